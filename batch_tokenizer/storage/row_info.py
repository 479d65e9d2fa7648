"""What is stored of a row beside its codes: the fields of its manifest row, and what the run says of it.

Sinks that have one place for both (``info``) keep what the run says under its own names, and the fields of the row
beside it. A field of such a name that says something else is kept under ``manifest_row``, so nothing is lost. Codes of
a row's other audio (``--audio_fields``) are among what the run says, under the names that ``other_audio`` has.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from batch_tokenizer.records import ROW_INFO_FIELDS, RUN_INFO_FIELDS

#: Where fields of the manifest's row are kept whose names mean something else beside them.
HIDDEN = "manifest_row"

_RUN_FIELDS = frozenset((*RUN_INFO_FIELDS, *ROW_INFO_FIELDS))


def other_names(about: Mapping[str, Any]) -> tuple[str, ...]:
    """The names under which a run has codes of rows' other audio, by what it says of a row; none for rows of other
    programs, which may have such a field too."""
    others = about.get("other_audio")
    return tuple(others) if isinstance(others, Mapping) and "fingerprint" in about else ()


def join_info(fields: Mapping[str, Any], about: Mapping[str, Any]) -> dict[str, Any]:
    """The ``info`` of a row, of its fields and of what the run says of it."""
    return merge_hiding(fields, about, _RUN_FIELDS.union(other_names(about)))


def split_info(info: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(fields, about), of which ``join_info`` makes this ``info`` again."""
    of_run = _RUN_FIELDS.union(other_names(info))
    about = {name: value for name, value in info.items() if name in of_run}
    fields = {name: value for name, value in info.items() if name not in of_run and name != HIDDEN}
    hidden = info.get(HIDDEN)
    if isinstance(hidden, Mapping):
        fields.update(hidden)
    elif HIDDEN in info:
        fields[HIDDEN] = hidden
    return fields, about


def merge_hiding(
    fields: Mapping[str, Any], ours: Mapping[str, Any], reserved: frozenset[str] = frozenset()
) -> dict[str, Any]:
    """Fields of a row and ``ours`` in one object, in which ``ours`` wins; a field that says something else under the
    name of one of ours is kept under ``manifest_row``.

    Args:
        reserved: names that fields may not have either, where ``ours`` does not have them.
    """
    kept: dict[str, Any] = {}
    hidden: dict[str, Any] = {}
    for name, value in fields.items():
        if name not in ours and name not in reserved and name != HIDDEN:
            kept[name] = value
        elif name not in ours or ours[name] != value:
            hidden[name] = value
    merged = {**kept, **ours}
    if hidden:
        merged[HIDDEN] = hidden
    return merged
