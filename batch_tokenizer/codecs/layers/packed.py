"""Layers of models that run on packed rows, and the packs of such a model.

Every matrix has one row per frame, with utterances end to end on one axis (``kernels/segments.py``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from batch_tokenizer.kernels.segments import packs

#: Frames of a pack: a number, None for each utterance alone, or ``auto``, which is None on a CPU and a default on CUDA.
Capacity = int | str | None


class Rotation:
    """Rotary position embedding: the two halves of a head rotate together by position · theta^(-2i/D), in float32."""

    def __init__(self, positions: Tensor, head_dim: int, theta: float) -> None:
        """Positions int64 (N,), from 0 in each utterance."""
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
        angles = torch.outer(positions.float(), 1.0 / theta**exponents)
        self.cos, self.sin = angles.cos().repeat(1, 2)[:, None], angles.sin()[:, None]  # (N, 1, D), (N, 1, D/2)

    def __call__(self, x: Tensor) -> Tensor:
        """(N, H, D) to (N, H, D), the same dtype."""
        half = x.shape[-1] // 2
        wide = x.float()
        turned = wide * self.cos
        turned[..., :half].addcmul_(wide[..., half:], self.sin, value=-1)
        turned[..., half:].addcmul_(wide[..., :half], self.sin)
        return turned.to(x.dtype)


def convolve(rows: Tensor, convolution: nn.Conv1d) -> Tensor:
    """A convolution with padding 1 along rows (F, C_in), zeros beyond both ends, as one matrix product."""
    kernel, stride = convolution.kernel_size[0], convolution.stride[0]
    windows = pad(rows, (0, 0, 1, 1)).unfold(0, kernel, stride)  # (F', C_in, kernel)
    weight = convolution.weight.transpose(1, 2).flatten(1)  # (C_out, kernel · C_in)
    return linear(windows.transpose(1, 2).flatten(1), weight, convolution.bias)


def fixed_capacity(capacity: Capacity, default: int, device: torch.device) -> int | None:
    """Frames of a pack on ``device``, None for each utterance alone."""
    if capacity == "auto":
        return default if device.type == "cuda" else None
    return None if capacity is None else int(capacity)


def packs_of(
    spans: Sequence[int], capacity: int | None, groups: Sequence[int] | None = None
) -> Iterator[tuple[list[int], int | None]]:
    """Members of each pack, in order, and the frames of its axis; None for these where an utterance is alone.

    An utterance longer than a pack has an axis of a multiple of ``capacity`` to itself.

    Args:
        spans: frames that each utterance takes up.
        groups: only utterances of one group share a pack.
    """
    if capacity is None:
        yield from (([index], None) for index in range(len(spans)))
        return
    by_group: dict[int, list[int]] = {}
    for index, group in enumerate(groups if groups is not None else [0] * len(spans)):
        by_group.setdefault(group, []).append(index)
    for indices in by_group.values():
        for index in [index for index in indices if spans[index] > capacity]:
            yield [index], -(-spans[index] // capacity) * capacity
        fitting = [index for index in indices if spans[index] <= capacity]
        for members in packs([spans[index] for index in fitting], capacity):
            yield [fitting[member] for member in members], capacity
