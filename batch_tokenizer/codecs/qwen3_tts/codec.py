"""Qwen3-TTS-Tokenizer-12Hz: 24 kHz, 12.5 frames a second, 16 codebooks; Mimi's encoder and a decoder of its own."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import numpy as np
import torch
from torch import Tensor

from batch_tokenizer.codecs.base import CodecInfo, CodecSpec
from batch_tokenizer.codecs.checkpoint import Checkpoint
from batch_tokenizer.codecs.layers.padded import PaddedBatch
from batch_tokenizer.codecs.padded_codec import Codes, PaddedCodec, Samples
from batch_tokenizer.codecs.qwen3_tts.config import Qwen3TtsConfig
from batch_tokenizer.codecs.qwen3_tts.model import Qwen3TtsTokenizer
from batch_tokenizer.records import AttentionWindow, DecoderChunks, RunError, Task

log = logging.getLogger(__name__)

_MODEL_TYPE = "qwen3_tts_tokenizer_12hz"
_OTHER_MODEL_TYPE = "qwen3_tts_tokenizer_25hz"

#: Convolutions are wrapped in modules of their own.
_WRAPPER = re.compile(r"\.conv(?=\.(?:weight|bias)$)")

#: Tensors that are in the file and that nothing reads.
_UNUSED = re.compile(
    r"\.codebook\.initialized$|^encoder\.quantizer\..*\.output_proj\.|^decoder\.quantizer\..*\.input_proj\."
)


def recognises(config: Mapping[str, Any]) -> bool:
    """By ``model_type``; the 25 Hz sibling too, to say that it is another model."""
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

    def num_frames(self, num_samples: int) -> int:
        return -(-num_samples // self.config.samples_per_frame)

    def num_output_samples(self, num_frames: int) -> int:
        return num_frames * self.config.samples_per_frame


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
    try:
        config = Qwen3TtsConfig.from_json(checkpoint.config)
    except RunError as error:
        raise RunError(f"{checkpoint.folder}: {error}") from error
    info = CodecInfo(
        family="qwen3_tts",
        name=checkpoint.name,
        sample_rate=config.sample_rate,
        samples_per_frame=config.samples_per_frame,
        codebook_sizes=(config.decoder.codebook_size,) * config.num_quantizers,
        fingerprint=checkpoint.fingerprint(),
    )
    return Qwen3TtsSpec(info=info, config=config)


def load_codec(
    checkpoint: Checkpoint,
    spec: CodecSpec,
    *,
    task: Task,
    device: torch.device,
    dtype: torch.dtype,
    attention: str,
    threads: int,
) -> Qwen3TtsCodec:
    """The weights that ``task`` needs; the encoder and the codebooks are float32 whatever ``dtype``.

    Raises:
        RunError: the checkpoint is not what its ``config.json`` implies.
    """
    spec = cast(Qwen3TtsSpec, spec)
    config = spec.config
    with checkpoint.empty_weights():
        whole = Qwen3TtsTokenizer(config, encoding=config.encoder.num_quantizers)
        part = Qwen3TtsTokenizer(
            config,
            encoding=None if task == "token2wav" else config.num_quantizers,
            decoding=task != "wav2token",
        )
    checkpoint.load(whole, part, device=device, dtype=torch.float32, rename=_rename)
    part.fold()
    if part.encoder is not None and spec.attention_window == "published":
        part.encoder.window = config.encoder.transformer.sliding_window
    if part.decoder is not None:
        part.decoder.to(dtype)
        part.decoder.chunks = spec.decoder_chunks
    return Qwen3TtsCodec(spec, part.eval().requires_grad_(False), device, threads)


def _rename(name: str) -> str | None:
    return None if _UNUSED.search(name) else _WRAPPER.sub("", name)


class Qwen3TtsCodec(PaddedCodec):
    """A Qwen3-TTS-Tokenizer-12Hz model behind the codec protocol. Of fewer codebooks than all the rows are summed."""

    spec: Qwen3TtsSpec

    def __init__(self, spec: Qwen3TtsSpec, model: Qwen3TtsTokenizer, device: torch.device, threads: int = 1) -> None:
        super().__init__(spec, device, threads)
        self.model = model

    def encode_padded(self, batch: PaddedBatch, num_quantizers: int) -> Tensor:
        if self.model.encoder is None:
            raise ValueError("this model was loaded without its encoder")
        codes: Tensor = self.model.encoder(batch, num_quantizers)
        return codes

    def decode_padded(self, codes: PaddedBatch, utterances: Sequence[Codes]) -> Tensor:
        if self.model.decoder is None:
            raise ValueError("this model was loaded without its decoder")
        samples: Tensor = self.model.decoder(codes)
        return samples.float()
