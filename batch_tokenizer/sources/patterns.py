"""What ``--data_list`` names: braces and globs to locations, and a location to the kind of source it is.

shards/{000..999}.tar     a thousand shards        shards/*.tar      those that are there
data.jsonl, .jsonl.gz     rows                     shards.txt        a list of shards, one a line
audio/                    a folder of audio        s3://…, https://… any of these elsewhere
pipe:COMMAND              the tar that a shell command prints, where ``--allow_pipe`` says so
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Literal

from batch_tokenizer.records import RunError
from batch_tokenizer.storage import remote
from batch_tokenizer.storage.names import PIPE, file_name, is_url, spoken
from batch_tokenizer.storage.remote import StorageError
from batch_tokenizer.storage.streams import StreamReader

Kind = Literal["rows", "tar", "parquet", "folder", "list"]

#: Locations that one pattern may name.
MOST_LOCATIONS = 1_000_000

_INNERMOST = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(-?\d{1,18})\.\.(-?\d{1,18})")
_GLOB = re.compile(r"[*?\[]")
_TAR_NAME = re.compile(r"\.(tar|tar\.gz|tgz)$", re.IGNORECASE)
_LIST_NAME = re.compile(r"\.(txt|list|lst)$", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Source:
    """One thing to list rows from."""

    location: str
    kind: Kind


def expand_braces(pattern: str) -> Iterator[str]:
    """``a{1..3}b`` to ``a1b a2b a3b``, ``{x,y}`` to each; a range keeps the zeros before its numbers. Braces that are
    neither stay as they are.

    Raises:
        RunError: more than ``MOST_LOCATIONS``.
    """
    return _limited(_expand(pattern, 0), pattern)


def _limited(words: Iterator[str], pattern: str) -> Iterator[str]:
    for number, word in enumerate(words):
        if number >= MOST_LOCATIONS:
            raise RunError(f"--data_list {pattern}: names more than {MOST_LOCATIONS:,} files")
        yield word


def _expand(pattern: str, begin: int) -> Iterator[str]:
    match = _INNERMOST.search(pattern, begin)
    if match is None:
        yield pattern
        return
    choices = _choices(match[1])
    if choices is None:
        yield from _expand(pattern, match.end())
        return
    for choice in choices:
        yield from _expand(pattern[: match.start()] + choice + pattern[match.end() :], begin)


def _choices(inner: str) -> Iterator[str] | None:
    """What one pair of braces stands for; None where it stands for itself."""
    if match := _RANGE.fullmatch(inner):
        first, last = int(match[1]), int(match[2])
        padded = any(end.lstrip("-").startswith("0") and len(end.lstrip("-")) > 1 for end in match.groups())
        width = max(map(len, match.groups())) if padded else 0
        step = 1 if first <= last else -1
        return (f"{number:0{width}d}" if width else str(number) for number in range(first, last + step, step))
    return iter(inner.split(",")) if "," in inner else None


def locations(data_list: str) -> list[str]:
    """What a pattern names, in order: braces in theirs, and what a glob matches sorted.

    Raises:
        RunError: nothing matches, or the store cannot be asked.
    """
    if data_list.startswith(PIPE) or (not is_url(data_list) and os.path.exists(data_list)):
        return [data_list]
    found: list[str] = []
    for word in expand_braces(data_list):
        if not _GLOB.search(word.partition("://")[2] if is_url(word) else word):
            found.append(word)
            continue
        try:
            matches = remote.find(word) if is_url(word) else sorted(glob.glob(word, recursive=True))
        except StorageError as error:
            raise RunError(f"--data_list {error.reason}", exit_code=1) from error
        if not matches:
            raise RunError(f"--data_list {spoken(word)}: no file matches")
        found += matches
    return found


def find_sources(data_list: str) -> list[Source]:
    """The sources that ``--data_list`` names, lists of shards resolved.

    Raises:
        RunError: nothing is there, or it is no source.
    """
    sources: list[Source] = []
    for location in locations(data_list):
        kind = kind_of(location)
        if kind != "list":
            sources.append(Source(location, kind))
            continue
        for line in _list_lines(location):
            for named in locations(line):
                inner = kind_of(named)
                if inner not in ("tar", "parquet"):
                    raise RunError(f"list {spoken(location)} names {spoken(named)}, which is neither tar nor parquet")
                sources.append(Source(named, inner))
    if not sources:
        raise RunError(f"--data_list {spoken(data_list)}: names nothing")
    return sources


def kind_of(location: str) -> Kind:
    """By its name, and where that says little, by its first line.

    Raises:
        RunError: it cannot be read.
    """
    name = file_name(location)
    if location.startswith(PIPE) or _TAR_NAME.search(name):
        return "tar"
    if name.lower().endswith(".parquet"):
        return "parquet"
    if is_url(location):
        if _LIST_NAME.search(name):
            return "list"
        return "folder" if name.endswith("/") else "rows"
    if os.path.isdir(location):
        return "folder"
    first = next(_first_lines(location), "") if os.path.isfile(location) else ""
    is_list = first.startswith(PIPE) or bool(_TAR_NAME.search(first)) or first.lower().endswith(".parquet")
    return "list" if is_list and not first.startswith('{"') else "rows"


def _first_lines(location: str) -> Iterator[str]:
    try:
        with open(location, "rb") as stream:
            head = stream.read(1 << 16)
    except OSError:
        return  # whoever reads it will say why not
    for line in head.split(b"\n"):
        text = line.decode("utf-8", "replace").strip()
        if text and not text.startswith("#"):
            yield text


def _list_lines(location: str) -> Iterator[str]:
    try:
        reader = StreamReader(location)
        try:
            content = b"".join(iter(lambda: reader.read(1 << 20), b""))
        finally:
            reader.close()
        lines = content.decode("utf-8").splitlines()
    except StorageError as error:
        raise RunError(f"--data_list {error.reason}", exit_code=1) from error
    except UnicodeDecodeError as error:
        raise RunError(f"list {spoken(location)}: not UTF-8") from error
    kept = (line.strip() for line in lines)
    return islice((line for line in kept if line and not line.startswith("#")), MOST_LOCATIONS)
