"""Being asked to stop: what is in flight is finished, the exit status says which signal it was, the rest is resumed."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping

import pytest

from tests.e2e.conftest import Open
from tests.support.command import run_here
from tests.support.runs import ROOT, Run, after_batches


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1], ids=lambda number: number.name)
def test_a_process_alone(
    open_workspace: Open,
    undisturbed: Mapping[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    number: signal.Signals,
) -> None:
    """This one, which the signal reaches in the middle of the rows."""
    workspace = open_workspace(64)
    after_batches(monkeypatch, 3, lambda: os.kill(os.getpid(), number))
    run = run_here(*workspace.arguments(), cwd=workspace.folder)
    assert run.returncode == 128 + number
    done = workspace.rows_done()
    announcement = f"{number.name}: finishing the batches in progress, at most 20 s (--grace); a second signal stops"
    assert capfd.readouterr().err.count(announcement) == 1
    assert run.stderr.splitlines()[-1].endswith(f"stopped by {number.name}; start the same command again to go on")
    assert "Traceback" not in run.stderr
    assert 24 <= done < 64
    # Nothing was cut off: every output that exists is in the ledger, and whole.
    outputs = workspace.outputs()
    assert len(outputs) == 2 * done
    assert all(undisturbed[name] == content for name, content in outputs.items())
    if number == signal.SIGINT:
        assert f"resuming: {done} rows are done, 0 failed" in workspace.finish_here()
        workspace.check_complete(undisturbed)


def test_a_second_signal_stops_at_once(open_workspace: Open, undisturbed: Mapping[str, bytes]) -> None:
    """Rows wait for a batch of 1,000 and hours of grace, which the second signal cuts short."""
    workspace = open_workspace(100)
    (workspace.folder / "sitecustomize.py").write_text(
        "import time\n"
        "import batch_tokenizer.pipeline.rank_loop as rank_loop\n"
        "rank_loop.RankLoop._finish_batch = lambda self: time.sleep(3600) if self.stop.requested else None\n"
    )
    path = f"{workspace.folder}:{ROOT}"
    with Run.start(workspace.command(1, "--grace", 3600), workspace.folder, {"PYTHONPATH": path}) as run:
        workspace.await_rows(20, run)
        run.signal(signal.SIGUSR1)
        run.wait_until(lambda: "a second signal stops at once" in run.output(), "the first signal's line")
        time.sleep(2.5)  # signals that are closer count as one
        run.signal(signal.SIGTERM)
        assert run.wait() == 128 + signal.SIGTERM
    assert "interrupted; start the same command again to resume" in run.output()
    assert "Traceback" not in run.output()
    (workspace.folder / "sitecustomize.py").unlink()
    workspace.finish_here()
    workspace.check_complete(undisturbed, redone=True)


def test_before_the_run_has_begun(open_workspace: Open) -> None:
    """The model is still being loaded when the signal comes."""
    workspace = open_workspace(200)
    with workspace.start(1) as run:
        run.wait_until(lambda: "model " in run.output(), "a line about the model")
        run.signal(signal.SIGINT)
        assert run.wait() == 128 + signal.SIGINT
    assert "Traceback" not in run.output()
    assert workspace.rows_done() < 200


def test_torchrun_passes_it_on(open_workspace: Open, undisturbed: Mapping[str, bytes]) -> None:
    """Torchrun itself leaves with its own status; its ranks end in good order."""
    workspace = open_workspace(300)
    handled = "--signals_to_handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
    with workspace.start(2, launcher=[handled]) as run:
        workspace.await_rows(40, run)
        run.signal(signal.SIGUSR1)
        assert run.wait() != 0
        done = workspace.rows_done()
    assert run.output().count("stopped by SIGUSR1; start the same command again to go on") == 2
    assert "forcefully exiting" not in run.output()
    assert 40 <= done < 300
    outputs = workspace.outputs()
    assert len(outputs) == 2 * done
    assert all(undisturbed[name] == content for name, content in outputs.items())
