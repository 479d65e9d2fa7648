"""Where ``convert`` puts rows as a Lhotse Shar folder: cuts with their codes as a ``TemporalArray``, written by lhotse.

cuts.000000.jsonl.gz, codes.000000.tar      and recording.000000.tar where rows have audio
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from batch_tokenizer.commands.convert_targets import Common, codes_of
from batch_tokenizer.records import RowError, RunError, first_line
from batch_tokenizer.runs.stored_rows import StoredRow
from batch_tokenizer.storage.row_info import split_info

#: Cuts of a shard.
_SHARD_ROWS = 1000

#: Fields of rows that a supervision has.
_OF_SUPERVISION = ("text", "speaker", "language", "gender")


class SharTarget:
    """Cuts and their codes, in shards of a thousand."""

    def __init__(self, folder: Path) -> None:
        try:
            import lhotse  # noqa: F401
        except ImportError as error:
            raise RunError("--to shar needs lhotse: pip install lhotse") from error
        self._folder = folder
        self._common = Common()
        self._writer: Any = None
        self._has_audio = False

    def add(self, row: StoredRow) -> None:
        codes = codes_of(row)
        self._common.check(row)
        if self._writer is None:
            self._open(has_audio=row.audio is not None)
        if (row.audio is not None) != self._has_audio:
            raise RunError(
                f"row {row.key}: has audio or has none, unlike those before it: --tokens_only leaves it behind"
            )
        try:
            self._writer.write(self._cut(row, codes))
        except (ValueError, TypeError, AssertionError) as error:
            raise RowError("write", f"lhotse takes no such cut: {first_line(error)}") from error

    def _open(self, *, has_audio: bool) -> None:
        from lhotse.shar import SharWriter

        self._has_audio = has_audio
        fields = {"codes": "numpy", **({"recording": "original"} if has_audio else {})}
        self._writer = SharWriter(str(self._folder), fields=fields, shard_size=_SHARD_ROWS)
        self._writer.__enter__()

    def _cut(self, row: StoredRow, codes: Any) -> Any:
        from lhotse import MonoCut, Recording, SupervisionSegment

        rate, num_samples, frame_rate = (row.info.get(name) for name in ("sample_rate", "num_samples", "frame_rate"))
        if not isinstance(frame_rate, (int, float)) or frame_rate <= 0:
            raise RunError(f"row {row.key}: does not say how many frames a second has, which a TemporalArray needs")
        known = isinstance(rate, int) and isinstance(num_samples, int) and rate > 0 and num_samples > 0
        duration = num_samples / rate if known else len(codes) / frame_rate  # type: ignore[operator]
        recording = None
        if row.audio is not None:
            recording = Recording.from_bytes(bytes(row.audio), recording_id=row.key)
            duration = min(duration, recording.duration)
        fields, about = split_info(row.info)
        own = {name: str(fields.pop(name)) for name in _OF_SUPERVISION if fields.get(name) is not None}
        fields.pop("key", None)
        cut = MonoCut(
            id=row.key, start=0.0, duration=duration, channel=0, recording=recording,
            supervisions=[SupervisionSegment(row.key, row.key, 0.0, duration, **own)],
            custom={**fields, "codec": about.get("codec"), "fingerprint": about.get("fingerprint")},
        )  # fmt: skip
        # A cut loads as many frames as its duration has. The last frame of codes may reach beyond the audio, and must
        # not be cut off.
        return cut.attach_tensor(
            "codes", codes, frame_shift=_frame_shift(duration, frame_rate, len(codes)), temporal_dim=0
        )

    def finish(self) -> None:
        if self._writer is not None:
            self._writer.close()


def _frame_shift(duration: float, frame_rate: float, num_frames: int) -> float:
    """Seconds of a frame: the codec's, unless lhotse would then not count ``num_frames`` in the duration."""
    from lhotse.array import seconds_to_frames

    shift = 1 / frame_rate
    return (
        shift
        if seconds_to_frames(duration, frame_shift=shift, max_index=num_frames) == num_frames
        else duration / num_frames
    )
