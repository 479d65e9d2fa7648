"""``batch_tokenizer manifest``: makes a manifest of whatever holds a corpus, and says what a manifest holds.

    batch_tokenizer manifest from FOLDER --out data.jsonl --output_dir tokens
    batch_tokenizer manifest stats data.jsonl --model_path M

``from`` takes what ``--data_list`` takes (folders, tars, NeMo and Lhotse rows, URLs) and adds what each file's header
says: ``duration`` in seconds, ``original_sample_rate`` in Hz, ``original_channels``. Files that cannot be opened, and
rows that cannot be rows, go into ``OUT.unreadable.jsonl`` with their reasons. ``stats`` reads no audio but the headers
of a sample.
"""

from __future__ import annotations

import argparse
import logging
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from batch_tokenizer.audio.decoding import probe_audio
from batch_tokenizer.audio_fields import parse_audio_fields
from batch_tokenizer.commands.status import format_size
from batch_tokenizer.config import add_options, check_least
from batch_tokenizer.manifest.manifest import Manifest
from batch_tokenizer.manifest.row import REFUSED, LineState, cut_of
from batch_tokenizer.records import ManifestRow, RowError, RunError, Sink, first_line, printable
from batch_tokenizer.runtime.row_counter import RowCounter
from batch_tokenizer.sources.finishing import SourceSettings
from batch_tokenizer.sources.lines import lines_of
from batch_tokenizer.sources.listing import local_manifest
from batch_tokenizer.sources.ordered_map import ordered
from batch_tokenizer.sources.patterns import find_sources
from batch_tokenizer.storage.json_lines import dump_json, parse_json
from batch_tokenizer.storage.streams import ALLOW_PIPE

log = logging.getLogger(__name__)

#: Seconds of computing for one of audio that the published model's loop took to encode and decode, on one H800.
PUBLISHED_RTF = 0.0028

#: Rows whose headers ``stats`` opens where the manifest does not say rates and channels.
_SAMPLE_ROWS = 200

_CHUNK = 64
_EXAMPLES = 5

#: Upper ends of the histogram's bins, in seconds.
_BINS = (1, 2, 5, 10, 15, 20, 30, 60, 300, 3600)
_BAR = 40


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    commands = parser.add_subparsers(dest="action", required=True, metavar="from | stats")
    make = commands.add_parser("from", help="write a manifest of a folder, tars, or another tool's manifest")
    add = make.add_argument
    add("source", help="a folder, tars ('shards/{000..999}.tar'), NeMo or Lhotse JSON lines, a URL")
    add("--out", type=Path, default=Path("data.jsonl"), help="the manifest (%(default)s)")
    add("--overwrite", action="store_true", help="replace the manifest if it is there; the source itself never is")
    add_options(make, "task", "output_dir", "names", "sink", "audio_format", "channels", "audio_fields", "audio_column",
        "allow_pipe")  # fmt: skip
    add("--workers", type=int, default=min(32, 4 * (os.cpu_count() or 1)),
        help="files opened at once (%(default)s); more help on network disks")  # fmt: skip
    stats = commands.add_parser("stats", help="count, hours, histogram, expected tokens, bytes and GPU-hours")
    add = stats.add_argument
    add("source", help="a manifest, or any other source")
    add_options(stats, "model_path", "num_quantizers")
    add("--rtf", type=float, default=PUBLISHED_RTF,
        help="seconds of one GPU for a second of audio; %(default)s is published for encoding and decoding on an H800;"
        " batch_tokenizer bench measures yours")  # fmt: skip


