"""``verify --recompute N``: rows of a run are tokenized again on this device and compared with what stands.

Each row is computed alone, and all of them together in a shuffled order. If the codes are the same, they do not depend
on what a row was batched with. With another number format, ``--dtype float32``, the share of equal codes says what that
format costs.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from batch_tokenizer.audio.loading import load_samples
from batch_tokenizer.audio_fields import from_settings, parts_of
from batch_tokenizer.codecs.base import Codec
from batch_tokenizer.codecs.checkpoint import Checkpoint
from batch_tokenizer.codecs.offline import encode
from batch_tokenizer.codecs.opening import CodecSetup
from batch_tokenizer.commands.verify_rows import Problem
from batch_tokenizer.config import Device, Dtype
from batch_tokenizer.data.other_codes import read_other_codes
from batch_tokenizer.data.token_files import read_tokens
from batch_tokenizer.manifest.manifest import Manifest
from batch_tokenizer.records import ManifestRow, RowError, RowFailure, RunError
from batch_tokenizer.runs.finished_run import FinishedRun
from batch_tokenizer.runs.scored_rows import rows_with_outputs
from batch_tokenizer.runtime.ledger import LedgerState, RowStatus

log = logging.getLogger(__name__)

#: Seconds of audio that a sampled row has at most, as all of the sample is in memory at once.
_MOST_SECONDS = 120.0

Codes = npt.NDArray[np.uint16]


@dataclass(frozen=True, slots=True)
class StoredCodes:
    """A sampled row, or other audio of one: its samples at the codec's rate, and the codes that the run stored."""

    row: ManifestRow
    samples: npt.NDArray[np.float32]
    codes: Codes


@dataclass(slots=True)
class Comparison:
    """Codes that were computed in one way against the stored ones.

    Attributes:
        name: of the way.
        held_against: whether a difference is one of the run: the number format is the run's.
        num_codes, num_equal: codes compared, and those that are the same.
        problems: a finding for each row that differs.
    """

    name: str
    held_against: bool
    num_codes: int = 0
    num_equal: int = 0
    problems: list[Problem] = field(default_factory=list)

    def add(self, stored: StoredCodes, computed: Codes | RowError) -> None:
        """Compare one row."""
        self.num_codes += stored.codes.size
        what = self._difference(stored.codes, computed)
        if what is not None:
            row = stored.row
            way = self.name if row.other_codes is None else f"{row.other_codes}, {self.name}"
            self.problems.append(Problem(row.line + 1, row.key, "recomputed", None, f"{way}: {what}"))

    def _difference(self, stored: Codes, computed: Codes | RowError) -> str | None:
        if isinstance(computed, RowError):
            return computed.reason
        if computed.shape != stored.shape:
            return f"codes of shape {computed.shape}, where {stored.shape} are stored"
        different = computed != stored
        count = int(np.count_nonzero(different))
        self.num_equal += stored.size - count
        if not count:
            return None
        frame, codebook = map(int, np.argwhere(different)[0])
        return (
            f"{count:,} of {stored.size:,} codes differ, first in frame {frame}, codebook {codebook}: "
            f"{computed[frame, codebook]}, where {stored[frame, codebook]} is stored"
        )


