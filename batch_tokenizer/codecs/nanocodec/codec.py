"""NanoCodec (NeMo): 22.05 kHz, 12.5 frames a second, groups of finite scalar quantizers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from batch_tokenizer.codecs.base import CodecInfo, CodecSpec
from batch_tokenizer.codecs.checkpoint import Checkpoint
from batch_tokenizer.codecs.layers.convolution import weight_norm_name
from batch_tokenizer.codecs.loading import LoadRequest
from batch_tokenizer.codecs.nanocodec.config import NanoCodecConfig
from batch_tokenizer.codecs.nanocodec.model import NanoCodec
from batch_tokenizer.codecs.padded_codec import PaddedCodec, Samples

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


def open_spec(checkpoint: Checkpoint) -> NanoCodecSpec:
    """Reads the configuration and samples the weights for the fingerprint.

    Raises:
        RunError: a key of the configuration is absent or out of range, or the weights cannot be read.
    """
    config = checkpoint.parse_config(NanoCodecConfig.from_json)
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


def load_codec(request: LoadRequest[NanoCodecSpec]) -> PaddedCodec:
    """The codec with the weights that the task needs.

    Raises:
        RunError: the checkpoint is not what its configuration implies.
    """
    model, parameters = request.load_folded(lambda parts: NanoCodec(request.spec.config, parts), _rename)
    model = model.to(request.dtype)
    return PaddedCodec(request.spec, model, request.device, request.threads, parameters=parameters)


def _rename(name: str) -> str | None:
    """NeMo's names without wrappers; quantizers have constants only, and the other parts are for training."""
    if name.partition(".")[0] not in ("audio_encoder", "audio_decoder"):
        return None
    return _WRAPPER.sub("", weight_norm_name(name))
