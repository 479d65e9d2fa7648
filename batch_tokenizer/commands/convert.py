"""``batch_tokenizer convert``: tokens from one form of storage into another, without the model.

    batch_tokenizer convert RUN_OR_SHARDS --to json|npy|jsonl|tar|parquet --out DIR
    batch_tokenizer convert RUN_OR_SHARDS --to megatron|flat --pattern interleaved|delayed --out DIR

It reads whatever ``runs/stored_rows.py`` reads, and writes a new folder, which appears whole or not at all: token files
with a manifest of them (``data.jsonl``), shards, or one stream for a language model with ``tokens.json``, which says
how its numbers are made (``writers/token_streams.py``).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol, get_args

import numpy as np
import numpy.typing as npt

from batch_tokenizer import __version__
from batch_tokenizer.config import add_options, check_codes_field
from batch_tokenizer.records import SHARD_SINKS, RowError, RunError, Sink
from batch_tokenizer.runs.stored_rows import StoredRow, stored_rows
from batch_tokenizer.runtime.row_counter import RowCounter
from batch_tokenizer.sources.finishing import output_path
from batch_tokenizer.storage.json_lines import json_lines_writer
from batch_tokenizer.storage.names import HIDDEN_STATES_ENDING
from batch_tokenizer.storage.row_info import RUN_INFO_FIELDS, split_info
from batch_tokenizer.writers.row_encoding import EncodedRow, npy_bytes, tokens_as_json, tokens_as_npy
from batch_tokenizer.writers.shard_sink import MOST_ROWS, OpenShard, ShardForm, shard_form
from batch_tokenizer.writers.token_streams import FlatFile, Layout, MegatronFile, Pattern, TokenStream

Form = Literal["json", "npy", "jsonl", "tar", "parquet", "megatron", "flat"]

ToBytes = Callable[[npt.NDArray[np.uint16], Mapping[str, Any]], bytes]

#: Of what a run says of its rows alike, what all rows of a shard or stream must have in common.
_MUST_AGREE = (
    "codec", "fingerprint", "sample_rate", "frame_rate", "codebook_sizes",
    "loudness", "attention_window", "window_merge", "hidden_states",
)  # fmt: skip


class Target(Protocol):
    """Where converted rows go."""

    def add(self, row: StoredRow) -> None:
        """One more row.

        Raises:
            RowError: it cannot be stored.
            RunError: it does not go with those before it.
        """

    def finish(self) -> None:
        """Write what comes last."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    add = parser.add_argument
    add("source", help="a run folder, shards ('out/*.tar'), a manifest of token files, or a folder of either")
    add("--to", dest="form", choices=get_args(Form), required=True, help="what to make of it")
    add("--out", type=Path, required=True, help="a new folder")
    add("--pattern", choices=get_args(Pattern), default="interleaved",
        help="megatron, flat: order of the codebooks (%(default)s)")  # fmt: skip
    add("--codebook_sizes", type=_sizes, metavar="N,N,…",
        help="megatron, flat: where the tokens do not say (files of other programs)")  # fmt: skip
    add("--tokens_only", action="store_true", help="leave audio and hidden states behind")
    add_options(parser, "codes_field")
    add(
        "--shard_megabytes",
        type=int,
        default=256,
        help="jsonl, tar, parquet: size at which a shard is closed (%(default)s)",
    )


def main(arguments: argparse.Namespace) -> int:
    """Converts. Returns 0.

    Raises:
        RunError: there is nothing to convert, a row cannot be, or the folder cannot be written.
    """
    if arguments.shard_megabytes < 1:
        raise RunError(f"--shard_megabytes {arguments.shard_megabytes}: must be at least 1")
    check_codes_field(arguments.codes_field)
    rows = stored_rows(arguments.source)
    with _new_folder(arguments.out) as folder:
        target: Target = _target(arguments, folder)
        num_rows, num_codes = _fill(target, rows, tokens_only=arguments.tokens_only)
        if not num_rows:
            raise RunError(f"{arguments.source}: has no rows")
        num_files, num_bytes = _count(folder)
    print(f"{num_rows:,} rows, {num_codes:,} codes: {num_files:,} files of {num_bytes:,} bytes in all")
    return 0


def _fill(target: Target, rows: Iterator[StoredRow], *, tokens_only: bool) -> tuple[int, int]:
    """(rows, codes) that went into the target, which is finished in any case, as it has files open."""
    num_rows = num_codes = 0
    try:
        with RowCounter("converted") as counter:
            for row in rows:
                try:
                    target.add(_tokens_only(row) if tokens_only else row)
                except RowError as error:
                    raise RunError(f"row {row.key}: {error.reason}", exit_code=1) from error
                num_rows += 1
                num_codes += 0 if row.codes is None else row.codes.size
                counter.update()
    except BaseException:
        with suppress(OSError):
            target.finish()
        raise
    target.finish()
    return num_rows, num_codes


