"""Small Qwen3-TTS-Tokenizer-12Hz checkpoints with seeded random weights under the published names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from batch_tokenizer.codecs.qwen3_tts.config import Qwen3TtsConfig
from batch_tokenizer.codecs.qwen3_tts.model import Qwen3TtsTokenizer

#: Modules of the published code that wrap a convolution named ``conv``.
_WRAPPED = ("pre_conv", "dwconv", "downsample", "conv1", "conv2")


def tiny(**changes: Any) -> dict[str, Any]:
    """A configuration: 24 kHz, 24 samples a frame, 4 codebooks of 32; an encoder's window of 9, a decoder's of 30."""
    transformer = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return {
        "model_type": "qwen3_tts_tokenizer_12hz",
        "encoder_valid_num_quantizers": 4,
        "input_sample_rate": 24000,
        "output_sample_rate": 24000,
        "encode_downsample_rate": 24,
        "decode_upsample_rate": 24,
        "encoder_config": {
            **transformer, "hidden_size": 24, "head_dim": 6, "intermediate_size": 32, "sliding_window": 9,
            "num_filters": 4, "upsampling_ratios": [4, 3], "codebook_size": 32, "codebook_dim": 8,
            "num_quantizers": 6, "num_semantic_quantizers": 1, "sampling_rate": 24000, "_frame_rate": 1000.0,
        },
        "decoder_config": {
            **transformer, "hidden_size": 16, "head_dim": 8, "intermediate_size": 24, "sliding_window": 30,
            "latent_dim": 20, "codebook_dim": 12, "codebook_size": 32, "num_quantizers": 4, "decoder_dim": 16,
            "upsampling_ratios": [2, 2], "upsample_rates": [3, 2],
        },
        **changes,
    }  # fmt: skip


def random_tensors(config: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Every tensor that the configuration implies, with the published names."""
    generator = torch.Generator().manual_seed(seed)
    checked = Qwen3TtsConfig.from_json(config)
    model = Qwen3TtsTokenizer(checked, codebooks=checked.encoder.num_quantizers)
    tensors = {}
    for name, value in model.state_dict().items():
        draw = torch.randn(value.shape, generator=generator)
        if name.endswith("cluster_usage"):
            values = 1 + 3 * draw.abs()
        elif "embed" in name:
            values = draw * 2
        elif value.ndim > 1:
            # Less in the decoder's last part, whose snakes would else magnify rounding.
            values = draw * value[0].numel() ** -0.5 * (0.4 if name.startswith("decoder.decoder") else 1.0)
        elif name.endswith((".scale", ".gamma")) or ("norm" in name and "weight" in name):
            values = 1 + 0.1 * draw
        else:
            values = 0.1 * draw
        tensors[_published(name)] = values.contiguous()
    for name in list(tensors):
        if name.endswith("embed_sum"):
            tensors[name.replace("embed_sum", "initialized")] = torch.ones(1)
    return tensors


def _published(name: str) -> str:
    """The name in a checkpoint: convolutions are wrapped there, other layers are not."""
    *path, parameter = name.split(".")
    convolutional = (
        name.startswith("encoder.encoder.")
        or path[-1] in _WRAPPED
        or (name.startswith(("decoder.decoder.", "decoder.upsample.")) and path[-1].isdecimal())
    )
    wrapped = convolutional and parameter in ("weight", "bias")
    return ".".join([*path, "conv", parameter] if wrapped else [*path, parameter])


def write_qwen3_tts_checkpoint(
    folder: Path, config: dict[str, Any] | None = None, tensors: dict[str, Tensor] | None = None
) -> Path:
    """``config.json`` and ``model.safetensors``."""
    folder.mkdir(parents=True, exist_ok=True)
    config = tiny() if config is None else config
    (folder / "config.json").write_text(json.dumps(config))
    save_file(random_tensors(config) if tensors is None else tensors, folder / "model.safetensors")
    return folder