def main(arguments: argparse.Namespace) -> int:
    """Makes or describes a manifest. Returns 0; 1 if no row is readable.

    Raises:
        RunError: the source is not there, or the output cannot be written.
    """
    if arguments.action == "stats":
        return _stats(arguments.source, arguments.model_path, arguments.num_quantizers, arguments.rtf)
    check_least(arguments, workers=1)
    if arguments.allow_pipe:
        os.environ[ALLOW_PIPE] = "1"
    # Rows of a sink that makes shards need no outputs, and neither do rows that get them later.
    sink: Sink = arguments.sink if arguments.output_dir is not None else "tar"
    fields = [] if arguments.audio_fields is None else [one.field for one in parse_audio_fields(arguments.audio_fields)]
    settings = SourceSettings(
        arguments.task, sink, arguments.output_dir, arguments.audio_format, arguments.channels, arguments.audio_column,
        arguments.names, *((fields[0], tuple(fields[1:])) if fields else ()),
    )  # fmt: skip
    return make_manifest(arguments.source, arguments.out, settings, arguments.workers, overwrite=arguments.overwrite)


# ----------------------------------------------------------------------------------------------------------------- from


@dataclass(slots=True)
class _ChunkResult:
    """What one chunk of lines became."""

    lines: list[bytes] = field(default_factory=list)
    refused: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    num_unknown: int = 0


def make_manifest(source: str, out: Path, settings: SourceSettings, workers: int, *, overwrite: bool = False) -> int:
    """Writes the manifest ``out`` of a source, and ``OUT.unreadable.jsonl`` if there is something for it.

    Args:
        overwrite: replace these files if they are there.

    Returns:
        0; 1 if no row is readable.

    Raises:
        RunError: the source is not there, a file is there already, is the source or a part of it, or cannot be written.
    """
    unreadable = out.with_name(f"{out.stem}.unreadable.jsonl")
    read = {os.path.realpath(named.location) for named in find_sources(source)}
    for path in (out, unreadable):
        if os.path.realpath(path) in read:
            raise RunError(f"--out {out}: {path} is the source itself, or a part of it: choose another name")
        if path.exists() and not overwrite:
            raise RunError(f"--out {out}: {path} is there already: choose another name, or --overwrite to replace it")
    total = _ChunkResult()
    num_rows = num_refused = 0
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as aside:
            # 1. List the source; the result is a JSON-lines file of rows without facts from headers.
            listed = local_manifest(source, Path(aside), settings)
            made, bad = Path(aside) / "made", Path(aside) / "bad"
            with made.open("wb") as stream, bad.open("wb") as bad_stream, RowCounter("opening files") as counter:
                # 2. Open every file, many at once, and keep the order.
                for part in ordered(partial(_make_chunk, settings), _chunks(str(listed)), workers):
                    stream.writelines(line + b"\n" for line in part.lines)
                    for row in part.refused:
                        bad_stream.write(dump_json(row) + b"\n")
                    num_rows, num_refused = num_rows + len(part.lines), num_refused + len(part.refused)
                    total.refused += part.refused[: _EXAMPLES - len(total.refused)]
                    total.seconds += part.seconds
                    total.num_unknown += part.num_unknown
                    counter.update(len(part.lines) + len(part.refused))
            # 3. Only a complete manifest takes the place of an earlier one.
            made.replace(out)
            if num_refused:
                bad.replace(unreadable)
            else:
                unreadable.unlink(missing_ok=True)
    except OSError as error:
        raise RunError(f"{error.filename or out}: {error.strerror or error}", exit_code=1) from error
    unknown = f", {total.num_unknown:,} of unknown duration" if total.num_unknown else ""
    print(f"{out}: {num_rows:,} rows, {total.seconds / 3600:,.3f} h{unknown}")
    if num_refused:
        print(f"{unreadable}: {num_refused:,} that are not in it, among them")
        for row in total.refused:
            print(f"  {printable(row['key'] or 'without key')}: {printable(row['reason'])}")
    return 0 if num_rows else 1


def _chunks(path: str) -> Iterator[list[bytes]]:
    lines = lines_of(path)
    while part := list(islice(lines, _CHUNK)):
        yield part


def _make_chunk(settings: SourceSettings, lines: list[bytes]) -> _ChunkResult:
    made = _ChunkResult()
    for text in lines:
        if text.strip():
            _make_line(text, settings, made)
    return made


