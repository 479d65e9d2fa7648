"""Stop signals leave a note; a second, later Ctrl-C aborts."""

from __future__ import annotations

import os
import signal
import time

import pytest

from batch_tokenizer.runtime import signals
from batch_tokenizer.runtime.signals import Stopped, StopRequest


@pytest.mark.parametrize("number", StopRequest.SIGNALS)
def test_the_first_signal_is_noted(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert not stop.requested
        assert stop.seconds_since == 0.0
        os.kill(os.getpid(), number)
        time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
        with pytest.raises(Stopped, match=number.name):
            stop.check()
        assert stop.seconds_since >= 0.01
    assert signal.getsignal(number) == before


def test_ctrl_c_from_terminal_and_agent_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        monkeypatch.setattr(signals, "_SAME_INTERRUPT_SECONDS", 0.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_after_sigterm_is_the_first_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "_SAME_INTERRUPT_SECONDS", 0.0)
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(Stopped, match="SIGTERM"):
            stop.check()
