"""Layers of MOSS's encoder and decoder: patches and causal pre-norm transformers over packed rows.

Rows of several utterances lie end to end on one tight axis, one row per moment of the stage's rate. An utterance may
continue an earlier call: a ``Stream`` then holds its position and the keys and values that each layer still sees.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from batch_tokenizer.codecs.layers.attention import Rotation
from batch_tokenizer.codecs.layers.norms import LayerScale
from batch_tokenizer.codecs.moss.config import Patch, Stage, TransformerStage
from batch_tokenizer.kernels.attention import choose_backend, varlen_attention
from batch_tokenizer.kernels.segments import Lengths, Segments, as_lengths, to_device, within


class Stream:
    """Streaming state of one utterance: its position and cached keys and values. Constant size once windows are full.

    Attributes:
        frames: token frames computed so far.
        past: per attention layer the rotated keys and the values that later queries see, (2, M, H, D), M < context.
    """

    def __init__(self) -> None:
        self.frames = 0
        self.past: dict[nn.Module, Tensor] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return sum(past.nbytes for past in self.past.values())


class PackedFrames:
    """The next frames of several utterances, packed on one axis at each stage's rate.

    Attributes:
        frames: int64 (S,), token frames of each.
        streams: S streams that these frames continue, or None if the frames are whole utterances.
    """

    def __init__(
        self, frames: Sequence[int] | Lengths, device: torch.device, streams: Sequence[Stream] | None = None
    ) -> None:
        self.frames = as_lengths(frames)
        self.streams = streams
        self.device = device
        self._segments: dict[int, Segments] = {}

    def segments(self, rate: int) -> Segments:
        """The utterances on the tight axis of a stage with ``rate`` rows per token frame."""
        if rate not in self._segments:
            self._segments[rate] = Segments(self.frames * rate, self.device)
        return self._segments[rate]

    def positions(self, rate: int) -> Tensor:
        """int64 (N,): each row's position in its utterance."""
        segments = self.segments(rate)
        if self.streams is None:
            return segments.positions
        offsets = np.array([stream.frames * rate for stream in self.streams], np.int64)
        return to_device(within(segments.lengths) + np.repeat(offsets, segments.lengths), self.device)

    def with_past(
        self, layer: nn.Module, keys: Tensor, values: Tensor, rate: int, context: int
    ) -> tuple[Tensor, Tensor, Segments]:
        """Keys and values (N, H, D) with those of the streams' past before them, and where each utterance's lie.

        The streams then hold the last ``context`` - 1 of them for the next call.
        """
        if self.streams is None:
            return keys, values, self.segments(rate)
        pieces = []
        new = torch.stack((keys, values)).split(self.segments(rate).lengths.tolist(), dim=1)
        for stream, piece in zip(self.streams, new, strict=True):
            past = stream.past.get(layer)
            if past is not None:
                piece = torch.cat((past, piece), dim=1)
            stream.past[layer] = piece[:, max(0, piece.shape[1] - context + 1) :].clone()
            pieces.append(piece)
        both = torch.cat(pieces, dim=1) if len(pieces) > 1 else pieces[0]
        return both[0], both[1], Segments([piece.shape[1] for piece in pieces], self.device)

    def advance(self) -> None:
        """Moves the streams' positions past these frames, after the last stage."""
        if self.streams is not None:
            for stream, frames in zip(self.streams, self.frames.tolist(), strict=True):
                stream.frames += frames


