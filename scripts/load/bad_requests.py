# SPDX-License-Identifier: Apache-2.0
"""Requests that a server must refuse: what is wrong, and what is sent."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"


@dataclass(frozen=True)
class BadRequest:
    """What is sent, and what is wrong with it.

    Attributes:
        name: what is wrong.
        path: of the endpoint.
        body: as it goes over the wire.
    """

    name: str
    path: str
    body: bytes


def catalogue(model: str) -> list[BadRequest]:
    """Every bad request once, for a server of ``model``."""
    good = {"model": model, "prompt": "x = 1\n", "max_tokens": 3}
    chat = {"model": model, "messages": [{"role": "user", "content": "a"}]}

    def schema(schema: dict[str, Any]) -> dict[str, Any]:
        named = {"name": "answer", "schema": schema}
        return {"response_format": {"type": "json_schema", "json_schema": named}}

    wrong_fields: dict[str, dict[str, Any]] = {
        "max_tokens negative": {"max_tokens": -1},
        "max_tokens 0": {"max_tokens": 0},
        "max_tokens 2^40": {"max_tokens": 2**40},
        "max_tokens a word": {"max_tokens": "many"},
        "max_tokens a fraction": {"max_tokens": 3.5},
        "min_tokens above max_tokens": {"min_tokens": 10},
        "prompt empty": {"prompt": ""},
        "prompt without tokens": {"prompt": []},
        "prompt null": {"prompt": None},
        "prompt a number": {"prompt": 5},
        "prompt a mapping": {"prompt": {"text": "a"}},
        "token id outside the vocabulary": {"prompt": [1, 2, 10**6]},
        "token id negative": {"prompt": [1, -2]},
        "model unknown": {"model": "no-such-model"},
        "temperature negative": {"temperature": -2},
        "temperature not a number": {"temperature": float("nan")},
        "temperature infinite": {"temperature": float("inf")},
        "temperature a word": {"temperature": "hot"},
        "top_p above 1": {"top_p": 2},
        "top_k negative": {"top_k": -5},
        "repetition_penalty 0": {"repetition_penalty": 0},
        "presence_penalty huge": {"presence_penalty": 99},
        "logprobs huge": {"logprobs": 10**6},
        "logprobs 2^70": {"logprobs": 2**70},
        "prompt_logprobs negative": {"prompt_logprobs": -5},
        "n huge": {"n": 10**6},
        "n 0": {"n": 0},
        "n negative": {"n": -1},
        "seed 2^70": {"seed": 2**70},
        "stop a number": {"stop": 5},
        "stop_token_ids words": {"stop_token_ids": ["a"]},
        "allowed_token_ids empty": {"allowed_token_ids": []},
        "allowed_token_ids outside the vocabulary": {"allowed_token_ids": [10**6]},
        "logit_bias outside the vocabulary": {"logit_bias": {"100000": 5}},
        "bad_words empty": {"bad_words": [""]},
        "stream_options without a stream": {"stream_options": {"include_usage": True}},
        "JSON schema of no type": schema({"type": "nonsense"}),
        "JSON schema unsatisfiable": schema(
            {"type": "integer", "minimum": 5, "maximum": 1}
        ),
        "JSON schema with a loose reference": schema(
            {"properties": {"a": {"$ref": "#/nowhere"}}, "required": ["a"]}
        ),
        "regular expression unclosed": {"structured_outputs": {"regex": "(["}},
        "grammar without its rule": {
            "structured_outputs": {"grammar": "root ::= nothing"}
        },
    }
    wrong_chats: dict[str, dict[str, Any]] = {
        "chat without messages": {"messages": None},
        "chat of no messages": {"messages": []},
        "chat by a role of a number": {"messages": [{"role": 5, "content": 1}]},
        "chat with top_logprobs huge": {"logprobs": True, "top_logprobs": 10**6},
    }
    bodies = {
        "JSON cut off": b'{"model": ',
        "JSON a list": b"[1, 2]",
        "body empty": b"",
        "body not UTF-8": b"\xff\xfe\x80\x81",
        "prompt not UTF-8": b'{"model": "%b", "prompt": "\xff\xfe"}' % model.encode(),
    }
    return [
        *(
            BadRequest(name, COMPLETIONS, json.dumps(good | fields).encode())
            for name, fields in wrong_fields.items()
        ),
        *(
            BadRequest(name, CHAT, json.dumps(chat | fields).encode())
            for name, fields in wrong_chats.items()
        ),
        *(BadRequest(name, COMPLETIONS, body) for name, body in bodies.items()),
        BadRequest("endpoint unknown", "/v1/nothing", json.dumps(good).encode()),
    ]


def is_refusal(status: int) -> bool:
    """Whether an HTTP status says that the client was wrong."""
    return 400 <= status < 500
