"""``Loader``: rows go in, the same rows come out loaded or failed, each exactly once, whatever happens to a process.

One pool of loader processes per rank, on torch's ``DataLoader`` (``workers.py``). What this adds to it is that a row
which kills its process, or hangs in it, costs only itself:

- Each process names the row that it has in hand, and a set of processes ends with the first that dies. The row in the
  dead process's hands is suspect; the others are loaded again by the next set. A suspect is tried once more, in a set
  of one process; if that dies too, the row fails.
- If a process has had a row in hand for longer than ``row_timeout``, the row fails at once, and the set ends likewise.
- Signals that a launcher sends to all processes of a job are kept from the loader processes, so a preempted job blames
  no row.

One thread starts sets of processes and receives what they load while the model computes. Rows are handed out to them
wherever room or rows become available. All of that is under one lock.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from batch_tokenizer.data.processes import ensure_fork_server
from batch_tokenizer.data.worker import STARTING, Answer, Failed, Loaded, attempt
from batch_tokenizer.data.workers import POLL_SECONDS, Death, WorkerSet
from batch_tokenizer.records import LoadedRow, ManifestRow, RowFailure, RunError, first_line

_log = logging.getLogger(__name__)

#: Rows that are handed over in one message: as many as load in this many seconds and fit in this many bytes, up to a
#: bound. A message costs as much processor time as loading a wav of one to three seconds, but rows wait for the others
#: in it, and what is more than the cache holds is slow to copy.
_MESSAGE_SECONDS, _MESSAGE_BYTES, _MOST_ROWS = 20e-3, 16 << 20, 64

#: Sets of processes that fail, one after the other, before any row was loaded: that is the machine's trouble.
_FAILURES_IN_SUCCESSION = 3

#: Seconds that ``close`` waits for processes that are only just being started; they end by themselves.
_CLOSE_SECONDS = 1.0


@dataclass(eq=False, slots=True)
class _PendingRow:
    """A row on its way through. ``deaths`` counts the processes that died on it."""

    row: ManifestRow
    number: int  # in the order submitted
    deaths: int = 0


class Loader:
    """Loads rows in ``num_workers`` processes, ahead of the consumer but not further than it allows.

    Args:
        load: loads one row; it and what it holds must be picklable, and defined in a module that can be imported. It
            should raise ``RowError`` for a row's troubles; ``OSError`` and ``MemoryError`` fail the row too, and any
            other exception fails it as an internal error, with the traceback in the log.
        num_workers: loader processes. With 0, ``next`` loads in the calling thread, and ``row_timeout`` does not hold.
        rows_ahead: most rows that are being loaded or lie loaded.
        bytes_ahead: most bytes of arrays that lie loaded, if no row is larger. Each worker may have two more messages,
            of one row or a part of so many bytes.
        row_timeout: seconds that loading one row may take.

    Rows come out in the order in which they are done. ``submit``, ``next`` and ``stop_loading`` may be called from any
    thread.
    """

    def __init__(
        self,
        load: Callable[[ManifestRow], LoadedRow],
        *,
        num_workers: int,
        rows_ahead: int,
        bytes_ahead: int,
        row_timeout: float,
    ) -> None:
        self._load = load
        self._num_workers = num_workers
        self._rows_ahead = rows_ahead
        self._bytes_ahead = bytes_ahead
        self._row_timeout = row_timeout
        self._message_bytes = min(_MESSAGE_BYTES, bytes_ahead // (4 * max(1, num_workers)))

        # All of this is under the lock. A row is in one of the first four, by its number in the third.
        self._changed = threading.Condition()
        self._queue: deque[_PendingRow] = deque()
        self._suspects: deque[_PendingRow] = deque()
        self._in_flight: dict[int, _PendingRow] = {}
        self._ready: deque[tuple[LoadedRow | RowFailure, int]] = deque()
        self._ready_bytes = 0
        self._submitted = 0
        self._handed_out = 0
        self._workers: WorkerSet | None = None
        self._alone = False  # the workers are one, for suspects
        self._row_bytes: float | None = None  # running mean of a row's size
        self._row_seconds = 1.0  # and of the processor time that it takes to load
        self._failures = 0  # of sets, in succession
        self._stopped = False
        self._fault: BaseException | None = None

        self._thread: threading.Thread | None = None
        if num_workers:
            with contextlib.suppress(OSError):  # the thread tries again, and says what is wrong
                ensure_fork_server(load)
            self._thread = threading.Thread(target=self._run, name="loader", daemon=True)
            self._thread.start()
            atexit.register(self.stop_loading)  # or Python would wait for processes that are in the middle of a row

    # The caller's side

    def submit(self, rows: Sequence[ManifestRow]) -> None:
        """Queue rows for loading. Returns at once."""
        with self._changed:
            if self._stopped:
                raise RuntimeError("the loader was stopped")
            self._queue.extend(_PendingRow(row, self._submitted + place) for place, row in enumerate(rows))
            self._submitted += len(rows)
            self._hand_out()
            self._changed.notify_all()

    def next(self, timeout: float | None = None) -> LoadedRow | RowFailure | None:
        """The next row that is done; None after ``timeout`` seconds (None: no limit), and when no row is pending.

        Raises:
            RunError: loader processes cannot be started. Rows that were done before come out first.
        """
        if self._thread is None:
            return self._load_here()
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._fault or not self._pending(), timeout)
            if not self._ready:
                if self._fault is not None:
                    raise self._fault
                return None
            record, size = self._ready.popleft()
            self._ready_bytes -= size
            self._handed_out += 1
            self._hand_out()
            self._changed.notify_all()
            return record

    @property
    def pending(self) -> int:
        """Rows submitted and not yet handed out by ``next``."""
        with self._changed:
            return self._pending()

    def stop_loading(self) -> list[ManifestRow]:
        """Load no more, kill the loader processes, and give back the rows that are not done, in the order submitted.

        Rows that are done still come out of ``next``.
        """
        with self._changed:
            self._stopped = True
            rows = sorted([*self._queue, *self._suspects, *self._in_flight.values()], key=lambda row: row.number)
            self._queue.clear()
            self._suspects.clear()
            self._in_flight.clear()
            self._submitted -= len(rows)
            if self._workers is not None:
                self._workers.kill()
            self._changed.notify_all()
        return [pending.row for pending in rows]

    def close(self) -> None:
        """Kill the loader processes and forget what is pending."""
        self.stop_loading()
        if self._thread is not None:
            self._thread.join(_CLOSE_SECONDS)
            atexit.unregister(self.stop_loading)
        with self._changed:
            self._ready.clear()
            self._handed_out = self._submitted

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _pending(self) -> int:
        return self._submitted - self._handed_out

    def _load_here(self) -> LoadedRow | RowFailure | None:
        with self._changed:
            if not self._queue:
                return None
            pending = self._queue.popleft()
            self._handed_out += 1
        result = attempt(self._load, pending.row)
        return _failure(pending.row, result) if isinstance(result, Failed) else result

    # Rows handed out

    def _hand_out(self) -> None:
        """Give queued rows to the workers, as far as the consumer's allowance goes. The lock is held."""
        while self._workers is not None and self._workers.free and (count := self._message_rows()):
            source = self._suspects if self._alone else self._queue
            rows = [source.popleft() for _ in range(count)]
            self._in_flight.update((pending.number, pending) for pending in rows)
            self._workers.give([(pending.number, pending.row) for pending in rows])

    def _message_rows(self) -> int:
        """How many rows the next message may have; 0 for none now."""
        if self._alone:
            return 1 if self._suspects and not self._in_flight else 0
        if not self._queue:
            return 0
        # 1. Enough to make the cost of a message small, but so few that every worker gets some.
        row_bytes = self._bytes_ahead / self._num_workers if self._row_bytes is None else max(1.0, self._row_bytes)
        most = min(
            _MOST_ROWS,
            _MESSAGE_SECONDS / self._row_seconds,
            self._message_bytes / row_bytes,
            self._rows_ahead / (2 * self._num_workers),
            -(-len(self._queue) // self._num_workers),
        )
        count = max(1, int(most))
        # 2. As far as there is room. While the consumer has rows to take, wait until there is room for a whole message.
        ahead = len(self._in_flight) + len(self._ready)
        bytes_left = self._bytes_ahead - self._ready_bytes
        room = min(self._rows_ahead - ahead, int(bytes_left / row_bytes) - len(self._in_flight))
        if room < count and self._ready:
            return 0
        return max(0 if ahead else 1, min(room, count))  # a row may be larger than all that is allowed

    # The thread

    def _run(self) -> None:
        try:
            while not self._stopped:
                self._run_workers()
                with self._changed:
                    self._changed.wait_for(lambda: self._queue or self._suspects or self._stopped)
        except BaseException as error:  # noqa: BLE001 - raised again by next(), in the thread that can act on it
            with self._changed:
                self._fault = error
                self._changed.notify_all()

    def _run_workers(self) -> None:
        """One set of workers, until one dies or hangs, a suspect is settled, or the loading is stopped."""
        self._alone = bool(self._suspects)
        # 1. Start them.
        try:
            workers = WorkerSet(self._load, 1 if self._alone else self._num_workers, self._message_bytes)
        except (OSError, EOFError, RuntimeError) as error:
            reason = "the fork server ended" if isinstance(error, EOFError) else first_line(error)
            remedy = "lower --num_workers or raise the limit on processes"
            self._count_failure(f"cannot start a loader process: {reason}; {remedy}")
            return
        with self._changed:
            self._workers = workers
            self._hand_out()
        # 2. Take in what they load, and look after them now and then.
        late: list[int] = []
        deaths: list[Death] = []
        try:
            look = time.monotonic()
            while not (self._stopped or late or deaths or (self._alone and not self._in_flight)):
                answer = workers.receive()
                if answer is not None:
                    self._take(workers, answer)
                if answer is None or time.monotonic() > look + POLL_SECONDS:
                    look = time.monotonic()
                    late, deaths = workers.late(self._row_timeout), workers.deaths()
            server_died = bool(deaths) and workers.server_died()
        finally:
            with self._changed:
                self._workers = None
            workers.close()
        if self._stopped:
            return
        # 3. Find out which rows are to blame, and queue the others again.
        with self._changed:
            blamed = self._settle(late, [] if server_died else deaths)
        if server_died:
            self._count_failure("the fork server of the loader processes died; is the machine out of memory?")
        elif deaths and not blamed:
            when = "as soon as they start" if deaths[0].number == STARTING else "without a row in hand"
            self._count_failure(f"loader processes die {when} ({deaths[0]})")

    def _take(self, workers: WorkerSet, answer: Answer) -> None:
        """Take in the rows of an answer, each when the consumer has room for it; meanwhile no row is cut off."""
        # 1. Each row, once there is room for its arrays, which are copied out of the shared buffer.
        results = workers.results_of(answer)
        for number, result in results:
            size = result.nbytes if isinstance(result, Loaded) else 0
            with self._changed:
                while self._ready_bytes and self._ready_bytes + size > self._bytes_ahead and not self._stopped:
                    self._changed.wait()
                pending = self._in_flight.get(number)
            if pending is None or result is None:
                continue
            record = workers.row_of(answer, pending.row, result) if isinstance(result, Loaded) else result
            with self._changed:
                if isinstance(record, LoadedRow):
                    self._row_bytes = _mean(self._row_bytes, size)
                    self._row_seconds = _mean(self._row_seconds, max(1e-4, record.load_seconds))
                self._finish(number, record, size)
        # 2. The buffer is free again; rows that did not fit in the answer go back to the queue's front.
        with self._changed:
            workers.take_back(answer)
            for number, result in reversed(results):
                if result is None and number in self._in_flight:
                    self._queue.appendleft(self._in_flight.pop(number))
            self._hand_out()

    def _finish(self, number: int, result: LoadedRow | Failed, size: int = 0) -> None:
        """A row is done, unless it was given back meanwhile. The lock is held."""
        pending = self._in_flight.pop(number, None)
        if pending is None:
            return
        record = _failure(pending.row, result) if isinstance(result, Failed) else result
        self._ready.append((record, size))
        self._ready_bytes += size
        self._failures = 0
        self._changed.notify_all()

    def _settle(self, late: Sequence[int], deaths: Sequence[Death]) -> bool:
        """Fail, suspect or queue again what a set of workers left; whether a row is to blame. The lock is held."""
        # 1. A row that takes too long fails at once: a second try would take as long.
        blamed = bool(late)
        for number in late:
            reason = f"took longer than --row_timeout {self._row_timeout:g} s to load; raise it if the file is good"
            self._finish(number, Failed("load", reason))
        # 2. A row in the hands of a dead process may be innocent (a kill from outside), so it is tried once more.
        for death in deaths:
            if (pending := self._in_flight.get(death.number)) is None:
                continue
            blamed = True
            pending.deaths += 1
            if pending.deaths == 1:
                _log.warning("loader process died (%s) on row %r; trying it once more", death, pending.row.key)
            else:
                self._finish(death.number, Failed("load", f"loader process died twice on this row ({death})"))
        # 3. All others are loaded again, in their order.
        for pending in sorted(self._in_flight.values(), key=lambda pending: -pending.number):
            (self._suspects if pending.deaths else self._queue).appendleft(pending)
        self._in_flight.clear()
        return blamed

    def _count_failure(self, reason: str) -> None:
        """A set of workers ended and no row is to blame. ``RunError`` if that happens again and again."""
        self._failures += 1
        if self._failures >= _FAILURES_IN_SUCCESSION:
            raise RunError(reason, exit_code=1)
        _log.warning("%s; starting again", reason)


def _failure(row: ManifestRow, failed: Failed) -> RowFailure:
    if failed.bug is not None:
        _log.error("row %r (line %d): %s\n%s", row.key, row.line, failed.reason, failed.bug)
    return RowFailure.of(row, failed.stage, failed.reason)


def _mean(before: float | None, value: float) -> float:
    """A running mean."""
    return value if before is None else 0.9 * before + 0.1 * value
