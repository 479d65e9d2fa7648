"""Where ``convert`` puts rows as streams of token numbers for language models, with or without their text."""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import numpy.typing as npt

from batch_tokenizer import __version__
from batch_tokenizer.commands.convert_targets import Common, codes_of
from batch_tokenizer.records import RUN_INFO_FIELDS, RunError
from batch_tokenizer.runs.stored_rows import StoredRow
from batch_tokenizer.storage.json_lines import dump_json
from batch_tokenizer.writers.text_tokenizer import open_tokenizer, vocabulary_size
from batch_tokenizer.writers.token_streams import SPLIT_NAMES, FlatFile, Layout, MegatronFile, Pattern, TokenStream

_FIELD = re.compile(r"(\{audio\}|\{text\})")

#: Tokens are at most 32 bits wide, with a sign.
_MOST_TOKENS = 2**31 - 1


@dataclass(frozen=True, slots=True)
class StreamSettings:
    """How rows become tokens.

    Attributes:
        codebook_sizes: where the rows do not say.
        base_offset: None for the first token above the text's vocabulary, which is 0 without text.
        last: the token after each utterance; None for the first one behind the codebooks.
        text_field: the field of the rows that is their text.
        templates: one utterance for each, of ``{text}``, ``{audio}`` once, and text of its own.
        split: shares of the rows, which go to a folder each; empty for one stream.
        order: ``manifest``: of the run's manifest, ``shuffle``: by chance, drawn from the seed; None: as stored.
    """

    kind: Literal["megatron", "flat"]
    pattern: Pattern = "interleaved"
    codebook_sizes: tuple[int, ...] | None = None
    base_offset: int | None = None
    audio_start: int | None = None
    audio_end: int | None = None
    last: int | None = None
    text_field: str | None = None
    tokenizer: str | None = None
    templates: tuple[str, ...] = ("{text}{audio}",)
    split: tuple[float, ...] = ()
    seed: int = 0
    order: Literal["manifest", "shuffle"] | None = None

    def check(self) -> None:
        """
        Raises:
            RunError: settings contradict each other.
        """
        if (self.text_field is None) != (self.tokenizer is None):
            raise RunError("--text FIELD needs --tokenizer PATH_OR_ID, and the other way round")
        for template in self.templates:
            if template.count("{audio}") != 1:
                raise RunError(f"--template {template!r}: must have {{audio}} once, and may have {{text}}")
        if self.split and (len(self.split) not in (2, 3) or min(self.split) < 0 or abs(sum(self.split) - 1) > 1e-6):
            raise RunError("--split: two or three shares (train, valid, test) that add up to 1, such as 0.99,0.01")


