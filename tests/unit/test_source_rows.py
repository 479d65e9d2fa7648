"""Sources: whatever names a corpus becomes one manifest, and what cannot be a row is a refused one."""

from __future__ import annotations

import argparse
import contextlib
import gzip
import itertools
import json
import os
import random
import re
import sys
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from hypothesis import example, given
from hypothesis import strategies as st

from batch_tokenizer.cli import main
from batch_tokenizer.config import RunConfig, add_options, beside
from batch_tokenizer.manifest.manifest import Manifest
from batch_tokenizer.manifest.row import MAX_LINE, REFUSED, cut_of
from batch_tokenizer.records import AudioCut, ManifestRow, RowError, RowFailure, RunError
from batch_tokenizer.runs.source import prepare, settings_of
from batch_tokenizer.sources import listing
from batch_tokenizer.sources.finishing import MOST_NAME, SourceSettings, output_path
from batch_tokenizer.sources.foreign_rows import Refused, complete
from batch_tokenizer.sources.listing import local_manifest
from batch_tokenizer.sources.made_keys import SeenKeys, hash_of
from batch_tokenizer.sources.patterns import expand_braces, find_sources
from batch_tokenizer.storage.opening import open_location
from tests.support.tars import header, tar_bytes, wav_content

NO_OUTPUTS = SourceSettings(sink="tar")


def rows_of(data_list: str | Path, folder: Path, given_settings: SourceSettings = NO_OUTPUTS) -> list[dict[str, Any]]:
    """The rows that a source becomes."""
    path = local_manifest(str(data_list), folder / "index", given_settings)
    return [json.loads(line) for line in path.read_bytes().splitlines() if line.strip()]


def read(location: str) -> bytes:
    with open_location(location) as (file, _):
        return file.read()


# --- patterns


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("a", ["a"]),
        ("s{0..2}.tar", ["s0.tar", "s1.tar", "s2.tar"]),
        ("{008..011}", ["008", "009", "010", "011"]),
        ("{2..0}", ["2", "1", "0"]),
        ("{a,b}{1..2}", ["a1", "a2", "b1", "b2"]),
        ("{a,{x,y}}", ["a", "x", "y"]),
        ("{}{a}", ["{}{a}"]),
        ("{a}{1..2}", ["{a}1", "{a}2"]),
    ],
)
def test_braces(pattern: str, words: list[str]) -> None:
    assert sorted(expand_braces(pattern)) == sorted(words)


def test_too_many_files_are_refused_at_once() -> None:
    first = itertools.islice(expand_braces("{0..99999999999}"), 10_000_000)
    with pytest.raises(RunError, match="more than"):
        sum(1 for _ in first)


def test_globs_lists_and_files_with_braces_in_their_names(tmp_path: Path) -> None:
    for name in ("s1.tar", "s0.tar", "x{0..1}.tar", "b.txt"):
        (tmp_path / name).write_bytes(tar_bytes([("a.wav", b"x")]))
    (tmp_path / "list.txt").write_text(f"# shards\n{tmp_path}/s*.tar\n\n{tmp_path}/s1.tar\n")
    located = [source.location for source in find_sources(f"{tmp_path}/s*.tar")]
    assert located == [f"{tmp_path}/s0.tar", f"{tmp_path}/s1.tar"]
    assert [source.location for source in find_sources(f"{tmp_path}/x{{0..1}}.tar")] == [f"{tmp_path}/x{{0..1}}.tar"]
    assert [source.location for source in find_sources(f"{tmp_path}/list.txt")] == [*located, f"{tmp_path}/s1.tar"]
    with pytest.raises(RunError, match="no file matches"):
        find_sources(f"{tmp_path}/none*.tar")
    with pytest.raises(RunError, match=r"2 of 4 files do not exist, the first .*s2\.tar"):
        rows_of(f"{tmp_path}/s{{0..3}}.tar", tmp_path)


@pytest.mark.parametrize(
    ("data_list", "name"),
    [
        ("a/data.jsonl", "a/data.T"),
        ("a/data.jsonl.gz", "a/data.T"),
        ("a/shards/{000..999}.tar", "a/shards.T"),
        ("shards/*.tar", "shards.T"),
        ("*.tar", "shards.T"),
        ("../{0..3}.tar", "../shards.T"),
        ("s3://bucket/deep/data.jsonl", "data.T"),
        ("s3://bucket/shards/{0..3}.tar", "shards.T"),
        ("https://host/x/data.jsonl?token=a/b", "data.T"),
        ("pipe:cat a/b.tar", "pipe.T"),
    ],
)
def test_run_folders_lie_where_a_person_would_look(data_list: str, name: str) -> None:
    assert beside(data_list, ".T") == Path(name)


def test_run_folder_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "audio").mkdir()
    assert RunConfig(data_list=f"{tmp_path}/audio/").default_run_dir() == tmp_path / "audio.wav2token.run"
    monkeypatch.chdir(tmp_path / "audio")
    assert beside(".", ".x") == tmp_path / "audio.x"


# --- JSON lines


def test_complete_rows_are_taken_as_they_stand(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"key":"a","wav":"a.wav","quantized_tokens":"a.json"}\n')
    assert local_manifest(str(path), tmp_path / "index", SourceSettings()) == path
    assert not (tmp_path / "index").exists()
    missing = tmp_path / "none.jsonl"
    assert local_manifest(str(missing), tmp_path / "index", SourceSettings()) == missing


