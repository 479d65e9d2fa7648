"""The differences between the codecs of transformers: lengths from a configuration, and calls of the models.

Configurations and models of the library are ``Any`` here, as importing its types takes seconds. Codes are (B, T, K) and
samples (B, channels, S), our layout, on both sides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from batch_tokenizer.codecs.config_keys import ConfigKeys
from batch_tokenizer.codecs.hf.lengths import (
    Chunks,
    Conv,
    Lengths,
    PaddedConvs,
    PlainConvs,
    TwoEncoders,
)
from batch_tokenizer.codecs.hf.spectrum import SpectrumAndWaveform
from batch_tokenizer.records import RunError

#: Longest input of Mimi and of EnCodec in one piece, in samples. They compute their padding in float32, which stops
#: being exact soon after.
MOST_SAMPLES = (1 << 24) - (1 << 16)

Settings = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ModelKind:
    """One kind of model.

    Attributes:
        model_class: its name in transformers.
        lengths: from its configuration, and from ``preprocessor_config.json`` (empty where the checkpoint has none).
        codebook_sizes: from its configuration.
        encode: (model, samples (B, channels, length), number of codebooks, what else ``Lengths.inputs`` has) to codes
            (B, T, K).
        decode: (model, codes (B, T, K)) to samples (B, channels, S) or (B, S).
        front_end: the class that makes ``encode``'s inputs out of samples, where ``Lengths`` does in its place.
        sample_rates: of its input and of its output, in Hz, from its configuration.
        limited: whether one utterance may have ``MOST_SAMPLES`` at most.
        replaced: names of the model's parts whose convolutions are replaced by ours (``hf/exact.py``).
        mixed_lengths: whether a batch of mixed lengths is then exact, from the configuration: no norm or attention over
            time sees the padding.
    """

    model_class: str
    lengths: Callable[[Any, Settings], Lengths]
    codebook_sizes: Callable[[Any], tuple[int, ...]]
    encode: Callable[..., Tensor]
    decode: Callable[[Any, Tensor], Tensor]
    front_end: str | None = None
    sample_rates: Callable[[Any], tuple[int, int]] = lambda config: (config.sampling_rate, config.sampling_rate)
    limited: bool = False
    replaced: tuple[str, ...] = ()
    mixed_lengths: Callable[[Any], bool] = lambda config: True


def _mimi_lengths(config: Any, settings: Settings) -> Lengths:
    if config.frame_rate == config.encodec_frame_rate:
        raise RunError("its frame rates before and after downsampling are equal, which transformers cannot run")
    return PaddedConvs(math.prod(config.upsampling_ratios) * config.latent_stride)


def _mimi_encode(model: Any, samples: Tensor, num_quantizers: int) -> Tensor:
    least = model.config.num_semantic_quantizers
    codes: Tensor = model.encode(samples, num_quantizers=max(num_quantizers, least)).audio_codes
    return codes[:, :num_quantizers].mT


def _decode_all_at_once(model: Any, codes: Tensor) -> Tensor:
    audio: Tensor = model.decode(audio_codes=codes.mT).audio_values
    return audio


def _encodec_lengths(config: Any, settings: Settings) -> Lengths:
    if config.normalize:
        raise RunError(
            "this EnCodec normalises each chunk's volume (normalize is true), so its tokens do not decode without the "
            "volumes, which token files do not hold; use one without, such as facebook/encodec_24khz"
        )
    if config.chunk_length_s is None:
        return PaddedConvs(config.hop_length)
    if config.chunk_stride is None or 2 * config.chunk_stride < config.chunk_length:
        raise RunError(f"chunks that overlap by {config.overlap} cannot be run; overlap must be 0 to 0.5")
    return Chunks(config.hop_length, config.chunk_length, config.chunk_stride)


def _encodec_quantizers(config: Any, bandwidth: float) -> int:
    """Codebooks that EnCodec uses at ``bandwidth`` kbit/s."""
    counted = math.floor(bandwidth * 1000 / (math.log2(config.codebook_size) * config.frame_rate))
    return min(max(1, counted), config.num_quantizers)


def _xcodec_quantizers(config: Any, bandwidth: float) -> int:
    """Codebooks that X-Codec uses at ``bandwidth`` kbit/s."""
    counted = math.floor(bandwidth / (math.log2(config.codebook_size) * config.frame_rate / 1000))
    return min(max(1, counted), config.num_quantizers)


def _by_bandwidth(quantizers: Callable[[Any, float], int]) -> Callable[[Any], tuple[int, ...]]:
    def sizes(config: Any) -> tuple[int, ...]:
        most = max(quantizers(config, bandwidth) for bandwidth in config.target_bandwidths)
        return (config.codebook_size,) * most

    return sizes


def _bandwidth(config: Any, quantizers: Callable[[Any, float], int], num_quantizers: int) -> float:
    """The least bandwidth with enough codebooks; codes of the first ones do not depend on how many follow."""
    enough = [value for value in config.target_bandwidths if quantizers(config, value) >= num_quantizers]
    return float(min(enough))


def _encodec_encode(model: Any, samples: Tensor, num_quantizers: int) -> Tensor:
    bandwidth = _bandwidth(model.config, _encodec_quantizers, num_quantizers)
    output = model.encode(samples, bandwidth=bandwidth)  # codes (chunks, B, K, T)
    codes: Tensor = output.audio_codes[:, :, :num_quantizers].permute(1, 0, 3, 2).flatten(1, 2)
    return codes[:, : codes.shape[1] - output.last_frame_pad_length]


def _encodec_decode(model: Any, codes: Tensor) -> Tensor:
    config = model.config
    frames = codes.shape[1] if config.chunk_length is None else -(-config.chunk_length // config.hop_length)
    # (K, B, T) of each chunk, which is how this quantizer takes codes.
    chunks = [model.decoder(model.quantizer.decode(part.permute(2, 0, 1))) for part in codes.split(frames, dim=1)]
    return chunks[0] if config.chunk_length is None else _cross_fade(chunks, config.chunk_stride)


def _cross_fade(chunks: list[Tensor], stride: int) -> Tensor:
    """Overlap-add of chunks (B, channels, S_i), ``stride`` samples apart, weighted by a triangle and divided by the sum
    of weights: (B, channels, S). Equal to the library's, which waits for the device to check that sum."""
    length = chunks[0].shape[-1]
    ramp = torch.linspace(0, 1, length + 2, device=chunks[0].device, dtype=chunks[0].dtype)[1:-1]
    triangle = 0.5 - (ramp - 0.5).abs()
    total = stride * (len(chunks) - 1) + chunks[-1].shape[-1]
    audio, weights = chunks[0].new_zeros(*chunks[0].shape[:-1], total), triangle.new_zeros(total)
    for index, chunk in enumerate(chunks):
        place = slice(index * stride, index * stride + chunk.shape[-1])
        weight = triangle[: chunk.shape[-1]]
        audio[..., place] += weight * chunk
        weights[place] += weight
    return audio / weights


