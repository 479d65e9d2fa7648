"""``Packer``: collects loaded rows into batches within a row limit and a frame budget.

Rows are put first-fit into a few open batches, which fills the budget better than a new batch whenever the next row
does not fit. Tokens do not depend on batch composition, so nothing here needs to be reproducible.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from batch_tokenizer.records import Batch, LoadedRow

#: Batches that are open at once. More would be filled little better and keep more rows waiting.
_OPEN_BATCHES = 4


@dataclass(slots=True)
class _OpenBatch:
    opened: int  # how many rows had been added when it was opened
    rows: list[LoadedRow] = field(default_factory=list)
    frames: int = 0


class Packer:
    """Packs rows into batches.

    Args:
        batch_size: most rows in a batch.
        frame_budget: most token frames in a batch. A row that is longer gets a batch to itself.

    A batch is returned at the latest with the ``2 * batch_size``-th row after its first one, or by ``flush``.
    """

    def __init__(self, batch_size: int, frame_budget: int) -> None:
        self._batch_size = batch_size
        self.frame_budget = frame_budget
        self._open: list[_OpenBatch] = []
        self._added = 0

    def add(self, loaded: LoadedRow) -> list[Batch]:
        """Take in a row; returns the batches that are ready, often none."""
        # 1. A batch that has been open for long is closed, so that its rows do not wait for ever.
        self._added += 1
        room = self.frame_budget - loaded.frames
        ready = []
        if self._open and self._open[0].opened + 2 * self._batch_size <= self._added:
            ready.append(self._open.pop(0))
        # 2. The first batch with room takes the row, or a new one.
        place = next((batch for batch in self._open if batch.frames <= room), None)
        if place is None:
            place = _OpenBatch(self._added)
            self._open.append(place)
        place.rows.append(loaded)
        place.frames += loaded.frames
        # 3. It is full, or too many are open: then the fullest goes.
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
