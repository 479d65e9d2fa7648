"""The codec protocol: a spec that needs no weights, and a model that computes codes from features and audio from codes.

``CodecSpec`` is small and picklable. It goes to the loader workers (front end), to ``verify`` (frame arithmetic) and to
the run folder (fingerprint). ``Codec`` holds weights on a device and is made only in the process that computes.
Audio is float32 samples (S,) at ``info.sample_rate``, or (channels, S) where ``info.channels`` is more than one; codes
are (T, K) in every file and interface.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import numpy as np
import numpy.typing as npt

from batch_tokenizer.codecs.config_keys import MOST_COUNT, MOST_SIZE
from batch_tokenizer.records import Downmix, RunError, Stage, Task

if TYPE_CHECKING:
    from typing_extensions import Self


#: The parts of a model whose weights a task needs.
PARTS: Mapping[Task, tuple[Literal["encoder", "decoder"], ...]] = {
    "wav2token": ("encoder",),
    "token2wav": ("decoder",),
    "wav2token2wav": ("encoder", "decoder"),
}


@dataclass(frozen=True, slots=True)
class CodecInfo:
    """Properties of a checkpoint, as written into every token file.

    Attributes:
        family: the model family, such as ``mimo`` or ``dac``.
        name: the checkpoint's own name, its folder or hub id without the path before it.
        sample_rate: Hz, of the input, and of decoded audio unless ``decoded_sample_rate`` is set.
        samples_per_frame: samples of audio per frame of tokens.
        codebook_sizes: rows of each codebook; its length is the greatest usable ``num_quantizers``.
        fingerprint: hexadecimal digest of configuration and weights; equal fingerprints mean interchangeable tokens.
        max_samples: longest utterance that the model takes in one pass, or None for no limit.
        decoded_sample_rate: Hz, of decoded audio where it differs from ``sample_rate``; else None.
        columns: what each column of the codes is, where they are not simply codebooks in their order; else empty.
        channels: of the audio; where there are two or more, samples are (channels, S) instead of (S,) everywhere.
    """

    family: str
    name: str
    sample_rate: int
    samples_per_frame: int
    codebook_sizes: tuple[int, ...]
    fingerprint: str
    max_samples: int | None = None
    decoded_sample_rate: int | None = None
    columns: tuple[str, ...] = ()
    channels: int = 1

    def __post_init__(self) -> None:
        """
        Raises:
            ValueError: a number is out of range; a checkpoint's files are untrusted input.
        """
        for name, value, most in (
            ("sample rate", self.sample_rate, MOST_SIZE),
            ("sample rate of the decoded audio", self.output_sample_rate, MOST_SIZE),
            ("number of samples per frame", self.samples_per_frame, MOST_SIZE),
            ("number of codebooks", self.num_codebooks, MOST_COUNT),
            ("greatest codebook", max(self.codebook_sizes, default=0), 1 << 16),
            ("smallest codebook", min(self.codebook_sizes, default=0), 1 << 16),
            ("number of channels", self.channels, MOST_COUNT),
        ):
            if not 1 <= value <= most:
                raise ValueError(f"the {name} is {value}, must be 1 to {most}")

    @property
    def output_sample_rate(self) -> int:
        """Hz, of decoded audio."""
        return self.decoded_sample_rate or self.sample_rate

    @property
    def num_codebooks(self) -> int:
        """Codebooks in the checkpoint."""
        return len(self.codebook_sizes)

    @property
    def frame_rate(self) -> float:
        """Token frames per second."""
        return self.sample_rate / self.samples_per_frame


#: How utterances share a batch on a device: end to end on one axis; padded, of any lengths; of equal lengths only; not
#: at all. Results are those of each utterance alone in every case. Few models compute batches on a CPU
#: (``padded_codec.py``, ``layers/packed.py``).
Batching = Literal["packed", "padded", "equal lengths", "one by one"]


class CodecSpec(ABC):
    """A checkpoint without its weights. Subclasses are picklable and cheap to copy to a worker process."""

    info: CodecInfo

    #: The number format of ``--dtype auto`` on CUDA.
    cuda_dtype: ClassVar[Literal["float32", "bfloat16"]] = "bfloat16"

    #: How utterances share a batch.
    batching: Batching = "one by one"

    #: Where features are made: in loader processes, or in the codec (``with_device_front_end``).
    front_end: Literal["host", "device"] = "host"

    #: How a mono codec makes one channel of a file with several, unless the row names one.
    downmix: ClassVar[Downmix] = "mean"

    #: Whether a run keeps the encoder's output before quantization (``Codec.encode_hidden``).
    hidden_states: bool = False

    #: Whether the codec has streams, whose results are those of one pass.
    streams: ClassVar[bool] = False

    #: Settings of this family: names of fields of the spec whose values a run may choose.
    options: ClassVar[tuple[str, ...]] = ()

    def with_options(self, chosen: Mapping[str, Any]) -> Self:
        """The same checkpoint with some of ``options`` set; the fingerprint stays, as codebooks and decoder do.

        Raises:
            RunError: this family has no such setting.
        """
        for name, value in chosen.items():
            if name not in self.options:
                has = f"it has {', '.join(f'--{known}' for known in self.options)}" if self.options else "it has none"
                flag = f"--{name}" if value is True else f"--{name} {value}"
                raise RunError(f"{flag}: not a setting of {self.info.family}; {has}")
        return replace(self, **chosen)  # type: ignore[type-var]  # subclasses are dataclasses

    def with_recorded(self, settings: Mapping[str, Any]) -> Self:
        """``with_options`` of those among the settings of a run or the ``info`` of a token file."""
        return self.with_options({name: settings[name] for name in self.options if name in settings})

    @property
    def needs_whole_utterances(self) -> bool:
        """Whether ``features`` of an utterance's pieces would not be those of the whole."""
        return False

    @property
    def settings(self) -> dict[str, Any]:
        """``options`` that differ from their defaults, for the run's settings and every token file."""
        defaults = {field.name: field.default for field in fields(self) if field.default is not MISSING}  # type: ignore[arg-type]
        return {name: getattr(self, name) for name in self.options if getattr(self, name) != defaults[name]}

    def with_device_front_end(self) -> CodecSpec | None:
        """The same checkpoint with its front end in the codec: its ``features`` are the samples. None if not supported.

        Loader processes then only decode audio; the codec must be made with the spec that the loader has.
        """
        return None

    @abstractmethod
    def features(self, samples: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """The front end: samples (S,) or (channels, S), S >= 1, to what ``Codec.encode`` takes, (channels, length).

        Runs in a loader worker.
        """

    def is_feature_length(self, length: int) -> bool:
        """Whether ``features`` can return arrays of this length."""
        return length >= 1

    def num_frames(self, num_samples: int) -> int:
        """Token frames T of an utterance of ``num_samples`` >= 1 samples of each channel; by default as many as hold
        them."""
        return -(-num_samples // self.info.samples_per_frame)

    def num_output_samples(self, num_frames: int) -> int:
        """Samples of each channel that ``num_frames`` >= 1 frames decode to, at ``info.output_sample_rate``; by default
        ``info.samples_per_frame`` each.

        Raises:
            RowError: the model cannot decode that many.
        """
        return num_frames * self.info.samples_per_frame


class CodecStream(Protocol):
    """One utterance that is encoded and decoded piece by piece, with independent state for each direction. Each call
    takes a list with the next piece and returns a list of one, so that a stream can be used in place of a codec."""

    def encode(self, features: Sequence[npt.NDArray[np.float32]], num_quantizers: int) -> list[npt.NDArray[np.uint16]]:
        """Features of whole frames, of the last piece also of less, to their codes."""

    def encode_hidden(
        self, features: Sequence[npt.NDArray[np.float32]], num_quantizers: int
    ) -> tuple[list[npt.NDArray[np.uint16]], list[npt.NDArray[np.float16]]]:
        """As ``Codec.encode_hidden``, where ``spec.hidden_states``."""

    def decode(self, codes: Sequence[npt.NDArray[np.uint16]]) -> list[npt.NDArray[np.float32]]:
        """Codes to their samples."""


@dataclass(frozen=True, slots=True)
class Computed:
    """Results of a batch: codes (T_i, K_i), samples as ``Codec.decode`` returns them if the task has any, the device's
    seconds by stage, and hidden states (T_i, d) where ``spec.hidden_states``."""

    codes: list[npt.NDArray[np.uint16]]
    samples: list[npt.NDArray[np.float32]] | None
    seconds: Mapping[Stage, float]
    hidden_states: list[npt.NDArray[np.float16]] | None = None


class Computation(Protocol):
    """A batch that a device works on."""

    def finish(self) -> Computed:
        """Waits for the device."""


class Codec(ABC):
    """A checkpoint with its weights on a device.

    A result never depends on the other members of the call: neither on how many there are, nor on their lengths or
    order. Members are numpy arrays in host memory on both sides.

    Attributes:
        frame_budget: token frames that it computes at once, where that many fit in memory. The caller makes batches of
            about this size, and halves it after a batch that did not fit.
        batch_limit: number of utterances above which a call gets no faster, or None; on a CPU some for each core.
        compiled: whether its layers run under ``torch.compile``, which changes bits in 16-bit formats.
        runs_ahead: whether there is ``begin``, which returns while the device still works.
    """

    spec: CodecSpec
    frame_budget: int = 8192
    batch_limit: int | None = None
    runs_ahead: bool = False
    compiled: bool = False

    @property
    def info(self) -> CodecInfo:
        """The spec's ``info``."""
        return self.spec.info

    def encode_files(
        self, paths: Sequence[str | os.PathLike[str]], num_quantizers: int | None = None
    ) -> list[npt.NDArray[np.uint16]]:
        """Audio files of any format, rate and number of channels to codes (T_i, ``num_quantizers``) each, in order.

        Args:
            num_quantizers: codebooks to use; None for all.

        Raises:
            RowError: a file cannot be read, is too long, or does not fit in memory; the reason names it.
            TypeError: ``paths`` is one path, not a list.
        """
        from batch_tokenizer.codecs.files import encode_files  # imported here, as that module needs this one

        return encode_files(self, paths, num_quantizers)

    def decode_to_files(self, codes: Sequence[npt.NDArray[np.uint16]], paths: Sequence[str | os.PathLike[str]]) -> None:
        """Codes (T_i, K_i) each to audio files, 16-bit ``.wav`` or ``.flac`` at ``info.output_sample_rate``.

        Folders are made. A file appears whole, in place of one that is there.

        Raises:
            RowError: an utterance cannot be decoded; the reason names its file.
            ValueError: there are not as many paths as utterances, or one has another ending; or as ``decode``.
            OSError: a file cannot be written.
        """
        from batch_tokenizer.codecs.files import decode_to_files  # imported here, as that module needs this one

        decode_to_files(self, codes, paths)

    def encode(
        self, features: Sequence[npt.NDArray[np.float32]], num_quantizers: int | None = None
    ) -> list[npt.NDArray[np.uint16]]:
        """Features (channels, length_i) each to codes (T_i, ``num_quantizers``) each, in the order given.

        Args:
            num_quantizers: codebooks to use; None for all.

        Raises:
            ValueError: ``num_quantizers`` is not 1 to ``num_codebooks``, or a member is not as ``spec.features`` makes
                it: of another shape or number format, or not finite.
        """
        count = self._check_encoding(features, num_quantizers)
        return self.encode_batch(features, count) if len(features) else []

    def encode_hidden(
        self, features: Sequence[npt.NDArray[np.float32]], num_quantizers: int | None = None
    ) -> tuple[list[npt.NDArray[np.uint16]], list[npt.NDArray[np.float16]]]:
        """The codes of ``encode``, and the encoder's output before quantization, float16 (T_i, d) each.

        Only where ``hidden_states`` is a setting of the spec.

        Raises:
            ValueError: as ``encode``.
        """
        count = self._check_encoding(features, num_quantizers)
        return self.encode_hidden_batch(features, count) if len(features) else ([], [])

    def decode(self, codes: Sequence[npt.NDArray[np.uint16]]) -> list[npt.NDArray[np.float32]]:
        """Codes (T_i, K_i) each, 1 <= K_i <= ``num_codebooks``, to samples (S_i,) each, in the order given.

        Samples are (channels, S_i) where the codec has more than one channel.

        Raises:
            ValueError: a member has no frames, another shape, or a code that is not in its codebook.
        """
        for index, member in enumerate(codes):
            check_codes(member, self.info.codebook_sizes, f"utterance {index}")
        return self.decode_batch(codes) if len(codes) else []

    @abstractmethod
    def encode_batch(
        self, features: Sequence[npt.NDArray[np.float32]], num_quantizers: int
    ) -> list[npt.NDArray[np.uint16]]:
        """``encode`` of one or more members, which are checked."""

    def encode_hidden_batch(
        self, features: Sequence[npt.NDArray[np.float32]], num_quantizers: int
    ) -> tuple[list[npt.NDArray[np.uint16]], list[npt.NDArray[np.float16]]]:
        """``encode_hidden`` of one or more members, which are checked."""
        raise NotImplementedError(f"{self.info.family} keeps no hidden states")

    @abstractmethod
    def decode_batch(self, codes: Sequence[npt.NDArray[np.uint16]]) -> list[npt.NDArray[np.float32]]:
        """``decode`` of one or more members, which are checked."""

    @cached_property
    def _feature_channels(self) -> int:
        channels = self.info.channels
        return len(self.spec.features(np.zeros((1,) if channels == 1 else (channels, 1), np.float32)))

    def _check_encoding(self, features: Sequence[npt.NDArray[np.float32]], num_quantizers: int | None) -> int:
        """The number of codebooks to encode."""
        count = self.info.num_codebooks
        num_quantizers = count if num_quantizers is None else num_quantizers
        if not isinstance(num_quantizers, (int, np.integer)) or not 1 <= num_quantizers <= count:
            raise ValueError(f"{num_quantizers} codebooks asked for: this checkpoint has 1 to {count}")
        for index, member in enumerate(features):
            self._check_features(member, f"utterance {index}")
        return int(num_quantizers)

    def _check_features(self, features: npt.NDArray[np.float32], name: str) -> None:
        shape, dtype = np.shape(features), getattr(features, "dtype", type(features).__name__)
        if not isinstance(features, np.ndarray) or dtype != np.float32:
            raise ValueError(
                f"{name}: features are of {dtype}, must be a numpy array of float32, as spec.features gives"
            )
        if len(shape) != 2 or shape[0] != self._feature_channels or not self.spec.is_feature_length(shape[1]):
            raise ValueError(
                f"{name}: features have shape {shape}, must be ({self._feature_channels}, length) as "
                f"spec.features(samples) gives them"
            )
        if not np.isfinite(features).all():
            raise ValueError(f"{name}: features are not finite")

    def begin(self, task: Task, inputs: Sequence[npt.NDArray[Any]], num_quantizers: int) -> Computation:
        """All of ``task`` for a batch of features, or of codes in ``token2wav``, where ``runs_ahead``.

        It returns when the work is queued on the device, so that the next batch can be made ready meanwhile. Results
        are those of ``encode`` and ``decode``.
        """
        raise NotImplementedError(f"{self.info.family} computes at once")

    def open_stream(self) -> CodecStream:
        """A new stream, where ``spec.streams``."""
        raise NotImplementedError(f"{self.info.family} has no streams")

    def release(self) -> None:
        """Frees cached device memory, after a batch that did not fit."""
        from accelerate.utils.memory import clear_device_cache  # imported here, as loader processes need it never

        clear_device_cache()


def as_channels(samples: npt.NDArray[Any], channels: int) -> npt.NDArray[np.float32]:
    """Samples (S,) of one channel, or (channels, S), as float32 (channels, S).

    Raises:
        ValueError: they are of another number of channels.
    """
    if samples.shape[:-1] != (() if channels == 1 else (channels,)):
        wanted = "(S,)" if channels == 1 else f"({channels}, S)"
        raise ValueError(f"samples have shape {samples.shape}, must be {wanted}")
    return np.asarray(samples, dtype=np.float32).reshape(channels, -1)


def check_codes(codes: npt.NDArray[Any], codebook_sizes: Sequence[int], name: str, *, least: int = 1) -> None:
    """
    Raises:
        ValueError: codes of the utterance ``name`` are not integers (T, K), T at least ``least`` and K from 1 to the
            number of codebooks, or one is not in its codebook.
    """
    shape, dtype = np.shape(codes), getattr(codes, "dtype", type(codes).__name__)
    if not isinstance(codes, np.ndarray) or codes.dtype.kind not in "ui":
        raise ValueError(f"{name}: codes are of {dtype}, must be a numpy array of integers")
    if len(shape) != 2 or shape[0] < least or not 1 <= shape[1] <= len(codebook_sizes):
        raise ValueError(f"{name}: codes have shape {shape}, must be ({least} or more, 1 to {len(codebook_sizes)})")
    if (codes < 0).any() or (codes >= np.array(codebook_sizes[: shape[1]])).any():
        raise ValueError(f"{name}: a code is negative or not below its codebook's size ({max(codebook_sizes)})")
