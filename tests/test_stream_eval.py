# SPDX-License-Identifier: Apache-2.0
"""StreamEval: its text, its scores, its script."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai import OpenAI
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sink_paged.evaluation.configs import CacheConfig
from sink_paged.evaluation.report import Evaluation
from sink_paged.evaluation.scoring import open_engine
from sink_paged.evaluation.stream_answers import (
    Outcome,
    TokenStream,
    ask_server,
    encode,
    generate_answers,
    make_stream,
    score_answers,
)
from sink_paged.evaluation.stream_eval import STYLES, generate, join
from sink_paged.evaluation.stream_results import (
    Answers,
    Plan,
    distance_table,
    interval,
    position_table,
)
from tests.lookup_model import make_lookup_llama

ROOT = Path(__file__).parents[1]
POCKET = ROOT / "models" / "pocket"
SCRIPT = ROOT / "scripts" / "eval_stream_qa.py"
sys.path.insert(0, str(SCRIPT.parent))

from eval_stream_qa import main  # noqa: E402

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


# Its tokens.


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """Byte pairs that join a number to the space before it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = [join(generate(9, style, 500))[0] for style in STYLES.values()]
    trainer = trainers.BpeTrainer(
        vocab_size=1500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


class Slow:
    """A tokenizer that does not say where its tokens stand."""

    is_fast = False

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.decode = tokenizer.decode

    def __call__(self, text, add_special_tokens=True):
        return self.tokenizer(text, add_special_tokens=add_special_tokens)


@pytest.fixture(scope="module")
def tokenizers():
    pocket, merging = AutoTokenizer.from_pretrained(POCKET), merging_tokenizer()
    return {
        "bytes": pocket,
        "merging": merging,
        "slow bytes": Slow(pocket),
        "slow merging": Slow(merging),
    }


@pytest.mark.parametrize("name", ["bytes", "merging", "slow bytes", "slow merging"])
@pytest.mark.parametrize("style", STYLES.values(), ids=list(STYLES))
def test_the_tokens_of_an_answer(tokenizers, name, style):
    tokenizer = tokenizers[name]
    pieces = list(generate(1, style, 300))
    text, answers = join(pieces)
    stream = encode(tokenizer, pieces)
    bos = int("bytes" in name)
    assert tokenizer.decode(stream.tokens[bos:]) == text
    assert len(stream.questions) == len(answers) == 29
    for question, answer in zip(stream.questions, answers, strict=True):
        assert question.distance == answer.distance
        found = tokenizer.decode(stream.tokens[question.start : question.end])
        assert found.strip() == text[answer.start : answer.end]
        before = tokenizer.decode(stream.tokens[bos : question.start])
        assert before.rstrip() == text[: answer.start].rstrip()


def test_merged_tokens_are_those_of_running_text(tokenizers):
    tokenizer = tokenizers["merging"]
    pieces = list(generate(1, STYLES["short"], 300))
    stream = encode(tokenizer, pieces)
    assert stream.tokens == tokenizer(join(pieces)[0])["input_ids"]
    first = [tokenizer.decode(stream.tokens[q.start]) for q in stream.questions]
    assert any(re.fullmatch(r" \d+", token) for token in first)


@pytest.mark.parametrize("num_tokens", [100, 1500, 5000])
def test_a_stream_has_the_tokens_asked_for(tokenizers, num_tokens):
    tokenizer, style = tokenizers["bytes"], STYLES["short"]
    stream = make_stream(tokenizer, style, 4, num_tokens, distance=range(1, 30))
    assert len(stream.tokens) == num_tokens
    longer = make_stream(tokenizer, style, 4, 6000, distance=range(1, 30))
    assert stream == longer.first(num_tokens)
    assert all(question.end <= num_tokens for question in stream.questions)
    assert len(stream.questions) >= (num_tokens - 100) // 112


# Right and wrong.


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    """An engine that holds 15 lines or so, with a question after every fifth."""
    folder = tmp_path_factory.mktemp("lookup")
    make_lookup_llama(folder, 256)
    config = CacheConfig.parse("4+200")
    with open_engine(str(folder), config, 3001, block_size=32) as llm:
        yield llm


def test_what_the_window_holds_is_known(llm, tokenizers):
    inside, beyond = [1, 6, 12, 14], [18, 30, 70]
    stream = make_stream(
        tokenizers["bytes"], STYLES["short"], 0, 3000, 5, inside + beyond
    )
    (outcomes,) = score_answers(llm, [stream])
    known = [outcome.right for outcome in outcomes if outcome.distance in inside]
    unknown = [
        outcome.right
        for outcome in outcomes
        if outcome.distance in beyond and outcome.position > 300
    ]
    # A key may be taken for one that resembles it.
    assert sum(known) >= 0.95 * len(known) > 20
    assert sum(unknown) == 0 < len(unknown)
    last = [outcome.right for outcome in outcomes if outcome.position > 2000]
    assert len(set(last)) == 2
    assert generate_answers(llm, stream)[0] == outcomes


def test_ranks_say_what_greedy_decoding_writes(llm, tokenizers):
    """Every other answer of the text is what the model would have written."""
    stream = make_stream(
        tokenizers["bytes"], STYLES["short"], 1, 900, every=4, distance=2
    )
    tokens, expected = stream.tokens, []
    for i, question in enumerate(stream.questions):
        _, tokens = generate_answers(llm, TokenStream(tokens, [question]), own=True)
        if i % 2:
            # The first, the second, ... token of the answer is another one.
            wrong = question.start + i // 2 % (question.end - question.start)
            tokens[wrong] = (tokens[wrong] + 1) % 256
        expected.append(Outcome(question.start, 2, i % 2 == 0))
    assert len(expected) > 15
    assert tokens != stream.tokens
    mixed = TokenStream(tokens, stream.questions)
    assert score_answers(llm, [mixed]) == [expected]
    outcomes, same = generate_answers(llm, mixed)
    assert outcomes == expected
    assert same == tokens


def test_own_answers_stay_in_the_text(llm, tokenizers):
    stream = make_stream(
        tokenizers["bytes"], STYLES["short"], 2, 300, every=4, distance=2
    )
    outcomes, tokens = generate_answers(llm, stream, own=True)
    assert [outcome.position for outcome in outcomes] == [
        question.start for question in stream.questions
    ]
    own = TokenStream(tokens, stream.questions)
    assert all(outcome.right for outcome in score_answers(llm, [own])[0])


def test_several_streams_at_once(llm, tokenizers):
    streams = [
        make_stream(tokenizers["bytes"], STYLES["short"], seed, length, 4, 2)
        for seed, length in ((3, 500), (4, 200))
    ]
    together = score_answers(llm, streams)
    assert together == [score_answers(llm, [stream])[0] for stream in streams]
    assert [len(outcomes) for outcomes in together] == [
        len(stream.questions) for stream in streams
    ]


# Servers.


class Memory(BaseHTTPRequestHandler):
    """A server that knows the last ``LINES`` facts of what it is sent."""

    LINES = 25
    LIMIT = 100_000
    requests: list[dict] = []

    def do_GET(self):  # noqa: N802
        self.reply({"object": "list", "data": [{"id": "memory", "object": "model"}]})

    def do_POST(self):  # noqa: N802
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.requests.append(body)
        chat = self.path.endswith("/chat/completions")
        turns = [turn["content"] for turn in body["messages"]] if chat else []
        text = "\n".join(turns) if chat else body["prompt"]
        if len(text) > self.LIMIT:
            self.reply({"error": {"message": "too long"}}, 400)
            return
        facts = fact_pattern(STYLES["paper"]).findall(text)
        key = re.findall(r"on shelf ([a-z ]+)\? Answer", text)[-1]
        value = dict(facts[-self.LINES :]).get(key, "11111")
        answer = {"message": {"role": "assistant", "content": f"It is <{value}>."}}
        choice = answer if chat else {"text": value}
        self.reply(
            {
                "id": "0",
                "choices": [{"index": 0, "finish_reason": "stop", **choice}],
                "usage": {"prompt_tokens": len(text), "completion_tokens": 1},
            }
        )

    def reply(self, message, status=200):
        body = json.dumps(message).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    """The base URL of ``Memory``."""
    Memory.requests.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), Memory) as http:
        Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}/v1"
        http.shutdown()


