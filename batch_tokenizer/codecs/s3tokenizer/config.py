"""The configuration of an S3Tokenizer checkpoint, and the windows that long audio is encoded in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any

from batch_tokenizer.codecs.config_keys import ConfigKeys
from batch_tokenizer.records import RunError, WindowMerge

#: Hz, samples from one mel frame to the next, and the fewest samples that a spectrum can be made of.
SAMPLE_RATE, HOP_LENGTH, LEAST_SAMPLES = 16000, 160, 201

#: Mel frames (of 10 ms) that the encoder sees at once, and from one window's start to the next.
WINDOW_FRAMES, WINDOW_STEP = 3000, 2600

#: Seconds of tokens that a window loses on each side where another window overlaps it.
TRIMMED_SECONDS = 2

#: Base-3 digits of a code of finite scalar quantization.
FSQ_DIGITS = 8

#: The published names, the stride of ``conv1`` of each, and whether it is of the second architecture (RoPE, FSMN, FSQ).
VERSIONS: Mapping[str, tuple[int, bool]] = {
    "speech_tokenizer_v1": (1, False),
    "speech_tokenizer_v1_25hz": (2, False),
    "speech_tokenizer_v2_25hz": (2, True),
    "speech_tokenizer_v3_25hz": (2, True),
}


@dataclass(frozen=True, slots=True)
class Window:
    """A part of an utterance that is encoded by itself.

    Attributes:
        start, length: in mel frames.
        skip, tokens: the tokens that are kept of it: so many, after the first ``skip``.
    """

    start: int
    length: int
    skip: int
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class S3Config:
    """A checked configuration, under the published names where there are any.

    Attributes:
        stride: of ``conv1``; ``conv2``'s is 2.
        fsmn: the second architecture (v2, v3): rotary positions, a memory beside attention, scalar quantization. The
            first (v1) adds a table of positions and has one codebook.
        n_audio_ctx: positions in that table.
        key_bias: whether keys have a bias: the published models' have none, the package's own v3 class makes one.
    """

    stride: int
    fsmn: bool
    n_mels: int
    n_audio_ctx: int
    n_audio_state: int
    n_audio_head: int
    n_audio_layer: int
    n_codebook_size: int
    key_bias: bool = False

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> S3Config:
        """A mapping with the published sizes and ``name``, one of ``VERSIONS``.

        Raises:
            RunError: a key is absent or of no use; the message names it.
        """
        keys = ConfigKeys(config)
        name = config.get("name")
        if not isinstance(name, str) or name not in VERSIONS:
            raise keys.wrong("name", f"must be one of {', '.join(VERSIONS)}")
        stride, fsmn = VERSIONS[name]
        keys.known("sampling_rate", SAMPLE_RATE, SAMPLE_RATE)
        return cls(
            stride=stride,
            fsmn=fsmn,
            n_mels=keys.count("n_mels", 128),
            n_audio_ctx=keys.size("n_audio_ctx"),
            n_audio_state=keys.size("n_audio_state"),
            n_audio_head=keys.size("n_audio_head"),
            n_audio_layer=keys.count("n_audio_layer"),
            n_codebook_size=keys.size("n_codebook_size"),
        )

    def __post_init__(self) -> None:
        if self.n_audio_state % self.n_audio_head:
            raise RunError(
                f"config.json: n_audio_head = {self.n_audio_head}: must divide n_audio_state ({self.n_audio_state})"
            )
        if self.fsmn and self.n_audio_state // self.n_audio_head != 64:
            raise RunError(
                f"config.json: n_audio_head = {self.n_audio_head}: heads must be 64 wide, as their rotations are; "
                f"n_audio_state is {self.n_audio_state}"
            )
        if self.fsmn and self.n_codebook_size != 3**FSQ_DIGITS:
            raise RunError(f"config.json: n_codebook_size = {self.n_codebook_size}: must be {3**FSQ_DIGITS}")
        if not 1 <= self.n_codebook_size <= 65536:
            raise RunError(f"config.json: n_codebook_size = {self.n_codebook_size}: must be 1 to 65536")
        if not self.fsmn and self.n_audio_ctx < self.tokens_of(WINDOW_FRAMES):
            raise RunError(
                f"config.json: n_audio_ctx = {self.n_audio_ctx}: must be at least {self.tokens_of(WINDOW_FRAMES)}, "
                f"the tokens of 30 s"
            )

    @property
    def samples_per_frame(self) -> int:
        """Samples per token frame: 320 at 50 Hz, 640 at 25 Hz."""
        return HOP_LENGTH * self.stride * 2

    def mel_frames(self, num_samples: int) -> int:
        """Mel frames of an utterance. One of fewer than ``LEAST_SAMPLES`` samples is zero-padded, and has one."""
        return max(num_samples, LEAST_SAMPLES) // HOP_LENGTH

    def tokens_of(self, mel_frames: int) -> int:
        """Tokens of one window."""
        return (self.convolved(mel_frames) + 1) // 2

    def convolved(self, mel_frames: int) -> int:
        """Frames between the two convolutions."""
        return (mel_frames + self.stride - 1) // self.stride

    def windows(self, mel_frames: int, merge: WindowMerge = "complete") -> list[Window]:
        """The windows of an utterance of ``mel_frames``, and which of their tokens make up its own.

        Up to 30 s are one window. Longer audio has one of 30 s every 26 s; each loses its tokens of 2 s on every side
        where it has a neighbour. ``published`` also starts a window where the one before it has reached the end, and
        then cuts the latter's tail as well, so that up to 2 s of tokens are missing. ``complete`` starts none there.
        """
        trimmed = TRIMMED_SECONDS * SAMPLE_RATE // self.samples_per_frame
        starts = [0]
        for start in count(WINDOW_STEP, WINDOW_STEP):
            over = mel_frames <= WINDOW_FRAMES or start >= mel_frames
            if over or (merge == "complete" and starts[-1] + WINDOW_FRAMES >= mel_frames):
                break
            starts.append(start)
        windows = []
        for start in starts:
            length = min(WINDOW_FRAMES, mel_frames - start)
            first, last = start == 0, start == starts[-1]
            kept = self.tokens_of(length) - trimmed * (not first) - trimmed * (not last)
            windows.append(Window(start, length, trimmed * (not first), max(0, kept)))
        return windows

    def num_frames(self, num_samples: int, merge: WindowMerge = "complete") -> int:
        """Token frames of an utterance of ``num_samples`` >= 1 samples."""
        return sum(window.tokens for window in self.windows(self.mel_frames(num_samples), merge))
