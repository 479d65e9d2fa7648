"""SNAC's encoder, quantizer and decoder on padded batches, modules under the published names.

All convolutions but the strided ones keep the length, with zeros on both sides; none is causal. ``fold`` must be called
once after the tensors are in place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial, reduce
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool1d, pad, scaled_dot_product_attention

from batch_tokenizer.codecs.layers.activations import Snake
from batch_tokenizer.codecs.layers.attention import Rotation
from batch_tokenizer.codecs.layers.convolution import Conv1d, ConvTranspose1d, Padding, fold_weight_norms
from batch_tokenizer.codecs.layers.padded import PaddedBatch
from batch_tokenizer.codecs.layers.quantizers import Codebook, residual_codes
from batch_tokenizer.codecs.snac.config import HEAD_DIM, SnacConfig

_Conv = partial(Conv1d, weight_norm=True)


class ResidualUnit(nn.Module):
    """x + conv1(snake(conv7(snake(x)))), the first convolution dilated."""

    def __init__(self, width: int, dilation: int, groups: int) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            [
                Snake(width),
                _Conv(width, width, 7, padding=Padding.same(7, dilation), dilation=dilation, groups=groups),
                Snake(width),
                _Conv(width, width, 1, padding=Padding.same(1)),
            ]
        )

    def forward(self, batch: PaddedBatch) -> PaddedBatch:
        """(B, C, T) to (B, C, T)."""
        first_snake, wide_conv, second_snake, narrow_conv = self.block
        hidden = wide_conv(batch.map(first_snake))
        hidden = narrow_conv(hidden.map(second_snake))
        return batch.with_values(batch.values + hidden.values)


class LocalAttention(nn.Module):
    """x + to_out(attention(LayerNorm(x))) within windows of frames that do not overlap.

    Encoded utterances are whole windows long. Codes to decode may end within one: its last frames see each other only.
    """

    def __init__(self, width: int, window: int) -> None:
        super().__init__()
        self.window = window
        self.norm = nn.LayerNorm(width)
        self.to_qkv = nn.Linear(width, 3 * width, bias=False)
        self.to_out = nn.Linear(width, width, bias=False)

    def forward(self, batch: PaddedBatch) -> PaddedBatch:
        """(B, C, T) to (B, C, T)."""
        missing = -batch.size % self.window
        frames = pad(self.norm(batch.values.mT), (0, 0, 0, missing))  # (B, T', C)
        windows = self.to_qkv(frames).unflatten(1, (-1, self.window)).unflatten(-1, (3, -1, HEAD_DIM))
        query, key, value = windows.permute(3, 0, 1, 4, 2, 5).flatten(1, 2)  # 3 · (windows, heads, window, 64)
        rotation = Rotation.of(self.window, HEAD_DIM, device=frames.device)
        attended = scaled_dot_product_attention(
            rotation.halves(query), rotation.halves(key), value, attn_mask=self._own_frames(batch, missing)
        )
        joined = attended.transpose(1, 2).flatten(2).reshape(frames.shape)
        return batch.with_values(batch.values + self.to_out(joined[:, : batch.size]).mT)

    def _own_frames(self, batch: PaddedBatch, missing: int) -> Tensor | None:
        """bool (windows, 1, 1, window): frames of an utterance, all where a window has none; None where all are."""
        if batch.beyond is None and not missing:
            return None
        beyond = batch.beyond
        if beyond is None:
            beyond = torch.zeros(len(batch.values), 1, batch.size, dtype=torch.bool, device=batch.values.device)
        own = ~pad(beyond, (0, missing), value=True).reshape(-1, 1, 1, self.window)
        return own | ~own.any(dim=-1, keepdim=True)


class EncoderBlock(nn.Module):
    """Three residual units, then a strided convolution to twice the channels."""

    def __init__(self, width: int, stride: int, depthwise: bool) -> None:
        super().__init__()
        side = math.ceil(stride / 2)
        groups = width if depthwise else 1
        self.block = nn.ModuleList(
            [
                *(ResidualUnit(width, dilation, groups) for dilation in (1, 3, 9)),
                Snake(width),
                _Conv(width, 2 * width, 2 * stride, padding=Padding(side, side), stride=stride),
            ]
        )

    def forward(self, batch: PaddedBatch) -> PaddedBatch:
        """(B, C, T) to (B, 2C, T / stride)."""
        *units, snake, down = self.block
        for unit in units:
            batch = unit(batch)
        return cast(PaddedBatch, down(batch.map(snake)))


class Encoder(nn.Module):
    """Samples to latent frames."""

    def __init__(self, config: SnacConfig) -> None:
        super().__init__()
        width = config.encoder_dim
        layers: list[nn.Module] = [_Conv(1, width, 7, padding=Padding.same(7))]
        for stride in config.encoder_rates:
            layers.append(EncoderBlock(width, stride, config.depthwise))
            width *= 2
        if config.attn_window_size is not None:
            layers.append(LocalAttention(width, config.attn_window_size))
        layers.append(_Conv(width, width, 7, padding=Padding.same(7), groups=width if config.depthwise else 1))
        self.block = nn.ModuleList(layers)

    def forward(self, batch: PaddedBatch) -> PaddedBatch:
        """(B, 1, S) to (B, latent_dim, F)."""
        for layer in self.block:
            batch = layer(batch)
        return batch


class Level(nn.Module):
    """One codebook at one rate: a code for each ``stride`` latent frames."""

    def __init__(self, config: SnacConfig, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.in_proj = _Conv(config.latent_dim, config.codebook_dim, 1, padding=Padding.same(1))
        self.out_proj = _Conv(config.codebook_dim, config.latent_dim, 1, padding=Padding.same(1))
        self.codebook = Codebook(config.codebook_size, config.codebook_dim, by_direction=True)

    def nearest(self, residual: Tensor) -> Tensor:
        """Residual (B, latent_dim, F) to codes int64 (B, F / stride)."""
        if self.stride > 1:
            residual = avg_pool1d(residual, self.stride, self.stride)
        vectors = self.in_proj(PaddedBatch(residual)).values.mT  # (B, F / stride, d)
        return self.codebook.nearest(vectors.flatten(0, 1)).unflatten(0, vectors.shape[:2])

    def forward(self, codes: Tensor, absent: Tensor | None = None) -> Tensor:
        """Codes (B, F / stride) to float32 (B, latent_dim, F); those that are ``absent``, a mask, add nothing."""
        latent = self.out_proj(PaddedBatch(self.codebook(codes).mT)).values
        if absent is not None:
            latent = latent.masked_fill(absent[:, None], 0.0)
        return latent.repeat_interleave(self.stride, dim=-1)


class Quantizer(nn.Module):
    """Levels at several rates, each quantizing the residual of the coarser ones; in float32."""

    def __init__(self, config: SnacConfig) -> None:
        super().__init__()
        self.quantizers = nn.ModuleList(Level(config, stride) for stride in config.vq_strides)

    def encode(self, latent: Tensor) -> list[Tensor]:
        """Latent frames (B, latent_dim, F) to codes int64 (B, F / stride) of each level, coarse first."""
        return residual_codes(self.quantizers, latent.float())

    def decode(self, codes: Sequence[Tensor], absent: Sequence[Tensor | None]) -> Tensor:
        """Codes of each level to float32 (B, latent_dim, F)."""
        levels = zip(self.quantizers, codes, absent, strict=True)
        return reduce(torch.add, (level(code, missing) for level, code, missing in levels))


class NoiseBlock(nn.Module):
    """x + n · linear(x), n one standard normal value for each position."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = _Conv(width, width, 1, padding=Padding.same(1), bias=False)

    def forward(self, batch: PaddedBatch, noise: Tensor | None) -> PaddedBatch:
        """(B, C, T) to (B, C, T) with noise (B, 1, T); without noise what it is on average, x."""
        return batch if noise is None else batch.with_values(batch.values + noise * self.linear(batch).values)


