"""The part of ``verify`` that goes through the manifest: each row's ledger entries, and the files that it names."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from batch_tokenizer.audio_fields import from_settings, parts_of
from batch_tokenizer.codecs.base import CodecSpec
from batch_tokenizer.manifest.manifest import Manifest
from batch_tokenizer.records import ManifestRow
from batch_tokenizer.runs.checks import (
    CheckFailed,
    OutputForm,
    check_audio_file,
    check_file_checksum,
    check_hidden_states_file,
    check_token_file,
)
from batch_tokenizer.runtime.ledger import LedgerState, RowStatus, matched_entries
from batch_tokenizer.storage.names import HIDDEN_STATES_ENDING
from batch_tokenizer.writers.publish import is_temporary

#: Reported, but not held against the run: the manifest's durations are often estimates.
DURATION = "duration"

#: Seconds, and share of its length, by which a row's audio may differ from the manifest's duration.
_DURATION_SECONDS, _DURATION_SHARE = 0.5, 0.02

CHUNK_LINES = 256


@dataclass(frozen=True, slots=True)
class Problem:
    """One finding.

    Attributes:
        line: of the manifest, from 1; None where it belongs to no row. So is ``key``, also where a line has none.
        kind: one of ``verify.KINDS``, or ``DURATION``.
        path: the file, if it is about one.
    """

    line: int | None
    key: str | None
    kind: str
    path: str | None
    what: str

    def __str__(self) -> str:
        place = [] if self.line is None else [f"line {self.line}, {self.key or 'without key'}"]
        return ": ".join([*place, *([] if self.path is None else [self.path]), self.what])


# -------------------------------------------------------------------------------------------------------------- ledger


@dataclass(frozen=True, slots=True)
class LedgerAudit:
    """Whether the ledger's entries of one row agree.

    Attributes:
        contradicts: bool (num_lines,), rows that are done with several lengths, or failed although they were done.
        num_repeated: further entries of rows that are done, which agree with the first.
    """

    contradicts: npt.NDArray[np.bool_]
    num_repeated: int


def audit_ledger(run_dir: Path, manifest: Manifest, state: LedgerState) -> LedgerAudit:
    """Compare all entries of each row. A failure that a later attempt made good contradicts nothing, and neither does
    what was taken back.

    Raises:
        RunError: the ledger cannot be read.
    """
    # 1. The latest attempt that took each row back; earlier entries no longer count.
    taken_back = np.zeros(manifest.num_lines, np.int32)
    for entries in matched_entries(run_dir, manifest, "redo"):
        taken_back[entries.lines] = entries.attempt
    contradicts = np.zeros(manifest.num_lines, np.bool_)
    first_done = np.full(manifest.num_lines, -1, np.int32)
    num_done = 0
    # 2. Rows that are done several times must have the same lengths each time.
    for entries in matched_entries(run_dir, manifest, "done"):
        valid = entries.attempt >= taken_back[entries.lines]
        lines = entries.lines[valid]
        num_done += len(lines)
        unseen = lines[first_done[lines] < 0]
        first_done[unseen] = entries.attempt
        other = (entries.num_samples[valid] != state.num_samples[lines]) | (
            entries.frames[valid] != state.frames[lines]
        )
        contradicts[lines[other]] = True
    # 3. A row that is done does not fail any more.
    for entries in matched_entries(run_dir, manifest, "failed"):
        lines = entries.lines[entries.attempt >= taken_back[entries.lines]]
        after_done = (first_done[lines] >= 0) & (entries.attempt >= first_done[lines])
        contradicts[lines[after_done]] = True
    return LedgerAudit(contradicts, num_done - int(np.count_nonzero(first_done >= 0)))


# ------------------------------------------------------------------------------------------------------------- lengths


@dataclass(frozen=True, slots=True)
class ExpectedLengths:
    """The lengths that outputs must have, by the codec's frame arithmetic.

    Attributes:
        segment_samples: samples of the segments that longer audio was encoded in; None if it was not.
    """

    spec: CodecSpec
    task: str
    segment_samples: int | None

    def __call__(self, num_samples: int, num_frames: int) -> tuple[int, int]:
        """(frames, samples of the reconstruction) of a row whose ledger entry has these numbers."""
        if self.task == "token2wav":
            return num_frames, num_samples
        if num_samples < 1:
            return 0, 0
        if self.segment_samples is None or num_samples <= self.segment_samples:
            frames = self.spec.num_frames(num_samples)
            return frames, self.spec.num_output_samples(frames)
        whole, rest = divmod(num_samples, self.segment_samples)
        frames = whole * self.spec.num_frames(self.segment_samples) + (self.spec.num_frames(rest) if rest else 0)
        info = self.spec.info
        return frames, round(num_samples * info.output_sample_rate / info.sample_rate)

    def possible(self, num_samples: int, num_frames: int) -> bool:
        """Whether a row can have these numbers."""
        if num_frames < 1:
            return False
        if self.task == "token2wav":
            # Codes of several segments are decoded to less than their frames hold: each segment is cut.
            return 0 < num_samples <= self.spec.num_output_samples(num_frames)
        return self(num_samples, num_frames)[0] == num_frames


# ---------------------------------------------------------------------------------------------------------------- rows


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some lines of the manifest and what their files must be; arrays have one element a line.

    Attributes:
        status: of ``RowStatus``.
        num_samples: input samples by the ledger.
        frames: token frames by the codec's arithmetic.
        output_samples: samples of a decoded audio file, likewise.
        disagrees: the ledger's entries of the row disagree.
        impossible: the codec does not make such lengths.
        checksums: CRC-32 of each output's bytes by the ledger, by the field that names the output; -1 where the ledger
            has none. Empty if contents are not checked.
    """

    first_line: int
    status: npt.NDArray[np.uint8]
    num_samples: npt.NDArray[np.int64]
    frames: npt.NDArray[np.int64]
    output_samples: npt.NDArray[np.int64]
    disagrees: npt.NDArray[np.bool_]
    impossible: npt.NDArray[np.bool_]
    checksums: Mapping[str, npt.NDArray[np.int64]]


