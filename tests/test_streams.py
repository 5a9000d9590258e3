# SPDX-License-Identifier: Apache-2.0
"""The runner's bounded buffers: ring block table and token rows."""

import resource
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from vllm.v1.worker.block_table import BlockTable

from sink_paged.stream_state import BlockIds
from sink_paged.streams import RingBlockTable
from sink_paged.token_rows import TokenRows
from sink_paged.window import BlockWindow, SinkWindow
from tests.engines import vllm_since


def make_table(policy: BlockWindow, num_columns: int) -> RingBlockTable:
    older: dict[str, Any] = {}
    if not vllm_since("0.32.0"):
        older["kernel_block_size"] = policy.block_size
    table = BlockTable(
        block_size=policy.block_size,
        max_num_reqs=3,
        max_num_blocks_per_req=num_columns,
        max_num_batched_tokens=64,
        pin_memory=False,
        device=torch.device("cpu"),
        cp_kv_cache_interleave_size=1,
        **older,
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
    bounded = BlockIds(text, pinned=table.pinned, ring=table.ring)
    assert len(bounded) <= num_columns
    table.add_row(bounded, 0)
    assert np.array_equal(table.block_table.np[0], table.block_table.np[2])
    assert table.num_blocks_per_row[0] == len(text)
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


class RowsMachine(RuleBasedStateMachine):
    """Token rows against plain lists: what has still to be read is there.

    And the tokens before, as many as are to be looked back at.
    """

    @initialize(looks_back=st.sampled_from([0, 1, 300, 20_000]))
    def start(self, looks_back: int) -> None:
        self.rows = TokenRows(3)
        self.rows.looks_back = looks_back
        self.texts: dict[int, list[int]] = {}
        self.read: dict[int, int] = {}

    @rule(
        row=st.integers(0, 2),
        length=st.integers(0, 60_000),
        known=st.floats(0, 1),
    )
    def begin(self, row: int, length: int, known: float) -> None:
        text = [(7 * i + length) % 251 for i in range(length)]
        self.texts[row], self.read[row] = text, int(length * known)
        self.rows.begin(row, self.read[row])
        self.rows[row, :length] = torch.tensor(text, dtype=torch.int64)

    @rule(row=st.integers(0, 2), count=st.integers(1, 5))
    def append(self, row: int, count: int) -> None:
        if row in self.texts:
            start = len(self.texts[row])
            self.texts[row] += [start % 250 + 1] * count
            self.rows[row, start : start + count] = [start % 250 + 1] * count

    @rule(row=st.integers(0, 2), amount=st.floats(0, 1))
    def advance(self, row: int, amount: float) -> None:
        if row in self.texts:
            left = len(self.texts[row]) - self.read[row]
            self.read[row] += int(left * amount)
            num_read = [self.read.get(other, 0) for other in range(3)]
            self.rows.trim(np.array(num_read, dtype=np.int32))

    @rule(source=st.integers(0, 2), to=st.integers(0, 2))
    def move(self, source: int, to: int) -> None:
        if source in self.texts and source != to:
            stop = len(self.texts[source])
            self.rows[to, :stop] = self.rows[source, :stop]
            self.texts[to] = self.texts.pop(source)
            self.read[to] = self.read.pop(source)
            self.rows.release(source, source + 1)

    @rule()
    def swap(self) -> None:
        if {0, 1} <= set(self.texts):
            stop = max(len(self.texts[0]), len(self.texts[1]))
            kept = self.rows[0, :stop].copy()
            self.rows[0, :stop] = self.rows[1, :stop]
            self.rows[1, :stop] = kept
            for state in (self.texts, self.read):
                state[0], state[1] = state[1], state[0]  # type: ignore[index]

    @invariant()
    def holds_what_is_to_be_read(self) -> None:
        if not hasattr(self, "rows"):
            return
        length = self.rows.looks_back
        ends = np.array([len(self.texts.get(row, ())) for row in range(3)])
        tails, lengths = self.rows.tails(ends, length)
        for row, text in self.texts.items():
            assert tails[row, : lengths[row]].tolist() == text[-length:] * bool(length)
            first = max(0, self.read[row] - length)
            assert self.rows.ids[row, first : len(text)].tolist() == text[first:]
            assert self.rows.tensor[row, first : len(text)].tolist() == text[first:]


test_token_rows_machine = RowsMachine.TestCase
test_token_rows_machine.settings = settings(
    max_examples=25, stateful_step_count=20, deadline=None
)


def resident_bytes() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize()


def test_token_rows_cost_what_is_not_yet_read() -> None:
    rows = TokenRows(256)
    text = np.full(2_000_000, 5, dtype=np.int32)
    before = resident_bytes()
    rows.begin(7, 0)
    rows[7, :2_000_000] = text
    assert 8_000_000 <= resident_bytes() - before < 10_000_000
    num_read = np.zeros(8, dtype=np.int32)
    num_read[7] = 1_900_000
    rows.trim(num_read)
    assert resident_bytes() - before < 2_000_000
    assert (rows.ids[7, 1_900_000:2_000_000] == 5).all()
    rows.release(7, 8)
    assert resident_bytes() - before < 1_000_000


def test_an_endless_row_stays_small_and_moves_at_once() -> None:
    """A text of a billion tokens, of which the last are known."""
    rows = TokenRows(2)
    before = resident_bytes()
    start = 10**9
    rows.begin(1, start)
    num_read = np.zeros(2, dtype=np.int32)
    for position in range(start, start + 400_000, 1000):
        rows[1, position : position + 1000] = [position % 97] * 1000
        num_read[1] = position
        rows.trim(num_read)
    assert resident_bytes() - before < 1_000_000
    end = start + 400_000
    rows[0, :end] = rows[1, :end]
    assert resident_bytes() - before < 1_000_000
    assert (rows.ids[0, end - 1000 : end] == (end - 1000) % 97).all()


def test_refused_address_space_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError("Cannot allocate memory")

    monkeypatch.setattr("mmap.mmap", refuse)
    with pytest.raises(MemoryError, match="8 GiB of address space.*--max-num-seqs"):
        TokenRows(1)
