"""What ``--data_list`` names: braces and globs to locations, and a location to the kind of source it is.

shards/{000..999}.tar     a thousand shards        shards/*.tar      those that are there
data.jsonl, .jsonl.gz     rows                     shards.txt        a list of shards, one a line
wav.scp                   Kaldi's list             files.txt         a list of audio files, one a line
x.csv, x.tsv              a table with a header    '*.flac'          audio files
data/*.parquet, *.arrow   a data set with audio    saved/            a folder of datasets.save_to_disk, or of parquet
audio/                    a folder of audio        s3://…, https://… any of these elsewhere
hf://datasets/OWNER/NAME  the parquet files of a data set on the Hugging Face Hub
shar/                     a folder of Lhotse Shar: cuts.*.jsonl.gz with recording.*.tar
pipe:COMMAND              the tar that a shell command prints, where ``--allow_pipe`` says so
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, cast

import braceexpand

from batch_tokenizer.records import RunError, first_line
from batch_tokenizer.sources.shar_rows import companions, is_cuts_file
from batch_tokenizer.sources.sidecars import AUDIO_ENDINGS, TOKEN_ENDINGS
from batch_tokenizer.storage import remote
from batch_tokenizer.storage.json_lines import parse_json
from batch_tokenizer.storage.jsonl_rows import holds_codes
from batch_tokenizer.storage.names import PIPE, display_name, display_source, file_name, is_url, scheme_of
from batch_tokenizer.storage.remote import StorageError
from batch_tokenizer.storage.streams import StreamReader

Kind = Literal["rows", "tar", "parquet", "arrow", "shar", "folder", "list", "scp", "table", "paths", "audio"]

#: What each kind is called in the log.
DESCRIPTIONS: Mapping[Kind, str] = {
    "rows": "JSON lines",
    "tar": "tar",
    "parquet": "parquet",
    "arrow": "Arrow",
    "shar": "shard of Lhotse Shar",
    "folder": "folder",
    "list": "list of shards",
    "scp": "wav.scp",
    "table": "table with a header",
    "paths": "list of paths",
    "audio": "audio file",
}

#: What files that are none of these begin with.
_OTHER_FORMATS: Mapping[bytes, str] = {
    b"PK\3\4": "a zip archive: unpack it, or pack it as tar",
    b"Rar!": "a rar archive: unpack it, or pack it as tar",
    b"7z\xbc\xaf": "a 7z archive: unpack it, or pack it as tar",
    b"BZh": "compressed by bzip2: unpack it, or compress it by gzip or zstd",
    b"\xfd7zXZ": "compressed by xz: unpack it, or compress it by gzip or zstd",
    b"\xff\xfe": "text in UTF-16: convert it to UTF-8",
    b"\xfe\xff": "text in UTF-16: convert it to UTF-8",
    b"PAR1": "a parquet file: give it a name that ends in .parquet",
    b"ARROW1": "an Arrow file: give it a name that ends in .arrow",
    b"SQLite format": "a database: export it as CSV",
    b"Obj\1": "an Avro file: save it as parquet or JSON lines",
    b"\x89HDF": "an HDF5 file: export it as CSV or JSON lines",
    b"\x80": "a pickled object: save it as JSON lines",
}

_READABLE = (
    "--data_list takes JSON lines, csv and tsv with a header, wav.scp, lists of paths, tars, parquet, Arrow, folders, "
    "and audio files"
)

#: Lines that show what a text file is.
_LOOKED_AT = 100

#: Locations that one pattern may name.
MOST_LOCATIONS = 1_000_000

_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)")
_GLOB = re.compile(r"[*?\[]")
_TAR_NAME = re.compile(r"\.(tar|tar\.gz|tgz|tar\.zst|tzst)$", re.IGNORECASE)
_COMPRESSED_NAME = re.compile(r"\.(gz|zst)$", re.IGNORECASE)
_LIST_NAME = re.compile(r"\.(txt|list|lst)$", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Source:
    """A location, and what kind of rows are listed from it."""

    location: str
    kind: Kind


def expand_braces(pattern: str) -> Iterator[str]:
    """The locations of a shard pattern as webdataset reads it: ``a{1..3}b`` is ``a1b a2b a3b``, ``{x,y}`` is each.
    Braces that are not balanced stay as they are.

    It is what webdataset's ``expand_urls`` calls for each URL; that function itself would take ``::`` for a separator,
    which stands in locations here, and make a list of any number of names.

    Raises:
        RunError: more than ``MOST_LOCATIONS``.
    """
    too_many = RunError(f"--data_list {display_name(pattern)}: names more than {MOST_LOCATIONS:,} files")
    # Each range becomes a list before the first name is made.
    for first, last in _RANGE.findall(pattern):
        if max(len(first), len(last)) > 18 or abs(int(last) - int(first)) >= MOST_LOCATIONS:
            raise too_many
    try:
        for number, word in enumerate(braceexpand.braceexpand(pattern, escape=False)):
            if number >= MOST_LOCATIONS:
                raise too_many
            yield word
    except braceexpand.UnbalancedBracesError:  # type: ignore[attr-defined]  # its stub lacks it
        yield pattern


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
            raise RunError(f"--data_list {display_name(word)}: no file matches")
        found += matches
    return found


def find_sources(data_list: str) -> list[Source]:
    """The sources that ``--data_list`` names, lists of shards resolved; several stand one a line.

    Raises:
        RunError: nothing is there, or it is no source.
    """
    # A list of shards is resolved here, one level deep: it may name tars and parquet files, not further lists.
    sources: list[Source] = []
    words = [data_list] if os.path.exists(data_list) else data_list.split("\n")
    for location in (location for word in words for location in locations(word)):
        kind = kind_of(location)
        if kind == "folder":
            sources += data_set_files(location) or [Source(location, kind)]
            continue
        if kind != "list":
            sources.append(Source(location, kind))
            continue
        for line in _list_lines(location):
            for named in locations(line):
                inner = kind_of(named)
                if inner not in ("tar", "parquet") and not (inner == "rows" and holds_codes(named)):
                    raise RunError(
                        f"list {display_name(location)} names {display_name(named)}, which is neither tar nor parquet"
                    )
                sources.append(Source(named, inner))
    if not sources:
        raise RunError(f"--data_list {display_source(data_list)}: names nothing")
    return sources


def stored_sources(source: Source) -> Iterator[Source]:
    """Where the tokens of a local folder of outputs are: in its shards, or in the token files below it. Any other
    source is its own.

    Raises:
        RunError: the folder cannot be read.
    """
    if source.kind != "folder" or is_url(source.location):
        yield source
        return
    try:
        names = sorted(name for name in os.listdir(source.location) if not name.startswith("."))
    except OSError as error:
        raise RunError(f"folder {source.location} cannot be read: {error.strerror}") from error
    paths = [os.path.join(source.location, name) for name in names if not name.startswith("token2wav-")]
    shards = [Source(path, kind_of(path)) for path in paths if path.endswith((".tar", ".parquet"))]
    lines = [path for path in paths if path.endswith(".jsonl")]
    shards += [Source(path, "rows") for path in lines if holds_codes(path)]
    yield from shards or [source]


def data_set_files(folder: str) -> list[Source]:
    """The files of a data set that a folder holds: those of all splits that ``datasets.save_to_disk`` wrote, shards of
    Lhotse Shar, or parquet in the folder or in those in it; on the Hub parquet or tars anywhere below. None where it is
    another folder, or has audio files in itself.

    Raises:
        RunError: the folder cannot be read, or its description is damaged.
    """
    if is_url(folder):
        return _remote_data_set(folder)
    if splits := _read_object(folder, "dataset_dict.json").get("splits"):
        return [source for split in splits for source in data_set_files(os.path.join(folder, str(split)))]
    if arrow := _read_object(folder, "state.json").get("_data_files"):
        return [Source(os.path.join(folder, str(file["filename"])), "arrow") for file in arrow]
    try:
        names = os.listdir(folder)
    except OSError:
        return []  # walking it raises the reason
    if cuts := [name for name in sorted(names) if is_cuts_file(name, set(names))]:
        return [Source(os.path.join(folder, name), "shar") for name in cuts]
    is_audio = any(name.rpartition(".")[2].lower() in AUDIO_ENDINGS for name in names)
    is_output = any(name.startswith(".batch_tokenizer.") for name in names)
    if is_audio or is_output:
        return []
    path = glob.escape(folder)
    parquet = sorted(glob.glob(f"{path}/*.parquet")) or sorted(glob.glob(f"{path}/*/*.parquet"))
    return [Source(name, "parquet") for name in parquet]


def _remote_data_set(folder: str) -> list[Source]:
    try:
        found = remote.list_folder(folder)
    except StorageError as error:
        raise RunError(f"--data_list {error.reason}", exit_code=1) from error
    names = {url.rpartition("/")[2] for url in found}
    if cuts := [url for url in found if is_cuts_file(url, names)]:
        return [Source(url, "shar") for url in cuts]
    if scheme_of(folder) != "hf":
        return []
    parquet = [Source(url, "parquet") for url in found if url.lower().endswith(".parquet")]
    return parquet or [Source(url, "tar") for url in found if _TAR_NAME.search(url)]


def _read_object(folder: str, name: str) -> dict[str, Any]:
    """A JSON object that describes a data set; empty where there is no such file."""
    path = os.path.join(folder, name)
    try:
        with open(path, "rb") as stream:
            value = parse_json(stream.read(1 << 20))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise RunError(f"{display_name(path)}: cannot be read: {first_line(error)}", exit_code=1) from error
    return value if isinstance(value, dict) else {}


def kind_of(location: str) -> Kind:
    """By its name, and where that says little, by its first line.

    Raises:
        RunError: it cannot be read, or is of a format that is not.
    """
    name = file_name(location)
    ending = _COMPRESSED_NAME.sub("", name).rpartition(".")[2].lower()
    if location.startswith(PIPE) or _TAR_NAME.search(name):
        return "tar"
    if not is_url(location) and os.path.isdir(location):
        return "folder"
    if ending in ("parquet", "arrow", "scp"):
        return cast(Kind, ending)
    if ending in ("csv", "tsv"):
        return "table"
    if name.rpartition("/")[2].startswith("cuts.") and not is_url(location) and _has_recordings(location):
        return "shar"
    if ending in AUDIO_ENDINGS | TOKEN_ENDINGS:
        return "audio"
    if is_url(location):
        if _LIST_NAME.search(name):
            return "list"
        is_folder = name.endswith("/") or (scheme_of(location) == "hf" and "." not in name.rpartition("/")[2])
        return "folder" if is_folder else "rows"
    return _kind_of_text(location) if os.path.isfile(location) else "rows"


def _has_recordings(location: str) -> bool:
    tar = companions(location)[0]
    return is_cuts_file(location, {os.path.basename(tar)}) and os.path.isfile(tar)


def _kind_of_text(location: str) -> Kind:
    lines = list(islice(_first_lines(location), _LOOKED_AT))
    first = lines[0] if lines else ""
    is_shard = first.startswith(PIPE) or _TAR_NAME.search(first) or first.lower().endswith((".parquet", ".jsonl"))
    if is_shard and not first.startswith("{"):
        return "list"
    if first.rpartition(".")[2].lower() in AUDIO_ENDINGS:
        # Kaldi's lists have a key before the path; paths may have blanks in them.
        key, _, path = first.partition(" ")
        has_key = bool(path.strip()) and "/" not in key and key.rpartition(".")[2].lower() not in AUDIO_ENDINGS
        return "scp" if has_key else "paths"
    if first == "{" or first.startswith("["):
        what = "a JSON array" if first.startswith("[") else "one JSON object over many lines"
        raise RunError(f"--data_list {display_name(location)}: is {what}: write one object a line")
    # A damaged line among rows is one failed row; where nothing is a row, it is the file that is of another kind.
    if not lines or any(line.startswith("{") for line in lines):
        return "rows"
    raise RunError(f"--data_list {display_name(location)}: begins with {first[:60]!r}, which is no row: {_READABLE}")


def _first_lines(location: str) -> Iterator[str]:
    try:
        with closing(StreamReader(location)) as reader:
            head = reader.read(1 << 16)
    except StorageError as error:
        raise RunError(f"--data_list {error.reason}") from error
    name = display_name(location)
    for begin, what in _OTHER_FORMATS.items():
        if head.startswith(begin):
            raise RunError(f"--data_list {name}: is {what}. {_READABLE}")
    if b"\0" in head[:1024]:
        raise RunError(f"--data_list {name}: is a binary file of an unknown format. {_READABLE}")
    for line in head.split(b"\n"):
        text = line.decode("utf-8", "replace").removeprefix("\ufeff").strip()
        if text and not text.startswith("#"):
            yield text


def _list_lines(location: str) -> Iterator[str]:
    try:
        with closing(StreamReader(location)) as reader:
            content = b"".join(iter(lambda: reader.read(1 << 20), b""))
        lines = content.decode("utf-8").splitlines()
    except StorageError as error:
        raise RunError(f"--data_list {error.reason}", exit_code=1) from error
    except UnicodeDecodeError as error:
        raise RunError(f"list {display_name(location)}: not UTF-8") from error
    kept = (line.strip() for line in lines)
    return islice((line for line in kept if line and not line.startswith("#")), MOST_LOCATIONS)
