"""Training examples: a manifest of audio files enters; crops of one length, each a pure function of its number, leave.

Crop number i of a seed is always the same one, whoever makes it and in whatever order, so a resumed run goes on with
the data it had not seen. Files shorter than a crop are laid one after the other until the crop is full.
"""

from __future__ import annotations

import bisect
import json
import logging
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
import numpy.typing as npt
from torch.utils.data import Dataset

from batch_tokenizer.audio.loading import load_samples
from batch_tokenizer.audio.mel import log_mel
from batch_tokenizer.audio.resampling import resample
from batch_tokenizer.codecs.mimo.config import MiMoConfig
from batch_tokenizer.records import RowError, RunError

log = logging.getLogger(__name__)

Samples = npt.NDArray[np.float32]

#: A crop is played this much slower or faster, which moves its pitch as well: more voices than the data has speakers.
SLOWEST, FASTEST = 0.8, 1.25

#: Decibels by which a crop's level is changed, at most, up or down.
GAIN = 6.0


def read_manifest(path: Path) -> list[tuple[str, float]]:
    """Path and seconds of every file in a JSON-lines manifest; rows need ``wav``, and ``duration`` if they have it.

    Raises:
        RunError: the manifest cannot be read, a line is no object with a ``wav``, or there is none.
    """
    files: list[tuple[str, float]] = []
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                row = json.loads(line)
                if not isinstance(row, dict) or not isinstance(row.get("wav"), str):
                    raise RunError(f"{path}, line {number}: must be an object with a path in wav")
                files.append((row["wav"], float(row.get("duration", 1.0))))
    except OSError as error:
        raise RunError(f"{path}: cannot be read: {error}") from error
    except ValueError as error:
        raise RunError(f"{path}: is not JSON lines: {error}") from error
    if not files:
        raise RunError(f"{path}: has no rows")
    return files


class Audio:
    """Files of a manifest as float32 samples at one rate, the first ones kept in memory up to ``cache_bytes``."""

    def __init__(self, files: Sequence[tuple[str, float]], sample_rate: int, cache_bytes: int) -> None:
        self.paths = [path for path, _ in files]
        self.sample_rate = sample_rate
        self._cumulative = list(accumulate(max(seconds, 1e-3) for _, seconds in files))
        self._room = cache_bytes
        self._cache: dict[int, Samples] = {}
        self._bad: set[int] = set()

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Samples | None:
        """Samples (S,) of file ``index``; None if it cannot be read, which is logged once."""
        if index in self._bad:
            return None
        samples = self._cache.get(index)
        if samples is not None:
            return samples
        try:
            samples = load_samples(self.paths[index], self.sample_rate)
        except RowError as error:
            log.warning("left out of training: %s", error.reason)
            self._bad.add(index)
            if len(self._bad) == len(self.paths):
                raise RunError("no file of the training manifest can be read") from error
            return None
        if samples.nbytes <= self._room:
            self._room -= samples.nbytes
            self._cache[index] = samples
        return samples

    def draw(self, rng: np.random.Generator) -> Samples:
        """A file, with a chance in proportion to its length."""
        while True:
            index = bisect.bisect(self._cumulative, rng.random() * self._cumulative[-1])
            samples = self[min(index, len(self.paths) - 1)]
            if samples is not None:
                return samples


def crop(audio: Audio, length: int, rng: np.random.Generator) -> Samples:
    """``length`` samples from one file, or from several end to end."""
    pieces: list[Samples] = []
    missing = length
    while missing > 0:
        samples = audio.draw(rng)
        start = int(rng.integers(0, max(1, len(samples) - missing + 1)))
        pieces.append(samples[start : start + missing])
        missing -= len(pieces[-1])
    return np.concatenate(pieces)


def augmented(audio: Audio, length: int, rng: np.random.Generator) -> Samples:
    """A crop of ``length`` samples, every other one at another speed, all at another level, never clipped."""
    if rng.random() < 0.5:
        rate = int(audio.sample_rate * np.exp(rng.uniform(np.log(SLOWEST), np.log(FASTEST))))
        source = crop(audio, length * rate // audio.sample_rate + 64, rng)
        samples = resample(source[None], rate, audio.sample_rate, "soxr")[0, :length]
        samples = np.pad(samples, (0, length - len(samples)))
    else:
        samples = crop(audio, length, rng)
    gain = 10 ** (rng.uniform(-GAIN, GAIN) / 20)
    peak = float(np.abs(samples).max())
    return (samples * min(gain, 0.99 / max(peak, 1e-5))).astype(np.float32)


class Crops(Dataset[tuple[Samples, Samples, Samples]]):
    """Crop number i: samples (S,), their log-mel (n_mels, L), and the log-mel that the vocoder should be given.

    The latter has its frames where the inverse transform puts them, half a hop later. All are float32.
    """

    def __init__(self, audio: Audio, config: MiMoConfig, token_frames: int, seed: int) -> None:
        self.audio = audio
        self.config = config
        self.length = crop_length(config, token_frames)
        self.seed = seed

    def __getitem__(self, index: int) -> tuple[Samples, Samples, Samples]:
        samples = augmented(self.audio, self.length, np.random.default_rng((self.seed, index)))
        late = self.config.hop_length // 2 if self.config.vocoder_padding == "same" else 0
        return samples, mel_of(samples, self.config), mel_of(np.pad(samples[late:], (0, late)), self.config)


class Numbers:
    """Batches of crop numbers without end, from batch ``first`` on. A batch sampler for ``DataLoader``."""

    def __init__(self, first: int, batch_size: int) -> None:
        self.first, self.batch_size = first, batch_size

    def __iter__(self) -> Iterator[list[int]]:
        batch = self.first
        while True:
            yield list(range(batch * self.batch_size, (batch + 1) * self.batch_size))
            batch += 1


def crop_length(config: MiMoConfig, token_frames: int) -> int:
    """Samples of the longest utterance whose mel frames fill exactly ``token_frames`` token frames."""
    per_token = config.stride_size * config.avg_pooler
    return (token_frames * per_token - 1) * config.hop_length


def mel_of(samples: Samples, config: MiMoConfig) -> Samples:
    """Log-mel (n_mels, L) as the codec's front end makes it."""
    return log_mel(samples, config.mel)