def chunks(
    manifest: Manifest,
    lengths: ExpectedLengths,
    state: LedgerState,
    audit: LedgerAudit,
    checksums: Mapping[str, npt.NDArray[np.int64]],
) -> Iterator[Chunk]:
    """The whole manifest.

    Args:
        checksums: as in ``Chunk``, of all lines.
    """
    for first in range(0, manifest.num_lines, CHUNK_LINES):
        part = slice(first, min(first + CHUNK_LINES, manifest.num_lines))
        status, num_samples = state.status[part], state.num_samples[part]
        frames = np.zeros(len(status), np.int64)
        output_samples = np.zeros(len(status), np.int64)
        impossible = np.zeros(len(status), np.bool_)
        for number in np.flatnonzero(status == RowStatus.DONE).tolist():
            samples, counted = int(num_samples[number]), int(state.frames[part][number])
            frames[number], output_samples[number] = lengths(samples, counted)
            impossible[number] = not lengths.possible(samples, counted)
        yield Chunk(
            first, status, num_samples, frames, output_samples, audit.contradicts[part], impossible,
            {name: column[part] for name, column in checksums.items()},
        )  # fmt: skip


@dataclass(slots=True)
class ChunkReport:
    """What was found in a chunk.

    Attributes:
        num_lines: how long the chunk was.
        num_files: files that were checked.
        wrong_rows: (line from 0, key) of rows whose outputs or entries are wrong.
        folders: in which the rows' outputs lie.
    """

    num_lines: int
    num_files: int = 0
    problems: list[Problem] = field(default_factory=list)
    wrong_rows: list[tuple[int, str]] = field(default_factory=list)
    folders: set[str] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class RowChecker:
    """Checks rows and the files that they name. Picklable, without a codec."""

    manifest: Manifest
    form: OutputForm

    def check(self, chunk: Chunk) -> ChunkReport:
        """Check every row of the chunk.

        Raises:
            RunError: the manifest changes or cannot be read.
        """
        report = ChunkReport(len(chunk.status))
        for row in self.manifest.read(chunk.first_line, chunk.first_line + len(chunk.status)):
            number = row.line - chunk.first_line
            if chunk.status[number] == RowStatus.PENDING:
                report.problems.append(Problem(row.line + 1, row.key, "pending", None, "neither done nor failed"))
            if not isinstance(row, ManifestRow):
                continue
            report.folders.update(os.path.dirname(path) for path in self._outputs(row).values())
            wrong = list(self._wrong_entries(row, chunk, number))
            if chunk.status[number] == RowStatus.DONE:
                wrong += self._wrong_files(row, chunk, number)
                report.num_files += len(self._outputs(row))
                report.problems += self._other_duration(row, int(chunk.num_samples[number]))
            if wrong:
                report.problems += wrong
                report.wrong_rows.append((row.line, row.key))
        return report

    def _outputs(self, row: ManifestRow) -> dict[str, str]:
        outputs = {name: str(row.fields[name]) for name in self.manifest.form.outputs}
        if self.form.info.get("hidden_states") and "quantized_tokens" in outputs:
            outputs["hidden_states"] = outputs["quantized_tokens"] + HIDDEN_STATES_ENDING
        return outputs

    def _wrong_entries(self, row: ManifestRow, chunk: Chunk, number: int) -> Iterator[Problem]:
        if chunk.disagrees[number]:
            yield Problem(row.line + 1, row.key, "ledger", None, "the ledger's entries disagree")
        elif chunk.status[number] == RowStatus.DONE and chunk.impossible[number]:
            what = f"{chunk.num_samples[number]} samples do not make the frames that the ledger has"
            yield Problem(row.line + 1, row.key, "ledger", None, what)

    def _wrong_files(self, row: ManifestRow, chunk: Chunk, number: int) -> Iterator[Problem]:
        for name, path in self._outputs(row).items():
            try:
                if name == "hidden_states":
                    check_hidden_states_file(path, int(chunk.frames[number]))
                elif name == "reconstructed_wav":
                    check_audio_file(path, self.form, int(chunk.output_samples[number]))
                else:
                    num_samples, num_frames = int(chunk.num_samples[number]), int(chunk.frames[number])
                    others = parts_of(row, from_settings(self.form.info))[1:]
                    check_token_file(
                        path, self.form, key=row.key, num_samples=num_samples, num_frames=num_frames,
                        other_names=[part.other_codes for part in others if part.other_codes is not None],
                    )  # fmt: skip
                if name in chunk.checksums and chunk.checksums[name][number] >= 0:
                    check_file_checksum(path, int(chunk.checksums[name][number]))
            except CheckFailed as error:
                yield Problem(row.line + 1, row.key, error.kind, path, error.reason)

    def _other_duration(self, row: ManifestRow, num_samples: int) -> Iterator[Problem]:
        stated, found = float(self.manifest.durations[row.line]), num_samples / self.form.sample_rate
        if not math.isnan(stated) and abs(stated - found) > max(_DURATION_SECONDS, _DURATION_SHARE * found):
            what = f"duration {stated:.2f} s by the manifest, {found:.2f} s by its audio"
            yield Problem(row.line + 1, row.key, DURATION, None, what)


def find_strays(folder: str) -> list[Problem]:
    """Temporary files in a folder of outputs, left by killed processes."""
    try:
        with os.scandir(folder or ".") as entries:
            strays = sorted(entry.path for entry in entries if is_temporary(entry.name))
    except (FileNotFoundError, NotADirectoryError):
        return []  # nothing lies in it, which has been reported file by file
    except OSError as error:
        what = f"cannot be searched for temporary files: {error.strerror}"
        return [Problem(None, None, "unreadable", folder, what)]
    what = "left by a killed process; remove it unless a run is writing there"
    return [Problem(None, None, "stray", path, what) for path in strays]
