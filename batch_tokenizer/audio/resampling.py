"""Samples at one rate to samples at another.

``reference`` is torchaudio's default resampler, with which the published tokens were made: a sinc with six zero
crossings on each side under a Hann window, rolled off at 0.99 of the lower Nyquist frequency. Wherever torchaudio's own
kernel is of a sensible size it is used, and the result is its result bit for bit. ``soxr`` (at its setting HQ) rejects
aliases far better.

Two things are done otherwise than by calling torchaudio on everything:

- Long audio goes through in blocks. torchaudio's convolution copies its input up to fourteen times over; a block's copy
  stays in the cache, which makes it several times faster, and bits do not change. For the same reason a part of a long
  recording can be made alone (``Piece``).
- A pair of rates without a large common divisor, such as 44,099 and 24,000 Hz, gives torchaudio a kernel of gigabytes
  that is nearly all zeros. There only the taps inside the window are computed, in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import soxr
import torch

from batch_tokenizer.audio.mel import transforms

Resampler = Literal["reference", "soxr"]
Samples = npt.NDArray[np.float32]

_ZERO_CROSSINGS = 6
_ROLLOFF = 0.99

#: Largest kernel, in elements, that torchaudio may build: 4 MiB. Every pair of the usual rates is below it.
_MOST_DENSE_ELEMENTS = 1 << 20

#: Input samples in a block. Much shorter ones make the convolution choose another algorithm, whose last bits differ.
_BLOCK_SAMPLES = 1 << 18

#: Longer recordings than this are resampled in blocks, for every ratio.
SHORT_SAMPLES = 2 * _BLOCK_SAMPLES

#: Input samples on each side of a piece that soxr is given; its filter is some hundreds long.
_SOXR_MARGIN = 4096

#: Taps that the sparse path handles at a time, and most that it keeps per pair of rates (float64).
_SPARSE_BLOCK_TAPS = 1 << 18
_SPARSE_TABLE_TAPS = 1 << 21


def resample(samples: Samples, from_rate: int, to_rate: int, resampler: Resampler) -> Samples:
    """Samples (channels, S), S >= 1, at ``from_rate`` Hz to (channels, S') at ``to_rate`` Hz, S' >= 1.

    S' is about S x ``to_rate`` / ``from_rate``; ``reference`` rounds it as torchaudio does. At equal rates the input
    itself is returned. The same input gives the same bits on any number of threads.
    """
    # Published tokens were made with torchaudio's kernel, which is used wherever it has a sensible size.
    if from_rate == to_rate:
        return samples
    if resampler == "soxr":
        return _resample_soxr(samples, from_rate, to_rate)
    source, target = _ratio(from_rate, to_rate)
    if _is_dense(source, target):
        return _resample_dense(samples, source, target)
    return _resample_sparse(samples, source, target)


@dataclass(frozen=True, slots=True)
class Piece:
    """Samples ``first`` up to ``last`` of a resampled recording, and which of its own samples they are made from.

    With ``reference`` they are those of the whole recording to the bit, with ``soxr`` within 2e-5. Made by ``plan``.

    Attributes:
        first, last: at ``to_rate``.
        start, stop: at ``from_rate``; ``stop`` may lie behind the recording's end.
        whole: they are all that there is, as short recordings are resampled otherwise than long ones.
    """

    first: int
    last: int
    start: int
    stop: int
    from_rate: int
    to_rate: int
    resampler: Resampler
    whole: bool = False

    @classmethod
    def plan(
        cls, first: int, last: int, length: int | None, from_rate: int, to_rate: int, resampler: Resampler
    ) -> Piece:
        """Which samples are needed. ``length`` is the recording's, or None for one longer than ``SHORT_SAMPLES``."""
        if from_rate == to_rate:
            return cls(first, last, first, last, from_rate, to_rate, resampler)
        source, target = _ratio(from_rate, to_rate)
        if length is not None and not _is_done_in_blocks(length, source):
            return cls(first, last, 0, length, from_rate, to_rate, resampler, whole=True)
        around = max(_kernel_width(source, target) + 2, _SOXR_MARGIN if resampler == "soxr" else 0)
        around = -(-around // source)
        start = max(0, first // target - around) * source
        return cls(first, last, start, (-(-last // target) + around) * source, from_rate, to_rate, resampler)

    def resample(self, samples: Samples) -> Samples:
        """Samples (channels, n) from ``start`` on to (channels, ``last`` - ``first``).

        Where n is less than ``stop`` - ``start`` the recording ends there, and the result may be shorter, even empty.
        """
        channels, count = samples.shape
        last = self.last
        if self.whole or count < self.stop - self.start:
            last = min(last, resampled_length(self.start + count, self.from_rate, self.to_rate, self.resampler))
        if last <= self.first or count == 0:
            return np.empty((channels, 0), np.float32)
        if self.from_rate == self.to_rate:
            return samples[:, : last - self.first]
        source, target = _ratio(self.from_rate, self.to_rate)
        begin = self.start // source * target
        if self.whole or self.resampler == "soxr" or not _is_dense(source, target):
            made = resample(samples, self.from_rate, self.to_rate, self.resampler)
            return np.ascontiguousarray(made[:, self.first - begin : last - begin])
        first_group = self.first // target
        output = np.empty((channels, last - first_group * target), np.float32)
        _dense_blocks(samples, self.start, first_group, -(-last // target), source, target, output)
        return output[:, self.first - first_group * target :]


def resampled_length(length: int, from_rate: int, to_rate: int, resampler: Resampler) -> int:
    """Samples that ``resample`` makes of ``length`` >= 1."""
    if from_rate == to_rate:
        return length
    if resampler == "soxr":
        return max(1, (2 * length * to_rate + from_rate) // (2 * from_rate))
    return _output_length(length, *_ratio(from_rate, to_rate))


def _ratio(from_rate: int, to_rate: int) -> tuple[int, int]:
    divisor = math.gcd(from_rate, to_rate)
    return from_rate // divisor, to_rate // divisor


def _is_dense(source: int, target: int) -> bool:
    """Whether torchaudio's kernel for this ratio is of a sensible size."""
    return target * (2 * _kernel_width(source, target) + source) <= _MOST_DENSE_ELEMENTS


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
    channels, length = samples.shape
    groups = length // source + 1
    if not _is_done_in_blocks(length, source):
        with torch.inference_mode():
            return _dense_transform(source, target)(torch.from_numpy(samples)).numpy()
    output = np.empty((channels, _output_length(length, source, target)), np.float32)
    _dense_blocks(samples, 0, 0, groups, source, target, output)
    return output


def _is_done_in_blocks(length: int, source: int) -> bool:
    return (length // source + 1) * source >= SHORT_SAMPLES


def _dense_blocks(
    samples: Samples, position: int, first_group: int, last_group: int, source: int, target: int, output: Samples
) -> None:
    """Fills ``output`` with groups of ``target`` samples, each made from a stride of ``source`` and what is around it.

    ``samples`` begin at ``position`` of the recording; beyond them it counts as silent. All blocks have one size, the
    last one too.
    """
    transform = _dense_transform(source, target)
    kernel, width = transform.kernel, transform.width
    groups_per_block = -(-_BLOCK_SAMPLES // source)
    block = torch.empty(len(samples), 1, (groups_per_block - 1) * source + kernel.shape[-1])
    with torch.inference_mode():
        for first in range(first_group, last_group, groups_per_block):
            start = first * source - width - position
            inside = slice(max(0, start), max(0, min(samples.shape[1], start + block.shape[2])))
            block.zero_()
            # A copy also puts strides in order: numpy may give one channel strides that make the convolution slow.
            block[:, 0, inside.start - start : inside.stop - start] = torch.from_numpy(samples[:, inside])
            made = torch.nn.functional.conv1d(block, kernel, stride=source)
            place = output[:, (first - first_group) * target :][:, : groups_per_block * target]
            place[:] = made.transpose(1, 2).reshape(len(samples), -1)[:, : place.shape[1]].numpy()


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
