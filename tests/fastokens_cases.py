# SPDX-License-Identifier: Apache-2.0
"""``VLLM_USE_FASTOKENS=1`` beside the bounded detokenizers, in a process of its own.

It replaces the tokenizers of a whole process: ``python -m tests.fastokens_cases``.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

os.environ["VLLM_USE_FASTOKENS"] = "1"

import pytest
from vllm.tokenizers import get_tokenizer

from tests import test_detokenizer
from tests.test_detokenizer import KINDS, TEXT, TOKENIZERS

FAST = KINDS[0]
TEXTS = [TEXT, "", "<s>" + TEXT + "</s>", Path(__file__).read_text() * 8]


def main(name: str) -> None:
    """Same tokens as Hugging Face's tokenizer; same text as vLLM's detokenizer."""
    slow = TOKENIZERS[name]()
    expected = [slow(text)["input_ids"] for text in TEXTS]
    with tempfile.TemporaryDirectory() as folder:
        slow.save_pretrained(folder)
        fast = get_tokenizer(folder)
    assert "fastokens" in type(fast.backend_tokenizer).__module__
    assert [fast(text)["input_ids"] for text in TEXTS] == expected
    with pytest.MonkeyPatch.context() as patch:
        for skip_special_tokens in (True, False):
            test_detokenizer.test_same_deltas_and_text(
                fast, *FAST, skip_special_tokens, seed=0, monkeypatch=patch
            )


if __name__ == "__main__":
    main(sys.argv[1])
    print("passed")