class DecoderBlock(nn.Module):
    """A transposed convolution to half the channels, noise, and three residual units."""

    def __init__(self, width: int, stride: int, config: SnacConfig) -> None:
        super().__init__()
        half, side = width // 2, math.ceil(stride / 2)
        groups = half if config.depthwise else 1
        self.block = nn.ModuleList(
            [
                Snake(width),
                ConvTranspose1d(
                    width,
                    half,
                    2 * stride,
                    stride,
                    trim_left=side,
                    trim_right=side,
                    output_padding=stride % 2,
                    weight_norm=True,
                ),
                *([NoiseBlock(half)] if config.noise else []),
                *(ResidualUnit(half, dilation, groups) for dilation in (1, 3, 9)),
            ]
        )

    def forward(self, batch: PaddedBatch, noise: Tensor | None) -> PaddedBatch:
        """(B, C, T) to (B, C / 2, T · stride)."""
        snake, up, *rest = self.block
        batch = up(batch.map(snake))
        for layer in rest:
            batch = layer(batch, noise) if isinstance(layer, NoiseBlock) else layer(batch)
        return batch


class Decoder(nn.Module):
    """Latent frames to samples."""

    def __init__(self, config: SnacConfig) -> None:
        super().__init__()
        latent, width = config.latent_dim, config.decoder_dim
        if config.depthwise:
            layers: list[nn.Module] = [
                _Conv(latent, latent, 7, padding=Padding.same(7), groups=latent),
                _Conv(latent, width, 1, padding=Padding.same(1)),
            ]
        else:
            layers = [_Conv(latent, width, 7, padding=Padding.same(7))]
        if config.attn_window_size is not None:
            layers.append(LocalAttention(width, config.attn_window_size))
        for stride in config.decoder_rates:
            layers.append(DecoderBlock(width, stride, config))
            width //= 2
        layers += [Snake(width), _Conv(width, 1, 7, padding=Padding.same(7))]
        self.model = nn.ModuleList(layers)

    def forward(self, batch: PaddedBatch, noise: Sequence[Tensor] | None) -> Tensor:
        """(B, latent_dim, F) to samples (B, S), with noise (B, 1, T) for each decoder block or none."""
        *layers, snake, last = self.model
        draws = iter(noise or ())
        for layer in layers:
            batch = layer(batch, next(draws, None)) if isinstance(layer, DecoderBlock) else layer(batch)
        return cast(Tensor, last(batch.map(snake)).values.tanh()[:, 0])


