# SPDX-License-Identifier: Apache-2.0
"""Attention maps against the weights that eager attention returns."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from sink_paged.evaluation import attention_observer
from sink_paged.evaluation.attention_maps import (
    LogitSums,
    ShareSums,
    cut_texts,
    position_bins,
)
from sink_paged.evaluation.attention_observer import Rows, make_observable, observe
from sink_paged.evaluation.report import Evaluation
from tests.families import FAMILIES, SLIDING, make_model

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import attention_maps as script  # noqa: E402

POCKET = ROOT / "models" / "pocket"
GQA = "Llama (GQA)"


def random_texts(count: int, length: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 320, (count, length))


def eager_weights(model: PreTrainedModel, texts: np.ndarray) -> list[np.ndarray]:
    """A layer each, ``[texts, heads, queries, keys]``."""
    with torch.no_grad():
        output = model(torch.as_tensor(texts), output_attentions=True, use_cache=False)
    return [weights.double().numpy() for weights in output.attentions]


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - np.nanmax(logits, axis=-1, keepdims=True))
    weights[np.isnan(weights)] = 0
    return weights / weights.sum(-1, keepdims=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_softmax_of_the_logits_is_the_models_own(family: str) -> None:
    """Of one text, as the mean over several is of logits, not of weights."""
    texts = random_texts(1, 48)
    expected = eager_weights(make_model(family), texts)
    sums = LogitSums()
    observe(make_observable(make_model(family)), texts, sums)
    means = sums.means()
    assert list(means) == list(range(len(expected)))
    for layer, weights in enumerate(expected):
        visible = weights[0] > 0
        assert np.isnan(means[layer][np.triu(visible == 0, 1)]).all()
        # Learned sink logits take a part; what is left is shared as the others say.
        weights = weights[0] / weights[0].sum(-1, keepdims=True)
        assert np.abs(softmax(means[layer]) - weights).max() < 2e-5


def test_logits_of_rotated_queries_and_keys() -> None:
    """The scaled products themselves, not only up to a constant of each query."""
    texts = random_texts(1, 12)
    seen: dict[int, Rows] = {}

    class Keep:
        def see(self, rows: Rows) -> None:
            seen[rows.layer] = rows

    model = make_observable(make_model(GQA))
    observe(model, texts, Keep())
    sums = LogitSums()
    observe(model, texts, sums)
    for layer, rows in seen.items():
        for head in range(4):
            query = rows.query[0, head].double().numpy()
            key = rows.key[0, head // 2].double().numpy()
            expected = query @ key.T / 32**0.5
            lower = np.tril_indices(12)
            actual = sums.means()[layer][head]
            assert np.abs(actual[lower] - expected[lower]).max() < 1e-4
            assert np.isnan(actual[np.triu_indices(12, 1)]).all()


@pytest.mark.parametrize("family", [GQA, "Gemma 2", "gpt-oss", "Qwen3"])
def test_bfloat16(family: str) -> None:
    """Its rounding is not taken for another softmax; the logits are about the same."""
    texts = random_texts(4, 48)
    sums, rounded = LogitSums(), LogitSums()
    observe(make_observable(make_model(family)), texts, sums)
    observe(make_observable(make_model(family).bfloat16()), texts, rounded)
    first, expected = rounded.means()[0], sums.means()[0]
    assert np.nanmax(np.abs(first - expected)) < 0.05 * np.nanmax(np.abs(expected))


def test_a_mean_over_texts_is_that_of_each() -> None:
    texts = random_texts(5, 16)
    model = make_observable(make_model(GQA))
    together, one_by_one = LogitSums(), []
    observe(model, texts, together, batch=3)
    for text in texts:
        alone = LogitSums()
        observe(model, text[None], alone)
        one_by_one.append(alone.means())
    for layer, mean in together.means().items():
        expected = np.mean([alone[layer] for alone in one_by_one], axis=0)
        np.testing.assert_allclose(mean, expected, atol=1e-4)


@pytest.mark.parametrize("family", [GQA, SLIDING, "Gemma 2", "gpt-oss"])
@pytest.mark.parametrize("block", [attention_observer.BLOCK, 5000])
def test_shares_are_the_models_own(
    family: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the blocks of queries."""
    monkeypatch.setattr(attention_observer, "BLOCK", block)
    texts = random_texts(2, 90)
    edges = [8, 20, 53, 90]
    sums = ShareSums(edges)
    observe(make_observable(make_model(family)), texts, sums, batch=2)
    for layer, weights in enumerate(eager_weights(make_model(family), texts)):
        weights = weights.mean(0)
        recent = [weights[:, i, i - 4 : i].sum(-1) for i in range(8, 90)]
        parts = np.stack(
            (
                weights[:, 8:, 0],
                weights[:, 8:, :4].sum(-1),
                np.stack(recent, axis=-1),
            )
        )
        for i, (low, high) in enumerate(zip(edges, edges[1:], strict=False)):
            expected = parts[..., low - 8 : high - 8].mean(-1)
            actual = sums.shares()[layer][..., i]
            assert np.abs(actual - expected).max() < 1e-5


