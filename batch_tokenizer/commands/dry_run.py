"""``--dry_run``: checks everything that can be checked without running, and writes nothing that stays.

It prints what the run would do, how long it would take and how much it would write, estimated from a sample of its
rows, and a line for each thing that would fail. The manifest is indexed in a temporary folder, which is removed; an
earlier run's folder is only read.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from batch_tokenizer import __version__
from batch_tokenizer.audio.decoding import probe_audio
from batch_tokenizer.audio_fields import parts_of
from batch_tokenizer.codecs.base import Codec, CodecSpec
from batch_tokenizer.commands.dry_run_places import check_places, print_fact
from batch_tokenizer.commands.status import format_duration, format_size, seems_at_work
from batch_tokenizer.data.loading import RowLoader
from batch_tokenizer.data.pieces import PassLimit, piece_of
from batch_tokenizer.manifest.manifest import Manifest
from batch_tokenizer.manifest.row import LineState
from batch_tokenizer.manifest.units import in_shard, plan_units
from batch_tokenizer.pipeline.rank_loop import encode_decode, tokenized_rows
from batch_tokenizer.pipeline.setup import RunContext, warn_of_absent_fields
from batch_tokenizer.records import LoadedRow, ManifestRow, RowError, RunError
from batch_tokenizer.runs.output_rows import run_as_source
from batch_tokenizer.runs.source import settings_of
from batch_tokenizer.runtime.ledger import RowStatus, read_ledger
from batch_tokenizer.runtime.ledger_lines import has_done_rows
from batch_tokenizer.runtime.processes import ProcessGroup
from batch_tokenizer.runtime.run_settings import read_settings, run_dir_of, setting_differences
from batch_tokenizer.sources.listing import local_manifest
from batch_tokenizer.storage.names import display_name
from batch_tokenizer.writers.open import output_bytes

#: Rows of which the input is opened, and of these, rows that are decoded.
SAMPLE_ROWS, DECODED_ROWS = 32, 8

#: Seconds of audio that are decoded and computed, unless the shortest row has more.
_TIMED_SECONDS = 20.0

#: Lines of the manifest that are named for each way in which it is wrong.
_EXAMPLES = 3


@dataclass(frozen=True, slots=True)
class Sampled:
    """A row, or other audio of one, that was opened. ``seconds`` is its length, or None where the header does not
    say."""

    row: ManifestRow
    seconds: float | None


@dataclass(frozen=True, slots=True)
class Measured:
    """What the computed rows took, each for a second of their audio.

    Attributes:
        load: processor time of one loader process.
        stages: wall time of encode and decode.
        bytes_written: by output field, or of ``shards``.
    """

    load: float
    stages: Mapping[str, float]
    bytes_written: Mapping[str, float]


def dry_run(context: RunContext) -> int:
    """Prints the plan. Returns 1 if anything would fail, else 0; ranks other than 0 print nothing and return 0.

    Raises:
        RunError: the manifest or the run folder cannot be read.
        Stopped: a stop signal came.
    """
    config, processes, spec = context.config, context.processes, context.spec
    if not processes.is_main:
        return 0
    run_dir = run_dir_of(config)
    trouble: list[str] = []
    codebooks = f"{context.num_quantizers} of {spec.info.num_codebooks} codebooks"
    print_fact("dry run", f"batch_tokenizer {__version__}, {config.task}, {codebooks}")
    print_fact("model", f"{context.codec.checkpoint.folder} ({spec.info.family}, fingerprint {spec.info.fingerprint})")
    print_fact("device", context.compute.reason.removeprefix("device "))
    with tempfile.TemporaryDirectory(prefix="batch_tokenizer-") as scratch:
        # 1. The rows, and what an earlier run did of them.
        idle = context.stop.check
        source = str(config.data_list)
        if config.task == "token2wav":
            source = run_as_source(source, Path(scratch), idle)
        path = local_manifest(source, Path(scratch), settings_of(config, run_dir), idle)
        manifest = Manifest.open(path, config.task, scratch, sink=config.sink, progress=lambda done, total: idle())
        trouble += _describe_manifest(manifest, display_name(str(config.data_list)))
        warn_of_absent_fields(manifest, config.other_audio)
        status, troubles = _earlier_run(context, run_dir, manifest)
        trouble += troubles
        todo = status == RowStatus.PENDING
        if config.retry_failed:
            todo |= status == RowStatus.FAILED
        todo &= in_shard(manifest, config.num_shards, config.shard)
        units = plan_units(
            manifest, world_size=processes.world_size, num_shards=config.num_shards, shard=config.shard, pending=todo
        )
        rows = np.flatnonzero(todo & manifest.is_row)
        of_shard = f" of shard {config.shard} of {config.num_shards}" if config.num_shards > 1 else ""
        ranks = f"{processes.world_size} ranks ({processes.launcher})"
        print_fact("to do", f"{len(rows):,} rows{of_shard} in {len(units):,} units for {ranks}")
        trouble += _too_long(manifest, rows, spec, context.limit)
        # 2. A sample of the inputs is opened, and some of it is decoded.
        load = RowLoader(config.task, spec, config.resampler, context.num_quantizers, context.limit)
        sample, opened = _open_sample(context, load, manifest, rows, trouble)
        seconds = _estimate_seconds(manifest, rows, opened)
        loaded = _load_some(context, load, opened, trouble)
    # 3. What was decoded goes through the model, whose times and sizes stand for all rows.
    measured = None
    try:
        codec = context.load_codec()
    except RunError as error:
        trouble.append(str(error))
    else:
        context.stop.check()
        measured = _measure(context, codec, loaded) if loaded else None
    needed: dict[str, float] = {}
    if measured is None or seconds is None:
        print_fact("time", "unknown, as no row of the sample could be computed" if len(rows) else "none: nothing to do")
    else:
        _print_time(context.num_workers, processes, measured, seconds)
        needed = {field: share * seconds for field, share in measured.bytes_written.items()}
        print_fact("bytes", ", ".join(f"{field} {format_size(size)}" for field, size in needed.items()))
    # 4. Whether the outputs can be written.
    trouble += check_places(sample, manifest.form, config.output_dir, run_dir, needed)

    print()
    for line in trouble:
        print(f"would fail: {line}".encode(errors="backslashreplace").decode())
    print(
        f"{len(trouble)} things would fail"
        if trouble
        else "nothing would fail, as far as the manifest and a sample of its rows show",
        flush=True,
    )
    return 1 if trouble else 0


# ------------------------------------------------------------------------------------------------ manifest, run folder


def _describe_manifest(manifest: Manifest, source: str) -> Iterator[str]:
    """Prints the counts, and yields a line for what is wrong, with the first examples."""
    counts = {}
    for state, name in ((LineState.MALFORMED, "malformed"), (LineState.DUPLICATE, "duplicate")):
        lines = np.flatnonzero(manifest.states == state)
        counts[name] = len(lines)
        for line in lines[:_EXAMPLES].tolist():
            item = manifest.row(line)
            yield f"line {line + 1}, {item.key or 'without key'}: {getattr(item, 'reason', name)}"
        if len(lines) > _EXAMPLES:
            yield f"{len(lines) - _EXAMPLES:,} more {name} lines"
    print_fact(
        "manifest",
        f"{source}: {len(manifest):,} rows, " + ", ".join(f"{count:,} {kind}" for kind, count in counts.items()),
    )


def _earlier_run(context: RunContext, run_dir: Path, manifest: Manifest) -> tuple[npt.NDArray[np.uint8], list[str]]:
    """Each line's status as the run would find it, and why an earlier run's folder could not be resumed."""
    config = context.config
    fresh = np.where(manifest.is_blank, RowStatus.BLANK, RowStatus.PENDING).astype(np.uint8)
    if not run_dir.exists():
        print_fact("run folder", f"{run_dir}, new")
        return fresh, []
    if not run_dir.is_dir():
        return fresh, [f"run folder {run_dir} is a file: choose another with --run_dir"]
    trouble = []
    if seems_at_work(run_dir):
        trouble.append(f"run folder {run_dir}: a job seems to be at work on it")
    before = read_settings(run_dir)
    differences = [] if before is None else setting_differences(before, context.run_settings)
    if differences and not has_done_rows(run_dir):
        print_fact("run folder", f"{run_dir}: no row is done in it, it begins anew")
        return fresh, trouble
    if differences and config.overwrite:
        print_fact("run folder", f"{run_dir}: discarded, it is of a run with other settings ({'; '.join(differences)})")
        return fresh, trouble
    if differences:
        return fresh, [
            *trouble, f"run folder {run_dir} is of a run with other settings: {'; '.join(differences)}",
        ]  # fmt: skip
    state = read_ledger(run_dir, manifest)
    if state.num_changed:
        changed = f"{state.num_changed} finished rows changed in the manifest ({', '.join(state.changed_keys)})"
        if config.overwrite:
            print_fact("run folder", f"{run_dir}: discarded, as {changed}")
            return fresh, trouble
        trouble.append(f"run folder {run_dir}: {changed}")
    print_fact("run folder", f"{run_dir}: resumed, {state.num_done:,} rows are done, {state.num_failed:,} failed")
    return state.status, trouble


def _too_long(manifest: Manifest, rows: npt.NDArray[np.int64], spec: CodecSpec, limit: PassLimit) -> list[str]:
    if limit.samples is None or limit.policy != "native" or manifest.task == "token2wav":
        return []
    most = limit.samples / spec.info.sample_rate
    lines = rows[manifest.durations[rows] > most]
    if not len(lines):
        return []
    first = f"the first on line {lines[0] + 1}"
    return [f"{len(lines):,} rows are by the manifest longer than the {most:g} s that one pass takes, {first}"]


# -------------------------------------------------------------------------------------------------------------- sample


def _open_sample(
    context: RunContext, load: RowLoader, manifest: Manifest, rows: npt.NDArray[np.int64], trouble: list[str]
) -> tuple[list[ManifestRow], list[Sampled]]:
    """Rows spread evenly over those to do, and their inputs that open: their own, and other audio of theirs."""
    sampled = [item for item in manifest.sample(rows, SAMPLE_ROWS) if isinstance(item, ManifestRow)]
    opened = []
    inputs: list[ManifestRow] = []
    for row in sampled:
        try:
            inputs += parts_of(row, context.config.other_audio)
        except RowError as error:
            trouble.append(f"line {row.line + 1}, {row.key}: {error}")
    for row in inputs:
        context.stop.check()
        try:
            if context.config.task == "token2wav":
                seconds: float | None = load(row).num_samples / load.spec.info.sample_rate
            else:
                seconds = probe_audio(str(row.wav)).seconds(row.cut)
        except RowError as error:
            trouble.append(f"line {row.line + 1}, {row.key}: {error}")
        else:
            opened.append(Sampled(row, seconds))
    return sampled, opened


def _estimate_seconds(manifest: Manifest, rows: npt.NDArray[np.int64], opened: Sequence[Sampled]) -> float | None:
    """Prints and returns the seconds of audio of all rows to do; None where they are unknown."""
    durations = manifest.durations[rows]
    known = ~np.isnan(durations)
    seconds = float(durations[known].sum(dtype=np.float64))
    num_unknown = int(np.count_nonzero(~known))
    lengths = _seconds_of(opened, other=False)
    if num_unknown and not lengths:
        print_fact("audio", f"unknown: {num_unknown:,} rows have no duration, and no header of the sample says one")
        return None
    if not num_unknown:
        source = "by the manifest's durations"
    else:
        seconds += num_unknown * float(np.mean(lengths))
        part = f" for the {num_unknown:,} rows without duration" if known.any() else ""
        source = f"extrapolated from the headers of {len(lengths)} rows{part}"
    print_fact("audio", f"{seconds / 3600:,.3f} h, {source}")
    # Of other audio the manifest says nothing: the sample has it in proportion.
    others = _seconds_of(opened, other=True)
    if others and sum(lengths):
        more = seconds * sum(others) / sum(lengths)
        print_fact("", f"{more / 3600:,.3f} h of other audio, extrapolated from the headers of {len(others)} files")
        seconds += more
    return seconds


def _seconds_of(opened: Sequence[Sampled], *, other: bool) -> list[float]:
    """The lengths of rows' own audio, or of their other audio, so far as headers say."""
    return [
        sampled.seconds
        for sampled in opened
        if sampled.seconds is not None and (sampled.row.other_codes is not None) == other
    ]


