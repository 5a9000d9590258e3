# SPDX-License-Identifier: Apache-2.0
"""StreamEval (Xiao et al., 2023, section 4.3): questions about a text that goes on.

The text is made of lines, each a fact: a key and a value. After every few lines comes
a question, what the value of a key was, and its answer. The fact stands a known number
of lines back, its distance. A question is answered from the cache alone, so what can be
answered is what lies within the window.

The paper's data was not released; this is a generator of such text. Equal arguments
give equal text, on any machine.
"""

from __future__ import annotations

import string
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from random import Random

_ADJECTIVES = """
amber ancient autumn bitter blue bold brave brief bright broad calm careful clean
clear clever cold copper coral crimson curious damp dark distant dry early eager empty
faint fast fine flat fresh gentle golden grand green grey happy heavy hidden hollow
honest humble icy idle ivory jolly kind late light lively lonely loud lucky mellow
misty modest narrow noble north olive patient plain polite proud purple quick quiet
rapid
"""
_NOUNS = """
anchor apple arrow badger barrel basket beacon bell bridge bucket button cabin candle
canyon carpet castle cedar circle cloud comet cottage desert dolphin engine falcon
feather fiddle field forest fountain garden glacier hammer harbour hawk island jacket
kettle ladder lantern lemon lion maple marble meadow mirror mountain needle ocean
orchard otter paddle pepper pillow planet pocket prairie rabbit ribbon river rocket
saddle salmon
"""


@dataclass(frozen=True)
class Style:
    """How facts and questions read.

    Attributes:
        name: of the style.
        fact: a line, of ``{key}`` and ``{value}``.
        question: about ``{key}``; the value follows at once.
        answer_end: what follows an answer.
        key_parts: a key is one string of each.
        key_joint: between the parts of a key.
        value_digits: digits of a value.
    """

    name: str
    fact: str
    question: str
    answer_end: str
    key_parts: tuple[Sequence[str], ...]
    key_joint: str
    value_digits: int

    @property
    def unique_lines(self) -> int:
        """Lines in a row whose keys all differ; also the largest distance."""
        return prod(map(len, self.key_parts)) // 2

    def draw_key(self, random: Random) -> str:
        """Any key."""
        return self.key_joint.join(random.choice(part) for part in self.key_parts)

    def draw_value(self, random: Random) -> str:
        """Any value."""
        return str(
            random.randrange(10 ** (self.value_digits - 1), 10**self.value_digits)
        )


STYLES = {
    style.name: style
    for style in (
        # About ten tokens a line where a token is a byte.
        Style(
            name="short",
            fact="{key}: {value}\n",
            question="? {key}: ",
            answer_end="\n",
            key_parts=(string.ascii_lowercase,) * 3,
            key_joint="",
            value_digits=4,
        ),
        Style(
            name="paper",
            fact="The code on shelf {key} is <{value}>\n",
            question="Question: what is the code on shelf {key}? Answer: <",
            answer_end=">\n",
            key_parts=(_ADJECTIVES.split(), _NOUNS.split()),
            key_joint=" ",
            value_digits=5,
        ),
    )
}


@dataclass(frozen=True)
class Piece:
    """A piece of a stream.

    Attributes:
        text: of the piece.
        distance: for an answer, the lines back to its fact, 1 for the line just before
            the question; 0 for text that is given.
    """

    text: str
    distance: int = 0

    @property
    def is_answer(self) -> bool:
        """Whether a model is to give this text."""
        return self.distance > 0


@dataclass(frozen=True)
class Answer:
    """Where an answer stands in the text.

    Attributes:
        start: index of its first character.
        end: index behind its last.
        distance: see ``Piece``.
    """

    start: int
    end: int
    distance: int


def generate(
    seed: int,
    style: Style,
    lines: int,
    every: int = 10,
    distance: int | Sequence[int] = 20,
) -> Iterator[Piece]:
    """A stream in pieces: given text and answers in turn, the first and last given.

    No fact is asked for twice, and the keys of any ``style.unique_lines`` lines in a
    row differ, so that what a question asks for stands in one place.

    Args:
        seed: of the text; a longer stream begins with the shorter one.
        style: of its lines.
        lines: facts in all.
        every: facts from question to question. The first question comes when there
            are as many lines as the distance.
        distance: in lines. Of several, as of a ``range``, each question draws one of
            those that reach a fact.

    Raises:
        ValueError: for a distance below 1 or above ``style.unique_lines``.
    """
    distances = [distance] if isinstance(distance, int) else list(distance)
    if not distances or min(distances) < 1 or max(distances) > style.unique_lines:
        raise ValueError(
            f"a distance must lie in 1 - {style.unique_lines} for style {style.name!r}"
        )
    return _generate(Random(seed), style, lines, every, distances)


def _generate(
    random: Random, style: Style, lines: int, every: int, distances: list[int]
) -> Iterator[Piece]:
    facts: deque[tuple[str, str]] = deque(maxlen=style.unique_lines)
    recent: set[str] = set()
    asked: set[str] = set()
    given: list[str] = []
    for line in range(1, lines + 1):
        if len(facts) == style.unique_lines:
            recent.discard(facts[0][0])
            asked.discard(facts[0][0])
        key = style.draw_key(random)
        while key in recent:
            key = style.draw_key(random)
        recent.add(key)
        value = style.draw_value(random)
        facts.append((key, value))
        given.append(style.fact.format(key=key, value=value))
        if line % every:
            continue
        open_distances = [
            d for d in distances if d <= line and facts[-d][0] not in asked
        ]
        if not open_distances:
            continue
        back = random.choice(open_distances)
        key, value = facts[-back]
        asked.add(key)
        given.append(style.question.format(key=key))
        yield Piece("".join(given))
        yield Piece(value, back)
        given = [style.answer_end]
    yield Piece("".join(given))


def join(pieces: Iterable[Piece]) -> tuple[str, list[Answer]]:
    """The whole text, and where its answers stand."""
    texts: list[str] = []
    answers: list[Answer] = []
    length = 0
    for piece in pieces:
        end = length + len(piece.text)
        if piece.is_answer:
            answers.append(Answer(length, end, piece.distance))
        texts.append(piece.text)
        length = end
    return "".join(texts), answers
