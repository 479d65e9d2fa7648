"""The encoder of S3Tokenizer and its quantizers: log-mel of packed utterances to one code a frame.

Every matrix has one row per frame. Windows of several utterances lie end to end on one axis, with zero rows between
them wherever a convolution would see its neighbour, so a result does not depend on what it was computed with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import conv1d, gelu, normalize, pad

from batch_tokenizer.codecs.layers.packed import Capacity, Rotation, convolve, packs_of
from batch_tokenizer.codecs.layers.quantizers import Projection
from batch_tokenizer.codecs.mimo.quantizer import Codebook
from batch_tokenizer.codecs.s3tokenizer.config import FSQ_DIGITS, S3Config
from batch_tokenizer.kernels.attention import choose_backend, varlen_attention
from batch_tokenizer.kernels.segments import GappedAxis, Segments, filler_runs, joined_on
from batch_tokenizer.records import WindowMerge

#: Token frames of a pack on CUDA: at 25 Hz 164 s of audio.
DEFAULT_CAPACITY = 4096

#: Taps of the memory filter.
MEMORY_KERNEL = 31

ROPE_THETA = 10000.0

#: Factor of a scalar quantizer's tanh, a float32 a little above 0.999.
FSQ_BOUND = 0.9990000128746033


class SelfAttention(nn.Module):
    """out(softmax(q kᵀ / √D) v) within each window; with ``fsmn``, q and k are rotated and a memory is added.

    The memory is a depthwise convolution over the window's values plus the values: m = conv(v) + v.
    """

    def __init__(self, config: S3Config) -> None:
        super().__init__()
        width = config.n_audio_state
        self.heads = config.n_audio_head
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width, bias=config.key_bias)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        if config.fsmn:
            self.fsmn_block = nn.Conv1d(width, width, MEMORY_KERNEL, groups=width, bias=False)

    def forward(self, rows: Tensor, segments: Segments, memory: GappedAxis | None, rotate: Rotation | None,
                backend: str) -> Tensor:  # fmt: skip
        """(N, d) to (N, d)."""
        query, key, value = self.query(rows), self.key(rows), self.value(rows)
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in (query, key, value))
        if rotate is not None:
            q, k = rotate(q), rotate(k)
        attended = self.out(varlen_attention(q, k, v, segments, backend=backend).flatten(1))
        return attended if memory is None else attended + self._memory(value, memory)

    def _memory(self, value: Tensor, axis: GappedAxis) -> Tensor:
        side = MEMORY_KERNEL // 2
        spaced = pad(axis.scatter(value).t()[None], (side, side))
        filtered = conv1d(spaced, self.fsmn_block.weight, groups=self.fsmn_block.groups)[0].t()
        return axis.gather(filtered) + value


class Block(nn.Module):
    """x + attn(attn_ln(x)), then x + mlp.2(gelu(mlp.0(mlp_ln(x)))). LayerNorms are computed in float32."""

    def __init__(self, config: S3Config) -> None:
        super().__init__()
        width = config.n_audio_state
        self.attn_ln, self.mlp_ln = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = SelfAttention(config)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, *places: Any) -> Tensor:
        """(N, d) to (N, d)."""
        x = x + self.attn(self.attn_ln(x), *places)
        return x + self.mlp(self.mlp_ln(x))


class Layout:
    """Positions of a pack's windows on each axis, from their mel frames.

    Windows start at multiples of both strides together, with at least one zero row after each.
    """

    def __init__(self, config: S3Config, mel_frames: Sequence[int], device: torch.device, capacity: int | None) -> None:
        align = config.stride * 2
        spans = np.array([span(config, frames) for frames in mel_frames], np.int64)
        starts = np.cumsum(spans) - spans
        size = int(spans.sum()) if capacity is None else capacity
        convolved = [config.convolved(frames) for frames in mel_frames]
        self.tokens = [config.tokens_of(frames) for frames in mel_frames]
        filler = [] if capacity is None else filler_runs(capacity - sum(self.tokens))
        self.mel = GappedAxis.build(starts * align, mel_frames, size * align, device)
        conv1 = GappedAxis.build(starts * 2, convolved, size * 2, device)
        self.conv1_valid = conv1.scatter(torch.ones(len(conv1.rows), 1, dtype=torch.bool, device=device))
        self.conv2 = GappedAxis.build(starts, self.tokens, size, device)
        self.segments = Segments([*self.tokens, *filler], device)
        self.memory: GappedAxis | None = None
        if config.fsmn:
            self.memory = GappedAxis.spaced(self.segments.lengths, MEMORY_KERNEL // 2, device)


def span(config: S3Config, mel_frames: int) -> int:
    """Token frames of axis that a window takes up: at least one row stays empty on every axis."""
    return config.convolved(mel_frames) // 2 + 1


class Encoder(nn.Module):
    """Two convolutions, positions, pre-norm layers; no final norm."""

    positional_embedding: Tensor

    def __init__(self, config: S3Config) -> None:
        super().__init__()
        width = config.n_audio_state
        self.config = config
        self.attention = "auto"
        self.conv1 = nn.Conv1d(config.n_mels, width, 3, stride=config.stride, padding=1)
        self.conv2 = nn.Conv1d(width, width, 3, stride=2, padding=1)
        if not config.fsmn:
            self.register_buffer("positional_embedding", torch.zeros(config.n_audio_ctx, width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_audio_layer))

    def forward(self, mel: Tensor, layout: Layout) -> Tensor:
        """Log-mel rows (layout.mel.size, n_mels), zeros between windows, to hidden (N, d), filler at its end."""
        config, segments = self.config, layout.segments
        x = gelu(convolve(mel, self.conv1)) * layout.conv1_valid
        x = layout.conv2.gather(gelu(convolve(x, self.conv2)))
        x = pad(x, (0, 0, 0, segments.total - len(x)))
        head_dim = config.n_audio_state // config.n_audio_head
        rotate = None
        if config.fsmn:
            rotate = Rotation(segments.positions, head_dim, ROPE_THETA)
        else:
            x = x + self.positional_embedding[segments.positions].to(x.dtype)
        backend, _ = choose_backend(self.attention, x.device, x.dtype, head_dim)
        for block in self.blocks:
            x = block(x, segments, layout.memory, rotate, backend)
        return x


class NearestRow(Codebook):
    """The quantizer of v1: the row of ``embed`` that is nearest to x / max(|x|, 1e-12)."""

    def forward(self, hidden: Tensor) -> Tensor:
        """(N, d) to codes int64 (N,)."""
        return self.nearest(normalize(hidden.float()))


class ScalarDigits(nn.Module):
    """The quantizer of v2 and v3: Σ digit_i · 3^i with digit = round(0.999 tanh(project_down(x))) + 1."""

    def __init__(self, config: S3Config) -> None:
        super().__init__()
        self.project_down = Projection(config.n_audio_state, FSQ_DIGITS)

    def forward(self, hidden: Tensor) -> Tensor:
        """(N, d) to codes int64 (N,)."""
        digits = (self.project_down(hidden.float()).tanh() * FSQ_BOUND).round().long() + 1
        powers = 3 ** torch.arange(FSQ_DIGITS, device=hidden.device)
        return (digits * powers).sum(dim=1)


class S3Tokenizer(nn.Module):
    """S3Tokenizer.

    Attributes:
        config: the checkpoint's configuration.
        merge: how the tokens of windows of long audio are merged.
        capacity: token frames of axis per pack; None runs each window alone; ``auto`` packs ``DEFAULT_CAPACITY`` on
            CUDA, and on a CPU short windows only (``layers/packed.py``). Results are equal to the bit only among packs
            of one capacity.
    """

    def __init__(self, config: S3Config, merge: WindowMerge = "complete") -> None:
        super().__init__()
        self.config = config
        self.merge = merge
        self.capacity: Capacity = "auto"
        self.encoder = Encoder(config)
        self.quantizer = nn.Module()
        self.quantizer._codebook = (
            ScalarDigits(config) if config.fsmn else NearestRow(config.n_codebook_size, config.n_audio_state)
        )

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.encoder.conv1.weight.device

    @torch.no_grad()
    def encode_utterances(self, mels: Sequence[Tensor]) -> list[Tensor]:
        """Log-mel float32 (n_mels, L_i) each to codes int64 (T_i, 1) each, on the model's device."""
        windows = [
            (utterance, window)
            for utterance, mel in enumerate(mels)
            for window in self.config.windows(mel.shape[1], self.merge)
        ]
        kept: dict[int, Tensor] = {}  # by window
        spans = [span(self.config, window.length) for _, window in windows]
        with torch.autocast(self.device.type, enabled=False):
            for group, capacity in packs_of(spans, self.capacity, DEFAULT_CAPACITY, self.device):
                members = [windows[index] for index in group]
                rows = [mels[utterance][:, one.start : one.start + one.length].t() for utterance, one in members]
                hidden, layout = self._hidden(rows, capacity)
                codes = self.quantizer._codebook(hidden)  # type: ignore[operator]  # nn.Module's attributes are untyped
                for index, code in zip(group, codes.split(layout.segments.lengths.tolist()), strict=False):
                    window = windows[index][1]
                    kept[index] = code[window.skip : window.skip + window.tokens]
        parts: list[list[Tensor]] = [[] for _ in mels]
        for index, (utterance, _) in enumerate(windows):
            parts[utterance].append(kept[index])
        return [torch.cat(part)[:, None] for part in parts]

    @torch.no_grad()
    def hidden(self, mel: Tensor) -> Tensor:
        """Log-mel (n_mels, L), L at most 3,000, to hidden frames (T, d) before quantization."""
        hidden, _ = self._hidden([mel.t()], None)
        return hidden.float()

    def _hidden(self, mels: Sequence[Tensor], capacity: int | None) -> tuple[Tensor, Layout]:
        """Log-mel rows (L_i, n_mels) of a pack's windows to hidden (N, d), filler at its end."""
        layout = Layout(self.config, [len(mel) for mel in mels], self.device, capacity)
        rows = layout.mel.scatter(joined_on(list(mels), self.device))
        return self.encoder(rows.to(self.encoder.conv1.weight.dtype), layout), layout
