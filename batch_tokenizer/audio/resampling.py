"""Samples at one rate to samples at another.

``reference`` is torchaudio's default resampler, with which the published tokens were made: a sinc with six zero
crossings on each side under a Hann window, rolled off at 0.99 of the lower Nyquist frequency. Wherever torchaudio's own
kernel is of a sensible size it is used, and the result is its result bit for bit. ``soxr`` (at its setting HQ) rejects
aliases far better.

Two things are done otherwise than by calling torchaudio on everything:

- Long audio goes through in blocks. torchaudio's convolution copies its input up to fourteen times over; a block's copy
  stays in the cache, which makes it several times faster, and bits do not change.
- A pair of rates without a large common divisor, such as 44,099 and 24,000 Hz, gives torchaudio a kernel of gigabytes
  that is nearly all zeros. There only the taps inside the window are computed, in float64.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import soxr
import torch

from batch_tokenizer.audio.torchaudio_transforms import transforms

Resampler = Literal["reference", "soxr"]
Samples = npt.NDArray[np.float32]

_ZERO_CROSSINGS = 6
_ROLLOFF = 0.99

#: Largest kernel, in elements, that torchaudio may build: 4 MiB. Every pair of the usual rates is below it.
_MOST_DENSE_ELEMENTS = 1 << 20

#: Input samples in a block. Much shorter ones make the convolution choose another algorithm, whose last bits differ.
_BLOCK_SAMPLES = 1 << 18

#: Taps that the sparse path handles at a time, and most that it keeps per pair of rates (float64).
_SPARSE_BLOCK_TAPS = 1 << 18
_SPARSE_TABLE_TAPS = 1 << 21


def resample(samples: Samples, from_rate: int, to_rate: int, resampler: Resampler) -> Samples:
    """Samples (channels, S), S >= 1, at ``from_rate`` Hz to (channels, S') at ``to_rate`` Hz, S' >= 1.

    S' is about S x ``to_rate`` / ``from_rate``; ``reference`` rounds it as torchaudio does. At equal rates the input
    itself is returned. The same input gives the same bits on any number of threads.
    """
    if from_rate == to_rate:
        return samples
    if resampler == "soxr":
        return _resample_soxr(samples, from_rate, to_rate)
    divisor = math.gcd(from_rate, to_rate)
    source, target = from_rate // divisor, to_rate // divisor
    if target * (2 * _kernel_width(source, target) + source) <= _MOST_DENSE_ELEMENTS:
        return _resample_dense(samples, source, target)
    return _resample_sparse(samples, source, target)


def _resample_soxr(samples: Samples, from_rate: int, to_rate: int) -> Samples:
    # Audio shorter than one sample of the output counts as that long.
    missing = -(-from_rate // to_rate) - samples.shape[1]
    if missing > 0:
        samples = np.pad(samples, ((0, 0), (0, missing)))
    return np.ascontiguousarray(soxr.resample(samples.T, from_rate, to_rate, quality="HQ").T)


def _kernel_width(source: int, target: int) -> int:
    """Input samples that the window reaches to each side of an output sample, rounded up."""
    return math.ceil(_ZERO_CROSSINGS * source / (min(source, target) * _ROLLOFF))


def _output_length(length: int, source: int, target: int) -> int:
    """torchaudio's number of output samples. It rounds the quotient to float32 first, which shows in long audio."""
    exact = (length // source + 1) * target
    return min(exact, math.ceil(np.float32(target * length / source)))


@lru_cache(maxsize=64)
def _dense_transform(source: int, target: int) -> Any:
    return transforms.Resample(source, target)


def _resample_dense(samples: Samples, source: int, target: int) -> Samples:
    transform = _dense_transform(source, target)
    channels, length = samples.shape
    waveform = torch.from_numpy(samples)
    # Output is made in groups of ``target`` samples from strides of ``source``; blocks are whole groups, evenly sized.
    groups = length // source + 1
    blocks = groups * source // _BLOCK_SAMPLES
    with torch.inference_mode():
        if blocks < 2:
            return transform(waveform).numpy()
        kernel, width = transform.kernel, transform.width
        output = torch.empty(channels, _output_length(length, source, target))
        groups_per_block = -(-groups // blocks)
        for first in range(0, groups, groups_per_block):
            last = min(groups, first + groups_per_block)
            start = first * source - width
            stop = (last - 1) * source - width + kernel.shape[-1]
            # A copy also puts strides in order: numpy may give a single channel strides that make the convolution slow.
            block = torch.zeros(channels, 1, stop - start)
            inside = slice(max(0, start), min(length, stop))
            block[:, 0, inside.start - start : inside.stop - start] = waveform[:, inside]
            made = torch.nn.functional.conv1d(block, kernel, stride=source)
            place = output[:, first * target : last * target]
            place.copy_(made.transpose(1, 2).reshape(channels, -1)[:, : place.shape[1]])
        return output.numpy()


def _window_weights(phases: npt.NDArray[np.int64], source: int, target: int) -> npt.NDArray[np.float64]:
    """Weights (phases, taps) of the input samples around output samples n with n % ``target`` == phase.

    The first tap is ``_kernel_width`` samples before the last input sample that is not after the output sample.
    """
    width = _kernel_width(source, target)
    band = min(source, target) * _ROLLOFF
    taps = np.arange(-width, width + 2)
    positions = (phases * source // target)[:, None] + taps
    # torchaudio rounds the phase to float32 and nothing else.
    rounded_phases = (-phases.astype(np.float32) / np.float32(target)).astype(np.float64)
    times = np.clip((rounded_phases[:, None] + positions / source) * band, -_ZERO_CROSSINGS, _ZERO_CROSSINGS)
    window = np.cos(times * (math.pi / 2 / _ZERO_CROSSINGS)) ** 2
    return np.sinc(times) * window * (band / source)


@lru_cache(maxsize=8)
def _weight_table(source: int, target: int) -> npt.NDArray[np.float64]:
    return _window_weights(np.arange(target), source, target)


def _resample_sparse(samples: Samples, source: int, target: int) -> Samples:
    channels, length = samples.shape
    width = _kernel_width(source, target)
    taps = 2 * width + 2
    made = _output_length(length, source, target)
    last_position = (made - 1) * source // target
    padded = np.pad(samples, ((0, 0), (width, width + 1 + max(0, last_position + 1 - length))))
    windows = np.lib.stride_tricks.sliding_window_view(padded, taps, axis=1)
    table = _weight_table(source, target) if target * taps <= _SPARSE_TABLE_TAPS else None
    output = np.empty((channels, made), np.float32)
    step = max(1, _SPARSE_BLOCK_TAPS // taps)
    for first in range(0, made, step):
        indices = np.arange(first, min(made, first + step))
        phases = indices % target
        weights = _window_weights(phases, source, target) if table is None else table[phases]
        # In the padded input, the window of the sample at position p starts at p.
        positions = indices * source // target
        for channel in range(channels):
            around = windows[channel, positions]
            output[channel, first : first + len(indices)] = np.einsum("st,st->s", around, weights)
    return output