def _load_some(context: RunContext, load: RowLoader, opened: Sequence[Sampled], trouble: list[str]) -> list[LoadedRow]:
    """Some rows as the codec takes them, decoded in full; not hours of audio, unless even the shortest is that long."""
    lengths = [sampled.seconds or 0.0 for sampled in opened]
    chosen: list[Sampled] = []
    room = _TIMED_SECONDS
    for sampled, length in zip(opened, lengths, strict=True):
        if length <= room and len(chosen) < DECODED_ROWS:
            chosen.append(sampled)
            room -= length
    if opened and not chosen:
        chosen.append(opened[int(np.argmin(lengths))])
    loaded: list[LoadedRow] = []
    for sampled in chosen:
        context.stop.check()
        try:
            loaded.append(_first_piece(load, load(sampled.row)))
        except RowError as error:
            trouble.append(f"line {sampled.row.line + 1}, {sampled.row.key}: {error}")
    print_fact("sample", f"{len(opened)} inputs opened, {len(loaded)} of {len(chosen)} decoded")
    return loaded


def _first_piece(load: RowLoader, loaded: LoadedRow) -> LoadedRow:
    """What stands for a row that is done in pieces; other rows as they are."""
    if loaded.pieces is None:
        return loaded
    if loaded.codes is None:
        return load(piece_of(loaded.row, loaded.pieces, 0, load.spec.info.sample_rate))
    assert loaded.pieces.frames is not None
    codes = loaded.codes[: loaded.pieces.frames[1]]
    return LoadedRow(loaded.row, None, codes, load.spec.num_output_samples(len(codes)), len(codes))


