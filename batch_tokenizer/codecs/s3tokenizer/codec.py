"""S3Tokenizer v1, v2 and v3 of CosyVoice: 16 kHz, 25 or 50 frames a second, one codebook; encodes only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch

from batch_tokenizer.audio.mel import whisper_log_mel
from batch_tokenizer.codecs.base import CodecInfo, CodecSpec
from batch_tokenizer.codecs.checkpoint import GRAPHS_KEY, Checkpoint
from batch_tokenizer.codecs.execution import codes_to_host
from batch_tokenizer.codecs.loading import LoadRequest, log_attention
from batch_tokenizer.codecs.packed_codec import PackedCodec
from batch_tokenizer.codecs.s3tokenizer.config import SAMPLE_RATE, VERSIONS, S3Config
from batch_tokenizer.codecs.s3tokenizer.model import DEFAULT_CAPACITY, S3Tokenizer
from batch_tokenizer.codecs.s3tokenizer.published import is_published_graph, open_graph
from batch_tokenizer.records import Downmix, RowError, RunError, WindowMerge

Samples = npt.NDArray[np.float32]
Codes = npt.NDArray[np.uint16]


def recognises(config: Mapping[str, Any]) -> bool:
    """A folder whose configuration has one of the published names, or that has a published graph."""
    return config.get("name") in list(VERSIONS) or any(map(is_published_graph, config.get(GRAPHS_KEY, ())))


@dataclass(frozen=True)
class S3Spec(CodecSpec):
    """An S3Tokenizer checkpoint without its weights. Features are log-mel spectra, (n_mels, L).

    Attributes:
        window_merge: how the tokens of windows are merged where audio is longer than 30 s; ``S3Config.windows``.
    """

    options = ("window_merge",)

    #: As the published code takes it.
    downmix: ClassVar[Downmix] = "first"

    #: 16 bits change codes, and the published graphs compute in 32.
    cuda_dtype: ClassVar[Literal["float32", "bfloat16"]] = "float32"

    batching = "packed"

    info: CodecInfo
    config: S3Config
    window_merge: WindowMerge = "complete"

    def features(self, samples: Samples) -> Samples:
        return whisper_log_mel(samples, self.config.n_mels)

    def num_frames(self, num_samples: int) -> int:
        return self.config.num_frames(num_samples, self.window_merge)

    def num_output_samples(self, num_frames: int) -> int:
        raise RowError("load", f"{self.info.name}: S3Tokenizer has no decoder; its codes become audio in CosyVoice")


def open_spec(checkpoint: Checkpoint) -> S3Spec:
    """Reads the configuration, or derives it from the graph, and samples the weights for the fingerprint.

    Raises:
        RunError: the configuration or the graph is not that of an S3Tokenizer, or the weights cannot be read.
    """
    opened, config = _opened(checkpoint)
    info = CodecInfo(
        family="s3tokenizer",
        name=checkpoint.name,
        sample_rate=SAMPLE_RATE,
        samples_per_frame=config.samples_per_frame,
        codebook_sizes=(config.n_codebook_size,),
        # Over what the model computes, so that a graph and a folder made of it have one fingerprint.
        fingerprint=replace(opened, config=asdict(config)).fingerprint(),
    )
    return S3Spec(info=info, config=config)


def blank_model(config: Mapping[str, Any]) -> S3Tokenizer:
    """The whole model of a configuration, whose tensors have no trained values."""
    return S3Tokenizer(S3Config.from_json(config))


def load_codec(request: LoadRequest[S3Spec]) -> S3Codec:
    """The encoder.

    Raises:
        RunError: the task needs a decoder, the checkpoint is not what its configuration implies, or the attention
            backend cannot run here.
    """
    if request.task != "wav2token":
        raise RunError(
            f"{request.checkpoint.folder}: S3Tokenizer encodes only (--task wav2token); its codes become audio in "
            "CosyVoice"
        )
    opened, config = _opened(request.checkpoint)
    head_size = config.n_audio_state // config.n_audio_head
    log_attention({"encoder": head_size}, request.attention, request.device, request.dtype)
    with opened.empty_weights():
        model = S3Tokenizer(config, request.spec.window_merge)
    opened.load(model, model, device=request.device, dtype=request.dtype)
    model.encoder.attention = request.attention
    return S3Codec(request.spec, model.requires_grad_(False).eval(), request.threads)


class S3Codec(PackedCodec):
    """An S3Tokenizer behind the codec protocol; ``threads`` as in ``BatchRunner``."""

    spec: S3Spec
    model: S3Tokenizer

    def __init__(self, spec: S3Spec, model: S3Tokenizer, threads: int = 1) -> None:
        super().__init__(spec, model, threads, DEFAULT_CAPACITY)

    def encode_batch(self, features: Sequence[Samples], num_quantizers: int) -> list[Codes]:
        mels = [torch.from_numpy(feature) for feature in features]
        codes = self.run_model(self.model.encode_utterances, mels, axis=1, frame=self.model.config.stride * 2)
        return codes_to_host(codes)

    def decode_batch(self, codes: Sequence[Codes]) -> list[Samples]:
        raise RowError("decode", "S3Tokenizer has no decoder")


def _opened(checkpoint: Checkpoint) -> tuple[Checkpoint, S3Config]:
    """The checkpoint whose ``tensors`` have the package's names, and its configuration."""
    graphs = checkpoint.config.get(GRAPHS_KEY, ())
    if graphs:
        return open_graph(checkpoint)
    config = checkpoint.parse_config(S3Config.from_json)
    has_key_bias = "encoder.blocks.0.attn.key.bias" in checkpoint.names()
    return checkpoint, replace(config, key_bias=has_key_bias)
