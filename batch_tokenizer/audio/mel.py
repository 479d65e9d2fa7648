"""The mel front end: samples (S,) float32 enter, a log-mel spectrogram (n_mels, L) float32 leaves.

It is torchaudio's ``MelSpectrogram`` (magnitudes, Hann window, reflected ends, HTK filters without normalisation), then
``log(max(mel, 1e-7))``. L = 1 + S // ``hop_length``. Reflection needs more than half a window of the transform, so
shorter audio is padded with zeros at its end to ``n_fft // 2 + 1`` samples, and counts as that long.

Spectra are made a block of frames at a time, since those of a long recording would take ten times its memory.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from batch_tokenizer.records import RowError, RunError


def import_transforms() -> ModuleType:
    """``torchaudio.transforms``.

    Raises:
        RunError: torchaudio is absent or does not fit the installed torch, which shows as an OSError (a missing CUDA
            library) or a RuntimeError (another torch's operators) as often as an ImportError.
    """
    try:
        return importlib.import_module("torchaudio.transforms")
    except (ImportError, OSError, RuntimeError) as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise RunError(
            f"torchaudio does not load beside the installed torch ({first_line}); torchaudio 2.11 needs a build "
            "of torch for CUDA 13.0: reinstall both in one go, pip install --force-reinstall 'torch>=2.11,<2.15' "
            "'torchaudio==2.11.*', and let pip take the registry's own builds"
        ) from error


transforms = import_transforms()

#: The least mel that a logarithm is taken of.
FLOOR = 1e-7

_BLOCK_FRAMES = 512


@dataclass(frozen=True, slots=True)
class MelForm:
    """What a mel spectrogram is like.

    Attributes:
        sample_rate, f_min, f_max: Hz; ``f_max`` None is half the sample rate.
        n_fft, hop_length, window_size: samples.
        n_mels: channels.
    """

    sample_rate: int
    n_fft: int
    hop_length: int
    window_size: int
    n_mels: int
    f_min: float
    f_max: float | None

    @property
    def least_samples(self) -> int:
        """What shorter audio is padded to with zeros at its end: more than half a transform."""
        return self.n_fft // 2 + 1


def log_mel(samples: npt.NDArray[np.float32], form: MelForm) -> npt.NDArray[np.float32]:
    """Log-mel spectrogram (``n_mels``, L) of samples (S,).

    Raises:
        RowError: there are no samples.
    """
    return log_mel_tensor(torch.from_numpy(samples), form).numpy()


@torch.no_grad()
def log_mel_tensor(samples: torch.Tensor, form: MelForm) -> torch.Tensor:
    """As ``log_mel``, from a float32 tensor (S,) to one (``n_mels``, L) on the same device."""
    length = samples.shape[0]
    if length == 0:
        raise RowError("load", "no samples")
    transform = mel_transform(form, samples.device)
    if length < form.least_samples:
        samples = torch.nn.functional.pad(samples, (0, form.least_samples - length))
    n_fft, hop = form.n_fft, form.hop_length
    padded = torch.nn.functional.pad(samples[None], (n_fft // 2, n_fft // 2), mode="reflect")[0]
    frames = 1 + samples.shape[0] // hop
    mel = torch.empty(form.n_mels, frames, dtype=torch.float32, device=samples.device)
    window, filters = transform.spectrogram.window, transform.mel_scale.fb
    for first in range(0, frames, _BLOCK_FRAMES):
        last = min(frames, first + _BLOCK_FRAMES)
        spectrum = torch.stft(
            padded[first * hop : (last - 1) * hop + n_fft],
            n_fft,
            hop,
            form.window_size,
            window,
            center=False,
            return_complex=True,
        )
        mel[:, first:last] = (spectrum.abs().T @ filters).T
    return mel.clamp_(min=FLOOR).log_()


@lru_cache(maxsize=16)
def mel_transform(form: MelForm, device: torch.device) -> Any:
    """torchaudio's ``MelSpectrogram``, for its window and filters."""
    return transforms.MelSpectrogram(
        sample_rate=form.sample_rate,
        n_fft=form.n_fft,
        win_length=form.window_size,
        hop_length=form.hop_length,
        f_min=float(form.f_min),
        f_max=form.f_max,
        n_mels=form.n_mels,
        power=1.0,
        center=True,
    ).to(device)