def test_every_line_stays_in_its_place(tmp_path: Path) -> None:
    """Lines that are no rows pass through, for the manifest to refuse by their line."""
    path = tmp_path / "data.jsonl"
    long = b'{"key":"' + b"x" * (MAX_LINE + 5000)
    lines = [b'\xef\xbb\xbf{"key":"a","audio_filepath":"a.wav","duration":1.5}', b"", b"not JSON", b"[1]", long,
             b"\xff", b'{"key":"b","wav":"b.wav","quantized_tokens":"own/b.json"}', b'{"wave":"c.wav"}']  # fmt: skip
    path.write_bytes(b"\n".join(lines))
    made = local_manifest(str(path), tmp_path / "index", SourceSettings(output_dir="out"))
    manifest = Manifest.open(made, "wav2token", tmp_path / "index")
    assert manifest.num_lines == len(lines)
    items = {item.line: item for item in manifest.read(0, len(lines))}
    assert isinstance(items[0], ManifestRow)
    assert (items[0].wav, items[0].fields["duration"]) == ("a.wav", 1.5)
    assert isinstance(items[6], ManifestRow)
    assert items[6].quantized_tokens == "own/b.json"
    reasons = {line: item.reason for line, item in items.items() if isinstance(item, RowFailure)}
    assert sorted(reasons) == [2, 3, 4, 5, 7]
    assert "longer than 16 MiB" in reasons[4]
    assert 'field "key" is missing' in reasons[7]


NEMO = {"audio_filepath": "wavs/a.wav", "duration": 2.0, "text": "hello", "lang": "en"}


def test_nemo_rows() -> None:
    assert complete(NEMO) == {"key": "wavs/a", "wav": "wavs/a.wav", **NEMO}
    assert complete({"audio": {"path": "a.wav", "bytes": None}}) == {"key": "a", "wav": "a.wav"}
    first = complete({**NEMO, "offset": 0})
    assert (first["key"], first["offset"], first["duration"]) == ("wavs/a-0-2.0", 0, 2.0)
    assert cut_of(first) == AudioCut(0.0, 2.0)
    assert complete({**NEMO, "offset": 0, "duration": 1.5})["key"] == "wavs/a-0-1.5"
    assert complete({**NEMO, "offset": 0, "duration": None})["key"] == "wavs/a-0"
    cut = complete({**NEMO, "offset": 12.5})
    assert (cut["key"], cut["offset"], cut["duration"]) == ("wavs/a-12.5-2.0", 12.5, 2.0)
    assert complete({**NEMO, "id": "u1"})["key"] == "u1"
    assert complete(NEMO, base="base")["wav"] == "base/wavs/a.wav"
    assert complete({**NEMO, "audio_filepath": "/x/a.wav"}, base="base")["wav"] == "/x/a.wav"
    for row, reason in (({**NEMO, "shard_id": 3}, "name its tars"), ({"audio_filepath": 7}, "not a path")):
        with pytest.raises(Refused, match=reason):
            complete(row)


def test_nemo_paths_are_beside_their_manifest_where_they_are_not_here(tmp_path: Path) -> None:
    (tmp_path / "wavs").mkdir()
    (tmp_path / "wavs" / "a.wav").write_bytes(wav_content())
    (tmp_path / "nemo.json").write_text(json.dumps(NEMO) + "\n")
    assert rows_of(tmp_path / "nemo.json", tmp_path)[0]["wav"] == f"{tmp_path}/wavs/a.wav"


def lhotse(**more: Any) -> dict[str, Any]:
    recording = {
        "id": "rec", "sources": [{"type": "file", "channels": [0], "source": "rec.flac"}],
        "sampling_rate": 16000, "num_samples": 160000, "duration": 10.0,
    }  # fmt: skip
    supervision = {"id": "s", "text": "hello", "speaker": "sp", "language": "en", "start": 0, "duration": 2}
    return {"id": "cut-1", "start": 1.25, "duration": 2.5, "channel": 0, "type": "MonoCut", "recording": recording,
            "supervisions": [supervision], **more}  # fmt: skip


def test_lhotse_cuts_and_recordings() -> None:
    row = complete(lhotse())
    assert row == {
        "key": "cut-1", "wav": "rec.flac", "start": 1.25, "duration": 2.5, "text": "hello", "speaker": "sp",
        "language": "en",
    }  # fmt: skip
    whole = complete(lhotse(start=0, duration=10.0))
    assert ("start" in whole, whole["duration"]) == (False, 10.0)
    assert complete(lhotse()["recording"]) == {"key": "rec", "wav": "rec.flac", "duration": 10.0}
    two = lhotse(channel=3)
    two["recording"]["sources"][0]["channels"] = [2, 3]
    assert complete(two)["channel"] == 1
    assert complete({**two, "channel": [3]})["channel"] == 1
    assert "channel" not in complete({**two, "channel": [2, 3]})
    texts = complete(lhotse(supervisions=[{"text": "a", "speaker": "x"}, {"text": "b", "speaker": "y"}]))
    assert (texts["text"], "speaker" in texts, len(texts["supervisions"])) == ("a b", False, 2)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda row: row.update(type="MixedCut", tracks=[]), "MixedCut"),
        (lambda row: row["recording"]["sources"].append({}), "2 sources"),
        (lambda row: row["recording"].update(sources=[]), "0 sources"),
        (lambda row: row["recording"]["sources"][0].update(type="command"), "type 'command'"),
        (lambda row: row["recording"].update(transforms=[{"name": "Speed"}]), "transforms"),
        (lambda row: row.update(id=None), '"id" is missing'),
        (lambda row: row.update(channel=[0, 5]), "only one or all"),
    ],
)
def test_lhotse_rows_without_a_counterpart_are_refused(
    change: Callable[[dict[str, Any]], object], reason: str, tmp_path: Path
) -> None:
    row = lhotse()
    change(row)
    with gzip.open(tmp_path / "cuts.jsonl.gz", "wb") as stream:
        stream.write(json.dumps(row).encode() + b"\n" + json.dumps(lhotse(id="good")).encode())
    path = local_manifest(str(tmp_path / "cuts.jsonl.gz"), tmp_path / "index", NO_OUTPUTS)
    bad, good = Manifest.open(path, "wav2token", tmp_path / "index", sink="tar").read(0, 2)
    assert isinstance(bad, RowFailure)
    assert reason in bad.reason
    assert isinstance(good, ManifestRow)
    assert good.cut is not None
    assert good.cut.end == 3.75


