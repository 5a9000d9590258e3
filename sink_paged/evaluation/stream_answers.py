# SPDX-License-Identifier: Apache-2.0
"""A model's answers to the questions of ``stream_eval``, right or wrong.

Three ways, of one text:

- ``score_answers``: the text with the true answers in it is one prompt. An answer is
  right when each of its tokens has rank 1, which is what greedy decoding after the
  question would write, ties apart.
- ``generate_answers``: each answer is decoded greedily by an engine.
- ``ask_server``: each question is a request to a server with OpenAI's API, which is
  sent the whole conversation anew.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from sink_paged.evaluation.scoring import score_with_ranks
from sink_paged.evaluation.stream_eval import Piece, Style, generate, join
from sink_paged.evaluation.texts import special_prefix

if TYPE_CHECKING:
    from openai import OpenAI
    from vllm import LLM


class Question(NamedTuple):
    """Where an answer stands in a text of tokens: ``[start, end)``.

    Attributes:
        start: index of its first token.
        end: index behind its last.
        distance: lines back to the fact.
    """

    start: int
    end: int
    distance: int


@dataclass(frozen=True)
class TokenStream:
    """A stream as tokens, with the true answers in it."""

    tokens: list[int]
    questions: list[Question]

    def first(self, num_tokens: int) -> TokenStream:
        """The first ``num_tokens`` tokens, with the questions answered in them."""
        questions = [q for q in self.questions if q.end <= num_tokens]
        return TokenStream(self.tokens[:num_tokens], questions)


class Outcome(NamedTuple):
    """Whether one question was answered rightly.

    Attributes:
        position: tokens before the answer.
        distance: lines back to the fact.
        right: whether the answer was the true one.
    """

    position: int
    distance: int
    right: bool


def encode(tokenizer: Any, pieces: Iterable[Piece]) -> TokenStream:
    """Tokens of a stream, by a tokenizer of Hugging Face.

    The text is tokenized as a whole, as a model reads such text; the tokens of an
    answer are those that overlap it. A tokenizer that does not say where its tokens
    stand is given the pieces one by one.
    """
    pieces = list(pieces)
    if not tokenizer.is_fast:
        return _encode_apart(tokenizer, pieces)
    text, answers = join(pieces)
    encoding = tokenizer(
        text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
    prefix = special_prefix(tokenizer)
    starts, ends = np.asarray(encoding["offset_mapping"], np.int64).reshape(-1, 2).T
    first = np.searchsorted(ends, [a.start for a in answers], "right") + len(prefix)
    last = np.searchsorted(starts, [a.end for a in answers], "left") + len(prefix)
    return TokenStream(
        [*prefix, *encoding["input_ids"]],
        [
            Question(int(start), int(end), answer.distance)
            for start, end, answer in zip(first, last, answers, strict=True)
        ],
    )


def _encode_apart(tokenizer: Any, pieces: Iterable[Piece]) -> TokenStream:
    tokens = special_prefix(tokenizer)
    questions: list[Question] = []
    for piece in pieces:
        start = len(tokens)
        tokens += tokenizer(piece.text, add_special_tokens=False)["input_ids"]
        if piece.is_answer:
            questions.append(Question(start, len(tokens), piece.distance))
    return TokenStream(tokens, questions)


def tokens_per_line(tokenizer: Any, style: Style, every: int) -> float:
    """Tokens of a fact, its share of the questions included."""
    lines = 20 * every
    pieces = generate(0, style, lines, every, distance=1)
    return len(encode(tokenizer, pieces).tokens) / lines


def make_stream(
    tokenizer: Any,
    style: Style,
    seed: int,
    num_tokens: int,
    every: int = 10,
    distance: int | Sequence[int] = 20,
) -> TokenStream:
    """A stream of exactly ``num_tokens`` tokens; the rest as ``generate``."""
    lines = num_tokens / tokens_per_line(tokenizer, style, every)
    while True:
        lines = 1.1 * lines + every
        stream = encode(tokenizer, generate(seed, style, round(lines), every, distance))
        if len(stream.tokens) >= num_tokens:
            return stream.first(num_tokens)


def score_answers(
    llm: LLM, streams: Sequence[TokenStream], name: str = ""
) -> list[list[Outcome]]:
    """Outcomes of each stream, from one prefill of it with the true answers.

    Args:
        llm: of ``open_engine``.
        streams: read as far as they go.
        name: of the progress bar; none is shown without it.
    """
    scores = score_with_ranks(llm, [stream.tokens for stream in streams], name)
    return [
        [
            # The first token has no rank.
            Outcome(
                q.start, q.distance, bool((ranks[q.start - 1 : q.end - 1] == 1).all())
            )
            for q in stream.questions
        ]
        for stream, (_, ranks) in zip(streams, scores, strict=True)
    ]


def generate_answers(
    llm: LLM, stream: TokenStream, own: bool = False, name: str = ""
) -> tuple[list[Outcome], list[int]]:
    """Outcomes of a stream whose answers are decoded greedily.

    Args:
        llm: of ``open_engine``.
        stream: the text and the true answers.
        own: leave the model's own answers in the text, right or wrong, instead of the
            true ones.
        name: of the progress bar; none is shown without it.

    Returns:
        The outcomes, and the tokens of the text as it was in the end.
    """
    from tqdm import tqdm
    from vllm import SamplingParams

    tokens = list(stream.tokens)
    outcomes = []
    for question in tqdm(
        stream.questions, desc=name, unit="question", disable=not name
    ):
        params = SamplingParams(
            max_tokens=question.end - question.start,
            temperature=0,
            ignore_eos=True,
            detokenize=False,
        )
        prompt: Any = {"prompt_token_ids": tokens[: question.start]}
        output = llm.generate(prompt, params, use_tqdm=False)[0].outputs[0]
        answer = slice(question.start, question.end)
        given = list(output.token_ids)
        right = given == stream.tokens[answer]
        outcomes.append(Outcome(question.start, question.distance, right))
        if own:
            tokens[answer] = given
    return outcomes, tokens


def ask_server(
    client: OpenAI,
    model: str,
    style: Style,
    pieces: Iterable[Piece],
    api: Literal["chat", "completions"] = "chat",
    max_tokens: int = 32,
) -> Iterator[Outcome]:
    """Outcomes from a server, one by one.

    The first number of a reply counts as its answer; replies stay in the conversation
    as they are. Positions are the server's own counts of the prompt's tokens.

    Args:
        client: of the server.
        model: its name there.
        style: of the text.
        pieces: of ``generate``.
        api: ``chat``: a user's turn is the lines since the last question and the
            question, the assistant's turn the reply. ``completions``: one text that
            grows by lines, questions and replies.
        max_tokens: of a reply.

    Raises:
        openai.OpenAIError: where the server refuses or does not answer.
    """
    messages: list[Any] = []
    text = ""
    given = ""
    for piece in pieces:
        if not piece.is_answer:
            given = piece.text
            continue
        if api == "chat":
            messages.append(
                {"role": "user", "content": given.removeprefix(style.answer_end)}
            )
            response: Any = client.chat.completions.create(
                model=model, messages=messages, max_tokens=max_tokens, temperature=0
            )
            reply = response.choices[0].message.content or ""
            messages.append({"role": "assistant", "content": reply})
        else:
            text += given
            response = client.completions.create(
                model=model,
                prompt=text,
                max_tokens=max_tokens,
                temperature=0,
                stop=list(style.answer_end),
            )
            reply = response.choices[0].text
            text += reply
        number = re.search(r"\d+", reply)
        right = number is not None and number[0] == piece.text
        yield Outcome(response.usage.prompt_tokens, piece.distance, right)
