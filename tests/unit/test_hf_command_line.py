"""Mimi and DAC through the command, in all three tasks: tokens are those of the library, audio within a step of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

transformers = pytest.importorskip("transformers")

from batch_tokenizer.cli import main  # noqa: E402
from batch_tokenizer.writers.row_encoding import wav_bytes  # noqa: E402
from tests.support.command import output_row, run_here, write_manifest  # noqa: E402
from tests.support.hf import save_checkpoint  # noqa: E402

LENGTHS = (3001, 50, 777, 2400)


@pytest.fixture(autouse=True)
def same_number_of_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def library_results(model: Any, wav: Path) -> tuple[list[list[int]], bytes]:
    """Tokens (T, K), and the wav file that their decoding makes, by the library alone."""
    samples, rate = soundfile.read(wav, dtype="float32")
    with torch.inference_mode():
        codes = model.encode(torch.from_numpy(samples)[None, None]).audio_codes
        audio = model.decode(audio_codes=codes).audio_values
    return codes[0].T.tolist(), wav_bytes(audio.flatten().numpy(), rate)


@pytest.mark.parametrize(("name", "workers"), [("mimi", 1), ("dac", 0)])
def test_three_tasks(name: str, workers: int, tmp_path: Path) -> None:
    model = save_checkpoint(tmp_path / "model", name)
    generator = np.random.default_rng(0)
    rows = []
    for length in LENGTHS:
        wav = tmp_path / f"{length}.wav"
        soundfile.write(wav, generator.normal(0, 0.2, length), model.config.sampling_rate)
        rows.append(output_row(str(length), wav, tmp_path / "both"))
    words = ("--model_path", tmp_path / "model", "--device", "cpu", "--strict")
    manifest = write_manifest(tmp_path / "both.jsonl", rows)
    done = run_here(*words, "--data_list", manifest, "--task", "wav2token2wav", "--num_workers", workers)
    assert done.returncode == 0, done.stderr
    assert "batches: one by one" in done.stderr

    def run(task: str, rows: list[dict[str, Any]], *more: str) -> None:
        manifest = write_manifest(tmp_path / f"{task}.jsonl", rows)
        arguments = [*map(str, words), "--data_list", str(manifest), "--task", task, "--num_workers", "0", *more]
        assert main(arguments) == 0

    alone = [{**row, "quantized_tokens": str(tmp_path / "alone" / f"{row['key']}.json")} for row in rows]
    run("wav2token", alone, "--batch_size", "1")
    back = [{**row, "reconstructed_wav": str(tmp_path / "back" / f"{row['key']}.wav")} for row in alone]
    run("token2wav", back)
    for row, row_alone, row_back in zip(rows, alone, back, strict=True):
        tokens, wav = library_results(model, Path(row["wav"]))
        written = json.loads(Path(row["quantized_tokens"]).read_text())
        assert written["quantized_tokens"] == tokens
        assert written["info"]["codec"] == name
        assert json.loads(Path(row_alone["quantized_tokens"]).read_text())["quantized_tokens"] == tokens
        made = Path(row["reconstructed_wav"]).read_bytes()
        assert Path(row_back["reconstructed_wav"]).read_bytes() == made
        steps = [soundfile.read(BytesIO(audio), dtype="int16")[0].astype(int) for audio in (made, wav)]
        assert np.abs(steps[0] - steps[1]).max() <= 1  # a batch rounds sums in another order than the library


def test_stereo_file_and_fewer_codebooks(tmp_path: Path) -> None:
    """A file of two channels at another rate, through a model of two channels."""
    model = save_checkpoint(tmp_path / "model", "encodec_chunks")
    soundfile.write(tmp_path / "a.wav", np.random.default_rng(1).normal(0, 0.2, (5000, 2)), 48000)
    row = output_row("a", tmp_path / "a.wav", tmp_path)
    row["reconstructed_wav"] = str(tmp_path / "out.wav")
    manifest = write_manifest(tmp_path / "rows.jsonl", [row])
    words = ["--model_path", tmp_path / "model", "--data_list", manifest, "--task", "wav2token2wav", "--num_workers", 0]
    assert main([*map(str, words), "--num_quantizers", "3", "--device", "cpu", "--strict"]) == 0
    tokens = np.array(json.loads((tmp_path / "a.json").read_text())["quantized_tokens"])
    assert tokens.shape == (3 * 30 + 2, 3)  # 2500 samples at 24 kHz make three chunks, and two frames of overlap
    audio, rate = soundfile.read(tmp_path / "out.wav")
    assert (audio.ndim, len(audio), rate) == (1, 3 * 1152 + 80, model.config.sampling_rate)
