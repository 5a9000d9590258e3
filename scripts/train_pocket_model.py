#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Train the bundled pocket model: a byte-level Llama that reads Python.

The text is the standard library of the Python that runs this script, so the model can
be made again anywhere without a download. The files in ``HELD_OUT`` are never trained
on; ``make demo`` and the tests read those. Every training sample starts with the BOS
token, as in the streams that the model later reads. Writes a Hugging Face checkpoint
(weights, config, tokenizer) and ``training.json``: the run's provenance and its losses.

    python scripts/train_pocket_model.py --output models/pocket --steps 4000
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HELD_OUT = ("argparse.py", "tarfile.py", "typing.py")
SKIPPED_FOLDERS = {
    "test",
    "tests",
    "site-packages",
    "idlelib",
    "lib2to3",
    "__pycache__",
}
BOS, EOS, PAD = 256, 257, 258
VOCAB_SIZE = 320  # a multiple of 64, as vLLM pads the vocabulary


def standard_library_files() -> list[Path]:
    """Python sources of the running interpreter's standard library, sorted by name."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return [
        path
        for path in sorted(root.rglob("*.py"))
        if not SKIPPED_FOLDERS.intersection(path.relative_to(root).parts)
    ]


def load_corpus() -> tuple[np.ndarray, np.ndarray]:
    """Training and held-out text as byte arrays, ``uint8 [num_bytes]``."""
    train: list[bytes] = []
    held_out: list[bytes] = []
    for path in standard_library_files():
        (held_out if path.name in HELD_OUT else train).append(path.read_bytes())
    if not train or not held_out:
        raise SystemExit("this Python carries no standard library sources to train on")
    return tuple(np.frombuffer(b"\n".join(t), np.uint8) for t in (train, held_out))  # type: ignore[return-value]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, token id = byte value, BOS put in front of every text."""
    alphabet = byte_to_unicode()
    vocab = {char: byte for byte, char in alphabet.items()}
    vocab |= {"<bos>": BOS, "<eos>": EOS, "<pad>": PAD}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", BOS)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = (
        "{{ bos_token }}"
        "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
    )
    return tokenizer


def byte_to_unicode() -> dict[int, str]:
    """The printable character that ``ByteLevel`` writes for each byte (GPT-2's map)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {b: chr(b) for b in printable} | {
        byte: chr(256 + index) for index, byte in enumerate(others)
    }


def model_config(context: int) -> LlamaConfig:
    """A 1.6M-parameter Llama with grouped-query heads of 32."""
    return LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=context,
        rope_theta=10000.0,
        tie_word_embeddings=True,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )


def sample_batch(
    text: np.ndarray, batch_size: int, context: int, rng: np.random.Generator
) -> Tensor:
    """Random crops behind a BOS token: ``int64 [batch_size, context]``."""
    starts = rng.integers(0, len(text) - context, batch_size)
    crops = np.stack([text[s : s + context - 1] for s in starts]).astype(np.int64)
    bos = np.full((batch_size, 1), BOS, np.int64)
    return torch.from_numpy(np.concatenate([bos, crops], axis=1))


def sequence_losses(model: LlamaForCausalLM, batch: Tensor) -> Tensor:
    """Next-token losses in nats: ``float32 [batch_size, context - 1]``."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(input_ids=batch, use_cache=False).logits
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].float().transpose(1, 2), batch[:, 1:], reduction="none"
    )


def learning_rate_factor(step: int, steps: int) -> float:
    """Linear warm-up over 100 steps, then a cosine to a twentieth."""
    if step < 100:
        return (step + 1) / 100
    progress = (step - 100) / max(1, steps - 100)
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress))


def build_optimizers(
    model: LlamaForCausalLM, learning_rate: float
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for embeddings and norms."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(
            matrices,
            lr=learning_rate,
            weight_decay=0.1,
            momentum=0.95,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(
            others, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0
        ),
    ]


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, text: np.ndarray, context: int) -> float:
    """Mean held-out loss in nats per byte over 64 fixed crops."""
    batch = sample_batch(text, 64, context, np.random.default_rng(0))
    return float(sequence_losses(model, batch).mean())


def save(
    model: LlamaForCausalLM, output: Path, record: dict[str, Any], context: int
) -> None:
    """Write weights, tokenizer and the training record into ``output``."""
    model.save_pretrained(output)
    tokenizer = byte_tokenizer()
    tokenizer.model_max_length = context
    tokenizer.save_pretrained(output)
    (output / "training.json").write_text(json.dumps(record, indent=1) + "\n")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="checkpoint folder")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch-size", type=int, default=16, help="samples a step")
    parser.add_argument("--context", type=int, default=512, help="trained length")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0, help="0: torch's default")
    return parser.parse_args()


def main() -> None:
    """Train, and save at every evaluation so that a cut run leaves a usable model."""
    args = parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    train_text, held_out_text = load_corpus()
    model = LlamaForCausalLM(model_config(args.context))
    optimizers = build_optimizers(model, args.learning_rate)
    schedulers = [
        torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate_factor(step, args.steps)
        )
        for optimizer in optimizers
    ]
    record: dict[str, Any] = {
        "command": " ".join(sys.argv),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "train_bytes": len(train_text),
        "held_out_files": list(HELD_OUT),
        "tokens_per_step": args.batch_size * args.context,
        "seed": args.seed,
        "log": [],
    }
    started, recent = time.time(), []
    progress = tqdm(range(args.steps), desc="training", mininterval=5)
    for step in progress:
        batch = sample_batch(train_text, args.batch_size, args.context, rng)
        loss = sequence_losses(model, batch).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad(set_to_none=True)
        recent.append(loss.item())
        if (step + 1) % 250 == 0 or step + 1 == args.steps:
            entry = {
                "step": step + 1,
                "seconds": round(time.time() - started),
                "train_loss": round(sum(recent) / len(recent), 4),
                "held_out_loss": round(evaluate(model, held_out_text, args.context), 4),
            }
            record["log"].append(entry)
            recent = []
            progress.write(json.dumps(entry))
            save(model, args.output, record, args.context)


if __name__ == "__main__":
    main()
