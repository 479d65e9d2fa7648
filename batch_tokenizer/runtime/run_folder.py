"""The run folder: everything a run remembers, and the lock that keeps a second job out of it.

``run_files.py`` lists what is in it. Rank 0 of a job does what is done once: it takes the lock, compares settings and
draws the attempt's number. The other ranks wait for its message. A lock belongs to a living process: killed by
SIGKILL, it is free at once.
"""

from __future__ import annotations

import errno
import io
import json
import logging
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from batch_tokenizer.records import RunError
from batch_tokenizer.runtime.ledger_lines import has_done_rows
from batch_tokenizer.runtime.processes import ProcessGroup
from batch_tokenizer.runtime.rank_channel import FIRST, open_channel
from batch_tokenizer.runtime.run_files import (
    ENVIRONMENTS,
    FOLDERS,
    LEDGER_PATTERNS,
    RUN_PATTERNS,
    SUMMARY,
    attempt_file,
    attempt_numbers,
    ledger_file,
    part_name,
)
from batch_tokenizer.runtime.run_settings import other_version, read_run, read_settings, setting_differences, write_run
from batch_tokenizer.runtime.work_queue import no_idle, poll
from batch_tokenizer.storage.atomic import replace_file
from batch_tokenizer.storage.file_lock import FileLock, exclusive_lock

logger = logging.getLogger(__name__)

#: Rank 0 of a restarted job may start a moment before its killed predecessor has ended.
_LOCK_SECONDS = 10.0
#: A shared file system may show a new file to other machines late.
_VISIBLE_SECONDS = 60.0


