"""``config.json`` of a SNAC checkpoint: the arguments of its constructor, checked, and the shapes that they imply."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from batch_tokenizer.codecs.config_keys import MOST_COUNT, ConfigKeys

#: Width of an attention head.
HEAD_DIM = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class SnacConfig:
    """A checked configuration, under the published names.

    Attributes:
        sampling_rate: Hz.
        attn_window_size: latent frames of an attention window, or None for a model without attention.
        vq_strides: latent frames for each code of a level, coarse first; each a multiple of the next.
    """

    sampling_rate: int
    encoder_dim: int
    encoder_rates: tuple[int, ...]
    latent_dim: int
    decoder_dim: int
    decoder_rates: tuple[int, ...]
    attn_window_size: int | None
    codebook_size: int
    codebook_dim: int
    vq_strides: tuple[int, ...]
    noise: bool
    depthwise: bool

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> SnacConfig:
        """The published mapping to a checked config; absent keys have the constructor's defaults.

        Raises:
            RunError: a key is absent, of the wrong type or out of range; the message names it.
        """
        keys = ConfigKeys(config)
        rates = keys.sizes("encoder_rates")
        width = keys.size("encoder_dim")
        latent = width * 2 ** len(rates)
        checked = cls(
            sampling_rate=keys.size("sampling_rate"),
            encoder_dim=width,
            encoder_rates=rates,
            latent_dim=latent if keys.value("latent_dim", None) is None else keys.size("latent_dim"),
            decoder_dim=keys.size("decoder_dim"),
            decoder_rates=keys.sizes("decoder_rates"),
            attn_window_size=None if keys.value("attn_window_size", 32) is None else keys.size("attn_window_size", 32),
            codebook_size=keys.size("codebook_size", 4096),
            codebook_dim=keys.size("codebook_dim", 8),
            vq_strides=keys.sizes("vq_strides"),
            noise=keys.flag("noise", True),
            depthwise=keys.flag("depthwise", True),
        )
        if checked.latent_dim != latent:
            raise keys.wrong("latent_dim", f"must be {latent}, the width that the encoder ends with")
        if math.prod(checked.decoder_rates) != checked.hop:
            raise keys.wrong("decoder_rates", f"must have the product of encoder_rates, {checked.hop}")
        if checked.decoder_dim % 2 ** len(checked.decoder_rates):
            raise keys.wrong("decoder_dim", f"must be a multiple of {2 ** len(checked.decoder_rates)}")
        if min(checked.encoder_rates + checked.decoder_rates) < 2:
            raise keys.wrong("encoder_rates", "rates must be 2 or more")
        columns = sum(checked.vq_strides[0] // stride for stride in checked.vq_strides)
        if columns > MOST_COUNT:
            raise keys.wrong("vq_strides", f"make {columns} codes a frame, at most {MOST_COUNT}")
        if any(coarse % fine for coarse, fine in zip(checked.vq_strides, checked.vq_strides[1:], strict=False)):
            raise keys.wrong("vq_strides", "each must be a multiple of the next")
        if checked.attn_window_size is not None and (latent % HEAD_DIM or checked.decoder_dim % HEAD_DIM):
            raise keys.wrong("attn_window_size", f"attention needs widths that are multiples of {HEAD_DIM}")
        if checked.codebook_size > 1 << 16:
            raise keys.wrong("codebook_size", "must not exceed 65536")
        return checked

    @property
    def hop(self) -> int:
        """Samples per latent frame."""
        return math.prod(self.encoder_rates)

    @property
    def samples_per_frame(self) -> int:
        """Samples per coarse frame: of the first level's codes, a row of the token file."""
        return self.hop * self.vq_strides[0]

    @property
    def multiple(self) -> int:
        """The number of samples is padded to a multiple of this."""
        return self.hop * math.lcm(self.vq_strides[0], self.attn_window_size or 1)


def column_levels(strides: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """The columns of a coarse frame's codes as (level, position within the coarse frame), in Orpheus's order.

    Each code is followed by those of the next level that lie within it: (0, 0), (1, 0), (2, 0), (2, 1), (1, 1),
    (2, 2), (2, 3) for strides 4, 2, 1. A coarse frame's codes are a tree, and this is its pre-order walk.
    """

    def walk(level: int, position: int) -> list[tuple[int, int]]:
        found = [(level, position)]
        if level + 1 < len(strides):
            children = strides[level] // strides[level + 1]
            for child in range(children):
                found += walk(level + 1, position * children + child)
        return found

    return tuple(walk(0, 0))
