"""``launch/train_default.sh`` from unpacked packages to a model card, at the smallest size."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import soundfile

from batch_tokenizer.cli import main
from batch_tokenizer.training.__main__ import main as train
from tests.support.checkpoints import TINY
from tests.support.command import ROOT


def script(name: str) -> ModuleType:
    """A module of ``launch/``, which is no part of the package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "launch" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses and the other script look for it
    spec.loader.exec_module(module)
    return module


def write_tone(path: Path, seconds: float, pitch: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    time = np.arange(int(seconds * 16000)) / 16000
    wave = 0.2 * np.sin(2 * np.pi * pitch * time) * (1 + np.sin(2 * np.pi * 4 * time))
    soundfile.write(path, wave.astype(np.float32), 16000)


def test_manifests_training_scores_and_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps of the script after unpacking, in this process."""
    unpacked = tmp_path / "unpacked"
    for number in range(20):
        write_tone(unpacked / "festvox-ru" / "wav" / f"{number:02}.wav", 2.2 if number == 19 else 0.6, 110 + 5 * number)
    write_tone(unpacked / "tuxpaint-stamps-default" / "cat_desc_ro.wav", 2.2, 150)
    write_tone(unpacked / "tuxpaint-stamps-default" / "cat_desc_fr.wav", 2.2, 150)  # of a language that is not used
    config = {**TINY, "num_quantizers": 20, "codebook_size": [8], "encoder_attn_window_size": [8, 8]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setenv("PACKAGES", "festvox-ru tuxpaint-stamps-default")
    monkeypatch.setenv("CLIPS", "1")
    monkeypatch.setattr(sys, "argv", ["script", str(tmp_path)])
    script("speech_manifests").main()
    words = ["--data", f"{tmp_path}/train.jsonl", "--held_out", f"{tmp_path}/heard.jsonl", "--out", f"{tmp_path}/run"]
    words += ["--config", f"{tmp_path}/config.json", "--steps", "2", "--batch_size", "1", "--token_frames", "8"]
    assert train([*words, "--num_workers", "0", "--device", "cpu"]) == 0
    words = ["--data_list", f"{tmp_path}/scored.jsonl", "--model_path", f"{tmp_path}/run/checkpoint", "--by", "voice"]
    words += ["--num_quantizers", "4", "8", "20", "--metrics", "level_change", "--out", f"{tmp_path}/scores"]
    assert main(["evaluate", *words, "--device", "cpu", "--workers", "1"]) == 0
    script("model_card").main()
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert len(rows) == 19
    assert {row["source"] for row in rows} == {"festvox-ru"}
    steps = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert steps[0]["step"] == 2
    card = (tmp_path / "run" / "checkpoint" / "README.md").read_text()
    assert "| never heard: tuxpaint_ro | 1 | 20 |" in card
    assert "| heard: shmyrev | 1 | 20 |" in card
    assert "| **all never heard** | 1 | 20 |" in card
    assert "| `festvox-ru` | 19 | 0.00 | BSD-like |" in card
    licence = (tmp_path / "run" / "checkpoint" / "LICENSE").read_text()
    assert "CC-BY-SA-4.0" in licence
    assert "Nickolay V. Shmyrev" in licence


def test_recordings_to_learn_from_allow_the_licence_of_the_weights() -> None:
    packages = script("speech_manifests").PACKAGES
    learned = {name: package for name, package in packages.items() if package.learn}
    allowed = {"BSD-like", "BSD-2-Clause-like", "CC-BY-3.0", "CC-BY-SA-3.0", "CC-BY-SA-3.0-IT"}
    assert {package.licence for package in learned.values()} <= allowed
    assert not {"cs", "nl"} & {package.language for package in learned.values()}
    assert {"cs", "nl"} <= {package.language for package in packages.values()}
    assert all(package.credit for package in packages.values())
    assert not {package.voice for package in learned.values()} & {p.voice for p in packages.values() if not p.learn}
