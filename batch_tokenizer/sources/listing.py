"""``local_manifest``: whatever ``--data_list`` names, as one local JSON-lines file.

A JSON-lines file whose rows are complete is used directly. Everything else is listed once into
``FOLDER/source-IDENTITY.jsonl``, which is complete or not there. The identity is a hash of what the file depends on:
the names, sizes and times of the inputs, and the settings that shape rows. So a later start finds the file again, and
lists anew where a shard was added or replaced. The same inputs give the same lines, in the same order.

Shards are listed by several threads, as that is mostly waiting; what each found is kept in a file of its own once it is
large, so that memory does not grow with the corpus.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, replace
from functools import partial
from hashlib import blake2b
from itertools import chain, islice
from pathlib import Path
from threading import Lock
from typing import IO, Any

import numpy as np

from batch_tokenizer.manifest.row import MAX_LINE
from batch_tokenizer.records import RunError, printable
from batch_tokenizer.sources.dataset_rows import dataset_rows
from batch_tokenizer.sources.finishing import FinishedLine, Finisher, SourceSettings
from batch_tokenizer.sources.folder_rows import folder_row, walk_folder
from batch_tokenizer.sources.foreign_rows import AUDIO_FIELDS, Refused
from batch_tokenizer.sources.lines import lines_of
from batch_tokenizer.sources.list_rows import path_rows, scp_rows, table_rows
from batch_tokenizer.sources.made_keys import SeenKeys, hash_of
from batch_tokenizer.sources.ordered_map import ordered
from batch_tokenizer.sources.parquet_rows import parquet_rows
from batch_tokenizer.sources.patterns import DESCRIPTIONS, Source, find_sources, stored_sources
from batch_tokenizer.sources.shar_rows import companions, shar_rows
from batch_tokenizer.sources.tar_rows import tar_rows
from batch_tokenizer.sources.token_lines import token_line_rows
from batch_tokenizer.storage import remote
from batch_tokenizer.storage.atomic import atomic_write
from batch_tokenizer.storage.file_lock import exclusive_lock
from batch_tokenizer.storage.json_lines import parse_json
from batch_tokenizer.storage.jsonl_rows import holds_codes
from batch_tokenizer.storage.names import PIPE, display_name, display_source, is_relative, is_url
from batch_tokenizer.storage.remote import StorageError
from batch_tokenizer.storage.streams import is_compressed

log = logging.getLogger(__name__)

_VERSION = 3

_THREADS = 8

_CHUNK = 2000

#: Bytes of one shard's lines that are held in memory.
_SPOOLED = 8 * 2**20

#: Lines at the beginning of a JSON-lines file that decide whether it is another tool's.
_LOOKED_AT = 100

#: Listings of an earlier state of the inputs are removed only after this: another job may still read them.
_STALE_SECONDS = 24 * 3600.0

#: Kinds of sources whose rows are files, found by their names.
_FOUND_BY_NAME = ("folder", "audio", "paths")

#: Files up to which the outputs of folders and lists lie as the inputs do.
MOST_MIRRORED = 10_000

#: Seconds between lines of progress.
_LOG_SECONDS = 5.0

Task = Callable[[], "_Lines"]


class SkippedFiles:
    """Counts what is left out, by kind, and logs one line for each kind."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._first: dict[str, str] = {}
        self._lock = Lock()

    def add(self, kind: str, name: str) -> None:
        """One more of ``kind``."""
        with self._lock:
            self._counts[kind] += 1
            self._first.setdefault(kind, name)

    def log(self) -> None:
        """Write the log lines."""
        for kind, count in sorted(self._counts.items()):
            log.warning("left out: %s %s, the first %s", f"{count:,}", kind, repr(printable(self._first[kind][:200])))


