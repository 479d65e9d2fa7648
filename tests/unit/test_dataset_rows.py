"""Data sets of parquet and Arrow as sources: every column arrives, and audio is read from where it lies."""

from __future__ import annotations

import datetime
import json
import random
from decimal import Decimal
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batch_tokenizer.audio.decoding import decode_audio
from batch_tokenizer.cli import main
from batch_tokenizer.manifest.row import REFUSED
from batch_tokenizer.records import RowError, RunError
from batch_tokenizer.sources.finishing import SourceSettings
from batch_tokenizer.sources.listing import local_manifest
from batch_tokenizer.sources.patterns import find_sources
from batch_tokenizer.storage import remote, table_files
from batch_tokenizer.storage.names import cell_location, display_name, parse_cell_location
from batch_tokenizer.storage.opening import open_location
from tests.support.checkpoints import write_mimo_checkpoint
from tests.support.tars import wav_content

NUM_ROWS = 23


@pytest.fixture(autouse=True)
def nothing_kept() -> None:
    table_files._forget()


def rows_of(data_list: str | Path, folder: Path, column: str | None = None) -> list[dict[str, Any]]:
    settings = SourceSettings(sink="tar", audio_column=column)
    path = local_manifest(str(data_list), folder / "index", settings)
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def read(location: str) -> bytes:
    with open_location(location) as (file, _):
        return file.read()


def clip(number: int) -> bytes:
    return wav_content(number, seconds=0.05 + 0.01 * number)


def columns() -> dict[str, list[Any]]:
    """Clips with text, speaker and fields of any shape."""
    rows = range(NUM_ROWS)
    return {
        "audio": [{"bytes": clip(row), "path": f"clip-{row:03}.wav"} for row in rows],
        "text": [f"Nummer {row}, größer" if row % 3 else None for row in rows],
        "speaker": [row % 4 for row in rows],
        "offset": [float(row) for row in rows],
        "meta": [{"snr": row / 3, "tags": ["a", "b"][: row % 3], "large": 2**62 + row} for row in rows],
    }


def expected(row: dict[str, Any], number: int) -> dict[str, Any]:
    """The fields of a row of ``columns``; those that speak of a longer recording have names of their own."""
    values = {name: column[number] for name, column in columns().items() if name != "audio"}
    values["original_offset"] = values.pop("offset")
    return {"key": f"clip-{number:03}", "wav": row["wav"], **values}


def check(rows: list[dict[str, Any]]) -> None:
    assert len(rows) == NUM_ROWS
    for number, row in enumerate(rows):
        assert row == expected(row, number)
    order = list(range(NUM_ROWS))
    random.Random(0).shuffle(order)
    for number in order:
        assert read(rows[number]["wav"]) == clip(number)


def test_data_sets_as_their_own_library_saves_them(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    whole = datasets.Dataset.from_dict(columns()).cast_column("audio", datasets.Audio(decode=False))
    whole.save_to_disk(str(tmp_path / "saved"), num_shards=3)
    halves = datasets.DatasetDict({"train": whole.select(range(15)), "test": whole.select(range(15, NUM_ROWS))})
    halves.save_to_disk(str(tmp_path / "splits"))
    (tmp_path / "hub" / "data").mkdir(parents=True)
    for part in range(2):
        whole.shard(2, part).to_parquet(str(tmp_path / "hub" / "data" / f"train-{part}.parquet"), batch_size=4)
    for source in ("saved", "splits", "hub", "hub/data/*.parquet"):
        check(rows_of(tmp_path / source, tmp_path))
    assert [source.kind for source in find_sources(str(tmp_path / "saved"))] == ["arrow"] * 3
    samples, rate = decode_audio(rows_of(tmp_path / "saved", tmp_path)[3]["wav"])
    assert (samples.shape[-1], rate) == (round(0.08 * 16000), 16000)


@pytest.mark.parametrize("window_bytes", [1, 3000, 1 << 20])
@pytest.mark.parametrize("row_group_size", [1, 7, 100])
def test_groups_of_any_size_are_read_a_window_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window_bytes: int, row_group_size: int
) -> None:
    monkeypatch.setattr(table_files, "_WINDOW_BYTES", window_bytes)
    pq.write_table(pa.table(columns()), tmp_path / "x.parquet", row_group_size=row_group_size)
    check(rows_of(tmp_path / "x.parquet", tmp_path))
    with table_files._lock:
        assert len(table_files._windows) <= table_files._CACHED_WINDOWS


