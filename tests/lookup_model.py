# SPDX-License-Identifier: Apache-2.0
"""A Llama that looks keys up, with weights set by hand.

It continues a text of lines ``abc: 1234`` by what followed the same characters before:
its first layer copies the last ``REACH`` tokens to every position, one head each; a
head of its second layer finds the position before which the same tokens stand, and
copies the token there. So it knows all that its cache holds and nothing else.
"""

from __future__ import annotations

import shutil
import string
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

POCKET = Path(__file__).parents[1] / "models" / "pocket"
SYMBOLS = string.ascii_lowercase + string.digits + ": ?\n"
REACH = 8
CODE = 16
HEAD = 256
HIDDEN = CODE * (REACH + 2) + CODE
"""Codes of the token, of those before it, and of the answer; then a constant."""
ANSWER = CODE * (REACH + 1)
CONSTANT = CODE * (REACH + 2)
THETA = 1e12
NEAR, FAR = 32, 64
"""The first pairs of rotary dims turn fast, those from ``FAR`` on hardly at all."""


def codes() -> torch.Tensor:
    """``[len(SYMBOLS) + 1, CODE]`` of +-1, of which no two have a product beyond 4."""
    words: list[int] = []
    for word in range(2**CODE):
        if all(6 <= (word ^ other).bit_count() <= 10 for other in words):
            words.append(word)
        if len(words) > len(SYMBOLS):
            break
    bits = [[word >> i & 1 for i in range(CODE)] for word in words]
    return torch.tensor(bits, dtype=torch.float32) * 2 - 1


def slot(index: int) -> slice:
    """Of the residual stream: the code of the token ``index`` positions back."""
    return slice(CODE * index, CODE * (index + 1))


def make_lookup_llama(folder: Path, trained_length: int) -> None:
    """Write the model and a tokenizer of bytes into ``folder``."""
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=HIDDEN,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=REACH,
        num_key_value_heads=REACH,
        head_dim=HEAD,
        max_position_embeddings=trained_length,
        rope_theta=THETA,
        rms_norm_eps=1e-12,
        tie_word_embeddings=False,
        bos_token_id=256,
        eos_token_id=257,
    )
    model = LlamaForCausalLM(config).float().eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
        set_weights(model)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(POCKET / name, folder)


def set_weights(model: LlamaForCausalLM) -> None:
    """All that are not zero."""
    ids = [ord(symbol) for symbol in SYMBOLS]
    embedding = model.model.embed_tokens.weight
    *known, other = codes()
    embedding[:, slot(0)] = other  # all tokens are of one norm
    embedding[ids, slot(0)] = torch.stack(known)
    embedding[:, CONSTANT] = 1
    model.lm_head.weight[ids, ANSWER : ANSWER + CODE] = torch.stack(known)
    model.model.norm.weight.fill_(1)
    copy, find = model.model.layers
    # As large as what they divide by.
    copy.input_layernorm.weight.fill_(((CODE + 1) / HIDDEN) ** 0.5)
    full = CODE * (REACH + 1) + 1
    find.input_layernorm.weight.fill_((full / HIDDEN) ** 0.5)
    set_copying(copy.self_attn)
    set_finding(find.self_attn)


def set_copying(attention: torch.nn.Module) -> None:
    """Head ``h`` attends the token ``h + 1`` positions back."""
    speeds = THETA ** (-2 * torch.arange(NEAR) / HEAD)
    pairs = torch.arange(NEAR)
    for head in range(REACH):
        start = HEAD * head
        angles = -speeds * (head + 1)
        attention.q_proj.weight[start + pairs, CONSTANT] = 400 * angles.cos()
        attention.q_proj.weight[start + HEAD // 2 + pairs, CONSTANT] = (
            400 * angles.sin()
        )
        attention.k_proj.weight[start + pairs, CONSTANT] = 1
        eye = torch.eye(CODE)
        attention.v_proj.weight[start : start + CODE, slot(0)] = eye
        attention.o_proj.weight[slot(head + 1), start : start + CODE] = eye


def set_finding(attention: torch.nn.Module) -> None:
    """The first head attends where the same tokens stand before.

    Nearer tokens weigh more, so that no unequal far ones outweigh them.
    """
    dims = torch.cat([torch.arange(FAR, HEAD // 2)] * 2)
    dims[len(dims) // 2 :] += HEAD // 2
    eye = torch.eye(CODE)
    for back in range(REACH):
        rows = dims[CODE * back : CODE * (back + 1)]
        attention.q_proj.weight[rows, slot(back)] = 600 * 1.6**-back * eye
        attention.k_proj.weight[rows, slot(back + 1)] = eye
    attention.v_proj.weight[:CODE, slot(0)] = eye
    attention.o_proj.weight[ANSWER : ANSWER + CODE, :CODE] = eye