def _dac_encoder(config: Any) -> tuple[Conv, ...]:
    return tuple(Conv(2 * stride, stride, math.ceil(stride / 2)) for stride in config.downsampling_ratios)


def _dac_decoder(config: Any, *, output_padding: bool) -> tuple[Conv, ...]:
    return tuple(
        Conv(2 * stride, stride, math.ceil(stride / 2), stride % 2 if output_padding else 0)
        for stride in config.upsampling_ratios
    )


def _dac_lengths(config: Any, settings: Settings) -> Lengths:
    return PlainConvs(
        hop=math.prod(config.downsampling_ratios),
        encoder=_dac_encoder(config),
        decoder=_dac_decoder(config, output_padding=False),
        multiple=_multiple(settings),
    )


def _multiple(settings: Settings) -> int:
    """The DAC feature extractor pads to a multiple of this; 1 where the checkpoint has none."""
    return _front_end(settings).size("hop_length", 512) if settings else 1


def _front_end(settings: Settings) -> ConfigKeys:
    return ConfigKeys(settings, file="preprocessor_config.json")


def _dac_encode(model: Any, samples: Tensor, num_quantizers: int) -> Tensor:
    codes: Tensor = model.encode(samples, n_quantizers=num_quantizers).audio_codes
    return codes.mT