def part_of(key: str, shares: Sequence[float], seed: int) -> int:
    """The part of a split that a row belongs to, by its key and the seed alone."""
    digest = blake2b(f"{seed}\0{key}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    place = int.from_bytes(digest, "big") / 2**64
    return min(int(np.searchsorted(np.cumsum(shares), place, side="right")), len(shares) - 1)


class StreamTarget:
    """Streams of token numbers, each a folder with ``keys.jsonl``, which has the rows' fields, a line an utterance, and
    ``tokens.json``, which explains the numbers."""

    def __init__(self, folder: Path, settings: StreamSettings, place_of: Callable[[str], int] | None = None) -> None:
        """
        Args:
            place_of: where a key stands in the manifest, for the order of it.
        """
        settings.check()
        self._settings = settings
        self._common = Common()
        self._layout: Layout | None = None
        self._text = None if settings.tokenizer is None else _Text(settings)
        names = SPLIT_NAMES[: len(settings.split)] or ("",)
        self._place_of = place_of
        self._parts = [_Part(folder / name, settings, number) for number, name in enumerate(names)]

    def add(self, row: StoredRow) -> None:
        codes = codes_of(row)
        self._common.check(row)
        if self._layout is None:
            self._layout = self._layout_of(row, codes.shape[1])
        if (codes >= np.array(self._layout.codebook_sizes)).any():
            raise RunError(f"row {row.key}: has codes beyond the codebooks' sizes {self._layout.codebook_sizes}")
        shares = self._settings.split
        part = self._parts[part_of(row.key, shares, self._settings.seed) if shares else 0]
        about = {name: value for name, value in row.info.items() if name not in RUN_INFO_FIELDS and name != "key"}
        pieces: list[list[npt.NDArray[np.uint16] | Sequence[int]]]
        pieces = [[codes]] if self._text is None else self._text.pieces(row, codes)
        for number, parts in enumerate(pieces):
            which = {"template": number} if len(pieces) > 1 else {}
            place = 0 if self._place_of is None else self._place_of(row.key)
            part.append(self._layout.join(parts), {"key": row.key, **about, **which}, place)

    def _layout_of(self, row: StoredRow, width: int) -> Layout:
        settings = self._settings
        text_vocabulary = 0 if self._text is None else self._text.vocabulary_size
        base = settings.base_offset
        layout = Layout(
            settings.pattern, self._codebook_sizes(row, width), text_vocabulary if base is None else base,
            settings.audio_start, settings.audio_end, settings.last, text_vocabulary,
        )  # fmt: skip
        if layout.base_offset < text_vocabulary:
            raise RunError(
                f"--base_offset {base}: the text's vocabulary has {text_vocabulary:,} tokens, "
                "above which the codes' begin: give that number, or leave it out"
            )
        marks = {
            "audio_start": settings.audio_start,
            "audio_end": settings.audio_end,
            "end_of_utterance": settings.last,
        }
        for name, mark in marks.items():
            if mark is not None and (layout.base_offset <= mark < layout.end_of_codes or mark == layout.padding):
                raise RunError(
                    f"--{name} {mark}: is a token of the codes, which are {layout.base_offset} to "
                    f"{layout.end_of_codes - 1}, or of padding ({layout.padding})"
                )
        given = [
            mark for mark in (settings.audio_start, settings.audio_end, layout.end_of_utterance) if mark is not None
        ]
        if len(set(given)) != len(given):
            raise RunError("--audio_start, --audio_end and the end of an utterance are different tokens")
        if layout.vocabulary_size > _MOST_TOKENS:
            raise RunError(f"--base_offset {base}: tokens of up to {layout.vocabulary_size:,} do not fit into 32 bits")
        return layout

    def _codebook_sizes(self, row: StoredRow, width: int) -> tuple[int, ...]:
        sizes = self._settings.codebook_sizes or row.info.get("codebook_sizes")
        if not isinstance(sizes, (list, tuple)) or not all(isinstance(size, int) and size > 0 for size in sizes):
            raise RunError(f"row {row.key}: does not say how large the codebooks are: give --codebook_sizes")
        if len(sizes) < width:
            raise RunError(f"row {row.key}: has {width} codebooks, of which {len(sizes)} sizes are known")
        return tuple(sizes[:width])

    def finish(self) -> None:
        for part in self._parts:
            part.finish(self._layout, self._common, self._text)


class _Text:
    """The text of rows as tokens.

    Attributes:
        vocabulary_size: the number above all of the tokenizer's ids.
    """

    def __init__(self, settings: StreamSettings) -> None:
        self._tokenizer = open_tokenizer(str(settings.tokenizer))
        self._field = str(settings.text_field)
        self._templates = [[piece for piece in _FIELD.split(template) if piece] for template in settings.templates]
        self.vocabulary_size = vocabulary_size(self._tokenizer)

    def pieces(
        self, row: StoredRow, codes: npt.NDArray[np.uint16]
    ) -> list[list[npt.NDArray[np.uint16] | Sequence[int]]]:
        """What an utterance of each template consists of."""
        text = row.info.get(self._field)
        if not isinstance(text, str):
            raise RunError(f"row {row.key}: has no text in its field {self._field}, which --text names")
        return [self._of_template(template, text, codes) for template in self._templates]

    def _of_template(
        self, template: Sequence[str], text: str, codes: npt.NDArray[np.uint16]
    ) -> list[npt.NDArray[np.uint16] | Sequence[int]]:
        # Text between two fields is tokenized as one, as tokens may reach from the template's text into the row's.
        parts: list[npt.NDArray[np.uint16] | Sequence[int]] = []
        for side in _around_audio(template):
            if side is None:
                parts.append(codes)
            elif written := "".join(text if piece == "{text}" else piece for piece in side):
                parts.append(self._tokenizer.encode(written, add_special_tokens=False).ids)
        return parts

    def save(self, folder: Path) -> None:
        """Write the tokenizer beside the tokens, so that they can be read without the original."""
        self._tokenizer.save(str(folder / "tokenizer.json"))


def _around_audio(template: Sequence[str]) -> tuple[Sequence[str], None, Sequence[str]]:
    place = list(template).index("{audio}")
    return template[:place], None, template[place + 1 :]


class _Part:
    """One stream that is being written.

    Rows come as they are stored. Where their order is another, tokens and lines are kept aside, and put in order when
    all are there.
    """

    def __init__(self, folder: Path, settings: StreamSettings, number: int) -> None:
        folder.mkdir(exist_ok=True)
        self._folder = folder
        self._settings = settings
        self._number = number
        self._tokens_path, self._lines_path = folder / ".tokens.part", folder / ".keys.part"
        self._tokens: BinaryIO = self._tokens_path.open("wb")
        self._lines: BinaryIO = self._lines_path.open("wb")
        self._token_ends, self._line_ends, self._places = array("q", [0]), array("q", [0]), array("q")
        self._dtype: np.dtype[Any] | None = None

    def append(self, tokens: npt.NDArray[Any], about: dict[str, Any], place: int) -> None:
        """One utterance, its line of ``keys.jsonl``, and its place in the order."""
        self._dtype = tokens.dtype
        self._tokens.write(tokens.data)
        line = dump_json(about) + b"\n"
        self._lines.write(line)
        self._token_ends.append(self._token_ends[-1] + len(tokens))
        self._line_ends.append(self._line_ends[-1] + len(line))
        self._places.append(place)

    def finish(self, layout: Layout | None, common: Common, text: _Text | None) -> None:
        """Write the stream, its lines and ``tokens.json``; of a part without rows as well."""
        self._tokens.close()
        self._lines.close()
        if layout is not None:
            self._write(layout)
            self._write_about(layout, common, text)
        self._tokens_path.unlink()
        self._lines_path.unlink()

    def _write(self, layout: Layout) -> None:
        make: Callable[[Path, np.dtype[Any]], TokenStream]
        make = MegatronFile if self._settings.kind == "megatron" else FlatFile
        stream = make(self._folder, layout.dtype)
        with (self._folder / "keys.jsonl").open("wb") as keys:
            if len(self._places):
                tokens = np.memmap(self._tokens_path, layout.dtype, "r")
                lines = np.memmap(self._lines_path, np.uint8, "r")
                for number in self._order():
                    stream.append(tokens[self._token_ends[number] : self._token_ends[number + 1]])
                    keys.write(lines[self._line_ends[number] : self._line_ends[number + 1]].tobytes())
        stream.close()

    def _order(self) -> list[int]:
        if self._settings.order == "shuffle":
            chance = np.random.default_rng((self._settings.seed, self._number))
            return [int(number) for number in chance.permutation(len(self._places))]
        return [int(number) for number in np.argsort(np.frombuffer(self._places, np.int64), kind="stable")]

    def _write_about(self, layout: Layout, common: Common, text: _Text | None) -> None:
        settings = self._settings
        about: dict[str, Any] = {
            **layout.as_json(),
            "ids": explain(layout),
            "num_utterances": len(self._places),
            "num_tokens": self._token_ends[-1],
            "converted_by": f"batch_tokenizer {__version__}",
            "made_by": {name: value for name, value in common.fields.items() if name != "hidden_states"},
        }
        if text is not None:
            text.save(self._folder)
            about["text"] = {
                "field": settings.text_field, "tokenizer": settings.tokenizer, "templates": settings.templates
            }  # fmt: skip
        if settings.split or settings.order == "shuffle":
            about |= {"split": settings.split, "order": settings.order, "seed": settings.seed}
        (self._folder / "tokens.json").write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n")


def explain(layout: Layout) -> list[dict[str, Any]]:
    """What each token number means, as ranges from ``first`` to ``last``."""
    ranges = [
        {"first": offset, "last": offset + size - 1, "meaning": f"codes 0 to {size - 1} of codebook {codebook}"}
        for codebook, (offset, size) in enumerate(zip(layout.offsets, layout.codebook_sizes, strict=True))
    ]
    marks = {
        "begin of audio": layout.audio_start,
        "end of audio": layout.audio_end,
        "end of utterance": layout.end_of_utterance,
        "padding of the delayed pattern": layout.padding if layout.pattern == "delayed" else None,
    }
    ranges += [{"first": mark, "last": mark, "meaning": meaning} for meaning, mark in marks.items() if mark is not None]
    if layout.text_vocabulary:
        ranges.insert(0, {"first": 0, "last": layout.text_vocabulary - 1, "meaning": "text, by tokenizer.json"})
    return ranges


def settings_of(arguments: Any, kind: Literal["megatron", "flat"]) -> StreamSettings:
    """The settings that the command's arguments ask for."""
    settings = StreamSettings(
        kind, arguments.pattern, arguments.codebook_sizes, arguments.base_offset, arguments.audio_start,
        arguments.audio_end, arguments.end_of_utterance, arguments.text, arguments.tokenizer,
        split=arguments.split or (), seed=arguments.seed, order=arguments.order,
    )  # fmt: skip
    return replace(settings, templates=tuple(arguments.template)) if arguments.template else settings
