"""``WorkerSet``: one generation of loader processes, on torch's ``DataLoader``, with what a rank must know of them.

``DataLoader`` starts the processes, keeps them supplied ahead of the rank and brings their answers in the order of
their arrival. When a process dies it says only that, and neither its queues nor their locks can be trusted any more. So
a set ends with the first death among it, and another is started, which takes some tens of milliseconds a process: they
are forked by a server that has imported all they need.
"""

from __future__ import annotations

import logging
import multiprocessing.connection
import os
import pickle
import signal
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader

from batch_tokenizer.data.buffers import SharedBuffers
from batch_tokenizer.data.processes import WorkerContext, ensure_fork_server
from batch_tokenizer.data.worker import STARTING, Answer, Failed, Loaded, RowDataset, StartFault, Ticket, prepare_worker
from batch_tokenizer.records import LoadedRow, ManifestRow, RunError

_log = logging.getLogger(__name__)

#: Tickets for each process: one that it works on, and one so that it need not wait for the rank.
_TICKETS_A_WORKER = 2

#: Seconds after which ``receive`` comes back without an answer, and between two looks at the processes.
POLL_SECONDS = 0.1

#: If more than this has passed between two looks, the whole job was suspended (control-Z, Slurm's gang scheduling), its
#: loader processes with it, and the rest does not count as time that a row took.
_LONGEST_LOOK = 1.0

#: The exit status that ``multiprocessing`` gives a process whose end the fork server has not reported.
_UNREPORTED = 255


class Death(NamedTuple):
    """A process that has ended by itself. ``number`` is that of the row in hand, or ``STARTING`` or ``IDLE``."""

    number: int
    status: int

    def __str__(self) -> str:
        if self.status >= 0:
            return f"exit status {self.status}"
        if -self.status == signal.SIGKILL:
            return "signal 9: probably out of memory"
        return f"signal {-self.status}: {signal.strsignal(-self.status)}"


