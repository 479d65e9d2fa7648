"""Which utterances share an axis of fixed length, and how the rest of that axis is filled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

#: Filler attends among itself in runs of at most this many frames, which bounds its cost.
FILLER_RUN = 512


def packs(spans: Sequence[int], capacity: int) -> Iterator[list[int]]:
    """Indices of the utterances of each pack, in the order given.

    Args:
        spans: what each utterance takes up, none more than ``capacity``.
        capacity: what a pack holds, in the same unit.
    """
    members: list[int] = []
    used = 0
    for index, span in enumerate(spans):
        if span > capacity:
            raise ValueError(f"utterance {index} takes up {span}, more than the capacity {capacity}")
        if members and used + span > capacity:
            yield members
            members, used = [], 0
        members.append(index)
        used += span
    if members:
        yield members


def filler_runs(size: int) -> list[int]:
    """``size`` frames of filler as lengths of runs."""
    full, rest = divmod(size, FILLER_RUN)
    return [FILLER_RUN] * full + [rest] * (rest > 0)
