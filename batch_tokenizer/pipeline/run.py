"""A run: the manifest's rows go through loader, packer, codec and writers, and end in the ledger.

    manifest ──► work queue ──► loader processes ──► packer ──► codec ──► writers ──► ledger

``run_job`` prepares what a job does once (run folder, manifest, ledger, units), ``RankLoop`` is the loop of one
process, and rank 0 writes the summary. A row counts as ended only when its line is in the ledger, which comes after its
outputs are published.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from batch_tokenizer.manifest.manifest import Manifest
from batch_tokenizer.manifest.units import in_shard, plan_units
from batch_tokenizer.pipeline.claimed_rows import ClaimedRows
from batch_tokenizer.pipeline.ending import ending_lines, work_figures
from batch_tokenizer.pipeline.joined_rows import JoinedRows
from batch_tokenizer.pipeline.long_audio import LongRows
from batch_tokenizer.pipeline.rank_loop import RankLoop
from batch_tokenizer.pipeline.setup import RunContext, open_live_quality, open_manifest
from batch_tokenizer.quality.live import LiveQuality
from batch_tokenizer.records import ManifestRow, printable
from batch_tokenizer.runs.finished_run import FinishedRun
from batch_tokenizer.runs.output_rows import write_run_manifest
from batch_tokenizer.runs.source import typed
from batch_tokenizer.runtime.devices import environment_of
from batch_tokenizer.runtime.environments import agree_on_environment, read_environments
from batch_tokenizer.runtime.ledger import RowStatus, read_ledger, write_failures
from batch_tokenizer.runtime.ledger_writer import LedgerWriter
from batch_tokenizer.runtime.progress import JobStatus, ProgressReporter, RankStatus, read_status
from batch_tokenizer.runtime.run_files import SUMMARY, read_record
from batch_tokenizer.runtime.run_folder import RunFolder
from batch_tokenizer.runtime.signals import StopRequest
from batch_tokenizer.runtime.work_queue import WorkQueue
from batch_tokenizer.storage.names import is_url
from batch_tokenizer.writers.open import open_sink

log = logging.getLogger(__name__)

#: Seconds without a sign of life after which rank 0 stops waiting for another rank at the end.
_SILENT_SECONDS = 90.0

#: The same for a rank that has shown none yet: it may be loading a large model.
_STARTING_SECONDS = 600.0


def run_job(context: RunContext) -> int:
    """Everything from the run folder on. Returns the exit status.

    Raises:
        RunError: the run cannot go on.
        Stopped: a stop signal came; what was in flight is finished.
    """
    config, processes, stop = context.config, context.processes, context.stop
    with context.open_folder() as folder:
        # 1. What there is to do. All ranks plan from the state that rank 0 found.
        manifest, status = open_manifest(context, folder)
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
                device=str(context.compute.device),
                quiet=config.quiet,
            ) as progress,
            context.open_loader() as loader,
        ):
            progress.set_state("running")
            try:
                quality: LiveQuality | None = None
                # 2. The rows. Loader processes start while the codec is loaded.
                if len(units):
                    queue = WorkQueue.open(len(units), processes, folder.attempt_id, stop.check)
                    with (
                        open_sink(
                            config,
                            folder,
                            context.info,
                            context.num_quantizers,
                            context.spec.info.output_sample_rate,
                            ledger.append,
                            _fields_of_first_rows(manifest),
                        ) as sink,
                        open_live_quality(config, context.spec) as quality,
                    ):
                        codec = context.load_codec()
                        agree_on_environment(
                            folder,
                            {**environment_of(context.compute), "compiled": codec.compiled},
                            sixteen_bits=context.compute.dtype != torch.float32,
                            allow_mixed=config.allow_mixed_devices,
                        )
                        RankLoop(
                            config=config,
                            claimed=ClaimedRows(queue, units, manifest, todo, processes.world_size),
                            loader=loader,
                            codec=codec,
                            joined_rows=JoinedRows(config.other_audio),
                            long_rows=LongRows(codec, loader, stop, max(2, context.num_workers + 1), folder.path),
                            sink=sink,
                            ledger=ledger,
                            progress=progress,
                            stop=stop,
                            batch_size=context.batch_size,
                            num_writers=min(4, max(2, context.num_workers)),
                            num_quantizers=context.num_quantizers,
                            quality=quality,
                        ).run()
                        if quality is not None:
                            quality.close(1.0 if stop.requested else 60.0 if config.stop_below else 10.0)
            except BaseException:
                progress.set_state("interrupted")
                raise
            progress.set_state("interrupted" if stop.requested else "finished")
            # 3. Rank 0 stays for the others, and then writes what all have done.
            if processes.is_main:
                _await_others(folder, stop)
        stop.check()
        exit_status = 0
        if processes.is_main:
            exit_status = _summarize(context, folder, manifest, len(units) > 0, progress.computing_since)
        if quality is not None:
            quality.check_at_end()
        return exit_status


def _fields_of_first_rows(manifest: Manifest) -> Iterator[Mapping[str, Any]]:
    """The fields of the manifest's rows, some thousand from the first on."""
    for row in manifest.read(0, min(manifest.num_lines, 2000)):
        if isinstance(row, ManifestRow):
            yield row.fields