@pytest.mark.parametrize("api", ["chat", "completions"])
def test_a_server_is_asked_with_all_of_the_text(server, api):
    style = STYLES["paper"]
    pieces = list(generate(7, style, 200, distance=[20, 25, 26, 40]))
    client = OpenAI(base_url=server, api_key="none", max_retries=0)
    outcomes = list(ask_server(client, "memory", style, pieces, api))
    assert [o.right for o in outcomes] == [o.distance <= 25 for o in outcomes]
    assert len(outcomes) == 19
    assert len({o.right for o in outcomes}) == 2
    last = Memory.requests[-1]
    if api == "completions":
        assert len(fact_pattern(style).findall(last["prompt"])) == 200
        positions = [len(request["prompt"]) for request in Memory.requests]
        assert re.search(r"Answer: <\d{5}>\nThe code", last["prompt"])
    else:
        roles = [turn["role"] for turn in last["messages"]]
        assert roles == ["user", "assistant"] * 18 + ["user"]
        assert all(
            turn["content"].startswith("The code on shelf")
            for turn in last["messages"][::2]
        )
        positions = [
            len("\n".join(turn["content"] for turn in request["messages"]))
            for request in Memory.requests
        ]
    assert [outcome.position for outcome in outcomes] == positions


# Tables.


