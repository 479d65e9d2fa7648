"""S3Tokenizer against its definition, its windows, the published graphs, and what is refused."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from batch_tokenizer.codecs.checkpoint import Checkpoint
from batch_tokenizer.codecs.loading import LoadRequest
from batch_tokenizer.codecs.registry import find_family
from batch_tokenizer.codecs.s3tokenizer.config import S3Config
from batch_tokenizer.records import RowError, RunError
from tests.support.s3tokenizer import (
    VERSIONS,
    codes,
    hidden_frames,
    random_tensors,
    tiny,
    write_s3_checkpoint,
    write_s3_graph,
)

LENGTHS = (1, 160, 201, 479, 640, 3999, 4000, 16123)


def noise(length: int) -> np.ndarray:
    return np.random.default_rng(length).normal(0, 0.2, length).astype(np.float32)


def open_codec(path, task: str = "wav2token", threads: int = 1):
    checkpoint = Checkpoint.open(str(path))
    family = find_family(checkpoint)
    return family.load_codec(LoadRequest(checkpoint, family.open_spec(checkpoint), task=task, threads=threads))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("capacity", ["auto", None, 64])
def test_equals_its_definition(version, capacity, tmp_path):
    tensors = random_tensors(version)
    codec = open_codec(write_s3_checkpoint(tmp_path, version, tensors))
    codec.model.capacity = capacity
    mels = [codec.spec.features(noise(length)) for length in LENGTHS]
    for length, mel, code in zip(LENGTHS, mels, codec.encode(mels, 1), strict=True):
        hidden = hidden_frames(tensors, version, torch.from_numpy(mel))
        torch.testing.assert_close(codec.model.hidden(torch.from_numpy(mel)).double(), hidden, rtol=0, atol=2e-5)
        assert code.dtype == np.uint16
        assert code.shape == (codec.spec.num_frames(length), 1)
        np.testing.assert_array_equal(code[:, 0], codes(tensors, version, hidden))


def test_long_audio_is_encoded_in_windows(tmp_path):
    tensors = random_tensors("v2")
    codec = open_codec(write_s3_checkpoint(tmp_path, "v2", tensors))
    mel = codec.spec.features(noise(16000 * 53))
    (code,) = codec.encode([mel], 1)
    (first, second) = (
        codes(tensors, "v2", hidden_frames(tensors, "v2", torch.from_numpy(part))).numpy()
        for part in (mel[:, :3000], mel[:, 2600:])
    )
    np.testing.assert_array_equal(code[:, 0], np.concatenate((first[:-50], second[50:])))
    codec.model.merge = "published"
    (published,) = codec.encode([mel], 1)
    np.testing.assert_array_equal(published, code[:1275])


@given(st.integers(1, 40000), st.sampled_from(sorted(VERSIONS)))
def test_complete_windows_make_every_token_once(mel_frames, version):
    config = S3Config.from_json(tiny(version))
    per_token = config.stride * 2
    windows = config.windows(mel_frames)
    tokens = [one.start // per_token + one.skip + token for one in windows for token in range(one.tokens)]
    assert tokens == list(range(config.tokens_of(mel_frames)))
    published = config.windows(mel_frames, "published")
    lost = config.tokens_of(mel_frames) - sum(window.tokens for window in published)
    trimmed = 2 * 16000 // config.samples_per_frame
    last = config.tokens_of((mel_frames - 1) % 2600 + 1)  # tokens of the last window, where there are several
    assert lost == (min(max(0, 2 * trimmed - last), trimmed) if mel_frames > 5200 else 0)


@pytest.mark.parametrize("version", VERSIONS)
def test_published_graph_equals_the_folder(version, tmp_path):
    tensors = random_tensors(version)
    folder = write_s3_checkpoint(tmp_path / "folder", version, tensors)
    graph = write_s3_graph(tmp_path / "graph" / f"speech_tokenizer_{version[:2]}.onnx", version, tensors)
    (graph.parent / "campplus.onnx").write_bytes(b"another model")
    graph.with_suffix(".batch.onnx").write_bytes(b"the same weights, for batches")  # as CosyVoice 3 comes
    (graph.parent / "config.json").write_text("{}")
    mel = [open_codec(folder).spec.features(noise(9000))]
    for path in (graph, graph.parent):
        codec = open_codec(path)
        assert codec.info.fingerprint == open_codec(folder).info.fingerprint
        assert codec.spec.config == open_codec(folder).spec.config
        np.testing.assert_array_equal(codec.encode(mel, 1)[0], open_codec(folder).encode(mel, 1)[0])


def test_a_graph_without_one_of_its_weights_is_refused(tmp_path):
    tensors = random_tensors("v3")
    del tensors["encoder.blocks.1.attn.value.bias"]
    graph = write_s3_graph(tmp_path / "speech_tokenizer_v3.onnx", "v3", tensors)
    with pytest.raises(RunError, match=r"lacks encoder\.blocks\.1\.attn\.value\.bias"):
        open_codec(graph)


def test_two_published_graphs_in_a_folder(tmp_path):
    for name in ("speech_tokenizer_v1.onnx", "speech_tokenizer_v2.onnx"):
        write_s3_graph(tmp_path / name, "v2", random_tensors("v2"))
    with pytest.raises(RunError, match="pass the path of the one"):
        open_codec(tmp_path)
    assert open_codec(tmp_path / "speech_tokenizer_v2.onnx").spec.config.fsmn


def test_another_graph_is_refused(tmp_path):
    (tmp_path / "speech_tokenizer_v1.onnx").write_bytes(b"not a graph")
    with pytest.raises(RunError, match="cannot be read as an ONNX graph"):
        open_codec(tmp_path)


def test_codes_depend_on_nothing_else_in_the_batch(tmp_path):
    codec = open_codec(write_s3_checkpoint(tmp_path, "v2"), threads=2)
    mels = {length: codec.spec.features(noise(length)) for length in (*LENGTHS, 481600)}
    alone = {length: codec.encode([mel], 1)[0] for length, mel in mels.items()}
    for capacity, lengths in ((None, (*mels, *reversed(mels))), (1600, [*mels, *sorted(mels)[::2]])):
        codec.model.capacity = capacity
        for length, code in zip(lengths, codec.encode([mels[length] for length in lengths], 1), strict=True):
            np.testing.assert_array_equal(code, alone[length], err_msg=f"{length} samples at capacity {capacity}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_audio_head": 3}, "n_audio_head = 3: must divide"),
        ({"n_audio_head": 4}, "heads must be 64 wide"),
        ({"n_audio_layer": None}, "n_audio_layer = None: must be a whole number"),
        ({"n_codebook_size": 4096}, "n_codebook_size = 4096: must be 6561"),
        ({"sampling_rate": 24000}, "sampling_rate = 24000"),
        ({"n_audio_layer": 5}, "lacks encoder.blocks.2"),
    ],
)
def test_wrong_checkpoints(changes, message, tmp_path):
    folder = write_s3_checkpoint(tmp_path, "v2", **changes)
    with pytest.raises(RunError, match=message) as error:
        open_codec(folder)
    assert "\n" not in str(error.value)


def test_encodes_only(tmp_path):
    folder = write_s3_checkpoint(tmp_path, "v1")
    with pytest.raises(RunError, match="encodes only"):
        open_codec(folder, "token2wav")
    with pytest.raises(RowError, match="no decoder"):
        open_codec(folder).spec.num_output_samples(3)


def test_spec_and_its_setting(tmp_path):
    checkpoint = Checkpoint.open(str(write_s3_checkpoint(tmp_path, "v1")))
    spec = find_family(checkpoint).open_spec(checkpoint)
    published = spec.with_options({"window_merge": "published"})
    assert pickle.loads(pickle.dumps(published)) == published
    assert (spec.settings, published.settings) == ({}, {"window_merge": "published"})
    assert published.info.fingerprint == spec.info.fingerprint
    with pytest.raises(RunError, match=r"--loudness moss_tts: not a setting of s3tokenizer; it has --window_merge"):
        spec.with_options({"loudness": "moss_tts"})
