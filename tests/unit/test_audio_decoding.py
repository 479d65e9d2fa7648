"""Decoding: every format comes back as it went in, and every hostile file becomes one clear RowError in no time."""

from __future__ import annotations

import os
import signal
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile

from batch_tokenizer.audio.decoding import decode_audio, probe_audio
from batch_tokenizer.audio.reader import AudioHeader
from batch_tokenizer.records import RowError

RATE = 24000


@pytest.fixture(autouse=True)
def nothing_hangs() -> Iterator[None]:
    def give_up(signal_number: int, frame: object) -> None:
        raise AssertionError("decoding hangs")

    previous = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


def tone(samples: int = 4801, channels: int = 1, level: float = 0.4) -> np.ndarray:
    """(channels, samples), another frequency in each channel."""
    time = np.arange(samples) / RATE
    return np.stack([level * np.sin(2 * np.pi * 300 * (c + 1) * time) for c in range(channels)]).astype(np.float32)


def write(path: Path, samples: np.ndarray, rate: int = RATE, **options: str | float) -> bytes:
    soundfile.write(path, samples.T, rate, **options)
    return path.read_bytes()


def write_with_ffmpeg(path: Path, samples: np.ndarray, codec: str, sample_format: str, **options: str) -> None:
    """Samples (channels, S) of the format's own type, as ``codec`` in the container that the suffix names."""
    layout = {1: "mono", 2: "stereo", 6: "5.1"}[len(samples)]
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=RATE, layout=layout)
        planar = sample_format.endswith("p")
        values = samples if planar else samples.T.reshape(1, -1)
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(values), format=sample_format, layout=layout)
        # Without a first time stamp the encoder's delay would not be noted in the file.
        frame.sample_rate, frame.pts = RATE, 0
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)


# Formats


@pytest.mark.parametrize(
    ("suffix", "subtype", "step"),
    [
        ("wav", "PCM_U8", 2**-7),
        ("wav", "PCM_16", 2**-15),
        ("wav", "PCM_24", 2**-23),
        ("wav", "PCM_32", 2**-23),
        ("wav", "FLOAT", 0.0),
        ("wav", "DOUBLE", 0.0),
        ("flac", "PCM_16", 2**-15),
        ("flac", "PCM_24", 2**-23),
        ("aiff", "PCM_16", 2**-15),
    ],
)
@pytest.mark.parametrize("channels", [1, 2])
def test_lossless_formats_come_back_as_they_were(
    tmp_path: Path, suffix: str, subtype: str, step: float, channels: int
) -> None:
    samples = tone(channels=channels)
    path = tmp_path / f"a.{suffix}"
    write(path, samples, subtype=subtype)
    decoded, rate = decode_audio(str(path))
    assert rate == RATE
    assert decoded.dtype == np.float32
    assert decoded.flags.c_contiguous
    assert decoded.shape == samples.shape
    np.testing.assert_allclose(decoded, samples, atol=step, rtol=0)
    assert probe_audio(str(path)) == AudioHeader(samples.shape[1], RATE, channels, exact=True)


def test_extensible_wav_of_six_channels(tmp_path: Path) -> None:
    samples = tone(channels=6)
    write(tmp_path / "a.wav", samples, format="WAVEX", subtype="PCM_24")
    decoded, _ = decode_audio(str(tmp_path / "a.wav"))
    np.testing.assert_allclose(decoded, samples, atol=2**-23, rtol=0)


@pytest.mark.parametrize(("suffix", "subtype"), [("ogg", "VORBIS"), ("opus", "OPUS"), ("mp3", "MPEG_LAYER_III")])
@pytest.mark.parametrize("channels", [1, 2])
def test_lossy_formats_of_libsndfile(tmp_path: Path, suffix: str, subtype: str, channels: int) -> None:
    samples = tone(12000, channels)
    container = {"mp3": "MP3"}.get(suffix, "OGG")
    write(tmp_path / f"a.{suffix}", samples, format=container, subtype=subtype)
    decoded, rate = decode_audio(str(tmp_path / f"a.{suffix}"))
    if suffix == "opus":  # which is decoded at its own rate, whatever the encoder was given
        assert rate == 48000
        decoded = decoded[:, ::2]
    assert rate in (RATE, 48000)
    assert decoded.shape == samples.shape
    assert correlation(decoded, samples) > 0.99


