"""What runs in a loader process: ``RowDataset``, whose iterator takes rows and yields them loaded.

torch's ``DataLoader`` starts the processes and carries their messages. Beside it are two things that it does not have:

- each process writes the number of the row in hand to shared memory, so that the rank knows which row a process died
  of, or hangs in;
- rows and arrays are handed over in ``SharedBuffers``. Messages have a few dozen bytes, which a pipe takes
  whole or not at all, so a killed process cannot damage the queue that all of them share.
"""

from __future__ import annotations

import ctypes
import fcntl
import gc
import multiprocessing
import os
import pickle
import select
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, MutableSequence, Sequence
from multiprocessing.queues import SimpleQueue
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from batch_tokenizer.data.buffers import BUFFER_BYTES, SharedBuffers
from batch_tokenizer.records import LoadedRow, ManifestRow, Pieces, RowError, Stage

#: Signals that a launcher sends to every process of a job. Only the computing process answers them; it ends the loader.
JOB_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)

#: What stands in place of the row in hand before a process has started, and while it has none.
STARTING, IDLE = -2, -1

#: Most bytes of a row, so that a buffer always has room for it and for what was loaded before it.
MOST_ROW_BYTES = BUFFER_BYTES - (1 << 30)

_PR_SET_PDEATHSIG = 1


class Ticket(NamedTuple):
    """Rows to load: the pickled (number, row) pairs are the first ``size`` bytes of a shared buffer."""

    buffer: int
    size: int


class Answer(NamedTuple):
    """What became of a ticket's rows: the pickled (number, result) pairs, ``size`` bytes at ``offset`` of its buffer.

    A result is None if the others' arrays were as much as one answer takes: that row is to be given out again.
    """

    buffer: int
    offset: int
    size: int


class StartFault(NamedTuple):
    """A loader process could not import what it needs."""

    trace: str


class StoredArray(NamedTuple):
    """An array in the buffer of an answer."""

    offset: int
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


class Loaded(NamedTuple):
    """A ``LoadedRow`` on its way to the rank, which has the row itself already."""

    features: StoredArray | None
    codes: StoredArray | None
    num_samples: int
    frames: int
    load_seconds: float
    pieces: Pieces | None

    @property
    def nbytes(self) -> int:
        """Bytes of array data."""
        return sum(array.nbytes for array in self[:2] if array is not None)


class Failed(NamedTuple):
    """A row that could not be loaded. ``bug`` is the traceback if the fault is the program's own, else None."""

    stage: Stage
    reason: str
    bug: str | None = None


def attempt(load: Callable[[ManifestRow], LoadedRow], row: ManifestRow) -> LoadedRow | Failed:
    """Load one row; whatever goes wrong becomes that row's failure, also a bug of ours, as a million others wait."""
    try:
        return load(row)
    except RowError as error:
        return Failed(error.stage, error.reason)
    except MemoryError:
        return Failed("load", "not enough memory to load this row; lower --num_workers or give the job more memory")
    except OSError as error:
        return Failed("load", str(error) or type(error).__name__)
    except Exception as error:  # noqa: BLE001 - reported as a bug with its traceback, by the process that has the log
        return Failed("load", f"internal error: {type(error).__name__}: {error}", traceback.format_exc())


