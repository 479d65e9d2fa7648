"""Which input of a graph is what, for the layouts that are known: the community's, the official one, and our own.

A layout is recognised by the names of inputs and outputs, and their types and numbers of axes must agree. Sizes are
then held against it, and never used to choose between two readings that they both allow.

    community   input_values float32 (B, 1, S)                       → audio_codes int64 (K, B, T), …
                audio_codes int32 (K, B, T)                          → audio float32 (C, S)
    official    input_values float32 (1, 1, S), n_quantizers int64   → audio_codes (K, 1, T), …
                audio_codes int64 (K, 1, T), n_quantizers int64      → audio float32 (1, 1, S), …
    ours        ``moss_graphs.py``; says so in its metadata
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from batch_tokenizer.codecs.onnx.graph_file import GraphFile, Port
from batch_tokenizer.records import RunError

Role = Literal["encoder", "decoder", "encoder_step", "decoder_step"]

#: Keys of our own graphs' metadata begin so.
PREFIX = "batch_tokenizer."

#: The version of our own layout.
FORMAT = "1"

_INTEGERS = ("int32", "int64")
_ROLES: tuple[Role, ...] = ("encoder", "decoder", "encoder_step", "decoder_step")

#: What a dimension's name says that it is: codebooks, batch or frames.
_HINTS = {
    "K": ("quant", "codebook", "n_q", "nq"),
    "B": ("batch",),
    "T": ("frame", "time", "len", "seq"),
}


class UnknownLayout(RunError):
    """A graph whose inputs and outputs are those of no known layout."""


@dataclass(frozen=True)
class Layout:
    """How to run one graph. Picklable.

    Attributes:
        source: ``community``, ``official`` or ``ours``.
        role: what the graph does.
        path: its file.
        dtypes: of its inputs, by name.
        axes: the order of the codes' axes, such as ``KBT``.
        fixed_codebooks: the size of the codes' axis of codebooks where the graph fixes it.
        past: shapes of the pasts that a step takes, for one utterance.
        count_shape: the shape of the input ``n_quantizers``.
    """

    source: Literal["community", "official", "ours"]
    role: Role
    path: Path
    dtypes: Mapping[str, str]
    axes: str
    fixed_codebooks: int | None = None
    past: tuple[tuple[int, ...], ...] = ()
    count_shape: tuple[int, ...] = ()


@dataclass(frozen=True)
class _Signature:
    """What a published graph looks like. Values are the types allowed and the number of axes."""

    source: Literal["community", "official"]
    role: Role
    inputs: Mapping[str, tuple[tuple[str, ...], tuple[int, ...]]]
    outputs: Mapping[str, tuple[tuple[str, ...], tuple[int, ...]]]
    codes: str = field(default="audio_codes")

    def fault(self, graph: GraphFile) -> str | None:
        """Why the graph is not this; None if it is."""
        given = {port.name: port for port in graph.inputs}
        if given.keys() != self.inputs.keys():
            return f"its inputs are not {', '.join(self.inputs)}"
        made = {port.name: port for port in graph.outputs}
        for name, (dtypes, ranks) in {**self.inputs, **self.outputs}.items():
            port = given.get(name) if name in self.inputs else made.get(name)
            if port is None:
                return f"it has no output {name}"
            if port.dtype and port.dtype not in dtypes:
                return f"{name} is {port.dtype}, not {' or '.join(dtypes)}"
            if port.shape is not None and len(port.shape) not in ranks:
                return f"{name} has {len(port.shape)} axes, not {' or '.join(map(str, ranks))}"
            if port.shape is None and name in self.inputs:
                return f"{name} has no shape"
        return None


_WAVES = {"input_values": (("float32",), (3,))}
_COUNT = {"n_quantizers": (_INTEGERS, (0, 1))}
_SIGNATURES = (
    _Signature("community", "encoder", _WAVES, {"audio_codes": (_INTEGERS, (3,))}),
    _Signature("official", "encoder", {**_WAVES, **_COUNT}, {"audio_codes": (_INTEGERS, (3,))}),
    _Signature("community", "decoder", {"audio_codes": (("int32",), (3,))}, {"audio": (("float32",), (2,))}),
    _Signature("official", "decoder", {"audio_codes": (_INTEGERS, (3,)), **_COUNT}, {"audio": (("float32",), (3,))}),
)


def recognise(graph: GraphFile, num_codebooks: int | None) -> Layout:
    """The layout of a graph.

    Args:
        num_codebooks: codebooks of the codec, where that is known from elsewhere.

    Raises:
        UnknownLayout: it fits none.
        RunError: its sizes contradict the one that its names and types fit.
    """
    role = graph.metadata.get(f"{PREFIX}role")
    if role is not None:
        return _ours(graph, role)
    faults = []
    for signature in _SIGNATURES:
        fault = signature.fault(graph)
        if fault is None:
            return _published(graph, signature, num_codebooks)
        faults.append(f"{signature.source} {signature.role}: {fault}")
    raise UnknownLayout(f"{graph.path}: is of no known layout; it is {graph}. {'; '.join(faults)}")


def _ours(graph: GraphFile, role: str) -> Layout:
    version = graph.metadata.get(f"{PREFIX}format")
    if version != FORMAT or role not in _ROLES:
        raise RunError(
            f"{graph.path}: was exported as {role}, format {version}; this version reads format {FORMAT}. "
            "Export it again"
        )
    pasts = [port.shape or () for port in graph.inputs if port.name.startswith("past_")]
    return Layout(
        source="ours",
        role=next(known for known in _ROLES if known == role),
        path=graph.path,
        dtypes={port.name: port.dtype for port in graph.inputs},
        axes="BKT",
        past=tuple(tuple(dim if isinstance(dim, int) else 1 for dim in shape) for shape in pasts),
    )


def _published(graph: GraphFile, signature: _Signature, num_codebooks: int | None) -> Layout:
    ports = graph.outputs if signature.role == "encoder" else graph.inputs
    codes = next(port for port in ports if port.name == signature.codes)
    if signature.role == "encoder":
        waves = next(port for port in graph.inputs if port.name == "input_values")
        for axis in (0, 1):
            size = (waves.shape or ())[axis]
            if isinstance(size, int) and size != 1:
                raise RunError(f"{graph.path}: {waves}: must be mono and take one utterance, (B, 1, S)")
    axes = _axes(graph, codes, num_codebooks)
    counts = [port.shape for port in graph.inputs if port.name == "n_quantizers"]
    size = "?" if codes.shape is None else codes.shape[axes.index("K")]
    return Layout(
        source=signature.source,
        role=signature.role,
        path=graph.path,
        dtypes={port.name: port.dtype for port in graph.inputs},
        axes=axes,
        fixed_codebooks=size if isinstance(size, int) else None,
        count_shape=(1,) if any(counts) else (),
    )


def _axes(graph: GraphFile, codes: Port, num_codebooks: int | None) -> str:
    """The order of the codes' axes: the published one, unless sizes or names of dimensions rule that out."""
    if codes.shape is None:
        return "KBT"
    possible = [
        order
        for order in ("KBT", "BKT", "BTK")
        if all(_may_be(meaning, size, num_codebooks) for meaning, size in zip(order, codes.shape, strict=True))
    ]
    if "KBT" in possible:
        return "KBT"
    if len(possible) == 1:
        return possible[0]
    books = "the codebooks" if num_codebooks is None else f"{num_codebooks} codebooks"
    raise RunError(
        f"{graph.path}: {codes}: cannot be ({books}, batch of 1, frames), and which axis is which is "
        f"{'not told by it' if possible else 'not known'}; export it with free axes, or fix its config.json"
    )


