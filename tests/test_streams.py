# SPDX-License-Identifier: Apache-2.0
"""The runner's bounded buffers: the ring block table and the token rows."""

import resource

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm.v1.worker.block_table import BlockTable

from sink_paged.streams import RingBlockTable, TokenRows
from sink_paged.window import BlockWindow, SinkWindow


def make_table(policy: BlockWindow, num_columns: int) -> RingBlockTable:
    table = BlockTable(
        block_size=policy.block_size,
        max_num_reqs=3,
        max_num_blocks_per_req=num_columns,
        max_num_batched_tokens=64,
        pin_memory=False,
        device=torch.device("cpu"),
        cp_kv_cache_interleave_size=1,
    )
    return RingBlockTable.adopt(table, policy)


@given(
    st.integers(0, 20),
    st.integers(1, 60),
    st.lists(st.integers(0, 9), max_size=30),
    st.integers(0, 3),
)
def test_ring_holds_the_blocks_that_can_be_read(
    sinks: int, window: int, appended: list[int], spare: int
) -> None:
    """Rows grown block by block, or taken over whole, keep the last ring of blocks."""
    policy = BlockWindow(SinkWindow(sinks, window), 16)
    num_columns = policy.max_blocks(16 * 9) + spare
    table = make_table(policy, num_columns)
    text: list[int] = []
    for count in appended:
        new = list(range(len(text) + 1, len(text) + 1 + count))
        table.append_row(new, 1)
        text += new
    table.add_row(text, 2)
    assert table.num_blocks_per_row[1] == table.num_blocks_per_row[2] == len(text)
    ring = num_columns - policy.pinned_blocks
    for block, block_id in enumerate(text):
        if block < policy.pinned_blocks or block >= len(text) - ring:
            column = policy.column(block, num_columns)
            assert table.block_table.np[1, column] == block_id
            assert table.block_table.np[2, column] == block_id
    table.move_row(1, 0)
    assert np.array_equal(table.block_table.np[0], table.block_table.np[2])
    assert not table.block_table.np[1].any()


def test_token_rows_cost_what_is_written() -> None:
    rows = TokenRows(256)

    def resident() -> int:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * resource.getpagesize()

    before = resident()
    rows.ids[7, :1_000_000] = 5
    rows.ids[200, 10**9 : 10**9 + 100] = 6
    written = resident() - before
    assert 4_000_000 <= written < 6_000_000
    rows.release(7, 201)
    assert resident() - before < 1_000_000
    assert not rows.ids[7, :1000].any()
    rows.ids[7, 0] = 1
    assert rows.ids[7, 0] == 1


def test_refused_address_space_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError("Cannot allocate memory")

    monkeypatch.setattr("mmap.mmap", refuse)
    with pytest.raises(MemoryError, match="8 GiB of address space.*--max-num-seqs"):
        TokenRows(1)
