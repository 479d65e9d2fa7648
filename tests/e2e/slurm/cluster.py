"""A real Slurm of two nodes on this one machine, for tests: its own key, ports and folder, nothing of the system's.

Takes root and the Debian packages slurmctld, slurmd, slurm-client and munge; no systemd. Works as a command too:

    python -m tests.e2e.slurm.cluster       starts one and prints how to reach it; control-C ends it
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType

from tests.support.runs import HANG_SECONDS

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue")

#: ``scontrol requeue`` puts a job back that is running; a node that was set down stays down (``ReturnToService``).
#: Debian's Slurm has no cgroup support where there is no systemd, hence the plain process tracking.
_CONFIGURATION = """
ClusterName=batchtok
SlurmctldHost=localhost
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SchedulerType=sched/builtin
SchedulerParameters=batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobRequeue=1
ReturnToService=0
KillWait=30
NodeName=node[0-1] NodeHostname=localhost NodeAddr=127.0.0.1 Port=[{first_port}-{last_port}] CPUs=2 RealMemory=1000
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class Cluster:
    """The daemons, from entering the context to leaving it, and the commands that talk to them.

    Attributes:
        environment: variables by which Slurm's commands find this cluster.
    """

    def __init__(self) -> None:
        # Munge trusts no folder that lies in one which others may write to, so pytest's folders will not do.
        self.folder = Path(tempfile.mkdtemp(prefix="batch_tokenizer-slurm-", dir="/run"))
        self.environment = {"SLURM_CONF": str(self.folder / "slurm.conf")}
        self._daemons: list[subprocess.Popen[bytes]] = []

    @staticmethod
    def why_not() -> str | None:
        """What is missing here, or None."""
        missing = [program for program in PROGRAMS if shutil.which(program) is None]
        if missing:
            return f"no {', '.join(missing)} here (Debian: slurmctld slurmd slurm-client munge)"
        return None if os.geteuid() == 0 else "starting Slurm's daemons takes root"

    def __enter__(self) -> Cluster:
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def _start(self) -> None:
        self.folder.chmod(0o755)
        for name in ("state", "node0", "node1"):
            (self.folder / name).mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        controller_port, first_port = _free_ports()
        (self.folder / "slurm.conf").write_text(
            _CONFIGURATION.format(
                folder=self.folder, controller_port=controller_port, first_port=first_port, last_port=first_port + 1
            )
        )
        places = [f"--{what}={self.folder}/munge.{what.removesuffix('-file')}" for what in ("socket", "pid-file")]
        places += [f"--key-file={key}", f"--log-file={self.folder}/munged.log", f"--seed-file={self.folder}/munge.seed"]
        self._launch("munged", "--foreground", "--force", *places)
        _wait_until((self.folder / "munge.socket").is_socket, "munged", self.log)
        self._launch("slurmctld", "-D")
        for node in ("node0", "node1"):
            self._launch("slurmd", "-D", "-N", node)
        _wait_until(self.is_idle, "nodes", self.log)

    def _launch(self, program: str, *words: str) -> None:
        name = words[-1] if program == "slurmd" else program
        with (self.folder / f"{name}.out").open("wb") as stream:
            self._daemons.append(
                subprocess.Popen(
                    [program, *words],
                    env=os.environ | self.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )

    def _stop(self) -> None:
        if len(self._daemons) > 1:
            self.command("scancel", "--signal=KILL", "--full", "--user=root")
            self.command("scancel", "--user=root")
            with contextlib.suppress(AssertionError):
                _wait_until(lambda: not self.command("squeue", "-h"), "empty queue", self.log, timeout=20)
        for daemon in reversed(self._daemons):
            daemon.send_signal(signal.SIGTERM)
        for daemon in self._daemons:
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def nodes(self) -> list[str]:
        """The states of both nodes, such as ``idle``."""
        return self.command("sinfo", "-h", "-N", "-o", "%t").split()

    def is_idle(self) -> bool:
        """Whether both nodes are up with nothing to do."""
        return self.nodes() == ["idle"] * 2

    def log(self) -> str:
        """The last lines of every daemon."""
        return "\n".join(f"{path.name}:\n{path.read_text()[-2000:]}" for path in sorted(self.folder.glob("*.out")))

    def command(self, *words: str, environment: Mapping[str, str] | None = None, cwd: Path | None = None) -> str:
        """One of Slurm's commands; returns what it printed, and raises nothing."""
        done = subprocess.run(
            words,
            env=dict(os.environ if environment is None else environment) | self.environment,
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=HANG_SECONDS,
            check=False,
        )
        return (done.stdout or done.stderr).strip()

    def job(self, job: str) -> dict[str, str]:
        """``scontrol show job``, as a dictionary; of the first, if it is an array."""
        shown = self.command("scontrol", "show", "job", "--oneliner", job).splitlines()[0]
        return dict(word.split("=", 1) for word in shown.split() if "=" in word)

    def start_now(self, job: str) -> None:
        """Have a job that is being requeued start soon after its old processes are gone, not two minutes later.

        Not in the same second: a node refuses a job whose credential is not newer than that of the one it ended, and
        tells their times to the second.
        """

        def is_requeued() -> bool:
            return self.job(job)["JobState"] == "PENDING" and set(self.nodes()) <= {"idle", "down"}

        _wait_until(is_requeued, f"{job} to be requeued", self.log)
        time.sleep(2.0)
        self.command("scontrol", "update", f"JobId={job}", "StartTime=now")

    def wait(self, job: str) -> str:
        """The state in which a job ended, such as COMPLETED."""
        states = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
        _wait_until(lambda: self.job(job)["JobState"] in states, f"end of job {job}", self.log)
        return self.job(job)["JobState"]


def _free_ports() -> tuple[int, int]:
    """A port for the controller, and the first of two for the nodes."""
    while True:
        with contextlib.ExitStack() as stack:
            first, controller = (stack.enter_context(socket.socket()) for _ in range(2))
            first.bind(("127.0.0.1", 0))
            controller.bind(("127.0.0.1", 0))
            second = stack.enter_context(socket.socket())
            with contextlib.suppress(OSError, OverflowError):
                second.bind(("127.0.0.1", first.getsockname()[1] + 1))
                return controller.getsockname()[1], first.getsockname()[1]


def _wait_until(
    condition: Callable[[], bool], what: str, log: Callable[[], str], timeout: float = HANG_SECONDS
) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"no {what} after {timeout:g} s:\n{log()}"
        time.sleep(0.2)


if __name__ == "__main__":
    if (reason := Cluster.why_not()) is not None:
        sys.exit(reason)
    with Cluster() as cluster, contextlib.suppress(KeyboardInterrupt):
        print(f"export SLURM_CONF={cluster.environment['SLURM_CONF']}", flush=True)
        signal.pause()
