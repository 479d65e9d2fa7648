"""Small checkpoints of the transformers library with seeded random weights, in the layout that the library saves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

_CONVS = {"conv_dim": [8] * 7, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
_SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}

#: Smallest legal configurations, by name. ``class`` is of the model; the rest goes into its configuration.
CONFIGS: dict[str, dict[str, Any]] = {
    "mimi": {
        "class": "MimiModel", **_SMALL, "num_filters": 4, "upsampling_ratios": [4, 3, 2], "upsample_groups": 16,
        "codebook_size": 32, "codebook_dim": 8, "vector_quantization_hidden_dimension": 8, "num_quantizers": 5,
        "num_semantic_quantizers": 2, "num_key_value_heads": 2, "sliding_window": 10, "layer_scale_initial_scale": 1.0,
    },
    "encodec": {
        "class": "EncodecModel", "hidden_size": 16, "num_filters": 4, "upsampling_ratios": [5, 4, 2],
        "codebook_size": 32, "target_bandwidths": [3.0, 6.0, 15.0], "sampling_rate": 24000,
    },
    "encodec_chunks": {
        "class": "EncodecModel", "hidden_size": 16, "num_filters": 4, "upsampling_ratios": [5, 4, 2],
        "codebook_size": 32, "target_bandwidths": [3.0, 6.0, 12.0], "sampling_rate": 24000, "audio_channels": 2,
        "chunk_length_s": 0.05, "overlap": 0.04, "norm_type": "time_group_norm", "use_causal_conv": False,
    },
    "dac": {
        "class": "DacModel", "encoder_hidden_size": 4, "downsampling_ratios": [2, 3, 5], "decoder_hidden_size": 32,
        "n_codebooks": 4, "codebook_size": 32, "codebook_dim": 4, "sampling_rate": 16000,
    },
    "xcodec": {
        "class": "XcodecModel", "target_bandwidths": [0.5, 1.0, 2.0], "codebook_size": 32,
        "acoustic_model_config": {
            "model_type": "dac", "encoder_hidden_size": 2, "downsampling_ratios": [8, 5, 4, 2],
            "decoder_hidden_size": 32, "upsampling_ratios": [8, 5, 4, 2], "hidden_size": 16,
        },
        "semantic_model_config": {"model_type": "hubert", **_SMALL, **_CONVS},
    },
    "higgs_audio_v2_tokenizer": {
        "class": "HiggsAudioV2TokenizerModel", "target_bandwidths": [0.5, 1.0], "codebook_size": 32, "codebook_dim": 8,
        "acoustic_model_config": {
            "model_type": "dac", "encoder_hidden_size": 2, "downsampling_ratios": [8, 5, 4, 2, 3],
            "decoder_hidden_size": 64, "upsampling_ratios": [8, 5, 4, 2, 3], "hidden_size": 16,
        },
        "semantic_model_config": {"model_type": "hubert", **_SMALL, **_CONVS},
    },
    "xcodec2": {
        "class": "Xcodec2Model", **_SMALL, "hidden_size": 64, "head_dim": 16, "num_key_value_heads": 2,
        "encoder_hidden_size": 2, "quantization_dim": 80, "quantization_levels": [4, 4, 4],
        "semantic_model_config": {"model_type": "wav2vec2-bert", **_SMALL},
    },
    "neucodec": {
        "class": "NeuCodecModel", **_SMALL, "hidden_size": 64, "head_dim": 16, "num_key_value_heads": 2,
        "encoder_hidden_size": 2, "quantization_dim": 80, "quantization_levels": [4, 4, 4],
        "semantic_model_config": {"model_type": "wav2vec2-bert", **_SMALL},
    },
}  # fmt: skip


def random_model(name: str, seed: int = 0, **changes: Any) -> Any:
    """A model of ``CONFIGS[name]`` with ``changes``, whose codebooks are not all zeros, in float32."""
    import transformers

    settings = {**CONFIGS[name], **changes}
    model_class = getattr(transformers, settings.pop("class"))
    torch.manual_seed(seed)
    model = model_class(model_class.config_class(**settings)).eval().requires_grad_(False)
    for module in model.modules():
        for buffer in ("embed", "embed_sum"):
            if isinstance(codebook := module._buffers.get(buffer), torch.Tensor):
                codebook.normal_(0, 0.1)
        # Trained layers keep their input's size.
        for name in ("weight", "original1", "weight_ih_l0", "weight_hh_l0"):
            weight = module._parameters.get(name)
            if weight is not None and weight.ndim > 1 and not isinstance(module, torch.nn.Embedding):
                weight.normal_(0, weight[0].numel() ** -0.5)
            if name == "original1" and weight is not None:
                scale = module.original0
                axes = [axis for axis in range(3) if scale.shape[axis] == 1]
                scale.copy_(weight.square().sum(axes, keepdim=True).sqrt())
    return model


def save_checkpoint(folder: Path, name: str, seed: int = 0, **changes: Any) -> Any:
    """Writes a model's checkpoint and returns the model."""
    model = random_model(name, seed, **changes)
    model.save_pretrained(folder)
    return model


@torch.inference_mode()
def library_codes(model: Any, samples: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """All codes (T, K) of one utterance, by the library's documented calls."""
    import transformers

    kind, config = model.config.model_type, model.config
    whole = torch.from_numpy(samples)[None, None]
    if kind in ("mimi", "dac", "xcodec", "higgs_audio_v2_tokenizer"):
        codes = model.encode(whole).audio_codes[0]
    elif kind in ("xcodec2", "neucodec"):
        extractor = getattr(transformers, {"xcodec2": "Xcodec2", "neucodec": "NeuCodec"}[kind] + "FeatureExtractor")()
        codes = model.encode(**extractor(samples, sampling_rate=16000, return_tensors="pt")).audio_codes[0]
    elif config.chunk_length_s is None:
        codes = model.encode(whole, bandwidth=config.target_bandwidths[-1]).audio_codes[0, 0]
    else:
        extractor = transformers.EncodecFeatureExtractor(2, 24000, 0.0, config.chunk_length_s, config.overlap)
        inputs = extractor(np.stack([samples, samples]), sampling_rate=24000, return_tensors="pt")
        output = model.encode(inputs["input_values"], inputs["padding_mask"], config.target_bandwidths[-1])
        chunks = list(output.audio_codes[:, 0])
        chunks[-1] = chunks[-1][:, : chunks[-1].shape[1] - output.last_frame_pad_length]
        codes = torch.cat(chunks, dim=1)
    return codes.T.numpy()


@torch.inference_mode()
def library_audio(model: Any, codes: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """Samples (S,) of codes (T, K), by the library's documented calls."""
    layout = torch.from_numpy(codes.astype(np.int64)).T[None]
    if model.config.model_type != "encodec":
        return model.decode(audio_codes=layout).audio_values.flatten().numpy()
    if model.config.chunk_length_s is None:
        return model.decode(layout[None], [None]).audio_values[0, 0].numpy()
    chunks = list(layout.split(30, dim=2))  # 1200 samples a chunk, 40 a frame
    missing = 30 - chunks[-1].shape[2]
    chunks[-1] = torch.nn.functional.pad(chunks[-1], (0, missing))
    output = model.decode(torch.stack(chunks), [None] * len(chunks), last_frame_pad_length=missing)
    return output.audio_values[0].mean(0).numpy()
