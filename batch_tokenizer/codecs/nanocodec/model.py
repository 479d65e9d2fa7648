"""NanoCodec's encoder and decoder on padded batches, modules under NeMo's names without their wrappers.

The encoder's convolutions see their input's first and last position repeated on both sides, the decoder's zeros on the
left only. ``fold`` must be called once after the tensors are in place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu

from batch_tokenizer.codecs.layers.activations import HalfSnake
from batch_tokenizer.codecs.layers.convolution import Conv1d, ConvTranspose1d, Padding, fold_weight_norms
from batch_tokenizer.codecs.layers.padded import PaddedBatch
from batch_tokenizer.codecs.layers.quantizers import FiniteScalarQuantizer
from batch_tokenizer.codecs.nanocodec.config import DILATIONS, KERNEL_SIZES, NanoCodecConfig

Activation = Callable[[Tensor], Tensor]


def _conv(channels_in: int, channels_out: int, kernel_size: int, *, causal: bool, dilation: int = 1) -> Conv1d:
    """A convolution that keeps the length."""
    if causal:
        padding = Padding.causal(kernel_size, dilation=dilation)
    else:
        padding = Padding.same(kernel_size, dilation, "replicate")
    return Conv1d(channels_in, channels_out, kernel_size, padding=padding, dilation=dilation, weight_norm=True)


def _activation(width: int, causal: bool) -> nn.Module:
    return HalfSnake(width) if causal else nn.LeakyReLU(0.01)


class ResidualBlock(nn.Module):
    """x + skip_conv(act(input_conv(act(x)))), the first convolution dilated."""

    def __init__(self, width: int, kernel_size: int, dilation: int, *, causal: bool) -> None:
        super().__init__()
        self.input_activation = _activation(width, causal)
        self.input_conv = _conv(width, width, kernel_size, causal=causal, dilation=dilation)
        self.skip_activation = _activation(width, causal)
        self.skip_conv = _conv(width, width, kernel_size, causal=causal)

    def forward(self, batch: PaddedBatch) -> PaddedBatch:
        """(B, C, T) to (B, C, T)."""
        hidden = self.input_conv(batch.map(self.input_activation))
        hidden = self.skip_conv(hidden.map(self.skip_activation))
        return batch.with_values(batch.values + hidden.values)


class Branch(nn.Module):
    """Residual blocks of one kernel size in a row."""

    def __init__(self, width: int, kernel_size: int, *, causal: bool) -> None:
        super().__init__()
        self.res_blocks = nn.ModuleList(
            ResidualBlock(width, kernel_size, dilation, causal=causal) for dilation in DILATIONS
        )

    def forward(self, batch: PaddedBatch) -> PaddedBatch:
        """(B, C, T) to (B, C, T)."""
        for block in self.res_blocks:
            batch = block(batch)
        return batch


class ResidualLayer(nn.Module):
    """The mean of parallel branches of several kernel sizes."""

    def __init__(self, width: int, *, causal: bool) -> None:
        super().__init__()
        self.res_blocks = nn.ModuleList(Branch(width, kernel_size, causal=causal) for kernel_size in KERNEL_SIZES)

    def forward(self, batch: PaddedBatch) -> PaddedBatch:
        """(B, C, T) to (B, C, T)."""
        total = sum(branch(batch).values for branch in self.res_blocks)
        return batch.with_values(total / len(self.res_blocks))


class Encoder(nn.Module):
    """Samples to frames before quantization."""

    def __init__(self, config: NanoCodecConfig) -> None:
        super().__init__()
        width = config.encoder_channels
        self.pre_conv = _conv(1, width, 7, causal=False)
        self.res_layers = nn.ModuleList()
        self.down_sample_conv_layers = nn.ModuleList()
        for stride in config.down_sample_rates:
            side = math.ceil(stride / 2)
            self.res_layers.append(ResidualLayer(width, causal=False))
            self.down_sample_conv_layers.append(
                Conv1d(
                    width,
                    2 * width,
                    2 * stride,
                    padding=Padding(side, side, mode="replicate"),
                    stride=stride,
                    weight_norm=True,
                )
            )
            width *= 2
        self.post_conv = _conv(width, config.latent_dim, 7, causal=False)

    def forward(self, batch: PaddedBatch) -> PaddedBatch:
        """(B, 1, S) to (B, latent_dim, T)."""
        batch = self.pre_conv(batch)
        for residual, down in zip(self.res_layers, self.down_sample_conv_layers, strict=True):
            batch = down(residual(batch).map(leaky_relu))
        return cast(PaddedBatch, self.post_conv(batch.map(leaky_relu)))


class Decoder(nn.Module):
    """Quantized frames to samples."""

    def __init__(self, config: NanoCodecConfig) -> None:
        super().__init__()
        width = config.decoder_channels
        self.pre_conv = _conv(config.latent_dim, width, 7, causal=True)
        self.activations = nn.ModuleList()
        self.up_sample_conv_layers = nn.ModuleList()
        self.res_layers = nn.ModuleList()
        for stride in config.up_sample_rates:
            half = width // 2
            self.activations.append(HalfSnake(width))
            self.up_sample_conv_layers.append(
                ConvTranspose1d(width, half, 2 * stride, stride, trim_right=stride, groups=half, weight_norm=True)
            )
            self.res_layers.append(ResidualLayer(half, causal=True))
            width = half
        self.post_activation = HalfSnake(width)
        self.post_conv = _conv(width, 1, 3, causal=True)

    def forward(self, batch: PaddedBatch) -> Tensor:
        """(B, latent_dim, T) to samples (B, S)."""
        batch = self.pre_conv(batch)
        for activation, up, residual in zip(self.activations, self.up_sample_conv_layers, self.res_layers, strict=True):
            batch = residual(up(batch.map(activation)))
        return cast(Tensor, self.post_conv(batch.map(self.post_activation)).values[:, 0].clamp(-1, 1))


class NanoCodec(nn.Module):
    """The parts of a NanoCodec model that are needed; quantizing has no weights and is done in float32."""

    def __init__(self, config: NanoCodecConfig, parts: Sequence[str] = ("encoder", "decoder")) -> None:
        super().__init__()
        self.config = config
        self.audio_encoder = Encoder(config) if "encoder" in parts else None
        self.audio_decoder = Decoder(config) if "decoder" in parts else None
        self.quantizer = FiniteScalarQuantizer(config.levels)

    @torch.no_grad()
    def fold(self) -> None:
        """Multiplies weight norms out; called once, with the published tensors in float32."""
        fold_weight_norms(self)
        self.quantizer.fold(next(self.parameters()).device)

    def hidden(self, samples: PaddedBatch) -> PaddedBatch:
        """Samples (B, 1, S), S a whole number of frames, to float32 (B, latent_dim, T) before quantization."""
        if self.audio_encoder is None:
            raise ValueError("this model was loaded without its encoder")
        dtype = next(self.audio_encoder.parameters()).dtype
        return cast(PaddedBatch, self.audio_encoder(samples.map(lambda x: x.to(dtype)))).map(Tensor.float)

    def encode(self, samples: PaddedBatch, num_quantizers: int) -> Tensor:
        """Samples (B, 1, S) to codes int64 (B, T, ``num_quantizers``) of the first groups."""
        groups = self.hidden(samples).values.mT.unflatten(-1, (self.config.num_groups, -1))
        return self.quantizer.encode(groups)[..., :num_quantizers]

    def decode(self, codes: PaddedBatch) -> Tensor:
        """Codes int64 (B, K, T), K at most the number of groups, to samples float32 (B, S).

        Groups that are not there have the value 0 in every dimension, the middle of its range.
        """
        if self.audio_decoder is None:
            raise ValueError("this model was loaded without its decoder")
        values = self.quantizer.decode(codes.values.mT).flatten(-2)  # (B, T, K · D)
        values = nn.functional.pad(values, (0, self.config.latent_dim - values.shape[-1]))
        dtype = next(self.audio_decoder.parameters()).dtype
        return cast(Tensor, self.audio_decoder(codes.with_values(values.mT.to(dtype)))).float()
