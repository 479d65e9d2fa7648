"""SNAC against the public implementation's values for small checkpoints in the published layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from batch_tokenizer.codecs.checkpoint import Checkpoint
from batch_tokenizer.codecs.layers.padded import PaddedBatch
from batch_tokenizer.codecs.registry import find_family
from batch_tokenizer.codecs.snac.codec import SnacCodec
from batch_tokenizer.codecs.snac.config import column_levels

GOLDEN = Path(__file__).parents[3] / "shared" / "golden"
KINDS = ("snac_24khz_tiny", "snac_44khz_tiny")

pytestmark = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"the known answers are not at {GOLDEN}")


@pytest.fixture(scope="module", params=KINDS)
def opened(request) -> tuple[SnacCodec, dict[str, torch.Tensor]]:
    folder = GOLDEN / request.param
    checkpoint = Checkpoint.open(str(folder))
    family = find_family(checkpoint)
    codec = family.load_codec(
        checkpoint,
        family.open_spec(checkpoint),
        task="wav2token2wav",
        device=torch.device("cpu"),
        dtype=torch.float32,
        attention="auto",
        threads=2,
    )
    return codec, load_file(folder / "expected.safetensors")


def indices(expected: dict[str, torch.Tensor]) -> list[int]:
    return sorted({int(name.partition(".")[0]) for name in expected})


def rows_of(codec: SnacCodec, expected: dict[str, torch.Tensor], index: int) -> np.ndarray:
    """The levels' known codes as rows of coarse frames."""
    columns = column_levels(codec.spec.config.vq_strides)
    levels = [expected[f"{index}.codes_{level}"] for level in range(len(codec.spec.config.vq_strides))]
    frames = len(levels[0])
    return np.stack([levels[level].reshape(frames, -1)[:, position] for level, position in columns], axis=1)


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("backwards", [False, True])
def test_codes_and_audio(opened, together, backwards):
    codec, expected = opened
    codec.together = together
    order = indices(expected)[:: -1 if backwards else 1] * 2
    wavs = [expected[f"{index}.wav"].numpy() for index in order]
    codes = codec.encode([codec.spec.features(wav) for wav in wavs], codec.info.num_codebooks)
    samples = codec.decode(codes)
    for index, wav, code, decoded in zip(order, wavs, codes, samples, strict=True):
        np.testing.assert_array_equal(code, rows_of(codec, expected, index))
        if f"{index}.flat7" in expected:
            np.testing.assert_array_equal(code, expected[f"{index}.flat7"].numpy())
        assert codec.spec.num_frames(len(wav)) == len(code)
        assert codec.spec.num_output_samples(len(code)) == len(decoded)
        np.testing.assert_allclose(decoded, expected[f"{index}.recon"].numpy(), rtol=0, atol=5e-5)


def test_latent_frames(opened):
    codec, expected = opened
    for index in indices(expected):
        features = torch.from_numpy(codec.spec.features(expected[f"{index}.wav"].numpy()))
        with torch.inference_mode():
            hidden = codec.model.encoder(PaddedBatch(features[None])).values[0].mT
        torch.testing.assert_close(hidden, expected[f"{index}.hidden"], rtol=0, atol=3e-4)


def test_given_noise(opened):
    codec, expected = opened
    [index] = [index for index in indices(expected) if f"{index}.recon_noise" in expected]
    levels = [expected[f"{index}.codes_{level}"].long()[None] for level in range(len(codec.spec.config.vq_strides))]
    noise = [expected[f"{index}.noise_{block}"][None, None] for block in range(len(codec.spec.config.decoder_rates))]
    with torch.inference_mode():
        samples = codec.model.decode(levels, None, noise=noise)[0]
    torch.testing.assert_close(samples, expected[f"{index}.recon_noise"], rtol=0, atol=5e-5)


def test_drawn_noise_is_an_utterances_own(opened):
    codec, expected = opened
    codes = [rows_of(codec, expected, index).astype(np.uint16) for index in indices(expected)]
    plain = codec.decode(codes)
    codec.noise_seed = 7
    try:
        codec.together = True
        batch = codec.decode(codes)
        codec.together = False
        for code, samples, without in zip(codes, batch, plain, strict=True):
            [alone] = codec.decode([code])
            np.testing.assert_allclose(samples, alone, rtol=0, atol=5e-5)
            assert np.abs(alone - without).max() > 1e-3
    finally:
        codec.noise_seed = None
