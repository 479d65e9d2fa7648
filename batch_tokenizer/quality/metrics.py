"""The metrics: each compares a reconstruction with its original, and gives a number or the reason why there is none.

- ``pesq_nb``, ``pesq_wb`` (pesq): P.862.1 at 8 kHz and P.862.2 at 16 kHz; the mean over pieces of at most 20 s.
- ``sim``: cosine of the speaker embeddings, see ``speakers``.
- ``stoi``, ``estoi`` (pystoi): short-time objective intelligibility, plain and extended, from 16 kHz.
- ``si_sdr``: scale-invariant signal-to-distortion ratio in dB, kept within -60 and 100. A decoder that makes up its own
  phase gets a low one however good it sounds.
- ``mel_distance``: mean absolute difference of log-mel spectra in dB, at the codec's rate.
- ``mos``, ``mos_original`` (distillmos): predicted mean opinion score of either side, 1 to 5.
- ``level_change``: level of the reconstruction less that of the original, in dB.
- ``clipped``, ``clipped_original``: samples at full scale, in per cent.

A metric that cannot be computed for a pair, or that cannot run here at all, says so in words; nothing is NaN.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from batch_tokenizer.audio.mel import MelForm, log_mel
from batch_tokenizer.quality.recordings import Recording
from batch_tokenizer.quality.speakers import SpeakerEncoder, SpeakerModel, Unavailable

#: PESQ was made for sentences, and its C code crashes on recordings with very many of them.
_PESQ_SECONDS = 20.0

_SI_SDR_BOUNDS = (-60.0, 100.0)

#: Magnitude below which mel bands count as silent: differences far below hearing should not weigh.
_MEL_FLOOR = math.log(1e-5)
_NEPER_TO_DB = 20 / math.log(10)

#: The least level, dB relative to full scale, that counts as more than silence.
_LOWEST_LEVEL = -120.0

_EXTRA = "pip install 'batch_tokenizer[quality]'"


class NotScored(Exception):
    """This pair has no value of this metric; the message says why."""


@dataclass(frozen=True, slots=True)
class Metric:
    """What a metric's numbers mean.

    Attributes:
        label: as tables name it.
        unit: of its values, or empty.
        higher_is_better: None for what is neither.
        decimals: that are worth showing.
    """

    label: str
    unit: str = ""
    higher_is_better: bool | None = True
    decimals: int = 2

    def text(self, value: float) -> str:
        """A value, rounded; never a zero with a minus."""
        return f"{round(value, self.decimals) + 0.0:.{self.decimals}f}"

    def named(self, value: float) -> str:
        """A value with the metric's label and unit."""
        return f"{self.label} {self.text(value)} {self.unit}".rstrip()


#: All metrics, in the order of tables.
METRICS: Mapping[str, Metric] = {
    "pesq_nb": Metric("PESQ-NB"),
    "pesq_wb": Metric("PESQ-WB"),
    "sim": Metric("SIM", decimals=3),
    "stoi": Metric("STOI", decimals=3),
    "estoi": Metric("ESTOI", decimals=3),
    "si_sdr": Metric("SI-SDR", "dB", decimals=1),
    "mel_distance": Metric("Mel distance", "dB", higher_is_better=False),
    "mos": Metric("MOS predicted"),
    "mos_original": Metric("MOS of original", higher_is_better=None),
    "level_change": Metric("Level change", "dB", higher_is_better=None, decimals=1),
    "clipped": Metric("Clipped", "%", higher_is_better=False),
    "clipped_original": Metric("Clipped original", "%", higher_is_better=None),
}

#: Those that cost little and need no model.
CHEAP_METRICS = ("stoi", "si_sdr", "level_change", "clipped", "clipped_original")


@dataclass(frozen=True, slots=True)
class Scores:
    """One pair's outcome. Every metric asked for is in exactly one of the two.

    Attributes:
        values: metric to a finite number.
        reasons: metric to the reason why there is none.
        missing: metrics among ``reasons`` that cannot run on this machine as it is set up.
    """

    values: Mapping[str, float]
    reasons: Mapping[str, str]
    missing: frozenset[str] = frozenset()


