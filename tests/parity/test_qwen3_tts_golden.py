"""Qwen3-TTS-Tokenizer-12Hz against what qwen-tts computes: codes, both attention windows, audio, published chunks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from batch_tokenizer.codecs.layers.padded import PaddedBatch
from tests.support.known_answers import KnownAnswers

FOLDERS = ("qwen3_tts_12hz_tiny", "qwen3_tts_12hz_window_tiny")
PUBLISHED = {"decoder_chunks": "published"}


@pytest.fixture(scope="module", params=FOLDERS)
def answers(request, golden_root):
    return KnownAnswers(golden_root / request.param, PUBLISHED)


def test_hidden_frames(answers):
    codec = answers.open("wav2token")
    for utterance in answers.utterances:
        with torch.inference_mode():
            hidden = codec.model.hidden(PaddedBatch(torch.from_numpy(answers.wav(utterance))[None, None]))
        expected = answers.expected[f"{utterance}.hidden"]
        np.testing.assert_allclose(hidden.values[0].mT.numpy(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("batch_frames", "size"), [(0, 3), (64, 3), (64, 16)], ids=["alone", "together", "all together"]
)
def test_batches_in_any_order(answers, batch_frames, size):
    codec = answers.open(threads=2)
    codec.batch_frames = batch_frames
    for order in answers.orders() if (batch_frames, size) == (64, 3) else [None]:
        for batch in answers.batches(size, order):
            codes = answers.encode(codec, batch)
            for utterance, code, samples in zip(batch, codes, codec.decode(codes), strict=True):
                np.testing.assert_array_equal(code, answers.codes(utterance), err_msg=f"utterance {utterance}")
                assert codec.spec.num_output_samples(len(code)) == len(samples)
                np.testing.assert_allclose(samples, answers.expected[f"{utterance}.recon"], rtol=0, atol=5e-6)


@pytest.mark.parametrize("batch_frames", [0, 64], ids=["alone", "together"])
def test_window_of_the_configuration(golden_root, batch_frames):
    answers = KnownAnswers(golden_root / "qwen3_tts_12hz_window_tiny", {"attention_window": "published"})
    codec = answers.open("wav2token")
    codec.batch_frames = batch_frames
    for utterance, code in zip(answers.utterances, answers.encode(codec, answers.utterances), strict=True):
        np.testing.assert_array_equal(code, answers.codes(utterance, "codes_windowed"))
    assert codec.spec.settings == {"attention_window": "published"}


@pytest.mark.parametrize("batch_frames", [0, 64], ids=["alone", "together"])
@pytest.mark.parametrize("piece", [17, 250])
def test_pieces_are_one_pass(golden_root, piece, batch_frames):
    answers = KnownAnswers(golden_root / "qwen3_tts_12hz_window_tiny")
    codec = answers.open()
    codec.batch_frames = batch_frames
    whole = answers.open()
    whole.model.encoder.piece = whole.model.decoder.piece = 10_000
    codec.model.encoder.piece = codec.model.decoder.piece = piece
    codes = answers.encode(codec, answers.utterances)
    for utterance, code in zip(answers.utterances, codes, strict=True):
        np.testing.assert_array_equal(code, answers.codes(utterance))
    differences = []
    for utterance, one_pass, samples in zip(answers.utterances, whole.decode(codes), codec.decode(codes), strict=True):
        np.testing.assert_allclose(samples, one_pass, rtol=0, atol=5e-6)
        differences.append(np.abs(samples - answers.expected[f"{utterance}.recon"]).max())
    assert max(differences) > 0.01  # the published chunks see less


def test_command_line(answers, tmp_path):
    tokens, samples = answers.run(tmp_path, "--batch_size", 3, "--decoder_chunks", "published")
    for utterance, code, audio in zip(answers.utterances, tokens, samples, strict=True):
        np.testing.assert_array_equal(code, answers.codes(utterance))
        np.testing.assert_allclose(audio[0], answers.expected[f"{utterance}.recon"], rtol=0, atol=1e-4)
