#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Train the bundled pocket models: byte-level Llamas that read Python.

The text is the standard library of the Python that runs this script, so a model can be
made again anywhere without a download; the files in ``HELD_OUT`` are never trained on.
Part of the samples teach to look things up, see ``pocket_samples``. Every sample
starts with the BOS token, as in the streams that the model later reads. With
``--sink-token`` every sample starts with a learned sink token (StreamingLLM, section
3.3), and every other has BOS after it: what a cache of one sink shows the model.

Writes a Hugging Face checkpoint (weights, config, tokenizer) and ``training.json``: the
run's provenance, its losses, and how much attention the first token takes. What is
needed to go on stays in ``--state``, and a run with the same one goes on.

    python scripts/train_pocket_model.py --weights models/pocket \\
        --output models/pocket-sinks
    python scripts/train_pocket_model.py --weights models/pocket --sink-token \\
        --output models/pocket-sink-token
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import shlex
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from muon import Muon
from pocket_samples import Bytes, Sampler, load_corpus
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sink_paged.evaluation.texts import HELD_OUT

BOS, EOS, PAD, SINK = 256, 257, 258, 259
VOCAB_SIZE = 320  # a multiple of 64, as vLLM pads the vocabulary


def byte_tokenizer(sink_token: bool = False) -> PreTrainedTokenizerFast:
    """One token per byte, token id = byte value, BOS put in front of every text.

    Args:
        sink_token: whether the sink token comes before BOS.
    """
    alphabet = byte_to_unicode()
    vocab = {char: byte for byte, char in alphabet.items()}
    vocab |= {"<bos>": BOS, "<eos>": EOS, "<pad>": PAD}
    first = "<bos>"
    if sink_token:
        vocab["<sink>"] = SINK
        first = "<sink> <bos>"
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        single=f"{first} $A",
        special_tokens=[(name, vocab[name]) for name in first.split()],
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        additional_special_tokens=["<sink>"] if sink_token else None,
        clean_up_tokenization_spaces=False,
    )
    # A question of StreamEval is answered on its own line.
    tokenizer.chat_template = (
        f"{first.replace(' ', '')}"
        "{% for message in messages %}{% set text = message['content'] %}"
        "{% if text.split('\\n')[-1].startswith('? ') %}{{ text.rstrip() }} "
        "{% else %}{{ text }}{{ '\\n' }}{% endif %}"
        "{% endfor %}"
    )
    return tokenizer


