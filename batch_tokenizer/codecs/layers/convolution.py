"""Convolutions over time on padded batches, each utterance as if it were alone.

Before a convolution every position beyond an utterance's end is set to what the layer's padding has there for a lone
utterance: zeros, its last value, or its reflection. Lengths are carried through strides as the layer's own arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import conv1d, conv_transpose1d, pad

from batch_tokenizer.codecs.layers.padded import PaddedBatch

#: A length, or several on a device.
Length = TypeVar("Length", int, Tensor)


@dataclass(frozen=True, slots=True)
class Padding:
    """The padding of a convolution before an utterance's start and after its end.

    Attributes:
        left, right: positions before and after.
        completes_stride: whether more are added on the right until the last stride is full; else it is dropped.
        mode: what they hold. ``reflect`` of an utterance that is no longer than the padding appends zeros to it first
            and cuts as many off again, as EnCodec does.
    """

    left: int
    right: int
    completes_stride: bool = False
    mode: Literal["zeros", "replicate", "reflect"] = "zeros"

    @classmethod
    def same(
        cls, kernel_size: int, dilation: int = 1, mode: Literal["zeros", "replicate", "reflect"] = "zeros"
    ) -> Padding:
        """As many positions on both sides as keep the length at stride 1; odd kernels."""
        side = (kernel_size - 1) * dilation // 2
        return cls(side, side, mode=mode)

    @classmethod
    def causal(
        cls,
        kernel_size: int,
        stride: int = 1,
        dilation: int = 1,
        mode: Literal["zeros", "replicate", "reflect"] = "zeros",
    ) -> Padding:
        """On the left only, and on the right up to a whole stride, for ceil(length / stride) outputs."""
        return cls((kernel_size - 1) * dilation + 1 - stride, 0, completes_stride=True, mode=mode)


class WeightNorm(nn.Module):
    """A weight as gain ``original0`` and direction ``original1``; the norm is over all axes but the first."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.original0 = nn.Parameter(torch.ones(shape[0], *[1] * (len(shape) - 1)))
        self.original1 = nn.Parameter(torch.zeros(shape))

    def folded(self) -> Tensor:
        """The weight."""
        direction = self.original1
        norm = torch.linalg.vector_norm(direction, dim=tuple(range(1, direction.ndim)), keepdim=True)
        return direction * (self.original0 / norm)


class WeightedLayer(nn.Module):
    """A layer with a weight and a bias, weight-normed in the checkpoint or not.

    Weight-normed, the parameters are ``parametrizations.weight.original0`` and ``.original1`` until ``fold`` multiplies
    them out to ``weight``; before it the layer cannot be used.
    """

    weight: nn.Parameter

    def __init__(self, *shape: int, bias: int | None, weight_norm: bool) -> None:
        super().__init__()
        if weight_norm:
            self.parametrizations = nn.Module()
            self.parametrizations.weight = WeightNorm(*shape)
        else:
            self.weight = nn.Parameter(torch.zeros(shape))
        self.bias = None if bias is None else nn.Parameter(torch.zeros(bias))

    @torch.no_grad()
    def fold(self) -> None:
        """Multiplies gain and direction out, once, if the weight is not yet one tensor."""
        if "parametrizations" in self._modules:
            normed = self.parametrizations.weight
            assert isinstance(normed, WeightNorm)
            self.weight = nn.Parameter(normed.folded(), requires_grad=False)
            del self.parametrizations


def fold_weight_norms(model: nn.Module) -> None:
    """``WeightedLayer.fold`` for all layers of ``model``, after its tensors are in place and before any cast."""
    for module in list(model.modules()):
        if isinstance(module, WeightedLayer):
            module.fold()


def weight_norm_name(name: str) -> str:
    """The name of a tensor as parametrizations have it, where a checkpoint has the older ``weight_g``, ``weight_v``."""
    for older, newer in (("weight_g", "original0"), ("weight_v", "original1")):
        if name.endswith(f".{older}"):
            return f"{name.removesuffix(older)}parametrizations.weight.{newer}"
    return name


