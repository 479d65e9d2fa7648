"""Layers of models that run on packed rows, and the packs of such a model.

Every matrix has one row per frame, with utterances end to end on one axis (``kernels/segments.py``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from batch_tokenizer.kernels.segments import packs

#: Frames of a pack: a number, None for each utterance alone, or ``auto``, which is a default on CUDA; on a CPU
#: utterances of up to ``CPU_SHARED_FRAMES`` share packs of ``CPU_CAPACITY``, and a longer one is computed alone.
Capacity = int | str | None

#: A pack of so few short utterances costs a CPU little more than one of them alone. Filler beside longer ones would
#: cost more than sharing saves.
CPU_SHARED_FRAMES, CPU_CAPACITY = 21, 64


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
    """Frames of a pack that any utterance shares on ``device``; None if none does, or only short ones do."""
    if capacity == "auto":
        return default if device.type == "cuda" else None
    return None if capacity is None else int(capacity)


def packs_of(
    spans: Sequence[int],
    capacity: Capacity,
    default: int,
    device: torch.device,
    groups: Sequence[int] | None = None,
) -> Iterator[tuple[list[int], int | None]]:
    """Members of each pack, in order, and the frames of its axis; None for these where an utterance is alone.

    An utterance's own span alone decides whether it shares a pack, and of which size. One that is longer than a pack of
    a fixed capacity has an axis of a multiple of it to itself.

    Args:
        spans: frames that each utterance takes up.
        default: capacity of ``auto`` on CUDA.
        groups: only utterances of one group share a pack.
    """
    # 1. What an utterance may take up to share a pack, and the frames of such a pack.
    fixed = fixed_capacity(capacity, default, device)
    shared, size = (CPU_SHARED_FRAMES, CPU_CAPACITY) if capacity == "auto" else (-1, 0)
    if fixed is not None:
        shared = size = fixed
    # 2. Longer ones alone, then the packs of each group.
    by_group: dict[int, list[int]] = {}
    for index, group in enumerate(groups if groups is not None else [0] * len(spans)):
        if spans[index] <= shared:
            by_group.setdefault(group, []).append(index)
        else:
            yield [index], None if fixed is None else -(-spans[index] // fixed) * fixed
    for indices in by_group.values():
        for members in packs([spans[index] for index in indices], size):
            yield [indices[member] for member in members], size
