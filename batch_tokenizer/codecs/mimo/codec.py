"""MiMo-Audio-Tokenizer: 24 kHz, 25 frames a second, 20 codebooks; the bundled model is a small one."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from batch_tokenizer.audio.mel import log_mel
from batch_tokenizer.codecs.base import CodecInfo, CodecSpec, Computation, Computed
from batch_tokenizer.codecs.checkpoint import Checkpoint
from batch_tokenizer.codecs.execution import StageClock, ToHost, codes_to_host, to_host
from batch_tokenizer.codecs.loading import LoadRequest, load_parts, log_attention
from batch_tokenizer.codecs.mimo.config import MiMoConfig
from batch_tokenizer.codecs.mimo.layers import CompilationFailed
from batch_tokenizer.codecs.mimo.model import DEFAULT_CAPACITY, MiMoAudioTokenizer
from batch_tokenizer.codecs.packed_codec import PackedCodec
from batch_tokenizer.records import Stage, Task

log = logging.getLogger(__name__)

#: Prefix of every parameter's name in some exports.
PREFIX = "audio_tokenizer."

#: Parameters from which on the layers are compiled on CUDA; smaller models would take longer to compile than they run.
COMPILED_SIZE = 100_000_000

_WITHOUT_EFFECT = ("_codebook.embed_avg", "_codebook.cluster_size", "_codebook.inited")


def recognises(config: Mapping[str, Any]) -> bool:
    """By ``model_type``, or by keys that no other family has."""
    return config.get("model_type") == "mimo_audio_tokenizer" or any(
        key in config for key in ("encoder_skip_layer_id", "vocoder_num_layers", "avg_pooler")
    )


@dataclass(frozen=True)
class MiMoSpec(CodecSpec):
    """A MiMo checkpoint without its weights.

    Attributes:
        front_end: where log-mel spectra are made. Features are these, (n_mels, L), or with ``device`` samples (1, S).
    """

    options = ("hidden_states",)

    batching = "packed"

    info: CodecInfo
    config: MiMoConfig
    front_end: Literal["host", "device"] = "host"
    hidden_states: bool = False

    def with_device_front_end(self) -> MiMoSpec:
        return replace(self, front_end="device")

    def features(self, samples: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        if self.front_end == "host":
            return log_mel(samples, self.config.mel)
        missing = max(0, self.config.mel.least_samples - len(samples))
        return (np.pad(samples, (0, missing)) if missing else samples)[None]

    def num_frames(self, num_samples: int) -> int:
        return self.config.num_token_frames(self.config.num_mel_frames(num_samples))

    def num_output_samples(self, num_frames: int) -> int:
        return self.config.num_output_samples(num_frames)


def open_spec(checkpoint: Checkpoint) -> MiMoSpec:
    """Reads the configuration and samples the weights for the fingerprint.

    Raises:
        RunError: a key of ``config.json`` is absent or out of range, or the weights cannot be read.
    """
    config = checkpoint.parse_config(MiMoConfig.from_json)
    info = CodecInfo(
        family="mimo",
        name=checkpoint.name,
        sample_rate=config.sampling_rate,
        samples_per_frame=config.samples_per_frame,
        codebook_sizes=config.codebook_size,
        fingerprint=checkpoint.fingerprint(PREFIX),
        max_samples=config.max_samples,
    )
    return MiMoSpec(info=info, config=config)


def load_model(
    checkpoint: Checkpoint,
    *,
    parts: Sequence[str] = ("encoder", "decoder"),
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> MiMoAudioTokenizer:
    """The model with ``parts`` of its weights, frozen.

    Raises:
        RunError: the checkpoint is not what its ``config.json`` implies; the message names what is wrong.
    """
    config = checkpoint.parse_config(MiMoConfig.from_json)
    outer_norm = config.ln_type
    if outer_norm == "RMSNorm" and "encoder.layer_norm.bias" in checkpoint.names(PREFIX):
        outer_norm = "LayerNorm"  # some published versions use ln_type inside the layers only

    def build(some: Sequence[str]) -> MiMoAudioTokenizer:
        return MiMoAudioTokenizer(config, parts=some, outer_norm=outer_norm)

    return load_parts(checkpoint, build, parts, device=device, dtype=dtype, strip=PREFIX, rename=_rename)


def load_codec(request: LoadRequest[MiMoSpec]) -> MiMoCodec:
    """The codec with the weights that the task needs.

    Raises:
        RunError: the checkpoint is not what its ``config.json`` implies, or the attention backend cannot run here.
    """
    spec, parts = request.spec, request.parts
    log_attention(head_sizes(spec.config, parts), request.attention, request.device, request.dtype)
    model = load_model(request.checkpoint, parts=parts, device=request.device, dtype=request.dtype)
    return prepare_codec(spec, model, request.attention, request.threads)


def prepare_codec(spec: MiMoSpec, model: MiMoAudioTokenizer, attention: str, threads: int) -> MiMoCodec:
    """A codec of a loaded model, in the fastest form for the model's device."""
    model.use_attention(attention)
    codec = MiMoCodec(spec, model, threads)
    if model.device.type == "cuda":
        model.join_projections()
        if sum(weight.numel() for weight in model.parameters()) >= COMPILED_SIZE:
            codec.compile_layers()
    return codec


