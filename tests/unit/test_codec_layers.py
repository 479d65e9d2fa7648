"""Shared codec layers: a padded batch gives each utterance what it has alone, and the formulas hold."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations

from batch_tokenizer.codecs.execution import BatchRunner, PaddedRunner, padded_size
from batch_tokenizer.codecs.layers.activations import HalfSnake, Snake
from batch_tokenizer.codecs.layers.attention import Rotation, padded_attention
from batch_tokenizer.codecs.layers.convolution import Conv1d, ConvTranspose1d, Padding, fold_weight_norms
from batch_tokenizer.codecs.layers.padded import PaddedBatch
from batch_tokenizer.codecs.layers.quantizers import Codebook, FiniteScalarQuantizer, residual_codes, summed_rows

CPU = torch.device("cpu")
LENGTHS = st.lists(st.integers(1, 30), min_size=1, max_size=4)


def randomised(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for tensor in [*module.parameters(), *module.buffers()]:
        if tensor.is_floating_point():
            tensor.data.normal_(generator=generator)
    return module.requires_grad_(False)


def utterances(lengths: list[int], channels: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(channels, length, generator=generator) for length in lengths]


def assert_as_alone(layer: nn.Module, lengths: list[int], channels: int, spare: int = 0) -> None:
    """What ``layer`` makes of a batch with arbitrary values beyond each end, against what it makes of each alone."""
    parts = utterances(lengths, channels)
    batch = PaddedBatch.join(parts, device=CPU, size=max(lengths) + spare, rows=len(parts) + bool(spare))
    if batch.beyond is not None:
        batch = batch.with_values(batch.filled(1e3))
    alone = [layer(PaddedBatch(part[None])) for part in parts]
    together = layer(batch)
    expected = [one.size for one in alone]
    assert expected == [layer.output_length(length) for length in lengths]
    if together.lengths is not None:
        assert together.lengths[: len(parts)].tolist() == expected
    for one, row in zip(alone, together.split(expected), strict=True):
        torch.testing.assert_close(row, one.values[0], rtol=0, atol=1e-4)


@given(
    LENGTHS,
    st.integers(1, 7),
    st.integers(1, 4),
    st.integers(1, 3),
    st.sampled_from(["zeros", "replicate", "reflect"]),
    st.integers(0, 9),
)
def test_causal_and_seanet_convolutions(lengths, kernel_size, stride, dilation, mode, spare):
    kernel_size = max(kernel_size, stride)
    total = (kernel_size - 1) * dilation + 1 - stride
    for left in (total, total - total // 2):  # causal, or the larger half on the left
        padding = Padding(left, total - left, completes_stride=True, mode=mode)
        layer = randomised(Conv1d(2, 3, kernel_size, padding=padding, stride=stride, dilation=dilation))
        assert [layer.output_length(length) for length in lengths] == [-(-length // stride) for length in lengths]
        assert_as_alone(layer, lengths, 2, spare)


@given(LENGTHS, st.sampled_from([1, 3, 7]), st.integers(1, 9), st.sampled_from(["zeros", "replicate"]))
def test_symmetric_convolutions_are_torchs(lengths, kernel_size, dilation, mode):
    padding = Padding.same(kernel_size, dilation, mode)
    layer = randomised(Conv1d(4, 4, kernel_size, padding=padding, dilation=dilation, groups=4))
    assert_as_alone(layer, lengths, 4)
    reference = nn.Conv1d(
        4, 4, kernel_size, padding=padding.left, dilation=dilation, groups=4, padding_mode=mode
    )  # fmt: skip
    reference.load_state_dict(layer.state_dict())
    [values] = utterances(lengths[:1], 4)
    torch.testing.assert_close(layer(PaddedBatch(values[None])).values, reference(values[None]))


@given(LENGTHS, st.integers(2, 7), st.integers(0, 9))
def test_strided_and_transposed_convolutions(lengths, stride, spare):
    side = -(-stride // 2)
    lengths = [length + stride for length in lengths]
    layer = randomised(Conv1d(2, 3, 2 * stride, padding=Padding(side, side), stride=stride))
    assert_as_alone(layer, lengths, 2, spare)
    symmetric = ConvTranspose1d(
        2, 4, 2 * stride, stride, trim_left=side, trim_right=side, output_padding=stride % 2, groups=2
    )
    causal = ConvTranspose1d(2, 4, 2 * stride, stride, trim_right=stride)
    for layer in (symmetric, causal):
        assert layer.output_length(5) == 5 * stride
        assert_as_alone(randomised(layer), lengths, 2, spare)


def test_folded_weight_norm_is_torchs():
    for layer, reference in (
        (
            Conv1d(2, 3, 5, padding=Padding.same(5), weight_norm=True),
            parametrizations.weight_norm(nn.Conv1d(2, 3, 5, padding=2)),
        ),
        (
            ConvTranspose1d(2, 3, 4, 2, trim_left=1, trim_right=1, weight_norm=True),
            parametrizations.weight_norm(nn.ConvTranspose1d(2, 3, 4, 2, padding=1)),
        ),
    ):
        reference.load_state_dict(randomised(layer).state_dict())
        fold_weight_norms(layer)
        values = utterances([9], 2)[0][None]
        assert set(layer.state_dict()) == {"weight", "bias"}
        torch.testing.assert_close(layer(PaddedBatch(values)).values, reference(values))


@given(LENGTHS, st.sampled_from([(-1, -1), (-1, 0), (3, 0), (2, 4), (0, 0), (5, -1)]), st.integers(0, 80))
def test_attention_is_its_definition(lengths, window, spare):
    size = max(lengths) + spare
    query, key, value = torch.randn(3, len(lengths), 2, size, 4, generator=torch.Generator().manual_seed(0))
    beyond = torch.arange(size) >= torch.tensor(lengths)[:, None]
    result = padded_attention(query, key, value, window=window, beyond=beyond[:, None])
    assert result.isfinite().all()
    left, right = window
    for row, length in enumerate(lengths):
        i, j = torch.arange(length)[:, None], torch.arange(length)
        seen = ((j >= i - left) | (left < 0)) & ((j <= i + right) | (right < 0))
        scores = (query[row, :, :length] @ key[row, :, :length].mT / 2).masked_fill(~seen, -torch.inf)
        expected = scores.softmax(-1) @ value[row, :, :length]
        torch.testing.assert_close(result[row, :, :length], expected, rtol=0, atol=1e-5)


def test_rotation_turns_each_pair_by_its_angle():
    rotation = Rotation.of(5, 4, device=CPU)
    x = torch.randn(2, 5, 4)
    turn = torch.polar(torch.ones(5, 2), torch.outer(torch.arange(5.0), torch.tensor([1.0, 0.01])))
    pairs = torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (2, 2))) * turn).flatten(-2)
    torch.testing.assert_close(rotation.pairs(x), pairs)
    halves = torch.cat(x.unflatten(-1, (2, 2)).unbind(-1), -1)
    expected = torch.cat(pairs.unflatten(-1, (2, 2)).unbind(-1), -1)
    torch.testing.assert_close(rotation.halves(halves), expected)


def test_each_codebook_codes_the_residual_of_those_before_it():
    for by_direction in (False, True):
        codebooks = [randomised(Codebook(8, 3, by_direction=by_direction)) for _ in range(4)]
        codebooks[1].weight[5] = codebooks[1].weight[2]  # of equals the first
        for codebook in codebooks:
            codebook.fold()
        vectors = torch.randn(50, 3)
        residual, expected = vectors.double(), []
        for layer in codebooks:
            rows, queries = layer.weight.double(), residual
            if by_direction:
                rows, queries = (x / x.norm(dim=1, keepdim=True) for x in (rows, queries))
            expected.append(torch.cdist(queries, rows).argmin(1))
            residual = residual - layer.weight[expected[-1]]
        codes = torch.stack(residual_codes(codebooks, vectors), 1)
        assert codes.tolist() == torch.stack(expected, 1).tolist()
        assert 5 not in codes[:, 1]
        torch.testing.assert_close(torch.stack(residual_codes(codebooks[:2], vectors), 1), codes[:, :2])
        torch.testing.assert_close(vectors - summed_rows(codebooks, codes), residual.float(), rtol=0, atol=1e-5)


def test_finite_scalar_quantizer_reaches_every_code():
    quantizer = FiniteScalarQuantizer([5, 4, 3])
    codes = torch.arange(quantizer.size)
    values = quantizer.decode(codes)
    assert values.min() == -1
    assert values.max() == 1
    half = torch.tensor([5, 4, 3]) // 2
    offset = torch.tensor([0.0, 0.5, 0.0])
    scale = torch.tensor([2.0, 1.5, 1.0]) * 0.999
    inside = torch.atanh((values * half + offset).clamp(-scale * 0.99, scale * 0.99) / scale)
    torch.testing.assert_close(quantizer.encode(inside - torch.tan(offset / scale)), codes)


def test_half_snake():
    layer, whole = HalfSnake(5), Snake(2)
    layer.alpha.data.fill_(2.0)
    whole.alpha.data.fill_(2.0)
    values = torch.randn(1, 5, 7)
    result = layer(values)
    torch.testing.assert_close(result[:, :2], whole(values[:, :2]))
    torch.testing.assert_close(whole(values[:, :2]), values[:, :2] + torch.sin(2 * values[:, :2]) ** 2 / 2)
    torch.testing.assert_close(result[:, 2:], torch.nn.functional.leaky_relu(values[:, 2:], 0.01))


@given(st.lists(st.integers(1, 200), min_size=1, max_size=40))
def test_an_utterances_batch_has_a_shape_that_its_length_alone_decides(frames):
    runner = PaddedRunner(CPU, 1, 96)
    shapes: dict[int, set[tuple[int | None, int | None, int]]] = {}

    def compute(members, size, rows):
        assert len(members) <= (rows or 1)
        for member in members:
            assert size is None or len(member) <= size
            shapes.setdefault(len(member), set()).add((size, rows))
        return [len(member) for member in members]

    assert runner(compute, [torch.zeros(count) for count in frames], len) == frames
    for count, found in shapes.items():
        size = padded_size(count)
        assert found == {(size, min(8, 96 // size)) if size <= 48 else (None, None)}
        assert size < 2 * count or size == 8


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("frames", [0, 16])
def test_results_are_in_order_whatever_is_computed_first(threads, frames):
    def compute(members, size, rows):
        assert (size, rows) in ([(None, None)] if frames == 0 else [(8, 2), (None, None)])
        return [len(member) for member in members]

    runner = PaddedRunner(CPU, threads, frames)
    assert runner.batch_limit == (None if frames else 8 * threads)
    assert runner(compute, [torch.zeros(count) for count in (3, 1, 17, 2, 9)], len) == [3, 1, 17, 2, 9]


@pytest.mark.parametrize("threads", [1, 3])
def test_short_members_share_a_call_of_each_thread(threads):
    calls = []

    def compute(members):
        calls.append(members)
        return [-member for member in members]

    members = [9, 1, 2, 8, 3, 1, 2, 1]
    assert BatchRunner(CPU, threads)(compute, members, int, shared=3) == [-member for member in members]
    shared = [
        [
            3,
            1,
        ],
        [2, 1],
        [2, 1],
    ]
    assert sorted(calls) == ([members] if threads == 1 else sorted([[9], [8], *shared]))


def test_batches_shrink_only_after_one_that_can_be_smaller():
    runner = PaddedRunner(CPU, 1, 256)

    def compute(members, size, rows):
        raise MemoryError

    for length, frames in ((1000, 256), (128, 128), (129, 128), (9, 64), (9, 64)):
        with pytest.raises(MemoryError):
            runner(compute, [torch.zeros(length)], len)
        runner.shrink()
        assert runner.frames == frames


@given(st.lists(st.integers(1, 9), min_size=1, max_size=40))
def test_without_padding_only_equal_lengths_share_a_batch(frames):
    runner = PaddedRunner(CPU, 1, 24, equal_lengths=True)

    def compute(members, size, rows):
        assert (size, rows) == (None, None)
        assert {len(member) for member in members} == {len(members[0])}
        assert len(members) == min(4, 24 // len(members[0]))
        return [len(member) for member in members]

    assert runner(compute, [torch.zeros(count) for count in frames], len) == frames
