"""Qwen3-TTS-Tokenizer-12Hz: 24 kHz, 12.5 frames a second, 16 codebooks; Mimi's encoder and a decoder of its own."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from batch_tokenizer.codecs.base import CodecInfo, CodecSpec
from batch_tokenizer.codecs.checkpoint import Checkpoint
from batch_tokenizer.codecs.loading import LoadRequest
from batch_tokenizer.codecs.padded_codec import PaddedCodec, Samples
from batch_tokenizer.codecs.qwen3_tts.config import Qwen3TtsConfig
from batch_tokenizer.codecs.qwen3_tts.model import Qwen3TtsTokenizer
from batch_tokenizer.records import AttentionWindow, DecoderChunks, RunError

_MODEL_TYPE = "qwen3_tts_tokenizer_12hz"
_OTHER_MODEL_TYPE = "qwen3_tts_tokenizer_25hz"

#: Convolutions are wrapped in modules of their own.
_WRAPPER = re.compile(r"\.conv(?=\.(?:weight|bias)$)")

#: Tensors that are in the file and that nothing reads.
_UNUSED = re.compile(
    r"\.codebook\.initialized$|^encoder\.quantizer\..*\.output_proj\.|^decoder\.quantizer\..*\.input_proj\."
)


def recognises(config: Mapping[str, Any]) -> bool:
    """By ``model_type``; also the 25 Hz model, which ``open_spec`` refuses by name."""
    return config.get("model_type") in (_MODEL_TYPE, _OTHER_MODEL_TYPE)


@dataclass(frozen=True)
class Qwen3TtsSpec(CodecSpec):
    """A Qwen3-TTS-Tokenizer-12Hz checkpoint without its weights. Features are the samples, (1, S).

    Attributes:
        attention_window: whether the encoder's queries see all earlier frames, as in the published code that makes
            training data, or those within the configuration's ``sliding_window``, as with flash attention.
        decoder_chunks: whether utterances above 24 s are decoded as if in one pass, or in the published chunks.
    """

    options = ("attention_window", "decoder_chunks")

    batching = "padded"

    info: CodecInfo
    config: Qwen3TtsConfig
    attention_window: AttentionWindow = "full"
    decoder_chunks: DecoderChunks = "exact"

    #: Encoding in 16 bits changes codes.
    cuda_dtype: ClassVar[Literal["float32", "bfloat16"]] = "float32"

    def features(self, samples: Samples) -> Samples:
        return np.asarray(samples, dtype=np.float32)[None]


def open_spec(checkpoint: Checkpoint) -> Qwen3TtsSpec:
    """Reads the configuration and samples the weights for the fingerprint.

    Raises:
        RunError: it is the 25 Hz model, a key of ``config.json`` is absent or out of range, or the weights cannot be
            read.
    """
    if checkpoint.config.get("model_type") == _OTHER_MODEL_TYPE:
        raise RunError(
            f"{checkpoint.folder}: {_OTHER_MODEL_TYPE} is another model, whose decoder needs a speaker's embedding and "
            f"spectrum beside the codes; only {_MODEL_TYPE} can be used here"
        )
    config = checkpoint.parse_config(Qwen3TtsConfig.from_json)
    info = CodecInfo(
        family="qwen3_tts",
        name=checkpoint.name,
        sample_rate=config.sample_rate,
        samples_per_frame=config.samples_per_frame,
        codebook_sizes=(config.decoder.codebook_size,) * config.num_quantizers,
        fingerprint=checkpoint.fingerprint(),
    )
    return Qwen3TtsSpec(info=info, config=config)


def blank_model(config: Mapping[str, Any]) -> Qwen3TtsTokenizer:
    """The whole model of a configuration, whose tensors have no trained values."""
    checked = Qwen3TtsConfig.from_json(config)
    return Qwen3TtsTokenizer(checked, codebooks=checked.encoder.num_quantizers)


def load_codec(request: LoadRequest[Qwen3TtsSpec]) -> PaddedCodec:
    """The codec with the weights that the task needs; the encoder and the codebooks are float32 whatever the dtype.

    Raises:
        RunError: the checkpoint is not what its ``config.json`` implies.
    """
    config = request.spec.config
    model, parameters = request.load_folded(
        lambda parts: Qwen3TtsTokenizer(config, parts),
        _rename,
        whole=lambda: Qwen3TtsTokenizer(config, codebooks=config.encoder.num_quantizers),
    )
    if model.encoder is not None and request.spec.attention_window == "published":
        model.encoder.window = config.encoder.transformer.sliding_window
    if model.decoder is not None:
        model.decoder.to(request.dtype)
        model.decoder.chunks = request.spec.decoder_chunks
    return PaddedCodec(request.spec, model, request.device, request.threads, parameters=parameters)


def _rename(name: str) -> str | None:
    return None if _UNUSED.search(name) else _WRAPPER.sub("", name)
