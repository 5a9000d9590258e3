# SPDX-License-Identifier: Apache-2.0
"""vLLM's offline API behind the ``Engine`` protocol."""

from __future__ import annotations

import os
from typing import Any

import psutil
from vllm import LLM, SamplingParams
from vllm.platforms import current_platform
from vllm.v1.engine.exceptions import EngineDeadError

from sink_paged.offline.lines import Request, Result
from sink_paged.offline.runner import RefusedError


class VllmEngine:
    """A vLLM engine that takes requests while others run.

    ``LLM.enqueue`` takes one request without waiting, ``LLMEngine.step`` advances all.
    """

    def __init__(
        self, settings: dict[str, Any], sampling: dict[str, Any], *, share: int = 1
    ) -> None:
        """Start vLLM.

        Args:
            settings: keyword arguments of ``vllm.LLM``.
            sampling: settings of ``vllm.SamplingParams`` that a request's own override,
                and that override the model's.
            share: engines that share this machine.
        """
        self.llm = LLM(**{**_cpu_defaults(share), **settings})
        model_config = self.llm.llm_engine.vllm_config.model_config
        self.sampling = {**model_config.get_diff_sampling_param(), **sampling}
        self._requests: dict[str, Request] = {}

    @property
    def in_flight(self) -> int:
        """Streams that were submitted and have not finished."""
        return len(self._requests)

    def submit(self, request: Request) -> None:
        """Queue a request.

        Raises:
            RefusedError: whatever vLLM finds wrong with this request alone.
        """
        try:
            params = SamplingParams(**{**self.sampling, **request.sampling})
            if request.kind == "messages":
                ids = self.llm.enqueue_chat([request.prompt], params, use_tqdm=False)
            else:
                prompt = {request.kind: request.prompt}
                ids = self.llm.enqueue([prompt], params, use_tqdm=False)
        except EngineDeadError:
            raise
        except Exception as error:  # of many kinds: templates, tokenizers, checks
            raise RefusedError(str(error) or type(error).__name__) from error
        # vLLM answers with the number it gave plus a random suffix; outputs carry the
        # number alone.
        self._requests[ids[0].partition("-")[0]] = request

    def step(self) -> list[Result]:
        """Advance all streams in flight, return those that finished."""
        return [
            Result(
                request=self._requests.pop(output.request_id),
                text=output.outputs[0].text,
                token_ids=list(output.outputs[0].token_ids),
                finish_reason=output.outputs[0].finish_reason,
                prompt_tokens=len(output.prompt_token_ids or ()),
                cached_tokens=output.num_cached_tokens or 0,
            )
            for output in self.llm.llm_engine.step()
            if output.finished
        ]


def _cpu_defaults(share: int) -> dict[str, Any]:
    """A quarter of the free memory: vLLM's default takes 92 % of all, or fails."""
    if not current_platform.is_cpu() or os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
        return {}
    free = int(psutil.virtual_memory().available)
    return {"kv_cache_memory_bytes": max(2**30, free // 4 // share)}
