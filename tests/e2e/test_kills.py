"""Runs that are killed, as a whole or process by process, and what the next start makes of what they left."""

from __future__ import annotations

import time
from collections.abc import Mapping

import psutil
import pytest

from tests.e2e.conftest import Open
from tests.support.runs import HANG_SECONDS, Killer, lingering


def test_all_processes_killed_twice_then_resumed_by_three(
    open_workspace: Open, undisturbed: Mapping[str, bytes]
) -> None:
    """First two ranks with their loader processes, then a process alone."""
    workspace = open_workspace(200)
    for num_processes, rows, fewest in ((2, 40, 5), (1, 97, 1)):  # the agent, two ranks, their loaders
        with workspace.start(num_processes, "--num_workers", num_processes - 1) as run:
            workspace.await_rows(rows, run)
            assert run.kill() >= fewest
        assert workspace.rows_done() < 200
        assert not list(lingering(workspace.folder))
    run = workspace.finish(3)
    assert "resuming: " in run.output()
    workspace.check_complete(undisturbed, redone=True)
    attempts = sorted(path.name[:6] for path in (workspace.run_dir / "ledger").iterdir())
    assert set(attempts) == {"000001", "000002", "000003"}


def test_processes_killed_one_by_one(open_workspace: Open, undisturbed: Mapping[str, bytes]) -> None:
    """Loader processes are replaced, torchrun restarts ranks, and a new command replaces a killed agent, which may
    still have ranks that finish what they hold. ``tests/measure/soak.py`` kills a hundred."""
    workspace = open_workspace(300)
    for attempt, victims in enumerate((("loader", "server", "loader", "agent"), ("loader", "rank", "loader"))):
        with workspace.start(2, "--num_workers", 1, launcher=["--max_restarts=9"]) as run:
            killer = Killer(workspace, run, seed=attempt)
            for victim in victims:
                killer.kill(victim)
            if victims[-1] != "agent":
                assert run.wait() == 0, run.output()
    workspace.check_complete(undisturbed, redone=True)
    psutil.wait_procs(list(lingering(workspace.folder)), HANG_SECONDS)
    assert not list(lingering(workspace.folder))


@pytest.mark.parametrize("seconds", [0.0, 2.0])
def test_ranks_end_with_their_agent(open_workspace: Open, seconds: float) -> None:
    """However early torchrun's agent is killed: while its ranks load libraries, or meet at its store."""
    workspace = open_workspace(300)
    with workspace.start(2, "--num_workers", 1) as run:
        run.wait_until(lambda: len(run.ranks()) == 2, "two ranks")
        time.sleep(seconds)
        others = [process for process in run.tree() if process.pid != run.process.pid]
        run.process.kill()
        _, alive = psutil.wait_procs(others, HANG_SECONDS)
        assert not alive