def test_tables_count_right_answers_where_all_was_read():
    outcomes = [Outcome(p, 10 if p % 400 else 30, p < 900) for p in range(0, 2000, 100)]
    short = [outcome for outcome in outcomes if outcome.position < 700]
    plan = Plan(STYLES["short"], [10, 30, 50], 512, 511, 11.2)
    answers = {
        "dense": Answers(700, 1.0, short, short),
        "4+507": Answers(2000, 1.0, outcomes, outcomes),
    }
    table = position_table(plan, answers)
    assert table.columns == ["tokens", "questions", "dense", "4+507"]
    assert table.rows == [
        ["0 - 512", 6, 1.0, 1.0],
        ["512 - 1,024", 5, None, 3 / 5],
        ["1,024 - 2,000", 9, None, 0.0],
    ]
    assert distance_table(plan, answers).rows == [
        [10, 112, 15, 1.0, 6 / 15],
        [30, 336, 5, 1.0, 3 / 5],
        [50, 560, 0, None, None],
    ]


@given(st.integers(1, 500), st.data())
def test_intervals_hold_the_share(questions, data):
    right = data.draw(st.integers(0, questions))
    outcomes = [Outcome(0, 1, i < right) for i in range(questions)]
    low, high = interval(outcomes)
    assert 0 <= low <= right / questions <= high <= 1
    assert high - low < 4 / questions**0.5


# The script.


def is_png(file):
    return file.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_script_writes_tables_and_plots(tmp_path):
    options = "--quick --configs dense 4+100 --distances 2 6 30 --output-dir"
    command = [sys.executable, SCRIPT, *options.split(), tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = Evaluation.read(tmp_path / "stream_qa.json")
    assert result.name == "stream_qa"
    assert result.tables[0].columns == ["tokens", "questions", "dense", "4+100"]
    assert [row[0] for row in result.tables[0].rows][-1].endswith("4,000")
    assert [row[0] for row in result.tables[1].rows] == [2, 6, 30]
    near, _, evicted = (row[-1] for row in result.tables[1].rows)
    assert near > 0.9 and evicted == 0
    for table in result.tables[:2]:
        for row in table.rows:
            assert all(cell is None or 0 <= cell <= 1 for cell in row[-2:])
            assert (row[-1] is None) == (row[-3] == 0)
        assert table.plain() in done.stdout
    counted = Counter()
    for name, each in result.data["counts"].items():
        assert all(row[-2] <= row[-1] for rows in each.values() for row in rows)
        counted[name] = sum(row[-1] for rows in each.values() for row in rows)
    assert counted == {row[0]: row[2] for row in result.tables[2].rows}
    assert result.data["style"] == "short"
    assert result.provenance["vllm"]
    assert len(result.plots) == 2
    assert all(is_png(tmp_path / plot) for plot in result.plots)


def test_script_asks_a_server(server, tmp_path):
    options = "--tokens 10000 --distances 10 25 40 --reply-tokens 16 --output-dir"
    assert main(["--server", server, *options.split(), str(tmp_path)]) == 0
    assert {request["max_tokens"] for request in Memory.requests} == {16}
    result = Evaluation.read(tmp_path / "stream_qa.json")
    assert [row[-1] for row in result.tables[0].rows] == [1.0] * len(
        result.tables[0].rows
    )
    assert [row[-1] for row in result.tables[1].rows] == [1.0, 1.0, 0.0]
    assert all(is_png(tmp_path / plot) for plot in result.plots)


def test_script_says_where_a_server_stopped(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Memory, "LIMIT", 5000)
    assert main(["--server", server, "--output-dir", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert re.search(r"memory stopped at 4,\d{3} tokens: .*too long", output)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--configs", "four"], "'four' is no cache config"),
        (["--configs", "recompute"], "recompute is not offered"),
        (["--configs", "4+124"], "do not fit the trained length of 128"),
        (["--model", "/nowhere"], "error: "),
        (["--tokens", "0"], "argument --tokens"),
        (["--distances", "9000"], "a distance must lie in 1 - 8788"),
        (["--server", "http://127.0.0.1:9/v1"], "no answer from http://127.0.0.1:9"),
    ],
)
def test_script_refuses(arguments, message, tmp_path, capsys):
    try:
        status = main([*arguments, "--output-dir", str(tmp_path)])
    except SystemExit as error:  # of argparse
        status = error.code
    assert status == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
