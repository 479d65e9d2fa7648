"""Units are claimed exactly once, under every launcher. torchrun's agent here is the real one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from batch_tokenizer.records import RunError
from batch_tokenizer.runtime import work_queue
from batch_tokenizer.runtime.processes import Launcher, ProcessGroup
from batch_tokenizer.runtime.work_queue import Store, WorkQueue
from tests.support.runs import HANG_SECONDS


def group(launcher: Launcher, rank: int, world_size: int) -> ProcessGroup:
    return ProcessGroup(rank, world_size, rank, launcher, "here", 1, "job", ("127.0.0.1", 9))


def claims(queue: WorkQueue) -> list[int]:
    return list(iter(queue.claim, None))


@pytest.mark.parametrize("world_size", [1, 3])
def test_srun_divides_beforehand(world_size: int) -> None:
    shares = [claims(WorkQueue.open(100, group("srun", rank, world_size), "a")) for rank in range(world_size)]
    assert sorted(unit for share in shares for unit in share) == list(range(100))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_process_alone_takes_all_in_order() -> None:
    queue = WorkQueue.open(50, group("single", 0, 1), "a")
    assert claims(queue) == list(range(50))
    assert queue.claim() is None


def test_a_store_that_is_gone_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work_queue, "_REFUSED_SECONDS", 0.3)
    processes = group("torchrun", 0, 2)
    with pytest.raises(RunError) as raised:
        Store(processes)
    assert raised.value.exit_code == 1
    assert "127.0.0.1:9 cannot be reached" in str(raised.value)
    assert "\n" not in str(raised.value)


PROGRAM = """
import json, os, sys, time
import numpy as np
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from batch_tokenizer.runtime.parent import stop_with_parent
from batch_tokenizer.runtime.processes import ProcessGroup
from batch_tokenizer.runtime.run_folder import RunFolder
from batch_tokenizer.runtime.work_queue import WorkQueue

def rank(out):
    processes = ProcessGroup.from_environment()
    stop_with_parent()
    with RunFolder.open(out + "/run", {}, processes=processes, timeout=600) as folder:
        if processes.is_main:
            folder.share_status(np.full(3, folder.attempt, np.uint8))
            status = [folder.attempt] * 3
        else:
            status = folder.await_status(timeout=600).tolist()
        queue = WorkQueue.open(1000, processes, folder.attempt_id)
        claimed = []
        while (unit := queue.claim()) is not None:
            claimed.append(unit)
            # In the first attempt rank 0 dies in the middle of the work.
            if folder.attempt == 1:
                if processes.is_main:
                    os.kill(os.getpid(), 9)
                time.sleep(60)
            time.sleep(0.0005)
        with open(f"{out}/{folder.attempt}-{processes.rank}.json", "w") as stream:
            json.dump({"claimed": claimed, "status": status}, stream)

config = LaunchConfig(
    min_nodes=1, max_nodes=1, nproc_per_node=2, run_id="job", rdzv_backend="c10d", rdzv_endpoint="localhost:0",
    max_restarts=1, monitor_interval=0.1, start_method="fork",
)
elastic_launch(config, rank)(sys.argv[1])
"""


def test_torchrun_claims_once_and_restarts_as_a_new_attempt(tmp_path: Path) -> None:
    """Its agent, with ranks that are forked, so that torch is imported once and not five times."""
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=HANG_SECONDS, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    parts = [json.loads((tmp_path / f"2-{rank}.json").read_text()) for rank in range(2)]
    assert np.array_equal(np.sort(np.concatenate([part["claimed"] for part in parts])), np.arange(1000))
    assert [part["status"] for part in parts] == [[2, 2, 2]] * 2
