# SPDX-License-Identifier: Apache-2.0
"""Engines on model runner V2, in a process of their own: ``python -m tests.v2_cases``.

vLLM has a V2 runner for the CPU, which wants a Triton that compiles for it. Here its
kernels run in Triton's interpreter, and our CUDA backend does too where a case says so.
Everything else, scheduler, requests, block tables, sampler, is what a GPU has.

As a plugin of pytest it makes other tests run on V2: ``-p tests.v2_cases -m family``.
"""

import copy
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple

os.environ.update(
    TRITON_INTERPRET="1",
    VLLM_USE_V2_MODEL_RUNNER="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_NO_USAGE_STATS="1",
    VLLM_LOGGING_LEVEL="ERROR",
    VLLM_MAX_BAD_WORDS_TOTAL_TOKENS="64",
    HF_HUB_OFFLINE="1",
)

import pytest  # noqa: E402
import torch  # noqa: E402
import triton.backends  # noqa: E402
from triton.backends import Backend
from triton.backends.driver import DriverBase
from triton.runtime.interpreter import InterpreterBuilder


class Interpreter(DriverBase):
    """What vLLM asks of Triton's backend for the CPU."""

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError

    def get_current_target(self) -> Any:
        raise NotImplementedError

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError


def load_masked(self: Any, pointers: Any, mask: Any, *args: Any) -> Any:
    """A masked load; what compares scalars becomes a block of integers there."""
    mask.data = mask.data.astype(bool)
    return LOAD_MASKED(self, pointers, mask, *args)


def without_libdevice() -> None:
    """The sampler's kernels of vLLM 0.29 and 0.30 call what the interpreter lacks."""
    from triton import language as tl
    from vllm.v1.worker.gpu.sample import gumbel

    if hasattr(gumbel, "tldevice"):
        gumbel.tldevice = SimpleNamespace(log1p=lambda x: tl.log(1.0 + x))


LOAD_MASKED = InterpreterBuilder.create_masked_load
InterpreterBuilder.create_masked_load = load_masked  # type: ignore[method-assign]
triton.backends.backends["cpu"] = Backend(compiler=None, driver=Interpreter)  # type: ignore[arg-type]
if "--cuda-backend" in sys.argv:
    from sink_paged import platforms

    platforms.CPU = platforms.CPU._replace(backend=platforms.CUDA.backend)
    torch.cuda.get_device_capability = lambda *_: (9, 0)  # type: ignore[assignment]
    platforms.current_platform.has_device_capability = lambda *_, **__: True

from vllm.sampling_params import RequestOutputKind  # noqa: E402
from vllm.v1.attention.backends.utils import PAD_SLOT_ID  # noqa: E402
from vllm.v1.sample.ops import topk_topp_sampler  # noqa: E402
from vllm.v1.worker.gpu import model_runner  # noqa: E402

from sink_paged.attention import flash  # noqa: E402
from sink_paged.config import MAX_STREAM_TOKENS  # noqa: E402
from sink_paged.kv_cache import group_spec  # noqa: E402
from sink_paged.runner_v2 import requests  # noqa: E402
from tests.attention_batches import window_attention  # noqa: E402
from tests.engines import (  # noqa: E402
    GOLDEN,
    async_scheduling,
    check_prefix_hits,
    core,
    drafted_error,
    eight_bit_losses,
    engine,
    first_near_tie,
    flash_losses,
    generate,
    greedy,
    kv_cache_manager,
    pool_is_empty,
    prompt_losses,
    worst,
)
from tests.stream_checks import check_groups  # noqa: E402
from tests.v2_speculation import CASES as SPECULATION  # noqa: E402
from tests.v2_speculation import (  # noqa: E402
    GOLD,
    IDS,
    PENALTIES,
    SURE,
    WINDOW,
    runner_of,
)

without_libdevice()
requests.SPARE_TOKENS = 32  # rows slide often


