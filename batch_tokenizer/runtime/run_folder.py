"""The run folder: everything a run remembers, and the lock that keeps a second job out of it.

    run.json            the settings that the run was started with; another command must have the same; the run's id
    ledger/             one file a process and attempt, see ``ledger.py``
    attempts/           one file a start of the job; its number orders the ledger's files
    shards/             ledger lines of shards that are being published, see ``shard_ledger.py``
    resume/             which rows were pending when an attempt began, from its rank 0 to its other ranks
    status/             one file a process, rewritten every few seconds, see ``progress.py``
    index/              the manifest's index, and the manifest itself where it was listed from other sources
    source.json         what the manifest was made of, see ``run_source.py``
    failures.jsonl      rows that failed
    summary.json        the numbers of the last attempt
    lock, lock.shard-I-of-N

Rank 0 of a job does what is done once: it takes the lock, compares settings and draws the attempt's number. The other
ranks wait for its word. A lock belongs to a living process: killed by SIGKILL, it is free at once.
"""

from __future__ import annotations

import errno
import fcntl
import io
import json
import logging
import os
import re
import time
import uuid
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from batch_tokenizer.records import RunError
from batch_tokenizer.runtime.ledger import ledger_file
from batch_tokenizer.runtime.notices import Notices, open_notices
from batch_tokenizer.runtime.processes import ProcessGroup

logger = logging.getLogger(__name__)

#: Rank 0 of a restarted job may start a moment before its killed predecessor's loader workers are gone.
_LOCK_SECONDS = 10.0
#: A shared file system may show a new file to other machines late.
_VISIBLE_SECONDS = 60.0
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_ATTEMPT_NAME = re.compile(r"(\d{6,8})\.json")
_WRITTEN_BY_RUNS = (
    "ledger/*.jsonl",
    "shards/*/*.jsonl",
    "status/*.json",
    "resume/*.npy",
    "failures.jsonl",
    "verify.jsonl",
    "summary.json",
    "run.json",
)
_FOLDERS = ("ledger", "attempts", "resume", "status", "index")


