"""MiMo's path on CUDA, traced on a fake device: one device, fitting dtypes, no wait for the host, small tables.

The faults that a trace must find are seeded one by one in ``test_a_seeded_fault_is_found``.
"""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch

from batch_tokenizer.codecs.base import CodecInfo
from batch_tokenizer.codecs.mimo import layers, quantizer
from batch_tokenizer.codecs.mimo import model as model_module
from batch_tokenizer.codecs.mimo.codec import MiMoCodec, MiMoSpec
from batch_tokenizer.codecs.mimo.model import MiMoAudioTokenizer
from batch_tokenizer.codecs.mimo.quantizer import Codebook
from batch_tokenizer.codecs.mimo.sized import sized_config
from batch_tokenizer.kernels import norms, segments
from tests.support.fake_cuda import CUDA, HostWait, fake_cuda, fake_mel_transform, fake_weights

#: Bytes of the largest table that may go to the device for a pack; the results come back in one array.
TABLE_BYTES = 8 << 20

#: Seconds of utterances side by side, the shortest less than a window. One that takes two packs is beside them.
SECONDS = (0.05, 0.5, 3, 7.7)


def open_fake(capability=(9, 0), *patches):
    return fake_cuda(
        capability,
        mock.patch.object(model_module, "mel_transform", fake_mel_transform),
        # Which codebook rows are equal is found on the host, once after loading.
        mock.patch.object(Codebook, "_known", lambda self: (None, torch.empty(len(self.embed), device=CUDA))),
        *patches,
    )


def make_codec(dtype=torch.bfloat16, front_end="device", size="mimo-11m"):
    # Two layers of a stack show what more would.
    config = replace(
        sized_config(size), encoder_layers=2, decoder_layers=2, vocoder_num_layers=2, encoder_skip_layer_id=1
    )
    with CUDA:
        model = MiMoAudioTokenizer(config)
    fake_weights(model, dtype)
    model.join_projections()
    info = CodecInfo("mimo", "fake", config.sampling_rate, config.samples_per_frame, config.codebook_size, "fake")
    spec = MiMoSpec(info, config)
    return MiMoCodec(spec.with_device_front_end() if front_end == "device" else spec, model)


def run_all_tasks(codec, longest=700):
    config = codec.spec.config
    lengths = [int(config.sampling_rate * seconds) for seconds in (*SECONDS, longest) if seconds <= longest]
    if codec.spec.front_end == "device":
        features = [codec.spec.features(np.zeros(length, np.float32)) for length in lengths]
    else:
        features = [np.zeros((config.n_mels, 1 + length // config.hop_length), np.float32) for length in lengths]
    codes = [np.zeros(shape, np.uint16) for shape in ((1, 1), (50, 8), (longest * 25, 8))]
    for task, inputs in (("wav2token", features), ("wav2token2wav", features), ("token2wav", codes)):
        codec.begin(task, inputs, 8)


@pytest.mark.parametrize(
    ("dtype", "front_end", "capability"),
    [
        (torch.bfloat16, "device", (9, 0)),
        (torch.bfloat16, "host", (9, 0)),
        (torch.float16, "device", (8, 0)),
        (torch.float32, "device", (9, 0)),
        (torch.bfloat16, "device", (7, 5)),
    ],
    ids=["bf16", "bf16-host", "fp16", "fp32", "bf16-turing"],
)
def test_all_tasks_run_on_one_device_without_a_wait(dtype, front_end, capability):
    with open_fake(capability) as trace:
        codec = make_codec(dtype, front_end)
        assert codec.runs_ahead
        # Without a kernel for packs attention runs block by block, and a trace of long packs takes minutes.
        has_kernel = dtype != torch.float32 and capability >= (8, 0)
        if not has_kernel:
            codec.model.capacity = 128
        with trace.watch():
            run_all_tasks(codec, 700 if has_kernel else 4)
    assert trace.operators > 1000


def test_tables_are_small():
    """Counted on a pack of short utterances; audio and codes themselves are not tables."""
    with open_fake() as trace:
        codec = make_codec()
        with trace.watch():
            codec.begin("token2wav", [np.zeros((60, 8), np.uint16)] * 100, 8)
        results = 100 * codec.spec.num_output_samples(60) * 4
    assert max(size for size in trace.pinned_bytes if size != results) < TABLE_BYTES


def faults():
    """Name and patch of one fault of each kind that the trace must find."""
    spread = norms.SegmentGroupNorm._spread
    repeat = torch.Tensor.repeat_interleave
    encode = quantizer.ResidualVectorQuantizer.encode
    reduce = torch.segment_reduce
    activate = layers.activate
    with_offsets = lambda make: mock.patch.object(segments.Segments, "offsets", property(make))  # noqa: E731
    offsets = lambda self: np.append(self.starts, self.total)  # noqa: E731
    return {
        "a value on the host": mock.patch.object(
            norms.SegmentGroupNorm, "_spread", staticmethod(lambda row, s: spread(row, s) + 0 * row.sum().item())
        ),
        "positions left on the host": mock.patch.object(
            segments.Segments, "positions", property(lambda self: torch.from_numpy(segments.within(self.lengths)))
        ),
        "offsets left on the host": with_offsets(lambda self: torch.from_numpy(offsets(self).astype(np.int32))),
        "offsets of 64 bits": with_offsets(lambda self: segments.to_device(offsets(self), self.device)),
        "an unknown output size": mock.patch.object(
            torch.Tensor, "repeat_interleave", lambda self, repeats, output_size=None: repeat(self, repeats)
        ),
        "a choice by value": mock.patch.object(
            quantizer.ResidualVectorQuantizer, "encode", lambda self, h, n: encode(self, h[h.sum(1) > 0], n)
        ),
        "mixed dtypes": mock.patch.object(layers, "activate", lambda x: activate(x).float()),
        "a pageable copy": mock.patch.object(
            segments, "to_device", lambda values, device: torch.as_tensor(values).to(device)
        ),
        "a check of lengths": mock.patch.object(
            torch, "segment_reduce", lambda data, mode, lengths, unsafe: reduce(data, mode, lengths=lengths)
        ),
    }


@pytest.mark.parametrize("name", faults())
def test_a_seeded_fault_is_found(name):
    with open_fake((9, 0), faults()[name]) as trace:
        codec = make_codec()
        with pytest.raises(Exception) as caught, trace.watch():  # noqa: PT011 - each kind raises its own
            run_all_tasks(codec)
    expected = {"a pageable copy": HostWait, "a check of lengths": HostWait, "offsets of 64 bits": AssertionError}
    assert isinstance(caught.value, expected.get(name, Exception))
