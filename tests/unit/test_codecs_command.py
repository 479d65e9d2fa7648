"""``batch_tokenizer codecs``: the list of families, and what is said about a checkpoint."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from batch_tokenizer.cli import main
from batch_tokenizer.codecs.checkpoint import Checkpoint
from batch_tokenizer.codecs.registry import FAMILIES
from batch_tokenizer.commands import codecs as codecs_command
from tests.support.checkpoints import TINY, write_mimo_checkpoint


def output(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    assert main(["codecs", *map(str, words)]) == 0
    return capsys.readouterr().out


def test_every_family_has_a_line_that_says_what_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    lines = output(capsys).splitlines()
    for name in FAMILIES:
        assert any(re.fullmatch(rf"  {name} +\S.{{10,}}", line) for line in lines), name


def test_libraries_have_a_version_or_a_remedy(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    libraries = {"here": (("absent-gpu", "numpy"), "a"), "gone": (("absent-gpu", "absent"), "b")}
    monkeypatch.setattr(codecs_command, "LIBRARIES", libraries)
    text = output(capsys)
    assert re.search(r"here +\d+\.\d+", text)
    assert re.search(r"gone +not installed: pip install 'batch_tokenizer\[b\]'", text)


def test_a_checkpoint_is_described_from_its_configuration_and_shapes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_mimo_checkpoint(tmp_path / "tiny")
    text = output(capsys, "--model_path", tmp_path / "tiny")
    count = sum(tensor.numel() for _, tensor in Checkpoint.open(str(tmp_path / "tiny")).tensors())
    for pattern in (
        "family +mimo",
        "sample rate +24,000 Hz",
        r"frame rate +25 Hz \(960 samples a frame\)",
        r"codebooks +5 \(1 x 32 \+ 4 x 16 codes\)",
        "longest audio +1,800.0 s",
        f"parameters +{count:,}",
        f"weights +{count * 4 / 2**20:.2f} MiB in float32, {count * 2 / 2**20:.2f} MiB in bfloat16",
        "fingerprint +[0-9a-f]{32}",
    ):
        assert re.search(pattern, text), pattern
    table = [line.split() for line in text.splitlines()[-TINY["num_quantizers"] :]]
    assert table[0] == ["1", "0.125", "5.0", "25.0"]
    assert table[4] == ["5", "0.525", "21.0", "125.0"]


def test_rates_of_an_encoder_and_a_decoder_that_differ(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    from tests.support.hf import save_checkpoint

    save_checkpoint(tmp_path, "neucodec")
    text = output(capsys, "--model_path", tmp_path)
    assert re.search("sample rate +16,000 Hz in, 24,000 Hz out", text)
    assert re.search(r"codebooks +1 \(64 codes\)", text)
    assert "no limit but memory" in text


def test_a_folder_that_is_no_checkpoint_is_one_line_and_status_2(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert main(["codecs", "--model_path", str(tmp_path)]) == 2
    assert "has no config.json" in caplog.text
