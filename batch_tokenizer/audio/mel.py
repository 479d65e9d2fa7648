"""Mel front ends: samples (S,) float32 to a log-mel spectrogram (n_mels, L) float32.

``log_mel`` is torchaudio's ``MelSpectrogram`` (magnitudes, Hann window, reflected ends, HTK filters without
normalisation), then ``log(max(mel, 1e-7))``; L = 1 + S // ``hop_length``. ``whisper_log_mel`` is Whisper's, of power
spectra with Slaney's filters; L = S // 160. ``kaldi_log_mel`` is Kaldi's. Reflection needs more than half a window of
the transform, so audio that is shorter is padded with zeros at its end to ``n_fft // 2 + 1`` samples, and counts as
that long.

All but Kaldi's are made a block of frames at a time, since spectra of a long recording take ten times its memory.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from batch_tokenizer.records import RowError, RunError, first_line


def import_transforms() -> ModuleType:
    """``torchaudio.transforms``.

    Raises:
        RunError: torchaudio is absent or does not fit the installed torch, which shows as an OSError (a missing CUDA
            library) or a RuntimeError (another torch's operators) as often as an ImportError.
    """
    try:
        return importlib.import_module("torchaudio.transforms")
    except (ImportError, OSError, RuntimeError) as error:
        raise RunError(
            f"torchaudio does not load beside the installed torch ({first_line(error)}); torchaudio 2.11 needs a build "
            "of torch for CUDA 13.0: reinstall both in one go, pip install --force-reinstall 'torch>=2.11,<2.15' "
            "'torchaudio==2.11.*', and let pip take the registry's own builds"
        ) from error


transforms = import_transforms()
kaldi = importlib.import_module("torchaudio.compliance.kaldi")

#: The least mel that a logarithm is taken of.
FLOOR = 1e-7

#: Whisper's front end: Hz, samples of a transform, and samples from one frame to the next.
WHISPER_RATE, WHISPER_N_FFT, WHISPER_HOP = 16000, 400, 160

#: Samples of a frame of ``kaldi_log_mel``, and from one to the next.
KALDI_WINDOW_AND_SHIFT = (400, 160)

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
    frames = 1 + samples.shape[0] // form.hop_length
    mel = torch.empty(form.n_mels, frames, dtype=torch.float32, device=samples.device)
    window, filters = transform.spectrogram.window, transform.mel_scale.fb
    for first, magnitudes in _magnitudes(samples, frames, form.n_fft, form.hop_length, form.window_size, window):
        mel[:, first : first + magnitudes.shape[1]] = (magnitudes.T @ filters).T
    return mel.clamp_(min=FLOOR).log_()


@torch.no_grad()
def whisper_log_mel(samples: npt.NDArray[np.float32], n_mels: int) -> npt.NDArray[np.float32]:
    """Whisper's log-mel spectrogram (``n_mels``, L) of samples (S,) at 16 kHz, not padded to 30 s.

    ``log10(max(mel, 1e-10))``, then no less than its greatest value in the utterance - 8, then (x + 4) / 4.

    Raises:
        RowError: there are no samples.
    """
    if not len(samples):
        raise RowError("load", "no samples")
    wave = torch.from_numpy(samples)
    wave = torch.nn.functional.pad(wave, (0, max(0, WHISPER_N_FFT // 2 + 1 - len(wave))))
    frames = len(wave) // WHISPER_HOP
    filters, window = slaney_filters(WHISPER_RATE, WHISPER_N_FFT, n_mels), torch.hann_window(WHISPER_N_FFT)
    mel = torch.empty(n_mels, frames, dtype=torch.float32)
    for first, magnitudes in _magnitudes(wave, frames, WHISPER_N_FFT, WHISPER_HOP, WHISPER_N_FFT, window):
        mel[:, first : first + magnitudes.shape[1]] = filters @ magnitudes.square_()
    mel.clamp_(min=1e-10).log10_()
    return torch.maximum(mel, mel.max() - 8.0).add_(4.0).div_(4.0).numpy()


@torch.no_grad()
def kaldi_log_mel(samples: torch.Tensor, sample_rate: int, n_mels: int) -> torch.Tensor:
    """Kaldi's log-mel spectrogram (L, ``n_mels``) of samples (S,), as wav2vec2-BERT takes it; L by ``kaldi_frames``.

    Natural logarithm of power spectra of 16-bit values, with torchaudio's defaults: frames are not centred, each loses
    its mean and has a pre-emphasis of 0.97 and Povey's window; the lowest filter begins at 20 Hz.
    """
    window, shift = (length / sample_rate * 1000 for length in KALDI_WINDOW_AND_SHIFT)
    mel: torch.Tensor = kaldi.fbank(
        samples[None] * 2**15,
        num_mel_bins=n_mels,
        frame_length=window,
        frame_shift=shift,
        sample_frequency=sample_rate,
        low_freq=20,
        high_freq=sample_rate // 2,
    )
    return mel


def kaldi_frames(num_samples: int, sample_rate: int) -> int:
    """L of ``kaldi_log_mel``; below 1 where there are too few samples."""
    # torchaudio takes milliseconds, and rounds what becomes of them.
    window, shift = (int(sample_rate * (length / sample_rate * 1000) * 0.001) for length in KALDI_WINDOW_AND_SHIFT)
    return (num_samples - window) // shift + 1


@lru_cache(maxsize=4)
def slaney_filters(sample_rate: int, n_fft: int, n_mels: int) -> torch.Tensor:
    """Triangular mel filters float32 (``n_mels``, n_fft // 2 + 1), those of ``librosa.filters.mel`` to the bit.

    Slaney's scale is linear up to 1 kHz (200/3 Hz a mel) and logarithmic above (6.4 times the frequency in 27 mels);
    each filter has the area 1. torchaudio's are computed in float32, which changes logarithms by up to 1e-5.
    """
    step, corner = 200.0 / 3, 1000.0
    ratio = np.log(6.4) / 27.0
    greatest = corner / step + np.log(sample_rate / 2 / corner) / ratio
    mels = np.linspace(0.0, greatest, n_mels + 2)
    logarithmic = mels >= corner / step
    edges = step * mels
    edges[logarithmic] = corner * np.exp(ratio * (mels[logarithmic] - corner / step))
    slopes = edges[:, None] - np.fft.rfftfreq(n_fft, 1.0 / sample_rate)
    widths = np.diff(edges)[:, None]
    rising, falling = -slopes[:-2] / widths[:-1], slopes[2:] / widths[1:]
    triangles = np.maximum(0, np.minimum(rising, falling)).astype(np.float32)
    return torch.from_numpy((triangles * (2.0 / (edges[2:] - edges[:-2]))[:, None]).astype(np.float32))


def _magnitudes(
    samples: torch.Tensor, frames: int, n_fft: int, hop: int, window_size: int, window: torch.Tensor
) -> Iterator[tuple[int, torch.Tensor]]:
    """Spectra of centred, reflected samples by blocks: the first frame, magnitudes (n_fft // 2 + 1, frames)."""
    padded = torch.nn.functional.pad(samples[None], (n_fft // 2, n_fft // 2), mode="reflect")[0]
    for first in range(0, frames, _BLOCK_FRAMES):
        last = min(frames, first + _BLOCK_FRAMES)
        block = padded[first * hop : (last - 1) * hop + n_fft]
        yield first, torch.stft(block, n_fft, hop, window_size, window, center=False, return_complex=True).abs()


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