# --- tars


def test_tar_rows_are_grouped_as_webdataset_groups_them(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(
        tar_bytes(
            [
                ("./d/a.FLAC", b"1"),
                ("./d/a.json", b'{"text":"A","n":NaN,"key":"evil","wav":"/etc/passwd","quantized_tokens":"/x",'
                               b'"offset":5,"channel":1,"__refused__":"no"}'),
                ("./d/a.txt", b"other text\n"),
                ("b.16k.wav", b"22"),
                ("b.48k.wav", b"333"),
                ("b.48k.txt", "h\u00e9".encode()),
                ("b.txt", b"of both"),
                ("c.cls", b"7"),
                ("d.tokens.npy", b"x"),
                (".hidden.wav", b"x"),
                ("noending", b"x"),
                ("e.wav", b"4444"),
                ("e.json", b"[1, 2]"),
            ]
        )
    )  # fmt: skip
    rows = rows_of(tmp_path / "x.tar", tmp_path)
    by_key = {row.pop("key"): row for row in rows}
    contents = {key: read(row.pop("wav")) for key, row in by_key.items()}
    assert contents == {"d/a": b"1", "b.16k": b"22", "b.48k": b"333", "e": b"4444"}
    assert by_key["d/a"] == {"text": "A", "n": None, "original_offset": 5, "original_channel": 1}
    assert by_key["b.16k"] == {"text": "of both"}
    assert by_key["b.48k"] == {"text": "h\u00e9"}
    assert by_key["e"] == {"json": [1, 2]}
    tokens = rows_of(tmp_path / "x.tar", tmp_path, SourceSettings("token2wav", "tar"))
    assert [row["key"] for row in tokens] == ["d"]
    assert tokens[0]["quantized_tokens"].startswith("tar://")


PARTS = st.text("aB.c-_é/", min_size=1, max_size=6).filter(lambda name: not name.startswith("/") and ".." not in name)


@example(groups=[(".//", {"wav"}), (".//a", {"wav"})])
@given(
    groups=st.lists(st.tuples(PARTS, st.sets(st.sampled_from(["wav", "flac", "json", "txt"]), min_size=1)), max_size=6)
)
def test_each_audio_member_of_any_tar_is_one_row_with_its_own_bytes(
    tmp_path_factory: pytest.TempPathFactory, groups: list[tuple[str, set[str]]]
) -> None:
    folder = tmp_path_factory.mktemp("tar")
    members = []
    for number, (stem, endings) in enumerate([("first", {"wav"}), *groups]):
        for ending in sorted(endings):
            content = b'{"n": %d}' % number if ending == "json" else f"{number}{ending}".encode()
            members.append((f"{stem}.{ending}", content))
    content = tar_bytes(members, tarfile.PAX_FORMAT)
    (folder / "x.tar").write_bytes(content)
    (folder / "y.tar.gz").write_bytes(gzip.compress(content))
    expected = [
        content
        for name, content in members
        if name.endswith((".wav", ".flac")) and not os.path.basename(name).startswith(".")
    ]
    for name in ("x.tar", "y.tar.gz"):
        rows = rows_of(folder / name, folder)
        assert [read(row["wav"]) for row in rows] == expected
        assert not any(REFUSED in row for row in rows)


def members(count: int = 4) -> list[tuple[str, bytes]]:
    """Clips with texts beside them."""
    pairs = [(f"u{number}.{end}", b"%d" % number * 300) for number in range(count) for end in ("txt", "wav")]
    return sorted(pairs, key=lambda pair: (pair[0].split(".")[0], pair[0].endswith("txt")))


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("place", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_a_torn_shard_costs_its_tail_and_one_failed_row(tmp_path: Path, place: float, compressed: bool) -> None:
    content = tar_bytes(members())[: 8 * 1024 + 1024]
    whole = gzip.compress(content, 0) if compressed else content
    path = tmp_path / ("x.tar.gz" if compressed else "x.tar")
    path.write_bytes(whole)
    complete = rows_of(path, tmp_path)
    path.write_bytes(whole[: int(place * len(whole))])
    *rows, torn = rows_of(path, tmp_path)
    # What is left is a beginning of what would have been, row by row, so that mending the shard changes no row.
    assert rows == complete[: len(rows)]
    # The one before the tear may be lost too, if nothing shows that it is whole.
    assert int(place * len(content) / 2048) - len(rows) in (0, 1)
    assert torn["key"] == str(path)
    assert torn[REFUSED].startswith(f"{path}: ")
    assert "fetch or pack it again" in torn[REFUSED]


def test_a_shard_that_is_no_tar_costs_one_failed_row_and_no_other_shard(tmp_path: Path) -> None:
    (tmp_path / "0.tar").write_bytes(b"")
    (tmp_path / "1.tar").write_bytes(b"RIFF" * 1000)
    (tmp_path / "2.tar").write_bytes(tar_bytes([("a.wav", b"x")]))
    (tmp_path / "3.tar").mkdir()
    rows = rows_of(f"{tmp_path}/{{0..3}}.tar", tmp_path)
    assert [("is empty" in str(row.get(REFUSED)), "is no tar" in str(row.get(REFUSED))) for row in rows] == [
        (True, False), (False, True), (False, False), (False, False),
    ]  # fmt: skip
    assert "is not a file" in rows[3][REFUSED]


def test_hostile_members_are_refused_by_name_and_write_nothing(tmp_path: Path) -> None:
    bomb = b'{"a":' * 100_000
    content = tar_bytes(
        [
            ("/etc/evil.wav", b"x"),
            ("a/../../evil.wav", b"x"),
            ("C:\\evil.wav", b"x"),
            ("..\\evil.wav", b"x"),
            ("n" * 2000 + ".wav", b"x"),
            ("bomb.wav", b"x"),
            ("bomb.json", bomb),
            ("large.wav", b"x"),
            ("large.json", b'"' + b"x" * (1 << 20) + b'"'),
            ("huge number.wav", b"x"),
            ("huge number.json", b'{"n": %s}' % (b"9" * 400)),
            ("good.wav", b"fine"),
        ],
        tarfile.GNU_FORMAT,
    )
    (tmp_path / "x.tar").write_bytes(header(b"link.wav", 0, b"2") + content)
    rows = rows_of(tmp_path / "x.tar", tmp_path, SourceSettings(output_dir=str(tmp_path / "out")))
    refused = {row["key"]: row[REFUSED] for row in rows if REFUSED in row}
    assert set(refused) >= {"/etc/evil.wav", "a/../../evil.wav", "C:\\evil.wav", "..\\evil.wav", "bomb", "large"}
    assert "an absolute name" in refused["/etc/evil.wav"]
    assert "leads out of the shard" in refused["a/../../evil.wav"]
    assert "a name of 2,004 characters" in refused[("n" * 2000)[:1024]]
    assert "its .json is not valid" in refused["bomb"]
    assert "1,048,578 bytes" in refused["large"]
    good = [row for row in rows if REFUSED not in row]
    assert read(good[-1]["wav"]) == b"fine"
    for row in good:
        assert os.path.realpath(row["quantized_tokens"]).startswith(f"{tmp_path}/out/")


def test_equal_keys_in_two_shards_are_duplicates(tmp_path: Path) -> None:
    for number in range(2):
        (tmp_path / f"{number}.tar").write_bytes(tar_bytes([("a.wav", b"x")]))
    path = local_manifest(f"{tmp_path}/*.tar", tmp_path / "index", NO_OUTPUTS)
    first, second = Manifest.open(path, "wav2token", tmp_path / "index", sink="tar").read(0, 2)
    assert isinstance(first, ManifestRow)
    assert isinstance(second, RowFailure)
    assert "duplicate key" in second.reason


def test_rows_of_compressed_tars_stay_in_their_order(tmp_path: Path) -> None:
    """Longest first would read the archive from its beginning again and again."""
    content = tar_bytes([(f"{n}.{end}", b'{"duration": %d}' % n) for n in range(3) for end in ("json", "wav")])
    (tmp_path / "x.tar").write_bytes(content)
    (tmp_path / "x.tar.gz").write_bytes(gzip.compress(content))
    for name, durations in (("x.tar", [0, 1, 2]), ("x.tar.gz", [-1, -1, -1])):
        path = local_manifest(f"{tmp_path}/{name}", tmp_path / "index", NO_OUTPUTS)
        manifest = Manifest.open(path, "wav2token", tmp_path / "index", sink="tar")
        assert np.nan_to_num(manifest.durations, nan=-1).tolist() == durations


def test_rows_of_shards_without_outputs_are_refused_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(tar_bytes([("a.wav", b"x")]))
    with pytest.raises(RunError, match="give --output_dir"):
        local_manifest(f"{tmp_path}/x.tar", tmp_path / "index", SourceSettings())


def test_a_source_is_listed_once_and_again_when_it_changed(tmp_path: Path) -> None:
    shard = tmp_path / "0.tar"
    shard.write_bytes(tar_bytes([("a.wav", b"x")]))
    first = local_manifest(f"{tmp_path}/*.tar", tmp_path / "index", NO_OUTPUTS)
    first_inode = first.stat().st_ino
    assert local_manifest(f"{tmp_path}/*.tar", tmp_path / "index", NO_OUTPUTS).stat().st_ino == first_inode
    (tmp_path / "1.tar").write_bytes(tar_bytes([("b.wav", b"x")]))
    second = local_manifest(f"{tmp_path}/*.tar", tmp_path / "index", NO_OUTPUTS)
    assert second.read_bytes().startswith(first.read_bytes())
    assert second.read_bytes().count(b"\n") == 2
    changed = local_manifest(f"{tmp_path}/*.tar", tmp_path / "index", SourceSettings(output_dir="o"))
    assert changed != second
    assert not list((tmp_path / "index").glob("listing-*"))


def test_a_listing_that_is_stopped_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stopped(Exception):
        pass

    def stop() -> None:
        raise Stopped

    (tmp_path / "0.tar").write_bytes(tar_bytes([("a.wav", b"x")]))
    with pytest.raises(Stopped):
        local_manifest(f"{tmp_path}/0.tar", tmp_path / "index", NO_OUTPUTS, stop)
    assert [path.name for path in (tmp_path / "index").iterdir()] == ["source.lock"]


# --- folders


def test_a_folder_is_walked_in_order(tmp_path: Path) -> None:
    audio = tmp_path / "audio"
    for name in ("b/z.wav", "b/a.Mp3", "a.b.flac", "b/a.txt", "b/a.json", ".hidden/x.wav", "readme.md", "b/.x.wav"):
        (audio / name).parent.mkdir(parents=True, exist_ok=True)
        (audio / name).write_bytes(b'{"speaker":1}' if name.endswith("json") else b"text")
    (audio / "loop").symlink_to(audio)
    (audio / "link.wav").symlink_to(audio / "b" / "z.wav")
    rows = rows_of(audio, tmp_path)
    assert [row["key"] for row in rows] == ["a.b", "link", "b/a", "b/z"]
    assert rows[2] == {"key": "b/a", "wav": f"{audio}/b/a.Mp3", "speaker": 1, "text": "text"}
    first = local_manifest(str(audio), tmp_path / "index", NO_OUTPUTS)
    (audio / "new.wav").write_bytes(b"x")
    assert local_manifest(str(audio), tmp_path / "index", NO_OUTPUTS) != first


def test_a_source_without_rows_is_named(tmp_path: Path) -> None:
    (tmp_path / "audio").mkdir()
    (tmp_path / "x.tar").write_bytes(tar_bytes([("readme.md", b"x")]))
    for name in ("audio", "x.tar"):
        with pytest.raises(RunError, match=f"{name}: there is no audio in it"):
            rows_of(tmp_path / name, tmp_path)


def test_names_that_no_manifest_can_hold_are_refused(tmp_path: Path) -> None:
    audio = tmp_path / "audio"
    audio.mkdir()
    (Path(os.fsdecode(os.fsencode(str(audio)) + b"/\xff.wav"))).write_bytes(b"x")
    (row,) = rows_of(audio, tmp_path)
    assert "not UTF-8" in row[REFUSED]


# --- outputs and channels

KEYS = st.text(min_size=1, max_size=300)


ODD_KEYS = st.sampled_from(["a", "A", "a/b", "a_b", ".", "..", "../x", "/", "a.", "CON", "é", "e\u0301"])


@given(st.lists(KEYS | ODD_KEYS, min_size=2, max_size=6, unique=True))
def test_distinct_keys_have_distinct_paths_inside_the_folder(keys: list[str]) -> None:
    paths = [output_path("out", key, ".json") for key in keys]
    assert len({path.lower() for path in paths}) == len(keys)
    for path in paths:
        top, first, second, name = path.split("/")
        assert (top, len(first), len(second)) == ("out", 2, 2)
        assert os.path.normpath(path) == path
        assert len(name.encode()) <= MOST_NAME + len(".json")
        assert name.isascii()
        assert not name.startswith((".", "-"))


def test_outputs_of_files_lie_as_the_files_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("talks/a/1.flac", "talks/Two words.wav", f"talks/{'n' * 200}.wav"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(b"")

    def outputs(source: str, output_dir: str) -> list[str]:
        settings = SourceSettings("wav2token2wav", output_dir=output_dir)
        return [row["reconstructed_wav"] for row in rows_of(source, tmp_path, settings)]

    two, long, one = outputs("talks", "out")
    assert (two, one) == ("out/Two words.wav", "out/a/1.wav")
    assert long == output_path("out", "n" * 200, ".wav")  # no file system takes longer names with our endings
    assert outputs("talks/a/1.flac", "out/") == ["out/talks/a/1.wav"]
    assert outputs(f"{tmp_path}/talks/a/1.flac", "out") == [f"out{tmp_path}/talks/a/1.wav"]
    # In the folder itself they would be listed at the next start, or replace what was read.
    for source, output_dir in (("talks", "talks"), ("talks", "talks/out"), ("talks/Two words.wav", ".")):
        assert all(len(Path(output).relative_to(output_dir).parts[0]) == 2 for output in outputs(source, output_dir))


def test_plain_keys_keep_their_names() -> None:
    assert output_path("out/", "utt-00012_3.a", ".json").endswith("/utt-00012_3.a.json")
    # A key that looks like another's name with its hash does not get that name.
    forged = output_path("out", "A", ".json").split("/")[-1].removesuffix(".json").lower()
    assert output_path("out", forged, ".json").split("/")[-1] != f"{forged}.json"
    assert output_path("s3://bucket/x", "a", ".npy").startswith("s3://bucket/x/")


@pytest.mark.parametrize(
    ("given_settings", "fields"),
    [
        (SourceSettings("wav2token", "json", "o"), {"quantized_tokens": ".json"}),
        (
            SourceSettings("wav2token2wav", "npy", "o", "flac"),
            {"quantized_tokens": ".npy", "reconstructed_wav": ".flac"},
        ),
        (SourceSettings("wav2token2wav", "tar", "o"), {}),
    ],
)
def test_rows_get_the_outputs_that_the_sink_needs(
    tmp_path: Path, given_settings: SourceSettings, fields: dict[str, str]
) -> None:
    (tmp_path / "data.jsonl").write_text('{"key":"a","wav":"a.wav"}\n')
    (row,) = rows_of(tmp_path / "data.jsonl", tmp_path, given_settings)
    assert {name: os.path.splitext(row[name])[1] for name in row.keys() - {"key", "wav"}} == fields


def test_channels(tmp_path: Path) -> None:
    for count in (1, 2, 3):
        (tmp_path / f"c{count}.wav").write_bytes(wav_content(channels=count))
    (tmp_path / "bad.wav").write_bytes(b"no audio")
    rows = [{"key": f"c{count}", "wav": f"{tmp_path}/c{count}.wav"} for count in (1, 2, 3)]
    rows += [{"key": "own", "wav": f"{tmp_path}/c3.wav", "channel": 1}, {"key": "bad", "wav": f"{tmp_path}/bad.wav"}]
    rows += [{"key": "named", "wav": f"{tmp_path}/c2.wav", "quantized_tokens": "x.y/out"}]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    channels = {
        name: [
            (row["key"], row.get("channel"))
            for row in rows_of(tmp_path / "data.jsonl", tmp_path, SourceSettings(output_dir="o", channels=name))
        ]
        for name in ("left", "right", "split")
    }
    assert channels["left"] == [("c1", 0), ("c2", 0), ("c3", 0), ("own", 1), ("bad", 0), ("named", 0)]
    assert channels["right"][:4] == [("c1", 1), ("c2", 1), ("c3", 1), ("own", 1)]
    assert channels["split"] == [
        ("c1-0", 0), ("c2-0", 0), ("c2-1", 1), ("c3-0", 0), ("c3-1", 1), ("c3-2", 2), ("own", 1), ("bad", None),
        ("named-0", 0), ("named-1", 1),
    ]  # fmt: skip
    split = rows_of(tmp_path / "data.jsonl", tmp_path, SourceSettings(output_dir="o", channels="split"))
    assert [row["quantized_tokens"] for row in split[-2:]] == ["x.y/out-0", "x.y/out-1"]
    assert len({row["quantized_tokens"] for row in split if REFUSED not in row}) == 9
    assert "not audio" in split[-3][REFUSED]


def test_keys_of_members_keep_their_case(tmp_path: Path) -> None:
    names = ["sw02001.A.wav", "sw02001.A.json", "sw02001.B.WAV", "spk.X1.wav", "spk.x1.wav", "a.wav.data", "b.TXT"]
    (tmp_path / "x.tar").write_bytes(tar_bytes([(name, b'{"n": 1}') for name in names]))
    rows = rows_of(tmp_path / "x.tar", tmp_path)
    assert [row["key"] for row in rows] == ["sw02001.A", "sw02001.B", "spk.X1", "spk.x1"]
    assert [row.get("n") for row in rows] == [1, None, None, None]


def test_members_of_other_kinds_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "x.tar").write_bytes(tar_bytes([("a.wav", b"x"), ("x.wav.data", b"x"), ("b.jpg", b"x")]))
    assert len(rows_of(tmp_path / "x.tar", tmp_path)) == 1
    assert "left out: 2 members that are neither audio nor text, the first 'x.wav.data'" in caplog.text


def test_foreign_rows_with_nan_are_read(tmp_path: Path) -> None:
    line = json.dumps({**NEMO, "snr": float("nan"), "id": "u", "big": 2**70})
    (tmp_path / "nemo.json").write_text(line + "\n")
    [row] = rows_of(tmp_path / "nemo.json", tmp_path)
    assert (row["key"], row["snr"], row["big"]) == ("u", None, 2**70)


# --- lists


def wavs(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")


def test_a_wav_scp_is_read_with_paths_beside_it(tmp_path: Path) -> None:
    wavs(tmp_path, "a/1.wav", "a/2 b.wav")
    (tmp_path / "wav.scp").write_text("u1 a/1.wav\nu2  a/2 b.wav\n\nu3 sph2pipe -f wav x.sph |\nonly_a_key\n")
    rows = rows_of(tmp_path / "wav.scp", tmp_path)
    assert rows[:3] == [
        {"key": "u1", "wav": f"{tmp_path}/a/1.wav"},
        {"key": "u2", "wav": f"{tmp_path}/a/2 b.wav"},
        {"key": "u3", "wav": "pipe:sph2pipe -f wav x.sph"},
    ]
    assert "line 5 of" in rows[3][REFUSED]
    (tmp_path / "segments").write_text("u1-1 u1 0.5 1.25\nu9-1 u9 0 1\nbad\n")
    rows = rows_of(tmp_path / "wav.scp", tmp_path)
    assert [row for row in rows if REFUSED not in row] == [
        {"key": "u1-1", "wav": f"{tmp_path}/a/1.wav", "start": 0.5, "end": 1.25}
    ]
    assert len(rows) == 4


def test_commands_of_a_wav_scp_need_leave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BATCH_TOKENIZER_ALLOW_PIPE", raising=False)
    with pytest.raises(RowError, match="needs --allow_pipe"):
        read("pipe:printf abc")
    monkeypatch.setenv("BATCH_TOKENIZER_ALLOW_PIPE", "1")
    assert read("pipe:printf abc") == b"abc"
    with pytest.raises(RowError, match="ended with status 3"):
        read("pipe:printf abc; exit 3")


@pytest.mark.parametrize(("ending", "separator"), [("csv", ","), ("tsv", "\t")])
def test_tables_with_a_header(tmp_path: Path, ending: str, separator: str) -> None:
    wavs(tmp_path, "1.wav")
    lines = [["path", "text", "start", "end", "n"], ["1.wav", f'"a{separator}""b"""', "0.5", "2", "007"],
             ["1.wav", "", "3", "", ""]]  # fmt: skip
    content = "\n".join(separator.join(cells) for cells in lines)
    (tmp_path / f"x.{ending}").write_text(f"\ufeff{content}\n")
    assert rows_of(tmp_path / f"x.{ending}", tmp_path) == [
        {
            "key": "1-0.5-2",
            "wav": f"{tmp_path}/1.wav",
            "path": "1.wav",
            "text": f'a{separator}"b"',
            "start": 0.5,
            "end": 2,
            "n": "007",
        },
        {"key": "1-3", "wav": f"{tmp_path}/1.wav", "path": "1.wav", "start": 3},
    ]


def test_lists_of_paths_globs_and_single_files(tmp_path: Path) -> None:
    wavs(tmp_path, "a/1.flac", "a/2 b.flac", "a/3.txt")
    expected = [f"{tmp_path}/a/1.flac", f"{tmp_path}/a/2 b.flac"]
    (tmp_path / "files.txt").write_text("a/1.flac\na/2 b.flac\n")
    assert [row["wav"] for row in rows_of(tmp_path / "files.txt", tmp_path)] == expected
    rows = rows_of(f"{tmp_path}/a/*.flac", tmp_path)
    assert [row["wav"] for row in rows] == expected
    assert rows[1]["key"] == f"{tmp_path}/a/2 b".lstrip("/")
    assert [row["wav"] for row in rows_of(expected[0], tmp_path)] == expected[:1]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"PK\3\4xxxx", "is a zip archive"),
        ('{"key": 1}'.encode("utf-16"), "is text in UTF-16"),
        (b'[{"key": "a"}]', "is a JSON array: write one object a line"),
        (b"[\n  {}\n]", "is a JSON array: write one object a line"),
    ],
)
def test_other_formats_are_named_once(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "data.jsonl").write_bytes(content)
    with pytest.raises(RunError, match=reason):
        find_sources(str(tmp_path / "data.jsonl"))


