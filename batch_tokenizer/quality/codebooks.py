"""``CodebookUse``: how much of each codebook the codes of many utterances use."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt


class CodebookUse:
    """Counts how often each code of each codebook occurs.

    Args:
        sizes: rows of each codebook, as far as they are known; without them nothing can be said of unused codes.
    """

    def __init__(self, sizes: Sequence[int] | None = None) -> None:
        self._sizes = None if sizes is None else tuple(sizes)
        self._counts: list[npt.NDArray[np.int64]] = []
        self.frames = 0

    def add(self, codes: npt.NDArray[np.uint16]) -> None:
        """Count codes (T, K); utterances may have different K."""
        self.frames += len(codes)
        for codebook, column in enumerate(codes.T):
            if codebook == len(self._counts):
                self._counts.append(np.zeros(0, np.int64))
            before = self._counts[codebook]
            counts = np.bincount(column, minlength=len(before))  # as long as the largest code so far
            counts[: len(before)] += before
            self._counts[codebook] = counts

    def __len__(self) -> int:
        """Codebooks seen."""
        return len(self._counts)

    def table(self) -> list[dict[str, Any]]:
        """A row a codebook: number (from 1), size and dead (codes that did not occur; None where the size is not
        known), used, entropy (bits a code), perplexity (codes that would carry as much if used evenly)."""
        rows = []
        for codebook, counts in enumerate(self._counts):
            shares = counts[counts > 0] / max(1, counts.sum())
            entropy = max(0.0, float(-(shares * np.log2(shares)).sum()))
            used = int(np.count_nonzero(counts))
            size = self._sizes[codebook] if self._sizes is not None and codebook < len(self._sizes) else None
            rows.append(
                {
                    "codebook": codebook + 1,
                    "size": size,
                    "used": used,
                    "dead": None if size is None else size - used,
                    "entropy": round(entropy, 4),
                    "perplexity": round(2**entropy, 2),
                }
            )
        return rows

    def entropy_rate(self, frame_rate: float) -> float:
        """Bits a second that the codes carry if each codebook is coded by itself; at most the nominal bit rate."""
        return frame_rate * float(sum(row["entropy"] for row in self.table()))


def bit_rate(sizes: Sequence[int], frame_rate: float) -> float:
    """Bits a second of codes from codebooks of these sizes, each code written alike."""
    return frame_rate * sum(math.log2(size) for size in sizes)
