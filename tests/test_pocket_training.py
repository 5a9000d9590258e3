# SPDX-License-Identifier: Apache-2.0
"""The pocket models' samples and tokenizers; a training run that is cut goes on."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

SCRIPTS = Path(__file__).parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))

import train_pocket_model as training  # noqa: E402
from muon import Muon, orthogonalize  # noqa: E402
from pocket_samples import FACT_WEIGHT, SHORTEST_CROP, Sampler, lookup_text  # noqa: E402

CONTEXT = 96


def test_lookups_weigh_their_answers() -> None:
    text, weights = lookup_text(400, 5)
    assert len(text) == len(weights)
    lines = bytes(text).decode().splitlines(keepends=True)
    position, facts, answers = 0, {}, 0
    for line in lines:
        key, value = line.removeprefix("? ").rstrip("\n").split(": ")
        marked = weights[position : position + len(line)] == 1
        if line.startswith("? "):
            assert value == facts[key]
            assert "".join(np.array(list(line))[marked]) == value
            answers += 1
        else:
            facts[key] = value
            assert (weights[position : position + len(line)] == FACT_WEIGHT).all()
        position += len(line)
    assert answers == 100


def test_samples() -> None:
    """As many of each kind as asked for; their prefix counts for nothing."""
    lines = [f"def f{i}(x):\n    return x + {i * i}\n" for i in range(1000)]
    text = np.frombuffer("".join(lines).encode(), np.uint8)
    shares = {"packed": 0.25, "lookup": 0.25, "repeat": 0.25}
    sampler = Sampler(text, [[259, 256]], CONTEXT, shares, lookup_lines=100)
    tokens, weights = sampler.batch(8, np.random.default_rng(0))
    assert tokens.shape == weights.shape == (8, CONTEXT)
    assert (tokens[:, :2] == [259, 256]).all() and (weights[:, :2] == 0).all()
    assert (weights[:4, 2:] == 1).all()
    rows = [bytes(row[2:].astype(np.uint8)) for row in tokens]
    assert all(row in bytes(text) for row in rows[:2])
    for row in rows[2:4]:
        assert row not in bytes(text)
        begin, crops = 0, 0
        while begin < len(row):  # the longest stretch of the text from here on
            ends = range(len(row), begin, -1)
            begin = next(end for end in ends if row[begin:end] in bytes(text))
            crops += 1
        assert 2 <= crops <= len(row) / SHORTEST_CROP + 1
    lookups = set(np.unique(weights[4:6, 2:]).tolist())
    assert lookups == {np.float32(FACT_WEIGHT), 1.0}
    for row, kept in zip(tokens[6:, 2:], weights[6:, 2:], strict=True):
        period = int((kept == 0).sum())
        assert 8 <= period < CONTEXT // 3
        assert (row[period:] == row[:-period]).all() and (kept[period:] == 1).all()


def test_samples_with_and_without_bos() -> None:
    text = np.frombuffer(b"x = 1\n" * 100, np.uint8)
    shares = dict.fromkeys(("packed", "lookup", "repeat"), 0.0)
    sampler = Sampler(text, [[259, 256], [259]], CONTEXT, shares, lookup_lines=0)
    tokens, weights = sampler.batch(64, np.random.default_rng(0))
    assert (tokens[:, 0] == 259).all() and (weights[:, 0] == 0).all()
    with_bos = tokens[:, 1] == 256
    assert 20 < with_bos.sum() < 44
    assert (weights[with_bos, 1] == 0).all() and (weights[~with_bos, 1:] == 1).all()
    assert (tokens[:, 2:] < 256).all() and (weights[:, 2:] == 1).all()


@pytest.mark.parametrize(("sink_token", "prefix"), [(False, [256]), (True, [259, 256])])
def test_tokenizers(sink_token: bool, prefix: list[int], tmp_path: Path) -> None:
    training.byte_tokenizer(sink_token).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer("é\n")["input_ids"] == [*prefix, *"é\n".encode()]
    assert tokenizer.decode([*"é\n".encode()]) == "é\n"
    for content, text in (
        ("a", b"a\n"),
        ("a: 1\n? a:", b"a: 1\n? a: "),
        ("a: 1\n? a: ", b"a: 1\n? a: "),
    ):
        chat = tokenizer.apply_chat_template([{"role": "user", "content": content}])
        ids = chat if isinstance(chat, list) else chat["input_ids"]
        assert ids == [*prefix, *text]


@pytest.mark.parametrize("shape", [(2, 24, 64), (1, 64, 24), (3, 32, 32)])
def test_orthogonal_updates(shape: tuple[int, int, int]) -> None:
    """Each matrix keeps its singular vectors; its values come near 1."""
    left, _, right = torch.linalg.svd(
        torch.randn(shape, generator=torch.Generator().manual_seed(0)), False
    )
    values = torch.linspace(0.2, 1, left.shape[2])
    found = orthogonalize(left * values @ right)
    moved = left.mT @ found @ right.mT
    new = moved.diagonal(dim1=1, dim2=2)
    assert (new > 0.6).all() and (new < 1.25).all()
    torch.testing.assert_close(moved, torch.diag_embed(new), atol=1e-4, rtol=0)


def test_muon_is_that_of_torch() -> None:
    """To bfloat16's precision, in which torch's orthogonalises."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(48, 16), (16, 48), (32, 32), (32, 32)]
    start = [torch.randn(shape, generator=generator) for shape in shapes]
    ours, theirs = ([torch.nn.Parameter(p.clone()) for p in start] for _ in range(2))
    optimizers = [
        Muon(ours, lr=0.01, weight_decay=0.1),
        torch.optim.Muon(
            theirs, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
        ),
    ]
    for _ in range(3):
        for left, right in zip(ours, theirs, strict=True):
            left.grad = torch.randn(left.shape, generator=generator)
            right.grad = left.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for left, right, before in zip(ours, theirs, start, strict=True):
        assert (left - right).norm() < 0.02 * (right - before).norm()