def test_rows_get_keys_and_their_input_under_other_names(tmp_path: Path) -> None:
    wavs(tmp_path, "a/1.wav", "2.wav", "3.wav")
    lines = [
        {"audio": "a/1.wav", "text": "t"},
        {"path": "2.wav", "key": 7},
        {"audio": {"path": "3.wav", "bytes": None}},
        {"wav": "2.wav", "offset": 0, "duration": 1},
        {"wav": "2.wav", "offset": 0, "duration": 2, "channel": 1},
        {"key": "whole", "wav": "/x/y.wav", "n": 1},
    ]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    rows = rows_of(tmp_path / "d.jsonl", tmp_path)
    assert [row["key"] for row in rows] == ["a/1", "7", "3", "2-0-1", "2-0-2-1", "whole"]
    assert [row["wav"] for row in rows] == [
        *(f"{tmp_path}/{name}.wav" for name in ("a/1", "2", "3", "2", "2")), "/x/y.wav"
    ]  # fmt: skip
    assert rows[0]["text"] == "t"
    complete_rows = [{"key": str(n), "wav": f"{tmp_path}/2.wav"} for n in range(3)]
    (tmp_path / "e.jsonl").write_text("\n".join(map(json.dumps, complete_rows)))
    assert local_manifest(str(tmp_path / "e.jsonl"), tmp_path / "i", NO_OUTPUTS) == tmp_path / "e.jsonl"


