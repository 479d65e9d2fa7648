"""Periodic activations of vocoders and codecs."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu


def snake(values: Tensor, frequency: Tensor, magnitude: Tensor | None = None, eps: float = 1e-9) -> Tensor:
    """x + sin²(frequency · x) / (magnitude + eps), magnitude = frequency where not given (arXiv:2006.08195, eq. 3).

    Args:
        values: (B, C, T).
        frequency, magnitude: broadcastable to it, such as (1, C, 1).
    """
    scale = ((frequency if magnitude is None else magnitude) + eps).reciprocal()
    return torch.addcmul(values, scale, torch.sin(frequency * values).square_())


class Snake(nn.Module):
    """``snake`` with a frequency ``alpha`` per channel, (1, C, 1) as checkpoints hold it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, channels, 1))

    def forward(self, values: Tensor) -> Tensor:
        """(B, C, T) to (B, C, T)."""
        return snake(values, self.alpha)


class SnakeBeta(nn.Module):
    """``snake`` with a frequency exp(``alpha``) and a magnitude exp(``beta``) per channel, (C,) each."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(channels))
        self.beta = nn.Parameter(torch.zeros(channels))

    def forward(self, values: Tensor) -> Tensor:
        """(B, C, T) to (B, C, T)."""
        return snake(values, self.alpha.exp()[:, None], self.beta.exp()[:, None])


class HalfSnake(nn.Module):
    """``Snake`` on the first half of the channels (rounded down), a leaky ReLU with slope 0.01 on the others."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, channels // 2, 1))

    def forward(self, values: Tensor) -> Tensor:
        """(B, C, T) to (B, C, T)."""
        count = self.alpha.shape[1]
        first, second = values[:, :count], values[:, count:]
        return torch.cat((snake(first, self.alpha), leaky_relu(second, 0.01)), dim=1)
