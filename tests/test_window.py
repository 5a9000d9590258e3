# SPDX-License-Identifier: Apache-2.0
"""The integer policy against its definition."""

from hypothesis import given
from hypothesis import strategies as st

from sink_paged.window import BlockWindow, SinkWindow, layer_window

windows = st.builds(SinkWindow, st.integers(0, 40), st.integers(1, 80))
policies = st.builds(BlockWindow, windows, st.integers(1, 48))


@given(windows, st.integers(0, 300))
def test_ranges_are_the_attended_set(window: SinkWindow, query: int) -> None:
    attended = [key for key in range(query + 10) if window.attends(query, key)]
    parts = [*window.cut_off_sinks(query), *window.recent_keys(query)]
    assert parts == attended
    if query >= window.capacity:
        assert len(attended) == window.capacity + 1


@given(windows, st.integers(0, 300))
def test_distances_are_slots_of_an_evicting_cache(
    window: SinkWindow, query: int
) -> None:
    """The 2023 code: evict after every step, positions are indices in the cache."""
    cache: list[int] = []
    for position in range(query + 1):
        if len(cache) > window.capacity:
            recent = cache[len(cache) - window.window_tokens :]
            cache = cache[: window.sink_tokens] + recent
        cache.append(position)
    for slot, key in enumerate(cache):
        assert window.attends(query, key)
        assert window.distance(query, key) == len(cache) - 1 - slot


@given(policies, st.integers(0, 400), st.integers(0, 60))
def test_blocks_kept_are_the_blocks_attended(
    policy: BlockWindow, query: int, ahead: int
) -> None:
    """Kept: every block that the query or a later one of the step attends, no other."""
    num_tokens = query + 1 + ahead
    later = range(query, num_tokens)
    attended = {
        key // policy.block_size
        for next_query in later
        for key in range(next_query + 1)
        if policy.window.attends(next_query, key)
    }
    pinned = set(range(min(policy.pinned_blocks, -(-num_tokens // policy.block_size))))
    first = policy.first_window_block(query)
    kept = pinned | set(range(first, -(-num_tokens // policy.block_size)))
    assert attended <= kept
    # A pinned block is kept for later even when it holds no key of this step.
    assert kept - attended <= pinned
    assert len(kept) == policy.resident_blocks(query, num_tokens)
    assert len(kept) <= policy.max_blocks(num_tokens - query)


@given(policies, st.integers(0, 400))
def test_the_oldest_block_stays_until_its_expiry(
    policy: BlockWindow, query: int
) -> None:
    oldest = policy.first_window_block(query)
    expiry = policy.expiry(oldest)
    assert query < expiry
    assert policy.first_window_block(expiry - 1) == oldest
    assert policy.first_window_block(expiry) == oldest + 1


@given(policies, st.integers(0, 400), st.integers(1, 60))
def test_ring_columns_never_collide(
    policy: BlockWindow, query: int, in_flight: int
) -> None:
    num_columns = policy.max_blocks(in_flight)
    total = -(-(query + in_flight) // policy.block_size)
    first = policy.first_window_block(query)
    kept = [b for b in range(total) if b < policy.pinned_blocks or b >= first]
    columns = [policy.column(block, num_columns) for block in kept]
    assert len(set(columns)) == len(columns)
    assert all(0 <= column < num_columns for column in columns)


@given(policies, st.data(), st.integers(1, 3))
def test_longest_hit_is_the_longest_resumable_prefix(
    policy: BlockWindow, data: st.DataObject, align: int
) -> None:
    cached = data.draw(st.lists(st.booleans(), max_size=24))

    def resumable(hit: int) -> bool:
        oldest = policy.first_window_block(hit * policy.block_size)
        needed = [b for b in range(hit) if b < policy.pinned_blocks or b >= oldest]
        return hit % align == 0 and all(cached[block] for block in needed)

    best = max(hit for hit in range(len(cached) + 1) if resumable(hit))
    assert policy.longest_hit(len(cached), cached.__getitem__, align) == best


def test_what_a_layer_keeps() -> None:
    """A native window counts the query; where all layers have it, the sinks join it."""
    stream = SinkWindow(4, 60)
    assert layer_window(stream, None, None) is stream
    assert layer_window(stream, 64, 64) is stream
    assert layer_window(stream, 24, None) == SinkWindow(0, 23)
    assert layer_window(stream, 24, 64) == SinkWindow(0, 23)