def test_paths_and_bytes_in_columns_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "clips").mkdir()
    for row in range(3):
        (tmp_path / "clips" / f"{row}.wav").write_bytes(clip(row))
    paths = [f"clips/{row}.wav" for row in range(3)]
    cuts = {"start": [0.0, 0.01, 0.02], "end": [0.03] * 3}
    table = pa.table({"path": paths, "content": [clip(row) for row in range(3)], "sentence": list("abc"), **cuts})
    pq.write_table(table, tmp_path / "x.parquet")
    rows = rows_of(tmp_path / "x.parquet", tmp_path)
    assert [row["wav"] for row in rows] == [str(tmp_path / path) for path in paths]
    assert (rows[1]["key"], rows[1]["sentence"], rows[1]["start"]) == ("clips/1-0.01-0.03", "b", 0.01)
    rows = rows_of(tmp_path / "x.parquet", tmp_path, "content")
    assert [(row["key"], row["path"], row["original_end"]) for row in rows][2] == ("x-2", "clips/2.wav", 0.03)
    assert [read(row["wav"]) for row in rows] == [clip(row) for row in range(3)]
    # A struct may hold the path alone, from the folder of its file.
    table = pa.table({"audio": [{"bytes": None, "path": path} for path in paths]}, schema=AUDIO_ONLY)
    pq.write_table(table, tmp_path / "y.parquet")
    assert [read(row["wav"]) for row in rows_of(tmp_path / "y.parquet", tmp_path)] == [clip(row) for row in range(3)]


AUDIO_ONLY = pa.schema([("audio", pa.struct([("bytes", pa.binary()), ("path", pa.string())]))])


def test_keys_are_their_own_or_made_unique(tmp_path: Path) -> None:
    audio = [{"bytes": clip(0), "path": path} for path in ("a/x.wav", "b/x.wav", None)]
    pq.write_table(pa.table({"audio": audio}, schema=AUDIO_ONLY), tmp_path / "made.parquet")
    assert [row["key"] for row in rows_of(tmp_path / "made.parquet", tmp_path)] == ["x", "x-2", "made-2"]
    pq.write_table(pa.table({"audio": audio, "id": [7, 7, 8]}), tmp_path / "ids.parquet")
    assert [row["key"] for row in rows_of(tmp_path / "ids.parquet", tmp_path)] == ["7", "7-2", "8"]
    pq.write_table(pa.table({"audio": audio, "key": ["k", "k", "l"]}), tmp_path / "own.parquet")
    assert [row["key"] for row in rows_of(tmp_path / "own.parquet", tmp_path)] == ["k", "k", "l"]


def test_values_that_json_does_not_have(tmp_path: Path) -> None:
    table = pa.table(
        {
            "audio": [{"bytes": clip(0), "path": "a.wav"}],
            "day": [datetime.date(2024, 2, 29)],
            "price": [Decimal("1.50")],
            "took": [datetime.timedelta(seconds=90)],
            "raw": [b"\0\1"],
            "cover": [{"bytes": b"\xff", "path": "c.jpg"}],
            "score": [float("nan")],
        }
    )
    pq.write_table(table, tmp_path / "x.parquet")
    (row,) = rows_of(tmp_path / "x.parquet", tmp_path, "audio")
    del row["wav"]
    assert row == {
        "key": "a", "day": "2024-02-29", "price": "1.50", "took": 90.0, "cover": {"path": "c.jpg"}, "score": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("names", "asked", "message"),
    [
        (["question", "answer"], None, "columns question, answer hold audio: choose one with --audio_column"),
        (["question", "answer"], "reply", "--audio_column reply: .* has the columns question, answer, number"),
        (["question"], "number", "--audio_column number: .* it has int64, neither audio files nor paths"),
        ([], None, r"no column is known to hold audio: name it with --audio_column \(number\)"),
    ],
)
def test_which_column_holds_audio(tmp_path: Path, names: list[str], asked: str | None, message: str) -> None:
    audio = [{"bytes": clip(0), "path": "a.wav"}]
    pq.write_table(pa.table({**dict.fromkeys(names, audio), "number": [1]}), tmp_path / "x.parquet")
    with pytest.raises(RunError, match=message):
        rows_of(tmp_path / "x.parquet", tmp_path, asked)
    if names:
        (row,) = rows_of(tmp_path / "x.parquet", tmp_path, names[-1])
        assert parse_cell_location(row["wav"]) == (f"{tmp_path}/x.parquet", 0, names[-1])


