"""MOSS's path on CUDA, traced on a fake device: whole utterances and streams, without a wait for the host."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from batch_tokenizer.codecs.layers import quantizers
from batch_tokenizer.codecs.moss.config import MossConfig
from batch_tokenizer.codecs.moss.layers import Stream
from batch_tokenizer.codecs.moss.model import MossAudioTokenizer
from batch_tokenizer.kernels import segments
from tests.support.fake_cuda import CUDA, HostWait, fake_cuda, fake_weights
from tests.support.moss import patch, stage, tiny

CONFIG = MossConfig.from_json(
    tiny(
        # Heads of 16, which the kernel for packs takes.
        encoder_kwargs=[patch(160), stage(160, 12, 32, 2), patch(4), stage(48, 20, 32, 2)],
        decoder_kwargs=[stage(20, 48, 32, 2), patch(4), stage(12, 160, 32, 2), patch(160)],
    )
)


def open_fake(*patches):
    # Equal codebook rows are found on the host, once after loading.
    rows = mock.patch.object(quantizers, "first_equal_rows", lambda rows: torch.arange(len(rows), device=rows.device))
    return fake_cuda((9, 0), rows, *patches)


def make_model(dtype):
    with CUDA:
        model = MossAudioTokenizer(CONFIG)
        model.quantizer.fold()
    model.capacity = 256
    fake_weights(model, dtype)
    return model


def run(model):
    samples = [torch.zeros(int(16000 * seconds)) for seconds in (0.01, 0.5, 3, 12)]  # the last in two packs
    codes = model.encode_utterances(samples, 5)
    model.decode_utterances(codes)
    streams = [Stream(), Stream()]
    for _ in range(2):
        model.encode_streams(streams, [torch.zeros(16000), torch.zeros(640)], 5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_utterances_and_streams_run_on_one_device_without_a_wait(dtype):
    with open_fake() as trace, torch.no_grad():
        model = make_model(dtype)
        with trace.watch():
            run(model)
    assert trace.operators > 200


def test_a_pageable_copy_is_found():
    pageable = mock.patch.object(segments, "to_device", lambda values, device: torch.as_tensor(values).to(device))
    with open_fake(pageable) as trace, torch.no_grad():
        model = make_model(torch.bfloat16)
        with pytest.raises(HostWait), trace.watch():
            run(model)
