"""``batch_tokenizer report RUN_DIR``: the run's page, one HTML file with figures and audio that needs no network.

What enters is the run folder (settings, ledger, status files, summary), its manifest, and the audio of some utterances.
Nothing is shown that was not recorded: ledgers hold no times, so the rates are those of the status files, from each
process's start to its last word. Utterances are scored as by ``evaluate``, whose results are used where they are there.
"""

from __future__ import annotations

import argparse
import logging
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from batch_tokenizer import __version__
from batch_tokenizer.commands.evaluate import Evaluation, Request, evaluate, num_scored
from batch_tokenizer.manifest.manifest import Manifest
from batch_tokenizer.quality.aggregates import reason_lines
from batch_tokenizer.quality.metrics import METRICS
from batch_tokenizer.quality.recordings import Recording
from batch_tokenizer.records import ManifestRow, RowError, RunError
from batch_tokenizer.report import figures, page, sounds
from batch_tokenizer.runs.finished_run import FinishedRun
from batch_tokenizer.runs.scored_rows import Source, recordings
from batch_tokenizer.runtime.ledger import LedgerState, iter_failures, read_ledger
from batch_tokenizer.runtime.progress import RankStatus

log = logging.getLogger(__name__)

#: The page stays below this, so that it can be sent around; audio is left out before it would not.
MOST_BYTES = 15_000_000
_AUDIO_BYTES = 12_000_000

#: Seconds of an utterance that the page shows and plays.
_LISTEN_SECONDS = 15.0

_RANKS_SHOWN = 32
_EXAMPLES = 3
_REASONS_SHOWN = 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    add = parser.add_argument
    add("run_dir", type=Path, help="the run folder, by default named MANIFEST.TASK.run")
    add("--data_list", help="the run's manifest, where it does not lie beside the run folder")
    add("--model_path", help="the run's checkpoint; needed for sizes of codebooks and for runs that made no audio")
    add("--sample", type=int, default=24, metavar="N", help="utterances to score, if not scored yet (%(default)s)")
    add("--listen", type=int, default=6, metavar="N", help="utterances to show and play (%(default)s)")
    add("--by", metavar="FIELD", help="scores for each value of this field of the manifest's rows")
    add("--speaker_model", default="auto", help="as in evaluate")
    add("--workers", type=int, default=1, help="processes that score (%(default)s)")
    add("--out", type=Path, metavar="FILE", help="the page; RUN_DIR/report.html when absent")


def main(arguments: argparse.Namespace) -> int:
    """Writes the page and prints its path and the averages. Returns 0.

    Raises:
        RunError: there is no such run folder, its manifest is not to be found, or the page cannot be written.
    """
    run_dir: Path = arguments.run_dir
    if arguments.listen < 0:
        raise RunError(f"--listen {arguments.listen}: must be at least 0")
    finished = FinishedRun.open(run_dir)
    manifest = finished.manifest(arguments.data_list)
    state = read_ledger(run_dir, manifest)
    evaluation: Evaluation | None = None
    source: Source | None = None
    trouble = ""
    try:
        request = Request(
            run_dir=run_dir,
            data_list=manifest.path,
            model_path=arguments.model_path,
            sample=max(arguments.sample, num_scored(run_dir / "quality")),
            by=arguments.by,
            speaker_model=arguments.speaker_model,
            workers=arguments.workers,
        )
        source = request.open_source()
        evaluation = evaluate(request, source)
    except RunError as error:
        trouble = str(error)
        log.warning("utterances are not scored: %s", error)
    run = Run(run_dir, finished.settings, manifest, state, finished.statuses(), finished.summary())
    text = run_page(run, evaluation, source, trouble, arguments.listen)
    path: Path = arguments.out or run_dir / "report.html"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror}", exit_code=1) from error
    if evaluation is not None:
        print(evaluation.table)
    print(f"report: {path} ({len(text.encode()) / 1e6:.1f} MB)")
    return 0


@dataclass(frozen=True, slots=True)
class Run:
    """What a run folder and its manifest say."""

    path: Path
    settings: Mapping[str, Any]
    manifest: Manifest
    state: LedgerState
    ranks: Sequence[RankStatus]
    summary: Mapping[str, Any]

    @property
    def audio_hours(self) -> float:
        """Of all rows that are done, in all attempts."""
        return float(self.state.num_samples.sum()) / self.settings["sample_rate"] / 3600


