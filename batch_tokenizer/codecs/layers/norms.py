"""Normalisation over time on padded batches, each utterance with its own statistics, and scales per channel."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import group_norm

from batch_tokenizer.codecs.layers.padded import PaddedBatch


class TimeGroupNorm(nn.Module):
    """GroupNorm whose statistics are over a group's channels and all positions of an utterance, in float32."""

    def __init__(self, groups: int, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.groups, self.eps = groups, eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, batch: PaddedBatch) -> PaddedBatch:
        """(B, C, T) to (B, C, T)."""
        if batch.lengths is None:
            return batch.with_values(group_norm(batch.values, self.groups, self.weight, self.bias, self.eps))
        values = batch.values.float().unflatten(1, (self.groups, -1))  # (B, G, C / G, T)
        assert batch.beyond is not None
        beyond = batch.beyond[:, None]
        count = (batch.lengths.clamp(min=1) * values.shape[2])[:, None, None, None]

        def mean(of: Tensor) -> Tensor:
            return of.masked_fill(beyond, 0.0).sum((2, 3), keepdim=True) / count

        centred = values - mean(values)
        normed = (centred * torch.rsqrt(mean(centred.square()) + self.eps)).flatten(1, 2).to(batch.values.dtype)
        return batch.with_values(normed * self.weight[:, None] + self.bias[:, None])


class LayerScale(nn.Module):
    """x · scale, a factor per channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """(…, d) to (…, d)."""
        return x * self.scale
