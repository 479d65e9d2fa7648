"""The part of ``verify`` for sinks that make shards: each shard against its ledger file, row by row.

A shard must hold the very rows that its ledger file names, in that order, each as long as the codec's arithmetic has
it. So every row that is done lies in exactly one place if no two ledger files name it, which is looked at as well.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from batch_tokenizer.records import OUTPUT_FIELDS, RowError, RunError, Task
from batch_tokenizer.runs.stored_rows import StoredRow, shard_rows
from batch_tokenizer.runtime.ledger import shard_ledger_file
from batch_tokenizer.runtime.shard_ledger import parse_shard_name, shard_of_ledger_file
from batch_tokenizer.writers.shard_folder import ShardFolder

#: Bytes of an audio file's beginning that the checks want.
AUDIO_HEADER_BYTES = 4096

_STREAM_INFO_BYTES = 34


class Wrong(Exception):
    """An output is not what it should be. ``kind`` is one of ``verify.KINDS``."""

    def __init__(self, kind: str, what: str) -> None:
        super().__init__(kind, what)
        self.kind = kind
        self.what = what


def check_audio(audio_format: str, head: bytes, size: int, *, sample_rate: int, num_samples: int) -> None:
    """Whether ``wav`` or ``flac`` content is mono, of 16 bits and of ``num_samples`` samples, by its header.

    Args:
        head: its first ``AUDIO_HEADER_BYTES``.
        size: of all of it, in bytes.

    Raises:
        Wrong: it is not.
    """
    check = _check_wav if audio_format == "wav" else _check_flac
    check(head, size, sample_rate, num_samples)


def _check_wav(head: bytes, size: int, sample_rate: int, num_samples: int) -> None:
    if head[:4] != b"RIFF" or head[8:12] != b"WAVE":
        raise Wrong("unreadable", f"not a wav file ({size} bytes)")
    chunks: dict[bytes, tuple[int, int]] = {}
    at = 12
    while b"data" not in chunks and at + 8 <= len(head):
        name, length = struct.unpack_from("<4sI", head, at)
        chunks[name] = at + 8, length
        at += 8 + length + length % 2
    if b"data" not in chunks or b"fmt " not in chunks or chunks[b"fmt "][0] + 16 > len(head):
        raise Wrong("unreadable", f"not a wav file that can be read: its header is damaged ({size} bytes)")
    tag, channels, rate, _, _, bits = struct.unpack_from("<HHIIHH", head, chunks[b"fmt "][0])
    if (tag, channels, bits) != (1, 1, 16):
        raise Wrong("content", f"format {tag}, {channels} channels, {bits} bits, and not PCM, 1 channel, 16 bits")
    if rate != sample_rate:
        raise Wrong("content", f"{rate} Hz, not {sample_rate} Hz")
    begin, length = chunks[b"data"]
    if begin + length > size:
        raise Wrong("length", f"cut short: {size - begin} of {length} bytes of audio are there")
    if length != 2 * num_samples:
        raise Wrong("length", f"{length / 2:.16g} samples where {num_samples} are expected")
    (promised,) = struct.unpack_from("<I", head, 4)
    if begin + length != size or promised + 8 != size:
        raise Wrong("content", f"{size} bytes, and not the {begin + length} that its header implies")


def _check_flac(head: bytes, size: int, sample_rate: int, num_samples: int) -> None:
    """By the first metadata block, which states the stream's length. The frames after it are not looked at."""
    if head[:4] != b"fLaC":
        raise Wrong("unreadable", f"not a flac file ({size} bytes)")
    info = head[8 : 8 + _STREAM_INFO_BYTES]
    if head[4] & 0x7F != 0 or len(info) < _STREAM_INFO_BYTES:
        raise Wrong("unreadable", f"not a flac file that can be read: its header is damaged ({size} bytes)")
    fields = int.from_bytes(info[10:18], "big")
    rate, channels, bits = fields >> 44, (fields >> 41 & 7) + 1, (fields >> 36 & 31) + 1
    if (channels, bits) != (1, 16):
        raise Wrong("content", f"{channels} channels, {bits} bits, and not 1 channel, 16 bits")
    if rate != sample_rate:
        raise Wrong("content", f"{rate} Hz, not {sample_rate} Hz")
    length = fields & (1 << 36) - 1
    if length != num_samples:
        raise Wrong("length", f"{length} samples where {num_samples} are expected")


def check_codes(codes: npt.NDArray[Any], codebook_sizes: tuple[int, ...], *, num_samples: int, num_frames: int) -> None:
    """Whether integers (T, K) are ``num_frames`` frames of one code for each codebook.

    Args:
        num_samples: for the message.

    Raises:
        Wrong: they are not.
    """
    if len(codes) != num_frames:
        raise Wrong("length", f"{len(codes)} frames where {num_samples} samples make {num_frames}")
    if codes.ndim != 2 or codes.shape[1] != len(codebook_sizes):
        raise Wrong("content", f"codes of shape {codes.shape}, not ({num_frames}, {len(codebook_sizes)})")
    if codes.dtype.kind not in "iu":
        raise Wrong("content", "codes that are not integers")
    outside = (codes < 0) | (codes >= np.array(codebook_sizes))
    if outside.any():
        frame, codebook = map(int, np.argwhere(outside)[0])
        raise Wrong(
            "content",
            f"frame {frame}, codebook {codebook}: code {codes[frame, codebook]} is outside "
            f"0 to {codebook_sizes[codebook] - 1}",
        )


def check_info(info: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Whether what an output says of itself has these values.

    Raises:
        Wrong: it has not.
    """
    for name, value in expected.items():
        if name not in info or info[name] != value:
            found = info.get(name, "absent")
            raise Wrong("content", f"its info has {name} {found}, not {value}")


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
