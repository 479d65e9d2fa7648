"""WavTokenizer on padded batches: SEANet encoder with an LSTM, one codebook, Vocos backbone, inverse transform.

Modules have the published names without the prefix ``encoder_model``. The LSTM runs forward only, so an utterance's
positions do not depend on what comes after its end. ``fold`` must be called once after the tensors are in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, silu

from batch_tokenizer.codecs.layers.attention import padded_attention
from batch_tokenizer.codecs.layers.convnext import ConvNeXt
from batch_tokenizer.codecs.layers.convolution import Conv1d, Padding, fold_weight_norms
from batch_tokenizer.codecs.layers.inverse_stft import inverse_stft
from batch_tokenizer.codecs.layers.norms import TimeGroupNorm
from batch_tokenizer.codecs.layers.padded import PaddedBatch
from batch_tokenizer.codecs.layers.quantizers import Codebook
from batch_tokenizer.codecs.layers.seanet import SeanetEncoder
from batch_tokenizer.codecs.wavtokenizer.config import WavTokenizerConfig


class SeanetConv(nn.Module):
    """A convolution whose output has ceil(length / stride) positions, with the encoder's padding and norm."""

    def __init__(
        self,
        config: WavTokenizerConfig,
        channels_in: int,
        channels_out: int,
        kernel_size: int,
        stride: int = 1,
        dilation: int = 1,
    ) -> None:
        super().__init__()
        total = (kernel_size - 1) * dilation + 1 - stride
        right = 0 if config.use_causal_conv else total // 2
        self.conv = Conv1d(
            channels_in,
            channels_out,
            kernel_size,
            padding=Padding(total - right, right, completes_stride=True, mode=config.pad_mode),
            stride=stride,
            dilation=dilation,
            weight_norm=config.norm_type == "weight_norm",
        )
        self.norm = TimeGroupNorm(1, channels_out) if config.norm_type == "time_group_norm" else nn.Identity()

    def forward(self, batch: PaddedBatch) -> PaddedBatch:
        """(B, C, T) to (B, C', ceil(T / stride))."""
        return cast(PaddedBatch, self.norm(self.conv(batch)))


class Lstm(nn.Module):
    """x + lstm(x) over time."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(width, width, layers)

    def forward(self, batch: PaddedBatch) -> PaddedBatch:
        """(B, C, T) to (B, C, T)."""
        steps = batch.values.permute(2, 0, 1)
        return batch.with_values((self.lstm(steps)[0] + steps).permute(1, 2, 0))


def _encoder(config: WavTokenizerConfig) -> SeanetEncoder:
    """Samples to frames before quantization, (B, 1, S) to (B, hidden_size, ceil(S / hop))."""
    return SeanetEncoder(
        config,
        partial(SeanetConv, config),
        config.hidden_size,
        shortcut=config.use_conv_shortcut,
        before_last=lambda width: [Lstm(width, config.num_lstm_layers)],
    )


class AdaLayerNorm(nn.Module):
    """LayerNorm with a scale and a shift for each bandwidth, of which inference uses the first."""

    def __init__(self, config: WavTokenizerConfig) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.scale = nn.Embedding(config.adanorm_num_embeddings, config.decoder_hidden_size)
        self.shift = nn.Embedding(config.adanorm_num_embeddings, config.decoder_hidden_size)

    def forward(self, frames: Tensor) -> Tensor:
        """(B, T, C) to (B, T, C)."""
        normed = layer_norm(frames, frames.shape[-1:], eps=self.eps)
        return normed * self.scale.weight[0] + self.shift.weight[0]


class ResnetBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), norms over time."""

    def __init__(self, config: WavTokenizerConfig) -> None:
        super().__init__()
        width, groups = config.decoder_hidden_size, config.decoder_attention_num_groups
        self.norm1 = TimeGroupNorm(groups, width, config.norm_eps)
        self.conv1 = Conv1d(width, width, 3, padding=Padding.same(3))
        self.norm2 = TimeGroupNorm(groups, width, config.norm_eps)
        self.conv2 = Conv1d(width, width, 3, padding=Padding.same(3))

    def forward(self, batch: PaddedBatch) -> PaddedBatch:
        """(B, C, T) to (B, C, T)."""
        hidden = self.conv1(self.norm1(batch).map(silu))
        hidden = self.conv2(self.norm2(hidden).map(silu))
        return batch.with_values(batch.values + hidden.values)


