"""``WriterPool``: threads that write results while the model computes the next ones.

Results hold host memory only, and only so much of it: ``submit`` waits while too many bytes are pending. A row that
cannot be written fails alone. Any other exception ends the run: ``submit``, ``drain`` or ``close`` raises it.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable

from batch_tokenizer.records import RowError, TokenizedRow, first_line

log = logging.getLogger(__name__)


class WriterPool:
    """Writes rows in ``threads`` threads.

    Args:
        write: writes a row's files, returning when they are published; raises ``RowError``.
        on_done: called with each row that was written, in the thread that wrote it.
        on_failed: called with each row that was not, and why, likewise.
        bytes_pending: about the most bytes of arrays that wait or are being written; a single row may have more.
    """

    def __init__(
        self,
        threads: int,
        *,
        write: Callable[[TokenizedRow], None],
        on_done: Callable[[TokenizedRow], None],
        on_failed: Callable[[TokenizedRow, RowError], None],
        bytes_pending: int,
    ) -> None:
        self._write = write
        self._on_done = on_done
        self._on_failed = on_failed
        self._bytes_allowed = bytes_pending
        # Two conditions of one lock: a row wakes one writer, and a written row wakes only who waits for room.
        self._lock = threading.Lock()
        self._given = threading.Condition(self._lock)
        self._written = threading.Condition(self._lock)
        self._queue: deque[TokenizedRow] = deque()
        self._bytes = 0  # in the queue or being written
        self._rows = 0  # likewise
        self._closed = False
        self._fault: BaseException | None = None
        # Daemons, so that a write that hangs (a dead file server) cannot keep the process from leaving.
        self._threads = [
            threading.Thread(target=self._run, name=f"writer-{number}", daemon=True) for number in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, result: TokenizedRow) -> None:
        """Queue a row for writing; waits while too many bytes are pending."""
        size = result.nbytes
        with self._lock:
            if self._closed:
                raise RuntimeError("the writer pool was closed")
            self._written.wait_for(lambda: self._fault or not self._rows or self._bytes + size <= self._bytes_allowed)
            self._raise_fault()
            self._queue.append(result)
            self._bytes += size
            self._rows += 1
            self._given.notify()

    def drain(self, timeout: float | None = None) -> bool:
        """Wait until every submitted row is written or failed; False if ``timeout`` seconds were not enough."""
        with self._lock:
            self._written.wait_for(lambda: self._fault or not self._rows, timeout)
            self._raise_fault()
            return not self._rows

    def close(self) -> None:
        """Write what was submitted, and end the threads."""
        self._end_threads()
        with self._lock:
            self._raise_fault()

    def __enter__(self) -> WriterPool:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            self.close()
            return
        if isinstance(error, KeyboardInterrupt):
            # Somebody wants to leave now: what is not written is done again. The threads do not outlive the process.
            with self._lock:
                self._queue.clear()
            return
        # A fault of a writer that the body has not seen yet must not hide the error that ended the body.
        self._end_threads()
        if self._fault is not None and self._fault is not error:
            log.warning("writing failed as well: %s", first_line(self._fault))

    def _end_threads(self) -> None:
        with self._lock:
            self._closed = True
            self._given.notify_all()
        for thread in self._threads:
            thread.join()

    def _raise_fault(self) -> None:
        if self._fault is not None:
            raise self._fault

    def _run(self) -> None:
        while True:
            with self._lock:
                self._given.wait_for(lambda: self._queue or self._closed or self._fault)
                if self._fault or not self._queue:
                    return
                result = self._queue.popleft()
            # Outside the lock, so that threads write side by side. A fault ends all threads.
            try:
                self._write_one(result)
            except BaseException as error:  # noqa: BLE001 - raised again in the submitting thread
                with self._lock:
                    self._fault = self._fault or error
                    self._given.notify_all()
                    self._written.notify_all()
                return
            with self._lock:
                self._bytes -= result.nbytes
                self._rows -= 1
                self._written.notify_all()

    def _write_one(self, result: TokenizedRow) -> None:
        try:
            self._write(result)
        except RowError as error:
            self._on_failed(result, error)
        else:
            self._on_done(result)
