"""The meaning of a graph's inputs and outputs in the known layouts: the community's, the official one, and our own.

A layout is recognised by the names of a graph's inputs, and by the types, numbers of axes and order of its outputs.
Exporters may generate names of outputs (``view_67``), so these only help: the output of the known name is meant, or
else the first that has its type and number of axes. Sizes are then held against the layout, and never used to choose
between two readings that they both allow.

    community   input_values float32 (B, 1, S)                          → audio_codes int64 (K, B, T), …
                audio_codes int32 (K, B, T)                             → audio float32 (C, S)
    official    input_values float32 (1, 1, S), n_quantizers int64      → audio_codes (K, 1, T), …
                audio_codes int64 (K, 1, T), n_quantizers int64         → audio float32 (1, 1, S), …
    nano        waveform float32 (1, C, S), input_lengths int32 (1)     → audio_codes (1, T, K), …
                audio_codes int32 (1, T, K), audio_code_lengths (1)     → audio float32 (1, C, S), …
    ours        ``moss_graphs.py``; marked in its metadata
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from batch_tokenizer.codecs.onnx.graph_file import GraphFile, Port
from batch_tokenizer.records import RunError

Source = Literal["community", "official", "nano", "ours"]
Role = Literal["encoder", "decoder", "encoder_step", "decoder_step"]

#: Keys of our own graphs' metadata begin so.
PREFIX = "batch_tokenizer."

#: The version of our own layout.
FORMAT = "1"

#: Types and numbers of axes that a port may have.
_Form = tuple[tuple[str, ...], tuple[int, ...]]

_INTEGERS = ("int32", "int64")
_ROLES: tuple[Role, ...] = ("encoder", "decoder", "encoder_step", "decoder_step")

#: Words in a dimension's name, by its meaning: codebooks, batch or frames.
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
        source: ``community``, ``official``, ``nano`` or ``ours``.
        role: what the graph does.
        path: its file.
        dtypes: of its inputs, by name.
        axes: the order of the codes' axes, such as ``KBT``.
        fixed_codebooks: the size of the codes' axis of codebooks where the graph fixes it.
        past: shapes of the pasts that a step takes, for one utterance.
        count_shape: the shape of the input ``n_quantizers``.
        output: the name of the output that has the codes or the audio.
        channels: of the audio; None where the graph does not fix them.
    """

    source: Source
    role: Role
    path: Path
    dtypes: Mapping[str, str]
    axes: str
    fixed_codebooks: int | None = None
    past: tuple[tuple[int, ...], ...] = ()
    count_shape: tuple[int, ...] = ()
    output: str = ""
    channels: int | None = 1


@dataclass(frozen=True)
class _Signature:
    """Inputs and output of a published graph.

    Attributes:
        inputs: the types and numbers of axes allowed of each.
        output: the same of the one that has the codes or the audio, and its published name.
    """

    source: Source
    role: Role
    inputs: Mapping[str, _Form]
    output: tuple[str, _Form]

    def find_output(self, graph: GraphFile) -> Port | str:
        """The output that is meant, or why the graph is not this."""
        given = {port.name: port for port in graph.inputs}
        if given.keys() != self.inputs.keys():
            return f"its inputs are not {', '.join(self.inputs)}"
        for name, form in self.inputs.items():
            if given[name].shape is None:
                return f"{name} has no shape"
            if (fault := _misfit(given[name], form)) is not None:
                return fault
        published, form = self.output
        for port in graph.outputs:
            if port.name == published:
                return _misfit(port, form) or port
        fitting = [port for port in graph.outputs if port.dtype and port.shape and _misfit(port, form) is None]
        dtypes, ranks = form
        wanted = f"{' or '.join(dtypes)} of {' or '.join(map(str, ranks))} axes"
        return fitting[0] if fitting else f"it has no output {published}, and none that is {wanted}"


def _misfit(port: Port, form: _Form) -> str | None:
    """Why a port does not have this form; None if it does, as far as the graph declares it."""
    dtypes, ranks = form
    if port.dtype and port.dtype not in dtypes:
        return f"{port.name} is {port.dtype}, not {' or '.join(dtypes)}"
    if port.shape is not None and len(port.shape) not in ranks:
        return f"{port.name} has {len(port.shape)} axes, not {' or '.join(map(str, ranks))}"
    return None


_THREE_AXES: _Form = (_INTEGERS, (3,))
_WAVES: Mapping[str, _Form] = {"input_values": (("float32",), (3,))}
_COUNT: Mapping[str, _Form] = {"n_quantizers": (_INTEGERS, (0, 1))}
_NANO_WAVES: Mapping[str, _Form] = {"waveform": (("float32",), (3,)), "input_lengths": (_INTEGERS, (1,))}
_NANO_CODES: Mapping[str, _Form] = {"audio_codes": _THREE_AXES, "audio_code_lengths": (_INTEGERS, (1,))}
_CODES = ("audio_codes", _THREE_AXES)
_SIGNATURES = (
    _Signature("community", "encoder", _WAVES, _CODES),
    _Signature("official", "encoder", {**_WAVES, **_COUNT}, _CODES),
    _Signature("nano", "encoder", _NANO_WAVES, _CODES),
    _Signature("community", "decoder", {"audio_codes": (("int32",), (3,))}, ("audio", (("float32",), (2,)))),
    _Signature("official", "decoder", {"audio_codes": _THREE_AXES, **_COUNT}, ("audio", (("float32",), (3,)))),
    _Signature("nano", "decoder", _NANO_CODES, ("audio", (("float32",), (3,)))),
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
        found = signature.find_output(graph)
        if isinstance(found, Port):
            return _published(graph, signature, found, num_codebooks)
        faults.append(f"{signature.source} {signature.role}: {found}")
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
        output="codes" if "encoder" in role else "audio",
    )


def _published(graph: GraphFile, signature: _Signature, output: Port, num_codebooks: int | None) -> Layout:
    encodes, nano = signature.role == "encoder", signature.source == "nano"
    codes = output if encodes else next(port for port in graph.inputs if port.name == "audio_codes")
    waves = next(port for port in graph.inputs if port.dtype == "float32") if encodes else output
    channels: int | str = 1
    if encodes or nano:
        batch, channels = (waves.shape or ("?", "?"))[:2]
        if batch != 1 and isinstance(batch, int):
            raise RunError(f"{graph.path}: {waves}: must take one utterance, (B, channels, S)")
        if not nano and channels != 1 and isinstance(channels, int):
            raise RunError(f"{graph.path}: {waves}: must be mono and take one utterance, (B, 1, S)")
        channels = channels if nano else 1
    axes = "BTK" if nano else _axes(graph, codes, num_codebooks)
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
        output=output.name,
        channels=channels if isinstance(channels, int) else None,
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
        f"{'not stated in it' if possible else 'not known'}; export it with free axes, or fix its config.json"
    )


def _may_be(meaning: str, size: int | str, num_codebooks: int | None) -> bool:
    if isinstance(size, int):
        if meaning == "K":
            return num_codebooks is None or size == num_codebooks
        return meaning == "T" or size == 1
    hinted = [known for known, words in _HINTS.items() if any(word in size.lower() for word in words)]
    return not hinted or meaning in hinted


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
