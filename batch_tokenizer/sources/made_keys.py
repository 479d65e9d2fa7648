"""Keys that a listing made up are made unique: the first row of a name keeps it, later ones get ``NAME-2`` and so on.

So rows keep their keys when others are added behind them. A key of a row's own is never changed: where two rows have
the same, the manifest refuses the second.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from batch_tokenizer.manifest.index import hash_bytes

Hashes = npt.NDArray[np.uint64]


def hash_of(key: str) -> int:
    """The 64-bit hash by which a key is known."""
    return int.from_bytes(hash_bytes(key.encode("utf-8", "surrogatepass")), "big")


class SeenKeys:
    """The keys of the rows that were listed so far, by hash, in eight bytes each."""

    def __init__(self) -> None:
        self._sorted: list[Hashes] = []  # each longer than all behind it, so that there are few
        self._next: dict[str, int] = {}

    def add(self, hashes: Hashes) -> None:
        """Take in the keys of more rows."""
        self._sorted.append(np.sort(hashes))
        while len(self._sorted) > 1 and len(self._sorted[-1]) * 2 >= len(self._sorted[-2]):
            last = self._sorted.pop()
            self._sorted[-1] = np.sort(np.concatenate((self._sorted[-1], last)), kind="stable")

    def contains(self, hashes: Hashes) -> npt.NDArray[np.bool_]:
        """Bool (n,): which of these keys were there."""
        found = np.zeros(len(hashes), np.bool_)
        for known in self._sorted:
            if len(known):
                places = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
                found |= known[places] == hashes
        return found

    def rename(self, keys: Sequence[str], own: Hashes) -> dict[int, str]:
        """Other keys for those of ``keys``, which were made up, that some row has already, by their places; all that
        these rows have is taken in.

        Args:
            own: hashes of the keys that rows beside them have of their own.
        """
        hashes = np.array([hash_of(key) for key in keys], np.uint64)
        self.add(own)
        taken: set[int] = set()
        renamed: dict[int, str] = {}
        for place in np.flatnonzero(self.contains(hashes) | _is_repeated(hashes)).tolist():
            key, hashed = keys[place], int(hashes[place])
            if hashed in taken or self.contains(hashes[place : place + 1])[0]:
                key, hashed = self._other(keys[place], taken, hashes)
                renamed[place] = key
                hashes[place] = hashed
            taken.add(hashed)
        self.add(hashes)
        return renamed

    def _other(self, key: str, taken: set[int], beside: Hashes) -> tuple[str, int]:
        while True:
            number = self._next[key] = self._next.get(key, 1) + 1
            other = f"{key}-{number}"
            hashed = hash_of(other)
            one = np.array([hashed], np.uint64)
            if hashed not in taken and not self.contains(one)[0] and not (beside == one).any():
                return other, hashed


def _is_repeated(hashes: Hashes) -> npt.NDArray[np.bool_]:
    """Bool (n,): which stand in the array more than once."""
    _, places, counts = np.unique(hashes, return_inverse=True, return_counts=True)
    return np.asarray(counts[places] > 1)
