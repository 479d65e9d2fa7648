"""Ranks that stand still, and clocks that jump."""

from __future__ import annotations

import itertools
import signal
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.e2e.conftest import NUM_ROWS, Open
from tests.support.runs import Run


def test_the_others_take_what_a_suspended_rank_has_not_claimed(
    open_workspace: Open, undisturbed: Mapping[str, bytes]
) -> None:
    """A rank that is infinitely slow keeps one unit and what it has loaded; nobody waits for it before the end.
    ``tests/measure/straggler.py`` measures the same with a rank that is ten times slower."""
    workspace = open_workspace(NUM_ROWS)
    unit = NUM_ROWS // (2 * 8)
    held = unit + 3 * 8  # being loaded, in an open batch, being computed
    with workspace.start(2) as run:
        workspace.await_rows(40, run)
        run.wait_until(lambda: len(list((workspace.run_dir / "ledger").iterdir())) == 2, "both ranks at work")
        (slow,) = (rank for rank in run.ranks() if rank.environ()["RANK"] == "1")
        slow.send_signal(signal.SIGSTOP)
        workspace.await_rows(NUM_ROWS - held, run)
        assert run.process.poll() is None
        slow.send_signal(signal.SIGCONT)
        assert run.wait() == 0
    workspace.check_complete(undisturbed)


def test_a_clock_that_jumps(
    open_workspace: Open, undisturbed: Mapping[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every look at the clock of the day finds it hours away from the look before, forwards or back."""
    (tmp_path / "sitecustomize.py").write_text(
        "import itertools, time\n"
        "real, looks = time.time, itertools.count()\n"
        "time.time = lambda: real() + (-1) ** next(looks) * 40000.0\n"
    )
    workspace = open_workspace(100)
    path = {"PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[2]}"}
    words = ("--row_timeout", 30, "--grace", 60)
    with Run.start(workspace.command(1, *words, "--num_workers", 1), workspace.folder, path) as run:
        workspace.await_rows(10, run)
        run.signal(signal.SIGTERM)
        assert run.wait() == 128 + signal.SIGTERM
    real, looks = time.time, itertools.count()
    with monkeypatch.context() as patched:
        patched.setattr(time, "time", lambda: real() + (-1) ** next(looks) * 40000.0)
        workspace.finish_here(*words)
    workspace.check_complete(undisturbed)