@dataclass(frozen=True, slots=True)
class Recomputation:
    """``--recompute`` and the flags that go with it.

    Attributes:
        num_rows: how many to sample.
        dtype: another number format to compare with; None for none.
    """

    num_rows: int
    model_path: str | None
    device: Device
    dtype: Dtype | None

    def check(self, run: FinishedRun) -> None:
        """
        Raises:
            RunError: the run made no tokens.
        """
        if run.task == "token2wav":
            raise RunError("--recompute: a token2wav run made no tokens that could be computed again")

    def compare(self, run: FinishedRun, manifest: Manifest, state: LedgerState) -> list[Comparison]:
        """Computes the sample in each way, and prints the table.

        Raises:
            RunError: no row of the sample can be loaded, or the checkpoint or device cannot be used.
        """
        # 1. The run's number format, alone and shuffled.
        run_dtype: Any = run.settings.get("dtype", "auto")
        codec, device = self._open_codec(run, run_dtype)
        sample = list(self._load(run, manifest, state, codec))
        if not sample:
            raise RunError("--recompute: no row could be loaded: start this where the run was started", exit_code=1)
        width = int(run.settings["num_quantizers"])
        alone = Comparison("alone", True)
        for one in sample:
            alone.add(one, encode(codec, [one.samples], width)[0])
        shuffled = Comparison("together, shuffled", True)
        _compare_together(shuffled, codec, sample, width)
        comparisons = [alone, shuffled]
        # 2. Another number format.
        if self.dtype not in (None, "auto", run_dtype):
            codec.release()
            other = Comparison(f"in {self.dtype}", False)
            _compare_together(other, self._open_codec(run, self.dtype)[0], sample, width)
            comparisons.append(other)
        num_rows = sum(one.row.other_codes is None for one in sample)
        _print_table(comparisons, num_rows, f"{device}, {run_dtype}")
        return comparisons

    def _open_codec(self, run: FinishedRun, dtype: Any) -> tuple[Codec, str]:
        # Features are made where a run makes them.
        setup = CodecSetup.open(
            Checkpoint.open(self.model_path or run.model_path), device=self.device, dtype=dtype, front_end="auto"
        )
        codec = replace(setup, spec=setup.spec.with_recorded(run.settings)).load("wav2token")
        return codec, str(setup.compute.device)

    def _load(self, run: FinishedRun, manifest: Manifest, state: LedgerState, codec: Codec) -> Iterator[StoredCodes]:
        info = codec.spec.info
        # Longer rows were encoded in pieces, which are rows of their own to the codec.
        limits = (_MOST_SECONDS * info.sample_rate, run.settings.get("segment_samples"), info.max_samples)
        most = min(limit for limit in limits if limit is not None)
        lines = np.flatnonzero((state.status == RowStatus.DONE) & (state.num_samples <= most))
        order = np.argsort(manifest.digests[lines], kind="stable")[: self.num_rows]
        for row, known in rows_with_outputs(run, manifest, np.sort(lines[order]).tolist()):
            try:
                if isinstance(row, RowFailure):
                    raise RowError(row.stage, row.reason)
                if row.wav is None or row.quantized_tokens is None:
                    raise RowError("load", "the row has no wav or no quantized_tokens")
                codes, about = read_tokens(row.quantized_tokens, info, known)
                stored: dict[str | None, Codes] = {None: codes}
                stored.update(read_other_codes(row.quantized_tokens, about))
                for part in parts_of(row, from_settings(run.settings)):
                    if part.other_codes is not None and about["other_codes"][part.other_codes]["num_samples"] > most:
                        continue
                    samples = load_samples(
                        str(part.wav), info.sample_rate, run.settings.get("resampler", "reference"), cut=part.cut
                    )
                    yield StoredCodes(part, samples, stored[part.other_codes])
            except RowError as error:
                log.warning("row %s is not computed again: %s", row.key, error.reason)


def _compare_together(comparison: Comparison, codec: Codec, sample: Sequence[StoredCodes], width: int) -> None:
    shuffled = random.Random(0).sample(sample, len(sample))
    for one, codes in zip(shuffled, encode(codec, [one.samples for one in shuffled], width), strict=True):
        comparison.add(one, codes)


def _print_table(comparisons: Sequence[Comparison], num_rows: int, where: str) -> None:
    print(f"recomputed {num_rows:,} rows, {comparisons[0].num_codes:,} codes, on {where}")
    print(f"           {'':<20}{'equal codes':>12}{'rows that differ':>18}")
    for one in comparisons:
        share = 100 * one.num_equal / max(1, one.num_codes)
        note = "" if one.held_against else "  (not held against the run)"
        print(f"           {one.name:<20}{share:>10.4f} %{len(one.problems):>18,}{note}")