def run_page(run: Run, evaluation: Evaluation | None, source: Source | None, trouble: str, listen: int) -> str:
    """The page's HTML.

    Args:
        trouble: why there is no evaluation, if there is none.
        listen: most utterances to show with audio.
    """
    state = run.state
    seconds = sum(end - start for start, end in _spans(run.ranks))
    numbers = {
        "rows done": f"{state.num_done:,}",
        "rows failed": f"{state.num_failed:,}",
        "rows to do": f"{state.num_pending:,}",
        "hours of audio": f"{run.audio_hours:,.4g}",
        "wall time": _duration(seconds) if seconds else "-",
    }
    made = sum(rank.audio_seconds for rank in run.ranks)
    if made and seconds:
        numbers["real-time factor"] = f"{seconds / made:.4g}"
    sections = [
        page.Section("What ran", _what_ran(run)),
        page.Section("Progress", _progress(run)),
        page.Section("Failures", _failures(run)),
        page.Section("Lengths", _lengths(run)),
    ]
    if evaluation is None:
        sections.append(page.Section("Quality", page.paragraph(f"Not scored: {trouble}")))
    else:
        sections.append(page.Section("Quality", _quality(evaluation)))
        sections.append(page.Section("Codebooks", _codebooks(evaluation)))
        if source is not None and listen:
            sections.append(page.Section("Listen", _listen(evaluation, source, listen)))
    return page.render(
        run.path.resolve().name,
        f"{run.settings['task']} over {run.manifest.path.name}",
        numbers,
        sections,
        f"Made by batch_tokenizer {__version__} on {time.strftime('%Y-%m-%d')} from {run.path.resolve().name}.",
    )


# ------------------------------------------------------------------------------------------------------------ sections


def _what_ran(run: Run) -> str:
    known = {name.replace("_", " "): value for name, value in run.settings.items() if value is not None}
    if sizes := run.settings.get("codebook_sizes"):
        known["codebook sizes"] = ", ".join(f"{len(list(same))} × {size}" for size, same in groupby(sizes))
    if "model_path" in run.summary:
        known = {"model path": run.summary["model_path"] or "bundled default", **known}
    last = max((rank.attempt for rank in run.ranks), default=0)
    states = sorted({rank.state for rank in run.ranks if rank.attempt == last})
    known["manifest"] = f"{run.manifest.path} ({len(run.manifest):,} rows)"
    known["starts of the job"] = len({rank.attempt for rank in run.ranks})
    if states:
        count = sum(rank.attempt == last for rank in run.ranks)
        known["last start"] = f"{count} process{'es' if count > 1 else ''}, {', '.join(states)}"
    return page.facts(known)


def _spans(ranks: Sequence[RankStatus]) -> list[tuple[float, float]]:
    """Stretches of time, seconds since 1970, in which any process was at work."""
    spans: list[tuple[float, float]] = []
    for start, end in sorted((rank.started, rank.started + rank.elapsed) for rank in ranks):
        if spans and start <= spans[-1][1]:
            spans[-1] = (spans[-1][0], max(end, spans[-1][1]))
        else:
            spans.append((start, end))
    return spans


def _progress(run: Run) -> str:
    if not run.ranks:
        return page.paragraph("No process has left a status file.")
    rows = [
        (
            rank.attempt, rank.shard, rank.rank, rank.host, rank.device, rank.state, f"{rank.rows_done:,}",
            f"{rank.rows_failed:,}", f"{rank.audio_seconds / 3600:.3g}", _duration(rank.elapsed),
            f"{rank.audio_seconds / rank.elapsed:.1f}" if rank.elapsed else "-",
        )
        for rank in run.ranks[-_RANKS_SHOWN:]
    ]  # fmt: skip
    head = ["start", "shard", "rank", "host", "device", "state", "rows done", "failed", "audio h", "time", "h/h"]
    more = f", the last {_RANKS_SHOWN} of {len(run.ranks)}" if len(run.ranks) > _RANKS_SHOWN else ""
    stages: dict[str, float] = {}
    for rank in run.ranks:
        for stage, seconds in rank.stage_seconds.items():
            stages[stage] = stages.get(stage, 0.0) + seconds
    drawings = {"Hours of audio over time": _over_time(run.ranks)}
    if stages:
        drawings["Where time went"] = figures.bars(
            "Seconds spent a stage", stages, "seconds, summed over processes and their workers"
        )
    return (
        page.charts(drawings)
        + page.paragraph(
            "Each process records when it started and what it had done at its last word, so lines are straight in "
            "between.", quiet=True,
        )
        + page.table(f"Processes{more}", head, rows)
    )  # fmt: skip


