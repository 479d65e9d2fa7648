"""The part of ``verify`` for sinks that make shards: each shard against its ledger file, row by row.

A shard must hold the very rows that its ledger file names, in that order, each as long as the codec's arithmetic has
it. So every row that is done lies in exactly one place if no two ledger files name it, which is looked at as well.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from batch_tokenizer.data.stored_rows import StoredRow, shard_rows
from batch_tokenizer.records import OUTPUT_FIELDS, RowError, RunError, Task
from batch_tokenizer.runtime.ledger import shard_ledger_file
from batch_tokenizer.runtime.shard_ledger import parse_shard_name, shard_name
from batch_tokenizer.verify_contents import AUDIO_HEADER_BYTES, Wrong, check_audio, check_codes, check_info
from batch_tokenizer.writers.shard_folder import ShardFolder

_LEDGER_NAME = re.compile(r"(\d{6,8})-(\d{5,8})\.(\d{6,8})\.jsonl")

#: Rows of one shard that are named, before the rest is only counted.
_MOST_NAMED = 20


@dataclass(frozen=True, slots=True)
class Entry:
    """A row as the ledger has it, with the lengths that its outputs must have.

    Attributes:
        line: of the manifest, from 0.
        output_samples: of its audio, at the rate of the output.
    """

    line: int
    key: str
    num_samples: int
    frames: int
    output_samples: int


@dataclass(frozen=True, slots=True)
class Shard:
    """A shard to look at, and what it must hold."""

    name: str
    path: str
    exists: bool
    ledger: Path
    entries: tuple[Entry, ...]


@dataclass(frozen=True, slots=True)
class RowProblem:
    """Something that is wrong with a shard, or with a row in it (``line`` and ``key``)."""

    kind: str
    what: str
    line: int | None = None
    key: str | None = None


@dataclass(slots=True)
class ShardReport:
    """What was found in a shard."""

    shard: Shard
    num_rows: int = 0
    problems: list[RowProblem] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class ShardChecker:
    """Looks at shards. Picklable, without codec.

    Attributes:
        codebook_sizes: of the codebooks that the run used.
        settings: that every row's info must name.
    """

    task: Task
    output_sample_rate: int
    audio_format: str
    codebook_sizes: tuple[int, ...]
    settings: Mapping[str, Any]

    def check(self, shard: Shard) -> ShardReport:
        """Read a whole shard."""
        report = ShardReport(shard)
        if not shard.exists:
            report.problems.append(RowProblem("missing", f"no such file: {len(shard.entries):,} rows are lost"))
            return report
        try:
            for entry, row in zip_longest(shard.entries, shard_rows(shard.path)):
                report.num_rows += row is not None
                if entry is None:
                    report.problems.append(
                        RowProblem("content", "a row that its ledger file does not name", key=row.key)
                    )
                elif row is None:
                    report.problems.append(RowProblem("missing", "not in its shard", entry.line + 1, entry.key))
                else:
                    try:
                        self._check_row(entry, row)
                    except Wrong as wrong:
                        report.problems.append(RowProblem(wrong.kind, wrong.what, entry.line + 1, entry.key))
                if len(report.problems) == _MOST_NAMED:
                    report.problems.append(RowProblem("content", "and further rows, which are not looked at"))
                    break
        except RowError as error:
            report.problems.append(RowProblem("unreadable", error.reason.removeprefix(f"{shard.path}: ")))
        return report

    def _check_row(self, entry: Entry, row: StoredRow) -> None:
        outputs = OUTPUT_FIELDS[self.task]
        if row.key != entry.key:
            raise Wrong("content", f"its place in the shard has row {row.key}")
        expected = {**self.settings, "num_samples": entry.num_samples, "num_frames": entry.frames}
        check_info(row.info, expected)
        if "quantized_tokens" in outputs:
            if row.codes is None:
                raise Wrong("missing", "has no tokens")
            check_codes(row.codes, self.codebook_sizes, num_samples=entry.num_samples, num_frames=entry.frames)
        if "reconstructed_wav" in outputs:
            if row.audio is None:
                raise Wrong("missing", "has no audio")
            if row.audio_format != self.audio_format:
                raise Wrong("content", f"its audio is {row.audio_format}, not {self.audio_format}")
            check_audio(
                row.audio_format,
                row.audio[:AUDIO_HEADER_BYTES],
                len(row.audio),
                sample_rate=self.output_sample_rate,
                num_samples=entry.output_samples,
            )


#: (input samples, frames by the ledger) to (frames, output samples) by the codec's arithmetic.
Lengths = Callable[[int, int], tuple[int, int]]


def shards_of_ledger(run_dir: Path, folder: ShardFolder, task: Task, suffix: str, lengths: Lengths) -> Iterator[Shard]:
    """The shards that the ledger names, earliest first.

    Raises:
        RunError: a ledger file cannot be read, or is damaged (exit code 1).
    """
    for path in sorted((run_dir / "ledger").iterdir()):
        name = shard_of_ledger_file(path.name, task, suffix)
        if name is None:
            continue
        try:
            entries = tuple(_entries(path.read_bytes(), lengths))
        except OSError as error:
            raise RunError(f"{path} cannot be read: {error.strerror}", exit_code=1) from error
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(f"{path} is damaged: remove it, and the next start does its rows again") from error
        yield Shard(name, folder.location(name), folder.exists(name), path, entries)


def shard_of_ledger_file(name: str, task: Task, suffix: str) -> str | None:
    """The name of the shard whose rows a ledger file has; None of the ledger files that are no shard's."""
    match = _LEDGER_NAME.fullmatch(name)
    return None if match is None else f"{shard_name(task, *map(int, match.groups()))}.{suffix}"


