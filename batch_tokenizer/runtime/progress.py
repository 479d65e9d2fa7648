"""How far a run is: each process writes a small status file every few seconds, and rank 0 shows one line for the whole
job.

``ProgressReporter`` counts what its process does; ``read_status`` adds up the files of all processes, for rank 0's
line and for the ``status`` command in another terminal. Rates come from the monotonic clock of each process, so a
clock that is set while the job runs changes none of them.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TextIO

from tqdm import tqdm

from batch_tokenizer.records import Stage
from batch_tokenizer.runtime.run_files import status_file, status_files
from batch_tokenizer.runtime.run_folder import RunFolder
from batch_tokenizer.storage.atomic import replace_file

logger = logging.getLogger(__name__)

State = Literal["starting", "running", "finished", "interrupted"]

_PLAIN_LINE_SECONDS = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RankStatus:
    """What one process last reported.

    Attributes:
        rows_done, rows_failed: rows that this process ended in this attempt.
        audio_seconds: audio of the rows done.
        stage_seconds: seconds spent a stage (load, encode, decode, write), summed over its threads and workers.
        elapsed: seconds since the process started, by the monotonic clock.
        started, updated: seconds since 1970 by the machine's clock, for people.
        rows_total, rows_done_before, rows_failed_before: of the job's shard, when the attempt began; the same in all
        ranks.
    """

    attempt: int
    rank: int
    world_size: int
    num_shards: int
    shard: int
    state: State
    host: str
    pid: int
    device: str
    rows_done: int = 0
    rows_failed: int = 0
    audio_seconds: float = 0.0
    stage_seconds: dict[str, float] = field(default_factory=dict)
    elapsed: float = 0.0
    started: float = 0.0
    updated: float = 0.0
    rows_total: int = 0
    rows_done_before: int = 0
    rows_failed_before: int = 0


@dataclass(frozen=True, slots=True)
class JobStatus:
    """The processes of the last attempt of every shard, and their sums."""

    ranks: tuple[RankStatus, ...]

    def _one_per_shard(self) -> Iterable[RankStatus]:
        return {status.shard: status for status in self.ranks}.values()

    @property
    def rows_total(self) -> int:
        """Rows of the shards that have started."""
        return sum(status.rows_total for status in self._one_per_shard())

    @property
    def rows_done(self) -> int:
        """Rows done, earlier attempts included."""
        before = sum(status.rows_done_before for status in self._one_per_shard())
        return before + sum(status.rows_done for status in self.ranks)

    @property
    def rows_failed(self) -> int:
        """Rows failed, earlier attempts included."""
        before = sum(status.rows_failed_before for status in self._one_per_shard())
        return before + sum(status.rows_failed for status in self.ranks)

    @property
    def audio_seconds(self) -> float:
        """Audio of the rows done in these attempts."""
        return sum(status.audio_seconds for status in self.ranks)

    @property
    def elapsed(self) -> float:
        """Seconds since the first process of these attempts started, or 0."""
        return max((status.elapsed for status in self.ranks), default=0.0)

    @property
    def seconds_left(self) -> float | None:
        """Estimate from the rows ended a second so far, or None before the first."""
        ended = sum(status.rows_done + status.rows_failed for status in self.ranks)
        if not ended or self.elapsed <= 0:
            return None
        left = self.rows_total - self.rows_done - self.rows_failed
        return max(0, left) * self.elapsed / ended

    @property
    def stage_seconds(self) -> dict[str, float]:
        """Seconds a stage, over all processes."""
        stages = dict.fromkeys(stage for status in self.ranks for stage in status.stage_seconds)
        return {stage: sum(status.stage_seconds.get(stage, 0.0) for status in self.ranks) for stage in stages}

    def line(self) -> str:
        """The state of the whole job in one line, without the counts of rows."""
        words = [f"{duration_text(self.audio_seconds)} of audio", speed_text(self.audio_seconds, self.elapsed)]
        words.append(f"{self.rows_failed} failed")
        if self.seconds_left is not None:
            words.append(f"{tqdm.format_interval(self.seconds_left)} left")
        return ", ".join(words)


def read_rank_statuses(run_dir: Path, attempt: int | None = None) -> Iterator[RankStatus]:
    """What each process of one attempt, or of all, last wrote, earliest attempt first; damaged files are left out."""
    for path in status_files(run_dir, attempt):
        try:
            yield RankStatus(**json.loads(path.read_bytes()))
        except FileNotFoundError:
            continue  # its run was just discarded
        except (OSError, ValueError, TypeError):
            logger.warning("%s is damaged: ignored", path)


def duration_text(seconds: float) -> str:
    """A length of audio or time with three digits or so: 22.5 s, 5.32 min, 12.3 h, 4,210 h."""
    for unit, size in (("s", 1), ("min", 60)):
        if seconds < 120 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 3600:.3g} h" if seconds < 3.59e6 else f"{seconds / 3600:,.0f} h"


def speed_text(audio_seconds: float, seconds: float) -> str:
    """How fast audio is worked through: 1.5 × real time."""
    speed = audio_seconds / seconds if seconds > 0 else 0.0
    return f"{speed:,.0f} × real time" if speed >= 100 else f"{speed:.2g} × real time"


def read_status(run_dir: Path, attempt: int | None = None) -> JobStatus:
    """The last attempt of every shard, or the one given, as far as its processes have written.

    Empty where nothing has started. With ``attempt``, only its files are read, which is what to use again and again.
    """
    latest: dict[tuple[int, int], dict[int, RankStatus]] = {}
    for status in read_rank_statuses(run_dir, attempt):
        ranks = latest.setdefault((status.num_shards, status.shard), {})
        if any(other.attempt != status.attempt for other in ranks.values()):
            ranks.clear()  # file names rise with the attempt
        ranks[status.rank] = status
    if not latest:
        return JobStatus(())
    # Only shards of the division that was used last: an earlier one may have had another number of shards.
    num_shards = max(
        (max(status.attempt for status in ranks.values()), shards) for (shards, _), ranks in latest.items()
    )[1]
    return JobStatus(
        tuple(
            ranks[rank]
            for (shards, _), ranks in sorted(latest.items())
            if shards == num_shards
            for rank in sorted(ranks)
        )
    )


class ProgressReporter:
    """Counts what this process does, writes it to the run folder, and in rank 0 shows the job's progress line.

    Counting methods may be called from any thread. A context manager: ``__enter__`` starts the reporting thread,
    ``__exit__`` writes the last status. A status file that cannot be written is logged once and never stops a run.
    """

    def __init__(
        self,
        folder: RunFolder,
        *,
        rows_total: int,
        rows_done_before: int = 0,
        rows_failed_before: int = 0,
        device: str = "cpu",
        quiet: bool = False,
        stream: TextIO | None = None,
    ) -> None:
        """
        Args:
            rows_total: rows of this job's shard, those that ended before included.
            quiet: show no line.
            stream: where rank 0 shows the line: a moving one on a terminal, otherwise one every 30 s. Default: stderr.
        """
        processes = folder.processes
        self._first = RankStatus(
            attempt=folder.attempt, rank=processes.rank, world_size=processes.world_size, num_shards=folder.num_shards,
            shard=folder.shard, state="starting", host=processes.host, pid=processes.pid, device=device,
            started=time.time(), rows_total=rows_total, rows_done_before=rows_done_before,
            rows_failed_before=rows_failed_before,
        )  # fmt: skip
        self._run_dir = folder.path
        self._path = status_file(folder.path, folder.attempt, processes.rank)
        self._is_shown = processes.is_main and not quiet
        self._began = time.monotonic()
        self._state: State = "starting"
        self._rows_done = self._rows_failed = 0
        self._audio_seconds = 0.0
        self._stage_seconds: dict[str, float] = {}
        #: When the model began with its first batch, on the monotonic clock; None before.
        self.computing_since: float | None = None
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._warned = False
        # A thousand processes must not write five hundred files a second to a shared file system.
        self._interval = min(30.0, max(2.0, processes.world_size / 16))
        self._stream = stream or sys.stderr
        self._bar: tqdm[Any] | None = None
        self._thread = threading.Thread(target=self._report, name="progress", daemon=True)

    def row_done(self, audio_seconds: float) -> None:
        """A row ended as done."""
        with self._lock:
            self._rows_done += 1
            self._audio_seconds += audio_seconds

    def row_failed(self) -> None:
        """A row ended as failed."""
        with self._lock:
            self._rows_failed += 1

    def add_seconds(self, stage: Stage, seconds: float) -> None:
        """Time that went into a stage."""
        with self._lock:
            if stage in ("encode", "decode") and self.computing_since is None:
                self.computing_since = time.monotonic() - seconds
            self._stage_seconds[stage] = self._stage_seconds.get(stage, 0.0) + seconds

    def set_state(self, state: State) -> None:
        """What the process is doing, from now on."""
        with self._lock:
            self._state = state

    def status(self) -> RankStatus:
        """This process now."""
        with self._lock:
            return replace(
                self._first, state=self._state, rows_done=self._rows_done, rows_failed=self._rows_failed,
                audio_seconds=self._audio_seconds, stage_seconds=dict(self._stage_seconds),
                elapsed=time.monotonic() - self._began, updated=time.time(),
            )  # fmt: skip

    def _publish(self) -> None:
        try:
            replace_file(self._path, json.dumps(asdict(self.status())).encode())
        except OSError as error:
            if not self._warned:
                logger.warning("cannot write %s (%s): the progress shown will be wrong", self._path, error.strerror)
                self._warned = True

    def _show(self) -> None:
        job = read_status(self._run_dir, self._first.attempt)
        ended = job.rows_done + job.rows_failed
        # The stream may be a pipe whose reader has ended, which is no reason to stop.
        with suppress(OSError):
            if self._bar is not None:
                self._bar.n = ended
                self._bar.set_postfix_str(job.line(), refresh=True)
            else:
                print(f"{ended}/{job.rows_total} rows, {job.line()}", file=self._stream, flush=True)

    def _report(self) -> None:
        shown = time.monotonic()
        while not self._closed.wait(self._interval):
            self._publish()
            if self._is_shown and (self._bar is not None or time.monotonic() - shown >= _PLAIN_LINE_SECONDS):
                self._show()
                shown = time.monotonic()

    def __enter__(self) -> ProgressReporter:
        if self._is_shown and self._stream.isatty():
            self._bar = tqdm(
                total=self._first.rows_total,
                file=self._stream,
                dynamic_ncols=True,
                bar_format="{n_fmt}/{total_fmt} rows{postfix} |{bar}|",
            )
        self._publish()
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._closed.set()
        self._thread.join()
        if self._state in ("starting", "running"):
            self._state = "finished" if exception[0] is None else "interrupted"
        self._publish()
        if self._is_shown:
            self._show()
        if self._bar is not None:
            with suppress(OSError):
                self._bar.close()
