"""Objects behind URLs, from an HTTP server that fails now and then, and from an S3 server."""

from __future__ import annotations

import gzip
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from batch_tokenizer.audio.decoding import decode_audio
from batch_tokenizer.records import RowError, RunError
from batch_tokenizer.sources.finishing import SourceSettings
from batch_tokenizer.sources.listing import local_manifest
from batch_tokenizer.storage import remote
from batch_tokenizer.storage.opening import open_location
from batch_tokenizer.storage.remote import StorageError
from batch_tokenizer.storage.streams import StreamReader
from batch_tokenizer.writers.publish import publish
from tests.support.stores import WebStore, s3_store, web_store
from tests.support.tars import tar_bytes, wav_content

pytest.importorskip("aiohttp", reason="aiohttp is not installed: pip install 'batch_tokenizer[remote]'")


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[WebStore]:
    monkeypatch.setattr(remote, "WAITS", (0.01, 0.01, 0.01))
    with web_store() as store:
        yield store


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    with s3_store(["corpus"]):
        yield "s3://corpus"


def content_of(location: str) -> bytes:
    with open_location(location) as (file, _):
        return file.read()


def reason_of(location: str) -> str:
    with pytest.raises(RowError) as raised, open_location(location):
        pass
    assert raised.value.stage == "load"
    assert "\n" not in raised.value.reason
    return raised.value.reason


@pytest.mark.parametrize("faults", [[], [503], ["drop"], [500, "drop", 502], [429], [408]])
def test_what_fails_now_and_then_is_tried_again(web: WebStore, faults: list[int | str]) -> None:
    content = os.urandom(100_000)
    web.files["a/b.wav"] = content
    web.faults[:] = faults
    assert content_of(f"{web.url}/a/b.wav") == content
    assert web.requests["a/b.wav"] == 1 + len(faults)


def test_what_stays_broken_is_told_in_one_line(web: WebStore) -> None:
    web.files["a.wav"] = b"x"
    web.faults[:] = [503] * 9
    reason = reason_of(f"{web.url}/a.wav?token=secret")
    assert "503" in reason
    assert "in 4 tries" in reason
    assert "start the same command again" in reason
    assert "secret" not in reason
    assert web.requests["a.wav"] == 4


@pytest.mark.parametrize(("status", "words"), [(404, "no such file"), (403, "no permission"), (410, "410")])
def test_what_waiting_does_not_mend_is_told_at_once(web: WebStore, status: int, words: str) -> None:
    web.files["a.wav"] = b"x"
    web.faults[:] = [status] * 9
    assert words in reason_of(f"{web.url}/a.wav")
    assert web.requests["a.wav"] == 1


def test_nobody_listens(web: WebStore) -> None:
    assert "in 4 tries" in reason_of("http://127.0.0.1:9/a.wav")


def test_an_empty_object_and_an_unknown_scheme(web: WebStore) -> None:
    web.files["a.wav"] = b""
    assert "is empty" in reason_of(f"{web.url}/a.wav")
    for scheme in ("nowhere", "reference", "ssh", "zip", "github"):
        assert f"{scheme}:// addresses are not read, only s3" in reason_of(f"{scheme}://a/b.wav")
    assert "chained" in reason_of(f"simplecache::{web.url}/a.wav".replace("simplecache::", "zip://x::"))


def test_a_backend_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gcsfs", None)
    assert "pip install gcsfs" in reason_of("gs://bucket/a.wav")


@pytest.mark.parametrize("knows_ranges", [True, False])
def test_large_objects_come_in_parts(web: WebStore, monkeypatch: pytest.MonkeyPatch, knows_ranges: bool) -> None:
    monkeypatch.setattr(remote, "BLOCK", 1000)
    content = os.urandom(3000)
    web.files["a.wav"], web.knows_ranges = content, knows_ranges
    web.faults[:] = ["none", 503]
    assert content_of(f"{web.url}/a.wav") == content
    assert web.requests["a.wav"] == (5 if knows_ranges else 1)
    assert bytes(iter(StreamReader(f"{web.url}/a.wav").read(5000))) == content


def test_a_long_recording_is_fetched_once_for_its_parts(web: WebStore) -> None:
    web.files |= {"long.wav": os.urandom(1 << 20), "short.wav": b"x", "other.wav": os.urandom(1 << 20)}
    long, other = f"{web.url}/long.wav", f"{web.url}/other.wav"
    for location in (long, long, f"{web.url}/short.wav", f"{web.url}/short.wav", long):
        assert content_of(location) == web.files[location.rpartition("/")[2]]
    assert (web.requests["long.wav"], web.requests["short.wav"]) == (1, 2)
    with open_location(long) as (first, _), open_location(long) as (second, _):
        first.read(100)
        assert second.tell() == 0
    assert content_of(other) == web.files["other.wav"]
    assert content_of(long) == web.files["long.wav"]
    assert web.requests["long.wav"] == 2


