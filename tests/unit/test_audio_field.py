"""Files of kinds that go wrong in the field: the right number of samples, the right samples, or one clear reason."""

from __future__ import annotations

import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile

from batch_tokenizer.audio.decoding import decode_audio, open_audio
from batch_tokenizer.audio.loading import load_samples
from batch_tokenizer.records import AudioCut, RowError

RATE = 24000
FIELD = Path(__file__).resolve().parents[3] / "shared" / "field"

needs_field_files = pytest.mark.skipif(not FIELD.is_dir(), reason=f"{FIELD} is not there")
needs_ffmpeg = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="the command ffmpeg is not installed")


def recording(samples: int, rate: int, channels: int = 1, seed: int = 0) -> np.ndarray:
    """(samples, channels): a rising tone in noise, so that no two places sound alike."""
    time = np.arange(samples) / rate
    noise = np.random.default_rng(seed).standard_normal((samples, channels))
    tones = np.stack([np.sin(2 * np.pi * 200 * (c + 1) * time * (1 + 0.1 * time)) for c in range(channels)], axis=1)
    return (0.3 * tones + 0.05 * noise).clip(-1, 1).astype(np.float32)


def ffmpeg(*arguments: object) -> None:
    command = ["ffmpeg", "-v", "error", "-nostdin", "-y", *map(str, arguments)]
    subprocess.run(command, check=True, timeout=600, stdin=subprocess.DEVNULL)


# --- the files themselves


@needs_field_files
@pytest.mark.parametrize(
    ("name", "samples"),
    [
        ("mp3_vbr_in.wav", 194_400),
        ("gsm_odd.wav", 75_840),
        ("m4a_tail.m4a", 75_790),
        ("wav_size_0.wav", 72_000),
        ("wav_stale_size.wav", 72_000),
        ("second_stream_default.mp4", 75_790),
    ],
)
def test_files_of_the_field_are_read_whole(name: str, samples: int) -> None:
    assert len(load_samples(str(FIELD / name), RATE)) == samples


@needs_field_files
def test_parts_of_files_of_the_field() -> None:
    whole = load_samples(str(FIELD / "m4a_tail.m4a"), RATE)
    for start in (0.0, 2.0):
        part = load_samples(str(FIELD / "m4a_tail.m4a"), RATE, cut=AudioCut(start))
        np.testing.assert_array_equal(part, whole[round(start * RATE) :])
    whole = load_samples(str(FIELD / "gsm_odd.wav"), RATE)
    part = load_samples(str(FIELD / "gsm_odd.wav"), RATE, cut=AudioCut(0.5, 1.5))
    np.testing.assert_array_equal(part, whole[12_000:36_000])
    assert np.abs(whole[-900:]).max() < 0.9


@needs_field_files
def test_the_rate_that_an_opus_header_mentions_changes_nothing() -> None:
    one, other = (load_samples(str(FIELD / f"opus_header_{rate}.opus"), RATE) for rate in (0, 48000))
    np.testing.assert_array_equal(one, other)


@needs_field_files
def test_a_stream_may_be_chosen() -> None:
    path = str(FIELD / "second_stream_default.mp4")
    default, first, second = (load_samples(path, RATE, cut=AudioCut(stream=stream)) for stream in (None, 0, 1))
    np.testing.assert_array_equal(default, second)
    assert len(first) != len(second)
    with pytest.raises(RowError, match="has 2 audio streams, so none with number 2 from 0"):
        load_samples(path, RATE, cut=AudioCut(stream=2))
    with pytest.raises(RowError, match="has 1 audio stream, so none with number 1 from 0"):
        load_samples(str(FIELD / "wav_size_0.wav"), RATE, cut=AudioCut(stream=1))


# --- sizes that are wrong


def wav(path: Path, samples: np.ndarray, form: str = "WAV", subtype: str = "PCM_16", rate: int = RATE) -> bytearray:
    soundfile.write(path, samples, rate, format=form, subtype=subtype)
    return bytearray(path.read_bytes())


