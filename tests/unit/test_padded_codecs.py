"""SNAC, NanoCodec and WavTokenizer: lengths, batches against each utterance alone, broken checkpoints."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from batch_tokenizer.cli import main
from batch_tokenizer.codecs import padded_codec
from batch_tokenizer.codecs.base import PARTS
from batch_tokenizer.codecs.checkpoint import Checkpoint
from batch_tokenizer.codecs.loading import LoadRequest
from batch_tokenizer.codecs.padded_codec import PaddedCodec
from batch_tokenizer.codecs.published_sizes import _FOLDER as SIZES
from batch_tokenizer.codecs.published_sizes import published_sizes
from batch_tokenizer.codecs.registry import find_family
from batch_tokenizer.codecs.snac.config import column_levels
from batch_tokenizer.records import RunError
from tests.support.command import write_manifest
from tests.support.padded_codecs import CONFIGS, random_tensors, write_checkpoint


def opened(folder: Path, task: str = "wav2token2wav", dtype: torch.dtype = torch.float32) -> PaddedCodec:
    checkpoint = Checkpoint.open(str(folder))
    family = find_family(checkpoint)
    spec = pickle.loads(pickle.dumps(family.open_spec(checkpoint)))
    return family.load_codec(LoadRequest(checkpoint, spec, task=task, dtype=dtype))


@pytest.fixture(scope="module", params=CONFIGS)
def codec(request, tmp_path_factory) -> PaddedCodec:
    return opened(write_checkpoint(tmp_path_factory.mktemp(request.param), request.param))


def noise(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.3, length).astype(np.float32)


def test_lengths_are_as_foretold(codec):
    hop = codec.info.samples_per_frame
    for length in (1, 2, hop - 1, hop, hop + 1, 4 * hop - 1, 4 * hop, 5 * hop + 1):
        [codes] = codec.encode([codec.spec.features(noise(length))], codec.info.num_codebooks)
        assert codes.shape == (codec.spec.num_frames(length), codec.info.num_codebooks)
        [samples] = codec.decode([codes])
        assert samples.shape == (codec.spec.num_output_samples(len(codes)),)


def test_mixed_batches_are_each_utterance_alone(codec):
    lengths = [1, 7, *np.random.default_rng(3).integers(1, 70 * codec.info.samples_per_frame, 12)]
    features = [codec.spec.features(noise(int(length), seed)) for seed, length in enumerate(lengths)]
    most = codec.info.num_codebooks
    codec.batch_frames = 0
    alone = codec.encode(features, most)
    assert len(np.unique(np.concatenate(alone))) > 10  # the comparison would mean nothing if all codes were equal
    expected = codec.decode(alone)
    codec.batch_frames = 64
    together = codec.encode(features[::-1], most)[::-1]
    decoded = codec.decode(alone)
    for codes, other, samples, audio in zip(alone, together, expected, decoded, strict=True):
        np.testing.assert_array_equal(codes, other)
        np.testing.assert_allclose(audio, samples, rtol=0, atol=1e-4)


def test_bits_of_utterances_that_fill_their_batch_are_those_of_each_alone(codec):
    codec.batch_frames = 256
    hop = codec.info.samples_per_frame
    features = [codec.spec.features(noise(12 * hop, seed)) for seed in range(8)]
    codes = codec.encode(features)
    audio = codec.decode(codes)
    for one, own, samples in zip(features[::3], codes[::3], audio[::3], strict=True):
        np.testing.assert_array_equal(codec.encode([one])[0], own)
        np.testing.assert_array_equal(codec.decode([own])[0], samples)


def test_fewer_codebooks(codec):
    features = [codec.spec.features(noise(1999))]
    most = codec.info.num_codebooks
    [codes] = codec.encode(features, most)
    samples = []
    for count in range(1, most + 1):
        [fewer] = codec.encode(features, count)
        np.testing.assert_array_equal(fewer, codes[:, :count])
        samples += codec.decode([fewer])
    for count, together in enumerate(codec.decode([codes[:, :count] for count in range(1, most + 1)])):
        np.testing.assert_array_equal(together, samples[count])
    assert len({audio.tobytes() for audio in samples}) == most
    with pytest.raises(ValueError, match="codebooks"):
        codec.encode(features, most + 1)


def test_codes_that_cannot_be(codec):
    size = codec.info.codebook_sizes[0]
    for codes in (np.full((3, 1), size, np.uint16), np.zeros((0, 1), np.uint16), np.zeros((3, 99), np.uint16)):
        with pytest.raises(ValueError, match="utterance 0"):
            codec.decode([codes])


@pytest.mark.parametrize("name", CONFIGS)
def test_each_task_loads_what_it_needs(tmp_path, name):
    folder = write_checkpoint(tmp_path, name)
    whole = opened(folder)
    features = [whole.spec.features(noise(999))]
    codes = whole.encode(features, whole.info.num_codebooks)
    np.testing.assert_array_equal(opened(folder, "wav2token").encode(features, whole.info.num_codebooks), codes)
    np.testing.assert_array_equal(opened(folder, "token2wav").decode(codes), whole.decode(codes))
    [samples] = opened(folder, dtype=torch.bfloat16).decode(codes)
    assert samples.dtype == np.float32
    assert np.isfinite(samples).all()


@pytest.mark.parametrize("name", CONFIGS)
def test_all_tasks_of_a_model_compute_in_one_way(tmp_path, monkeypatch, name):
    folder = write_checkpoint(tmp_path, name)
    assert opened(folder).batch_frames == opened(folder, "wav2token").batch_frames == padded_codec.SMALL_MODEL_FRAMES
    parameters = sum(parameter.numel() for parameter in opened(folder).model.parameters())
    monkeypatch.setattr(padded_codec, "SMALL_MODEL", parameters)  # no task's own part has as many
    assert [opened(folder, task).batch_frames for task in PARTS] == [0, 0, 0]


@pytest.mark.parametrize("name", CONFIGS)
def test_incomplete_and_wrong_checkpoints_end_in_one_line(tmp_path, name):
    tensors = random_tensors(name, CONFIGS[name])
    lost = next(key for key in tensors if key.endswith("original1"))
    broken = {
        "lacks": {key: value for key, value in tensors.items() if key != lost},
        "does not imply": {**tensors, lost.replace("original1", "original7"): tensors[lost].clone()},
        "has shape": {**tensors, lost: tensors[lost][..., :0].clone()},
    }
    for message, kept in broken.items():
        with pytest.raises(RunError, match=message) as raised:
            opened(write_checkpoint(tmp_path / message.replace(" ", "_"), name, kept))
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("snac", {"decoder_rates": [3, 3]}, "decoder_rates"),
        ("snac", {"vq_strides": [4, 3, 1]}, "multiple of the next"),
        ("snac", {"sampling_rate": "often"}, "whole number"),
        ("snac", {"encoder_dim": 12, "latent_dim": 48}, "attn_window_size"),
        (
            "nanocodec",
            {"audio_encoder": {**CONFIGS["nanocodec"]["audio_encoder"], "activation": "elu"}},
            "only 'lrelu'",
        ),
        ("nanocodec", {"samples_per_frame": 13}, "samples_per_frame"),
        ("nanocodec", {"vector_quantizer": {"num_groups": 3, "num_levels_per_group": [5, 4, 3]}}, "encoded_dim"),
        ("wavtokenizer", {"codebook_dim": 9}, "codebook_dim"),
        ("wavtokenizer", {"norm_type": "layer_norm"}, "norm_type"),
        ("wavtokenizer", {"audio_channels": 2}, "audio_channels"),
    ],
)
def test_configurations_that_cannot_be_used(tmp_path, name, changes, message):
    tensors = random_tensors(name, CONFIGS[name])
    with pytest.raises(RunError, match=message) as raised:
        opened(write_checkpoint(tmp_path, name, tensors, **changes))
    assert str(tmp_path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_variants_of_wavtokenizer_batch_exactly(tmp_path):
    for changes in (
        {"norm_type": "time_group_norm"},
        {"use_causal_conv": True, "pad_mode": "replicate", "use_conv_shortcut": False, "num_residual_layers": 2},
    ):
        codec = opened(write_checkpoint(tmp_path / "-".join(changes), "wavtokenizer", **changes))
        features = [codec.spec.features(noise(length, length)) for length in (1, 30, 31, 200, 7, 123)]
        codec.batch_frames = 0
        alone = codec.encode(features, 1)
        codec.batch_frames = 64
        for codes, other in zip(alone, codec.encode(features, 1), strict=True):
            np.testing.assert_array_equal(codes, other)


def test_wavtokenizer_scales_utterances_where_its_feature_extractor_does(tmp_path):
    folder = write_checkpoint(tmp_path, "wavtokenizer")
    plain = opened(folder)
    settings = {"normalize_audio": True, "target_peak_dB_FS": -6.0, "sampling_rate": 16000}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    scaled = opened(folder)
    samples = noise(500)
    expected = samples * (10 ** (-6 / 20) / float(np.abs(samples).max()))
    np.testing.assert_array_equal(scaled.spec.features(samples)[0], expected)
    assert not scaled.spec.features(np.zeros(5, np.float32)).any()
    assert scaled.info.fingerprint != plain.info.fingerprint
    (folder / "preprocessor_config.json").write_text(json.dumps({**settings, "sampling_rate": 24000}))
    with pytest.raises(RunError, match=r"preprocessor_config.json: sampling_rate"):
        opened(folder)


def test_columns_of_snac_are_a_walk_through_the_tree_of_a_coarse_frame():
    assert column_levels((4, 2, 1)) == ((0, 0), (1, 0), (2, 0), (2, 1), (1, 1), (2, 2), (2, 3))
    assert len(column_levels((8, 4, 2, 1))) == 15
    levels = [level for level, _ in column_levels((8, 4, 2, 1))]
    assert [levels.count(level) for level in range(4)] == [1, 2, 4, 8]


def test_noise_of_snac_is_an_utterances_own(tmp_path):
    codec = opened(write_checkpoint(tmp_path, "snac"))
    features = [codec.spec.features(noise(length, length)) for length in (40, 300, 77)]
    codes = codec.encode(features, codec.info.num_codebooks)
    plain = codec.decode(codes)
    codec.noise_seed = 7
    codec.batch_frames = 0
    alone = [codec.decode([code])[0] for code in codes]
    codec.batch_frames = 64
    for samples, other, without in zip(codec.decode(codes[::-1])[::-1], alone, plain, strict=True):
        np.testing.assert_allclose(samples, other, rtol=0, atol=1e-4)
        assert np.abs(samples - without).max() > 1e-3


def test_order_and_noise_of_snac_are_in_the_token_file(tmp_path):
    folder = write_checkpoint(tmp_path / "model", "snac")
    soundfile.write(tmp_path / "a.wav", noise(4000), 16000)
    row = {"key": "a", "wav": str(tmp_path / "a.wav"), "quantized_tokens": str(tmp_path / "a.json")}
    manifest = write_manifest(tmp_path / "rows.jsonl", [row])
    words = ["--model_path", folder, "--data_list", manifest, "--device", "cpu", "--num_workers", 0, "--strict"]
    assert main([*map(str, words), "--noise_seed", "3"]) == 0
    info = json.loads((tmp_path / "a.json").read_text())["info"]
    assert info["columns"][:3] == ["level 0, code 0", "level 1, code 0", "level 2, code 0"]
    assert info["noise_seed"] == 3


@pytest.mark.parametrize("name", published_sizes())
def test_published_sizes_are_configurations_of_a_family(tmp_path, name):
    if name in ("mimi", "encodec-24khz", "dac-44khz"):
        pytest.importorskip("transformers")
    config = json.loads((SIZES / f"{name}.json").read_text())
    with torch.device("meta"):
        model = find_family(Checkpoint(tmp_path, name, config)).blank_model(config)
    assert sum(parameter.numel() for parameter in model.parameters()) > 10_000_000
