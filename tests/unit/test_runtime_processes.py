"""Who a process is, from the environments that launchers really make."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

from batch_tokenizer.records import RunError
from batch_tokenizer.runtime.processes import ProcessGroup

TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "run", "RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "MASTER_ADDR": "node1",
    "MASTER_PORT": "29500", "TORCHELASTIC_RESTART_COUNT": "2", "TORCHELASTIC_USE_AGENT_STORE": "True",
}  # fmt: skip
SBATCH = {"SLURM_JOB_ID": "12", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
SRUN = SBATCH | {"SLURM_STEP_ID": "3", "SLURM_PROCID": "2", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "4"}


def test_torchrun() -> None:
    processes = ProcessGroup.from_environment(TORCHRUN)
    assert (processes.launcher, processes.rank, processes.world_size, processes.local_rank) == ("torchrun", 9, 16, 1)
    assert processes.store_address == ("node1", 29500)
    assert not processes.is_main


def test_torchrun_within_srun_is_torchrun() -> None:
    assert ProcessGroup.from_environment(SRUN | TORCHRUN).launcher == "torchrun"


def test_srun() -> None:
    processes = ProcessGroup.from_environment(SRUN)
    assert (processes.launcher, processes.rank, processes.world_size, processes.local_rank) == ("srun", 2, 4, 1)
    again = ProcessGroup.from_environment(SRUN | {"SLURM_RESTART_COUNT": "1"})
    assert processes.job != again.job


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"RANK": "1", "WORLD_SIZE": "2"},
        SBATCH,
        SBATCH | {"SLURM_STEP_ID": "batch"},
        SBATCH | {"SLURM_STEPID": "4294967291"},
        SRUN | {"SLURM_STEP_NUM_TASKS": "1"},
    ],
)
def test_alone(environment: dict[str, str]) -> None:
    processes = ProcessGroup.from_environment(environment)
    assert (processes.launcher, processes.rank, processes.world_size) == ("single", 0, 1)
    assert processes.is_main


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"RANK": "x"}, "RANK='x' is not a number"),
        ({"MASTER_PORT": ""}, "did not set MASTER_PORT"),
        ({"TORCHELASTIC_USE_AGENT_STORE": "False"}, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"),
    ],
)
def test_broken_environments(change: dict[str, str], message: str) -> None:
    with pytest.raises(RunError, match=message):
        ProcessGroup.from_environment(TORCHRUN | change)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent died")
def test_a_rank_does_not_outlive_a_killed_agent() -> None:
    rank = textwrap.dedent(
        """
        import signal, time
        from batch_tokenizer.runtime.parent import stop_with_parent
        stop_with_parent()
        signal.signal(signal.SIGTERM, lambda *_: print("SIGTERM", flush=True) or exit(0))
        print("ready", flush=True)
        time.sleep(300)
        """
    )
    agent = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
    process = subprocess.Popen(
        [sys.executable, "-c", agent, rank], env={**os.environ, **TORCHRUN}, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.kill()
    assert process.stdout.readline() == "SIGTERM\n"
    process.wait()
