"""MiMo against the known answers of the published model: alone, packed, in any order, with fewer codebooks."""

from __future__ import annotations

import json
import random

import pytest
import torch
from safetensors.torch import load_file

import batch_tokenizer
from batch_tokenizer.codecs.checkpoint import Checkpoint
from batch_tokenizer.codecs.loading import LoadRequest
from batch_tokenizer.codecs.mimo.codec import load_codec, open_spec
from batch_tokenizer.codecs.opening import open_codec

UTTERANCES = range(10)


@pytest.fixture(scope="module")
def folder(golden_root):
    return golden_root / "mimo_tiny"


@pytest.fixture(scope="module")
def expected(folder):
    return load_file(folder / "expected.safetensors")


@pytest.fixture(scope="module")
def model(folder):
    return batch_tokenizer.load_model(folder)


def orders():
    return [list(UTTERANCES), list(reversed(UTTERANCES)), random.Random(7).sample(UTTERANCES, 10)]


@pytest.mark.parametrize("capacity", ["auto", None, 200, 2048], ids=["auto", "alone", "small", "filler"])
@pytest.mark.parametrize("order", orders(), ids=["in order", "reversed", "shuffled"])
@pytest.mark.parametrize("n_q", [8, 3])
def test_codes_and_audio(model, expected, capacity, order, n_q):
    model.capacity = capacity
    codes = model.encode_utterances([expected[f"{i}.mel"] for i in order], n_q)
    for i, code in zip(order, codes, strict=True):
        assert torch.equal(code.int(), expected[f"{i}.codes"][:, :n_q]), f"utterance {i}"
    samples = model.decode_utterances(codes)
    for i, wav in zip(order, samples, strict=True):
        torch.testing.assert_close(wav, expected[f"{i}.recon_nq{n_q}"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_hidden_states(model, expected, backend):
    model.use_attention(backend)
    for i in UTTERANCES:
        torch.testing.assert_close(model.hidden(expected[f"{i}.mel"]), expected[f"{i}.hidden"], atol=5e-5, rtol=0)
    model.use_attention("auto")


@pytest.mark.parametrize("batch_size", [1, 3, 10])
def test_published_interface_in_padded_batches(model, expected, batch_size):
    model.capacity = "auto"
    for batch in [UTTERANCES[start : start + batch_size] for start in range(0, 10, batch_size)]:
        mels, mels_lens = batch_tokenizer.padding(
            [batch_tokenizer.mel_spectrogram(expected[f"{i}.wav"], model.config) for i in batch]
        )
        codes, codes_lens, stats = model.encode(mels, mels_lens)
        assert stats["batch_size"] == len(batch)
        wavs, wavs_lens, _ = model.decode(codes, codes_lens)
        assert wavs.shape[:2] == (len(batch), 1)
        for row, i in enumerate(batch):
            assert torch.equal(codes[row, : codes_lens[row]].int(), expected[f"{i}.codes"])
            torch.testing.assert_close(wavs[row, 0, : wavs_lens[row]], expected[f"{i}.recon_nq8"], atol=1e-5, rtol=0)


def test_codec_protocol_and_frame_arithmetic(folder, expected):
    checkpoint = Checkpoint.open(str(folder))
    spec = open_spec(checkpoint)
    codec = load_codec(LoadRequest(checkpoint, spec, threads=2))
    features = [spec.features(expected[f"{i}.wav"].numpy()) for i in UTTERANCES]
    codes = codec.encode(features, 8)
    samples = codec.decode(codes)
    for i, code, wav in zip(UTTERANCES, codes, samples, strict=True):
        assert code.dtype == "uint16"
        assert (code == expected[f"{i}.codes"].numpy()).all()
        assert len(code) == spec.num_frames(len(expected[f"{i}.wav"]))
        assert len(wav) == spec.num_output_samples(len(code)) == len(expected[f"{i}.recon_nq8"])


def test_stored_hidden_states(folder, expected):
    codec = open_codec(str(folder), "cpu")
    inputs = [codec.spec.features(expected[f"{i}.wav"].numpy()) for i in UTTERANCES]
    codes, hidden_states = codec.encode_hidden(inputs, 8)
    for i, code, hidden in zip(UTTERANCES, codes, hidden_states, strict=True):
        published = expected[f"{i}.hidden"]
        torch.testing.assert_close(torch.from_numpy(hidden), published.half(), rtol=1.5e-3, atol=1e-4)
        assert (codec.model.encoder.quantizer.encode(published, 8).numpy() == code).all()


def test_config_is_the_published_one(model, folder):
    published = json.loads((folder / "config.json").read_text())
    assert model.config.sampling_rate == published["sampling_rate"]
    assert list(model.config.codebook_size) == published["codebook_size"]
