"""WavTokenizer in the layout of transformers: one codebook, 40 or 75 codes a second, a Vocos decoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, cast

import numpy as np
import torch
from torch import Tensor

from batch_tokenizer.codecs.base import CodecInfo, CodecSpec
from batch_tokenizer.codecs.checkpoint import Checkpoint
from batch_tokenizer.codecs.layers.convolution import weight_norm_name
from batch_tokenizer.codecs.layers.padded import PaddedBatch
from batch_tokenizer.codecs.padded_codec import Codes, PaddedCodec, Samples
from batch_tokenizer.codecs.wavtokenizer.config import WavTokenizerConfig
from batch_tokenizer.codecs.wavtokenizer.model import WavTokenizer
from batch_tokenizer.records import RunError, Task

#: Statistics of training that are stored beside the codebook.
_UNUSED = ("embed_avg", "cluster_size", "inited")


def recognises(config: Mapping[str, Any]) -> bool:
    """By ``model_type``."""
    return config.get("model_type") == "wavtokenizer"


@dataclass(frozen=True)
class WavTokenizerSpec(CodecSpec):
    """A WavTokenizer checkpoint without its weights. Features are samples (1, S), scaled where it says so."""

    batching = "padded"

    info: CodecInfo
    config: WavTokenizerConfig

    #: The one codebook has close neighbours, and published codes are float32's.
    cuda_dtype: ClassVar[Literal["float32", "bfloat16"]] = "float32"

    def features(self, samples: Samples) -> Samples:
        samples = np.asarray(samples, dtype=np.float32)
        if self.config.target_peak is not None:
            samples = samples * (self.config.target_peak / max(float(np.abs(samples).max()), 1e-10))
        return samples[None]

    @property
    def needs_whole_utterances(self) -> bool:
        return self.config.target_peak is not None

    def num_frames(self, num_samples: int) -> int:
        return -(-num_samples // self.config.hop)

    def num_output_samples(self, num_frames: int) -> int:
        return num_frames * self.config.hop


def open_spec(checkpoint: Checkpoint) -> WavTokenizerSpec:
    """Reads the configuration and samples the weights for the fingerprint.

    Raises:
        RunError: a key of ``config.json`` or ``preprocessor_config.json`` is wrong, or the weights cannot be read.
    """
    try:
        config = WavTokenizerConfig.from_json(checkpoint.config, checkpoint.preprocessor())
    except RunError as error:
        raise RunError(f"{checkpoint.folder}: {error}") from error
    known = checkpoint
    if config.target_peak is not None:  # another file says so, and tokens depend on it
        known = replace(checkpoint, config={**checkpoint.config, "target_peak": config.target_peak})
    info = CodecInfo(
        family="wavtokenizer",
        name=checkpoint.name,
        sample_rate=config.sampling_rate,
        samples_per_frame=config.hop,
        codebook_sizes=(config.codebook_size,),
        fingerprint=known.fingerprint(),
    )
    return WavTokenizerSpec(info=info, config=config)


def blank_model(config: Mapping[str, Any]) -> WavTokenizer:
    """The whole model of a configuration, whose tensors have no trained values."""
    return WavTokenizer(WavTokenizerConfig.from_json(config, {}))


def load_codec(
    checkpoint: Checkpoint,
    spec: CodecSpec,
    *,
    task: Task,
    device: torch.device,
    dtype: torch.dtype,
    attention: str,
    threads: int,
) -> WavTokenizerCodec:
    """The weights that ``task`` needs.

    Raises:
        RunError: the checkpoint is not what its ``config.json`` implies.
    """
    spec = cast(WavTokenizerSpec, spec)
    with checkpoint.empty_weights():
        whole = WavTokenizer(spec.config)
        part = WavTokenizer(spec.config, encoder=task != "token2wav", decoder=task != "wav2token")
    checkpoint.load(whole, part, device=device, dtype=torch.float32, rename=_rename)
    part.fold()
    return WavTokenizerCodec(spec, part.to(dtype).eval().requires_grad_(False), device, threads)


def _rename(name: str) -> str | None:
    inner = weight_norm_name(name.removeprefix("encoder_model."))
    if not inner.startswith("quantizer.codebook."):
        return inner
    tensor = inner.removeprefix("quantizer.codebook.")
    return None if tensor in _UNUSED else "codebook.weight" if tensor == "embed" else inner


class WavTokenizerCodec(PaddedCodec):
    """A WavTokenizer model behind the codec protocol."""

    spec: WavTokenizerSpec

    def __init__(self, spec: WavTokenizerSpec, model: WavTokenizer, device: torch.device, threads: int = 1) -> None:
        super().__init__(spec, device, threads)
        self.model = model

    def encode_padded(self, batch: PaddedBatch, num_quantizers: int) -> Tensor:
        return self.model.encode(batch)

    def decode_padded(self, codes: PaddedBatch, utterances: Sequence[Codes]) -> Tensor:
        return self.model.decode(codes)
