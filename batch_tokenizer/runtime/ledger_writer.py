"""``LedgerWriter``: appends how each row ended to the ledger file of this process."""

from __future__ import annotations

import errno
import os
import threading
from contextlib import suppress
from pathlib import Path

from batch_tokenizer.records import LedgerEntry, RunError
from batch_tokenizer.runtime.ledger_lines import encode_entry


class LedgerWriter:
    """Appends entries to one file; used from several threads.

    An entry is one write of one whole line, so a crash tears at most the last line. There is no retry and no
    ``fsync``: a disk that is full stops the run, and lines lost with the power are rows that are done again.
    """

    def __init__(self, path: Path) -> None:
        """
        Raises:
            RunError: the file cannot be opened.
        """
        self.path = path
        self._lock = threading.Lock()
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
            size = os.fstat(self._descriptor).st_size
            # A process restarted within the attempt goes on in the file of the one before it, which may end in
            # mid-line.
            self._torn = size > 0 and os.pread(self._descriptor, 1, size - 1) != b"\n"
        except OSError as error:
            raise self._failure(error) from error

    def append(self, entry: LedgerEntry) -> None:
        """Write ``entry``. After it returns, the row counts as ended even if this process is killed.

        Raises:
            RunError: the line could not be written (exit code 1); the row does not count as ended.
        """
        line = encode_entry(entry)
        with self._lock:
            try:
                if os.fstat(self._descriptor).st_nlink == 0:
                    raise OSError(errno.ENOENT, "removed while the run wrote to it")
                if self._torn:
                    line = b"\n" + line
                self._torn = True
                written = os.write(self._descriptor, line)
                while written < len(line):
                    written += os.write(self._descriptor, line[written:])
                self._torn = False
            except OSError as error:
                raise self._failure(error) from error

    def _failure(self, error: OSError) -> RunError:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            remedy = "free some space there and start the same command again; finished rows are kept"
        elif error.errno in (errno.ENOENT, errno.ESTALE):
            remedy = "bring the run folder back, or start again without it"
        else:
            remedy = "make it writable and start the same command again; finished rows are kept"
        return RunError(f"cannot write {self.path} ({error.strerror}): {remedy}", exit_code=1)

    def close(self) -> None:
        """Close the file. A thread that is still at work cannot write to another file that gets its descriptor."""
        with self._lock:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> LedgerWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        # A network file system may report a failed write only here. Lines that are not there are rows done again.
        with suppress(OSError):
            self.close()
