"""The inverse short-time Fourier transform of a vocoder's spectra, on padded batches."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import fold

from batch_tokenizer.codecs.layers.padded import PaddedBatch


def inverse_stft(spectra: PaddedBatch, hop: int) -> Tensor:
    """Complex spectra (B, N/2 + 1, T) to float32 samples (B, T · hop), frames centred ("same" padding).

    Each frame's inverse real transform times a periodic Hann window of N samples is added at its place; the sum is
    divided by the sum of the squared windows there (1e-11 at least), and (N - hop) / 2 samples are cut off both ends.
    Frames beyond an utterance's end add nothing to either sum.
    """
    size = 2 * (spectra.values.shape[1] - 1)
    window = torch.hann_window(size, device=spectra.values.device)
    frames = torch.fft.irfft(spectra.values, size, dim=1) * window[:, None]
    power = window.square()[:, None].expand(1, -1, spectra.size)
    if spectra.beyond is not None:
        frames = frames.masked_fill(spectra.beyond, 0.0)
        power = power.expand(len(frames), -1, -1).masked_fill(spectra.beyond, 0.0)
    trim = (size - hop) // 2

    def overlap_add(parts: Tensor) -> Tensor:
        length = (spectra.size - 1) * hop + size
        whole = fold(parts, (1, length), (1, size), stride=(1, hop))[:, 0, 0]
        return whole[:, trim : length - trim]

    return overlap_add(frames) / overlap_add(power).clamp(min=1e-11)