def test_members_of_a_remote_tar_are_fetched_alone(web: WebStore, tmp_path: Path) -> None:
    clips = [wav_content(number, seconds=20) for number in range(4)]
    web.files["x.tar"] = tar_bytes([(f"{number}.wav", clip) for number, clip in enumerate(clips)])
    path = local_manifest(f"{web.url}/x.tar", tmp_path, SourceSettings(sink="tar"))
    listed = web.sent
    assert path.read_bytes().count(b"\n") == 4
    location = f"tar://{512 + len(clips[0]) + 512 + -len(clips[0]) % 512}+{len(clips[1])}/1.wav::{web.url}/x.tar"
    assert f'"wav":"{location}"'.encode() in path.read_bytes()
    web.faults[:] = ["drop", 503]
    assert content_of(location) == clips[1]
    assert web.sent - listed < 2 * len(clips[1])
    web.knows_ranges = False
    assert "does not send parts" in reason_of(location)


def test_manifests_come_from_a_store_once(web: WebStore, tmp_path: Path) -> None:
    lines = b'{"key":"a","wav":"a.wav","quantized_tokens":"a.json"}\nnot JSON\n'
    web.files |= {"data.jsonl": lines, "data.jsonl.gz": gzip.compress(lines)}
    for name in ("data.jsonl", "data.jsonl.gz"):
        web.faults[:] = [503]
        path = local_manifest(f"{web.url}/{name}", tmp_path, SourceSettings())
        assert path.read_bytes() == lines
        requests = web.requests[name]
        assert local_manifest(f"{web.url}/{name}", tmp_path, SourceSettings()) == path
        assert web.requests[name] == requests
    web.files["data.jsonl"] = lines + lines.replace(b"a", b"b")
    assert local_manifest(f"{web.url}/data.jsonl", tmp_path, SourceSettings()).read_bytes().count(b"\n") == 4
    with pytest.raises(RunError, match=r"none\.jsonl: no such file"):
        local_manifest(f"{web.url}/none.jsonl", tmp_path, SourceSettings())


def test_a_store_that_stops_answering_stops_the_listing(web: WebStore, tmp_path: Path) -> None:
    """A shard that cannot be reached now must not become a shard without rows."""
    web.files["x.tar"] = tar_bytes([("a.wav", b"x" * 3_000_000), ("b.wav", b"x")])
    web.faults[:] = ["none", "none", *[503] * 9]
    with pytest.raises(RunError, match="in 4 tries") as raised:
        local_manifest(f"{web.url}/x.tar", tmp_path, SourceSettings(sink="tar"))
    assert raised.value.exit_code == 1
    assert not list(tmp_path.glob("source-*"))


def test_s3_gives_audio_rows_and_shards_and_takes_outputs(s3: str, tmp_path: Path) -> None:
    clip = wav_content(1)
    publish(f"{s3}/out/ab/tokens.json", b"{}")
    assert content_of(f"{s3}/out/ab/tokens.json") == b"{}"
    publish(f"{s3}/audio/a.wav", clip)
    publish(f"{s3}/audio/a.txt", b"hello")
    publish(f"{s3}/shards/0.tar", tar_bytes([("t.wav", clip), ("t.json", b'{"speaker":7}')]))
    publish(f"{s3}/shards/1.tar", tar_bytes([("u.wav", clip)]))
    assert decode_audio(f"{s3}/audio/a.wav")[1] == 16000
    assert "no such file" in reason_of(f"{s3}/audio/none.wav")
    publish(f"{s3}/audio/empty.bin", b"")
    assert "is empty" in reason_of(f"{s3}/audio/empty.bin")
    for pattern in ("/shards/*.tar", "/shards/{0,1}.tar"):
        path = local_manifest(s3 + pattern, tmp_path, SourceSettings(output_dir=f"{s3}/out"))
        assert path.read_bytes().count(b"\n") == 2
        assert b'"speaker":7' in path.read_bytes()
        assert f'"quantized_tokens":"{s3}/out/'.encode() in path.read_bytes()
    folder = local_manifest(f"{s3}/audio/", tmp_path, SourceSettings(sink="tar"))
    assert folder.read_bytes() == f'{{"key":"a","wav":"{s3}/audio/a.wav","text":"hello"}}\n'.encode()


def test_a_store_that_takes_nothing_stops_the_run_and_not_the_row(web: WebStore) -> None:
    with pytest.raises(RowError, match="in 4 tries") as raised:
        publish("http://127.0.0.1:9/a.json", b"{}")
    assert isinstance(raised.value.__cause__, OSError)


def test_storage_errors_are_one_line() -> None:
    with pytest.raises(StorageError) as raised:
        remote.describe("http:///nothing")
    assert "\n" not in raised.value.reason
