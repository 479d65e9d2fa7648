"""A tar to rows, grouped as webdataset does: consecutive members with one name before the first dot.

``dir/utt1.flac``, ``dir/utt1.json`` and ``dir/utt1.txt`` are one row with the key ``dir/utt1``, webdataset's
``__key__``. Where more stands between the name and the ending, it belongs to the key: ``clip.16k.flac`` has the key
``clip.16k``. A leading ``./`` does not. Each audio member is a row, so two with one key are duplicates, which the
manifest refuses; so are equal keys in two shards.

Nothing is unpacked: a row names where its member lies. What cannot be a row but was meant as one becomes a refused
row, which fails by name: a torn shard is one, with its torn member; members with absolute names or ``..``; and rows
whose ``.json`` is too large or not valid. Links, devices and sparse files are counted and told.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from batch_tokenizer.manifest.row import REFUSED
from batch_tokenizer.records import RunError
from batch_tokenizer.sources.foreign_rows import Refused
from batch_tokenizer.sources.sidecars import AUDIO_ENDINGS, MOST_SIDECAR, TOKEN_ENDINGS, sidecar_fields
from batch_tokenizer.storage import remote
from batch_tokenizer.storage.names import PIPE, StreamedMember, TarMember, is_url, location_of, spoken
from batch_tokenizer.storage.remote import StorageError
from batch_tokenizer.storage.streams import GZIP_MAGIC, StreamReader
from batch_tokenizer.storage.tar import BlockTape, Member, StreamTape, Tape, TornTar, file_tape, walk

#: (kind, name): told of members that are left out.
Note = Callable[[str, str], None]

_NAME = re.compile(r"((?:.*/)?[^./][^/.]*)\.([^/]*)", re.DOTALL)
_LEAD = re.compile(r"^\./+")
_DRIVE = re.compile(r"[A-Za-z]:[\\/]")
_MOST_NAME = 1024


@dataclass(slots=True)
class _Group:
    """Consecutive members of one name."""

    prefix: str
    members: list[tuple[str, Member]] = field(default_factory=list)
    sidecars: dict[str, bytes | int] = field(default_factory=dict)  # content, or the size of one too large

    @property
    def suffixes(self) -> set[str]:
        """Of all of them."""
        return {suffix for suffix, _ in self.members} | self.sidecars.keys()


def tar_rows(location: str, field_name: str, note: Note) -> Iterator[dict[str, Any]]:
    """The rows of one shard, in its order; refused ones have the field ``REFUSED``.

    Args:
        field_name: ``wav`` for rows of audio members, ``quantized_tokens`` for rows of ``.npy`` members.

    Raises:
        RunError: the shard's storage does not answer; it may later.
    """
    endings = AUDIO_ENDINGS if field_name == "wav" else TOKEN_ENDINGS
    group = _Group("")
    usual: set[str] = set()
    latest: tuple[str, Member] | None = None  # of the members that were handed out: its prefix, and itself
    try:
        with _tape(location) as (tape, streamed):

            def rows() -> Iterator[dict[str, Any]]:
                for suffix, member in group.members:
                    yield _row(location, field_name, group, suffix, member, streamed=streamed)

            try:
                for member in walk(tape, note):
                    name = _LEAD.sub("", member.name)
                    ending = name.rpartition(".")[2].lower()
                    if fault := _fault(name):
                        if ending in endings:
                            reason = f"{spoken(location)} has member {name[:200]!a}, {fault}"
                            yield _refusal(name[:_MOST_NAME], reason)
                        continue
                    match = _NAME.fullmatch(name)
                    if match is None:
                        note("members without a name and an ending", name)
                        continue
                    prefix, suffix = match[1], match[2].lower()
                    if prefix != group.prefix:
                        yield from rows()
                        usual = group.suffixes
                        group = _Group(prefix)
                    latest = prefix, member
                    if ending in endings:
                        group.members.append((suffix, member))
                    elif ending in ("json", "txt"):
                        small = member.size <= MOST_SIDECAR
                        group.sidecars.setdefault(suffix, tape.read(member.size) if small else member.size)
                yield from rows()
            except (TornTar, StorageError) as error:
                if isinstance(error, StorageError) and error.transient:
                    raise
                # Of the last group a part may be missing. It is no row then until the shard is whole, as a row that
                # changes when it is done already would be done twice. Whole it is if it has what the one before has.
                whole = latest is None or tape.position >= latest[1].offset + latest[1].size
                lost = None
                if whole and usual and usual <= group.suffixes:
                    yield from rows()
                elif latest is not None:
                    lost = latest[1].name if not whole else group.prefix
                yield _refusal(location, _torn_reason(location, error, lost))
    except StorageError as error:
        if error.transient:
            raise RunError(error.reason, exit_code=1) from error
        yield _refusal(location, error.reason)


def _torn_reason(location: str, error: TornTar | StorageError, lost: str | None) -> str:
    what = error.reason if isinstance(error, StorageError) else f"{spoken(location)}: {error}"
    about = f" (with {lost[:200]!a})" if lost is not None else ""
    return f"{what}: the rest of the shard{about} is lost: fetch or pack it again, then start the same command"


def _refusal(key: str, reason: str) -> dict[str, Any]:
    return {"key": key, REFUSED: reason}


def _fault(name: str) -> str | None:
    """What is wrong with a member's name."""
    if name.startswith("/") or _DRIVE.match(name):
        return "an absolute name: pack the shard with relative ones"
    if ".." in name and ".." in re.split(r"[\\/]", name):
        return "a name that leads out of the shard: pack it with plain ones"
    if len(name) > _MOST_NAME:
        return f"a name of {len(name):,} characters"
    return None


