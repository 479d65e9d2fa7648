"""``--output_dir``: a row's key to the paths of its outputs.

    OUTPUT_DIR/3f/a9/utt1.json

Two levels of folders, named by a hash of the key, so that none holds more than a few of a million files. The name is
the key where that is a plain one; otherwise what is readable of it and a hash, so that no two keys share a file, not
even on a file system that holds upper and lower case for the same, and none leaves the folder.
"""

from __future__ import annotations

import re
from hashlib import blake2b

#: Bytes of a name without its ending. File systems take 255, and some users add endings of their own.
MOST_NAME = 150

_PLAIN = re.compile(r"[a-z0-9_][a-z0-9_.\-]*(?<![.\-])|[a-z0-9_]")
_HASHED = re.compile(r"-[0-9a-f]{16}$")
_UNSAFE = re.compile(r"[^A-Za-z0-9_.\-]+")


def output_path(output_dir: str, key: str, ending: str) -> str:
    """Where a row's output goes.

    Args:
        output_dir: a folder or a URL; put in front as it stands.
        ending: with its dot.
    """
    digest = blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
    return f"{output_dir.rstrip('/') or '/'}/{digest[:2]}/{digest[2:4]}/{_name(key, digest)}{ending}"


def _name(key: str, digest: str) -> str:
    if len(key) <= MOST_NAME and _PLAIN.fullmatch(key) and not _HASHED.search(key):
        return key
    readable = _UNSAFE.sub("_", key)[: MOST_NAME - 17].strip("._-")
    return f"{readable}-{digest}" if readable else f"_-{digest}"


def numbered_path(path: str, number: int) -> str:
    """``out/a.json`` to ``out/a-0.json``."""
    folder, slash, name = path.rpartition("/")
    stem, dot, ending = name.rpartition(".")
    return f"{folder}{slash}{stem}-{number}.{ending}" if dot and stem else f"{path}-{number}"
