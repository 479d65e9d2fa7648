"""Nearest codebook rows, packs of a fixed capacity, and buffers that stay float32."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from batch_tokenizer.codecs.layers.packed import CPU_CAPACITY, CPU_SHARED_FRAMES, packs_of
from batch_tokenizer.kernels.codebook import Float32Buffers, first_equal_rows, nearest_rows
from batch_tokenizer.kernels.segments import FILLER_RUN, filler_runs, packs


@given(seed=st.integers(0, 999), size=st.integers(1, 40), repeats=st.integers(1, 4))
def test_nearest_is_the_first_of_the_equals(seed, size, repeats):
    generator = torch.Generator().manual_seed(seed)
    distinct = torch.randn(size, 6, generator=generator)
    rows = distinct.repeat(repeats, 1)[torch.randperm(size * repeats, generator=generator)]
    queries = torch.randn(100, 6, generator=generator)
    distances = (queries.double()[:, None] - rows.double()[None]).square().sum(dim=-1)
    # float64 distances of equal rows are equal to the bit, and argmin takes the first
    assert torch.equal(nearest_rows(queries, rows, first_equal_rows(rows)), distances.argmin(dim=1))


@given(spans=st.lists(st.integers(0, 50)), capacity=st.integers(50, 120))
def test_packs_hold_everything_in_order_and_no_more_than_fits(spans, capacity):
    groups = list(packs(spans, capacity))
    assert [index for group in groups for index in group] == list(range(len(spans)))
    sums = [sum(spans[index] for index in group) for group in groups]
    assert all(group for group in groups)
    assert all(total <= capacity for total in sums)
    for total, following in zip(sums, groups[1:], strict=False):
        assert total + spans[following[0]] > capacity


@given(spans=st.lists(st.integers(0, 50)), groups=st.randoms(), capacity=st.sampled_from(["auto", None, 40]))
def test_a_span_alone_decides_whether_an_utterance_shares_a_pack(spans, groups, capacity):
    of_group = [groups.randrange(2) for _ in spans]
    axes = {"auto": CPU_CAPACITY, None: None, 40: 40}
    members: list[int] = []
    for pack, axis in packs_of(spans, capacity, 8192, torch.device("cpu"), of_group):
        members += pack
        assert len({of_group[index] for index in pack}) == 1
        assert axis is None or sum(spans[index] for index in pack) <= axis
        for index in pack:
            alone = spans[index] > {"auto": CPU_SHARED_FRAMES, None: -1, 40: 40}[capacity]
            assert axis == ((80 if capacity == 40 else None) if alone else axes[capacity])
            assert len(pack) == 1 or not alone
    assert sorted(members) == list(range(len(spans)))


def test_what_fits_no_pack_is_named():
    with pytest.raises(ValueError, match="utterance 1 takes up 51, more than the capacity 50"):
        list(packs([50, 51], 50))


def test_filler_comes_in_bounded_runs():
    for size in (0, 1, FILLER_RUN, FILLER_RUN + 1, 5 * FILLER_RUN):
        runs = filler_runs(size)
        assert sum(runs) == size
        assert all(0 < run <= FILLER_RUN for run in runs)


def test_buffers_stay_float32_at_every_depth():
    class Holder(Float32Buffers):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("rows", torch.tensor([1.0001]))

    outer = Holder()
    outer.inner = nn.Sequential(Holder(), nn.Linear(1, 1))
    outer.bfloat16()
    assert {name: buffer.dtype for name, buffer in outer.named_buffers()} == {
        "rows": torch.float32,
        "inner.0.rows": torch.float32,
    }
    assert outer.inner[0].rows.item() == torch.tensor(1.0001).item()
    assert {parameter.dtype for parameter in outer.parameters()} == {torch.bfloat16}
