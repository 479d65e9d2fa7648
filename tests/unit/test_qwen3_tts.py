"""Qwen3-TTS-Tokenizer-12Hz: against transformers' Mimi, in batches, in pieces, its settings, and what is refused."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from batch_tokenizer.cli import main
from batch_tokenizer.codecs.checkpoint import Checkpoint
from batch_tokenizer.codecs.loading import LoadRequest
from batch_tokenizer.codecs.padded_codec import PaddedCodec
from batch_tokenizer.codecs.qwen3_tts.codec import load_codec, open_spec
from batch_tokenizer.codecs.qwen3_tts.decoder import Decoder
from batch_tokenizer.codecs.registry import find_family
from batch_tokenizer.records import RunError
from tests.support.qwen3_tts import random_tensors, tiny, write_qwen3_tts_checkpoint

LENGTHS = (1, 23, 24, 25, 240, 1001, 3000)


def noise(length: int) -> np.ndarray:
    return np.random.default_rng(length).normal(0, 0.3, length).astype(np.float32)


def open_codec(folder: Path, task: str = "wav2token2wav", **options: str) -> PaddedCodec:
    checkpoint = Checkpoint.open(str(folder))
    return load_codec(LoadRequest(checkpoint, open_spec(checkpoint).with_options(options), task=task))  # type: ignore[arg-type]


def encode(codec: PaddedCodec, lengths=LENGTHS, count: int = 4) -> list[np.ndarray]:
    return codec.encode([codec.spec.features(noise(length)) for length in lengths], count)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_qwen3_tts_checkpoint(tmp_path_factory.mktemp("qwen3"))


@pytest.mark.parametrize("window", ["full", "published"])
def test_the_encoder_is_mimis(folder, tmp_path, window):
    """transformers' own model, given what is below ``encoder.`` as the spec of the family describes it."""
    transformers = pytest.importorskip("transformers")
    config = {"model_type": "mimi", **tiny()["encoder_config"], "decoder_config": None}
    config |= {"vector_quantization_hidden_dimension": 8, "upsample_groups": 24, "frame_rate": 1000.0}
    if window == "full":
        config["sliding_window"] = 100_000
    stored = load_file(folder / "model.safetensors")
    for layer in range(6):  # unused when encoding, but the library wants them
        quantizer = "semantic" if layer == 0 else "acoustic"
        stored[f"encoder.quantizer.{quantizer}_residual_vector_quantizer.output_proj.weight"] = torch.zeros(24, 8, 1)
    save_file(
        {name.removeprefix("encoder."): tensor for name, tensor in stored.items() if name.startswith("encoder.")},
        tmp_path / "model.safetensors",
    )
    (tmp_path / "config.json").write_text(json.dumps(config))
    try:
        model = transformers.MimiModel.from_pretrained(tmp_path).eval()
    except (AttributeError, TypeError) as error:
        pytest.skip(f"this transformers needs Mimi's decoder: {error}")
    codec = open_codec(folder, "wav2token", attention_window=window)
    for length, code in zip(LENGTHS, encode(codec), strict=True):
        with torch.inference_mode():
            expected = model.encode(torch.from_numpy(noise(length))[None, None], num_quantizers=4).audio_codes[0].T
        np.testing.assert_array_equal(code, expected.numpy())


def test_windows_differ_for_long_utterances_only(folder):
    full = encode(open_codec(folder, "wav2token"))
    windowed = encode(open_codec(folder, "wav2token", attention_window="published"))
    for length, one, other in zip(LENGTHS, full, windowed, strict=True):
        assert np.array_equal(one, other) == (length <= 24 * 4)


def test_results_do_not_depend_on_the_batch(folder):
    codec = open_codec(folder)
    codec.batch_frames = 0
    alone = dict(zip(LENGTHS, encode(codec), strict=True))
    audio = dict(zip(LENGTHS, codec.decode(list(alone.values())), strict=True))
    for length, code in alone.items():
        assert code.shape == (codec.spec.num_frames(length), 4)
        assert codec.spec.num_output_samples(len(code)) == len(audio[length])
    codec.batch_frames = 64
    codec.model.encoder.piece = codec.model.decoder.piece = 11
    for lengths in (LENGTHS, LENGTHS[::-1], (3000, 1, 3000, 25), (23,)):
        codes = encode(codec, lengths)
        for length, code, samples in zip(lengths, codes, codec.decode(codes), strict=True):
            np.testing.assert_array_equal(code, alone[length])
            np.testing.assert_allclose(samples, audio[length], rtol=0, atol=1e-5)


def test_fewer_codebooks(folder):
    codec = open_codec(folder)
    for whole, fewer in zip(encode(codec), encode(codec, count=2), strict=True):
        np.testing.assert_array_equal(fewer, whole[:, :2])
    (one,), (first,) = codec.decode([whole[:, :1]]), codec.decode([whole])
    assert one.shape == first.shape


