"""A run: the manifest's rows go through loader, packer, codec and writers, and end in the ledger.

    manifest ──► work queue ──► loader processes ──► packer ──► codec ──► writers ──► ledger

``run`` prepares what a job does once (run folder, manifest, ledger, units), ``Worker`` is the loop of one process, and
``_conclude`` is rank 0's last word. A row counts as ended only when its line is in the ledger, which comes after its
outputs are published.
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from signal import Signals
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from batch_tokenizer import __version__
from batch_tokenizer.codecs.base import Codec, CodecSpec, CodecStream, Computation
from batch_tokenizer.codecs.checkpoint import Checkpoint
from batch_tokenizer.codecs.registry import Family, find_family
from batch_tokenizer.commands.dry_run import dry_run
from batch_tokenizer.config import FrontEnd, RunConfig
from batch_tokenizer.data.batching import Packer, split
from batch_tokenizer.data.loader import Loader
from batch_tokenizer.data.loading import RowLoader
from batch_tokenizer.data.pieces import PassLimit
from batch_tokenizer.manifest.manifest import Manifest, Units, in_shard, plan_units
from batch_tokenizer.pipeline.long_audio import LongRows
from batch_tokenizer.quality.live import LiveQuality
from batch_tokenizer.records import (
    Batch,
    LedgerEntry,
    LoadedRow,
    ManifestRow,
    RowError,
    RowFailure,
    RunError,
    Stage,
    TokenizedRow,
)
from batch_tokenizer.runs.source import allow_pipes, prepare, typed
from batch_tokenizer.runtime.devices import ComputeDevice, choose_device
from batch_tokenizer.runtime.ledger import LedgerState, LedgerWriter, RowStatus, read_ledger, write_failures
from batch_tokenizer.runtime.processes import ProcessGroup, stop_with_parent
from batch_tokenizer.runtime.progress import JobStatus, ProgressReporter, RankStatus, read_status
from batch_tokenizer.runtime.run_folder import RunFolder
from batch_tokenizer.runtime.signals import StopRequest
from batch_tokenizer.runtime.work_queue import WorkQueue
from batch_tokenizer.writers.open import ResultSink, open_sink, recover_shards, run_settings
from batch_tokenizer.writers.pool import WriterPool

log = logging.getLogger(__name__)

#: Bytes of loaded input, and of results waiting for a writer, that a process holds at most.
LOADED_BYTES = 1 << 30
RESULT_BYTES = 1 << 29

#: What a file system says when it takes no row's files, whichever row it is.
STORAGE_TROUBLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE, errno.ENOTCONN)

#: Failures that each process names in its log; all of them are in ``failures.jsonl``.
FAILURES_LOGGED = 10

#: Seconds without a sign of life after which rank 0 stops waiting for another rank at the end.
SILENCE = 90.0

#: The same for a rank that has shown none yet: it may be loading a large model.
STARTING = 600.0

#: Seconds that the other ranks give rank 0 to list and index a corpus.
LISTING = 6 * 3600.0

Outputs = TypeVar("Outputs")


class Stopped(Exception):
    """A stop signal came while the process was waiting for something else."""


def run(config: RunConfig) -> int:
    """One process's part of a run, from the environment that its launcher gave it. Returns the exit status.

    Raises:
        RunError: the run cannot start or go on.
    """
    started = time.monotonic()
    processes = ProcessGroup.from_environment()
    stop_with_parent(processes)
    allow_pipes(config)
    if not processes.is_main:
        logging.getLogger().setLevel(logging.WARNING)
    with StopRequest() as stop:
        try:
            return _run(config, processes, stop, started)
        except Stopped:
            return _leave(stop)


@dataclass(frozen=True, slots=True)
class Job:
    """What a process knows before it touches the run folder."""

    config: RunConfig
    processes: ProcessGroup
    compute: ComputeDevice
    checkpoint: Checkpoint
    family: Family
    spec: CodecSpec
    num_quantizers: int

    @classmethod
    def prepare(cls, config: RunConfig, processes: ProcessGroup) -> Job:
        """Opens the checkpoint, chooses the device, and says so.

        Raises:
            RunError: the checkpoint or the device is not what was asked for.
        """
        torch.manual_seed(config.seed)
        checkpoint = Checkpoint.open(config.model_path)
        family = find_family(checkpoint)
        spec = family.open_spec(checkpoint)
        compute = choose_device(config.device, config.dtype, processes.local_rank, spec.cuda_dtype)
        spec = with_front_end(spec, config.front_end, compute)
        if compute.device.type == "cpu":
            # One thread an operation, several utterances at a time: faster for short ones, and results do not depend
            # on how many cores a process was given.
            torch.set_num_threads(1)
        most = spec.info.num_codebooks
        if config.num_quantizers is not None and config.num_quantizers > most:
            raise RunError(f"--num_quantizers {config.num_quantizers}: this checkpoint has {most} codebooks")
        job = cls(config, processes, compute, checkpoint, family, spec, config.num_quantizers or most)
        limit = job.limit
        log.info("batch_tokenizer %s: %s, rank 0 of %d (%s)",
                 __version__, config.task, processes.world_size, processes.launcher)  # fmt: skip
        log.info("%s", compute.reason)
        log.info("model %s (%s, fingerprint %s), %d of %d codebooks", checkpoint.folder, spec.info.family,
                 spec.info.fingerprint, job.num_quantizers, most)  # fmt: skip
        if limit.policy != "native" and limit.samples is not None:
            log.info("audio longer than %g s: %s", limit.samples / spec.info.sample_rate, limit.policy)
        return job

    @property
    def num_workers(self) -> int:
        """Loader processes."""
        return self.compute.loaders(self.config.num_workers)

    @property
    def limit(self) -> PassLimit:
        """What goes through the model in one pass."""
        return PassLimit.of(self.spec, self.config.long_audio, self.config.max_seconds)

    @property
    def info(self) -> dict[str, Any]:
        """What every token file of the run says about how it was made. Nothing about when, where or with whom."""
        return {
            "codec": self.spec.info.family,
            "fingerprint": self.spec.info.fingerprint,
            "sample_rate": self.spec.info.sample_rate,
            "frame_rate": self.spec.info.frame_rate,
            "codebook_sizes": list(self.spec.info.codebook_sizes[: self.num_quantizers]),
            "dtype": self.compute.dtype_name,
            "resampler": self.config.resampler,
            "version": __version__,
        }

    def open_folder(self, idle: Callable[[], None]) -> RunFolder:
        """The run folder, which refuses other settings than its own."""
        return RunFolder.open(
            self.config.run_dir or self.config.default_run_dir(),
            run_settings(self.config, self.num_quantizers, {**self.info, **self.limit.settings}),
            processes=self.processes,
            num_shards=self.config.num_shards,
            shard=self.config.shard,
            overwrite=self.config.overwrite,
            idle=idle,
        )

    def open_loader(self) -> AbstractContextManager[Loader]:
        """Loader processes for this rank."""
        return Loader(
            RowLoader(self.config.task, self.spec, self.config.resampler, self.num_quantizers, self.limit),
            num_workers=self.num_workers,
            rows_ahead=self.config.batch_size * self.config.prefetch,
            bytes_ahead=LOADED_BYTES,
            row_timeout=self.config.row_timeout,
        )

    def load_codec(self) -> Codec:
        """The weights that the task needs."""
        codec = self.family.load_codec(
            self.checkpoint, self.spec, task=self.config.task, device=self.compute.device, dtype=self.compute.dtype,
            attention=self.config.attention, threads=self.compute.cores,
        )  # fmt: skip
        if self.config.frame_budget is not None:
            codec.frame_budget = self.config.frame_budget
        return codec


def _run(config: RunConfig, processes: ProcessGroup, stop: StopRequest, started: float) -> int:
    job = Job.prepare(config, processes)
    if config.dry_run:
        return dry_run(
            config, processes, job.compute, job.checkpoint, job.spec, job.num_quantizers, job.info, _idle(stop)
        )  # fmt: skip
    return run_job(job, stop, started)


def with_front_end(spec: CodecSpec, asked: FrontEnd, compute: ComputeDevice) -> CodecSpec:
    """The spec that loader and codec share: features are made where ``asked``, or where it is faster.

    Raises:
        RunError: this codec cannot make them on a device.
    """
    if asked == "host" or (asked == "auto" and compute.device.type == "cpu"):
        return spec
    on_device = spec.with_device_front_end()
    if on_device is None and asked == "device":
        raise RunError(f"--front_end device: {spec.info.family} makes its features in loader processes; leave it out")
    log.info("features are made %s", "in loader processes" if on_device is None else f"on {compute.device}")
    return on_device or spec


def _idle(stop: StopRequest) -> Callable[[], None]:
    """What to call while waiting: it ends the wait when a stop signal has come."""

    def idle() -> None:
        if stop.requested:
            raise Stopped

    return idle


def run_job(job: Job, stop: StopRequest, started: float) -> int:
    """Everything from the run folder on; ``started`` is on the monotonic clock. Returns the exit status.

    Raises:
        RunError: the run cannot go on.
        Stopped: a signal came while it was waiting.
    """
    config, processes, idle = job.config, job.processes, _idle(stop)
    with job.open_folder(idle) as folder:
        manifest, status = _open_manifest(config, folder, idle)
        ours = in_shard(manifest, config.num_shards, config.shard)
        todo = status == RowStatus.PENDING
        if config.retry_failed:
            todo |= status == RowStatus.FAILED
        units = plan_units(
            manifest, world_size=processes.world_size, num_shards=config.num_shards, shard=config.shard, pending=todo
        )
        log.info("%d rows, %d to do, %d units", len(manifest), np.count_nonzero(todo & ours), len(units))
        with (
            LedgerWriter(folder.ledger_path) as ledger,
            ProgressReporter(
                folder,
                rows_total=int(np.count_nonzero(ours & ~manifest.is_blank)),
                rows_done_before=int(np.count_nonzero(ours & (status == RowStatus.DONE))),
                rows_failed_before=int(np.count_nonzero(ours & (status == RowStatus.FAILED) & ~todo)),
                device=str(job.compute.device),
            ) as progress,
            job.open_loader() as loader,
        ):
            progress.set_state("running")
            try:
                if len(units):
                    queue = WorkQueue.open(len(units), processes, folder.attempt_id)
                    claims = Claims(queue, units, manifest, todo, processes.world_size)
                    with (
                        open_sink(
                            config,
                            folder,
                            job.info,
                            job.num_quantizers,
                            job.spec.info.output_sample_rate,
                            ledger.append,
                        ) as sink,
                        _live_quality(config, job.spec) as quality,
                    ):
                        codec = job.load_codec()
                        worker = Worker(
                            config=config,
                            writers=min(4, max(2, job.num_workers)),
                            claims=claims,
                            loader=loader,
                            codec=codec,
                            long_rows=LongRows(codec, loader, stop, max(2, job.num_workers + 1), folder.path),
                            num_quantizers=job.num_quantizers,
                            sink=sink,
                            ledger=ledger,
                            progress=progress,
                            stop=stop,
                            quality=quality,
                        )
                        worker.work()
                        if quality is not None:
                            quality.close(1.0 if stop.requested else 10.0)
            except BaseException:
                progress.set_state("interrupted")
                raise
            progress.set_state("interrupted" if stop.requested else "finished")
            if processes.is_main:
                _await_others(folder, stop)
        if stop.requested:
            return _leave(stop)
        return _conclude(config, folder, manifest, time.monotonic() - started) if processes.is_main else 0


def _live_quality(config: RunConfig, spec: CodecSpec) -> AbstractContextManager[LiveQuality | None]:
    if not config.evaluate_every:
        return nullcontext()
    info = spec.info
    return LiveQuality(
        config.evaluate_every, dict(config.stop_below), info.sample_rate, info.output_sample_rate, config.resampler
    )


def _open_manifest(
    config: RunConfig, folder: RunFolder, idle: Callable[[], None]
) -> tuple[Manifest, npt.NDArray[np.uint8]]:
    """The manifest and each line's status. Rank 0 reads the ledger; all ranks plan from what it found."""
    if not folder.processes.is_main:
        status = folder.await_status(timeout=LISTING, idle=idle)
        path = folder.manifest or Path(config.data_list)
        return Manifest.open(path, config.task, folder.index_dir, sink=config.sink), status
    path = prepare(config, folder.path, idle)
    manifest = Manifest.open(path, config.task, folder.index_dir, sink=config.sink, progress=_IndexProgress(idle))
    recover_shards(config, folder, idle)
    state = read_ledger(folder.path, manifest, idle=idle)
    if state.num_changed:
        changed = f"{state.num_changed} finished rows changed in {config.data_list} ({', '.join(state.changed_keys)})"
        if not config.overwrite:
            raise RunError(
                f"{changed}: their outputs are of other input. Use another --run_dir, or --overwrite to do all again"
            )
        log.warning("%s: all rows are done again", changed)
        folder.discard_ledger()
        recover_shards(config, folder, idle)
        state = read_ledger(folder.path, manifest, idle=idle)
    _report_state(state)
    folder.share_status(state.status, path)
    return manifest, state.status


