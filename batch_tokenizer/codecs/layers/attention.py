"""Rotary self-attention on padded batches: causal, windowed or over whole utterances."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from batch_tokenizer.kernels.attention import Window, block_size


@dataclass(frozen=True, slots=True)
class Rotation:
    """Rotary position embedding (arXiv:2104.09864): cos and sin (T, D / 2) of each position's angles, float32, or of
    shapes that broadcast with half of what is turned."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def of(cls, size: int, head_dim: int, *, base: float = 10_000.0, device: torch.device) -> Rotation:
        """Positions 0 … ``size`` - 1, angle position / base^(2i / D) for pair i."""
        pairs = torch.arange(0, head_dim, 2, dtype=torch.int64, device=device).float()
        frequencies = 1.0 / base ** (pairs / head_dim)
        angles = torch.outer(torch.arange(size, device=device).float(), frequencies)
        return cls(angles.cos(), angles.sin())

    def halves(self, x: Tensor) -> Tensor:
        """Turns elements i and i + D/2 together; (…, T, D), the same dtype."""
        first, second = x.float().chunk(2, dim=-1)
        turned = (first * self.cos - second * self.sin, second * self.cos + first * self.sin)
        return torch.cat(turned, dim=-1).to(x.dtype)

    def pairs(self, x: Tensor) -> Tensor:
        """Turns elements 2i and 2i + 1 together; (…, T, D), the same dtype."""
        first, second = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        turned = (first * self.cos - second * self.sin, second * self.cos + first * self.sin)
        return torch.stack(turned, dim=-1).flatten(-2).to(x.dtype)


def padded_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: Window = (-1, -1),
    beyond: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """softmax(q kᵀ · scale) v within each utterance of a padded batch.

    Query i sees key j when i - left <= j <= i + right, -1 being no limit; causal is right = 0. With right = 0 nothing
    beyond an utterance's end is ever seen, so ``beyond`` changes nothing then.

    Args:
        query, key, value: (B, H, T, D).
        beyond: bool (B, 1, T), as ``PaddedBatch`` has it.
        scale: 1 / sqrt(D) where not given.

    Returns:
        (B, H, T, D); rows beyond an utterance's end are arbitrary but finite.
    """
    size, (left, right) = query.shape[2], window
    left = -1 if left >= size - 1 else left
    right = -1 if right >= size - 1 and right != 0 else right
    if left < 0:
        if right == 0:
            return scaled_dot_product_attention(query, key, value, is_causal=size > 1, scale=scale)
        if right < 0:
            seen = None if beyond is None else _own_keys(beyond, 0, size)
            return scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scale)
    block = size if left < 0 or right < 0 else block_size(left, right)
    parts = []
    for start in range(0, size, block):
        stop = min(start + block, size)
        low = 0 if left < 0 else max(0, start - left)
        high = size if right < 0 else min(size, stop + right)
        i = torch.arange(start, stop, device=query.device)[:, None]
        j = torch.arange(low, high, device=query.device)
        seen = (j >= i - left) if left >= 0 else (j >= 0).expand(stop - start, -1)
        if right >= 0:
            seen = seen & (j <= i + right)
        if beyond is not None and right != 0:
            seen = (seen & _own_keys(beyond, low, high)) | (i == j)  # no row of the softmax may be empty
        parts.append(
            scaled_dot_product_attention(
                query[:, :, start:stop], key[:, :, low:high], value[:, :, low:high], attn_mask=seen, scale=scale
            )
        )
    return torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]


def _own_keys(beyond: Tensor, low: int, high: int) -> Tensor:
    """bool (B, 1, 1, high - low): keys of the utterance itself; all of them where it has none."""
    own = ~beyond[:, :, None, low:high]
    return own | beyond.all(dim=-1)[:, :, None, None]
