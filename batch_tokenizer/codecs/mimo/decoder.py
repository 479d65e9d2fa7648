"""MiMo's decoder: summed codebook rows of packed utterances in, samples out.

Up-sampling by transposed convolutions, transformer layers, then a Vocos-style head: a spectrum per coarse mel frame and
an inverse short-time Fourier transform. As in the encoder, one row per frame; here utterances are packed tightly, and a
zero row between them where frames of a transposed convolution or of the inverse transform would otherwise overlap.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from batch_tokenizer.codecs.mimo.config import MiMoConfig
from batch_tokenizer.codecs.mimo.layers import TransformerStack, make_norm
from batch_tokenizer.kernels.codebook import Float32Buffers
from batch_tokenizer.kernels.norms import SegmentGroupNorm
from batch_tokenizer.kernels.segments import GappedAxis, Segments


def overlap_add(frames: Tensor, hop: int) -> Tensor:
    """Frames (F, W) or (F, W, C), each ``hop`` after the one before, to their sum ((F - 1) hop + W rounded up, …)."""
    count, width = frames.shape[:2]
    pieces = -(-width // hop)
    if width == hop:
        return frames.flatten(0, 1)
    if width % hop:
        frames = pad(frames, (0, 0) * (frames.ndim - 2) + (0, pieces * hop - width))
    frames = frames.unflatten(1, (pieces, hop))
    total = frames.new_zeros((count + pieces - 1, hop, *frames.shape[3:]))
    for piece in range(pieces):
        total[piece : piece + count] += frames[:, piece]
    return total.flatten(0, 1)


class UpSampling(nn.Module):
    """A transposed convolution, then GroupNorm over the whole of each utterance's output, then its tail is cut.

    ``kernel`` - ``stride`` rows are cut, after they have counted in the statistics.
    """

    def __init__(self, channels_in: int, channels_out: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose1d(channels_in, channels_out, kernel, stride=stride)
        self.norm = SegmentGroupNorm(channels_out)
        self.kernel, self.stride = kernel, stride

    def forward(self, rows: Tensor, segments: Segments) -> tuple[Tensor, Segments]:
        """(N, C_in) to (N · stride, C_out), and the utterances on the new tight axis."""
        weight = self.conv.weight  # (C_in, C_out, kernel)
        spread = (rows @ weight.transpose(1, 2).flatten(1)).unflatten(1, (self.kernel, -1))
        axis = GappedAxis.spaced(segments.lengths, -(-(self.kernel - self.stride) // self.stride), rows.device)
        summed = overlap_add(axis.scatter(spread), self.stride)
        full = (segments.lengths - 1) * self.stride + self.kernel
        out = GappedAxis.build(axis.starts * self.stride, full, len(summed), rows.device)
        bias = self.conv.get_parameter("bias")
        whole = self.norm(out.gather(summed) + bias, Segments(full, rows.device))
        kept = GappedAxis.build(np.cumsum(full) - full, segments.lengths * self.stride, len(whole), rows.device)
        return kept.gather(whole), Segments(kept.lengths, rows.device)


class InverseSTFT(Float32Buffers):
    """Windowed frames overlap-added at the hop and divided by the overlap-added squared window, in float32."""

    window: Tensor

    def __init__(self, window_size: int) -> None:
        super().__init__()
        # On the meta device, where models begin, hann_window would import torch's compiler, which takes two seconds.
        window = torch.hann_window(window_size, device="cpu")
        self.register_buffer("window", torch.empty_like(window, device=torch.get_default_device()).copy_(window))

    def forward(self, spectrum: Tensor, segments: Segments, hop: int, trim: int) -> tuple[Tensor, Segments]:
        """Spectrum complex64 (N, W/2 + 1), N frames of packed utterances, to float32 samples on a tight axis.

        ``trim`` samples are cut from both ends of each utterance, so that (frames - 1) · hop + W - 2 trim remain.
        """
        width = len(self.window)
        frames = torch.fft.irfft(spectrum, n=width, dim=1) * self.window
        # Enough empty frames that neither signal nor envelope of one utterance reaches the next.
        axis = GappedAxis.spaced(segments.lengths, -(-width // hop) - 1, spectrum.device)
        signal = overlap_add(axis.scatter(frames), hop)
        envelope = self._envelope(axis, hop)
        lengths = (segments.lengths - 1) * hop + width - 2 * trim
        # Blocks of samples are gathered, not samples: a table of single samples would be 63 MB for a pack of 300 s.
        block = gcd(hop, width - 2 * trim)
        blocks = (len(signal) - trim) // block
        kept = GappedAxis.build(axis.starts * hop // block, lengths // block, blocks, spectrum.device)

        def cut(samples: Tensor) -> Tensor:
            return kept.gather(samples[trim : trim + blocks * block].unflatten(0, (blocks, block))).flatten()

        return cut(signal) / cut(envelope), Segments(lengths, spectrum.device)

    def _envelope(self, axis: GappedAxis, hop: int) -> Tensor:
        """The squared window overlap-added wherever ``axis`` has a frame, float32, as long as the signal."""
        pieces = -(-len(self.window) // hop)
        squared = pad(self.window.square(), (0, pieces * hop - len(self.window))).unflatten(0, (pieces, hop))
        present = axis.scatter(squared.new_ones(axis.lengths.sum(), 1))
        total = squared.new_zeros(axis.size + pieces - 1, hop)
        for piece in range(pieces):
            total[piece : piece + axis.size].addcmul_(present, squared[piece])
        return total.flatten()


class SpectrumHead(nn.Module):
    """A linear layer to log-magnitude and phase, and the inverse transform."""

    def __init__(self, config: MiMoConfig) -> None:
        super().__init__()
        self.out = nn.Linear(config.vocoder_dim, config.nfft + 2)
        self.istft = InverseSTFT(config.window_size)
        self.hop = config.hop_length
        same = (config.window_size - config.hop_length) // 2
        self.trim = same if config.vocoder_padding == "same" else config.nfft // 2

    def forward(self, rows: Tensor, segments: Segments) -> tuple[Tensor, Segments]:
        """(N, vocoder_dim) to float32 samples on a tight axis."""
        log_magnitude, phase = self.out(rows).float().chunk(2, dim=1)
        magnitude = log_magnitude.exp().clamp(max=100.0)
        spectrum = torch.complex(magnitude * phase.cos(), magnitude * phase.sin())
        return self.istft(spectrum, segments, self.hop, self.trim)


class Vocoder(nn.Module):
    """Coarse mel frames to samples."""

    def __init__(self, config: MiMoConfig, outer_norm: str) -> None:
        super().__init__()
        width = config.vocoder_dim
        self.embeddings = nn.Linear(config.n_mels, width, bias=False)
        self.layers = TransformerStack(
            config.vocoder_num_layers, width, config.vocoder_attention_heads, config.vocoder_intermediate_dim,
            config.vocoder_attn_window_size, False, config.ln_type, config.rope_theta,
        )  # fmt: skip
        self.layer_norm = make_norm(outer_norm, width)
        self.head = SpectrumHead(config)

    def forward(self, mel: Tensor, segments: Segments) -> tuple[Tensor, Segments]:
        """(N, n_mels) to float32 samples on a tight axis."""
        x = self.layers(self.embeddings(mel), segments)
        return self.head(self.layer_norm(x), segments)


class AudioDecoder(nn.Module):
    """Up-sampling, causal transformer layers, up-sampling to coarse mel, vocoder."""

    def __init__(self, config: MiMoConfig, outer_norm: str) -> None:
        super().__init__()
        width = config.d_model
        self.pooled = config.avg_pooler != 1
        if self.pooled:
            self.dconv1 = UpSampling(width, width, config.avg_pooler, config.avg_pooler)
        self.layers = TransformerStack(
            config.decoder_layers, width, config.decoder_attention_heads, config.decoder_ffn_dim,
            config.decoder_attn_window_size, config.decoder_causal, config.ln_type, config.rope_theta,
        )  # fmt: skip
        self.layer_norm = make_norm(outer_norm, width)
        self.dconv2 = UpSampling(width, config.n_mels, config.decoder_kernel_size, config.decoder_stride_size)
        self.vocoder = Vocoder(config, outer_norm)

    def forward(self, rows: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Segments]:
        """Summed codebook rows float32 (sum(lengths), d_model) to float32 samples on a tight axis."""
        segments = Segments(lengths, rows.device)
        x = rows.to(self.dconv2.conv.weight.dtype)
        if self.pooled:
            x, segments = self.dconv1(x, segments)
        x = self.layer_norm(self.layers(x, segments))
        x, segments = self.dconv2(x, segments)
        return self.vocoder(x, segments)
