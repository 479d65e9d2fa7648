"""``LiveQuality``: scores some rows during a run, so that a wrong sample rate, a clipped corpus or a broken
checkpoint shows in its first minute.

Rows that were written are offered from any thread; a few are scored in one thread beside the run, with metrics that
cost little, and a line is logged for each. Offering never waits: rows that come while one is being scored are skipped.
Errors while scoring are logged and end the scoring, not the run; only ``--stop_below`` ends a run: between two batches,
when the mean of the last eight scores is below the threshold and there are at least three, and at the end of the run by
whatever scores there are.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from batch_tokenizer.audio.loading import load_samples
from batch_tokenizer.audio.resampling import Resampler, resample
from batch_tokenizer.quality.metrics import CHEAP_METRICS, METRICS, Scorer, Scores
from batch_tokenizer.quality.recordings import MOST_SECONDS, align
from batch_tokenizer.records import AudioCut, RowError, RunError, TokenizedRow

log = logging.getLogger(__name__)

#: A threshold is held against the mean of this many last scores, once there are at least so many.
_LAST = 8
_LEAST = 3


class LiveQuality:
    """Scores one of ``every`` rows of this process. A context manager; leaving it waits for nothing.

    Args:
        stop_below: metric to the mean below which the run stops.
        sample_rate: of the comparison, Hz.
        output_rate: of the rows' samples, Hz.
        resampler: how originals reach ``sample_rate``.
    """

    def __init__(
        self, every: int, stop_below: Mapping[str, float], sample_rate: int, output_rate: int, resampler: Resampler
    ) -> None:
        self._every = every
        self._stop_below = stop_below
        self._sample_rate = sample_rate
        self._output_rate = output_rate
        self._resampler: Resampler = resampler
        self._seen = 0
        self._lock = threading.Lock()
        self._rows: queue.Queue[TokenizedRow | None] = queue.Queue(maxsize=1)
        self._recent: dict[str, deque[float]] = {name: deque(maxlen=_LAST) for name in stop_below}
        self._last_key = ""
        self._verdict: str | None = None
        self._thread = threading.Thread(target=self._work, name="quality", daemon=True)

    def offer(self, result: TokenizedRow) -> None:
        """A row that is done. It is scored if it is its turn and nothing is being scored."""
        with self._lock:
            turn = self._seen % self._every == 0
            self._seen += 1
        if turn and result.samples is not None and result.row.wav is not None:
            try:
                self._rows.put_nowait(result)
            except queue.Full:
                log.debug("row %s is not scored: the one before it still is", result.row.key)

    def check(self) -> None:
        """
        Raises:
            RunError: a threshold was crossed (exit code 1).
        """
        if self._verdict is not None:
            raise RunError(self._verdict, exit_code=1)

    def check_at_end(self) -> None:
        """As ``check``, with however few scores there are.

        Raises:
            RunError: a threshold was crossed (exit code 1).
        """
        self.check()
        for name in self._stop_below:
            if self._recent[name]:
                self._compare(name, 1)
            else:
                log.warning("--stop_below %s: no row was scored", name)
        self.check()

    def close(self, seconds: float) -> None:
        """End the scoring, after what is being scored is, or ``seconds`` have passed."""
        if not self._thread.is_alive():
            return
        try:
            self._rows.put(None, timeout=seconds)
        except queue.Full:
            return
        self._thread.join(seconds)

    def __enter__(self) -> LiveQuality:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close(0.0)

    def _work(self) -> None:
        scorer = Scorer(CHEAP_METRICS)
        while (result := self._rows.get()) is not None:
            try:
                self._score(scorer, result)
            except RowError as error:
                log.warning("quality of row %s: %s", result.row.key, error.reason)
            except Exception:
                log.exception("scoring failed and ends here; the run continues")
                return

    def _score(self, scorer: Scorer, result: TokenizedRow) -> None:
        assert result.row.wav is not None
        assert result.samples is not None
        # 1. The first minutes of both.
        cut, samples = result.row.cut, result.samples
        if samples.shape[-1] > MOST_SECONDS * self._output_rate:  # hours, perhaps
            cut = cut or AudioCut()
            cut = replace(cut, end=cut.start + MOST_SECONDS)
            samples = np.array(samples[..., : round(MOST_SECONDS * self._output_rate)])
        original = load_samples(result.row.wav, self._sample_rate, self._resampler, cut=cut)
        mono = samples if samples.ndim == 1 else samples.mean(axis=0)
        made = resample(mono[None], self._output_rate, self._sample_rate, "soxr")[0]
        reference, (reconstruction,) = align(original, [made], self._sample_rate)
        # 2. Scores, and whether the mean of the last ones crosses a threshold.
        scores = scorer.score(reference, reconstruction)
        log.info("quality of row %s: %s", result.row.key, score_line(scores))
        for name in self._stop_below:
            if name in scores.values:
                self._recent[name].append(scores.values[name])
                self._last_key = result.row.key
                self._compare(name, _LEAST)

    def _compare(self, name: str, least_scores: int) -> None:
        """Holds the mean of the last scores against the threshold, if there are at least ``least_scores``."""
        recent, least = self._recent[name], self._stop_below[name]
        mean = sum(recent) / len(recent)
        if len(recent) >= least_scores and mean < least and self._verdict is None:
            rows = f"the last {len(recent)} rows" if len(recent) > 1 else "the one row"
            self._verdict = (
                f"--stop_below {name}={least:g}: {METRICS[name].label} is {mean:.3g} on average over {rows} scored, "
                f"up to {self._last_key}; look at the audio, finished rows are kept"
            )


def score_line(scores: Scores) -> str:
    """The scores in one line."""
    parts = []
    for name, about in METRICS.items():
        if name in scores.values:
            parts.append(about.named(scores.values[name]))
        elif name in scores.reasons:
            parts.append(f"{about.label} {scores.reasons[name]}")
    return ", ".join(parts)
