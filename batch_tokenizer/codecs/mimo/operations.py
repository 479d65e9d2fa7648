"""Floating-point operations of MiMo for an utterance, from its equations.

Counted are matrix products, two operations a multiply-add, and of attention only the pairs of frames that see each
other. Filler, padding and masked pairs are not, so a share of peak from these numbers is a share of useful work.
"""

from __future__ import annotations

from batch_tokenizer.codecs.mimo.config import MiMoConfig, Window


def visible_pairs(length: int, window: Window, causal: bool) -> int:
    """Pairs (query, key) of an utterance of ``length`` frames that see each other."""
    left, right = window[0], 0 if causal else window[1]
    hidden = 0
    for reach in (left, right):
        beyond = length - 1 - reach
        if reach >= 0 and beyond > 0:
            hidden += beyond * (beyond + 1) // 2
    return length * length - hidden


def _layers(count: int, width: int, hidden: int, length: int, window: Window, causal: bool) -> int:
    per_frame = 4 * width * width + 2 * width * hidden
    return 2 * count * (length * per_frame + 2 * width * visible_pairs(length, window, causal))


def encoder_operations(config: MiMoConfig, mel_frames: int, num_quantizers: int) -> int:
    """From log-mel to codes, for one utterance of ``mel_frames``."""
    width, kernel, pooler = config.d_model, config.kernel_size, config.avg_pooler
    frames = config.num_encoder_frames(mel_frames)
    tokens = config.num_token_frames(mel_frames)
    convolutions = (
        config.num_conv1_frames(mel_frames) * config.n_mels * kernel * width + frames * width * kernel * width
    )
    pooling = tokens * pooler * width * width if pooler != 1 else 0
    quantizer = tokens * width * sum(config.codebook_size[:num_quantizers])
    return 2 * (convolutions + pooling + quantizer) + _layers(
        config.encoder_layers, width, config.encoder_ffn_dim, frames,
        config.encoder_attn_window_size, config.encoder_causal,
    )  # fmt: skip


def decoder_operations(config: MiMoConfig, token_frames: int) -> int:
    """From codes to samples, for one utterance of ``token_frames``. Fourier transforms are not counted."""
    width, pooler = config.d_model, config.avg_pooler
    frames = token_frames * pooler
    mel_frames = config.num_coarse_mel_frames(token_frames)
    up_sampling = frames * width * width if pooler != 1 else 0
    up_sampling += frames * width * config.decoder_kernel_size * config.n_mels
    ends = mel_frames * config.vocoder_dim * (config.n_mels + config.nfft + 2)
    layers = _layers(
        config.decoder_layers, width, config.decoder_ffn_dim, frames,
        config.decoder_attn_window_size, config.decoder_causal,
    )  # fmt: skip
    vocoder = _layers(
        config.vocoder_num_layers, config.vocoder_dim, config.vocoder_intermediate_dim, mel_frames,
        config.vocoder_attn_window_size, False,
    )  # fmt: skip
    return 2 * (up_sampling + ends) + layers + vocoder
