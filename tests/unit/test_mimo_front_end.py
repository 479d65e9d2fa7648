"""MiMo's front end in the codec, and batches that are begun and finished: equal to what the host does, on a CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from batch_tokenizer.audio.mel import MelForm, log_mel
from batch_tokenizer.codecs.base import CodecInfo
from batch_tokenizer.codecs.mimo import model as front_end
from batch_tokenizer.codecs.mimo.codec import MiMoCodec, MiMoSpec
from batch_tokenizer.codecs.mimo.config import MiMoConfig
from batch_tokenizer.codecs.mimo.model import packed_log_mel
from batch_tokenizer.codecs.mimo.sized import random_model
from batch_tokenizer.kernels.segments import GappedAxis
from tests.support.checkpoints import TINY
from tests.unit.test_mimo_fast_path import MatrixShapes

FORM = MelForm(sample_rate=24000, n_fft=96, hop_length=24, window_size=96, n_mels=16, f_min=0, f_max=None)


@pytest.fixture(scope="module")
def config() -> MiMoConfig:
    return MiMoConfig.from_json(TINY)


def make_codec(config: MiMoConfig, where: str, capacity: int | None = None) -> MiMoCodec:
    info = CodecInfo("mimo", "tiny", config.sampling_rate, config.samples_per_frame, config.codebook_size, "random")
    model = random_model(config)
    if capacity is not None:
        model.capacity = capacity
    spec = MiMoSpec(info, config)
    return MiMoCodec(spec.with_device_front_end() if where == "device" else spec, model)


def noise(length: int) -> np.ndarray:
    return np.random.default_rng(length).uniform(-1, 1, length).astype(np.float32)


@given(
    lengths=st.lists(st.integers(FORM.least_samples, 3000), min_size=1, max_size=8),
    gaps=st.lists(st.integers(0, 5), min_size=8, max_size=8),
    after=st.integers(0, 9),
    block=st.sampled_from([1, 7, 64, 8192]),
)
def test_a_pack_has_the_spectra_of_its_utterances(lengths: list[int], gaps: list[int], after: int, block: int) -> None:
    wavs = [noise(length) for length in lengths]
    frames = np.array([1 + length // FORM.hop_length for length in lengths])
    starts = np.cumsum(frames + gaps[: len(frames)]) - frames
    axis = GappedAxis.build(starts, frames, int(starts[-1] + frames[-1]) + after, "cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(front_end, "BLOCK_ROWS", block)
        mel = packed_log_mel(torch.from_numpy(np.concatenate(wavs)), np.array(lengths), axis, FORM)
    assert mel.shape == (axis.size, FORM.n_mels)
    for wav, part in zip(wavs, axis.gather(mel).split(frames.tolist()), strict=True):
        torch.testing.assert_close(part.t(), torch.from_numpy(log_mel(wav, FORM)), atol=1e-5, rtol=0)
    between = torch.ones(axis.size, dtype=torch.bool)
    between[axis.rows] = False
    assert not mel[between].any()


@pytest.mark.parametrize("capacity", [None, 128])
def test_codes_are_those_of_the_host(config: MiMoConfig, capacity: int | None) -> None:
    """Audio shorter than half a transform too, which the spec pads as ``log_mel`` does."""
    wavs = [noise(length) for length in (1, 17, 480, 481, 2400, 24000, 50001)]
    host, device = make_codec(config, "host", capacity), make_codec(config, "device", capacity)
    expected = host.encode([host.spec.features(wav) for wav in wavs], 3)
    codes = device.encode([device.spec.features(wav) for wav in wavs], 3)
    assert [part.dtype for part in codes] == [np.uint16] * len(wavs)
    for wav, want, got in zip(wavs, expected, codes, strict=True):
        assert len(got) == device.spec.num_frames(len(wav))
        np.testing.assert_array_equal(got, want)


def test_a_code_does_not_depend_on_the_pack(config: MiMoConfig) -> None:
    codec = make_codec(config, "device", 128)
    wavs = [noise(length) for length in range(500, 40_000, 1777)]
    features = [codec.spec.features(wav) for wav in wavs]
    forwards, backwards = codec.encode(features, 4), codec.encode(features[::-1], 4)[::-1]
    for one, other in zip(forwards, backwards, strict=True):
        np.testing.assert_array_equal(one, other)


def test_every_matrix_product_has_one_shape(config: MiMoConfig) -> None:
    model = random_model(config)
    model.capacity = 128
    seen = []
    for lengths in ((9600, 21000), (90_000,), (481,) * 9):
        with MatrixShapes() as shapes:
            model.encode_samples([torch.from_numpy(noise(length)) for length in lengths], 2)
        seen.append(shapes.shapes)
    assert seen[0] == seen[1] == seen[2]
    assert any(config.nfft // 2 + 1 in shape for product in seen[0] for shape in product)  # the mel filters' is there


def test_too_short_samples_are_the_callers_fault(config: MiMoConfig) -> None:
    with pytest.raises(ValueError, match="less than"):
        random_model(config).encode_samples([torch.zeros(config.mel.least_samples - 1)])


@pytest.mark.parametrize("where", ["host", "device"])
@pytest.mark.parametrize("capacity", [None, 128])
def test_a_batch_that_is_begun_has_the_results_of_one_that_is_waited_for(
    config: MiMoConfig, where: str, capacity: int | None
) -> None:
    codec = make_codec(config, where, capacity)
    features = [codec.spec.features(noise(length)) for length in (2400, 24000, 481, 9600)]
    codes = codec.encode(features, 4)
    samples = codec.decode(codes)
    first = codec.begin("wav2token2wav", features, 4)
    second = codec.begin("wav2token2wav", features[::-1], 4)
    both, turned = first.finish(), second.finish()
    only_codes = codec.begin("wav2token", features, 4).finish()
    only_samples = codec.begin("token2wav", codes, 4).finish()
    for got in (both.codes, turned.codes[::-1], only_codes.codes, only_samples.codes):
        for one, other in zip(got, codes, strict=True):
            assert one.dtype == np.uint16
            np.testing.assert_array_equal(one, other)
    for got in (both.samples, (turned.samples or [])[::-1], only_samples.samples):
        for one, other in zip(got or [], samples, strict=True):
            np.testing.assert_array_equal(one, other)
    assert only_codes.samples is None
    assert set(both.seconds) == {"encode", "decode"}
    assert set(only_codes.seconds) == {"encode"}
    assert set(only_samples.seconds) == {"decode"}


def test_codes_beyond_the_range_of_int16_arrive() -> None:
    from batch_tokenizer.codecs.execution import codes_to_host

    codes = torch.tensor([[0, 32767], [32768, 65535]])
    np.testing.assert_array_equal(codes_to_host([codes])[0], codes.numpy())