def byte_to_unicode() -> dict[int, str]:
    """The printable character that ``ByteLevel`` writes for each byte (GPT-2's map)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {b: chr(b) for b in printable} | {
        byte: chr(256 + index) for index, byte in enumerate(others)
    }


def model_config(context: int, rope_theta: float) -> LlamaConfig:
    """A 1.6M-parameter Llama with grouped-query heads of 32.

    Heads this narrow have few slow dims. With a ``rope_theta`` of 10,000 those turn too
    far for the first token to be attended from everywhere in the context: the sinks of
    a model trained that way fade within 128 tokens.
    """
    return LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=context,
        rope_theta=rope_theta,
        tie_word_embeddings=True,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )


class Trainer:
    """A model, its optimizer, and what a run records."""

    def __init__(self, args: argparse.Namespace) -> None:
        """Start anew, or from what ``--state`` holds."""
        torch.manual_seed(args.seed)
        self.args, self.step, self.seconds = args, 0, 0.0
        self.commands: list[str] = []
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.rng = np.random.default_rng(args.seed)
        self.log: list[dict[str, Any]] = []
        prefixes = [[SINK, BOS], [SINK]] if args.sink_token else [[BOS]]
        self.prefix = prefixes[0]
        train, self.held_out = load_corpus()
        shares, lines = sample_shares(args), args.lookup_lines
        self.sampler = Sampler(train, prefixes, args.context, shares, lines)
        self.train_bytes = len(train)
        config = model_config(args.context, args.rope_theta)
        if args.weights is None:
            self.model = LlamaForCausalLM(config)
        else:
            self.model = LlamaForCausalLM.from_pretrained(args.weights, config=config)
        self.model.float().to(self.device)
        self.optimizers = build_optimizers(self.model, args)
        self.forward = torch.compile(self.model) if args.compile else self.model
        if args.state is not None and args.state.exists():
            self.restore(torch.load(args.state, weights_only=False))
        command = shlex.join(["python", *sys.argv])
        if command not in self.commands[-1:]:
            self.commands.append(command)

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what ``state`` gave."""
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.rng.bit_generator.state = state["rng"]
        self.step, self.seconds = state["step"], state["seconds"]
        self.commands, self.log = state["commands"], state["log"]

    def state(self) -> dict[str, Any]:
        """What a later run needs to go on."""
        return {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "rng": self.rng.bit_generator.state,
            "step": self.step,
            "seconds": self.seconds,
            "commands": self.commands,
            "log": self.log,
        }

    def losses(self, tokens: Tensor) -> Tensor:
        """Next-token losses in nats, ``float32 [batch_size, context - 1]``."""
        half = has_fast_bfloat16(self.device)
        cast = (
            torch.autocast(self.device.type, torch.bfloat16) if half else nullcontext()
        )
        with cast:
            logits = self.forward(input_ids=tokens, use_cache=False).logits
        return torch.nn.functional.cross_entropy(
            logits[:, :-1].float().transpose(1, 2), tokens[:, 1:], reduction="none"
        )

    def train_step(self) -> float | None:
        """One update; the mean loss of its text samples, None if there are none."""
        for group in (g for o in self.optimizers for g in o.param_groups):
            group["lr"] = self.args.learning_rate * rate_factor(
                self.step, self.args.steps
            )
        tokens, weights = map(
            torch.from_numpy, self.sampler.batch(self.args.batch_size, self.rng)
        )
        losses = self.losses(tokens.to(self.device))
        weights = weights[:, 1:].to(self.device)
        (losses * weights).sum().div(weights.sum()).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        plain = text_samples(self.args.batch_size, self.sampler.shares)
        if not plain:
            return None
        text, counted = losses[:plain].detach(), weights[:plain]
        return float((text * counted).sum() / counted.sum())

    @torch.no_grad()
    def evaluate(self) -> dict[str, Any]:
        """Held-out losses, with and without the prefix, and the first token's share.

        The losses are means over the second half of fixed crops. ``first_token_share``
        is the mean attention that its queries give to the first token, by layer.
        """
        context = self.args.context
        crops = held_out_crops(self.held_out, 64, context).to(self.device)
        prefixed = crops.clone()
        prefixed[:, : len(self.prefix)] = torch.tensor(self.prefix)
        half = context // 2
        with_prefix, without = (
            float(torch.cat([self.losses(p) for p in x.split(16)])[:, half:].mean())
            for x in (prefixed, crops)
        )
        self.model.set_attn_implementation("eager")
        output = self.model(prefixed[:8], output_attentions=True, use_cache=False)
        self.model.set_attn_implementation("sdpa")
        shares = [maps[:, :, half:, 0].mean().item() for maps in output.attentions]
        return {
            "held_out_loss": round(with_prefix, 4),
            "without_prefix": round(without, 4),
            "first_token_share": [round(share, 3) for share in shares],
        }

    def save(self) -> None:
        """Write the checkpoint, its record, and the state."""
        output = self.args.output
        self.model.save_pretrained(output)
        tokenizer = byte_tokenizer(self.args.sink_token)
        tokenizer.model_max_length = self.args.context
        tokenizer.save_pretrained(output)
        record = {
            "commands": self.commands,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name()
            if self.device.type == "cuda"
            else "cpu",
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "train_bytes": self.train_bytes,
            "held_out_modules": list(HELD_OUT),
            "tokens_per_step": self.args.batch_size * self.args.context,
            "seed": self.args.seed,
            "log": self.log,
        }
        (output / "training.json").write_text(json.dumps(record, indent=1) + "\n")
        if self.args.state is not None:
            partial = self.args.state.with_name(self.args.state.name + ".partial")
            torch.save(self.state(), partial)
            partial.replace(self.args.state)

    def run(self) -> None:
        """Train; save at every evaluation, so that a cut run leaves a usable model."""
        args = self.args
        recent: list[float] = []
        before = time.monotonic() - self.seconds
        bar = tqdm(initial=self.step, total=args.steps, desc="training", mininterval=5)
        while self.step < args.steps:
            if (loss := self.train_step()) is not None:
                recent.append(loss)
            bar.update()
            if self.step % args.evaluate_every and self.step < args.steps:
                continue
            self.seconds = time.monotonic() - before
            entry = {
                "step": self.step,
                "seconds": round(self.seconds),
                "train_loss": round(float(np.mean(recent)), 4) if recent else None,
                **self.evaluate(),
            }
            recent = []
            self.log.append(entry)
            bar.write(json.dumps(entry))
            self.save()