def _may_be(meaning: str, size: int | str, num_codebooks: int | None) -> bool:
    if isinstance(size, int):
        if meaning == "K":
            return num_codebooks is None or size == num_codebooks
        return meaning == "T" or size == 1
    said = [known for known, words in _HINTS.items() if any(word in size.lower() for word in words)]
    return not said or meaning in said


def our_metadata(role: Role, *, info: Mapping[str, object], codes: str) -> dict[str, str]:
    """``metadata_props`` of our own graphs."""
    values = {"format": FORMAT, "role": role, "codes": codes, **info}
    return {f"{PREFIX}{key}": value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}


def by_role(graphs: Iterable[GraphFile], num_codebooks: int | None) -> tuple[dict[Role, Layout], list[str]]:
    """The layouts of a folder's graphs by role, and why graphs that fit none do not.

    Raises:
        RunError: two graphs have one role, or one's sizes contradict its layout.
    """
    layouts: dict[Role, Layout] = {}
    faults = []
    for graph in graphs:
        try:
            layout = recognise(graph, num_codebooks)
        except UnknownLayout as error:
            faults.append(str(error))
            continue
        if layout.role in layouts:
            other = layouts[layout.role].path.name
            raise RunError(
                f"{graph.path}: has the role {layout.role}, and so has {other}; leave one of them in the folder"
            )
        layouts[layout.role] = layout
    return layouts, faults
