# SPDX-License-Identifier: Apache-2.0
"""Where vLLM's model runner V2 meets the bounded state of streams."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.output import SchedulerOutput

from sink_paged.kv_cache import group_spec
from sink_paged.runner_v2.block_tables import RingBlockTables
from sink_paged.runner_v2.requests import StreamRequestState
from sink_paged.runner_v2.sampling import adopt_sampler
from sink_paged.runner_v2.speculation import adopt_speculator, tokens_looked_back

if TYPE_CHECKING:
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner as Stock
else:
    Stock = object


class StreamRunner(Stock):
    """Put before a runner's own class; the texts' tokens come from the host.

    Attributes:
        req_states: see ``StreamRequestState``.
    """

    req_states: StreamRequestState
    input_buffers: Any
    prompt_logprobs_worker: Any

    @classmethod
    def adopt(cls, runner: Any) -> None:
        """Turn ``runner``, which has no model yet, into a runner of streams."""
        kind = type(runner)
        runner.__class__ = type(f"Stream{kind.__name__}", (cls, kind), {})
        runner.req_states = StreamRequestState.adopt(
            runner.req_states, tokens_looked_back(runner.vllm_config)
        )
        adopt_speculator(runner, runner.req_states)

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """See ``GPUModelRunner``."""
        super().load_model(*args, **kwargs)
        adopt_sampler(self, self.req_states)

    def add_requests(self, scheduler_output: SchedulerOutput) -> None:
        """See ``GPUModelRunner``; the whole texts are at hand until it is done."""
        super().add_requests(scheduler_output)
        self.req_states.texts.clear()

    def prepare_inputs(
        self, scheduler_output: SchedulerOutput, batch: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """See ``GPUModelRunner``, whose kernel for prompts has nothing to do.

        It fills in what was sampled afterwards, over the zeros that are written here.
        """
        states, rows = self.req_states, batch.idx_mapping_np
        states.targets = None
        if batch.has_prefill:
            states.read_prompts(
                rows,
                states.num_computed_tokens_np[rows],
                batch.num_scheduled_tokens,
                self.input_buffers.input_ids,
                bool(self.prompt_logprobs_worker.uses_prompt_logprobs[rows].any()),
            )
        states.make_room(rows)
        inputs = super().prepare_inputs(
            scheduler_output, batch._replace(has_prefill=False), *args, **kwargs
        )
        inputs.has_prefill = batch.has_prefill
        return inputs


def enable_streams(runner: Any) -> None:
    """Let the requests of ``runner`` grow past ``max_model_len``.

    Called once its KV cache is initialised.
    """
    groups = runner.kv_cache_config.kv_cache_groups
    policies = [group_spec(group).blocks for group in groups]
    RingBlockTables.adopt(runner.block_tables, policies)