class _FileLock:
    """An exclusive lock on a file, held until ``release`` or the end of this process, not of its children."""

    #: Where the file system has no locks, one warning is enough.
    _told: ClassVar[bool] = False
    _held: ClassVar[weakref.WeakSet[_FileLock]] = weakref.WeakSet()

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = -1

    def acquire(self) -> bool:
        """Take the lock, or return False because another process has it. True where the file system has no locks."""
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            return False
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            if not _FileLock._told:
                logger.warning(
                    "%s: this file system has no locks, so nothing keeps a second job out of the run folder. "
                    "It would do rows twice, with the same result.",
                    self.path,
                )
                _FileLock._told = True
        _FileLock._held.add(self)
        return True

    def write(self, text: str) -> None:
        """Say who holds the lock."""
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, text.encode(), 0)

    def release(self) -> None:
        """Let go."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    @classmethod
    def forget_in_child(cls) -> None:
        """A forked loader worker that outlives a killed rank must not keep its locks."""
        for lock in list(cls._held):
            lock.release()


os.register_at_fork(after_in_child=_FileLock.forget_in_child)


def _no_idle() -> None:
    return None


class RunFolder:
    """A run folder, opened for one attempt of one job. Close it at the end; it is a context manager.

    Attributes:
        path: the folder.
        processes: this process and its job.
        num_shards, shard: the part of the manifest that the job does.
        attempt: number of this start of the job, unique in the folder and greater than those before it.
        attempt_id: the number with a random part, for names that nobody else uses.
        manifest: in ranks other than 0, what rank 0 shared.
    """

    def __init__(self, path: Path, processes: ProcessGroup, num_shards: int, shard: int, notices: Notices) -> None:
        """``RunFolder.open`` is the way in."""
        self.path = path
        self.processes = processes
        self.num_shards = num_shards
        self.shard = shard
        self.attempt = 0
        self.attempt_id = ""
        self.manifest: Path | None = None
        self._notices = notices
        self._idle = _no_idle
        self._lock = _FileLock(path / f"lock.shard-{shard}-of-{num_shards}")

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
        idle: Callable[[], None] = _no_idle,
    ) -> RunFolder:
        """Make the folder or join it, as every rank of the job does.

        Args:
            settings: what must be the same for all commands on this folder, as JSON values.
            overwrite: discard what a run with other settings left here. With equal settings the run resumes.
            timeout: seconds that ranks other than 0 wait for its word.
            idle: called while waiting; an exception of its ends the wait.

        Raises:
            RunError: the settings differ (exit code 2); another job is at work here, the folder cannot be written, or
                rank 0 gave no word in time (exit code 1).
        """
        path = Path(run_dir)
        settings = json.loads(json.dumps(settings))
        try:
            if processes.is_main:
                for name in _FOLDERS:
                    (path / name).mkdir(parents=True, exist_ok=True)
            folder = cls(path, processes, num_shards, shard, open_notices(processes, path, path / "attempts"))
            folder._idle = idle
            if processes.is_main:
                folder._begin(settings, overwrite, idle)
            else:
                folder._join(settings, timeout, idle)
        except OSError as error:
            raise _failure(path, error) from error
        return folder

    # ------------------------------------------------------------------------------------------------------- rank 0

    def _begin(self, settings: Mapping[str, Any], overwrite: bool, idle: Callable[[], None]) -> None:
        try:
            deadline = time.monotonic() + _LOCK_SECONDS
            while True:
                with self.alone(idle):
                    holder = self._take_lock()
                    if holder is None:
                        self._agree_on_settings(settings, overwrite)
                        self._draw_attempt()
                        break
                if time.monotonic() > deadline:
                    raise RunError(
                        f"run folder {self.path} is in use by {holder}: wait for that job or stop it", exit_code=1
                    )
                idle()
                time.sleep(0.2)
        except RunError as error:
            self._lock.release()
            self._notices.announce(_word(error=str(error)))
            raise
        self._notices.announce(_word(attempt=self.attempt, attempt_id=self.attempt_id))

    @contextmanager
    def alone(self, idle: Callable[[], None]) -> Iterator[None]:
        """Held for moments, by one rank 0 of all jobs on this folder, so that looking and acting are one step.

        Raises:
            RunError: another job has held it for a minute (exit code 1).
        """
        lock = _FileLock(self.path / "lock")
        deadline = time.monotonic() + 60.0
        while not lock.acquire():
            if time.monotonic() > deadline:
                raise RunError(f"{lock.path} has been locked for a minute: is a job hanging?", exit_code=1)
            idle()
            time.sleep(0.05)
        try:
            yield
        finally:
            lock.release()

    def _take_lock(self) -> str | None:
        """Take this shard's lock, or say who works on it, or on the folder divided otherwise."""
        for other in self._other_locks():
            if not other.path.name.endswith(f"-of-{self.num_shards}") and (holder := _holder(other)):
                return f"{holder}, which divides it into another number of shards"
        if self._lock.acquire():
            return None
        return _read_holder(self._lock.path)

    def _other_locks(self) -> list[_FileLock]:
        paths = sorted(self.path.glob("lock.shard-*-of-*"))
        return [_FileLock(path) for path in paths if path != self._lock.path]

    def _agree_on_settings(self, settings: Mapping[str, Any], overwrite: bool) -> None:
        before = read_settings(self.path)
        if before is None and not any((self.path / "ledger").iterdir()):
            self._write_settings(settings)
            return
        differences = _differences(before or {}, settings)
        if not differences:
            return
        if not overwrite:
            raise RunError(
                f"run folder {self.path} was made with other settings: {'; '.join(differences)}. "
                "Use the settings it was made with, another --run_dir, or --overwrite to discard what it holds"
            )
        for other in self._other_locks():
            if holder := _holder(other):
                raise RunError(f"--overwrite: run folder {self.path} is in use by {holder}", exit_code=1)
        logger.warning("discarding what run folder %s holds (%s)", self.path, "; ".join(differences))
        run_id = self.run_id
        self._discard()
        self._write_settings(settings, run_id)

    def _write_settings(self, settings: Mapping[str, Any], run_id: str = "") -> None:
        content = {"settings": settings, "id": run_id or uuid.uuid4().hex[:16]}
        write_aside(self.path / "run.json", json.dumps(content, indent=2) + "\n")

    def _discard(self) -> None:
        """Remove what runs wrote, by name, and nothing else. ``run.json`` goes last, so a kill in between is repaired.

        Attempts stay, as their numbers must go on rising; the index stays, as it belongs to the manifest.
        """
        for pattern in _WRITTEN_BY_RUNS:
            for path in sorted(self.path.glob(pattern)):
                path.unlink(missing_ok=True)

    def discard_ledger(self) -> None:
        """Rank 0, before it shares a resume state: forget every row's end, as if nothing had been done.

        For ``--overwrite`` when finished rows of the manifest changed.

        Raises:
            RunError: another shard's job is at work, or the files cannot be removed (exit code 1).
        """
        try:
            for other in self._other_locks():
                if holder := _holder(other):
                    raise RunError(f"--overwrite: run folder {self.path} is in use by {holder}", exit_code=1)
            for pattern in ("shards/*/*.jsonl", "ledger/*.jsonl"):
                for path in sorted(self.path.glob(pattern)):
                    path.unlink(missing_ok=True)
        except OSError as error:
            raise _failure(self.path, error) from error

    def _draw_attempt(self) -> None:
        attempts = self.path / "attempts"
        taken = [int(match[1]) for path in attempts.iterdir() if (match := _ATTEMPT_NAME.fullmatch(path.name))]
        attempt = max(taken, default=0)
        while True:
            attempt += 1
            try:
                descriptor = os.open(attempts / f"{attempt:06d}.json", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
                break
            except FileExistsError:
                continue  # a job on a file system without locks was quicker
        self.attempt = attempt
        self.attempt_id = f"{attempt:06d}-{uuid.uuid4().hex[:8]}"
        me = {"host": self.processes.host, "pid": self.processes.pid, "attempt": attempt}
        with os.fdopen(descriptor, "w") as stream:
            json.dump(
                {
                    **me,
                    "launcher": self.processes.launcher,
                    "world_size": self.processes.world_size,
                    "num_shards": self.num_shards,
                    "shard": self.shard,
                    "started": time.time(),
                },
                stream,
            )
        self._lock.write(json.dumps(me))

    # -------------------------------------------------------------------------------------------------- other ranks

    def _join(self, settings: Mapping[str, Any], timeout: float, idle: Callable[[], None]) -> None:
        word = _read_word(self._notices.ask(timeout, idle), timeout)
        self.attempt, self.attempt_id = word["attempt"], word["attempt_id"]
        deadline = time.monotonic() + _VISIBLE_SECONDS
        while (before := read_settings(self.path)) is None:
            if time.monotonic() > deadline:
                raise RunError(
                    f"run folder {self.path} of rank 0 is not visible on {self.processes.host}: "
                    "it must lie on a file system that all machines share",
                    exit_code=1,
                )
            idle()
            time.sleep(0.5)
        if differences := _differences(before, settings):
            raise RunError(f"rank {self.processes.rank} on {self.processes.host} differs: {'; '.join(differences)}")

    # ---------------------------------------------------------------------------------------------------- all ranks

    @property
    def ledger_path(self) -> Path:
        """This process's ledger file."""
        return ledger_file(self.path, self.attempt, self.processes.rank)

    @property
    def run_id(self) -> str:
        """16 hexadecimal digits that no other run folder has, kept for as long as this one lasts; empty in a folder of
        an older version."""
        try:
            return str(json.loads((self.path / "run.json").read_bytes()).get("id", ""))
        except (OSError, ValueError, AttributeError):
            return ""

    @property
    def index_dir(self) -> Path:
        """Where the manifest's index lies."""
        return self.path / "index"

    @property
    def _resume_path(self) -> Path:
        return self.path / "resume" / f"shard-{self.shard}-of-{self.num_shards}.{self.attempt_id}.npy"

    def share_status(self, status: npt.NDArray[np.uint8], manifest: Path | None = None) -> None:
        """Rank 0: give ``LedgerState.status`` to the other ranks, and the path of the manifest that it is about. All
        must plan from the same, as each would read a later ledger than the one before it.

        Raises:
            RunError: it cannot be written (exit code 1).
        """
        if self.processes.world_size == 1:
            return
        try:
            for path in self._resume_path.parent.glob(f"shard-{self.shard}-of-{self.num_shards}.*.npy"):
                path.unlink(missing_ok=True)
            data = io.BytesIO()
            np.save(data, status)
            write_aside(self._resume_path, data.getvalue())
            self._notices.post(f"{self.attempt_id}.resume", _word(manifest=None if manifest is None else str(manifest)))
        except OSError as error:
            raise _failure(self.path, error) from error

    def await_status(self, *, timeout: float = 600.0, idle: Callable[[], None] = _no_idle) -> npt.NDArray[np.uint8]:
        """Ranks other than 0: the status array that rank 0 shared. ``manifest`` is known afterwards.

        Raises:
            RunError: rank 0 gave no word in time, or stopped (exit code 1).
        """
        try:
            word = _read_word(self._notices.wait(f"{self.attempt_id}.resume", timeout, idle), timeout)
            self.manifest = Path(word["manifest"]) if word.get("manifest") else None
            deadline = time.monotonic() + _VISIBLE_SECONDS
            # Where it was listed a moment ago. That it is not there at all, whoever opens it says better.
            while self.manifest is not None and not self.manifest.exists() and time.monotonic() < deadline:
                idle()
                time.sleep(0.5)
            while True:
                try:
                    return np.asarray(np.load(self._resume_path))
                except FileNotFoundError:
                    if time.monotonic() > deadline:
                        raise
                    idle()
                    time.sleep(0.5)
        except OSError as error:
            raise _failure(self.path, error) from error

    def write_summary(self, summary: Mapping[str, Any]) -> Path:
        """Replace ``summary.json``; returns its path.

        Raises:
            RunError: it cannot be written (exit code 1).
        """
        path = self.path / "summary.json"
        try:
            write_aside(path, json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
        except OSError as error:
            raise _failure(self.path, error) from error
        return path

    def close(self) -> None:
        """Let go of the lock, after ranks that are still starting have had the word; at most a minute."""
        try:
            self._notices.close(_VISIBLE_SECONDS, self._idle)
        finally:
            self._lock.release()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is None:
            self.close()
            return
        if isinstance(error, RunError) and self.processes.is_main:
            # Ranks that still wait for the resume state would wait for nothing.
            try:
                self._notices.post(f"{self.attempt_id}.resume", _word(error=str(error)))
            except (OSError, RunError) as second:
                logger.warning("the other ranks could not be told: %s", second)
        self._notices.close(0.0, self._idle)
        self._lock.release()


def read_settings(run_dir: Path) -> dict[str, Any] | None:
    """The settings in ``run.json``, or None where there is none.

    Raises:
        RunError: the file holds something else (exit code 1).
    """
    path = run_dir / "run.json"
    try:
        settings = json.loads(path.read_bytes())["settings"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} is damaged: remove it and start the same command with --overwrite") from error
    except OSError as error:
        raise _failure(run_dir, error) from error
    return dict(settings)


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    nothing = "nothing"
    return [
        f"{name}: run folder has {before.get(name, nothing)}, this run has {now.get(name, nothing)}"
        for name in dict.fromkeys((*before, *now))
        if before.get(name, nothing) != now.get(name, nothing)
    ]


def _holder(lock: _FileLock) -> str | None:
    """Who holds a lock of another shard; None if nobody does. Called under the folder's lock only."""
    if lock.acquire():
        lock.release()
        return None
    return _read_holder(lock.path)


def _read_holder(path: Path) -> str:
    try:
        who = json.loads(path.read_bytes())
        return f"attempt {who['attempt']} (host {who['host']}, process {who['pid']})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another job"


def write_aside(path: Path, content: str | bytes) -> None:
    """Write a file that is whole or not there: beside its place, then renamed."""
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        aside.write_bytes(content.encode() if isinstance(content, str) else content)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def _word(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


def _read_word(word: bytes | None, timeout: float) -> dict[str, Any]:
    if word is None:
        raise RunError(f"rank 0 gave no word within {timeout:.0f} seconds: look at its log", exit_code=1)
    fields: dict[str, Any] = json.loads(word)
    if "error" in fields:
        raise RunError(f"rank 0 stopped: {fields['error']}", exit_code=1, reported=True)
    return fields


def _failure(path: Path, error: OSError) -> RunError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        remedy = "free some space there and start the same command again"
    elif error.errno in (errno.ENOENT, errno.ESTALE):
        remedy = "was it removed? Start the same command again"
    else:
        remedy = "make it writable, or choose another with --run_dir"
    place = error.filename or path
    return RunError(f"run folder {path}: {error.strerror or error} ({place}): {remedy}", exit_code=1)
