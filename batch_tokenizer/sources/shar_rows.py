"""Lhotse Shar as rows: cuts of ``cuts.000000.jsonl.gz`` with the audio of ``recording.000000.tar`` beside it.

Members are in the order of the cuts and named after them, so both are read once, side by side. Values of further
``NAME.000000.jsonl.gz`` become custom fields of the cut; other tars (features, arrays) are left alone. Each row is a
Lhotse cut whose recording lies at a place in the tar, which ``foreign_rows.py`` completes like any other cut.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

from batch_tokenizer.manifest.row import REFUSED
from batch_tokenizer.records import RunError
from batch_tokenizer.sources.lines import lines_of
from batch_tokenizer.sources.sidecars import AUDIO_ENDINGS
from batch_tokenizer.sources.tar_rows import open_tar_stream
from batch_tokenizer.storage import remote
from batch_tokenizer.storage.json_lines import parse_json
from batch_tokenizer.storage.names import StreamedMember, TarMember, display_name, is_url, location_of
from batch_tokenizer.storage.remote import StorageError
from batch_tokenizer.storage.tar import TornTar, walk

_CUTS_NAME = re.compile(r"cuts(\.\d+)?\.jsonl(\.gz|\.zst)?")
_FIELD_NAME = re.compile(r"(\w+)(\.\d+)?\.jsonl(?:\.gz|\.zst)?")

#: Ending of a member that stands for a cut without audio.
_NOTHING = "nodata"


def is_cuts_file(location: str, names: set[str]) -> bool:
    """Whether a file has the cuts of a Shar's shard.

    Args:
        names: of the files beside it.
    """
    match = _CUTS_NAME.fullmatch(location.rpartition("/")[2])
    return match is not None and f"recording{match[1] or ''}.tar" in names


def companions(location: str) -> tuple[str, list[tuple[str, str]]]:
    """What lies beside a shard's cuts: the tar with the recordings, and (field, file) of custom fields.

    Raises:
        RunError: the folder cannot be listed.
    """
    folder, slash, name = location.rpartition("/")
    match = _CUTS_NAME.fullmatch(name)
    number = (match[1] or "") if match else ""
    try:
        if is_url(location):
            names = [url.rpartition("/")[2] for url in remote.find(f"{folder}/*{number}.jsonl*")]
        else:
            names = sorted(os.listdir(folder or "."))
    except StorageError as error:
        raise RunError(f"--data_list {error.reason}", exit_code=1) from error
    except OSError as error:
        raise RunError(f"folder {folder} cannot be read: {error.strerror}", exit_code=1) from error
    found = ((_FIELD_NAME.fullmatch(other), other) for other in names)
    fields = [
        (field[1], f"{folder}{slash}{other}")
        for field, other in found
        if field is not None and field[1] != "cuts" and (field[2] or "") == number
    ]
    return f"{folder}{slash}recording{number}.tar", fields


def shar_rows(location: str) -> Iterator[dict[str, Any]]:
    """The cuts of one shard, each with the place of its recording; refused ones where there is none, and for a tar that
    cannot be read to its end.

    Args:
        location: of the cuts.

    Raises:
        RunError: the shard's storage does not answer; it may later.
    """
    tar, fields = companions(location)
    cuts = (_with_fields(line, rest) for line, *rest in zip(
        _objects(location), *(_values(name, path) for name, path in fields), strict=False
    ))  # fmt: skip
    try:
        with open_tar_stream(tar) as (stream, streamed):
            # A row counts once its member is known to be whole, which shows when the next one is reached.
            waiting: list[tuple[int, dict[str, Any]]] = []
            try:
                for member in walk(stream, lambda kind, name: None):
                    yield from (row for _, row in waiting)
                    waiting.clear()
                    key, _, ending = member.name.rpartition(".")
                    if ending.lower() not in AUDIO_ENDINGS and ending != _NOTHING:
                        continue
                    cut = next(cuts, None)
                    if cut is None or cut.get("id") != key:
                        what = "no cut" if cut is None else f"cut {cut.get('id')!r}"
                        reason = f"{display_name(location)} has {what} where {display_name(tar)} has {member.name!r}"
                        yield {"key": key, REFUSED: f"{reason}: cuts and recordings are not of one Shar"}
                        return
                    place = (
                        StreamedMember(member.number, member.name, tar)
                        if streamed
                        else TarMember(member.offset, member.size, member.name, tar)
                    )
                    row = _row(cut, None if ending == _NOTHING else location_of(place))
                    waiting.append((member.offset + member.size, row))
            except (TornTar, StorageError):
                yield from (row for end, row in waiting if stream.position >= end)
                raise
            yield from (row for _, row in waiting)
            for cut in cuts:
                yield {"key": str(cut.get("id")), REFUSED: f"{display_name(tar)} has no recording of this cut"}
    except TornTar as error:
        yield {"key": tar, REFUSED: f"{display_name(tar)}: {error}: the rest of the shard is lost: fetch it again"}
    except StorageError as error:
        if error.transient:
            raise RunError(error.reason, exit_code=1) from error
        yield {"key": tar, REFUSED: error.reason}


def _row(cut: dict[str, Any], place: str | None) -> dict[str, Any]:
    recording = cut.get("recording")
    if place is None or not isinstance(recording, dict):
        return {"key": str(cut.get("id")), REFUSED: "a Lhotse cut without a recording"}
    sources = [source for source in recording.get("sources") or [] if isinstance(source, dict)]
    channels = sources[0].get("channels") if sources else None
    source = {"type": "file", "channels": channels, "source": place}
    return cut | {"recording": recording | {"sources": [source]}}


def _objects(location: str) -> Iterator[dict[str, Any]]:
    for line in lines_of(location):
        try:
            value = parse_json(line) if line.strip() else None
        except ValueError:
            value = {}
        if value is not None:
            yield value if isinstance(value, dict) else {}


def _values(field: str, location: str) -> Iterator[dict[str, Any]]:
    for item in _objects(location):
        yield {field: item[field]} if field in item else {}


def _with_fields(cut: dict[str, Any], values: list[dict[str, Any]]) -> dict[str, Any]:
    found = {name: value for item in values for name, value in item.items()}
    custom = cut.get("custom")
    return cut | {"custom": {**(custom if isinstance(custom, dict) else {}), **found}} if found else cut