def _target(arguments: argparse.Namespace, folder: Path) -> Target:
    form: Form = arguments.form
    if form in ("json", "npy"):
        return FileTarget(folder, arguments.out, tokens_as_json if form == "json" else tokens_as_npy, f".{form}")
    if form in SHARD_SINKS:
        return ShardTarget(folder, form, arguments.shard_megabytes * 1_000_000, arguments.codes_field)
    return StreamTarget(folder, form, arguments.pattern, arguments.codebook_sizes)


def _sizes(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(word) for word in text.split(","))
    except ValueError:
        sizes = ()
    if not sizes or min(sizes) < 1 or max(sizes) > 1 << 16:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of sizes such as 1024,1024,128")
    return sizes


def _tokens_only(row: StoredRow) -> StoredRow:
    return StoredRow(row.key, row.codes, {name: value for name, value in row.info.items() if name != "hidden_states"})


def _count(folder: Path) -> tuple[int, int]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return len(files), sum(path.stat().st_size for path in files)


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A folder beside ``out`` that becomes it in the end, or is removed after an exception.

    Raises:
        RunError: there is something, or nothing can be written there.
    """
    try:
        if out.exists() and not (out.is_dir() and not any(out.iterdir())):
            raise RunError(f"--out {out}: is there already; name a new folder")
        out.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".part", dir=out.parent))
        try:
            yield aside
            aside.chmod(0o777 & ~_umask())
            os.rename(aside, out)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
    except OSError as error:
        raise RunError(f"--out {out}: {error.filename or ''}: {error.strerror or error}", exit_code=1) from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


# -------------------------------------------------------------------------------------------------------------- targets


class FileTarget:
    """A token file a row, in two levels of folders, an audio file beside it, and ``data.jsonl``.

    Args:
        folder: where they are written.
        out: where they will be, for the manifest's paths.
    """

    def __init__(
        self,
        folder: Path,
        out: Path,
        to_bytes: ToBytes,
        ending: str,
    ) -> None:
        self._folder = folder
        self._out = out
        self._to_bytes = to_bytes
        self._ending = ending
        self._manifest_file = (folder / "data.jsonl").open("wb")
        self._manifest = json_lines_writer(self._manifest_file)

    def add(self, row: StoredRow) -> None:
        codes = _codes_of(row)
        fields, _ = split_info(row.info)
        line: dict[str, Any] = {"key": row.key, **{name: value for name, value in fields.items() if name != "key"}}
        line.pop("reconstructed_wav", None)
        line["quantized_tokens"] = self._write(row.key, self._ending, self._to_bytes(codes, _info_of(row, codes)))
        if row.hidden_states is not None:
            self._write(row.key, f"{self._ending}{HIDDEN_STATES_ENDING}", npy_bytes(row.hidden_states))
        if row.audio is not None:
            line["reconstructed_wav"] = self._write(row.key, f".{row.audio_format}", row.audio)
        rate, samples = row.info.get("sample_rate"), row.info.get("num_samples")
        if isinstance(rate, int) and isinstance(samples, int) and rate > 0:
            line.setdefault("duration", round(samples / rate, 4))
        self._manifest.write(line)

    def _write(self, key: str, ending: str, content: bytes) -> str:
        path = Path(output_path(str(self._folder), key, ending))
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with path.open("xb") as stream:
                stream.write(content)
        except FileExistsError as error:
            raise RunError(f"row {key}: is there twice") from error
        return output_path(str(self._out), key, ending)

    def finish(self) -> None:
        self._manifest_file.close()


class ShardTarget:
    """Shards ``tokens-000000.tar`` and so on."""

    def __init__(self, folder: Path, form: Sink, most_bytes: int, codes_field: str) -> None:
        self._folder = folder
        self._kind = form
        self._codes_field = codes_field
        self._most_bytes = most_bytes
        self._common = Common()
        self._form: ShardForm | None = None
        self._has_audio = False
        self._shard: OpenShard | None = None
        self._stream: BinaryIO | None = None
        self._num_shards = self._num_rows = 0

    def add(self, row: StoredRow) -> None:
        codes = row.codes
        self._common.check(row)
        if self._form is None:
            self._has_audio = row.audio is not None
            width = None if codes is None else codes.shape[1]
            self._form = shard_form(self._kind, self._common.fields, width, self._has_audio, self._codes_field)
        if self._kind == "jsonl" and codes is None:
            raise RunError(f"row {row.key}: has no tokens")
        for what, content in (("audio", row.audio), ("hidden states", row.hidden_states)):
            if self._kind == "jsonl" and content is not None:
                raise RunError(f"row {row.key}: has {what}, which JSON lines do not hold: give --tokens_only")
        if (row.info.get("hidden_states") is True) != (row.hidden_states is not None):
            raise RunError(f"row {row.key}: its hidden states are gone: --tokens_only leaves all of them behind")
        if (row.audio is not None) != self._has_audio:
            raise RunError(
                f"row {row.key}: {'has' if row.audio is not None else 'has no'} audio, unlike those before it: "
                "--tokens_only leaves audio behind"
            )
        fields, about = split_info({**row.info, "key": row.key} if codes is None else _info_of(row, codes))
        encoded = self._form.encode(
            EncodedRow(row.key, fields, about, codes, row.audio, row.audio_format, row.hidden_states)
        )
        if self._shard is None:
            self._stream = (self._folder / f"tokens-{self._num_shards:06d}.{self._form.suffix}").open("xb")
            self._shard = self._form.open(self._stream)
            self._num_shards += 1
        self._shard.append(encoded)
        self._num_rows += 1
        if self._shard.num_bytes >= self._most_bytes or self._num_rows >= MOST_ROWS:
            self._close()

    def finish(self) -> None:
        if self._shard is not None:
            self._close()

    def _close(self) -> None:
        assert self._shard is not None
        assert self._stream is not None
        self._shard.finish()
        self._stream.close()
        self._shard = None
        self._num_rows = 0


class StreamTarget:
    """One stream of token numbers, ``keys.jsonl`` with a key a line, and ``tokens.json``, which explains it."""

    def __init__(self, folder: Path, form: Form, pattern: Pattern, codebook_sizes: tuple[int, ...] | None) -> None:
        self._folder = folder
        self._kind = form
        self._pattern: Pattern = pattern
        self._sizes = codebook_sizes
        self._common = Common()
        self._layout: Layout | None = None
        self._stream: TokenStream | None = None
        self._keys_file = (folder / "keys.jsonl").open("wb")
        self._keys = json_lines_writer(self._keys_file)
        self._num_rows = self._num_tokens = 0

    def add(self, row: StoredRow) -> None:
        codes = _codes_of(row)
        self._common.check(row)
        if self._layout is None or self._stream is None:
            self._layout = Layout(self._pattern, self._codebook_sizes(row, codes.shape[1]))
            self._stream = (MegatronFile if self._kind == "megatron" else FlatFile)(self._folder, self._layout.dtype)
        if (codes >= np.array(self._layout.codebook_sizes)).any():
            raise RunError(f"row {row.key}: has codes beyond the codebooks' sizes {self._layout.codebook_sizes}")
        tokens = self._layout.encode(codes)
        self._stream.append(tokens)
        self._keys.write(row.key)
        self._num_rows += 1
        self._num_tokens += len(tokens)

    def _codebook_sizes(self, row: StoredRow, width: int) -> tuple[int, ...]:
        sizes = self._sizes or row.info.get("codebook_sizes")
        if not isinstance(sizes, (list, tuple)) or not all(isinstance(size, int) and size > 0 for size in sizes):
            raise RunError(f"row {row.key}: does not say how large the codebooks are: give --codebook_sizes")
        if len(sizes) < width:
            raise RunError(f"row {row.key}: has {width} codebooks, of which {len(sizes)} sizes are known")
        return tuple(sizes[:width])

    def finish(self) -> None:
        self._keys_file.close()
        if self._stream is None or self._layout is None:
            return
        self._stream.close()
        layout = self._layout
        about = {
            "pattern": layout.pattern,
            "num_quantizers": len(layout.codebook_sizes),
            "codebook_sizes": layout.codebook_sizes,
            "codebook_offsets": layout.offsets,
            "end_of_utterance": layout.end_of_utterance,
            "padding": layout.padding,
            "vocabulary_size": layout.vocabulary_size,
            "token_dtype": layout.dtype.name,
            "num_utterances": self._num_rows,
            "num_tokens": self._num_tokens,
            "converted_by": f"batch_tokenizer {__version__}",
            "made_by": self._common.fields,
        }
        (self._folder / "tokens.json").write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n")


@dataclass(slots=True)
class Common:
    """What all rows of a shard or stream have in common.

    Attributes:
        fields: of the first row, those that a run says of all its rows.
    """

    fields: dict[str, Any] = field(default_factory=dict)
    width: int | None = None
    _first: str | None = None

    def check(self, row: StoredRow) -> None:
        """
        Raises:
            RunError: the row is of another codec, or has another number of codebooks.
        """
        width = None if row.codes is None else row.codes.shape[1]
        if self._first is None:
            self._first, self.width = row.key, width
            self.fields = {name: row.info[name] for name in RUN_INFO_FIELDS if name in row.info}
            return
        if width != self.width:
            raise RunError(
                f"row {row.key}: has {width or 'no'} codebooks, row {self._first} has {self.width or 'none'}: "
                "convert them apart"
            )
        for name in _MUST_AGREE:
            if row.info.get(name) != self.fields.get(name):
                raise RunError(
                    f"row {row.key}: {name} {row.info.get(name)}, row {self._first} has {self.fields.get(name)}: "
                    "convert them apart"
                )


def _codes_of(row: StoredRow) -> npt.NDArray[np.uint16]:
    if row.codes is None:
        raise RunError(f"row {row.key}: has no tokens")
    return row.codes


def _info_of(row: StoredRow, codes: npt.NDArray[np.uint16]) -> dict[str, Any]:
    return {**row.info, "key": row.key, "num_frames": codes.shape[0], "num_quantizers": codes.shape[1]}
