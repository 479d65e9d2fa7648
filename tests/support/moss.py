"""Small MOSS checkpoints with seeded random weights in the published layout, and the model's definition in float64.

The reference reads like the model's description: one utterance, dense masks, no packing, no caches, none of the
package's code. It is what the unit tests compare with, beside the known answers of ``tests/parity``.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, normalize, pad

Tensors = dict[str, Tensor]


def stage(
    channels_in: int, channels_out: int, width: int, heads: int, layers: int = 1, **changes: Any
) -> dict[str, Any]:
    """A transformer stage as in ``config.json``."""
    return {
        "module_type": "Transformer",
        "causal": True,
        "conv_layout": True,
        "d_model": width,
        "dim_feedforward": 2 * width,
        "gating": "none",
        "input_dimension": channels_in,
        "layer_scale": 0.01,
        "max_period": 10000,
        "norm": "layer_norm",
        "num_heads": heads,
        "num_layers": layers,
        "output_dimension": channels_out,
        "positional_embedding": "rope",
        **changes,
    }


def patch(size: int) -> dict[str, Any]:
    """A patch stage as in ``config.json``."""
    return {"module_type": "PatchedPretransform", "patch_size": size}


def tiny(**changes: Any) -> dict[str, Any]:
    """A configuration: 16 kHz, 640 samples a frame (25 frames a second), a window of 1 s, 5 codebooks of 32."""
    return {
        "model_type": "speech_tokenizer",
        "architectures": ["MossAudioTokenizerModel"],
        "sampling_rate": 16000,
        "downsample_rate": 640,
        "causal_transformer_context_duration": 1,
        "encoder_kwargs": [
            patch(160),
            stage(160, 12, 24, 2, layers=2),
            patch(4),
            stage(48, 20, 32, 2),
        ],
        "decoder_kwargs": [
            stage(20, 48, 32, 2),
            patch(4),
            stage(12, 160, 24, 2, layers=2),
            patch(160),
        ],
        "quantizer_type": "rlfq",
        "quantizer_kwargs": {
            "codebook_dim": 6,
            "codebook_size": 32,
            "input_dim": 20,
            "num_quantizers": 5,
            "output_dim": 20,
            "quantizer_type": "rlfq",
            "rvq_dim": 16,
        },
        **changes,
    }


def random_tensors(config: dict[str, Any], seed: int = 0) -> Tensors:
    """Every tensor that the configuration implies, under its published name, with values that make codes vary."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=generator) * std

    tensors: Tensors = {}
    for part in ("encoder", "decoder"):
        for index, kwargs in enumerate(config[f"{part}_kwargs"]):
            if kwargs["module_type"] != "Transformer":
                continue
            place, width, hidden = f"{part}.{index}.", kwargs["d_model"], kwargs["dim_feedforward"]
            for name, rows, columns in (
                ("input_proj", width, kwargs["input_dimension"]),
                ("output_proj", kwargs["output_dimension"], width),
            ):
                if rows != columns:
                    tensors[f"{place}{name}.weight"] = normal(rows, columns, std=columns**-0.5)
            for layer in range(kwargs["num_layers"]):
                inner = f"{place}transformer.layers.{layer}."
                tensors[f"{inner}self_attn.in_projs.0.weight"] = normal(3 * width, width, std=1.5 * width**-0.5)
                tensors[f"{inner}self_attn.out_projs.0.weight"] = normal(width, width, std=width**-0.5)
                tensors[f"{inner}linear1.weight"] = normal(hidden, width, std=width**-0.5)
                tensors[f"{inner}linear2.weight"] = normal(width, hidden, std=hidden**-0.5)
                for norm in ("norm1", "norm2"):
                    tensors[f"{inner}{norm}.weight"] = 1 + normal(width, std=0.1)
                    tensors[f"{inner}{norm}.bias"] = normal(width, std=0.1)
                if kwargs["layer_scale"] is not None:
                    for scale in ("layer_scale_1", "layer_scale_2"):
                        tensors[f"{inner}{scale}.scale"] = 0.7 + normal(width, std=0.1)
    audio = max(name for name in tensors if name.startswith("decoder") and name.endswith("output_proj.weight"))
    tensors[audio] *= 0.04  # ordinary levels
    sizes = config["quantizer_kwargs"]
    projections = [
        ("quantizer.input_proj", sizes["input_dim"], sizes["rvq_dim"]),
        ("quantizer.output_proj", sizes["rvq_dim"], sizes["output_dim"]),
    ]
    for index in range(sizes["num_quantizers"]):
        place = f"quantizer.quantizers.{index}."
        tensors[f"{place}codebook.weight"] = normal(sizes["codebook_size"], sizes["codebook_dim"])
        projections.append((f"{place}in_proj", sizes["rvq_dim"], sizes["codebook_dim"]))
        projections.append((f"{place}out_proj", sizes["codebook_dim"], sizes["rvq_dim"]))
    for name, channels_in, channels_out in projections:
        if channels_in != channels_out:
            tensors[f"{name}.parametrizations.weight.original0"] = 0.5 + normal(channels_out, 1, 1).abs()
            tensors[f"{name}.parametrizations.weight.original1"] = normal(channels_out, channels_in, 1)
            tensors[f"{name}.bias"] = normal(channels_out, std=0.1)
    return tensors


