# SPDX-License-Identifier: Apache-2.0
"""StreamEval: its text, its scores, its script."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sink_paged.evaluation.stream_eval import STYLES, generate, join

styles = st.sampled_from(list(STYLES.values()))
distances = st.one_of(
    st.integers(1, 200),
    st.lists(st.integers(1, 200), min_size=1, max_size=8),
    st.builds(range, st.just(1), st.integers(2, 100)),
)


@settings(deadline=None)
@given(st.integers(0, 2**32), styles, st.integers(0, 400), st.integers(1, 30))
def test_equal_arguments_give_equal_text(seed, style, lines, every):
    first = list(generate(seed, style, lines, every))
    assert first == list(generate(seed, style, lines, every))
    longer, _ = join(generate(seed, style, lines + 25, every))
    assert longer.startswith(join(first)[0].removesuffix(style.answer_end))


def fact_pattern(style):
    """A line that is a fact, with its key and value."""
    key, value = r"(?P<key>[a-z ]+)", r"(?P<value>\d+)"
    return re.compile(
        re.escape(style.fact)
        .replace(re.escape("{key}"), key)
        .replace(re.escape("{value}"), value)
    )


@settings(deadline=None)
@given(
    st.integers(0, 2**32), styles, st.integers(0, 300), st.integers(1, 30), distances
)
def test_the_answer_stands_distance_facts_back(seed, style, lines, every, distance):
    pieces = list(generate(seed, style, lines, every, distance))
    allowed = {distance} if isinstance(distance, int) else set(distance)
    facts, questions, asked = [], [], set()
    for piece in pieces:
        if not piece.is_answer:
            found = list(fact_pattern(style).finditer(piece.text))
            facts += [(match["key"], match["value"]) for match in found]
            question = piece.text[found[-1].end() :] if found else ""
            continue
        key, value = facts[-piece.distance]
        assert piece.distance in allowed
        assert piece.text == value
        assert question == style.question.format(key=key)
        assert key not in asked
        asked.add(key)
        questions.append(len(facts))
    assert len(facts) == lines
    first = -(-min(allowed) // every) * every
    assert questions == list(range(first, lines + 1, every))
    keys = [key for key, _ in facts]
    assert len(set(keys)) == len(keys)


def test_keys_come_again_only_after_unique_lines():
    style = STYLES["paper"]
    text, _ = join(generate(3, style, 3 * style.unique_lines))
    keys = [match["key"] for match in fact_pattern(style).finditer(text)]
    assert len(keys) == 3 * style.unique_lines > len(set(keys))
    last = {}
    for line, key in enumerate(keys):
        assert line - last.get(key, -style.unique_lines) >= style.unique_lines
        last[key] = line


def test_join_gives_text_and_spans():
    style = STYLES["short"]
    pieces = list(generate(5, style, 95))
    text, answers = join(pieces)
    assert text == "".join(piece.text for piece in pieces)
    assert len(answers) == 8
    for answer in answers:
        assert re.fullmatch(r"\d{4}", text[answer.start : answer.end])
        assert text[answer.end] == "\n"
        assert answer.distance == 20
        line = text[: answer.start].splitlines()[-1]
        assert re.fullmatch(r"\? [a-z]{3}: ", line)
        assert text.index(line[2:]) < answer.start


@pytest.mark.parametrize("distance", [0, -1, 10**9, []])
def test_impossible_distances_are_refused(distance):
    with pytest.raises(ValueError, match="a distance must lie in 1 - "):
        generate(0, STYLES["short"], 10, distance=distance)