class WorkerSet:
    """``num_workers`` loader processes. ``give`` and ``kill`` may be called by any thread, all else by one.

    Args:
        load: the load function; picklable.
        message_bytes: about the most bytes of arrays in one answer, unless a single row has more.

    Raises:
        OSError, EOFError, RuntimeError: a process or a thread cannot be started.
    """

    def __init__(self, load: Callable[[ManifestRow], LoadedRow], num_workers: int, message_bytes: int) -> None:
        # 1. What the processes share with this one: buffers, a queue of tickets, and the number of the row in hand.
        ensure_fork_server(load)
        context = WorkerContext()
        self._processes = context.processes
        self._buffers = SharedBuffers(num_workers * _TICKETS_A_WORKER)
        self._free = list(range(len(self._buffers)))
        self._tickets = context.SimpleQueue()
        self._in_hand: Any = context.RawArray("q", [STARTING] * num_workers + [0])
        self._looked = time.monotonic()
        self._seen = [(STARTING, 0.0)] * num_workers  # the row in hand at the last look, and for how many seconds
        self._answers: Any = None
        pickled = pickle.dumps(load, protocol=5)
        dataset = RowDataset(pickled, self._buffers, self._tickets, self._in_hand, message_bytes)
        # 2. The processes, all of which must have started.
        try:
            self._answers = iter(
                _QuietDataLoader(
                    dataset,
                    batch_size=None,
                    num_workers=num_workers,
                    prefetch_factor=_TICKETS_A_WORKER,
                    collate_fn=_as_it_is,
                    worker_init_fn=prepare_worker,
                    multiprocessing_context=context,
                    generator=torch.Generator(),  # the caller's random numbers stay as they are
                    timeout=POLL_SECONDS,
                    in_order=False,
                )
            )
            for process in self._processes:
                if process.failure is not None:
                    raise process.failure
        except BaseException:
            self.close()
            raise

    @property
    def free(self) -> bool:
        """Whether ``give`` may be called."""
        return bool(self._free)

    def give(self, rows: Sequence[tuple[int, ManifestRow]]) -> None:
        """Have numbered rows loaded, by whichever process is first free."""
        buffer = self._free.pop()  # the one that was used last, which may still be in the cache
        pickled = pickle.dumps(rows, protocol=5)
        self._buffers[buffer][: len(pickled)] = pickled
        self._tickets.put(Ticket(buffer, len(pickled)))

    def receive(self) -> Answer | None:
        """The next answer; None after ``POLL_SECONDS``, and when a process has died.

        Raises:
            RunError: the processes cannot import what they need.
        """
        try:
            answer: Answer | StartFault = next(self._answers)
        except RuntimeError as error:
            if "timed out" in str(error) or self._ended():
                return None
            raise
        if isinstance(answer, StartFault):
            _log.error("the loader processes cannot import what they need:\n%s", answer.trace)
            last_line = answer.trace.strip().rpartition("\n")[2]
            raise RunError(f"the loader processes cannot import what they need: {last_line}", exit_code=1)
        return answer

    def results_of(self, answer: Answer) -> list[tuple[int, Loaded | Failed | None]]:
        """The numbered results of an answer; their arrays are still in its buffer."""
        results: list[tuple[int, Loaded | Failed | None]] = pickle.loads(
            self._buffers[answer.buffer][answer.offset : answer.offset + answer.size]
        )
        return results

    def row_of(self, answer: Answer, row: ManifestRow, loaded: Loaded) -> LoadedRow:
        """A loaded row with a copy of its arrays."""
        memory = self._buffers[answer.buffer]
        features, codes = (
            None if stored is None else np.ndarray(stored.shape, stored.dtype, memory, stored.offset).copy()
            for stored in (loaded.features, loaded.codes)
        )
        return LoadedRow(row, features, codes, *loaded[2:])

    def take_back(self, answer: Answer) -> None:
        """The answer was read; its buffer can be used again."""
        self._buffers.release(answer.buffer, answer.offset + answer.size)
        self._free.append(answer.buffer)

    def late(self, row_timeout: float) -> list[int]:
        """Rows that were in hand for longer than ``row_timeout`` seconds."""
        now = time.monotonic()
        passed, self._looked = min(now - self._looked, _LONGEST_LOOK), now
        rows = []
        for worker, number in enumerate(self._in_hand[:-1]):
            before, seconds = self._seen[worker]
            seconds = seconds + passed if number == before else 0.0
            self._seen[worker] = (number, seconds)
            if number >= 0 and seconds > row_timeout:
                rows.append(number)
        return rows

    def deaths(self) -> list[Death]:
        """Processes that have ended, and the row that each had in hand."""
        if not self._ended():
            return []
        return [
            Death(number, process.exitcode or 0)
            for process, number in zip(self._processes, self._in_hand, strict=False)
            if not process.is_alive()
        ]

    def server_died(self) -> bool:
        """Whether the fork server was killed, and the processes with it, so that no row is to blame."""
        for _ in range(20):  # its files are closed, which ``deaths`` has seen, some time before its status is there
            try:
                if os.waitid(os.P_PID, self._in_hand[-1], os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                    return True
            except ChildProcessError:  # it was waited for
                return True
            if all(process.exitcode != _UNREPORTED for process in self._processes):
                return False
            time.sleep(0.01)
        return False

    def kill(self) -> None:
        """Kill the processes; may be called again."""
        for process in self._processes:
            process.kill()

    def close(self) -> None:
        """Kill the processes and give back what they shared. Never waits for a row."""
        self.kill()
        for process in self._processes:
            process.join()
        self._answers = None  # whose end closes DataLoader's queues
        self._tickets.close()
        self._buffers.close()

    def _ended(self) -> list[Any]:
        return multiprocessing.connection.wait([process.sentinel for process in self._processes], 0)


class _QuietDataLoader(DataLoader[Any]):
    """It does not warn that there are more processes than cores: the user has chosen ``--num_workers``."""

    def check_worker_number_rationality(self) -> None:
        """Nothing."""


def _as_it_is(message: Any) -> Any:
    return message
