"""Resampling: torchaudio's bits wherever torchaudio can be used, its values elsewhere, at any length."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torchaudio
from hypothesis import example, given
from hypothesis import strategies as st

from batch_tokenizer.audio import mel, resampling
from batch_tokenizer.audio.resampling import resample
from batch_tokenizer.records import RunError


def noise(channels: int, samples: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (channels, samples)).astype(np.float32)


def with_torchaudio(samples: np.ndarray, from_rate: int, to_rate: int) -> np.ndarray:
    return torchaudio.transforms.Resample(from_rate, to_rate)(torch.from_numpy(samples)).numpy()


@pytest.fixture
def restored_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("from_rate", [8000, 11025, 16000, 22050, 32000, 44100, 48000, 96000])
@pytest.mark.parametrize(("channels", "samples"), [(1, 1), (1, 479), (2, 30011), (6, 5000)])
def test_reference_is_torchaudio_bit_for_bit(from_rate: int, channels: int, samples: int) -> None:
    given_samples = noise(channels, samples)
    np.testing.assert_array_equal(
        resample(given_samples, from_rate, 24000, "reference"), with_torchaudio(given_samples, from_rate, 24000)
    )


@pytest.mark.parametrize(("from_rate", "to_rate"), [(44100, 24000), (48000, 24000), (16000, 24000), (44100, 16000)])
@pytest.mark.parametrize("channels", [1, 2])
def test_blocks_of_long_audio_change_no_bit(from_rate: int, to_rate: int, channels: int) -> None:
    samples = noise(channels, 2 * resampling._BLOCK_SAMPLES + 12345)
    np.testing.assert_array_equal(
        resample(samples, from_rate, to_rate, "reference"), with_torchaudio(samples, from_rate, to_rate)
    )


def test_number_of_threads_changes_no_bit(restored_threads: None) -> None:
    for from_rate in (44100, 48000, 44099):
        samples = noise(2, 100_000)
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(resample(samples, from_rate, 24000, "reference"))
        np.testing.assert_array_equal(results[0], results[1])
        np.testing.assert_array_equal(results[0], results[2])


@pytest.mark.parametrize(
    ("source", "target"), [(147, 320), (147, 80), (2, 1), (1, 3), (1201, 1200), (999, 800), (800, 999), (7, 1)]
)
def test_sparse_equals_torchaudio(source: int, target: int) -> None:
    samples = noise(2, 9000)
    expected = with_torchaudio(samples, source, target)
    result = resampling._resample_sparse(samples, source, target)
    assert result.dtype == np.float32
    assert result.shape == expected.shape
    np.testing.assert_allclose(result, expected, atol=1e-6, rtol=0)


def test_sparse_in_blocks_and_without_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = noise(2, 5000)
    whole = resampling._resample_sparse(samples, 1201, 1200)
    monkeypatch.setattr(resampling, "_SPARSE_BLOCK_TAPS", 1000)
    np.testing.assert_array_equal(resampling._resample_sparse(samples, 1201, 1200), whole)
    monkeypatch.setattr(resampling, "_SPARSE_TABLE_TAPS", 0)
    np.testing.assert_array_equal(resampling._resample_sparse(samples, 1201, 1200), whole)


def test_rates_without_a_common_divisor_never_reach_torchaudio(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: int, target: int) -> None:
        raise AssertionError(f"a kernel of {source} x {target}")

    monkeypatch.setattr(resampling, "_dense_transform", refuse)
    for from_rate in (44099, 23999, 47999, 999_983):
        frequency = 440.0
        time = np.arange(from_rate // 5) / from_rate
        result = resample(np.sin(2 * np.pi * frequency * time)[None].astype(np.float32), from_rate, 24000, "reference")
        expected = np.sin(2 * np.pi * frequency * np.arange(result.shape[1]) / 24000)
        middle = slice(200, -200)
        np.testing.assert_allclose(result[0, middle], expected[middle], atol=0.02)


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 22050, 32000, 44100, 48000, 88200, 96000, 192000])
@pytest.mark.parametrize("to_rate", [16000, 24000, 32000, 44100, 48000])
def test_usual_rates_are_torchaudio_itself(rate: int, to_rate: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(samples: np.ndarray, source: int, target: int) -> np.ndarray:
        raise AssertionError("a usual pair of rates went the sparse way")

    monkeypatch.setattr(resampling, "_resample_sparse", refuse)
    resample(noise(1, 100), rate, to_rate, "reference")


@given(length=st.integers(1, 400_000_000), rates=st.sampled_from([(147, 80), (147, 320), (2, 1), (2, 3), (441, 320)]))
@example(length=40_000_001, rates=(2, 3))
def test_length_is_torchaudios_also_where_it_rounds(length: int, rates: tuple[int, int]) -> None:
    source, target = rates
    rounded = int(torch.ceil(torch.as_tensor(target * length / source)).long())
    produced = (length // source + 1) * target
    assert resampling._output_length(length, source, target) == min(rounded, produced)


@pytest.mark.parametrize("resampler", ["reference", "soxr"])
@pytest.mark.parametrize("from_rate", [100, 8000, 24000, 44099, 44100, 192000, 1_000_000])
def test_one_sample_gives_at_least_one(resampler: resampling.Resampler, from_rate: int) -> None:
    assert resample(noise(2, 1), from_rate, 24000, resampler).shape[1] >= 1


@pytest.mark.parametrize("resampler", ["reference", "soxr"])
def test_channels_do_not_mix(resampler: resampling.Resampler) -> None:
    samples = noise(3, 5000)
    together = resample(samples, 44100, 24000, resampler)
    assert together.dtype == np.float32
    for channel in range(3):
        np.testing.assert_array_equal(
            together[channel], resample(samples[channel : channel + 1], 44100, 24000, resampler)[0]
        )


@pytest.mark.parametrize("resampler", ["reference", "soxr"])
def test_equal_rates_pass_through(resampler: resampling.Resampler) -> None:
    samples = noise(2, 100)
    assert resample(samples, 24000, 24000, resampler) is samples


def test_soxr_rejects_what_would_alias() -> None:
    time = np.arange(44100) / 44100
    above = np.sin(2 * np.pi * 15000 * time)[None].astype(np.float32)
    assert np.abs(resample(above, 44100, 24000, "soxr")[0, 500:-500]).max() < 1e-4
    length = resample(above, 44100, 24000, "soxr").shape[1]
    assert abs(length - math.ceil(44100 * 24000 / 44100)) <= 1


@pytest.mark.parametrize("kind", [ImportError, OSError, RuntimeError])
def test_torchaudio_beside_a_wrong_torch_is_one_error_with_the_remedy(
    kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(name: str) -> None:
        raise kind("libcudart.so.13: cannot open shared object file\nand more")

    monkeypatch.setattr(mel.importlib, "import_module", fail)
    with pytest.raises(RunError, match=r"libcudart\.so\.13.*CUDA 13\.0.*pip install") as caught:
        mel.import_transforms()
    assert "\n" not in str(caught.value)
