"""``config.json`` of a MOSS-Audio-Tokenizer checkpoint: read, checked key by key, and the shapes that it implies.

v1 is mono at 24 kHz; v2 and Nano are stereo at 48 kHz, their two channels interleaved to one sequence of samples, and
their stages have windows of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from batch_tokenizer.codecs.config_keys import ConfigKeys
from batch_tokenizer.records import RunError

#: The key for the number of channels, and other names of it.
_CHANNELS = ("number_channels", "channels_numbers", "num_channels")

#: Quantizers that are the same at inference.
QUANTIZER_TYPES = ("rlfq", "random_prefix_rlfq")

#: Stage keys that have one published value each.
_FIXED: Mapping[str, Any] = {
    "causal": True,
    "conv_layout": True,
    "gating": "none",
    "norm": "layer_norm",
    "positional_embedding": "rope",
}
#: Rows of a stage that a query may see.
_MOST_CONTEXT = 1 << 30

_SIZES = ("input_dimension", "output_dimension", "d_model", "num_heads", "num_layers", "dim_feedforward")


@dataclass(frozen=True, slots=True)
class Patch:
    """``size`` neighbouring rows to one row of as many times the channels; in the decoder the inverse."""

    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TransformerStage:
    """A causal transformer with a bounded window, under the published names.

    Attributes:
        layer_scale: whether layers scale what they add.
        context: keys that a query sees, itself among them.
        rate: rows of this stage per token frame.
    """

    input_dimension: int
    output_dimension: int
    d_model: int
    num_heads: int
    num_layers: int
    dim_feedforward: int
    max_period: float
    layer_scale: bool
    context: int
    rate: int


Stage = Patch | TransformerStage


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizerConfig:
    """The published keys of ``quantizer_kwargs`` that matter at inference."""

    input_dim: int
    rvq_dim: int
    output_dim: int
    num_quantizers: int
    codebook_size: int
    codebook_dim: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MossConfig:
    """A checked configuration.

    Attributes:
        sampling_rate: Hz.
        downsample_rate: samples of a channel per token frame.
        channels: 1 or 2; two are interleaved before the first stage and after the last.
        encoder, decoder: their stages in order.
    """

    sampling_rate: int
    downsample_rate: int
    channels: int
    encoder: tuple[Stage, ...]
    decoder: tuple[Stage, ...]
    quantizer: QuantizerConfig

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> MossConfig:
        """The published mapping to a checked config. Keys without effect on what the model computes are left alone.

        Raises:
            RunError: a key is absent, of the wrong type, out of range or of a kind not known; the message names it.
        """
        top = ConfigKeys(config)
        only_alias = "sample_rate" in config and "sampling_rate" not in config
        sampling_rate = top.size("sample_rate" if only_alias else "sampling_rate")
        if config.get("sample_rate", sampling_rate) != sampling_rate:
            raise top.wrong("sample_rate", f"differs from sampling_rate ({sampling_rate})")
        downsample_rate = top.size("downsample_rate")
        quantizer = _quantizer(config)
        channels = _channels(top, downsample_rate)
        encoder_items, decoder_items = top.objects("encoder_kwargs"), _decoder_items(top)
        stages = _Stages(top, sampling_rate * channels, downsample_rate * channels)
        encoder = stages.read("encoder_kwargs", encoder_items, 1, quantizer.input_dim)
        decoder = stages.read("decoder_kwargs", decoder_items, quantizer.output_dim, 1)
        return cls(
            sampling_rate=sampling_rate,
            downsample_rate=downsample_rate,
            channels=channels,
            encoder=encoder,
            decoder=decoder,
            quantizer=quantizer,
        )

    @property
    def frame_rate(self) -> float:
        """Token frames per second."""
        return self.sampling_rate / self.downsample_rate

    @property
    def rows_per_frame(self) -> int:
        """Interleaved samples per token frame."""
        return self.downsample_rate * self.channels

    def num_frames(self, num_samples: int) -> int:
        """Token frames of ``num_samples`` samples of each channel; the last one may be padded."""
        return -(-num_samples // self.downsample_rate)


def _quantizer(config: Mapping[str, Any]) -> QuantizerConfig:
    kwargs = config.get("quantizer_kwargs")
    if not isinstance(kwargs, Mapping):
        raise ConfigKeys(config).wrong("quantizer_kwargs", "must be an object")
    keys = ConfigKeys(kwargs, "quantizer_kwargs.")
    for holder in (ConfigKeys(config), keys):
        kind = holder.mapping.get("quantizer_type")
        if kind in ("rvq", "spec_rvq"):
            raise holder.wrong("quantizer_type", "is not known here, as the published code cannot decode it")
        if kind is not None and kind not in QUANTIZER_TYPES:
            raise holder.wrong("quantizer_type", f"must be one of {', '.join(QUANTIZER_TYPES)}")
    if "quantizer_type" not in config and "quantizer_type" not in kwargs:
        raise keys.wrong("quantizer_type", "")
    quantizer = QuantizerConfig(
        input_dim=keys.size("input_dim"),
        rvq_dim=keys.size("rvq_dim"),
        output_dim=keys.size("output_dim"),
        num_quantizers=keys.count("num_quantizers"),
        codebook_size=keys.size("codebook_size"),
        codebook_dim=keys.size("codebook_dim"),
    )
    if quantizer.codebook_size > 65536:
        raise keys.wrong("codebook_size", "must not exceed 65536")
    return quantizer


def _channels(top: ConfigKeys, downsample_rate: int) -> int:
    """1 or 2. Without a key for it, 2 if the patch sizes multiply to twice the samples of a frame.

    Raises:
        RunError: another number, or two that are not interleaved.
    """
    present = [key for key in _CHANNELS if key in top.mapping]
    if present:
        channels = top.size(present[0])
        if channels not in (1, 2):
            raise top.wrong(present[0], "only 1 and 2 are known")
    else:
        patches = [item.get("patch_size") for item in top.objects("encoder_kwargs")]
        product = math.prod(size for size in patches if isinstance(size, int))
        channels = 2 if product == 2 * downsample_rate else 1
    if channels == 2:
        top.known("enable_channel_interleave", True, True)
    return channels


def _decoder_items(top: ConfigKeys) -> list[dict[str, Any]]:
    """``decoder_kwargs``, or ``reversed_decoder_kwargs`` from back to front with each stage's dimensions swapped."""
    if "decoder_kwargs" in top.mapping or "reversed_decoder_kwargs" not in top.mapping:
        return top.objects("decoder_kwargs")
    swapped = {"input_dimension": "output_dimension", "output_dimension": "input_dimension"}
    return [
        {swapped.get(key, key): value for key, value in item.items()}
        for item in reversed(top.objects("reversed_decoder_kwargs"))
    ]