def chunk(name: bytes, content: bytes) -> bytes:
    return name + struct.pack("<I", len(content)) + content + bytes(len(content) % 2)


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "ALAW"])
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("stated", [0, 2400, 2401])
def test_samples_behind_a_stale_size_are_read(tmp_path: Path, subtype: str, channels: int, stated: int) -> None:
    path = tmp_path / "a.wav"
    data = wav(path, recording(4801, RATE, channels), subtype=subtype)
    expected, _ = decode_audio(str(path))
    struct.pack_into("<I", data, data.index(b"data") + 4, stated)
    path.write_bytes(data)
    samples, rate = decode_audio(str(path))
    assert rate == RATE
    # Of 8-bit samples libsndfile pads an odd number by a byte, which then counts as a sample.
    np.testing.assert_array_equal(samples[:, : expected.shape[1]], expected)
    assert samples.shape[1] - expected.shape[1] <= 1
    with open_audio(str(path)) as audio:
        np.testing.assert_array_equal(audio.read(1000, 2000), expected[:, 1000:2000])


@pytest.mark.parametrize("form", ["RF64", "W64", "WAVEX"])
def test_stale_sizes_of_other_containers(tmp_path: Path, form: str) -> None:
    path = tmp_path / "a.wav"
    data = wav(path, recording(4801, RATE), form)
    expected, _ = decode_audio(str(path))
    if form == "RF64":
        struct.pack_into("<Q", data, data.index(b"ds64") + 16, 480)
    elif form == "W64":
        struct.pack_into("<Q", data, data.index(b"data\xf3\xac") + 16, 24 + 480)
    else:
        struct.pack_into("<I", data, data.index(b"data") + 4, 480)
    path.write_bytes(data)
    np.testing.assert_array_equal(decode_audio(str(path))[0][:, :4801], expected)


@pytest.mark.parametrize(
    ("form", "subtype"), [("AIFF", "PCM_16"), ("AU", "PCM_16"), ("CAF", "PCM_16"), ("WAV", "MS_ADPCM")]
)
def test_stale_sizes_that_cannot_be_read_on_fail_by_name(tmp_path: Path, form: str, subtype: str) -> None:
    path = tmp_path / "a"
    data = wav(path, recording(4800, RATE), form, subtype)
    if form == "AIFF":
        struct.pack_into(">I", data, data.index(b"SSND") + 4, 488)
    elif form == "AU":
        struct.pack_into(">I", data, 8, 480)
    elif form == "CAF":
        struct.pack_into(">q", data, data.index(b"data") + 4, 484)
    else:
        struct.pack_into("<I", data, data.index(b"data") + 4, 512)
    path.write_bytes(data)
    with pytest.raises(RowError, match=f"{path}: its header promises .* bytes of audio, and .* more follow"):
        decode_audio(str(path))


@pytest.mark.parametrize(
    "behind",
    [
        b"",
        b"\0",
        chunk(b"LIST", b"INFOISFT\4\0\0\0abc\0"),
        chunk(b"LIST", b"odd") + chunk(b"id3 ", b"ID3 something"),
        b"LIST" + struct.pack("<I", 3) + b"odd",
        b"TAG" + bytes(125),
        b"ID3\4\0\0\0\0\0\0",
    ],
)
@pytest.mark.parametrize("samples", [2400, 2401])
def test_chunks_and_tags_behind_the_samples_are_no_samples(tmp_path: Path, behind: bytes, samples: int) -> None:
    path = tmp_path / "a.wav"
    data = wav(path, recording(samples, RATE), subtype="PCM_U8")
    path.write_bytes(data + behind)
    assert decode_audio(str(path))[0].shape == (1, samples)


def test_two_recordings_in_one_file_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    data = wav(path, recording(2400, RATE))
    path.write_bytes(data + data)
    with pytest.raises(RowError, match=r"has another recording at byte 4,844"):
        decode_audio(str(path))
    path.write_bytes(data + chunk(b"data", bytes(100)))
    with pytest.raises(RowError, match=r"has another recording"):
        decode_audio(str(path))


