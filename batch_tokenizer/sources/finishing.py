"""``Finisher``: rows as a source has them to lines of our manifest.

It turns foreign rows into ours, counts and splits channels where that was asked for, and gives rows outputs that name
none. A line that is no JSON object stays as it is: the manifest refuses it, by its line.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from typing import Any, NamedTuple

from batch_tokenizer.audio.decoding import probe_audio
from batch_tokenizer.audio_fields import SPLIT_CHANNELS
from batch_tokenizer.manifest.row import MAX_LINE, REFUSED
from batch_tokenizer.records import RowError, RowForm, Sink, Task
from batch_tokenizer.sources.foreign_rows import MADE_KEY, Refused, complete, makes_key
from batch_tokenizer.storage.json_lines import dump_json, parse_json

#: Bytes of a name without its ending. File systems take 255, and some users add endings of their own.
MOST_NAME = 150

_PLAIN = re.compile(r"[a-z0-9_][a-z0-9_.\-]*(?<![.\-])|[a-z0-9_]")

_HASHED = re.compile(r"-[0-9a-f]{16}$")

_UNSAFE = re.compile(r"[^A-Za-z0-9_.\-]+")


def output_path(output_dir: str, key: str, ending: str) -> str:
    """Where a row's output goes.

    Args:
        output_dir: a folder or a URL.
        ending: with its dot.
    """
    digest = blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
    return f"{output_dir.rstrip('/') or '/'}/{digest[:2]}/{digest[2:4]}/{_name(key, digest)}{ending}"


def mirrored_path(output_dir: str, key: str, ending: str, source: str) -> str:
    """Where the output of a file goes that was found by its name: to the same place below ``output_dir``.

    Names that are too long, and outputs that would lie beside the file, have ``output_path``.

    Args:
        key: the path of the file without its ending.
        source: the path of the file.
    """
    path = f"{output_dir.rstrip('/') or '/'}/{key}{ending}"
    names_fit = all(name not in ("", ".", "..") and len(name.encode()) <= MOST_NAME for name in key.split("/"))
    is_beside = os.path.dirname(os.path.abspath(path)) == os.path.dirname(os.path.abspath(source))
    return output_path(output_dir, key, ending) if is_beside or not names_fit else path


def _name(key: str, digest: str) -> str:
    if len(key) <= MOST_NAME and _PLAIN.fullmatch(key) and not _HASHED.search(key):
        return key
    readable = _UNSAFE.sub("_", key)[: MOST_NAME - 17].strip("._-")
    return f"{readable}-{digest}" if readable else f"_-{digest}"


def numbered_path(path: str, number: int) -> str:
    """``out/a.json`` to ``out/a-0.json``."""
    folder, slash, name = path.rpartition("/")
    stem, dot, ending = name.rpartition(".")
    return f"{folder}{slash}{stem}-{number}.{ending}" if dot and stem else f"{path}-{number}"


#: Channels that ``split`` makes rows of; a header that promises more is damaged, or no recording.
_MOST_CHANNELS = 64


@lru_cache  # asked for every row
def _outputs(task: Task, sink: Sink, audio_format: str) -> Mapping[str, str]:
    tokens = ".npy" if sink == "npy" else ".json"
    endings = {"quantized_tokens": tokens, "reconstructed_wav": f".{audio_format}"}
    return {name: endings[name] for name in RowForm.of(task, sink).outputs}


@dataclass(frozen=True, slots=True)
class SourceSettings:
    """What rows are made for; fields as in ``RunConfig``.

    Attributes:
        audio_field: the field that names a row's own audio, where it is not one of the usual ones.
        other_fields: those that name its other audio.
    """

    task: Task = "wav2token"
    sink: Sink = "json"
    output_dir: str | None = None
    audio_format: str = "wav"
    channels: str = "mean"
    audio_column: str | None = None
    names: str = "auto"
    audio_field: str = "wav"
    other_fields: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "other_fields", tuple(self.other_fields))  # a list in what a run records

    @property
    def input_field(self) -> str:
        """The field that names a row's input."""
        return "quantized_tokens" if self.task == "token2wav" else "wav"

    @property
    def outputs(self) -> Mapping[str, str]:
        """The fields that must name a file to write, and its ending."""
        return _outputs(self.task, self.sink, self.audio_format)

    def complete(self, row: dict[str, Any], base: str) -> dict[str, Any]:
        """The row with a key and an input, as ``foreign_rows.complete`` makes it.

        Raises:
            Refused: it is none that can be read.
        """
        return complete(row, self.input_field, base, self.audio_field, self.other_fields)

    @property
    def picks_channels(self) -> bool:
        """Whether rows of audio get a channel."""
        return self.task != "token2wav" and self.channels != "mean"

    @property
    def changes_rows(self) -> bool:
        """Whether rows of ours need more than they say."""
        return self.picks_channels or (self.output_dir is not None and bool(self.outputs))


