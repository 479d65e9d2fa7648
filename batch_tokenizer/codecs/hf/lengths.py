"""Frames from samples and samples from frames, for each kind of model, without the model.

``Lengths`` are made from layer sizes in a model's configuration. They are picklable, hold plain integers, are used by
loader workers and never import transformers. ``input_length`` is the number of samples of the model's input: those of
the utterance, and zeros after them where the model or its feature extractor needs more. These samples are the features;
some models also need a spectrum (``hf/spectrum.py``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from batch_tokenizer.records import RowError, RunError


@dataclass(frozen=True, slots=True)
class Conv:
    """A convolution along time, or a transposed one."""

    kernel: int
    stride: int = 1
    padding: int = 0
    output_padding: int = 0

    def __call__(self, length: int) -> int:
        """Output length; below 1 where the input is too short."""
        return (length + 2 * self.padding - self.kernel) // self.stride + 1

    def transposed(self, length: int) -> int:
        """Output length as a transposed convolution."""
        return (length - 1) * self.stride - 2 * self.padding + self.kernel + self.output_padding


def through(convs: Sequence[Conv], length: int) -> int:
    """Length after all of ``convs``, 0 where the input is too short for one of them."""
    for conv in convs:
        length = conv(length)
        if length < 1:
            return 0
    return length


def through_transposed(convs: Sequence[Conv], length: int) -> int:
    """Length after all of ``convs`` as transposed convolutions."""
    for conv in convs:
        length = conv.transposed(length)
    return length


class Lengths(ABC):
    """Exact lengths of one model's inputs and outputs.

    Attributes:
        hop: samples per frame.
        multiple: what the checkpoint's feature extractor zero-pads to a multiple of; 1 where it does not.
    """

    hop: int
    multiple: int

    @abstractmethod
    def input_length(self, num_samples: int) -> int:
        """Samples of the model's input for an utterance of ``num_samples`` >= 1."""

    @abstractmethod
    def frames(self, length: int) -> int:
        """Token frames of an input of ``length`` samples; 0 where the model cannot take that length."""

    def takes(self, length: int) -> bool:
        """Whether features of ``length`` >= 1 are as ``features`` makes them."""
        return length % self.multiple == 0 and self.frames(length) > 0

    def features(self, samples: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Samples (S,), S >= 1, to the features (1, length) of a model: here its input alone."""
        return np.pad(samples, (0, self.input_length(len(samples)) - len(samples)))[None]

    def feature_frames(self, length: int) -> int:
        """Token frames of features of ``length``."""
        return self.frames(length)

    def inputs(self, features: Tensor) -> tuple[Tensor, ...]:
        """Features (B, 1, length) to the model's samples (B, 1, S), and its other inputs."""
        return (features,)

    @abstractmethod
    def output_samples(self, num_frames: int) -> int:
        """Samples that ``num_frames`` >= 1 frames decode to.

        Raises:
            RowError: the model cannot decode that many.
        """


def round_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def lengthened(lengths: Lengths, length: int, step: int, most: int) -> int:
    """The first of ``length``, ``length + step``, ... that the model can take.

    Raises:
        RunError: none of those up to ``most`` samples longer.
    """
    for candidate in range(length, length + most + 1, step):
        if lengths.frames(candidate):
            return candidate
    raise RunError(f"config.json describes a model that cannot take {length} samples, nor up to {most} more")


@dataclass(frozen=True, slots=True)
class PaddedConvs(Lengths):
    """Mimi, and EnCodec in one piece: every convolution pads its input up to a multiple of its stride."""

    hop: int
    multiple: int = 1

    def input_length(self, num_samples: int) -> int:
        return num_samples

    def frames(self, length: int) -> int:
        return -(-length // self.hop)

    def output_samples(self, num_frames: int) -> int:
        return num_frames * self.hop


@dataclass(frozen=True, slots=True)
class Chunks(Lengths):
    """EnCodec in chunks that overlap. The input is zero-padded as its feature extractor does, so that chunks are full.

    Attributes:
        length: samples of a chunk.
        stride: samples from one chunk's start to the next, at least half of ``length``.
    """

    hop: int
    length: int
    stride: int
    multiple: int = 1

    @property
    def chunk_frames(self) -> int:
        """Frames of a whole chunk."""
        return -(-self.length // self.hop)

    def input_length(self, num_samples: int) -> int:
        return (-(-num_samples // self.stride) - 1) * self.stride + self.length

    def takes(self, length: int) -> bool:
        return length >= self.length and (length - self.length) % self.stride == 0

    def frames(self, length: int) -> int:
        starts = range(0, length, self.stride)
        return sum(-(-min(self.length, length - start) // self.hop) for start in starts)

    def output_samples(self, num_frames: int) -> int:
        full, rest = divmod(num_frames, self.chunk_frames)
        last = rest or self.chunk_frames
        before = full if rest else full - 1
        total = before * self.stride + last * self.hop
        if before and (before - 1) * self.stride + self.chunk_frames * self.hop > total:
            raise RowError(
                "load",
                f"{num_frames} frames end in a chunk of {rest}, which is shorter than its overlap with the one before; "
                f"chunks have {self.chunk_frames} frames",
            )
        return total


@dataclass(frozen=True, slots=True)
class PlainConvs(Lengths):
    """DAC: convolutions that drop what does not fill a stride.

    Attributes:
        encoder, decoder: its strided convolutions in order.
    """

    hop: int
    encoder: tuple[Conv, ...]
    decoder: tuple[Conv, ...]
    multiple: int = 1

    def input_length(self, num_samples: int) -> int:
        return lengthened(self, round_up(num_samples, self.multiple), self.multiple, 2 * self.hop + self.multiple)

    def frames(self, length: int) -> int:
        return through(self.encoder, length)

    def output_samples(self, num_frames: int) -> int:
        return through_transposed(self.decoder, num_frames)


@dataclass(frozen=True, slots=True)
class TwoEncoders(Lengths):
    """X-Codec and the Higgs tokenizer: an acoustic and a semantic encoder whose frames must be equal in number.

    The model pads the acoustic encoder's input where that makes them equal. An input of another length is zero-padded
    by as many samples as it takes.

    Attributes:
        acoustic, decoder: as in ``PlainConvs``.
        margin: zeros that the model puts on both sides of the acoustic encoder's input, where needed.
        resample: the semantic encoder's sample rate over the input's, as a fraction in lowest terms.
        semantic_margin: zeros on both sides of the semantic encoder's input.
        semantic: convolutions of the semantic encoder itself.
        every: every how many-th semantic frame is used.
        adapter: convolutions on semantic frames.
    """

    hop: int
    acoustic: tuple[Conv, ...]
    decoder: tuple[Conv, ...]
    margin: int
    resample: tuple[int, int]
    semantic_margin: int
    semantic: tuple[Conv, ...]
    every: int
    adapter: tuple[Conv, ...]
    multiple: int = 1

    def input_length(self, num_samples: int) -> int:
        return lengthened(self, round_up(num_samples, self.multiple), self.multiple, 8 * self.hop + self.multiple)

    def frames(self, length: int) -> int:
        frames = self._semantic_frames(length)
        acoustic = through(self.acoustic, length)
        if acoustic != frames:
            acoustic = through(self.acoustic, length + 2 * self.margin)
        return frames if acoustic == frames else 0

    def _semantic_frames(self, length: int) -> int:
        numerator, denominator = self.resample
        if numerator != denominator:
            # torchaudio rounds this length in float32.
            length = int(np.ceil(np.float32(numerator * length / denominator)))
        frames = through(self.semantic, length + 2 * self.semantic_margin)
        return through(self.adapter, -(-frames // self.every)) if frames else 0

    def output_samples(self, num_frames: int) -> int:
        return through_transposed(self.decoder, num_frames)
