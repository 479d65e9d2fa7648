"""A run: the manifest's rows go through loader, packer, codec and writers, and end in the ledger.

    manifest ──► work queue ──► loader processes ──► packer ──► codec ──► writers ──► ledger

``run`` prepares what a job does once (run folder, manifest, ledger, units), ``Worker`` is the loop of one process, and
``_conclude`` is rank 0's last word. A row counts as ended only when its line is in the ledger, which comes after its
outputs are published.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from signal import Signals

import numpy as np

from batch_tokenizer.config import RunConfig
from batch_tokenizer.manifest.manifest import Manifest
from batch_tokenizer.manifest.units import in_shard, plan_units
from batch_tokenizer.pipeline.claims import Claims
from batch_tokenizer.pipeline.long_audio import LongRows
from batch_tokenizer.pipeline.setup import Job, open_live_quality, open_manifest
from batch_tokenizer.pipeline.worker import Worker
from batch_tokenizer.runs.source import allow_pipes, typed
from batch_tokenizer.runtime.ledger import LedgerWriter, RowStatus, read_ledger, write_failures
from batch_tokenizer.runtime.processes import ProcessGroup, stop_with_parent
from batch_tokenizer.runtime.progress import JobStatus, ProgressReporter, RankStatus, read_status
from batch_tokenizer.runtime.run_folder import RunFolder
from batch_tokenizer.runtime.signals import StopRequest
from batch_tokenizer.runtime.work_queue import WorkQueue
from batch_tokenizer.writers.open import open_sink

log = logging.getLogger(__name__)

#: Seconds without a sign of life after which rank 0 stops waiting for another rank at the end.
SILENCE = 90.0

#: The same for a rank that has shown none yet: it may be loading a large model.
STARTING = 600.0


class Stopped(Exception):
    """A stop signal came while the process was waiting for something else."""


def run(config: RunConfig, execute: Callable[[Job, StopRequest, float], int] | None = None) -> int:
    """One process's part of a run, from the environment that its launcher gave it. Returns the exit status.

    Args:
        execute: what to do with the prepared job in place of running it; ``run_job`` when None.

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
            return (execute or run_job)(Job.prepare(config, processes), stop, started)
        except Stopped:
            return _leave(stop)


def stop_check(stop: StopRequest) -> Callable[[], None]:
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
    config, processes, idle = job.config, job.processes, stop_check(stop)
    with job.open_folder(idle) as folder:
        manifest, status = open_manifest(config, folder, idle)
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
                        open_live_quality(config, job.spec) as quality,
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