class Conv1d(WeightedLayer):
    """A convolution, (B, C, T) to (B, C', T'), T' = ``output_length(T)``."""

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        kernel_size: int,
        *,
        padding: Padding,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = True,
        weight_norm: bool = False,
    ) -> None:
        super().__init__(
            channels_out,
            channels_in // groups,
            kernel_size,
            bias=channels_out if bias else None,
            weight_norm=weight_norm,
        )
        self.padding = padding
        self.stride, self.dilation, self.groups = stride, dilation, groups
        self.span = (kernel_size - 1) * dilation + 1

    def output_length(self, length: Length) -> Length:
        """Positions that an utterance of ``length`` becomes."""
        spare = length + self.padding.left + self.padding.right - self.span
        if self.padding.completes_stride:
            spare = spare + self.stride - 1
        return spare // self.stride + 1

    def forward(self, batch: PaddedBatch) -> PaddedBatch:
        """Each utterance's result is that of the utterance alone."""
        size = batch.size
        right = self._right(size)  # negative where the last positions are not needed
        left = self.padding.left
        lengths = None if batch.lengths is None else self.output_length(batch.lengths)
        if self.padding.mode == "zeros":
            values, both = batch.filled(), 0
            if left == self.padding.right and right <= left:
                both = left  # the convolution itself can add as many zeros on both sides
            elif left or right > 0:
                values = pad(values, (left, max(right, 0)))
        else:
            values, both = self._extended(batch, left, max(right, 0)), 0
        result = conv1d(values, self.weight, self.bias, self.stride, both, self.dilation, self.groups)
        return PaddedBatch.of(result, lengths) if self.changes_lengths else batch.with_values(result)

    @property
    def changes_lengths(self) -> bool:
        """Whether output lengths differ from input lengths."""
        return self.stride > 1 or self.padding.left + self.padding.right + 1 != self.span

    def _right(self, length: Length) -> Length:
        """Positions that the convolution reads after ``length``."""
        return (self.output_length(length) - 1) * self.stride + self.span - self.padding.left - length

    def _extended(self, batch: PaddedBatch, left: int, right: int) -> Tensor:
        """``values`` with replicated or reflected ends, (B, C, left + T + right)."""
        if batch.lengths is None:
            if self.padding.mode == "replicate":
                return pad(batch.values, (left, right), mode="replicate")
            return _reflect(batch.values, left, right)
        # Position p of the result is position p - left of the utterance, or the one of which it is a copy.
        position = torch.arange(-left, batch.size + right, device=batch.values.device)
        lengths = batch.lengths[:, None]
        if self.padding.mode == "replicate":
            source = position.minimum(lengths - 1).clamp(min=0)
            return _take(batch.values, source)
        most = self._right(lengths).clamp(min=left)
        mirror = lengths.maximum(most + 1) - 1  # with the zeros that a short utterance gets first
        source = mirror - (mirror - position.abs()).abs()
        outside = (source >= lengths) | (source < 0)
        return _take(batch.values, source.clamp(0, batch.size - 1)).masked_fill(outside[:, None], 0.0)


def _take(values: Tensor, source: Tensor) -> Tensor:
    """Values (B, C, T) at positions ``source`` (B, P) of each row, (B, C, P)."""
    return values.gather(2, source[:, None].expand(-1, values.shape[1], -1))


def _reflect(values: Tensor, left: int, right: int) -> Tensor:
    missing = max(left, right) + 1 - values.shape[-1]
    if missing <= 0:
        return pad(values, (left, right), mode="reflect")
    return pad(pad(values, (0, missing)), (left, right), mode="reflect")[..., :-missing]


class ConvTranspose1d(WeightedLayer):
    """A transposed convolution, (B, C, T) to (B, C', T'), T' = ``output_length(T)``.

    Args:
        trim_left, trim_right: positions cut off the result's ends.
        output_padding: positions that the result has more on the right.
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        kernel_size: int,
        stride: int,
        *,
        trim_left: int = 0,
        trim_right: int = 0,
        output_padding: int = 0,
        groups: int = 1,
        bias: bool = True,
        weight_norm: bool = False,
    ) -> None:
        super().__init__(
            channels_in,
            channels_out // groups,
            kernel_size,
            bias=channels_out if bias else None,
            weight_norm=weight_norm,
        )
        self.kernel_size, self.stride, self.groups = kernel_size, stride, groups
        self.trim_left, self.trim_right, self.output_padding = trim_left, trim_right, output_padding

    def output_length(self, length: Length) -> Length:
        """Positions that an utterance of ``length`` becomes."""
        return (length - 1) * self.stride + self.kernel_size + self.output_padding - self.trim_left - self.trim_right

    def forward(self, batch: PaddedBatch) -> PaddedBatch:
        """Each utterance's result is that of the utterance alone."""
        both = self.trim_left if self.trim_left == self.trim_right else 0
        result = conv_transpose1d(
            batch.filled(), self.weight, self.bias, self.stride, both, self.output_padding, self.groups
        )
        if not both:
            result = result[..., self.trim_left : self.trim_left + self.output_length(batch.size)]
        lengths = batch.lengths
        if lengths is not None:
            lengths = torch.where(lengths > 0, self.output_length(lengths), 0)  # rows without an utterance stay so
        return PaddedBatch.of(result, lengths)
