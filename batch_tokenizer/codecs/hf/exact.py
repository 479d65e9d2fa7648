"""Replacing the convolutions of the library's models by layers that are exact for batches of mixed lengths.

The library pads a batch to its longest member, and what its convolutions see beyond an utterance's end then differs
from what they see around the utterance alone. In the models of ``hf/families.py`` with ``mixed_lengths`` only
convolutions, forward LSTMs and causal attention mix positions in time, so it is enough to replace the convolutions by
those of ``codecs/layers``, with the same weights, which know the lengths.

Besides, strides are plain numbers there. (The library holds them in buffers on the device and waits for them.) For that
EnCodec's convolutions are also replaced where norms over time rule out mixed lengths.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from batch_tokenizer.codecs.checkpoint import empty_weights
from batch_tokenizer.codecs.layers.convolution import Conv1d, ConvTranspose1d, Padding
from batch_tokenizer.codecs.layers.padded import PaddedBatch

#: The library's names of padding to ours.
_PAD_MODES = {"constant": "zeros", "zero": "zeros", "replicate": "replicate", "reflect": "reflect"}


class BatchLengths(threading.local):
    """The utterances' lengths at the layer that a thread's batch has reached; None for a single utterance.

    Layers run one after the other, and no strided convolution is in a parallel branch, so the output lengths of one are
    the input lengths of the next.
    """

    lengths: Tensor | None = None
    beyond: Tensor | None = None

    @contextmanager
    def of(self, batch: PaddedBatch) -> Iterator[None]:
        """For the model's pass over ``batch``."""
        self.lengths, self.beyond = batch.lengths, batch.beyond
        try:
            yield
        finally:
            self.lengths = self.beyond = None


class ExactConvolution(nn.Module):
    """One of our convolutions with the library's interface: a tensor (B, C, T) in, one out."""

    def __init__(self, layer: Conv1d | ConvTranspose1d, state: BatchLengths) -> None:
        super().__init__()
        self.layer = layer
        self._state = state

    def forward(self, hidden_states: Tensor, padding_cache: None = None) -> Tensor:
        """``padding_cache`` is the library's argument for streams, which are not used."""
        state = self._state
        result: PaddedBatch = self.layer(PaddedBatch(hidden_states, state.lengths, state.beyond))
        state.lengths, state.beyond = result.lengths, result.beyond
        return result.values


def replace_convolutions(parts: Sequence[nn.Module]) -> BatchLengths:
    """Replaces all convolutions in ``parts`` of a model, whose weights are on their device, by exact ones.

    Returns:
        the object through which they get the lengths of a batch.
    """
    state = BatchLengths()
    for part in parts:
        _replace(part, state)
    return state


def _replace(parent: nn.Module, state: BatchLengths) -> None:
    for name, child in parent.named_children():
        norm = getattr(child, "norm", None)  # after each convolution of EnCodec at 48 kHz
        if norm is not None and isinstance(getattr(child, "conv", None), nn.ConvTranspose1d):
            continue  # it is trimmed after the norm, and does not wait for the device
        layer = _exact(child)
        if layer is None:
            _replace(child, state)
        else:
            convolution = ExactConvolution(layer, state)
            setattr(parent, name, convolution if norm is None else nn.Sequential(convolution, norm))


def _exact(module: Any) -> Conv1d | ConvTranspose1d | None:
    """Our layer for a convolution of torch's or of the library's, None for another module."""
    if isinstance(module, nn.Conv1d):
        side = int(module.padding[0])
        return _convolution(module, Padding(side, side))
    if isinstance(module, nn.ConvTranspose1d):
        side = int(module.padding[0])
        return _transposed(module, side, side)
    inner = getattr(module, "conv", None)
    if isinstance(inner, nn.Conv1d):  # MimiConv1d, EncodecConv1d
        total = (inner.kernel_size[0] - 1) * inner.dilation[0] + 1 - inner.stride[0]
        right = 0 if module.causal else total // 2
        mode: Any = _PAD_MODES[module.pad_mode]
        return _convolution(inner, Padding(total - right, right, completes_stride=True, mode=mode))
    if isinstance(inner, nn.ConvTranspose1d):  # MimiConvTranspose1d, EncodecConvTranspose1d
        total = inner.kernel_size[0] - inner.stride[0]
        right = math.ceil(total * module.trim_right_ratio) if module.causal else total // 2
        return _transposed(inner, total - right, right)
    return None


def _convolution(conv: nn.Conv1d, padding: Padding) -> Conv1d:
    with empty_weights():
        layer = Conv1d(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size[0],
            padding=padding,
            stride=conv.stride[0],
            dilation=conv.dilation[0],
            groups=conv.groups,
            bias=conv.bias is not None,
        )
    return _with_weights(layer, conv)


def _transposed(conv: nn.ConvTranspose1d, trim_left: int, trim_right: int) -> ConvTranspose1d:
    with empty_weights():
        layer = ConvTranspose1d(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size[0],
            conv.stride[0],
            trim_left=trim_left,
            trim_right=trim_right,
            output_padding=int(conv.output_padding[0]),
            groups=conv.groups,
            bias=conv.bias is not None,
        )
    return _with_weights(layer, conv)


def _with_weights(layer: Any, conv: Any) -> Any:
    """``layer`` with the weights of ``conv``; a weight norm is multiplied out by reading the weight."""
    layer.weight = nn.Parameter(conv.weight.detach(), requires_grad=False)
    if conv.bias is not None:
        layer.bias = nn.Parameter(conv.bias.detach(), requires_grad=False)
    return layer
