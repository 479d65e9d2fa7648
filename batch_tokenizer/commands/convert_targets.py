"""Where ``convert`` puts rows: token files with a manifest of them, shards, shards with the index of Megatron-Energon,
or a Lhotse Shar folder. The index and the Shar folder are made by their own libraries."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import numpy.typing as npt

from batch_tokenizer.records import RUN_INFO_FIELDS, RowError, RunError, Sink, first_line
from batch_tokenizer.runs.stored_rows import StoredRow
from batch_tokenizer.sources.finishing import output_path
from batch_tokenizer.storage.json_lines import json_lines_writer
from batch_tokenizer.storage.names import HIDDEN_STATES_ENDING
from batch_tokenizer.storage.row_info import other_names, split_info
from batch_tokenizer.writers.row_encoding import EncodedRow, npy_bytes
from batch_tokenizer.writers.shard_sink import MOST_ROWS, OpenShard, ShardForm, shard_form

ToBytes = Callable[[npt.NDArray[np.uint16], Mapping[str, Any]], bytes]

#: Of what a run says of its rows alike, what all rows of a shard or stream must have in common.
_MUST_AGREE = (
    "codec", "fingerprint", "sample_rate", "frame_rate", "codebook_sizes",
    "loudness", "attention_window", "window_merge", "hidden_states", "other_audio",
)  # fmt: skip

#: Cuts of a shard of Shar.
_SHARD_ROWS = 1000

#: Fields of rows that a supervision has.
_OF_SUPERVISION = ("text", "speaker", "language", "gender")

#: Energon's names of the parts of a split.
_SPLIT_NAMES = ("train", "val", "test")

#: Samples as they are, for a task encoder of the user's with a cooker of its own.
_DATASET = "__module__: megatron.energon\n__class__: CrudeWebdataset\n"


class Target(Protocol):
    """Where converted rows go."""

    def add(self, row: StoredRow) -> None:
        """One more row.

        Raises:
            RowError: it cannot be stored.
            RunError: it does not go with those before it.
        """

    def finish(self) -> None:
        """Write what comes last."""


class FileTarget:
    """A token file a row, in two levels of folders, an audio file beside it, and ``data.jsonl``.

    Args:
        folder: where they are written.
        out: where they will be, for the manifest's paths.
    """

    def __init__(
        self,
        folder: Path,
        out: Path,
        to_bytes: ToBytes,
        ending: str,
    ) -> None:
        self._folder = folder
        self._out = out
        self._to_bytes = to_bytes
        self._ending = ending
        self._manifest_file = (folder / "data.jsonl").open("wb")
        self._manifest = json_lines_writer(self._manifest_file)

    def add(self, row: StoredRow) -> None:
        codes = codes_of(row)
        fields, about = split_info(info_of(row, codes))
        encoded = EncodedRow(row.key, fields, about, codes, other_codes=row.other_codes)
        line: dict[str, Any] = {"key": row.key, **{name: value for name, value in fields.items() if name != "key"}}
        line.pop("reconstructed_wav", None)
        line["quantized_tokens"] = self._write(row.key, self._ending, self._to_bytes(codes, encoded.info_with_codes))
        if row.hidden_states is not None:
            self._write(row.key, f"{self._ending}{HIDDEN_STATES_ENDING}", npy_bytes(row.hidden_states))
        if row.audio is not None:
            line["reconstructed_wav"] = self._write(row.key, f".{row.audio_format}", row.audio)
        rate, samples = row.info.get("sample_rate"), row.info.get("num_samples")
        if isinstance(rate, int) and isinstance(samples, int) and rate > 0:
            line.setdefault("duration", round(samples / rate, 4))
        self._manifest.write(line)

    def _write(self, key: str, ending: str, content: bytes) -> str:
        path = Path(output_path(str(self._folder), key, ending))
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with path.open("xb") as stream:
                stream.write(content)
        except FileExistsError as error:
            raise RunError(f"row {key}: is there twice") from error
        return output_path(str(self._out), key, ending)

    def finish(self) -> None:
        self._manifest_file.close()


class ShardTarget:
    """Shards ``tokens-000000.tar`` and so on."""

    def __init__(self, folder: Path, form: Sink, most_bytes: int, codes_field: str) -> None:
        self._folder = folder
        self._kind = form
        self._codes_field = codes_field
        self._most_bytes = most_bytes
        self._common = Common()
        self._form: ShardForm | None = None
        self._has_audio = False
        self._shard: OpenShard | None = None
        self._stream: BinaryIO | None = None
        self._num_shards = self._num_rows = 0

    def add(self, row: StoredRow) -> None:
        codes = row.codes
        self._common.check(row)
        if self._form is None:
            self._has_audio = row.audio is not None
            width = None if codes is None else codes.shape[1]
            if self._codes_field in other_names(self._common.fields):
                raise RunError(f"--codes_field {self._codes_field}: other codes of the rows have this name")
            self._form = shard_form(self._kind, self._common.fields, width, self._has_audio, self._codes_field)
        if self._kind == "jsonl" and codes is None:
            raise RunError(f"row {row.key}: has no tokens")
        for what, content in (("audio", row.audio), ("hidden states", row.hidden_states)):
            if self._kind == "jsonl" and content is not None:
                raise RunError(f"row {row.key}: has {what}, which JSON lines do not hold: give --tokens_only")
        if (row.info.get("hidden_states") is True) != (row.hidden_states is not None):
            raise RunError(f"row {row.key}: its hidden states are gone: --tokens_only leaves all of them behind")
        if (row.audio is not None) != self._has_audio:
            raise RunError(
                f"row {row.key}: {'has' if row.audio is not None else 'has no'} audio, unlike those before it: "
                "--tokens_only leaves audio behind"
            )
        fields, about = split_info({**row.info, "key": row.key} if codes is None else info_of(row, codes))
        encoded = self._form.encode(
            EncodedRow(row.key, fields, about, codes, row.audio, row.audio_format, row.hidden_states, row.other_codes)
        )
        if self._shard is None:
            self._stream = (self._folder / f"tokens-{self._num_shards:06d}.{self._form.suffix}").open("xb")
            self._shard = self._form.open(self._stream)
            self._num_shards += 1
        self._shard.append(encoded)
        self._num_rows += 1
        if self._shard.num_bytes >= self._most_bytes or self._num_rows >= MOST_ROWS:
            self._close()

    def finish(self) -> None:
        if self._shard is not None:
            self._close()

    def _close(self) -> None:
        assert self._shard is not None
        assert self._stream is not None
        self._shard.finish()
        self._stream.close()
        self._shard = None
        self._num_rows = 0


class EnergonTarget(ShardTarget):
    """Shards ``tokens-000000.tar`` and so on, and ``.nv-meta`` with their index.

    Args:
        shares: of ``train``, ``val`` and ``test``, among which Energon divides whole shards; all are ``train`` where
            there are none.
    """

    def __init__(self, folder: Path, most_bytes: int, codes_field: str, shares: Sequence[float], seed: int) -> None:
        super().__init__(folder, "tar", most_bytes, codes_field)
        self._preparator = _preparator()
        self._parts = list(zip(_SPLIT_NAMES, shares or (1.0,), strict=False))
        self._seed = seed

    def finish(self) -> None:
        super().finish()
        self._preparator(self._folder, self._parts, self._seed)


def _preparator() -> Any:
    try:
        from megatron.energon.epathlib import EPath
        from megatron.energon.flavors.webdataset.prepare import WebdatasetPreparator
    except ImportError as error:
        raise RunError(
            f"--to energon needs megatron-energon: pip install megatron-energon ({first_line(error)})"
        ) from error

    def prepare(folder: Path, parts: list[tuple[str, float]], seed: int) -> None:
        names = sorted(path.name for path in folder.glob("*.tar"))
        if names:
            WebdatasetPreparator.prepare_dataset(
                EPath(str(folder)),
                names,
                split_parts_ratio=parts,
                shuffle_seed=seed if len(parts) > 1 else None,
                workers=2,
            )
            (folder / ".nv-meta" / "dataset.yaml").write_text(_DATASET)

    return prepare


class SharTarget:
    """Cuts in ``cuts.000000.jsonl.gz``, their codes as a ``TemporalArray`` in ``codes.000000.tar``, and
    ``recording.000000.tar`` where rows have audio."""

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


@dataclass(slots=True)
class Common:
    """What all rows of a shard or stream have in common.

    Attributes:
        fields: of the first row, those that a run says of all its rows.
    """

    fields: dict[str, Any] = field(default_factory=dict)
    width: int | None = None
    _first: str | None = None

    def check(self, row: StoredRow) -> None:
        """
        Raises:
            RunError: the row is of another codec, or has another number of codebooks.
        """
        width = None if row.codes is None else row.codes.shape[1]
        if self._first is None:
            self._first, self.width = row.key, width
            self.fields = {name: row.info[name] for name in RUN_INFO_FIELDS if name in row.info}
            return
        if width != self.width:
            raise RunError(
                f"row {row.key}: has {width or 'no'} codebooks, row {self._first} has {self.width or 'none'}: "
                "convert them apart"
            )
        for name in _MUST_AGREE:
            if row.info.get(name) != self.fields.get(name):
                raise RunError(
                    f"row {row.key}: {name} {row.info.get(name)}, row {self._first} has {self.fields.get(name)}: "
                    "convert them apart"
                )


def codes_of(row: StoredRow) -> npt.NDArray[np.uint16]:
    """The codes (T, K) of a row.

    Raises:
        RunError: it has none.
    """
    if row.codes is None:
        raise RunError(f"row {row.key}: has no tokens")
    return row.codes


def info_of(row: StoredRow, codes: npt.NDArray[np.uint16]) -> dict[str, Any]:
    """What is known of a row, with its own key and the shape of its codes."""
    return {**row.info, "key": row.key, "num_frames": codes.shape[0], "num_quantizers": codes.shape[1]}
