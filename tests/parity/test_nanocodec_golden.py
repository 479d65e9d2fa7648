"""NanoCodec against the public implementation's values for a small checkpoint with NeMo's names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from batch_tokenizer.codecs.checkpoint import Checkpoint
from batch_tokenizer.codecs.layers.padded import PaddedBatch
from batch_tokenizer.codecs.nanocodec.codec import NanoCodecCodec
from batch_tokenizer.codecs.registry import find_family

GOLDEN = Path(__file__).parents[3] / "shared" / "golden" / "nanocodec_tiny"

pytestmark = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"the known answers are not at {GOLDEN}")


@pytest.fixture(scope="module")
def expected() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "expected.safetensors")


@pytest.fixture(scope="module")
def codec() -> NanoCodecCodec:
    checkpoint = Checkpoint.open(str(GOLDEN))
    family = find_family(checkpoint)
    return family.load_codec(
        checkpoint,
        family.open_spec(checkpoint),
        task="wav2token2wav",
        device=torch.device("cpu"),
        dtype=torch.float32,
        attention="auto",
        threads=2,
    )


def indices(expected: dict[str, torch.Tensor]) -> list[int]:
    return sorted({int(name.partition(".")[0]) for name in expected})


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("backwards", [False, True])
def test_codes_and_audio(codec, expected, together, backwards):
    codec.together = together
    order = indices(expected)[:: -1 if backwards else 1]
    wavs = [expected[f"{index}.wav"].numpy() for index in order]
    codes = codec.encode([codec.spec.features(wav) for wav in wavs], codec.info.num_codebooks)
    samples = codec.decode(codes)
    for index, wav, code, decoded in zip(order, wavs, codes, samples, strict=True):
        np.testing.assert_array_equal(code, expected[f"{index}.codes"].numpy())
        assert codec.spec.num_frames(len(wav)) == len(code)
        assert codec.spec.num_output_samples(len(code)) == len(decoded)
        np.testing.assert_allclose(decoded, expected[f"{index}.recon"].numpy(), rtol=0, atol=5e-6)


def test_hidden_frames(codec, expected):
    for index in indices(expected):
        features = torch.from_numpy(codec.spec.features(expected[f"{index}.wav"].numpy()))
        with torch.inference_mode():
            hidden = codec.model.hidden(PaddedBatch(features[None])).values[0].mT
        torch.testing.assert_close(hidden, expected[f"{index}.hidden"], rtol=0, atol=3e-5)
