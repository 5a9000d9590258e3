# SPDX-License-Identifier: Apache-2.0
"""A dedicated sink token in front of every text, which the client never sees.

StreamingLLM, section 3.3: a model trained with one token before all texts needs that
token alone as its sink. The engine reads it as the first token of the prompt; what the
client gets back speaks of the client's own prompt.
"""

from __future__ import annotations

import copy
import enum
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.outputs import RequestOutput
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest
from vllm.v1.engine.logprobs import LogprobsProcessor
from vllm.v1.engine.output_processor import RequestState

MARK_KEY = "sink_paged_sink_token"


class Mark(enum.Enum):
    """Says in ``extra_args`` that a prompt's first token is ours.

    A member cannot come from a client, whose ``extra_args`` are JSON.
    """

    PREPENDED = 1


def prepend(request: EngineCoreRequest, token: int) -> None:
    """Put ``token`` before the prompt, unless the prompt starts with it.

    Raises:
        VLLMValidationError: for a prompt that is sent in pieces, whose later pieces
            cannot be told from a first one; for scores of given tokens, which vLLM
            looks up by their place in the prompt.
    """
    if request.resumable:
        raise VLLMValidationError(
            "with sink_token_id set, a prompt must be sent as a whole"
        )
    for name in ("prompt_logprob_token_ids", "prompt_logprob_start"):
        if getattr(request.sampling_params, name, None) is not None:
            raise VLLMValidationError(
                f"{name} does not work with sink_token_id set", parameter=name
            )
    if request.prompt_token_ids[0] == token:
        return
    request.prompt_token_ids = [token, *request.prompt_token_ids]
    sampling = request.sampling_params
    sampling.extra_args = {**(sampling.extra_args or {}), MARK_KEY: Mark.PREPENDED}


def client_request(request: EngineCoreRequest) -> EngineCoreRequest:
    """The request as its client sent it; ``request`` itself if that is unchanged."""
    sampling = request.sampling_params
    extra_args = (sampling and sampling.extra_args) or {}
    if extra_args.get(MARK_KEY) is not Mark.PREPENDED:
        return request
    clients = copy.copy(request)
    clients.prompt_token_ids = request.prompt_token_ids[1:]
    return clients


class SinkTokenState(RequestState):
    """State of a request that the engine knows with one token more."""

    def make_request_output(self, *args: Any, **kwargs: Any) -> Any:
        """As ``RequestState``'s, without the sink token in its counts."""
        output = super().make_request_output(*args, **kwargs)
        if isinstance(output, RequestOutput):
            if output.num_cached_tokens:
                output.num_cached_tokens -= 1
            elif output.num_cache_creation_tokens:
                output.num_cache_creation_tokens -= 1
        return output


class ClientLogprobs(LogprobsProcessor):
    """Leaves out the client's first token, which no token of the client's precedes."""

    def update_from_output(self, output: EngineCoreOutput) -> None:
        """See ``LogprobsProcessor``; a prompt's rows come all at once."""
        rows = output.new_prompt_logprobs_tensors
        if rows is not None:
            output.new_prompt_logprobs_tensors = rows._replace(
                logprob_token_ids=rows.logprob_token_ids[1:],
                logprobs=rows.logprobs[1:],
                selected_token_ranks=rows.selected_token_ranks[1:],
            )
        super().update_from_output(output)
