"""The part of ``verify`` for sinks that make shards: each shard against its ledger file, row by row.

A shard must hold the very rows that its ledger file names, in that order, each as long as the codec's arithmetic has
it. So every row that is done lies in exactly one place if no two ledger files name it, which is checked as well. Rows
are known by their digest: their lines may have moved since.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from batch_tokenizer.commands.verify_rows import ExpectedLengths, Problem
from batch_tokenizer.manifest.manifest import Manifest
from batch_tokenizer.records import OUTPUT_FIELDS, RowError, Task
from batch_tokenizer.runs.checks import (
    AUDIO_HEADER_BYTES,
    CheckFailed,
    OutputForm,
    check_audio,
    check_checksums,
    check_codes,
    check_hidden_states,
    check_info,
    check_other_codes,
)
from batch_tokenizer.runs.finished_run import FinishedRun
from batch_tokenizer.runs.shards import shard_entries
from batch_tokenizer.runs.stored_rows import StoredRow, shard_rows
from batch_tokenizer.runtime.ledger_lines import read_shard_lines
from batch_tokenizer.runtime.run_files import parse_shard_name, shard_ledger_file
from batch_tokenizer.storage.atomic import os_error_ends_run
from batch_tokenizer.writers.row_encoding import OTHER_CHECKSUM
from batch_tokenizer.writers.shard_folder import ShardFolder

#: Rows of one shard that are named, before the rest is only counted.
_MOST_NAMED = 20


@dataclass(frozen=True, slots=True)
class Entry:
    """A row as a shard's ledger file has it, with the lengths that its outputs must have.

    Attributes:
        line: of the manifest as it is now, from 0; None where the manifest no longer has the row.
        output_samples: of its audio, at the rate of the output.
        checksums: CRC-32 of what was stored, by name.
    """

    line: int | None
    key: str
    num_samples: int
    frames: int
    output_samples: int
    checksums: Mapping[str, int]

    @property
    def other_names(self) -> list[str]:
        """The names of the codes of its other audio."""
        return [name.removeprefix(OTHER_CHECKSUM) for name in self.checksums if name.startswith(OTHER_CHECKSUM)]

    def problem(self, kind: str, path: str, what: str) -> Problem:
        """A finding about this row."""
        return Problem(None if self.line is None else self.line + 1, self.key, kind, path, what)


@dataclass(frozen=True, slots=True)
class Shard:
    """A shard to check, and what it must hold."""

    path: str
    exists: bool
    ledger: Path
    entries: tuple[Entry, ...]

    @property
    def removed_keys(self) -> list[str]:
        """Keys of its rows that the manifest no longer has."""
        return [entry.key for entry in self.entries if entry.line is None]


@dataclass(slots=True)
class ShardReport:
    """What was found in a shard."""

    shard: Shard
    num_rows: int = 0
    problems: list[Problem] = field(default_factory=list)


def repeated_entries(shard: Shard, seen: npt.NDArray[np.bool_]) -> list[Entry]:
    """The shard's rows that an earlier shard, or an earlier place in this one, has as well.

    Args:
        seen: bool (num_lines,), lines of the manifest that shards were seen to have; the shard's are added.
    """
    again = []
    for entry in shard.entries:
        if entry.line is not None:
            if seen[entry.line]:
                again.append(entry)
            seen[entry.line] = True
    return again


def shards_to_check(
    run: FinishedRun, folder: ShardFolder, lengths: ExpectedLengths, manifest: Manifest
) -> Iterator[Shard]:
    """The shards that the ledger names, earliest first.

    Raises:
        RunError: a ledger file cannot be read, or is damaged (exit code 1).
    """
    for shard in run.shards():
        entries = tuple(_entry(item, lengths, manifest) for item in shard_entries(shard.ledger))
        yield Shard(shard.location, folder.exists(shard.name), shard.ledger, entries)


def _entry(item: Mapping[str, Any], lengths: ExpectedLengths, manifest: Manifest) -> Entry:
    frames, output_samples = lengths(item["num_samples"], item["frames"])
    return Entry(
        manifest.line_of(item["digest"]), item["key"], item["num_samples"], frames, output_samples,
        item.get("checksums", {}),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class ShardChecker:
    """Checks shards. Picklable, without a codec.

    Attributes:
        content: whether checksums are compared.
    """

    task: Task
    form: OutputForm
    content: bool

    def check(self, shard: Shard) -> ShardReport:
        """Read a whole shard."""
        report = ShardReport(shard)
        problems = report.problems
        if not shard.exists:
            what = f"no such file: {len(shard.entries):,} rows are lost"
            problems.append(Problem(None, None, "missing", shard.path, what))
            return report
        try:
            # Rows are compared by place: the shard was written in the order of its ledger file.
            for entry, row in zip_longest(shard.entries, shard_rows(shard.path)):
                report.num_rows += row is not None
                if entry is None:
                    what = "a row that its ledger file does not name"
                    problems.append(Problem(None, row.key, "content", shard.path, what))
                elif row is None:
                    problems.append(entry.problem("missing", shard.path, "not in its shard"))
                else:
                    try:
                        self._check_row(entry, row)
                    except CheckFailed as error:
                        problems.append(entry.problem(error.kind, shard.path, error.reason))
                if len(problems) == _MOST_NAMED:
                    what = "and further rows, which are not checked"
                    problems.append(Problem(None, None, "content", shard.path, what))
                    break
        except RowError as error:
            reason = error.reason.removeprefix(f"{shard.path}: ")
            problems.append(Problem(None, None, "unreadable", shard.path, reason))
        return report

    def _check_row(self, entry: Entry, row: StoredRow) -> None:
        outputs = OUTPUT_FIELDS[self.task]
        form = self.form
        if row.key != entry.key:
            raise CheckFailed("content", f"its place in the shard has row {row.key}")
        check_info(row.info, {**form.info, "num_samples": entry.num_samples, "num_frames": entry.frames})
        if "quantized_tokens" in outputs:
            if row.codes is None:
                raise CheckFailed("missing", "has no tokens")
            check_codes(row.codes, form.codebook_sizes, num_samples=entry.num_samples, num_frames=entry.frames)
            check_other_codes(row.other_codes, row.info, form.codebook_sizes, entry.other_names)
        if form.info.get("hidden_states"):
            if row.hidden_states is None:
                raise CheckFailed("missing", "has no hidden states")
            check_hidden_states(row.hidden_states, entry.frames)
        if "reconstructed_wav" in outputs:
            if row.audio is None:
                raise CheckFailed("missing", "has no audio")
            if row.audio_format != form.audio_format:
                raise CheckFailed("content", f"its audio is {row.audio_format}, not {form.audio_format}")
            head, size = row.audio[:AUDIO_HEADER_BYTES], len(row.audio)
            check_audio(
                form.audio_format, head, size,
                sample_rate=form.output_sample_rate, num_samples=entry.output_samples, channels=form.channels,
            )  # fmt: skip
        if self.content:
            check_checksums(row, entry.checksums)


def orphans(run_dir: Path, folder: ShardFolder, task: Task) -> list[Problem]:
    """Shards that no ledger file names, and files that were not published.

    Raises:
        RunError: the folder cannot be read (exit code 1).
    """
    found = []
    with os_error_ends_run(f"{folder.place} cannot be read"):
        for name in folder.names():
            place = parse_shard_name(task, name)
            if place is not None and read_shard_lines(shard_ledger_file(run_dir, *place)) is None:
                what = "no ledger file that is whole names this shard: the next start of the run puts that right"
                found.append(Problem(None, None, "orphan", folder.location(name), what))
        for name in folder.names_aside():
            if parse_shard_name(task, name) is not None:
                what = "left by a killed process, unless a run is writing there: the next start removes it"
                found.append(Problem(None, None, "orphan", folder.location(f".{name}.part"), what))
    return found


def take_back(wrong: Sequence[Shard]) -> int:
    """Let shards count no longer; returns how many rows that are. The next recovery removes the shards themselves.

    Raises:
        RunError: a ledger file cannot be removed (exit code 1).
    """
    for shard in wrong:
        with os_error_ends_run(f"{shard.ledger} cannot be removed"):
            shard.ledger.unlink(missing_ok=True)
    return sum(len(shard.entries) for shard in wrong)
