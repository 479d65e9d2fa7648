"""A codec spec without a codec, rows, and a load function that misbehaves as a row asks it to."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from batch_tokenizer.codecs.base import CodecInfo, CodecSpec
from batch_tokenizer.data import worker
from batch_tokenizer.records import LoadedRow, ManifestRow, RowError

INFO = CodecInfo(
    family="fake",
    name="fake-24k",
    sample_rate=24000,
    samples_per_frame=960,
    codebook_sizes=(1024, 128, 128),
    fingerprint="feedface",
    max_samples=24000 * 60,
)


@dataclass(frozen=True)
class FakeSpec(CodecSpec):
    """Its features are the samples."""

    info: CodecInfo = INFO

    def features(self, samples: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        return samples[None]

    def num_frames(self, num_samples: int) -> int:
        return -(-num_samples // self.info.samples_per_frame)

    def num_output_samples(self, num_frames: int) -> int:
        return num_frames * self.info.samples_per_frame


def make_row(line: int = 0, /, **fields: Any) -> ManifestRow:
    """A manifest row as the manifest would make it from ``fields``."""
    fields = {"key": f"utterance {line}", **fields}
    return ManifestRow(
        line,
        f"{line:016x}",
        fields["key"],
        fields.get("wav"),
        fields.get("quantized_tokens"),
        fields.get("reconstructed_wav"),
        fields,
    )


def store_half(loaded: LoadedRow, memory: memoryview, end: int) -> tuple[worker.Loaded, int]:
    """In place of ``worker._store``: copies some of a row, and kills the process."""
    memory[end : end + 100] = bytes(100)
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("killed")


def once(marker: str) -> bool:
    """True for the first who asks."""
    first = not Path(marker).exists()
    Path(marker).touch()
    return first


def misbehave(row: ManifestRow) -> LoadedRow:
    """Load ``samples`` (default 8) samples that equal the row's line, after doing what the row's field ``do`` says."""
    do, marker = row.fields.get("do"), row.fields.get("marker", "")
    if do in ("sleep", "hang in native code", "leave a mark") and marker:
        Path(marker).write_text(str(os.getpid()))
    if do == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if do == "die once" and once(marker):
        os.kill(os.getpid(), signal.SIGKILL)
    if do == "die while handing over" and once(marker):
        worker._store = store_half
    if do == "be too large":
        worker.MOST_ROW_BYTES = 0
    if do == "crash":
        ctypes.string_at(0)
    if do == "exit":
        os._exit(row.fields.get("status", 3))
    if do == "hang in native code":
        ctypes.PyDLL(None).sleep(3600)  # which keeps Python's lock
    if do == "sleep":
        time.sleep(row.fields.get("seconds", 3600))
    if do == "refuse":
        raise RowError("load", "refused")
    if do == "run out of memory":
        raise MemoryError
    if do == "lose the file server":
        raise OSError(5, "Input/output error", "some file")
    if do == "have a bug":
        raise KeyError("no such thing")
    samples = np.full((1, row.fields.get("samples", 8)), row.line, np.float32)
    return LoadedRow(row, samples, None, samples.size, 1, row.fields.get("load_seconds", 0.5))
