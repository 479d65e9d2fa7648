"""Cutting a manifest into units: exact, bounded, and the same for everybody."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batch_tokenizer.manifest.row import LineState
from batch_tokenizer.manifest.units import in_shard, plan_units
from batch_tokenizer.records import RunError


def lines_like(states: list[int], durations: list[float]) -> Any:
    """What ``plan_units`` reads of a manifest."""
    array = np.array(states, np.uint8)
    return SimpleNamespace(
        path="data.jsonl",
        num_lines=len(array),
        states=array,
        durations=np.array(durations, np.float32),
        is_blank=array == LineState.BLANK,
    )


def good_rows(number: int, duration: float = np.nan) -> Any:
    return lines_like([0] * number, [duration] * number)


line = st.tuples(
    st.sampled_from([0, 0, 0, 0, 1, 2, 3]), st.sampled_from([np.nan, 0.0, 1.5, 10.0, 4000.0]), st.booleans()
)


@given(st.lists(line, max_size=400), st.integers(1, 9), st.integers(1, 4), st.booleans())
def test_every_pending_line_lies_in_one_unit(
    lines: list[tuple[int, float, bool]], world_size: int, num_shards: int, resumed: bool
) -> None:
    manifest = lines_like([state for state, _, _ in lines], [duration for _, duration, _ in lines])
    wanted = ~manifest.is_blank
    if resumed:
        wanted &= np.array([pending for _, _, pending in lines], bool)
    count = np.zeros(len(lines), int)
    for shard in range(num_shards):
        units = plan_units(
            manifest,
            world_size=world_size,
            num_shards=num_shards,
            shard=shard,
            pending=wanted if resumed else None,
        )
        mine = in_shard(manifest, num_shards, shard)
        for unit in range(len(units)):
            start, stop = units[unit]
            count[start:stop] += 1
            assert wanted[start]
            assert wanted[stop - 1]
            assert np.count_nonzero(wanted[start:stop]) <= 64
            assert mine[start:stop].all()
    assert np.all(count[wanted] == 1)
    assert np.all(count <= 1)


def test_shards_agree_whatever_their_world_size_and_progress() -> None:
    manifest = good_rows(5000)
    half_done = np.arange(5000) % 3 > 0
    shares = []
    for shard, (world_size, pending) in enumerate([(1, None), (8, half_done), (64, None)]):
        covered = np.zeros(5000, bool)
        units = plan_units(manifest, world_size=world_size, num_shards=3, shard=shard, pending=pending)
        for unit in range(len(units)):
            covered[slice(*units[unit])] = True
        shares.append(covered & (half_done if pending is not None else True))
    assert np.array_equal(shares[0] | shares[2], ~in_shard(manifest, 3, 1))
    assert np.array_equal(shares[1], in_shard(manifest, 3, 1) & half_done)
    assert [np.count_nonzero(in_shard(manifest, 3, shard)) for shard in range(3)] == pytest.approx([1667] * 3, rel=0.05)


@pytest.mark.parametrize(("rows", "world_size", "units"), [(1, 8, 1), (10, 8, 10), (640, 8, 64), (10**6, 8, 15625)])
def test_small_manifests_give_everybody_work(rows: int, world_size: int, units: int) -> None:
    assert len(plan_units(good_rows(rows), world_size=world_size)) == units


def test_units_hold_bounded_seconds_and_the_longest_come_first() -> None:
    durations = np.tile([5.0, 30.0, 400.0, 1.0, 2.0], 2000)
    manifest = lines_like([0] * len(durations), list(durations))
    units = plan_units(manifest, world_size=2)
    totals = [durations[slice(*units[unit])].sum() for unit in range(len(units))]
    assert max(totals) <= 600 + 400
    assert totals == sorted(totals, reverse=True)


def test_units_of_unknown_length_come_first_in_order() -> None:
    durations = [10.0, np.nan, 20.0, np.nan, 5.0]
    units = plan_units(lines_like([0] * 5, durations), world_size=8)
    assert units.starts.tolist() == [1, 3, 2, 0, 4]
    refused = plan_units(lines_like([0, LineState.MALFORMED, 0], [10.0, np.nan, 20.0]), world_size=8)
    assert refused.starts.tolist() == [2, 0, 1]


def test_finished_stretches_are_not_read() -> None:
    pending = np.zeros(100_000, bool)
    pending[[3, 5, 90_000]] = True
    units = plan_units(good_rows(100_000), world_size=1, pending=pending)
    assert np.max(units.stops - units.starts) <= 64


def test_a_manifest_that_grew_since_rank_0_read_it_is_noticed() -> None:
    with pytest.raises(RunError, match="not the same in all processes"):
        plan_units(good_rows(10), world_size=1, pending=np.ones(9, bool))
