"""The decoder: codebook rows, a causal transformer with a window, and convolutions up to samples. All causal."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from batch_tokenizer.codecs.layers.activations import SnakeBeta
from batch_tokenizer.codecs.layers.attention import Rotation
from batch_tokenizer.codecs.layers.convnext import ConvNeXt
from batch_tokenizer.codecs.layers.convolution import Conv1d, ConvTranspose1d, Padding
from batch_tokenizer.codecs.layers.norms import LayerScale
from batch_tokenizer.codecs.layers.padded import PaddedBatch
from batch_tokenizer.codecs.qwen3_tts.config import DecoderConfig, TransformerConfig
from batch_tokenizer.codecs.qwen3_tts.layers import CausalAttention, Pointwise, UsageCodebook, in_pieces
from batch_tokenizer.kernels.codebook import Float32Buffers
from batch_tokenizer.kernels.norms import RMSNorm
from batch_tokenizer.records import DecoderChunks

#: Frames of a published chunk, and frames of context before it.
PUBLISHED_CHUNK, PUBLISHED_CONTEXT = 300, 25

#: Frames whose convolutions are computed at once.
PIECE_FRAMES = 250

DILATIONS = (1, 3, 9)


def _conv(channels_in: int, channels_out: int, kernel_size: int, *, dilation: int = 1, groups: int = 1) -> Conv1d:
    padding = Padding.causal(kernel_size, dilation=dilation)
    return Conv1d(channels_in, channels_out, kernel_size, padding=padding, dilation=dilation, groups=groups)


class DecodingQuantizer(Float32Buffers):
    """The sum of codebook rows through a projection."""

    def __init__(self, config: DecoderConfig, count: int) -> None:
        super().__init__()
        inner = config.codebook_dim // 2
        self.output_proj = Pointwise(inner, config.codebook_dim)
        self.vq = nn.Module()
        self.vq.layers = nn.ModuleList()
        for _ in range(count):
            codebook = UsageCodebook(config.codebook_size, inner, "embedding_sum")
            self.vq.layers.append(nn.ModuleDict({"_codebook": codebook}))

    def forward(self, codes: Tensor) -> Tensor:
        """Codes (B, K', T), K' at most the number of codebooks, to float32 (B, T, codebook_dim)."""
        layers = cast(nn.ModuleList, self.vq.layers)
        rows = [
            cast(nn.ModuleDict, layer)["_codebook"](codes[:, index])
            for index, layer in enumerate(layers[: codes.shape[1]])
        ]
        return self.output_proj(torch.stack(rows).sum(dim=0))


class Layer(nn.Module):
    """x + scale · attention(norm(x)), then x + scale · down(silu(gate(norm(x))) · up(norm(x)))."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        width, hidden = config.hidden_size, config.intermediate_size
        self.self_attn = CausalAttention(config)
        self.mlp = nn.ModuleDict(
            {
                "gate_proj": nn.Linear(width, hidden, bias=False),
                "up_proj": nn.Linear(width, hidden, bias=False),
                "down_proj": nn.Linear(hidden, width, bias=False),
            }
        )
        self.input_layernorm = RMSNorm(width, config.norm_eps)
        self.post_attention_layernorm = RMSNorm(width, config.norm_eps)
        self.self_attn_layer_scale = LayerScale(width)
        self.mlp_layer_scale = LayerScale(width)

    def forward(self, x: Tensor, rotation: Rotation, window: int) -> Tensor:
        """(B, T, d) to (B, T, d)."""
        x = x + self.self_attn_layer_scale(self.self_attn(self.input_layernorm(x), rotation, window))
        y = self.post_attention_layernorm(x)
        hidden = self.mlp["down_proj"](silu(self.mlp["gate_proj"](y)) * self.mlp["up_proj"](y))
        return x + self.mlp_layer_scale(hidden)


class Transformer(nn.Module):
    """Projection to the layers' width, the layers, a norm, projection back."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config.transformer
        width = config.transformer.hidden_size
        self.input_proj = nn.Linear(config.latent_dim, width)
        self.layers = nn.ModuleList(Layer(config.transformer) for _ in range(config.transformer.num_hidden_layers))
        self.norm = RMSNorm(width, config.transformer.norm_eps)
        self.output_proj = nn.Linear(width, config.latent_dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, latent_dim) to (B, T, latent_dim)."""
        config = self.config
        rotation = Rotation.of(x.shape[1], config.head_dim, base=config.rope_theta, device=x.device)
        x = self.input_proj(x)
        for layer in self.layers:
            x = layer(x, rotation, config.sliding_window)
        return self.output_proj(self.norm(x))


class ResidualUnit(nn.Module):
    """x + conv2(snake(conv1(snake(x)))), the first convolution dilated."""

    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.act1, self.act2 = SnakeBeta(width), SnakeBeta(width)
        self.conv1 = _conv(width, width, 7, dilation=dilation)
        self.conv2 = _conv(width, width, 1)

    def forward(self, batch: PaddedBatch) -> PaddedBatch:
        """(B, C, T) to (B, C, T)."""
        hidden = self.conv2(self.conv1(batch.map(self.act1)).map(self.act2))
        return batch.with_values(batch.values + hidden.values)


class UpBlock(nn.Module):
    """Snake, a transposed convolution to half the channels, three residual units."""

    def __init__(self, width: int, rate: int) -> None:
        super().__init__()
        half = width // 2
        self.block = nn.ModuleList(
            [
                SnakeBeta(width),
                ConvTranspose1d(width, half, 2 * rate, rate, trim_right=rate),
                *(ResidualUnit(half, dilation) for dilation in DILATIONS),
            ]
        )

    def forward(self, batch: PaddedBatch) -> PaddedBatch:
        """(B, C, T) to (B, C / 2, T · rate)."""
        snake, up, *units = self.block
        batch = up(batch.map(snake))
        for unit in units:
            batch = unit(batch)
        return batch


class Decoder(nn.Module):
    """Codes to samples.

    Attributes:
        chunks: how long utterances are decoded.
        piece: frames whose convolutions are computed at once.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.chunks: DecoderChunks = "exact"
        self.piece = PIECE_FRAMES
        latent, width = config.latent_dim, config.decoder_dim
        self.quantizer = nn.ModuleDict(
            {
                "rvq_first": DecodingQuantizer(config, 1),
                "rvq_rest": DecodingQuantizer(config, config.num_quantizers - 1),
            }
        )
        self.pre_conv = _conv(config.codebook_dim, latent, 3)
        self.pre_transformer = Transformer(config)
        self.upsample = nn.ModuleList(
            nn.ModuleList(
                [
                    ConvTranspose1d(latent, latent, factor, factor),
                    ConvNeXt(latent, 4 * latent, _conv(latent, latent, 7, groups=latent), nn.LayerNorm(latent, 1e-6)),
                ]
            )
            for factor in config.upsampling_ratios
        )
        layers: list[nn.Module] = [_conv(latent, width, 7)]
        for rate in config.upsample_rates:
            layers.append(UpBlock(width, rate))
            width //= 2
        self.decoder = nn.ModuleList([*layers, SnakeBeta(width), _conv(width, 1, 7)])

    def forward(self, codes: PaddedBatch) -> Tensor:
        """Codes int64 (B, K, T) to samples (B, S) in the model's dtype."""
        if self.chunks == "published":
            samples = in_pieces(
                lambda part: self._convolutions(self._latent(part)),
                codes,
                size=PUBLISHED_CHUNK,
                context=PUBLISHED_CONTEXT,
                positions_out=self.config.samples_per_frame,
            )
        else:
            samples = in_pieces(
                self._convolutions,
                self._latent(codes),
                size=self.piece,
                context=self.reach,
                positions_out=self.config.samples_per_frame,
            )
        return samples.values[:, 0].clamp(-1, 1)

    @property
    def reach(self) -> int:
        """Frames before a frame's own that its samples depend on, beyond the transformer."""
        frames, rate = 0.0, 1
        for module in [*self.upsample.modules(), *self.decoder.modules()]:  # in the order in which they are called
            if isinstance(module, Conv1d):
                frames += module.padding.left / rate
            elif isinstance(module, ConvTranspose1d):
                frames += (math.ceil(module.kernel_size / module.stride) - 1) / rate
                rate *= module.stride
        return math.ceil(frames)

    def _latent(self, codes: PaddedBatch) -> PaddedBatch:
        """Codes (B, K, T) to (B, latent_dim, T)."""
        first, rest = codes.values[:, :1], codes.values[:, 1:]
        rows = self.quantizer["rvq_first"](first)
        if rest.shape[1]:
            rows = rows + self.quantizer["rvq_rest"](rest)
        latent = self.pre_conv(codes.with_values(rows.mT.to(self.pre_conv.weight.dtype)))
        return cast(PaddedBatch, latent.with_values(self.pre_transformer(latent.values.mT).mT))

    def _convolutions(self, batch: PaddedBatch) -> PaddedBatch:
        """(B, latent_dim, T) to (B, 1, S)."""
        for stage in self.upsample:
            up, block = cast(nn.ModuleList, stage)
            batch = block(up(batch))
        *layers, snake, last = self.decoder
        for layer in layers:
            batch = layer(batch)
        return cast(PaddedBatch, last(batch.map(snake)))
