"""The bytes of token files and wav files."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from batch_tokenizer.records import RowError, TokenizedRow
from batch_tokenizer.writers import row_encoding
from batch_tokenizer.writers.file_sink import FileSink
from batch_tokenizer.writers.row_encoding import token_json, wav_bytes
from tests.support.loading import make_row

RUN_INFO = {"codec": "fake-24k", "sample_rate": 24000, "fingerprint": "feedface"}
CODES = np.array([[1, 65535], [3, 4], [5, 6]], np.uint16)


def result(codes: Any = CODES, samples: Any = None, **fields: Any) -> TokenizedRow:
    return TokenizedRow(make_row(**fields), codes, samples, 2880)


def info_of(**fields: Any) -> dict[str, Any]:
    return json.loads(token_json(result(**fields), RUN_INFO))["info"]


def test_token_file_layout() -> None:
    document = orjson.loads(token_json(result(wav="a.wav", text="щи"), RUN_INFO))
    assert list(document) == ["quantized_tokens", "info"]
    assert document["quantized_tokens"] == [[1, 65535], [3, 4], [5, 6]]
    assert document["info"] == {
        "key": "utterance 0",
        "wav": "a.wav",
        "text": "щи",
        **RUN_INFO,
        "num_samples": 2880,
        "num_frames": 3,
        "num_quantizers": 2,
    }


def test_a_view_of_more_codebooks_is_written_as_it_reads() -> None:
    assert orjson.loads(token_json(result(codes=CODES[:, 1:]), RUN_INFO))["quantized_tokens"] == [[65535], [4], [6]]


def test_the_rows_own_fields_of_our_names_are_kept_apart() -> None:
    info = info_of(codec="theirs", num_samples=7, manifest_row="odd", speaker=3)
    assert (info["codec"], info["num_samples"], info["speaker"]) == ("fake-24k", 2880, 3)
    assert info["manifest_row"] == {"codec": "theirs", "num_samples": 7, "manifest_row": "odd"}
    assert "manifest_row" not in info_of(speaker=3)


@pytest.mark.parametrize("value", [2**64, -(2**70), 1.5, None, {"a": [True, "\u0000"]}, "half \ud800 pair", 2**63])
def test_whatever_a_row_holds_is_written(value: object) -> None:
    assert info_of(odd=value)["odd"] == value


def test_deep_nesting_is_written_or_refused() -> None:
    deep: list[Any] = []
    for _ in range(500):
        deep = [deep]
    assert info_of(odd=deep)["odd"] == deep
    for _ in range(200_000):
        deep = [deep]
    with pytest.raises(RowError, match="nested too deeply"):
        info_of(odd=deep)


def test_wav_is_what_soundfile_reads() -> None:
    samples = np.arange(-32768, 32768, dtype=np.int16)
    content = wav_bytes(samples.astype(np.float32) / 32768, 24000)
    read, sample_rate = soundfile.read(io.BytesIO(content), dtype="int16")
    assert sample_rate == 24000
    assert soundfile.info(io.BytesIO(content)).subtype == "PCM_16"
    np.testing.assert_array_equal(read, samples)
    assert len(content) == 44 + 2 * 65536


def test_wav_rounds_to_nearest_and_clips() -> None:
    steps = np.array([0.5, 1.5, -0.5, -1.5, 2.4, -2.6, 40000, -40000, 32767.4, 1e30, -1e30], np.float32)
    read, _ = soundfile.read(io.BytesIO(wav_bytes(steps / 32768, 8000)), dtype="int16")
    assert read.tolist() == [0, 2, 0, -2, 2, -3, 32767, -32768, 32767, 32767, -32768]


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=20))
def test_wav_never_wraps(values: list[float]) -> None:
    samples = np.array(values, np.float32)
    read = np.frombuffer(wav_bytes(samples, 24000)[44:], "<i2")
    assert (np.abs(read / 32768 - np.clip(samples, -1, 1)) <= 1 / 32768).all()


def test_wav_leaves_its_input_alone() -> None:
    samples = np.array([0.25, 2.0], np.float32)
    wav_bytes(samples, 24000)
    assert samples.tolist() == [0.25, 2.0]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_samples_that_are_no_numbers_fail_the_row(bad: float) -> None:
    with pytest.raises(RowError, match=r"1 of 3 samples NaN or infinite") as raised:
        wav_bytes(np.array([0, bad, 0], np.float32), 24000)
    assert raised.value.stage == "decode"


def test_samples_beyond_a_wav_files_size_fail_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    endless = np.broadcast_to(np.float32(0), 2**31)
    with pytest.raises(RowError, match=r"24.9 hours of audio at 24000 Hz do not fit") as raised:
        wav_bytes(endless, 24000)
    assert raised.value.stage == "write"
    monkeypatch.setattr(row_encoding, "_MOST_DATA_BYTES", 8)
    assert len(wav_bytes(np.zeros(4, np.float32), 24000)) == 52
    with pytest.raises(RowError):
        wav_bytes(np.zeros(5, np.float32), 24000)


@pytest.mark.parametrize(
    ("task", "written"),
    [("wav2token", {"t.json"}), ("token2wav", {"r.wav"}), ("wav2token2wav", {"t.json", "r.wav"})],
)
def test_the_sink_publishes_what_the_task_makes(tmp_path: Path, task: Any, written: set[str]) -> None:
    fields = {"quantized_tokens": str(tmp_path / "t.json"), "reconstructed_wav": str(tmp_path / "r.wav")}
    row = result(samples=np.zeros(10, np.float32), **fields)
    FileSink(task, 24000, RUN_INFO).write(row)
    assert {path.name for path in tmp_path.iterdir()} == written
    if "t.json" in written:
        assert (tmp_path / "t.json").read_bytes() == token_json(row, RUN_INFO)
    if "r.wav" in written:
        assert soundfile.info(tmp_path / "r.wav").frames == 10


def test_the_sink_publishes_nothing_of_a_row_whose_audio_is_broken(tmp_path: Path) -> None:
    fields = {"quantized_tokens": str(tmp_path / "t.json"), "reconstructed_wav": str(tmp_path / "r.wav")}
    with pytest.raises(RowError):
        FileSink("wav2token2wav", 24000, RUN_INFO).write(result(samples=np.array([np.nan], np.float32), **fields))
    assert list(tmp_path.iterdir()) == []
