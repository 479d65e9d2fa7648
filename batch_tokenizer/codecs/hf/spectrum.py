"""The front end of X-Codec 2 and NeuCodec: samples for the acoustic encoder, a log-mel spectrum for the semantic one.

It is that of the library's feature extractors to the bit, and runs in loader workers without the library. Both inputs
are stored in one array: the padded samples, then the spectrum, frame by frame.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from batch_tokenizer.audio.mel import kaldi_frames, kaldi_log_mel
from batch_tokenizer.codecs.hf.lengths import Conv, Lengths, lengthened, round_up, through

#: Filters of the spectrum, and how many of its frames the semantic encoder takes as one.
N_MELS, STACKED = 80, 2


@dataclass(frozen=True, slots=True)
class SpectrumAndWaveform(Lengths):
    """Lengths and features of both inputs.

    The feature extractors append one zero, then zeros up to a multiple.

    Attributes:
        sample_rate: Hz, of the input.
        acoustic: the acoustic encoder's strided convolutions.
        margin: zeros on both sides of what the spectrum is made of.
        trims: whether the model cuts the longer of its two encoders' outputs; else they must be of one length.
        output_hop: samples per frame of decoded audio.
        padding_value: fills up the last stack of the spectrum's frames.
    """

    hop: int
    multiple: int
    sample_rate: int
    acoustic: tuple[Conv, ...]
    margin: int
    trims: bool
    output_hop: int
    padding_value: float = 1.0

    def input_length(self, num_samples: int) -> int:
        if self.frames(num_samples):
            return num_samples
        return lengthened(self, round_up(num_samples, self.multiple), self.multiple, 8 * self.multiple)

    def frames(self, length: int) -> int:
        padded = self._padded(length)
        acoustic = through(self.acoustic, padded)
        if self._spectra(padded) < 2:  # their variance is divided by one less than their number
            return 0
        if self.trims:
            return min(acoustic, self._stacks(padded))
        return acoustic if acoustic == self._stacks(padded) else 0

    def output_samples(self, num_frames: int) -> int:
        window = 4 * self.output_hop
        return (num_frames - 1) * self.output_hop + window - 2 * ((window - self.output_hop) // 2)

    def features(self, samples: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        padded = self._padded(self.input_length(len(samples)))
        wave = np.pad(samples, (0, padded - len(samples)))
        spectrum = self._spectrum(torch.from_numpy(np.pad(wave, self.margin)))
        missing = self._stacks(padded) * STACKED - len(spectrum)
        spectrum = F.pad(spectrum, (0, 0, 0, missing), value=self.padding_value)
        return np.concatenate([wave, spectrum.flatten().numpy()])[None]

    def takes(self, length: int) -> bool:
        padded = self._padded_of(length)
        return padded > 0 and self._feature_length(padded) == length and self.frames(padded - 1) > 0

    def feature_frames(self, length: int) -> int:
        return self.frames(self._padded_of(length) - 1)

    def inputs(self, features: Tensor) -> tuple[Tensor, ...]:
        """Samples (B, 1, S), spectra (B, T, ``STACKED * N_MELS``), and a mask (B, T), 0 where they are filled up."""
        padded = self._padded_of(features.shape[-1])
        stacks = features[:, 0, padded:].unflatten(1, (-1, STACKED * N_MELS))
        mask = torch.ones(stacks.shape[:2], dtype=torch.int64, device=features.device)
        if self._spectra(padded) % STACKED:
            mask[:, -1] = 0
        return features[..., :padded], stacks, mask

    def _spectrum(self, samples: Tensor) -> Tensor:
        """Samples (S,) to (L, ``N_MELS``), each filter of mean 0 and variance 1 over the utterance."""
        spectrum = kaldi_log_mel(samples, self.sample_rate, N_MELS)
        return (spectrum - spectrum.mean(0)) / torch.sqrt(spectrum.var(0, unbiased=True) + 1e-7)

    def _padded(self, length: int) -> int:
        """Samples that the model gets for ``length`` of them."""
        return round_up(length + 1, self.multiple)

    def _spectra(self, padded: int) -> int:
        """Frames of the spectrum of ``padded`` samples."""
        return kaldi_frames(padded + 2 * self.margin, self.sample_rate)

    def _stacks(self, padded: int) -> int:
        return -(-self._spectra(padded) // STACKED)

    def _feature_length(self, padded: int) -> int:
        return padded + self._stacks(padded) * STACKED * N_MELS

    def _padded_of(self, length: int) -> int:
        """The samples in features of ``length``: the first multiple whose features are not shorter."""
        candidates = range(0, length + self.multiple, self.multiple)
        return candidates[bisect_left(candidates, length, key=self._feature_length)]
