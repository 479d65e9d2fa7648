"""``config.json`` of a MiMo-Audio-Tokenizer checkpoint: read, checked, and the frame arithmetic it implies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from batch_tokenizer.audio.mel import MelForm
from batch_tokenizer.codecs.config_keys import MOST_COUNT, MOST_NUMBER, MOST_SIZE
from batch_tokenizer.records import RunError, short_repr

Window = tuple[int, int]

#: Samples of a spectrum: the filters of ``n_mels`` bands are in memory for each of its frequencies.
MOST_FFT = 1 << 16


@dataclass(frozen=True, kw_only=True)
class MiMoConfig:
    """The published keys, under their published names. Lengths are in samples unless their name says otherwise.

    Keys with a default may be absent from ``config.json``; every other one must be there. Keys that are not fields here
    (``scale_embedding``, ``threshold_ema_dead_code``, ``position_embedding_type`` …) have no effect on what the model
    computes and are left alone.

    Raises:
        RunError: a key is absent, of the wrong type or out of range; the message names it.
    """

    sampling_rate: int
    hop_length: int
    nfft: int
    window_size: int
    n_mels: int
    fmin: float = 0.0
    fmax: float | None = None

    d_model: int
    kernel_size: int = 3
    stride_size: int = 2
    avg_pooler: int
    encoder_layers: int
    encoder_attention_heads: int
    encoder_ffn_dim: int
    encoder_skip_layer_id: int | None
    encoder_causal: bool
    encoder_attn_window_size: Window

    num_quantizers: int
    codebook_size: tuple[int, ...]

    decoder_layers: int
    decoder_attention_heads: int
    decoder_ffn_dim: int
    decoder_causal: bool
    decoder_attn_window_size: Window
    decoder_kernel_size: int
    decoder_stride_size: int

    vocoder_dim: int
    vocoder_num_layers: int
    vocoder_attention_heads: int
    vocoder_intermediate_dim: int
    vocoder_attn_window_size: Window
    vocoder_padding: str = "same"

    rope_theta: float = 10000.0
    rope_type: str = "default"
    ln_type: str = "LayerNorm"
    activation_function: str = "gelu"
    max_audio_seconds: float = 1800

    def __post_init__(self) -> None:
        for keys, most in (
            (("encoder_layers", "decoder_layers", "vocoder_num_layers", "num_quantizers", "n_mels"), MOST_COUNT),
            (
                ("sampling_rate", "hop_length", "window_size", "d_model", "kernel_size", "stride_size", "avg_pooler",
                 "encoder_attention_heads", "encoder_ffn_dim", "decoder_attention_heads", "decoder_ffn_dim",
                 "decoder_kernel_size", "decoder_stride_size", "vocoder_dim", "vocoder_attention_heads",
                 "vocoder_intermediate_dim"), MOST_SIZE,
            ),
            (("nfft",), MOST_FFT),
            (("max_audio_seconds", "rope_theta"), MOST_NUMBER),
        ):  # fmt: skip
            for key in keys:
                self._require(key, 0 < getattr(self, key) <= most, f"must be above 0, and at most {most:g}")
        self._require("nfft", self.nfft % 2 == 0, "must be even")
        self._require(
            "window_size", self.window_size == self.nfft, f"must equal nfft ({self.nfft}), as the vocoder has it"
        )
        self._require("hop_length", self.hop_length <= self.window_size, "must not exceed window_size")
        self._require("hop_length", (self.window_size - self.hop_length) % 2 == 0, "must be of window_size's parity")
        nyquist = self.sampling_rate / 2
        self._require("fmin", 0 <= self.fmin < nyquist, f"must be from 0 to below {nyquist:g} Hz")
        self._require("fmax", self.fmin < self.f_max <= nyquist, f"must be above fmin and at most {nyquist:g} Hz")
        for part, width in (("encoder", self.d_model), ("decoder", self.d_model), ("vocoder", self.vocoder_dim)):
            heads = getattr(self, f"{part}_attention_heads")
            self._require(f"{part}_attention_heads", width % heads == 0, f"must divide the width {width}")
            self._require(f"{part}_attention_heads", width // heads % 2 == 0, "must give an even head size")
            window = getattr(self, f"{part}_attn_window_size")
            self._require(
                f"{part}_attn_window_size",
                -1 <= min(window) <= max(window) <= MOST_NUMBER,
                f"must be two numbers of -1 to {MOST_NUMBER:g}",
            )
        skip = self.encoder_skip_layer_id
        self._require(
            "encoder_skip_layer_id", skip is None or 1 <= skip <= self.encoder_layers,
            f"must be null or from 1 to encoder_layers ({self.encoder_layers})",
        )  # fmt: skip
        sizes = self.codebook_size
        self._require("codebook_size", len(sizes) >= 1 and min(sizes, default=0) >= 1, "must list sizes of at least 1")
        self._require("codebook_size", max(sizes) <= 65536, "must not exceed 65536")
        self._require("codebook_size", len(sizes) == self.num_quantizers, "must not be longer than num_quantizers")
        self._require(
            "decoder_kernel_size", self.decoder_kernel_size >= self.decoder_stride_size,
            f"must be at least decoder_stride_size ({self.decoder_stride_size})",
        )  # fmt: skip
        self._require("vocoder_padding", self.vocoder_padding in ("same", "center"), "must be same or center")
        self._require("rope_type", self.rope_type == "default", "only default is known")
        self._require("ln_type", self.ln_type in ("LayerNorm", "RMSNorm"), "must be LayerNorm or RMSNorm")
        self._require("activation_function", self.activation_function == "gelu", "only gelu is known")

    def _require(self, key: str, holds: bool, rule: str) -> None:
        if not holds:
            raise RunError(f"config.json: {key} = {short_repr(getattr(self, key))}: {rule}")

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> MiMoConfig:
        """The published mapping to a checked config. A short ``codebook_size`` repeats its last entry."""
        values: dict[str, Any] = {}
        for field in fields(cls):
            if field.name in config:
                values[field.name] = _typed(field.name, str(field.type), config[field.name])
            elif field.default is field.default_factory:  # both MISSING: the key has no default
                raise RunError(f"config.json: {field.name} is absent")
        sizes = values["codebook_size"]
        if sizes:
            values["codebook_size"] = sizes + sizes[-1:] * (min(values["num_quantizers"], MOST_COUNT) - len(sizes))
        return cls(**values)

    @property
    def f_max(self) -> float:
        """Upper edge of the mel filters, Hz."""
        return self.sampling_rate / 2 if self.fmax is None else self.fmax

    @property
    def mel(self) -> MelForm:
        """The form of the front end's mel spectrum."""
        return MelForm(
            sample_rate=self.sampling_rate, n_fft=self.nfft, hop_length=self.hop_length, window_size=self.window_size,
            n_mels=self.n_mels, f_min=self.fmin, f_max=self.f_max,
        )  # fmt: skip

    @property
    def max_samples(self) -> int:
        """Longest utterance, samples."""
        return int(self.max_audio_seconds * self.sampling_rate)

    @property
    def samples_per_frame(self) -> int:
        """Samples of audio per frame of tokens."""
        return self.hop_length * self.stride_size * self.avg_pooler

    def num_mel_frames(self, num_samples: int) -> int:
        """Mel frames of an utterance of ``num_samples`` >= 1 samples; the shortest ones are padded to nfft/2 + 1."""
        return 1 + max(num_samples, self.mel.least_samples) // self.hop_length

    def num_conv1_frames(self, mel_frames: int) -> int:
        """Frames after ``conv1``, which has padding 1 on both sides for every kernel size."""
        return mel_frames + 3 - self.kernel_size

    def num_encoder_frames(self, mel_frames: int) -> int:
        """Frames after ``conv2``, on which the encoder's layers run."""
        return (self.num_conv1_frames(mel_frames) + 2 - self.kernel_size) // self.stride_size + 1

    def num_token_frames(self, mel_frames: int) -> int:
        """Token frames of an utterance of ``mel_frames`` mel frames."""
        return -(-self.num_encoder_frames(mel_frames) // self.avg_pooler)

    def num_coarse_mel_frames(self, token_frames: int) -> int:
        """Mel frames that the decoder makes of ``token_frames`` token frames."""
        return token_frames * self.avg_pooler * self.decoder_stride_size

    def num_output_samples(self, token_frames: int) -> int:
        """Samples that decoding ``token_frames`` token frames yields."""
        frames = self.num_coarse_mel_frames(token_frames)
        return frames * self.hop_length if self.vocoder_padding == "same" else (frames - 1) * self.hop_length


def _typed(key: str, annotation: str, value: Any) -> Any:
    """``value`` as the field's type, without guessing: whole floats are integers, nothing else is converted."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    whole = number and float(value).is_integer()
    match annotation:
        case "bool":
            valid, result = isinstance(value, bool), value
        case "int":
            valid, result = whole, value
        case "int | None":
            valid, result = value is None or whole, value
        case "float":
            valid, result = number, value
        case "float | None":
            valid, result = value is None or number, value
        case "str":
            valid, result = isinstance(value, str), value
        case "Window" | "tuple[int, ...]":
            listed = value if isinstance(value, (list, tuple)) else [value] if annotation != "Window" else []
            valid = all(isinstance(item, int) and not isinstance(item, bool) for item in listed)
            valid, result = valid and (annotation != "Window" or len(listed) == 2), tuple(listed)
        case _:
            raise TypeError(f"MiMoConfig.{key} has the unforeseen type {annotation}")
    if not valid:
        raise RunError(
            f"config.json: {key} = {short_repr(value)}: must be {annotation.replace('Window', 'a pair of integers')}"
        )
    return int(result) if whole and annotation.startswith("int") else result