def sample_shares(args: argparse.Namespace) -> dict[str, float]:
    """Shares of the kinds of samples that are not plain text."""
    kinds = ("packed", "lookup", "repeat")
    return {kind: getattr(args, f"{kind}_share") for kind in kinds}


def text_samples(batch_size: int, shares: dict[str, float]) -> int:
    """Samples of plain text, which come first in a batch of ``Sampler``: the rest."""
    return batch_size - sum(round(batch_size * share) for share in shares.values())


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether matrix products in bfloat16 are faster than in float32."""
    return device.type == "cuda" or torch.cpu._is_avx512_bf16_supported()


def held_out_crops(text: Bytes, count: int, length: int) -> Tensor:
    """Fixed crops of the text, ``int64 [count, length]``."""
    starts = np.random.default_rng(0).integers(0, len(text) - length, count)
    crops = np.stack([text[start : start + length] for start in starts])
    return torch.from_numpy(crops.astype(np.int64))


def rate_factor(step: int, steps: int) -> float:
    """Of the learning rate: linear over 100 steps, then a cosine to a twentieth."""
    if step < 100:
        return (step + 1) / 100
    progress = (step - 100) / max(1, steps - 100)
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress))


def build_optimizers(
    model: LlamaForCausalLM, args: argparse.Namespace
) -> list[torch.optim.Optimizer]:
    """For the matrices of the layers, and for embeddings and norms, which decay not."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    rate, decay = args.learning_rate, args.weight_decay
    adam: Any = {"lr": rate, "betas": (0.9, 0.95), "fused": True}
    if args.optimizer == "adamw":
        first: Any = torch.optim.AdamW(matrices, weight_decay=decay, **adam)
    else:
        first = Muon(matrices, lr=rate, weight_decay=decay)
    return [first, torch.optim.AdamW(others, weight_decay=0.0, **adam)]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--output", type=Path, required=True, help="checkpoint folder")
    add("--state", type=Path, help="file to go on from, written at each evaluation")
    add("--weights", type=Path, help="checkpoint to start from instead of noise")
    add("--steps", type=int, default=2000)
    add("--batch-size", type=int, default=64, help="samples a step (64)")
    add("--context", type=int, default=128, help="trained length (128)")
    add("--rope-theta", type=float, default=1e6, help="(1e6)")
    add("--sink-token", action="store_true", help="a learned sink token before BOS")
    add("--packed-share", type=float, default=0.4, help="of the samples (0.4)")
    add("--lookup-share", type=float, default=0.2, help="of the samples (0.2)")
    add("--repeat-share", type=float, default=0.15, help="of the samples (0.15)")
    add("--lookup-lines", type=int, default=500_000, help="of the StreamEval text")
    add("--optimizer", choices=["muon", "adamw"], default="muon", help="(muon)")
    add("--learning-rate", type=float, default=3e-3)
    add("--weight-decay", type=float, default=0.1)
    add("--evaluate-every", type=int, default=100, metavar="STEPS")
    add("--seed", type=int, default=0)
    add("--compile", action="store_true", help="faster steps after a minute or two")
    add("--threads", type=int, default=0, help="0: torch's default")
    args = parser.parse_args()
    shares = sample_shares(args)
    if min(shares.values()) < 0 or text_samples(args.batch_size, shares) < 0:
        parser.error(
            f"the shares must be from 0, and not above {args.batch_size} samples in all"
        )
    if args.state is not None and not args.state.parent.is_dir():
        parser.error(f"--state: no folder {args.state.parent}")
    return args


def main() -> None:
    args = parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    args.output.mkdir(parents=True, exist_ok=True)
    Trainer(args).run()


if __name__ == "__main__":
    main()
