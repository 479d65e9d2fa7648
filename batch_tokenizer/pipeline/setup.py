"""What a run needs before its first row: checkpoint, device, run folder, manifest, loader."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from batch_tokenizer import __version__
from batch_tokenizer.audio_fields import OtherAudio
from batch_tokenizer.codecs.base import Codec, CodecSpec
from batch_tokenizer.codecs.checkpoint import Checkpoint
from batch_tokenizer.codecs.opening import CodecSetup
from batch_tokenizer.config import RunConfig
from batch_tokenizer.data.loader import Loader
from batch_tokenizer.data.loading import RowLoader
from batch_tokenizer.data.pieces import PassLimit
from batch_tokenizer.manifest.manifest import Manifest
from batch_tokenizer.pipeline.other_outputs import warn_of_other_outputs
from batch_tokenizer.quality.live import LiveQuality
from batch_tokenizer.records import SHARD_SINKS, ManifestRow, RunError
from batch_tokenizer.runs.output_rows import run_as_source
from batch_tokenizer.runs.source import allow_pipes, prepare
from batch_tokenizer.runtime.devices import ComputeDevice
from batch_tokenizer.runtime.ledger import LedgerState, read_ledger
from batch_tokenizer.runtime.processes import ProcessGroup
from batch_tokenizer.runtime.run_folder import RunFolder
from batch_tokenizer.runtime.run_settings import run_dir_of
from batch_tokenizer.runtime.signals import StopRequest
from batch_tokenizer.writers.open import recover_shards, run_settings

log = logging.getLogger(__name__)

#: Bytes of loaded input that a process holds at most.
_LOADED_BYTES = 1 << 30

#: Rows in which fields of other audio are looked for.
_ROWS_LOOKED_AT = 1000

#: Seconds that the other ranks give rank 0 to list and index a corpus.
_LISTING_SECONDS = 6 * 3600.0


@contextmanager
def open_context(config: RunConfig) -> Iterator[RunContext]:
    """One process's part of a run or a dry run, in the environment that its launcher gave it.

    Raises:
        RunError: the run cannot start.
    """
    started = time.monotonic()
    processes = ProcessGroup.from_environment()
    allow_pipes(config)
    if config.quiet or not processes.is_main:
        logging.getLogger().setLevel(logging.WARNING)
    announcement = (
        f"finishing the batches in progress, at most {config.grace:g} s (--grace); a second signal stops at once"
    )
    with StopRequest(announcement if processes.is_main else None) as stop:
        yield RunContext.prepare(config, processes, stop, started)


@dataclass(frozen=True, slots=True)
class RunContext:
    """What a process has before it opens the run folder.

    Attributes:
        num_quantizers: codebooks that the run uses.
        stop: whether the process is asked to stop.
        started: when it began, on the monotonic clock.
    """

    config: RunConfig
    processes: ProcessGroup
    codec: CodecSetup
    num_quantizers: int
    stop: StopRequest
    started: float

    @classmethod
    def prepare(
        cls,
        config: RunConfig,
        processes: ProcessGroup,
        stop: StopRequest,
        started: float,
        codec: CodecSetup | None = None,
    ) -> RunContext:
        """Opens the checkpoint, chooses the device, and logs both.

        Args:
            codec: where it is open already.

        Raises:
            RunError: the checkpoint or the device is not what was asked for.
        """
        # 1. Checkpoint, device and number format. No weights are read yet, so a wrong flag fails within seconds.
        codec = codec or CodecSetup.open(
            Checkpoint.open(config.model_path), device=config.device, dtype=config.dtype, front_end=config.front_end,
            attention=config.attention, options=config.codec_options, local_rank=processes.local_rank,
        )  # fmt: skip
        info = codec.spec.info
        most = info.num_codebooks
        if config.num_quantizers is not None and config.num_quantizers > most:
            raise RunError(f"--num_quantizers {config.num_quantizers}: this checkpoint has {most} codebooks")
        context = cls(config, processes, codec, config.num_quantizers or most, stop, started)
        # 2. Say what will be computed with, which is also what the outputs' ``info`` says.
        limit = context.limit
        log.info("batch_tokenizer %s: %s, rank 0 of %d (%s)",
                 __version__, config.task, processes.world_size, processes.launcher)  # fmt: skip
        log.info("%s", codec.compute.reason)
        log.info("model %s (%s, fingerprint %s), %d of %d codebooks", codec.checkpoint.folder, info.family,
                 info.fingerprint, context.num_quantizers, most)  # fmt: skip
        if limit.policy != "native" and limit.samples is not None:
            log.info("audio longer than %g s: %s", limit.samples / info.sample_rate, limit.policy)
        return context

    @property
    def compute(self) -> ComputeDevice:
        """The device that the rank computes on."""
        return self.codec.compute

    @property
    def spec(self) -> CodecSpec:
        """The spec that loader processes and the codec share."""
        return self.codec.spec

    @property
    def num_workers(self) -> int:
        """Loader processes."""
        return self.compute.loaders(self.config.num_workers)

    @property
    def batch_size(self) -> int:
        """Most utterances in a batch."""
        return self.compute.batch_size(self.config.batch_size)

    @property
    def limit(self) -> PassLimit:
        """What goes through the model in one pass."""
        return PassLimit.of(self.spec, self.config.long_audio, self.config.max_seconds)

    @property
    def info(self) -> dict[str, Any]:
        """What every token file of the run says about how it was made, not when, where or beside which rows."""
        info = self.codec.token_info(self.num_quantizers, self.config.resampler)
        others = self.config.other_audio
        return info | ({"other_audio": {one.codes: one.setting for one in others}} if others else {})

    @property
    def run_settings(self) -> dict[str, Any]:
        """What all commands on one run folder must have in common."""
        return run_settings(self.config, self.num_quantizers, {**self.info, **self.limit.settings})

    def open_folder(self) -> RunFolder:
        """The run folder, which refuses other settings than its own."""
        return RunFolder.open(
            run_dir_of(self.config),
            self.run_settings,
            processes=self.processes,
            num_shards=self.config.num_shards,
            shard=self.config.shard,
            overwrite=self.config.overwrite,
            idle=self.stop.check,
        )

    def open_loader(self) -> AbstractContextManager[Loader]:
        """Loader processes for this rank."""
        return Loader(
            RowLoader(self.config.task, self.spec, self.config.resampler, self.num_quantizers, self.limit),
            num_workers=self.num_workers,
            rows_ahead=self.batch_size * self.config.prefetch,
            bytes_ahead=_LOADED_BYTES,
            row_timeout=self.config.row_timeout,
        )

    def load_codec(self) -> Codec:
        """The codec with the weights that the task needs."""
        return self.codec.load(self.config.task, self.config.frame_budget)


def open_live_quality(config: RunConfig, spec: CodecSpec) -> AbstractContextManager[LiveQuality | None]:
    """Scores of some rows beside the run, if they were asked for."""
    if not config.evaluate_every:
        return nullcontext()
    info = spec.info
    return LiveQuality(
        config.evaluate_every, dict(config.stop_below), info.sample_rate, info.output_sample_rate, config.resampler
    )


def open_manifest(context: RunContext, folder: RunFolder) -> tuple[Manifest, npt.NDArray[np.uint8]]:
    """The manifest and each line's status. Rank 0 reads the ledger; all ranks plan from what it found.

    Raises:
        RunError: the source, the manifest or the ledger cannot be read, or finished rows changed.
        Stopped: a stop signal came.
    """
    config, idle = context.config, context.stop.check
    if not folder.processes.is_main:
        status = folder.await_status(timeout=_LISTING_SECONDS, idle=idle)
        path = folder.manifest or Path(config.data_list)
        return Manifest.open(path, config.task, folder.index_dir, sink=config.sink), status
    # 1. One local manifest, whatever the source is.
    source = str(config.data_list)
    if config.task == "token2wav":
        source = run_as_source(source, folder.index_dir, idle)
    path = prepare(config, folder.path, source, idle)
    manifest = Manifest.open(path, config.task, folder.index_dir, sink=config.sink, progress=_IndexProgress(idle))
    # 2. What is done, after half-published shards are settled.
    recover_shards(config, folder)
    state = read_ledger(folder.path, manifest, idle=idle)
    # 3. Outputs of rows that changed since are of other input, which must not pass unnoticed.
    if state.num_changed:
        changed = f"{state.num_changed} finished rows changed in {config.data_list} ({', '.join(state.changed_keys)})"
        if not config.overwrite:
            raise RunError(
                f"{changed}: their outputs are of other input. Use another --run_dir, or --overwrite to do all again"
            )
        log.warning("%s: all rows are done again", changed)
        folder.discard_ledger()
        recover_shards(config, folder)
        state = read_ledger(folder.path, manifest, idle=idle)
    _report_state(state)
    warn_of_absent_fields(manifest, config.other_audio)
    if config.sink not in SHARD_SINKS:
        warn_of_other_outputs(manifest, state.status, context.info)
    folder.share_status(state.status, path)
    return manifest, state.status


def warn_of_absent_fields(manifest: Manifest, others: tuple[OtherAudio, ...]) -> None:
    """Log a warning for each field of other audio that none of the first rows has."""
    first_rows = manifest.read(0, min(manifest.num_lines, _ROWS_LOOKED_AT)) if others else []
    rows = [row for row in first_rows if isinstance(row, ManifestRow)]
    for other in others:
        if other.field is not None and rows and not any(other.field in row.fields for row in rows):
            log.warning("--audio_fields: none of the first %d rows has a field %s", len(rows), other.field)


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
        self._last_logged = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        self._idle()
        if time.monotonic() - self._last_logged >= 5.0:
            self._last_logged = time.monotonic()
            log.info("indexing the manifest: %.0f %% of %.1f MB", 100 * done / max(total, 1), total / 1e6)