def _make_line(text: bytes, settings: SourceSettings, made: _ChunkResult) -> None:
    try:
        row = parse_json(text)
    except ValueError as error:
        row = {REFUSED: f"not valid JSON: {first_line(error)}"}
    if not isinstance(row, dict):
        row = {REFUSED: "not a JSON object"}
    key = row.get("key") if isinstance(row.get("key"), str) else None
    reason = row.get(REFUSED)
    try:
        if reason is None and settings.input_field == "wav":
            text, seconds = _with_header(row, text)
            made.seconds += seconds or 0.0
            made.num_unknown += seconds is None
    except RowError as error:
        reason = error.reason
    except ValueError as error:
        reason = str(error)
    if reason is None:
        made.lines.append(text.strip())
    else:
        made.refused.append({"key": key, "reason": reason})


def _with_header(row: dict[str, Any], text: bytes) -> tuple[bytes, float | None]:
    """The line with what its file's header says, and the seconds of the row's audio; None where they are not known.

    Raises:
        RowError: the file cannot be opened.
        ValueError: the row's own fields are wrong.
    """
    wav = row.get("wav")
    if not isinstance(wav, str) or not wav:
        raise ValueError('field "wav" is missing')
    header = probe_audio(wav)
    added: dict[str, Any] = {"original_sample_rate": header.sample_rate, "original_channels": header.channels}
    cut = cut_of(row)
    seconds = header.seconds(cut)
    if cut is None or (cut.start == 0 and cut.end is None):
        if seconds is not None:
            added["duration"] = round(seconds, 6)
        elif isinstance(row.get("duration"), (int, float)):
            seconds = float(row["duration"])
    return dump_json(row | added), seconds


# ---------------------------------------------------------------------------------------------------------------- stats


def _stats(source: str, model_path: str | None, num_quantizers: int | None, rtf: float) -> int:
    if not rtf > 0:
        raise RunError(f"--rtf {rtf:g}: must be above 0")
    with tempfile.TemporaryDirectory(prefix="batch_tokenizer-") as scratch:
        listed = local_manifest(source, Path(scratch), SourceSettings("wav2token", "tar"))
        manifest = Manifest.open(listed, "wav2token", scratch, sink="tar")
        # 1. Counts of lines.
        rows = np.flatnonzero(manifest.is_row)
        counts = {state: int(np.count_nonzero(manifest.states == state)) for state in LineState}
        print(
            f"rows       {len(manifest):,}: {counts[LineState.ROW]:,} good, {counts[LineState.MALFORMED]:,} malformed, "
            f"{counts[LineState.DUPLICATE]:,} duplicate"
        )
        if not len(rows):
            return 1
        sample = _sample(manifest, rows)
        durations = manifest.durations[rows].astype(np.float64)
    # 2. Hours; rows without duration are estimated from the headers of a sample.
    known = durations[~np.isnan(durations)]
    num_unknown = len(durations) - len(known)
    seconds: float | None = float(known.sum())
    if num_unknown:
        lengths = [length for length in sample.seconds if length is not None]
        extrapolated = num_unknown * float(np.mean(lengths)) if lengths else None
        length = "how long they are is unknown" if extrapolated is None else (
            f"about {extrapolated / 3600:,.2f} h by a sample of {len(lengths):,}"
        )  # fmt: skip
        print(
            f"audio      {known.sum() / 3600:,.2f} h in {len(known):,} rows; {num_unknown:,} say no duration: {length}"
        )
        seconds = None if extrapolated is None else float(known.sum()) + extrapolated
    else:
        print(f"audio      {known.sum() / 3600:,.2f} h")
    # 3. Durations, rates and channels, and what tokens of all that would take.
    _print_histogram(known)
    for name, found in (("rates", sample.rates), ("channels", sample.channels)):
        parts = ", ".join(f"{value} ({100 * count / found.total():.0f} %)" for value, count in found.most_common(8))
        print(f"{name:<10} {parts or 'unknown'}" + (f", of a sample of {found.total():,}" if parts else ""))
    for kind, count in sample.troubles.most_common(_EXAMPLES):
        print(f"           {count:,} of the sample cannot be opened: {printable(kind)}")
    if seconds is not None:
        _print_expectations(seconds, len(rows), model_path, num_quantizers, rtf)
    return 0


