"""Utterances laid end to end on one axis: their lengths, where each starts, and how to move rows between two layouts.

A *tight* axis has no rows between utterances; transformer layers run on it. A *gapped* axis has zero rows between
them, so that a convolution or an overlap-add sees there what it would see around a lone utterance. Everything here is
computed on the host from lengths that the host knows, and copied to the device once: nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import pad

#: Least size of ``Segments.offsets``, and least value of ``Segments.longest_bound``, both powers of two.
FEWEST_OFFSETS, LEAST_BOUND = 64, 1024

#: Filler attends among itself in runs of at most this many frames, which bounds its cost.
FILLER_RUN = 512


def packs(spans: Sequence[int], capacity: int) -> Iterator[list[int]]:
    """Indices of the utterances of each pack, in the order given.

    Args:
        spans: what each utterance takes up, none more than ``capacity``.
        capacity: what a pack holds, in the same unit.
    """
    members: list[int] = []
    used = 0
    for index, span in enumerate(spans):
        if span > capacity:
            raise ValueError(f"utterance {index} takes up {span}, more than the capacity {capacity}")
        if members and used + span > capacity:
            yield members
            members, used = [], 0
        members.append(index)
        used += span
    if members:
        yield members


def filler_runs(size: int) -> list[int]:
    """``size`` frames of filler as lengths of runs."""
    full, rest = divmod(size, FILLER_RUN)
    return [FILLER_RUN] * full + [rest] * (rest > 0)


Lengths = npt.NDArray[np.int64]


def as_lengths(lengths: Sequence[int] | Lengths) -> Lengths:
    """Lengths as int64 (S,); a negative one is an error of the caller's.

    Raises:
        ValueError: a length is negative.
    """
    array = np.asarray(lengths, dtype=np.int64)
    if array.ndim != 1 or (array < 0).any():
        raise ValueError(f"segment lengths must be a list of non-negative integers, got {lengths!r}")
    return array


def to_device(values: npt.NDArray[Any] | Tensor, device: torch.device | str) -> Tensor:
    """An array or a tensor on ``device``, without waiting for what the device is doing.

    A copy from ordinary memory would wait until everything before it is done; one from pinned memory queues behind it.
    """
    tensor = values if isinstance(values, Tensor) else torch.from_numpy(values)
    if tensor.device.type == "cpu" and torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def joined_on(parts: Sequence[Tensor], device: torch.device | str) -> Tensor:
    """The parts end to end on ``device``, likewise; they are copied once on their way."""
    if torch.device(device).type != "cuda" or any(part.device.type != "cpu" for part in parts):
        return to_device(torch.cat(list(parts)), device)
    count = sum(len(part) for part in parts)
    pinned = torch.empty((count, *parts[0].shape[1:]), dtype=parts[0].dtype, pin_memory=True)
    torch.cat(list(parts), out=pinned)
    return pinned.to(device, non_blocking=True)


class Segments:
    """S utterances on a tight axis of N = sum(lengths) rows.

    Attributes:
        lengths: int64 (S,), rows of each, zero allowed.
        starts: int64 (S,), first row of each.
        total: N.
        longest: the greatest length.
        device: where the tensors live.
    """

    def __init__(self, lengths: Sequence[int] | Lengths, device: torch.device | str = "cpu") -> None:
        self.lengths = as_lengths(lengths)
        ends = np.cumsum(self.lengths)
        self.starts = ends - self.lengths
        self.total = int(ends[-1]) if len(ends) else 0
        self.longest = int(self.lengths.max()) if len(ends) else 0
        self.device = torch.device(device)

    def __len__(self) -> int:
        return len(self.lengths)

    @cached_property
    def offsets(self) -> Tensor:
        """int32 (R + 1,): rows offsets[i] to offsets[i + 1] are utterance i. The form that varlen kernels take.

        R is ``FEWEST_OFFSETS`` or a higher power of two, and utterances beyond S are empty, so that tables have few
        sizes, as CUDA graphs would need.
        """
        ends = np.full(max(FEWEST_OFFSETS, power_of_two(len(self))) + 1, self.total, np.int32)
        ends[: len(self)] = self.starts
        return to_device(ends, self.device)

    @property
    def longest_bound(self) -> int:
        """``LEAST_BOUND`` or a higher power of two, not below ``longest``: the bound that varlen kernels launch by."""
        return max(LEAST_BOUND, power_of_two(self.longest))

    def bound_above(self, window: tuple[int, int]) -> int:
        """``longest_bound``, or the power of two above ``window`` (left, right) where that is higher.

        FlashAttention takes its kernel without a window where the window reaches over the bound of the keys. A bound
        that only utterances decide would let that, and with it the last bits of a result, depend on an utterance's
        neighbours. (MOSS-Audio-Tokenizer-Nano has windows of 1,600 and 1,200 rows.)
        """
        return max(self.longest_bound, power_of_two(max(window) + 1))

    @cached_property
    def positions(self) -> Tensor:
        """int64 (N,): each row's position in its utterance, from 0."""
        return to_device(within(self.lengths), self.device)

    @cached_property
    def rows_of(self) -> Tensor:
        """int64 (S,): ``lengths`` on the device."""
        return to_device(self.lengths, self.device)


