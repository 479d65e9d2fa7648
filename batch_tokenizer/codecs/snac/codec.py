"""SNAC: ragged codebook levels as one row of 7 or 15 codes for each coarse frame, in Orpheus's order."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from batch_tokenizer.codecs.base import CodecInfo, CodecSpec
from batch_tokenizer.codecs.checkpoint import Checkpoint
from batch_tokenizer.codecs.layers.convolution import weight_norm_name
from batch_tokenizer.codecs.layers.padded import PaddedBatch
from batch_tokenizer.codecs.loading import LoadRequest
from batch_tokenizer.codecs.padded_codec import Codes, PaddedCodec, Samples
from batch_tokenizer.codecs.snac.config import SnacConfig, column_levels
from batch_tokenizer.codecs.snac.model import Snac
from batch_tokenizer.kernels.segments import to_device


def recognises(config: Mapping[str, Any]) -> bool:
    """The published file has the constructor's arguments and no ``model_type``."""
    return "vq_strides" in config and "encoder_rates" in config


@dataclass(frozen=True)
class SnacSpec(CodecSpec):
    """A SNAC checkpoint without its weights. Features are samples (1, L), zero-padded to whole frames and windows.

    Attributes:
        noise_seed: of the decoder's noise, or None for none.
    """

    options = ("noise_seed",)

    batching = "padded"

    info: CodecInfo
    config: SnacConfig
    noise_seed: int | None = None

    #: The model is small, and published codes are float32's.
    cuda_dtype: ClassVar[Literal["float32", "bfloat16"]] = "float32"

    def features(self, samples: Samples) -> Samples:
        return np.pad(np.asarray(samples, dtype=np.float32), (0, -len(samples) % self.config.multiple))[None]

    def is_feature_length(self, length: int) -> bool:
        return length >= 1 and length % self.config.multiple == 0

    def num_frames(self, num_samples: int) -> int:
        padded = math.ceil(num_samples / self.config.multiple) * self.config.multiple
        return padded // self.config.samples_per_frame


def open_spec(checkpoint: Checkpoint) -> SnacSpec:
    """Reads the configuration and samples the weights for the fingerprint.

    Raises:
        RunError: a key of ``config.json`` is absent or out of range, or the weights cannot be read.
    """
    config = checkpoint.parse_config(SnacConfig.from_json)
    columns = column_levels(config.vq_strides)
    info = CodecInfo(
        family="snac",
        name=checkpoint.name,
        sample_rate=config.sampling_rate,
        samples_per_frame=config.samples_per_frame,
        codebook_sizes=(config.codebook_size,) * len(columns),
        fingerprint=checkpoint.fingerprint(),
        columns=tuple(f"level {level}, code {position}" for level, position in columns),
    )
    return SnacSpec(info=info, config=config)


def blank_model(config: Mapping[str, Any]) -> Snac:
    """The whole model of a configuration, whose tensors have no trained values."""
    return Snac(SnacConfig.from_json(config))


def load_codec(request: LoadRequest[SnacSpec]) -> SnacCodec:
    """The codec with the weights that the task needs; the quantizer computes in float32 whatever the dtype.

    Raises:
        RunError: the checkpoint is not what its ``config.json`` implies.
    """
    model, parameters = request.load_folded(lambda parts: Snac(request.spec.config, parts), _rename)
    model.use_dtype(request.dtype)
    return SnacCodec(request.spec, model, request.device, request.threads, parameters=parameters)


def _rename(name: str) -> str | None:
    return None if name.endswith("rel_pos.inv_freq") else weight_norm_name(name)


class SnacCodec(PaddedCodec):
    """A SNAC model behind the codec protocol.

    Codes (T, K) have a row for each coarse frame. Of K' < K columns the codes that are not there add nothing.

    Attributes:
        noise_seed: what the decoder's noise is drawn from, together with an utterance's codes, so that it does not
            depend on the utterance's neighbours; None for no noise, which is what the noise is on average.
    """

    spec: SnacSpec
    model: Snac

    def __init__(self, spec: SnacSpec, model: Snac, device: torch.device, threads: int, *, parameters: int) -> None:
        super().__init__(spec, model, device, threads, parameters=parameters)
        self.noise_seed = spec.noise_seed
        strides = spec.config.vq_strides
        self._per_frame = [strides[0] // stride for stride in strides]
        columns = column_levels(strides)
        #: For each level its columns, in the order of time: on the device, as indexing by a list would copy it there.
        self._columns = [
            torch.tensor(
                sorted((column for column, (of, _) in enumerate(columns) if of == level), key=lambda c: columns[c][1]),
                device="cpu",
            ).to(device)
            for level in range(len(strides))
        ]

    def encode_padded(self, batch: PaddedBatch, num_quantizers: int) -> Tensor:
        levels = self.model.encode(batch)
        rows = levels[0].new_empty((*levels[0].shape, self.info.num_codebooks))
        for codes, columns, count in zip(levels, self._columns, self._per_frame, strict=True):
            rows.index_copy_(2, columns, codes.unflatten(1, (-1, count)))
        return rows[..., :num_quantizers]

    def decode_padded(self, codes: PaddedBatch, utterances: Sequence[Codes]) -> Tensor:
        width = codes.values.shape[1]
        missing = self.info.num_codebooks - width
        rows = torch.nn.functional.pad(codes.values.mT, (0, missing))  # (B, T, K)
        levels, absent = [], []
        for columns in self._columns:
            levels.append(rows.index_select(2, columns).flatten(1))
            lacking = columns >= width
            absent.append(lacking.expand(rows.shape[0], rows.shape[1], -1).flatten(1) if missing else None)
        latent = None if codes.lengths is None else codes.lengths * self.spec.config.vq_strides[0]
        noise = None if self.noise_seed is None else self._noise(utterances, rows.shape[0], rows.shape[1])
        return self.model.decode(levels, latent, absent=absent, noise=noise)

    def _noise(self, utterances: Sequence[Codes], rows: int, size: int) -> list[Tensor]:
        """For each decoder block (B, 1, T): an utterance's own draws, block by block, drawn on the host."""
        config = self.spec.config
        steps = [config.vq_strides[0] * rate for rate in accumulate(config.decoder_rates, mul)]
        noise = [torch.zeros(rows, 1, size * step) for step in steps]
        for row, codes in enumerate(utterances):
            digest = hashlib.blake2b(f"{self.noise_seed} ".encode() + codes.T.tobytes(), digest_size=8).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
            for block, step in zip(noise, steps, strict=True):
                count = codes.shape[1] * step
                block[row, 0, :count] = torch.randn(count, generator=generator)
        return [to_device(block, self.device) for block in noise]
