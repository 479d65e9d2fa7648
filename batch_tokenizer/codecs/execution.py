"""Running a codec's model over a batch, and copying its results to the host."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Item = TypeVar("Item")
Result = TypeVar("Result")


class BatchRunner:
    """Runs a model over a batch: at once on a device; on a CPU one member at a time, ``threads`` side by side.

    Each member has one thread: the caller sets torch's own thread count to 1, so that results do not depend on how
    many cores a process was given.
    """

    #: Utterances per thread that a batch should have, so that the threads end at about the same time.
    _PER_THREAD = 8

    def __init__(self, device: torch.device, threads: int) -> None:
        self.batch_limit = self._PER_THREAD * threads if device.type == "cpu" else None
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, "codec") if device.type == "cpu" and threads > 1 else None

    def __call__(
        self,
        compute: Callable[[list[Item]], list[Result]],
        batch: Sequence[Item],
        length: Callable[[Item], int],
        *,
        shared: int = 0,
    ) -> list[Result]:
        """``compute``'s result for each member, in order.

        On several threads of a CPU the longest is started first. Members of at most ``shared`` are spread over as many
        calls as there are threads, in which the model may pack them.
        """
        if self._pool is None:
            with torch.inference_mode():
                return compute(list(batch))

        def some(indices: list[int]) -> list[Result]:
            with torch.inference_mode():
                return compute([batch[index] for index in indices])

        order = sorted(range(len(batch)), key=lambda index: -length(batch[index]))
        short = [index for index in order if length(batch[index]) <= shared]
        calls = [[index] for index in order[: len(order) - len(short)]]
        calls += [part for start in range(self._threads) if (part := short[start :: self._threads])]
        done: dict[int, Result] = {}
        for indices, results in zip(calls, self._pool.map(some, calls), strict=True):
            done.update(zip(indices, results, strict=True))
        return [done[index] for index in range(len(batch))]


class PaddedRunner:
    """Runs a model that takes padded batches, in batches of a few fixed shapes.

    An utterance is always computed in a batch of the same number of rows and of positions, which depend on its length
    alone: those of the smallest size that holds it. So no matrix product changes its shape, and thereby the last bits
    of its results, with the utterance's neighbours. Rows without an utterance are padding. Utterances that are
    too long for a batch are computed alone, without padding.

    A device computes the batches one after the other; a CPU ``threads`` side by side, the longest first. On a CPU
    batches have 2 to ``CPU_ROWS`` rows, as unused rows cost much and more rows gain little.

    Attributes:
        frames: frames of a batch, rows times size, at most; 0 where every utterance is computed alone.

    Args:
        equal_lengths: for models where padding cannot be exact: utterances of the same length share a batch, and none
            is padded. Then there are at most ``EQUAL_ROWS`` rows, as few utterances have the same length; unused rows
            hold copies.
    """

    EQUAL_ROWS, CPU_ROWS = 4, 8

    #: Frames of a batch are not fewer than this after ``shrink``.
    _FEWEST = 64

    def __init__(self, device: torch.device, threads: int, frames: int, *, equal_lengths: bool = False) -> None:
        self.frames = frames
        most = self.CPU_ROWS if device.type == "cpu" else frames
        self._most_rows = self.EQUAL_ROWS if equal_lengths else most
        self._fewest_rows = 2 if device.type == "cpu" else 1
        self._equal_lengths = equal_lengths
        self._last: _Group | None = None
        self._run = BatchRunner(device, threads)

    @property
    def batch_limit(self) -> int | None:
        """Number of utterances above which a call gets no faster, or None."""
        return None if self.frames else self._run.batch_limit

    def __call__(
        self,
        compute: Callable[[list[Tensor], int | None, int | None], list[Result]],
        batch: Sequence[Tensor],
        length: Callable[[Tensor], int],
        *,
        unit: int = 1,
    ) -> list[Result]:
        """``compute``'s result for each member, in order.

        Args:
            compute: makes results of utterances, of the size in frames and of the number of rows that their batch must
                have; None for both if the utterances are of one length and none needs padding. Results of more rows
                than there are utterances are dropped.
            length: of a member.
            unit: length of a frame.
        """

        def compute_group(group: _Group) -> list[Result]:
            self._last = group
            members = [batch[index] for index in group.indices]
            if group.size is None:
                return compute(members + members[:1] * (group.rows - len(members)), None, None)
            return compute(members, group.size, group.rows)

        groups = list(self._groups([length(member) for member in batch], unit))
        done = self._run(
            lambda some: [compute_group(group) for group in some],
            groups,
            lambda group: group.rows * length(batch[group.indices[0]]),
        )
        results = {
            index: result
            for group, of_group in zip(groups, done, strict=True)
            for index, result in zip(group.indices, of_group, strict=False)
        }
        return [results[index] for index in range(len(batch))]

    def shrink(self) -> None:
        """Makes batches half as large, after one that did not fit in memory; not after an utterance that was alone."""
        if self._last is None or self._last.rows > 1 or self._last.size is not None:
            self.frames = max(self._FEWEST, self.frames // 2)

    def _groups(self, lengths: Sequence[int], unit: int) -> Iterator[_Group]:
        """The utterances of each batch."""
        by_size: dict[int, list[int]] = {}
        for index, length in enumerate(lengths):
            size = length if self._equal_lengths else padded_size(-(-length // unit))
            by_size.setdefault(size, []).append(index)
        for size, indices in sorted(by_size.items()):
            fitting = self.frames * unit // size if self._equal_lengths else self.frames // size
            rows = min(self._most_rows, fitting) if fitting >= self._fewest_rows else 1
            padded = None if self._equal_lengths or fitting < self._fewest_rows else size
            for start in range(0, len(indices), rows):
                yield _Group(padded, rows, indices[start : start + rows])


@dataclass(frozen=True, slots=True)
class _Group:
    """Utterances of a batch, by their indices, and its shape; ``size`` in frames, None where nothing is padded."""

    size: int | None
    rows: int
    indices: list[int]


def padded_size(frames: int) -> int:
    """The smallest of 8, 12, 16, 24, 32, 48 … that is not below ``frames``: at most half of it is padding."""
    power = max(8, 1 << (frames - 1).bit_length())
    return power * 3 // 4 if power > 8 and frames <= power * 3 // 4 else power


class ToHost:
    """An asynchronous copy of tensors of equal width to numpy arrays: from a device in one copy to pinned memory,
    queued after the device's pending work."""

    def __init__(self, parts: Sequence[Tensor], dtype: torch.dtype) -> None:
        self._done: torch.cuda.Event | None = None
        if all(part.device.type == "cpu" for part in parts):
            self._parts = [part.to(dtype) for part in parts]
            return
        packed = torch.cat(list(parts)).to(dtype)
        host = torch.empty(packed.shape, dtype=dtype, pin_memory=packed.device.type == "cuda")
        host.copy_(packed, non_blocking=True)
        if packed.device.type == "cuda":
            self._done = torch.cuda.Event(blocking=True)  # its wait gives the processor to loaders and writers
            self._done.record(torch.cuda.current_stream(packed.device))
        self._parts = list(host.split([len(part) for part in parts]))

    def arrays(self) -> list[npt.NDArray[Any]]:
        """The arrays, in order, after the copy has finished."""
        if self._done is not None:
            self._done.synchronize()
        return [part.numpy() for part in self._parts]

    def codes(self) -> list[npt.NDArray[np.uint16]]:
        """``arrays`` of int16 as codes up to 65,535, which have wrapped around. Copies: a long row's pieces keep theirs
        for long, and views would keep the whole batch's array."""
        return [array.view(np.uint16).copy() for array in self.arrays()]


def codes_to_host(parts: Sequence[Tensor]) -> list[npt.NDArray[np.uint16]]:
    """Codes (T_i, K) up to 65,535 to numpy arrays, copied as 16-bit integers."""
    return ToHost(parts, torch.int16).codes()


def to_host(parts: Sequence[Tensor], dtype: torch.dtype) -> list[npt.NDArray[Any]]:
    """Tensors of equal width to numpy arrays."""
    return ToHost(parts, dtype).arrays()


class StageClock:
    """Measures how long a device worked between two marks in its queue; on a CPU, the time between the marks."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cuda = device.type == "cuda"
        self._marks: list[Any] = []

    def mark(self) -> None:
        """Records the time now, or on a device when its queue reaches this point."""
        if self._cuda:
            self._marks.append(torch.cuda.Event(enable_timing=True, blocking=True))
            self._marks[-1].record(torch.cuda.current_stream(self._device))
        else:
            self._marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Seconds between consecutive marks; waits until the device has passed the last."""
        if not self._cuda:
            return [late - early for early, late in pairwise(self._marks)]
        self._marks[-1].synchronize()
        return [early.elapsed_time(late) / 1e3 for early, late in pairwise(self._marks)]
