"""Sample rate, channels and codebooks of a folder of graphs, from ``config.json``, descriptions and the graphs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from batch_tokenizer.codecs.base import CodecInfo
from batch_tokenizer.codecs.checkpoint import Checkpoint
from batch_tokenizer.codecs.config_keys import MOST_COUNT, MOST_SIZE, ConfigKeys, read_json
from batch_tokenizer.codecs.onnx.graph_file import GraphFile
from batch_tokenizer.codecs.onnx.layouts import PREFIX, Layout, Role
from batch_tokenizer.records import RunError, short_repr

Layouts = Mapping[Role, Layout]

#: The file that describes Nano's graphs.
NANO_DESCRIPTION = "codec_browser_onnx_meta.json"


@dataclass(frozen=True)
class GraphSizes:
    """Sizes from ``config.json``, or from Nano's description of its graphs; None where absent."""

    folder: Any
    channels: int | None
    sample_rate: int | None
    samples_per_frame: int | None
    num_codebooks: int | None
    codebook_size: int | None

    @classmethod
    def read(cls, checkpoint: Checkpoint) -> GraphSizes:
        """
        Raises:
            RunError: a size is out of range, or the description cannot be read.
        """
        config = {**_nano_description(checkpoint), **checkpoint.config}
        quantizer = config.get("quantizer_kwargs")
        quantizer = quantizer if isinstance(quantizer, Mapping) else {}
        rate = config.get("sampling_rate", config.get("sample_rate"))
        values = {
            "channels": ("number_channels", config.get("number_channels")),
            "sample_rate": ("sampling_rate", rate),
            "samples_per_frame": ("downsample_rate", config.get("downsample_rate")),
            "num_codebooks": ("quantizer_kwargs.num_quantizers", quantizer.get("num_quantizers")),
            "codebook_size": ("quantizer_kwargs.codebook_size", quantizer.get("codebook_size")),
        }
        for key, value in values.values():
            most = MOST_COUNT if key in ("number_channels", "quantizer_kwargs.num_quantizers") else MOST_SIZE
            if value is None or (isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most):
                continue
            raise RunError(
                f"{checkpoint.folder}/config.json: {key} = {short_repr(value)}: must be a whole number above 0, and at "
                f"most {most}"
            )
        return cls(checkpoint.folder, **{name: value for name, (_, value) in values.items()})

    def audio_channels(self, layouts: Layouts) -> int:
        """Channels of the audio.

        Raises:
            RunError: neither the graphs nor their description state it, or they disagree.
        """
        found = _known(*(layout.channels for layout in layouts.values()))
        if any(layout.source == "nano" for layout in layouts.values()):
            found |= _known(self.channels)
        if len(found) != 1:
            raise RunError(f"{self.folder}: the number of channels is not clear ({sorted(found) or 'not stated'})")
        return found.pop()

    def complete(self, layouts: Layouts, graphs: Mapping[Role, GraphFile]) -> tuple[int, int, tuple[int, ...]]:
        """Sample rate, samples per frame and codebook sizes, from here and from the graphs.

        Raises:
            RunError: one is not known, or they disagree.
        """
        books = _known(self.num_codebooks, *(layout.fixed_codebooks for layout in layouts.values()))
        rows = _known(self.codebook_size) or _known(*(graph.codebook_rows() for graph in graphs.values()))
        if len(books) > 1 or len(rows) > 1:
            raise RunError(f"{self.folder}: its graphs disagree on the codebooks: {books or ''} of {rows or ''}")
        unknown = [
            key
            for key, value in (
                ("sampling_rate", self.sample_rate),
                ("downsample_rate", self.samples_per_frame),
                ("quantizer_kwargs.num_quantizers", books),
                ("quantizer_kwargs.codebook_size", rows),
            )
            if not value
        ]
        if unknown or self.sample_rate is None or self.samples_per_frame is None:
            raise RunError(
                f"{self.folder}: the graphs do not state {', '.join(unknown)}; put the config.json of the torch "
                "checkpoint, or one with these keys, beside them"
            )
        size, count = rows.pop(), books.pop()
        if not 1 <= size <= 65536 or not 1 <= count <= MOST_COUNT:
            raise RunError(
                f"{self.folder}: {count} codebooks of {size} rows; must be 1 to {MOST_COUNT} of 1 to 65536 each"
            )
        return self.sample_rate, self.samples_per_frame, (size,) * count


def _nano_description(checkpoint: Checkpoint) -> dict[str, Any]:
    """Sizes in ``codec_browser_onnx_meta.json``, under the names of a torch checkpoint's ``config.json``.

    It lacks the frame rate, which is 12.5 Hz in all of the family.

    Raises:
        RunError: it is there and cannot be read.
    """
    path = checkpoint.folder / NANO_DESCRIPTION
    if not path.is_file():
        return {}
    try:
        stated = ConfigKeys(read_json(path), file=NANO_DESCRIPTION).inside("codec_config")
        rate = stated.size("sample_rate")
        return {
            "sampling_rate": rate,
            "downsample_rate": round(rate / 12.5),
            "number_channels": stated.count("channels"),
            "quantizer_kwargs": {
                "num_quantizers": stated.count("num_quantizers"),
                "codebook_size": stated.value("codebook_size", None),
            },
        }
    except RunError as error:
        raise RunError(f"{checkpoint.folder}: {error}") from error


def _known(*values: int | None) -> set[int]:
    return {value for value in values if value is not None}


def our_info(checkpoint: Checkpoint, graphs: Sequence[GraphFile]) -> CodecInfo:
    """From our own graphs' metadata. The fingerprint is that of the model exported: the tokens are the same."""
    described = [
        {key: graph.metadata.get(f"{PREFIX}{key}") for key in ("sample_rate", "samples_per_frame", "codebook_sizes",
                                                              "fingerprint")}
        for graph in graphs
    ]  # fmt: skip
    if any(one != described[0] for one in described):
        raise RunError(f"{checkpoint.folder}: its graphs were exported from different checkpoints; export them again")
    try:
        values = {key: json.loads(described[0][key] or "") for key in ("sample_rate", "samples_per_frame")}
        sizes = tuple(json.loads(described[0]["codebook_sizes"] or ""))
        fingerprint = described[0]["fingerprint"]
        if not fingerprint or not all(type(value) is int and value > 0 for value in (*values.values(), *sizes)):
            raise ValueError
    except (ValueError, TypeError) as error:
        raise RunError(f"{graphs[0].path}: its metadata is incomplete; export it again") from error
    return CodecInfo(family="moss_onnx", name=checkpoint.name, codebook_sizes=sizes, fingerprint=fingerprint, **values)
