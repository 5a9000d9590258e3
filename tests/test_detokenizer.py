# SPDX-License-Identifier: Apache-2.0
"""The bounded detokenizers say what vLLM's say."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.detokenizer import (
    FastIncrementalDetokenizer,
    SlowIncrementalDetokenizer,
)

from sink_paged import detokenizer as bounded

POCKET = Path(__file__).parent.parent / "models" / "pocket"
TEXT = "Grüße, 世界! €5 🙂 – naïve café. Ünïcödé strings: π≈3.14159; done.\n"


def byte_level() -> PreTrainedTokenizerFast:
    """One token a byte."""
    return PreTrainedTokenizerFast(
        tokenizer_file=str(POCKET / "tokenizer.json"), bos_token="<s>"
    )


def merged() -> PreTrainedTokenizerFast:
    """Byte-level BPE whose tokens cut characters."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        [TEXT * 3, Path(__file__).read_text()],
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=["<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"
    )


def byte_fallback() -> PreTrainedTokenizerFast:
    """Llama 2's scheme: words that begin with a space, bytes for what is unknown."""
    pieces = ["<unk>", "<s>", "</s>"]
    pieces += [f"<0x{byte:02X}>" for byte in range(256)]
    pieces += [f"{space}{c}" for space in ("", "\u2581") for c in "abcdefghé世"]
    pieces.append("\u2581")
    vocab = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"
    )


TOKENIZERS = {"bytes": byte_level, "bpe": merged, "fallback": byte_fallback}
KINDS = [
    (FastIncrementalDetokenizer, bounded.FastStreamDetokenizer),
    (SlowIncrementalDetokenizer, bounded.SlowStreamDetokenizer),
]


def make_request(prompt: list[int], **params: Any) -> EngineCoreRequest:
    return EngineCoreRequest(
        request_id="0",
        prompt_token_ids=prompt,
        mm_features=None,
        sampling_params=SamplingParams(**params),
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )


def random_output(tokenizer: PreTrainedTokenizerFast, seed: int) -> list[int]:
    """Text, then noise, special tokens and long runs of either."""
    rng = random.Random(seed)
    size = len(tokenizer)
    output: list[int] = []
    while len(output) < 2500:
        kind = rng.randrange(4)
        if kind == 0:
            output += tokenizer.encode(TEXT, add_special_tokens=False)
        elif kind == 1:
            output += rng.choices(range(size), k=rng.randrange(1, 200))
        elif kind == 2:
            output += [tokenizer.bos_token_id] * rng.randrange(1, 200)
        else:
            output += [rng.randrange(size)] * rng.randrange(1, 300)
    return output


@pytest.fixture(params=TOKENIZERS, scope="module")
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return TOKENIZERS[request.param]()


@pytest.mark.parametrize(("vllm_class", "our_class"), KINDS)
@pytest.mark.parametrize("skip_special_tokens", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_same_deltas_and_text(
    tokenizer: PreTrainedTokenizerFast,
    vllm_class: type,
    our_class: type,
    skip_special_tokens: bool,
    seed: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Token by token, with a small text bound so that it is reached often."""
    monkeypatch.setattr(bounded, "TEXT_CHARS", 32)
    prompt = tokenizer.encode(TEXT, add_special_tokens=False) * 4
    params = {"skip_special_tokens": skip_special_tokens, "stop": ["never\0seen"]}
    for kind in (RequestOutputKind.DELTA, RequestOutputKind.FINAL_ONLY):
        request = make_request(prompt, output_kind=kind, **params)
        theirs = vllm_class(tokenizer, request)
        ours = our_class(vllm_class(tokenizer, request), request)
        delta = kind == RequestOutputKind.DELTA
        for token in random_output(tokenizer, seed):
            assert ours.update([token], False) == theirs.update([token], False)
            if delta:
                said = ours.get_next_output_text(False, True)
                assert said == theirs.get_next_output_text(False, True)
        last = theirs.get_next_output_text(True, delta)
        assert ours.get_next_output_text(True, delta) == last
        assert ours.num_output_tokens() == theirs.num_output_tokens()
        assert ours.output_token_ids == theirs.output_token_ids


@pytest.mark.parametrize(("vllm_class", "our_class"), KINDS)
@pytest.mark.parametrize("include", [True, False])
def test_stop_strings(
    vllm_class: type,
    our_class: type,
    include: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Found where it is, also when it crosses the place where text was cut."""
    monkeypatch.setattr(bounded, "TEXT_CHARS", 8)
    tokenizer = byte_level()
    for length in range(1, 60):
        request = make_request(
            [256], stop=["<END>", "END!"], include_stop_str_in_output=include
        )
        theirs = vllm_class(tokenizer, request)
        ours = our_class(vllm_class(tokenizer, request), request)
        output = list((b"ab<EN" * length)[:length] + b"<END> and more")
        stops = []
        for token in output:
            stops.append(ours.update([token], False))
            assert stops[-1] == theirs.update([token], False)
            if stops[-1]:
                break
        assert stops[-1] == "<END>"
        text = theirs.get_next_output_text(True, False)
        assert ours.get_next_output_text(True, False) == text
        assert ours.output_token_ids == theirs.output_token_ids


def test_a_character_that_the_prompt_leaves_open() -> None:
    """It is completed; the prompt is not said again, as vLLM would."""
    tokenizer = byte_level()
    request = make_request(list("hello €".encode()[:-1]))
    detokenizer = bounded.FastStreamDetokenizer(
        FastIncrementalDetokenizer(tokenizer, request), request
    )
    detokenizer.update(list("€ and so on".encode()[2:]), False)
    assert detokenizer.get_next_output_text(True, False) == "€ and so on"


@pytest.mark.parametrize("token", [65, 0x80, 256], ids=["text", "invalid", "special"])
def test_state_is_bounded(token: int) -> None:
    """After 20,000 tokens no more is kept, and no more decoded, than after 200."""
    request = make_request([1] * 500, output_kind=RequestOutputKind.DELTA)
    detokenizer = bounded.FastStreamDetokenizer(
        FastIncrementalDetokenizer(byte_level(), request), request
    )
    decoded = []
    decode = detokenizer._decode
    detokenizer._decode = lambda ids: decoded.append(len(ids)) or decode(ids)  # type: ignore
    for _ in range(20_000):
        detokenizer.update([token], False)
        detokenizer.get_next_output_text(False, True)
        assert len(detokenizer._pending) <= 2 * bounded.PENDING_TOKENS
        assert len(detokenizer.output_text) <= 2 * bounded.TEXT_CHARS
    assert sum(decoded) < 20_000 * 2 * bounded.OPEN_TOKENS
    assert max(decoded, default=0) <= 3 * bounded.PENDING_TOKENS


@pytest.mark.parametrize("name", TOKENIZERS)
def test_fastokens(name: str) -> None:
    """``VLLM_USE_FASTOKENS=1``: the same tokens, and our text is vLLM's."""
    command = [sys.executable, "-m", "tests.fastokens_cases", name]
    done = subprocess.run(
        command, cwd=POCKET.parents[1], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.endswith("passed\n")
