"""How loader processes are started: forked by ``multiprocessing``'s fork server, which has imported what they need.

The server is a fresh interpreter without threads or a CUDA context, which a fork of the computing process would tear.
What is here makes up for what ``multiprocessing`` and ``DataLoader`` do not do by themselves.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import pickletools
import signal
import sys
import tempfile
import threading
from collections.abc import Callable
from multiprocessing import forkserver, resource_tracker, spawn
from multiprocessing.context import ForkServerContext, ForkServerProcess
from typing import Any, NamedTuple

from batch_tokenizer.data.worker import JOB_SIGNALS
from batch_tokenizer.records import LoadedRow, ManifestRow

#: Seconds that a killed process is waited for: it may be in the kernel, waiting for a file server.
_JOIN_SECONDS = 5.0

#: Longest folder for the server's socket, whose path may have 107 bytes in all; Slurm's ``TMPDIR`` can be longer.
_LONGEST_FOLDER = 70

#: Held while what new processes inherit or are sent is changed for a moment.
_changing = threading.Lock()


def ensure_fork_server(load: Callable[[ManifestRow], LoadedRow]) -> None:
    """Start ``multiprocessing``'s fork server unless it runs, so that loader processes are forked in milliseconds.

    It imports what this process would (Python would look in the working directory first), and each process that it
    forks computes on one thread. Signals to the whole job are kept from it and from them.

    Raises:
        OSError: no process can be started.
    """
    # 1. The modules that loading needs, by the names in the pickled function: the server imports them once for all.
    operations = pickletools.genops(pickle.dumps(load, protocol=2))
    modules = {str(names).split(" ")[0] for operation, names, _ in operations if operation.name == "GLOBAL"}
    preload = [f"{__package__}.fork_server", f"{__package__}.workers", *sorted(modules)]
    multiprocessing.get_context("forkserver").set_forkserver_preload(preload)
    # 2. What the server inherits is changed for the moment of its start. Each worker computes on one thread.
    changes = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    changes |= {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path)), "PYTHONSAFEPATH": "1"}
    with _changing:
        before = dict(os.environ)
        signals = signal.pthread_sigmask(signal.SIG_BLOCK, JOB_SIGNALS)
        os.environ.update(changes)
        folder = tempfile.tempdir
        if len(tempfile.gettempdir()) > _LONGEST_FOLDER:
            tempfile.tempdir = "/tmp"
        try:
            resource_tracker.ensure_running()
            signal.pthread_sigmask(signal.SIG_BLOCK, JOB_SIGNALS)  # once more: the tracker's start unblocks some
            forkserver.ensure_running()
        finally:
            for name in changes:
                del os.environ[name]
            os.environ.update(before)
            tempfile.tempdir = folder
            signal.pthread_sigmask(signal.SIG_SETMASK, signals)


class WorkerContext(ForkServerContext):
    """What ``DataLoader`` makes its processes and flags with; ``processes`` are those it has made."""

    def __init__(self) -> None:
        super().__init__()
        self.processes: list[WorkerProcess] = []

    def Process(self, *args: Any, **keywords: Any) -> WorkerProcess:  # type: ignore[override]  # a class there
        """A process that the set can kill, and whose exit status it can read."""
        process = WorkerProcess(*args, **keywords)
        self.processes.append(process)
        return process

    def Event(self) -> Any:
        """A flag without a lock, as a process that was killed may hold that."""
        return _Flag(self.RawValue("b", 0))


class _Flag(NamedTuple):
    """``multiprocessing.Event``, as far as ``DataLoader`` uses it."""

    state: Any

    def set(self) -> None:
        """For all processes."""
        self.state.value = 1

    def is_set(self) -> bool:
        """Whether one of them has set it."""
        return bool(self.state.value)


class WorkerProcess(ForkServerProcess):
    """A process of the fork server, but for two things.

    The caller's main module is not imported into it: that may be a script without a main guard, which would start a run
    there. And one that could not be started counts as dead, as ``DataLoader`` cannot undo a set that is half there.
    """

    failure: OSError | EOFError | None = None

    def start(self) -> None:
        """Start it, or remember why not."""
        with _changing:
            complete = spawn.get_preparation_data
            spawn.get_preparation_data = lambda name: {
                key: value for key, value in complete(name).items() if not key.startswith("init_main_from")
            }
            try:
                super().start()
            except (OSError, EOFError) as error:
                self.failure = error
            finally:
                spawn.get_preparation_data = complete

    @property
    def pid(self) -> int | None:
        """Its process id; 0 if it could not be started."""
        return 0 if self.failure is not None else super().pid

    def kill(self) -> None:
        """SIGKILL, if it was started."""
        if self.pid:
            super().kill()

    def join(self, timeout: float | None = None) -> None:
        """At the program's end too a process that cannot be killed is not waited for."""
        if self.pid:
            super().join(_JOIN_SECONDS if timeout is None else timeout)
