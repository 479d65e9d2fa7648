"""The configuration of a NeMo audio codec, ``config.json`` with the keys of NeMo's yaml, checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from batch_tokenizer.codecs.config_keys import ConfigKeys

#: Kernels of a residual layer's branches, and dilations of the blocks in each.
KERNEL_SIZES = (3, 7, 11)
DILATIONS = (1, 3, 5)


@dataclass(frozen=True, slots=True, kw_only=True)
class NanoCodecConfig:
    """A checked configuration.

    Attributes:
        sample_rate: Hz.
        down_sample_rates, encoder_channels: strides of the encoder, and its width before the first.
        up_sample_rates, decoder_channels: the same of the decoder.
        latent_dim: width of what is quantized, ``num_groups`` times the number of ``levels``.
        levels: of each dimension of a group.
    """

    sample_rate: int
    down_sample_rates: tuple[int, ...]
    encoder_channels: int
    up_sample_rates: tuple[int, ...]
    decoder_channels: int
    num_groups: int
    levels: tuple[int, ...]

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> NanoCodecConfig:
        """NeMo's mapping to a checked config. Keys that only matter in training are left alone.

        Raises:
            RunError: a key is absent, of the wrong type, out of range or of a kind not known; the message names it.
        """
        keys = ConfigKeys(config)
        encoder, decoder = keys.inside("audio_encoder"), keys.inside("audio_decoder")
        quantizer = keys.inside("vector_quantizer")
        encoder.known("activation", "lrelu", "lrelu")
        encoder.known("pad_mode", "replicate")
        encoder.known("out_kernel_size", 7, 7)
        decoder.known("activation", "half_snake")
        decoder.known("output_activation", "clamp")
        decoder.known("pad_mode", "zeros", "zeros")
        decoder.known("out_kernel_size", 3, 3)
        decoder.known("n_groups_equal_to_out_channels", True)
        for part in (encoder, decoder):
            part.known("in_kernel_size", 7, 7)
            part.known("resblock_kernel_sizes", list(KERNEL_SIZES), list(KERNEL_SIZES))
            part.known("resblock_dilation_sizes", list(DILATIONS), list(DILATIONS))
        checked = cls(
            sample_rate=keys.size("sample_rate"),
            down_sample_rates=encoder.sizes("down_sample_rates"),
            encoder_channels=encoder.size("base_channels"),
            up_sample_rates=decoder.sizes("up_sample_rates"),
            decoder_channels=decoder.size("base_channels"),
            num_groups=quantizer.count("num_groups"),
            levels=quantizer.sizes("num_levels_per_group"),
        )
        hop = checked.samples_per_frame
        if keys.size("samples_per_frame", hop) != hop:
            raise keys.wrong("samples_per_frame", f"must be the product of down_sample_rates, {hop}")
        if math.prod(checked.up_sample_rates) != hop:
            raise decoder.wrong("up_sample_rates", f"must have the product of down_sample_rates, {hop}")
        if min(checked.down_sample_rates + checked.up_sample_rates) < 2:
            raise encoder.wrong("down_sample_rates", "rates must be 2 or more")
        for part, key in ((encoder, "encoded_dim"), (decoder, "input_dim")):
            if part.size(key) != checked.latent_dim:
                raise part.wrong(key, f"must be num_groups times the number of levels, {checked.latent_dim}")
        if checked.decoder_channels % 2 ** len(checked.up_sample_rates):
            raise decoder.wrong("base_channels", f"must be a multiple of {2 ** len(checked.up_sample_rates)}")
        if min(checked.levels) < 2 or math.prod(checked.levels) > 1 << 16:
            raise quantizer.wrong("num_levels_per_group", "must be 2 or more each, with a product of 65536 at most")
        return checked

    @property
    def samples_per_frame(self) -> int:
        """Samples of audio per frame of tokens."""
        return math.prod(self.down_sample_rates)

    @property
    def latent_dim(self) -> int:
        """Width of what is quantized."""
        return self.num_groups * len(self.levels)
