"""``Loader``: rows go in, the same rows come out loaded or failed, each exactly once, whatever happens to a process.

One pool of loader processes per rank, owned by the computing process. torch's ``DataLoader`` was not used because it
cannot keep that promise: a worker that is killed there ends the whole iterator, and the parent cannot tell which row
the worker held, so one file that exhausts memory would take the run with it.

Here each worker has its own socket and a short queue of rows, and answers row by row in order. So the first unanswered
row of a dead worker is the suspect, and the others it had are innocent. A suspect is tried once more, with a fresh
worker to itself; if that dies too, the row fails. A worker that sits on a row for longer than ``row_timeout`` is killed
and replaced, and the row fails at once. Signals that a launcher sends to all processes of a job do not end the workers
(see ``worker``), so a preempted job blames no row.

One thread of the parent does all of the talking: it hands out rows, takes in arrays while the model computes, and kills
and replaces workers. It waits in ``select`` and has nothing to do with the caller but two queues under one lock.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import pickle
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.reduction import send_handle
from types import TracebackType

import numpy as np

from batch_tokenizer.data.worker import HEAD, Failed, Loaded, attempt, outcome, unpack, without
from batch_tokenizer.records import LoadedRow, ManifestRow, RowFailure, RunError

_log = logging.getLogger(__name__)

#: Rows that a worker holds at once, the one it loads and those that wait: so many that it need not wait for the parent,
#: which may be busy for some milliseconds, and so few that a row does not wait long behind others while workers idle.
_LEAST_ROWS, _MOST_ROWS = 3, 12
_SECONDS_OF_ROWS = 5e-3

#: Bytes that a worker may send before the parent reads them, if the system allows so many: enough for most rows, as
#: each time that it has to wait costs both sides more than the copying.
_SOCKET_BYTES = 1 << 20

#: So many processes that die at their start, one after the other, are the machine's trouble and not a row's.
_DEATHS_IN_SUCCESSION = 3

#: The thread looks at the clock this often while rows are being loaded. If it finds that two of these have passed, the
#: whole job was suspended (control-Z, Slurm's gang scheduling), its workers with it, and the time does not count.
_SECOND = 1.0


@dataclass(eq=False, slots=True)
class _Job:
    """A row on its way through; ``deaths`` counts the workers that died on it."""

    row: ManifestRow
    order: int
    deaths: int = 0


class _Worker:
    """The parent's view of one loader process, and the parent's end of its socket."""

    def __init__(self, number: int, connection: socket.socket) -> None:
        connection.setblocking(False)
        self.number = number
        self.connection = connection
        self.jobs: deque[_Job] = deque()  # what it was given and has not answered, in that order
        self.alive = False  # it has said its first word
        self.alone = False  # it is trying a suspect and gets nothing else meanwhile
        self.began = 0.0  # when it could begin with the first of its jobs
        self.arriving: int | None = None  # bytes of the arrays of an answer that has begun to arrive
        self.admitted = False  # those bytes are accounted for and may be read
        self.watched = 0  # the events that ``select`` waits for on its socket
        self.ended = False  # its socket is at the end
        self.status: int | None = None  # its exit status, once the server has told
        self._outgoing = bytearray()
        self._messages = self._read_messages()
        self._wanted = next(self._messages)

    @property
    def held_back(self) -> bool:
        """An answer has begun to arrive, and the consumer has no room for its arrays."""
        return self.arriving is not None and not self.admitted

    def give(self, job: _Job) -> None:
        """Queue a row for it; ``flush`` sends it."""
        if not self.jobs:
            self.began = time.monotonic()
        self.jobs.append(job)
        self._outgoing += pickle.dumps(job.row, protocol=5)

    def flush(self) -> bool:
        """Send what the socket takes. True if some is left. Never blocks: the worker may itself be sending."""
        try:
            while self._outgoing:
                del self._outgoing[: self.connection.send(self._outgoing)]
        except BlockingIOError:
            return True
        except (BrokenPipeError, ConnectionResetError):
            self._outgoing.clear()  # it is dead, which reading will show
        return False

    def receive(self, admit: Callable[[_Worker], bool]) -> Iterator[tuple[Loaded | Failed | None, int]]:
        """Messages that are complete, with the bytes of their arrays.

        Ends when the socket is empty or at its end (``ended``), or when ``admit`` will not have the next arrays
        yet; the worker then waits in its ``send``.
        """
        while True:
            if self.arriving is not None and not self.admitted and not admit(self):
                return
            try:
                count = self.connection.recvmsg_into(self._wanted)[0]
            except BlockingIOError:
                return
            except ConnectionResetError:
                count = 0
            if count == 0:
                self.ended = True
                return
            self._wanted = without(self._wanted, count)
            if not self._wanted:
                self._wanted = next(self._messages)
                if not self._wanted:
                    size, self.arriving, self.admitted = self.arriving or 0, None, False
                    yield self._message, size
                    self._wanted = next(self._messages)

    def _read_messages(self) -> Iterator[list[memoryview]]:
        """The counterpart of ``worker.pack``. Yields memory to fill, and none each time ``_message`` is complete."""
        while True:
            head = bytearray(HEAD.size)
            yield [memoryview(head)]
            body_size, *sizes = HEAD.unpack(head)
            body = bytearray(body_size)
            arrays = [np.empty(size, np.uint8) for size in sizes]
            self.arriving = sum(sizes)
            yield [memoryview(body), *(array.data for array in arrays if len(array))]
            self._message: Loaded | Failed | None = unpack(body, arrays)
            yield []


class Loader:
    """Loads rows in ``num_workers`` processes, ahead of the consumer but not further than it allows.

    Args:
        load: loads one row; it and what it holds must be picklable, and defined in a module that can be imported. It
            should raise ``RowError`` for a row's troubles; ``OSError`` and ``MemoryError`` fail the row too, and any
            other exception fails it as an internal error, with the traceback in the log.
        num_workers: loader processes. With 0, ``next`` loads in the calling thread, and ``row_timeout`` does not hold.
        rows_ahead: most rows that are being loaded or lie loaded.
        bytes_ahead: about the most bytes of arrays that lie loaded; each worker may hold one more row back. One row may
            be larger than that.
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

        # Shared with the callers, under the lock.
        self._changed = threading.Condition()
        self._queue: deque[_Job] = deque()
        self._suspects: deque[_Job] = deque()
        self._workers: dict[int, _Worker] = {}
        self._ready: deque[tuple[LoadedRow | RowFailure, int]] = deque()
        self._held_bytes = 0  # in _ready or admitted to it
        self._submitted = 0
        self._handed_out = 0
        self._starved = False  # the thread would do more if the consumer took something
        self._stopped = False
        self._fault: BaseException | None = None

        # The thread's own.
        self._row_bytes: float | None = None  # running mean of a row's size
        self._row_seconds = 1.0  # and of the processor time that it takes to load
        self._workers_started = 0
        self._looked = time.monotonic()  # at the clock
        self._start_deaths = 0  # in succession
        self._server_deaths = 0  # in succession
        self._server: subprocess.Popen[bytes] | None = None
        self._thread: threading.Thread | None = None
        if num_workers:
            self._pickled_load = pickle.dumps(load, protocol=5)
            self._selector = selectors.DefaultSelector()
            self._bell, self._bell_rope = socket.socketpair()
            self._bell.setblocking(False)
            self._bell_rope.setblocking(False)
            self._thread = threading.Thread(target=self._run, name="loader", daemon=True)
            self._thread.start()

    # The caller's side

    def submit(self, rows: Sequence[ManifestRow]) -> None:
        """Queue rows for loading. Returns at once."""
        with self._changed:
            if self._stopped:
                raise RuntimeError("the loader was stopped")
            self._queue.extend(_Job(row, self._submitted + place) for place, row in enumerate(rows))
            self._submitted += len(rows)
        self._ring()

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
            self._held_bytes -= size
            self._handed_out += 1
            starved = self._starved
        if starved:
            self._ring()
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
            jobs = [*self._queue, *self._suspects]
            self._queue.clear()
            self._suspects.clear()
            for worker in self._workers.values():
                jobs += worker.jobs
                worker.jobs.clear()
            self._submitted -= len(jobs)
            self._changed.notify_all()
        self._ring()
        return [job.row for job in sorted(jobs, key=lambda job: job.order)]

    def close(self) -> None:
        """Kill the loader processes and forget what is pending."""
        self.stop_loading()
        if self._thread is not None:
            self._thread.join()
            self._bell.close()
            self._bell_rope.close()
        with self._changed:
            self._ready.clear()
            self._handed_out = self._submitted

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _pending(self) -> int:
        return self._submitted - self._handed_out

    def _ring(self) -> None:
        """Wake the thread."""
        if self._thread is not None and self._thread.is_alive():
            with contextlib.suppress(BlockingIOError):  # it has been rung often enough
                self._bell_rope.send(b"!")

    def _load_here(self) -> LoadedRow | RowFailure | None:
        with self._changed:
            if not self._queue:
                return None
            job = self._queue.popleft()
        record = self._record(job, attempt(self._load, job.row))
        with self._changed:
            self._handed_out += 1
        return record

    def _record(self, job: _Job, result: Loaded | Failed) -> LoadedRow | RowFailure:
        if isinstance(result, Failed) and result.bug is not None:
            _log.error("row %r (line %d): %s\n%s", job.row.key, job.row.line, result.reason, result.bug)
        return outcome(job.row, result)

    # The thread's side

    def _run(self) -> None:
        try:
            self._selector.register(self._bell, selectors.EVENT_READ, self._on_bell)
            self._start_server()
            while not self._stopped:
                self._turn()
        except BaseException as error:  # noqa: BLE001 - raised again by next(), in the thread that can act on it
            with self._changed:
                self._fault = error
                self._changed.notify_all()
        finally:
            self._end_server()
            for worker in self._workers.values():
                worker.connection.close()
            self._selector.close()

    def _turn(self) -> None:
        with self._changed:
            for worker in [worker for worker in self._workers.values() if worker.held_back]:
                self._listen(worker)
            self._assign()
            deadlines = [worker.began + self._row_timeout for worker in self._timed()]
        patience = min(_SECOND, max(0.0, min(deadlines) - time.monotonic())) if deadlines else None
        for key, _ in self._selector.select(patience):
            key.data()
        self._cut_off_late_workers()

    def _on_bell(self) -> None:
        self._bell.recv(4096)

    def _assign(self) -> None:
        """Hand out queued rows as far as the consumer's allowance goes, to the workers that have fewest."""
        workers = [worker for worker in self._workers.values() if worker.alive and not worker.ended]
        in_flight = sum(len(worker.jobs) for worker in self._workers.values())
        unweighed = in_flight - sum(worker.admitted for worker in workers)
        row_bytes = self._bytes_ahead // self._num_workers if self._row_bytes is None else self._row_bytes
        self._starved = any(worker.held_back for worker in workers)
        most = max(_LEAST_ROWS, min(_MOST_ROWS, int(_SECONDS_OF_ROWS / self._row_seconds)))
        free = [worker for worker in workers if not worker.alone and len(worker.jobs) <= (most + 1) // 2]
        given = set()
        while self._queue and free:
            ahead = in_flight + len(self._ready)
            expected_bytes = self._held_bytes + (unweighed + 1) * row_bytes
            if ahead and (ahead >= self._rows_ahead or expected_bytes > self._bytes_ahead):
                self._starved = True
                break
            worker = min(free, key=lambda worker: len(worker.jobs))
            worker.give(self._queue.popleft())
            given.add(worker)
            if len(worker.jobs) >= most:
                free.remove(worker)
            in_flight += 1
            unweighed += 1
        for worker in given:
            self._watch(worker)

    def _watch(self, worker: _Worker) -> None:
        """Send what can be sent, and have ``select`` wait for what is left to do with this worker."""
        events = 0 if worker.held_back or worker.ended else selectors.EVENT_READ
        if worker.flush():
            events |= selectors.EVENT_WRITE
        if events == worker.watched:
            return
        if worker.watched:
            self._selector.unregister(worker.connection)
        if events:
            self._selector.register(worker.connection, events, lambda: self._listen(worker))
        worker.watched = events

    def _listen(self, worker: _Worker) -> None:
        """Take in what a worker says, and send it what waits to be sent."""
        if worker.number not in self._workers:  # dismissed while this event waited
            return
        for message, size in worker.receive(self._admit):
            with self._changed:
                if message is None:
                    self._greet(worker)
                elif worker.jobs:
                    self._on_answer(worker, message, size)
                else:  # the loading was stopped
                    self._held_bytes -= size
        self._watch(worker)
        if worker.ended and worker.status is not None:
            self._bury(worker)

    def _admit(self, worker: _Worker) -> bool:
        """Is there room for the arrays that a worker is about to send? A dead worker's are taken in at any rate."""
        size = worker.arriving or 0
        with self._changed:
            if size and self._held_bytes and self._held_bytes + size > self._bytes_ahead and worker.status is None:
                return False
            self._held_bytes += size
            worker.admitted = True
            return True

    def _greet(self, worker: _Worker) -> None:
        worker.alive = True
        self._start_deaths = 0
        if self._suspects:
            worker.alone = True
            worker.give(self._suspects.popleft())
            self._watch(worker)

    def _on_answer(self, worker: _Worker, message: Loaded | Failed, size: int) -> None:
        job = worker.jobs.popleft()
        worker.alone = False
        worker.began = time.monotonic()
        self._server_deaths = 0
        if isinstance(message, Loaded):
            self._row_bytes = size if self._row_bytes is None else 0.9 * self._row_bytes + 0.1 * size
            self._row_seconds = 0.9 * self._row_seconds + 0.1 * max(1e-4, message.load_seconds)
        self._finish(job, message, size)

    def _finish(self, job: _Job, result: Loaded | Failed, size: int = 0) -> None:
        self._ready.append((self._record(job, result), size))
        self._changed.notify()

    # Workers that end

    def _timed(self) -> list[_Worker]:
        """Workers whose time is running: not while they start, nor when they have begun to send an answer."""
        return [worker for worker in self._workers.values() if worker.alive and worker.jobs and worker.arriving is None]

    def _cut_off_late_workers(self) -> None:
        now = time.monotonic()
        gap, self._looked = now - self._looked, now
        with self._changed:
            for worker in self._timed():
                if gap > 2 * _SECOND:
                    worker.began = min(now, worker.began + gap)
                if now - worker.began < self._row_timeout:
                    continue
                job = worker.jobs.popleft()
                reason = f"took longer than --row_timeout {self._row_timeout:g} s to load; raise it if the file is good"
                self._finish(job, Failed("load", reason))
                self._request("kill", worker.number)
                self._dismiss(worker)
                self._start_worker()

    def _bury(self, worker: _Worker) -> None:
        """A worker is dead, and everything it sent before has been read."""
        death = _describe_death(worker.status or 0)
        with self._changed:
            if self._stopped:
                return
            if not worker.alive:
                self._start_deaths += 1
                if self._start_deaths >= _DEATHS_IN_SUCCESSION:
                    raise RunError(f"loader processes die as soon as they start ({death})", exit_code=1)
            elif worker.jobs:
                suspect = worker.jobs.popleft()
                suspect.deaths += 1
                if suspect.deaths == 1:
                    _log.warning("loader process died (%s) on row %r; trying it once more", death, suspect.row.key)
                    self._suspects.append(suspect)
                else:
                    self._finish(suspect, Failed("load", f"loader process died twice on this row ({death})"))
            self._dismiss(worker)
            self._start_worker()

    def _dismiss(self, worker: _Worker) -> None:
        """Forget a worker; what it was given goes to others."""
        del self._workers[worker.number]
        if worker.admitted:
            self._held_bytes -= worker.arriving or 0
        for job in reversed(worker.jobs):
            (self._suspects if job.deaths else self._queue).appendleft(job)
        if worker.watched:
            self._selector.unregister(worker.connection)
        worker.connection.close()

    # The fork server

    def _start_server(self) -> None:
        self._control, theirs = multiprocessing.Pipe()
        program = (
            f"import sys; sys.path[:] = {sys.path!r}\n"
            f"from batch_tokenizer.data.worker import main; main({theirs.fileno()})"
        )
        one_thread = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        try:
            self._server = subprocess.Popen(
                [sys.executable, "-c", program],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env={**os.environ, **one_thread},
            )
        except OSError as error:
            self._control.close()
            raise RunError(f"cannot start the loader processes' server: {error}", exit_code=1) from error
        finally:
            theirs.close()
        self._selector.register(self._control, selectors.EVENT_READ, self._on_server)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it died, which the end of file will tell
            self._control.send_bytes(self._pickled_load)

    def _on_server(self) -> None:
        try:
            kind, *details = self._control.recv()
        except (EOFError, ConnectionResetError):
            self._on_server_death()
            return
        with self._changed:
            if kind == "ready":
                for _ in range(self._num_workers):
                    self._start_worker()
            elif kind == "exited":
                number, status = details
                worker = self._workers.get(number)
                if worker is not None:  # None: it was dismissed
                    worker.status = status
                    self._listen(worker)
            elif kind == "unforked":
                raise RunError(
                    f"cannot start a loader process: {details[1]}; lower --num_workers or raise the limit on processes",
                    exit_code=1,
                )
            else:
                (trace,) = details
                _log.error("the loader processes cannot import what they need:\n%s", trace)
                last_line = trace.strip().rpartition("\n")[2]
                raise RunError(f"the loader processes cannot import what they need: {last_line}", exit_code=1)

    def _on_server_death(self) -> None:
        """Somebody killed the server, and the kernel its children. No row is to blame; start over."""
        self._server_deaths += 1
        if self._server_deaths >= _DEATHS_IN_SUCCESSION:
            raise RunError("the loader processes' server keeps dying; is the machine out of memory?", exit_code=1)
        _log.warning("the loader processes' server died; starting another")
        self._selector.unregister(self._control)
        self._end_server()
        with self._changed:
            for worker in list(self._workers.values()):
                self._dismiss(worker)
        self._start_server()

    def _start_worker(self) -> None:
        try:
            ours, theirs = socket.socketpair()
            theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BYTES)
        except OSError as error:
            raise RunError(f"cannot start a loader process: {error}", exit_code=1) from error
        worker = _Worker(self._workers_started, ours)
        self._workers_started += 1
        self._workers[worker.number] = worker
        self._watch(worker)
        with theirs:
            self._request("start", worker.number, theirs)

    def _request(self, request: str, number: int, connection: socket.socket | None = None) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it died, which the end of file will tell
            self._control.send((request, number))
            if connection is not None:
                send_handle(self._control, connection.fileno(), None)

    def _end_server(self) -> None:
        """The server leaves at the end of file, and takes its children along."""
        if self._server is None:
            return
        self._control.close()
        try:
            self._server.wait(timeout=0.5)
        except subprocess.TimeoutExpired:  # still importing
            self._server.kill()
            self._server.wait()


def _describe_death(status: int) -> str:
    if status >= 0:
        return f"exit status {status}"
    if -status == signal.SIGKILL:
        return "signal 9: probably out of memory"
    return f"signal {-status}: {signal.strsignal(-status)}"