def local_manifest(
    data_list: str, folder: Path, settings: SourceSettings, idle: Callable[[], None] = lambda: None
) -> Path:
    """The JSON-lines file that stands for ``data_list``.

    Args:
        folder: where it is written, if it has to be; made if it is not there.
        idle: called while waiting; an exception that it raises ends the listing, and no partial file remains.

    Raises:
        RunError: the inputs are not there or cannot be read, rows could have no outputs, or the folder cannot be
            written.
    """
    # 1. One of our own manifests needs no listing.
    sources = find_sources(data_list)
    settings = replace(settings, names=names_of_outputs(sources, settings))
    if settings.input_field == "quantized_tokens":
        sources = [stored for source in sources for stored in stored_sources(source)]
    kinds = Counter(DESCRIPTIONS[source.kind] for source in sources)
    named = (f"{count:,} × {kind}" if count > 1 else kind for kind, count in kinds.items())
    log.info("--data_list %s: %s", display_source(data_list), ", ".join(named))
    if settings.other_fields and any(source.kind == "shar" for source in sources):
        raise RunError(
            f"--data_list {display_source(data_list)}: of a Lhotse Shar the recordings of cuts are read, and no other "
            "--audio_fields: give cuts as JSON lines whose recordings are files"
        )
    if len(sources) == 1 and sources[0].kind == "rows" and _is_ours(sources[0].location, settings):
        return Path(sources[0].location)
    if (
        settings.output_dir is None
        and settings.outputs
        and any(source.kind not in ("rows", "table") for source in sources)
    ):
        raise RunError(
            f"--data_list {display_source(data_list)}: its rows name no outputs: "
            "give --output_dir, the folder that they go to"
        )
    # 2. A listing of the same inputs and settings is used again; otherwise one process makes it, and others wait.
    try:
        path = folder / f"source-{_identity(sources, settings)}.jsonl"
        if path.exists():
            return path
        folder.mkdir(parents=True, exist_ok=True)
        with exclusive_lock(folder / "source.lock", idle, purpose="listing the same source"):
            if not path.exists():
                _list(sources, path, settings, idle)
    except OSError as error:
        place = error.filename or folder
        raise RunError(
            f"listing {display_source(data_list)}: {place}: {error.strerror or error}", exit_code=1
        ) from error
    return path


def _is_ours(location: str, settings: SourceSettings) -> bool:
    """Whether a JSON-lines file can be used directly; also one that cannot be read, as the manifest reports that."""
    if is_url(location) or settings.changes_rows or _has_codes(location, settings):
        return False
    try:
        if not os.path.isfile(location):
            return True
        with open(location, "rb") as stream:
            head = stream.read(1 << 20)
    except (OSError, ValueError):
        return True
    if is_compressed(head):
        return False
    base = _base_of(location, _rows_of(head), settings)
    try:
        return all(settings.complete(row, base) is row for row in _rows_of(head))
    except Refused:
        return False


def _has_codes(location: str, settings: SourceSettings) -> bool:
    """Whether rows that are read for their codes have them in their lines, and do not name files of them."""
    return settings.input_field == "quantized_tokens" and holds_codes(location)


