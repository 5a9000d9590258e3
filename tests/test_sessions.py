# SPDX-License-Identifier: Apache-2.0
"""Prompts that arrive in pieces (``StreamingInput``): sessions on streams."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from prometheus_client import REGISTRY
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.engine.protocol import StreamingInput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

POCKET = Path(__file__).parent.parent / "models" / "pocket"
WRITTEN = 6
PIECES = [
    [256, *(7919 * i * i % 251 for i in range(1, 150))],
    [7919 * i * i % 251 for i in range(150, 190)],
    [7919 * i * i % 251 for i in range(190, 2500)],  # more than the pool holds
]
SECONDS = 60
pytestmark = pytest.mark.slow


def asked() -> SamplingParams:
    return SamplingParams(
        max_tokens=WRITTEN,
        temperature=0,
        ignore_eos=True,
        output_kind=RequestOutputKind.DELTA,
    )


async def write(engine: AsyncLLM, name: str, prompt: list[int]) -> list[int]:
    """What an ordinary request writes."""
    written: list[int] = []
    inputs = {"prompt_token_ids": prompt}
    async for output in engine.generate(inputs, asked(), name):
        written += output.outputs[0].token_ids
    return written


async def converse(engine: AsyncLLM, name: str, pause: float) -> list[list[int]]:
    """What a session writes after each piece, the next of which comes then.

    Args:
        engine: of the session.
        name: of the session.
        pause: seconds from the last answer to the end of the input.
    """
    answers: list[list[int]] = []
    answered = asyncio.Event()

    async def pieces() -> AsyncIterator[StreamingInput]:
        for piece in PIECES:
            answers.append([])
            answered.clear()
            # A copy: vLLM appends the later pieces to the first.
            yield StreamingInput(prompt={"prompt_token_ids": [*piece]})
            await answered.wait()
        await asyncio.sleep(pause)

    async for output in engine.generate(pieces(), asked(), name):
        for choice in output.outputs:
            answers[-1] += choice.token_ids
        if len(answers[-1]) == WRITTEN:
            answered.set()
    return answers


def gauge(name: str) -> float:
    value = REGISTRY.get_sample_value(name, {"model_name": str(POCKET), "engine": "0"})
    assert value is not None
    return value


def test_sessions() -> None:
    """A session writes what its text as one prompt gives, and leaves nothing behind.

    The last token of an answer is not read again: the next piece takes its place.
    """

    async def run() -> None:
        problems: list[object] = []
        asyncio.get_running_loop().set_exception_handler(
            lambda _, context: problems.append(context.get("exception", context))
        )
        engine = AsyncLLM.from_engine_args(
            AsyncEngineArgs(
                str(POCKET),
                dtype="float32",
                enforce_eager=True,
                block_size=16,
                num_gpu_blocks_override=60,
                kv_cache_memory_bytes=1 << 26,
                max_num_seqs=4,
                max_num_batched_tokens=64,
                max_model_len=128,
                additional_config={"sink_paged": {}},
            )
        )
        try:
            text: list[int] = []
            alone: list[list[int]] = []
            for piece in PIECES:
                text += piece
                written = write(engine, f"alone {len(text)}", text)
                alone.append(await asyncio.wait_for(written, SECONDS))
                text += alone[-1][:-1]
            for number in range(4):  # as many as may run at once
                pause = 0.0 if number == 0 else 0.5
                session = converse(engine, f"session {number}", pause)
                assert await asyncio.wait_for(session, SECONDS) == alone
            await asyncio.sleep(0.5)
            after = write(engine, "after", PIECES[0])
            assert await asyncio.wait_for(after, SECONDS) == alone[0]
            assert not problems
            for name in ("num_requests_running", "num_requests_waiting"):
                assert gauge(f"vllm:{name}") == 0
            assert gauge("vllm:sink_paged_blocks_pinned") == 0
        finally:
            engine.shutdown()

    asyncio.run(run())