def write_moss_checkpoint(
    folder: Path, config: dict[str, Any] | None = None, tensors: Tensors | None = None, seed: int = 0
) -> Path:
    """``config.json`` and ``model.safetensors``, by default of ``tiny()`` with random weights."""
    folder.mkdir(parents=True, exist_ok=True)
    config = tiny() if config is None else config
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    save_file(random_tensors(config, seed) if tensors is None else tensors, folder / "model.safetensors")
    return folder


def noise(num_samples: int, seed: int = 0) -> npt.NDArray[np.float32]:
    """Noise whose level swells and fades, float32 (num_samples,)."""
    generator = np.random.default_rng(seed)
    level = 0.2 + 0.15 * np.sin(np.arange(num_samples) / 900)
    return (generator.standard_normal(num_samples) * level).astype(np.float32)


@dataclass
class Encoded:
    """What the reference makes of an utterance: ``distances`` float64 (T, K, size), ``hidden`` float64 (T, d)."""

    hidden: Tensor
    codes: npt.NDArray[np.int64]
    distances: Tensor


class Reference:
    """The definition in float64, one utterance at a time."""

    def __init__(self, config: dict[str, Any], tensors: Tensors) -> None:
        self.config = config
        self.tensors = {name: tensor.double() for name, tensor in tensors.items()}

    def encode(self, samples: npt.NDArray[np.float32], num_quantizers: int) -> Encoded:
        """Samples (S,) to hidden frames and codes."""
        x = torch.from_numpy(samples).double()[:, None]
        x = pad(x, (0, 0, 0, -len(x) % self.config["downsample_rate"]))
        hidden = self._stages("encoder", x, self.config["sampling_rate"])
        residual = self._projection("quantizer.input_proj", hidden)
        codes, distances = [], []
        for index in range(num_quantizers):
            place = f"quantizer.quantizers.{index}."
            rows = self.tensors[f"{place}codebook.weight"]
            query = normalize(self._projection(f"{place}in_proj", residual))
            distance = (query[:, None] - normalize(rows)[None]).square().sum(dim=-1)
            code = distance.argmin(dim=1)
            residual = residual - self._projection(f"{place}out_proj", rows[code])
            codes.append(code)
            distances.append(distance)
        return Encoded(hidden, torch.stack(codes, dim=1).numpy(), torch.stack(distances, dim=1))

    def decode(self, codes: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        """Codes (T, K) to samples."""
        total: Tensor | float = 0.0
        for index, column in enumerate(torch.from_numpy(codes.astype(np.int64)).unbind(1)):
            place = f"quantizer.quantizers.{index}."
            total = total + self._projection(f"{place}out_proj", self.tensors[f"{place}codebook.weight"][column])
        assert isinstance(total, Tensor)
        x = self._projection("quantizer.output_proj", total)
        rate = self.config["sampling_rate"] / self.config["downsample_rate"]
        return self._stages("decoder", x, rate)[:, 0].numpy()

    def _stages(self, part: str, x: Tensor, rate: float) -> Tensor:
        for index, kwargs in enumerate(self.config[f"{part}_kwargs"]):
            if kwargs["module_type"] == "Transformer":
                x = self._transformer(f"{part}.{index}.", kwargs, x, rate)
            elif part == "encoder":
                size = kwargs["patch_size"]
                x = torch.stack([row.t().flatten() for row in x.split(size)])
                rate = rate / size
            else:
                size = kwargs["patch_size"]
                x = torch.cat([row.unflatten(0, (-1, size)).t() for row in x])
                rate = rate * size
        return x

    def _transformer(self, place: str, kwargs: dict[str, Any], x: Tensor, rate: float) -> Tensor:
        heads, size = kwargs["num_heads"], kwargs["d_model"] // kwargs["num_heads"]
        context = int(rate * self.config["causal_transformer_context_duration"])
        x = self._linear(f"{place}input_proj.weight", x)
        i = torch.arange(len(x))[:, None] - torch.arange(len(x))[None]
        hidden = (i < 0) | (i >= context)
        angle = torch.arange(len(x)).double()[:, None, None] * torch.exp(
            torch.arange(size // 2).double() * (-2 * math.log(kwargs["max_period"]) / size)
        )
        turn = torch.polar(torch.ones_like(angle), angle)
        for layer in range(kwargs["num_layers"]):
            inner = f"{place}transformer.layers.{layer}."
            q, k, v = self._linear(f"{inner}self_attn.in_projs.0.weight", self._norm(f"{inner}norm1", x)).chunk(
                3, dim=1
            )
            q, k, v = (part.unflatten(1, (heads, size)) for part in (q, k, v))
            q, k = (
                torch.view_as_real(torch.view_as_complex(part.unflatten(2, (-1, 2))) * turn).flatten(2)
                for part in (q, k)
            )
            scores = torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(size)
            weights = scores.masked_fill(hidden, -math.inf).softmax(dim=-1)
            attended = torch.einsum("hij,jhd->ihd", weights, v).flatten(1)
            x = x + self._scale(f"{inner}layer_scale_1", self._linear(f"{inner}self_attn.out_projs.0.weight", attended))
            wide = gelu(self._linear(f"{inner}linear1.weight", self._norm(f"{inner}norm2", x)))
            x = x + self._scale(f"{inner}layer_scale_2", self._linear(f"{inner}linear2.weight", wide))
        return self._linear(f"{place}output_proj.weight", x)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.tensors[name].t() if name in self.tensors else x

    def _scale(self, name: str, x: Tensor) -> Tensor:
        return x * self.tensors[f"{name}.scale"] if f"{name}.scale" in self.tensors else x

    def _norm(self, name: str, x: Tensor) -> Tensor:
        return layer_norm(x, x.shape[1:], self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"], eps=1e-5)

    def _projection(self, name: str, x: Tensor) -> Tensor:
        if f"{name}.bias" not in self.tensors:
            return x
        direction = self.tensors[f"{name}.parametrizations.weight.original1"][:, :, 0]
        gain = self.tensors[f"{name}.parametrizations.weight.original0"][:, :, 0]
        return x @ (gain * normalize(direction)).t() + self.tensors[f"{name}.bias"]


def assert_codes_match(codes: npt.NDArray[Any], encoded: Encoded, margin: float = 1e-5) -> None:
    """Codes (T, K) equal the reference's, except from where two rows were nearer to equal than ``margin``."""
    assert codes.shape == encoded.codes.shape
    for frame in range(len(codes)):
        for index in range(codes.shape[1]):
            if codes[frame, index] != encoded.codes[frame, index]:
                nearest, second = encoded.distances[frame, index].topk(2, largest=False).values.tolist()
                assert second - nearest < margin, f"frame {frame}, codebook {index}: not a near-tie"
                break  # what later codebooks quantize has changed
