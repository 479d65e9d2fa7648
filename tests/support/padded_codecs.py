"""Small checkpoints of SNAC, NanoCodec and WavTokenizer with seeded random weights, in the published layouts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from batch_tokenizer.codecs.nanocodec.config import NanoCodecConfig
from batch_tokenizer.codecs.nanocodec.model import NanoCodec
from batch_tokenizer.codecs.snac.config import SnacConfig
from batch_tokenizer.codecs.snac.model import Snac
from batch_tokenizer.codecs.wavtokenizer.config import WavTokenizerConfig
from batch_tokenizer.codecs.wavtokenizer.model import WavTokenizer

#: Configurations by name.
CONFIGS: dict[str, dict[str, Any]] = {
    "snac": {
        "sampling_rate": 16000, "encoder_dim": 16, "encoder_rates": [2, 3], "latent_dim": 64, "decoder_dim": 64,
        "decoder_rates": [3, 2], "attn_window_size": 4, "codebook_size": 32, "codebook_dim": 4, "vq_strides": [4, 2, 1],
        "noise": True, "depthwise": True,
    },
    "nanocodec": {
        "model_type": "nemo_audio_codec", "sample_rate": 16000, "samples_per_frame": 12,
        "audio_encoder": {
            "down_sample_rates": [3, 4], "encoded_dim": 6, "base_channels": 2, "activation": "lrelu",
            "pad_mode": "replicate",
        },
        "audio_decoder": {
            "up_sample_rates": [4, 3], "input_dim": 6, "base_channels": 8, "activation": "half_snake",
            "output_activation": "clamp", "pad_mode": "zeros", "n_groups_equal_to_out_channels": True,
        },
        "vector_quantizer": {"num_groups": 2, "num_levels_per_group": [5, 4, 3]},
    },
    "wavtokenizer": {
        "model_type": "wavtokenizer", "sampling_rate": 16000, "num_filters": 4, "upsampling_ratios": [3, 2],
        "hidden_size": 8, "codebook_dim": 8, "codebook_size": 32, "decoder_hidden_size": 16,
        "decoder_intermediate_size": 24, "decoder_num_layers": 2, "decoder_attention_num_groups": 4,
    },
}  # fmt: skip


def model_of(name: str, config: dict[str, Any]) -> nn.Module:
    """The family's whole model."""
    if name == "snac":
        return Snac(SnacConfig.from_json(config))
    if name == "nanocodec":
        return NanoCodec(NanoCodecConfig.from_json(config))
    return WavTokenizer(WavTokenizerConfig.from_json(config, {}))


def random_tensors(name: str, config: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Every tensor under its published name, with values that make codes vary."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for own, tensor in model_of(name, config).state_dict().items():
        value = torch.randn(tensor.shape, generator=generator)
        if own.endswith(
            ("original0", "alpha", "gamma", "norm.weight", "norm1.weight", "norm2.weight", "pos_net.5.weight")
        ):
            value = 1 + 0.1 * value
        elif own.endswith("bias") or "shift" in own:
            value = 0.1 * value
        elif own.startswith("codebook"):
            value = 0.3 * value
        elif tensor.ndim > 1 and "codebook" not in own:
            value = value / tensor[0].numel() ** 0.5
        if own.endswith("original0") and ("encoder.post_conv" in own or "encoder.layers.8" in own):
            value = 20 * value  # the frames before quantization, which else were all alike
        tensors[_published(name, own)] = value
    return tensors


def _published(name: str, own: str) -> str:
    if name == "wavtokenizer" and own.startswith(("encoder.", "codebook.")):
        return f"encoder_model.{own.replace('codebook.weight', 'quantizer.codebook.embed')}"
    if name == "nanocodec":
        if own.endswith(".alpha"):
            return own.replace(".alpha", ".activation.snake_act.alpha")
        return own.replace(".parametrizations", ".conv.parametrizations").replace(".bias", ".conv.bias")
    return own


def write_checkpoint(folder: Path, name: str, tensors: dict[str, Tensor] | None = None, **changes: Any) -> Path:
    """A checkpoint folder of ``CONFIGS[name]`` with ``changes``."""
    config = {**CONFIGS[name], **changes}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(random_tensors(name, config) if tensors is None else tensors, folder / "model.safetensors")
    return folder
