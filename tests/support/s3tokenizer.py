"""Small random S3Tokenizer checkpoints, as a folder and as a graph, and their definition in float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import conv1d, gelu, layer_norm, linear, normalize

Tensors = dict[str, Tensor]

#: Versions by their short name: the published name, the strides, and how many layers the published one has.
VERSIONS = {
    "v1": ("speech_tokenizer_v1", (1, 2)),
    "v1_25hz": ("speech_tokenizer_v1_25hz", (2, 2)),
    "v2": ("speech_tokenizer_v2_25hz", (2, 2)),
    "v3": ("speech_tokenizer_v3_25hz", (2, 2)),
}


def tiny(version: str) -> dict[str, Any]:
    """A configuration with heads 64 wide."""
    return {
        "name": VERSIONS[version][0],
        "n_mels": 128,
        "n_audio_ctx": 1500,
        "n_audio_state": 128,
        "n_audio_head": 2,
        "n_audio_layer": 3 if version == "v3" else 2,
        "n_codebook_size": 6561 if version in ("v2", "v3") else 50,
    }


def random_tensors(version: str, seed: int = 0) -> Tensors:
    """Every tensor of ``tiny(version)`` under the package's names."""
    generator = torch.Generator().manual_seed(seed)
    config = tiny(version)
    width = config["n_audio_state"]

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=generator) * std

    tensors = {
        "encoder.conv1.weight": normal(width, 128, 3, std=0.1),
        "encoder.conv1.bias": normal(width, std=0.1),
        "encoder.conv2.weight": normal(width, width, 3, std=0.05),
        "encoder.conv2.bias": normal(width, std=0.1),
    }
    for layer in range(config["n_audio_layer"]):
        place = f"encoder.blocks.{layer}."
        for name in ("query", "key", "value", "out"):
            tensors[f"{place}attn.{name}.weight"] = normal(width, width, std=width**-0.5)
            if name != "key":
                tensors[f"{place}attn.{name}.bias"] = normal(width, std=0.1)
        for name in ("attn_ln", "mlp_ln"):
            tensors[f"{place}{name}.weight"] = 1 + normal(width, std=0.1)
            tensors[f"{place}{name}.bias"] = normal(width, std=0.1)
        tensors[f"{place}mlp.0.weight"] = normal(4 * width, width, std=width**-0.5)
        tensors[f"{place}mlp.0.bias"] = normal(4 * width, std=0.1)
        tensors[f"{place}mlp.2.weight"] = normal(width, 4 * width, std=(4 * width) ** -0.5)
        tensors[f"{place}mlp.2.bias"] = normal(width, std=0.1)
        if version in ("v2", "v3"):
            tensors[f"{place}attn.fsmn_block.weight"] = normal(width, 1, 31, std=0.2)
    if version in ("v2", "v3"):
        tensors["quantizer._codebook.project_down.weight"] = normal(8, width, std=2 * width**-0.5)
        tensors["quantizer._codebook.project_down.bias"] = normal(8, std=0.1)
    else:
        tensors["encoder.positional_embedding"] = normal(1500, width, std=0.3)
        tensors["quantizer._codebook.embed"] = normal(50, width, std=width**-0.5)
    return tensors


def write_s3_checkpoint(folder: Path, version: str, tensors: Tensors | None = None, **changes: Any) -> Path:
    """``config.json`` and ``model.safetensors``; ``changes`` override keys of the configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**tiny(version), **changes}))
    save_file(tensors or random_tensors(version), folder / "model.safetensors")
    return folder


def hidden_frames(tensors: Tensors, version: str, mel: Tensor) -> Tensor:
    """The encoder's definition on one window (128, L), in float64: (T, d)."""
    own = {name: tensor.double() for name, tensor in tensors.items()}
    x = mel.double()[None]
    for name, stride in zip(("conv1", "conv2"), VERSIONS[version][1], strict=True):
        x = gelu(conv1d(x, own[f"encoder.{name}.weight"], own[f"encoder.{name}.bias"], stride, padding=1))
    x = x[0].T
    length, width = x.shape
    if version in ("v1", "v1_25hz"):
        x = x + own["encoder.positional_embedding"][:length]
    angles = torch.outer(torch.arange(length).double(), 10000.0 ** (-torch.arange(0, 64, 2).double() / 64))
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]

    def rotated(heads: Tensor) -> Tensor:
        first, second = heads.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    for layer in range(tiny(version)["n_audio_layer"]):
        weights = {name.split(".", 3)[3]: own[name] for name in own if name.startswith(f"encoder.blocks.{layer}.")}
        y = layer_norm(x, (width,), weights["attn_ln.weight"], weights["attn_ln.bias"])
        q, k, v = (
            linear(y, weights[f"attn.{name}.weight"], weights.get(f"attn.{name}.bias")).unflatten(-1, (2, 64))
            for name in ("query", "key", "value")
        )
        memory = torch.zeros_like(x)
        if version in ("v2", "v3"):
            q, k = rotated(q), rotated(k)
            values = v.flatten(1)
            memory = conv1d(values.T[None], weights["attn.fsmn_block.weight"], padding=15, groups=width)[0].T + values
        scores = torch.einsum("ihd,jhd->hij", q, k) / 8
        attended = torch.einsum("hij,jhd->ihd", scores.softmax(-1), v).flatten(1)
        x = x + linear(attended, weights["attn.out.weight"], weights["attn.out.bias"]) + memory
        y = layer_norm(x, (width,), weights["mlp_ln.weight"], weights["mlp_ln.bias"])
        y = gelu(linear(y, weights["mlp.0.weight"], weights["mlp.0.bias"]))
        x = x + linear(y, weights["mlp.2.weight"], weights["mlp.2.bias"])
    return x