def losses_and_tokens(num_tokens: int = 700, num_written: int = 150) -> None:
    """The 2023 code's losses, read in chunks, and its greedy tokens."""
    reference = GOLD["res"]["greedy_4+60"]
    tie = first_near_tie(reference["top2_gap"])
    assert tie > 40
    ids = IDS[:num_tokens]
    with engine(GOLDEN, WINDOW, max_num_batched_tokens=128) as llm:
        runner = runner_of(llm)
        assert type(runner).__name__ == "StreamCPUModelRunner"
        row_tokens = requests.TAIL + requests.SPARE_TOKENS
        assert runner.req_states.all_token_ids.gpu.shape[1] == row_tokens
        read, written = generate(
            llm,
            [ids, IDS[: reference["prompt_len"]]],
            [greedy(1, prompt_logprobs=0), greedy(num_written)],
        )
        assert worst(
            prompt_losses(read), GOLD["res"]["4+60"]["nll"][: len(ids) - 1]
        ) < (1e-3)
        tokens = list(written.outputs[0].token_ids)
        assert tokens[:tie] == reference["tokens"][:tie]
        assert len(tokens) == num_written
        assert pool_is_empty(llm)
        assert not runner.req_states.unread
        assert not runner.req_states.texts


def cuda_backend() -> None:
    """The same by our CUDA backend, shorter: the interpreter takes its time."""
    losses_and_tokens(num_tokens=120, num_written=56)


def eight_bit_cache() -> None:
    """An fp8 cache by our CUDA backend: a float32 one of the numbers that it stored."""
    losses = eight_bit_losses(IDS[:100])
    assert worst(losses["replayed"], losses["plain"]) > 0.02
    assert worst(losses["replayed"], losses["fp8"]) < 1e-4


