# SPDX-License-Identifier: Apache-2.0
r"""Does a chat's next turn wait longer the longer the chat is?

Starts ``vllm serve --sink-eviction``, or takes a ``--server`` that runs with it, and
holds conversations of several lengths with it, in rotation: each turn resends the whole
history through the chat API, adds a question, and is timed from the sending of the
request, which lies ready as bytes, to the first text of the answer. (What a client does
before is its own: the ``openai`` package checks 250 messages in 30 to 45 ms.) The usage
in the answer says how many tokens of the prompt the prefix cache held (a server of your
own needs ``--enable-prompt-tokens-details``); the others were computed. For comparison:

- ``cold``: the same prompt under another ``cache_salt``, which finds nothing cached,
  for histories of at most ``--cold`` tokens;
- ``--server`` can be one of stock vLLM, as far as its context reaches.

With ``fastokens`` installed, vLLM tokenizes by it where ``VLLM_USE_FASTOKENS=1`` is in
the environment, which the server inherits. ``turns.json`` has what of it the server
was given, and None of a ``--server``.

The floor of a turn: its new tokens in one step, and a pass over the text of the history
for JSON, the tokenizer, and vLLM's hashes of the blocks (73 bytes each, sha256 over
each block's token ids).

Written to ``--output-dir``: ``turns.json``, ``turns.png`` and the server's log.

Example::

    VLLM_USE_FASTOKENS=1 python scripts/bench_turns.py --histories 1000 10000 100000 \
        --serve-args --dtype float32
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import httpx
from load.events import EventError, event
from load.report import progress
from load.server import ServerError, running_server
from load.workload import source_text
from provenance import provenance

from sink_paged.evaluation.report import Table

MESSAGE = 400
"""Characters of a message of a history."""
Message = dict[str, str]


@dataclass
class Chat:
    """A conversation, and what its turns took.

    Attributes:
        messages: so far.
        prompt_tokens: of each turn.
        computed_tokens: of each turn's prompt.
        ttft: seconds to the first token of each turn.
        cold: the same where nothing was cached.
    """

    messages: list[Message]
    prompt_tokens: list[int] = field(default_factory=list)
    computed_tokens: list[int] = field(default_factory=list)
    ttft: list[float] = field(default_factory=list)
    cold: list[float] = field(default_factory=list)


class Client:
    """Talks with one server.

    Attributes:
        salts: prompts under different ones share nothing.
    """

    def __init__(self, http: httpx.Client, answer_tokens: int) -> None:
        """Of the server at the base URL of ``http``; answers have ``answer_tokens``."""
        self.http = http
        models = self.http.get("/v1/models").raise_for_status().json()
        self.model = models["data"][0]["id"]
        self.answer_tokens = answer_tokens
        self.salts = time.time_ns()

    def count(self, messages: list[Message]) -> int:
        """Tokens of a conversation."""
        body = {"model": self.model, "messages": messages}
        response = self.http.post("/tokenize", json=body).raise_for_status()
        count: int = response.json()["count"]
        return count

    def ask(
        self, messages: list[Message], salted: bool = False
    ) -> tuple[float, str, dict[str, Any]]:
        """Seconds to the first token, the answer, and the usage.

        Args:
            messages: the conversation.
            salted: find nothing in the prefix cache.

        Raises:
            ServerError: there was no answer.
            EventError: the server sent an error in its place.
        """
        self.salts += salted
        body: dict[str, Any] = {
            "model": self.model,
            "messages": messages,
            "max_tokens": 1 if salted else self.answer_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if salted:
            body["cache_salt"] = str(self.salts)
        request = self.http.build_request("POST", "/v1/chat/completions", json=body)
        first, texts, usage = None, [], None
        begin = time.perf_counter()
        response = self.http.send(request, stream=True)
        with contextlib.closing(response):
            if response.is_error:
                raise ServerError(f"HTTP {response.status_code}: {response.read()!r}")
            for line in response.iter_lines():
                if (news := event(line)) is None:
                    continue
                for choice in news["choices"]:
                    text = choice["delta"].get("content")
                    if first is None and (text or choice["finish_reason"]):
                        first = time.perf_counter() - begin
                    texts.append(text or "")
                usage = news.get("usage") or usage
        if first is None or usage is None:
            raise ServerError("the server sent no answer")
        return first, "".join(texts), usage


def history_of(tokens: int, count: Callable[[list[Message]], int]) -> list[Message]:
    """A conversation of about ``tokens`` tokens, which ends with an answer."""
    text = source_text()
    sample = count([{"role": "user", "content": text[: 10 * MESSAGE]}])
    messages = max(1, round(tokens / sample * 5)) * 2
    text *= 1 + messages * MESSAGE // len(text)
    return [
        {
            "role": "assistant" if index % 2 else "user",
            "content": text[index * MESSAGE : (index + 1) * MESSAGE],
        }
        for index in range(messages)
    ]


def take_turn(client: Client, chat: Chat, turn: int, cold: int) -> None:
    """One question and its answer; the first of a chat fills the cache unmeasured."""
    question = source_text()[-(turn + 2) * 100 :][:100]
    messages = [*chat.messages, {"role": "user", "content": question}]
    ttft, answer, usage = client.ask(messages)
    chat.messages = [*messages, {"role": "assistant", "content": answer}]
    if turn == 0:
        return
    chat.ttft.append(ttft)
    tokens, details = usage["prompt_tokens"], usage.get("prompt_tokens_details")
    if details is None:
        raise ServerError("the server needs --enable-prompt-tokens-details")
    chat.prompt_tokens.append(tokens)
    chat.computed_tokens.append(tokens - (details["cached_tokens"] or 0))
    if tokens <= cold:
        chat.cold.append(client.ask(messages, salted=True)[0])


def measure(args: argparse.Namespace, url: str) -> list[Chat]:
    """All conversations, a turn of each after the other."""
    with httpx.Client(base_url=url, timeout=600) as http:
        client = Client(http, args.answer_tokens)
        chats = [Chat(history_of(n, client.count)) for n in args.histories]
        for turn in progress(range(args.turns + 1), "turns", "turn"):
            for chat in chats:
                take_turn(client, chat, turn, args.cold)
    return chats


def milliseconds(seconds: list[float]) -> str | None:
    """Median and quartiles; a single value alone."""
    if not seconds:
        return None
    if len(seconds) == 1:
        return f"{1e3 * seconds[0]:.0f}"
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return f"{1e3 * median:.0f} ({1e3 * low:.0f}-{1e3 * high:.0f})"


def table(chats: list[Chat]) -> Table:
    """A line a conversation."""
    return Table(
        "Time to the first token of a turn, ms: median (quartiles)",
        ["history, tokens", "computed, at most", "turn", "cold"],
        [
            [
                f"{chat.prompt_tokens[0]:,}",
                max(chat.computed_tokens),
                milliseconds(chat.ttft),
                milliseconds(chat.cold),
            ]
            for chat in chats
        ],
    )


def plot(chats: list[Chat], path: Path) -> None:
    """Times against the length of the history."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6, 4))
    for name, label in (
        ("ttft", "turn, history cached"),
        ("cold", "nothing cached"),
    ):
        points = [
            (statistics.median(chat.prompt_tokens), statistics.median(seconds))
            for chat in chats
            if (seconds := getattr(chat, name))
        ]
        if points:
            tokens, medians = zip(*points, strict=True)
            axis.plot(tokens, [1e3 * s for s in medians], marker="o", label=label)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("tokens of the conversation")
    axis.set_ylabel("time to the first token, ms")
    axis.legend()
    axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="models/pocket", help="a folder or name of a checkpoint")
    add(
        "--histories",
        nargs="+",
        type=int,
        default=[1_000, 10_000, 100_000],
        metavar="TOKENS",
        help="lengths of the conversations at their beginning",
    )
    add("--turns", type=int, default=15, help="of each conversation, two at least")
    add("--answer-tokens", type=int, default=16, help="of each answer")
    add(
        "--cold", type=int, default=20_000, metavar="TOKENS", help="longest cold prompt"
    )
    add("--server", metavar="URL", help="one that runs, in place of one started here")
    add(
        "--serve-args",
        nargs=argparse.REMAINDER,
        default=[],
        help="the rest of the line: flags of vllm serve",
    )
    add("--output-dir", type=Path, default=Path("bench_out"))
    args = parser.parse_args(arguments)
    if args.turns < 2 or min(args.histories) < 1:
        parser.error("--turns must be at least 2, --histories above 0")
    return args


def main(arguments: list[str] | None = None) -> None:
    """Run and print."""
    args = parse_arguments(arguments)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    flags = ["--sink-eviction", "--enable-prompt-tokens-details"]
    flags += ["--disable-uvicorn-access-log", *args.serve_args]
    log, environment = args.output_dir / "turns.log", None
    try:
        if args.server:
            chats = measure(args, args.server.rstrip("/"))
        else:
            with running_server(args.model, flags, log) as server:
                environment = server.recorded_environment()
                chats = measure(args, server.url)
    except (ServerError, EventError, httpx.HTTPError) as error:
        sys.exit(f"FAILED: {error}")
    result = {
        "provenance": provenance(),
        "environment": environment,
        "server_flags": None if args.server else flags,
        "chats": [asdict(chat) | {"messages": len(chat.messages)} for chat in chats],
    }
    (args.output_dir / "turns.json").write_text(json.dumps(result, indent=1) + "\n")
    plot(chats, args.output_dir / "turns.png")
    print(table(chats).plain())
    print(f"written: {args.output_dir}/turns.json, {args.output_dir}/turns.png")


if __name__ == "__main__":
    main()