def _over_time(ranks: Sequence[RankStatus]) -> str:
    begin = min(rank.started for rank in ranks)
    points: list[tuple[float, float]] = [(0.0, 0.0)]
    moments = sorted({moment for rank in ranks for moment in (rank.started, rank.started + rank.elapsed)})
    unit, name = (3600.0, "hours") if moments[-1] - begin > 7200 else (60.0, "minutes")
    if moments[-1] - begin < 180:
        unit, name = 1.0, "seconds"
    for moment in moments:
        done = sum(
            rank.audio_seconds * min(1.0, max(0.0, moment - rank.started) / max(rank.elapsed, 1e-9)) for rank in ranks
        )
        points.append(((moment - begin) / unit, done / 3600))
    series = {"all processes": points}
    if 1 < len(ranks) <= 8:
        for rank in ranks:
            start = (rank.started - begin) / unit
            series[f"start {rank.attempt}, rank {rank.rank}"] = [
                (start, 0.0),
                (start + rank.elapsed / unit, rank.audio_seconds / 3600),
            ]
    return figures.lines(
        "Hours of audio done over time", series, f"{name} since the first process started", "hours of audio"
    )


@dataclass
class _Reason:
    stage: str
    count: int = 0
    examples: list[str] = field(default_factory=list)


def reason_pattern(reason: str) -> str:
    """A failure's reason without what differs from row to row: paths, quoted names and numbers."""
    reason = re.sub(r'"[^"]*"', '"…"', reason)
    reason = re.sub(r"\S*[/\\][^\s:,;)]*", "FILE", reason)
    reason = re.sub(r"^\S+\.\w{1,5}(?=: )", "FILE", reason)
    return re.sub(r"\d[\d.,]*", "N", reason)


def _failures(run: Run) -> str:
    if not run.state.num_failed:
        return page.paragraph("No row failed.")
    reasons: dict[tuple[str, str], _Reason] = {}
    for entry in iter_failures(run.path, run.manifest, run.state):
        stage = entry.stage or "-"
        one = reasons.setdefault((stage, reason_pattern(entry.reason or "-")), _Reason(stage))
        one.count += 1
        if len(one.examples) < _EXAMPLES:
            one.examples.append(f"{entry.key or f'line {entry.line + 1}'}: {entry.reason}")
    ordered = sorted(reasons.items(), key=lambda item: -item[1].count)
    rows = [
        (f"{one.count:,}", one.stage, pattern, " · ".join(one.examples))
        for (_, pattern), one in ordered[:_REASONS_SHOWN]
    ]
    more = f", the most frequent {_REASONS_SHOWN} of {len(ordered)} reasons" if len(ordered) > _REASONS_SHOWN else ""
    return page.table(f"Failed rows by reason{more}", ["rows", "stage", "reason", "examples"], rows, wide=(2, 3))


def _lengths(run: Run) -> str:
    done = run.state.frames > 0
    if not done.any():
        return page.paragraph("No row is done.")
    seconds = run.state.num_samples[done] / run.settings["sample_rate"]
    return page.charts(
        {
            "Duration": figures.histogram("Durations of rows that are done", seconds, "seconds"),
            "Token frames": figures.histogram("Token frames of rows that are done", run.state.frames[done],
                                              "frames a row", color=figures.GREEN),
        }
    )  # fmt: skip


def _quality(evaluation: Evaluation) -> str:
    names = [
        name for name in METRICS
        if any(name in one.estimates or name in one.reasons for one in evaluation.groups)
    ]  # fmt: skip
    head = ["utterances", "codebooks", "n", *(_label(name) for name in names)]
    rows = []
    for one in evaluation.groups:
        cells = []
        for name in names:
            found = one.estimates.get(name)
            decimals = METRICS[name].decimals
            if found is None:
                cells.append("none")
            elif found.low is None:
                cells.append(f"{found.mean:.{decimals}f}")
            else:
                cells.append(f"{found.mean:.{decimals}f} [{found.low:.{decimals}f}, {found.high:.{decimals}f}]")
        rows.append((one.name, one.num_quantizers, one.count, *cells))
    body = page.table(
        "Mean scores, with the 95 % confidence interval of the mean (bootstrap over utterances)", head, rows
    )
    notes = reason_lines([one for one in evaluation.groups if one.name == "all"], names)
    notes += [f"{record['key']} could not be scored: {record['failed']}" for record in evaluation.failed[:20]]
    if "sim" in names:
        body += page.paragraph(
            f"SIM is the cosine of speaker embeddings by {evaluation.settings['speaker_model']}.", quiet=True
        )
    if notes:
        items = "".join(f"<li>{page.escape(note)}</li>" for note in notes)
        body += f"<details><summary>{len(notes)} notes on scores that there are not</summary><ul>{items}</ul></details>"
    drawings = {}
    for name in ("pesq_wb", "stoi", "sim", "si_sdr", "mel_distance", "mos"):
        values = [record["scores"][name] for record in evaluation.utterances if name in record["scores"]]
        if values:
            drawings[METRICS[name].label] = figures.histogram(
                f"{METRICS[name].label} of scored utterances", values, _label(name), color=figures.PURPLE, width=3.4
            )
    return body + page.charts(drawings)


