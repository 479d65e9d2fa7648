"""The files of ``../shared/field`` through the command line: each has the tokens of all of its samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from batch_tokenizer.cli import main
from tests.support.checkpoints import write_mimo_checkpoint
from tests.support.command import write_manifest

FIELD = Path(__file__).resolve().parents[3] / "shared" / "field"

pytestmark = pytest.mark.skipif(not FIELD.is_dir(), reason=f"{FIELD} is not there")

#: Row by key: what it says beside its file, and its samples at 24 kHz.
ROWS: dict[str, tuple[str, dict[str, Any], int]] = {
    "mp3 in riff": ("mp3_vbr_in.wav", {}, 194_400),
    "gsm": ("gsm_odd.wav", {}, 75_840),
    "gsm part": ("gsm_odd.wav", {"start": 0.5, "end": 1.5}, 24_000),
    "m4a": ("m4a_tail.m4a", {}, 75_790),
    "m4a from 0": ("m4a_tail.m4a", {"start": 0}, 75_790),
    "m4a from 2": ("m4a_tail.m4a", {"start": 2.0}, 27_790),
    "default stream": ("second_stream_default.mp4", {}, 75_790),
    "size 0": ("wav_size_0.wav", {}, 72_000),
    "stale size": ("wav_stale_size.wav", {}, 72_000),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mimo_checkpoint(tmp_path_factory.mktemp("model"))


def tokens(path: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(path.read_text())
    return result


def test_rows_of_the_field(tmp_path: Path, model: Path) -> None:
    names = {
        **ROWS,
        "header 0": ("opus_header_0.opus", {}, 0),
        "header 48000": ("opus_header_48000.opus", {}, 0),
        "stream 0": ("second_stream_default.mp4", {"audio_stream": 0}, 0),
    }
    rows = [
        {"key": key, "wav": str(FIELD / name), "quantized_tokens": str(tmp_path / f"{key}.json"), **more}
        for key, (name, more, _) in names.items()
    ]
    manifest = write_manifest(tmp_path / "data.jsonl", rows)
    words = ["--data_list", str(manifest), "--task", "wav2token", "--model_path", str(model), "--num_workers", "1"]
    assert main([*words, "--device", "cpu", "--strict"]) == 0
    found = {key: tokens(tmp_path / f"{key}.json") for key in names}
    assert {key: found[key]["info"]["num_samples"] for key in ROWS} == {
        key: samples for key, (_, _, samples) in ROWS.items()
    }
    assert found["header 0"]["quantized_tokens"] == found["header 48000"]["quantized_tokens"]
    assert found["default stream"]["quantized_tokens"] != found["stream 0"]["quantized_tokens"]


def test_keys_of_a_tar_keep_their_case(tmp_path: Path, model: Path) -> None:
    out = tmp_path / "out"
    words = ["--data_list", str(FIELD / "tar_capitals.tar"), "--task", "wav2token", "--output_dir", str(out)]
    assert main([*words, "--model_path", str(model), "--num_workers", "1", "--device", "cpu", "--strict"]) == 0
    names = [path.name for path in out.rglob("*.json") if "run" not in path.parent.name]
    for key in ("sw02001.A", "spk.X1", "spk.x1"):  # beside a digest, as file systems may not tell case
        assert any(name.startswith(key) for name in names), (key, names)
