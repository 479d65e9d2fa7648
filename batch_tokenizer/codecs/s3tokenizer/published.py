"""Weights of a published S3Tokenizer graph (``speech_tokenizer_v*.onnx``) under the names of the s3tokenizer package.

The graph is never run. Its exporter kept the module's path in the names of nodes, such as
``/blocks.0/attn/query/MatMul``, but not in those of most weights, so a weight is named by the node that takes it:

    Conv                  weight and bias; the first is ``conv1``, the second ``conv2``, depthwise ones are memories
    MatMul, Add           weight (stored (in, out)) and bias of a linear layer
    LayerNormalization    weight and bias of a norm; where it is spelled out, those of its ``Mul`` and last ``Add``
    Pow, Slice            the codebook of v1 (stored (d, size)), its table of positions

Every weight must be found: loading is as strict as from a folder.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy.typing as npt
import torch
from torch import Tensor

from batch_tokenizer.codecs.checkpoint import GRAPHS_KEY, Checkpoint
from batch_tokenizer.codecs.onnx.graph_file import GraphFile
from batch_tokenizer.codecs.s3tokenizer.config import S3Config
from batch_tokenizer.records import RunError

if TYPE_CHECKING:
    import onnx

Arrays = dict[str, npt.NDArray[Any]]

_PUBLISHED = re.compile(r"speech_tokenizer.*\.onnx", re.IGNORECASE)

#: The ending of a second graph of the same weights, for batches, that CosyVoice 3 comes with.
_FOR_BATCHES = ".batch.onnx"

#: A node of a layer: which, the module in it, and the operation.
_IN_LAYER = re.compile(r"(?:^|/)blocks\.(\d+)/(?:attn/)?(?:mlp/)?([\w.]+)/(\w+)$")

_LINEAR = {"query": "attn.query", "key": "attn.key", "value": "attn.value", "out": "attn.out",
           "mlp.0": "mlp.0", "mlp.2": "mlp.2"}  # fmt: skip
_NORMS = ("attn_ln", "mlp_ln")


def is_published_graph(name: str) -> bool:
    """Whether a file name is that of a published graph."""
    return _PUBLISHED.fullmatch(name) is not None


@dataclass(frozen=True)
class GraphCheckpoint(Checkpoint):
    """A published graph as a checkpoint: ``tensors`` are its weights under the package's names."""

    path: Path = field(default_factory=Path)

    def tensors(self, strip: str = "") -> Iterator[tuple[str, Tensor]]:
        for name, array in sorted(self.arrays.items()):
            yield name, torch.from_numpy(array.copy())

    @cached_property
    def graph(self) -> onnx.GraphProto:
        """The parsed graph with all of its weights."""
        from onnx.external_data_helper import load_external_data_for_model

        opened = GraphFile.open(self.path)
        opened.check_external_files()
        load_external_data_for_model(opened.proto, str(self.path.parent))
        return opened.proto.graph

    @cached_property
    def values(self) -> Arrays:
        """Initializers and constants by the name under which nodes take them."""
        return _values(self.graph)

    @cached_property
    def arrays(self) -> Arrays:
        """The weights that are known, by the package's names."""
        return _named(self.graph, self.values)


def open_graph(checkpoint: Checkpoint) -> tuple[GraphCheckpoint, S3Config]:
    """The graph of a folder that has one, and the configuration that its weights and strides imply.

    Raises:
        RunError: the folder has two, or the graph is of no known version.
    """
    names = [name for name in checkpoint.config[GRAPHS_KEY] if is_published_graph(name)]
    plain = {name for name in names if not name.endswith(_FOR_BATCHES)}
    names = [name for name in names if name in plain or name.replace(_FOR_BATCHES, ".onnx") not in plain]
    if len(names) != 1:
        raise RunError(
            f"{checkpoint.folder}: has {', '.join(names)}; pass the path of the one that is meant as --model_path"
        )
    path = checkpoint.folder / names[0]
    opened = GraphCheckpoint(checkpoint.folder, checkpoint.name, checkpoint.config, path)
    return opened, _config(path, opened, checkpoint.config)


