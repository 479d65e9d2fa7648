"""What lies beside audio or tokens of the same name, ``.json`` and ``.txt``, to fields of the row.

The fields are untrusted: they may not say what the row is called, where its input lies or where its outputs go. Only a
``key`` from which the members' name was made, as in the tars that this package writes, is believed.
``start``, ``end``, ``offset`` and ``channel`` refer to the recording that the file was cut from, not to the file,
so they pass as ``original_start`` and so on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from batch_tokenizer.manifest.row import REFUSED
from batch_tokenizer.records import CUT_FIELDS, REQUIRED_FIELDS
from batch_tokenizer.sources.foreign_rows import Refused
from batch_tokenizer.storage.json_lines import parse_json
from batch_tokenizer.storage.names import member_name

#: Bytes that a sidecar may have.
MOST_SIDECAR = 1 << 20

_OURS = frozenset((*REQUIRED_FIELDS["wav2token2wav"], REFUSED))

#: Endings of files that hold audio, in lower case.
AUDIO_ENDINGS = frozenset(
    ("3gp", "aac", "ac3", "aif", "aifc", "aiff", "amr", "au", "avi", "caf", "flac", "m4a", "m4b", "mka", "mkv", "mov",
     "mp2", "mp3", "mp4", "mpga", "oga", "ogg", "opus", "rf64", "snd", "sph", "w64", "wav", "wave", "weba", "webm",
     "wma", "wv")
)  # fmt: skip
TOKEN_ENDINGS = frozenset(("npy",))


def sidecar_fields(json_content: bytes | None, text_content: bytes | None, member: str = "") -> dict[str, Any]:
    """Fields of a row.

    Args:
        member: the name of the members, less their endings.

    Raises:
        Refused: the JSON is none.
    """
    fields: dict[str, Any] = {}
    if json_content is not None:
        try:
            value = parse_json(json_content)
        except ValueError as error:
            raise Refused(f"its .json is not valid: {' '.join(str(error).split())[:120]}") from error
        fields = own_fields(value, member) if isinstance(value, dict) else {"json": value}
    if text_content is not None:
        fields.setdefault("text", text_content.decode("utf-8", "replace").strip())
    return fields


def own_fields(value: Mapping[str, Any], member: str = "") -> dict[str, Any]:
    """The fields that a row takes over from what lies beside it; arguments as in ``sidecar_fields``."""
    fields: dict[str, Any] = {}
    for name, item in value.items():
        if name == "key" and isinstance(item, str) and item and member_name(item) == member:
            fields["key"] = item
        elif name not in _OURS:
            fields[f"original_{name}" if name in CUT_FIELDS else name] = item
    return fields
