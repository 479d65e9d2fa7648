"""Tars made byte by byte, so that tests can make those that no library would, and clips to put into them."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable

import numpy as np
import soundfile


def tar_bytes(members: Iterable[tuple[str, bytes]], tar_format: int = tarfile.USTAR_FORMAT) -> bytes:
    """A tar of regular files."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tar_format) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def header(name: bytes = b"a.wav", size: int = 0, kind: bytes = b"0", *, size_field: bytes | None = None) -> bytes:
    """One header with a good checksum, whatever else is in it."""
    block = bytearray(512)
    block[: len(name)] = name
    block[124:136] = size_field if size_field is not None else b"%011o\0" % size
    block[148:156] = b" " * 8
    block[156:157] = kind
    block[257:263] = b"ustar\0"
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def wav_content(number: int = 0, *, seconds: float = 0.1, rate: int = 16000, channels: int = 1) -> bytes:
    """A short clip of noise; another one for each number."""
    samples = np.random.default_rng(number).uniform(-0.3, 0.3, (int(seconds * rate), channels))
    stream = io.BytesIO()
    soundfile.write(stream, samples, rate, format="WAV", subtype="PCM_16")
    return stream.getvalue()
