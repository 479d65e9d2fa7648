"""Locations and tars: what lies where is found as it was put, and no archive does harm."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batch_tokenizer.records import RowError
from batch_tokenizer.storage import streams
from batch_tokenizer.storage.names import (
    StreamedMember,
    TarMember,
    display_name,
    file_name,
    is_url,
    location_of,
    parse_member,
)
from batch_tokenizer.storage.opening import open_location
from batch_tokenizer.storage.tar import ByteStream, Member, SeekableByteStream, TornTar, walk
from tests.support.tars import header, tar_bytes

NAMES = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0/"), min_size=1, max_size=150).filter(
    lambda name: name not in (".", "..")
)


def read(location: str) -> bytes:
    with open_location(location) as (file, size):
        content = file.read(size + 1)
    assert len(content) == size
    return content


def walk_bytes(content: bytes, notes: list[tuple[str, str]] | None = None) -> tuple[list[Member], str | None]:
    """The members of a tar, and why it could not be read on, if so."""
    members: list[Member] = []
    note = (lambda kind, name: None) if notes is None else lambda kind, name: notes.append((kind, name))
    try:
        for member in walk(ByteStream(io.BytesIO(content).read), note):
            members.append(member)
    except TornTar as error:
        return members, str(error)
    return members, None


# --- names


@given(st.text(st.characters(exclude_categories=("Cs",)), max_size=30), st.text(min_size=1, max_size=30))
def test_member_locations_are_read_back_whatever_the_name(name: str, archive: str) -> None:
    for member in (TarMember(512, 7, name, archive), StreamedMember(3, name, archive)):
        assert parse_member(location_of(member)) == member
        assert file_name(location_of(member)) == name


def test_messages_show_no_secrets_and_one_line() -> None:
    url = "https://user:password@host/a.wav?X-Amz-Signature=secret"
    assert display_name(url) == "https://host/a.wav?…"
    assert "secret" not in display_name(f"tar://512+7/b.wav::{url}")
    assert display_name(location_of(TarMember(512, 7, "a\nb.wav", "x.tar"))) == r"'a\nb.wav' in x.tar"
    assert is_url("s3://bucket/key")
    assert not is_url("tar://1+2/a::b")
    assert not is_url("audio/a.wav")


# --- tars


@given(
    st.lists(st.tuples(NAMES, st.binary(max_size=1200)), max_size=8),
    st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_every_member_of_any_tar_is_found_and_read(
    tmp_path_factory: pytest.TempPathFactory, members: list[tuple[str, bytes]], tar_format: int
) -> None:
    folder = tmp_path_factory.mktemp("tars")
    content = tar_bytes(members, tar_format)
    plain, compressed = folder / "x.tar", folder / "x.tar.gz"
    plain.write_bytes(content)
    compressed.write_bytes(gzip.compress(content))
    with plain.open("rb") as stream:
        found = list(walk(SeekableByteStream.of_file(stream), lambda kind, name: None))
    assert [member.name for member in found] == [name for name, _ in members]
    assert walk_bytes(content) == (found, None)
    for member, (_, expected) in zip(found, members, strict=True):
        if expected:
            place = TarMember(member.offset, member.size, member.name, str(plain))
            assert read(location_of(place)) == expected
            assert read(location_of(StreamedMember(member.number, member.name, str(compressed)))) == expected


@given(st.integers(0, 6000))
def test_a_torn_tar_gives_the_members_before_the_tear_and_says_so(length: int) -> None:
    content = tar_bytes([(f"{number}.wav", bytes([number]) * 700) for number in range(3)])
    ends = [512 + 1024 + 1536 * number for number in range(3)]
    members, reason = walk_bytes(content[:length])
    # A member that was begun is handed out before it is known to be torn; the listing sees to that.
    whole = [member for member in members if member.offset + member.size <= length]
    assert len(whole) == sum(1 for end in ends if end - 324 <= length)
    assert (reason is None) == (length >= 3 * 1536 + 512)


def test_appended_archives_are_read_to_the_last() -> None:
    members, reason = walk_bytes(tar_bytes([("a.wav", b"1")]) + tar_bytes([("b.wav", b"2")]))
    assert [member.name for member in members] == ["a.wav", "b.wav"]
    assert reason is None


END = bytes(1024)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b"RIFF" + bytes(2000), "is no tar"),
        (header(size_field=b"\x80" + b"\xff" * 11) + END, "impossible size"),
        (header(size_field=b"\xff" * 12) + END, "impossible size"),
        (header(size_field=b"99999999999\0") + END, "impossible size"),
        (header(size=0o77777777777) + END, "ends at byte 1,536, within member 'a.wav'"),
        (header(b"././@LongLink", 1 << 30, b"L") + END, "has a name or fields of 1,073,741,824 bytes"),
        (header(kind=b"x", size=30) + b"30 size=99999999999999999999\n\n".ljust(512, b"\0") + header() + END, "size"),
        (header()[:-1] + b"x" + END, "is no tar"),
        (header() + header()[:100], "within a header"),
        (header() + b"x" * 512, "header at byte 512 is damaged"),
    ],
)
def test_damaged_and_impossible_archives_are_named(content: bytes, reason: str) -> None:
    assert reason in str(walk_bytes(content)[1])


def test_what_is_no_plain_file_is_told_and_left_out() -> None:
    sparse = bytearray(header(b"sparse.wav", 512, b"S"))
    content = b"".join(
        (
            header(b"hard.wav", 700, b"1"),  # states the size of its target, and brings no content
            header(b"soft.wav", 0, b"2"),
            header(b"null.wav", 0, b"3"),
            header(b"pipe.wav", 0, b"6"),
            header(b"folder/", 0, b"5"),
            bytes(sparse) + b"x" * 512,
            header(b"odd.wav", 5, b"Z") + b"abcde".ljust(512, b"\0"),
            header(b"good.wav", 3) + b"abc".ljust(512, b"\0"),
            END,
        )
    )
    notes: list[tuple[str, str]] = []
    members, reason = walk_bytes(content, notes)
    assert ([member.name for member in members], reason) == (["good.wav"], None)
    assert {name for _, name in notes} == {"hard.wav", "soft.wav", "null.wav", "pipe.wav", "sparse.wav", "odd.wav"}


def test_sparse_files_of_pax_headers_are_left_out_too() -> None:
    record = b"22 GNU.sparse.major=1\n"
    notes: list[tuple[str, str]] = []
    content = header(kind=b"x", size=len(record)) + record.ljust(512, b"\0") + header(size=3) + bytes(512) + END
    assert walk_bytes(content, notes) == ([], None)
    assert notes == [("sparse files", "a.wav")]


@given(st.binary(max_size=64), st.integers(0, 511), st.integers(0, 2))
def test_no_damage_makes_the_walk_crash_or_give_more_than_is_there(junk: bytes, place: int, member: int) -> None:
    content = bytearray(tar_bytes([(f"{number}.wav", b"x" * 600) for number in range(3)]))
    at = member * 1536 + place
    content[at : at + len(junk)] = junk
    members, _ = walk_bytes(bytes(content))
    assert len(members) <= 3


# --- opening


def test_a_member_of_an_archive_that_changed_is_refused(tmp_path: Path) -> None:
    archive = tmp_path / "x.tar"
    archive.write_bytes(tar_bytes([("a.wav", b"abc"), ("b.wav", b"defg")]))
    location = location_of(TarMember(1536, 4, "b.wav", str(archive)))
    assert read(location) == b"defg"
    archive.write_bytes(tar_bytes([("a.wav", b"a" * 700), ("b.wav", b"defg")]))
    with pytest.raises(RowError, match="has something else there"):
        read(location)
    archive.write_bytes(archive.read_bytes()[:100])
    with pytest.raises(RowError, match="has something else there"):
        read(location)
    with pytest.raises(RowError, match="no such file"):
        read(location.replace("x.tar", "y.tar"))


def test_few_archives_stay_open(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for number in range(30):
        (tmp_path / f"{number}.tar").write_bytes(tar_bytes([("a.wav", b"%d" % number)]))
        assert read(f"tar://512+{len(str(number))}/a.wav::{tmp_path}/{number}.tar") == b"%d" % number
    assert len(os.listdir("/proc/self/fd")) <= before + 8


def test_members_of_streams_in_any_order(tmp_path: Path) -> None:
    archive = tmp_path / "x.tar.gz"
    archive.write_bytes(gzip.compress(tar_bytes([(f"{number}", b"%d" % number) for number in range(9)])))
    for number in (0, 1, 5, 4, 4, 8, 0):
        assert read(f"targz://{number}/name::{archive}") == b"%d" % number
    with pytest.raises(RowError, match="has no member number 9"):
        read(f"targz://9/name::{archive}")


def test_large_members_do_not_stay_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batch_tokenizer.storage.files._IN_MEMORY", 1000)
    monkeypatch.setattr("batch_tokenizer.storage.files.BLOCK", 1000)
    content = os.urandom(5001)
    archive = tmp_path / "x.tar"
    archive.write_bytes(tar_bytes([("a", content)]))
    assert read(f"tar://512+5001/a::{archive}") == content
    archive.write_bytes(archive.read_bytes()[:3000])
    with pytest.raises(RowError, match="is cut short"):
        read(f"tar://512+5001/another name::{archive}")


def test_a_compression_bomb_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "_RATIO_FREE", 1 << 20)
    archive = tmp_path / "x.tar.gz"
    archive.write_bytes(gzip.compress(header(size=1 << 26) + bytes(1 << 26), 9))
    with pytest.raises(RowError, match="compression bomb"):
        read(f"targz://0/a.wav::{archive}")


def test_commands_run_only_where_that_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = tmp_path / "x.tar"
    archive.write_bytes(tar_bytes([("a", b"abc")]))
    monkeypatch.delenv(streams.ALLOW_PIPE, raising=False)
    with pytest.raises(RowError, match="needs --allow_pipe"):
        read(f"targz://0/a::pipe:touch {tmp_path}/ran; cat {archive}")
    assert not (tmp_path / "ran").exists()
    monkeypatch.setenv(streams.ALLOW_PIPE, "1")
    assert read(f"targz://0/a::pipe:cat {archive}") == b"abc"
    with pytest.raises(RowError, match="ended with status 3"):
        read("targz://0/a::pipe:exit 3")


@pytest.mark.parametrize(
    "make", [lambda path: path.mkdir(), lambda path: os.mkfifo(path), lambda path: None], ids=["folder", "pipe", "none"]
)
def test_archives_that_are_no_files_are_named(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "x")
    for location in (f"tar://512+7/a::{tmp_path}/x", f"targz://0/a::{tmp_path}/x"):
        with pytest.raises(RowError, match=r"is not a file|no such file"):
            read(location)


def test_a_stream_is_read_by_one_process_only(tmp_path: Path) -> None:
    """A child that was forked in the middle of a stream must not move its parent's place in it."""
    archive = tmp_path / "x.tar.gz"
    archive.write_bytes(gzip.compress(tar_bytes([(f"{number}", os.urandom(70000)) for number in range(20)])))
    first = read(f"targz://0/a::{archive}")
    child = os.fork()
    if child == 0:
        os._exit(0 if len(read(f"targz://15/a::{archive}")) == 70000 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert len(read(f"targz://1/a::{archive}")) == 70000
    assert read(f"targz://0/a::{archive}") == first


def members_of(tmp_path: Path, contents: list[bytes]) -> list[str]:
    archive = tmp_path / "x.tar"
    archive.write_bytes(tar_bytes([(f"{number}", content) for number, content in enumerate(contents)]))
    with archive.open("rb") as stream:
        members = list(walk(SeekableByteStream.of_file(stream), lambda kind, name: None))
    return [location_of(TarMember(member.offset, member.size, member.name, str(archive))) for member in members]


def test_members_that_are_open_at_once_are_independent(tmp_path: Path) -> None:
    first, second, empty, large = members_of(tmp_path, [b"1" * 5000, b"2" * 4000, b"", bytes(2**21)])
    with open_location(first) as (outer, _):
        for _ in range(2):
            assert read(second) == b"2" * 4000
        with pytest.raises(RowError, match="empty"), open_location(empty):
            pass
        assert outer.read() == b"1" * 5000
    with open_location(large) as (one, _), open_location(large) as (other, _):  # from the cache
        assert one.seek(0, os.SEEK_END) == 2**21
        assert other.tell() == 0


def test_large_contents_are_cached_in_a_file_that_each_opening_reads_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("batch_tokenizer.storage.files._IN_MEMORY", 1000)
    content = os.urandom(2**21)
    [location] = members_of(tmp_path, [content])
    with open_location(location) as (one, _), open_location(location) as (other, _):
        assert one.read(100) + other.read(100) == content[:100] * 2
        (tmp_path / "x.tar").unlink()
        assert read(location) == content