def _xcodec_lengths(config: Any, settings: Settings) -> Lengths:
    return _two_encoders(config, settings, resample=(1, 1), semantic_margin=config.hop_length // 2, every=1)


def _higgs_lengths(config: Any, settings: Settings) -> Lengths:
    rates = config.semantic_sample_rate, config.sample_rate
    common = math.gcd(*rates)
    return _two_encoders(
        config,
        settings,
        resample=(rates[0] // common, rates[1] // common),
        semantic_margin=160,
        every=max(1, config.semantic_downsample_factor),
    )


def _two_encoders(
    config: Any, settings: Settings, *, resample: tuple[int, int], semantic_margin: int, every: int
) -> Lengths:
    semantic = config.semantic_model_config
    adapter = [Conv(config.kernel_size, 1, config.kernel_size // 2)]
    adapter += [Conv(3, 1, 1) if stride == 1 else Conv(2 * stride, stride, stride - 1) for stride in config.strides]
    return TwoEncoders(
        hop=config.hop_length,
        acoustic=_dac_encoder(config.acoustic_model_config),
        decoder=_dac_decoder(config.acoustic_model_config, output_padding=True),
        margin=config.hop_length // 2,
        resample=resample,
        semantic_margin=semantic_margin,
        semantic=tuple(
            Conv(kernel, stride) for kernel, stride in zip(semantic.conv_kernel, semantic.conv_stride, strict=True)
        ),
        every=every,
        adapter=tuple(adapter),
        multiple=_multiple(settings),
    )


def _xcodec_encode(model: Any, samples: Tensor, num_quantizers: int) -> Tensor:
    bandwidth = _bandwidth(model.config, _xcodec_quantizers, num_quantizers)
    codes: Tensor = model.encode(samples, bandwidth=bandwidth).audio_codes[:, :num_quantizers]
    return codes.mT


def _spectrum_lengths(config: Any, settings: Settings, *, rate: int, own_margin: bool, trims: bool) -> Lengths:
    hop = math.prod(config.downsampling_ratios)
    multiple = _front_end(settings).size("hop_length", hop)
    _front_end(settings).count("num_mel_bins", 80)
    return SpectrumAndWaveform(
        hop=hop,
        multiple=multiple,
        sample_rate=rate,
        acoustic=_dac_encoder(config),
        margin=multiple // 2 if own_margin else 0,
        trims=trims,
        output_hop=config.hop_length,
        padding_value=_front_end(settings).number("padding_value", 1.0),
    )


def _xcodec2_lengths(config: Any, settings: Settings) -> Lengths:
    return _spectrum_lengths(config, settings, rate=config.sampling_rate, own_margin=True, trims=False)


def _neucodec_lengths(config: Any, settings: Settings) -> Lengths:
    return _spectrum_lengths(config, settings, rate=config.input_sampling_rate, own_margin=False, trims=True)


def _scalar_codebook(config: Any) -> tuple[int, ...]:
    return (math.prod(config.quantization_levels),)


def _spectrum_encode(model: Any, samples: Tensor, num_quantizers: int, spectrum: Tensor, mask: Tensor) -> Tensor:
    codes: Tensor = model.encode(
        input_values=samples, input_features=spectrum.to(samples), input_features_mask=mask
    ).audio_codes
    return codes[:, :num_quantizers].mT


_BOTH_HALVES = ("encoder", "decoder")

_XCODEC_RATES: Callable[[Any], tuple[int, int]] = lambda config: (config.sample_rate, config.sample_rate)  # noqa: E731

#: By ``model_type``.
KINDS: Mapping[str, ModelKind] = {
    "mimi": ModelKind(
        "MimiModel",
        _mimi_lengths,
        lambda config: (config.codebook_size,) * config.num_quantizers,
        _mimi_encode,
        _decode_all_at_once,
        limited=True,
        replaced=_BOTH_HALVES,
    ),
    "encodec": ModelKind(
        "EncodecModel",
        _encodec_lengths,
        _by_bandwidth(_encodec_quantizers),
        _encodec_encode,
        _encodec_decode,
        limited=True,
        replaced=_BOTH_HALVES,
        mixed_lengths=lambda config: config.chunk_length_s is None and config.norm_type == "weight_norm",
    ),
    "dac": ModelKind(
        "DacModel",
        _dac_lengths,
        lambda config: (config.codebook_size,) * config.n_codebooks,
        _dac_encode,
        _decode_all_at_once,
        replaced=_BOTH_HALVES,
    ),
    "xcodec": ModelKind(
        "XcodecModel",
        _xcodec_lengths,
        _by_bandwidth(_xcodec_quantizers),
        _xcodec_encode,
        _decode_all_at_once,
        sample_rates=_XCODEC_RATES,
    ),
    "higgs_audio_v2_tokenizer": ModelKind(
        "HiggsAudioV2TokenizerModel",
        _higgs_lengths,
        _by_bandwidth(_xcodec_quantizers),
        _xcodec_encode,
        _decode_all_at_once,
        sample_rates=_XCODEC_RATES,
    ),
    "xcodec2": ModelKind(
        "Xcodec2Model",
        _xcodec2_lengths,
        _scalar_codebook,
        _spectrum_encode,
        _decode_all_at_once,
        front_end="Xcodec2FeatureExtractor",
    ),
    "neucodec": ModelKind(
        "NeuCodecModel",
        _neucodec_lengths,
        _scalar_codebook,
        _spectrum_encode,
        _decode_all_at_once,
        front_end="NeuCodecFeatureExtractor",
        sample_rates=lambda config: (config.input_sampling_rate, config.output_sampling_rate),
    ),
}

#: By ``model_type``: audio models of the library that have no tokens to write, and why.
WITHOUT_TOKENS: Mapping[str, str] = {
    "pocket_tts_audio_tokenizer": "Pocket-TTS's tokenizer makes continuous latents",
    "vibevoice_acoustic_tokenizer": "VibeVoice's acoustic tokenizer makes continuous latents",
}
