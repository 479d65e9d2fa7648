"""``load_codec``: every family behind the same lines."""

from __future__ import annotations

import numpy as np
import pytest
import soundfile

import batch_tokenizer
from batch_tokenizer.records import RowError, RunError
from batch_tokenizer.writers.row_encoding import wav_bytes
from tests.support.checkpoints import write_mimo_checkpoint
from tests.support.moss import write_moss_checkpoint


@pytest.fixture(params=["mimo", "moss"])
def codec(request, tmp_path):
    write = write_mimo_checkpoint if request.param == "mimo" else write_moss_checkpoint
    return batch_tokenizer.load_codec(write(tmp_path / "model"), device="cpu")


def test_samples_to_codes_and_back(codec):
    samples = np.random.default_rng(0).normal(size=30000).astype(np.float32) * 0.1
    (codes,) = codec.encode([codec.spec.features(samples)], num_quantizers=2)
    assert codes.dtype == np.uint16
    assert codes.shape == (codec.spec.num_frames(30000), 2)
    (wav,) = codec.decode([codes])
    assert wav.dtype == np.float32
    assert len(wav) == codec.spec.num_output_samples(len(codes))


def test_files_to_codes_and_back(codec, tmp_path):
    random = np.random.default_rng(0)
    for name, rate, length in (("a.wav", 24000, 30000), ("b.flac", 16000, 12000)):
        soundfile.write(tmp_path / name, random.normal(size=length) * 0.1, rate)
    paths = [tmp_path / "a.wav", tmp_path / "b.flac"]
    codes = codec.encode_files(paths)
    samples = [batch_tokenizer.load_audio(path, codec.info.sample_rate).numpy() for path in paths]
    for got, one in zip(codes, samples, strict=True):
        assert got.shape[1] == codec.info.num_codebooks
        assert np.array_equal(got, codec.encode([codec.spec.features(one)])[0])
    made = [tmp_path / "out" / "a.wav", tmp_path / "out" / "b.flac"]
    codec.decode_to_files(codes, made)
    for path, decoded in zip(made, codec.decode(codes), strict=True):
        steps, rate = soundfile.read(path, dtype="int16")
        assert rate == codec.info.output_sample_rate
        assert np.array_equal(steps, np.rint(decoded * 32768).clip(-32768, 32767))
    assert made[0].read_bytes() == wav_bytes(codec.decode(codes)[0], rate)  # the bytes of a run
    with pytest.raises(RowError, match=r"none\.wav"):
        codec.encode_files([tmp_path / "none.wav"])
    with pytest.raises(TypeError, match="paths must be a list of paths"):
        codec.encode_files(str(tmp_path / "a.wav"))
    with pytest.raises(ValueError, match="2 utterances for 1 paths"):
        codec.decode_to_files(codes, made[:1])
    with pytest.raises(ValueError, match=r"x\.ogg"):
        codec.decode_to_files(codes[:1], ["x.ogg"])


def test_the_package_lists_its_public_names():
    assert dir(batch_tokenizer) == sorted(batch_tokenizer.__all__)


def test_a_stream_equals_the_whole(tmp_path):
    codec = batch_tokenizer.load_codec(write_moss_checkpoint(tmp_path / "model"), device="cpu")
    samples = np.random.default_rng(0).normal(size=60000).astype(np.float32) * 0.1
    (whole,) = codec.encode([codec.spec.features(samples)], num_quantizers=2)
    chunks = ([samples[start : start + 7000]] for start in range(0, 60000, 7000))
    parts = [codes for (codes,) in codec.encode_stream(chunks, num_quantizers=2)]
    assert np.array_equal(np.concatenate(parts), whole)


def test_what_is_no_checkpoint_is_named(tmp_path):
    with pytest.raises(RunError, match="nowhere"):
        batch_tokenizer.load_codec(tmp_path / "nowhere")
