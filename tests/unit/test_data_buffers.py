"""Memory shared with loader processes: what is written is read, whatever its size; large rows' memory is given back."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from batch_tokenizer.data import buffers as module
from batch_tokenizer.data.buffers import SharedBuffers
from batch_tokenizer.data.loader import Loader
from batch_tokenizer.records import LoadedRow
from tests.support.loading import make_row, misbehave


def no_memory_file() -> int:
    raise OSError(errno.ENOSYS, "Function not implemented")


def held_bytes(shared: SharedBuffers) -> int:
    return os.fstat(shared._descriptor).st_blocks * 512


def test_buffers_are_apart_and_take_memory_as_they_are_written() -> None:
    shared = SharedBuffers(3)
    assert held_bytes(shared) == 0
    for buffer in range(3):
        shared[buffer][1000:2000] = bytes([buffer]) * 1000
    assert [bytes(shared[buffer][999:2001]) for buffer in range(3)] == [
        b"\0" + bytes([buffer]) * 1000 + b"\0" for buffer in range(3)
    ]
    assert held_bytes(shared) <= 3 * 8192
    shared.close()


def test_memory_of_a_large_row_is_given_back() -> None:
    shared = SharedBuffers(2)
    data = np.random.default_rng(0).bytes(40_000_000)
    for _ in range(2):
        for buffer in range(2):
            shared[buffer][:40_000_000] = data
            assert shared[buffer][:40_000_000] == data
            shared.release(buffer, 40_000_000)
    assert held_bytes(shared) == 2 * module._KEPT_BYTES
    shared.close()


def test_without_memory_files_rows_pass_through_a_file(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setattr(module, "_memory_file", no_memory_file)
    monkeypatch.setattr(module.tempfile, "tempdir", str(tmp_path))
    rows = [make_row(line, samples=1 + line % 2 * 3_000_000) for line in range(12)]
    with Loader(misbehave, num_workers=2, rows_ahead=100, bytes_ahead=1 << 28, row_timeout=300) as loader:
        loader.submit(rows)
        for _ in rows:
            record = loader.next(timeout=300)
            assert isinstance(record, LoadedRow)
            assert record.features is not None
            assert record.features.shape == (1, 1 + record.row.line % 2 * 3_000_000)
            assert (record.features == record.row.line).all()
    assert f"loaded rows pass through a file in {tmp_path}, which is slower" in caplog.text
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


def test_a_full_disk_is_an_error_at_the_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(descriptor: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "_memory_file", no_memory_file)
    monkeypatch.setattr(module.os, "posix_fallocate", full)
    monkeypatch.setattr(module.tempfile, "tempdir", str(tmp_path))
    with pytest.raises(OSError, match=f"No space left on device: 2 MB in {tmp_path}"):
        SharedBuffers(2)
