"""``batch_tokenizer convert``: tokens from one form of storage into another, without the model.

    batch_tokenizer convert RUN_OR_SHARDS --to json|npy|jsonl|tar|parquet --out DIR
    batch_tokenizer convert RUN_OR_SHARDS --to megatron|flat --pattern interleaved|delayed --out DIR
    batch_tokenizer convert RUN_OR_SHARDS --to shar|energon --out DIR

It reads whatever ``stored_rows`` reads, and writes a new folder, which appears whole or not at all: token files
with a manifest of them (``data.jsonl``), shards, streams for a language model with ``tokens.json``, which says how
their numbers are made (``writers/token_streams.py``), a Lhotse Shar folder, or tars with Megatron-Energon's index.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from batch_tokenizer.audio_fields import check_codes_field
from batch_tokenizer.commands.convert_streams import StreamTarget, settings_of
from batch_tokenizer.commands.convert_targets import EnergonTarget, FileTarget, ShardTarget, SharTarget, Target
from batch_tokenizer.config import add_options, check_least
from batch_tokenizer.records import RowError, RunError
from batch_tokenizer.runs.finished_run import FinishedRun
from batch_tokenizer.runs.indexed_rows import stored_rows
from batch_tokenizer.runs.stored_rows import StoredRow
from batch_tokenizer.runtime.row_counter import RowCounter
from batch_tokenizer.runtime.run_files import is_run_folder
from batch_tokenizer.storage.row_info import other_names
from batch_tokenizer.writers.row_encoding import tokens_as_json, tokens_as_npy
from batch_tokenizer.writers.token_streams import Pattern

Form = Literal["json", "npy", "jsonl", "tar", "parquet", "shar", "energon", "megatron", "flat"]


#: What has one place for codes.
_OWN_CODES_ONLY: tuple[Form, ...] = ("shar", "megatron", "flat")

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    add = parser.add_argument
    add("source", help="a run folder, shards ('out/*.tar'), a manifest of token files, or a folder of either")
    add("--to", dest="form", choices=get_args(Form), required=True, help="what to make of it")
    add("--out", type=Path, required=True, help="a new folder")
    stream = parser.add_argument_group("megatron, flat").add_argument
    stream("--pattern", choices=get_args(Pattern), default="interleaved", help="order of the codebooks (%(default)s)")
    stream("--codebook_sizes", type=_sizes, metavar="N,N,…",
        help="where the tokens do not say (files of other programs)")  # fmt: skip
    stream("--base_offset", type=_token, metavar="N",
        help="the first token of codes (0; with --text, the first above the tokenizer's)")  # fmt: skip
    stream("--audio_start", type=_token, metavar="ID", help="a token before the codes of an utterance")
    stream("--audio_end", type=_token, metavar="ID", help="a token behind them")
    stream("--end_of_utterance", type=_token, metavar="ID",
        help="the token after each utterance (the first one behind the codebooks)")  # fmt: skip
    stream("--text", metavar="FIELD", help="the field of the rows whose text stands beside the codes")
    stream("--tokenizer", metavar="PATH_OR_ID", help="of the text: a tokenizer.json, a folder with one, or a hub id")
    stream("--template", action="append", type=_template, metavar="TEXT",
        help="what an utterance consists of: {text}, {audio} and text between them ({text}{audio}); given several "
        "times, each row becomes an utterance for each")  # fmt: skip
    stream("--split", type=_shares, metavar="SHARE,SHARE",
        help="shares of the rows for train, valid and test, a folder each, by the rows' keys")  # fmt: skip
    stream("--order", choices=("manifest", "shuffle"),
        help="of the run's manifest, or by chance; as the rows are stored when absent")  # fmt: skip
    stream("--seed", type=int, default=0, metavar="N", help="of --split and --order shuffle (%(default)s)")
    add("--tokens_only", action="store_true", help="leave audio and hidden states behind")
    add_options(parser, "codes_field")
    add("--shard_megabytes", type=int, default=256, help="size at which a shard is closed (%(default)s)")


def main(arguments: argparse.Namespace) -> int:
    """Converts. Returns 0.

    Raises:
        RunError: there is nothing to convert, a row cannot be, or the folder cannot be written.
    """
    check_least(arguments, shard_megabytes=1)
    check_codes_field(arguments.codes_field)
    rows = stored_rows(arguments.source)
    with _new_folder(arguments.out) as folder:
        target: Target = _target(arguments, folder)
        if arguments.form in _OWN_CODES_ONLY:
            rows = _own_codes_only(rows, arguments.form)
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
                num_codes += sum(codes.size for codes in (row.codes, *row.other_codes.values()) if codes is not None)
                counter.update()
    except BaseException:
        with suppress(OSError):
            target.finish()
        raise
    target.finish()
    return num_rows, num_codes


def _target(arguments: argparse.Namespace, folder: Path) -> Target:
    form: Form = arguments.form
    if form == "json" or form == "npy":
        return FileTarget(folder, arguments.out, tokens_as_json if form == "json" else tokens_as_npy, f".{form}")
    if form == "megatron" or form == "flat":
        place_of = _places_of(arguments.source) if arguments.order == "manifest" else None
        return StreamTarget(folder, settings_of(arguments, form), place_of)
    if form == "shar":
        return SharTarget(folder)
    if form == "energon":
        shares, seed = arguments.split or (), arguments.seed
        return EnergonTarget(folder, arguments.shard_megabytes * 1_000_000, arguments.codes_field, shares, seed)
    return ShardTarget(folder, form, arguments.shard_megabytes * 1_000_000, arguments.codes_field)


def _sizes(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(word) for word in text.split(","))
    except ValueError:
        sizes = ()
    if not sizes or min(sizes) < 1 or max(sizes) > 1 << 16:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of sizes such as 1024,1024,128")
    return sizes


def _shares(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(word) for word in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of shares such as 0.99,0.01") from error


def _token(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a token's number")
    return int(text)


def _template(text: str) -> str:
    """As typed, with ``\\n`` and ``\\t`` for a line end and a tab."""
    return text.replace("\\n", "\n").replace("\\t", "\t")


def _places_of(source: str) -> Callable[[str], int] | None:
    """Where each key stands in the manifest of a run folder; None of other sources, which are in their order."""
    if not is_run_folder(source):
        return None
    manifest = FinishedRun.open(Path(source)).manifest()
    order = np.argsort(manifest.key_hashes, kind="stable")
    ordered = manifest.key_hashes[order]
    return lambda key: int(order[min(int(np.searchsorted(ordered, manifest.hash_key(key))), len(order) - 1)])


def _tokens_only(row: StoredRow) -> StoredRow:
    info = {name: value for name, value in row.info.items() if name != "hidden_states"}
    return StoredRow(row.key, row.codes, info, other_codes=row.other_codes)


def _own_codes_only(rows: Iterator[StoredRow], form: Form) -> Iterator[StoredRow]:
    """Rows without the codes of other audio, which a warning names once."""
    warned = False
    for row in rows:
        if names := other_names(row.info):
            if not warned:
                log.warning("--to %s holds the own codes of rows: %s are left behind", form, ", ".join(names))
            warned = True
            info = {name: value for name, value in row.info.items() if name not in ("other_audio", "other_codes")}
            row = replace(row, info=info, other_codes={})
        yield row


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
