"""NanoCodec (NeMo): 22.05 kHz, 12.5 frames a second, groups of finite scalar quantizers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import numpy as np
import torch
from torch import Tensor

from batch_tokenizer.codecs.base import CodecInfo, CodecSpec
from batch_tokenizer.codecs.checkpoint import Checkpoint
from batch_tokenizer.codecs.layers.convolution import weight_norm_name
from batch_tokenizer.codecs.layers.padded import PaddedBatch
from batch_tokenizer.codecs.nanocodec.config import NanoCodecConfig
from batch_tokenizer.codecs.nanocodec.model import NanoCodec
from batch_tokenizer.codecs.padded_codec import Codes, PaddedCodec, Samples
from batch_tokenizer.records import RunError, Task

#: NeMo wraps each convolution and each activation in modules of their own.
_WRAPPER = re.compile(r"\.conv(?=\.(?:parametrizations|weight|bias))|\.activation\.snake_act(?=\.alpha$)")


def recognises(config: Mapping[str, Any]) -> bool:
    """By NeMo's keys for the three parts of a codec."""
    return all(isinstance(config.get(key), Mapping) for key in ("audio_encoder", "audio_decoder", "vector_quantizer"))


@dataclass(frozen=True)
class NanoCodecSpec(CodecSpec):
    """A NanoCodec checkpoint without its weights. Features are samples (1, L), zero-padded to whole frames."""

    batching = "padded"

    info: CodecInfo
    config: NanoCodecConfig

    #: Rounding to levels is close for many values, and published codes are float32's.
    cuda_dtype: ClassVar[Literal["float32", "bfloat16"]] = "float32"

    def features(self, samples: Samples) -> Samples:
        missing = -len(samples) % self.config.samples_per_frame
        return np.pad(np.asarray(samples, dtype=np.float32), (0, missing))[None]

    def is_feature_length(self, length: int) -> bool:
        return length >= 1 and length % self.config.samples_per_frame == 0

    def num_frames(self, num_samples: int) -> int:
        return -(-num_samples // self.config.samples_per_frame)

    def num_output_samples(self, num_frames: int) -> int:
        return num_frames * self.config.samples_per_frame


def open_spec(checkpoint: Checkpoint) -> NanoCodecSpec:
    """Reads the configuration and samples the weights for the fingerprint.

    Raises:
        RunError: a key of the configuration is absent or out of range, or the weights cannot be read.
    """
    try:
        config = NanoCodecConfig.from_json(checkpoint.config)
    except RunError as error:
        raise RunError(f"{checkpoint.folder}: {error}") from error
    info = CodecInfo(
        family="nanocodec",
        name=checkpoint.name,
        sample_rate=config.sample_rate,
        samples_per_frame=config.samples_per_frame,
        codebook_sizes=(int(np.prod(config.levels)),) * config.num_groups,
        fingerprint=checkpoint.fingerprint(),
    )
    return NanoCodecSpec(info=info, config=config)


def blank_model(config: Mapping[str, Any]) -> NanoCodec:
    """The whole model of a configuration, whose tensors have no trained values."""
    return NanoCodec(NanoCodecConfig.from_json(config))


def load_codec(
    checkpoint: Checkpoint,
    spec: CodecSpec,
    *,
    task: Task,
    device: torch.device,
    dtype: torch.dtype,
    attention: str,
    threads: int,
) -> NanoCodecCodec:
    """The weights that ``task`` needs.

    Raises:
        RunError: the checkpoint is not what its configuration implies.
    """
    spec = cast(NanoCodecSpec, spec)
    with checkpoint.empty_weights():
        whole = NanoCodec(spec.config)
        part = NanoCodec(spec.config, encoder=task != "token2wav", decoder=task != "wav2token")
    checkpoint.load(whole, part, device=device, dtype=torch.float32, rename=_rename)
    part.fold()
    return NanoCodecCodec(spec, part.to(dtype).eval().requires_grad_(False), device, threads)


def _rename(name: str) -> str | None:
    """NeMo's names without wrappers; quantizers have constants only, and the other parts are for training."""
    if name.partition(".")[0] not in ("audio_encoder", "audio_decoder"):
        return None
    return _WRAPPER.sub("", weight_norm_name(name))


class NanoCodecCodec(PaddedCodec):
    """A NanoCodec model behind the codec protocol."""

    spec: NanoCodecSpec

    def __init__(self, spec: NanoCodecSpec, model: NanoCodec, device: torch.device, threads: int = 1) -> None:
        super().__init__(spec, device, threads)
        self.model = model

    def encode_padded(self, batch: PaddedBatch, num_quantizers: int) -> Tensor:
        return self.model.encode(batch)[..., :num_quantizers]

    def decode_padded(self, codes: PaddedBatch, utterances: Sequence[Codes]) -> Tensor:
        return self.model.decode(codes)
