"""``ShardSink``: gathers the results of many rows in one file; its rows are done when the whole file is published.

    encode in writer threads ─► the open shard, aside ─► full? lines aside ─► rename the shard ─► rename the lines

A shard is full at so many bytes, rows or minutes, so that a killed run loses little. Which number a shard gets and
what counts after a kill is up to ``runtime/shard_ledger.py``; where it is published, to ``ShardFolder``.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, BinaryIO, Protocol

from batch_tokenizer.records import CODES_FIELD, LedgerEntry, RunError, TokenizedRow, first_line
from batch_tokenizer.runtime.shard_ledger import ShardJournal
from batch_tokenizer.writers.jsonl_shard import JsonlShard, jsonl_line
from batch_tokenizer.writers.parquet_columns import ColumnType
from batch_tokenizer.writers.parquet_shard import (
    ParquetForm,
    ParquetShard,
    parquet_row,
    parquet_stored,
    require_pyarrow,
)
from batch_tokenizer.writers.row_encoding import EncodedRow, RowEncoder, done_entry
from batch_tokenizer.writers.shard_folder import ShardFolder
from batch_tokenizer.writers.tar_shard import TarShard

log = logging.getLogger(__name__)

#: A shard is closed at so many rows, and by the first row after so many seconds.
MOST_ROWS, MOST_SECONDS = 65536, 600.0


class OpenShard(Protocol):
    """A shard that is being written to a stream."""

    @property
    def num_bytes(self) -> int:
        """About what it has so far."""

    def append(self, encoded: Any) -> None:
        """One row, as the form's ``encode`` made it."""

    def finish(self) -> None:
        """Write the end of the file."""


@dataclass(frozen=True, slots=True)
class ShardForm:
    """How rows become a file.

    Attributes:
        encode: what ``OpenShard.append`` takes, of a row; runs in several threads; raises ``RowError``.
        stored: the row's bytes in the file, by name, of what ``encode`` made.
        open: begins a file.
    """

    suffix: str
    encode: Callable[[EncodedRow], Any]
    stored: Callable[[Any], Mapping[str, bytes | memoryview]]
    open: Callable[[BinaryIO], OpenShard]


def shard_form(
    sink: str,
    run_info: Mapping[str, Any],
    num_quantizers: int | None,
    has_audio: bool,
    codes_field: str = CODES_FIELD,
    fields: Mapping[str, ColumnType] | None = None,
) -> ShardForm:
    """The form of ``jsonl``, ``tar`` or ``parquet`` shards.

    Args:
        run_info: what is the same for all rows.
        num_quantizers: K of all rows; None where there are no tokens.
        codes_field: the name of the codes in ``jsonl`` and ``parquet``.
        fields: the columns of ``parquet`` for fields of rows; None where the first rows decide about them.

    Raises:
        RunError: a library is not installed.
    """
    if sink == "tar":
        return ShardForm(TarShard.suffix, TarShard.encode, TarShard.stored, TarShard)
    if sink == "jsonl":
        return ShardForm(
            JsonlShard.suffix, lambda row: jsonl_line(row, codes_field), lambda line: {"line": line}, JsonlShard
        )
    require_pyarrow()
    has_tokens = num_quantizers is not None
    common = {**run_info, "num_quantizers": num_quantizers} if has_tokens else run_info
    parquet = ParquetForm(common, has_tokens, has_audio, codes_field, fields)
    return ShardForm(
        ParquetShard.suffix,
        lambda row: parquet_row(row, parquet),
        parquet_stored,
        lambda stream: ParquetShard(stream, parquet),
    )