class FinishedLine(NamedTuple):
    """A line of our manifest, without its line end.

    Attributes:
        key: of its row; None where it has none.
        is_made: whether the key was made up, so that another one will do.
    """

    text: bytes
    key: str | None
    is_made: bool


@dataclass(frozen=True, slots=True)
class Finisher:
    """Completes the rows of one source.

    Attributes:
        base: folder that relative paths of inputs lie in; empty for the working directory.
        mirrored: whether outputs lie in the output folder as the inputs lie in theirs.
    """

    settings: SourceSettings
    base: str = ""
    mirrored: bool = False

    def line(self, text: bytes) -> Iterator[FinishedLine]:
        """A line of any manifest to lines of ours."""
        stripped = text.strip()
        row: Any = None
        if stripped and len(text) <= MAX_LINE:
            with contextlib.suppress(ValueError):
                row = parse_json(stripped)
        if isinstance(row, dict):
            yield from self.finish(row, text)
        else:
            yield FinishedLine(text, None, False)

    def finish(self, row: dict[str, Any], text: bytes | None = None) -> Iterator[FinishedLine]:
        """The lines of a row.

        Args:
            text: the row's line, to be kept where nothing has to change.
        """
        is_made = makes_key(row)
        for item in self.rows(row):
            key = item.get("key")
            line = text if text is not None and item is row else self.encode(item)
            yield FinishedLine(line, key if isinstance(key, str) else None, is_made and REFUSED not in item)

    def renamed(self, text: bytes, key: str) -> bytes:
        """A line that ``finish`` made, under another key; outputs that are named after the key follow."""
        row = parse_json(text)
        for name, ending in self.settings.outputs.items():
            if self.settings.output_dir is not None and row.get(name) == self._output(row, ending):
                row[name] = self._output(row | {"key": key}, ending)
        return self.encode(row | {"key": key})

    def rows(self, row: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """A row to complete rows, with channels and outputs; the same object where there is nothing to change."""
        if MADE_KEY in row:
            others = {name: value for name, value in row.items() if name not in (MADE_KEY, "key")}
            row = {"key": row[MADE_KEY], **others}
        if REFUSED not in row:
            try:
                row = self.settings.complete(row, self.base)
            except Refused as refused:
                row = {**({"key": refused.key} if refused.key else {}), REFUSED: refused.reason}
        key = row.get("key")
        if REFUSED in row or not isinstance(key, str) or not key:
            yield row
            return
        for part in self._channels(row, key):
            missing = {name: ending for name, ending in self.settings.outputs.items() if not part.get(name)}
            if self.settings.output_dir is None or not missing:
                yield part
                continue
            yield part | {name: self._output(part, ending) for name, ending in missing.items()}

    def _output(self, row: Mapping[str, Any], ending: str) -> str:
        folder, key, source = self.settings.output_dir, row["key"], row.get(self.settings.input_field)
        assert folder is not None
        if self.mirrored and isinstance(source, str):
            return mirrored_path(folder, key, ending, source)
        return output_path(folder, key, ending)

    def _channels(self, row: dict[str, Any], key: str) -> Iterator[dict[str, Any]]:
        wanted = self.settings.channels
        if not self.settings.picks_channels or row.get("channel") is not None:
            yield row
        elif wanted in ("left", "right"):
            yield row | {"channel": 0 if wanted == "left" else 1}
        else:
            yield from self._split(row, key)

    def _split(self, row: dict[str, Any], key: str) -> Iterator[dict[str, Any]]:
        wav = row.get("wav")
        if not isinstance(wav, str) or not wav:
            yield row
            return
        try:
            count = probe_audio(wav).channels
        except RowError as error:
            # Whatever is wrong with the file, it fails as one row, and by this name.
            yield {"key": key, REFUSED: f"its channels cannot be counted: {error.reason}"}
            return
        if self.settings.channels == "split_row":
            if count > 2:
                yield {"key": key, REFUSED: f"{count} channels, where --channels split_row takes two: split takes all"}
            else:
                yield row | {"channel": 0, SPLIT_CHANNELS: count}
            return
        if count > _MOST_CHANNELS:
            yield {"key": key, REFUSED: f"{count} channels, where {_MOST_CHANNELS} is the most that are split"}
            return
        for channel in range(count):
            outputs = {
                name: numbered_path(row[name], channel)
                for name in self.settings.outputs
                if isinstance(row.get(name), str) and row[name]
            }
            yield row | {"key": f"{key}-{channel}", "channel": channel} | outputs

    def encode(self, row: dict[str, Any]) -> bytes:
        """A row as a line."""
        try:
            return dump_json(row)
        except (TypeError, ValueError) as error:
            return dump_json({"key": row.get("key"), REFUSED: f"its fields cannot be passed on: {error}"})
