# SPDX-License-Identifier: Apache-2.0
"""What the extension does at each point where vLLM is entered.

Each method runs behind the vLLM function of the same purpose, be it called by a patch
of :mod:`sink_paged.patches` or by a vLLM that carries the hook itself.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from sink_paged.cli import add_arguments, merge_settings, settings_from_arguments
from sink_paged.config import CONFIG_KEY, SinkConfig, StreamConfig, sink_settings


class EngineHooks:
    """Entered into vLLM once per process; inert for engines without ``sink_paged``."""

    def add_cli_args(self, parser: argparse.ArgumentParser) -> None:
        """Add the extension's flags to the parser of the engine arguments."""
        add_arguments(parser)

    def from_cli_args(self, engine_args: Any, args: argparse.Namespace) -> None:
        """Fill the flags into ``additional_config``.

        Into that of ``args`` too: vLLM sends those to each of several API servers,
        which reads them before it loads its plugins.
        """
        settings = settings_from_arguments(args)
        if settings is not None:
            args.additional_config = engine_args.additional_config = merge_settings(
                engine_args.additional_config, settings
            )

    def update_args(self, engine_args: Any) -> None:
        """Refuse wrong settings before anything of the engine is built.

        And choose the executor, while it can be seen whether the user has.
        """
        settings = sink_settings(engine_args.additional_config)
        if settings is not None:
            from sink_paged import engine, executor

            engine.check_vllm_version()
            config = SinkConfig.from_mapping(settings)
            if settings is config:  # vLLM hashes and sends what it is given
                others = engine_args.additional_config
                engine_args.additional_config = {**others, CONFIG_KEY: asdict(config)}
            executor.choose_executor(engine_args)

    def update_config(self, vllm_config: Any) -> None:
        """Make the config that of a streaming engine."""
        settings = sink_settings(vllm_config.additional_config)
        if settings is not None:
            from sink_paged import engine

            config = SinkConfig.from_mapping(settings)
            engine.enable_sink_eviction(vllm_config, config)

    def update_request(self, vllm_config: Any, request: Any) -> None:
        """Refuse a prompt that memory cannot hold; cap a request as stock would.

        vLLM gives a request that names no ``max_tokens`` what is left of
        ``max_model_len``, which for a stream is no bound at all. Counts are those of
        the client's prompt: a dedicated sink token is put before it last.
        """
        stream = StreamConfig.load(vllm_config.additional_config)
        if stream is None or request.sampling_params is None:
            return
        self._check_size(vllm_config, stream, request)
        self._check_runner_v2(vllm_config, request)
        if stream.sink_token_id is not None:
            from sink_paged.sink_token import prepend

            prepend(request, stream.sink_token_id)

    def update_beam_search(self, vllm_config: Any, prompt: Any, params: Any) -> None:
        """Cap a beam search that names no ``max_tokens``, as any other request.

        vLLM searches in the front end, and asks the engine for a token at a time.
        """
        stream = StreamConfig.load(vllm_config.additional_config)
        if stream is not None:
            prompt_tokens = len(prompt.get("prompt_token_ids", ()))
            self._set_default(vllm_config, stream, prompt_tokens, params)

    def update_front_end(self, engine: Any) -> None:
        """Give a streaming engine's front end its output processor and its metrics.

        And wrap what of its server has no hook.

        Args:
            engine: an ``LLMEngine`` or ``AsyncLLM``, at the end of its construction.
        """
        if StreamConfig.load(engine.vllm_config.additional_config) is None:
            return
        from vllm.v1.engine.async_llm import AsyncLLM

        from sink_paged import metrics, patches
        from sink_paged.output_processor import StreamOutputProcessor

        if isinstance(engine, AsyncLLM):
            for patch in patches.SERVER:
                patch.install()
        engine.output_processor.__class__ = StreamOutputProcessor
        if engine.logger_manager is not None:
            metrics.show_counts(engine.vllm_config, engine.logger_manager)

    def update_stats(self, scheduler: Any, stats: Any) -> None:
        """Add a streaming engine's counts to the statistics of a step."""
        if StreamConfig.load(scheduler.vllm_config.additional_config) is not None:
            from sink_paged import metrics

            metrics.add_counts(scheduler, stats)

    def _check_size(self, vllm_config: Any, stream: StreamConfig, request: Any) -> None:
        from vllm.exceptions import VLLMValidationError

        from sink_paged.host_memory import check_prompt_fits

        sampling = request.sampling_params
        prompt_tokens = len(request.prompt_token_ids)
        vocab_size = vllm_config.model_config.get_vocab_size()
        check_prompt_fits(prompt_tokens, sampling, vocab_size)
        named = self._set_default(vllm_config, stream, prompt_tokens, sampling)
        if not named and sampling.min_tokens > sampling.max_tokens:
            raise VLLMValidationError(
                f"min_tokens={sampling.min_tokens} is above {sampling.max_tokens}, the "
                "most that a request gets which names no max_tokens",
                parameter="min_tokens",
                value=sampling.min_tokens,
            )

    def _set_default(
        self, vllm_config: Any, stream: StreamConfig, prompt_tokens: int, params: Any
    ) -> bool:
        """Give ``max_tokens`` its default; whether the request named one."""
        if params.max_tokens < vllm_config.model_config.max_model_len - prompt_tokens:
            return True
        params.max_tokens = stream.default_max_tokens(prompt_tokens)
        return False

    def _check_runner_v2(self, vllm_config: Any, request: Any) -> None:
        from vllm.exceptions import VLLMValidationError

        budget = getattr(request.sampling_params, "thinking_token_budget", None)
        if budget is not None and vllm_config.use_v2_model_runner:
            raise VLLMValidationError(
                "sink eviction does not support thinking_token_budget on model runner "
                "V2, which looks for it in the whole text; a server with "
                "VLLM_USE_V2_MODEL_RUNNER=0 does",
                parameter="thinking_token_budget",
                value=budget,
            )


HOOKS = EngineHooks()
