"""Layers that the encoder and the decoder share: causal rotary attention, codebooks, and long utterances in pieces."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from batch_tokenizer.codecs.layers.attention import Rotation, padded_attention
from batch_tokenizer.codecs.layers.padded import PaddedBatch
from batch_tokenizer.codecs.layers.quantizers import Codebook
from batch_tokenizer.codecs.qwen3_tts.config import TransformerConfig
from batch_tokenizer.kernels.codebook import Float32Buffers


class CausalAttention(nn.Module):
    """o(softmax(rot(q) rot(k)ᵀ / √D) v); a key and value head serves several query heads. No query sees a later key."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        width, bias = config.hidden_size, config.attention_bias
        self.head_dim = config.head_dim
        self.group = config.num_attention_heads // config.num_key_value_heads
        queries, keys = (heads * self.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = nn.Linear(width, queries, bias=bias)
        self.k_proj = nn.Linear(width, keys, bias=bias)
        self.v_proj = nn.Linear(width, keys, bias=bias)
        self.o_proj = nn.Linear(queries, width, bias=bias)

    def forward(self, x: Tensor, rotation: Rotation, window: int | None) -> Tensor:
        """(B, T, d) to (B, T, d); query i sees keys j with 0 <= i - j < ``window``, or all earlier ones."""
        q, k, v = (
            project(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        k, v = (
            part.repeat_interleave(self.group, dim=1) if self.group > 1 else part for part in (rotation.halves(k), v)
        )
        left = -1 if window is None else window - 1
        attended = padded_attention(rotation.halves(q), k, v, window=(left, 0))
        return self.o_proj(attended.transpose(1, 2).flatten(2))


class UsageCodebook(Codebook):
    """A codebook stored as moving sums: row = sum / max(usage, 1e-5)."""

    cluster_usage: Tensor

    def __init__(self, size: int, dim: int, sum_name: str) -> None:
        super().__init__(size, dim)
        del self.weight
        self.sum_name = sum_name
        self.register_buffer("cluster_usage", torch.ones(size))
        self.register_buffer(sum_name, torch.zeros(size, dim))

    def fold(self) -> None:
        usage = self.cluster_usage.clamp(min=1e-5)[:, None]
        self.register_buffer("weight", getattr(self, self.sum_name) / usage)
        del self.cluster_usage
        delattr(self, self.sum_name)
        super().fold()


class Pointwise(Float32Buffers):
    """A 1×1 convolution without bias on rows, in float32; ``weight`` (out, in, 1)."""

    weight: Tensor

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(channels_out, channels_in, 1))

    def forward(self, rows: Tensor) -> Tensor:
        """(…, in) to (…, out)."""
        return linear(rows, self.weight[:, :, 0])


def in_pieces(
    compute: Callable[[PaddedBatch], PaddedBatch],
    batch: PaddedBatch,
    *,
    size: int,
    context: int,
    positions_in: int = 1,
    positions_out: int = 1,
) -> PaddedBatch:
    """``compute`` of a causal module on pieces of an axis, so that its memory does not grow with the length.

    Args:
        batch: ``positions_in`` positions per frame; the last frame of an utterance may have fewer.
        size: frames of a piece.
        context: frames before a piece that are computed with it and whose results are dropped. If the module's
            receptive field is no longer, the results are those of one pass.
        positions_out: of ``compute``'s result, per frame.
    """
    frames = -(-batch.size // positions_in)
    if frames <= size:
        return compute(batch)
    parts, lengths = [], None
    for start in range(0, frames, size):
        first = max(0, start - context)
        low, high = first * positions_in, min(batch.size, (start + size) * positions_in)
        own = None if batch.lengths is None else (batch.lengths - low).clamp(0, high - low)
        done = compute(PaddedBatch.of(batch.values[..., low:high], own))
        dropped = (start - first) * positions_out
        parts.append(done.values[..., dropped:])
        if done.lengths is not None:
            kept = (done.lengths - dropped).clamp(min=0)
            lengths = kept if lengths is None else lengths + kept
    return PaddedBatch.of(torch.cat(parts, dim=-1), lengths)
