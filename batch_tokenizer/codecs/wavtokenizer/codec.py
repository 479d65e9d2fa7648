"""WavTokenizer in the layout of transformers: one codebook, 40 or 75 codes a second, a Vocos decoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np

from batch_tokenizer.codecs.base import CodecInfo, CodecSpec
from batch_tokenizer.codecs.checkpoint import Checkpoint
from batch_tokenizer.codecs.layers.convolution import weight_norm_name
from batch_tokenizer.codecs.loading import LoadRequest
from batch_tokenizer.codecs.padded_codec import PaddedCodec, Samples
from batch_tokenizer.codecs.wavtokenizer.config import WavTokenizerConfig
from batch_tokenizer.codecs.wavtokenizer.model import WavTokenizer

#: Statistics of training that are stored beside the codebook.
_UNUSED = ("embed_avg", "cluster_size", "inited")


def recognises(config: Mapping[str, Any]) -> bool:
    """By ``model_type``."""
    return config.get("model_type") == "wavtokenizer"


@dataclass(frozen=True)
class WavTokenizerSpec(CodecSpec):
    """A WavTokenizer checkpoint without its weights. Features are samples (1, S), scaled to ``target_peak`` if set."""

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


def open_spec(checkpoint: Checkpoint) -> WavTokenizerSpec:
    """Reads the configuration and samples the weights for the fingerprint.

    Raises:
        RunError: a key of ``config.json`` or ``preprocessor_config.json`` is wrong, or the weights cannot be read.
    """
    preprocessor = checkpoint.preprocessor()
    config = checkpoint.parse_config(lambda keys: WavTokenizerConfig.from_json(keys, preprocessor))
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


def load_codec(request: LoadRequest[WavTokenizerSpec]) -> PaddedCodec:
    """The codec with the weights that the task needs.

    Raises:
        RunError: the checkpoint is not what its ``config.json`` implies.
    """
    model, parameters = request.load_folded(lambda parts: WavTokenizer(request.spec.config, parts), _rename)
    model = model.to(request.dtype)
    return PaddedCodec(request.spec, model, request.device, request.threads, parameters=parameters)


def _rename(name: str) -> str | None:
    inner = weight_norm_name(name.removeprefix("encoder_model."))
    if not inner.startswith("quantizer.codebook."):
        return inner
    tensor = inner.removeprefix("quantizer.codebook.")
    return None if tensor in _UNUSED else "codebook.weight" if tensor == "embed" else inner
