"""From a path to the samples that a codec takes, and the sample clips as a whole."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torchaudio

from batch_tokenizer.audio.decoding import probe_audio
from batch_tokenizer.audio.loading import load_samples
from batch_tokenizer.records import REQUIRED_FIELDS, RowError

ROOT = Path(__file__).resolve().parents[2]
ROWS = [json.loads(line) for line in (ROOT / "sample_data" / "data.jsonl").read_text("utf-8").splitlines()]


def noise(channels: int, samples: int) -> np.ndarray:
    return np.random.default_rng(samples).uniform(-0.5, 0.5, (channels, samples)).astype(np.float32)


@pytest.mark.parametrize("channels", [1, 2, 6])
@pytest.mark.parametrize("rate", [24000, 44100])
def test_each_channel_is_resampled_and_then_averaged(tmp_path: Path, channels: int, rate: int) -> None:
    samples = noise(channels, 5001)
    soundfile.write(tmp_path / "a.wav", samples.T, rate, subtype="FLOAT")
    published = torchaudio.transforms.Resample(rate, 24000)(torch.from_numpy(samples)).mean(0).numpy()
    loaded = load_samples(str(tmp_path / "a.wav"), 24000, "reference")
    assert loaded.flags.c_contiguous
    np.testing.assert_array_equal(loaded, published)


def test_soxr_gives_the_mean_too(tmp_path: Path) -> None:
    left = noise(1, 48000)
    soundfile.write(tmp_path / "a.wav", np.concatenate([left, -left]).T, 48000, subtype="FLOAT")
    np.testing.assert_allclose(load_samples(str(tmp_path / "a.wav"), 24000, "soxr"), 0, atol=1e-6)


def test_the_limit_counts_samples_at_the_codecs_rate(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", noise(1, 44100).T, 44100)
    path = str(tmp_path / "a.wav")
    assert load_samples(path, 24000, max_samples=24000).shape == (24000,)
    with pytest.raises(RowError, match="too long"):
        load_samples(path, 24000, max_samples=23999)
    # One sample over the limit that is less than half a sample at the file's own rate.
    soundfile.write(path, noise(1, 8001).T, 8000)
    with pytest.raises(RowError, match="too long"):
        load_samples(path, 24000, max_samples=24002)


def test_sum_that_overflows_is_a_failure(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.full((100, 2), 3e38), 24000, subtype="FLOAT")
    with pytest.raises(RowError, match="too large"):
        load_samples(str(tmp_path / "a.wav"), 24000)


@pytest.mark.parametrize("resampler", ["reference", "soxr"])
def test_one_sample_of_a_higher_rate(tmp_path: Path, resampler: str) -> None:
    soundfile.write(tmp_path / "a.wav", np.full(1, 0.5), 192000)
    assert len(load_samples(str(tmp_path / "a.wav"), 24000, resampler)) == 1


@pytest.mark.parametrize("row", ROWS, ids=[row["key"] for row in ROWS])
@pytest.mark.parametrize("resampler", ["reference", "soxr"])
def test_sample_clips_load_at_their_length(row: dict[str, str | float], resampler: str) -> None:
    samples = load_samples(str(ROOT / row["wav"]), 24000, resampler)
    # Lossy formats carry some tens of milliseconds of their encoder's.
    assert len(samples) / 24000 == pytest.approx(row["duration"], abs=0.06)
    assert 0.1 < np.abs(samples).max() <= 1
    np.testing.assert_array_equal(samples, load_samples(str(ROOT / row["wav"]), 24000, resampler))


def test_sample_manifest_is_whole_and_varied() -> None:
    assert all(isinstance(row[field], str) for row in ROWS for field in REQUIRED_FIELDS["wav2token2wav"])
    for field in ("key", "wav", "quantized_tokens", "reconstructed_wav"):
        assert len({row[field] for row in ROWS}) == len(ROWS)
    headers = [probe_audio(str(ROOT / row["wav"])) for row in ROWS]
    assert {header.channels for header in headers} == {1, 2, 6}
    assert {8000, 16000, 22050, 24000, 44100, 48000} <= {header.sample_rate for header in headers}
    assert {Path(row["wav"]).suffix for row in ROWS} == {".wav", ".flac", ".ogg", ".opus", ".mp3", ".m4a"}
    note = (ROOT / "sample_data" / "LICENCES.md").read_text("utf-8")
    clips = {f"clips/{path.name}" for path in (ROOT / "sample_data" / "clips").iterdir()}
    assert clips == {row["wav"].removeprefix("sample_data/") for row in ROWS}
    assert all(f"| `{clip}` |" in note for clip in clips)
