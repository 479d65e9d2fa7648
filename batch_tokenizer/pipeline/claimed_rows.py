"""The rows that one process claims from the work queue, unit by unit."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from batch_tokenizer.manifest.manifest import Manifest
from batch_tokenizer.manifest.units import Units
from batch_tokenizer.records import ManifestRow, RowFailure
from batch_tokenizer.runtime.work_queue import WorkQueue


class ClaimedRows:
    """Rows of the units that this process claims, one unit after the other, and how many it should hold.

    Near the end, rows that one process holds are rows that the others cannot take, and if it is slow, all wait for it.
    So the limit shrinks with the number of unclaimed rows.

    Args:
        todo: bool (num_lines,), the manifest's lines that are to be done; others are left out.
    """

    def __init__(
        self, queue: WorkQueue, units: Units, manifest: Manifest, todo: npt.NDArray[np.bool_], world_size: int
    ) -> None:
        self._queue = queue
        self._units = units
        self._manifest = manifest
        self._todo = todo
        self._world_size = world_size
        self._rows_left = np.append(np.cumsum((units.stops - units.starts)[::-1])[::-1], 0)  # from each unit on
        self._least = max(1, int(self._rows_left[0]) // (4 * len(units)))
        self._next_unit = 0

    def __iter__(self) -> Iterator[ManifestRow | RowFailure]:
        while (unit := self._queue.claim()) is not None:
            self._next_unit = unit + 1
            yield from (item for item in self._manifest.read(*self._units[unit]) if self._todo[item.line])

    def prefetch_limit(self, most: int) -> int:
        """Rows to load ahead, or to gather for a batch.

        ``most`` while many rows are unclaimed, then a sixteenth of an even share of the unclaimed ones, so that a
        process ten times slower than the others is done with them when the others are. Never less than a quarter of a
        unit, as small batches cost time too.
        """
        if self._world_size == 1:
            return most
        return min(most, max(self._least, int(self._rows_left[self._next_unit]) // (16 * self._world_size)))