@pytest.mark.parametrize("suffix", ["m4a", "mp4", "mka"])
@pytest.mark.parametrize("channels", [1, 2, 6])
def test_aac_needs_ffmpeg(tmp_path: Path, suffix: str, channels: int) -> None:
    samples = tone(12000, channels)
    path = tmp_path / f"a.{suffix}"
    write_with_ffmpeg(path, samples, "aac", "fltp")
    decoded, rate = decode_audio(str(path))
    assert rate == RATE
    assert len(decoded) == channels
    assert abs(decoded.shape[1] - 12000) <= 2048
    assert probe_audio(str(path)).channels == channels
    # The LFE, channel 3, keeps no tone.
    for channel in (c for c in range(channels) if c != 3):
        assert correlation(decoded[channel : channel + 1], samples[channel : channel + 1]) > 0.98


@pytest.mark.parametrize(
    ("codec", "sample_format", "dtype", "full_scale", "zero"),
    [
        ("pcm_u8", "u8", np.uint8, 2**7, 2**7),
        ("pcm_s16le", "s16", np.int16, 2**15, 0),
        ("pcm_s32le", "s32", np.int32, 2**31, 0),
        ("pcm_f32le", "flt", np.float32, 1, 0),
        ("pcm_f64le", "dbl", np.float64, 1, 0),
    ],
)
@pytest.mark.parametrize("channels", [1, 2])
def test_every_sample_type_of_ffmpeg_is_scaled_to_one(
    tmp_path: Path, codec: str, sample_format: str, dtype: type, full_scale: int, zero: int, channels: int
) -> None:
    exact = tone(channels=channels, level=0.9).astype(np.float64) * full_scale + zero
    values = (np.round(exact) if np.issubdtype(dtype, np.integer) else exact).astype(dtype)
    write_with_ffmpeg(tmp_path / "a.mkv", values, codec, sample_format)
    decoded, _ = decode_audio(str(tmp_path / "a.mkv"))
    np.testing.assert_array_equal(decoded, ((values.astype(np.float64) - zero) / full_scale).astype(np.float32))


