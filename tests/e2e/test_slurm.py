"""The scripts in ``launch/`` on a real Slurm of two nodes: robbed of a node, warned, requeued, and as an array."""

from __future__ import annotations

import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping

import pytest

from tests.e2e.conftest import NUM_ROWS, Open
from tests.e2e.slurm.cluster import Cluster
from tests.support.runs import HANG_SECONDS, ROOT, Workspace, run_environment

#: node0 and node1 are names that only Slurm knows. No restarts by torchrun, so that a rank that fails is seen here.
ENVIRONMENT = {"VENV": sys.prefix, "MASTER_ADDR": "localhost", "MAX_RESTARTS": "0"}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    if (reason := Cluster.why_not()) is not None:
        pytest.skip(reason)
    with Cluster() as running:
        yield running


@pytest.fixture(autouse=True)
def _idle_nodes(cluster: Cluster) -> Iterator[None]:
    yield
    cluster.command("scancel", "--user=root")
    cluster.command("scontrol", "update", "NodeName=node[0-1]", "State=RESUME")
    wait_until(cluster.is_idle, cluster.log)


def wait_until(condition: Callable[[], bool], log: Callable[[], str]) -> None:
    deadline = time.monotonic() + HANG_SECONDS
    while not condition():
        assert time.monotonic() < deadline, log()
        time.sleep(0.05)


class Job:
    """``launch/slurm.sbatch`` submitted for a workspace."""

    def __init__(self, cluster: Cluster, workspace: Workspace, *flags: str) -> None:
        self.cluster = cluster
        self.workspace = workspace
        script = str(ROOT / "launch" / "slurm.sbatch")
        words = ("sbatch", "--parsable", "--output=log/slurm.txt", *flags, script, *workspace.arguments())
        self.id = cluster.command(*words, environment=run_environment() | ENVIRONMENT, cwd=workspace.folder)
        assert self.id.isdecimal(), self.id

    def output(self) -> str:
        path = self.workspace.folder / "log" / "slurm.txt"
        return path.read_text(errors="replace") if path.exists() else ""

    def await_rows(self, count: int) -> None:
        wait_until(lambda: self.workspace.rows_done() >= count, self.output)

    def await_both_ranks(self, attempt: int) -> None:
        """Each has done a row."""
        ledgers = [self.workspace.run_dir / "ledger" / f"{attempt:06d}-{rank:05d}.jsonl" for rank in (0, 1)]
        wait_until(lambda: all(path.exists() and path.stat().st_size for path in ledgers), self.output)

    def finish(self, restarts: int) -> None:
        ended = self.cluster.wait(self.id)
        assert ended == "COMPLETED", f"{self.output()}\n{self.cluster.job(self.id)}\n{self.cluster.log()}"
        assert self.cluster.job(self.id)["Restarts"] == str(restarts), self.output()


def test_a_node_goes_down_then_warned_before_the_time_limit(
    cluster: Cluster, open_workspace: Open, undisturbed: Mapping[str, bytes]
) -> None:
    """SIGUSR1 to the batch script alone is what ``--signal=B:USR1`` sends, at a moment that suits the test."""
    workspace = open_workspace(NUM_ROWS)
    job = Job(cluster, workspace, "--nodes=2")
    job.await_both_ranks(attempt=1)
    assert cluster.command("scontrol", "update", "NodeName=node1", "State=DOWN", "Reason=test") == ""
    wait_until(lambda: cluster.job(job.id)["JobState"] == "PENDING", cluster.log)
    # It may go on with fewer nodes.
    assert cluster.command("scontrol", "update", f"JobId={job.id}", "NumNodes=1", "NumTasks=1") == ""
    cluster.start_now(job.id)
    before = workspace.rows_done()
    job.await_rows(before + 40)
    assert cluster.command("scancel", "--batch", "--signal=USR1", job.id) == ""
    cluster.start_now(job.id)
    done = Counter(str(entry["key"]) for entry in workspace.ledger())
    assert before + 40 <= len(done) < NUM_ROWS
    assert "warned by Slurm" in job.output()
    assert "stopped by SIGUSR1; start the same command again to go on" in job.output()
    assert workspace.outputs().items() <= undisturbed.items()
    job.finish(restarts=2)
    assert cluster.job(job.id)["NodeList"] == "node0"
    assert f"resuming: {len(done)} rows are done, 0 failed" in job.output()
    workspace.check_complete(undisturbed, redone=True)
    again = Counter(str(entry["key"]) for entry in workspace.ledger()) - done
    assert again == Counter(set(workspace.corpus.keys) - done.keys())  # nothing was done twice after the warning


def test_array_then_verify(cluster: Cluster, open_workspace: Open, undisturbed: Mapping[str, bytes]) -> None:
    workspace = open_workspace(100)
    words = ["bash", str(ROOT / "launch" / "slurm_array.sbatch"), "--array=0-1", "--output=log/%A-%a.txt", "--"]
    said = cluster.command(
        *words, *workspace.arguments(), environment=run_environment() | ENVIRONMENT, cwd=workspace.folder
    )
    array, verify = (word.split()[-1] for word in said.split(","))
    assert cluster.wait(verify) == "COMPLETED", said
    proof = workspace.folder / f"batch_tokenizer-{verify}-verify.log"
    assert "100" in proof.read_text()
    proof.unlink()
    workspace.check_complete(undisturbed)
    for task in (0, 1):
        output = (workspace.folder / "log" / f"{array}-{task}.txt").read_text()
        assert re.search(r"100 rows, \d\d to do", output), output


def test_plain_srun(cluster: Cluster, open_workspace: Open, undisturbed: Mapping[str, bytes]) -> None:
    workspace = open_workspace(100)
    words = ["srun", "--ntasks=2", sys.executable, "-m", "batch_tokenizer", *workspace.arguments()]
    said = cluster.command(*words, environment=run_environment(), cwd=workspace.folder)
    assert "100 rows done, 0 failed" in said
    workspace.check_complete(undisturbed)
    assert len(list((workspace.run_dir / "ledger").iterdir())) == 2