def rotation(positions: Tensor, head_dim: int, max_period: float) -> Rotation:
    """The rotation of queries and keys (N, 2, H, D) at positions int64 (N,), for ``Rotation.pairs``.

    The angle is position · exp(-i · 2 ln(max_period) / D). A power instead of the exponential differs by enough to
    change tokens hours into a recording, and so would positions that start again.
    """
    pair = torch.arange(head_dim // 2, dtype=torch.float32, device=positions.device)
    angles = torch.outer(positions.float(), torch.exp(pair * (-math.log(max_period) * 2 / head_dim)))
    return Rotation(angles.cos()[:, None, None], angles.sin()[:, None, None])


class SelfAttention(nn.Module):
    """softmax(rot(q) rot(k)ᵀ / sqrt(D)) v over the last ``context`` rows of each utterance; no biases."""

    def __init__(self, stage: TransformerStage) -> None:
        super().__init__()
        width = stage.d_model
        self.heads = stage.num_heads
        self.rate, self.context = stage.rate, stage.context
        self.in_projs = nn.ModuleList([nn.Linear(width, 3 * width, bias=False)])
        self.out_projs = nn.ModuleList([nn.Linear(width, width, bias=False)])

    def forward(self, rows: Tensor, rotate: Rotation, packed: PackedFrames, backend: str) -> Tensor:
        """(N, d) to (N, d)."""
        projected = self.in_projs[0](rows).unflatten(-1, (3, self.heads, -1))
        queries, keys = rotate.pairs(projected[:, :2]).unbind(1)
        keys, values, key_segments = packed.with_past(self, keys, projected[:, 2], self.rate, self.context)
        attended = varlen_attention(
            queries,
            keys,
            values,
            packed.segments(self.rate),
            window=(self.context - 1, 0),
            key_segments=key_segments,
            backend=backend,
        )
        return self.out_projs[0](attended.flatten(1))


class TransformerLayer(nn.Module):
    """x + scale₁ · attention(norm₁(x)), then x + scale₂ · linear₂(gelu(linear₁(norm₂(x))))."""

    def __init__(self, stage: TransformerStage) -> None:
        super().__init__()
        width = stage.d_model
        self.self_attn = SelfAttention(stage)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.linear1 = nn.Linear(width, stage.dim_feedforward, bias=False)
        self.linear2 = nn.Linear(stage.dim_feedforward, width, bias=False)
        self.layer_scale_1 = LayerScale(width) if stage.layer_scale else nn.Identity()
        self.layer_scale_2 = LayerScale(width) if stage.layer_scale else nn.Identity()

    def forward(self, x: Tensor, rotate: Rotation, packed: PackedFrames, backend: str) -> Tensor:
        """(N, d) to (N, d)."""
        x = x + self.layer_scale_1(self.self_attn(self.norm1(x), rotate, packed, backend))
        return x + self.layer_scale_2(self.linear2(gelu(self.linear1(self.norm2(x)))))


class Transformer(nn.Module):
    """A stage: projection to the layers' width, the layers, projection away; no norm at the end."""

    def __init__(self, stage: TransformerStage) -> None:
        super().__init__()
        self.stage = stage
        self.attention = "auto"
        self.input_proj = _projection(stage.input_dimension, stage.d_model)
        self.transformer = nn.Module()
        self.transformer.layers = nn.ModuleList(TransformerLayer(stage) for _ in range(stage.num_layers))
        self.output_proj = _projection(stage.d_model, stage.output_dimension)

    def add_projection(self, name: str) -> None:
        """Puts ``input_proj`` or ``output_proj`` in place, between equal sizes too, which usually have none."""
        stage = self.stage
        sizes = (
            (stage.input_dimension, stage.d_model) if name == "input_proj" else (stage.d_model, stage.output_dimension)
        )
        setattr(self, name, nn.Linear(*sizes, bias=False))

    def forward(self, x: Tensor, packed: PackedFrames) -> Tensor:
        """(N, input_dimension) to (N, output_dimension)."""
        stage = self.stage
        head_dim = stage.d_model // stage.num_heads
        rotate = rotation(packed.positions(stage.rate), head_dim, stage.max_period)
        backend, _ = choose_backend(self.attention, x.device, x.dtype, head_dim)
        x = self.input_proj(x)
        for layer in self.transformer.layers:  # type: ignore[union-attr]  # nn.Module's attributes are untyped
            x = layer(x, rotate, packed, backend)
        return self.output_proj(x)


class PatchDown(nn.Module):
    """Rows (N, d) to (N / h, d · h): channel d · h + j holds channel d of row j of each patch."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor, packed: PackedFrames) -> Tensor:
        """(N, d) to (N / h, d · h)."""
        return x.unflatten(0, (-1, self.size)).transpose(1, 2).flatten(1)


class PatchUp(nn.Module):
    """The inverse of ``PatchDown``: rows (N, d · h) to (N · h, d)."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor, packed: PackedFrames) -> Tensor:
        """(N, d · h) to (N · h, d)."""
        return x.unflatten(1, (-1, self.size)).transpose(1, 2).flatten(0, 1)


class Stages(nn.ModuleList):
    """Stages in order; an ``nn.ModuleList``, so parameters are ``N.…`` as published."""

    def __init__(self, stages: Sequence[Stage], patch: type[PatchDown] | type[PatchUp]) -> None:
        super().__init__(patch(stage.size) if isinstance(stage, Patch) else Transformer(stage) for stage in stages)

    def forward(self, x: Tensor, packed: PackedFrames) -> Tensor:
        """Rows at the rate before the first stage to rows at the rate after the last, each utterance on its own."""
        for stage in self:
            x = stage(x, packed)
        return x


def _projection(channels_in: int, channels_out: int) -> nn.Module:
    return nn.Identity() if channels_in == channels_out else nn.Linear(channels_in, channels_out, bias=False)
