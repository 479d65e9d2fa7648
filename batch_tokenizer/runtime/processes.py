"""Who this process is among the processes of its job, read from the launcher's environment variables.

Three launchers are known. ``torchrun`` gives every process a rank and a store that all of them reach. ``srun`` gives
a rank and nothing shared but the file system. Anything else is one process that works alone.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from batch_tokenizer.records import RunError

Launcher = Literal["torchrun", "srun", "single"]

#: Slurm numbers its own steps (batch script, extern, interactive, pending) from here up; tasks of srun count from 0.
_FIRST_SPECIAL_STEP = 0xFFFFFFF0


@dataclass(frozen=True, slots=True)
class ProcessGroup:
    """One process and the job that it belongs to.

    Attributes:
        rank: this process among all of the job, from 0; rank 0 does what is done once (lock, index, progress line).
        world_size: processes of the job.
        local_rank: this process among those on its machine, from 0.
        launcher: what started the job.
        host: this machine's name.
        pid: this process.
        job: the launcher's name of the job; one restart under srun is another job.
        store_address: host and port of the store that torchrun keeps for its processes; None under other launchers.
    """

    rank: int
    world_size: int
    local_rank: int
    launcher: Launcher
    host: str
    pid: int
    job: str
    store_address: tuple[str, int] | None = None

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> ProcessGroup:
        """Read ``os.environ``, or the mapping given.

        Raises:
            RunError: a launcher's variable is missing or no number.
        """
        environment = os.environ if environment is None else environment
        host, pid = socket.gethostname(), os.getpid()
        if "TORCHELASTIC_RUN_ID" in environment:
            if environment.get("TORCHELASTIC_USE_AGENT_STORE", "True") != "True":
                raise RunError(
                    "this torchrun keeps no store for its processes: unset TORCH_DISABLE_SHARE_RDZV_TCP_STORE "
                    "and use --rdzv_backend=c10d"
                )
            return cls(
                rank=_number(environment, "RANK"),
                world_size=_number(environment, "WORLD_SIZE"),
                local_rank=_number(environment, "LOCAL_RANK"),
                launcher="torchrun",
                host=host,
                pid=pid,
                job=environment["TORCHELASTIC_RUN_ID"],
                store_address=(_text(environment, "MASTER_ADDR"), _number(environment, "MASTER_PORT")),
            )
        step = environment.get("SLURM_STEP_ID", environment.get("SLURM_STEPID", ""))
        # The script of sbatch also has SLURM_PROCID=0 and SLURM_NTASKS. Only a numbered step means that srun started
        # us.
        if step.isdecimal() and int(step) < _FIRST_SPECIAL_STEP and "SLURM_PROCID" in environment:
            tasks = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environment else "SLURM_NTASKS"
            world_size = _number(environment, tasks, 1)
            restarts = _number(environment, "SLURM_RESTART_COUNT", 0)
            if world_size > 1:
                return cls(
                    rank=_number(environment, "SLURM_PROCID"),
                    world_size=world_size,
                    local_rank=_number(environment, "SLURM_LOCALID", 0),
                    launcher="srun",
                    host=host,
                    pid=pid,
                    job=f"{_text(environment, 'SLURM_JOB_ID')}.{step}.{restarts}",
                )
        return cls(0, 1, 0, "single", host, pid, f"{host}.{pid}")


def _text(environment: Mapping[str, str], name: str) -> str:
    if not environment.get(name):
        raise RunError(f"the launcher did not set {name}")
    return environment[name]


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    if default is not None and not environment.get(name):
        return default
    text = _text(environment, name)
    if not text.isdecimal():
        raise RunError(f"environment variable {name}={text!r} is not a number")
    return int(text)


def num_cores() -> int:
    """Processor cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on this operating system
        return os.cpu_count() or 1


def shard_of_slurm_array(environment: Mapping[str, str], num_shards: int | None = None) -> tuple[int, int]:
    """(num_shards, shard) of this task of a Slurm job array, for ``--shard slurm``.

    Tasks ``--array=F-L:S`` are shards 0, 1, … of as many as there are tasks. With ``num_shards`` given, a task's own
    number is its shard, so that single ones of them can be submitted again.

    Raises:
        RunError: this is no array task, or its numbers are not a range.
    """
    try:
        task, first, step, count = (
            int(environment[f"SLURM_ARRAY_TASK_{name}"]) for name in ("ID", "MIN", "STEP", "COUNT")
        )
    except (KeyError, ValueError) as error:
        raise RunError("--shard slurm: this is not a task of a Slurm job array (sbatch --array=0-9)") from error
    if num_shards is not None:
        return num_shards, task
    shard, rest = divmod(task - first, max(1, step))
    if rest or shard >= count:
        raise RunError(
            "--shard slurm: the array's task numbers are not a range; submit one such as --array=0-9, "
            "or say how many shards there are with --num_shards"
        )
    return count, shard
