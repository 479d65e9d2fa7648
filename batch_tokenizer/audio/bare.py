"""Loading as a script of three lines does it, for benchmarks to compare with: no checks, libsndfile's formats only."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import soundfile
import torch

from batch_tokenizer.audio.torchaudio_transforms import transforms


@lru_cache(maxsize=16)
def _resampler(from_rate: int, to_rate: int) -> Any:
    return transforms.Resample(from_rate, to_rate)


def load_bare(path: str, sample_rate: int) -> npt.NDArray[np.float32]:
    """A file's samples (S,), resampled by torchaudio and averaged over channels."""
    samples, file_rate = soundfile.read(path, dtype="float32", always_2d=True)
    channels = torch.from_numpy(samples.T)
    if file_rate != sample_rate:
        channels = _resampler(file_rate, sample_rate)(channels.contiguous())
    return channels.mean(dim=0).numpy()