def test_a_size_that_wrapped_at_four_gigabytes(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    data = wav(path, recording(24, 8000), rate=8000)
    total = 2**32 + 96_000
    struct.pack_into("<I", data, 40, total - 2**32)
    with path.open("wb") as stream:
        stream.write(data[:44])
        stream.truncate(44 + total)  # sparse
    with open_audio(str(path)) as audio:
        assert audio.header.frames == total // 2
        assert audio.read(total // 2 - 10).shape == (1, 10)


# --- parts

#: Name, file ending, ffmpeg's options.
ENCODERS: dict[str, tuple[str, list[str]]] = {
    "wav": ("wav", []),
    "wav24": ("wav", ["-c:a", "pcm_s24le"]),
    "w64": ("w64", []),
    "aiff": ("aiff", []),
    "caf": ("caf", []),
    "au": ("au", []),
    "mulaw": ("wav", ["-c:a", "pcm_mulaw"]),
    "flac": ("flac", []),
    "alac": ("m4a", ["-c:a", "alac"]),
    "alac_caf": ("caf", ["-c:a", "alac"]),
    "wavpack": ("wv", []),
    "ima": ("wav", ["-c:a", "adpcm_ima_wav"]),
    "ms_adpcm": ("wav", ["-c:a", "adpcm_ms"]),
    "gsm": ("wav", ["-c:a", "libgsm_ms", "-ar", "8000", "-ac", "1"]),
    "vorbis": ("ogg", ["-c:a", "libvorbis", "-q:a", "2"]),
    "opus": ("opus", ["-b:a", "24k"]),
    "opus_webm": ("webm", ["-c:a", "libopus"]),
    "opus_mka": ("mka", ["-c:a", "libopus", "-application", "voip"]),
    "mp3": ("mp3", ["-b:a", "64k"]),
    "mp3_vbr": ("mp3", ["-q:a", "7"]),
    "mp3_no_tag": ("mp3", ["-q:a", "7", "-write_xing", "0"]),
    "mp3_wav": ("wav", ["-c:a", "libmp3lame"]),
    "mp2": ("mp2", ["-ar", "24000"]),
    "aac": ("m4a", ["-b:a", "48k"]),
    "aac_adts": ("aac", []),
    "aac_mkv": ("mkv", ["-c:a", "aac"]),
    "ac3": ("ac3", ["-ar", "48000"]),
    "ac3_mp4": ("mp4", ["-c:a", "ac3", "-ar", "48000"]),
    "wma": ("wma", []),
    "flac_mka": ("mka", ["-c:a", "flac"]),
    "pcm_mov": ("mov", ["-c:a", "pcm_s16le"]),
    "alac_mov": ("mov", ["-c:a", "alac"]),
    "pcm_mka": ("mka", ["-c:a", "pcm_f32le"]),
    "flac_ogg": ("oga", ["-c:a", "flac"]),
    "flac_mp4": ("mp4", ["-c:a", "flac", "-strict", "-2"]),
    "speex": ("spx", ["-c:a", "libspeex", "-ar", "16000", "-ac", "1"]),
    "vorbis_webm": ("webm", ["-c:a", "libvorbis"]),
    "eac3_mp4": ("mp4", ["-c:a", "eac3", "-ar", "48000"]),
    "mp3_avi": ("avi", ["-c:a", "libmp3lame"]),
    "ima_aifc": ("aifc", ["-c:a", "adpcm_ima_qt"]),
    "g722": ("wav", ["-c:a", "adpcm_g722", "-ar", "16000", "-ac", "1"]),
    "g726": ("wav", ["-c:a", "adpcm_g726", "-ar", "8000", "-ac", "1"]),
    "tta": ("tta", []),
    "alaw_w64": ("w64", ["-c:a", "pcm_alaw"]),
    "rf64": ("wav", ["-rf64", "always"]),
}


@pytest.fixture(autouse=True)
def nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    yield
    assert capfd.readouterr().err == ""


@needs_ffmpeg
@pytest.mark.parametrize("kind", ENCODERS)
def test_a_part_of_any_file_has_the_bits_of_the_whole(tmp_path: Path, kind: str) -> None:
    """Rate, length and places are random, others for each kind, and the same each time."""
    rng = np.random.default_rng(list(ENCODERS).index(kind))
    rate = int(rng.choice([8000, 16000, 22050, 24000, 44100, 48000]))
    samples, channels, tail = (int(rng.integers(*bounds)) for bounds in ((16_000, 150_000), (1, 3), (480, 30_000)))
    places = rng.random((3, 2))
    ending, options = ENCODERS[kind]
    source, path = tmp_path / "source.wav", str(tmp_path / f"a.{ending}")
    soundfile.write(source, recording(samples, rate, channels, samples), rate)
    ffmpeg("-i", source, *options, path)
    whole, whole_rate = decode_audio(path)
    assert abs(whole.shape[1] / whole_rate - samples / rate) < 0.3
    length = whole.shape[1]
    ends = [sorted(round(share * length) for share in pair) for pair in places]
    for start, stop in [*ends, (max(0, length - tail), None)]:
        with open_audio(path) as audio:
            np.testing.assert_array_equal(audio.read(start, stop), whole[:, start:stop])
            assert audio.length() == length
    loaded = load_samples(path, RATE)
    for start in (0.0, 0.3 * float(places[0, 0]), max(0.0, len(loaded) / RATE - tail / 48000)):
        part = load_samples(path, RATE, cut=AudioCut(start))
        np.testing.assert_array_equal(part, loaded[round(start * RATE) :])


# --- Opus


def ogg_checksum(page: bytes) -> int:
    value = 0
    for byte in page:
        value ^= byte << 24
        for _ in range(8):
            value = (value << 1) ^ (0x04C11DB7 if value & 0x80000000 else 0)
    return value & 0xFFFFFFFF


def ogg_pages(content: bytes) -> list[bytearray]:
    pages, place = [], 0
    while place < len(content):
        count = content[place + 26]
        size = 27 + count + sum(content[place + 27 : place + 27 + count])
        pages.append(bytearray(content[place : place + size]))
        place += size
    return pages


def ogg_bytes(pages: list[bytearray]) -> bytes:
    for page in pages:
        page[22:26] = bytes(4)
        struct.pack_into("<I", page, 22, ogg_checksum(page))
    return b"".join(pages)


@needs_ffmpeg
@pytest.mark.parametrize("shift", [-960 * 3, 960, 123_456, 2**40 + 1])
def test_positions_that_do_not_begin_at_zero_change_nothing(tmp_path: Path, shift: int) -> None:
    soundfile.write(tmp_path / "source.wav", recording(100_000, 48000), 48000)
    ffmpeg("-i", tmp_path / "source.wav", "-b:a", "32k", tmp_path / "a.opus")
    expected, _ = decode_audio(str(tmp_path / "a.opus"))
    pages = ogg_pages((tmp_path / "a.opus").read_bytes())
    for page in pages[2:]:
        position = struct.unpack_from("<q", page, 6)[0]
        struct.pack_into("<q", page, 6, position + shift)
    (tmp_path / "b.opus").write_bytes(ogg_bytes(pages))
    if shift < 0:  # which no encoder does: more samples than positions
        assert abs(decode_audio(str(tmp_path / "b.opus"))[0].shape[1] - expected.shape[1]) <= -shift
    else:
        np.testing.assert_array_equal(decode_audio(str(tmp_path / "b.opus"))[0], expected)


@needs_ffmpeg
def test_a_lost_page_is_missing_audio(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "source.wav", recording(300_000, 48000), 48000)
    ffmpeg("-i", tmp_path / "source.wav", tmp_path / "a.opus")
    pages = ogg_pages((tmp_path / "a.opus").read_bytes())
    assert len(pages) > 5
    (tmp_path / "a.opus").write_bytes(ogg_bytes(pages[:3] + pages[4:]))
    with pytest.raises(RowError, match=r"a\.opus: damaged or cut short, .* s are missing inside"):
        decode_audio(str(tmp_path / "a.opus"))


@needs_ffmpeg
@pytest.mark.parametrize("container", ["webm", "mka", "mp4"])
def test_opus_gives_the_same_samples_in_every_container(tmp_path: Path, container: str) -> None:
    soundfile.write(tmp_path / "source.wav", recording(96_000, 48000), 48000)
    ffmpeg("-i", tmp_path / "source.wav", "-b:a", "32k", tmp_path / "a.opus")
    ffmpeg("-i", tmp_path / "a.opus", "-c", "copy", tmp_path / f"a.{container}")
    expected, _ = decode_audio(str(tmp_path / "a.opus"))
    samples, _ = decode_audio(str(tmp_path / f"a.{container}"))
    common = min(samples.shape[1], expected.shape[1])
    assert abs(samples.shape[1] - expected.shape[1]) <= 960
    np.testing.assert_array_equal(samples[:, :common], expected[:, :common])
