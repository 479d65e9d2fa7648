"""Messages from rank 0 to the other ranks of its job: the attempt's number, and that the resume state is there.

Under torchrun they go through its store, under srun through small files in the run folder. Ranks wait for a message
with a time limit; rank 0 does not wait.
"""

from __future__ import annotations

import os
import threading
import uuid
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

from batch_tokenizer.records import RunError
from batch_tokenizer.runtime.processes import ProcessGroup
from batch_tokenizer.runtime.work_queue import Store, poll
from batch_tokenizer.storage.atomic import replace_file

#: The name of a job's first message. Names of later ones hold the attempt's id, so that they are new.
FIRST = "attempt"


class RankChannel(ABC):
    """The channel from rank 0 to the others."""

    @abstractmethod
    def broadcast(self, name: str, message: bytes) -> None:
        """Rank 0: send a message to every rank of this job, now and later."""

    @abstractmethod
    def receive(self, name: str, timeout: float, idle: Callable[[], None]) -> bytes | None:
        """Other ranks: the message called ``name``, or None after ``timeout`` seconds. ``idle`` is called while
        waiting; an exception of its ends the wait."""

    def close(self, wait_seconds: float, idle: Callable[[], None]) -> None:
        """Rank 0: end the channel, but give ranks that are still starting so long to receive the first message."""
        return


class StoreChannel(RankChannel):
    """Through torchrun's store, which outlives restarts of the ranks.

    A restarted rank must not receive the first message of a rank 0 that is dead, and nothing in its environment tells
    the restarts apart: machines count them differently. So it stores a request under a new, unique name, and only a
    living rank 0 answers it, from a thread that looks for requests as long as the channel is open.
    """

    _LOOK_SECONDS = 0.2

    def __init__(self, processes: ProcessGroup, run_dir: Path, idle: Callable[[], None]) -> None:
        self._world_size = processes.world_size
        self._store = Store(processes, idle)
        # The answering thread's own connection: a store's client does one thing at a time.
        self._answering_store = Store(processes, idle) if processes.is_main else None
        self._prefix = f"batch_tokenizer/{zlib.crc32(os.fsencode(run_dir)):08x}"
        self._closed = threading.Event()
        self._all_received = threading.Event()
        self._thread: threading.Thread | None = None

    def broadcast(self, name: str, message: bytes) -> None:
        """Stores the message; the first one is sent to each rank that requests it."""
        if name != FIRST:
            self._store.set(f"{self._prefix}/{name}", message)
            return
        assert self._answering_store is not None
        arguments = (self._answering_store, message)
        self._thread = threading.Thread(target=self._answer, args=arguments, name="rank-channel", daemon=True)
        self._thread.start()

    def _answer(self, store: Store, message: bytes) -> None:
        answered: set[str] = set()
        try:
            while not self._closed.is_set():
                for request in (store.get(f"{self._prefix}/requests") or b"").decode().split():
                    if request not in answered:
                        store.set(f"{self._prefix}/answer/{request}", message)
                        answered.add(request)
                if store.add(self._received_key(message), 0) >= self._world_size - 1:
                    self._all_received.set()
                self._closed.wait(self._LOOK_SECONDS)
        except RunError:
            self._all_received.set()  # the store has ended: no more requests come, and the next claim of work fails

    def receive(self, name: str, timeout: float, idle: Callable[[], None]) -> bytes | None:
        """Waits for the stored message, or for the answer of the present rank 0."""
        if name != FIRST:
            return self._store.wait(f"{self._prefix}/{name}", timeout, idle)
        request = uuid.uuid4().hex
        self._store.append(f"{self._prefix}/requests", request + "\n")
        message = self._store.wait(f"{self._prefix}/answer/{request}", timeout, idle)
        if message is not None:
            self._store.add(self._received_key(message), 1)
        return message

    def _received_key(self, message: bytes) -> str:
        return f"{self._prefix}/received/{zlib.crc32(message):08x}"

    def close(self, wait_seconds: float, idle: Callable[[], None]) -> None:
        """A short run may end in rank 0 before another rank has even loaded its libraries."""
        if self._thread is None:
            return
        try:
            poll(lambda: True if self._all_received.is_set() else None, wait_seconds, idle)
        finally:
            self._closed.set()
            self._thread.join()


class FolderChannel(RankChannel):
    """Through files in the run folder, named after Slurm's job, step and restart count, which no two runs share."""

    def __init__(self, processes: ProcessGroup, folder: Path) -> None:
        self._folder = folder
        self._job = processes.job

    def _path(self, name: str) -> Path:
        return self._folder / f"slurm-{self._job}.{name}"

    def broadcast(self, name: str, message: bytes) -> None:
        """Writes the message's file."""
        replace_file(self._path(name), message)

    def receive(self, name: str, timeout: float, idle: Callable[[], None]) -> bytes | None:
        """Waits for the message's file."""

        def look() -> bytes | None:
            try:
                return self._path(name).read_bytes()
            except FileNotFoundError:
                return None

        return poll(look, timeout, idle)


def open_channel(processes: ProcessGroup, run_dir: Path, folder: Path, idle: Callable[[], None]) -> RankChannel | None:
    """The channel that the job's launcher allows, None for a process alone; ``folder`` is where files would lie."""
    if processes.world_size == 1:
        return None
    if processes.launcher == "torchrun":
        return StoreChannel(processes, run_dir, idle)
    return FolderChannel(processes, folder)
