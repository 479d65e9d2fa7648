"""``PaddedCodec``: the shared codec class of models that take padded batches (``layers/``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from batch_tokenizer.codecs.base import Codec, CodecSpec
from batch_tokenizer.codecs.execution import PaddedRunner, codes_to_host, to_host
from batch_tokenizer.codecs.layers.padded import PaddedBatch

Samples = npt.NDArray[np.float32]
Codes = npt.NDArray[np.uint16]

#: Seconds of audio that a device computes at once, padding included.
SECONDS_AT_ONCE = 96

#: Parameters below which calling operators takes a CPU longer than computing them: only then does a batch pay there.
SMALL_MODEL = 5_000_000

#: Frames of a small model's batch on a CPU.
SMALL_MODEL_FRAMES = 256


class PaddedCodec(Codec):
    """A model that encodes and decodes padded batches exactly, behind the codec protocol.

    Its features are samples (1, L), padded by ``CodecSpec.features``. Utterances are computed in batches of fixed
    shapes (``PaddedRunner``), on a CPU only those of small models, as batches of larger ones are slower there than one
    utterance after the other (``docs/performance.md``).

    Args:
        model: has ``encode(batch, num_quantizers)`` and ``decode(codes)`` as ``encode_padded`` and ``decode_padded``,
            which a family may have of its own instead.
        parameters: of the whole model, not of the parts that a task needs, so that all tasks compute in one way and
            their results have the same bits. None where a CPU shall compute each utterance alone whatever the size.
        equal_lengths: for models that padding cannot be exact with: only utterances of one length share a batch.
    """

    def __init__(
        self,
        spec: CodecSpec,
        model: Any,
        device: torch.device,
        threads: int,
        *,
        parameters: int | None,
        equal_lengths: bool = False,
    ) -> None:
        self.spec = spec
        self.model = model
        self.device = device
        frames = max(64, round(SECONDS_AT_ONCE * spec.info.frame_rate))
        if device.type == "cpu":
            frames = SMALL_MODEL_FRAMES if parameters is not None and parameters < SMALL_MODEL else 0
        self._run = PaddedRunner(device, threads, frames, equal_lengths=equal_lengths)
        self.batch_limit = self._run.batch_limit
        self.frame_budget = max(8192, 8 * frames)  # so many that sizes fill their rows

    def encode_padded(self, batch: PaddedBatch, num_quantizers: int) -> Tensor:
        """Samples (B, 1, L) of the utterances to codes int64 (B, T, ``num_quantizers``)."""
        codes: Tensor = self.model.encode(batch, num_quantizers)
        return codes

    def decode_padded(self, codes: PaddedBatch, utterances: Sequence[Codes]) -> Tensor:
        """Codes int64 (B, K, T) to samples float32 (B, S).

        Args:
            codes: on the device.
            utterances: the first rows' codes (K, T_i), on the host.
        """
        samples: Tensor = self.model.decode(codes)
        return samples

    def frames_of(self, length: int) -> int:
        """Token frames of features of ``length`` samples."""
        return self.spec.num_frames(length)

    @property
    def batch_frames(self) -> int:
        """Frames of a padded batch, at most; 0 where each utterance is computed alone."""
        return self._run.frames

    @batch_frames.setter
    def batch_frames(self, frames: int) -> None:
        self._run.frames = frames

    def encode_batch(self, features: Sequence[Samples], num_quantizers: int) -> list[Codes]:
        def compute(members: list[Tensor], size: int | None, rows: int | None) -> list[Tensor]:
            samples = None if size is None else size * self.info.samples_per_frame
            batch = PaddedBatch.join(members, device=self.device, size=samples, rows=rows)
            codes = self.encode_padded(batch, num_quantizers)
            frames = [self.frames_of(member.shape[1]) for member in members]
            return [row[:count] for row, count in zip(codes, frames, strict=False)]

        tensors = [torch.from_numpy(array) for array in features]
        done = self._run(compute, tensors, _length, unit=self.info.samples_per_frame)
        return codes_to_host(done)

    def decode_batch(self, codes: Sequence[Codes]) -> list[Samples]:
        results: dict[int, Samples] = {}
        for width in sorted({code.shape[1] for code in codes}):  # one number of codebooks at a time
            chosen = [index for index, code in enumerate(codes) if code.shape[1] == width]
            for index, samples in zip(chosen, self._decode([codes[index] for index in chosen]), strict=True):
                results[index] = samples
        return [results[index] for index in range(len(codes))]

    def _decode(self, codes: Sequence[Codes]) -> list[Samples]:
        def compute(members: list[Tensor], size: int | None, rows: int | None) -> list[Tensor]:
            batch = PaddedBatch.join(members, device=self.device, size=size, rows=rows)
            samples = self.decode_padded(batch, [member.numpy().astype(np.uint16) for member in members])
            lengths = [self.spec.num_output_samples(member.shape[1]) for member in members]
            return [row[:length] for row, length in zip(samples, lengths, strict=False)]

        tensors = [torch.from_numpy(code.T.astype(np.int64)) for code in codes]
        return to_host(self._run(compute, tensors, _length), torch.float32)

    def release(self) -> None:
        super().release()
        if self.device.type == "cuda":
            self._run.shrink()


def _length(member: Tensor) -> int:
    return member.shape[1]