def _entries(content: bytes, lengths: Lengths) -> Iterator[Entry]:
    for line in content.splitlines():
        item = orjson.loads(line)
        frames, output_samples = lengths(item["num_samples"], item["frames"])
        yield Entry(item["line"], item["key"], item["num_samples"], frames, output_samples)


def orphans(run_dir: Path, folder: ShardFolder, task: Task) -> list[tuple[str, str]]:
    """(path, what) of shards that no ledger file names, and of files that were not published.

    Raises:
        RunError: the folder cannot be read (exit code 1).
    """
    try:
        found = []
        for name in folder.names():
            place = parse_shard_name(task, name)
            if place is not None and not shard_ledger_file(run_dir, *place).exists():
                what = "no ledger file names this shard: the next start of the run puts that right"
                found.append((folder.location(name), what))
        for name in folder.names_aside():
            if parse_shard_name(task, name) is not None:
                what = "left by a killed process, unless a run is writing there: the next start removes it"
                found.append((folder.location(f".{name}.part"), what))
        return found
    except OSError as error:
        raise RunError(f"{folder.place} cannot be read: {error.strerror}", exit_code=1) from error


def take_back(wrong: Sequence[Shard]) -> int:
    """Let shards count no longer; returns how many rows that are. The next recovery removes the shards themselves.

    Raises:
        RunError: a ledger file cannot be removed (exit code 1).
    """
    for shard in wrong:
        try:
            shard.ledger.unlink(missing_ok=True)
        except OSError as error:
            raise RunError(f"{shard.ledger} cannot be removed: {error.strerror}", exit_code=1) from error
    return sum(len(shard.entries) for shard in wrong)


class Places:
    """Counts in how many shards each line of the manifest is."""

    def __init__(self, num_lines: int) -> None:
        self._seen: npt.NDArray[np.bool_] = np.zeros(num_lines, np.bool_)

    def repeated(self, shard: Shard) -> list[Entry]:
        """The shard's rows that an earlier shard, or an earlier place in this one, has as well."""
        again = []
        for entry in shard.entries:
            if 0 <= entry.line < len(self._seen):
                if self._seen[entry.line]:
                    again.append(entry)
                self._seen[entry.line] = True
        return again
