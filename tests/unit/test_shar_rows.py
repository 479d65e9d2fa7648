"""Folders of Lhotse Shar as sources: supervisions and custom fields of the cuts, audio of the tars beside them."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from batch_tokenizer.manifest.row import REFUSED
from batch_tokenizer.sources.finishing import SourceSettings
from batch_tokenizer.sources.listing import local_manifest
from batch_tokenizer.sources.patterns import find_sources
from batch_tokenizer.storage.names import parse_member
from batch_tokenizer.storage.opening import open_location
from tests.support.tars import tar_bytes, wav_content


def rows_of(data_list: str | Path, folder: Path) -> list[dict[str, Any]]:
    path = local_manifest(str(data_list), folder / "index", SourceSettings(sink="tar"))
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def read(location: str) -> bytes:
    with open_location(location) as (file, _):
        return file.read()


def cut(key: str, **more: Any) -> dict[str, Any]:
    """A cut as lhotse writes it into a Shar."""
    recording = {
        "id": f"rec-{key}", "sources": [{"type": "shar", "channels": [0], "source": ""}], "sampling_rate": 16000,
        "num_samples": 1600, "duration": 0.1, "channel_ids": [0],
    }  # fmt: skip
    supervision = {"id": key, "recording_id": f"rec-{key}", "start": 0, "duration": 0.1, "text": f"says {key}",
                   "speaker": "bob", "custom": {"emotion": "calm"}}  # fmt: skip
    return {
        "id": key, "start": 0, "duration": 0.1, "channel": 0, "supervisions": [supervision], "recording": recording,
        "custom": {"snr": 12.5}, "type": "MonoCut", **more,
    }  # fmt: skip


def write_shard(folder: Path, number: int, cuts: list[dict[str, Any]], members: list[tuple[str, bytes]]) -> None:
    folder.mkdir(exist_ok=True)
    lines = "".join(json.dumps(item) + "\n" for item in cuts)
    (folder / f"cuts.{number:06}.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (folder / f"recording.{number:06}.tar").write_bytes(tar_bytes(members))


def member(key: str, number: int) -> list[tuple[str, bytes]]:
    return [(f"{key}.wav", wav_content(number)), (f"{key}.json", b"{}")]


def test_cuts_and_the_recordings_beside_them(tmp_path: Path) -> None:
    shar = tmp_path / "shar"
    write_shard(shar, 0, [cut("spk/utt.0"), cut("spk/utt.1", start=0.02, duration=0.05)],
                member("spk/utt.0", 0) + member("spk/utt.1", 1))  # fmt: skip
    nothing = [("c.nodata", b""), ("c.nometa", b"")]
    write_shard(shar, 1, [cut("c"), cut("d")], nothing + member("d", 3))
    values = [{"cut_id": "c"}, {"cut_id": "d", "score": [1, 2]}]
    (shar / "score.000001.jsonl.gz").write_bytes(gzip.compress("".join(f"{json.dumps(v)}\n" for v in values).encode()))
    (shar / "features.000000.tar").write_bytes(b"")
    assert [source.kind for source in find_sources(str(shar))] == ["shar", "shar"]
    for source in (shar, shar / "cuts.*.jsonl.gz"):
        first, second, third, fourth = rows_of(source, tmp_path)
        supervisions = cut("spk/utt.0")["supervisions"]
        assert first == {
            "key": "spk/utt.0", "wav": first["wav"], "duration": 0.1, "text": "says spk/utt.0", "speaker": "bob",
            "supervisions": supervisions, "custom": {"snr": 12.5},
        }  # fmt: skip
        assert (second["start"], second["duration"]) == (0.02, 0.05)
        assert third == {"key": "c", REFUSED: "a Lhotse cut without a recording"}
        assert fourth["custom"] == {"snr": 12.5, "score": [1, 2]}
        assert [read(row["wav"]) for row in (first, second, fourth)] == [wav_content(n) for n in (0, 1, 3)]
        assert parse_member(first["wav"]) is not None
    before = local_manifest(str(shar), tmp_path / "index", SourceSettings(sink="tar"))
    write_shard(shar, 1, [cut("c"), cut("d")], member("c", 2) + member("d", 3))
    after = local_manifest(str(shar), tmp_path / "index", SourceSettings(sink="tar"))
    assert before != after, "another tar beside the same cuts is another source"


def test_what_does_not_fit_together_is_named(tmp_path: Path) -> None:
    shar = tmp_path / "shar"
    write_shard(shar, 0, [cut("a"), cut("b")], member("a", 0) + member("x", 1))
    write_shard(shar, 1, [cut("c"), cut("d")], member("c", 0))
    write_shard(shar, 2, [cut("e"), cut("f")], member("e", 0) + member("f", 1))
    content = (shar / "recording.000002.tar").read_bytes()
    (shar / "recording.000002.tar").write_bytes(content[:6000])
    rows = rows_of(shar, tmp_path)
    assert [row["key"] for row in rows if REFUSED not in row] == ["a", "c", "e"]
    reasons = [row[REFUSED] for row in rows if REFUSED in row]
    assert "has cut 'b' where" in reasons[0]
    assert "has no recording of this cut" in reasons[1]
    assert "the rest of the shard is lost" in reasons[2]


def test_a_shar_that_lhotse_wrote(tmp_path: Path) -> None:
    lhotse = pytest.importorskip("lhotse", reason="lhotse is not installed")
    shar_module = pytest.importorskip("lhotse.shar")
    clips = np.random.default_rng(0).uniform(-0.3, 0.3, (5, 8000)).astype(np.float32)
    (tmp_path / "shar").mkdir()
    with shar_module.SharWriter(str(tmp_path / "shar"), fields={"recording": "flac"}, shard_size=2) as writer:
        for number, clip in enumerate(clips):
            soundfile.write(tmp_path / f"{number}.wav", clip, 16000)
            recording = lhotse.Recording.from_file(tmp_path / f"{number}.wav")
            supervision = lhotse.SupervisionSegment(
                id=f"s{number}", recording_id=recording.id, start=0, duration=0.25, text=f"text {number}", speaker="x"
            )
            made = lhotse.MonoCut(
                id=f"utt-{number}", start=0.125, duration=0.25, channel=0, recording=recording,
                supervisions=[supervision], custom={"number": number},
            )  # fmt: skip
            writer.write(made)
    rows = rows_of(tmp_path / "shar", tmp_path)
    assert [(row["key"], row["text"], row["speaker"], row["custom"]) for row in rows] == [
        (f"utt-{number}", f"text {number}", "x", {"number": number}) for number in range(5)
    ]
    for row, clip in zip(rows, clips, strict=True):
        samples, rate = soundfile.read(io.BytesIO(read(row["wav"])), dtype="float32")
        assert rate == 16000
        np.testing.assert_allclose(samples, clip[2000:6000], atol=1e-4)
