"""Rows with several audio fields: a row for each up to the codec, and one row again behind it.

    claimed rows ──ManifestRow─► JoinedRows ─a row for each audio─► loader ─► packer ─► codec ─► JoinedRows ─► writers

Nothing between knows of it, so the codes of each are those that its file has as a row of its own. A row ends once: when
its last result is there, or when the first of its audio fails; results of the others are then dropped.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from batch_tokenizer.audio_fields import OtherAudio, parts_of
from batch_tokenizer.records import ManifestRow, RowError, RowFailure, TokenizedRow


@dataclass(slots=True)
class _Pending:
    """A row of whose audio some is not done.

    Attributes:
        missing: how many results.
        results: by the name of their codes, None for the row's own; None once one has failed.
    """

    missing: int
    results: dict[str | None, TokenizedRow] | None = field(default_factory=dict)


class JoinedRows:
    """The rows with several audio fields that one process is working on.

    Args:
        others: what rows may have beside their own audio.
    """

    def __init__(self, others: tuple[OtherAudio, ...]) -> None:
        self._others = others
        self._pending: dict[tuple[int, str | None], _Pending] = {}

    def split(self, row: ManifestRow) -> list[ManifestRow] | RowFailure:
        """The row itself, and a row for each other audio that it has; its failure where a field names none."""
        try:
            parts = parts_of(row, self._others)
        except RowError as error:
            return RowFailure.of(row, error.stage, error.reason)
        if len(parts) > 1:
            self._pending[row.line, row.key] = _Pending(len(parts))
        return parts

    def join(self, outcome: TokenizedRow | RowFailure) -> TokenizedRow | RowFailure | None:
        """How a row has ended, given the outcome of one of its parts; None if it has not, or had before."""
        row = outcome if isinstance(outcome, RowFailure) else outcome.row
        pending = self._pending.get((row.line, row.key))
        if pending is None:
            return outcome
        pending.missing -= 1
        if not pending.missing:
            del self._pending[row.line, row.key]
        if pending.results is None:
            return None
        if isinstance(outcome, RowFailure):
            pending.results = None
            return outcome
        pending.results[row.other_codes] = outcome
        if pending.missing:
            return None
        own = pending.results.pop(None)
        return replace(own, others={name: result for name, result in pending.results.items() if name is not None})