class _Stages:
    """Reads lists of stages, for sequences of ``rate`` samples a second and ``rows_per_frame`` a token frame."""

    def __init__(self, top: ConfigKeys, rate: int, rows_per_frame: int) -> None:
        self._top = top
        self._rate = rate
        self._rows_per_frame = rows_per_frame
        items = [item for key in ("encoder_kwargs", "decoder_kwargs") for item in top.mapping.get(key) or ()]
        later = top.mapping.get("sampling_rate") == 48000 or any(
            key in top.mapping for key in (*_CHANNELS, "enable_channel_interleave")
        )
        # v1's code truncates windows, that of v2 and Nano rounds them, half to even.
        self._whole: Callable[[float], int] = (
            round if later or any("context_duration" in item for item in items if isinstance(item, dict)) else int
        )

    def read(
        self, key: str, items: Sequence[Mapping[str, Any]], channels: int, last_channels: int
    ) -> tuple[Stage, ...]:
        """The stages under ``key``, checked to fit each other from ``channels`` to ``last_channels``."""
        top, encoding = self._top, key == "encoder_kwargs"
        rate = self._rows_per_frame if encoding else 1
        rows_a_second = float(self._rate) if encoding else self._rate / self._rows_per_frame
        stages: list[Stage] = []
        for index, item in enumerate(items):
            keys = ConfigKeys(item, f"{key}[{index}].")
            kind = item.get("module_type")
            if kind == "PatchedPretransform":
                size = keys.size("patch_size")
                whole = rate if encoding else channels
                if whole % size:
                    raise keys.wrong("patch_size", f"must divide {whole}, the output size of the stages before it")
                if encoding:
                    rate, channels, rows_a_second = rate // size, channels * size, rows_a_second / size
                else:
                    rate, channels, rows_a_second = rate * size, channels // size, rows_a_second * size
                stages.append(Patch(size))
            elif kind == "Transformer":
                own = "context_duration" in item
                seconds = (keys if own else top).positive(
                    "context_duration" if own else "causal_transformer_context_duration"
                )
                stage = _transformer(keys, self._whole(rows_a_second * seconds), rate)
                if stage.input_dimension != channels:
                    raise keys.wrong("input_dimension", f"must be {channels}, the output size of the stages before it")
                channels = stage.output_dimension
                stages.append(stage)
            else:
                raise keys.wrong("module_type", "must be PatchedPretransform or Transformer")
        if rate != (1 if encoding else self._rows_per_frame):
            raise top.wrong(
                "downsample_rate",
                f"must be the product of the patch sizes in {key}, or half of it where audio is stereo",
            )
        if channels != last_channels:
            wanted = "quantizer_kwargs.input_dim" if encoding else "one channel of audio"
            raise RunError(
                f"config.json: {key}: ends with {channels} channels, must end with {last_channels} ({wanted})"
            )
        return tuple(stages)


def _transformer(keys: ConfigKeys, context: int, rate: int) -> TransformerStage:
    known = {*_FIXED, *_SIZES, "module_type", "layer_scale", "max_period", "context_duration"}
    for key in keys.mapping:
        if key not in known:
            raise keys.wrong(key, "this key is not known, so what the stage computes is not either")
    for key, value in _FIXED.items():
        keys.known(key, value)
    sizes = {key: keys.count(key) if key == "num_layers" else keys.size(key) for key in _SIZES}
    if sizes["d_model"] % sizes["num_heads"]:
        raise keys.wrong("num_heads", f"must divide d_model ({sizes['d_model']})")
    if sizes["d_model"] // sizes["num_heads"] % 2:
        raise keys.wrong("num_heads", "must give an even head size")
    if not 1 <= context <= _MOST_CONTEXT:
        raise RunError(
            f"config.json: {keys.place}context_duration: the window is {context:.6g} rows of this stage, must be 1 to "
            f"{_MOST_CONTEXT}"
        )
    if "layer_scale" not in keys.mapping or keys.mapping["layer_scale"] is not None:
        keys.positive("layer_scale")  # what the parameters were set to before training; only its presence matters
    return TransformerStage(
        **sizes,
        max_period=keys.positive("max_period"),
        layer_scale=keys.mapping["layer_scale"] is not None,
        context=context,
        rate=rate,
    )
