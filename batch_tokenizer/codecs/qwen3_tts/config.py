"""``config.json`` of a Qwen3-TTS-Tokenizer-12Hz, checked, and the shapes that it implies."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from batch_tokenizer.codecs.config_keys import ConfigKeys


@dataclass(frozen=True, slots=True, kw_only=True)
class TransformerConfig:
    """A causal transformer, under the published names.

    Attributes:
        sliding_window: keys that a query sees, itself among them, where the window is applied.
        attention_bias: whether queries, keys, values and outputs have biases.
    """

    num_hidden_layers: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    sliding_window: int
    rope_theta: float
    norm_eps: float
    attention_bias: bool

    @classmethod
    def read(cls, keys: ConfigKeys, norm_eps: str) -> TransformerConfig:
        """From an object of ``config.json`` whose key for the norms' epsilon is ``norm_eps``."""
        heads = keys.size("num_attention_heads")
        width = keys.size("hidden_size")
        config = cls(
            num_hidden_layers=keys.count("num_hidden_layers"),
            hidden_size=width,
            num_attention_heads=heads,
            num_key_value_heads=keys.size("num_key_value_heads", heads),
            head_dim=keys.size("head_dim", max(1, width // heads)),
            intermediate_size=keys.size("intermediate_size"),
            sliding_window=keys.size("sliding_window"),
            rope_theta=keys.number("rope_theta", 10000.0),
            norm_eps=keys.number(norm_eps, 1e-5),
            attention_bias=keys.flag("attention_bias", False),
        )
        if config.head_dim % 2:
            raise keys.wrong("head_dim", "must be even")
        if heads % config.num_key_value_heads:
            raise keys.wrong("num_key_value_heads", f"must divide num_attention_heads ({heads})")
        return config


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderConfig:
    """``encoder_config``: the encoder half of a Mimi model, under the published names.

    Attributes:
        strides: of the convolutions, from samples down; the published ``upsampling_ratios`` reversed.
        downsample: latent frames per token frame.
        num_quantizers: codebooks in the checkpoint; fewer are used.
    """

    transformer: TransformerConfig
    num_filters: int
    strides: tuple[int, ...]
    kernel_size: int
    last_kernel_size: int
    residual_kernel_size: int
    num_residual_layers: int
    dilation_growth_rate: int
    compress: int
    downsample: int
    codebook_size: int
    codebook_dim: int
    num_quantizers: int
    num_semantic_quantizers: int

    @classmethod
    def read(cls, keys: ConfigKeys) -> EncoderConfig:
        """
        Raises:
            RunError: a key is absent, out of range, or has a value that no published encoder has.
        """
        for key, value in (
            ("audio_channels", 1),
            ("hidden_act", "gelu"),
            ("pad_mode", "constant"),
            ("use_causal_conv", True),
            ("use_conv_shortcut", False),
        ):
            keys.known(key, value, default=value)
        strides = tuple(reversed(keys.sizes("upsampling_ratios")))
        latent_rate = keys.size("sampling_rate") / math.prod(strides)
        rate_key = "_frame_rate" if "_frame_rate" in keys.mapping else "frame_rate"
        downsample = latent_rate / keys.number(rate_key, 12.5)
        if downsample < 1 or not float(downsample).is_integer():
            raise keys.wrong(
                rate_key, f"must go into {latent_rate:g}, the rate after the convolutions, a whole number of times"
            )
        codebook_dim = keys.size("codebook_dim")
        keys.known("vector_quantization_hidden_dimension", codebook_dim, default=codebook_dim)
        config = cls(
            transformer=TransformerConfig.read(keys, "norm_eps"),
            num_filters=keys.size("num_filters"),
            strides=strides,
            kernel_size=keys.size("kernel_size", 7),
            last_kernel_size=keys.size("last_kernel_size", 3),
            residual_kernel_size=keys.size("residual_kernel_size", 3),
            num_residual_layers=keys.count("num_residual_layers", 1),
            dilation_growth_rate=keys.size("dilation_growth_rate", 2),
            compress=keys.size("compress", 2),
            downsample=int(downsample),
            codebook_size=keys.size("codebook_size"),
            codebook_dim=codebook_dim,
            num_quantizers=keys.count("num_quantizers"),
            num_semantic_quantizers=keys.count("num_semantic_quantizers", 1),
        )
        if config.num_semantic_quantizers >= config.num_quantizers:
            raise keys.wrong("num_semantic_quantizers", f"must be below num_quantizers ({config.num_quantizers})")
        return config

    @property
    def samples_per_latent(self) -> int:
        """Samples per latent frame, before ``downsample``."""
        return math.prod(self.strides)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """``decoder_config``, under the published names."""

    transformer: TransformerConfig
    latent_dim: int
    codebook_dim: int
    codebook_size: int
    num_quantizers: int
    upsampling_ratios: tuple[int, ...]
    upsample_rates: tuple[int, ...]
    decoder_dim: int

    @classmethod
    def read(cls, keys: ConfigKeys) -> DecoderConfig:
        """
        Raises:
            RunError: a key is absent, out of range, or has a value that no published decoder has.
        """
        keys.known("hidden_act", "silu", default="silu")
        config = cls(
            transformer=TransformerConfig.read(keys, "rms_norm_eps"),
            latent_dim=keys.size("latent_dim"),
            codebook_dim=keys.size("codebook_dim"),
            codebook_size=keys.size("codebook_size"),
            num_quantizers=keys.count("num_quantizers"),
            upsampling_ratios=keys.sizes("upsampling_ratios"),
            upsample_rates=keys.sizes("upsample_rates"),
            decoder_dim=keys.size("decoder_dim"),
        )
        if config.num_quantizers < 2:
            raise keys.wrong("num_quantizers", "must be 2 or more")
        if config.codebook_dim % 2:
            raise keys.wrong("codebook_dim", "must be even")
        if config.decoder_dim % 2 ** len(config.upsample_rates):
            raise keys.wrong("decoder_dim", f"must be a multiple of {2 ** len(config.upsample_rates)}")
        return config

    @property
    def samples_per_frame(self) -> int:
        """Samples per token frame."""
        return math.prod(self.upsampling_ratios) * math.prod(self.upsample_rates)


@dataclass(frozen=True, slots=True, kw_only=True)
class Qwen3TtsConfig:
    """A checked configuration.

    Attributes:
        sample_rate: Hz, in and out.
        samples_per_frame: samples per token frame.
        num_quantizers: codebooks in use.
    """

    sample_rate: int
    samples_per_frame: int
    num_quantizers: int
    encoder: EncoderConfig
    decoder: DecoderConfig

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> Qwen3TtsConfig:
        """The published mapping to a checked config.

        Raises:
            RunError: a key is absent, of the wrong type, out of range or not known; the message names it.
        """
        keys = ConfigKeys(config)
        encoder = EncoderConfig.read(keys.inside("encoder_config"))
        decoder = DecoderConfig.read(keys.inside("decoder_config"))
        rate = keys.size("input_sample_rate")
        keys.known("output_sample_rate", rate)
        keys.inside("encoder_config").known("sampling_rate", rate)
        hop = keys.size("encode_downsample_rate")
        if hop != encoder.samples_per_latent * encoder.downsample:
            raise keys.wrong("encode_downsample_rate", "must be what the encoder's strides multiply to")
        keys.known("decode_upsample_rate", hop)
        if hop != decoder.samples_per_frame:
            raise keys.wrong("decode_upsample_rate", "must be what the decoder's rates multiply to")
        count = keys.count("encoder_valid_num_quantizers")
        if count > encoder.num_quantizers or count != decoder.num_quantizers:
            raise keys.wrong(
                "encoder_valid_num_quantizers",
                f"must be the decoder's num_quantizers ({decoder.num_quantizers}) and no more than the encoder's "
                f"({encoder.num_quantizers})",
            )
        if encoder.codebook_size != decoder.codebook_size or encoder.codebook_size > 1 << 16:
            raise keys.inside("decoder_config").wrong(
                "codebook_size", f"must be the encoder's ({encoder.codebook_size}), and at most 65536"
            )
        return cls(sample_rate=rate, samples_per_frame=hop, num_quantizers=count, encoder=encoder, decoder=decoder)
