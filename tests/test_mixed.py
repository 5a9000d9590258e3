# SPDX-License-Identifier: Apache-2.0
"""An endless stream beside short requests that come and go."""

from __future__ import annotations

import random
from typing import Any

from vllm import LLM

from sink_paged.stream_state import TAIL_TOKENS
from sink_paged.token_rows import TRIM_TOKENS
from tests.engines import GOLDEN, core, engine, generate, greedy, pool_is_empty

SINKS = (4, 60)
LONG = {"prompt_token_ids": [256, *range(1, 90)]}
LONG_TOKENS = 3_000
SHARED = [256, *(i * 7 % 251 for i in range(200))]


def short_prompts(count: int) -> list[list[int]]:
    """Some share a beginning, which the prefix cache then holds."""
    rng = random.Random(5)
    return [
        [*SHARED[: rng.choice((1, 64, 150, 200))], *rng.choices(range(251), k=9)]
        for _ in range(count)
    ]


def step_until(llm: LLM, done: Any) -> dict[str, list[int]]:
    """Finished requests and their tokens, until ``done`` of them."""
    finished: dict[str, list[int]] = {}
    while not done(finished):
        for output in llm.llm_engine.step():
            if output.finished:
                finished[output.request_id] = list(output.outputs[0].token_ids)
    return finished


def test_each_is_as_if_alone() -> None:
    """Token for token; and nothing of any of them is left."""
    prompts = short_prompts(60)
    with engine(GOLDEN, SINKS, max_num_seqs=6) as llm:
        add = llm.llm_engine.add_request
        add("long", LONG, greedy(LONG_TOKENS))
        alone = step_until(llm, lambda finished: "long" in finished)["long"]
        expected = [
            list(generate(llm, [prompt], greedy(40))[0].outputs[0].token_ids)
            for prompt in prompts
        ]

        # The long stream comes third, so that it moves to other rows of the batch.
        waiting = list(enumerate(prompts))
        for index, prompt in (waiting.pop(0), waiting.pop(0)):
            add(str(index), {"prompt_token_ids": prompt}, greedy(40))
        llm.llm_engine.step()
        add("long", LONG, greedy(LONG_TOKENS))
        finished: dict[str, list[int]] = {}
        runner = core(llm).model_executor.driver_worker.worker.model_runner
        rows = set()
        while "long" not in finished or waiting:
            if waiting and llm.llm_engine.get_num_unfinished_requests() < 6:
                index, prompt = waiting.pop(0)
                add(str(index), {"prompt_token_ids": prompt}, greedy(40))
            for output in llm.llm_engine.step():
                if output.finished:
                    finished[output.request_id] = list(output.outputs[0].token_ids)
            for request_id, row in runner.input_batch.req_id_to_index.items():
                if request_id.startswith("long"):
                    rows.add(row)
                    state = runner.requests[request_id]
                    live = runner.input_batch.token_ids_cpu[row, :1]
                    assert len(live.ids) <= TRIM_TOKENS + 90
                    assert list.__len__(state.output_token_ids) < 2 * TAIL_TOKENS
                    assert len(state.block_ids[0]) <= len(
                        runner.input_batch.block_table.block_tables[0].block_table.np[0]
                    )
        finished |= step_until(
            llm, lambda _: not llm.llm_engine.has_unfinished_requests()
        )
        assert len(rows) > 1
        assert finished.pop("long") == alone
        assert [finished[str(index)] for index in range(len(prompts))] == expected
        assert pool_is_empty(llm)
        llm.llm_engine.step()
        assert not runner.requests


def test_penalties_past_the_window_are_those_of_stock_vllm() -> None:
    """With a window as long as the text; then across evictions, chunked or not."""
    settings = [
        {"repetition_penalty": 1.3},
        {"frequency_penalty": 0.6, "presence_penalty": 0.4},
        {"repetition_penalty": 0.9, "frequency_penalty": -0.2},
    ]
    prompts = short_prompts(len(settings) + 1)
    params = [*(greedy(30, **kinds) for kinds in settings), greedy(30)]

    def run(sinks: tuple[int, int] | None, **options: Any) -> list[list[int]]:
        with engine(GOLDEN, sinks, **options) as llm:
            return [
                list(out.outputs[0].token_ids) for out in generate(llm, prompts, params)
            ]

    stock = run(None, max_model_len=256)
    assert run((4, 251), max_model_len=256) == stock
    evicting = run(SINKS)
    assert run(SINKS, max_num_batched_tokens=16, max_num_seqs=3) == evicting
    assert evicting != stock
