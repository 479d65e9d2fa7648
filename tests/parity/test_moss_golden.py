"""MOSS against the public implementation's values for the small published-layout checkpoint."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from batch_tokenizer.codecs.checkpoint import Checkpoint
from batch_tokenizer.codecs.loading import LoadRequest
from batch_tokenizer.codecs.moss.codec import MossCodec, load_codec, open_spec

GOLDEN = Path(__file__).parents[3] / "shared" / "golden" / "moss_tiny"
UTTERANCES = range(5)
ORDERS = ((0, 1, 2, 3, 4), (4, 2, 0, 3, 1), (3, 3, 0, 0, 4))

pytestmark = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"the known answers are not at {GOLDEN}")


@pytest.fixture(scope="module")
def expected() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "expected.safetensors")


@pytest.fixture
def codec() -> MossCodec:
    return codec_on("cpu")


def codec_on(device: str) -> MossCodec:
    checkpoint = Checkpoint.open(str(GOLDEN))
    return load_codec(LoadRequest(checkpoint, open_spec(checkpoint), device=torch.device(device), threads=2))


@pytest.mark.parametrize("attention", ["auto", "reference"])
def test_hidden_frames(codec, expected, attention):
    codec.model.use_attention(attention)
    for index in UTTERANCES:
        hidden = codec.model.hidden(expected[f"{index}.wav"])
        torch.testing.assert_close(hidden, expected[f"{index}.hidden"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("capacity", ["auto", 80])
@pytest.mark.parametrize("num_quantizers", [8, 3])
def test_mixed_batches(codec, expected, order, capacity, num_quantizers):
    codec.model.capacity = capacity
    wavs = [expected[f"{index}.wav"].numpy() for index in order]
    codes = codec.encode([codec.spec.features(wav) for wav in wavs], num_quantizers)
    samples = codec.decode(codes)
    for index, wav, code, decoded in zip(order, wavs, codes, samples, strict=True):
        np.testing.assert_array_equal(code, expected[f"{index}.codes"].numpy()[:, :num_quantizers])
        assert codec.spec.num_frames(len(wav)) == len(code)
        assert codec.spec.num_output_samples(len(code)) == len(decoded)
        np.testing.assert_allclose(decoded, expected[f"{index}.recon_nq{num_quantizers}"].numpy(), rtol=0, atol=2e-6)


@pytest.mark.parametrize("capacity", [None, 200])
def test_mixed_numbers_of_codebooks_in_one_batch(codec, expected, capacity):
    codec.model.capacity = capacity
    used = [(index, count) for index in UTTERANCES for count in (8, 3)]
    samples = codec.decode([expected[f"{index}.codes"].numpy()[:, :count].astype(np.uint16) for index, count in used])
    for (index, count), decoded in zip(used, samples, strict=True):
        np.testing.assert_allclose(decoded, expected[f"{index}.recon_nq{count}"].numpy(), rtol=0, atol=2e-6)


@pytest.mark.parametrize("frames", [1, 25, 54])
def test_long_utterances_go_through_in_pieces(codec, expected, frames):
    codec.model.stream_above = frames
    codes = codec.encode([codec.spec.features(expected[f"{index}.wav"].numpy()) for index in UTTERANCES], 8)
    samples = codec.decode(codes)
    for index in UTTERANCES:
        np.testing.assert_array_equal(codes[index], expected[f"{index}.codes"].numpy())
        np.testing.assert_allclose(samples[index], expected[f"{index}.recon_nq8"].numpy(), rtol=0, atol=2e-6)


@pytest.mark.parametrize("chunk", [500, 1920, 5000, 48000])
def test_streams_of_several_utterances(codec, expected, chunk):
    wavs = [expected[f"{index}.wav"].numpy() for index in UTTERANCES]
    steps = -(-max(map(len, wavs)) // chunk)
    samples = ([wav[start * chunk : (start + 1) * chunk] for wav in wavs] for start in range(steps))
    codes = [np.concatenate(parts) for parts in zip(*codec.encode_stream(samples, 8), strict=True)]
    cuts = list(pairwise([0, 3, 4, 20, 55]))
    decoded = codec.decode_stream([code[start:stop] for code in codes] for start, stop in cuts)
    for index, audio in enumerate(zip(*decoded, strict=True)):
        np.testing.assert_array_equal(codes[index], expected[f"{index}.codes"].numpy())
        np.testing.assert_allclose(np.concatenate(audio), expected[f"{index}.recon_nq8"].numpy(), rtol=0, atol=2e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_packs_and_streams_on_cuda(expected):
    codec = codec_on("cuda")
    wavs = [expected[f"{index}.wav"].numpy() for index in UTTERANCES]
    packed = codec.encode([codec.spec.features(wav) for wav in wavs], 8)
    streamed = zip(*codec.encode_stream([[wav[:9000] for wav in wavs], [wav[9000:] for wav in wavs]], 8), strict=True)
    for index, code, parts, decoded in zip(UTTERANCES, packed, streamed, codec.decode(packed), strict=True):
        np.testing.assert_array_equal(code, expected[f"{index}.codes"].numpy())
        np.testing.assert_array_equal(np.concatenate(parts), code)
        np.testing.assert_allclose(decoded, expected[f"{index}.recon_nq8"].numpy(), rtol=0, atol=1e-5)
