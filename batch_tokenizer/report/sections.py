"""The sections of a run's page: what the run folder, its manifest and the scores say, as blocks for ``page.py``.

Nothing is shown that was not recorded: ledgers hold no times, so rates are those of the status files, from each
process's start to its latest status.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np
from tqdm import tqdm

from batch_tokenizer.manifest.manifest import Manifest
from batch_tokenizer.quality.aggregates import Group, column_name, heading, level_notes, reason_lines, score_texts
from batch_tokenizer.quality.evaluation import Evaluation, recordings
from batch_tokenizer.quality.metrics import METRICS
from batch_tokenizer.quality.recordings import Recording
from batch_tokenizer.records import ManifestRow, RowError
from batch_tokenizer.report import figures
from batch_tokenizer.report.page import (
    Block,
    Charts,
    Comparison,
    Facts,
    Folded,
    Notes,
    Paragraph,
    Section,
    Side,
    Table,
    audio_url,
)
from batch_tokenizer.runs.finished_run import FinishedRun
from batch_tokenizer.runs.scored_rows import Source, rows_with_outputs
from batch_tokenizer.runtime.ledger import LedgerState, iter_failures
from batch_tokenizer.runtime.progress import RankStatus, duration_text, read_rank_statuses, speed_text

log = logging.getLogger(__name__)

#: Bytes of the page's figures and audio, beyond which utterances are left out.
_MOST_LISTEN_BYTES = 12_000_000

#: Seconds of an utterance that the page shows and plays.
_LISTEN_SECONDS = 15.0

_RANKS_SHOWN = 32
_EXAMPLES = 3
_REASONS_SHOWN = 30

#: A histogram of fewer values says less than the table does.
_LEAST_VALUES = 10

#: Metrics whose distribution is drawn.
_DRAWN_METRICS = ("pesq_wb", "stoi", "sim", "si_sdr", "mel_distance", "mos")


@dataclass(frozen=True, slots=True)
class RunFacts:
    """A run, and what its folder and manifest say of it."""

    run: FinishedRun
    manifest: Manifest
    state: LedgerState
    ranks: Sequence[RankStatus]
    summary: Mapping[str, Any]

    @classmethod
    def of(cls, run: FinishedRun, manifest: Manifest, state: LedgerState) -> RunFacts:
        """Reads status files and summary."""
        return cls(run, manifest, state, tuple(read_rank_statuses(run.path)), run.summary())

    @property
    def audio_seconds(self) -> float:
        """Of all rows that are done, in all attempts."""
        return float(self.state.num_samples.sum()) / self.run.settings["sample_rate"]

    @property
    def wall_seconds(self) -> float:
        """Time in which any process was at work."""
        return sum(end - start for start, end in _spans(self.ranks))


def key_numbers(facts: RunFacts) -> dict[str, str]:
    """The few numbers that matter most."""
    state, seconds = facts.state, facts.wall_seconds
    numbers = {
        "rows done": f"{state.num_done:,}",
        "rows failed": f"{state.num_failed:,}",
        "rows to do": f"{state.num_pending:,}",
        "audio": duration_text(facts.audio_seconds),
        "wall time": tqdm.format_interval(seconds) if seconds else "-",
    }
    processed = sum(rank.audio_seconds for rank in facts.ranks)
    if processed and seconds:
        numbers["× real time"] = speed_text(processed, seconds).split()[0]
    return numbers


# ----------------------------------------------------------------------------------------------------------------- run


def what_ran(facts: RunFacts) -> Section:
    """Settings, source and starts."""
    settings = facts.run.settings
    known = {name.replace("_", " "): value for name, value in settings.items() if value is not None}
    if sizes := settings.get("codebook_sizes"):
        known["codebook sizes"] = ", ".join(f"{len(list(same))} × {size}" for size, same in groupby(sizes))
    if "model_path" in facts.summary:
        known = {"model path": facts.summary["model_path"] or "bundled default", **known}
    last = max((rank.attempt for rank in facts.ranks), default=0)
    states = sorted({rank.state for rank in facts.ranks if rank.attempt == last})
    known["manifest"] = f"{facts.manifest.path} ({len(facts.manifest):,} rows)"
    known["starts of the job"] = len({rank.attempt for rank in facts.ranks})
    if states:
        count = sum(rank.attempt == last for rank in facts.ranks)
        known["last start"] = f"{count} process{'es' if count > 1 else ''}, {', '.join(states)}"
    return Section("What ran", [Facts(known)], folded=True)


def _spans(ranks: Sequence[RankStatus]) -> list[tuple[float, float]]:
    """Stretches of time, seconds since 1970, in which any process was at work."""
    spans: list[tuple[float, float]] = []
    for start, end in sorted((rank.started, rank.started + rank.elapsed) for rank in ranks):
        if spans and start <= spans[-1][1]:
            spans[-1] = (spans[-1][0], max(end, spans[-1][1]))
        else:
            spans.append((start, end))
    return spans


def progress(facts: RunFacts) -> Section:
    """Rates and processes. Processes that ended without having had a row are only counted."""
    if not facts.ranks:
        return Section("Progress", [Paragraph("No process has left a status file.")])
    shown = [rank for rank in facts.ranks if rank.rows_done or rank.rows_failed or rank.state == "running"]
    rows: list[tuple[Any, ...]] = [
        (
            rank.attempt, rank.shard, rank.rank, f"{rank.rows_done:,}", f"{rank.rows_failed:,}",
            duration_text(rank.audio_seconds), speed_text(rank.audio_seconds, rank.elapsed).split()[0],
            tqdm.format_interval(rank.elapsed), rank.state, rank.host, rank.device,
        )
        for rank in shown[-_RANKS_SHOWN:]
    ]  # fmt: skip
    head = ["start", "shard", "rank", "rows done", "failed", "audio", "× real time", "time", "state", "host", "device"]
    if len({(rank.attempt, rank.shard) for rank in shown}) == 1:  # nothing to tell apart
        head, rows = head[2:], [row[2:] for row in rows]
    caption = "Processes"
    if len(shown) > _RANKS_SHOWN:
        caption += f", the last {_RANKS_SHOWN} of {len(shown)}"
    if len(shown) < len(facts.ranks):
        caption += f"; {len(facts.ranks) - len(shown)} that had no row to do are not shown"
    stages: dict[str, float] = {}
    for rank in facts.ranks:
        for stage, seconds in rank.stage_seconds.items():
            stages[stage] = stages.get(stage, 0.0) + seconds
    charts = {"Audio over time": _over_time(shown or facts.ranks)}
    if stages:
        charts["Where time went"] = figures.bars(
            "Seconds spent a stage", stages, "seconds, summed over processes and their workers"
        )
    blocks: list[Block] = [Charts(charts)]
    if len(shown) > 1:
        lines = "Each process records when it started and what it had done at its latest status: lines are straight."
        blocks.append(Paragraph(lines, quiet=True))
    return Section("Progress", [*blocks, Table(caption, head, rows)])


def _time_unit(seconds: float) -> tuple[float, str]:
    """The unit of an axis up to so many seconds: its length in seconds, and its name."""
    if seconds < 180:
        return 1.0, "seconds"
    return (3600.0, "hours") if seconds > 7200 else (60.0, "minutes")


def _over_time(ranks: Sequence[RankStatus]) -> str:
    begin = min(rank.started for rank in ranks)
    points: list[tuple[float, float]] = [(0.0, 0.0)]
    moments = sorted({moment for rank in ranks for moment in (rank.started, rank.started + rank.elapsed)})
    unit, name = _time_unit(moments[-1] - begin)
    audio_unit, audio_name = _time_unit(sum(rank.audio_seconds for rank in ranks))
    for moment in moments:
        done = sum(
            rank.audio_seconds * min(1.0, max(0.0, moment - rank.started) / max(rank.elapsed, 1e-9)) for rank in ranks
        )
        points.append(((moment - begin) / unit, done / audio_unit))
    series = {"all processes": points}
    if 1 < len(ranks) <= 8:
        for rank in ranks:
            start = (rank.started - begin) / unit
            series[f"start {rank.attempt}, rank {rank.rank}"] = [
                (start, 0.0),
                (start + rank.elapsed / unit, rank.audio_seconds / audio_unit),
            ]
    return figures.lines(
        "Audio done over time", series, f"{name} since the first process started", f"{audio_name} of audio"
    )


@dataclass
class _Reason:
    count: int = 0
    examples: list[str] = field(default_factory=list)


def reason_pattern(reason: str) -> str:
    """A failure's reason without what differs from row to row: paths, quoted names and numbers."""
    reason = re.sub(r'"[^"]*"', '"…"', reason)
    reason = re.sub(r"\S*[/\\][^\s:,;)]*", "FILE", reason)
    reason = re.sub(r"^\S+\.\w{1,5}(?=: )", "FILE", reason)
    return re.sub(r"\d[\d.,]*", "N", reason)


