"""S3Tokenizer against the known answers of the s3tokenizer package: alone, in batches, in any order, by the command."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.support.known_answers import KnownAnswers

FOLDERS = ("s3_v1_tiny", "s3_v1_25hz_tiny", "s3_v2_tiny", "s3_long_tiny")


@pytest.fixture(scope="module", params=FOLDERS)
def answers(request, golden_root):
    return KnownAnswers(golden_root / request.param, {"window_merge": "published"})


def test_mel_and_hidden_frames(answers):
    codec = answers.open("wav2token")
    for utterance in answers.utterances:
        mel = codec.spec.features(answers.wav(utterance))
        if f"{utterance}.mel" in answers.expected:
            np.testing.assert_allclose(mel, answers.expected[f"{utterance}.mel"], rtol=0, atol=1e-6)
        if f"{utterance}.hidden" in answers.expected:
            hidden = codec.model.hidden(torch.from_numpy(mel)).numpy()
            np.testing.assert_allclose(hidden, answers.expected[f"{utterance}.hidden"], rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("capacity", "size"), [("auto", 3), (1600, 3), (1600, 16)], ids=["auto", "packed", "all packed"]
)
def test_batches_in_any_order(answers, capacity, size):
    if "long" in answers.folder.name and size == 16:
        pytest.skip("16 utterances of up to 53 s take long")
    codec = answers.open("wav2token")
    codec.model.capacity = capacity
    for order in answers.orders() if (capacity, size) == (1600, 3) else [None]:
        for batch in answers.batches(size, order):
            for utterance, code in zip(batch, answers.encode(codec, batch), strict=True):
                np.testing.assert_array_equal(code, answers.codes(utterance), err_msg=f"utterance {utterance}")


def test_complete_merge_keeps_the_published_tokens_and_adds_the_lost_ones(golden_root):
    codec = KnownAnswers(golden_root / "s3_long_tiny").open("wav2token")
    answers = KnownAnswers(golden_root / "s3_long_tiny")
    for utterance in answers.utterances:
        (code,) = answers.encode(codec, [utterance])
        published = answers.codes(utterance)
        seconds = len(answers.wav(utterance)) / 16000
        assert len(code) == int(np.ceil(seconds * 25 - 1e-9))
        np.testing.assert_array_equal(code[: len(published)], published)
    assert len(code) == 1325
    assert len(published) == 1275


def test_command_line(answers, tmp_path):
    tokens, _ = answers.run(tmp_path, "--batch_size", 3, "--window_merge", "published", task="wav2token")
    for utterance, code in zip(answers.utterances, tokens, strict=True):
        np.testing.assert_array_equal(code, answers.codes(utterance))
