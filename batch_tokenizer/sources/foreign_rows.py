"""Rows of other tools' manifests to rows of this one: NeMo's, Lhotse's cuts and recordings, and rows that name their
audio otherwise or have no key.

A complete row passes as it is. ``Refused`` says why one of theirs has no counterpart.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from batch_tokenizer.records import first_line, short_repr
from batch_tokenizer.storage.names import file_name, is_relative


class Refused(Exception):
    """A row cannot become one of ours. ``key`` is its name, where it has one."""

    def __init__(self, reason: str, key: str | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.key = key


#: Fields that hold a row's own name, in the order in which they count.
KEY_FIELDS = ("key", "id", "utt_id")

#: The field in which a source puts a key that it made up; where another row has it already, it is made another one.
MADE_KEY = "__made_key__"

#: Other names of the field ``wav``, in the order in which they count.
AUDIO_FIELDS = ("audio_filepath", "audio", "path", "file", "file_name")


def is_lhotse(row: Mapping[str, Any]) -> bool:
    """Whether it is a cut, or a recording."""
    return "wav" not in row and (
        isinstance(row.get("recording"), Mapping)
        or isinstance(row.get("tracks"), list)
        or (isinstance(row.get("sources"), list) and "sampling_rate" in row)
    )


def makes_key(row: Mapping[str, Any]) -> bool:
    """Whether the key that the row gets is one that was made up, so that no other row means it by that name."""
    if MADE_KEY in row:
        return True
    return not is_lhotse(row) and all(row.get(name) in (None, "") for name in KEY_FIELDS)


def complete(
    row: dict[str, Any],
    field_name: str = "wav",
    base: str = "",
    audio_field: str = "wav",
    other_fields: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Our row: one with a key and an input; the same object where there is nothing to change.

    A row's key is its own, also as a number, or ``id`` or ``utt_id``, or the path without its ending, with offset and
    duration where the row is a part of the file. NeMo reads ``duration`` seconds from ``offset`` on, be it 0 or not;
    without an offset, the whole file.

    Args:
        field_name: of the input: ``wav`` or ``quantized_tokens``.
        base: folder that relative paths of inputs lie in; empty for the working directory.
        audio_field: that names a row's audio before all others, where it is not ``wav``.
        other_fields: those that name its other audio.

    Raises:
        Refused: the row is no utterance that can be read.
    """
    try:
        if is_lhotse(row):
            return _from_lhotse(row) | _custom_audio(row, other_fields)
        completed = _completed(row, field_name, base, audio_field)
        others = _other_paths(completed, base, other_fields)
        return completed | others if others else completed
    except (AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:
        # Fields may hold anything; those that are looked into have their forms, which are not asked for one by one.
        key = next((row[name] for name in ("key", "id") if isinstance(row.get(name), str)), None)
        raise Refused(
            f"its fields are not as the tool that writes such rows has them ({first_line(error)})", key
        ) from error


def _other_paths(row: Mapping[str, Any], base: str, other_fields: tuple[str, ...]) -> dict[str, Any]:
    """What changes in the fields of other audio: relative paths, and what data sets write instead of a path."""
    changed = {}
    for name in other_fields:
        value = path = row.get(name)
        if isinstance(path, Mapping) and isinstance(path.get("path"), str):
            path = path["path"]
        if base and isinstance(path, str) and path and is_relative(path):
            path = os.path.join(base, path)
        if path is not value:
            changed[name] = path
    return changed


def _completed(row: dict[str, Any], field_name: str, base: str, audio_field: str) -> dict[str, Any]:
    # 1. The row's key, and which field names the input.
    key = next((row[name] for name in KEY_FIELDS if row.get(name) not in (None, "")), None)
    key = str(key) if type(key) is int else key
    changed: dict[str, Any] = {}
    name = field_name
    if field_name == "wav" and audio_field in row:
        name = audio_field
    elif field_name == "wav" and audio_field != "wav" and "wav" not in row:  # rows of tars and tables have a wav
        raise Refused(f'field "{audio_field}" is missing', key if isinstance(key, str) else None)
    elif field_name == "wav" and "wav" not in row:
        name = next((alias for alias in AUDIO_FIELDS if alias in row), "wav")
    path = row.get(name)
    if isinstance(path, Mapping) and name != "wav":  # as data sets write their audio
        path = path.get("path")
    # 2. What has to change: the input's field, its folder, the key.
    if name != field_name:
        if not isinstance(path, str) or not path:
            raise Refused(f'field "{name}" is not a path', key if isinstance(key, str) else None)
        if "shard_id" in row:
            raise Refused("a row of a tarred NeMo manifest: name its tars in --data_list", str(key or path))
        changed["wav"] = path
    if isinstance(path, str) and path:
        if key is None:
            key = _key_of(path, row)
        if base and is_relative(path):
            changed[field_name] = os.path.join(base, path)
    if isinstance(key, str) and row.get("key") != key and not isinstance(row.get("key"), str):
        changed["key"] = key
    if not changed:
        return row
    # 3. Key and input first, then the row's other fields in their order.
    first = {"key": changed.get("key", row.get("key")), field_name: changed.get(field_name, row.get(field_name))}
    #    A path stays under the name that trainers know it by; what a data set has in its place may be the audio itself.
    rest = {other: value for other, value in row.items() if other != name or isinstance(value, str)}
    return {**{other: value for other, value in first.items() if value is not None}, **rest, **changed}


def _key_of(path: str, row: Mapping[str, Any]) -> str:
    parts = [re.sub(r"^(\.{0,2}/)+", "", os.path.splitext(file_name(path))[0])]
    start = next((row[name] for name in ("offset", "start") if row.get(name) is not None), None)
    if start is not None or row.get("end") is not None:
        parts += [str(value) for value in (start, row.get("end"), row.get("duration")) if value is not None]
    if row.get("channel") is not None:
        parts.append(str(row["channel"]))
    return "-".join(parts)


def _from_lhotse(row: Mapping[str, Any]) -> dict[str, Any]:
    """A cut of one recording with one source, or such a recording as a whole."""
    # 1. What cannot be one utterance of one file.
    key = row.get("id") if isinstance(row.get("id"), str) else None
    kind = row.get("type")
    if isinstance(row.get("tracks"), list) or kind in ("MixedCut", "PaddingCut"):
        raise Refused(
            f"a Lhotse {short_repr(kind) if kind else 'MixedCut'}: only cuts of one recording can be read", key
        )
    whole = "recording" not in row
    recording: Mapping[str, Any] = row if whole else row["recording"]
    sources = recording.get("sources")
    if not isinstance(sources, list) or len(sources) != 1 or not isinstance(sources[0], Mapping):
        count = len(sources) if isinstance(sources, list) else "no"
        raise Refused(f"a Lhotse recording with {count} sources: only one can be read", key)
    if recording.get("transforms"):
        raise Refused("a Lhotse recording with transforms: save it as audio first", key)
    source = sources[0]
    if source.get("type") not in ("file", "url") or not isinstance(source.get("source"), str):
        raise Refused(f"a Lhotse source of type {short_repr(source.get('type'))}: only file and url can be read", key)
    ours: dict[str, Any] = {"key": key, "wav": source["source"]}
    if key is None:
        raise Refused('field "id" is missing')
    # 2. Lhotse names channels; here they are counted in the order of the source.
    channels = source.get("channels")
    channel = None if whole else row.get("channel")
    if isinstance(channel, list):
        if channels is not None and sorted(map(str, channel)) != sorted(map(str, channels)) and len(channel) > 1:
            raise Refused(f"a Lhotse cut of channels {short_repr(channel)}: only one or all can be read", key)
        channel = channel[0] if len(channel) == 1 else None
    if channel is not None and isinstance(channels, list) and len(channels) > 1:
        if channel not in channels:
            raise Refused(f"a Lhotse cut of channel {short_repr(channel)}, which its source does not have", key)
        ours["channel"] = channels.index(channel)
    # 3. A cut of the whole recording needs no start.
    start, duration, length = row.get("start"), row.get("duration"), recording.get("duration")
    if whole or (not start and duration == length):
        ours["duration"] = duration
    else:
        ours |= {"start": start or 0.0, "duration": duration}
    return {**ours, **_of_supervisions(row), **_custom(row)}


def _of_supervisions(row: Mapping[str, Any]) -> dict[str, Any]:
    """Text, speaker and language where a cut's supervisions agree, and the supervisions as they are."""
    found = row.get("supervisions")
    if not isinstance(found, list) or not found:
        return {}
    parts = [part for part in found if isinstance(part, Mapping)]
    facts: dict[str, Any] = {}
    texts = [part["text"] for part in parts if isinstance(part.get("text"), str)]
    if texts:
        facts["text"] = " ".join(texts)
    for name in ("speaker", "language", "gender"):
        values = {str(part[name]) for part in parts if part.get(name) is not None}
        if len(values) == 1:
            facts[name] = values.pop()
    has_more = len(found) > 1 or any(part.get(name) for part in parts for name in ("custom", "alignment"))
    return {**facts, "supervisions": found} if has_more else facts


def _custom_audio(row: Mapping[str, Any], other_fields: tuple[str, ...]) -> dict[str, Any]:
    """The paths of other audio, which a cut has as recordings among its custom fields."""
    custom, paths = _custom(row).get("custom", {}), {}
    for name in other_fields:
        value = custom.get(name)
        if value is None:
            continue
        if not isinstance(value, Mapping):
            paths[name] = value
            continue
        try:
            found = _from_lhotse(value)
            if "start" in found or "channel" in found:
                raise Refused("a part of a recording: save it as audio of its own first")
        except Refused as refused:
            raise Refused(f"{name}: {refused.reason}", row["id"]) from refused
        paths[name] = found["wav"]
    return paths


def _custom(row: Mapping[str, Any]) -> dict[str, Any]:
    custom = row.get("custom")
    return {"custom": custom} if isinstance(custom, Mapping) and custom else {}