class ShardSink:
    """Gathers rows in shards. ``write`` is called by several threads.

    Args:
        most_bytes, most_rows, most_seconds: at which a shard is closed; one last row may pass the bytes.
    """

    def __init__(
        self,
        encode: RowEncoder,
        form: ShardForm,
        folder: ShardFolder,
        journal: ShardJournal,
        *,
        most_bytes: int,
        most_rows: int = MOST_ROWS,
        most_seconds: float = MOST_SECONDS,
    ) -> None:
        self._encode = encode
        self._form = form
        self._folder = folder
        self._journal = journal
        self._most_bytes = most_bytes
        self._most_rows = most_rows
        self._most_seconds = most_seconds
        self._lock = threading.Lock()
        self._shard: _ShardInProgress | None = None
        self._name = ""  # of the latest shard
        self._failure: RunError | None = None

    def write(self, result: TokenizedRow) -> None:
        """Add one row to the open shard, and publish the shard if that fills it.

        Raises:
            RowError: the row could not be encoded.
            RunError: the shard could not be written or published (exit code 1).
        """
        encoded = self._form.encode(self._encode(result))
        with self._lock, self._first_failure():
            shard = self._shard or self._open()
            assert shard.file is not None
            shard.file.append(encoded)
            shard.entries.append(done_entry(result, self._form.stored(encoded)))
            if (
                shard.file.num_bytes >= self._most_bytes
                or len(shard.entries) >= self._most_rows
                or time.monotonic() - shard.opened >= self._most_seconds
            ):
                self._publish(shard)

    def close(self) -> None:
        """Publish the open shard.

        Raises:
            RunError: it could not be (exit code 1).
        """
        with self._lock, self._first_failure():
            if self._shard is not None:
                self._publish(self._shard)

    def __enter__(self) -> ShardSink:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """After an exception the open shard is thrown away: its rows are not done."""
        if error is None:
            self.close()
            return
        # A thread that hangs in a write may hold the lock. Then the next start removes the file.
        if self._lock.acquire(timeout=1.0):
            try:
                if self._shard is not None:
                    self._discard(self._shard)
            finally:
                self._lock.release()

    @contextmanager
    def _first_failure(self) -> Iterator[None]:
        """Turns an error of the storage into a RunError, and raises that one again from then on: a shard that
        could not be written once is in no state to be written or closed by another thread."""
        if self._failure is not None:
            raise self._failure
        try:
            yield
        except RunError as error:
            self._failure = error
            raise
        except _storage_errors() as error:
            cause = error.strerror if isinstance(error, OSError) else None
            self._failure = RunError(
                f"{self._folder.place}: shard {self._name} cannot be written: {cause or first_line(error)}; put that "
                "right and start the same command again, finished rows are kept",
                exit_code=1,
            )
            raise self._failure from error

    def _open(self) -> _ShardInProgress:
        number, name = self._journal.draw()
        self._name = f"{name}.{self._form.suffix}"
        stream = self._folder.create(self._name)
        self._shard = _ShardInProgress(number, self._name, stream)
        self._shard.file = self._form.open(stream)
        return self._shard

    def _publish(self, shard: _ShardInProgress) -> None:
        assert shard.file is not None
        # ``recover`` completes at the next start what a kill between two of these steps interrupts.
        # 1. The shard, complete, under its temporary name.
        shard.file.finish()
        shard.stream.close()
        # 2. Its ledger lines, where they do not count yet.
        self._journal.prepare(shard.number, shard.entries)
        # 3. The shard appears, and then its lines count.
        self._folder.publish(shard.name)
        self._journal.commit(shard.number)
        self._shard = None

    def _discard(self, shard: _ShardInProgress) -> None:
        # A parquet writer that is not closed complains at the end of the process. Closing one whose disk is full, or
        # whose file was closed half-way, fails in as many ways as there are libraries; none of them is news.
        steps: list[Callable[[], None]] = [shard.stream.close, partial(self._folder.discard, shard.name)]
        if shard.file is not None:
            steps.insert(0, shard.file.finish)
        for step in steps:
            try:
                step()
            except Exception as error:  # noqa: BLE001 - the error that ended the run is the one to report
                log.debug("shard %s, which is thrown away: %s", shard.name, error)


@dataclass(slots=True)
class _ShardInProgress:
    """The shard that rows are added to; ``file`` is None until its first bytes are written."""

    number: int
    name: str
    stream: BinaryIO
    file: OpenShard | None = None
    entries: list[LedgerEntry] = field(default_factory=list)
    opened: float = field(default_factory=time.monotonic)


def _storage_errors() -> tuple[type[Exception], ...]:
    """What is raised for a stream that fails, by pyarrow as well if it is in use."""
    arrow = sys.modules.get("pyarrow")
    return (OSError,) if arrow is None else (OSError, arrow.ArrowException)