def test_shares_of_a_whole() -> None:
    """The first four tokens and the four before the query are all that query 8 has,
    bar itself; no share is negative, the first token's is in that of the first four."""
    sums = ShareSums([4, 5, 8, 9, 40])
    observe(make_observable(make_model(GQA)), random_texts(3, 40), sums)
    for shares in sums.shares().values():
        first, first_four, recent = shares
        assert (first >= 0).all() and (first <= first_four + 1e-7).all()
        assert (first_four <= 1 + 1e-6).all()
        # Query 4: keys 0 to 3 are both the first four and the four before it.
        np.testing.assert_allclose(first_four[:, 0], recent[:, 0], atol=1e-6)
        assert (first_four[:, 2] + recent[:, 2] < 1).all()


def test_norms_of_the_first_tokens() -> None:
    """A first token whose value is scaled shows by that factor, its key not."""
    model = make_model(GQA)
    texts = np.concatenate(
        (np.full((3, 1), 256), np.random.default_rng(2).integers(0, 256, (3, 59))), 1
    )
    plain = ShareSums([8, 60])
    observe(make_observable(model), texts, plain)

    def scale(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        output[:, 0] *= 10
        return output

    model.model.layers[1].self_attn.v_proj.register_forward_hook(scale)
    scaled = ShareSums([8, 60])
    observe(model, texts, scaled)
    expected = plain.norms()[1].copy()
    expected[1, 0] *= 10
    np.testing.assert_allclose(scaled.norms()[1], expected, rtol=1e-4)
    np.testing.assert_allclose(scaled.norms()[0], plain.norms()[0], rtol=1e-6)


def test_a_softmax_of_another_kind_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_observable(make_model(GQA))
    code = sys.modules[type(model).__module__]
    eager = code.eager_attention_forward

    def sharper(module: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return eager(module, 2 * query, *args, **kwargs)

    monkeypatch.setattr(code, "eager_attention_forward", sharper)
    with pytest.raises(ValueError, match="layer 0 computes its attention"):
        observe(model, random_texts(1, 16), LogitSums())


def test_a_model_without_the_interface_is_refused() -> None:
    config = BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=2)
    with pytest.raises(ValueError, match="BloomForCausalLM cannot be observed"):
        make_observable(BloomForCausalLM(config))


def test_texts_are_cut_by_seed() -> None:
    documents = [list(range(30)), [], list(range(100, 107)), list(range(200, 260))]
    texts = cut_texts(documents, 500, 9, [256], seed=3)
    assert texts.shape == (500, 9)
    assert (texts[:, 0] == 256).all()
    assert (np.diff(texts[:, 1:]) == 1).all()
    # Every place of the documents that are long enough, the last ones included.
    assert set(texts[:, 1]) == {*range(23), *range(200, 253)}
    np.testing.assert_array_equal(texts, cut_texts(documents, 500, 9, [256], seed=3))
    assert (texts != cut_texts(documents, 500, 9, [256], seed=4)).any()
    with pytest.raises(ValueError, match="longest document has 60 tokens"):
        cut_texts(documents, 1, 61, [], seed=0)


@pytest.mark.parametrize(
    ("trained", "length"), [(512, 512), (512, 2000), (512, 100), (4096, 4096), (9, 9)]
)
def test_bins(trained: int, length: int) -> None:
    edges = position_bins(trained, length)
    assert edges[0] == 8
    assert edges[-1] == length
    assert edges == sorted(set(edges))
    if trained < length:
        assert trained in edges


SMALL = ["--sentences=6", "--texts=2", "--length=96", "--device=cpu"]


@pytest.mark.slow
def test_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Files are written, with equal figures for equal seeds."""
    folder = tmp_path / "out"
    arguments = [*SMALL, "--seed=5", "--output-dir", str(folder)]
    assert script.main(arguments) == 0
    result = Evaluation.read(folder / "attention_maps.json")
    assert result.name == "attention_maps"
    assert len(result.plots) == 2
    for plot in result.plots:
        assert (folder / plot).stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert re.search(r"whose first token takes more than 30%.*: [3-9] of 24", printed)
    assert all(table.plain() in printed for table in result.tables)
    logits = result.data["logits"]["3"]
    assert list(logits) == ["mean of heads", *map(str, range(6))]
    assert [len(row) for row in logits["5"]] == list(range(1, 17))
    edges, shares = result.data["edges"], result.data["shares"]["0"]
    assert np.shape(list(shares.values())) == (3, 6, len(edges) - 1)
    assert result.data["settings"]["prefix"] == [256]
    again, settings = script.measure(script.parse_arguments(arguments))
    repeated = json.loads(json.dumps(script.figures(again, settings)))
    assert repeated == result.data


@pytest.mark.slow
def test_script_on_many_heads(tmp_path: Path) -> None:
    """A selection is drawn, the tables and counts are of all; past the trained length,
    whose end the tables show."""
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=96,
        intermediate_size=64,
        num_hidden_layers=10,
        num_attention_heads=12,
        num_key_value_heads=4,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    for file in POCKET.glob("tokenizer*"):
        (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    options = ["--model", str(tmp_path / "model"), "--output-dir", str(tmp_path)]
    assert script.main([*SMALL, *options, "--no-bos", "--sink-share=0"]) == 0
    result = Evaluation.read(tmp_path / "attention_maps.json")
    assert list(result.data["logits"]) == list("01345689")
    assert list(result.data["logits"]["0"]) == ["mean of heads", "0", "4", "7", "11"]
    layers, heads, norms = result.tables
    assert len(layers.rows) == len(norms.rows) == 10
    assert layers.rows[9][-1] == "12 of 12"
    assert "120 of 120" in result.summary
    assert len(heads.rows) == 8 * 4
    assert layers.title.endswith("- 63")
    assert result.data["edges"][-1] == 96
    chosen = [*SMALL, *options, "--layers", "9", "2", "--heads", "3"]
    found, _ = script.measure(script.parse_arguments(chosen))
    assert [row[0] for row in script.head_table(found).rows] == ["2.3", "9.3"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "no/such/model"], "no/such/model"),
        (["--text", "no_such_text"], "no_such_text"),
        (["--length", "1000000"], "no text of 1,000,000 tokens"),
        (["--layers", "0", "4"], "layers 0 to 3"),
        (["--heads", "6"], "heads 0 to 5"),
        (["--sentences", "0"], "--sentences"),
        (["--sentence-tokens", "1"], "--sentence-tokens"),
        (["--length", "15"], "--length"),
        (["--device", "nonsense"], "nonsense"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_errors_of_the_user(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = [*SMALL[:2], *arguments, "--output-dir", str(tmp_path / "out")]
    try:
        status = script.main(options)
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "error: " in last
    assert message in last
    assert not (tmp_path / "out").exists()
