"""Parts of files: the samples are those of the whole, wherever the part lies and whatever the format."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batch_tokenizer.audio import loading
from batch_tokenizer.audio.decoding import decode_audio, open_audio
from batch_tokenizer.audio.loading import load_samples, measure_samples
from batch_tokenizer.audio.resampling import Piece, resample, resampled_length
from batch_tokenizer.records import AudioCut, RowError
from tests.unit.test_audio_decoding import write_with_ffmpeg

RATE = 24000
SECONDS = 9


def recording(seconds: float = SECONDS, channels: int = 2, rate: int = RATE) -> np.ndarray:
    """(channels, samples): a rising tone in noise, so that no two places sound alike."""
    time = np.arange(int(seconds * rate)) / rate
    noise = np.random.default_rng(0).standard_normal((channels, len(time)))
    tones = np.stack([np.sin(2 * np.pi * 200 * (c + 1) * time * (1 + 0.1 * time)) for c in range(channels)])
    return (0.3 * tones + 0.05 * noise * (1 + np.sin(time))).clip(-1, 1).astype(np.float32)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The recording in every kind of file that is read in another way."""
    folder = tmp_path_factory.mktemp("cuts")
    samples = recording()
    for suffix, form, subtype in (
        ("wav", "WAV", "PCM_16"),
        ("flac", "FLAC", "PCM_16"),
        ("ogg", "OGG", "VORBIS"),
        ("opus", "OGG", "OPUS"),
        ("mp3", "MP3", "MPEG_LAYER_III"),
    ):
        soundfile.write(folder / f"a.{suffix}", samples.T, RATE, format=form, subtype=subtype)
    for suffix in ("m4a", "mka", "aac"):
        write_with_ffmpeg(folder / f"a.{suffix}", samples, "aac", "fltp")
    return {path.suffix[1:]: str(path) for path in folder.iterdir()}


PLACES = [(0, 1), (1, 500), (3 * RATE + 17, 4 * RATE), (5 * RATE, 8 * RATE + 1), (8 * RATE, None)]
EXACT = ("wav", "flac", "ogg", "opus", "mp3", "mka", "aac", "m4a")


