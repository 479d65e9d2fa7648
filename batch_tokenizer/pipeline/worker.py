"""The loop of one process: rows that it claimed go through loader, packer, codec and writers, and end in the ledger."""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from batch_tokenizer.codecs.base import Codec, CodecStream, Computation
from batch_tokenizer.config import RunConfig
from batch_tokenizer.data.batching import Packer, split
from batch_tokenizer.data.loader import Loader
from batch_tokenizer.pipeline.claims import Claims
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
from batch_tokenizer.runtime.ledger import LedgerWriter
from batch_tokenizer.runtime.progress import ProgressReporter
from batch_tokenizer.runtime.signals import StopRequest
from batch_tokenizer.writers.open import ResultSink
from batch_tokenizer.writers.pool import WriterPool

RESULT_BYTES = 1 << 29

log = logging.getLogger(__name__)

#: What a file system says when it takes no row's files, whichever row it is.
STORAGE_TROUBLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE, errno.ENOTCONN)

#: Failures that each process names in its log; all of them are in ``failures.jsonl``.
FAILURES_LOGGED = 10

Outputs = TypeVar("Outputs")


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