class RunFolder:
    """A run folder, opened for one attempt of one job. Close it at the end; it is a context manager.

    Attributes:
        path: the folder.
        processes: this process and its job.
        num_shards, shard: the part of the manifest that the job does.
        attempt: number of this start of the job, unique in the folder and greater than those before it.
        attempt_id: the number with a random part, for unique names.
        manifest: in ranks other than 0, what rank 0 shared.
    """

    def __init__(
        self, path: Path, processes: ProcessGroup, num_shards: int, shard: int, idle: Callable[[], None]
    ) -> None:
        """Use ``RunFolder.open``."""
        self.path = path
        self.processes = processes
        self.num_shards = num_shards
        self.shard = shard
        self.attempt = 0
        self.attempt_id = ""
        self.manifest: Path | None = None
        self._idle = idle
        self._part = part_name(num_shards, shard)
        self._lock = FileLock(path / f"lock.{self._part}")
        self._channel = open_channel(processes, path, path / "attempts", idle)

    @classmethod
    def open(
        cls,
        run_dir: Path | str,
        settings: Mapping[str, Any],
        *,
        processes: ProcessGroup,
        num_shards: int = 1,
        shard: int = 0,
        overwrite: bool = False,
        timeout: float = 600.0,
        idle: Callable[[], None] = no_idle,
    ) -> RunFolder:
        """Make the folder or join it, as every rank of the job does.

        Args:
            settings: what must be the same for all commands on this folder, as JSON values.
            overwrite: discard what a run with other settings left here. With equal settings the run resumes.
            timeout: seconds that ranks other than 0 wait for its message.
            idle: called while waiting; an exception of its ends the wait.

        Raises:
            RunError: the settings differ (exit code 2); another job is at work here, the folder cannot be written, or
                rank 0 sent no message in time (exit code 1).
        """
        path = Path(run_dir)
        settings = json.loads(json.dumps(settings))
        try:
            if processes.is_main:
                for name in FOLDERS:
                    (path / name).mkdir(parents=True, exist_ok=True)
            folder = cls(path, processes, num_shards, shard, idle)
            if processes.is_main:
                folder._begin(settings, overwrite)
            else:
                folder._join(settings, timeout)
        except OSError as error:
            raise _failure(path, error) from error
        return folder

    # ------------------------------------------------------------------------------------------------------- rank 0

    def _begin(self, settings: Mapping[str, Any], overwrite: bool) -> None:
        try:
            deadline = time.monotonic() + _LOCK_SECONDS
            while (holder := self._try_to_begin(settings, overwrite)) is not None:
                if time.monotonic() > deadline:
                    raise RunError(
                        f"run folder {self.path} is in use by {holder}: wait for that job or stop it", exit_code=1
                    )
                self._idle()
                time.sleep(0.2)
        except BaseException as error:
            self._lock.release()
            self._broadcast_error(FIRST, error)
            raise
        self._broadcast(FIRST, attempt=self.attempt, attempt_id=self.attempt_id)

    def _try_to_begin(self, settings: Mapping[str, Any], overwrite: bool) -> str | None:
        """Take the lock, agree on settings and draw an attempt, in one step; or return who holds the lock."""
        with self.exclusive_lock():
            # 1. No job may work on the folder with another number of shards, nor on this shard.
            for other in self._other_locks():
                if not other.path.name.endswith(f"-of-{self.num_shards}") and (holder := _holder(other)):
                    return f"{holder}, which divides it into another number of shards"
            if not self._lock.acquire():
                return _read_holder(self._lock.path)
            # 2. Settings are compared, or written, before anything else is.
            self._agree_on_settings(settings, overwrite)
            # 3. Number the attempt, and write it into the lock's file, for the message of jobs that find it taken.
            self._draw_attempt()
        return None

    def exclusive_lock(self) -> AbstractContextManager[None]:
        """Held for moments, by one rank 0 of all jobs on this folder.

        Raises:
            RunError: another job has held it for a minute (exit code 1).
        """
        return exclusive_lock(self.path / "lock", self._idle, timeout=60.0)

    def _other_locks(self) -> list[FileLock]:
        return [FileLock(path) for path in sorted(self.path.glob("lock.shard-*-of-*")) if path != self._lock.path]

    def _is_shared(self) -> bool:
        """Whether the job of another shard is at work here."""
        return any(_holder(other) for other in self._other_locks())

    def _refuse_living_jobs(self) -> None:
        for other in self._other_locks():
            if holder := _holder(other):
                raise RunError(f"--overwrite: run folder {self.path} is in use by {holder}", exit_code=1)

    def _agree_on_settings(self, settings: Mapping[str, Any], overwrite: bool) -> None:
        # 1. What the folder has. With --overwrite, one of another version is discarded like one with other settings.
        content = read_run(self.path) if overwrite else None
        other = other_version(content) if content is not None else None
        before = {} if other else read_settings(self.path)
        if before is None and not any((self.path / "ledger").iterdir()):
            write_run(self.path, settings)
            return
        # 2. A start that failed before any row was done fixes neither settings nor device.
        unused = before is not None and not other and not self._is_shared() and not has_done_rows(self.path)
        if unused:
            self._remove((ENVIRONMENTS,))
        # 3. Equal settings resume; others are refused, or, with --overwrite, what the folder has is removed.
        differences = [f"it is of {other}"] if other else setting_differences(before or {}, settings)
        if not differences:
            return
        if not overwrite and not unused:
            raise RunError(
                f"run folder {self.path} is of a run with other settings: {'; '.join(differences)}. "
                "Use the same settings, another --run_dir, or --overwrite to discard what it holds"
            )
        self._refuse_living_jobs()
        if unused:
            logger.info("run folder %s has no row that is done: it begins with these settings", self.path)
        else:
            logger.warning("discarding what run folder %s holds (%s)", self.path, "; ".join(differences))
        run_id = self.run_id
        self._remove(RUN_PATTERNS)
        write_run(self.path, settings, run_id)

    def _remove(self, patterns: tuple[str, ...]) -> None:
        """Remove what runs wrote, by name and in this order, and nothing else."""
        for pattern in patterns:
            for path in sorted(self.path.glob(pattern)):
                path.unlink(missing_ok=True)

    def discard_ledger(self) -> None:
        """Rank 0, before it shares a resume state: forget how every row ended, as if nothing had been done.

        For ``--overwrite`` when finished rows of the manifest changed.

        Raises:
            RunError: another shard's job is at work, or the files cannot be removed (exit code 1).
        """
        try:
            self._refuse_living_jobs()
            self._remove(LEDGER_PATTERNS)
        except OSError as error:
            raise _failure(self.path, error) from error

    def _draw_attempt(self) -> None:
        attempt = max(attempt_numbers(self.path), default=0)
        while True:
            attempt += 1
            try:
                stream = attempt_file(self.path, attempt).open("x")
                break
            except FileExistsError:
                continue  # a job on a file system without locks was quicker
        # The random part keeps names apart where a folder was removed and numbers begin again.
        self.attempt = attempt
        self.attempt_id = f"{attempt:06d}-{uuid.uuid4().hex[:8]}"
        holder = {"host": self.processes.host, "pid": self.processes.pid, "attempt": attempt}
        about = {
            **holder,
            "launcher": self.processes.launcher,
            "world_size": self.processes.world_size,
            "num_shards": self.num_shards,
            "shard": self.shard,
            "started": time.time(),
        }
        with stream:
            json.dump(about, stream)
        self._lock.write(json.dumps(holder))

    def share_status(self, status: npt.NDArray[np.uint8], manifest: Path | None = None) -> None:
        """Rank 0: give ``LedgerState.status`` to the other ranks, and the path of the manifest that it is about. All
        must plan from the same, as each would read a later ledger than the one before it.

        Raises:
            RunError: it cannot be written (exit code 1).
        """
        if self._channel is None:
            return
        try:
            for path in self._resume_path.parent.glob(f"{self._part}.*.npy"):
                path.unlink(missing_ok=True)
            data = io.BytesIO()
            np.save(data, status)
            replace_file(self._resume_path, data.getvalue())
            self._broadcast(self._resume_message, manifest=None if manifest is None else str(manifest))
        except OSError as error:
            raise _failure(self.path, error) from error

    def _broadcast(self, name: str, **fields: Any) -> None:
        if self._channel is not None:
            self._channel.broadcast(name, json.dumps(fields).encode())

    def _broadcast_error(self, name: str, error: BaseException) -> None:
        """Ranks that wait for the message learn why it does not come. Never hides the error itself."""
        if self._channel is None or not isinstance(error, (RunError, OSError)):
            return
        try:
            self._broadcast(name, error=str(error))
        except (OSError, RunError) as second:
            logger.warning("the other ranks do not know that rank 0 stops: %s", second)

    # -------------------------------------------------------------------------------------------------- other ranks

    def _join(self, settings: Mapping[str, Any], timeout: float) -> None:
        message = self._receive(FIRST, timeout, self._idle)
        self.attempt, self.attempt_id = message["attempt"], message["attempt_id"]
        before = poll(lambda: read_settings(self.path), _VISIBLE_SECONDS, self._idle)
        if before is None:
            raise RunError(
                f"run folder {self.path} of rank 0 is not visible on {self.processes.host}: "
                "it must lie on a file system that all machines share",
                exit_code=1,
            )
        if differences := setting_differences(before, settings):
            raise RunError(f"rank {self.processes.rank} on {self.processes.host} differs: {'; '.join(differences)}")

    def await_status(self, *, timeout: float = 600.0, idle: Callable[[], None] = no_idle) -> npt.NDArray[np.uint8]:
        """Ranks other than 0: the status array that rank 0 shared. ``manifest`` is known afterwards.

        Raises:
            RunError: rank 0 sent no message in time, or stopped (exit code 1).
        """
        try:
            message = self._receive(self._resume_message, timeout, idle)
            self.manifest = Path(message["manifest"]) if message.get("manifest") else None
            # Rank 0 wrote both a moment ago. If one stays missing, opening it raises the better message.
            for path in filter(None, (self.manifest, self._resume_path)):
                poll(lambda path=path: path.exists() or None, _VISIBLE_SECONDS, idle)  # type: ignore[misc]
            return np.asarray(np.load(self._resume_path))
        except OSError as error:
            raise _failure(self.path, error) from error

    def _receive(self, name: str, timeout: float, idle: Callable[[], None]) -> dict[str, Any]:
        if self._channel is None:
            raise ValueError("a job of one process has no rank 0 to wait for")
        message = self._channel.receive(name, timeout, idle)
        if message is None:
            raise RunError(f"no message from rank 0 within {timeout:.0f} seconds: look at its log", exit_code=1)
        fields: dict[str, Any] = json.loads(message)
        if "error" in fields:
            raise RunError(f"rank 0 stopped: {fields['error']}", exit_code=1, reported=True)
        return fields

    # ---------------------------------------------------------------------------------------------------- all ranks

    @property
    def ledger_path(self) -> Path:
        """This process's ledger file."""
        return ledger_file(self.path, self.attempt, self.processes.rank)

    @property
    def run_id(self) -> str:
        """16 hexadecimal digits that no other run folder has, kept for as long as this one lasts."""
        return str((read_run(self.path) or {}).get("id", ""))

    @property
    def index_dir(self) -> Path:
        """Where the manifest's index lies."""
        return self.path / "index"

    @property
    def _resume_path(self) -> Path:
        return self.path / "resume" / f"{self._part}.{self.attempt_id}.npy"

    @property
    def _resume_message(self) -> str:
        return f"{self.attempt_id}.resume"

    def write_summary(self, summary: Mapping[str, Any]) -> Path:
        """Replace ``summary.json``; returns its path.

        Raises:
            RunError: it cannot be written (exit code 1).
        """
        path = self.path / SUMMARY
        try:
            replace_file(path, (json.dumps(summary, indent=2, ensure_ascii=False) + "\n").encode())
        except OSError as error:
            raise _failure(self.path, error) from error
        return path

    def close(self, wait_seconds: float | None = None) -> None:
        """Release the lock, after ranks that are still starting have had the first message, or ``wait_seconds``."""
        try:
            if self._channel is not None:
                self._channel.close(_VISIBLE_SECONDS if wait_seconds is None else wait_seconds, self._idle)
        finally:
            self._lock.release()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is None:
            self.close()
            return
        if self.processes.is_main:
            self._broadcast_error(self._resume_message, error)
        self.close(0.0)


def _holder(lock: FileLock) -> str | None:
    """Which job holds the lock of another shard, or None. Called under the folder's lock only."""
    if lock.acquire():
        lock.release()
        return None
    return _read_holder(lock.path)


def _read_holder(path: Path) -> str:
    try:
        holder = json.loads(path.read_bytes())
        return f"attempt {holder['attempt']} (host {holder['host']}, process {holder['pid']})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another job"


def _failure(path: Path, error: OSError) -> RunError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        remedy = "free some space there and start the same command again"
    elif error.errno in (errno.ENOENT, errno.ESTALE):
        remedy = "was it removed? Start the same command again"
    else:
        remedy = "make it writable, or choose another with --run_dir"
    place = error.filename or path
    return RunError(f"run folder {path}: {error.strerror or error} ({place}): {remedy}", exit_code=1)
