"""The main job as users run it: manifest to tokens to audio, alone and under torchrun, against known answers."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import soundfile
from huggingface_hub import constants
from safetensors.numpy import load_file

import batch_tokenizer as package
from batch_tokenizer.audio.loading import load_samples
from batch_tokenizer.cli import main
from tests.support.checkpoints import write_mimo_checkpoint
from tests.support.command import (
    ROOT,
    batch_tokenizer,
    contents,
    environment,
    failures,
    output_row,
    run_here,
    write_manifest,
)


def samples_of(path):
    samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    assert rate == 24000
    assert soundfile.info(path).subtype == "PCM_16"
    return samples[:, 0]


@pytest.fixture(scope="module")
def golden(golden_root, tmp_path_factory):
    """The golden utterances as 32-bit float wav files, and their known answers."""
    folder = tmp_path_factory.mktemp("golden")
    expected = load_file(golden_root / "mimo_tiny" / "expected.safetensors")
    for index in range(10):
        soundfile.write(folder / f"{index}.wav", expected[f"{index}.wav"], 24000, subtype="FLOAT")
    return folder, golden_root / "mimo_tiny", expected


@pytest.mark.parametrize(
    ("batch_size", "n_q", "order", "front_end"),
    [(1, None, 1, "auto"), (3, 8, -1, "host"), (64, 3, 1, "device")],
    ids=["alone", "batches of 3, reversed", "one batch, 3 codebooks, log-mel in the codec"],
)
def test_known_answers_through_the_command_line(golden, tmp_path, batch_size, n_q, order, front_end):
    wavs, model, expected = golden
    rows = [output_row(f"u{i}", wavs / f"{i}.wav", tmp_path / "deep/er") for i in range(10)][::order]
    manifest = write_manifest(tmp_path / "data.jsonl", rows)
    words = ["--model_path", model, "--data_list", manifest, "--task", "wav2token2wav", "--batch_size", batch_size]
    words += ["--front_end", front_end]
    words += ["--num_quantizers", n_q] if n_q else []
    done = run_here(*words)
    assert done.returncode == 0, done.stderr
    assert "10 rows done, 0 failed" in done.stdout
    used = n_q or 8
    for i in range(10):
        document = json.loads((tmp_path / f"deep/er/u{i}.json").read_text())
        assert np.array_equal(document["quantized_tokens"], expected[f"{i}.codes"][:, :used])
        assert document["info"]["num_samples"] == len(expected[f"{i}.wav"])
        assert document["info"]["sample_rate"] == 24000
        assert document["info"]["frame_rate"] == 25
        wav = samples_of(tmp_path / f"deep/er/u{i}.wav")
        answer = np.clip(expected[f"{i}.recon_nq{used}"], -1, 1)
        assert len(wav) == len(answer)
        assert np.abs(wav - answer).max() < 1e-5 + 1 / 32768


class TestTasks:
    """The three tasks on the sample clips with a small random checkpoint of unusual shape."""

    @pytest.fixture(scope="class")
    @classmethod
    def workplace(cls, tmp_path_factory):
        folder = tmp_path_factory.mktemp("tasks")
        write_mimo_checkpoint(folder / "model", encoder_causal=True, n_mels=80, encoder_attn_window_size=[30, -1])
        shutil.copytree(ROOT / "sample_data" / "clips", folder / "sample_data" / "clips")
        shutil.copy(ROOT / "sample_data" / "data.jsonl", folder)
        return folder

    def run(self, workplace, task, *words):
        done = run_here("--model_path", "model", "--data_list", "data.jsonl", "--task", task, *words, cwd=workplace)
        assert done.returncode == 0, done.stderr
        return done

    def test_two_steps_give_the_files_of_one(self, workplace):
        out = workplace / "sample_data" / "out"
        one = self.run(workplace, "wav2token2wav")
        assert "12 rows done, 0 failed" in one.stdout
        together = contents(out)
        assert len(together) == 24
        shutil.rmtree(out)
        self.run(workplace, "wav2token", "--batch_size", 1, "--num_workers", 0)
        self.run(workplace, "token2wav", "--batch_size", 5)
        assert contents(out) == together

    def test_fields_of_the_row_are_passed_through(self, workplace):
        rows = [json.loads(line) for line in (workplace / "data.jsonl").read_text().splitlines()]
        if not (workplace / rows[0]["quantized_tokens"]).exists():
            self.run(workplace, "wav2token")
        for row in rows:
            info = json.loads((workplace / row["quantized_tokens"]).read_text())["info"]
            assert {name: info[name] for name in row} == row
            assert not {"rank", "host", "time", "device"} & info.keys()


def test_resamplers_differ_and_reference_is_torchaudios(tmp_path):
    import torch
    import torchaudio

    rng = np.random.default_rng(0)
    soundfile.write(tmp_path / "a.wav", rng.normal(size=(8000, 2)) * 0.2, 16000, subtype="FLOAT")
    model = write_mimo_checkpoint(tmp_path / "model")
    tokens = {}
    for resampler in ("reference", "soxr"):
        row = output_row("a", tmp_path / "a.wav", tmp_path / resampler)
        manifest = write_manifest(tmp_path / f"{resampler}.jsonl", [row])
        done = run_here("--model_path", model, "--data_list", manifest, "--resampler", resampler, "--num_workers", 0)
        assert done.returncode == 0, done.stderr
        tokens[resampler] = json.loads((tmp_path / resampler / "a.json").read_text())["quantized_tokens"]
    channels = torch.from_numpy(soundfile.read(tmp_path / "a.wav", dtype="float32")[0].T.copy())
    wav = torchaudio.transforms.Resample(16000, 24000)(channels).mean(dim=0)
    tokenizer = package.load_model(model)
    mels, lengths = package.padding([package.mel_spectrogram(wav, tokenizer.config)])
    assert tokenizer.encode(mels, lengths)[0][0].tolist() == tokens["reference"]
    assert tokens["reference"] != tokens["soxr"]


def test_sixteen_bit_runs_say_so(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.random.default_rng(0).normal(size=9000) * 0.2, 24000)
    manifest = write_manifest(tmp_path / "data.jsonl", [output_row("a", tmp_path / "a.wav", tmp_path / "out")])
    model = write_mimo_checkpoint(tmp_path / "model")
    done = run_here(
        "--model_path", model, "--data_list", manifest, "--task", "wav2token2wav", "--dtype", "bfloat16",
        "--num_workers", 0,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "bfloat16" in done.stderr
    assert json.loads((tmp_path / "out" / "a.json").read_text())["info"]["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--data_list", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--data_list", "data.jsonl", "--task", "wav2wav"], "wav2wav"),
        (["--data_list", "data.jsonl", "--batch_size", "0"], "--batch_size 0"),
        (["--data_list", "data.jsonl", "--num_quantizers", "99"], "--num_quantizers 99"),
        (["--data_list", "data.jsonl", "--model_path", "./no/such/model"], "./no/such/model"),
        (["--data_list", "data.jsonl", "--attention", "flash_attn", "--device", "cpu"], "flash_attn"),
        (["--data_list", "data.jsonl", "--shard", "3"], "--shard 3"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_arguments_end_in_one_line_and_status_two(tmp_path, words, named):
    soundfile.write(tmp_path / "a.wav", np.zeros(9000), 24000)
    write_manifest(tmp_path / "data.jsonl", [output_row("a", tmp_path / "a.wav", tmp_path / "out")])
    done = run_here(*words, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert named in done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_a_hub_that_cannot_be_reached_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    soundfile.write(tmp_path / "a.wav", np.zeros(9000), 24000)
    manifest = write_manifest(tmp_path / "data.jsonl", [output_row("a", tmp_path / "a.wav", tmp_path / "out")])
    done = run_here("--data_list", manifest, "--model_path", "nobody/nothing")
    assert done.returncode == 1
    assert "nobody/nothing" in done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_nothing_failed_means_an_empty_failures_file(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.random.default_rng(0).normal(size=9000) * 0.2, 24000)
    manifest = write_manifest(tmp_path / "data.jsonl", [output_row("a", tmp_path / "a.wav", tmp_path / "out")])
    done = run_here("--data_list", manifest, "--run_dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert failures(tmp_path / "run") == {}
    assert "failures" not in done.stdout


def test_a_run_ends_with_its_outputs_and_one_with_nothing_to_do_keeps_the_figures(tmp_path, monkeypatch, capsys):
    """In one process, as a user with a folder of audio types it."""
    monkeypatch.chdir(tmp_path)
    for name in ("a", "sub/b"):
        (tmp_path / "audio" / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(tmp_path / "audio" / f"{name}.wav", np.random.default_rng(0).normal(size=24000) * 0.2, 24000)
    words = ["audio", "-o", "tokens", "--run_dir", "run", "--num_workers", "0", "--quiet"]
    assert main(words) == 0
    first, progress = capsys.readouterr()
    assert progress == ""
    lines = first.splitlines()
    assert lines[0] == "2 rows done, 0 failed, 0 to do"
    assert re.fullmatch(r"2 s of audio in [\d.]+ s, .* × real time; without .* of start-up .* × real time", lines[1])
    assert lines[3] == "outputs: in tokens, the first tokens/a.json"
    assert lines[-1] == "run folder: run"
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["rtf_after_startup"] < summary["rtf"]
    assert main(words) == 0
    assert capsys.readouterr().out.splitlines()[:2] == [lines[0], "nothing was left to do"]
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == summary


def test_the_quick_start_makes_speech_that_can_be_understood(tmp_path):
    stoi = pytest.importorskip("pystoi").stoi
    shutil.copytree(ROOT / "sample_data" / "clips", tmp_path / "sample_data" / "clips")
    shutil.copy(ROOT / "sample_data" / "data.jsonl", tmp_path / "sample_data")
    done = run_here("--data_list", "sample_data/data.jsonl", "--task", "wav2token2wav", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    scores = []
    for line in (tmp_path / "sample_data" / "data.jsonl").read_text().splitlines():
        row = json.loads(line)
        original = load_samples(str(tmp_path / row["wav"]), 24000)
        made = load_samples(str(tmp_path / row["reconstructed_wav"]), 24000)
        if len(original) > 24000:
            scores.append(stoi(original, made[: len(original)], 24000))
    assert len(scores) >= 10
    assert np.mean(scores) > 0.85  # 0.91 when this was written; noise of the same spectrum as speech has about 0.3


def test_accelerate_launch_starts_the_ranks_of_a_run(tmp_path):
    """``--multi_gpu`` is what accelerate chooses by itself where there are several GPUs; it is torchrun with other
    flags. What it starts is the console script, where the package is installed."""
    script = shutil.which("batch_tokenizer", path=os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"])
    program = [script] if script else ["-m", "batch_tokenizer"]
    model = write_mimo_checkpoint(tmp_path / "model")
    rows = []
    for number in range(4):
        wav = tmp_path / f"{number}.wav"
        soundfile.write(wav, np.random.default_rng(number).normal(size=6000) * 0.2, 24000)
        rows.append(output_row(str(number), wav, tmp_path / "out"))
    write_manifest(tmp_path / "data.jsonl", rows)
    launcher = [
        "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
        "--mixed_precision", "no", "--dynamo_backend", "no",
    ]  # fmt: skip
    words = ["--model_path", str(model), "--task", "wav2token2wav", "--num_workers", "0"]
    done = subprocess.run(
        [sys.executable, "-m", *launcher, *program, *words, "--device", "cpu"],
        capture_output=True, text=True, timeout=600, cwd=tmp_path, env=environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "rank 0 of 2 (torchrun)" in done.stderr
    assert "4 rows done, 0 failed" in done.stdout
    started = contents(tmp_path / "out")
    assert len(started) == 8
    shutil.rmtree(tmp_path / "out")
    alone = run_here(*words, "--run_dir", "alone", cwd=tmp_path)
    assert alone.returncode == 0, alone.stderr
    assert contents(tmp_path / "out") == started


def test_a_start_without_a_manifest_takes_one_line_and_one_entry_of_torchruns_report(tmp_path):
    done = batch_tokenizer("--task", "wav2token2wav", ranks=2, cwd=tmp_path)
    assert done.returncode == 1
    ours = [line for line in done.stderr.splitlines() if " ERROR " in line]
    assert len(ours) == 1
    reason = "no data.jsonl in the working directory: name the utterances with --data_list"
    assert ours[0].endswith(reason)
    assert f"traceback : {reason}" in done.stderr
    assert not list(tmp_path.iterdir())