def test_damaged_files_cost_their_rows_alone(tmp_path: Path) -> None:
    table = pa.table(columns())
    for name in ("a", "b", "c"):
        pq.write_table(table.slice(0, 2), tmp_path / f"{name}.parquet")
    (tmp_path / "b.parquet").write_bytes((tmp_path / "b.parquet").read_bytes()[:-9])
    rows = rows_of(tmp_path / "*.parquet", tmp_path)
    assert [REFUSED in row for row in rows] == [False, False, True, False, False]
    assert "b.parquet: cannot be read" in rows[2][REFUSED]
    with pa.OSFile(str(tmp_path / "torn.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=5)
    content = (tmp_path / "torn.arrow").read_bytes()
    (tmp_path / "torn.arrow").write_bytes(content[: len(content) // 2])
    *whole, torn = rows_of(tmp_path / "torn.arrow", tmp_path)
    assert len(whole) % 5 == 0
    assert 0 < len(whole) < NUM_ROWS
    assert f"its rows from {len(whole)} on are lost" in torn[REFUSED]
    assert read(whole[-1]["wav"]) == clip(len(whole) - 1)
    pq.write_table(pa.table({"audio": [{"bytes": None, "path": None}]}, schema=AUDIO_ONLY), tmp_path / "none.parquet")
    for location, reason in (
        (cell_location(f"{tmp_path}/a.parquet", 9, "audio"), "has 2 rows, and no row 9"),
        (cell_location(f"{tmp_path}/a.parquet", 0, "sound"), "has no column sound: it has changed"),
        (cell_location(f"{tmp_path}/none.parquet", 0, "audio"), "row 0 has no audio in column audio"),
        (cell_location("none.parquet", 0, "a"), "none.parquet: no such file"),
    ):
        with pytest.raises(RowError, match=reason):
            read(location)


def test_locations_of_any_column() -> None:
    for column in ("audio", "a:b", "50%", "größe/2"):
        location = cell_location("s3://b/x.parquet", 7, column)
        assert parse_cell_location(location) == ("s3://b/x.parquet", 7, column)
    assert display_name(location) == "row 7 of s3://b/x.parquet"


def test_data_sets_on_the_hub_are_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the Hub's file system replaced by one in memory."""
    memory = fsspec.filesystem("memory")
    asked: list[int] = []

    class Hub:
        def __getattr__(self, name: str) -> Any:
            return getattr(memory, name)

        def cat_file(self, path: str, start: int, end: int) -> bytes:
            asked.append(end - start)
            return bytes(memory.cat_file(path, start=start, end=end))

        def unstrip_protocol(self, name: str) -> str:
            return f"hf://{name.lstrip('/')}"

    monkeypatch.setattr(remote, "_file_system", lambda url: (Hub(), "/" + url.removeprefix("hf://")))
    monkeypatch.setattr(table_files, "_REMOTE_READ_BYTES", 4096)
    rows = [{"bytes": clip(0) + bytes(100_000), "path": f"{row}.wav"} for row in range(40)]
    pq.write_table(
        pa.table({"audio": rows, "text": list(map(str, range(40)))}), tmp_path / "x.parquet", row_group_size=5,
        compression=None, use_dictionary=False,
    )  # fmt: skip
    for split in ("train", "test"):
        memory.pipe_file(f"/datasets/me/voices/data/{split}.parquet", (tmp_path / "x.parquet").read_bytes())
    memory.pipe_file("/datasets/me/voices/README.md", b"#")
    try:
        listed = rows_of("hf://datasets/me/voices", tmp_path)
        assert [row["key"] for row in listed[:40]] == [str(row) for row in range(40)]
        assert [row["key"] for row in listed[40:]] == [f"{row}-2" for row in range(40)]
        size = (tmp_path / "x.parquet").stat().st_size
        assert sum(asked) < size / 4, "audio is not read to list it"
        asked.clear()
        assert read(listed[22]["wav"]) == rows[22]["bytes"]
        assert sum(asked) < size / 4, "a row costs its group, and not its file"
    finally:
        memory.rm("/datasets", recursive=True)


def test_a_data_set_becomes_trainers_lines_by_one_command(tmp_path: Path) -> None:
    checkpoint = write_mimo_checkpoint(tmp_path / "checkpoint")
    pq.write_table(pa.table(columns()).slice(0, 4), tmp_path / "x.parquet", row_group_size=3)
    words = ["--data_list", f"{tmp_path}/x.parquet", "--model_path", str(checkpoint), "--num_workers", "0"]
    assert main([*words, "--sink", "jsonl", "--output_dir", f"{tmp_path}/out"]) == 0
    (shard,) = (tmp_path / "out").glob("wav2token-*.jsonl")
    made = {row["key"]: row for row in map(json.loads, shard.read_bytes().splitlines())}
    assert sorted(made) == [f"clip-{number:03}" for number in range(4)]
    for number in range(4):
        row = made[f"clip-{number:03}"]
        assert {name: row[name] for name in ("text", "speaker", "meta")} == {
            name: columns()[name][number] for name in ("text", "speaker", "meta")
        }
        assert np.array(row["audio_codes"]).ndim == 2
    assert (tmp_path / "out" / "x.wav2token.run" / "summary.json").exists()
