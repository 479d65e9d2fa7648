"""What a token file says beside its codes, read without them: the ``info`` of a JSON or npy file as our sinks write it.

For listing folders; ``data/token_files.py`` reads and checks the codes.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np

from batch_tokenizer.storage.files import open_file
from batch_tokenizer.storage.json_lines import parse_json
from batch_tokenizer.storage.npy import read_header

#: A JSON file up to this size is parsed as a whole; of a larger one what stands behind its frames.
_MOST_PARSED = 1 << 20


class NoTokens(Exception):
    """A JSON file that has no tokens in it."""


def stored_info(path: str) -> Mapping[str, Any]:
    """The ``info`` of a token file; empty where it has none that can be read, which reading the codes will report.

    Raises:
        NoTokens: it is a JSON file without tokens.
        RowError: it cannot be read.
    """
    with open_file(path, "a token file") as (file, size):
        if path.endswith(".npy"):
            return _behind_array(file, size)
        content = file.read()
    if b'"quantized_tokens"' not in content and not content.lstrip().startswith(b"["):
        raise NoTokens
    if len(content) > _MOST_PARSED:
        # Frames have no strings in them, so the first ``info`` is the file's own.
        begin = content.find(b'"info"')
        content = b"{" + content[begin:] if begin > 0 else b"{}"
    return _info_of(content)


def _behind_array(file: Any, size: int) -> Mapping[str, Any]:
    """JSON behind an array, as far as the header says where the array ends."""
    head = io.BytesIO(file.read(4096))
    try:
        shape, _, dtype = read_header(head)
    except ValueError:  # reported when the codes are read
        return {}
    end = head.tell() + int(np.prod(shape, dtype=object)) * dtype.itemsize
    if not head.tell() < end < size:
        return {}
    file.seek(end)
    return _info_of(file.read(size - end))


def _info_of(content: bytes) -> Mapping[str, Any]:
    try:
        document = parse_json(content)
    except ValueError:
        return {}
    info = document.get("info") if isinstance(document, Mapping) else None
    return info if isinstance(info, Mapping) else {}
