"""``config.json`` and ``preprocessor_config.json`` of a WavTokenizer checkpoint in transformers' layout, checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from batch_tokenizer.codecs.config_keys import ConfigKeys

_PAD_MODES = {"reflect": "reflect", "replicate": "replicate", "constant": "zeros"}


@dataclass(frozen=True, slots=True, kw_only=True)
class WavTokenizerConfig:
    """A checked configuration, under the published names; absent keys have transformers' defaults.

    Attributes:
        sampling_rate: Hz.
        upsampling_ratios: in the decoder's order; the encoder's strides are the reverse.
        norm_type: of the encoder's convolutions; ``time_group_norm`` is a GroupNorm over time after each.
        target_peak: peak magnitude that each utterance is scaled to before encoding; None for no scaling.
    """

    sampling_rate: int
    num_filters: int
    upsampling_ratios: tuple[int, ...]
    num_residual_layers: int
    dilation_growth_rate: int
    compress: int
    use_conv_shortcut: bool
    use_causal_conv: bool
    pad_mode: Literal["zeros", "replicate", "reflect"]
    norm_type: str
    kernel_size: int
    last_kernel_size: int
    residual_kernel_size: int
    num_lstm_layers: int
    hidden_size: int
    codebook_size: int
    decoder_hidden_size: int
    decoder_intermediate_size: int
    decoder_num_layers: int
    adanorm_num_embeddings: int
    decoder_attention_num_groups: int
    norm_eps: float
    target_peak: float | None

    @classmethod
    def from_json(cls, config: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> WavTokenizerConfig:
        """Both published mappings to a checked config.

        Raises:
            RunError: a key is of the wrong type, out of range or of a kind not known; the message names it.
        """
        keys = ConfigKeys(config)
        front_end = ConfigKeys(preprocessor, file="preprocessor_config.json")
        keys.known("audio_channels", 1, 1)
        pad_mode = keys.value("pad_mode", "reflect")
        if pad_mode not in _PAD_MODES:
            raise keys.wrong("pad_mode", f"must be one of {', '.join(_PAD_MODES)}")
        norm_type = keys.value("norm_type", "weight_norm")
        if norm_type not in ("weight_norm", "time_group_norm"):
            raise keys.wrong("norm_type", "must be weight_norm or time_group_norm")
        decibels = front_end.number("target_peak_dB_FS", -3.0)
        checked = cls(
            sampling_rate=keys.size("sampling_rate", 24000),
            num_filters=keys.size("num_filters", 32),
            upsampling_ratios=keys.sizes("upsampling_ratios", (6, 5, 5, 4)),
            num_residual_layers=keys.count("num_residual_layers", 1),
            dilation_growth_rate=keys.size("dilation_growth_rate", 2),
            compress=keys.size("compress", 2),
            use_conv_shortcut=keys.flag("use_conv_shortcut", True),
            use_causal_conv=keys.flag("use_causal_conv", False),
            pad_mode=cast(Literal["zeros", "replicate", "reflect"], _PAD_MODES[pad_mode]),
            norm_type=norm_type,
            kernel_size=keys.size("kernel_size", 7),
            last_kernel_size=keys.size("last_kernel_size", 7),
            residual_kernel_size=keys.size("residual_kernel_size", 3),
            num_lstm_layers=keys.count("num_lstm_layers", 2),
            hidden_size=keys.size("hidden_size", 512),
            codebook_size=keys.size("codebook_size", 4096),
            decoder_hidden_size=keys.size("decoder_hidden_size", 768),
            decoder_intermediate_size=keys.size("decoder_intermediate_size", 2304),
            decoder_num_layers=keys.count("decoder_num_layers", 12),
            adanorm_num_embeddings=keys.size("adanorm_num_embeddings", 4),
            decoder_attention_num_groups=keys.size("decoder_attention_num_groups", 32),
            norm_eps=keys.number("norm_eps", 1e-6),
            target_peak=10.0 ** (decibels / 20.0) if front_end.flag("normalize_audio", False) else None,
        )
        if keys.size("codebook_dim", 512) != checked.hidden_size:
            raise keys.wrong("codebook_dim", f"must equal hidden_size ({checked.hidden_size})")
        if checked.codebook_size > 1 << 16:
            raise keys.wrong("codebook_size", "must not exceed 65536")
        if checked.decoder_hidden_size % checked.decoder_attention_num_groups:
            raise keys.wrong("decoder_attention_num_groups", f"must divide {checked.decoder_hidden_size}")
        if checked.num_filters % checked.compress:
            raise keys.wrong("compress", f"must divide num_filters ({checked.num_filters})")
        if front_end.value("sampling_rate", checked.sampling_rate) != checked.sampling_rate:
            raise front_end.wrong("sampling_rate", f"config.json says {checked.sampling_rate}")
        return checked

    @property
    def strides(self) -> tuple[int, ...]:
        """Of the encoder's convolutions, from samples to frames."""
        return self.upsampling_ratios[::-1]

    @property
    def hop(self) -> int:
        """Samples per frame."""
        return math.prod(self.upsampling_ratios)