def _rows_of(head: bytes) -> Iterator[dict[str, Any]]:
    for line in islice((line for line in head.split(b"\n") if line.strip()), _LOOKED_AT):
        try:
            row = parse_json(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            yield row


def _identity(sources: list[Source], settings: SourceSettings) -> str:
    """
    Raises:
        RunError: an input is not there.
    """
    hashed = blake2b(repr((_VERSION, MAX_LINE, astuple(settings))).encode(), digest_size=8)
    missing: list[str] = []
    with ThreadPoolExecutor(_THREADS) as pool:
        for source, state in zip(sources, pool.map(lambda item: _state(item, settings), sources), strict=True):
            if state is None:
                missing.append(display_name(source.location))
            hashed.update(f"{source.kind}\0{source.location}\0{state}\0".encode("utf-8", "surrogateescape"))
    if missing:
        count = f"{len(missing):,} of {len(sources):,} files do not exist, the first " if len(sources) > 1 else ""
        verb = "" if len(sources) > 1 else " does not exist"
        raise RunError(f"--data_list: {count}{missing[0]}{verb}")
    return hashed.hexdigest()


def _state(source: Source, settings: SourceSettings) -> str | None:
    """What changes when the input does; None if it is not there."""
    location = source.location
    if location.startswith(PIPE):
        return ""
    if source.kind == "folder":
        names = blake2b(digest_size=16)
        for found in walk_folder(location, settings.input_field, lambda kind, name: None):
            names.update(repr(found).encode("utf-8", "surrogateescape"))
        return names.hexdigest()
    if is_url(location):
        parts = [location, companions(location)[0]] if source.kind == "shar" else [location]
        try:
            return repr([remote.describe(part) for part in parts] if len(parts) > 1 else remote.describe(location))
        except StorageError as error:
            raise RunError(f"--data_list {error.reason}", exit_code=1 if error.transient else 2) from error
    try:
        status = os.stat(location)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise RunError(f"--data_list {display_name(location)}: {error.strerror}") from error
    state = f"{status.st_size} {status.st_mtime_ns}"
    beside = [segments] if source.kind == "scp" and os.path.isfile(segments := _segments_of(location)) else []
    if source.kind == "shar":
        tar, fields = companions(location)
        beside = [tar, *(path for _, path in fields)]
    for path in beside:
        status = os.stat(path)
        state = f"{state} {status.st_size} {status.st_mtime_ns}"
    return state


class _Lines:
    """Lines that one task found, in memory, or in a file without a name when they are many."""

    def __init__(self, finisher: Finisher) -> None:
        self._file = tempfile.SpooledTemporaryFile(_SPOOLED, prefix="batch_tokenizer-")  # noqa: SIM115
        self._finisher = finisher
        self._own = array("Q")  # hashes of keys
        self._made: dict[int, str] = {}  # by line
        self.count = 0

    def add(self, line: FinishedLine) -> None:
        """One more."""
        self._file.write(line.text + b"\n")
        if line.key is not None and line.is_made:
            self._made[self.count] = line.key
        elif line.key is not None:
            self._own.append(hash_of(line.key))
        self.count += 1

    def move_to(self, stream: IO[bytes], seen: SeenKeys) -> None:
        """Write them to ``stream``, each made key a new one, and drop them."""
        renamed = seen.rename(list(self._made.values()), np.frombuffer(self._own, np.uint64))
        lines = list(self._made)
        others = {lines[place]: key for place, key in renamed.items()}
        self._file.seek(0)
        if others:
            for number, line in enumerate(self._file):
                text = line.removesuffix(b"\n")
                stream.write((self._finisher.renamed(text, others[number]) if number in others else text) + b"\n")
        else:
            while block := self._file.read(1 << 20):
                stream.write(block)
        self._file.close()


def _list(sources: list[Source], path: Path, settings: SourceSettings, idle: Callable[[], None]) -> None:
    left_out = SkippedFiles()
    began = last_logged = time.monotonic()
    rows = finished = 0
    seen = SeenKeys()
    # To split channels each file is opened, and those in compressed tars in their order.
    threads = 2 if settings.channels in ("split", "split_row") else _THREADS
    name, of_all = display_name(sources[0].location), f" of {len(sources):,}" if len(sources) > 1 else ""
    with atomic_write(path) as stream:
        tasks = (task for source in sources for task in _tasks(source, settings, left_out))
        for lines in ordered(lambda task: task(), tasks, threads, idle):
            rows, finished = rows + lines.count, finished + 1
            lines.move_to(stream, seen)
            idle()
            if time.monotonic() - last_logged > _LOG_SECONDS:
                last_logged = time.monotonic()
                log.info("listing %s: %s parts%s, %s rows", name, f"{finished:,}", of_all, f"{rows:,}")
        left_out.log()
        if not rows:
            what = "audio" if settings.input_field == "wav" else "tokens"
            raise RunError(f"--data_list {name}: there is no {what} in it, and no row")
    log.info("listed %s rows of %s sources in %.1f s", f"{rows:,}", f"{len(sources):,}", time.monotonic() - began)
    for other in path.parent.glob("source-*.jsonl"):
        with contextlib.suppress(FileNotFoundError):  # another process removes them too
            if other != path and time.time() - other.stat().st_mtime > _STALE_SECONDS:
                other.unlink()


def _tasks(source: Source, settings: SourceSettings, left_out: SkippedFiles) -> Iterator[Task]:
    """The parts of a source, in order."""
    field_name, location = settings.input_field, source.location
    if source.kind == "tar":
        rows_of_tar = tar_rows(location, field_name, left_out.add, settings.other_fields)
        yield lambda: _finish_rows(rows_of_tar, Finisher(settings))
    elif source.kind == "parquet" and settings.task == "token2wav":
        yield lambda: _finish_rows(parquet_rows(location), Finisher(settings))
    elif source.kind == "shar":
        yield lambda: _finish_rows(shar_rows(location), Finisher(settings))
    elif source.kind in ("parquet", "arrow"):
        yield partial(_dataset_lines, location, settings, left_out)
    elif source.kind == "folder":
        found = walk_folder(location, field_name, left_out.add)
        while part := list(islice(found, _CHUNK)):
            rows = (row for found_file in part if (row := folder_row(location, field_name, found_file)) is not None)
            yield partial(_finish_rows, rows, Finisher(settings, mirrored=_is_mirrored(source, settings)))
    elif source.kind == "rows" and _has_codes(location, settings):
        yield lambda: _finish_rows(token_line_rows(location), Finisher(settings))
    elif source.kind == "rows":
        yield from _line_tasks(location, settings)
    else:
        rows_of_list = partial(_rows_of_list, source, field_name)
        base = _base_of(location, islice(rows_of_list(), _LOOKED_AT), settings)
        finisher = Finisher(settings, base, _is_mirrored(source, settings))
        listed = rows_of_list()
        while part_of_list := list(islice(listed, _CHUNK)):
            yield partial(_finish_rows, iter(part_of_list), finisher)


def _dataset_lines(location: str, settings: SourceSettings, left_out: SkippedFiles) -> _Lines:
    rows = dataset_rows(location, settings.audio_column, left_out.add, settings.audio_field, settings.other_fields)
    first = list(islice(rows, _LOOKED_AT))
    return _finish_rows(chain(first, rows), Finisher(settings, _base_of(location, first, settings)))


def names_of_outputs(sources: Iterable[Source], settings: SourceSettings) -> str:
    """``mirror`` or ``hash``: what ``--names auto`` means for these sources, and otherwise what was asked for."""
    if settings.names != "auto" or settings.output_dir is None or not settings.outputs:
        return settings.names
    count = 0
    for source in sources:
        if source.kind not in _FOUND_BY_NAME or is_url(source.location):
            continue  # the names of the others are those of their keys
        if source.kind == "folder":
            found: Iterator[Any] = walk_folder(source.location, settings.input_field, lambda kind, name: None)
        else:
            found = _rows_of_list(source, settings.input_field)
        count += sum(1 for _ in islice(found, MOST_MIRRORED + 1 - count))
        if count > MOST_MIRRORED:
            return "hash"
    return "mirror"


def _is_mirrored(source: Source, settings: SourceSettings) -> bool:
    """Whether outputs lie in the output folder as the inputs lie in theirs.

    Only those of local files that were found by their names; and not where they would lie in the folder of the source,
    from which a later start would list them. Addresses may have names that no file system takes.
    """
    target = settings.output_dir
    if settings.names != "mirror" or target is None or is_url(source.location) or is_url(target):
        return False
    folder = os.path.realpath(source.location)
    is_below = source.kind == "folder" and os.path.commonpath((folder, os.path.realpath(target))) == folder
    return source.kind in _FOUND_BY_NAME and not is_below


def _segments_of(location: str) -> str:
    """Where Kaldi keeps the parts of a list's recordings."""
    return os.path.join(os.path.dirname(location), "segments")


def _rows_of_list(source: Source, field_name: str) -> Iterator[dict[str, Any]]:
    """Rows of a source that is a list of audio, or one file of it."""
    location = source.location
    if source.kind == "audio":
        return iter(({field_name: location},))
    lines = lines_of(location)
    if source.kind == "scp":
        segments = _segments_of(location)
        return scp_rows(location, lines, lines_of(segments) if os.path.isfile(segments) else None)
    if source.kind == "table":
        return table_rows(location, lines, "\t" if ".tsv" in location.lower() else ",")
    return path_rows(location, lines, field_name)


def _finish_rows(rows: Iterator[dict[str, Any]], finisher: Finisher) -> _Lines:
    lines = _Lines(finisher)
    for row in rows:
        for line in finisher.finish(row):
            lines.add(line)
    return lines


def _line_tasks(location: str, settings: SourceSettings) -> Iterator[Task]:
    """Some thousand lines of a JSON-lines file at a time."""
    finisher: Finisher | None = None
    lines = lines_of(location)
    while part := list(islice(lines, _CHUNK)):
        if finisher is None:
            part[0] = part[0].removeprefix(b"\xef\xbb\xbf")
            finisher = Finisher(settings, _base_of(location, _rows_of(b"\n".join(part[:_LOOKED_AT])), settings))
        yield partial(_finish_lines, part, finisher)


def _finish_lines(part: list[bytes], finisher: Finisher) -> _Lines:
    lines = _Lines(finisher)
    for text in part:
        for line in finisher.line(text):
            lines.add(line)
    return lines


def _base_of(location: str, rows: Iterable[dict[str, Any]], settings: SourceSettings) -> str:
    """Relative paths lie in the working directory or, where the first is not there, in the folder of the list."""
    folder = os.path.dirname(location)
    if not folder or is_url(location):
        return ""
    names: tuple[str, ...] = (settings.input_field,)
    if settings.input_field == "wav":
        names = (settings.audio_field, *names, *AUDIO_FIELDS)
    for row in rows:
        own = next((name for name in names if isinstance(row.get(name), str) and row[name]), None)
        for name in (own, *settings.other_fields):
            path = row.get(name) if name is not None else None
            if isinstance(path, str) and path and is_relative(path):
                return folder if not os.path.exists(path) and os.path.exists(os.path.join(folder, path)) else ""
    return ""
