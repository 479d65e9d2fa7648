"""MOSS v2 and Nano, stereo, against the published code's values: batches, streams, the command line; loudness."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from batch_tokenizer.audio.loudness import moss_tts_loudness
from tests.support.known_answers import KnownAnswers

FEWER = {"moss_v2_tiny": (8, 4), "moss_nano_tiny": (6, 3)}


@pytest.fixture(scope="module", params=FEWER)
def answers(request, golden_root):
    return KnownAnswers(golden_root / request.param)


@pytest.fixture
def codec(answers):
    return answers.open()


def counts(answers) -> list[int]:
    return sorted({int(name.partition("recon_nq")[2]) for name in answers.expected if "recon_nq" in name})


def test_hidden_frames(answers, codec):
    for utterance in answers.utterances:
        hidden = codec.model.hidden(torch.from_numpy(answers.wav(utterance).T.copy()).flatten())
        np.testing.assert_allclose(hidden, answers.expected[f"{utterance}.hidden"], rtol=0, atol=1e-5)


def test_stored_hidden_states(answers, codec):
    books = codec.info.num_codebooks
    for batch in answers.batches(3, answers.utterances[::-1]):
        inputs = [codec.spec.features(answers.wav(utterance)) for utterance in batch]
        for utterance, code, hidden in zip(batch, *codec.encode_hidden(inputs, books), strict=True):
            expected = answers.expected[f"{utterance}.hidden"]
            np.testing.assert_array_equal(code, answers.codes(utterance))
            np.testing.assert_allclose(hidden, expected.astype(np.float16), rtol=1.5e-3, atol=2e-5)
            quantized = codec.model.quantizer.encode(torch.from_numpy(expected), books)
            np.testing.assert_array_equal(quantized, code)


@pytest.mark.parametrize("capacity", ["auto", 60], ids=["auto", "packed"])
@pytest.mark.parametrize("size", [1, 3, 16])
def test_batches_in_any_order(answers, codec, size, capacity):
    codec.model.capacity = capacity
    for order in answers.orders() if size == 3 else [None]:
        for batch in answers.batches(size, order):
            for utterance, code in zip(batch, answers.encode(codec, batch), strict=True):
                np.testing.assert_array_equal(code, answers.codes(utterance))
            used = [(utterance, count) for utterance in batch for count in counts(answers)]
            audio = codec.decode([answers.codes(utterance)[:, :count].astype(np.uint16) for utterance, count in used])
            for (utterance, count), samples in zip(used, audio, strict=True):
                expected = answers.expected[f"{utterance}.recon_nq{count}"]
                assert codec.spec.num_output_samples(len(answers.codes(utterance))) == samples.shape[1]
                np.testing.assert_allclose(samples, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("chunk", [500, 3840, 10000])
def test_streams(answers, codec, chunk):
    wavs = [answers.wav(utterance) for utterance in answers.utterances]
    books = codec.info.num_codebooks
    steps = -(-max(wav.shape[1] for wav in wavs) // chunk)
    pieces = ([wav[:, start * chunk : (start + 1) * chunk] for wav in wavs] for start in range(steps))
    codes = [np.concatenate(parts) for parts in zip(*codec.encode_stream(pieces, books), strict=True)]
    cuts = list(pairwise([0, 3, 4, 20, 1000]))
    decoded = codec.decode_stream([code[start:stop] for code in codes] for start, stop in cuts)
    for utterance, code, audio in zip(answers.utterances, codes, zip(*decoded, strict=True), strict=True):
        np.testing.assert_array_equal(code, answers.codes(utterance))
        expected = answers.expected[f"{utterance}.recon_nq{books}"]
        np.testing.assert_allclose(np.concatenate(audio, axis=1), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("flags", [(), ("--long_audio", "stream", "--max_seconds", "0.3")], ids=["whole", "streamed"])
def test_command_line(answers, tmp_path, flags):
    tokens, audio = answers.run(tmp_path, "--batch_size", 3, *flags)
    books = answers.open().info.num_codebooks
    for utterance, code, samples in zip(answers.utterances, tokens, audio, strict=True):
        np.testing.assert_array_equal(code, answers.codes(utterance))
        np.testing.assert_allclose(samples, answers.expected[f"{utterance}.recon_nq{books}"], rtol=0, atol=1e-4)


def test_loudness_of_moss_tts(golden_root):
    expected = load_file(golden_root / "moss_loudness" / "expected.safetensors")
    for name in (name for name in expected if name.endswith(".wav")):
        out = expected[f"{name.removesuffix('.wav')}.out"]
        np.testing.assert_allclose(moss_tts_loudness(expected[name]), out, rtol=1e-6)
