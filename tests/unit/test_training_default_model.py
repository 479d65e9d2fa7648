"""The bundled model: its size, its shape, its levels, and that its speech can be understood."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from batch_tokenizer.audio.loading import load_samples
from batch_tokenizer.audio.mel import log_mel
from batch_tokenizer.codecs.checkpoint import Checkpoint, default_checkpoint
from batch_tokenizer.codecs.mimo.codec import load_model
from batch_tokenizer.training.recipe import SMALL
from tests.support.command import ROOT

CLIPS = ("it-01.wav", "it-03.flac", "ru-05.wav")


@pytest.fixture(scope="module")
def model():
    return load_model(Checkpoint.open(None), device=torch.device("cpu"))


@pytest.fixture(scope="module")
def clips() -> list[np.ndarray]:
    return [load_samples(str(ROOT / "sample_data" / "clips" / name), 24000) for name in CLIPS]


def reconstructed(model, samples: np.ndarray) -> np.ndarray:
    codes = model.encode_utterances([torch.from_numpy(log_mel(samples, model.config.mel))])
    return model.decode_utterances(codes)[0].numpy()[: len(samples)]


def test_it_is_small_and_of_the_shape_that_training_makes_by_default() -> None:
    folder = default_checkpoint()
    assert sum(path.stat().st_size for path in folder.iterdir()) < 12_000_000
    assert json.loads((folder / "config.json").read_text()) == dict(SMALL)


@pytest.mark.parametrize("gain", [0.0, -10.0, -20.0, -30.0, -40.0])
def test_a_quieter_clip_comes_back_quieter_by_as_much(model, clips: list[np.ndarray], gain: float) -> None:
    for clip in clips:
        samples = (clip * 10 ** (gain / 20)).astype(np.float32)
        made = reconstructed(model, samples)
        assert len(made) == len(samples)
        change = 20 * math.log10(np.sqrt(np.mean(made**2)) / np.sqrt(np.mean(samples**2)))
        assert abs(change) < 1.5


def test_speech_can_be_understood_also_from_few_codebooks(model, clips: list[np.ndarray]) -> None:
    stoi = pytest.importorskip("pystoi").stoi
    scores = []
    for clip in clips:
        codes = model.encode_utterances([torch.from_numpy(log_mel(clip, model.config.mel))])[0]
        for number in (4, 8, 20):
            made = model.decode_utterances([codes[:, :number]])[0].numpy()[: len(clip)]
            scores.append(stoi(clip, made, 24000))
    four, eight, all_of_them = np.reshape(scores, (-1, 3)).mean(axis=0)
    assert four < eight < all_of_them
    assert four > 0.8
    assert all_of_them > 0.88
