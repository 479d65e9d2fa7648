"""The further families' path on CUDA, traced on a fake device: one device, no wait, no large tables of the host."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from batch_tokenizer.codecs.checkpoint import Checkpoint
from batch_tokenizer.codecs.mimo.quantizer import Codebook
from batch_tokenizer.codecs.padded_codec import SECONDS_AT_ONCE, PaddedCodec
from batch_tokenizer.codecs.registry import find_family
from batch_tokenizer.codecs.s3tokenizer.config import S3Config
from batch_tokenizer.codecs.s3tokenizer.model import S3Tokenizer
from batch_tokenizer.codecs.snac.codec import SnacCodec
from batch_tokenizer.kernels import segments
from batch_tokenizer.kernels.codebook import minus_half_norms
from tests.support import s3tokenizer
from tests.support.fake_cuda import CUDA, HostWait, fake_cuda_for_batches, fake_weights
from tests.support.padded_codecs import write_checkpoint
from tests.support.qwen3_tts import write_qwen3_tts_checkpoint

#: Bytes of one host array that may be pinned for a batch.
MOST_PINNED = 8_000_000

#: Samples of the utterances of a batch: of several sizes, two of one length, and one that fills a size.
LENGTHS = (3, 700, 700, 1536)

#: WavTokenizer's LSTM runs step by step on a fake device.
LSTM_LENGTHS = (3, 90, 90)

FAMILIES = ("snac", "snac with noise", "nanocodec", "wavtokenizer", "qwen3_tts")


def lengths_of(name: str) -> tuple[int, ...]:
    return LSTM_LENGTHS if name == "wavtokenizer" else LENGTHS


def open_codec(name: str, folder: Any) -> Any:
    """Makes the codec on the fake device; called outside of it, as the checkpoint's files are real."""
    if name == "qwen3_tts":
        checkpoint = Checkpoint.open(str(write_qwen3_tts_checkpoint(folder)))
    else:
        checkpoint = Checkpoint.open(str(write_checkpoint(folder, name.partition(" ")[0])))
    family: Any = find_family(checkpoint)
    spec = family.open_spec(checkpoint)
    if name == "snac with noise":
        spec = replace(spec, noise_seed=7)
    features = [spec.features(np.zeros(length, np.float32)) for length in lengths_of(name)]

    def make(dtype: torch.dtype) -> PaddedCodec:
        with CUDA:
            model = family.blank_model(checkpoint.config)
            model.fold()
        fake_weights(model, dtype)
        codec_class = SnacCodec if name.startswith("snac") else PaddedCodec
        codec = codec_class(spec, model, CUDA, 1, parameters=0)
        codec.batch_frames = 512  # the tiny models have many short frames
        return codec

    return make, features, spec


def run(codec: PaddedCodec, features: Any, count: int) -> list[np.ndarray]:
    codes = codec.encode_batch(features, count)
    widths = [1, *[count] * (len(codes) - 1)]
    return codec.decode_batch([code[:, :width] for code, width in zip(codes, widths, strict=True)])


@pytest.mark.parametrize("name", FAMILIES)
def test_batches_run_on_one_device_without_a_wait(name: str, tmp_path: Any) -> None:
    make, features, spec = open_codec(name, tmp_path)
    with fake_cuda_for_batches() as trace, torch.no_grad():
        codec = make(torch.float32)
        with trace.watch():
            samples = run(codec, features, spec.info.num_codebooks)
    for length, wav in zip(lengths_of(name), samples, strict=True):
        assert wav.shape == (spec.num_output_samples(spec.num_frames(length)),)
    assert trace.operators > 100
    audio = 1.1 * SECONDS_AT_ONCE * spec.info.sample_rate * 4  # what a batch has of it goes to the device and back
    assert max(trace.pinned_bytes) < max(MOST_PINNED, audio)


def test_a_pageable_copy_is_found(tmp_path: Any) -> None:
    make, features, spec = open_codec("nanocodec", tmp_path)
    pageable = mock.patch(
        "batch_tokenizer.codecs.layers.padded.to_device", lambda values, device: torch.as_tensor(values).to(device)
    )
    with fake_cuda_for_batches(pageable) as trace, torch.no_grad():
        codec = make(torch.float32)
        with pytest.raises(HostWait), trace.watch():
            run(codec, features, spec.info.num_codebooks)


#: Equal rows are found at the first batch.
EQUAL_ROWS = mock.patch.object(Codebook, "_known", lambda codebook: (None, minus_half_norms(codebook.embed)))


def fake_s3tokenizer(version: str, dtype: torch.dtype) -> S3Tokenizer:
    with CUDA:
        model = S3Tokenizer(S3Config.from_json(s3tokenizer.tiny(version)))
    model.capacity = 4096
    fake_weights(model, dtype)
    return model


def test_an_index_on_the_host_is_found() -> None:
    positions = property(lambda self: torch.from_numpy(segments.within(self.lengths)))
    left = mock.patch.object(segments.Segments, "positions", positions)
    with fake_cuda_for_batches(EQUAL_ROWS, left) as trace, torch.no_grad():
        model = fake_s3tokenizer("v1", torch.float32)
        with pytest.raises(HostWait, match="is indexed by"), trace.watch():
            model.encode_utterances([torch.zeros(128, 57)])


@pytest.mark.parametrize(
    ("version", "dtype"),
    [
        *((version, torch.float32) for version in ("v1", "v2")),
        *((version, torch.bfloat16) for version in ("v1", "v2", "v3")),
    ],
    ids=["v1", "v2", "v1-bf16", "v2-bf16", "v3-bf16"],
)
def test_packs_of_s3tokenizer_run_on_one_device_without_a_wait(version: str, dtype: torch.dtype) -> None:
    with fake_cuda_for_batches(EQUAL_ROWS) as trace, torch.no_grad():
        model = fake_s3tokenizer(version, dtype)
        with trace.watch():
            codes = model.encode_utterances([torch.zeros(128, frames) for frames in (1, 57, 400, 3000, 5601)])
    assert [code.shape[1] for code in codes] == [1] * 5
    assert trace.operators > 30
    assert (trace.varlen_calls > 0) == (dtype == torch.bfloat16)
    assert max(trace.pinned_bytes) < MOST_PINNED
