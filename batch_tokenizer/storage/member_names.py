"""A key to the name of its members in a tar that we write, less the endings.

webdataset cuts a member's name at its first dot, and names in a tar have to be short, and safe to extract anywhere.
"""

from __future__ import annotations

import re
from hashlib import blake2b

_PLAIN = re.compile(r"[A-Za-z0-9_-]{1,80}")
_UNSAFE = re.compile(r"[^A-Za-z0-9_-]+")


def member_name(key: str) -> str:
    """The key itself if it is 1 to 80 of ``A-Z a-z 0-9 _ -``; otherwise as much of it as is, ``~`` and a hash of all
    of it, which no plain key can be."""
    if _PLAIN.fullmatch(key):
        return key
    digest = blake2b(key.encode("utf-8", "surrogatepass"), digest_size=10).hexdigest()
    return f"{_UNSAFE.sub('_', key)[:48]}~{digest}"
