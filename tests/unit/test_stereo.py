"""Two channels from the file to the model and back: loading, wav and flac, long rows, a run, verify and evaluate."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from batch_tokenizer.audio.loading import load_samples
from batch_tokenizer.cli import main
from batch_tokenizer.codecs.opening import open_codec
from batch_tokenizer.records import AudioCut
from batch_tokenizer.writers.open import audio_encoder
from batch_tokenizer.writers.row_encoding import wav_bytes
from tests.support.command import output_row, write_manifest
from tests.support.moss import tiny, write_moss_checkpoint

RATE = 8000


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.2, shape).astype(np.float32)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    config = tiny(sampling_rate=RATE, downsample_rate=320, number_channels=2, enable_channel_interleave=True)
    return write_moss_checkpoint(tmp_path_factory.mktemp("stereo"), config)


@pytest.mark.parametrize("resampler", ["reference", "soxr"])
@pytest.mark.parametrize("file_rate", [RATE, 11025])
def test_channels_of_a_file(tmp_path, resampler, file_rate):
    recorded = noise(3, 5000)
    path = tmp_path / "a.wav"

    def load(samples: np.ndarray, **more):
        soundfile.write(path, samples.T, file_rate, subtype="FLOAT")
        return load_samples(str(path), RATE, resampler, **more)

    separate = [load(channel) for channel in recorded]
    np.testing.assert_allclose(load(recorded[:2], channels=2), separate[:2], rtol=0, atol=1e-6)
    np.testing.assert_allclose(load(recorded, channels=2), separate[:2], rtol=0, atol=1e-6)
    np.testing.assert_array_equal(load(recorded[0], channels=2), [separate[0]] * 2)
    np.testing.assert_allclose(load(recorded, downmix="first"), separate[0], rtol=0, atol=1e-6)
    np.testing.assert_allclose(load(recorded), np.mean(separate, axis=0), rtol=0, atol=1e-5)
    whole = load(recorded, channels=2)
    tolerance = 1e-6 if resampler == "reference" else 2e-5
    part = load(recorded, channels=2, cut=AudioCut(0.1, 0.25))
    np.testing.assert_allclose(part, whole[:, 800:2000], rtol=0, atol=tolerance)
    named = load(recorded, channels=2, cut=AudioCut(0.1, 0.25, channel=1))
    np.testing.assert_allclose(named, [separate[1][800:2000]] * 2, rtol=0, atol=tolerance)


@pytest.mark.parametrize("encode", [wav_bytes, audio_encoder("flac")])
def test_files_of_two_channels(tmp_path, encode):
    samples = noise(2, 5001)
    (tmp_path / "a").write_bytes(encode(samples, RATE))
    read, rate = soundfile.read(tmp_path / "a", dtype="float32")
    assert (read.shape, rate) == ((5001, 2), RATE)
    np.testing.assert_allclose(read.T, samples, rtol=0, atol=1 / 65536 + 1e-7)
    single = encode(samples[0], RATE)
    (tmp_path / "b").write_bytes(single)
    np.testing.assert_array_equal(soundfile.read(tmp_path / "b", dtype="float32")[0], read[:, 0])


def corpus(folder: Path) -> list[dict]:
    rows = []
    for number, channels in enumerate((2, 1, 3)):
        wav = folder / f"{number}.wav"
        wav.parent.mkdir(parents=True, exist_ok=True)
        samples = noise(3000 + 700 * number, channels, seed=number)
        soundfile.write(wav, samples, RATE, subtype="FLOAT")
        rows.append(output_row(str(number), wav, folder / "out"))
    return rows


@pytest.mark.parametrize("flags", [
    (), ("--audio_format", "flac"), ("--long_audio", "stream", "--max_seconds", "0.1"),
    ("--long_audio", "segment", "--max_seconds", "0.16"),
], ids=["wav", "flac", "stream", "segment"])  # fmt: skip
def test_a_run_with_a_stereo_codec(checkpoint, tmp_path, flags, capsys):
    rows = corpus(tmp_path)
    manifest = write_manifest(tmp_path / "rows.jsonl", rows)
    words = ["--model_path", checkpoint, "--data_list", manifest, "--task", "wav2token2wav", "--num_workers", 0,
             "--device", "cpu", "--strict"]  # fmt: skip
    assert main([*map(str, words), *flags]) == 0
    codec = open_codec(str(checkpoint), "cpu")
    for row in rows:
        samples = load_samples(row["wav"], RATE, channels=2)
        written = json.loads(Path(row["quantized_tokens"]).read_text())
        assert written["info"]["channels"] == 2
        assert written["info"]["num_samples"] == samples.shape[1]
        read, rate = soundfile.read(row["reconstructed_wav"], dtype="float32")
        assert (read.shape[1], rate) == (2, RATE)
        if "segment" not in flags:
            (codes,) = codec.encode([codec.spec.features(samples)], 5)
            np.testing.assert_array_equal(written["quantized_tokens"], codes)
            np.testing.assert_allclose(read.T, codec.decode([codes])[0].clip(-1, 1), rtol=0, atol=1e-4)
        else:
            assert len(read) == samples.shape[1]
    assert main(["verify", "--data_list", str(manifest), "--model_path", str(checkpoint)]) == 0


def test_evaluate_and_inspect(checkpoint, tmp_path, capsys):
    rows = corpus(tmp_path)
    manifest = write_manifest(tmp_path / "rows.jsonl", rows)
    words = ["evaluate", "--model_path", checkpoint, "--data_list", manifest, "--metrics", "si_sdr", "--device", "cpu",
             "--out", tmp_path / "scores"]  # fmt: skip
    assert main([*map(str, words)]) == 0
    words = ["inspect", rows[0]["wav"], "--model_path", checkpoint, "--device", "cpu", "--out", tmp_path / "inspect",
             "--metrics", "si_sdr"]  # fmt: skip
    assert main([*map(str, words)]) == 0
    assert soundfile.info(tmp_path / "inspect" / "0.wav").channels == 2


@pytest.mark.parametrize("layout", ["ours", "community", "official"])
def test_a_stereo_model_is_not_exported(checkpoint, tmp_path, layout, caplog):
    pytest.importorskip("onnx")
    words = ["onnx", "export", "--model_path", checkpoint, "--out", tmp_path / "graphs", "--layout", layout]
    assert main([*map(str, words)]) == 2
    assert "only mono models are exported, this one has 2 channels" in caplog.text
    assert not (tmp_path / "graphs").exists()
