"""Rows of other tools' manifests to rows of this one: NeMo's, and Lhotse's cuts and recordings.

A row of ours passes as it is. ``Refused`` says why one of theirs has no counterpart.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any


class Refused(Exception):
    """A row cannot become one of ours. ``key`` is its name, where it has one."""

    def __init__(self, reason: str, key: str | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.key = key


def is_foreign(row: Mapping[str, Any]) -> bool:
    """Whether ``convert`` has something to do."""
    if "wav" in row:
        return False
    return "audio_filepath" in row or is_lhotse(row)


def is_lhotse(row: Mapping[str, Any]) -> bool:
    """Whether it is a cut, or a recording."""
    return (
        isinstance(row.get("recording"), Mapping)
        or isinstance(row.get("tracks"), list)
        or (isinstance(row.get("sources"), list) and "sampling_rate" in row)
    )


def convert(row: Mapping[str, Any], base: str = "") -> dict[str, Any]:
    """Our row.

    Args:
        base: folder that paths of NeMo rows are relative to.

    Raises:
        Refused: there is none.
    """
    return _from_nemo(row, base) if "audio_filepath" in row else _from_lhotse(row)


def _from_nemo(row: Mapping[str, Any], base: str) -> dict[str, Any]:
    """``audio_filepath``, ``duration``, ``offset``, ``text`` …; the key is the row's own, or the path, with offset and
    duration where the row is a part of the file.

    NeMo reads ``duration`` seconds from ``offset`` on, be it 0 or not; without an offset, the whole file.
    """
    path = row["audio_filepath"]
    named = next((row[name] for name in ("key", "id", "utt_id") if isinstance(row.get(name), str) and row[name]), None)
    if not isinstance(path, str) or not path:
        raise Refused('field "audio_filepath" is not a path', named)
    if "shard_id" in row:
        raise Refused("a row of a tarred NeMo manifest: name its tars in --data_list", named or path)
    key = named
    if key is None:
        key = os.path.splitext(path)[0].lstrip("./")
        if row.get("offset") is not None:
            key = "-".join(str(part) for part in (key, row["offset"], row.get("duration")) if part is not None)
    rest = {name: value for name, value in row.items() if name not in ("audio_filepath", "key")}
    return {"key": key, "wav": os.path.join(base, path) if base and not os.path.isabs(path) else path, **rest}


def _from_lhotse(row: Mapping[str, Any]) -> dict[str, Any]:
    """A cut of one recording with one source, or such a recording as a whole."""
    key = row.get("id") if isinstance(row.get("id"), str) else None
    kind = row.get("type")
    if isinstance(row.get("tracks"), list) or kind in ("MixedCut", "PaddingCut"):
        raise Refused(f"a Lhotse {kind or 'MixedCut'}: only cuts of one recording can be read", key)
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
        raise Refused(f"a Lhotse source of type {source.get('type')!r}: only file and url can be read", key)
    ours: dict[str, Any] = {"key": key, "wav": source["source"]}
    if key is None:
        raise Refused('field "id" is missing')
    channels = source.get("channels")
    channel = None if whole else row.get("channel")
    if isinstance(channel, list):
        if channels is not None and sorted(map(str, channel)) != sorted(map(str, channels)) and len(channel) > 1:
            raise Refused(f"a Lhotse cut of channels {channel}: only one or all can be read", key)
        channel = channel[0] if len(channel) == 1 else None
    if channel is not None and isinstance(channels, list) and len(channels) > 1:
        if channel not in channels:
            raise Refused(f"a Lhotse cut of channel {channel}, which its source does not have", key)
        ours["channel"] = channels.index(channel)
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
    return {**facts, "supervisions": found} if len(found) > 1 else facts


def _custom(row: Mapping[str, Any]) -> dict[str, Any]:
    custom = row.get("custom")
    return {"custom": custom} if isinstance(custom, Mapping) and custom else {}