@contextmanager
def flash_queries() -> Iterator[list[int]]:
    """Stand in for FlashAttention; most tokens of a request, of each call."""
    queries: list[int] = []

    def attend_window(query: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        queries.append(kwargs["max_query_len"])
        return window_attention(query, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flash, "attend_window", attend_window)
        patch.setattr(flash, "is_available", lambda: True)
        yield queries


def flash_attention_route() -> None:
    """Chunks of a prompt through FlashAttention, single tokens not: the same losses."""
    with flash_queries() as queries:
        losses = flash_losses(IDS[:150], dtype="float16")
    layers = 3
    assert queries == [48] * 3 * layers + [6] * layers
    assert worst(losses["Triton"], losses["FlashAttention"]) < 0.03


def flash_attention_drafts() -> None:
    """Verified tokens, not by FlashAttention, beside the same ones read by it."""
    with flash_queries() as queries:
        assert drafted_error(24, dtype="float16") < 0.03
    assert queries and min(queries) > 4


class Text(NamedTuple):
    """Written tokens, and how far they are determined in float32."""

    tokens: list[int]
    sure: int


def gaps_of(written: Any) -> list[float]:
    """Log-probability of each token's best alternative below that of the best."""
    gaps = []
    for entry in written.logprobs:
        best, second = sorted(entry.values(), key=lambda item: item.rank)[:2]
        gaps.append(best.logprob - second.logprob)
    return gaps


def sampled(llm: Any, num_tokens: int) -> list[Text]:
    """Texts by everything that looks back: penalties, bad words, seeds."""
    bad = greedy(num_tokens, logprobs=2)
    first = generate(llm, [IDS[:40]], greedy(12))[0].outputs[0].token_ids
    bad._bad_words_token_ids = [list(first[4:6]), list(first[8:11])]
    params = [
        greedy(min(num_tokens, 50), logprobs=2, **PENALTIES),
        bad,
        greedy(num_tokens, logprobs=2, temperature=1.0, seed=3),
        greedy(num_tokens, logprobs=2, min_tokens=20),
    ]
    prompts = [IDS[:200], IDS[:40], IDS[:90], IDS[5:60]]
    texts = []
    for output, asked in zip(generate(llm, prompts, params), params, strict=True):
        tokens = list(output.outputs[0].token_ids)
        gaps = gaps_of(output.outputs[0])
        sure = next((i for i, gap in enumerate(gaps) if gap < SURE), len(gaps))
        texts.append(Text(tokens, 20 if asked.seed else sure))
    return texts


def check_equal(mine: list[Text], theirs: list[Text]) -> None:
    for text, other in zip(mine, theirs, strict=True):
        assert other.sure > 10
        assert text.tokens[: other.sure] == other.tokens[: other.sure]
        assert len(text.tokens) == len(other.tokens)


PROCESSED = {"logprobs_mode": "processed_logprobs", "max_num_batched_tokens": 64}


def run_sampler_without_requests(llm: Any) -> None:
    """What vLLM does on a GPU when it measures the memory that a step takes."""
    runner = runner_of(llm)
    hidden_size = llm.model_config.get_hidden_size()
    with pytest.MonkeyPatch.context() as patch:
        gpu = SimpleNamespace(is_cpu=lambda: False)
        patch.setattr(model_runner, "current_platform", gpu, raising=False)
        # Its kernel uses what the interpreter lacks.
        patch.setattr(topk_topp_sampler, "HAS_TRITON", False)
        runner._dummy_sampler_run(torch.randn(3, hidden_size))


def sampling() -> None:
    """The same tokens as stock vLLM, where that has the whole text at hand."""
    with engine(GOLDEN, None, **PROCESSED) as llm:
        stock = sampled(llm, 80)
    with engine(GOLDEN, (4, 251), **PROCESSED) as llm:
        run_sampler_without_requests(llm)
        check_equal(sampled(llm, 80), stock)


def bad_words() -> None:
    """A word that comes late, when a row has slid along its text, and is then bad."""
    count = 120
    assert count > 2 * 32
    with engine(GOLDEN, WINDOW) as llm:
        text = list(generate(llm, [IDS[:40]], greedy(count))[0].outputs[0].token_ids)
        pairs = [tuple(text[i : i + 2]) for i in range(count - 1)]
        late = next(i for i in range(100, count - 1) if pairs.index(pairs[i]) == i)
        params = greedy(count)
        params._bad_words_token_ids = [list(pairs[late])]
        other = list(generate(llm, [IDS[:40]], params)[0].outputs[0].token_ids)
    assert other[: late + 1] == text[: late + 1]
    assert other[late + 1] != text[late + 1]


def slots_of_far_positions() -> None:
    """Where tokens at the end of int32, and at the start, are written."""
    with engine(GOLDEN, WINDOW, block_size=16) as llm:
        tables = runner_of(llm).block_tables
        policy = group_spec(kv_cache_manager(llm).kv_cache_config.kv_cache_groups[0])
        table = tables.block_tables[0].gpu
        columns = table.shape[1]
        table[:2] = torch.randperm(2 * columns).view(2, columns).int()
        far = [MAX_STREAM_TOKENS - 1 - i for i in range(300)][::-1]
        texts = {1: range(40), 0: far, -1: range(5)}  # by row; the last is padding
        sizes = [len(text) for text in texts.values()]
        slots = tables.compute_slot_mappings(
            torch.tensor(list(texts), dtype=torch.int32),
            torch.tensor([0, *sizes]).cumsum(0).int(),
            torch.tensor([i for text in texts.values() for i in text]),
            sum(sizes) + 3,
        )
        expected = [
            table[row, policy.blocks.column(i // 16, columns)] * 16 + i % 16
            if row >= 0
            else PAD_SLOT_ID
            for row, text in texts.items()
            for i in text
        ]
        assert slots[0].tolist() == [*expected, *[PAD_SLOT_ID] * 3]


def prefix_cache_hits() -> None:
    """After eviction: the same tokens as with a cold cache."""
    with engine(GOLDEN, WINDOW, block_size=16, max_num_batched_tokens=64) as llm:
        check_prefix_hits(llm, IDS[:200], 16)


def converse(llm: Any, pieces: list[list[int]], num_written: int) -> list[list[int]]:
    """What a prompt in pieces gets after each, the next of which comes then."""
    front = llm.llm_engine
    params = greedy(num_written, output_kind=RequestOutputKind.DELTA)
    answers: list[list[int]] = []
    name = ""
    for number, piece in enumerate([*pieces, [0]]):  # the last only ends the session
        resumable = number < len(pieces)
        request = front.input_processor.process_inputs(
            name or "session",
            {"prompt_token_ids": [*piece]},
            params,
            supported_tasks=("generate",),
            resumable=resumable,
        )
        if not name:
            front.input_processor.assign_request_id(request)
            name = request.request_id
        request.external_req_id = "session"
        front.output_processor.add_request(request, None, None, 0)
        # In a server the core has a list of its own; both append to theirs.
        sent = copy.copy(request)
        sent.prompt_token_ids = [*request.prompt_token_ids]
        front.engine_core.add_request(sent)
        if not resumable:
            front.step()
            break
        answers.append([])
        while len(answers[-1]) < num_written:
            for output in front.step():
                answers[-1] += output.outputs[0].token_ids
    return answers


def sessions() -> None:
    """A prompt in pieces gets what its text as one prompt gets, and leaves nothing."""
    pieces = [IDS[:90], IDS[90:100], IDS[100:300]]
    with pytest.MonkeyPatch.context() as patch:
        async_scheduling(patch)
        options = {"max_num_batched_tokens": 64, "async_scheduling": True}
        with engine(GOLDEN, WINDOW, **options) as llm:
            assert type(core(llm).scheduler).__name__ == "AsyncScheduler"
            text: list[int] = []
            for piece, answer in zip(pieces, converse(llm, pieces, 5), strict=True):
                text += piece
                written = generate(llm, [text], greedy(5, logprobs=2))[0].outputs[0]
                sure = next(
                    (i for i, gap in enumerate(gaps_of(written)) if gap < SURE), 5
                )
                assert sure > 1
                assert answer[:sure] == list(written.token_ids)[:sure]
                text += answer[:-1]  # the last is not read: the next piece follows
            assert pool_is_empty(llm)


def several_groups() -> None:
    """Layers that keep different tokens: three KV-cache groups, each with its table."""
    check_groups()


def several_groups_cuda() -> None:
    """The same by our CUDA backend, shorter."""
    check_groups(num_tokens=120, num_written=40)


def preemption() -> None:
    """A pool too small for all: preempted and resumed, each text is as it is alone."""
    with engine(GOLDEN, WINDOW, block_size=16, **PROCESSED) as llm:
        alone = sampled(llm, 80)
    with engine(
        GOLDEN, WINDOW, block_size=16, num_gpu_blocks_override=18, **PROCESSED
    ) as llm:
        scheduler = core(llm).scheduler
        preempted = []
        preempt = scheduler._preempt_request

        def counted(request: Any, *args: Any, **kwargs: Any) -> Any:
            preempted.append(request.num_output_tokens)
            return preempt(request, *args, **kwargs)

        scheduler._preempt_request = counted
        check_equal(sampled(llm, 80), alone)
        assert max(preempted) > 0
        assert pool_is_empty(llm)


CASES: dict[str, Callable[[], None]] = {
    case.__name__: case
    for case in (
        losses_and_tokens,
        cuda_backend,
        eight_bit_cache,
        flash_attention_route,
        flash_attention_drafts,
        sampling,
        bad_words,
        slots_of_far_positions,
        prefix_cache_hits,
        several_groups,
        several_groups_cuda,
        sessions,
        preemption,
        *SPECULATION,
    )
}

if __name__ == "__main__":
    for name in sys.argv[1:]:
        if not name.startswith("--"):
            CASES[name]()
    print("passed")
