"""Chunks of any size against one pass: codes up to near-ties, samples within 1e-5, state of constant size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import zip_longest

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from batch_tokenizer.codecs.checkpoint import Checkpoint
from batch_tokenizer.codecs.loading import LoadRequest
from batch_tokenizer.codecs.moss.codec import MossCodec, load_codec, open_spec
from batch_tokenizer.codecs.moss.config import MossConfig
from batch_tokenizer.codecs.moss.layers import Stream
from tests.support.moss import (
    Encoded,
    Reference,
    assert_codes_match,
    noise,
    patch,
    random_tensors,
    stage,
    tiny,
    write_moss_checkpoint,
)

#: Samples of each: less than a frame, a frame, several windows (25 frames each), and lengths between.
LENGTHS = (5, 640, 16_100, 50_001, 3200)
WAVS = [noise(length, seed=length) for length in LENGTHS]


@pytest.fixture(scope="module")
def codec(tmp_path_factory) -> MossCodec:
    checkpoint = Checkpoint.open(str(write_moss_checkpoint(tmp_path_factory.mktemp("moss"))))
    spec = open_spec(checkpoint)
    codec = load_codec(LoadRequest(checkpoint, spec))
    codec.model.stream_above = 10_000  # one pass, unless a test says otherwise
    return codec


@pytest.fixture(scope="module")
def wanted() -> list[Encoded]:
    reference = Reference(tiny(), random_tensors(tiny()))
    return [reference.encode(wav, 5) for wav in WAVS]


@pytest.fixture(scope="module")
def decoded(codec, wanted) -> list[np.ndarray]:
    return codec.decode([encoded.codes.astype(np.uint16) for encoded in wanted])


def cut(array: np.ndarray, sizes: Sequence[int]) -> list[np.ndarray]:
    """Pieces of ``sizes``, over and over until the array is used up."""
    pieces, start = [], 0
    while start < len(array):
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(array[start : start + size])
        start += size
    return pieces


def steps(arrays: Sequence[np.ndarray], sizes: Sequence[Sequence[int]], say_ends: bool) -> Iterator[list]:
    """Chunks of several utterances side by side; an ended one goes on as None or as empty chunks."""
    columns = [cut(array, each) for array, each in zip(arrays, sizes, strict=True)]
    for row in zip_longest(*columns):
        yield [chunk if chunk is not None or say_ends else array[:0] for chunk, array in zip(row, arrays, strict=True)]


sample_sizes = st.lists(st.integers(0, 9000), min_size=1, max_size=4).filter(lambda sizes: sum(sizes) > 2000)
frame_sizes = st.lists(st.integers(0, 60), min_size=1, max_size=4).filter(lambda sizes: sum(sizes) > 8)


@settings(max_examples=8)
@given(sizes=st.lists(sample_sizes, min_size=5, max_size=5), say_ends=st.booleans())
def test_encoding_in_chunks(codec, wanted, sizes, say_ends):
    out = zip(*codec.encode_stream(steps(WAVS, sizes, say_ends), 5), strict=True)
    for parts, encoded in zip(out, wanted, strict=True):
        codes = np.concatenate(parts)
        assert codes.dtype == np.uint16
        assert_codes_match(codes, encoded)


@settings(max_examples=8)
@given(sizes=st.lists(frame_sizes, min_size=5, max_size=5), say_ends=st.booleans())
def test_decoding_in_chunks(codec, wanted, decoded, sizes, say_ends):
    codes = [encoded.codes.astype(np.uint16) for encoded in wanted]
    out = zip(*codec.decode_stream(steps(codes, sizes, say_ends)), strict=True)
    for parts, samples in zip(out, decoded, strict=True):
        assert parts[0].dtype == np.float32
        np.testing.assert_allclose(np.concatenate(parts), samples, rtol=0, atol=1e-5)


@pytest.mark.parametrize("frames", [3, 24, 25, 78])
def test_long_utterances_are_done_in_pieces_whatever_their_batch(codec, wanted, decoded, frames, monkeypatch):
    monkeypatch.setattr(codec.model, "stream_above", frames)
    features = [codec.spec.features(wav) for wav in WAVS]
    together = codec.encode(features, 5)
    for code, encoded in zip(together, wanted, strict=True):
        assert_codes_match(code, encoded)
    audio = codec.decode([encoded.codes.astype(np.uint16) for encoded in wanted])
    for samples, one_pass in zip(audio, decoded, strict=True):
        np.testing.assert_allclose(samples, one_pass, rtol=0, atol=1e-5)
    for order in ((3,), (3, 0, 3), (4, 3, 2, 1, 0)):
        for index, code in zip(order, codec.encode([features[index] for index in order], 5), strict=True):
            np.testing.assert_array_equal(code, together[index])


def test_a_pack_takes_no_utterance_longer_than_itself(codec, wanted, monkeypatch):
    monkeypatch.setattr(codec.model, "capacity", 30)
    assert len(wanted[3].codes) == 79
    for code, encoded in zip(codec.encode([codec.spec.features(wav) for wav in WAVS], 5), wanted, strict=True):
        assert_codes_match(code, encoded)


def test_codes_come_as_soon_as_their_frame_is_whole(codec):
    wav = noise(2000)
    chunks = [wav[:639], wav[639:640], wav[640:640], wav[640:1999], wav[1999:]]
    counts = [len(codes) for (codes,) in codec.encode_stream(([chunk] for chunk in chunks), 2)]
    assert counts == [0, 1, 0, 2, 0, 1]
    ended = [[codes.shape for codes in step] for step in codec.encode_stream([[wav, wav[:100]], [None, None]], 2)]
    assert ended == [[(3, 2), (0, 2)], [(1, 2), (1, 2)]]


def test_state_is_of_constant_size(codec):
    model, stream, sizes = codec.model, Stream(), []
    for _ in range(6):
        model.encode_streams([stream], [torch.from_numpy(noise(640 * 20))], 5)
        sizes.append(stream.nbytes)
    # Keys and values of context - 1 rows: two layers of width 24 at 100 rows a second, one of width 32 at 25.
    assert sizes[2:] == [2 * 4 * (2 * 99 * 24 + 24 * 32)] * 4
    assert all(past.untyped_storage().nbytes() == past.nbytes for past in stream.past.values())


def test_the_steps_inside_a_large_chunk_are_bounded(codec, monkeypatch):
    rows = []
    encode = codec.model._encode
    monkeypatch.setattr(
        codec.model, "_encode", lambda wavs, *rest: rows.append(sum(map(len, wavs))) or encode(wavs, *rest)
    )
    monkeypatch.setattr(codec.model, "stream_above", 12)
    list(codec.encode_stream([[noise(640 * 100), noise(640 * 30), noise(640)]], 5))
    assert max(rows) == 12 * 640


def test_positions_go_on_hours_into_a_stream(codec):
    wav = torch.from_numpy(noise(640 * 60))
    codes = torch.from_numpy(np.random.default_rng(0).integers(0, 32, (60, 5)))
    late = MossConfig.from_json(tiny()).frame_rate * 3600 * 10

    def run(begin: float, pieces: int) -> tuple[torch.Tensor, torch.Tensor]:
        there, back = Stream(), Stream()
        there.frames = back.frames = int(begin)
        tokens = [codec.model.encode_streams([there], [part], 5)[0] for part in wav.split(640 * pieces)]
        audio = [codec.model.decode_streams([back], [part])[0] for part in codes.split(pieces)]
        assert there.frames == back.frames == int(begin) + 60
        return torch.cat(tokens), torch.cat(audio)

    whole, chunked, early = run(late, 60), run(late, 7), run(0, 60)
    assert torch.equal(whole[0], chunked[0])
    torch.testing.assert_close(whole[1], chunked[1], rtol=0, atol=2e-6)
    # Float32 angles are not shift-invariant: had positions begun again, these would be equal.
    assert (whole[1] - early[1]).abs().max() > 1e-4


def test_misuse_is_named(codec):
    wav, codes = noise(700), np.zeros((2, 5), dtype=np.uint16)
    for chunks, message in (
        ([[wav], [wav, wav]], "2 chunks for 1 utterances"),
        ([[wav], [None], [wav]], "utterance 0 goes on after its end"),
        ([[wav, wav[:0]]], "utterance 1 has no samples"),
        ([[wav, None]], "utterance 1 has no samples"),
        ([[wav[None]]], r"samples have shape \(1, 700\)"),
    ):
        with pytest.raises(ValueError, match=message):
            list(codec.encode_stream(chunks, 5))
    for chunks, message in (
        ([[codes], [codes, codes]], "2 chunks for 1 utterances"),
        ([[codes], [None], [codes]], "utterance 0 goes on after its end"),
        ([[codes, codes + 32]], "utterance 1: a code is negative or not below"),
    ):
        with pytest.raises(ValueError, match=message):
            list(codec.decode_stream(chunks))
    with pytest.raises(ValueError, match="has 1 to 5"):
        list(codec.encode_stream([[wav]], 6))
    assert list(codec.encode_stream([], 5)) == []
    assert list(codec.decode_stream([])) == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("attention", ["torch_varlen", "sdpa"])
def test_cached_keys_in_the_kernels_of_a_device(tmp_path, attention):
    config = tiny(
        encoder_kwargs=[patch(160), stage(160, 20, 32, 2), patch(4), stage(80, 20, 32, 2)],
        decoder_kwargs=[stage(20, 80, 32, 2, layers=2), patch(4), stage(20, 160, 32, 2), patch(160)],
    )
    checkpoint = Checkpoint.open(str(write_moss_checkpoint(tmp_path, config)))
    codec = load_codec(
        LoadRequest(
            checkpoint,
            open_spec(checkpoint),
            task="token2wav",
            device=torch.device("cuda"),
            dtype=torch.bfloat16,
            attention=attention,
        )
    )
    codes = np.random.default_rng(0).integers(0, 32, (120, 5)).astype(np.uint16)
    (whole,) = codec.decode([codes])
    chunked = np.concatenate([part for (part,) in codec.decode_stream([code] for code in np.split(codes, [1, 30, 77]))])
    assert np.abs(chunked - whole).max() < 0.02 * np.abs(whole).max()