def test_manifest_from_replaces_no_file_unasked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    soundfile.write("a.wav", np.zeros(800), 16000)
    Path("nemo.jsonl").write_text('{"audio_filepath": "a.wav"}\n')
    Path("data.jsonl").write_text("precious\n")
    assert main(["manifest", "from", "nemo.jsonl"]) == 2
    assert "data.jsonl is there already: choose another name, or --overwrite" in caplog.text
    assert Path("data.jsonl").read_text() == "precious\n"
    assert main(["manifest", "from", "nemo.jsonl", "--overwrite"]) == 0
    assert json.loads(Path("data.jsonl").read_text())["key"] == "a"
    for source in ("nemo.jsonl", "*.jsonl", f"{tmp_path}/nemo.jsonl"):
        before = Path("nemo.jsonl").read_text()
        assert main(["manifest", "from", source, "--out", "nemo.jsonl", "--overwrite"]) == 2
        assert Path("nemo.jsonl").read_text() == before
    assert "is the source itself, or a part of it" in caplog.text


def test_run_folders_are_no_audio_and_no_tokens(tmp_path: Path) -> None:
    for name in ("data.run", "data.run/ledger", "data.run/resume"):
        (tmp_path / name).mkdir()
    (tmp_path / "data.run" / "run.json").touch()
    for name in ("a.npy", "data.run/resume/b.npy"):
        np.save(tmp_path / name, np.zeros((1, 1), np.uint16))
    settings = SourceSettings("token2wav", output_dir="out")
    assert [row["key"] for row in rows_of(tmp_path, tmp_path / "index", settings)] == ["a"]


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"PK\3\4rest", "is a zip archive: unpack it, or pack it as tar"),
        (b"BZh91AY", "is compressed by bzip2"),
        ('{"wav": "a.wav"}\n'.encode("utf-16"), "is text in UTF-16: convert it to UTF-8"),
        (b'[\n {"wav": "a.wav"}\n]', "is a JSON array: write one object a line"),
        (b'[{"wav": "a.wav"}]', "is a JSON array: write one object a line"),
        (b'{\n "wav": "a.wav"\n}\n', "is one JSON object over many lines"),
        (b"PAR1", "is a parquet file: give it a name that ends in .parquet"),
        (bytes(range(200)), "is a binary file of an unknown format"),
        (b"once upon a time\nthere was\n", "begins with 'once upon a time', which is no row"),
    ],
)
def test_what_is_not_recognised_is_named_in_one_line(tmp_path: Path, content: bytes, found: str) -> None:
    (tmp_path / "data").write_bytes(content)
    with pytest.raises(RunError) as raised:
        find_sources(f"{tmp_path}/data")
    assert found in str(raised.value)
    assert "\n" not in str(raised.value)
    (tmp_path / "data.gz").write_bytes(gzip.compress(content))
    with pytest.raises(RunError, match=re.escape(found)):
        find_sources(f"{tmp_path}/data.gz")


