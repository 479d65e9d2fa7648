"""A tar to rows, grouped as webdataset does: consecutive members with one name before the first dot.

``dir/utt1.flac``, ``dir/utt1.json`` and ``dir/utt1.txt`` are one row with the key ``dir/utt1``, webdataset's
``__key__``. Where more stands between the name and the ending, it belongs to the key, in its own case:
``sw02001.A.wav`` has the key ``sw02001.A``. A leading ``./`` does not. Each audio member is a row, so two with one key
are duplicates, which the manifest refuses; so are equal keys in two shards.

Nothing is unpacked: a row names where its member lies. What cannot be a row but was meant as one becomes a refused
row, which fails by name: a torn shard is one, with its torn member; members with absolute names or ``..``; and rows
whose ``.json`` is too large or not valid. Links, devices, sparse files and members of other kinds are counted and
logged.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any, BinaryIO, cast

from batch_tokenizer.manifest.row import REFUSED
from batch_tokenizer.records import RunError
from batch_tokenizer.sources.foreign_rows import Refused
from batch_tokenizer.sources.sidecars import AUDIO_ENDINGS, MOST_SIDECAR, TOKEN_ENDINGS, sidecar_fields
from batch_tokenizer.storage import remote
from batch_tokenizer.storage.names import (
    HIDDEN_STATES_ENDING,
    PIPE,
    StreamedMember,
    TarMember,
    display_name,
    is_url,
    location_of,
    split_member_name,
)
from batch_tokenizer.storage.remote import StorageError
from batch_tokenizer.storage.row_info import other_names
from batch_tokenizer.storage.streams import StreamReader, is_compressed
from batch_tokenizer.storage.tar import ByteStream, Member, SeekableByteStream, TornTar, walk

#: Called with (kind, name) of each member or file that is left out.
Note = Callable[[str, str], None]

_DRIVE = re.compile(r"[A-Za-z]:[\\/]")
_MOST_NAME = 1024


@dataclass(slots=True)
class _Group:
    """Consecutive members of one name.

    Attributes:
        members: those that are rows, each with what stands between the name and its ending.
        sidecars: by what stands after the name, with the ending in lower case: the content of small ones, the size of
            ones that are too large.
    """

    prefix: str
    members: list[tuple[str, Member]] = field(default_factory=list)
    sidecars: dict[str, bytes | int] = field(default_factory=dict)
    suffixes: set[str] = field(default_factory=set)


def tar_rows(
    location: str, field_name: str, note: Note, other_fields: tuple[str, ...] = ()
) -> Iterator[dict[str, Any]]:
    """The rows of one shard, in its order; refused ones have the field ``REFUSED``.

    Args:
        field_name: ``wav`` for rows of audio members, ``quantized_tokens`` for rows of ``.npy`` members.
        other_fields: fields that members of a row's other audio become: ``utt1.ref_audio.wav`` is ``ref_audio`` of
            ``utt1``. Members of other codes are known by the row's ``.json``.

    Raises:
        RunError: the shard's storage does not answer; it may later.
    """
    endings = AUDIO_ENDINGS if field_name == "wav" else TOKEN_ENDINGS
    group = _Group("")
    usual: set[str] = set()
    latest: tuple[str, Member] | None = None  # the last member that was read, and its prefix
    try:
        with open_tar_stream(location) as (stream, streamed):

            def rows() -> Iterator[dict[str, Any]]:
                names = other_fields if field_name == "wav" else _other_codes(group)
                others = {
                    lead: _place(location, member, streamed=streamed) for lead, member in group.members if lead in names
                }
                own = [(lead, member) for lead, member in group.members if lead not in names]
                if others and not own:
                    note("members of other audio without one that is the row's own", group.members[0][1].name)
                for lead, member in own:
                    row = _row(location, field_name, group, lead, member, streamed=streamed)
                    yield row if REFUSED in row else row | others

            try:
                for member in walk(stream, note):
                    # 1. Names that no row can have.
                    name = member.name
                    ending = name.rpartition(".")[2].lower()
                    if fault := _fault(name):
                        if ending in endings:
                            reason = f"{display_name(location)} has member {name[:200]!a}, {fault}"
                            yield _refusal(name[:_MOST_NAME], reason)
                        continue
                    split = split_member_name(name)
                    if split is None:
                        note("members without a name and an ending", name)
                        continue
                    prefix, lead = split[0], split[1].rpartition(".")[0]
                    suffix = f"{lead}.{ending}" if lead else ending
                    # 2. Another name begins another group: the one before it is complete.
                    if prefix != group.prefix:
                        yield from rows()
                        usual = group.suffixes
                        group = _Group(prefix)
                    # 3. The member becomes a row, or the text or JSON beside one; content is read of these alone.
                    latest = prefix, member
                    if name.endswith(HIDDEN_STATES_ENDING):
                        continue
                    if ending in endings:
                        group.suffixes.add(suffix)
                        group.members.append((lead, member))
                    elif ending in ("json", "txt"):
                        group.suffixes.add(suffix)
                        small = member.size <= MOST_SIDECAR
                        group.sidecars.setdefault(suffix, stream.read(member.size) if small else member.size)
                    elif ending not in AUDIO_ENDINGS | TOKEN_ENDINGS:
                        note("members that are neither audio nor text", name)
                yield from rows()
            except (TornTar, StorageError) as error:
                if isinstance(error, StorageError) and error.transient:
                    raise
                # Of the last group a part may be missing. It is no row then until the shard is whole, as a row that
                # changes when it is done already would be done twice. Whole it is if it has what the one before has.
                whole = latest is None or stream.position >= latest[1].offset + latest[1].size
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
    what = error.reason if isinstance(error, StorageError) else f"{display_name(location)}: {error}"
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


def _row(location: str, field_name: str, group: _Group, lead: str, member: Member, *, streamed: bool) -> dict[str, Any]:
    if field_name == "quantized_tokens":
        lead = re.sub(r"(^|\.)tokens$", "", lead)
    key = f"{group.prefix}.{lead}" if lead else group.prefix
    place = _place(location, member, streamed=streamed)
    try:
        fields = sidecar_fields(_sidecar(group, lead, "json"), _sidecar(group, lead, "txt"), key)
    except Refused as refused:
        return _refusal(key, f"{display_name(place)}: {refused.reason}")
    return {"key": key, field_name: place, **fields}


def _place(location: str, member: Member, *, streamed: bool) -> str:
    return location_of(
        StreamedMember(member.number, member.name, location)
        if streamed
        else TarMember(member.offset, member.size, member.name, location)
    )


def _other_codes(group: _Group) -> tuple[str, ...]:
    """The members of a row that have codes of its other audio; none where its ``.json`` does not say."""
    if len(group.members) == 1:
        return ()
    try:
        return other_names(sidecar_fields(_sidecar(group, "", "json"), None))
    except Refused:
        return ()


def _sidecar(group: _Group, lead: str, ending: str) -> bytes | None:
    for suffix in (f"{lead}.{ending}", ending) if lead else (ending,):
        content = group.sidecars.get(suffix)
        if isinstance(content, int):
            raise Refused(f"its .{ending} has {content:,} bytes, more than {MOST_SIDECAR:,}")
        if content is not None:
            return content
    return None


@contextmanager
def open_tar_stream(location: str) -> Iterator[tuple[ByteStream, bool]]:
    """The archive's bytes, and whether they can be read from the front only."""
    # 1. A plain tar whose bytes can be addressed: content is skipped, not read.
    if not location.startswith(PIPE):
        if is_url(location):
            head = remote.read_range(location, 0, 4)
            size = remote.describe(location)[0]
            if not is_compressed(head) and size is not None:
                yield (
                    SeekableByteStream(lambda begin, n: remote.read_range(location, begin, begin + n), size, 1 << 20),
                    False,
                )
                return
        else:
            try:
                descriptor = os.open(location, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            except OSError as error:
                raise StorageError(f"{display_name(location)}: cannot be opened: {error.strerror}") from error
            if not os.path.isfile(descriptor):
                os.close(descriptor)
                raise StorageError(f"{display_name(location)}: is not a file")
            with open(descriptor, "rb", buffering=0) as file:
                if not is_compressed(file.read(4)):
                    yield SeekableByteStream.of_file(cast(BinaryIO, file)), False
                    return
    # 2. A compressed tar or a command's output, from the front.
    with closing(StreamReader(location)) as reader:
        yield ByteStream(reader.read), True
