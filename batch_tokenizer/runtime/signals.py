"""Being asked to stop: SIGTERM (Slurm, torchrun), SIGUSR1 (Slurm's warning before the time limit), SIGINT (Ctrl-C).

The first signal prints one line and is recorded; the rank loop checks for it between batches and finishes what is in
flight. A second signal aborts at once, by ``Aborted``.
"""

from __future__ import annotations

import os
import signal
import time
from types import FrameType
from typing import Any

#: Ctrl-C under torchrun reaches a rank twice, from the terminal and from the agent, and a batch system may signal both.
#: Signals that come within so many seconds of the first are one.
_SAME_REQUEST_SECONDS = 2.0

_STDERR = 2


class Stopped(Exception):
    """A stop signal ended what the process was doing.

    Attributes:
        signal: the first one that came.
    """

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(number.name)
        self.signal = number


class Aborted(KeyboardInterrupt):
    """A second stop signal: whatever the process is doing ends here.

    Attributes:
        signal: which one.
    """

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(number.name)
        self.signal = number


class StopRequest:
    """Handlers for the stop signals while the context is open; the handlers before it come back after it.

    Must be opened in the main thread. Reading it is safe from any thread.

    Args:
        announcement: what to print when the first signal comes; nothing when None.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self, announcement: str | None = None) -> None:
        self._announcement = announcement
        self._first: tuple[signal.Signals, float] | None = None
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether a stop signal has come."""
        return self._first is not None

    @property
    def seconds_since(self) -> float:
        """Seconds since the first stop signal; 0 before it."""
        return time.monotonic() - self._first[1] if self._first else 0.0

    def check(self) -> None:
        """What to call while waiting for something else.

        Raises:
            Stopped: a stop signal has come.
        """
        if self._first is not None:
            raise Stopped(self._first[0])

    def __enter__(self) -> StopRequest:
        self._previous = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        received = signal.Signals(number)
        if self._first is None:
            self._first = received, time.monotonic()
            if self._announcement is not None:
                line = f"{time.strftime('%H:%M:%S')} WARNING {received.name}: {self._announcement}\n"
                # Not by the log: its stream may be in the middle of a write, which this handler interrupts.
                os.write(_STDERR, line.encode())
        elif self.seconds_since > _SAME_REQUEST_SECONDS:
            raise Aborted(received)
