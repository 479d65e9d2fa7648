"""Utterances are scored: each one's original against what it became, in this process or in several."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from batch_tokenizer.quality.metrics import Scorer
from batch_tokenizer.quality.recordings import align, load_beginning
from batch_tokenizer.records import AudioCut, RowError, RunError

#: What is known and found of one utterance at one number of codebooks, as ``utterances.jsonl`` has it.
Record = dict[str, Any]


@dataclass(frozen=True, slots=True)
class ScoringTask:
    """One utterance to be scored: where the original is, and what it became.

    Attributes:
        record: what is known of the utterance; its scores are added to this.
        made: number of codebooks to samples (S,) at ``sample_rate``, or to the path of an audio file.
        sample_rate: Hz, of the comparison.
        resampler: how the original reaches it.
        cut: the part of ``wav`` that is the original.
    """

    record: Mapping[str, Any]
    wav: str
    made: Mapping[int, npt.NDArray[np.float32] | str]
    sample_rate: int
    resampler: Any
    cut: AudioCut | None = None


def score_utterance(task: ScoringTask, scorer: Scorer) -> list[Record]:
    """The records of one utterance, one a number of codebooks; one with ``failed`` if it cannot be compared."""
    try:
        original, length = load_beginning(task.wav, task.sample_rate, task.resampler, task.cut)
        made = [
            load_beginning(one, task.sample_rate, "soxr") if isinstance(one, str) else (one, len(one))
            for one in task.made.values()
        ]
        samples, lengths = zip(*made, strict=True)
        reference, reconstructions = align(original, samples, task.sample_rate, [length, *lengths])
    except RowError as error:
        return [{**task.record, "failed": error.reason}]
    records = []
    for num_quantizers, reconstruction in zip(task.made, reconstructions, strict=True):
        scores = scorer.score(reference, reconstruction)
        records.append(
            {
                **task.record,
                "num_quantizers": num_quantizers,
                "seconds": round(length / task.sample_rate, 4),
                "scored_seconds": round(reference.seconds, 4),
                "scores": {name: round(value, 6) for name, value in scores.values.items()},
                "not_scored": dict(scores.reasons),
                "missing": sorted(scores.missing),
            }
        )
    return records


def score_utterances(
    tasks: Iterator[ScoringTask | Record], metrics: Sequence[str], speaker_model: str, workers: int
) -> Iterator[list[Record]]:
    """The records of each utterance, in the order in which they are finished.

    Args:
        tasks: utterances to score, or the record of one that cannot be, which is passed on.
        workers: processes that score; 1 scores in this one.

    Raises:
        RunError: a scoring process died (exit code 1).
    """
    if workers == 1:
        scorer = Scorer(tuple(metrics), speaker_model)
        for task in tasks:
            yield score_utterance(task, scorer) if isinstance(task, ScoringTask) else [task]
        return
    pool = ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=_start_process, initargs=(metrics, speaker_model)
    )
    try:
        running: set[Future[list[Record]]] = set()
        for task in tasks:
            if not isinstance(task, ScoringTask):
                yield [task]
                continue
            running.add(pool.submit(_score_in_process, task))
            # Utterances are decoded no further ahead than the processes need.
            while len(running) >= 2 * workers:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in done)
    except BrokenProcessPool as error:
        raise RunError(
            "a scoring process died (out of memory?): start the same command again with fewer --workers, "
            "what is scored is kept",
            exit_code=1,
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_scorer: Scorer | None = None


def _start_process(metrics: Sequence[str], speaker_model: str) -> None:
    global _scorer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    torch.set_num_threads(1)
    _scorer = Scorer(tuple(metrics), speaker_model)


def _score_in_process(task: ScoringTask) -> list[Record]:
    assert _scorer is not None
    return score_utterance(task, _scorer)