def failures(facts: RunFacts) -> Section:
    """Failed rows by reason."""
    if not facts.state.num_failed:
        return Section("Failures", [Paragraph("No row failed.")])
    reasons: dict[tuple[str, str], _Reason] = {}
    for entry in iter_failures(facts.run.path, facts.manifest, facts.state):
        one = reasons.setdefault((entry.stage or "-", reason_pattern(entry.reason or "-")), _Reason())
        one.count += 1
        if len(one.examples) < _EXAMPLES:
            one.examples.append(f"{entry.key or f'line {entry.line + 1}'}: {entry.reason}")
    ordered = sorted(reasons.items(), key=lambda item: -item[1].count)
    rows: list[tuple[Any, ...]] = [
        (f"{one.count:,}", stage, pattern, " · ".join(one.examples))
        for (stage, pattern), one in ordered[:_REASONS_SHOWN]
    ]
    more = f", the most frequent {_REASONS_SHOWN} of {len(ordered)} reasons" if len(ordered) > _REASONS_SHOWN else ""
    head = ["rows", "stage", "reason", "examples"]
    return Section("Failures", [Table(f"Failed rows by reason{more}", head, rows, wide=(2, 3))])


def lengths(facts: RunFacts) -> Section:
    """How long the rows are that are done."""
    done = facts.state.frames > 0
    count = int(np.count_nonzero(done))
    if not count:
        return Section("Lengths", [Paragraph("No row is done.")])
    seconds = facts.state.num_samples[done] / facts.run.settings["sample_rate"]
    frames = facts.state.frames[done]
    if count < _LEAST_VALUES:
        text = f"{count} rows of {seconds.min():.2f} to {seconds.max():.2f} s, "
        text += f"{frames.min():,} to {frames.max():,} token frames."
        return Section("Lengths", [Paragraph(text)])
    charts = {
        "Duration": figures.histogram("Durations of rows that are done", seconds, "seconds"),
        "Token frames": figures.histogram(
            "Token frames of rows that are done", frames, "frames a row", color=figures.GREEN
        ),
    }
    return Section("Lengths", [Charts(charts)])


