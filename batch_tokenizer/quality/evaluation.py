"""``evaluate``: originals against reconstructions, an utterance at a time and on average.

Results are appended to files as they come, so that a stopped command can be resumed: what has a line is not scored
again.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from batch_tokenizer.codecs.offline import at_input_rate, decode, encode
from batch_tokenizer.config import Device, Dtype, beside
from batch_tokenizer.quality.aggregates import Group, group, level_notes, score_table
from batch_tokenizer.quality.codebooks import CodebookUse, bit_rate
from batch_tokenizer.quality.metrics import METRICS, Scorer
from batch_tokenizer.quality.recordings import Recording, align, load_beginning
from batch_tokenizer.quality.results import ResultsFolder
from batch_tokenizer.quality.scoring import Record, ScoringTask, score_utterances
from batch_tokenizer.quality.speakers import SpeakerEncoder
from batch_tokenizer.records import ManifestRow, Pieces, RowError, RowFailure, RunError
from batch_tokenizer.runs.scored_rows import Source, load_input, open_source, rows_with_outputs
from batch_tokenizer.runtime.row_counter import RowCounter

log = logging.getLogger(__name__)

#: Utterances that are loaded, and go through the codec, together.
_CHUNK = 16

#: A scoring process must have as many to do, to be worth its start.
UTTERANCES_PER_WORKER = 4

#: Fields of a row that are files, not facts about the utterance.
_PATH_FIELDS = ("wav", "quantized_tokens", "reconstructed_wav")

#: Characters that ``table.md`` is wide at most, unless one column is wider.
_TABLE_WIDTH = 100


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
    metrics: tuple[str, ...] = tuple(METRICS)
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
        """The utterances.

        Raises:
            RunError: the run, the manifest or the checkpoint cannot be used.
        """
        return open_source(
            run_dir=self.run_dir, data_list=self.data_list, model_path=self.model_path, device=self.device,
            num_quantizers=self.num_quantizers, index_dir=self.folder / "index", dtype=self.dtype,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The results.

    Attributes:
        folder: where they lie.
        settings: how they were made.
        metrics: that were asked for.
        utterances: records of the sample's utterances, as in ``utterances.jsonl``.
        failed: records of those that could not be scored at all.
        groups: their averages.
        codebooks: a row a codebook, as ``CodebookUse.table`` has them.
        rates: bits a second, frames a second, and so on.
    """

    folder: Path
    settings: Mapping[str, Any]
    metrics: Sequence[str]
    utterances: Sequence[Mapping[str, Any]]
    failed: Sequence[Mapping[str, Any]]
    groups: Sequence[Group]
    codebooks: Sequence[Mapping[str, Any]]
    rates: Mapping[str, float]

    def table(self, width: int = _TABLE_WIDTH) -> str:
        """The averages as text, about ``width`` characters wide."""
        text = score_table(self.groups, self.metrics, width)
        if "sim" in self.metrics:
            text += f"SIM: cosine of speaker embeddings by {self.settings['speaker_model']}\n"
        return text + "±: half the 95 % confidence interval of the mean, by bootstrap over utterances\n"

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
        lines += level_notes(self.utterances)
        for reason, count in Counter(record["failed"] for record in self.failed).most_common(10):
            lines.append(f"{count} utterances could not be scored: {reason}")
        if self.failed and not self.utterances:
            lines.append(
                "paths in a manifest are relative to the working directory: start this where the run was started"
            )
        return lines


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
    # 1. The folder, which may have scores already.
    speaker = SpeakerEncoder.choose(request.speaker_model).name
    settings = {"fingerprint": source.fingerprint, "resampler": source.resampler, "speaker_model": speaker}
    results = ResultsFolder(request.folder)
    results.open(settings, overwrite=request.overwrite)
    # 2. The sample. By digest, which is as good as chance: a larger sample holds the smaller one, and rows that the run
    #    did since then leave most of it as it was, so little is scored twice.
    order = np.argsort(source.manifest.digests[source.lines], kind="stable")[: request.sample]
    digests = {int(line): source.manifest.digest(line) for line in np.sort(source.lines[order])}
    # 3. Score what has no score.
    scored = _scored(results, digests, Scorer(request.metrics, request.speaker_model))
    left = [line for line in digests if not all((line, number) in scored for number in source.num_quantizers)]
    if left:
        _score_all(source, left, request, results)
    # 4. Averages over the sample.
    evaluation = _collect(source, request, results, settings, digests)
    results.write_tables(evaluation.table(), _summary(evaluation), evaluation.utterances)
    return evaluation


def num_scored(folder: Path) -> int:
    """Utterances that an earlier command scored into ``folder``."""
    return len({record["digest"] for record in ResultsFolder(folder).records() if "scores" in record})


