"""Checkpoints that somebody damaged or made up end in one line that names them, at once and with little memory.

``tests/measure/hostile_checkpoints.py`` tries all of the faults; here are some of each family's, drawn by a seed.
"""

from __future__ import annotations

import io
import json
import math
import random
import re
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from batch_tokenizer.codecs.checkpoint import Checkpoint
from batch_tokenizer.codecs.nemo_archive import open_archive_weights, read_archive_config
from batch_tokenizer.codecs.opening import CodecSetup
from batch_tokenizer.records import RunError
from tests.support import padded_codecs
from tests.support.checkpoints import write_mimo_checkpoint
from tests.support.families import write
from tests.support.hostile_checkpoints import copied, faults, tensor_faults

FAULTS_OF_A_FAMILY = 16


def load(folder: Path) -> None:
    """Opens a checkpoint and loads its encoder, on a CPU with torch's thread count left alone."""
    CodecSetup.open(Checkpoint.open(str(folder)), device="cpu", threads=1).load("wav2token")


def refusal(folder: Path) -> str:
    """The line with which a checkpoint is refused."""
    with pytest.raises(RunError) as refused:
        load(folder)
    return str(refused.value)


@pytest.mark.parametrize(
    "family", ["mimo", "moss", "qwen3_tts", "s3tokenizer", "snac", "nanocodec", "wavtokenizer", "dac", "mimi"]
)
def test_faults_are_one_line(tmp_path: Path, family: str) -> None:
    source = write(family, tmp_path / "good")
    load(source)
    found = list(faults(source))
    for number, (name, fault) in enumerate(random.Random(family).sample(found, FAULTS_OF_A_FAMILY)):
        folder = copied(source, tmp_path / f"hostile {number}")
        fault(folder)
        begun = time.process_time()
        try:
            load(folder)
        except RunError as error:
            text = str(error)
            assert folder.name in text, (name, text)
            assert "\n" not in text, (name, text)
            assert len(text) < 1500, (name, text)
        assert time.process_time() - begun < 10, name


@pytest.mark.parametrize(("name", "fault"), list(tensor_faults()))
def test_every_fault_of_weights_is_refused(tmp_path: Path, name: str, fault: Any) -> None:
    folder = padded_codecs.write_checkpoint(tmp_path / "hostile", "snac")
    fault(folder)
    text = refusal(folder)
    assert "hostile" in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("mimo", {"encoder_layers": 10_000_000}, r"encoder_layers = 10000000: must be above 0, and at most 1024"),
        ("mimo", {"num_quantizers": 10**400}, "num_quantizers = inf: must be int"),
        ("mimo", {"nfft": 1 << 30, "window_size": 1 << 30}, "window_size = 1073741824: must be above 0, and at most"),
        ("mimo", {"encoder_layers": 900}, "config.json implies a far larger model than the"),
        ("mimo", {"max_audio_seconds": float("inf")}, "max_audio_seconds = inf: must be above 0, and at most"),
        ("moss", {"downsample_rate": 10**12}, "downsample_rate = 1000000000000: must be a whole number"),
        ("s3tokenizer", {"n_audio_layer": 10**7}, "n_audio_layer = 10000000: must be a whole number above 0, and at"),
        ("s3tokenizer", {"name": ["speech_tokenizer_v1"]}, "is of no known family"),
        ("snac", {"vq_strides": [4096, 1]}, "vq_strides = .*: make 4097 codes a frame, at most 1024"),
        ("snac", {"encoder_dim": 1 << 17, "decoder_dim": 1 << 17, "latent_dim": None}, "implies a far larger model"),
        ("snac", {"onnx_graphs": [7]}, None),
        ("qwen3_tts", {"encoder_valid_num_quantizers": 10**9}, "encoder_valid_num_quantizers = 1000000000: must be"),
        ("wavtokenizer", {"decoder_num_layers": 10**7}, "decoder_num_layers = 10000000: must be a whole number"),
        ("dac", {"n_codebooks": 10**9}, "n_codebooks = 1000000000: must not be beyond"),
        ("dac", {"downsampling_ratios": [1 << 19] * 4}, "a frame has 7.55579e\\+22 samples, must have 1 to 262144"),
        ("dac", {"codebook_size": -1}, "config.json .*ValueError: the greatest codebook is -1, must be 1 to 65536"),
        ("mimi", {"num_hidden_layers": 10**7}, "num_hidden_layers = 10000000: must not be beyond"),
        ("mimi", {"num_hidden_layers": 10**6}, "implies a far larger model"),
    ],
)  # fmt: skip
def test_sizes_beyond_this_world_are_named(
    tmp_path: Path, family: str, changes: dict[str, Any], words: str | None
) -> None:
    folder = write(family, tmp_path / "hostile")
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    if words is None:
        load(folder)
        return
    with pytest.raises(RunError, match=words) as refused:
        load(folder)
    assert str(folder) in str(refused.value)


