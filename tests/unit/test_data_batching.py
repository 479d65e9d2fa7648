"""Packing: every row once, within bounds, in bounded time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batch_tokenizer.data.batching import Packer, split
from batch_tokenizer.records import Batch, LoadedRow
from tests.support.loading import make_row

FRAMES = st.lists(st.integers(1, 60), max_size=200)


def loaded(line: int, frames: int) -> LoadedRow:
    return LoadedRow(make_row(line), None, None, frames * 960, frames)


def lines(batches: list[Batch]) -> list[int]:
    return sorted(row.row.line for batch in batches for row in batch.rows)


@given(FRAMES, st.integers(1, 12), st.integers(1, 80))
def test_every_row_once_within_bounds_and_soon(frames: list[int], batch_size: int, frame_budget: int) -> None:
    packer = Packer(batch_size, frame_budget)
    batches: list[Batch] = []
    out: set[int] = set()
    for line, count in enumerate(frames):
        ready = packer.add(loaded(line, count))
        batches += ready
        out.update(row.row.line for batch in ready for row in batch.rows)
        # What came in 4 * batch_size rows ago joined a batch that is at most 2 * batch_size rows older or younger.
        assert all(earlier in out for earlier in range(line - 4 * batch_size))
    batches += packer.flush()
    assert lines(batches) == list(range(len(frames)))
    assert packer.flush() == []
    for batch in batches:
        assert 1 <= len(batch.rows) <= batch_size
        assert batch.frames <= frame_budget or len(batch.rows) == 1


def test_a_full_batch_leaves_at_once() -> None:
    packer = Packer(3, 100)
    assert [len(packer.add(loaded(line, 10))) for line in range(6)] == [0, 0, 1, 0, 0, 1]
    assert [len(packer.add(loaded(line, 50))) for line in range(4)] == [0, 1, 0, 1]
    (alone,) = packer.add(loaded(0, 200))
    assert alone.frames == 200


def test_it_fills_better_than_cutting_where_it_overflows() -> None:
    frames = [70, 80, 20, 30, 60, 40, 90, 10] * 25
    packer = Packer(64, 100)
    batches = [batch for line, count in enumerate(frames) for batch in packer.add(loaded(line, count))]
    batches += packer.flush()
    assert sum(frames) / (100 * len(batches)) > 0.95


@given(st.lists(st.integers(1, 60), min_size=2, max_size=40))
def test_split_keeps_all_rows_in_order_and_halves_the_frames(frames: list[int]) -> None:
    batch = Batch(tuple(loaded(line, count) for line, count in enumerate(frames)))
    first, second = split(batch)
    assert first.rows
    assert second.rows
    assert first.rows + second.rows == batch.rows
    best = min(max(sum(frames[:place]), sum(frames[place:])) for place in range(1, len(frames)))
    assert max(first.frames, second.frames) == best


def test_one_row_is_not_split() -> None:
    with pytest.raises(ValueError, match="one row"):
        split(Batch((loaded(0, 5),)))
