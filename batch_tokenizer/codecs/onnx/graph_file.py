"""Reading an ONNX file without running it: inputs, outputs, metadata, external weights.

``layouts.py`` recognises codecs by them, and ``onnx info`` prints them. ``GraphFile.digest`` covers the graph
and a sample of its weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from batch_tokenizer.records import RunError, first_line

if TYPE_CHECKING:
    import onnx

#: The message for a user without the packages.
INSTALL = "ONNX checkpoints need more packages: pip install 'batch_tokenizer[onnx]' (on a GPU also onnxruntime-gpu)"

#: Bytes sampled of each external weight for the digest: this many blocks of this many bytes, evenly spread.
_BLOCKS, _BLOCK_BYTES = 16, 1024


@dataclass(frozen=True)
class Port:
    """An input or output of a graph.

    Attributes:
        dtype: numpy's name, such as ``float32``; empty where the graph does not declare it.
        shape: a number where a dimension is fixed, its name or ``?`` where it is free; None where the graph does not
            declare their number.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...] | None

    def __str__(self) -> str:
        dims = "of unknown shape" if self.shape is None else f"({', '.join(map(str, self.shape))})"
        return f"{self.name} {self.dtype or 'of unknown type'} {dims}"


@dataclass(frozen=True)
class ExternalWeight:
    """The place of a weight outside the graph's file. Attributes: ``path``; ``offset`` and ``length`` in bytes."""

    path: Path
    offset: int
    length: int


class GraphFile:
    """A parsed graph without its external weights.

    Attributes:
        path: its file.
        proto: the parsed model.
    """

    def __init__(self, path: Path, proto: onnx.ModelProto) -> None:
        self.path = path
        self.proto = proto

    @classmethod
    def open(cls, path: Path) -> GraphFile:
        """Parses a file.

        Raises:
            RunError: the packages are not installed, or it cannot be read as a graph.
        """
        try:
            import onnx
        except ImportError as error:
            raise RunError(INSTALL) from error
        from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

        try:
            proto = onnx.load(path, load_external_data=False)
        except (OSError, DecodeError, ValueError) as error:
            reason = first_line(error)
            raise RunError(
                f"{path}: cannot be read as an ONNX graph ({reason}); download or export it again"
            ) from error
        if not proto.graph.output:
            raise RunError(f"{path}: is not an ONNX graph, as it has no outputs; download or export it again")
        return cls(path, proto)

    @cached_property
    def inputs(self) -> tuple[Port, ...]:
        """The inputs. Weights that an old file lists as inputs are left out."""
        weights = {tensor.name for tensor in self.proto.graph.initializer}
        return tuple(_port(value) for value in self.proto.graph.input if value.name not in weights)

    @cached_property
    def outputs(self) -> tuple[Port, ...]:
        """The outputs."""
        return tuple(_port(value) for value in self.proto.graph.output)

    @cached_property
    def metadata(self) -> dict[str, str]:
        """``metadata_props``."""
        return {entry.key: entry.value for entry in self.proto.metadata_props}

    @property
    def opset(self) -> int:
        """Version of the standard operator set."""
        return max((entry.version for entry in self.proto.opset_import if entry.domain in ("", "ai.onnx")), default=0)

    @property
    def producer(self) -> str:
        """The program that wrote the file."""
        return f"{self.proto.producer_name} {self.proto.producer_version}".strip() or "unknown"

    @cached_property
    def external_weights(self) -> tuple[ExternalWeight, ...]:
        """Weights in other files, in the order of the graph.

        Raises:
            RunError: one lies outside the graph's folder.
        """
        found = []
        for tensor in self.proto.graph.initializer:
            if tensor.data_location != tensor.EXTERNAL:
                continue
            entries = {entry.key: entry.value for entry in tensor.external_data}
            location = Path(entries.get("location", ""))
            if location.is_absolute() or ".." in location.parts:
                raise RunError(f"{self.path}: weight {tensor.name} is at {location}, outside the graph's folder")
            try:
                offset, length = int(entries.get("offset", "0")), int(entries.get("length", "0"))
            except ValueError as error:
                raise RunError(f"{self.path}: weight {tensor.name} is at no place of {location}: {error}") from error
            if offset < 0 or length < 0:
                raise RunError(f"{self.path}: weight {tensor.name} is at {offset:,} of {location}, {length:,} long")
            found.append(ExternalWeight(self.path.parent / location, offset, length))
        return tuple(found)

    @property
    def external_files(self) -> list[Path]:
        """The files beside the graph that it needs."""
        return sorted({weight.path for weight in self.external_weights})

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights, wherever they are."""
        from onnx import helper

        total = 0
        for tensor in self.proto.graph.initializer:
            count = 1
            for dim in tensor.dims:
                count *= dim
            total += count * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        return total

    def check_external_files(self) -> None:
        """
        Raises:
            RunError: a file that the graph needs is absent or too short; the message names it.
        """
        for path in self.external_files:
            ends = [weight.offset + weight.length for weight in self.external_weights if weight.path == path]
            if not path.is_file():
                raise RunError(
                    f"{self.path}: needs its weights in {path.name}, which is not beside it; download it as well"
                )
            if path.stat().st_size < max(ends):
                raise RunError(
                    f"{path}: has {path.stat().st_size} bytes where {self.path.name} needs {max(ends)}; "
                    "download it again"
                )

    def digest(self) -> bytes:
        """Over the file's bytes and a sample of every external weight.

        Raises:
            RunError: a file cannot be read.
        """
        digest = hashlib.sha256()
        try:
            with self.path.open("rb") as file:
                while block := file.read(1 << 24):
                    digest.update(block)
            for block in self._sampled():
                digest.update(block)
        except OSError as error:
            raise RunError(f"{error.filename or self.path}: cannot be read: {error.strerror}") from error
        return digest.digest()

    def codebook_rows(self) -> int | None:
        """Rows of each codebook, if the graph has tables called so and all have equally many; else None."""
        rows = {
            tensor.dims[0]
            for tensor in self.proto.graph.initializer
            if "codebook" in tensor.name.lower() and len(tensor.dims) == 2
        }
        return rows.pop() if len(rows) == 1 else None

    def __str__(self) -> str:
        """Its inputs and outputs in one line."""
        return f"({'; '.join(map(str, self.inputs))}) -> ({'; '.join(map(str, self.outputs))})"

    def _sampled(self) -> Iterator[bytes]:
        for path in self.external_files:
            with path.open("rb") as file:
                for weight in self.external_weights:
                    if weight.path != path:
                        continue
                    for start in range(0, weight.length, max(weight.length // _BLOCKS, _BLOCK_BYTES)):
                        file.seek(weight.offset + start)
                        yield file.read(min(_BLOCK_BYTES, weight.length - start))


def _port(value: onnx.ValueInfoProto) -> Port:
    from onnx import helper

    tensor = value.type.tensor_type
    dtype = str(helper.tensor_dtype_to_np_dtype(tensor.elem_type)) if tensor.elem_type else ""
    if not tensor.HasField("shape"):
        return Port(value.name, dtype, None)
    dims = (dim.dim_value if dim.HasField("dim_value") else dim.dim_param or "?" for dim in tensor.shape.dim)
    return Port(value.name, dtype, tuple(dims))