def test_a_hub_cache_has_links_and_is_no_fault(tmp_path: Path) -> None:
    folder = padded_codecs.write_checkpoint(tmp_path / "snapshot", "snac")
    (tmp_path / "blobs").mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).rename(tmp_path / "blobs" / name)
        (folder / name).symlink_to(f"../blobs/{name}")
    load(folder)
    (tmp_path / "blobs" / "model.safetensors").unlink()
    assert "has none of model.safetensors" in refusal(folder)


def test_weights_of_other_numbers_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = write_mimo_checkpoint(tmp_path / "hostile")
    tensors = load_file(folder / "model.safetensors")
    name = "encoder.conv1.weight"
    save_file({**tensors, name: tensors[name].to(torch.complex64)}, folder / "model.safetensors")
    assert f"{name} is of torch.complex64, must be of torch.float32" in refusal(folder)


@pytest.mark.parametrize("value", [math.nan, -math.inf])
@pytest.mark.parametrize("family", ["mimo", "moss", "s3tokenizer", "snac", "dac"])
def test_weights_that_are_no_finite_numbers_are_refused(tmp_path: Path, family: str, value: float) -> None:
    """Codes would come out of most models, and mean nothing."""
    from safetensors.torch import load_file, save_file

    path = write(family, tmp_path / "hostile") / "model.safetensors"
    tensors = load_file(path)
    name = next(key for key, tensor in sorted(tensors.items()) if "encoder" in key and tensor.ndim > 1)
    tensors[name].view(-1)[-1] = value
    save_file(tensors, path, {"format": "pt"})
    assert re.search(r"hostile: .* has values that are NaN or infinite; download", refusal(path.parent))


def test_weights_beyond_a_number_format_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = write("mimo", tmp_path / "hostile") / "model.safetensors"
    tensors = load_file(path)
    tensors["encoder.conv1.weight"].view(-1)[0] = 70_000.0
    save_file(tensors, path)
    load(path.parent)
    checkpoint = Checkpoint.open(str(path.parent))
    with pytest.raises(RunError, match=r"encoder.conv1.weight has values that do not fit into torch.float16: choose"):
        CodecSetup.open(checkpoint, device="cpu", dtype="float16", threads=1).load("wav2token")


def test_damaged_archives_of_nemo_are_refused(tmp_path: Path) -> None:
    """Bytes changed in a compressed archive; zlib's own error is one in a thousand of what they lead to."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name, content in (
            ("./model_config.yaml", b"sample_rate: 16000\n" * 30),
            ("./model_weights.ckpt", random.Random(0).randbytes(20_000)),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    path = tmp_path / "hostile.nemo"
    for seed in range(300):
        draw = random.Random(seed)
        content = bytearray(packed.getvalue())
        for _ in range(draw.choice((1, 3))):
            content[draw.randrange(draw.choice((20, 600, len(content))))] = draw.randrange(256)
        path.write_bytes(content[: draw.choice((len(content), len(content), draw.randrange(len(content))))])
        try:
            read_archive_config(path)
            with open_archive_weights(path) as weights:
                weights.read()
        except RunError as error:
            assert "hostile.nemo: " in str(error)  # noqa: PT017
