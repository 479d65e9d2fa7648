"""Manifest lines, token files and audio files that a seed made wrong, as strangers' files are."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Iterator
from typing import Any

import numpy as np

#: JSON texts that may stand in any field.
TEXTS = (
    "null", "true", "0", "-1", "1.5", "1e999", "-0.0", "NaN", "Infinity", "9" * 400, "9" * 5000, '""', '"\\u0000"',
    '"\\u2028"', '"\\u001b[2J\\u0007"', '"\\ud800"', '"../up/x"', '"/"', '"."', '"a/b"',
    '"' + "k" * 10_000 + '"',
    "[]", "{}", "[null]", "[" * 300 + "]" * 300, "[" * 100_000 + "]" * 100_000, '"memory://nothing/x.wav"',
    '"ftpx://no/x"', '"tar://0+5::/dev/null"', '"file:///no/such/x"', '"reference://x"',
    '"pipe:cat /dev/zero |"',
    '"parquet://7::x"', '"jsonl://0+5::x"', '"data:audio/wav;base64,AAAA"', '"x\\ny"', '"\\u202egnp.wav"', "1" * 19,
    "{]",
    "'x'",
)  # fmt: skip

#: Fields that a row may have beside its own.
FIELDS = ("key", "wav", "quantized_tokens", "start", "end", "offset", "duration", "channel", "audio_stream", "text",
          "id",
          "audio_filepath", "recording", "sources", "supervisions", "snr", "__refused__", "")  # fmt: skip


def manifest_lines(count: int, seed: int, wav: str, out: str) -> Iterator[bytes]:
    """``count`` lines: rows with another value, a field twice or other bytes; rows of other tools; no JSON."""
    random_ = random.Random(seed)
    for number in range(count):
        fields = {
            "key": json.dumps(f"mutated {number}"),
            "wav": json.dumps(wav),
            "quantized_tokens": json.dumps(f"{out}/mutated {number}.json"),
        }
        kind = random_.randrange(8)
        for _ in range(random_.choice((1, 1, 2))):
            fields[random_.choice(FIELDS)] = random_.choice(TEXTS)
        line = "{" + ", ".join(f"{json.dumps(name)}: {text}" for name, text in fields.items()) + "}"
        if kind == 0:  # a field twice
            line = line[:-1] + f', "{random_.choice(FIELDS)}": {random_.choice(TEXTS)}' + "}"
        content = line.encode()
        if kind == 1:  # bytes that are no UTF-8, or no JSON
            place = random_.randrange(len(content))
            content = (
                content[:place]
                + random_.choice((b"\xff", b"\x00", b"\r", b'"', b"\\", b"\xe2\x80\xa8"))
                + content[place:]
            )
        if kind == 2:
            content = content[: random_.randrange(len(content))]
        if kind == 3:
            content = random_.choice((
                b'{"audio_filepath": %b, "duration": 1.0, "text": "a"}',
                b'{"id": "c", "start": 0, "recording": {"sources": []}}',
                b'{"id": "c", "start": 0, "duration": 1e9, "recording": {"sources": [{"type": "file", "source": %b}]}}',
                b"utterance-1 %b", b"utterance-2 cat %b |", b"path,text\n%b,x", b"[%b]", b"%b", b"\xef\xbb\xbf{}",
            )).replace(b"%b", json.dumps(wav).encode())  # fmt: skip
        yield content.replace(b"\n", b" ")


def token_files(
    count: int, seed: int, codebook_sizes: tuple[int, ...], info: dict[str, Any]
) -> Iterator[tuple[str, bytes]]:
    """``count`` token files, JSON or npy, each of which is wrong in one way: a name's ending, and the bytes."""
    random_ = random.Random(seed)
    generator = np.random.default_rng(seed)
    for _ in range(count):
        frames = random_.choice((1, 3, 40))
        codes = generator.integers(0, min(codebook_sizes), (frames, len(codebook_sizes)))
        listed: Any = codes.tolist()
        place = random_.randrange(frames)
        odd = random_.choice(
            (-1, 1 << 16, 10**30, 1.0, 1.5, float("nan"), "1", None, True, [1], {}, "", max(codebook_sizes))
        )
        match random_.randrange(14):
            case 0:
                listed[place][0] = odd
            case 1:
                listed[place] = odd
            case 2:
                listed = odd
            case 3:
                listed[place] = listed[place] + [0] * random_.choice((1, 300))
            case 4:
                listed[place] = listed[place][:-1] if frames > 1 else []
            case 5:
                listed = [list(column) for column in zip(*listed, strict=True)] * 9
            case 6:
                listed = random_.choice(([], [[]], [[], []], [[[1]]], [listed]))
            case 7:
                yield ".json", json.dumps({"quantized_tokens": listed, "info": odd_info(random_, info)}).encode()
                continue
            case 8:
                text = json.dumps({"quantized_tokens": listed, "info": info}).encode()
                cut = random_.randrange(len(text))
                yield (
                    ".json",
                    random_.choice((text[:cut], text[:cut] + b"\xff" + text[cut:], b"[" * 100_000, b"", b"\x00" * 99)),
                )
                continue
            case 9 | 10 | 11:
                yield ".npy", broken_array(random_, codes)
                continue
            case _:
                other = random_.choice((np.float32, np.int64, ">i4", bool, "U3", np.complex64))
                buffer = io.BytesIO()
                np.save(buffer, (codes + random_.choice((0, -5, 70_000))).astype(other))
                yield ".npy", buffer.getvalue()
                continue
        yield ".json", json.dumps({"quantized_tokens": listed, "info": info}).encode()


