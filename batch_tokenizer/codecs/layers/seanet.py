"""The SEANet encoder as EnCodec and its successors have it (arXiv:2210.13438), on padded batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from torch.nn.functional import elu

from batch_tokenizer.codecs.layers.convolution import Conv1d
from batch_tokenizer.codecs.layers.padded import PaddedBatch

#: Makes a convolution from input and output channels, kernel size, and ``stride`` or ``dilation``.
MakeConv = Callable[..., nn.Module]


class Elu(nn.Module):
    """ELU at its place in the list of layers."""

    def forward(self, batch: PaddedBatch) -> PaddedBatch:
        """(B, C, T) to (B, C, T)."""
        return batch.map(elu)


class ResidualBlock(nn.Module):
    """shortcut(x) + conv(elu(conv(elu(x)))), the first convolution dilated and with fewer channels."""

    def __init__(self, config: Any, conv: MakeConv, width: int, dilation: int, shortcut: bool) -> None:
        super().__init__()
        hidden = width // config.compress
        first = conv(width, hidden, config.residual_kernel_size, dilation=dilation)
        self.block = nn.ModuleList([Elu(), first, Elu(), conv(hidden, width, 1)])
        self.shortcut = conv(width, width, 1) if shortcut else nn.Identity()

    def forward(self, batch: PaddedBatch) -> PaddedBatch:
        """(B, C, T) to (B, C, T)."""
        hidden = batch
        for layer in self.block:
            hidden = layer(hidden)
        return batch.with_values(self.shortcut(batch).values + hidden.values)


class SeanetEncoder(nn.Module):
    """Samples to latent frames: for each stride residual blocks and a convolution that doubles the channels.

    Args:
        config: has ``num_filters``, ``strides``, ``kernel_size``, ``last_kernel_size``, ``residual_kernel_size``,
            ``num_residual_layers``, ``dilation_growth_rate`` and ``compress``, as published.
        channels_out: of the result.
        shortcut: whether residual blocks have a convolution on their shortcut.
        before_last: makes the layers before the last activation, for a number of channels.
    """

    def __init__(
        self,
        config: Any,
        conv: MakeConv,
        channels_out: int,
        *,
        shortcut: bool = False,
        before_last: Callable[[int], Sequence[nn.Module]] = lambda width: (),
    ) -> None:
        super().__init__()
        width = config.num_filters
        layers = [conv(1, width, config.kernel_size)]
        for stride in config.strides:
            for index in range(config.num_residual_layers):
                layers.append(ResidualBlock(config, conv, width, config.dilation_growth_rate**index, shortcut))
            layers += [Elu(), conv(width, 2 * width, 2 * stride, stride=stride)]
            width *= 2
        layers += [*before_last(width), Elu(), conv(width, channels_out, config.last_kernel_size)]
        self.layers = nn.ModuleList(layers)

    def forward(self, batch: PaddedBatch) -> PaddedBatch:
        """(B, 1, S) to (B, ``channels_out``, T)."""
        for layer in self.layers:
            batch = layer(batch)
        return batch

    @property
    def reach(self) -> int:
        """Samples before a latent frame's own that it depends on, where all convolutions are causal."""
        samples, hop = 0, 1
        for module in self.modules():  # in the order in which they are called
            if isinstance(module, Conv1d):
                samples += module.padding.left * hop
                hop *= module.stride
        return samples
