"""Training examples: augmented crops of equal length from the files of a source.

A crop is a pure function of the seed and its number, independent of the process that loads it and of the order, so a
resumed run continues with the crops that it had not used. Files shorter than a crop are concatenated.
"""

from __future__ import annotations

import bisect
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.utils.data import Dataset

from batch_tokenizer.audio.loading import load_samples
from batch_tokenizer.audio.mel import log_mel
from batch_tokenizer.codecs.mimo.config import MiMoConfig
from batch_tokenizer.manifest.row import cut_of
from batch_tokenizer.records import AudioCut, RowError, RunError, first_line
from batch_tokenizer.sources.finishing import SourceSettings
from batch_tokenizer.sources.listing import local_manifest
from batch_tokenizer.storage.atomic import os_error_ends_run
from batch_tokenizer.storage.json_lines import parse_json
from batch_tokenizer.training.augmentation import Augmentation, Samples, augment

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class AudioFile:
    """One row of a training manifest.

    Attributes:
        path: location of the audio: a file, a URL or a member of a tar.
        seconds: its length, 1 where the row does not say.
        speaker: the row's speaker, or empty.
        cut: part of the file; None for all of it.
    """

    path: str
    seconds: float = 1.0
    speaker: str = ""
    cut: AudioCut | None = None


def read_manifest(source: Path | str, folder: Path) -> list[AudioFile]:
    """All recordings of a source as ``--data_list`` takes it: a manifest, a folder, tars, lists of paths.

    Args:
        folder: where the manifest of a source of another kind is written.

    Raises:
        RunError: the source cannot be read, a line is no object with a ``wav``, or there is none.
    """
    path = local_manifest(str(source), folder, SourceSettings(sink="tar"))
    files: list[AudioFile] = []
    with os_error_ends_run(f"{source}: cannot be read", exit_code=2), path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                if line.strip():
                    files.append(_audio_file(parse_json(line)))
            except (KeyError, TypeError, ValueError) as error:  # also of what is no JSON
                reason = first_line(error)
                raise RunError(f"{source}, line {number}: must be an object with a path in wav: {reason}") from error
    if not files:
        raise RunError(f"{source}: has no rows")
    return files


def _audio_file(row: dict[str, Any]) -> AudioFile:
    """
    Raises:
        KeyError, TypeError, ValueError: the row names no audio, or its fields are not of their kinds.
    """
    if not isinstance(row["wav"], str):
        raise TypeError("wav is no text")
    cut = cut_of(row)
    seconds = row.get("duration") or (cut.end - cut.start if cut and cut.end else 1.0)
    return AudioFile(row["wav"], float(seconds), str(row.get("speaker") or ""), cut)


class Audio:
    """Files of a manifest as samples at one rate, with a cache of 16-bit samples of up to ``cache_bytes``."""

    def __init__(self, files: Sequence[AudioFile], sample_rate: int, cache_bytes: int) -> None:
        self.files = files
        self.sample_rate = sample_rate
        seconds: dict[str, float] = {}
        for file in files:
            seconds[file.speaker] = seconds.get(file.speaker, 0.0) + max(file.seconds, 1e-3)
        # A speaker's chance is proportional to the square root of their hours, between by length and equal chances.
        self._cumulative = list(
            accumulate(max(file.seconds, 1e-3) / math.sqrt(seconds[file.speaker]) for file in files)
        )
        self._room = cache_bytes
        self._cache: dict[int, npt.NDArray[np.int16]] = {}
        self._bad: set[int] = set()

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Samples | None:
        """Samples (S,) of file ``index``; None if it cannot be read, which is logged once."""
        if index in self._bad:
            return None
        kept = self._cache.get(index)
        if kept is not None:
            return np.asarray(kept.astype(np.float32) / np.float32(32767), np.float32)
        try:
            samples = load_samples(self.files[index].path, self.sample_rate, cut=self.files[index].cut)
        except RowError as error:
            log.warning("left out of training: %s", error.reason)
            self._bad.add(index)
            if len(self._bad) == len(self.files):
                raise RunError("no file of the training manifest can be read") from error
            return None
        kept = np.rint(samples.clip(-1, 1) * 32767).astype(np.int16)
        if kept.nbytes <= self._room:
            self._room -= kept.nbytes
            self._cache[index] = kept
        return kept.astype(np.float32) / np.float32(32767)

    def draw(self, rng: np.random.Generator) -> Samples:
        """Samples (S,) of a random file: its speaker by the square root of their hours, then the file by its length."""
        while True:
            index = bisect.bisect(self._cumulative, rng.random() * self._cumulative[-1])
            samples = self[min(index, len(self.files) - 1)]
            if samples is not None and len(samples):
                return samples


def crop(audio: Audio, length: int, rng: np.random.Generator) -> Samples:
    """``length`` samples of one random file, or of several concatenated ones."""
    pieces: list[Samples] = []
    missing = length
    while missing > 0:
        samples = audio.draw(rng)
        start = int(rng.integers(0, max(1, len(samples) - missing + 1)))
        pieces.append(samples[start : start + missing])
        missing -= len(pieces[-1])
    return np.concatenate(pieces)


class Crops(Dataset[tuple[Samples, Samples, Samples]]):
    """Crop number i: samples (S,), their log-mel (n_mels, L), and the coarse mel's target (n_mels, L), all float32.

    The target's frames are where the inverse transform puts the vocoder's, half a hop later with "same" padding.
    """

    def __init__(
        self, audio: Audio, config: MiMoConfig, token_frames: int, seed: int, how: Augmentation | None = None
    ) -> None:
        self.audio = audio
        self.how = how or Augmentation()
        self.config = config
        self.length = crop_length(config, token_frames)
        self.seed = seed

    def __getitem__(self, index: int) -> tuple[Samples, Samples, Samples]:
        rng = np.random.default_rng((self.seed, index))
        samples = augment(
            lambda length: crop(self.audio, length, rng), self.length, self.config.sampling_rate, rng, self.how
        )
        # The inverse transform centres its frames half a hop later than the front end does.
        late = self.config.hop_length // 2 if self.config.vocoder_padding == "same" else 0
        form = self.config.mel
        return samples, log_mel(samples, form), log_mel(np.pad(samples[late:], (0, late)), form)


class BatchNumbers:
    """Endless batches of crop numbers from batch ``first`` on. A batch sampler for ``DataLoader``."""

    def __init__(self, first: int, batch_size: int) -> None:
        self.first, self.batch_size = first, batch_size

    def __iter__(self) -> Iterator[list[int]]:
        batch = self.first
        while True:
            yield list(range(batch * self.batch_size, (batch + 1) * self.batch_size))
            batch += 1


def crop_length(config: MiMoConfig, token_frames: int) -> int:
    """Length in samples of the longest utterance whose mel frames fill exactly ``token_frames`` token frames."""
    per_token = config.stride_size * config.avg_pooler
    return (token_frames * per_token - 1) * config.hop_length
