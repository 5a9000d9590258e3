# SPDX-License-Identifier: Apache-2.0
"""vLLM's output processor for streams: bounded state, and an unseen sink token."""

from __future__ import annotations

from typing import Any

from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest
from vllm.v1.engine.logprobs import LogprobsProcessor
from vllm.v1.engine.output_processor import OutputProcessor

from sink_paged.detokenizer import BOUNDED_CLASSES, PENDING_TOKENS
from sink_paged.sink_token import ClientLogprobs, SinkTokenState, client_request


class DeltaLogprobs(LogprobsProcessor):
    """Forgets the log-probabilities that a client which receives deltas has."""

    logprobs: Any
    kept: int

    def update_from_output(self, output: EngineCoreOutput) -> None:
        """See ``LogprobsProcessor``."""
        if self.logprobs is not None and len(self.logprobs) >= 2 * self.kept:
            self.logprobs = self.logprobs[-self.kept :]
        super().update_from_output(output)


class ClientDeltaLogprobs(ClientLogprobs, DeltaLogprobs):
    """Forgets them, and never has that of the client's first token."""


class StreamOutputProcessor(OutputProcessor):
    """Keeps each request as its client knows it, at a cost that does not grow."""

    def add_request(
        self, request: EngineCoreRequest, *args: Any, **kwargs: Any
    ) -> None:
        """See ``OutputProcessor``."""
        seen = client_request(request)
        super().add_request(seen, *args, **kwargs)
        state = self.request_states.get(request.request_id)
        if state is None:  # a session whose last output had been sent: it has ended
            return
        replacement = BOUNDED_CLASSES.get(type(state.detokenizer))
        if replacement is not None:
            state.detokenizer = replacement(state.detokenizer, seen)
        if type(state.logprobs_processor) is LogprobsProcessor:
            delta = state.output_kind == RequestOutputKind.DELTA
            if delta:
                state.logprobs_processor.__class__ = DeltaLogprobs
                state.logprobs_processor.kept = PENDING_TOKENS + state.stream_interval
            if seen is not request:
                state.__class__ = SinkTokenState
                state.logprobs_processor.__class__ = (
                    ClientDeltaLogprobs if delta else ClientLogprobs
                )
