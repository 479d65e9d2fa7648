"""Being asked to stop: SIGTERM (Slurm, torchrun), SIGUSR1 (Slurm's warning before the time limit), SIGINT (Ctrl-C).

A signal only leaves a note, which the rank loop reads between batches; what is in flight is finished. A second Ctrl-C
aborts at once, by KeyboardInterrupt.
"""

from __future__ import annotations

import signal
import time
from types import FrameType, TracebackType
from typing import Any

#: Ctrl-C under torchrun reaches a rank twice, from the terminal and from the agent. SIGINTs this close, in seconds,
#: are one.
_SAME_INTERRUPT_SECONDS = 2.0


class Stopped(Exception):
    """A stop signal ended what the process was doing.

    Attributes:
        signal: the first one that came.
    """

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(number.name)
        self.signal = number


class StopRequest:
    """Handlers for the stop signals while the context is open; the handlers before it come back after it.

    Must be opened in the main thread. Reading it is safe from any thread.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self) -> None:
        self._first: tuple[signal.Signals, float] | None = None
        self._first_interrupt: float | None = None
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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first = (signal.Signals(number), now)
        if number == signal.SIGINT:
            if self._first_interrupt is None:
                self._first_interrupt = now
            elif now - self._first_interrupt > _SAME_INTERRUPT_SECONDS:
                raise KeyboardInterrupt
