"""MiMo's encoder: log-mel frames of packed utterances in, hidden token frames out.

Every matrix here has one row per frame, so a convolution is a matrix product over windows of rows. Utterances start at
multiples of stride x pooling on the mel axis with at least one zero frame after each, so that convolutions see zeros
where a lone utterance would.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from batch_tokenizer.codecs.layers.packed import convolve
from batch_tokenizer.codecs.mimo.config import MiMoConfig
from batch_tokenizer.codecs.mimo.layers import TransformerStack, activate, make_norm
from batch_tokenizer.codecs.mimo.quantizer import ResidualVectorQuantizer
from batch_tokenizer.kernels.segments import GappedAxis, Segments, filler_runs


@dataclass(frozen=True)
class EncoderLayout:
    """Positions of the utterances on the axes of the encoder.

    Attributes:
        mel: the input axis, ``mel.size`` rows.
        conv1_valid: bool (rows after conv1, 1), true where an utterance has a frame.
        conv2: the axis after ``conv2``; its starts are multiples of the pooling.
        layers: the tight axis that the layers run on, filler at its end.
        tokens: the axis of token frames.
    """

    mel: GappedAxis
    conv1_valid: Tensor
    conv2: GappedAxis
    layers: Segments
    tokens: GappedAxis

    @staticmethod
    def spans(config: MiMoConfig, mel_frames: Sequence[int]) -> np.ndarray:
        """int64 (S,): token frames of axis that each utterance takes up, its gap included."""
        align = config.stride_size * config.avg_pooler
        frames = np.asarray(mel_frames, dtype=np.int64)
        convolved = frames + config.num_conv1_frames(0)
        tokens = [config.num_token_frames(length) for length in frames.tolist()]
        return np.maximum(-(-(np.maximum(frames, convolved) + 1) // align), tokens)

    @classmethod
    def build(
        cls, config: MiMoConfig, mel_frames: Sequence[int], device: torch.device, capacity: int | None = None
    ) -> EncoderLayout:
        """Utterances of ``mel_frames`` each; ``capacity`` token frames of axis, or as many as they take up."""
        stride, pooler = config.stride_size, config.avg_pooler
        spans = cls.spans(config, mel_frames)
        starts = np.cumsum(spans) - spans
        total = int(spans.sum())
        size = total if capacity is None else capacity
        if size < total:
            raise ValueError(f"utterances take up {total} token frames of axis, more than the capacity {size}")
        conv1_lengths = [config.num_conv1_frames(frames) for frames in mel_frames]
        conv2_lengths = [config.num_encoder_frames(frames) for frames in mel_frames]
        token_lengths = [config.num_token_frames(frames) for frames in mel_frames]
        mel = GappedAxis.build(starts * stride * pooler, mel_frames, size * stride * pooler, device)
        conv1 = GappedAxis.build(starts * stride * pooler, conv1_lengths, config.num_conv1_frames(mel.size), device)
        filler = 0 if capacity is None else size * pooler - sum(conv2_lengths)
        return cls(
            mel=mel,
            conv1_valid=conv1.scatter(torch.ones(len(conv1.rows), 1, dtype=torch.bool, device=device)),
            conv2=GappedAxis.build(starts * pooler, conv2_lengths, size * pooler, device),
            layers=Segments([*conv2_lengths, *filler_runs(filler)], device),
            tokens=GappedAxis.build(starts, token_lengths, size, device),
        )


class AudioEncoder(nn.Module):
    """Two convolutions, transformer layers, pooling by a strided convolution; owns the quantizer."""

    def __init__(self, config: MiMoConfig, outer_norm: str) -> None:
        super().__init__()
        width = config.d_model
        self.config = config
        self.conv1 = nn.Conv1d(config.n_mels, width, config.kernel_size, padding=1)
        self.conv2 = nn.Conv1d(width, width, config.kernel_size, stride=config.stride_size, padding=1)
        self.layers = TransformerStack(
            config.encoder_layers, width, config.encoder_attention_heads, config.encoder_ffn_dim,
            config.encoder_attn_window_size, config.encoder_causal, config.ln_type, config.rope_theta,
        )  # fmt: skip
        self.layer_norm = make_norm(outer_norm, width)
        if config.avg_pooler != 1:
            pooling = nn.Conv1d(width, width, config.avg_pooler, stride=config.avg_pooler, bias=False)
            self.down_sample_layer = nn.Sequential(pooling, nn.GELU())
            self.down_sample_norm = make_norm(outer_norm, width)
        self.quantizer = ResidualVectorQuantizer(config.codebook_size, width)

    def forward(self, mel: Tensor, layout: EncoderLayout) -> Tensor:
        """Log-mel rows (layout.mel.size, n_mels), zeros between utterances, to hidden (layout.tokens.size, d_model)."""
        x = activate(convolve(mel.to(self.conv1.weight.dtype), self.conv1))
        x = x * layout.conv1_valid  # the bias has filled the gaps
        x = activate(convolve(x, self.conv2))
        x = layout.conv2.gather(x)
        x = pad(x, (0, 0, 0, layout.layers.total - len(x)))
        x = self.layers(x, layout.layers, skip=self.config.encoder_skip_layer_id)
        x = self.layer_norm(x)
        x = layout.conv2.scatter(x[: len(layout.conv2.rows)])
        if self.config.avg_pooler != 1:
            weight = self.down_sample_layer.get_parameter("0.weight").transpose(1, 2).flatten(1)
            x = activate(linear(x.unflatten(0, (-1, self.config.avg_pooler)).flatten(1), weight))
            x = self.down_sample_norm(x)
        return x
