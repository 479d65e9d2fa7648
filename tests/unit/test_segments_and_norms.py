"""Layouts of packed utterances, and normalisations that must not mix them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from batch_tokenizer.kernels.codebook import Float32Buffers
from batch_tokenizer.kernels.norms import RMSNorm, SegmentGroupNorm
from batch_tokenizer.kernels.segments import FEWEST_OFFSETS, GappedAxis, Segments, within


@given(st.lists(st.integers(0, 9), max_size=6), st.integers(0, 3))
def test_scatter_then_gather_is_the_identity_and_gaps_are_zero(lengths, gap):
    axis = GappedAxis.spaced(lengths, gap, "cpu")
    tight = torch.arange(1, sum(lengths) + 1, dtype=torch.float32)[:, None]
    gapped = axis.scatter(tight)
    assert axis.size == sum(lengths) + gap * max(0, len(lengths) - 1)
    assert torch.equal(axis.gather(gapped), tight)
    assert int((gapped == 0).sum()) == axis.size - sum(lengths)


@given(st.lists(st.integers(0, 9), max_size=6))
def test_positions_count_from_zero_in_each_utterance(lengths):
    expected = [position for length in lengths for position in range(length)]
    assert within(np.array(lengths, dtype=np.int64)).tolist() == expected
    segments = Segments(lengths)
    assert segments.positions.tolist() == expected
    expected = [sum(lengths[:count]) for count in range(len(lengths) + 1)]
    assert segments.offsets.tolist() == expected + expected[-1:] * (FEWEST_OFFSETS - len(lengths))


@pytest.mark.parametrize(
    ("lengths", "rows", "bound"),
    [([], 64, 1024), ([1] * 64, 64, 1024), ([1] * 65, 128, 1024), ([1024, 3], 64, 1024), ([5, 1025], 64, 2048)],
)
def test_tables_of_varlen_kernels_have_few_sizes(lengths, rows, bound):
    segments = Segments(lengths)
    assert segments.offsets.shape == (rows + 1,)
    assert segments.offsets[-1] == segments.total == sum(lengths)
    assert segments.longest_bound == bound
    assert segments.bound_above((-1, -1)) == segments.bound_above((300, 0)) == bound


@pytest.mark.parametrize("lengths", [[3], [1024, 9], [1025], [1600, 5], [2048]])
def test_a_neighbours_length_does_not_decide_whether_a_window_reaches_over_the_bound(lengths):
    assert all(Segments(lengths).bound_above(window) > max(window) for window in [(1023, 0), (1599, 0), (7, 4096)])


def test_negative_lengths_are_refused():
    with pytest.raises(ValueError, match="non-negative"):
        Segments([3, -1])


def test_group_norm_equals_torchs_on_each_utterance_alone():
    torch.manual_seed(0)
    norm, reference = SegmentGroupNorm(6), torch.nn.GroupNorm(1, 6)
    with torch.no_grad():
        for parameter, other in zip(norm.parameters(), reference.parameters(), strict=True):
            other.copy_(parameter.normal_())
    lengths = [5, 1, 40]
    rows = torch.randn(46, 6) * 3 + 100
    ours = norm(rows, Segments(lengths)).split(lengths)
    for mine, alone in zip(ours, rows.split(lengths), strict=True):
        torch.testing.assert_close(mine, reference(alone.t()[None])[0].t(), atol=2e-5, rtol=1e-5)


def test_group_norm_has_the_same_bits_whatever_the_neighbours():
    torch.manual_seed(0)
    norm, rows = SegmentGroupNorm(4), torch.randn(30, 4)
    alone = norm(rows, Segments([30]))
    packed = norm(torch.cat([torch.randn(17, 4) * 50, rows, torch.randn(5, 4)]), Segments([17, 30, 5]))
    assert torch.equal(packed[17:47], alone)


def test_rms_norm_takes_its_statistics_in_float32():
    rows = (torch.randn(3, 8) * 1e3).bfloat16()
    wide = rows.float()
    exact = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(RMSNorm(8)(rows).float(), exact, atol=2e-2, rtol=1e-2)


def test_float32_buffers_survive_a_cast_and_follow_a_move():
    class Holder(Float32Buffers):
        def __init__(self):
            super().__init__()
            self.register_buffer("table", torch.tensor([1 / 3]))

    model = torch.nn.Sequential(torch.nn.Linear(1, 1), Holder()).bfloat16()
    assert model[0].weight.dtype == torch.bfloat16
    assert model[1].table.item() == torch.tensor(1 / 3).item()
    assert model.to("meta")[1].table.device.type == "meta"
