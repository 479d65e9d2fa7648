"""Normalisations over packed rows: RMSNorm per row, and GroupNorm with one group per utterance."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from batch_tokenizer.kernels.segments import Segments


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight, statistics in float32. Rows (N, C)."""

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.eps = eps

    def forward(self, rows: Tensor) -> Tensor:
        """(N, C) to (N, C), the same dtype."""
        wide = rows.float()
        wide = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps)
        return self.weight * wide.to(rows.dtype)


class SegmentGroupNorm(nn.Module):
    """GroupNorm with one group, over all channels and rows of each utterance by itself.

    The mean and the variance of an utterance are sums over its own rows only, added up in float64 and in row order, so
    that they do not depend on what else is on the axis.
    """

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, rows: Tensor, segments: Segments) -> Tensor:
        """(N, C) to (N, C), the same dtype; ``segments`` are the utterances on the tight axis of N rows."""
        wide = rows.float()
        centred = wide - self._spread(wide.mean(dim=-1), segments).float()
        variance = self._spread(centred.square().mean(dim=-1), segments)
        normed = centred * torch.rsqrt(variance + self.eps).float()
        return (normed * self.weight.float() + self.bias.float()).to(rows.dtype)

    @staticmethod
    def _spread(per_row: Tensor, segments: Segments) -> Tensor:
        """Mean over each utterance's rows, float64 (N,), handed back to every one of them as (N, 1)."""
        lengths = segments.rows_of
        means = torch.segment_reduce(per_row.double(), "mean", lengths=lengths, unsafe=True)
        return means.repeat_interleave(lengths, output_size=segments.total)[:, None]