class AttentionBlock(nn.Module):
    """x + proj_out(attention(norm(x))), one head, each frame over all of its utterance."""

    def __init__(self, config: WavTokenizerConfig) -> None:
        super().__init__()
        width = config.decoder_hidden_size
        self.norm = TimeGroupNorm(config.decoder_attention_num_groups, width, config.norm_eps)
        self.q, self.k, self.v, self.proj_out = (Conv1d(width, width, 1, padding=Padding.same(1)) for _ in range(4))

    def forward(self, batch: PaddedBatch) -> PaddedBatch:
        """(B, C, T) to (B, C, T)."""
        normed = self.norm(batch)
        query, key, value = (project(normed).values.mT[:, None] for project in (self.q, self.k, self.v))
        attended = padded_attention(query, key, value, beyond=batch.beyond)[:, 0].mT
        return batch.with_values(batch.values + self.proj_out(batch.with_values(attended)).values)


class Backbone(nn.Module):
    """Codebook rows to what the head makes spectra of."""

    def __init__(self, config: WavTokenizerConfig) -> None:
        super().__init__()
        width = config.decoder_hidden_size
        self.embed = Conv1d(config.hidden_size, width, 7, padding=Padding.same(7))
        self.pos_net = nn.ModuleList(
            [
                ResnetBlock(config),
                ResnetBlock(config),
                AttentionBlock(config),
                ResnetBlock(config),
                ResnetBlock(config),
                TimeGroupNorm(config.decoder_attention_num_groups, width, config.norm_eps),
            ]
        )
        self.norm = AdaLayerNorm(config)
        self.convnext = nn.ModuleList(
            ConvNeXt(
                width,
                config.decoder_intermediate_size,
                Conv1d(width, width, 7, padding=Padding.same(7), groups=width),
                AdaLayerNorm(config),
            )
            for _ in range(config.decoder_num_layers)
        )
        self.final_layer_norm = nn.LayerNorm(width, config.norm_eps)

    def forward(self, batch: PaddedBatch) -> PaddedBatch:
        """(B, hidden_size, T) to (B, decoder_hidden_size, T)."""
        batch = self.embed(batch)
        for layer in self.pos_net:
            batch = layer(batch)
        batch = batch.with_values(self.norm(batch.values.mT).mT)
        for layer in self.convnext:
            batch = layer(batch)
        return batch.with_values(self.final_layer_norm(batch.values.mT).mT)


class SpectrumHead(nn.Module):
    """A linear layer to log-magnitude (magnitudes up to 100) and phase, and the inverse transform."""

    def __init__(self, config: WavTokenizerConfig) -> None:
        super().__init__()
        self.hop = config.hop
        self.linear = nn.Linear(config.decoder_hidden_size, 4 * config.hop + 2)

    def forward(self, batch: PaddedBatch) -> Tensor:
        """(B, decoder_hidden_size, T) to float32 samples (B, T · hop)."""
        log_magnitude, phase = self.linear(batch.values.mT).float().mT.chunk(2, dim=1)
        spectra = torch.polar(log_magnitude.exp().clamp(max=100.0), phase)
        return inverse_stft(batch.with_values(spectra), self.hop)


class WavTokenizer(nn.Module):
    """The parts of a WavTokenizer model that are needed; the codebook always, in float32."""

    def __init__(self, config: WavTokenizerConfig, parts: Sequence[str] = ("encoder", "decoder")) -> None:
        super().__init__()
        self.config = config
        self.encoder = _encoder(config) if "encoder" in parts else None
        self.codebook = Codebook(config.codebook_size, config.hidden_size)
        self.backbone = Backbone(config) if "decoder" in parts else None
        self.head = SpectrumHead(config) if "decoder" in parts else None

    @torch.no_grad()
    def fold(self) -> None:
        """Multiplies weight norms out and prepares the codebook; called once, with the published tensors in float32."""
        fold_weight_norms(self)
        self.codebook.fold()

    def hidden(self, samples: PaddedBatch) -> PaddedBatch:
        """Samples (B, 1, S) to float32 (B, hidden_size, T) before quantization."""
        if self.encoder is None:
            raise ValueError("this model was loaded without its encoder")
        dtype = next(self.encoder.parameters()).dtype
        return cast(PaddedBatch, self.encoder(samples.map(lambda values: values.to(dtype)))).map(Tensor.float)

    def encode(self, samples: PaddedBatch, num_quantizers: int = 1) -> Tensor:
        """Samples (B, 1, S) to codes int64 (B, T, 1); there is one codebook."""
        hidden = self.hidden(samples).values.mT
        return self.codebook.nearest(hidden.flatten(0, 1)).unflatten(0, hidden.shape[:2])[..., None]

    def decode(self, codes: PaddedBatch) -> Tensor:
        """Codes int64 (B, 1, T) to samples float32 (B, T · hop)."""
        if self.backbone is None or self.head is None:
            raise ValueError("this model was loaded without its decoder")
        rows = self.codebook(codes.values[:, 0]).mT.to(self.head.linear.weight.dtype)
        return cast(Tensor, self.head(self.backbone(codes.with_values(rows))))
