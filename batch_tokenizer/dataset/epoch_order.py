"""The order of an epoch's rows, and which of them each rank and DataLoader worker reads.

An epoch is a sequence of all rows. ``EpochOrder`` says which row stands at a position of it. What is left of an epoch
is a list of ranges of positions; ``share_of_rank`` cuts it into contiguous pieces, one for each rank, so that ranks
read different files where they can. Of a rank's share the DataLoader's workers take turns, a batch each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

#: Positions ``[begin, end)`` of an epoch's sequence.
Range = tuple[int, int]


@dataclass(frozen=True)
class EpochOrder:
    """The sequence of an epoch's rows, computed a window at a time.

    Rows lie in blocks, which are cheap to read as a whole. Shuffled, the blocks are put in a random order, cut into
    windows of ``window_blocks`` blocks, and the rows of each window are permuted. With all blocks in one window any
    order of rows is possible.

    Attributes:
        block_starts: int64 (B + 1,), the first row of each block, then the number of rows.
        window_blocks: None leaves the rows in their order.
        seed: with ``epoch`` decides the order.
    """

    block_starts: npt.NDArray[np.int64]
    window_blocks: int | None
    seed: int
    epoch: int

    def rows(self, ranges: Sequence[Range]) -> Iterator[int]:
        """The rows at positions of the sequence, in their order."""
        if self.window_blocks is None:
            for begin, end in ranges:
                yield from range(begin, end)
            return
        # 1. Blocks in the epoch's order, and the position at which each begins.
        num_blocks = len(self.block_starts) - 1
        blocks = np.random.default_rng((self.seed, self.epoch, 0)).permutation(num_blocks)
        sizes = np.diff(self.block_starts)[blocks]
        # 2. Windows of them.
        first_blocks = np.arange(0, num_blocks, self.window_blocks)
        window_sizes = np.add.reduceat(sizes, first_blocks)
        window_starts = np.concatenate(([0], np.cumsum(window_sizes)))
        for begin, end in ranges:
            window = int(np.searchsorted(window_starts, begin, side="right")) - 1
            while begin < end:
                # 3. The rows of a window, permuted, as far as the range goes.
                start, stop = window_starts[window : window + 2].tolist()
                members = blocks[first_blocks[window] : first_blocks[window] + self.window_blocks]
                rows = np.concatenate([np.arange(*self.block_starts[block : block + 2]) for block in members])
                np.random.default_rng((self.seed, self.epoch, 1 + window)).shuffle(rows)
                yield from rows[begin - start : min(end, stop) - start].tolist()
                begin, window = stop, window + 1


def count(ranges: Sequence[Range]) -> int:
    """Positions in ranges."""
    return sum(end - begin for begin, end in ranges)


def cut(ranges: Sequence[Range], begin: int, end: int) -> tuple[Range, ...]:
    """The ranges' positions from the ``begin``-th up to, not including, the ``end``-th."""
    found = []
    passed = 0
    for first, last in ranges:
        low, high = max(begin - passed, 0), min(end - passed, last - first)
        if low < high:
            found.append((first + low, first + high))
        passed += last - first
    return tuple(found)


def share_of_rank(ranges: Sequence[Range], rank: int, world_size: int, *, drop_uneven: bool) -> tuple[Range, ...]:
    """The contiguous piece of ``ranges`` that a rank reads.

    Args:
        drop_uneven: all pieces have the same size, and the last ``count(ranges) % world_size`` positions are left out;
            otherwise the sizes of pieces differ by one at most.
    """
    total = count(ranges)
    if drop_uneven:
        total -= total % world_size
    return cut(ranges, rank * total // world_size, (rank + 1) * total // world_size)


def remaining(ranges: Sequence[Range], consumed: int, world_size: int, *, drop_uneven: bool) -> tuple[Range, ...]:
    """What is left of ``ranges`` when each of ``world_size`` ranks has read ``consumed`` rows of its share.

    With the same number of ranks each of them goes on exactly where it was.
    """
    left: list[Range] = []
    for rank in range(world_size):
        share = share_of_rank(ranges, rank, world_size, drop_uneven=drop_uneven)
        left += cut(share, consumed, count(share))
    return tuple(left)
