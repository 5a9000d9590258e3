# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""The Triton kernel that merges the partial results of a split-key decode."""

import triton
import triton.language as tl

from sink_paged.attention.triton_tile import LOWEST


@triton.jit
def merge(
    partial_output,
    partial_norm,
    output,
    query_start_loc,
    output_token,
    output_head,
    group: tl.constexpr,
    head_size: tl.constexpr,
    padded: tl.constexpr,
    rows: tl.constexpr,
    parts: tl.constexpr,
    parts_padded: tl.constexpr,
):
    """Output of one row (a token and query head), from `parts` partial ones.

    Grid: requests, KV heads, rows of a request. A part whose norm is `LOWEST` saw no
    key and left no output. All loads are under way before the first is waited for: a
    merge takes as long as memory's latency, as often as it is met.
    """
    request = tl.program_id(0)
    kv_head = tl.program_id(1)
    row = tl.program_id(2)
    start = tl.load(query_start_loc + request)
    end = tl.load(query_start_loc + request + 1)
    part = tl.arange(0, parts_padded)
    program = (request * tl.num_programs(1) + kv_head) * parts + part
    partial = program * rows + row
    norm = tl.load(partial_norm + partial, mask=part < parts, other=LOWEST)
    dim = tl.arange(0, padded)
    within = dim < head_size
    outputs = tl.load(
        partial_output + partial[:, None] * head_size + dim[None, :],
        mask=(part < parts)[:, None] & within[None, :],
        other=0.0,
    )
    seen = norm != LOWEST  # NaN is seen, and passed on
    weight = tl.where(seen, tl.exp2(norm - tl.max(norm, 0)), 0.0)
    outputs = tl.where(seen[:, None], outputs, 0.0)
    merged = tl.sum(outputs * weight[:, None], 0) / tl.sum(weight, 0)
    token = (start + row // group).to(tl.int64)
    head = kv_head * group + row % group
    tl.store(
        output + token * output_token + head * output_head + dim,
        merged.to(output.dtype.element_ty),
        mask=dim < tl.where(row < (end - start) * group, head_size, 0),
    )
