"""A path enters, mono float32 samples (S,) at a codec's sample rate leave, or one ``RowError``."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from batch_tokenizer.audio.decoding import decode_audio, printable_path
from batch_tokenizer.audio.resampling import Resampler, resample
from batch_tokenizer.records import RowError


def load_samples(
    path: str, sample_rate: int, resampler: Resampler = "reference", *, max_samples: int | None = None
) -> npt.NDArray[np.float32]:
    """One utterance: decoded, resampled to ``sample_rate`` Hz, and averaged over channels.

    ``reference`` resamples each channel and then averages, the order in which published tokens were made. The same file
    gives the same bits, whatever process and however many threads load it.

    Args:
        max_samples: the most samples that may be returned.

    Returns:
        Samples (S,), 1 <= S <= ``max_samples``, contiguous, finite, nominally in [-1, 1].

    Raises:
        RowError: the file cannot be decoded (``decode_audio`` says why), or is too long.
    """
    max_seconds = None if max_samples is None else max_samples / sample_rate
    channels, file_rate = decode_audio(path, max_seconds=max_seconds)
    if resampler == "reference":
        samples = _mean(resample(channels, file_rate, sample_rate, resampler))
    else:
        samples = resample(_mean(channels)[None], file_rate, sample_rate, resampler)[0]
    if max_samples is not None and len(samples) > max_samples:
        length = f"{len(samples)} samples at {sample_rate} Hz where {max_samples} is the most"
        raise RowError("load", f"{printable_path(path)}: too long, {length}")
    # Finite samples near the end of float32's range overflow in a sum.
    if not np.isfinite(samples).all():
        raise RowError("load", f"{printable_path(path)}: its samples are too large to resample or average")
    return samples


def _mean(channels: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """(channels, S) to (S,). By torch, since numpy adds up more than two channels in another order."""
    return channels[0] if len(channels) == 1 else torch.from_numpy(channels).mean(0).numpy()
