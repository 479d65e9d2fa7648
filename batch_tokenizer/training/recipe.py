"""Settings of a training run, and the configuration of the bundled default model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from batch_tokenizer.training.augmentation import Augmentation

#: The shape of the bundled default checkpoint. Bounded windows let a model trained on short crops take long audio.
SMALL: Mapping[str, Any] = {
    "model_type": "mimo_audio_tokenizer",
    "sampling_rate": 24000,
    "hop_length": 480,
    "nfft": 960,
    "window_size": 960,
    "n_mels": 128,
    "fmin": 0,
    "fmax": 8000,
    "d_model": 128,
    "kernel_size": 3,
    "stride_size": 1,
    "avg_pooler": 2,
    "encoder_layers": 3,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 512,
    "encoder_skip_layer_id": 2,
    "encoder_causal": False,
    "encoder_attn_window_size": [24, 24],
    "num_quantizers": 20,
    "codebook_size": [256, 256, 128],
    "decoder_layers": 3,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 512,
    "decoder_causal": True,
    "decoder_attn_window_size": [48, 0],
    "decoder_kernel_size": 3,
    "decoder_stride_size": 1,
    "vocoder_dim": 192,
    "vocoder_num_layers": 7,
    "vocoder_attention_heads": 4,
    "vocoder_intermediate_dim": 768,
    "vocoder_attn_window_size": [40, 10],
    "vocoder_padding": "same",
    "rope_theta": 10000,
    "rope_type": "default",
    "ln_type": "LayerNorm",
    "activation_function": "gelu",
    "max_audio_seconds": 1800,
}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings of a training run.

    Attributes:
        data: source of the training audio, as ``--data_list`` takes it.
        out: run folder: ``state.pt``, ``log.jsonl`` and ``checkpoint/``.
        held_out: source of audio that is scored during training but not trained on; None for none.
        config: the model's ``config.json``.
        start_from: checkpoint folder with initial weights; None for random ones.
        average_over: number of steps over which the exported weights are averaged.
        steps, minutes: the run ends at whichever comes first; the learning rate falls to zero towards it.
        batch_size: crops per step.
        token_frames: length of a crop in token frames.
        learning_rate: peak learning rate of AdamW, reached after ``warmup`` steps.
        quantize_from: first step with the quantizer; at the latest half way through ``steps``.
        coarse_weight, commitment_weight: weights of the coarse mel loss and of the commitment loss.
        adversarial_from: share of the run after which the discriminators are used.
        adversarial_weight, feature_weight: weights of the adversarial loss and of the feature matching loss.
        augmentation: settings of the augmentation.
        seed: of the initial weights, the order of the data and all random choices.
        device: name of a torch device.
        num_workers: processes that load crops.
        cache_gib: memory for decoded audio per loading process.
        log_every: steps between two progress lines.
        save_every: seconds between two saves.
    """

    data: Path | str
    out: Path
    held_out: Path | str | None = None
    config: Mapping[str, Any]
    start_from: str | None = None
    average_over: int = 1000
    steps: int = 40000
    minutes: float = math.inf
    batch_size: int = 4
    token_frames: int = 32
    learning_rate: float = 1.2e-3
    warmup: int = 200
    quantize_from: int = 130
    coarse_weight: float = 2.0
    commitment_weight: float = 0.5
    adversarial_from: float = 0.6
    adversarial_weight: float = 0.1
    feature_weight: float = 1.0
    augmentation: Augmentation = field(default_factory=Augmentation)
    seed: int = 1986
    device: str = "cpu"
    num_workers: int = 1
    cache_gib: float = 4.0
    log_every: int = 50
    save_every: float = 300.0
