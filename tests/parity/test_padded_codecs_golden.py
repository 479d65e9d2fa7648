"""SNAC, NanoCodec and WavTokenizer against what their public implementations compute of each utterance alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from batch_tokenizer.codecs.layers.padded import PaddedBatch
from batch_tokenizer.codecs.snac.config import column_levels
from tests.support.known_answers import KnownAnswers

#: Tolerances of hidden frames and of audio.
FOLDERS = {
    "snac_24khz_tiny": (3e-4, 5e-5),
    "snac_44khz_tiny": (3e-4, 5e-5),
    "nanocodec_tiny": (3e-5, 5e-6),
    "wavtokenizer_tiny": (1e-5, 1e-5),
}


@pytest.fixture(scope="module", params=FOLDERS)
def answers(request, golden_root):
    return known(golden_root, request.param)


def known(golden_root, name):
    """Known answers whose codes are (T, K), also those of SNAC, which come by level."""
    answers = KnownAnswers(golden_root / name)
    expected = answers.expected
    for utterance in [name.partition(".")[0] for name in expected if name.endswith(".codes_0")]:
        levels = [expected[name] for name in sorted(expected) if name.startswith(f"{utterance}.codes_")]
        frames = len(levels[0])
        columns = column_levels(tuple(len(levels[-1]) // len(level) for level in levels))
        rows = [levels[level].reshape(frames, -1)[:, position] for level, position in columns]
        expected[f"{utterance}.codes"] = np.stack(rows, axis=1)
    return answers


def assert_audio(answers, utterance, samples):
    expected = answers.expected[f"{utterance}.recon"]
    np.testing.assert_allclose(samples, expected, rtol=0, atol=FOLDERS[answers.folder.name][1])


def test_hidden_frames(answers):
    model = (codec := answers.open()).model
    hidden = model.hidden if hasattr(model, "hidden") else model.encoder
    for utterance in answers.utterances:
        features = torch.from_numpy(codec.spec.features(answers.wav(utterance)))
        with torch.inference_mode():
            found = hidden(PaddedBatch(features[None])).values[0].mT.numpy()
        expected = answers.expected[f"{utterance}.hidden"]
        np.testing.assert_allclose(found, expected, rtol=0, atol=FOLDERS[answers.folder.name][0])


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
                assert_audio(answers, utterance, samples)


def test_command_line(answers, tmp_path):
    tokens, samples = answers.run(tmp_path, "--batch_size", 3)
    for utterance, code, audio in zip(answers.utterances, tokens, samples, strict=True):
        np.testing.assert_array_equal(code, answers.codes(utterance))
        np.testing.assert_allclose(audio[0], answers.expected[f"{utterance}.recon"], rtol=0, atol=1e-4)


def test_orpheus_order(golden_root):
    answers = known(golden_root, "snac_24khz_tiny")
    for utterance in answers.utterances:
        np.testing.assert_array_equal(answers.codes(utterance), answers.expected[f"{utterance}.flat7"])


@pytest.mark.parametrize("name", ["snac_24khz_tiny", "snac_44khz_tiny"])
def test_noise_of_snac(golden_root, name):
    answers = known(golden_root, name)
    codec = answers.open()
    [utterance] = [number for number in answers.utterances if f"{number}.recon_noise" in answers.expected]
    levels = range(len(codec.spec.config.vq_strides))
    codes = [torch.from_numpy(answers.expected[f"{utterance}.codes_{level}"]).long()[None] for level in levels]
    blocks = range(len(codec.spec.config.decoder_rates))
    noise = [torch.from_numpy(answers.expected[f"{utterance}.noise_{block}"])[None, None] for block in blocks]
    with torch.inference_mode():
        samples = codec.model.decode(codes, None, noise=noise)[0].numpy()
    np.testing.assert_allclose(samples, answers.expected[f"{utterance}.recon_noise"], rtol=0, atol=5e-5)
