"""Writes an ONNX graph node by node, its weights inside the file or in one beside it that several graphs may share.

Graphs are written directly and not traced from torch: a trace of a model with this many symbolic sizes takes minutes
where this takes a second, and a traced constant that should have been a size is found only at another size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper
from torch import Tensor

from batch_tokenizer import __version__

#: The operator set of every graph.
OPSET = 18

#: Offsets in a weight file are multiples of this, so that they can be mapped.
_ALIGNMENT = 4096

_TYPES = {"float32": TensorProto.FLOAT, "int32": TensorProto.INT32, "int64": TensorProto.INT64}

Dims = Sequence[int | str]


class WeightFile:
    """A file of weights beside the graphs. A weight that two graphs name is stored once.

    Attributes:
        path: where it is; a graph names it relative to its own folder, which must be the same.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._places: dict[str, tuple[int, int]] = {}
        path.write_bytes(b"")

    def store(self, name: str, values: npt.NDArray[Any]) -> tuple[int, int]:
        """Offset and length of the weight's bytes, which are appended where they are new."""
        if name not in self._places:
            with self.path.open("ab") as file:
                file.write(b"\0" * (-file.tell() % _ALIGNMENT))
                self._places[name] = file.tell(), values.nbytes
                file.write(values.tobytes())
        return self._places[name]


class GraphBuilder:
    """A graph under construction. Values are known by name; each method that computes returns its result's name."""

    def __init__(self, name: str, weights: WeightFile | None = None) -> None:
        self._name = name
        self._weights = weights
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, onnx.TensorProto] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []

    def input(self, name: str, dtype: str, dims: Dims) -> str:
        """Declares an input; a dimension that is a name is free."""
        self._inputs.append(helper.make_tensor_value_info(name, _TYPES[dtype], list(dims)))
        return name

    def output(self, name: str, value: str, dtype: str, dims: Dims) -> None:
        """Declares ``value`` as an output."""
        self._nodes.append(helper.make_node("Identity", [value], [name]))
        self._outputs.append(helper.make_tensor_value_info(name, _TYPES[dtype], list(dims)))

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """One node with one output."""
        return self.split_op(kind, 1, *inputs, **attributes)[0]

    def split_op(self, kind: str, count: int, *inputs: str, **attributes: Any) -> list[str]:
        """One node with ``count`` outputs."""
        number = len(self._nodes)
        outputs = [f"{kind}_{number}" if count == 1 else f"{kind}_{number}_{index}" for index in range(count)]
        self._nodes.append(helper.make_node(kind, list(inputs), outputs, **attributes))
        return outputs

    def integers(self, *values: int) -> str:
        """int64 (n,), a constant."""
        return self._constant(np.array(values, dtype=np.int64))

    def integer(self, value: int) -> str:
        """int64 scalar, a constant."""
        return self._constant(np.array(value, dtype=np.int64))

    def number(self, value: float) -> str:
        """float32 scalar, a constant."""
        return self._constant(np.array(value, dtype=np.float32))

    def weight(self, name: str, tensor: Tensor) -> str:
        """A float32 or int64 tensor of the model."""
        if name in self._initializers:
            return name
        values = np.ascontiguousarray(tensor.detach().cpu().numpy())
        if self._weights is None or values.nbytes < 1024:
            self._initializers[name] = onnx.numpy_helper.from_array(values, name)
            return name
        proto = TensorProto(name=name, dims=values.shape, data_type=_TYPES[str(values.dtype)])
        proto.data_location = TensorProto.EXTERNAL
        offset, length = self._weights.store(name, values)
        for key, value in (("location", self._weights.path.name), ("offset", offset), ("length", length)):
            proto.external_data.add(key=key, value=str(value))
        self._initializers[name] = proto
        return name

    def size(self, value: str, axis: int) -> str:
        """int64 (1,), a dimension of a value."""
        return self.op("Shape", value, start=axis, end=axis + 1)

    def arange(self, count: str) -> str:
        """int64 (n,): 0 to n - 1, of ``count`` (1,)."""
        return self.op("Range", self.integer(0), self.op("Squeeze", count), self.integer(1))

    def ceil_div(self, value: str, divisor: int) -> str:
        """Integers rounded up to multiples, divided."""
        return self.op("Div", self.op("Add", value, self.integer(divisor - 1)), self.integer(divisor))

    def reshape(self, value: str, *shape: int) -> str:
        """0 keeps a dimension, -1 is what is left."""
        return self.op("Reshape", value, self.integers(*shape))

    def unsqueeze(self, value: str, *axes: int) -> str:
        """New dimensions of size 1."""
        return self.op("Unsqueeze", value, self.integers(*axes))

    def pad(self, value: str, rank: int, axis: int, *, before: int = 0, after: str | None = None) -> str:
        """Zeros along one axis; ``after`` is int64 (1,)."""
        zeros = [self.integers(0)] * (2 * rank)
        zeros[axis] = self.integers(before)
        zeros[rank + axis] = self.integers(0) if after is None else after
        return self.op("Pad", value, self.op("Concat", *zeros, axis=0))

    def slice(self, value: str, axis: int, start: str, end: str | None = None) -> str:
        """From ``start`` to ``end``, int64 (1,) each, or to the last."""
        return self.op("Slice", value, start, end or self.integers(2**62), self.integers(axis))

    def model(self, metadata: Mapping[str, str]) -> onnx.ModelProto:
        """The finished model."""
        graph = helper.make_graph(
            self._nodes, self._name, self._inputs, self._outputs, list(self._initializers.values())
        )
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=8,
            producer_name="batch_tokenizer",
            producer_version=__version__,
        )
        helper.set_model_props(model, dict(metadata))
        return model

    def _constant(self, values: npt.NDArray[Any]) -> str:
        name = f"const_{values.dtype}_{'_'.join(map(str, values.shape))}:{values.tobytes().hex()}"
        if name not in self._initializers:
            self._initializers[name] = onnx.numpy_helper.from_array(values, name)
        return name