def _label(name: str) -> str:
    about = METRICS[name]
    return f"{about.label} ({about.unit})" if about.unit else about.label


def _codebooks(evaluation: Evaluation) -> str:
    rows = evaluation.codebooks
    if not rows:
        return page.paragraph("No tokens were read.")
    names = [str(row["codebook"]) for row in rows]
    sizes = {str(row["codebook"]): float(row["size"]) for row in rows if row["size"] is not None}
    drawing = figures.bars(
        "Perplexity of each codebook", dict(zip(names, (row["perplexity"] for row in rows), strict=True)),
        "perplexity" + (" (grey: size)" if sizes else ""), limits=sizes if len(sizes) == len(names) else None,
    )  # fmt: skip
    cells = [
        (row["codebook"], row["size"] or "not known", row["used"], "not known" if row["dead"] is None else row["dead"],
         f"{row['entropy']:.2f}", f"{row['perplexity']:.1f}")
        for row in rows
    ]  # fmt: skip
    head = ["codebook", "size", "used", "unused", "entropy (bits)", "perplexity"]
    return (
        page.facts({name: f"{value:,.10g}" for name, value in evaluation.rates.items()})
        + page.charts({"Perplexity": drawing})
        + page.paragraph("Codes that are unused here may occur in more audio.", quiet=True)
        + f"<details><summary>As a table</summary>{page.table('Use of codebooks', head, cells)}</details>"
    )  # fmt: skip


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


def _listen(evaluation: Evaluation, source: Source, count: int) -> str:
    most = source.num_quantizers[-1]
    name, chosen = choose([record for record in evaluation.utterances if record["num_quantizers"] == most], count)
    if not chosen:
        return page.paragraph("No utterance could be scored.")
    body = page.paragraph(
        (
            f"{len(chosen)} scored utterances from the worst to the best {METRICS[name].label}"
            if name
            else "Some utterances"
        )
        + f", the first {_LISTEN_SECONDS:g} s of each. The vertical scale is the same for both recordings."
    )
    used = 0
    for record, text in _articles(chosen, source):
        used += len(text)
        if used > _AUDIO_BYTES:
            body += page.paragraph("Further utterances are left out, to keep the page small.", quiet=True)
            log.info("the page would be too large: %s and those after it are left out", record["key"])
            break
        body += text
    return body


def _articles(chosen: Sequence[Mapping[str, Any]], source: Source) -> Iterator[tuple[Mapping[str, Any], str]]:
    rows = {row.line: (row, known) for row, known in source.rows([record["line"] for record in chosen])}
    for record in chosen:
        row, known = rows[record["line"]]
        try:
            if not isinstance(row, ManifestRow):
                raise RowError(row.stage, row.reason)
            pair = [_first_seconds(one) for one in recordings(source, row, known)]
        except RowError as error:
            yield record, page.paragraph(f"{record['key']}: cannot be shown: {error.reason}", quiet=True)
            continue
        peak = max(1e-3, *(float(np.abs(one.samples).max()) for one in pair))
        sides = {
            side: (figures.recording(f"{side} of {record['key']}: waveform and mel spectrogram", one, peak=peak),
                   sounds.data_url(one))
            for side, one in zip(("Original", "Reconstruction"), pair, strict=True)
        }  # fmt: skip
        scores = {
            _label(metric): f"{value:.{METRICS[metric].decimals}f}" for metric, value in record["scores"].items()
        } | {_label(metric): reason for metric, reason in record["not_scored"].items()}
        about = [f"{name}: {value}" for name, value in record["row"].items() if name != "duration"]
        notes = [
            f"{record['seconds']:.2f} s, {record['frames']} frames of {record['num_quantizers']} codes",
            *([" · ".join(about)] if about else []),
        ]
        ordered = {_label(metric): scores[_label(metric)] for metric in METRICS if _label(metric) in scores}
        yield record, page.comparison(str(record["key"]), notes, sides, ordered)


def _first_seconds(one: Recording) -> Recording:
    return Recording(one.samples[: int(_LISTEN_SECONDS * one.sample_rate)], one.sample_rate)


def _duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
