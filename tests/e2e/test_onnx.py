"""ONNX through the command line: export, check, info, and runs of the three tasks on each layout."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import soundfile

from batch_tokenizer.cli import main
from batch_tokenizer.codecs.checkpoint import Checkpoint
from batch_tokenizer.codecs.loading import LoadRequest
from batch_tokenizer.codecs.moss.codec import MossCodec, load_codec, open_spec
from tests.support.command import failures, output_row, write_manifest
from tests.support.moss import noise, tiny, write_moss_checkpoint
from tests.support.onnx_layouts import write_community, write_official

LENGTHS = (1, 640, 9001, 20000, 33000)
CONFIG = {"sampling_rate": 16000, "downsample_rate": 640, "quantizer_kwargs": {"codebook_size": 32}}


class World:
    """A checkpoint, its graphs in three layouts, and a manifest."""

    def __init__(self, root: Path) -> None:
        self.torch = write_moss_checkpoint(root / "torch")
        self.ours = root / "ours"
        assert main(["onnx", "export", "--model_path", str(self.torch), "--out", str(self.ours)]) == 0
        self.layouts = {
            "ours": self.ours,
            "community": write_community(self.ours, root / "community", books=5, config=CONFIG),
            "official": write_official(self.ours, root / "official", books=5, frame=640, config=tiny()),
        }
        self.wavs = {}
        for length in LENGTHS:
            path = root / f"{length}.wav"
            soundfile.write(path, noise(length, seed=length), 16000, subtype="FLOAT")
            self.wavs[f"u{length}"] = path
        checkpoint = Checkpoint.open(str(self.torch))
        self.reference: MossCodec = load_codec(LoadRequest(checkpoint, open_spec(checkpoint)))

    def manifest(self, folder: Path) -> Path:
        rows = [output_row(key, wav, folder / "out") for key, wav in self.wavs.items()]
        return write_manifest(folder / "data.jsonl", rows)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


def arguments(manifest: Path, model: Path, task: str, *more: str) -> list[str]:
    fixed = ["--data_list", str(manifest), "--model_path", str(model), "--task", task, "--device", "cpu"]
    return [*fixed, "--num_workers", "0", "--run_dir", str(manifest.parent / task), *more]


def tokens(folder: Path, key: str) -> tuple[np.ndarray, dict]:
    document = json.loads((folder / "out" / f"{key}.json").read_text())
    return np.array(document["quantized_tokens"]), document["info"]


@pytest.mark.parametrize("layout", ["community", "official"])
def test_published_layouts_run_all_tasks(world, tmp_path, layout):
    manifest = world.manifest(tmp_path)
    model = world.layouts[layout]
    assert main(arguments(manifest, model, "wav2token2wav", "--num_quantizers", "5", "--strict")) == 0
    for key, wav in world.wavs.items():
        codes, info = tokens(tmp_path, key)
        samples = noise(int(key[1:]), seed=int(key[1:]))
        expected = world.reference.encode([samples[None]], 5)[0]
        np.testing.assert_array_equal(codes, expected, err_msg=str(wav))
        assert info["codec"] == "moss_onnx"
        heard, rate = soundfile.read(tmp_path / "out" / f"{key}.wav", dtype="float32")
        assert rate == 16000
        np.testing.assert_allclose(heard, world.reference.decode([expected])[0].clip(-1, 1), rtol=0, atol=1e-3)
    verify = ["verify", "--data_list", str(manifest), "--model_path", str(model), "--workers", "1"]
    assert main([*verify, "--run_dir", str(tmp_path / "wav2token2wav")]) == 0
    audio = {key: (tmp_path / "out" / f"{key}.wav").read_bytes() for key in world.wavs}
    for key in world.wavs:
        (tmp_path / "out" / f"{key}.wav").unlink()
    assert main(arguments(manifest, model, "token2wav", "--strict")) == 0
    assert {key: (tmp_path / "out" / f"{key}.wav").read_bytes() for key in world.wavs} == audio


def test_our_graphs_and_the_torch_checkpoint_take_each_others_tokens(world, tmp_path):
    manifest = world.manifest(tmp_path)
    assert main(arguments(manifest, world.ours, "wav2token", "--num_quantizers", "3", "--strict")) == 0
    for key in world.wavs:
        codes, info = tokens(tmp_path, key)
        expected = world.reference.encode([noise(int(key[1:]), seed=int(key[1:]))[None]], 3)[0]
        np.testing.assert_array_equal(codes, expected)
        assert info["fingerprint"] == world.reference.info.fingerprint
    assert main(arguments(manifest, world.torch, "token2wav", "--strict")) == 0


def test_tokens_of_another_codec_are_refused(world, tmp_path):
    manifest = world.manifest(tmp_path)
    assert main(arguments(manifest, world.layouts["community"], "wav2token", "--strict")) == 0
    assert main(arguments(manifest, world.layouts["official"], "token2wav")) == 1
    reasons = {row["reason"] for row in failures(tmp_path / "token2wav").values()}
    assert len(reasons) == len(LENGTHS)
    assert all("fingerprint" in reason for reason in reasons)


def test_check_and_info(world, tmp_path, capsys):
    assert main(["onnx", "check", str(world.ours), "--model_path", str(world.torch)]) == 0
    said = capsys.readouterr().out
    for line in ("codes alone, 5 codebooks, against PyTorch: 100.000 % equal", "codes in a batch of 5, 1 codebooks",
                 "audio in steps against one pass: differs by at most", "all equal within the bounds"):  # fmt: skip
        assert line in said
    assert main(["onnx", "check", str(world.layouts["official"]), "--model_path", str(world.torch)]) == 0
    said = capsys.readouterr().out
    assert "audio alone, 2 codebooks, against PyTorch: differs by at most" in said
    assert "decoding in pieces with 20.0 s of context: differs from one pass by at most" in said
    assert main(["onnx", "info", str(world.layouts["official"])]) == 0
    said = capsys.readouterr().out
    for line in ("input n_quantizers int64 ()", "input audio_codes int64 (5, 1, frames)", "opset 18, producer pytorch",
                 "external decoder.data: 0."):  # fmt: skip
        assert line in said
    other = write_moss_checkpoint(tmp_path / "other", seed=5)
    assert main(["onnx", "check", str(world.ours), "--model_path", str(other)]) == 1
    assert "out of bounds" in capsys.readouterr().out


def test_errors_are_one_line_each(world, tmp_path, caplog):
    manifest = world.manifest(tmp_path)

    def message(*words: str) -> str:
        caplog.clear()
        assert main(list(words)) == 2
        (line,) = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
        assert "\n" not in line
        return line

    missing = shutil.copytree(world.layouts["official"], tmp_path / "missing")
    (missing / "encoder.data").unlink()
    assert "needs its weights in encoder.data" in message(*arguments(manifest, missing, "wav2token"))
    assert "needs its weights in encoder.data" in message("onnx", "check", str(missing))
    unknown = tmp_path / "unknown"
    unknown.mkdir()
    model = onnx.load(world.ours / "encoder.onnx")
    del model.metadata_props[:]
    onnx.save(model, unknown / "encoder.onnx")
    line = message(*arguments(manifest, unknown, "wav2token"))
    assert "is of no known layout; it is (audio float32 (batch, samples); lengths int64 (batch)" in line
    assert "no ONNX graph" in message("onnx", "info", str(tmp_path / "nothing"))
    assert "only MOSS" in message("onnx", "export", "--model_path", str(world.ours), "--out", str(tmp_path / "x"))


def test_a_provider_that_fails_to_load_is_one_line(world, tmp_path, caplog, monkeypatch):
    monkeypatch.setenv("BATCH_TOKENIZER_ONNX_PROVIDERS", "cuda")
    assert main(arguments(world.manifest(tmp_path), world.ours, "wav2token")) == 2
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert "CUDAExecutionProvider" in line
