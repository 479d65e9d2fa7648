"""``PassLimit``: which rows are too long for one pass through the model, and where they are cut.

Nothing here depends on what else is in a run, so a row is always cut at the same places.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from batch_tokenizer.codecs.base import CodecSpec
from batch_tokenizer.records import AudioCut, LongAudio, ManifestRow, Pieces, RowError, RunError

#: Seconds of a piece unless ``--max_seconds`` says otherwise, as MiMo's language model has them.
PIECE_SECONDS = 60.0

#: Seconds of codes that a window has on each side beyond what is used of it. ``docs/long_audio.md`` has the seam error.
CONTEXT_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class PassLimit:
    """What the model takes in one pass.

    Attributes:
        policy: what happens to what is longer.
        samples: the most, at the codec's rate; None where there is no limit. In ``stream`` whole frames.
        max_seconds: ``--max_seconds``, if it is that which limits.
    """

    policy: LongAudio = "native"
    samples: int | None = None
    max_seconds: float | None = None

    @classmethod
    def of(cls, spec: CodecSpec, policy: LongAudio = "native", max_seconds: float | None = None) -> PassLimit:
        """The limit of a run.

        Raises:
            RunError: the model has no streams, or does not take as much in one pass as is asked for.
        """
        info = spec.info
        if policy != "native" and spec.needs_whole_utterances:
            asked = ", ".join(f"--{name} {value}" for name, value in spec.settings.items())
            raise RunError(f"--long_audio {policy}: {asked} needs whole utterances; leave one of them out")
        if policy == "stream" and not spec.streams:
            raise RunError(f"--long_audio stream: {info.family} has no exact streams; use --long_audio segment")
        # 1. The user's limit, or the usual length of a piece, but never more than the model takes.
        model = info.max_samples
        if max_seconds is None:
            samples = model
            if policy != "native":
                usual = round(PIECE_SECONDS * info.sample_rate)
                samples = usual if model is None else min(usual, model)
        else:
            samples = max(1, round(max_seconds * info.sample_rate))
            if model is not None and samples > model:
                most = model / info.sample_rate
                raise RunError(f"--max_seconds {max_seconds:g}: {info.name} takes {most:g} s in one pass")
        # 2. A stream's pieces end with whole frames, as its state goes on from frame to frame.
        if policy == "stream" and samples is not None:
            samples = max(1, samples // info.samples_per_frame) * info.samples_per_frame
        return cls(policy, samples, max_seconds)

    @property
    def settings(self) -> dict[str, Any]:
        """What later runs into the same run folder must have too: segments change tokens, streams do not."""
        return {"segment_samples": self.samples} if self.policy == "segment" else {}

    def remedy(self, spec: CodecSpec) -> str:
        """What to do about a row that is too long, for its error message."""
        takes = "--long_audio stream takes it" if spec.streams else "--long_audio segment takes it in segments"
        return takes if self.max_seconds is None else f"raise --max_seconds, or {takes}"

    def of_audio(self, num_samples: int) -> Pieces:
        """Pieces of audio that is longer than ``samples``."""
        assert self.samples is not None
        places = (*range(0, num_samples, self.samples), num_samples)
        return Pieces("stream" if self.policy == "stream" else "segments", places)

    def of_codes(self, spec: CodecSpec, num_frames: int, origin: Mapping[str, Any]) -> Pieces | None:
        """Pieces of codes, or None if they go through in one pass.

        Codes that were made in segments are decoded in these, whatever the policy.

        Args:
            origin: the ``info`` beside the codes.

        Raises:
            RowError: they are too long for the model, or their recorded segments do not fit them.
        """
        # Other people's tokens may come with segments that mean something else.
        recorded = origin.get("segments") if "fingerprint" in origin else None
        if recorded is not None:
            return _recorded_segments(recorded, spec, num_frames, origin.get("num_samples"))
        most = None if self.samples is None else spec.num_frames(self.samples)
        if most is None or num_frames <= most:
            return None
        if self.policy == "native":
            raise RowError("load", f"too long, {num_frames} frames where {most} is the most; {self.remedy(spec)}")
        assert self.samples is not None
        step = max(1, self.samples // spec.info.samples_per_frame)
        frames = (*range(0, num_frames, step), num_frames)
        samples = tuple(place * spec.info.samples_per_frame for place in frames)
        return Pieces("stream" if self.policy == "stream" else "windows", samples, frames)


def piece_of(row: ManifestRow, pieces: Pieces, number: int, sample_rate: int) -> ManifestRow:
    """The row of one piece of a row's audio. Pieces that touch have the same time there, so that nothing is lost."""
    whole = row.cut or AudioCut()
    first = round(whole.start * sample_rate)
    ends = [(first + place) / sample_rate for place in pieces.samples[number : number + 2]]
    return replace(row, cut=replace(whole, start=ends[0], end=ends[1]), piece=number)


def _recorded_segments(recorded: object, spec: CodecSpec, num_frames: int, num_samples: object) -> Pieces | None:
    try:
        pairs = [(int(frame), int(sample)) for frame, sample in recorded]  # type: ignore[attr-defined]
    except (TypeError, ValueError, OverflowError) as error:
        raise RowError("load", "its segments are not pairs of frames and samples") from error
    if type(num_samples) is not int:
        raise RowError("load", "it has segments but not num_samples, where the last one ends")
    frames = [*(frame for frame, _ in pairs), num_frames]
    samples = [*(sample for _, sample in pairs), num_samples]
    if frames[0] or samples[0] or any(a >= b for column in (frames, samples) for a, b in pairwise(column)):
        raise RowError("load", "its segments do not follow each other from the first frame to the last")
    for (frame, after), (sample, end) in zip(pairwise(frames), pairwise(samples), strict=True):
        if spec.num_frames(end - sample) != after - frame:
            raise RowError("load", f"its segment from frame {frame} on is not as long as its samples make it")
    return Pieces("segments", tuple(samples), tuple(frames))