def test_the_sound_of_a_video(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        video = container.add_stream("mpeg4", rate=25)
        video.width, video.height, video.pix_fmt = 32, 32, "yuv420p"
        sound = container.add_stream("aac", rate=RATE, layout="mono")
        picture = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
        for packet in [*video.encode(picture), *video.encode(None)]:
            container.mux(packet)
        frame = av.AudioFrame.from_ndarray(tone(6000), format="fltp", layout="mono")
        frame.sample_rate = RATE
        for packet in [*sound.encode(frame), *sound.encode(None)]:
            container.mux(packet)
    decoded, rate = decode_audio(str(path))
    assert (len(decoded), rate) == (1, RATE)
    assert decoded.shape[1] >= 6000


def noise(samples: int) -> np.ndarray:
    return np.random.default_rng(0).uniform(-0.3, 0.3, (1, samples)).astype(np.float32)


def correlation(left: np.ndarray, right: np.ndarray) -> float:
    length = min(left.shape[1], right.shape[1])
    return float(np.corrcoef(left[:, :length].ravel(), right[:, :length].ravel())[0, 1])


def test_one_sample(tmp_path: Path) -> None:
    write(tmp_path / "a.wav", np.full((1, 1), 0.5, np.float32), subtype="FLOAT")
    decoded, _ = decode_audio(str(tmp_path / "a.wav"))
    np.testing.assert_array_equal(decoded, [[0.5]])


def test_unicode_path_and_name_without_suffix(tmp_path: Path) -> None:
    folder = tmp_path / "звук 音声 \U0001f50a"
    folder.mkdir()
    samples = tone()
    write(folder / "ё'\"", samples, format="WAV", subtype="FLOAT")
    np.testing.assert_array_equal(decode_audio(str(folder / "ё'\""))[0], samples)


def test_values_beyond_full_scale_are_kept(tmp_path: Path) -> None:
    samples = tone(level=3.0)
    write(tmp_path / "a.wav", samples, subtype="FLOAT")
    np.testing.assert_array_equal(decode_audio(str(tmp_path / "a.wav"))[0], samples)


# Files that libsndfile alone would cut short


def strip_mp3_tag(data: bytes) -> bytes:
    """Without its first frame, which counts the others."""
    assert b"Xing" in data[:256] or b"Info" in data[:256]
    return data[data.index(data[:2], 64) :]


def test_variable_mp3_that_does_not_know_its_length_is_whole(tmp_path: Path) -> None:
    # Quiet after loud: an estimate from the first frames' bit rate is far too short.
    samples = noise(RATE * 8)
    samples[:, RATE * 4 :] = 0
    options = {"bitrate_mode": "VARIABLE", "compression_level": 0.5}
    data = write(tmp_path / "a.mp3", samples, format="MP3", **options)
    (tmp_path / "a.mp3").write_bytes(strip_mp3_tag(data))
    decoded, _ = decode_audio(str(tmp_path / "a.mp3"))
    assert 8 * RATE <= decoded.shape[1] <= 8 * RATE + 4 * 1152
    assert probe_audio(str(tmp_path / "a.mp3")).frames is None


def test_two_mp3s_end_to_end_are_both_read(tmp_path: Path) -> None:
    data = write(tmp_path / "a.mp3", noise(RATE * 2))
    (tmp_path / "a.mp3").write_bytes(data + data)
    assert decode_audio(str(tmp_path / "a.mp3"))[0].shape[1] >= 4 * RATE


def test_chained_ogg_is_read_to_its_end(tmp_path: Path) -> None:
    first, second = (write(tmp_path / f"{n}.ogg", tone(n)) for n in (24000, 12000))
    assert first[14:18] != second[14:18], "two streams have two serial numbers"
    (tmp_path / "a.ogg").write_bytes(first + second)
    assert decode_audio(str(tmp_path / "a.ogg"))[0].shape[1] >= 36000


def flac_without_length(path: Path, samples: np.ndarray) -> None:
    """What an encoder that writes to a pipe leaves: a count of zero, 36 bits from the middle of byte 21 on."""
    data = bytearray(write(path, samples))
    data[21] &= 0xF0
    data[22:26] = bytes(4)
    path.write_bytes(data)


def test_flac_from_a_pipe_is_read_to_its_end(tmp_path: Path) -> None:
    flac_without_length(tmp_path / "a.flac", tone())
    np.testing.assert_allclose(decode_audio(str(tmp_path / "a.flac"))[0], tone(), atol=2**-15, rtol=0)
    assert probe_audio(str(tmp_path / "a.flac")).frames is None


def test_wav_that_promises_more_than_it_holds_yields_what_is_there(tmp_path: Path) -> None:
    data = bytearray(write(tmp_path / "a.wav", tone(1000)))
    data[40:44] = b"\xff" * 4
    (tmp_path / "a.wav").write_bytes(data)
    np.testing.assert_allclose(decode_audio(str(tmp_path / "a.wav"))[0], tone(1000), atol=2**-15, rtol=0)
    (tmp_path / "a.wav").write_bytes(data[:-1000])
    assert decode_audio(str(tmp_path / "a.wav"))[0].shape == (1, 500)


# Length limits


def test_a_limit_is_checked_before_decoding_where_the_header_knows(tmp_path: Path) -> None:
    data = write(tmp_path / "a.flac", tone(RATE * 2))
    (tmp_path / "a.flac").write_bytes(data[:5000])  # decoding this would fail otherwise
    with pytest.raises(RowError, match=r"too long, at least 2\.00 s where 1\.90 s is the most"):
        decode_audio(str(tmp_path / "a.flac"), max_seconds=1.9)


@pytest.mark.parametrize("make", ["flac", "m4a"])
def test_a_limit_is_checked_while_decoding_where_the_header_does_not_know(tmp_path: Path, make: str) -> None:
    path = tmp_path / f"a.{make}"
    if make == "flac":
        flac_without_length(path, tone(RATE * 2))
    else:
        write_with_ffmpeg(path, tone(RATE * 2), "aac", "fltp")
    with pytest.raises(RowError, match="too long"):
        decode_audio(str(path), max_seconds=1.5)
    assert decode_audio(str(path), max_seconds=2.1)[0].shape[1] >= RATE * 2


def test_a_file_of_exactly_the_limit_passes(tmp_path: Path) -> None:
    write(tmp_path / "a.wav", tone(4410), rate=44100)
    assert decode_audio(str(tmp_path / "a.wav"), max_seconds=0.1)[0].shape == (1, 4410)
    with pytest.raises(RowError, match="too long"):
        decode_audio(str(tmp_path / "a.wav"), max_seconds=4409 / 44100)


# Hostile files


def wav_with(offset: int, layout: str, value: int) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        data = bytearray(write(path, tone(), format="WAV"))
        struct.pack_into(layout, data, offset, value)
        path.write_bytes(data)

    return make


def content(data: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(data) and None


def floats(*values: float, subtype: str = "FLOAT") -> Callable[[Path], None]:
    return lambda path: soundfile.write(path, np.array([*values, 0.0]), RATE, format="WAV", subtype=subtype)


def cut(suffix: str, keep: float | int) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        container = {"opus": "OGG"}.get(suffix, suffix.upper())
        data = write(path, tone(48000), format=container, **({"subtype": "OPUS"} if suffix == "opus" else {}))
        path.write_bytes(data[: keep if isinstance(keep, int) else int(len(data) * keep)])

    return make


def torn(suffix: str) -> Callable[[Path], None]:
    """Junk in the middle."""

    def make(path: Path) -> None:
        data = bytearray(write(path, noise(96000), format=suffix.upper()))
        middle = len(data) // 2
        data[middle : middle + 600] = np.random.default_rng(0).bytes(600)
        path.write_bytes(data)

    return make


def cut_m4a(path: Path) -> None:
    write_with_ffmpeg(path.with_suffix(".m4a"), tone(48000), "aac", "fltp")
    data = path.with_suffix(".m4a").read_bytes()
    path.write_bytes(data[: len(data) // 2])


def flac_that_promises_the_moon(path: Path) -> None:
    data = bytearray(write(path, tone(), format="FLAC"))
    data[21] |= 0x0F
    data[22:26] = b"\xff" * 4
    path.write_bytes(data)


def silent_film(path: Path) -> None:
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        picture = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
        for packet in [*stream.encode(picture), *stream.encode(None)]:
            container.mux(packet)


def playlist(path: Path) -> None:
    target = path.with_name("secret.wav")
    write(target, tone())
    path.write_text(f"ffconcat version 1.0\nfile '{target.name}'\n")


def web_playlist(path: Path) -> None:
    write_with_ffmpeg(path.with_name("secret.aac"), tone(), "aac", "fltp")
    path.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{path.with_name('secret.aac')}\n#EXT-X-ENDLIST\n")


HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: None, "no such file"),
    "below a file": (lambda path: None, "cannot be opened: Not a directory"),
    "empty": (lambda path: path.touch(), "empty"),
    "folder": (lambda path: path.mkdir(), "folder"),
    "pipe": (os.mkfifo, "pipe, device or socket"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "pipe, device or socket"),
    "dangling link": (lambda path: path.symlink_to("nowhere"), "no such file"),
    "link to itself": (lambda path: path.symlink_to(path), "symbolic links"),
    "text": (content(b"hello, this is no audio\n" * 50), "not audio"),
    "html": (content(b"<!DOCTYPE html><html><body>404 Not Found</body></html>"), "not audio"),
    "one byte": (content(b"R"), "not audio"),
    "zeros": (content(bytes(10000)), "not audio|no audio"),
    "playlist of files": (playlist, "not audio"),
    "web playlist": (web_playlist, "not audio"),
    "no samples": (lambda path: soundfile.write(path, np.zeros(0), RATE, format="WAV"), "no samples"),
    "no samples, flac": (lambda path: soundfile.write(path, np.zeros(0), RATE, format="FLAC"), "empty|no samples"),
    "film without sound": (silent_film, "no audio in it"),
    "NaN": (floats(0.1, float("nan")), "NaN or infinite"),
    "infinity": (floats(float("-inf")), "NaN or infinite"),
    "NaN in double": (floats(float("nan"), subtype="DOUBLE"), "NaN or infinite"),
    "too large for float32": (floats(1e300, subtype="DOUBLE"), "NaN or infinite"),
    "wav header cut": (cut("wav", 30), "header is damaged or cut short"),
    "flac header cut": (cut("flac", 30), "header is damaged or cut short"),
    "mp3 header cut": (cut("mp3", 30), "header is damaged or cut short"),
    "ogg header cut": (cut("ogg", 30), "header is damaged or cut short"),
    "opus header cut": (cut("opus", 30), "header is damaged or cut short"),
    "flac body cut": (cut("flac", 0.5), "damaged or cut short"),
    "mp3 body cut": (cut("mp3", 0.5), "damaged or cut short, .* of 48000 samples"),
    "m4a cut": (cut_m4a, "header is damaged or cut short"),
    "flac torn": (torn("flac"), "damaged or cut short"),
    "ogg torn": (torn("ogg"), "damaged or cut short, .* of 96000 samples"),
    "rate of zero": (wav_with(24, "<I", 0), "header is damaged"),
    "rate of one": (wav_with(24, "<I", 1), "sample rate of 1 Hz"),
    "rate of two thousand million": (wav_with(24, "<I", 2**31 - 1), "sample rate of 2147483647 Hz"),
    "rate of four thousand million": (wav_with(24, "<I", 2**32 - 1), "header is damaged"),
    "no channels": (wav_with(22, "<H", 0), "Channel count is zero"),
    "65535 channels": (wav_with(22, "<H", 2**16 - 1), "Too many channels"),
    "unknown codec": (wav_with(20, "<H", 0x7A7A), "no decoder for its audio"),
    "length of 68719476735": (flac_that_promises_the_moon, "promises 68719476735 samples"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_file_is_one_clear_error(tmp_path: Path, kind: str) -> None:
    make, reason = HOSTILE[kind]
    path = tmp_path / "плохой.wav"
    make(path)
    if kind == "below a file":
        (tmp_path / "file").touch()
        path = tmp_path / "file" / "a.wav"
    with pytest.raises(RowError, match=reason) as caught:
        decode_audio(str(path))
    assert caught.value.stage == "load"
    assert caught.value.reason.startswith(f"{path}: ")
    assert "\n" not in caught.value.reason


@pytest.mark.parametrize(
    "kind", ["missing", "empty", "folder", "pipe", "text", "wav header cut", "no channels", "rate of zero"]
)
def test_probing_a_hostile_file(tmp_path: Path, kind: str) -> None:
    make, _ = HOSTILE[kind]
    make(tmp_path / "a.wav")
    with pytest.raises(RowError):
        probe_audio(str(tmp_path / "a.wav"))


@pytest.mark.parametrize("seed", range(12))
def test_junk_bytes(tmp_path: Path, seed: int) -> None:
    random = np.random.default_rng(seed)
    path = tmp_path / ("a." + ["wav", "mp3", "flac", "raw", "au", "gsm", "vox", "m4a", "ogg", "aac", "sds", "x"][seed])
    path.write_bytes(random.bytes(int(10 ** random.uniform(0, 5.5))))
    with pytest.raises(RowError, match=r"not audio|no audio|damaged"):
        decode_audio(str(path))


@pytest.mark.parametrize("path", ["a\0b.wav", "a\udcff\ud800.wav", "x" * 5000, ""])
def test_impossible_path(path: str) -> None:
    with pytest.raises(RowError) as caught:
        decode_audio(path)
    caught.value.reason.encode("utf-8")
    assert caught.value.reason.isprintable()


def test_line_break_in_a_name_does_not_break_the_reason(tmp_path: Path) -> None:
    with pytest.raises(RowError, match="no such file") as caught:
        decode_audio(str(tmp_path / "a\nb.wav"))
    assert "\n" not in caught.value.reason


def test_no_permission(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    write(path, tone())
    path.chmod(0)
    superuser = os.geteuid() == 0
    if superuser:
        os.seteuid(65534)
    try:
        with pytest.raises(RowError, match="no permission"):
            decode_audio(str(path))
    finally:
        if superuser:
            os.seteuid(0)


def test_descriptors_are_closed(tmp_path: Path) -> None:
    write(tmp_path / "good.wav", tone())
    write_with_ffmpeg(tmp_path / "good.m4a", tone(), "aac", "fltp")
    (tmp_path / "junk.wav").write_bytes(b"junk" * 100)
    cut("flac", 0.5)(tmp_path / "cut.flac")
    before = len(os.listdir("/proc/self/fd"))
    for path in tmp_path.iterdir():
        for _ in range(3):
            try:
                decode_audio(str(path))
            except RowError:
                assert path.stem in ("junk", "cut")
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("form", ["WAV", "WAVEX", "FLAC"])
@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bits_decode_to_what_libsndfile_makes_of_them(tmp_path, form, channels):
    every = np.arange(-32768, 32768, dtype=np.int16)
    path = tmp_path / "every.audio"
    soundfile.write(path, np.resize(every, (65538 // channels, channels)), 24000, format=form, subtype="PCM_16")
    expected = soundfile.read(path, dtype="float32", always_2d=True)[0].T
    samples, _ = decode_audio(str(path))
    assert samples.dtype == np.float32
    assert samples.flags.c_contiguous
    assert np.array_equal(samples, expected)