def _config(path: Path, opened: GraphCheckpoint, stated: Mapping[str, Any]) -> S3Config:
    arrays = opened.arrays
    layers = {int(name.split(".")[2]) for name in arrays if name.startswith("encoder.blocks.")}
    fsmn = "encoder.blocks.0.attn.fsmn_block.weight" in arrays
    needed = ["encoder.conv1.weight", "encoder.blocks.0.attn.query.weight"]
    needed.append("quantizer._codebook.project_down.weight" if fsmn else "quantizer._codebook.embed")
    missing = [name for name in needed if name not in arrays]
    if missing:
        raise RunError(f"{path}: lacks {', '.join(missing)}; it is no S3Tokenizer, or of a version not known here")
    width, n_mels, _ = arrays["encoder.conv1.weight"].shape
    strides = _strides(opened.graph)
    if len(strides) < 2 or strides[0] not in (1, 2) or strides[1] != 2:
        raise RunError(f"{path}: its convolutions have the strides {strides[:2]}, must have 1 or 2, and 2")
    heads = stated.get("n_audio_head", _heads(opened, width))
    try:
        return S3Config(
            stride=strides[0],
            fsmn=fsmn,
            n_mels=n_mels,
            n_audio_ctx=1500 if fsmn else len(arrays.get("encoder.positional_embedding", ())),
            n_audio_state=width,
            n_audio_head=heads if isinstance(heads, int) and heads > 0 else 1,
            n_audio_layer=len(layers),
            n_codebook_size=3 ** len(arrays[needed[2]]) if fsmn else len(arrays[needed[2]]),
            key_bias="encoder.blocks.0.attn.key.bias" in arrays,
        )
    except RunError as error:
        raise RunError(f"{path}: {str(error).removeprefix('config.json: ')}") from error


def _values(graph: onnx.GraphProto) -> Arrays:
    from onnx import numpy_helper

    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            for attribute in node.attribute:
                if attribute.name == "value":
                    values[node.output[0]] = numpy_helper.to_array(attribute.t)
        elif node.op_type == "Identity" and node.input[0] in values:  # one weight that several modules share
            values[node.output[0]] = values[node.input[0]]
    return values


def _heads(opened: GraphCheckpoint, width: int) -> int:
    """Attention heads: queries and keys are multiplied by (width / heads)^(-1/4). Published heads are 64 wide."""
    for node in opened.graph.node:
        layer = _IN_LAYER.search(node.name)
        if layer is None or layer[2] != "attn" or node.op_type != "Mul":
            continue
        for scale in (opened.values[name] for name in node.input if name in opened.values):
            if scale.size == 1 and 0 < float(scale.item()) < 1:
                return max(1, width // round(float(scale.item()) ** -4))
    return max(1, width // 64)


def _strides(graph: onnx.GraphProto) -> list[int]:
    return [
        next((attribute.ints[0] for attribute in node.attribute if attribute.name == "strides"), 1)
        for node in graph.node
        if node.op_type == "Conv"
    ]


def _named(graph: onnx.GraphProto, values: Arrays) -> Arrays:
    named: Arrays = {}
    convolutions = 0
    for node in graph.node:
        taken = [(name, values[name]) for name in node.input if name in values and values[name].size > 1]
        if not taken:
            continue
        name, value = taken[0]
        layer = _IN_LAYER.search(node.name)
        place = f"encoder.blocks.{layer[1]}." if layer else ""
        module = layer[2] if layer else ""
        if node.op_type == "Conv":
            if layer is not None:
                named[f"{place}attn.fsmn_block.weight"] = value
                continue
            convolutions += 1
            for part, (_, array) in zip(("weight", "bias"), taken, strict=False):
                named[f"encoder.conv{convolutions}.{part}"] = array
        elif "positional_embedding" in name:
            named["encoder.positional_embedding"] = value
        elif "quantizer" in node.name or name.startswith("quantizer"):
            _name_quantizer(named, node, value)
        elif module in _LINEAR and node.op_type in ("MatMul", "Add"):
            named[f"{place}{_LINEAR[module]}.{'weight' if node.op_type == 'MatMul' else 'bias'}"] = value.T
        elif module in _NORMS:
            if node.op_type == "LayerNormalization":
                for part, (_, array) in zip(("weight", "bias"), taken, strict=False):
                    named[f"{place}{module}.{part}"] = array
            elif node.op_type in ("Mul", "Add"):
                named[f"{place}{module}.{'weight' if node.op_type == 'Mul' else 'bias'}"] = value
    return named


def _name_quantizer(named: Arrays, node: onnx.NodeProto, value: npt.NDArray[Any]) -> None:
    if "project" in node.name:
        if node.op_type in ("MatMul", "Add"):
            part = "weight" if node.op_type == "MatMul" else "bias"
            named[f"quantizer._codebook.project_down.{part}"] = value.T
    elif node.op_type == "Pow" and value.ndim == 2:
        named["quantizer._codebook.embed"] = value.T
