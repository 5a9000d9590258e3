# SPDX-License-Identifier: Apache-2.0
"""Cache configs by name, texts, losses of an engine, and the script."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from sink_paged.evaluation.configs import CacheConfig, paper_configs
from sink_paged.evaluation.report import Evaluation, format_cell, geometric_bins
from sink_paged.evaluation.scoring import open_engine, recompute, score, score_many
from sink_paged.evaluation.texts import read_texts, special_prefix, stream_tokens
from sink_paged.window import SinkWindow
from tests.engines import make_llama
from tests.servers import MODEL

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "eval_perplexity.py"
LENGTH = 64
"""The tiny model's trained length."""


def test_names_of_configs() -> None:
    for name in ("dense", "recompute", "0+1024", "4+1020", "4+1020@text"):
        assert str(CacheConfig.parse(name)) == name
    assert CacheConfig.parse("4+60").window == SinkWindow(4, 60)
    assert CacheConfig.parse("4+60@text").positions == "text"
    for name in ("", "4", "4+0", "-1+4", "4+60@cache", "sparse"):
        with pytest.raises(ValueError, match="no cache config"):
            CacheConfig.parse(name)
    names = list(map(str, paper_configs(1024)))
    assert names[:4] == ["dense", "recompute", "0+1024", "1+1023"]


def test_texts_of_files_and_folders(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "c.jsonl").write_text('{"text": "third"}\n\n"fourth"\n')
    (tmp_path / "ignored.bin").write_text("x")
    assert list(read_texts([tmp_path])) == ["first", "second", "third", "fourth"]
    (tmp_path / "c.jsonl").write_text('{"body": "third"}\n')
    with pytest.raises(ValueError, match="c.jsonl, line 1"):
        list(read_texts([tmp_path]))
    with pytest.raises(ValueError, match="no file"):
        list(read_texts([tmp_path / "none"]))


def test_one_prefix_before_all_documents() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    assert special_prefix(tokenizer) == [256]
    assert stream_tokens(tokenizer, ["ab", "c"]) == [256, *b"ab\nc\n"]
    assert stream_tokens(tokenizer, ["ab", "c"], limit=3) == [256, *b"ab"]


def test_bins_cover_the_text() -> None:
    for length in (1, 5, 100, 12345):
        edges = list(geometric_bins(length, 10))
        assert edges[0] == 0 and edges[-1] == length and edges == sorted(set(edges))


def test_cells() -> None:
    cells = (None, 12345, 1.23456, 12.3456, 123.456, 1234.56, 1e6, "a")
    texts = ["-", "12,345", "1.235", "12.35", "123.5", "1,235", "1.00e+06", "a"]
    assert list(map(format_cell, cells)) == texts


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model."""
    folder = tmp_path_factory.mktemp("model")
    make_llama(folder, max_position_embeddings=LENGTH)
    return folder


@pytest.fixture(scope="module")
def tokens() -> list[int]:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 256, (400,), generator=generator).tolist()


OPTIONS = {"dtype": "float32", "skip_tokenizer_init": True, "block_size": 32}


def masked_losses(folder: Path, tokens: list[int], window: SinkWindow) -> np.ndarray:
    """Losses of Transformers' own model, keys masked, positions those of the text."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    count = len(tokens)
    mask = torch.full((1, 1, count, count), -torch.inf)
    for query in range(count):
        for key in range(query + 1):
            if window.attends(query, key):
                mask[0, 0, query, key] = 0
    with torch.inference_mode():
        logits = model(torch.tensor([tokens]), attention_mask=mask).logits[0].double()
    losses = -logits[:-1].log_softmax(-1)
    return losses.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0].numpy()


def test_positions_in_the_text(folder: Path, tokens: list[int]) -> None:
    """Sinks at their distance in the text, which grows past the trained length."""
    config = CacheConfig.parse("4+40@text")
    assert config.window is not None
    with open_engine(str(folder), config, len(tokens) + 1, **OPTIONS) as llm:
        losses = score(llm, tokens)
    expected = masked_losses(folder, tokens, config.window)
    assert np.abs(losses - expected).max() < 2e-3
    in_cache = CacheConfig.parse("4+40")
    with open_engine(str(folder), in_cache, len(tokens) + 1, **OPTIONS) as llm:
        others = score(llm, tokens)
    assert np.abs(losses[:44] - others[:44]).max() < 2e-3
    assert np.abs(losses - others).max() > 0.1


def test_dense_and_recomputed_losses(folder: Path, tokens: list[int]) -> None:
    """Of several texts at once in their order, and of windows encoded anew."""
    dense = CacheConfig("dense")
    texts = [tokens[:100], tokens[50:300], tokens[:2]]
    with open_engine(str(folder), dense, 301, **OPTIONS) as llm:
        losses = score_many(llm, texts)
    for text, found in zip(texts, losses, strict=True):
        everything = SinkWindow(0, len(text))
        assert np.abs(found - masked_losses(folder, text, everything)).max() < 2e-3
    places = [5, 64, 200]
    config, window = CacheConfig("recompute"), LENGTH
    with open_engine(str(folder), config, window + 2, **OPTIONS) as llm:
        found = recompute(llm, tokens, places, window, prefix=[256])
    for place, loss in zip(places, found, strict=True):
        text = tokens[: place + 1]
        if place > window:
            text = [256, *text[-window:]]
        everything = SinkWindow(0, len(text))
        assert abs(loss - masked_losses(folder, text, everything)[-1]) < 2e-3


def test_script(tmp_path: Path) -> None:
    """Tables, plot, losses; the oracle agrees, dense is cut off, sinks matter."""
    command = (
        f"--configs dense recompute 0+100 4+96 4+96@text --tokens 900 --oracle 300 "
        f"--dense-tokens 600 --recompute-positions 3 --dtype float32 "
        f"--output-dir {tmp_path}"
    )
    ran = subprocess.run(
        [sys.executable, SCRIPT, *command.split()], capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    evaluation = Evaluation.read(tmp_path / "perplexity.json")
    table = evaluation.tables[0]
    assert table.plain() in ran.stdout
    scored = {row[0]: row[1] for row in table.rows}
    assert scored == {
        "dense": 599, "recompute": 3, "0+100": 899, "4+96": 899, "4+96@text": 899
    }  # fmt: skip
    assert evaluation.data["oracle"]["config"] == "4+96"
    assert evaluation.data["oracle"]["largest"] < 1e-3
    with (tmp_path / "losses-4+96.csv").open() as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    beyond = {row[0]: row[3] for row in table.rows}
    expected = float(np.exp(np.mean(losses[127:])))
    assert beyond["4+96"] == pytest.approx(expected, rel=1e-4)
    assert beyond["0+100"] > 1.05 * beyond["4+96"]
    assert beyond["dense"] > 1.5 * beyond["4+96"]
    assert (tmp_path / "perplexity.png").stat().st_size > 5000
    assert json.loads((tmp_path / "perplexity.json").read_text())["provenance"]["vllm"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--configs", "4"], "is no cache config"),
        (["--text", "/nonexistent"], "no file /nonexistent"),
        (["--tokens", "0"], "must be at least 1"),
        (["--oracle-config", "dense"], "must be of the form S+R"),
    ],
)
def test_mistakes(arguments: list[str], message: str) -> None:
    ran = subprocess.run(
        [sys.executable, SCRIPT, *arguments], capture_output=True, text=True
    )
    assert ran.returncode == 2 and message in ran.stderr