# ------------------------------------------------------------------------------------------------------------- quality


def quality(evaluation: Evaluation) -> Section:
    """Mean scores, a row a metric and a column a group of utterances."""
    groups = evaluation.groups
    names = [name for name in METRICS if any(name in one.estimates or name in one.reasons for one in groups)]
    head = ["", *(column_name(one, groups) for one in groups)]
    rows = [(heading(name), *(_cell(one, name) for one in groups)) for name in names]
    rows.append(("utterances", *(f"{one.count:,}" for one in groups)))
    caption = "Mean scores, with the 95 % confidence interval of the mean (bootstrap over utterances)"
    blocks: list[Block] = [Paragraph(note) for note in level_notes(evaluation.utterances)]
    blocks.append(Table(caption, head, rows))
    if "si_sdr" in names:
        blocks.append(
            Paragraph(
                "SI-SDR compares waveforms sample by sample: a decoder that makes up its own phase is near -30 dB "
                "however good it sounds.",
                quiet=True,
            )
        )
    if "sim" in names:
        speaker_model = evaluation.settings["speaker_model"]
        blocks.append(Paragraph(f"SIM is the cosine of speaker embeddings by {speaker_model}.", quiet=True))
    notes = reason_lines([one for one in groups if one.name == "all"], names)
    notes += [f"{record['key']} could not be scored: {record['failed']}" for record in evaluation.failed[:20]]
    if notes:
        blocks.append(Notes(f"{len(notes)} notes on missing scores", notes))
    charts = {}
    for name in _DRAWN_METRICS:
        values = [record["scores"][name] for record in evaluation.utterances if name in record["scores"]]
        if len(values) >= _LEAST_VALUES:
            label = METRICS[name].label
            charts[label] = figures.histogram(
                f"{label} of scored utterances", values, heading(name), color=figures.PURPLE, width=3.4
            )
    if charts:
        blocks.append(Charts(charts))
    return Section("Quality", blocks)


def _cell(one: Group, name: str) -> str:
    found = one.estimates.get(name)
    if found is None:
        return "none"
    text = METRICS[name].text
    if found.low is None or found.high is None:
        return text(found.mean)
    return f"{text(found.mean)} [{text(found.low)}, {text(found.high)}]"


