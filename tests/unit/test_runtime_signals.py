"""The first stop signal prints a line and leaves a note; a later one aborts."""

from __future__ import annotations

import os
import signal
import time

import pytest

from batch_tokenizer.runtime import signals
from batch_tokenizer.runtime.signals import Aborted, Stopped, StopRequest


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


def test_signals_from_terminal_and_agent_are_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    with StopRequest() as stop:
        for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert stop.requested


@pytest.mark.parametrize("number", StopRequest.SIGNALS)
def test_a_later_signal_aborts(monkeypatch: pytest.MonkeyPatch, number: signal.Signals) -> None:
    monkeypatch.setattr(signals, "_SAME_REQUEST_SECONDS", 0.0)
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        with pytest.raises(Aborted, match=number.name) as raised:
            os.kill(os.getpid(), number)
        assert raised.value.signal == number
        with pytest.raises(Stopped, match="SIGUSR1"):
            stop.check()


def test_the_first_signal_says_at_once_what_it_waits_for(capfd: pytest.CaptureFixture[str]) -> None:
    with StopRequest("finishing, at most 20 s"):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
    (line,) = capfd.readouterr().err.splitlines()
    assert line.endswith("SIGTERM: finishing, at most 20 s")