def train(monkeypatch: pytest.MonkeyPatch, folder: Path, *options: str) -> Path:
    """Run the script with few small steps."""
    arguments = ["train", "--output", str(folder), "--batch-size", "4", *options]
    arguments += ["--context", str(CONTEXT), "--lookup-lines", "200", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", arguments)
    training.main()
    return folder


def test_a_cut_run_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """To the same model, and the log is that of one run."""
    whole = train(monkeypatch, tmp_path / "a", "--steps", "4", "--evaluate-every", "2")
    state = str(tmp_path / "state.pt")

    class CutError(Exception):
        pass

    step = training.Trainer.train_step

    def cut_at_two(trainer: training.Trainer) -> float:
        if trainer.step == 2:
            raise CutError
        return step(trainer)

    options = ("--steps", "4", "--evaluate-every", "2", "--state", state)
    monkeypatch.setattr(training.Trainer, "train_step", cut_at_two)
    with pytest.raises(CutError):
        train(monkeypatch, tmp_path / "b", *options)
    monkeypatch.setattr(training.Trainer, "train_step", step)
    resumed = train(monkeypatch, tmp_path / "b", *options)
    left, right = (load_file(f / "model.safetensors") for f in (whole, resumed))
    assert all(torch.equal(left[name], right[name]) for name in left)
    logs = [
        json.loads((f / "training.json").read_text())["log"] for f in (whole, resumed)
    ]
    steps = [[entry["step"] for entry in log] for log in logs]
    assert steps == [[2, 4], [2, 4]]
    assert len(logs[0][0]["first_token_share"]) == 4
    assert logs[0][1]["held_out_loss"] == logs[1][1]["held_out_loss"]


@pytest.mark.parametrize(
    ("size", "shares"),
    [
        (64, (0.4, 0.2, 0.15)),
        (8, (0.25, 0.25, 0.25)),
        (4, (0.5, 0.5, 0)),
        (3, (0, 0, 0)),
    ],
)
def test_text_samples_are_those_of_the_sampler(
    size: int, shares: tuple[float, float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = dict(zip(("packed", "lookup", "repeat"), shares, strict=True))
    text = np.frombuffer(b"x = 1\n" * 1000, np.uint8)
    sampler = Sampler(text, [[256]], CONTEXT, kinds, lookup_lines=100)
    drawn: Counter[str] = Counter()

    def counted(name: str) -> None:
        draw = sampler.kinds[name]

        def draw_one(*args: object) -> object:
            drawn[name] += 1
            assert name != "plain" or drawn.total() == drawn["plain"], "it comes first"
            return draw(*args)

        monkeypatch.setitem(sampler.kinds, name, draw_one)

    for name in list(sampler.kinds):
        counted(name)
    sampler.batch(size, np.random.default_rng(0))
    assert drawn["plain"] == training.text_samples(size, kinds)


class EvenLoss(torch.nn.Module):
    """Of a vocabulary of 320, every token is as likely."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(320))

    def forward(self, input_ids: torch.Tensor, **_: object) -> object:
        logits = self.weight.expand(*input_ids.shape, -1)
        return type("Output", (), {"logits": logits})


@pytest.mark.parametrize("plain_share", [0.5, 0.0])
def test_train_loss_is_the_mean_of_text_that_counts(
    plain_share: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The prefix of two tokens does not; None where no sample is plain text."""
    arguments = ["--output", str(tmp_path), "--batch-size", "4", "--sink-token"]
    arguments += ["--context", str(CONTEXT), "--lookup-share", "0"]
    arguments += ["--packed-share", str(1 - plain_share), "--repeat-share", "0"]
    monkeypatch.setattr(sys, "argv", ["train", *arguments])
    trainer = training.Trainer(training.parse_args())
    trainer.model = trainer.forward = EvenLoss()
    trainer.optimizers = []
    loss = trainer.train_step()
    if plain_share:
        assert loss == pytest.approx(math.log(320), rel=1e-3)
    else:
        assert loss is None


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--packed-share", "0.8", "--lookup-share", "0.5"], "the shares must be from"),
        (["--packed-share", "-0.1"], "the shares must be from"),
        (["--state", "missing/state.pt"], "--state: no folder missing"),
    ],
)
def test_unusable_arguments_are_refused(
    wrong: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["train", "--output", "out", *wrong])
    with pytest.raises(SystemExit) as stop:
        training.parse_args()
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_state_is_replaced_whole(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A run that is killed while it writes leaves the state before."""
    state = tmp_path / "state.pt"
    options = ("--evaluate-every", "1", "--state", str(state))
    train(monkeypatch, tmp_path / "a", "--steps", "1", *options)
    before = state.read_bytes()
    save = torch.save

    def killed(document: object, path: Path) -> None:
        save(document, path)
        path.write_bytes(path.read_bytes()[:100])
        raise KeyboardInterrupt

    monkeypatch.setattr(training.torch, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        train(monkeypatch, tmp_path / "a", "--steps", "2", *options)
    assert state.read_bytes() == before
    monkeypatch.setattr(training.torch, "save", save)
    train(monkeypatch, tmp_path / "a", "--steps", "2", *options)
    assert torch.load(state, weights_only=False)["step"] == 2
    assert not list(tmp_path.glob("*.partial"))