def _measure(context: RunContext, codec: Codec, loaded: Sequence[LoadedRow]) -> Measured | None:
    """Computes the loaded rows; None if they do not fit in memory."""
    batch = list(loaded)
    # 1. The batch. Where batches have one shape whatever is in them, as on a device, a few rows would overstate the
    #    cost of a second. A codec with a limit computes one utterance after the other.
    while (
        codec.batch_limit is None
        and codec.spec.batching != "one by one"
        and len(batch) < context.batch_size
        and 2 * sum(row.frames for row in batch) < codec.frame_budget
    ):
        batch += loaded
    batch = batch[: context.batch_size]
    # 2. One row first, whose times do not count: libraries start up on it.
    try:
        for rows in ([min(batch, key=lambda row: row.frames)], batch):
            computed = encode_decode(rows, codec, context.config, context.num_quantizers)
    except RowError:
        codec.release()
        return None
    # 3. What the results would take on disk, and all of it for a second of audio.
    results = list(tokenized_rows(batch, computed))
    rate = codec.info.sample_rate
    seconds = sum(result.num_samples for result in results) / rate
    sizes = output_bytes(context.config, results, context.info, context.num_quantizers, codec.info.output_sample_rate)
    return Measured(
        load=sum(row.load_seconds for row in loaded) / (sum(row.num_samples for row in loaded) / rate),
        stages={stage: spent / seconds for stage, spent in computed.seconds.items()},
        bytes_written={name: size / seconds for name, size in sizes.items()},
    )


def _print_time(loaders: int, processes: ProcessGroup, measured: Measured, seconds: float) -> None:
    """Loading goes on beside the model, unless there are no loader processes."""
    computing = sum(measured.stages.values()) * seconds / processes.world_size
    loading = measured.load * seconds / processes.world_size / max(1, loaders)
    total = max(computing, loading) if loaders else computing + loading
    print_fact(
        "time",
        f"about {format_duration(total)}: computing {format_duration(computing)}, loading {format_duration(loading)} "
        f"({loaders} loader processes a rank)",
    )
    shares = {**measured.stages, "load": measured.load}
    print_fact("", "seconds for one of audio: " + ", ".join(f"{name} {share:.5f}" for name, share in shares.items()))