def head_sizes(config: MiMoConfig, parts: Sequence[str]) -> dict[str, int]:
    """Head sizes of the transformer stacks of ``parts``, by their names."""
    sizes = {}
    if "encoder" in parts:
        sizes["encoder"] = config.d_model // config.encoder_attention_heads
    if "decoder" in parts:
        sizes["decoder"] = config.d_model // config.decoder_attention_heads
        sizes["vocoder"] = config.vocoder_dim // config.vocoder_attention_heads
    return sizes


class MiMoComputation:
    """A ``Computation``: a batch that the model's device works on."""

    def __init__(
        self,
        codes: ToHost | list[npt.NDArray[np.uint16]],
        samples: ToHost | None,
        hidden_states: ToHost | None,
        clock: StageClock,
    ) -> None:
        self._codes, self._samples, self._hidden_states, self._clock = codes, samples, hidden_states, clock

    def finish(self) -> Computed:
        codes = self._codes.codes() if isinstance(self._codes, ToHost) else self._codes
        samples = None if self._samples is None else self._samples.arrays()
        hidden_states = None if self._hidden_states is None else self._hidden_states.arrays()
        encode, decode = self._clock.seconds()
        seconds: dict[Stage, float] = {"encode": encode} if isinstance(self._codes, ToHost) else {}
        if samples is not None:
            seconds["decode"] = decode
        return Computed(codes, samples, seconds, hidden_states)


class MiMoCodec(PackedCodec):
    """A MiMo model behind the codec protocol; ``threads`` as in ``BatchRunner``."""

    spec: MiMoSpec
    model: MiMoAudioTokenizer

    def __init__(self, spec: MiMoSpec, model: MiMoAudioTokenizer, threads: int = 1) -> None:
        super().__init__(spec, model, threads, DEFAULT_CAPACITY)
        self.runs_ahead = model.device.type == "cuda"

    def encode_batch(
        self, features: Sequence[npt.NDArray[np.float32]], num_quantizers: int
    ) -> list[npt.NDArray[np.uint16]]:
        return codes_to_host([codes for codes, _ in self._encode_all(features, num_quantizers)])

    def encode_hidden_batch(
        self, features: Sequence[npt.NDArray[np.float32]], num_quantizers: int
    ) -> tuple[list[npt.NDArray[np.uint16]], list[npt.NDArray[np.float16]]]:
        codes, hidden_states = zip(*self._encode_all(features, num_quantizers), strict=True)
        return codes_to_host(codes), to_host(hidden_states, torch.float16)

    def decode_batch(self, codes: Sequence[npt.NDArray[np.uint16]]) -> list[npt.NDArray[np.float32]]:
        tensors = [torch.from_numpy(code.astype(np.int64)) for code in codes]
        return to_host(self.run_model(self.model.decode_utterances, tensors, axis=0, frame=1), torch.float32)

    def begin(self, task: Task, inputs: Sequence[npt.NDArray[Any]], num_quantizers: int) -> Computation:
        clock = StageClock(self.model.device)
        with torch.inference_mode():
            clock.mark()
            hidden_states: list[Tensor] = []
            if task == "token2wav":
                codes = [torch.from_numpy(code.astype(np.int64)) for code in inputs]
            else:
                encoded = self._encode([torch.from_numpy(part) for part in inputs], num_quantizers)
                codes = [codes for codes, _ in encoded]
                hidden_states = [hidden for _, hidden in encoded] if self.spec.hidden_states else []
                del encoded
            clock.mark()
            samples = None if task == "wav2token" else self.model.decode_utterances(codes)
            clock.mark()
            return MiMoComputation(
                list(inputs) if task == "token2wav" else ToHost(codes, torch.int16),
                None if samples is None else ToHost(samples, torch.float32),
                ToHost(hidden_states, torch.float16) if hidden_states else None,
                clock,
            )

    def _encode_all(
        self, features: Sequence[npt.NDArray[np.float32]], num_quantizers: int
    ) -> list[tuple[Tensor, Tensor]]:
        inputs = [torch.from_numpy(part) for part in features]
        config = self.model.config
        frame = config.samples_per_frame // (config.hop_length if self.spec.front_end == "host" else 1)
        return self.run_model(lambda batch: self._encode(batch, num_quantizers), inputs, axis=1, frame=frame)

    def _encode(self, features: Sequence[Tensor], num_quantizers: int) -> list[tuple[Tensor, Tensor]]:
        if self.spec.front_end == "host":
            return self.model.encode_mels(features, num_quantizers)
        return self.model.encode_samples([part[0] for part in features], num_quantizers)

    def on_capacity_change(self) -> None:
        if self.compiled:
            self.compile_layers()

    def compile_layers(self) -> None:
        """Compiles the layers for packs of ``frame_budget`` token frames; where that fails, logs the reason."""
        try:
            self.model.compile_layers(self.frame_budget)
            self.compiled = True
        except CompilationFailed as error:
            log.warning("layers run without torch.compile, which failed here: %s", error)
            self.compiled = False


def _rename(name: str) -> str | None:
    return None if name.endswith(_WITHOUT_EFFECT) else name
