"""Models of transformers on CUDA, traced on a fake device: one device, no wait, no large tables of the host."""

from __future__ import annotations

import math
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torchaudio

pytest.importorskip("transformers")

from batch_tokenizer.codecs.checkpoint import Checkpoint
from batch_tokenizer.codecs.hf.codec import HfCodec, open_spec
from tests.support import hf
from tests.support.fake_cuda import fake_cuda_for_batches, move_to_fake_device

#: Of padded families utterances of different lengths share a batch.
PADDED = ("mimi", "encodec", "dac")
EQUAL_LENGTHS = ("encodec_chunks", "xcodec", "higgs_audio_v2_tokenizer", "xcodec2", "neucodec")


def resample(samples: torch.Tensor, from_rate: int, to_rate: int) -> torch.Tensor:
    """The shape of torchaudio's, which Higgs calls, and which copies one number to the device for each batch."""
    return samples.new_zeros(*samples.shape[:-1], math.ceil(samples.shape[-1] * to_rate / from_rate))


@pytest.mark.parametrize("name", PADDED + EQUAL_LENGTHS)
def test_batches_run_on_one_device_without_a_wait(name: str, tmp_path: Path) -> None:
    model = hf.save_checkpoint(tmp_path, name)
    spec = open_spec(Checkpoint.open(str(tmp_path)))
    assert (spec.batching == "padded") == (name in PADDED)
    lengths = (130, 200) if name in PADDED else (200, 200)
    features = [spec.features(np.zeros(length, np.float32)) for length in lengths]
    resampling = mock.patch.object(torchaudio.functional, "resample", resample)
    with fake_cuda_for_batches(resampling) as trace, torch.no_grad():
        codec = HfCodec(spec, move_to_fake_device(model))
        codec.batch_frames = 64  # the tiny models have many short frames
        with trace.watch():
            codes = codec.encode_batch(features, spec.info.num_codebooks)
            samples = codec.decode_batch(codes)
    for length, wav in zip(lengths, samples, strict=True):
        assert wav.shape == (spec.num_output_samples(spec.num_frames(length)),)
    assert trace.operators > 100
    assert max(trace.pinned_bytes) < 1_000_000
