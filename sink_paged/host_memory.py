# SPDX-License-Identifier: Apache-2.0
"""Whether a prompt fits into the host's memory, asked before vLLM takes it in."""

from __future__ import annotations

from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams

TOKEN_BYTES = 128
"""A prompt token's share in vLLM's processes: Python integers and lists of them in
front end, engine core and worker, the message between them, block hashes."""
LOGPROB_BYTES = 480
"""A prompt log-probability as vLLM reports it: a Python object in a dictionary."""
FLAT_LOGPROB_BYTES = 280
"""The same with ``flat_logprobs``: entries of lists."""
FREE_BYTES_ASKED_ABOVE = 1 << 26
"""Smaller prompts are not worth asking the system how much memory is free."""


def check_prompt_fits(num_tokens: int, params: SamplingParams, vocab_size: int) -> None:
    """Refuse a prompt whose bookkeeping would not fit into free memory.

    Args:
        num_tokens: the prompt's length.
        params: its ``prompt_logprobs`` are asked for; -1 asks for the vocabulary.
        vocab_size: of the model.

    Raises:
        VLLMValidationError: with what is needed and what is free.
    """
    per_token = TOKEN_BYTES
    scored = params.prompt_logprobs
    if scored is not None:
        entry_bytes = FLAT_LOGPROB_BYTES if params.flat_logprobs else LOGPROB_BYTES
        per_token += entry_bytes * (vocab_size if scored == -1 else scored + 1)
    needed = num_tokens * per_token
    if needed < FREE_BYTES_ASKED_ABOVE:
        return
    # Takes a fifth of a second to import, which the first short request need not wait.
    from vllm.model_executor.model_loader import weight_utils

    free = weight_utils._get_available_ram_bytes()
    if needed > free:
        raise VLLMValidationError(
            f"the prompt of {num_tokens} tokens needs about {needed >> 20} MiB of host "
            f"memory ({per_token} bytes a token), and {free >> 20} MiB are free: "
            "shorten it"
            + (", or leave out prompt_logprobs" if per_token > TOKEN_BYTES else ""),
            parameter="prompt",
            value=num_tokens,
        )
