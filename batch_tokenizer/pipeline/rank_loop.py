"""``RankLoop``: the loop of one process, from loaded rows to the ledger.

row feed ──► packer ──► codec ──► writers ──► ledger
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from batch_tokenizer.codecs.base import Codec, CodecStream, Computation, Computed
from batch_tokenizer.codecs.memory import in_memory
from batch_tokenizer.config import RunConfig
from batch_tokenizer.data.batching import Packer, split
from batch_tokenizer.data.loader import Loader
from batch_tokenizer.pipeline.claimed_rows import ClaimedRows
from batch_tokenizer.pipeline.joined_rows import JoinedRows
from batch_tokenizer.pipeline.long_audio import LongRows
from batch_tokenizer.pipeline.row_feed import RowFeed
from batch_tokenizer.quality.live import LiveQuality
from batch_tokenizer.records import (
    Batch,
    LedgerEntry,
    LoadedRow,
    RowError,
    RowFailure,
    RunError,
    Stage,
    TokenizedRow,
)
from batch_tokenizer.runtime.ledger_writer import LedgerWriter
from batch_tokenizer.runtime.progress import ProgressReporter
from batch_tokenizer.runtime.signals import StopRequest
from batch_tokenizer.writers.open import ResultSink
from batch_tokenizer.writers.pool import WriterPool

log = logging.getLogger(__name__)

#: Bytes of results that wait for a writer.
_RESULT_BYTES = 1 << 29

#: Errors of a file system that takes no row's files, whichever row it is.
_STORAGE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE, errno.ENOTCONN)

#: Failures that each process names in its log; all of them are in ``failures.jsonl``.
_FAILURES_LOGGED = 10

Codes = npt.NDArray[np.uint16]
Samples = npt.NDArray[np.float32]
Result = TypeVar("Result")


@dataclass(slots=True)
class RankLoop:
    """Takes rows as they are claimed, ends each as done or failed.

    Attributes:
        batch_size: most utterances in a batch.
        num_writers: threads that write results.
        num_quantizers: codebooks that are encoded.
        quality: scores some rows beside the run.
    """

    config: RunConfig
    claimed: ClaimedRows
    loader: Loader
    codec: Codec
    joined_rows: JoinedRows
    long_rows: LongRows
    sink: ResultSink
    ledger: LedgerWriter
    progress: ProgressReporter
    stop: StopRequest
    batch_size: int
    num_writers: int
    num_quantizers: int
    quality: LiveQuality | None = None
    _in_flight: tuple[Batch, Computation] | None = field(init=False, default=None)
    _num_failures: int = field(init=False, default=0)
    _writers: WriterPool = field(init=False)

    def run(self) -> None:
        """Until no row is left, or a stop signal: then what is loaded is finished within the grace time.

        Raises:
            RunError: the run cannot go on (exit code 1).
        """
        with WriterPool(
            self.num_writers,
            write=self._write,
            on_done=self._on_done,
            on_failed=self._on_unwritten,
            bytes_pending=_RESULT_BYTES,
        ) as self._writers:
            # 1. Rows go into batches, and batches through the codec as soon as they are full.
            self._compute_rows()
            # 2. The last results are written.
            if not self._writers.drain(self._seconds_left()):
                raise RunError(f"writing took longer than --grace {self.config.grace:g} s after the stop", exit_code=1)
            self.sink.close()

    def _compute_rows(self) -> None:
        batch_size = min(self.batch_size, self.codec.batch_limit or self.batch_size)
        packer = Packer(batch_size, self._packed_frames)
        most_ahead = self.batch_size * self.config.prefetch
        held = 0
        feed = RowFeed(
            self.claimed, self.loader, self.joined_rows, self.long_rows, self.stop, self.progress, most_ahead,
            on_failure=self._end,
        )  # fmt: skip
        for ready in feed:
            # 1. Live quality may end the run, between batches.
            if self.quality is not None:
                self.quality.check()
            if ready is None:  # nothing to begin, so there is time to wait for the device
                self._finish_batch()
                continue
            # 2. A piece of a streamed row goes alone, as its stream keeps the state from piece to piece.
            loaded, stream = ready
            if stream is not None:
                self._compute(Batch((loaded,)), stream)
                continue
            # 3. Other rows gather in batches.
            held += 1
            packer.frame_budget = self._packed_frames  # it shrinks after a batch that did not fit
            batches = packer.add(loaded)
            # Near the end, rows must not wait for a batch that the rows left would not fill.
            if held >= self.claimed.prefetch_limit(batch_size):
                batches += packer.flush()
            for batch in batches:
                held -= len(batch.rows)
                self._compute(batch)
        # 4. The last, partly filled batches; after a stop signal as far as the grace time goes.
        for batch in packer.flush():
            if self.stop.seconds_since <= self.config.grace:
                self._compute(batch)
        self._finish_batch()

    @property
    def _packed_frames(self) -> int:
        """Frames in a batch: a sixteenth of the budget is left for the gaps between packed utterances."""
        return max(1, self.codec.frame_budget * 15 // 16)

    def _seconds_left(self) -> float | None:
        """Seconds that the grace time still allows, at least two; None before a stop signal."""
        return max(2.0, self.config.grace - self.stop.seconds_since) if self.stop.requested else None

    # --------------------------------------------------------------------------------------------------------- codec

    def _compute(self, batch: Batch, stream: CodecStream | None = None) -> None:
        """A batch through the codec and on to the writers, or a piece of a streamed row through its ``stream``. Where
        the codec runs ahead, the batch before this one is waited for while this one is computed."""
        ahead = stream is None and self.codec.runs_ahead
        try:
            begun = self._begin(batch) if ahead else None
            computed = (
                None if ahead else encode_decode(batch.rows, stream or self.codec, self.config, self.num_quantizers)
            )
        except RowError as error:
            # The batch before it, which the device still holds, may have taken the memory: it is finished first.
            self._finish_batch()
            self._compute_halves(batch, error)
            return
        if computed is not None:
            self._hand_over(batch, computed)
        if begun is not None:
            self._finish_batch()
            self._in_flight = batch, begun

    def _compute_halves(self, batch: Batch, error: RowError) -> None:
        """What did not fit in memory, in halves, down to one row."""
        self.codec.release()
        if len(batch.rows) == 1:
            self._end(RowFailure.of(batch.rows[0].row, error.stage, error.reason))
            return
        # What did not fit once will not fit again: the smaller budget stays. It is halved, never set to what the batch
        # has, so that packs keep to a few sizes.
        budget = self.codec.frame_budget // 2
        while budget >= batch.frames > 1:
            budget //= 2
        self.codec.frame_budget = max(1, budget)
        log.warning(
            "out of memory with %d rows of %d frames in all: frame budget now %d; in 16 bits, the tokens of the rows "
            "from here on may differ in some bits from those of a device with more memory",
            len(batch.rows), batch.frames, self.codec.frame_budget,
        )  # fmt: skip
        for half in split(batch):
            self._compute(half)

    def _begin(self, batch: Batch) -> Computation:
        """
        Raises:
            RowError: it does not fit in memory.
        """
        task = self.config.task
        inputs = [loaded.codes if task == "token2wav" else loaded.features for loaded in batch.rows]
        present = [part for part in inputs if part is not None]
        return in_memory(self._first_stage, lambda: self.codec.begin(task, present, self.num_quantizers))

    def _finish_batch(self) -> None:
        """Waits for the batch that the device works on, if there is one."""
        if self._in_flight is None:
            return
        (batch, begun), self._in_flight = self._in_flight, None
        try:
            computed = in_memory(self._first_stage, begun.finish)
        except RowError as error:
            del begun  # it may hold the batch's memory on the device
            self._compute_halves(batch, error)
            return
        self._hand_over(batch, computed)

    @property
    def _first_stage(self) -> Stage:
        return "decode" if self.config.task == "token2wav" else "encode"

    def _hand_over(self, batch: Batch, computed: Computed) -> None:
        for stage, seconds in computed.seconds.items():
            self.progress.add_seconds(stage, seconds)
        for result in tokenized_rows(batch.rows, computed):
            self._end(result)

    # ------------------------------------------------------------------------------------------------- ends of rows

    def _end(self, outcome: TokenizedRow | RowFailure) -> None:
        """A row, a piece of a long one, or one of several audio fields of a row was computed or failed."""
        one = self.long_rows.fold(outcome)
        whole = None if one is None else self.joined_rows.join(one)
        if isinstance(whole, RowFailure):
            self._record_failure(whole)
        elif whole is not None:
            self._writers.submit(whole)

    def _record_failure(self, failure: RowFailure) -> None:
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
        self._num_failures += 1
        if self._num_failures <= _FAILURES_LOGGED:
            log.warning("row %s (line %d) failed: %s: %s", failure.key, failure.line + 1, failure.stage, failure.reason)
        if self._num_failures == _FAILURES_LOGGED:
            log.warning("further failures of this process are not logged; failures.jsonl will have them all")

    # ---------------------------------------------------------------------------------------------- writer threads

    def _write(self, result: TokenizedRow) -> None:
        started = time.perf_counter()
        try:
            self.sink.write(result)
        finally:
            self.progress.add_seconds("write", time.perf_counter() - started)

    def _on_done(self, result: TokenizedRow) -> None:
        """The row is published, or in a shard that will be."""
        info = self.codec.info
        rate = info.output_sample_rate if self.config.task == "token2wav" else info.sample_rate
        num_samples = result.num_samples + sum(other.num_samples for other in result.others.values())
        self.progress.row_done(num_samples / rate)
        if self.quality is not None:
            self.quality.offer(result)

    def _on_unwritten(self, result: TokenizedRow, error: RowError) -> None:
        if isinstance(error.__cause__, OSError) and error.__cause__.errno in _STORAGE_ERRORS:
            # Every row after it would fail as well, by the thousand, and none of them is to blame.
            raise RunError(
                f"{error.reason}; put that right and start the same command again, finished rows are kept", exit_code=1
            ) from error
        self._record_failure(RowFailure.of(result.row, error.stage, error.reason))


def encode_decode(
    rows: Sequence[LoadedRow], codec: Codec | CodecStream, config: RunConfig, num_quantizers: int
) -> Computed:
    """Codes, samples and hidden states of loaded rows, those of them that the run keeps, and the seconds they took.

    Raises:
        RowError: the rows do not fit in memory.
    """
    seconds: dict[Stage, float] = {}

    def timed(stage: Stage, compute: Callable[[], Result]) -> Result:
        started = time.perf_counter()
        result = in_memory(stage, compute)
        seconds[stage] = time.perf_counter() - started
        return result

    codes: list[Any] = [loaded.codes for loaded in rows]
    features = [loaded.features for loaded in rows if loaded.features is not None]
    hidden_states = None
    if config.hidden_states:
        codes, hidden_states = timed("encode", lambda: codec.encode_hidden(features, num_quantizers))
    elif config.task != "token2wav":
        codes = timed("encode", lambda: codec.encode(features, num_quantizers))
    samples = None if config.task == "wav2token" else timed("decode", lambda: codec.decode(codes))
    return Computed(codes, samples, seconds, hidden_states)


def tokenized_rows(rows: Sequence[LoadedRow], computed: Computed) -> Iterator[TokenizedRow]:
    """Each loaded row with its part of what was computed of all of them."""
    absent = [None] * len(rows)
    samples, hidden_states = computed.samples or absent, computed.hidden_states or absent
    for loaded, codes, audio, hidden in zip(rows, computed.codes, samples, hidden_states, strict=True):
        yield TokenizedRow(loaded.row, codes, audio, loaded.num_samples, hidden_states=hidden)