def test_rows_with_a_damaged_first_line_are_rows(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_bytes(b'torn"}\n{"key": "a", "wav": "a.wav", "quantized_tokens": "a.json"}\n')
    assert [source.kind for source in find_sources(f"{tmp_path}/data.jsonl")] == ["rows"]


def test_several_sources_are_one_after_the_other(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a/1.wav", "a/1.flac", "b/1.wav", "b/2.wav"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(wav_content())
    (tmp_path / "c.jsonl").write_text('{"key": "2", "wav": "x.wav"}\n{"wav": "1.mp3"}\n')
    caplog.set_level("INFO")
    settings = SourceSettings(output_dir="out")
    rows = rows_of(f"{tmp_path}/a\n{tmp_path}/b\n{tmp_path}/c.jsonl", tmp_path, settings)
    made = {row["wav"].removeprefix(f"{tmp_path}/"): (row["key"], row["quantized_tokens"]) for row in rows}
    assert {wav: key for wav, (key, _) in made.items()} == {
        "a/1.flac": "1", "a/1.wav": "1-2", "b/1.wav": "1-3", "b/2.wav": "2", "x.wav": "2", "1.mp3": "1-4",
    }  # fmt: skip
    assert [made[name][1] for name in ("a/1.flac", "a/1.wav", "b/1.wav", "b/2.wav")] == [
        "out/1.json", "out/1-2.json", "out/1-3.json", "out/2.json",
    ]  # fmt: skip
    assert made["1.mp3"][1] == output_path("out", "1-4", ".json")
    assert f"--data_list {tmp_path}/a, {tmp_path}/b, {tmp_path}/c.jsonl: 2 × folder, JSON lines" in caplog.text
    parser = argparse.ArgumentParser()
    add_options(parser, "data_list")
    words = ["--data_list", "a", "b", "--data_list", "c"]
    assert parser.parse_args(words).data_list == "a\nb\nc"
    assert parser.parse_args([]).data_list == "data.jsonl"
    assert beside("x/a\nb", ".T") == Path("x/a.T")


@given(
    st.lists(
        st.lists(st.tuples(st.sampled_from(["a", "a-2", "a-3", "b", "a-2-2"]), st.booleans()), max_size=6), max_size=6
    )
)
def test_made_keys_are_unique_and_own_keys_stay(parts: list[list[tuple[str, bool]]]) -> None:
    seen = SeenKeys()
    earlier: set[str] = set()
    for part in parts:
        own = [key for key, is_made in part if not is_made]
        made = [key for key, is_made in part if is_made]
        renamed = seen.rename(made, np.array([hash_of(key) for key in own], np.uint64))
        keys = [renamed.get(place, key) for place, key in enumerate(made)]
        assert len({*keys}) == len(keys)
        assert not {*keys} & (earlier | {*own})
        for place, key in enumerate(made):  # only what has to change does
            assert place not in renamed or key in earlier | {*own} | {*keys[:place]}
        earlier |= {*keys, *own}


def test_tars_and_rows_that_zstd_compressed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = tar_bytes([(f"{name}.wav", wav_content(number)) for number, name in enumerate("abc")])
    (tmp_path / "none.tar.zst").write_bytes(b"\x28\xb5\x2f\xfd")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    (row,) = rows_of(tmp_path / "none.tar.zst", tmp_path)
    assert "is compressed by zstd: pip install zstandard" in row[REFUSED]
    monkeypatch.undo()
    zstandard = pytest.importorskip("zstandard", reason="zstandard is not installed")
    whole = zstandard.compress(content[:1000]) + zstandard.compress(content[1000:])
    (tmp_path / "x.tar.zst").write_bytes(whole)
    rows = rows_of(tmp_path / "x.tar.zst", tmp_path)
    assert [row["key"] for row in rows] == ["a", "b", "c"]
    assert [read(row["wav"]) for row in rows] == [wav_content(number) for number in range(3)]
    (tmp_path / "torn.tar.zst").write_bytes(whole[:-9])
    *_, torn = rows_of(tmp_path / "torn.tar.zst", tmp_path)
    assert "its compressed data has no end" in torn[REFUSED]
    (tmp_path / "data.jsonl.zst").write_bytes(zstandard.compress(b'{"audio": "a.wav"}\n'))
    assert [row["key"] for row in rows_of(tmp_path / "data.jsonl.zst", tmp_path)] == ["a"]


def test_piped_entries_of_a_list_run_only_where_that_is_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.wav").write_bytes(wav_content())
    (tmp_path / "wav.scp").write_text(f"utt1 cat {tmp_path}/a.wav |\n")
    (row,) = rows_of(tmp_path / "wav.scp", tmp_path)
    with pytest.raises(RowError, match="would run a shell command, which needs --allow_pipe"):
        read(row["wav"])
    monkeypatch.setenv("BATCH_TOKENIZER_ALLOW_PIPE", "1")
    assert read(row["wav"]) == wav_content()


def test_rows_of_other_tools_with_any_values_are_rows_or_refused() -> None:
    values: list[Any] = [None, True, -1, 1.5, "x", "", [], {}, [[]], [None], {"a": 1}, 10**5000, float("nan"), [0, "1"]]
    draw = random.Random(0)

    def mutated(value: Any) -> Any:
        if draw.random() < 0.12:
            return draw.choice(values)
        if isinstance(value, dict):
            return {key: mutated(inner) for key, inner in value.items()}
        return [mutated(inner) for inner in value] if isinstance(value, list) else value

    source = {"type": "file", "channels": [0, 1], "source": "a.wav"}
    recording = {"id": "r", "sources": [source], "sampling_rate": 8000, "duration": 3.0}
    cut = {"id": "c", "start": 1.0, "duration": 1.0, "channel": [1], "recording": recording, "type": "MonoCut",
           "supervisions": [{"text": "a", "speaker": "s"}, {"text": "b"}], "custom": {"snr": 1}}  # fmt: skip
    nemo = {"audio_filepath": "a.wav", "offset": 0, "duration": 1.5, "id": 7, "channel": 0, "end": None}
    for number in range(3000):
        row = mutated([cut, recording, nemo, {"audio": {"path": "a.wav"}, "utt_id": 3}][number % 4])
        if isinstance(row, dict):
            with contextlib.suppress(Refused):
                assert isinstance(complete(row, base="/data"), dict)


def test_outputs_lie_as_the_inputs_do_up_to_a_number_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("talks/größe/1.wav", "talks/2.wav", "talks/3.wav"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(wav_content())
    Path("files.txt").write_text("talks/größe/1.wav\ntalks/2.wav\n")

    def outputs(source: str, **more: str) -> list[str]:
        settings = SourceSettings(output_dir="out", **more)  # type: ignore[arg-type]
        return sorted(row["quantized_tokens"] for row in rows_of(source, tmp_path, settings))

    as_inputs = ["out/2.json", "out/3.json", "out/größe/1.json"]
    hashed = sorted(output_path("out", key, ".json") for key in ("2", "3", "größe/1"))
    assert outputs("talks") == outputs("talks", names="mirror") == as_inputs
    assert outputs("talks", names="hash") == hashed
    assert outputs("files.txt") == ["out/talks/2.json", "out/talks/größe/1.json"]
    monkeypatch.setattr(listing, "MOST_MIRRORED", 2)
    assert outputs("talks") == hashed
    assert outputs("talks", names="mirror") == as_inputs
    assert outputs("files.txt") == ["out/talks/2.json", "out/talks/größe/1.json"]
    # A run that was begun with fewer files keeps to its names.
    config = RunConfig(data_list="talks", output_dir="out")
    run_dir = tmp_path / "run"
    monkeypatch.setattr(listing, "MOST_MIRRORED", 3)
    first = prepare(config, run_dir, "talks", lambda: None).read_bytes()
    monkeypatch.setattr(listing, "MOST_MIRRORED", 2)
    assert prepare(config, run_dir, "talks", lambda: None).read_bytes() == first
    assert settings_of(replace(config, names="hash"), run_dir).names == "hash"