@dataclass(slots=True)
class _Sample:
    """Rows that were looked at; ``seconds`` has an element a row."""

    rates: Counter[str] = field(default_factory=Counter)
    channels: Counter[str] = field(default_factory=Counter)
    troubles: Counter[str] = field(default_factory=Counter)
    seconds: list[float | None] = field(default_factory=list)


def _sample(manifest: Manifest, rows: npt.NDArray[np.int64]) -> _Sample:
    """Rows spread over the manifest, by what they say of their files, or by the files' headers."""
    sample = _Sample()
    picked = (row for row in manifest.sample(rows, _SAMPLE_ROWS) if isinstance(row, ManifestRow))
    for facts in ordered(_facts, picked, 8):
        if isinstance(facts, str):
            sample.troubles[facts] += 1
            continue
        rate, channels, seconds = facts
        sample.rates[f"{rate:,} Hz"] += 1
        sample.channels[str(channels)] += 1
        sample.seconds.append(seconds)
    return sample


def _facts(row: ManifestRow) -> tuple[int, int, float | None] | str:
    """Rate, channels and seconds of a row, or why they are not known."""
    rate, channels = row.fields.get("original_sample_rate"), row.fields.get("original_channels")
    if type(rate) is int and type(channels) is int:
        duration = row.fields.get("duration")
        return rate, channels, float(duration) if isinstance(duration, (int, float)) else None
    try:
        header = probe_audio(str(row.wav))
    except RowError as error:
        return error.reason
    return header.sample_rate, header.channels, header.seconds(row.cut)


def _print_histogram(seconds: npt.NDArray[np.float64]) -> None:
    if not len(seconds):
        return
    counts = np.bincount(np.searchsorted(_BINS, seconds, side="right"), minlength=len(_BINS) + 1)
    sums = np.bincount(np.searchsorted(_BINS, seconds, side="right"), weights=seconds, minlength=len(_BINS) + 1)
    print(
        f"durations  {seconds.min():.2f} to {seconds.max():.2f} s, mean {seconds.mean():.2f}, "
        f"median {np.median(seconds):.2f}"
    )
    for number, (count, total) in enumerate(zip(counts.tolist(), sums.tolist(), strict=True)):
        if count:
            low = "" if number == 0 else f"{_BINS[number - 1]:g}"
            high = f"{_BINS[number]:g}" if number < len(_BINS) else ""
            bar = "#" * round(_BAR * count / int(counts.max()))
            print(f"{low:>6} to {high:<5} s {count:>12,} {total / 3600:>12,.2f} h  {bar}".rstrip())


def _print_expectations(
    seconds: float, num_rows: int, model_path: str | None, num_quantizers: int | None, rtf: float
) -> None:
    # Imported here, as this takes torch, which nothing before it needs.
    from batch_tokenizer.codecs.opening import open_spec

    info = open_spec(model_path).info
    codebooks = num_quantizers or info.num_codebooks
    if not 1 <= codebooks <= info.num_codebooks:
        raise RunError(f"--num_quantizers {num_quantizers}: {info.name} has {info.num_codebooks} codebooks")
    frames = seconds * info.frame_rate
    # A code in JSON is its digits and a comma; equally likely codes have this many.
    digits = sum(
        float(np.mean([len(str(code)) for code in range(size)])) + 1 for size in info.codebook_sizes[:codebooks]
    )
    print(f"tokens     {frames * codebooks:,.0f}: {info.name}, {info.frame_rate:g} frames a second x {codebooks}")
    print(
        f"bytes      {format_size(frames * (digits + 2))} as JSON and about {format_size(400.0 * num_rows)} of info; "
        f"{format_size(2 * frames * codebooks)} as 16-bit integers; "
        f"{format_size(2 * seconds * info.output_sample_rate)} of reconstructed wav"
    )
    print(f"GPU-hours  {seconds / 3600 * rtf:,.2f} at an RTF of {rtf:g} (--rtf)")