def odd_info(random_: random.Random, info: dict[str, Any]) -> Any:
    """``info`` of another codec, or none."""
    field = random_.choice(("fingerprint", "codec", "num_samples", "num_frames", "segments", "sample_rate", "wav"))
    value = random_.choice((None, -1, 0, 1.5, "x", [], {}, [[1, 2]], 10**30, {"samples": [0, -1], "frames": "x"}))
    return random_.choice(
        ({**info, field: value}, {**info, field: value}, value, {"fingerprint": "0" * 32, "codec": "\x1b[2J"})
    )


def broken_array(random_: random.Random, codes: np.ndarray) -> bytes:
    """An npy file with some bytes changed, most often of its header."""
    buffer = io.BytesIO()
    np.save(buffer, codes.astype(np.uint16))
    content = bytearray(buffer.getvalue())
    for _ in range(random_.choice((1, 3))):
        content[random_.randrange(random_.choice((10, 80, 128, len(content))))] = random_.randrange(256)
    return bytes(content[: random_.choice((len(content), len(content), random_.randrange(len(content))))])


def audio_bytes(seed: int, content: bytes) -> bytes:
    """An audio file with bytes changed, cut, repeated or put in."""
    random_ = random.Random(seed)
    data = bytearray(content)
    for _ in range(random_.choice((1, 1, 4, 30))):
        place = random_.randrange(random_.choice((min(64, len(data)), min(600, len(data)), len(data))))
        match random_.randrange(6):
            case 0 | 1:
                data[place] = random_.choice((0, 255, 127, 128, random_.randrange(256)))
            case 2:
                data[place : place + 4] = random_.choice((b"\xff" * 4, b"\0" * 4, b"\xff\xff\xff\x7f", b"\0\0\0\x80"))
            case 3:
                data[place:place] = data[place : place + random_.randrange(1, 400)]
            case 4:
                del data[place : place + random_.choice((1, 2, 50, 4000))]
            case _:
                data[place:] = data[place:][: random_.randrange(1, 2000)] if random_.random() < 0.3 else data[place:]
        if len(data) < 8:
            break
    return bytes(data)
