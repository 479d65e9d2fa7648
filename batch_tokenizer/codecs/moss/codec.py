"""MOSS-Audio-Tokenizer v1, v2 and Nano: 24 or 48 kHz, 12.5 frames a second, 16 or 32 codebooks; exact streams."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from batch_tokenizer.audio.loudness import moss_tts_loudness
from batch_tokenizer.codecs.base import CodecInfo, CodecSpec, as_channels, check_codes
from batch_tokenizer.codecs.checkpoint import Checkpoint
from batch_tokenizer.codecs.execution import codes_to_host, to_host
from batch_tokenizer.codecs.layers.convolution import weight_norm_name
from batch_tokenizer.codecs.loading import LoadRequest, load_parts, log_attention
from batch_tokenizer.codecs.moss.config import MossConfig, TransformerStage
from batch_tokenizer.codecs.moss.layers import Stream
from batch_tokenizer.codecs.moss.model import DEFAULT_CAPACITY, MossAudioTokenizer, interleave
from batch_tokenizer.codecs.moss.streaming import decode_stream, encode_stream
from batch_tokenizer.codecs.packed_codec import PackedCodec
from batch_tokenizer.records import Loudness

Samples = npt.NDArray[np.float32]
Codes = npt.NDArray[np.uint16]
Hidden = npt.NDArray[np.float16]


#: Other names of the same tensors, in v2 and in older checkpoints: patterns and their replacements.
_ALIASES = (
    (re.compile(r"\.self_attn\.(in|out)_proj(?:_weight|\.weight)$"), r".self_attn.\1_projs.0.weight"),
    (re.compile(r"\.ffn\.0\.weight$"), ".linear1.weight"),
    (re.compile(r"\.ffn\.2\.weight$"), ".linear2.weight"),
)


def recognises(config: Mapping[str, Any]) -> bool:
    """A MOSS checkpoint lists its stages. (The conversion to transformers' own classes does not, and is not this.)"""
    keys = ("encoder_kwargs", "decoder_kwargs", "reversed_decoder_kwargs")
    return any(isinstance(config.get(key), list) for key in keys)


@dataclass(frozen=True)
class MossSpec(CodecSpec):
    """A MOSS checkpoint without its weights. Features are the samples themselves, (channels, S).

    Attributes:
        loudness: normalisation of an utterance's level before encoding; ``moss_tts`` as in MOSS-TTS's training data.
    """

    options = ("loudness", "hidden_states")

    batching = "packed"

    info: CodecInfo
    config: MossConfig
    loudness: Loudness = "none"
    hidden_states: bool = False
    streams = True

    @property
    def needs_whole_utterances(self) -> bool:
        return self.loudness != "none"

    def features(self, samples: Samples) -> Samples:
        channels = as_channels(samples, self.info.channels)
        return channels if self.loudness == "none" else moss_tts_loudness(channels)


def open_spec(checkpoint: Checkpoint) -> MossSpec:
    """Reads the configuration and samples the weights for the fingerprint.

    Raises:
        RunError: a key of ``config.json`` is absent or out of range, or the weights cannot be read.
    """
    config = checkpoint.parse_config(MossConfig.from_json)
    quantizer = config.quantizer
    info = CodecInfo(
        family="moss",
        name=checkpoint.name,
        sample_rate=config.sampling_rate,
        samples_per_frame=config.downsample_rate,
        codebook_sizes=(quantizer.codebook_size,) * quantizer.num_quantizers,
        fingerprint=checkpoint.fingerprint(),
        channels=config.channels,
    )
    return MossSpec(info=info, config=config)


def load_model(
    checkpoint: Checkpoint,
    *,
    parts: Sequence[str] = ("encoder", "decoder"),
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> MossAudioTokenizer:
    """The model with ``parts`` of its weights and the quantizer, frozen.

    Raises:
        RunError: the checkpoint is not what its ``config.json`` implies; the message names what is wrong.
    """
    config = checkpoint.parse_config(MossConfig.from_json)
    stored = checkpoint.names()

    def build(some: Sequence[str]) -> MossAudioTokenizer:
        model = MossAudioTokenizer(config, parts=some)
        model.add_projections(stored)
        return model

    model = load_parts(checkpoint, build, parts, device=device, dtype=dtype, rename=_rename)
    model.quantizer.fold()
    return model


def blank_model(config: Mapping[str, Any]) -> MossAudioTokenizer:
    """The whole model of a configuration, whose tensors have no trained values."""
    return MossAudioTokenizer(MossConfig.from_json(config))


def load_codec(request: LoadRequest[MossSpec]) -> MossCodec:
    """The codec with the weights that the task needs.

    Raises:
        RunError: the checkpoint is not what its ``config.json`` implies, or the attention backend cannot run here.
    """
    config = request.spec.config
    stages = [stage for stage in (*config.encoder, *config.decoder) if isinstance(stage, TransformerStage)]
    sizes = sorted({stage.d_model // stage.num_heads for stage in stages})
    named = {f"stages with heads of {size}": size for size in sizes}
    log_attention(named, request.attention, request.device, request.dtype)
    model = load_model(request.checkpoint, parts=request.parts, device=request.device, dtype=request.dtype)
    model.use_attention(request.attention)
    return MossCodec(request.spec, model, request.threads)


class MossCodec(PackedCodec):
    """A MOSS model behind the codec protocol, and its streams.

    Utterances longer than ``MossAudioTokenizer.stream_above`` are computed alone and in pieces, so ``encode`` and
    ``decode`` take any length; their activations need no more memory than that many frames do.
    """

    spec: MossSpec
    model: MossAudioTokenizer

    def __init__(self, spec: MossSpec, model: MossAudioTokenizer, threads: int = 1) -> None:
        super().__init__(spec, model, threads, DEFAULT_CAPACITY // spec.info.channels)

    def encode_batch(self, features: Sequence[Samples], num_quantizers: int) -> list[Codes]:
        return codes_to_host([codes for codes, _ in self._encode(features, num_quantizers)])

    def encode_hidden_batch(self, features: Sequence[Samples], num_quantizers: int) -> tuple[list[Codes], list[Hidden]]:
        codes, hidden_states = zip(*self._encode(features, num_quantizers), strict=True)
        return codes_to_host(codes), to_host(hidden_states, torch.float16)

    def _encode(self, features: Sequence[Samples], num_quantizers: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        samples = [interleave(torch.from_numpy(feature)) for feature in features]
        return self.run_model(lambda batch: self.model.encode_utterances_hidden(batch, num_quantizers), samples, axis=0)

    def decode_batch(self, codes: Sequence[Codes]) -> list[Samples]:
        tensors = [torch.from_numpy(code.astype(np.int64)) for code in codes]
        return self._channels(self.run_model(self.model.decode_utterances, tensors, axis=0))

    def encode_stream(
        self, chunks: Iterable[Sequence[Samples | None]], num_quantizers: int | None = None
    ) -> Iterator[list[Codes]]:
        """Encodes several utterances as their samples arrive.

        Args:
            chunks: a list a step, for each utterance its next samples float32 (n_i,), or (channels, n_i) of a stereo
                model, n_i >= 0, or None from when it has ended. The first step sets the number of utterances.
            num_quantizers: codebooks to use; None for all.

        Yields:
            a list a step, for each utterance codes uint16 (t_i, ``num_quantizers``) of the frames that are complete.
            An utterance's last frame is zero-padded and returned when its end is known; utterances that end with
            ``chunks`` itself get it in one more step. All steps together equal ``encode`` of the whole.

        Raises:
            ValueError: the number of utterances changes, one goes on after its end, or one ends without any samples;
                or ``loudness`` is set, which needs whole utterances.
        """
        if self.spec.loudness != "none":
            raise ValueError("loudness is of whole utterances: set the level before streaming, and no loudness here")
        channels = self.info.channels
        steps = ([None if chunk is None else _samples(chunk, channels) for chunk in step] for step in chunks)
        for codes in encode_stream(self.model, steps, num_quantizers or self.info.num_codebooks):
            yield codes_to_host(codes)

    def decode_stream(self, chunks: Iterable[Sequence[Codes | None]]) -> Iterator[list[Samples]]:
        """Decodes several utterances as their codes arrive.

        Args:
            chunks: a list a step, for each utterance its next codes uint16 (t_i, K_i), t_i >= 0, or None from when it
                has ended. The first step sets the number of utterances.

        Yields:
            a list a step, for each utterance samples float32 (t_i · samples per frame,), or (channels, …). All steps
            together equal ``decode`` of the whole within 1e-5 in float32.

        Raises:
            ValueError: the number of utterances changes, one goes on after its end, or a code is out of range.
        """
        steps = (
            [None if code is None else self._codes(code, index) for index, code in enumerate(step)] for step in chunks
        )
        for samples in decode_stream(self.model, steps):
            yield self._channels(samples)

    def open_stream(self) -> MossStream:
        return MossStream(self)

    def _channels(self, interleaved: Sequence[torch.Tensor]) -> list[Samples]:
        """Interleaved samples (n · channels,) each as (n,), or as (channels, n) of a stereo model."""
        arrays = to_host(interleaved, torch.float32)
        channels = self.info.channels
        return arrays if channels == 1 else [np.ascontiguousarray(one.reshape(-1, channels).T) for one in arrays]

    def _codes(self, code: Codes, index: int) -> torch.Tensor:
        check_codes(code, self.info.codebook_sizes, f"utterance {index}", least=0)
        return torch.from_numpy(code.astype(np.int64))


class MossStream:
    """A ``CodecStream``. Pieces of ``stream_above`` frames give the bits that ``MossCodec.encode`` gives."""

    def __init__(self, codec: MossCodec) -> None:
        self._codec = codec
        self._encoding, self._decoding = Stream(), Stream()

    def encode(self, features: Sequence[Samples], num_quantizers: int) -> list[Codes]:
        return self.encode_hidden(features, num_quantizers)[0]

    def encode_hidden(self, features: Sequence[Samples], num_quantizers: int) -> tuple[list[Codes], list[Hidden]]:
        (feature,) = features
        with torch.inference_mode():
            samples = interleave(torch.from_numpy(feature))
            ((codes, hidden),) = self._codec.model.encode_streams_hidden([self._encoding], [samples], num_quantizers)
            return codes_to_host([codes]), to_host([hidden], torch.float16)

    def decode(self, codes: Sequence[Codes]) -> list[Samples]:
        (code,) = codes
        with torch.inference_mode():
            checked = self._codec._codes(code, 0)
            return self._codec._channels(self._codec.model.decode_streams([self._decoding], [checked]))


def _samples(chunk: Samples, channels: int) -> torch.Tensor:
    """Samples (n,) or (channels, n), interleaved."""
    return interleave(torch.from_numpy(as_channels(chunk, channels)))


def _rename(name: str) -> str:
    for pattern, meant in _ALIASES:
        name = pattern.sub(meant, name)
    return weight_norm_name(name)
