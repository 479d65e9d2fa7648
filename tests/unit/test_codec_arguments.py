"""What the Python interface is given is checked, with the same words for every family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import batch_tokenizer
from batch_tokenizer.codecs.base import Codec
from batch_tokenizer.codecs.mimo.config import MiMoConfig
from batch_tokenizer.codecs.mimo.model import MiMoAudioTokenizer
from tests.support import hf
from tests.support.checkpoints import TINY, random_mimo
from tests.support.families import write

FAMILIES = ("mimo", "moss", "moss stereo", "qwen3_tts", "s3tokenizer", "snac", "nanocodec", "wavtokenizer", "dac",
            "encodec_chunks")  # fmt: skip


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(request.param, tmp_path_factory.mktemp(request.param) / "model")


@pytest.fixture(scope="module")
def codec(folder: Path) -> Codec:
    return batch_tokenizer.load_codec(folder, task="wav2token", device="cpu")


def samples(codec: Codec, length: int = 3001) -> np.ndarray:
    shape = (length,) if codec.info.channels == 1 else (codec.info.channels, length)
    return np.random.default_rng(0).normal(0, 0.1, shape).astype(np.float32)


def test_numbers_of_codebooks(codec: Codec) -> None:
    features = [codec.spec.features(samples(codec))]
    (codes,) = codec.encode(features, codec.info.num_codebooks)
    assert codes.shape == (codec.spec.num_frames(3001), codec.info.num_codebooks)
    np.testing.assert_array_equal(codec.encode(features)[0], codes)
    for wrong in (0, -1, 99, codec.info.num_codebooks + 1, 1.0, "1"):
        with pytest.raises(ValueError, match="codebooks asked for: this checkpoint has 1 to"):
            codec.encode(features, wrong)  # type: ignore[arg-type]


def test_features(codec: Codec) -> None:
    good = codec.spec.features(samples(codec))
    spoiled = good.copy()
    spoiled[0, 3] = np.nan
    for wrong, words in (
        (good[0], "features have shape"),
        (good[None], "features have shape"),
        (np.concatenate([good, good]), "features have shape"),
        (good[:, :0], "features have shape"),
        (samples(codec).reshape(-1), "features have shape"),
        (good.astype(np.float64), "features are of float64, must be a numpy array of float32"),
        ((good * 1000).astype(np.int16), "features are of int16"),
        (torch.from_numpy(good), "features are of torch.float32, must be a numpy array"),
        (good.tolist(), "features are of list"),
        (spoiled, "features are not finite"),
    ):
        with pytest.raises(ValueError, match=f"^utterance 1: {words}"):
            codec.encode([good, wrong], 1)
    assert codec.encode([], 1) == []


def test_samples_in_place_of_features(codec: Codec) -> None:
    """Where features are samples with something done to their length, other lengths are refused."""
    raw = np.atleast_2d(samples(codec))
    if not codec.spec.is_feature_length(3001) or len(raw) != len(codec.spec.features(samples(codec))):
        with pytest.raises(ValueError, match=r"must be .* as spec.features"):
            codec.encode([raw], 1)
    else:
        assert codec.encode([raw], 1)[0].shape == (codec.spec.num_frames(3001), 1)


def test_codes(codec: Codec) -> None:
    sizes = codec.info.codebook_sizes
    good = np.zeros((4, len(sizes)), np.uint16)
    large = good.copy()
    large[1, -1] = sizes[-1]
    for wrong, words in (
        (good[0], "codes have shape"),
        (good[None], "codes have shape"),
        (good[:0], "codes have shape"),
        (good[:, :0], "codes have shape"),
        (np.zeros((4, len(sizes) + 1), np.uint16), "codes have shape"),
        (good.astype(np.float32), "codes are of float32, must be a numpy array of integers"),
        (good.astype(bool), "codes are of bool"),
        (good.tolist(), "codes are of list"),
        (good.astype(np.int64) - 1, "a code is negative"),
        (large, "a code is negative or not below its codebook's size"),
    ):
        with pytest.raises(ValueError, match=f"^utterance 1: {words}"):
            codec.decode([good, wrong])


def test_a_part_that_was_not_loaded(folder: Path, codec: Codec) -> None:
    if codec.info.family in ("s3tokenizer", *hf.CONFIGS, "encodec"):
        return  # the first has no decoder, and those of transformers are loaded whole
    with pytest.raises(ValueError, match="loaded without its decoder"):
        codec.decode([np.zeros((4, 1), np.uint16)])
    decoder = batch_tokenizer.load_codec(folder, task="token2wav", device="cpu")
    with pytest.raises(ValueError, match="loaded without its encoder"):
        decoder.encode([codec.spec.features(samples(codec))], 1)


@pytest.fixture(scope="module")
def tokenizer() -> MiMoAudioTokenizer:
    return random_mimo(MiMoConfig.from_json(TINY))


@pytest.mark.parametrize(
    ("lens", "words"),
    [
        (torch.tensor([20, 21]), r"mels_lens\[1\] = 21: must be 1 to 20"),
        (torch.tensor([-1, 20]), r"mels_lens\[0\] = -1"),
        (torch.tensor([0, 20]), r"mels_lens\[0\] = 0"),
        (torch.tensor([20]), r"mels_lens must be 2 integers, one for each utterance; got \(1,\)"),
        (torch.tensor([20, 20, 20]), "mels_lens must be 2 integers"),
        (torch.tensor([20.0, 20.0]), "mels_lens must be 2 integers.*float32"),
        (torch.tensor([[20], [20]]), "mels_lens must be 2 integers"),
    ],
)
def test_lengths_of_a_padded_batch(tokenizer: MiMoAudioTokenizer, lens: torch.Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        tokenizer.encode(torch.zeros(2, TINY["n_mels"], 20), lens)
    with pytest.raises(ValueError, match=words.replace("mels_lens", "codes_lens")):
        tokenizer.decode(torch.zeros(2, 20, 5, dtype=torch.int64), lens)


def test_padded_batches_of_another_shape_or_type(tokenizer: MiMoAudioTokenizer) -> None:
    lens = torch.tensor([20, 20])
    for mels in (torch.zeros(2, 24000), torch.zeros(2, 1, 20), torch.zeros(2, TINY["n_mels"], 20, dtype=torch.int16)):
        with pytest.raises(ValueError, match="mels must be log-mel"):
            tokenizer.encode(mels, lens)
    for n_q in (0, 99):
        with pytest.raises(ValueError, match=f"n_q = {n_q}: this checkpoint has 1 to 5"):
            tokenizer.encode(torch.zeros(2, TINY["n_mels"], 20), lens, n_q)
    for codes in (torch.zeros(20, 5), torch.zeros(2, 20, 5), torch.zeros(2, 20, 5, dtype=torch.bool)):
        with pytest.raises(ValueError, match=r"codes must be .* of integers"):
            tokenizer.decode(codes, lens)
    with pytest.raises(ValueError, match="utterance 0: codes are 20 frames of 6 codebooks"):
        tokenizer.decode(torch.zeros(2, 20, 6, dtype=torch.int64), lens)


def test_samples_and_log_mels_of_another_shape(tokenizer: MiMoAudioTokenizer) -> None:
    for wav in (torch.zeros(1, 100), torch.zeros(0), torch.zeros(100, dtype=torch.int16)):
        with pytest.raises(ValueError, match="wav must be samples"):
            batch_tokenizer.mel_spectrogram(wav, tokenizer.config)
    mel = torch.zeros(40, 7)
    for mels in ([], [mel, torch.zeros(41, 7)], [mel[0]]):
        with pytest.raises(ValueError, match="mels must be one or more"):
            batch_tokenizer.padding(mels)


def test_channels_that_the_model_does_not_have(tmp_path: Path) -> None:
    mono = batch_tokenizer.load_codec(write("moss", tmp_path / "mono"), device="cpu")
    with pytest.raises(ValueError, match=r"samples have shape \(2, 640\), must be \(S,\)"):
        mono.spec.features(np.zeros((2, 640), np.float32))
    stereo = batch_tokenizer.load_codec(write("moss stereo", tmp_path / "stereo"), device="cpu")
    with pytest.raises(ValueError, match=r"samples have shape \(640,\), must be \(2, S\)"):
        stereo.spec.features(np.zeros(640, np.float32))