class Snac(nn.Module):
    """The parts of a SNAC model that are needed; the quantizer always."""

    def __init__(self, config: SnacConfig, parts: Sequence[str] = ("encoder", "decoder")) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config) if "encoder" in parts else None
        self.quantizer = Quantizer(config)
        self.decoder = Decoder(config) if "decoder" in parts else None

    @torch.no_grad()
    def fold(self) -> None:
        """Multiplies weight norms out and prepares codebooks; called once, with the published tensors in float32."""
        fold_weight_norms(self)
        for level in cast("list[Level]", list(self.quantizer.quantizers)):
            level.codebook.fold()

    def use_dtype(self, dtype: torch.dtype) -> None:
        """Makes all but the quantizer compute in ``dtype``."""
        for part in (self.encoder, self.decoder):
            if part is not None:
                part.to(dtype)

    def encode(self, samples: PaddedBatch) -> list[Tensor]:
        """Samples (B, 1, S), S a whole number of ``config.multiple``, to codes (B, F / stride) of each level."""
        if self.encoder is None:
            raise ValueError("this model was loaded without its encoder")
        dtype = next(self.encoder.parameters()).dtype
        return self.quantizer.encode(self.encoder(samples.map(lambda values: values.to(dtype))).values)

    def decode(
        self,
        codes: Sequence[Tensor],
        frames: Tensor | None,
        *,
        absent: Sequence[Tensor | None] | None = None,
        noise: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Codes (B, F / stride) of each level to samples float32 (B, S).

        Args:
            frames: int64 (B,), latent frames of each utterance, or None if all fill the axis.
            absent: for each level the codes that are not there and add nothing, bool (B, F / stride), or None.
            noise: for each decoder block one value a position, (B, 1, T), or None for no noise.
        """
        if self.decoder is None:
            raise ValueError("this model was loaded without its decoder")
        latent = self.quantizer.decode(codes, absent or [None] * len(codes))
        dtype = next(self.decoder.parameters()).dtype
        draws = None if noise is None else [draw.to(dtype) for draw in noise]
        return cast(Tensor, self.decoder(PaddedBatch.of(latent.to(dtype), frames), draws)).float()