def _row(
    location: str, field_name: str, group: _Group, suffix: str, member: Member, *, streamed: bool
) -> dict[str, Any]:
    lead = suffix.rpartition(".")[0]
    if field_name == "quantized_tokens":
        lead = re.sub(r"(^|\.)tokens$", "", lead)
    key = f"{group.prefix}.{lead}" if lead else group.prefix
    place = (
        StreamedMember(member.number, member.name, location)
        if streamed
        else TarMember(member.offset, member.size, member.name, location)
    )
    try:
        fields = sidecar_fields(_sidecar(group, lead, "json"), _sidecar(group, lead, "txt"), key)
    except Refused as refused:
        return _refusal(key, f"{spoken(location_of(place))}: {refused.reason}")
    return {"key": key, field_name: location_of(place), **fields}


def _sidecar(group: _Group, lead: str, ending: str) -> bytes | None:
    for suffix in (f"{lead}.{ending}", ending) if lead else (ending,):
        content = group.sidecars.get(suffix)
        if isinstance(content, int):
            raise Refused(f"its .{ending} has {content:,} bytes, more than {MOST_SIDECAR:,}")
        if content is not None:
            return content
    return None


@contextmanager
def _tape(location: str) -> Iterator[tuple[Tape, bool]]:
    """The archive from its front, and whether it can be read in that way only."""
    if not location.startswith(PIPE):
        if is_url(location):
            head = remote.read_range(location, 0, len(GZIP_MAGIC))
            size = remote.describe(location)[0]
            if head != GZIP_MAGIC and size is not None:
                yield BlockTape(lambda begin, n: remote.read_range(location, begin, begin + n), size, 1 << 20), False
                return
        else:
            try:
                descriptor = os.open(location, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            except OSError as error:
                raise StorageError(f"{spoken(location)}: cannot be opened: {error.strerror}") from error
            try:
                if not os.path.isfile(descriptor):
                    raise StorageError(f"{spoken(location)}: is not a file")
                if os.pread(descriptor, len(GZIP_MAGIC), 0) != GZIP_MAGIC:
                    yield file_tape(descriptor), False
                    return
            finally:
                os.close(descriptor)
    reader = StreamReader(location)
    try:
        yield StreamTape(reader.read), True
    finally:
        reader.close()
