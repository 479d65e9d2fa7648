"""A codec spec without a codec, rows, and a load function that misbehaves as a row asks it to."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import time
from collections.abc import Sequence
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


def make_row(line: int = 0, **fields: Any) -> ManifestRow:
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


def send_half(connection: socket.socket, parts: Sequence[memoryview]) -> None:
    """Sends the first half of a message, and kills the process."""
    message = b"".join(parts)
    connection.sendall(message[: len(message) // 2])
    os.kill(os.getpid(), signal.SIGKILL)


def misbehave(row: ManifestRow) -> LoadedRow:
    """Load ``samples`` (default 8) samples that equal the row's line, after doing what the row's field ``do`` says."""
    do, marker = row.fields.get("do"), row.fields.get("marker", "")
    if do == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if do == "die once" and not Path(marker).exists():
        Path(marker).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if do == "die at next answer":
        worker.send = send_half
    if do == "crash":
        ctypes.string_at(0)
    if do == "sleep":
        if marker:
            Path(marker).write_text(str(os.getpid()))
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
