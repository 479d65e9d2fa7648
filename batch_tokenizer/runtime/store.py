"""The key-value store that torchrun keeps for its processes, as far as a run needs it, with failures in one line.

It lives in torchrun's own process, not in a rank, so it outlives any rank. Waiting is polling, so that signals are
handled meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

from batch_tokenizer.records import RunError
from batch_tokenizer.runtime.processes import ProcessGroup

Result = TypeVar("Result")


class Store:
    """A client of torchrun's store. Methods may be called from several threads.

    Raises:
        RunError: from any method and at the start, with exit code 1: the store is gone.
    """

    def __init__(self, processes: ProcessGroup, *, timeout: float = 60.0) -> None:
        # Only torchrun's processes need torch here; commands that read a run folder start without it.
        from torch.distributed import TCPStore

        if processes.store_address is None:
            raise ValueError(f"launcher {processes.launcher} keeps no store")
        host, port = processes.store_address
        self._address = f"{host}:{port}"
        # Any: torch's own type stubs lack ``append`` and take no bytes.
        self._client: Any = self._call(
            lambda: TCPStore(host, port, is_master=False, timeout=timedelta(seconds=timeout), wait_for_workers=False)
        )

    def _call(self, operation: Callable[[], Result]) -> Result:
        try:
            return operation()
        except RuntimeError as error:  # what torch raises for every failure of its store
            first_line = str(error).strip().split("\n")[0]
            raise RunError(
                f"torchrun's store at {self._address} is gone ({first_line}): start the same command again to resume",
                exit_code=1,
            ) from error

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
