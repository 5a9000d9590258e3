# SPDX-License-Identifier: Apache-2.0
"""A dedicated sink token: in front of every text, and seen by no client."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from vllm import LLM, RequestOutput, SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.logprobs import FlatLogprobs
from vllm.v1.engine import EngineCoreRequest

from sink_paged import SinkConfig
from sink_paged.sink_token import MARK_KEY, Mark, client_request, prepend
from tests.engines import GOLDEN, core, engine, generate, greedy
from tests.servers import MODEL, running_server
from tests.test_config import make_config, parse, stream_of

SINK = 258
RESIDENT = 128
TEXT = [256, *(7919 * i * i % 251 for i in range(1, 300))]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    settings = {"sink_tokens": 1, "window_tokens": 63, "sink_token_id": SINK}
    with engine(
        GOLDEN,
        None,
        max_model_len=RESIDENT,
        max_num_batched_tokens=128,  # TEXT is read in chunks
        additional_config={"sink_paged": settings},
    ) as llm:
        yield llm


def pair(llm: LLM, text: list[int], params: SamplingParams) -> list[RequestOutput]:
    """The text as a client sends it, and with the sink token of its own."""
    return generate(llm, [text, [SINK, *text]], params)


def test_the_engine_reads_it_first(llm: LLM) -> None:
    llm_engine = llm.llm_engine
    for name, text in (("plain", TEXT), ("own", [SINK, *TEXT])):
        llm_engine.add_request(name, {"prompt_token_ids": text}, greedy(2))
    requests = core(llm).scheduler.requests.values()
    assert [list(r.prompt_token_ids) for r in requests] == [[SINK, *TEXT]] * 2
    while llm_engine.has_unfinished_requests():
        llm_engine.step()


def test_output_is_that_of_the_token_in_the_prompt(llm: LLM) -> None:
    plain, own = pair(llm, TEXT, greedy(200, logprobs=1))
    assert plain.prompt_token_ids == TEXT
    assert own.prompt_token_ids == [SINK, *TEXT]
    assert plain.outputs[0].token_ids == own.outputs[0].token_ids
    assert len(plain.outputs[0].token_ids) == 200
    assert plain.outputs[0].cumulative_logprob == pytest.approx(
        own.outputs[0].cumulative_logprob, abs=1e-3
    )


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("length", [1, 2, len(TEXT)])
def test_prompt_logprobs_line_up(llm: LLM, length: int, flat: bool) -> None:
    text = TEXT[:length]
    params = greedy(1, prompt_logprobs=2, flat_logprobs=flat)
    plain, own = pair(llm, text, params)
    assert plain.prompt_logprobs is not None and own.prompt_logprobs is not None
    assert isinstance(plain.prompt_logprobs, FlatLogprobs) == flat
    ours, theirs = list(plain.prompt_logprobs), list(own.prompt_logprobs)
    assert len(ours) == length
    assert not ours[0]
    for token, mine, reference in zip(text[1:], ours[1:], theirs[2:], strict=True):
        assert mine.keys() == reference.keys() and token in mine
        assert mine[token].logprob == pytest.approx(reference[token].logprob, abs=1e-4)


def test_cached_tokens_are_the_clients(llm: LLM) -> None:
    assert llm.reset_prefix_cache()
    first, own = (generate(llm, [text], greedy(1))[0] for text in (TEXT, [SINK, *TEXT]))
    again = generate(llm, [TEXT], greedy(1))[0]
    assert first.num_cached_tokens == 0
    assert own.num_cached_tokens is not None and own.num_cached_tokens > 200
    assert again.num_cached_tokens == own.num_cached_tokens - 1 < len(TEXT)
    assert first.num_cache_creation_tokens is not None
    assert first.num_cache_creation_tokens <= len(TEXT)


def test_default_of_max_tokens_counts_the_clients_prompt(llm: LLM) -> None:
    params = SamplingParams(max_tokens=None, ignore_eos=True, detokenize=False)
    output = generate(llm, [TEXT[:10]], params)[0].outputs[0]
    assert len(output.token_ids) == RESIDENT - 10


def test_several_outputs(llm: LLM) -> None:
    params = SamplingParams(
        n=3, max_tokens=5, seed=1, detokenize=False, prompt_logprobs=0
    )
    output = generate(llm, [TEXT], params)[0]
    assert len({tuple(o.token_ids) for o in output.outputs}) == 3
    assert output.prompt_token_ids == TEXT
    assert output.prompt_logprobs is not None
    assert len(output.prompt_logprobs) == len(TEXT)


def make_request(**changes: Any) -> EngineCoreRequest:
    fields: dict[str, Any] = {
        "request_id": "r",
        "prompt_token_ids": [5, 6],
        "mm_features": None,
        "sampling_params": SamplingParams(),
        "pooling_params": None,
        "arrival_time": 0.0,
        "lora_request": None,
        "cache_salt": None,
        "data_parallel_rank": None,
    }
    return EngineCoreRequest(**(fields | changes))


def test_the_callers_prompt_and_arguments_are_left_alone() -> None:
    tokens, extra = [5, 6], {"mine": 1}
    request = make_request(
        prompt_token_ids=tokens, sampling_params=SamplingParams(extra_args=extra)
    )
    prepend(request, SINK)
    assert request.prompt_token_ids == [SINK, 5, 6]
    assert (tokens, extra) == ([5, 6], {"mine": 1})
    assert client_request(request).prompt_token_ids == tokens
    assert request.prompt_token_ids == [SINK, 5, 6]


@pytest.mark.parametrize("value", [1, True, "PREPENDED", Mark.PREPENDED.value])
def test_a_client_cannot_pretend(value: Any) -> None:
    request = make_request(sampling_params=SamplingParams(extra_args={MARK_KEY: value}))
    assert client_request(request) is request


def test_a_prompt_in_pieces_is_refused() -> None:
    with pytest.raises(VLLMValidationError, match="as a whole"):
        prepend(make_request(resumable=True), SINK)


@pytest.mark.skipif(
    not hasattr(SamplingParams, "prompt_logprob_start"), reason="of vLLM 0.32"
)
@pytest.mark.parametrize(
    "asked",
    [{"prompt_logprob_token_ids": [[1], [2]]}, {"prompt_logprob_start": 0}],
    ids=lambda asked: next(iter(asked)),
)
def test_scores_by_place_are_refused(asked: dict[str, Any]) -> None:
    """vLLM looks them up in the prompt that it knows, which begins a token earlier."""
    sampling = SamplingParams()
    for name, value in asked.items():
        setattr(sampling, name, value)
    with pytest.raises(VLLMValidationError, match="with sink_token_id"):
        prepend(make_request(sampling_params=sampling), SINK)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sink_token_id": -1}, r"sink_token_id must be in \[0, "),
        ({"sink_token_id": True}, "sink_token_id must be an integer"),
        ({"sink_token_id": "5"}, "sink_token_id must be an integer"),
        ({"sink_token_id": 5, "sink_tokens": 0}, "needs sink_tokens of at least 1"),
        ({"sink_token_id": 320}, r"320 is not in the .* vocabulary.*\[0, 319\]"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_config(settings)


def test_settings_and_flags() -> None:
    assert stream_of(make_config({"sink_token_id": 319})).sink_token_id == 319
    assert stream_of(make_config({})).sink_token_id is None
    assert SinkConfig(sink_token_id=0).sink_token_id == 0
    flags = ("--sink-eviction", "--sink-tokens", "1", "--sink-token-id", "258")
    assert parse(*flags).additional_config == {
        "sink_paged": {"sink_tokens": 1, "sink_token_id": 258}
    }
    with pytest.raises(ValueError, match="--sink-token-id need --sink-eviction"):
        parse("--sink-token-id", "258")


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    log = tmp_path_factory.mktemp("server") / "log"
    flags = (
        f"--enforce-eager --max-model-len {RESIDENT} --sink-tokens 1 "
        f"--sink-token-id {SINK} --enable-prompt-tokens-details"
    )
    with running_server(log, flags) as url:
        yield openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=120)


def complete(client: openai.OpenAI, prompt: Any, **options: Any) -> Any:
    options = {"temperature": 0, "max_tokens": 5} | options
    return client.completions.create(model=str(MODEL), prompt=prompt, **options)


PROMPT = "def read(path):\n    return open(path)\n" * 10
TOKENS = [256, *PROMPT.encode()]  # of the bundled model's tokenizer


def test_completions_report_the_clients_prompt(client: openai.OpenAI) -> None:
    """Usage, echo, logprobs and token ids; the engine's logprobs are with the sink."""
    options: dict[str, Any] = {
        "echo": True,
        "logprobs": 1,
        "extra_body": {"ignore_eos": True},
    }
    by_text = complete(client, PROMPT, **options)
    own = complete(client, [SINK, *TOKENS], **options)
    assert by_text.usage.prompt_tokens == len(TOKENS)
    assert own.usage.prompt_tokens == len(TOKENS) + 1
    choice, reference = by_text.choices[0], own.choices[0]
    assert choice.text.startswith(PROMPT)
    ours, theirs = choice.logprobs, reference.logprobs
    assert len(ours.tokens) == len(ours.token_logprobs) == len(TOKENS) + 5
    assert ours.token_logprobs[0] is None
    assert ours.tokens[1:] == theirs.tokens[2:]
    assert ours.token_logprobs[1:] == pytest.approx(theirs.token_logprobs[2:], abs=1e-3)
    with_ids = complete(client, PROMPT, extra_body={"return_token_ids": True})
    assert with_ids.choices[0].prompt_token_ids == TOKENS


def test_streamed_echo(client: openai.OpenAI) -> None:
    events = complete(
        client,
        PROMPT,
        echo=True,
        logprobs=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    text, logprobs, usage = "", [], None
    for event in events:
        for choice in event.choices:
            text += choice.text
            logprobs += choice.logprobs.token_logprobs if choice.logprobs else []
        usage = event.usage or usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(TOKENS), 5)
    assert text.startswith(PROMPT)
    assert len(logprobs) == len(TOKENS) + 5
    assert logprobs[0] is None and None not in logprobs[1:]


def test_chat_counts_are_the_clients(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": PROMPT}]
    usages = [
        client.chat.completions.create(
            model=str(MODEL), messages=messages, max_tokens=3, temperature=0
        ).usage
        for _ in range(2)
    ]
    rendered = client.post(
        str(client.base_url).replace("/v1/", "/tokenize"),
        body={"model": str(MODEL), "messages": messages},
        cast_to=dict[str, Any],
    )
    for usage in usages:
        assert usage is not None
        assert usage.prompt_tokens == rendered["count"]
    details = usages[1].prompt_tokens_details if usages[1] else None
    assert details is not None
    assert 200 < (details.cached_tokens or 0) < rendered["count"]
