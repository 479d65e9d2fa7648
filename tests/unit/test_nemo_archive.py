"""NeMo's archives: the same codec as the folder that they were made of, and one line for one that is damaged."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from batch_tokenizer.codecs.checkpoint import Checkpoint
from batch_tokenizer.codecs.opening import open_codec, open_spec
from batch_tokenizer.records import RunError
from tests.support.padded_codecs import write_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("nanocodec"), "nanocodec")


def config_of(folder: Path) -> dict[str, Any]:
    """As NeMo has it: with keys for training, and references."""
    config = json.loads((folder / "config.json").read_text())
    return {
        **config,
        "_target_": "nemo.collections.tts.models.AudioCodecModel",
        "name": "EnCodec",
        "rate": config["sample_rate"],
        "sample_rate": "${rate}",
        "optim": {"lr": 2e-4, "sched": {"max_steps": "${trainer.max_steps}"}},
        "audio_encoder": {**config["audio_encoder"], "_target_": "nemo.HiFiGANEncoder"},
    }


def weights_of(folder: Path) -> bytes:
    stream = io.BytesIO()
    torch.save({**load_file(folder / "model.safetensors"), "discriminator.weight": torch.zeros(3)}, stream)
    return stream.getvalue()


def write_archive(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


@pytest.mark.parametrize("mode", ["w", "w:gz"])
@pytest.mark.parametrize("prefix", ["", "./"])
def test_an_archive_is_the_codec_of_its_folder(folder, tmp_path, prefix, mode):
    members = {
        f"{prefix}model_config.yaml": yaml.safe_dump(config_of(folder)).encode(),
        f"{prefix}model_weights.ckpt": weights_of(folder),
    }
    archive = write_archive(tmp_path / "codec.nemo", members, mode)
    samples = np.random.default_rng(0).normal(0, 0.3, 3001).astype(np.float32)
    wanted = open_codec(str(folder), "cpu")
    for place in (archive, tmp_path):  # the file itself, and a folder that has no other
        codec = open_codec(str(place), "cpu")
        assert (codec.info.family, codec.info.sample_rate) == ("nanocodec", wanted.info.sample_rate)
        [codes] = codec.encode([codec.spec.features(samples)])
        np.testing.assert_array_equal(codes, wanted.encode([wanted.spec.features(samples)])[0])
        np.testing.assert_array_equal(codec.decode([codes])[0], wanted.decode([codes])[0])
    assert Checkpoint.open(str(archive)).name == "codec"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_config.yaml": None}, "has no file model_config.yaml"),
        ({"model_weights.ckpt": None}, "has no file model_weights.ckpt"),
        ({"model_config.yaml": b"a: [1"}, "model_config.yaml cannot be read"),
        ({"model_config.yaml": b"\xff\xfe\x00"}, "model_config.yaml cannot be read"),
        ({"model_config.yaml": b"- 1\n"}, "must hold a mapping"),
        ({"model_config.yaml": b"a: &x [1]\nb: *x\n"}, "has aliases"),
        ({"model_config.yaml": b"a: " + b"[" * 1500}, "nested too deeply|cannot be read"),
        ({"model_config.yaml": b"#" * (1 << 21)}, "at most 1,048,576 are read"),
        ({"model_config.yaml": b"a: !!python/object/apply:os.system ['true']\n"}, "cannot be read"),
        ({"model_weights.ckpt": b"no weights"}, "cannot be read as torch weights"),
    ],
)
def test_what_is_no_archive_is_one_line(folder, tmp_path, changes, words):
    members = {
        "model_config.yaml": yaml.safe_dump(config_of(folder)).encode(),
        "model_weights.ckpt": weights_of(folder),
    }
    kept = {name: content for name, content in {**members, **changes}.items() if content is not None}
    archive = write_archive(tmp_path / "codec.nemo", kept)
    with pytest.raises(RunError, match=words) as caught:
        open_spec(str(archive))
    assert "\n" not in str(caught.value)


def test_a_truncated_archive_is_one_line(folder, tmp_path):
    content = {
        "model_config.yaml": yaml.safe_dump(config_of(folder)).encode(),
        "model_weights.ckpt": weights_of(folder),
    }
    archive = write_archive(tmp_path / "codec.nemo", content)
    for length in (0, 100, 3000, len(archive.read_bytes()) // 2):
        (tmp_path / "short.nemo").write_bytes(archive.read_bytes()[:length])
        with pytest.raises(RunError, match=r"short\.nemo"):
            open_spec(str(tmp_path / "short.nemo"))
