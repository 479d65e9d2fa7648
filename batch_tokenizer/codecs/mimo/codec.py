"""MiMo behind the codec protocol: its spec, its front end, and the model fed with numpy arrays."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from batch_tokenizer.audio.mel import log_mel
from batch_tokenizer.codecs.base import Codec, CodecInfo, CodecSpec
from batch_tokenizer.codecs.checkpoint import Checkpoint
from batch_tokenizer.codecs.execution import BatchRunner, to_host
from batch_tokenizer.codecs.mimo.config import MiMoConfig
from batch_tokenizer.codecs.mimo.model import DEFAULT_CAPACITY, MiMoAudioTokenizer
from batch_tokenizer.kernels.attention import BackendUnavailable, choose_backend
from batch_tokenizer.records import RunError, Task

log = logging.getLogger(__name__)

#: Some exports put this before every parameter's name.
PREFIX = "audio_tokenizer."

#: Parameters from which on the layers are compiled on CUDA; smaller models would take longer to compile than they run.
COMPILED_SIZE = 100_000_000

_WITHOUT_EFFECT = ("_codebook.embed_avg", "_codebook.cluster_size", "_codebook.inited")

#: What each task needs of the model.
PARTS: Mapping[Task, tuple[str, ...]] = {
    "wav2token": ("encoder",),
    "token2wav": ("decoder",),
    "wav2token2wav": ("encoder", "decoder"),
}


def recognises(config: Mapping[str, Any]) -> bool:
    """A MiMo checkpoint says so, or has keys that no other family has."""
    return config.get("model_type") == "mimo_audio_tokenizer" or any(
        key in config for key in ("encoder_skip_layer_id", "vocoder_num_layers", "avg_pooler")
    )


@dataclass(frozen=True)
class MiMoSpec(CodecSpec):
    """A MiMo checkpoint without its weights. Features are log-mel (n_mels, L)."""

    info: CodecInfo
    config: MiMoConfig

    def features(self, samples: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        return log_mel(
            samples,
            sample_rate=self.config.sampling_rate,
            n_fft=self.config.nfft,
            hop_length=self.config.hop_length,
            window_size=self.config.window_size,
            n_mels=self.config.n_mels,
            f_min=self.config.fmin,
            f_max=self.config.f_max,
        )

    def num_frames(self, num_samples: int) -> int:
        return self.config.num_token_frames(self.config.num_mel_frames(num_samples))

    def num_output_samples(self, num_frames: int) -> int:
        return self.config.num_output_samples(num_frames)


def open_spec(checkpoint: Checkpoint) -> MiMoSpec:
    """Reads the configuration and samples the weights for the fingerprint.

    Raises:
        RunError: a key of ``config.json`` is absent or out of range, or the weights cannot be read.
    """
    config = _config(checkpoint)
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
    """The model with ``parts`` of its weights, frozen. Weights go to the device one by one.

    Raises:
        RunError: the checkpoint is not what its ``config.json`` implies; the message names what is wrong.
    """
    config = _config(checkpoint)
    outer_norm = config.ln_type
    if outer_norm == "RMSNorm" and "encoder.layer_norm.bias" in checkpoint.names(PREFIX):
        outer_norm = "LayerNorm"  # some published versions use ln_type inside the layers only
    with torch.device("meta"):
        whole = MiMoAudioTokenizer(config, outer_norm=outer_norm)
        part = MiMoAudioTokenizer(config, parts=parts, outer_norm=outer_norm)
    checkpoint.load(whole, part, device=device, dtype=dtype, strip=PREFIX, rename=_rename)
    return part.freeze()


def load_codec(
    checkpoint: Checkpoint,
    spec: MiMoSpec,
    *,
    task: Task,
    device: torch.device,
    dtype: torch.dtype,
    attention: str,
    threads: int,
) -> MiMoCodec:
    """The weights that ``task`` needs. See ``registry.Family``."""
    check_attention(spec.config, attention, device, dtype)
    model = load_model(checkpoint, parts=PARTS[task], device=device, dtype=dtype)
    model.use_attention(attention)
    return MiMoCodec(spec, model, threads)


def check_attention(config: MiMoConfig, attention: str, device: torch.device, dtype: torch.dtype) -> None:
    """Logs which backend will run.

    Raises:
        RunError: the one asked for cannot run here.
    """
    try:
        backend, reason = choose_backend(attention, device, dtype, config.d_model // config.encoder_attention_heads)
    except BackendUnavailable as error:
        raise RunError(f"--attention {attention}: {error}") from error
    log.info("attention %s (%s)", backend, reason)


class MiMoCodec(Codec):
    """A MiMo model behind the codec protocol; ``threads`` as in ``BatchRunner``."""

    def __init__(self, spec: MiMoSpec, model: MiMoAudioTokenizer, threads: int = 1) -> None:
        self.spec = spec
        self.model = model
        self.frame_budget = DEFAULT_CAPACITY
        if model.device.type == "cuda" and sum(weight.numel() for weight in model.parameters()) >= COMPILED_SIZE:
            model.compile_layers()
        self._run = BatchRunner(model.device, threads)
        self.batch_limit = self._run.batch_limit

    def encode(self, features: Sequence[npt.NDArray[np.float32]], num_quantizers: int) -> list[npt.NDArray[np.uint16]]:
        mels = [torch.from_numpy(mel) for mel in features]
        codes = self._run(lambda batch: self.model.encode_utterances(batch, num_quantizers), mels, lambda m: m.shape[1])
        return [part.astype(np.uint16) for part in to_host(codes, torch.int32)]

    def decode(self, codes: Sequence[npt.NDArray[np.uint16]]) -> list[npt.NDArray[np.float32]]:
        tensors = [torch.from_numpy(code.astype(np.int64)) for code in codes]
        return to_host(self._run(self.model.decode_utterances, tensors, len), torch.float32)

    @property
    def frame_budget(self) -> int:
        """Token frames computed at once."""
        return self._frame_budget

    @frame_budget.setter
    def frame_budget(self, frames: int) -> None:
        self._frame_budget = max(1, frames)
        if self.model.device.type == "cuda":
            self.model.capacity = self._frame_budget

    def release(self) -> None:
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()


def _config(checkpoint: Checkpoint) -> MiMoConfig:
    try:
        return MiMoConfig.from_json(checkpoint.config)
    except RunError as error:
        raise RunError(f"{checkpoint.folder}: {error}") from error


def _rename(name: str) -> str | None:
    return None if name.endswith(_WITHOUT_EFFECT) else name
