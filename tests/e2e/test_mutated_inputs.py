"""Lines, token files and audio that a seed made wrong: each row is done, or fails by name for a clear reason."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from batch_tokenizer.cli import main
from tests.support.checkpoints import write_mimo_checkpoint
from tests.support.command import write_manifest
from tests.support.mutations import audio_bytes, manifest_lines, token_files

#: What no message of the program has.
TRACES = ("internal error", "Traceback", "Error(", "object has no attribute")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mimo_checkpoint(tmp_path_factory.mktemp("model"))


def run(folder: Path, manifest: Path, task: str, model: Path) -> tuple[dict[str, int], list[dict[str, Any]]]:
    """A run's summary, and its failures."""
    run_dir = folder / "run"
    words = ["--data_list", str(manifest), "--task", task, "--model_path", str(model), "--run_dir", str(run_dir)]
    status = main([*words, "--num_workers", "1", "--device", "cpu", "--dtype", "float32"])
    summary = json.loads((run_dir / "summary.json").read_text())
    failed = [json.loads(line) for line in (run_dir / "failures.jsonl").read_bytes().splitlines()]
    assert status == (1 if not summary["done"] else 0)
    for failure in failed:
        assert not any(trace in failure["reason"] for trace in TRACES), failure
        assert len(failure["reason"]) < 12_000, failure["reason"][:300]  # names of 10,000 characters are whole
    return summary, failed


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows name outputs by relative paths, too."""
    (tmp_path / "work" / "inner").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work" / "inner")


def check_manifest_lines(folder: Path, model: Path, count: int, seed: int) -> None:
    """Every line that is not blank is one row, done or failed; those that are done have the samples that they name."""
    wav = folder / "good.wav"
    soundfile.write(wav, np.random.default_rng(0).normal(0, 0.1, 24000), 24000)
    lines = list(manifest_lines(count, seed, str(wav), str(folder / "out")))
    good = {"key": "good", "wav": str(wav), "quantized_tokens": str(folder / "out" / "good.json")}
    manifest = write_manifest(folder / "data.jsonl", [good, *lines])
    summary, failed = run(folder, manifest, "wav2token", model)
    rows = sum(bool(line.strip()) for line in lines) + 1
    assert summary["done"] + summary["failed"] == rows
    assert len(failed) == summary["failed"]
    assert (folder / "out" / "good.json").is_file()


def check_token_files(folder: Path, model: Path, count: int, seed: int) -> None:
    """Files that are done had codes that the codec has; all others are failed by name."""
    files = list(token_files(count, seed, (32, 16, 16, 16, 16), {"codec": "mimo", "num_samples": 3000}))
    rows = []
    for number, (ending, content) in enumerate(files):
        path = folder / f"{number}{ending}"
        path.write_bytes(content)
        out = str(folder / "out" / f"{number}.wav")
        rows.append({"key": f"{number}{ending}", "quantized_tokens": str(path), "reconstructed_wav": out})
    summary, failed = run(folder, write_manifest(folder / "data.jsonl", rows), "token2wav", model)
    assert summary["done"] + summary["failed"] == count
    for failure in failed:
        assert failure["key"] in failure["reason"], failure
    assert summary["failed"] > count / 3


def check_audio_files(folder: Path, model: Path, count: int, seed: int) -> None:
    """Audio of several formats with bytes changed."""
    sources = []
    samples = np.random.default_rng(0).normal(0, 0.1, 12000)
    for name in ("a.wav", "a.flac", "a.ogg", "a.mp3", "a.aiff", "a.w64", "a.caf"):
        soundfile.write(folder / name, samples, 24000)
        sources.append(folder / name)
    if shutil.which("ffmpeg") is not None:
        for name in ("b.m4a", "b.opus", "b.webm", "b.mp4", "b.wma", "b.ac3"):
            command = ["ffmpeg", "-v", "error", "-nostdin", "-y", "-i", str(folder / "a.wav"), str(folder / name)]
            if subprocess.run(command, check=False, timeout=100).returncode == 0:
                sources.append(folder / name)
    rows = []
    for number in range(count):
        source = sources[number % len(sources)]
        path = folder / f"{number}{source.suffix}"
        path.write_bytes(audio_bytes(seed + number, source.read_bytes()))
        row = {"key": path.name, "wav": str(path), "quantized_tokens": str(folder / "out" / f"{number}.json")}
        rows.append({**row, "start": 0.2, "end": 0.4} if number % 5 == 4 else row)
    summary, failed = run(folder, write_manifest(folder / "data.jsonl", rows), "wav2token", model)
    assert summary["done"] + summary["failed"] == count
    for failure in failed:
        assert failure["key"] in failure["reason"], failure


def test_manifest_lines(tmp_path: Path, model: Path) -> None:
    check_manifest_lines(tmp_path, model, 80, seed=1)


def test_token_files(tmp_path: Path, model: Path) -> None:
    check_token_files(tmp_path, model, 69, seed=1)


def test_audio_files(tmp_path: Path, model: Path) -> None:
    check_audio_files(tmp_path, model, 52, seed=1)
