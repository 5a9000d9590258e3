# SPDX-License-Identifier: Apache-2.0
"""``scripts/demo.py`` without engines: what it reads, shows and refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import demo  # noqa: E402

POCKET = ROOT / "models" / "pocket"
TEXT = "".join(f"line {number}: äöü\n" for number in range(1, 400))


def word_tokenizer(folder: Path) -> Path:
    """One token for a word with the space before it, and one for a line's end."""
    words = {f"{number}:" for number in range(1, 400)} | {"line", "äöü", "\n"}
    alphabet = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre_tokenizers.Split(" ", "merged_with_next")
    lines = pre_tokenizers.Split("\n", "isolated")
    pieces = {
        piece for word in words for start in ("", " ") for piece in [start + word]
    }
    encoded = {alphabet.pre_tokenize_str(piece)[0][0] for piece in pieces}
    vocabulary = {piece: index for index, piece in enumerate(sorted(encoded))}
    backend = Tokenizer(models.WordLevel(vocabulary))
    backend.pre_tokenizer = pre_tokenizers.Sequence([lines, split, alphabet])
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("limit", [None, 1000])
def test_the_tail_is_what_was_read(limit: int | None, tmp_path: Path) -> None:
    """Of a tokenizer with several characters to a token."""
    tokens, tail = demo.load_tokens(str(word_tokenizer(tmp_path)), TEXT, limit)
    lines = TEXT.splitlines(keepends=True)
    read = lines if limit is None else lines[: limit // 4]  # tokens of a line
    assert len(tokens) == 4 * len(read)
    assert tail == "".join(read[-demo.TAIL_LINES :])


def test_the_tail_of_the_bundled_model() -> None:
    """Its BOS is a token of no text, and characters may be two tokens."""
    tokens, tail = demo.load_tokens(str(POCKET), TEXT, 4000)
    assert len(tokens) == 4000
    read = TEXT.encode()[:3999].decode(errors="replace")
    assert tail == "".join(read.splitlines(keepends=True)[-demo.TAIL_LINES :])


class StubReader:
    """Reads with a loss of 1 and goes on with a word."""

    def __init__(self, model: str, sink: dict[str, int] | None) -> None:
        pass

    def __enter__(self) -> StubReader:
        return self

    def __exit__(self, *exc_info: object) -> None:
        pass

    def read(self, tokens: list[int], name: str, max_tokens: int) -> demo.Reading:
        return demo.Reading(np.ones(len(tokens) - 1), 1.0, "continued\n", 512, 1024)

    def refusal(self, tokens: list[int]) -> str:
        return "too long"


def test_what_is_shown(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PYTHONWARNINGS", "default")  # else the script sets it
    monkeypatch.setattr(demo, "VllmReader", StubReader)
    monkeypatch.setattr(
        demo,
        "read_densely",
        lambda model, tokens: demo.Reading(np.ones(len(tokens) - 1), 1.0),
    )
    text, written = tmp_path / "text", tmp_path / "report.json"
    text.write_text(TEXT, encoding="utf-8")
    assert demo.main(["--text", str(text), "--json", str(written)]) == 0
    shown = [f"    {line}" for line in TEXT.splitlines()[-demo.TAIL_LINES :]]
    shown += ["    -- from here on the model --", "    continued"]
    assert "\n".join(shown) in capsys.readouterr().out
    report: dict[str, Any] = json.loads(written.read_text())
    assert report["tokens"] == 1 + len(TEXT.encode())
    assert report["tail"].splitlines() == TEXT.splitlines()[-demo.TAIL_LINES :]


@pytest.mark.parametrize("content", [None, b"caf\xe9"])
def test_a_text_that_cannot_be_read_is_refused(
    content: bytes | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text"
    if content is not None:
        text.write_bytes(content)
    assert demo.main(["--text", str(text)]) == 2
    assert f"--text {text} is no readable UTF-8 text" in capsys.readouterr().err
