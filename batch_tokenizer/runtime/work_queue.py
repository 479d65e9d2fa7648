"""Which process does which unit of work. Nobody waits for anybody: there are no collectives here.

Under torchrun, units are handed out one at a time by a counter in torchrun's own store, so a slow process takes fewer
and a dead one none. Processes of plain srun share no store, and a counter in a file needs locks that parallel file
systems often lack, so there each process takes every world_size-th unit: units are sorted by length, which makes the
shares about equal, but a slow process is not relieved. A process alone just counts.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

from batch_tokenizer.runtime.processes import ProcessGroup
from batch_tokenizer.runtime.store import Store


class WorkQueue:
    """The units 0 .. num_units - 1 of one attempt, each given to exactly one process of the job."""

    def __init__(self, num_units: int, next_unit: Callable[[], int]) -> None:
        """``next_unit`` yields rising numbers that no other process gets. ``WorkQueue.open`` is the way in."""
        self._num_units = num_units
        self._next_unit = next_unit
        self._exhausted = False

    @classmethod
    def open(cls, num_units: int, processes: ProcessGroup, attempt_id: str) -> WorkQueue:
        """The queue that the job's launcher allows.

        Args:
            attempt_id: ``RunFolder.attempt_id``, so that every attempt starts to count from 0.
        """
        if processes.world_size == 1:
            return cls(num_units, count().__next__)
        if processes.launcher == "torchrun":
            store = Store(processes)
            return cls(num_units, lambda: store.add(f"batch_tokenizer/{attempt_id}/claimed", 1) - 1)
        return cls(num_units, count(processes.rank, processes.world_size).__next__)

    def claim(self) -> int | None:
        """The next unit for this process, or None when all are claimed.

        Raises:
            RunError: the launcher's store is gone (exit code 1).
        """
        if self._exhausted:
            return None
        unit = self._next_unit()
        if unit < self._num_units:
            return unit
        # Torchrun may end its store while other processes still finish: do not ask again.
        self._exhausted = True
        return None
