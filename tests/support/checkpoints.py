"""Small MiMo checkpoints with seeded random weights, in the published layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from batch_tokenizer.codecs.mimo.config import MiMoConfig
from batch_tokenizer.codecs.mimo.model import MiMoAudioTokenizer

TINY: dict[str, Any] = {
    "model_type": "mimo_audio_tokenizer",
    "sampling_rate": 24000,
    "hop_length": 240,
    "nfft": 960,
    "window_size": 960,
    "n_mels": 40,
    "fmin": 0,
    "fmax": None,
    "d_model": 32,
    "kernel_size": 3,
    "stride_size": 2,
    "avg_pooler": 2,
    "encoder_layers": 3,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "encoder_skip_layer_id": 2,
    "encoder_causal": False,
    "encoder_attn_window_size": [-1, -1],
    "num_quantizers": 5,
    "codebook_size": [32, 16],
    "decoder_layers": 2,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 64,
    "decoder_causal": True,
    "decoder_attn_window_size": [-1, -1],
    "decoder_kernel_size": 3,
    "decoder_stride_size": 2,
    "vocoder_dim": 16,
    "vocoder_num_layers": 2,
    "vocoder_attention_heads": 2,
    "vocoder_intermediate_dim": 32,
    "vocoder_attn_window_size": [40, 10],
    "vocoder_padding": "same",
    "rope_theta": 10000,
    "rope_type": "default",
    "ln_type": "LayerNorm",
    "activation_function": "gelu",
    "max_audio_seconds": 1800,
}


def random_mimo(config: MiMoConfig, seed: int = 0) -> MiMoAudioTokenizer:
    """A model whose tokens vary with the audio and whose audio has ordinary levels."""
    torch.manual_seed(seed)
    model = MiMoAudioTokenizer(config)
    for index, codebook in enumerate(model.encoder.quantizer.codebooks):
        codebook.embed.normal_(std=0.9**index)
    assert model.decoder is not None
    torch.nn.init.normal_(model.decoder.vocoder.head.out.weight, std=0.5 / config.vocoder_dim**0.5)
    return model.freeze()


def write_mimo_checkpoint(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """``config.json`` and ``model.safetensors`` of a random model; ``changes`` override ``TINY``'s keys."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {**TINY, **changes}
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    model = random_mimo(MiMoConfig.from_json(config), seed)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    return folder