def codebooks(evaluation: Evaluation) -> Section:
    """How much of each codebook the scored utterances use."""
    use = evaluation.codebooks
    if not use:
        return Section("Codebooks", [Paragraph("No tokens were read.")])
    perplexities = {str(row["codebook"]): float(row["perplexity"]) for row in use}
    sizes = {str(row["codebook"]): float(row["size"]) for row in use if row["size"] is not None}
    all_known = len(sizes) == len(perplexities)
    chart = figures.bars(
        "Perplexity of each codebook", perplexities, "perplexity" + (" (grey: size)" if all_known else ""),
        limits=sizes if all_known else None,
    )  # fmt: skip
    rows: list[tuple[Any, ...]] = [
        (row["codebook"], row["size"] or "not known", row["used"], "not known" if row["dead"] is None else row["dead"],
         f"{row['entropy']:.2f}", f"{row['perplexity']:.1f}")
        for row in use
    ]  # fmt: skip
    head = ["codebook", "size", "used", "unused", "entropy (bits)", "perplexity"]
    return Section(
        "Codebooks",
        [
            Facts({name: f"{value:,.10g}" for name, value in evaluation.rates.items()}),
            Charts({"Perplexity": chart}),
            Paragraph("Codes that are unused here may occur in more audio.", quiet=True),
            Folded("As a table", Table("Use of codebooks", head, rows)),
        ],
    )


# -------------------------------------------------------------------------------------------------------------- listen


def choose(utterances: Sequence[Mapping[str, Any]], count: int) -> tuple[str, list[Mapping[str, Any]]]:
    """Utterances from the worst to the best by a metric that many have, evenly spread; and the metric's name."""
    for name in ("pesq_wb", "stoi", "mel_distance"):
        able = [record for record in utterances if name in record["scores"]]
        if len(able) >= min(count, len(utterances)) / 2 and able:
            sign = -1 if METRICS[name].higher_is_better is False else 1
            able.sort(key=lambda record: sign * record["scores"][name])
            places = np.unique(np.linspace(0, len(able) - 1, min(count, len(able))).round().astype(int))
            return name, [able[place] for place in places]
    return "", list(utterances[:count])


def listen(evaluation: Evaluation, source: Source, count: int) -> Section:
    """Originals and reconstructions side by side, at most ``count`` utterances."""
    most = source.num_quantizers[-1]
    name, chosen = choose([record for record in evaluation.utterances if record["num_quantizers"] == most], count)
    if not chosen:
        return Section("Listen", [Paragraph("No utterance could be scored.")])
    which = f"{len(chosen)} utterances from the worst to the best {METRICS[name].label}" if name else "Some utterances"
    text = f"{which}, the first {_LISTEN_SECONDS:g} s of each. The vertical scale is the same for both recordings."
    blocks: list[Block] = [Paragraph(text)]
    num_bytes = 0
    for block in _comparisons(chosen, source):
        num_bytes += block.num_bytes if isinstance(block, Comparison) else 0
        if num_bytes > _MOST_LISTEN_BYTES:
            blocks.append(Paragraph("Further utterances are left out, to keep the page small.", quiet=True))
            log.info("the page would be too large: further utterances are left out")
            break
        blocks.append(block)
    return Section("Listen", blocks)


def _comparisons(chosen: Sequence[Mapping[str, Any]], source: Source) -> Iterator[Comparison | Paragraph]:
    lines = [record["line"] for record in chosen]
    rows = {row.line: (row, known) for row, known in rows_with_outputs(source.run, source.manifest, lines)}
    for record in chosen:
        row, known = rows[record["line"]]
        try:
            if not isinstance(row, ManifestRow):
                raise RowError(row.stage, row.reason)
            pair = [_first_seconds(one) for one in recordings(source, row, known)]
        except RowError as error:
            yield Paragraph(f"{record['key']}: cannot be shown: {error.reason}", quiet=True)
            continue
        peak = max(1e-3, *(float(np.abs(one.samples).max()) for one in pair))
        sides = []
        for side, one in zip(("Original", "Reconstruction"), pair, strict=True):
            title = f"{side} of {record['key']}: waveform and mel spectrogram"
            sides.append(Side(side, figures.recording(title, one, peak=peak), audio_url(one)))
        notes = [f"{record['seconds']:.2f} s, {record['frames']} frames of {record['num_quantizers']} codes"]
        about = [f"{name}: {value}" for name, value in record["row"].items() if name != "duration"]
        if about:
            notes.append(" · ".join(about))
        yield Comparison(str(record["key"]), notes, sides, score_texts(record["scores"], record["not_scored"]))


def _first_seconds(one: Recording) -> Recording:
    return Recording(one.samples[: int(_LISTEN_SECONDS * one.sample_rate)], one.sample_rate)