def _report_state(state: LedgerState) -> None:
    if state.num_done or state.num_failed:
        log.info("resuming: %d rows are done, %d failed", state.num_done, state.num_failed)
    if state.num_unreadable:
        log.warning("%d ledger lines cannot be read, as after a crash; their rows are done again", state.num_unreadable)
    if state.num_removed:
        log.warning("%d finished rows are no longer in the manifest", state.num_removed)


class _IndexProgress:
    """A log line now and then while a large manifest is indexed."""

    def __init__(self, idle: Callable[[], None]) -> None:
        self._idle = idle
        self._told = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        self._idle()
        if time.monotonic() - self._told >= 5.0:
            self._told = time.monotonic()
            log.info("indexing the manifest: %.0f %% of %.1f MB", 100 * done / max(total, 1), total / 1e6)


class Claims:
    """The rows of the units that this process claims, one unit after the other, and how many it should hold.

    A process that held many rows while few are left would keep them from the others, and if it is slow, all wait for
    it. So its share shrinks with what nobody has claimed yet.
    """

    def __init__(
        self, queue: WorkQueue, units: Units, manifest: Manifest, todo: npt.NDArray[np.bool_], world_size: int
    ) -> None:
        self._queue = queue
        self._units = units
        self._manifest = manifest
        self._todo = todo
        self._world_size = world_size
        self._left = np.append(np.cumsum((units.stops - units.starts)[::-1])[::-1], 0)
        self._least = max(1, int(self._left[0]) // (4 * len(units)))
        self._next = 0

    def __iter__(self) -> Iterator[ManifestRow | RowFailure]:
        while (unit := self._queue.claim()) is not None:
            self._next = unit + 1
            yield from (item for item in self._manifest.read(*self._units[unit]) if self._todo[item.line])

    def share(self, most: int) -> int:
        """Rows to load ahead, or to gather for a batch: ``most`` while many are left, then a sixteenth of an even share
        of those that nobody has claimed, so that a process ten times slower than the others can still be done with
        them when the others are; never less than a quarter of a unit, as small batches cost time too."""
        if self._world_size == 1:
            return most
        return min(most, max(self._least, int(self._left[self._next]) // (16 * self._world_size)))


@dataclass(slots=True)
class Worker:
    """The loop of one process: takes rows as they are claimed, ends each as done or failed."""

    config: RunConfig
    writers: int
    claims: Claims
    loader: Loader
    codec: Codec
    num_quantizers: int
    sink: ResultSink
    ledger: LedgerWriter
    progress: ProgressReporter
    stop: StopRequest
    long_rows: LongRows
    quality: LiveQuality | None = None
    failures_logged: int = 0
    in_flight: tuple[Batch, Computation] | None = None

    def work(self) -> None:
        """Until no row is left, or a stop signal: then what is loaded is finished within the grace time."""
        with WriterPool(
            self.writers,
            write=self._timed_write,
            on_done=self._on_done,
            on_failed=self._on_unwritten,
            bytes_pending=RESULT_BYTES,
        ) as writers:
            # A sixteenth is left for the gaps between packed utterances.
            batch_size = min(self.config.batch_size, self.codec.batch_limit or self.config.batch_size)
            packer = Packer(batch_size, max(1, self.codec.frame_budget * 15 // 16))
            held = 0
            for loaded in self._loaded():
                if loaded is None:  # nothing to do, so there is time to wait for the device
                    self._finish(writers)
                    continue
                if (stream := self.long_rows.stream_of(loaded.row)) is not None:
                    self._compute(Batch((loaded,)), writers, stream)
                    continue
                held += 1
                batches = packer.add(loaded)
                if held >= self.claims.share(batch_size):
                    batches += packer.flush()
                for batch in batches:
                    held -= len(batch.rows)
                    self._compute(batch, writers)
            for batch in packer.flush():
                if self.stop.seconds_since <= self.config.grace:
                    self._compute(batch, writers)
            self._finish(writers)
            if not writers.drain(self._time_left()):
                raise RunError(f"writing took longer than --grace {self.config.grace:g} s after the stop", exit_code=1)
            self.sink.close()

    def _time_left(self) -> float | None:
        """Seconds that the grace time still allows, at least two; None when nobody asked to stop."""
        return max(2.0, self.config.grace - self.stop.seconds_since) if self.stop.requested else None

    def _loaded(self) -> Iterator[LoadedRow | None]:
        """Keeps the loader fed, and yields what it has loaded; None now and then while there is nothing."""
        most = self.config.batch_size * self.config.prefetch
        source: Iterator[ManifestRow | RowFailure] | None = iter(self.claims)
        while True:
            if self.quality is not None:
                self.quality.check()
            if source is not None and not self._feed(source, most):
                source = None
            if self.stop.requested:
                source = None
                self.loader.stop_loading()
            if source is None and self.loader.pending == 0:
                return
            record = self.loader.next(timeout=0.5)
            if isinstance(record, RowFailure):
                self._fail(record)
            elif record is None:
                yield None
            else:
                self.progress.add_seconds("load", record.load_seconds)
                yield from self.long_rows.unfold(record)

    def _feed(self, source: Iterator[ManifestRow | RowFailure], most: int) -> bool:
        """Submits rows up to this process's share of them, some at a time; False when there are no more.

        A submission wakes the loader's thread, which for each single row would cost more than reading the row.
        """
        pending = self.loader.pending
        share = self.claims.share(most)
        if share - pending < min(16, (share + 3) // 4):
            return True
        rows: list[ManifestRow] = []
        more = True
        while more and pending + len(rows) < self.claims.share(most) and not self.stop.requested:
            item = next(source, None)
            if item is None:
                more = False
            elif isinstance(item, RowFailure):
                self._fail(item)
            else:
                rows.append(item)
        if rows:
            self.loader.submit(rows)
        return more

    def _compute(self, batch: Batch, writers: WriterPool, stream: CodecStream | None = None) -> None:
        """A batch through the codec and on to the writers. A piece of a row that is streamed goes alone through its
        ``stream``. Where the codec runs ahead, the batch before this one is waited for while this one is computed."""
        ahead = stream is None and self.codec.runs_ahead
        try:
            begun = self._begin(batch) if ahead else None
            outputs = None if ahead else self._encode_decode(batch, stream or self.codec)
        except RowError as error:
            self._finish(writers)
            self._compute_halves(batch, error, writers)
            return
        if outputs is not None:
            self._hand_over(batch, *outputs, writers)
        if begun is not None:
            self._finish(writers)
            self.in_flight = batch, begun

    def _compute_halves(self, batch: Batch, error: RowError, writers: WriterPool) -> None:
        """What did not fit in memory, in halves, down to one row."""
        self.codec.release()
        if len(batch.rows) == 1:
            self._fail(RowFailure.of(batch.rows[0].row, error.stage, error.reason))
            return
        # What did not fit once will not fit again: the smaller budget stays.
        longest = max(loaded.frames for loaded in batch.rows)
        self.codec.frame_budget = max(longest, min(self.codec.frame_budget, batch.frames) // 2)
        log.warning("out of memory with %d rows of %d frames in all: frame budget now %d",
                    len(batch.rows), batch.frames, self.codec.frame_budget)  # fmt: skip
        for half in split(batch):
            self._compute(half, writers)

    def _begin(self, batch: Batch) -> Computation:
        """
        Raises:
            RowError: it does not fit in memory.
        """
        task = self.config.task
        inputs = [loaded.codes if task == "token2wav" else loaded.features for loaded in batch.rows]
        present = [part for part in inputs if part is not None]
        return self._guarded(self._first_stage, lambda: self.codec.begin(task, present, self.num_quantizers))

    def _finish(self, writers: WriterPool) -> None:
        """Waits for the batch that the device works on, if there is one."""
        if self.in_flight is None:
            return
        (batch, begun), self.in_flight = self.in_flight, None
        try:
            computed = self._guarded(self._first_stage, begun.finish)
        except RowError as error:
            self._compute_halves(batch, error, writers)
            return
        for stage, seconds in computed.seconds.items():
            self.progress.add_seconds(stage, seconds)
        self._hand_over(batch, computed.codes, computed.samples, writers)

    @property
    def _first_stage(self) -> Stage:
        return "decode" if self.config.task == "token2wav" else "encode"

    def _encode_decode(
        self, batch: Batch, codec: Codec | CodecStream
    ) -> tuple[Sequence[npt.NDArray[np.uint16]], Sequence[npt.NDArray[np.float32]] | None]:
        """The batch's codes and samples.

        Raises:
            RowError: it does not fit in memory.
        """
        task = self.config.task
        codes: list[Any] = [loaded.codes for loaded in batch.rows]
        if task != "token2wav":
            features = [loaded.features for loaded in batch.rows if loaded.features is not None]
            codes = self._timed("encode", lambda: codec.encode(features, self.num_quantizers))
        return codes, None if task == "wav2token" else self._timed("decode", lambda: codec.decode(codes))

    def _hand_over(
        self,
        batch: Batch,
        codes: Sequence[npt.NDArray[np.uint16]],
        samples: Sequence[npt.NDArray[np.float32]] | None,
        writers: WriterPool,
    ) -> None:
        """The batch's results to the writers, those of pieces when their row is whole."""
        wavs = [None] * len(batch.rows) if samples is None else samples
        for loaded, code, wav in zip(batch.rows, codes, wavs, strict=True):
            result = TokenizedRow(loaded.row, code, wav, loaded.num_samples)
            if (whole := self.long_rows.fold(result)) is not None:
                writers.submit(whole)

    def _timed(self, stage: Stage, compute: Callable[[], Outputs]) -> Outputs:
        started = time.perf_counter()
        try:
            return self._guarded(stage, compute)
        finally:
            self.progress.add_seconds(stage, time.perf_counter() - started)

    def _guarded(self, stage: Stage, compute: Callable[[], Outputs]) -> Outputs:
        """What ``compute`` returns.

        Raises:
            RowError: there was not enough memory.
            RunError: the device failed.
        """
        try:
            return compute()
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise RowError(stage, "does not fit in memory, even alone: use a larger device, or cut it") from error
        except torch.AcceleratorError as error:
            reason = str(error).strip().splitlines()[0]
            raise RunError(
                f"{stage}: the device failed ({reason}); start the same command again", exit_code=1
            ) from error
        except RuntimeError as error:
            if "not enough memory" not in str(error) and "can't allocate memory" not in str(error):
                raise
            raise RowError(stage, "does not fit in memory, even alone: use a larger machine, or cut it") from error

    def _timed_write(self, result: TokenizedRow) -> None:
        started = time.perf_counter()
        try:
            self.sink.write(result)
        finally:
            self.progress.add_seconds("write", time.perf_counter() - started)

    def _on_done(self, result: TokenizedRow) -> None:
        """The row is published, or in a shard that will be."""
        info = self.codec.info
        rate = info.output_sample_rate if self.config.task == "token2wav" else info.sample_rate
        self.progress.row_done(result.num_samples / rate)
        if self.quality is not None:
            self.quality.offer(result)

    def _on_unwritten(self, result: TokenizedRow, error: RowError) -> None:
        if isinstance(error.__cause__, OSError) and error.__cause__.errno in STORAGE_TROUBLE:
            # Every row after it would fail as well, by the thousand, and none of them is to blame.
            raise RunError(
                f"{error.reason}; put that right and start the same command again, finished rows are kept", exit_code=1
            ) from error
        self._fail(RowFailure.of(result.row, error.stage, error.reason))

    def _fail(self, failure: RowFailure) -> None:
        if not self.long_rows.fails(failure):
            return
        self.ledger.append(
            LedgerEntry(
                line=failure.line,
                digest=failure.digest,
                key=failure.key,
                status="failed",
                stage=failure.stage,
                reason=failure.reason,
            )
        )
        self.progress.row_failed()
        self.failures_logged += 1
        if self.failures_logged <= FAILURES_LOGGED:
            log.warning("row %s (line %d) failed: %s: %s", failure.key, failure.line + 1, failure.stage, failure.reason)
        if self.failures_logged == FAILURES_LOGGED:
            log.warning("further failures of this process are not logged; failures.jsonl will have them all")


def _leave(stop: StopRequest) -> int:
    """The last line of a process that was asked to stop, and its exit status."""
    name = stop.signal_name or "SIGTERM"
    log.warning("stopped by %s; start the same command again to go on", name)
    return 128 + Signals[name].value


def _await_others(folder: RunFolder, stop: StopRequest) -> None:
    """Rank 0 stays until the other ranks have ended too, or show no sign of life, or it is asked to stop."""
    news: dict[int, tuple[RankStatus | None, float]] = {}
    while not stop.requested:
        ranks = {status.rank: status for status in read_status(folder.path).ranks if status.attempt == folder.attempt}
        now = time.monotonic()
        waiting = False
        for rank in range(1, folder.processes.world_size):
            status = ranks.get(rank)
            if status is not None and status.state in ("finished", "interrupted"):
                continue
            if rank not in news or news[rank][0] != status:
                news[rank] = status, now
            waiting |= now - news[rank][1] < (STARTING if status is None else SILENCE)
        if not waiting:
            return
        time.sleep(0.1)


def _conclude(config: RunConfig, folder: RunFolder, manifest: Manifest, wall_seconds: float) -> int:
    """Rank 0's last word: failures, summary, exit status."""
    state = read_ledger(folder.path, manifest)
    failures = write_failures(folder.path, manifest, state)
    job = JobStatus(tuple(rank for rank in read_status(folder.path).ranks if rank.attempt == folder.attempt))
    audio = job.audio_seconds
    rates = {stage: round(seconds / audio, 6) for stage, seconds in job.stage_seconds.items()} if audio else {}
    summary = {
        "rows": len(manifest),
        "done": state.num_done,
        "failed": state.num_failed,
        "pending": state.num_pending,
        "audio_hours": round(audio / 3600, 6),
        "wall_seconds": round(wall_seconds, 3),
        "rtf": round(wall_seconds / audio, 6) if audio else None,
        "rtf_per_stage": rates,
        "world_size": folder.processes.world_size,
        "failures": str(failures),
        "data_list": typed(config.data_list),
        "model_path": config.model_path,
    }
    folder.write_summary(summary)
    print(
        f"{state.num_done} rows done, {state.num_failed} failed, {state.num_pending} to do\n"
        f"{audio / 3600:.4f} h of audio in {wall_seconds:.1f} s: RTF "
        + (f"{wall_seconds / audio:.5f}" if audio else "-")
        + "".join(f", {stage} {rate:.5f}" for stage, rate in rates.items())
        + f"\nfailures: {failures}",
        flush=True,
    )
    if left := np.count_nonzero(state.pending & in_shard(manifest, config.num_shards, config.shard)):
        log.error("%d rows are neither done nor failed, as another rank went away; start the same command again", left)
        return 1
    if state.num_failed and (config.strict or not state.num_done):
        return 1
    return 0