def test_reach_covers_what_a_piece_needs(folder, monkeypatch):
    codec = open_codec(folder, "token2wav")
    codes = np.random.default_rng(0).integers(0, 32, (90, 4)).astype(np.uint16)
    (whole,) = codec.decode([codes])
    codec.model.decoder.piece = 20
    (pieces,) = codec.decode([codes])
    np.testing.assert_allclose(pieces, whole, rtol=0, atol=1e-5)
    assert codec.model.decoder.reach == 17
    monkeypatch.setattr(Decoder, "reach", 8)
    assert np.abs(codec.decode([codes])[0] - whole).max() > 1e-4


def test_published_chunks_are_those_of_the_description(folder):
    """Chunks of 300 frames, each but the first with 25 frames before it, one by one through the whole decoder."""
    codes = np.random.default_rng(1).integers(0, 32, (650, 4)).astype(np.uint16)
    exact, published = open_codec(folder, "token2wav"), open_codec(folder, "token2wav", decoder_chunks="published")
    parts = []
    for start in (0, 300, 600):
        first = max(0, start - 25)
        (samples,) = exact.decode([codes[first : start + 300]])
        parts.append(samples[(start - first) * 24 :])
    (chunked,) = published.decode([codes])
    np.testing.assert_allclose(chunked, np.concatenate(parts), rtol=0, atol=1e-6)
    (whole,) = exact.decode([codes])
    np.testing.assert_allclose(chunked[: 300 * 24], whole[: 300 * 24], rtol=0, atol=1e-5)
    assert np.abs(chunked - whole).max() > 1e-4


def test_sixteen_bits_are_for_the_decoder_only(folder):
    checkpoint = Checkpoint.open(str(folder))
    codec = load_codec(LoadRequest(checkpoint, open_spec(checkpoint), dtype=torch.bfloat16))
    for code, same in zip(encode(codec), encode(open_codec(folder)), strict=True):
        np.testing.assert_array_equal(code, same)
    assert codec.model.decoder.pre_conv.weight.dtype == torch.bfloat16
    assert codec.decode([code])[0].dtype == np.float32


def test_a_tts_checkpoint_stands_for_its_tokenizer(folder, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_tts"}))
    (tmp_path / "speech_tokenizer").symlink_to(folder)
    checkpoint = Checkpoint.open(str(tmp_path))
    assert find_family(checkpoint).open_spec(checkpoint).info.family == "qwen3_tts"


def test_settings_reach_the_token_files(folder, tmp_path):
    import soundfile

    soundfile.write(tmp_path / "a.wav", noise(3000), 24000, subtype="FLOAT")
    row = {"key": "a", "wav": str(tmp_path / "a.wav"), "quantized_tokens": str(tmp_path / "a.json")}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    words = ["--model_path", folder, "--data_list", tmp_path / "rows.jsonl", "--num_workers", 0, "--device", "cpu"]
    assert main([*map(str, words), "--attention_window", "published", "--strict"]) == 0
    written = json.loads((tmp_path / "a.json").read_text())
    (expected,) = encode(open_codec(folder, "wav2token", attention_window="published"), (3000,))
    assert written["quantized_tokens"] == expected.tolist()
    assert written["info"]["attention_window"] == "published"
    assert main([*map(str, words), "--strict"]) == 2  # the run folder holds the run to its settings
    assert main(["verify", "--data_list", str(tmp_path / "rows.jsonl"), "--model_path", str(folder)]) == 0


def changed(part: str | None, **changes: Any) -> dict[str, Any]:
    config = copy.deepcopy(tiny())
    (config if part is None else config[part]).update(changes)
    return config


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (changed(None, model_type="qwen3_tts_tokenizer_25hz"), "qwen3_tts_tokenizer_25hz is another model"),
        (changed(None, encoder_valid_num_quantizers=5), "encoder_valid_num_quantizers = 5: must be the decoder's"),
        (changed(None, encode_downsample_rate=48), "encode_downsample_rate = 48: must be what the encoder's strides"),
        (changed("decoder_config", upsample_rates=[3, 3]), "decode_upsample_rate = 24: must be what the decoder's"),
        (changed("encoder_config", use_causal_conv=False), "encoder_config.use_causal_conv = False: only True"),
        (changed("encoder_config", num_key_value_heads=3), "encoder_config.num_key_value_heads = 3: must divide"),
        (changed("decoder_config", hidden_act="gelu"), "decoder_config.hidden_act = 'gelu': only 'silu'"),
        (changed("decoder_config", codebook_size=64), "decoder_config.codebook_size = 64: must be the encoder's"),
        (changed("decoder_config", num_hidden_layers=3), "lacks decoder.pre_transformer.layers.2"),
        (changed("decoder_config", latent_dim=24), "has shape"),
        ({**tiny(), "decoder_config": None}, "decoder_config = None: must be an object"),
    ],
)
def test_wrong_checkpoints_are_one_line(tmp_path, config, message):
    folder = write_qwen3_tts_checkpoint(tmp_path, config, random_tensors(tiny()))
    with pytest.raises(RunError, match=message) as error:
        open_codec(folder)
    assert "\n" not in str(error.value)


def test_spec_is_picklable(folder):
    spec = open_spec(Checkpoint.open(str(folder))).with_options({"decoder_chunks": "published"})
    assert pickle.loads(pickle.dumps(spec)) == spec
    assert spec.settings == {"decoder_chunks": "published"}
