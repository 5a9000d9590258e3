# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters past the window, against the model with the adapter merged into it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import openai

from tests.chat.api import ADAPTER, BASE, BLOCK, PROMPT, WINDOW, complete, no_hits
from tests.chat.models import merge_adapter
from tests.engines import engine, generate, greedy, prompt_losses, worst

SINKS = (4, WINDOW - 5)
"""What the server's flags come to."""


def losses(answer: Any) -> list[float]:
    """Of a prompt's tokens from the second on, as the server reports them."""
    entries, ids = answer.prompt_logprobs, answer.prompt_token_ids
    pairs = zip(entries[1:], ids[1:], strict=True)
    return [-entry[str(token)]["logprob"] for entry, token in pairs]


def test_an_adapter_is_its_merged_model(
    client: openai.OpenAI, adapter: Path, tmp_path: Path
) -> None:
    options = {"max_tokens": 2 * WINDOW, "return_token_ids": True, "prompt_logprobs": 0}
    options["logprobs"] = 2
    served = {
        name: complete(client, model=name, **options).choices[0]
        for name in (BASE, ADAPTER)
    }
    ids = served[ADAPTER].prompt_token_ids
    with engine(
        merge_adapter(adapter, tmp_path / "merged"), SINKS, block_size=BLOCK
    ) as llm:
        params = greedy(2 * WINDOW, prompt_logprobs=0, logprobs=2)
        merged = generate(llm, [ids], params)[0]
    expected = prompt_losses(merged)
    assert worst(losses(served[ADAPTER]), expected) < 1e-3
    assert worst(losses(served[BASE]), expected) > 1
    answer = merged.outputs[0]
    pairs = zip(served[ADAPTER].token_ids, answer.token_ids, strict=True)
    unlike = [step for step, (left, right) in enumerate(pairs) if left != right]
    seen = served[ADAPTER].logprobs.top_logprobs
    assert not unlike, f"{unlike[0]}: {seen[unlike[0]]}, {answer.logprobs[unlike[0]]}"
    assert served[BASE].token_ids != served[ADAPTER].token_ids


def test_cached_blocks_are_those_of_one_adapter(client: openai.OpenAI) -> None:
    """One asks behind the other; each finds its own text, and answers as if alone."""
    salt = no_hits()
    found = {BASE: 0, ADAPTER: 0}
    for text in (PROMPT, PROMPT + "x = 1\n"):
        for name in found:
            answer = complete(client, text, model=name, max_tokens=WINDOW, **salt)
            anew = complete(client, text, model=name, max_tokens=WINDOW, **no_hits())
            cached = answer.usage.prompt_tokens_details.cached_tokens
            assert found[name] <= cached <= found[name] + BLOCK
            assert answer.choices[0].text == anew.choices[0].text
            found[name] = len(PROMPT) // BLOCK * BLOCK