@dataclass
class Scorer:
    """Scores pairs. Libraries and models are loaded when first needed, and once.

    Attributes:
        names: metrics to compute.
        speaker_model: which model judges speakers, see ``SpeakerEncoder.open``.
    """

    names: Sequence[str] = tuple(METRICS)
    speaker_model: str = "auto"
    _tools: dict[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for name in self.names:
            if name not in METRICS:
                raise ValueError(f"unknown metric {name}; known: {', '.join(METRICS)}")

    def score(self, original: Recording, reconstruction: Recording) -> Scores:
        """Scores of a pair of equal length and rate."""
        values: dict[str, float] = {}
        reasons: dict[str, str] = {}
        missing = set()
        for name in self.names:
            try:
                value = float(_MEASURES[name](self, original, reconstruction))
                if math.isfinite(value):
                    values[name] = value
                else:
                    reasons[name] = f"came out as {value}"
            except NotScored as error:
                reasons[name] = str(error)
            except Unavailable as error:
                reasons[name] = f"not run: {error}"
                missing.add(name)
        return Scores(values, reasons, frozenset(missing))

    def available(self, name: str) -> bool:
        """Whether a metric's library is installed, without loading it."""
        library = _LIBRARIES.get(name)
        if name == "sim":
            return SpeakerEncoder.choose(self.speaker_model).available
        return library is None or importlib.util.find_spec(library) is not None

    def tool(self, name: str, load: Callable[[], Any]) -> Any:
        """A library or model, loaded once; what kept it from loading is raised again each time."""
        if name not in self._tools:
            try:
                self._tools[name] = load()
            except Unavailable as error:
                self._tools[name] = error
        found = self._tools[name]
        if isinstance(found, Unavailable):
            raise found
        return found

    def library(self, name: str) -> Any:
        """A library of the ``quality`` extra."""
        return self.tool(name, lambda: _import(name))


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except (ImportError, OSError, RuntimeError) as error:
        raise Unavailable(f"{name} cannot be imported ({error}); {_EXTRA}") from error


def _need_sound(original: Recording) -> None:
    if original.is_silent:
        raise NotScored("the original is silent")


# ------------------------------------------------------------------------------------------------------------- metrics


def _pesq(scorer: Scorer, original: Recording, made: Recording, rate: int, mode: str) -> float:
    library = scorer.library("pesq")
    _need_sound(original)
    if made.is_silent:
        raise NotScored("the reconstruction is silent")
    reference, degraded = original.at(rate), made.at(rate)
    if len(reference) < rate // 4 + 1:
        raise NotScored("shorter than 0.25 s")
    pieces = math.ceil(len(reference) / (_PESQ_SECONDS * rate))
    scores = []
    for left, right in zip(np.array_split(reference, pieces), np.array_split(degraded, pieces), strict=True):
        try:
            scores.append(library.pesq(rate, left, right, mode))
        except library.NoUtterancesError:
            continue  # a pause as long as a piece
        except (library.PesqError, ValueError) as error:  # ValueError: nothing is left after its level alignment
            raise NotScored(f"pesq: {error}") from error
    if not scores:
        raise NotScored("pesq finds no speech in the original")
    return float(np.mean(scores))


def _stoi(scorer: Scorer, original: Recording, made: Recording, *, extended: bool) -> float:
    library = scorer.library("pystoi")
    _need_sound(original)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Not enough STFT frames", category=RuntimeWarning)
        try:
            return float(library.stoi(original.at(16000), made.at(16000), 16000, extended=extended))
        except RuntimeWarning as error:
            raise NotScored("less than 0.4 s of sound") from error
        except (ValueError, IndexError) as error:  # shorter than one of its frames
            raise NotScored("less than 0.4 s of sound") from error


def _sim(scorer: Scorer, original: Recording, made: Recording) -> float:
    encoder: SpeakerModel = scorer.tool("speakers", lambda: SpeakerEncoder.choose(scorer.speaker_model).load())
    _need_sound(original)
    embeddings = []
    for side, recording in (("original", original), ("reconstruction", made)):
        embedding = recording.derived("speaker", partial(_embedding, encoder, recording))
        if embedding is None:
            raise NotScored(f"too little speech in the {side}")
        embeddings.append(embedding)
    left, right = embeddings
    return float(left @ right / max(float(np.linalg.norm(left) * np.linalg.norm(right)), 1e-12))


def _embedding(encoder: SpeakerModel, recording: Recording) -> npt.NDArray[np.float32] | None:
    return encoder(recording.at(16000))


def _si_sdr(scorer: Scorer, original: Recording, made: Recording) -> float:
    _need_sound(original)
    reference = original.samples.astype(np.float64) - original.samples.mean(dtype=np.float64)
    estimate = made.samples.astype(np.float64) - made.samples.mean(dtype=np.float64)
    energy = float(reference @ reference)
    if energy <= 1e-12 * len(reference):
        raise NotScored("the original is constant")
    target = (float(estimate @ reference) / energy) * reference
    distortion = estimate - target
    signal, noise = float(target @ target), float(distortion @ distortion)
    low, high = _SI_SDR_BOUNDS
    if signal == 0:
        return low
    return float(np.clip(10 * math.log10(signal / max(noise, 1e-12 * signal)), low, high))


def _mel_distance(scorer: Scorer, original: Recording, made: Recording) -> float:
    left, right = (one.derived("mel", partial(mel_db, one)) for one in (original, made))
    return float(np.mean(np.abs(left - right)))


def mel_db(recording: Recording) -> npt.NDArray[np.float32]:
    """Mel spectrum (80, frames) in dB of magnitude, at least -100; windows of 43 ms every 11 ms."""
    hop = max(1, round(recording.sample_rate * 256 / 24000))
    form = MelForm(recording.sample_rate, 4 * hop, hop, 4 * hop, n_mels=80, f_min=0, f_max=None)
    mel = log_mel(recording.samples, form)
    return np.maximum(mel, np.float32(_MEL_FLOOR)) * np.float32(_NEPER_TO_DB)


def _mos(scorer: Scorer, recording: Recording) -> float:
    model = scorer.tool("distillmos", lambda: _load_distillmos(scorer))
    samples = recording.at(16000)

    def predict() -> float:
        with torch.inference_mode():
            return float(model(torch.from_numpy(np.ascontiguousarray(samples))[None]))

    if len(samples) < 16000 // 2:
        raise NotScored("shorter than 0.5 s")
    if recording.is_silent:
        raise NotScored("silent")
    score: float = recording.derived("mos", predict)
    return score


def _load_distillmos(scorer: Scorer) -> Any:
    library = scorer.library("distillmos")
    with contextlib.redirect_stdout(io.StringIO()):  # it prints where its weights are
        return library.ConvTransformerSQAModel().eval()


def level_db(samples: npt.NDArray[np.float32]) -> float:
    """Root mean square in dB relative to full scale, at least -120."""
    mean = float(np.mean(np.square(samples, dtype=np.float64))) if len(samples) else 0.0
    return max(_LOWEST_LEVEL, 10 * math.log10(mean)) if mean > 0 else _LOWEST_LEVEL


def _level_change(scorer: Scorer, original: Recording, made: Recording) -> float:
    return level_db(made.samples) - level_db(original.samples)


def _clipped(recording: Recording) -> float:
    # Full scale of 16 bits; a float that is beyond it will be clipped when it is written.
    return 100 * float(np.mean(np.abs(recording.samples) >= 32767 / 32768))


_MEASURES: Mapping[str, Callable[[Scorer, Recording, Recording], float]] = {
    "pesq_nb": lambda scorer, original, made: _pesq(scorer, original, made, 8000, "nb"),
    "pesq_wb": lambda scorer, original, made: _pesq(scorer, original, made, 16000, "wb"),
    "sim": _sim,
    "stoi": lambda scorer, original, made: _stoi(scorer, original, made, extended=False),
    "estoi": lambda scorer, original, made: _stoi(scorer, original, made, extended=True),
    "si_sdr": _si_sdr,
    "mel_distance": _mel_distance,
    "mos": lambda scorer, original, made: _mos(scorer, made),
    "mos_original": lambda scorer, original, made: _mos(scorer, original),
    "level_change": _level_change,
    "clipped": lambda scorer, original, made: _clipped(made),
    "clipped_original": lambda scorer, original, made: _clipped(original),
}

_LIBRARIES: Mapping[str, str] = {
    "pesq_nb": "pesq",
    "pesq_wb": "pesq",
    "stoi": "pystoi",
    "estoi": "pystoi",
    "mos": "distillmos",
    "mos_original": "distillmos",
}
