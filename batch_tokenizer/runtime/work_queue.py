"""Which process does which unit of work. No process waits for another: there are no collectives here.

Under torchrun, units are handed out one at a time by a counter in torchrun's own store, so a slow process takes fewer
and a dead one none. Processes of plain srun share no store, and a counter in a file needs locks that parallel file
systems often lack, so there each process takes every world_size-th unit: units are sorted by length, which makes the
shares about equal, but a slow process is not relieved. A process alone just counts.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from datetime import timedelta
from itertools import count
from typing import Any, TypeVar

from batch_tokenizer.records import RunError, first_line
from batch_tokenizer.runtime.processes import ProcessGroup

Result = TypeVar("Result")

#: Seconds for which a store may be out of reach at the start, and for which it may refuse connections: torchrun starts
#: its store before its processes, so one that refuses has ended.
_UNREACHABLE_SECONDS, _REFUSED_SECONDS = 60.0, 5.0


def no_idle() -> None:
    """What to call while waiting where nothing ends the wait."""


class Store:
    """A client of torchrun's store. Methods may be called from several threads.

    Raises:
        RunError: from any method and at the start, with exit code 1: the store cannot be reached.
    """

    def __init__(self, processes: ProcessGroup, idle: Callable[[], None] = no_idle) -> None:
        # Only torchrun's processes need torch here; commands that read a run folder start without it.
        from torch.distributed import TCPStore

        if processes.store_address is None:
            raise ValueError(f"launcher {processes.launcher} keeps no store")
        host, port = processes.store_address
        self._address = f"{host}:{port}"
        self._await_server(host, port, idle)
        # Any: torch's own type stubs lack ``append`` and take no bytes.
        self._client: Any = self._call(
            lambda: TCPStore(host, port, is_master=False, timeout=timedelta(minutes=1), wait_for_workers=False)
        )

    def _await_server(self, host: str, port: int, idle: Callable[[], None]) -> None:
        """Returns when the store accepts connections. While torch's client waits for that, no signal is handled, and
        what it prints of a failure is long."""
        began = time.monotonic()
        deadline = began + _UNREACHABLE_SECONDS
        while True:
            try:
                socket.create_connection((host, port), timeout=1.0).close()
                return
            except OSError as error:
                if isinstance(error, ConnectionRefusedError):
                    deadline = min(deadline, began + _REFUSED_SECONDS)
                if time.monotonic() >= deadline:
                    raise self._failure(error) from error
            idle()
            time.sleep(0.2)

    def _call(self, operation: Callable[[], Result]) -> Result:
        try:
            return operation()
        except RuntimeError as error:  # what torch raises for every failure of its store
            raise self._failure(error) from error

    def _failure(self, error: Exception) -> RunError:
        return RunError(
            f"torchrun's store at {self._address} cannot be reached ({first_line(error)}): start the same command "
            "again to resume",
            exit_code=1,
        )

    def add(self, key: str, amount: int) -> int:
        """Add to a counter that starts at 0, and return its new value; atomic over all processes."""
        return int(self._call(lambda: self._client.add(key, amount)))

    def append(self, key: str, text: str) -> None:
        """Append to a value; atomic over all processes."""
        self._call(lambda: self._client.append(key, text))

    def set(self, key: str, value: bytes) -> None:
        """Set a value."""
        self._call(lambda: self._client.set(key, value))

    def get(self, key: str) -> bytes | None:
        """The value, or None where there is none yet."""
        if not self._call(lambda: self._client.check([key])):
            return None
        return bytes(self._call(lambda: self._client.get(key)))

    def wait(self, key: str, timeout: float, idle: Callable[[], None]) -> bytes | None:
        """The value once it is there, or None after ``timeout`` seconds. ``idle`` is called while waiting."""
        return poll(lambda: self.get(key), timeout, idle)


def poll(look: Callable[[], Result | None], timeout: float, idle: Callable[[], None]) -> Result | None:
    """What ``look`` returns as soon as that is not None, or None after ``timeout`` seconds of monotonic time.

    Looks often at first and every second later. ``idle`` is called between looks; an exception of its ends the wait.
    """
    deadline = time.monotonic() + timeout
    pause = 0.02
    while (found := look()) is None and time.monotonic() < deadline:
        idle()
        time.sleep(pause)
        pause = min(1.0, pause * 1.5)
    return found


class WorkQueue:
    """The units 0 .. num_units - 1 of one attempt, each given to exactly one process of the job."""

    def __init__(self, num_units: int, next_unit: Callable[[], int]) -> None:
        """``next_unit`` yields rising numbers that no other process gets. Use ``WorkQueue.open``."""
        self._num_units = num_units
        self._next_unit = next_unit
        self._exhausted = False

    @classmethod
    def open(
        cls, num_units: int, processes: ProcessGroup, attempt_id: str, idle: Callable[[], None] = no_idle
    ) -> WorkQueue:
        """The queue that the job's launcher allows.

        Args:
            attempt_id: ``RunFolder.attempt_id``, so that every attempt starts to count from 0.
            idle: called while waiting for the launcher's store; an exception of its ends the wait.

        Raises:
            RunError: the launcher's store cannot be reached (exit code 1).
        """
        if processes.world_size == 1:
            return cls(num_units, count().__next__)
        if processes.launcher == "torchrun":
            store = Store(processes, idle)
            return cls(num_units, lambda: store.add(f"batch_tokenizer/{attempt_id}/claimed", 1) - 1)
        return cls(num_units, count(processes.rank, processes.world_size).__next__)

    def claim(self) -> int | None:
        """The next unit for this process, or None when all are claimed.

        Raises:
            RunError: the launcher's store cannot be reached (exit code 1).
        """
        if self._exhausted:
            return None
        unit = self._next_unit()
        if unit < self._num_units:
            return unit
        # Torchrun may end its store while other processes still finish: do not ask again.
        self._exhausted = True
        return None