def codes(tensors: Tensors, version: str, hidden: Tensor) -> Tensor:
    """The quantizer's definition: (T, d) in float64 to (T,)."""
    if version in ("v1", "v1_25hz"):
        rows = tensors["quantizer._codebook.embed"].double()
        return torch.cdist(normalize(hidden), rows).argmin(dim=1)
    weight, bias = (tensors[f"quantizer._codebook.project_down.{part}"].double() for part in ("weight", "bias"))
    digits = (linear(hidden, weight, bias).tanh() * 0.9990000128746033).round().long() + 1
    return (digits * 3 ** torch.arange(8)).sum(dim=1)


def write_s3_graph(path: Path, version: str, tensors: Tensors) -> Path:
    """Nodes and weights called as in the published graph of ``version``; too few nodes to be run."""
    graph = _Graph(spelled_out=version == "v3")
    strides = VERSIONS[version][1]
    for index, stride in enumerate(strides, start=1):
        parts = [tensors[f"encoder.conv{index}.{part}"] for part in ("weight", "bias")]
        graph.node(f"/conv{index}/Conv", "Conv", *parts, strides=[stride], pads=[1, 1])
    if version in ("v1", "v1_25hz"):
        graph.node("/Slice", "Slice", tensors["encoder.positional_embedding"], name="encoders.positional_embedding")
    for layer in range(tiny(version)["n_audio_layer"]):
        own, place = f"encoder.blocks.{layer}.", f"/blocks.{layer}/"
        for norm in ("attn_ln", "mlp_ln"):
            graph.norm(f"{place}{norm}", tensors[f"{own}{norm}.weight"], tensors[f"{own}{norm}.bias"])
        for linear_layer in ("attn.query", "attn.key", "attn.value", "attn.out", "mlp.0", "mlp.2"):
            module = place + (linear_layer.replace(".", "/") if "attn" in linear_layer else f"mlp/{linear_layer}")
            graph.linear(module, tensors[f"{own}{linear_layer}.weight"], tensors.get(f"{own}{linear_layer}.bias"))
        graph.node(f"{place}attn/Mul", "Mul", torch.tensor(0.35355339))
        if f"{own}attn.fsmn_block.weight" in tensors:
            memory = tensors[f"{own}attn.fsmn_block.weight"]
            graph.node(f"{place}attn/fsmn_block/Conv", "Conv", memory, strides=[1], group=len(memory))
            graph.node(f"{place}attn/Mul_1", "Mul", torch.ones(2048, 64))  # the table of rotations
    if version in ("v1", "v1_25hz"):
        book = tensors["quantizer._codebook.embed"]
        graph.node("/quantizer/rq/model/layers.0/_codebook/Pow_1", "Pow", book.T.contiguous())
    else:
        down = [tensors[f"quantizer._codebook.project_down.{part}"] for part in ("weight", "bias")]
        graph.linear("/quantizer/project_in", *down, bias_name="quantizer.project_in.bias")
        graph.node("/quantizer/Mul", "Mul", torch.tensor([3.0**digit for digit in range(8)]))
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(graph.model(), path)
    return path


class _Graph:
    def __init__(self, spelled_out: bool) -> None:
        self._spelled_out = spelled_out
        self._nodes: list[onnx.NodeProto] = []
        self._weights: list[onnx.TensorProto] = []

    def node(self, node_name: str, kind: str, *weights: Tensor, name: str | None = None, **attributes: Any) -> None:
        names = []
        for weight in weights:
            names.append(name or f"onnx::{kind}_{1500 + len(self._nodes) + len(self._weights)}")
            value = numpy_helper.from_array(np.ascontiguousarray(weight.numpy()), names[-1])
            if self._spelled_out and weight.ndim == 1 and kind == "Add":
                self._nodes.append(helper.make_node("Constant", [], [names[-1]], value=value))
            else:
                self._weights.append(value)
        inputs = [*names, "x"] if kind == "Add" else ["x", *names]
        self._nodes.append(helper.make_node(kind, inputs, [f"{node_name}_output_0"], name=node_name, **attributes))

    def linear(self, place: str, weight: Tensor, bias: Tensor | None, bias_name: str | None = None) -> None:
        self.node(f"{place}/MatMul", "MatMul", weight.T)
        if bias is not None:
            self.node(f"{place}/Add", "Add", bias, name=bias_name)

    def norm(self, place: str, weight: Tensor, bias: Tensor) -> None:
        if self._spelled_out:
            self.node(f"{place}/Add", "Add", torch.tensor(1e-5))
            self.node(f"{place}/Mul", "Mul", weight)
            self.node(f"{place}/Add_1", "Add", bias)
        else:
            self.node(f"{place}/LayerNormalization", "LayerNormalization", weight, bias, epsilon=1e-5)

    def model(self) -> onnx.ModelProto:
        ports = [
            helper.make_tensor_value_info("feats", TensorProto.FLOAT, [1, 128, "length"]),
            helper.make_tensor_value_info("feats_length", TensorProto.INT32, [1]),
        ]
        result = [helper.make_tensor_value_info("indices", TensorProto.INT32, [1, "tokens"])]
        return helper.make_model(helper.make_graph(self._nodes, "main_graph", ports, result, self._weights))
