# SPDX-License-Identifier: Apache-2.0
"""Outputs of a given form: JSON, patterns, tool calls, reasoning; past the window."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import openai
import pytest

from tests.chat.api import BASE, PROMPT, WINDOW, complete, user
from tests.chat.models import MARKUP_IDS

LONG = 2 * WINDOW
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": LONG, "maxLength": LONG + 20},
        "sizes": {
            "type": "array",
            "items": {"type": "integer", "minimum": 0, "maximum": 999},
            "minItems": 20,
            "maxItems": 25,
        },
    },
    "required": ["name", "sizes"],
    "additionalProperties": False,
}
MARKUP_FIRST = {str(token): 100 for token in MARKUP_IDS}
"""A logit bias: where the form allows it, markup is a token and not its letters."""
NO_PADDING = {str(ord(space)): -100 for space in " \n\r\t"} | {"257": 100}
"""A logit bias: no white space that the form can do without; end where it may."""
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "write", "parameters": SCHEMA},
}


def ask(client: openai.OpenAI, extra: Any = None, **options: Any) -> Any:
    """A greedy chat completion that may end."""
    return client.chat.completions.create(
        model=BASE,
        messages=user(PROMPT),  # type: ignore[arg-type]
        max_tokens=1000,
        temperature=0,
        extra_body=extra or {},
        **options,
    )


def check(arguments: str) -> None:
    """It is JSON of the schema, longer than the window."""
    jsonschema.validate(json.loads(arguments), SCHEMA)
    assert len(arguments) > LONG


def test_json_of_a_schema(client: openai.OpenAI) -> None:
    form = {"name": "entry", "schema": SCHEMA, "strict": True}
    options: dict[str, Any] = {
        "response_format": {"type": "json_schema", "json_schema": form}
    }
    choice = ask(client, **options).choices[0]
    assert choice.finish_reason == "stop"
    check(choice.message.content)
    events = ask(client, stream=True, **options)
    deltas = [event.choices[0].delta.content or "" for event in events]
    assert "".join(deltas) == choice.message.content
    text = {"format": {"type": "json_schema", **form}}
    answer = client.responses.create(
        model=BASE,
        input=user(PROMPT),  # type: ignore[arg-type]
        text=text,  # type: ignore[arg-type]
        temperature=0,
        max_output_tokens=1000,
    )
    check(answer.output_text)


def test_patterns_and_choices(client: openai.OpenAI) -> None:
    def write(**form: Any) -> str:
        options = {"max_tokens": 1000, "ignore_eos": False}
        answer = complete(client, structured_outputs=form, **options)
        return str(answer.choices[0].text)

    words = write(regex=r"([a-f]{3} ){50}end").split(" ")
    assert len(words) == 51
    assert words.pop() == "end"
    assert all(len(word) == 3 and set(word) <= set("abcdef") for word in words)
    choices = ["z" * LONG + "one", "z" * LONG + "two"]
    assert write(choice=choices) in choices


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("which", ["named", "required", "auto"])
def test_tool_calls(client: openai.OpenAI, which: str, stream: bool) -> None:
    """With ``auto``, a pattern makes the model write a call for the parser to find."""
    choice: Any = which
    extra: dict[str, Any] = {"logit_bias": NO_PADDING}
    tool = {**TOOL, "function": {**TOOL["function"], "strict": which != "auto"}}
    if which == "named":
        choice = {"type": "function", "function": {"name": "write"}}
    elif which == "auto":
        call = (
            r'<tool_call>\n\{"name": "write", "arguments": \{"name": "'
            rf'[a-z]{{{LONG}}}", "sizes": \[(\d, ){{20}}1\]\}}\}}\n</tool_call>'
        )
        extra["structured_outputs"] = {"regex": call}
    answer = ask(client, extra, tools=[tool], tool_choice=choice, stream=stream)
    if not stream:
        (call,) = answer.choices[0].message.tool_calls
        name, arguments = call.function.name, call.function.arguments
        reason = answer.choices[0].finish_reason
    else:
        name, arguments, reason, parts = "", "", None, 0
        for event in answer:
            reason = event.choices[0].finish_reason or reason
            for call in event.choices[0].delta.tool_calls or []:
                assert call.index == 0
                name += call.function.name or ""
                arguments += call.function.arguments or ""
                parts += 1
        assert parts > LONG / 2
    assert name == "write"
    check(arguments)
    assert reason == ("stop" if which == "named" else "tool_calls")


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_reasoning_longer_than_the_window(client: openai.OpenAI, stream: bool) -> None:
    extra = {
        "chat_template_kwargs": {"thinking": True},
        "logit_bias": MARKUP_FIRST,
        "structured_outputs": {"regex": rf"[a-z ]{{{LONG}}}</think>[A-Z]{{9}}"},
    }
    answer = ask(client, extra, stream=stream)
    if not stream:
        message = answer.choices[0].message
        reasoning, content = message.reasoning, message.content
    else:
        reasoning = content = ""
        for event in answer:
            delta = event.choices[0].delta
            reasoning += getattr(delta, "reasoning", None) or ""
            content += delta.content or ""
    assert len(reasoning) == LONG
    assert not set(reasoning) & set("<>/ABC")
    assert len(content) == 9
    assert content.isupper()
