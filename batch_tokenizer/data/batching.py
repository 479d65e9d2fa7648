"""``Packer``: loaded rows enter one at a time, batches within a row limit and a frame budget leave.

Rows are put first-fit into a few open batches, which fills the budget better than cutting the stream where it happens
to overflow. Which rows meet in a batch changes no row's result, so nothing here needs to be reproducible.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from batch_tokenizer.records import Batch, LoadedRow

#: Batches that are filled at once. More would fill little better and hold more rows back.
_OPEN_BATCHES = 4


@dataclass(slots=True)
class _OpenBatch:
    opened: int  # the number of the row that opened it
    rows: list[LoadedRow] = field(default_factory=list)
    frames: int = 0


class Packer:
    """Packs rows into batches.

    Args:
        batch_size: most rows in a batch.
        frame_budget: most token frames in a batch. A row that is longer gets a batch to itself.

    A row leaves at the latest with the ``2 * batch_size``-th row after the one that opened its batch, or at ``flush``.
    """

    def __init__(self, batch_size: int, frame_budget: int) -> None:
        self._batch_size = batch_size
        self.frame_budget = frame_budget
        self._open: list[_OpenBatch] = []
        self._added = 0

    def add(self, loaded: LoadedRow) -> list[Batch]:
        """Take in a row; returns the batches that are ready, often none."""
        self._added += 1
        room = self.frame_budget - loaded.frames
        ready = []
        if self._open and self._open[0].opened + 2 * self._batch_size <= self._added:
            ready.append(self._open.pop(0))
        place = next((batch for batch in self._open if batch.frames <= room), None)
        if place is None:
            place = _OpenBatch(self._added)
            self._open.append(place)
        place.rows.append(loaded)
        place.frames += loaded.frames
        if len(place.rows) >= self._batch_size or place.frames >= self.frame_budget:
            self._open.remove(place)
            ready.append(place)
        elif len(self._open) > _OPEN_BATCHES:
            fullest = max(self._open, key=lambda batch: batch.frames)
            self._open.remove(fullest)
            ready.append(fullest)
        return [Batch(tuple(batch.rows)) for batch in ready]

    def flush(self) -> list[Batch]:
        """The batches that are still open."""
        batches = [Batch(tuple(batch.rows)) for batch in self._open]
        self._open.clear()
        return batches


def split(batch: Batch) -> tuple[Batch, Batch]:
    """A batch of two or more rows in two, of about half the frames each: what to try when it did not fit in memory."""
    rows = batch.rows
    if len(rows) < 2:
        raise ValueError("a batch of one row cannot be split")
    best, before = 1, 0
    least = batch.frames
    for place in range(1, len(rows)):
        before += rows[place - 1].frames
        larger = max(before, batch.frames - before)
        if larger < least:
            best, least = place, larger
    return Batch(rows[:best]), Batch(rows[best:])
