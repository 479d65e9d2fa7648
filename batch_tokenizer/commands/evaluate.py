"""``batch_tokenizer evaluate``: originals against reconstructions, an utterance at a time and on average.

    batch_tokenizer evaluate RUN_DIR                          what a run wrote: its wav files and tokens
    batch_tokenizer evaluate RUN_DIR --num_quantizers 4 8     its tokens, decoded again from their first codebooks
    batch_tokenizer evaluate --data_list data.jsonl           the manifest's audio through the codec, in memory

What leaves is a folder: ``utterances.jsonl`` (a line an utterance and number of codebooks; also ``.parquet`` where
pyarrow is installed), ``tokens.jsonl`` (its codes, for counting), ``table.md`` and ``summary.json``. A command that was
stopped goes on where it was: what has a line is not scored again.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from batch_tokenizer.codecs.offline import at_input_rate, decode, encode
from batch_tokenizer.config import Device, Dtype, add_options, beside
from batch_tokenizer.quality.aggregates import Group, group, markdown_table
from batch_tokenizer.quality.codebooks import CodebookUse, bit_rate
from batch_tokenizer.quality.metrics import METRICS, Scorer
from batch_tokenizer.quality.recordings import align, load_beginning
from batch_tokenizer.quality.results import ResultsFolder
from batch_tokenizer.quality.speakers import SpeakerEncoder
from batch_tokenizer.records import AudioCut, ManifestRow, Pieces, RowError, RowFailure, RunError
from batch_tokenizer.runs.scored_rows import Source, load_input, open_source

log = logging.getLogger(__name__)

#: Utterances that are loaded, and go through the codec, together.
_CHUNK = 16

#: A scoring process must have as many to do, to be worth its start.
_UTTERANCES_PER_WORKER = 4

#: Fields of a row that are files, not facts about the utterance.
_PATH_FIELDS = ("wav", "quantized_tokens", "reconstructed_wav")

#: What ``--metrics`` means when it is not given.
DEFAULT_METRICS = tuple(METRICS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    add = parser.add_argument
    add("run_dir", type=Path, nargs="?", help="a run folder: score what the run made")
    add("--data_list", help="a manifest: put its audio through the codec; with RUN_DIR, the run's manifest")
    add("--model_path", help="checkpoint folder or hub id; the run's, or the bundled default, when absent")
    add("--sample", type=int, metavar="N", help="score N utterances, as good as drawn by lot; all when absent")
    add("--by", metavar="FIELD", help="a row of the table for each value of this field of the manifest's rows")
    add("--num_quantizers", type=int, nargs="+", default=[], metavar="K", help="numbers of codebooks to decode from")
    add("--metrics", nargs="+", choices=list(METRICS), default=list(DEFAULT_METRICS), metavar="METRIC",
        help="of " + ", ".join(METRICS))  # fmt: skip
    add("--speaker_model", default="auto", help="a transformers x-vector model, or resemblyzer; auto: WavLM if cached")
    add("--workers", type=int, default=_num_cores(), help="processes that score (%(default)s)")
    add_options(parser, "device", "dtype")
    add("--out", type=Path, metavar="DIR", help="where results go; RUN_DIR/quality or MANIFEST.quality when absent")
    add("--overwrite", action="store_true", help="discard results in DIR that were made with other settings")


def main(arguments: argparse.Namespace) -> int:
    """Scores, prints the table and where everything lies. Returns 1 if no utterance could be scored, else 0.

    Raises:
        RunError: there is nothing to score, or it cannot be scored this way; the message names flag and remedy.
    """
    request = Request(
        run_dir=arguments.run_dir,
        data_list=arguments.data_list,
        model_path=arguments.model_path,
        sample=arguments.sample,
        by=arguments.by,
        num_quantizers=tuple(arguments.num_quantizers),
        metrics=tuple(name for name in METRICS if name in arguments.metrics),
        speaker_model=arguments.speaker_model,
        workers=arguments.workers,
        device=arguments.device,
        dtype=arguments.dtype,
        out=arguments.out,
        overwrite=arguments.overwrite,
    )
    result = evaluate(request)
    print(result.table)
    for line in result.notes():
        print(line)
    print(f"results: {result.folder}")
    return 0 if result.utterances else 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What to score. Fields are the command's arguments.

    Raises:
        RunError: a value is out of range, or neither ``run_dir`` nor ``data_list`` is given.
    """

    run_dir: Path | None = None
    data_list: str | Path | None = None
    model_path: str | None = None
    sample: int | None = None
    by: str | None = None
    num_quantizers: tuple[int, ...] = ()
    metrics: tuple[str, ...] = DEFAULT_METRICS
    speaker_model: str = "auto"
    workers: int = 1
    device: Device = "auto"
    dtype: Dtype = "auto"
    out: Path | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.run_dir is None and self.data_list is None:
            raise RunError("evaluate needs a run folder or --data_list")
        if self.sample is not None and self.sample < 1:
            raise RunError(f"--sample {self.sample}: must be at least 1")
        if self.workers < 1:
            raise RunError(f"--workers {self.workers}: must be at least 1")

    @property
    def folder(self) -> Path:
        """Where results go."""
        if self.out is not None:
            return self.out
        if self.run_dir is not None:
            return self.run_dir / "quality"
        assert self.data_list is not None
        return beside(self.data_list, ".quality")

    def open_source(self) -> Source:
        """What it speaks of.

        Raises:
            RunError: it cannot be used; see ``open_source``.
        """
        return open_source(
            run_dir=self.run_dir, data_list=self.data_list, model_path=self.model_path, device=self.device,
            num_quantizers=self.num_quantizers, index_dir=self.folder / "index", dtype=self.dtype,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What was found.

    Attributes:
        folder: where it lies.
        settings: how it was made.
        utterances: records of the sample's utterances, as in ``utterances.jsonl``.
        failed: records of those that could not be scored at all.
        groups: their averages.
        codebooks: a row a codebook, see ``CodebookUse.table``.
        rates: bits a second, frames a second, and so on.
        table: the averages as text.
    """

    folder: Path
    settings: Mapping[str, Any]
    utterances: Sequence[Mapping[str, Any]]
    failed: Sequence[Mapping[str, Any]]
    groups: Sequence[Group]
    codebooks: Sequence[Mapping[str, Any]]
    rates: Mapping[str, float]
    table: str

    def notes(self) -> list[str]:
        """What else a person should know, a line each."""
        lines = [f"{name}: {value:,.10g}" for name, value in self.rates.items()]
        dead = [(row["dead"], row["size"]) for row in self.codebooks if row["dead"] is not None]
        if self.codebooks:
            shares = ", ".join(f"{row['perplexity']:.0f}" for row in self.codebooks)
            lines.append(f"perplexity of codebooks 1 to {len(self.codebooks)}: {shares}")
        if dead:
            lines.append(
                f"codes that did not occur: {sum(one for one, _ in dead):,} of {sum(size for _, size in dead):,}"
            )
        for reason, count in Counter(record["failed"] for record in self.failed).most_common(10):
            lines.append(f"{count} utterances could not be scored: {reason}")
        if self.failed and not self.utterances:
            lines.append(
                "paths in a manifest are relative to the working directory: start this where the run was started"
            )
        return lines


# ------------------------------------------------------------------------------------------------------------- scoring


@dataclass(frozen=True, slots=True)
class Job:
    """One utterance for a scoring process: where the original is, and what it became.

    Attributes:
        made: number of codebooks to samples, or to the path of a wav file.
        cut: the part of ``wav`` that is the original.
    """

    record: Mapping[str, Any]
    wav: str
    made: Mapping[int, npt.NDArray[np.float32] | str]
    sample_rate: int
    resampler: Any
    cut: AudioCut | None = None


_scorer: Scorer | None = None


def _start_worker(metrics: Sequence[str], speaker_model: str) -> None:
    global _scorer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    torch.set_num_threads(1)
    _scorer = Scorer(tuple(metrics), speaker_model)


def _score_in_worker(job: Job) -> list[dict[str, Any]]:
    assert _scorer is not None
    return score_job(job, _scorer)


def score_job(job: Job, scorer: Scorer) -> list[dict[str, Any]]:
    """The records of one utterance, one a number of codebooks; one with ``failed`` if it cannot be compared."""
    try:
        original, length = load_beginning(job.wav, job.sample_rate, job.resampler, job.cut)
        made = [
            load_beginning(one, job.sample_rate, "soxr") if isinstance(one, str) else (one, len(one))
            for one in job.made.values()
        ]
        samples, lengths = zip(*made, strict=True)
        reference, reconstructions = align(original, samples, job.sample_rate, [length, *lengths])
    except RowError as error:
        return [{**job.record, "failed": error.reason}]
    records = []
    for num_quantizers, reconstruction in zip(job.made, reconstructions, strict=True):
        scores = scorer.score(reference, reconstruction)
        records.append(
            {
                **job.record,
                "num_quantizers": num_quantizers,
                "seconds": round(length / job.sample_rate, 4),
                "scored_seconds": round(reference.seconds, 4),
                "scores": {name: round(value, 6) for name, value in scores.values.items()},
                "not_scored": dict(scores.reasons),
                "missing": sorted(scores.missing),
            }
        )
    return records


def _jobs(
    source: Source, rows: Iterable[tuple[ManifestRow | RowFailure, Mapping[str, Any]]], results: ResultsFolder
) -> Iterator[Job | dict[str, Any]]:
    """Utterances ready to be scored, or the record of one that cannot be."""
    most = source.num_quantizers[-1]
    rows = iter(rows)
    while chunk := list(islice(rows, _CHUNK)):
        ready: list[tuple[ManifestRow, dict[str, Any]]] = []
        loaded: list[tuple[Any, Pieces | None]] = []
        for row, known in chunk:
            record: dict[str, Any] = {"line": row.line, "digest": row.digest, "key": row.key}
            if isinstance(row, RowFailure):
                yield {**record, "failed": row.reason}
                continue
            record["row"] = {
                name: value
                for name, value in row.fields.items()
                if name not in (*_PATH_FIELDS, "key") and isinstance(value, str | int | float | bool)
            }
            try:
                loaded.append(load_input(source, row, known))
                ready.append((row, record))
            except RowError as error:
                yield {**record, "failed": error.reason}
        if source.run is None:
            assert source.codec is not None
            coded: list[Any] = encode(source.codec, [samples for samples, _ in loaded], most)
        else:
            coded = [codes[:, :most] for codes, _ in loaded]
        yield from _made(source, ready, coded, [segments for _, segments in loaded], results)


def _made(
    source: Source,
    rows: Sequence[tuple[ManifestRow, dict[str, Any]]],
    coded: Sequence[Any],
    segments: Sequence[Pieces | None],
    results: ResultsFolder,
) -> Iterator[Job | dict[str, Any]]:
    made: list[dict[int, Any]] = [{} for _ in rows]
    failed: dict[int, RowError] = {number: codes for number, codes in enumerate(coded) if isinstance(codes, RowError)}
    for num_quantizers in source.num_quantizers:
        good = [number for number in range(len(rows)) if number not in failed]
        if source.codec is None:
            for number in good:
                made[number][num_quantizers] = rows[number][0].reconstructed_wav
            continue
        parts = [np.ascontiguousarray(coded[number][:, :num_quantizers]) for number in good]
        decoded = decode(source.codec, parts, [segments[number] for number in good])
        for number, samples in zip(good, decoded, strict=True):
            if isinstance(samples, RowError):
                failed[number] = samples
            else:
                made[number][num_quantizers] = at_input_rate(source.codec.info, samples)
    for number, (row, record) in enumerate(rows):
        if number in failed:
            yield {**record, "failed": failed[number].reason}
            continue
        results.append_codes(row.line, row.digest, coded[number])
        record["frames"] = len(coded[number])
        assert row.wav is not None
        yield Job(record, row.wav, made[number], source.sample_rate, source.resampler, row.cut)


def _results(jobs: Iterator[Job | dict[str, Any]], request: Request, workers: int) -> Iterator[list[dict[str, Any]]]:
    """Records of each utterance, as they come."""
    if workers == 1:
        scorer = Scorer(request.metrics, request.speaker_model)
        for job in jobs:
            yield score_job(job, scorer) if isinstance(job, Job) else [job]
        return
    pool = ProcessPoolExecutor(
        workers,
        mp_context=get_context("spawn"),
        initializer=_start_worker,
        initargs=(request.metrics, request.speaker_model),
    )
    try:
        running: set[Future[list[dict[str, Any]]]] = set()
        for job in jobs:
            if not isinstance(job, Job):
                yield [job]
                continue
            running.add(pool.submit(_score_in_worker, job))
            while len(running) >= 2 * workers:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in done)
    except BrokenProcessPool as error:
        raise RunError(
            "a scoring process died, perhaps for want of memory: start the same command again with fewer --workers, "
            "what is scored is kept",
            exit_code=1,
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


# ------------------------------------------------------------------------------------------------------------ evaluate


def evaluate(request: Request, source: Source | None = None) -> Evaluation:
    """Scores what has no score yet, and writes the folder's tables.

    Args:
        source: of this request, where it is open already.

    Raises:
        RunError: there is nothing to score, or it cannot be scored this way.
    """
    source = source or request.open_source()
    if not len(source.lines):
        raise RunError("there is nothing to score: no row is done")
    folder = request.folder
    speaker = SpeakerEncoder.choose(request.speaker_model).name
    settings = {"fingerprint": source.fingerprint, "resampler": source.resampler, "speaker_model": speaker}
    results = ResultsFolder(folder)
    results.open(settings, overwrite=request.overwrite)

    # By digest, which is as good as chance: a larger sample holds the smaller one, and rows that the run did since
    # then leave most of it as it was, so little is scored twice.
    order = np.argsort(source.manifest.digests[source.lines], kind="stable")[: request.sample]
    chosen = np.sort(source.lines[order])
    digests = {int(line): source.digest(line) for line in chosen}
    scorer = Scorer(request.metrics, request.speaker_model)
    scored = _scored(results, digests, scorer)
    left = [line for line in digests if not all((line, number) in scored for number in source.num_quantizers)]
    if left:
        _score_all(source, left, request, results)
    return _conclude(source, request, results, settings, digests)


def num_scored(folder: Path) -> int:
    """Utterances that an earlier command scored into ``folder``."""
    return len({record["digest"] for record in ResultsFolder(folder).records() if "scores" in record})


def _scored(
    results: ResultsFolder, digests: Mapping[int, str], scorer: Scorer
) -> dict[tuple[int, int], dict[str, Any]]:
    """(line, number of codebooks) to the last record that has all metrics asked for, as far as they can run here."""
    found = {}
    for record in results.records():
        if digests.get(record["line"]) != record["digest"] or "failed" in record:
            continue
        outcomes = record["scores"].keys() | record["not_scored"].keys()
        again = [name for name in scorer.names if name not in outcomes]
        again += [name for name in record["missing"] if name in scorer.names and scorer.available(name)]
        if not again:
            found[record["line"], record["num_quantizers"]] = record
    return found


def _score_all(source: Source, lines: Sequence[int], request: Request, results: ResultsFolder) -> None:
    # Another process takes seconds to start, and a few utterances a second are scored.
    workers = max(1, min(request.workers, len(lines) // _UTTERANCES_PER_WORKER))
    on_terminal = sys.stderr.isatty()
    log.info("scoring %d utterances, %d at a time", len(lines), workers)
    with tqdm(total=len(lines), unit="utterance", mininterval=0.5 if on_terminal else 30.0) as bar:
        jobs = _jobs(source, source.rows(lines), results)
        for records in _results(jobs, request, workers):
            results.append(records)
            bar.update()


def _conclude(
    source: Source, request: Request, results: ResultsFolder, settings: Mapping[str, Any], digests: Mapping[int, str]
) -> Evaluation:
    scored: dict[tuple[int, int], dict[str, Any]] = {}
    failed: dict[int, dict[str, Any]] = {}
    for record in results.records():
        line = record["line"]
        if digests.get(line) != record["digest"]:
            continue
        if "failed" in record:
            failed[line] = record
        elif record["num_quantizers"] in source.num_quantizers:
            failed.pop(line, None)
            scored[line, record["num_quantizers"]] = _only(record, request.metrics)
    utterances = [scored[place] for place in sorted(scored)]
    groups = group(utterances, request.by)
    use = CodebookUse(source.info.codebook_sizes if source.info is not None else None)
    places = {(line, digests[line]) for line, _ in scored}
    for codes in results.codes(places, source.num_quantizers[-1]):
        use.add(codes)
    rates = {"frames scored": float(use.frames), "frames a second": source.frame_rate}
    rates["tokens a second"] = source.frame_rate * source.num_quantizers[-1]
    if source.info is not None:
        for number in source.num_quantizers:
            rates[f"bits a second at {number} codebooks"] = round(
                bit_rate(source.info.codebook_sizes[:number], source.frame_rate), 1
            )
    rates["bits a second that the codes carry (entropy)"] = round(use.entropy_rate(source.frame_rate), 1)
    table = markdown_table(groups, request.metrics)
    if "sim" in request.metrics:
        table += f"SIM: cosine of speaker embeddings by {settings['speaker_model']}\n"
    table += "±: half the 95 % confidence interval of the mean, by bootstrap over utterances\n"
    result = Evaluation(results.path, settings, utterances, list(failed.values()), groups, use.table(), rates, table)
    summary = {
        "settings": settings,
        "utterances": len(utterances),
        "failed": [{name: record[name] for name in ("line", "key", "failed")} for record in result.failed],
        "rates": rates,
        "groups": [asdict(one) for one in groups],
        "codebooks": result.codebooks,
    }
    results.write_tables(table, summary, utterances)
    return result


def _only(record: dict[str, Any], metrics: Sequence[str]) -> dict[str, Any]:
    """The record with the metrics asked for now; an earlier command may have asked for more."""
    return record | {
        part: {name: value for name, value in record[part].items() if name in metrics}
        for part in ("scores", "not_scored")
    }


def _num_cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on this operating system
        return os.cpu_count() or 1
