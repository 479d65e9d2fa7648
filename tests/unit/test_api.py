"""``load_codec``: every family behind the same lines."""

from __future__ import annotations

import numpy as np
import pytest

import batch_tokenizer
from batch_tokenizer.records import RunError
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
