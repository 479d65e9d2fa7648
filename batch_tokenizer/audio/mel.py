"""The mel front end: samples (S,) float32 enter, a log-mel spectrogram (n_mels, L) float32 leaves.

It is torchaudio's ``MelSpectrogram`` (magnitudes, Hann window, reflected ends, HTK filters without normalisation), then
``log(max(mel, 1e-7))``. L = 1 + S // ``hop_length``. Reflection needs more than half a window of the transform, so
shorter audio is padded with zeros at its end to ``n_fft // 2 + 1`` samples, and counts as that long.

Spectra are made a block of frames at a time, since those of a long recording would take ten times its memory.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from batch_tokenizer.audio.torchaudio_transforms import transforms
from batch_tokenizer.records import RowError

_FLOOR = 1e-7
_BLOCK_FRAMES = 512


def log_mel(
    samples: npt.NDArray[np.float32],
    *,
    sample_rate: int,
    n_fft: int,
    hop_length: int,
    window_size: int,
    n_mels: int,
    f_min: float,
    f_max: float | None,
) -> npt.NDArray[np.float32]:
    """Log-mel spectrogram (``n_mels``, L) of samples (S,).

    Args:
        sample_rate, f_min, f_max: Hz; ``f_max`` None is half the sample rate.
        n_fft, hop_length, window_size: samples.

    Raises:
        RowError: there are no samples.
    """
    mel = log_mel_tensor(
        torch.from_numpy(samples),
        sample_rate=sample_rate,
        n_fft=n_fft,
        hop_length=hop_length,
        window_size=window_size,
        n_mels=n_mels,
        f_min=f_min,
        f_max=f_max,
    )
    return mel.numpy()


@torch.no_grad()
def log_mel_tensor(
    samples: torch.Tensor,
    *,
    sample_rate: int,
    n_fft: int,
    hop_length: int,
    window_size: int,
    n_mels: int,
    f_min: float,
    f_max: float | None,
) -> torch.Tensor:
    """As ``log_mel``, from a float32 tensor (S,) to one (``n_mels``, L) on the same device."""
    length = samples.shape[0]
    if length == 0:
        raise RowError("load", "no samples")
    transform = _transform(sample_rate, n_fft, hop_length, window_size, n_mels, float(f_min), f_max, samples.device)
    half = n_fft // 2
    if length <= half:
        samples = torch.nn.functional.pad(samples, (0, half + 1 - length))
    padded = torch.nn.functional.pad(samples[None], (half, half), mode="reflect")[0]
    frames = 1 + samples.shape[0] // hop_length
    mel = torch.empty(n_mels, frames, dtype=torch.float32, device=samples.device)
    window, filters = transform.spectrogram.window, transform.mel_scale.fb
    for first in range(0, frames, _BLOCK_FRAMES):
        last = min(frames, first + _BLOCK_FRAMES)
        spectrum = torch.stft(
            padded[first * hop_length : (last - 1) * hop_length + n_fft],
            n_fft,
            hop_length,
            window_size,
            window,
            center=False,
            return_complex=True,
        )
        mel[:, first:last] = (spectrum.abs().T @ filters).T
    return mel.clamp_(min=_FLOOR).log_()


@lru_cache(maxsize=16)
def _transform(
    sample_rate: int,
    n_fft: int,
    hop_length: int,
    window_size: int,
    n_mels: int,
    f_min: float,
    f_max: float | None,
    device: torch.device,
) -> Any:
    return transforms.MelSpectrogram(
        sample_rate=sample_rate,
        n_fft=n_fft,
        win_length=window_size,
        hop_length=hop_length,
        f_min=f_min,
        f_max=f_max,
        n_mels=n_mels,
        power=1.0,
        center=True,
    ).to(device)