def power_of_two(count: int) -> int:
    """The least power of two that is not below ``count``."""
    return 1 << max(0, count - 1).bit_length()


def within(lengths: Lengths) -> Lengths:
    """int64 (sum(lengths),): 0 … n-1 for each length n, one after the other."""
    ends = np.cumsum(lengths)
    return np.arange(int(ends[-1]) if len(ends) else 0, dtype=np.int64) - np.repeat(ends - lengths, lengths)


@dataclass(frozen=True)
class GappedAxis:
    """S utterances on a gapped axis of ``size`` rows, utterance i at rows starts[i] … starts[i] + lengths[i] - 1.

    Attributes:
        rows: int64 (sum(lengths),) on the device: where each tight row lies on the gapped axis.
    """

    starts: Lengths
    lengths: Lengths
    size: int
    rows: Tensor

    @classmethod
    def build(
        cls, starts: Lengths, lengths: Sequence[int] | Lengths, size: int, device: torch.device | str
    ) -> GappedAxis:
        """Utterance i takes ``lengths[i]`` rows from ``starts[i]`` on, all below ``size``."""
        checked = as_lengths(lengths)
        rows = to_device(within(checked) + np.repeat(starts, checked), device)
        return cls(starts=starts, lengths=checked, size=size, rows=rows)

    @classmethod
    def spaced(cls, lengths: Sequence[int] | Lengths, gap: int, device: torch.device | str) -> GappedAxis:
        """Utterances one after the other with ``gap`` zero rows between."""
        checked = as_lengths(lengths)
        ends = np.cumsum(checked + gap)
        return cls.build(ends - checked - gap, checked, int(ends[-1]) - gap if len(ends) else 0, device)

    def __len__(self) -> int:
        return len(self.lengths)

    def scatter(self, tight: Tensor) -> Tensor:
        """Tight rows (N, …) to the gapped axis (size, …), zeros between."""
        if len(self) == 1:
            before, after = int(self.starts[0]), self.size - int(self.starts[0]) - len(tight)
            return pad(tight, (0, 0) * (tight.ndim - 1) + (before, after)) if before or after else tight
        gapped = tight.new_zeros((self.size, *tight.shape[1:]))
        return gapped.index_copy_(0, self.rows, tight)

    def gather(self, gapped: Tensor) -> Tensor:
        """Gapped rows (size, …) to the tight axis (N, …); of a lone utterance a view."""
        if len(self) == 1:
            return gapped.narrow(0, int(self.starts[0]), int(self.lengths[0]))
        return gapped.index_select(0, self.rows)
