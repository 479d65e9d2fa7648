"""``RowFeed``: rows from the work queue through the loader, up to the codec.

work queue ──► claimed rows ──► loader processes ──► rows, or pieces of long rows, that the codec can be given
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from batch_tokenizer.codecs.base import CodecStream
from batch_tokenizer.data.loader import Loader
from batch_tokenizer.pipeline.claimed_rows import ClaimedRows
from batch_tokenizer.pipeline.joined_rows import JoinedRows
from batch_tokenizer.pipeline.long_audio import LongRows
from batch_tokenizer.records import LoadedRow, ManifestRow, RowFailure
from batch_tokenizer.runtime.progress import ProgressReporter
from batch_tokenizer.runtime.signals import StopRequest

#: Seconds between looks at what else there is to do, while nothing has been loaded.
_LOOK_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class RowFeed:
    """Rows of one process as they are loaded, until none are left or it is asked to stop; then what is loaded already.

    Attributes:
        most_ahead: rows that are in the loader at a time while many are left.
        on_failure: called with each row that cannot be read or loaded.
    """

    claimed: ClaimedRows
    loader: Loader
    joined_rows: JoinedRows
    long_rows: LongRows
    stop: StopRequest
    progress: ProgressReporter
    most_ahead: int
    on_failure: Callable[[RowFailure], None]

    def __iter__(self) -> Iterator[tuple[LoadedRow, CodecStream | None] | None]:
        """Rows and, for a piece of a row that is streamed, the stream that it goes through; None now and then while
        there is nothing."""
        source: Iterator[ManifestRow | RowFailure] | None = iter(self.claimed)
        while True:
            # 1. Keep the loader busy, unless all rows are claimed or the process is asked to stop.
            if source is not None and not self._submit(source):
                source = None
            if self.stop.requested:
                source = None
                self.loader.stop_loading()
            if source is None and self.loader.pending == 0:
                return
            # 2. Pass on what it has loaded.
            record = self.loader.next(timeout=_LOOK_SECONDS)
            if isinstance(record, RowFailure):
                self.on_failure(record)
            elif record is None:
                yield None
            else:
                self.progress.add_seconds("load", record.load_seconds)
                yield from self.long_rows.unfold(record)

    def _submit(self, source: Iterator[ManifestRow | RowFailure]) -> bool:
        """Submits rows up to this process's limit, some at a time; False when there are no more.

        A submission wakes the loader's thread, which for each single row would cost more than reading the row.
        """
        # 1. Not yet, if so little is missing that the next submission can bring more.
        pending = self.loader.pending
        limit = self.claimed.prefetch_limit(self.most_ahead)
        if limit - pending < min(16, (limit + 3) // 4):
            return True
        # 2. Fill up. Claiming a unit lowers the limit, so it is asked for each row.
        rows: list[ManifestRow] = []
        more = True
        while more and pending + len(rows) < self.claimed.prefetch_limit(self.most_ahead) and not self.stop.requested:
            item = next(source, None)
            if item is None:
                more = False
            elif isinstance(item, RowFailure):
                self.on_failure(item)
            elif isinstance(parts := self.joined_rows.split(item), RowFailure):
                self.on_failure(parts)
            else:
                rows += parts
        if rows:
            self.loader.submit(rows)
        return more