def _scored(results: ResultsFolder, digests: Mapping[int, str], scorer: Scorer) -> dict[tuple[int, int], Record]:
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
    workers = max(1, min(request.workers, len(lines) // UTTERANCES_PER_WORKER))
    log.info("scoring %d utterances, %d at a time", len(lines), workers)
    with RowCounter("scored", len(lines), delay=0.0) as counter:
        tasks = _scoring_tasks(source, rows_with_outputs(source.run, source.manifest, lines), results)
        for records in score_utterances(tasks, request.metrics, request.speaker_model, workers):
            results.append(records)
            counter.update()


def _scoring_tasks(
    source: Source, rows: Iterable[tuple[ManifestRow | RowFailure, Mapping[str, Any]]], results: ResultsFolder
) -> Iterator[ScoringTask | Record]:
    """Utterances ready to be scored, or the record of one that cannot be."""
    most = source.num_quantizers[-1]
    rows = iter(rows)
    while chunk := list(islice(rows, _CHUNK)):
        # 1. What the codec starts from: audio, or the codes that the run stored.
        ready: list[tuple[ManifestRow, Record]] = []
        loaded: list[tuple[Any, Pieces | None]] = []
        for row, known in chunk:
            record: Record = {"line": row.line, "digest": row.digest, "key": row.key}
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
        # 2. Codes of all codebooks asked for; smaller numbers are prefixes of these.
        if source.run is None:
            assert source.codec is not None
            coded: list[Any] = encode(source.codec, [samples for samples, _ in loaded], most)
        else:
            coded = [codes[:, :most] for codes, _ in loaded]
        yield from _reconstructed(source, ready, coded, [segments for _, segments in loaded], results)


def _reconstructed(
    source: Source,
    rows: Sequence[tuple[ManifestRow, Record]],
    coded: Sequence[Any],
    segments: Sequence[Pieces | None],
    results: ResultsFolder,
) -> Iterator[ScoringTask | Record]:
    """Tasks for rows with their codes: from each number of codebooks, the audio that the run wrote or that the codec
    makes of them."""
    # 1. Audio from each number of codebooks.
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
    # 2. A task for each row that has them all.
    for number, (row, record) in enumerate(rows):
        if number in failed:
            yield {**record, "failed": failed[number].reason}
            continue
        results.append_codes(row.line, row.digest, coded[number])
        record["frames"] = len(coded[number])
        assert row.wav is not None
        yield ScoringTask(record, row.wav, made[number], source.sample_rate, source.resampler, row.cut)


def _collect(
    source: Source, request: Request, results: ResultsFolder, settings: Mapping[str, Any], digests: Mapping[int, str]
) -> Evaluation:
    scored: dict[tuple[int, int], Record] = {}
    failed: dict[int, Record] = {}
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
    use = CodebookUse(source.info.codebook_sizes if source.info is not None else None)
    places = {(line, digests[line]) for line, _ in scored}
    for codes in results.codes(places, source.num_quantizers[-1]):
        use.add(codes)
    return Evaluation(
        results.path, settings, request.metrics, utterances, list(failed.values()), group(utterances, request.by),
        use.table(), _rates(source, use),
    )  # fmt: skip


def _only(record: Record, metrics: Sequence[str]) -> Record:
    """The record with the metrics asked for now; an earlier command may have asked for more."""
    return record | {
        part: {name: value for name, value in record[part].items() if name in metrics}
        for part in ("scores", "not_scored")
    }


def _rates(source: Source, use: CodebookUse) -> dict[str, float]:
    rates = {"frames scored": float(use.frames), "frames a second": source.frame_rate}
    rates["tokens a second"] = source.frame_rate * source.num_quantizers[-1]
    if source.info is not None:
        for number in source.num_quantizers:
            bits = bit_rate(source.info.codebook_sizes[:number], source.frame_rate)
            rates[f"bits a second at {number} codebooks"] = round(bits, 1)
    rates["bits a second that the codes carry (entropy)"] = round(use.entropy_rate(source.frame_rate), 1)
    return rates


def _summary(evaluation: Evaluation) -> dict[str, Any]:
    return {
        "settings": evaluation.settings,
        "utterances": len(evaluation.utterances),
        "failed": [{name: record[name] for name in ("line", "key", "failed")} for record in evaluation.failed],
        "rates": evaluation.rates,
        "groups": [asdict(one) for one in evaluation.groups],
        "codebooks": evaluation.codebooks,
    }


def recordings(source: Source, row: ManifestRow, known: Mapping[str, Any]) -> tuple[Recording, Recording]:
    """A row's original and its reconstruction from the most codebooks asked for, to look at and listen to.

    Raises:
        RowError: one of them cannot be had.
    """
    if row.wav is None:
        raise RowError("load", "the row has no wav to compare with")
    original, length = load_beginning(row.wav, source.sample_rate, source.resampler, row.cut)
    most = source.num_quantizers[-1]
    made: Any
    if source.codec is None:
        if row.reconstructed_wav is None:
            raise RowError("load", "the row has no reconstructed_wav")
        made, made_length = load_beginning(row.reconstructed_wav, source.sample_rate, "soxr")
    else:
        loaded, segments = load_input(source, row, known)
        (codes,) = encode(source.codec, [loaded], most) if source.run is None else [loaded[:, :most]]
        if isinstance(codes, RowError):
            raise codes
        (made,) = decode(source.codec, [np.ascontiguousarray(codes)], [segments])
        if isinstance(made, RowError):
            raise made
        made = at_input_rate(source.codec.info, made)
        made_length = len(made)
    reference, (reconstruction,) = align(original, [made], source.sample_rate, [length, made_length])
    return reference, reconstruction