@pytest.mark.parametrize("suffix", EXACT)
@pytest.mark.parametrize(("start", "stop"), PLACES)
def test_a_part_has_the_bits_of_the_whole(files: dict[str, str], suffix: str, start: int, stop: int | None) -> None:
    whole, _ = decode_audio(files[suffix])
    with open_audio(files[suffix]) as audio:
        part = audio.read(start, stop)
    assert part.flags.c_contiguous
    np.testing.assert_array_equal(part, whole[:, start:stop])
    with open_audio(files[suffix]) as audio:
        np.testing.assert_array_equal(audio.read(start, stop, channel=1), whole[1:, start:stop])
    with open_audio(files[suffix]) as audio:
        assert audio.length() == whole.shape[1]


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg"])
def test_what_lies_before_a_part_is_not_decoded(
    files: dict[str, str], suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = []
    with open_audio(files[suffix]) as audio:
        blocks = audio._blocks
        monkeypatch.setattr(
            audio, "_blocks", lambda *part: ((decoded.append(len(b[1][0])), b)[1] for b in blocks(*part))
        )
        audio.read(8 * RATE, 8 * RATE + 100)
    assert 100 <= sum(decoded) < 2.2 * RATE


def test_a_damaged_file_fails_in_the_part_that_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "a.flac"
    soundfile.write(path, recording().T, RATE)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    assert load_samples(str(path), RATE, cut=AudioCut(1, 2)).shape == (RATE,)
    with pytest.raises(RowError, match="damaged or cut short"):
        load_samples(str(path), RATE, cut=AudioCut(7, 8))


@pytest.mark.parametrize("resampler", ["reference", "soxr"])
@pytest.mark.parametrize("rate", [24000, 16000, 44100, 48000, 44099])
def test_cuts_of_a_long_file_are_slices_of_the_whole_loaded_file(tmp_path: Path, resampler: str, rate: int) -> None:
    path = str(tmp_path / "a.wav")
    soundfile.write(path, recording(40 if rate != 44099 else 5, 2, rate).T, rate)
    whole = load_samples(path, RATE, resampler)
    ends = [0.0, 0.3, 1.00003, 1.5, 4.2, 4.99] + ([] if rate == 44099 else [17.77, 39.0])
    for start, end in [*pairwise(ends), (ends[-1], None)]:
        cut = load_samples(path, RATE, resampler, cut=AudioCut(start, end))
        expected = whole[round(start * RATE) : None if end is None else round(end * RATE)]
        assert cut.shape == expected.shape
        if resampler == "reference":
            np.testing.assert_array_equal(cut, expected)
        else:
            np.testing.assert_allclose(cut, expected, atol=2e-5, rtol=0)
    assert measure_samples(path, RATE, resampler) == len(whole)


@pytest.mark.parametrize("channels", [1, 2, 6])
def test_channels_of_a_cut_are_averaged_as_those_of_the_whole(tmp_path: Path, channels: int) -> None:
    path = str(tmp_path / "a.wav")
    soundfile.write(path, recording(13, channels, 48000).T, 48000)
    whole = load_samples(path, RATE)
    np.testing.assert_array_equal(load_samples(path, RATE, cut=AudioCut(1.1, 12.7)), whole[26400:304800])


def test_a_channel_is_that_channel_alone(tmp_path: Path) -> None:
    samples = recording(2)
    path = str(tmp_path / "a.wav")
    soundfile.write(path, samples.T, RATE, subtype="FLOAT")
    for channel in (0, 1):
        np.testing.assert_array_equal(load_samples(path, RATE, cut=AudioCut(channel=channel)), samples[channel])
    with pytest.raises(RowError, match="has 2 channels, so none with number 2 from 0"):
        load_samples(path, RATE, cut=AudioCut(channel=2))


@pytest.mark.parametrize("suffix", ["wav", "mp3", "mka"])
def test_a_cut_that_the_file_does_not_have_names_both_ends(files: dict[str, str], suffix: str) -> None:
    assert abs(len(load_samples(files[suffix], RATE, cut=AudioCut(8, 9.08))) - RATE) < 1500
    with pytest.raises(RowError, match=r"a\.\w+: the segment ends at 9\.5 s, the file at 9\.0"):
        load_samples(files[suffix], RATE, cut=AudioCut(8, 9.5))
    with pytest.raises(RowError, match=r"the segment starts at 20 s, the file ends at|ends before 20 s"):
        load_samples(files[suffix], RATE, cut=AudioCut(20, 21))
    with pytest.raises(RowError, match=r"the segment starts at 20 s, the file ends at|ends before 20 s"):
        load_samples(files[suffix], RATE, cut=AudioCut(20))


def test_a_cut_may_be_too_long_or_too_short(files: dict[str, str]) -> None:
    with pytest.raises(RowError, match="too long, 48000 samples at 24000 Hz where 47999"):
        load_samples(files["wav"], RATE, cut=AudioCut(1, 3), max_samples=47999)
    with pytest.raises(RowError, match="too long"):
        load_samples(files["wav"], RATE, cut=AudioCut(1), max_samples=8 * RATE - 1)
    assert len(load_samples(files["wav"], RATE, cut=AudioCut(1), max_samples=8 * RATE)) == 8 * RATE
    with pytest.raises(RowError, match="shorter than a sample"):
        load_samples(files["wav"], RATE, cut=AudioCut(1, 1.00001))


@pytest.mark.parametrize("suffix", ["mp3", "mka", "aac", "wav", "m4a"])
def test_cuts_in_their_order_take_one_decoding(
    files: dict[str, str], suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = load_samples(files[suffix], 16000)
    opened: list[str] = []
    again = loading.open_audio
    monkeypatch.setattr(loading, "open_audio", lambda path, stream: opened.append(path) or again(path, stream))
    for second in (0, 1, 2, 5, 7):
        cut = load_samples(files[suffix], 16000, cut=AudioCut(second, second + 1))
        np.testing.assert_array_equal(cut, whole[16000 * second :][:16000])
    assert len(opened) == (5 if suffix == "wav" else 1)
    # Backwards, and a file that is another now.
    np.testing.assert_array_equal(load_samples(files[suffix], 16000, cut=AudioCut(0, 1)), whole[:16000])
    before, other = files[suffix] + ".old", files[suffix]
    os.rename(other, before)
    soundfile.write(other, np.zeros(RATE), RATE, format="WAV")
    try:
        assert not load_samples(other, 16000, cut=AudioCut(0.5, 1)).any()
    finally:
        os.replace(before, other)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rates=st.sampled_from(
        [(48000, 24000), (44100, 24000), (16000, 24000), (8000, 16000), (11027, 8000), (24000, 24000)]
    ),
    length=st.integers(1, 700_000),
    place=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    resampler=st.sampled_from(["reference", "soxr"]),
)
def test_any_piece_is_a_slice_of_the_whole(
    rates: tuple[int, int], length: int, place: tuple[float, float], resampler: str
) -> None:
    length = min(length, 30_000) if rates[0] == 11027 else length
    samples = np.random.default_rng(length).uniform(-0.5, 0.5, (1, length)).astype(np.float32)
    whole = resample(samples, *rates, resampler)
    assert whole.shape[1] == resampled_length(length, *rates, resampler)
    first, last = sorted(round(share * whole.shape[1]) for share in place)
    last = max(last, first + 1)
    piece = Piece.plan(first, last, length, *rates, resampler)
    made = piece.resample(samples[:, piece.start : piece.stop])
    expected = whole[:, first:last]
    assert made.shape == expected.shape
    if resampler == "reference":
        np.testing.assert_array_equal(made, expected)
    else:
        np.testing.assert_allclose(made, expected, atol=2e-5, rtol=0)
