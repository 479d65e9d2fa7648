"""What rank 0 tells the other ranks of its job, once and one way: the attempt's number, and that the resume state is
there.

Under torchrun the words go through its store, under srun through small files in the run folder. A rank asks and waits
with a time limit; rank 0 waits for nobody.
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


class Notices(ABC):
    """The channel from rank 0 to the others."""

    @abstractmethod
    def announce(self, word: bytes) -> None:
        """Rank 0: tell every rank of this job, now and later, the first word."""

    @abstractmethod
    def ask(self, timeout: float, idle: Callable[[], None]) -> bytes | None:
        """Other ranks: the first word of the rank 0 that is alive now, or None after ``timeout`` seconds."""

    @abstractmethod
    def post(self, name: str, word: bytes) -> None:
        """Rank 0: a further word. ``name`` must be new, so it holds the attempt's id."""

    @abstractmethod
    def wait(self, name: str, timeout: float, idle: Callable[[], None]) -> bytes | None:
        """Other ranks: the word posted under ``name``, or None after ``timeout`` seconds."""

    @abstractmethod
    def close(self, wait_seconds: float, idle: Callable[[], None]) -> None:
        """Rank 0: stop answering, but give ranks that are still starting so long to ask."""


class NoNotices(Notices):
    """A process alone has nobody to tell."""

    def announce(self, word: bytes) -> None:
        """Nobody listens."""

    def ask(self, timeout: float, idle: Callable[[], None]) -> bytes | None:
        """Nobody answers."""
        return None

    def post(self, name: str, word: bytes) -> None:
        """Nobody listens."""

    def wait(self, name: str, timeout: float, idle: Callable[[], None]) -> bytes | None:
        """Nobody answers."""
        return None

    def close(self, wait_seconds: float, idle: Callable[[], None]) -> None:
        """Nothing to stop."""


class StoreNotices(Notices):
    """Through torchrun's store, which outlives restarts of the ranks.

    A restarted rank must not take the word of a rank 0 that is dead, and nothing in its environment tells the restarts
    apart: machines count them differently. So a rank leaves a question with a name that nobody used before, and only a
    living rank 0 answers it, from a thread that looks for questions as long as the run folder is open.
    """

    _LOOK_SECONDS = 0.2

    def __init__(self, processes: ProcessGroup, run_dir: Path) -> None:
        self._processes = processes
        self._store = Store(processes)
        self._prefix = f"batch_tokenizer/{zlib.crc32(os.fsencode(run_dir)):08x}"
        self._closed = threading.Event()
        self._all_heard = threading.Event()
        self._thread: threading.Thread | None = None

    def _heard_key(self, word: bytes) -> str:
        return f"{self._prefix}/heard/{zlib.crc32(word):08x}"

    def announce(self, word: bytes) -> None:
        """See ``Notices``."""
        store = Store(self._processes)  # its own connection: a store's client does one thing at a time
        self._thread = threading.Thread(target=self._answer, args=(store, word), name="notices", daemon=True)
        self._thread.start()

    def _answer(self, store: Store, word: bytes) -> None:
        answered: set[str] = set()
        try:
            while not self._closed.is_set():
                for question in (store.get(f"{self._prefix}/questions") or b"").decode().split():
                    if question not in answered:
                        store.set(f"{self._prefix}/answer/{question}", word)
                        answered.add(question)
                if store.add(self._heard_key(word), 0) >= self._processes.world_size - 1:
                    self._all_heard.set()
                self._closed.wait(self._LOOK_SECONDS)
        except RunError:
            self._all_heard.set()  # the store is gone: nobody can ask any more, and the next claim of work says so

    def ask(self, timeout: float, idle: Callable[[], None]) -> bytes | None:
        """See ``Notices``."""
        question = uuid.uuid4().hex
        self._store.append(f"{self._prefix}/questions", question + "\n")
        word = self._store.wait(f"{self._prefix}/answer/{question}", timeout, idle)
        if word is not None:
            self._store.add(self._heard_key(word), 1)
        return word

    def post(self, name: str, word: bytes) -> None:
        """See ``Notices``."""
        self._store.set(f"{self._prefix}/{name}", word)

    def wait(self, name: str, timeout: float, idle: Callable[[], None]) -> bytes | None:
        """See ``Notices``."""
        return self._store.wait(f"{self._prefix}/{name}", timeout, idle)

    def close(self, wait_seconds: float, idle: Callable[[], None]) -> None:
        """See ``Notices``. A short run may end in rank 0 before another rank has even loaded its libraries."""
        if self._thread is None:
            return
        try:
            poll(lambda: True if self._all_heard.is_set() else None, wait_seconds, idle)
        finally:
            self._closed.set()
            self._thread.join()


class FolderNotices(Notices):
    """Through files in the run folder, named after Slurm's job, step and restart count, which no two runs share."""

    def __init__(self, processes: ProcessGroup, folder: Path) -> None:
        self._folder = folder
        self._job = processes.job

    def _path(self, name: str) -> Path:
        return self._folder / f"slurm-{self._job}.{name}"

    def announce(self, word: bytes) -> None:
        """See ``Notices``."""
        self.post("attempt", word)

    def ask(self, timeout: float, idle: Callable[[], None]) -> bytes | None:
        """See ``Notices``."""
        return self.wait("attempt", timeout, idle)

    def post(self, name: str, word: bytes) -> None:
        """See ``Notices``."""
        path = self._path(name)
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        aside.write_bytes(word)
        aside.replace(path)

    def wait(self, name: str, timeout: float, idle: Callable[[], None]) -> bytes | None:
        """See ``Notices``."""

        def look() -> bytes | None:
            try:
                return self._path(name).read_bytes()
            except FileNotFoundError:
                return None

        return poll(look, timeout, idle)

    def close(self, wait_seconds: float, idle: Callable[[], None]) -> None:
        """Nothing to stop."""


def open_notices(processes: ProcessGroup, run_dir: Path, folder: Path) -> Notices:
    """The channel that the job's launcher allows; ``folder`` is where files would lie."""
    if processes.world_size == 1:
        return NoNotices()
    if processes.launcher == "torchrun":
        return StoreNotices(processes, run_dir)
    return FolderNotices(processes, folder)
