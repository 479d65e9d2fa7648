"""The mel front end against torchaudio's own transform, and its edges."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest
import torch
import torchaudio

from batch_tokenizer.audio.mel import MelForm, log_mel, log_mel_tensor
from batch_tokenizer.records import RowError

MIMO = MelForm(sample_rate=24000, n_fft=960, hop_length=240, window_size=960, n_mels=128, f_min=0, f_max=None)
OTHER = MelForm(sample_rate=16000, n_fft=512, hop_length=160, window_size=400, n_mels=80, f_min=20.0, f_max=7600.0)


def noise(samples: int) -> np.ndarray:
    return np.random.default_rng(samples).uniform(-1, 1, samples).astype(np.float32)


def with_torchaudio(samples: np.ndarray, form: MelForm) -> np.ndarray:
    names = {"window_size": "win_length"}
    transform = torchaudio.transforms.MelSpectrogram(
        **{names.get(name, name): value for name, value in asdict(form).items()}, power=1.0, center=True
    )
    return torch.log(torch.clip(transform(torch.from_numpy(samples)), min=1e-7)).numpy()


@pytest.mark.parametrize("form", [MIMO, OTHER])
@pytest.mark.parametrize("length", [481, 482, 960, 24000, 24239, 24240, 150_000])
def test_equals_torchaudio_in_any_number_of_blocks(form: MelForm, length: int) -> None:
    samples = noise(length)
    result = log_mel(samples, form)
    assert result.dtype == np.float32
    assert result.shape == (form.n_mels, 1 + length // form.hop_length)
    np.testing.assert_allclose(result, with_torchaudio(samples, form), atol=1e-5, rtol=0)


@pytest.mark.parametrize("length", [1, 2, 239, 240, 480])
def test_short_audio_counts_as_padded_at_its_end(length: int) -> None:
    samples = noise(length)
    padded = np.concatenate([samples, np.zeros(481 - length, np.float32)])
    result = log_mel(samples, MIMO)
    assert result.shape == (128, 3)
    np.testing.assert_allclose(result, with_torchaudio(padded, MIMO), atol=1e-5, rtol=0)


def test_no_samples_is_the_rows_failure() -> None:
    with pytest.raises(RowError, match="no samples"):
        log_mel(np.zeros(0, np.float32), MIMO)


def test_silence_is_at_the_floor() -> None:
    np.testing.assert_array_equal(log_mel(np.zeros(1000, np.float32), MIMO), np.float32(np.log(np.float32(1e-7))))


def test_input_is_left_alone_and_tensor_form_agrees() -> None:
    samples = noise(5000)
    before = samples.copy()
    result = log_mel_tensor(torch.from_numpy(samples).requires_grad_(), MIMO)
    assert not result.requires_grad
    np.testing.assert_array_equal(result.numpy(), log_mel(samples, MIMO))
    np.testing.assert_array_equal(samples, before)


def test_number_of_threads_changes_no_bit() -> None:
    samples = noise(200_000)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(log_mel(samples, MIMO))
    finally:
        torch.set_num_threads(threads)
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])