class RowDataset(IterableDataset[Any]):
    """Loads the rows that ``tickets`` name, in every process of a ``DataLoader``; it ends only with the process.

    Args:
        load: the pickled load function.
        tickets: rows to load, one queue for all processes: whichever is free takes the next.
        in_hand: the number of the row that each process has in hand, and last the fork server's process id.
        message_bytes: an answer is sent before all its rows are loaded when their arrays have so many bytes.
    """

    def __init__(
        self,
        load: bytes,
        buffers: SharedBuffers,
        tickets: SimpleQueue[Ticket],
        in_hand: MutableSequence[int],
        message_bytes: int,
    ) -> None:
        self.load = load
        self.buffers = buffers
        self.tickets = tickets
        self.in_hand = in_hand
        self.message_bytes = message_bytes

    def __iter__(self) -> Iterator[Answer | StartFault]:
        # 1. Import what loading needs. What fails here would fail for every row.
        try:
            load: Callable[[ManifestRow], LoadedRow] = pickle.loads(self.load)
        except Exception:  # noqa: BLE001 - any import may fail in any way; the rank raises it
            yield StartFault(traceback.format_exc())
            return
        worker = get_worker_info().id  # type: ignore[union-attr]
        self.in_hand[worker] = IDLE

        # 2. Load rows until the rank kills this process.
        while True:
            ticket = self.tickets.get()
            rows = pickle.loads(self.buffers[ticket.buffer][: ticket.size])
            yield self._load_rows(load, worker, ticket.buffer, rows)

    def _load_rows(
        self,
        load: Callable[[ManifestRow], LoadedRow],
        worker: int,
        buffer: int,
        rows: Sequence[tuple[int, ManifestRow]],
    ) -> Answer:
        memory, end = self.buffers[buffer], 0
        results: list[tuple[int, Loaded | Failed | None]] = []
        for number, row in rows:
            # The row stays in hand until its arrays are stored: a process may run out of memory there too.
            self.in_hand[worker] = number
            result = attempt(load, row)
            if isinstance(result, LoadedRow) and result.nbytes > MOST_ROW_BYTES:
                result = Failed("load", f"{result.nbytes:,} bytes at once are too many; --long_audio segment takes it")
            if isinstance(result, LoadedRow):
                stored, end = _store(result, memory, end)
                results.append((number, stored))
            else:
                results.append((number, result))
            if end >= self.message_bytes:
                break
        results += [(number, None) for number, _ in rows[len(results) :]]
        pickled = pickle.dumps(results, protocol=5)
        memory[end : end + len(pickled)] = pickled
        self.in_hand[worker] = IDLE
        return Answer(buffer, end, len(pickled))


def _store(loaded: LoadedRow, memory: memoryview, end: int) -> tuple[Loaded, int]:
    """Copy a row's arrays to ``memory`` from ``end`` on; returns where they end."""
    stored: list[StoredArray | None] = []
    for array in (loaded.features, loaded.codes):
        if array is None:
            stored.append(None)
            continue
        stored.append(StoredArray(end, array.dtype.str, array.shape, array.nbytes))
        np.ndarray(array.shape, array.dtype, memory, end)[...] = array
        end += array.nbytes
    features, codes = stored
    return Loaded(features, codes, loaded.num_samples, loaded.frames, loaded.load_seconds, loaded.pieces), end


def prepare_worker(worker: int) -> None:
    """``DataLoader``'s ``worker_init_fn``: what a loader process does before its first row."""
    server, rank = os.getppid(), multiprocessing.parent_process()
    assert rank is not None
    get_worker_info().dataset.in_hand[-1] = server  # type: ignore[union-attr]
    # 1. Signals to the whole job are for the computing process. A fault ends this one without torch's message, which
    #    does not know the row.
    signal.pthread_sigmask(signal.SIG_BLOCK, JOB_SIGNALS)
    for number in (signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGIO):
        signal.signal(number, signal.SIG_DFL)
    # 2. Outlive neither the rank nor the fork server, which alone reports exit statuses, not even in native code that
    #    never returns: the kernel sends SIGIO when the rank's end of a pipe is closed, and on Linux SIGKILL when the
    #    server ends.
    fcntl.fcntl(rank.sentinel, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(rank.sentinel, fcntl.F_SETFL, fcntl.fcntl(rank.sentinel, fcntl.F_GETFL) | os.O_ASYNC)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if select.select([rank.sentinel], [], [], 0)[0] or os.getppid() != server:  # one ended before the kernel was asked
        os._exit(1)
    # 3. Garbage collection would otherwise write to every object of the modules, and so copy their shared pages.
    gc.freeze()
