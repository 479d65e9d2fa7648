"""Runs that are killed, as a whole or process by process, and what the next start makes of what they left."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import psutil

from tests.e2e.conftest import Open
from tests.support.runs import HANG_SECONDS, Killer, Run, lingering


def test_processes_killed_one_by_one_then_all_then_resumed_by_three(
    open_workspace: Open, undisturbed: Mapping[str, bytes]
) -> None:
    """Loader processes are replaced and torchrun restarts the rank; what is left after a kill of the whole tree is
    shared by the ranks of a new command. ``tests/measure/soak.py`` kills a hundred."""
    workspace = open_workspace(200)
    ledger = workspace.run_dir / "ledger"
    with workspace.start(1, "--num_workers", 1, launcher=["--max_restarts=9"]) as run:
        killer = Killer(workspace, run, seed=0)
        for victim in ("loader", "server", "rank"):
            killer.kill(victim)
        restarted = ledger / "000002-00000.jsonl"
        run.wait_until(lambda: restarted.exists() and restarted.stat().st_size > 0, "rows of the restarted rank")
        run.wait_until(lambda: bool(run.loaders()), "its loader process")
        assert run.kill() >= 4  # the agent, the rank, its fork server and its loader process
    done = Counter(str(entry["key"]) for entry in workspace.ledger())
    assert len(done) < 200
    assert not list(lingering(workspace.folder))
    run = workspace.finish(3)
    assert "resuming: " in run.output()
    workspace.check_complete(undisturbed, redone=True)
    again = Counter(str(entry["key"]) for entry in workspace.ledger()) - done
    assert again == Counter(set(workspace.corpus.keys) - done.keys())
    assert sorted(path.stem for path in ledger.glob("000003-*")) == ["000003-00000", "000003-00001", "000003-00002"]


def kill_agent(run: Run) -> None:
    """Kill torchrun's agent alone, and wait until its ranks have ended."""
    others = [process for process in run.tree() if process.pid != run.process.pid]
    run.process.kill()
    _, alive = psutil.wait_procs(others, HANG_SECONDS)
    assert not alive


def test_ranks_that_load_libraries_end_with_their_agent(open_workspace: Open) -> None:
    workspace = open_workspace(20)
    with workspace.start(2) as run:
        run.wait_until(lambda: len(run.ranks()) == 2, "two ranks")
        kill_agent(run)


def test_ranks_at_work_end_with_their_agent(open_workspace: Open, undisturbed: Mapping[str, bytes]) -> None:
    """They leave nothing half done, and a new command goes on."""
    workspace = open_workspace(200)
    with workspace.start(2) as run:
        workspace.await_rows(20, run)
        kill_agent(run)
    assert workspace.rows_done() < 200
    assert workspace.outputs().items() <= undisturbed.items()
    workspace.finish_here()
    workspace.check_complete(undisturbed, redone=True)
