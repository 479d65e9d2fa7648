"""The ConvNeXt block of vocoders (arXiv:2201.03545, arXiv:2306.00814), on padded batches."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import gelu

from batch_tokenizer.codecs.layers.convolution import Conv1d
from batch_tokenizer.codecs.layers.padded import PaddedBatch


class ConvNeXt(nn.Module):
    """x + gamma · pwconv2(gelu(pwconv1(norm(dwconv(x))))).

    Args:
        dwconv: a depthwise convolution of ``width`` channels that keeps the length.
        norm: of frames (B, T, C).
        hidden: channels between the two linear layers.
    """

    def __init__(self, width: int, hidden: int, dwconv: Conv1d, norm: nn.Module) -> None:
        super().__init__()
        self.dwconv, self.norm = dwconv, norm
        self.pwconv1, self.pwconv2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, batch: PaddedBatch) -> PaddedBatch:
        """(B, C, T) to (B, C, T)."""
        frames = self.norm(self.dwconv(batch).values.mT)
        frames = self.gamma * self.pwconv2(gelu(self.pwconv1(frames)))
        return batch.with_values(batch.values + frames.mT)
