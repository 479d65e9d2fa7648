"""``ShardSink``: results of many rows become one file, which is published whole, and only then are its rows done.

    encode in writer threads ─► the open shard, aside ─► full? lines aside ─► rename the shard ─► rename the lines

A shard is full at so many bytes, rows or minutes, so that a killed run loses little. The ledger's side of it (which
number a shard gets, and what counts after a kill) is the ``Journal``'s, the output folder's the ``ShardFolder``'s.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, BinaryIO, Protocol

from batch_tokenizer.records import LedgerEntry, RunError, TokenizedRow
from batch_tokenizer.writers.parquet_shard import ParquetShard, parquet_row, require_pyarrow
from batch_tokenizer.writers.row_encoding import EncodedRow, RowEncoder, done_entry
from batch_tokenizer.writers.shard_folder import ShardFolder
from batch_tokenizer.writers.tar_shard import TarShard

#: A shard is closed at so many rows, and by the first row after so many seconds.
MOST_ROWS, MOST_SECONDS = 65536, 600.0


class Journal(Protocol):
    """The ledger's part in publishing a shard; see ``runtime/shard_ledger.py``."""

    def draw(self) -> tuple[int, str]:
        """A number that no shard of this process has, and the shard's name with it, less its suffix."""

    def prepare(self, number: int, entries: Sequence[LedgerEntry]) -> None:
        """Write the ledger lines of a shard, not yet as valid."""

    def commit(self, number: int) -> None:
        """Make the lines valid: the shard's rows are done."""


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
        open: begins a file.
    """

    suffix: str
    encode: Callable[[EncodedRow], Any]
    open: Callable[[BinaryIO], OpenShard]


def shard_form(sink: str, run_info: Mapping[str, Any], num_quantizers: int | None, has_audio: bool) -> ShardForm:
    """The form of ``tar`` or ``parquet`` shards.

    Args:
        run_info: what is the same for all rows.
        num_quantizers: K of all rows; None where there are no tokens.

    Raises:
        RunError: a library is not installed.
    """
    if sink == "tar":
        return ShardForm(TarShard.suffix, TarShard.encode, TarShard)
    require_pyarrow()
    has_tokens = num_quantizers is not None
    common = {**run_info, "num_quantizers": num_quantizers} if has_tokens else run_info
    return ShardForm(
        ParquetShard.suffix,
        lambda row: parquet_row(row, common),
        lambda stream: ParquetShard(stream, common, has_tokens=has_tokens, has_audio=has_audio),
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
        journal: Journal,
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
        self._shard: OpenShard | None = None
        self._stream: BinaryIO | None = None
        self._number = 0
        self._name = ""
        self._entries: list[LedgerEntry] = []
        self._opened = 0.0

    def write(self, result: TokenizedRow) -> None:
        """Add one row to the open shard, and publish the shard if that fills it.

        Raises:
            RowError: the row could not be encoded.
            RunError: the shard could not be written or published (exit code 1).
        """
        encoded = self._form.encode(self._encode(result))
        with self._lock:
            try:
                shard = self._shard or self._open()
                shard.append(encoded)
                self._entries.append(done_entry(result))
                if (
                    shard.num_bytes >= self._most_bytes
                    or len(self._entries) >= self._most_rows
                    or time.monotonic() - self._opened >= self._most_seconds
                ):
                    self._publish(shard)
            except OSError as error:
                raise self._failure(error) from error

    def close(self) -> None:
        """Publish the open shard.

        Raises:
            RunError: it could not be (exit code 1).
        """
        with self._lock:
            if self._shard is not None:
                try:
                    self._publish(self._shard)
                except OSError as error:
                    raise self._failure(error) from error

    def __enter__(self) -> ShardSink:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """After an exception the open shard is thrown away: its rows are not done."""
        if error is None:
            self.close()
            return
        # A thread that hangs in a write may hold the lock. Then the next start removes the file.
        if self._lock.acquire(timeout=1.0):
            try:
                if self._shard is not None and self._stream is not None:
                    with suppress(OSError):
                        self._shard.finish()  # a parquet writer that is not closed complains at the end of the process
                        self._stream.close()
                    with suppress(OSError):
                        self._folder.discard(self._name)
            finally:
                self._lock.release()

    def _open(self) -> OpenShard:
        self._number, name = self._journal.draw()
        self._name = f"{name}.{self._form.suffix}"
        self._stream = self._folder.create(self._name)
        self._shard = self._form.open(self._stream)
        self._opened = time.monotonic()
        return self._shard

    def _publish(self, shard: OpenShard) -> None:
        assert self._stream is not None
        shard.finish()
        self._stream.close()
        self._journal.prepare(self._number, self._entries)
        self._folder.publish(self._name)
        self._journal.commit(self._number)
        self._shard = self._stream = None
        self._entries = []

    def _failure(self, error: OSError) -> RunError:
        return RunError(
            f"{self._folder.place}: shard {self._name} cannot be written: {error.strerror or error}; put that right "
            "and start the same command again, finished rows are kept",
            exit_code=1,
        )