def _await_others(folder: RunFolder, stop: StopRequest) -> None:
    """Rank 0 stays until the other ranks have ended too, or show no sign of life, or it is asked to stop."""
    last_seen: dict[int, tuple[RankStatus | None, float]] = {}
    while not stop.requested:
        ranks = {status.rank: status for status in _job_status(folder).ranks}
        now = time.monotonic()
        waiting = False
        for rank in range(1, folder.processes.world_size):
            status = ranks.get(rank)
            if status is not None and status.state in ("finished", "interrupted"):
                continue
            # Any change of its status file is a sign of life; clocks of machines are not compared.
            if rank not in last_seen or last_seen[rank][0] != status:
                last_seen[rank] = status, now
            waiting |= now - last_seen[rank][1] < (_STARTING_SECONDS if status is None else _SILENT_SECONDS)
        if not waiting:
            return
        time.sleep(0.1)


def _job_status(folder: RunFolder) -> JobStatus:
    """The processes of this job, in this attempt."""
    return read_status(folder.path, folder.attempt)


def _summarize(
    context: RunContext, folder: RunFolder, manifest: Manifest, had_work: bool, computing_since: float | None
) -> int:
    """Rank 0, when the job's rows have ended: writes failures and summary; returns the exit status.

    Args:
        had_work: whether this attempt found rows to do.
        computing_since: when this rank computed its first row, on the monotonic clock; None if it computed none.
    """
    # 1. The ledger once more, which now has the rows of all ranks.
    config = context.config
    state = read_ledger(folder.path, manifest)
    failures = write_failures(folder.path, manifest, state)
    job = _job_status(folder)
    figures = work_figures(
        job.audio_seconds,
        time.monotonic() - context.started,
        (computing_since or context.started) - context.started,
        job.stage_seconds,
        folder.processes.world_size,
    )
    earlier = {} if had_work else read_record(folder.path / SUMMARY)
    summary = {
        "rows": len(manifest),
        "done": state.num_done,
        "failed": state.num_failed,
        "pending": state.num_pending,
        **{name: earlier.get(name, value) for name, value in figures.items()},
        "failures": str(failures),
        "environments": read_environments(folder.path),
        "data_list": typed(config.data_list),
        "model_path": config.model_path,
    }
    # 2. Once every job is finished: a manifest of all outputs, written beside them. Shards of JSON lines are a
    #    manifest themselves, and a reader of all JSON-lines files in the folder would take a second one for rows.
    known = read_record(folder.path / SUMMARY).get("manifest")
    has_place = config.output_dir is not None and not is_url(config.output_dir) and config.sink != "jsonl"
    if has_place and not state.num_pending and (had_work or not known):
        run = FinishedRun.open(folder.path)
        written = write_run_manifest(run, manifest, Path(str(config.output_dir)), known, context.stop.check)
        known = str(written) if written is not None else known
    if known:
        summary["manifest"] = known
    # 3. The same to a file and to the terminal.
    folder.write_summary(summary)
    lines = ending_lines(
        config, manifest, state, figures, had_work=had_work, run_dir=folder.path, failures=failures,
        outputs_manifest=known,
    )  # fmt: skip
    print("\n".join(map(printable, lines)), flush=True)
    # 4. The exit status.
    if left := np.count_nonzero(state.pending & in_shard(manifest, config.num_shards, config.shard)):
        log.error("%d rows are neither done nor failed, as a rank ended early; start the same command again", left)
        return 1
    return 1 if config.too_many_failed(state.num_failed, state.num_done + state.num_failed) else 0
