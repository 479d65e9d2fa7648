"""Audio that a row has beside its own: ``--audio_fields``, ``--channels split_row``, and the parts of a row they make.

A row with reference audio becomes several rows, one for each file or channel that is encoded. Up to the codec they are
rows like any others; ``pipeline/joined_rows.py`` makes one of them again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from batch_tokenizer.records import (
    ROW_INFO_FIELDS,
    RUN_INFO_FIELDS,
    AudioCut,
    ManifestRow,
    RowError,
    RunError,
    short_repr,
)

#: Says of a row of which ``--channels split_row`` makes codes of each channel how many there are.
SPLIT_CHANNELS = "split_channels"

_CODES_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_\-]{0,63}")  # webdataset leaves out members that begin with _

#: Fields and columns that stand beside the codes of a row.
_OTHER_FIELDS = frozenset(
    ("key", "codec", "fingerprint", "num_frames", "num_samples", "duration", "audio", "hidden_states", "info",
     "manifest_row", "batch_tokenizer")
)  # fmt: skip

#: What codes of several fields may not be called either, in whatever case: fields of rows, members of tars, and what a
#: run says of its rows have these names.
_NO_CODES_NAMES = frozenset(
    ("wav", "quantized_tokens", "reconstructed_wav", "tokens", "hidden", SPLIT_CHANNELS,
     *RUN_INFO_FIELDS, *ROW_INFO_FIELDS)
)  # fmt: skip

#: Fields that name no audio to encode.
_NO_AUDIO_FIELDS = frozenset(("key", "quantized_tokens", "reconstructed_wav"))


@dataclass(frozen=True, slots=True)
class OtherAudio:
    """Audio that rows of a run have beside their own, and whose codes are stored with theirs.

    Attributes:
        codes: the name under which they are.
        field: the row's field that names the file; None for another channel of the row's own.
        channel: of the file, counted from 0; None for the mean of all.
    """

    codes: str
    field: str | None = None
    channel: int | None = None

    @property
    def setting(self) -> dict[str, Any]:
        """As the settings of a run have it under ``codes``, which ``from_settings`` reads."""
        named = {"field": self.field, "channel": self.channel}
        return {name: value for name, value in named.items() if value is not None}


def from_settings(settings: Mapping[str, Any]) -> tuple[OtherAudio, ...]:
    """The other audio of a run, by its settings or by what a row of it says."""
    return tuple(OtherAudio(codes, **about) for codes, about in settings.get("other_audio", {}).items())


def check_codes_field(name: str) -> None:
    """
    Raises:
        RunError: the name cannot be that of the codes, as it is empty or that of something else beside them.
    """
    if not name or name in _OTHER_FIELDS:
        others = ", ".join(sorted(_OTHER_FIELDS))
        raise RunError(f"--codes_field {name!r}: a name other than {others}")


@lru_cache(maxsize=8)
def parse_audio_fields(text: str) -> tuple[OtherAudio, ...]:
    """The fields of ``--audio_fields``, the row's own audio first.

    Raises:
        RunError: they are not so written, or a name cannot be used.
    """
    found: list[OtherAudio] = []
    for part in text.split(","):
        name, _, codes = (word.strip() for word in part.partition("="))
        if not name or not codes:
            raise RunError(f"--audio_fields {text}: FIELD=CODES, several with commas between them")
        if name in _NO_AUDIO_FIELDS or (found and name == "wav"):
            raise RunError(f"--audio_fields {text}: {name} is no field of audio beside the row's own")
        taken = _OTHER_FIELDS | _NO_CODES_NAMES | ({"codes"} if found else set())
        if not _CODES_NAME.fullmatch(codes) or codes.lower() in taken:
            raise RunError(f"--audio_fields {text}: codes cannot be named {codes}")
        found.append(OtherAudio(codes, name))
    for names in ({one.field for one in found}, {one.codes.lower() for one in found}):
        if len(names) < len(found):
            raise RunError(f"--audio_fields {text}: has a name twice")
    return tuple(found)


def parts_of(row: ManifestRow, others: tuple[OtherAudio, ...]) -> list[ManifestRow]:
    """The row itself, then a row for each other audio that it has. A field that is absent, null or empty has none.

    Raises:
        RowError: a field is something else than a path.
    """
    parts = [row]
    for other in others:
        if other.field is None:
            if row.fields.get(SPLIT_CHANNELS) == 2:
                own_cut = row.cut or AudioCut()
                parts.append(replace(row, cut=replace(own_cut, channel=other.channel), other_codes=other.codes))
            continue
        path = row.fields.get(other.field)
        if path is None or path == "":
            continue
        if not isinstance(path, str) or "\0" in path:
            raise RowError("load", f'field "{other.field}" is {short_repr(path)}, not a path')
        cut = None if other.channel is None else AudioCut(channel=other.channel)
        parts.append(replace(row, wav=path, cut=cut, other_codes=other.codes))
    return parts
