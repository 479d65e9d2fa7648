"""``TokenDataset``: every row exactly once, in an order of its own each epoch, from where an epoch was left."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

import batch_tokenizer
from batch_tokenizer import TokenDataset, collate_tokens
from batch_tokenizer.cli import main
from batch_tokenizer.dataset import token_dataset
from batch_tokenizer.runs.indexed_rows import IndexedRows, stored_rows
from batch_tokenizer.runs.stored_rows import StoredRow
from batch_tokenizer.writers.file_sink import FileSink
from tests.support.runs import make_corpus
from tests.support.shards import RUN_INFO, tokenized
from tests.unit.test_sinks_round_trip import write_shard


@dataclass(frozen=True)
class FakeFile:
    """Rows whose keys are their numbers."""

    first: int
    blocks: tuple[int, ...]

    def __len__(self) -> int:
        return sum(self.blocks)

    def block_starts(self) -> npt.NDArray[np.int64]:
        return np.cumsum([0, *self.blocks[:-1]], dtype=np.int64)

    def read(self, number: int, *, with_audio: bool) -> StoredRow:
        return StoredRow(str(self.first + number), np.array([[self.first + number]], np.uint16), {})


@dataclass(frozen=True)
class Source:
    """How many rows each block of each file has, and what order they are read in."""

    files: tuple[tuple[int, ...], ...]
    shuffle: Any
    seed: int
    batch_size: int
    drop_uneven: bool

    @property
    def num_rows(self) -> int:
        return sum(map(sum, self.files))

    def open(self, rank: int, world_size: int) -> TokenDataset:
        firsts = np.cumsum([0, *map(sum, self.files)], dtype=np.int64)
        files = tuple(FakeFile(int(first), blocks) for first, blocks in zip(firsts, self.files, strict=False))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(IndexedRows, "open", lambda source: IndexedRows(source, files, firsts))
            return TokenDataset(
                "x", shuffle=self.shuffle, seed=self.seed, batch_size=self.batch_size, drop_uneven=self.drop_uneven,
                rank=rank, world_size=world_size,
            )  # fmt: skip


BLOCKS = st.lists(st.integers(1, 9), min_size=1, max_size=40).map(tuple)
SOURCES = st.builds(
    Source,
    st.lists(BLOCKS, min_size=1, max_size=3).map(tuple),
    st.sampled_from([False, True, "rows"]),
    st.integers(0, 3),
    st.integers(1, 5),
    st.booleans(),
)


@contextmanager
def as_worker(worker: int, num_workers: int) -> Iterator[None]:
    """This process stands for one of several DataLoader workers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_dataset, "get_worker_info", lambda: SimpleNamespace(id=worker, num_workers=num_workers))
        yield


def keys_of(rows: Iterator[dict[str, Any]], most: int | None = None) -> list[str]:
    found = []
    while len(found) != most and (row := next(rows, None)) is not None:
        found.append(row["key"])
    return found


def rank_order(source: Source, rank: int, world_size: int, epoch: int = 0) -> list[str]:
    dataset = source.open(rank, world_size)
    dataset.set_epoch(epoch)
    return keys_of(iter(dataset))


class TestEveryRowOnce:
    @given(SOURCES, st.integers(1, 7), st.integers(1, 4))
    def test_ranks_and_workers_part_the_rows(self, source: Source, world_size: int, num_workers: int) -> None:
        seen, sizes = [], []
        for rank in range(world_size):
            alone = rank_order(source, rank, world_size)
            of_workers = []
            for worker in range(num_workers):
                with as_worker(worker, num_workers):
                    of_workers.append(keys_of(iter(source.open(rank, world_size))))
            # A DataLoader takes a batch of each worker in turn, so it has the rows in the order of one process.
            size = source.batch_size
            in_turns = []
            for first in range(0, len(alone), size):
                turn = first // size
                in_turns += of_workers[turn % num_workers][turn // num_workers * size :][:size]
            assert in_turns == alone
            assert len(source.open(rank, world_size)) == len(alone)
            seen += alone
            sizes.append(len(alone))
        assert len(set(seen)) == len(seen)
        left_out = source.num_rows % world_size if source.drop_uneven else 0
        assert len(seen) == source.num_rows - left_out
        assert max(sizes) - min(sizes) <= (0 if source.drop_uneven else 1)

    @given(SOURCES)
    def test_an_epochs_order_is_its_own_and_always_the_same(self, source: Source) -> None:
        first, second = rank_order(source, 0, 1), rank_order(source, 0, 1, epoch=1)
        assert first == rank_order(source, 0, 1)
        assert sorted(first) == sorted(second)
        if source.shuffle is False:
            assert first == second == [str(number) for number in range(source.num_rows)]
        elif source.num_rows > 20:
            assert first != second
            assert first != sorted(first, key=int)

    def test_rows_far_apart_come_together(self) -> None:
        source = Source(((256,) * 100,), True, 0, 1, False)
        rows = np.array(rank_order(source, 0, 1)[:64], np.int64)
        assert len(set((rows // 256).tolist())) > 20  # of the 32 blocks of a window
        assert rows.max() - rows.min() > 256 * 50


class TestResuming:
    @given(SOURCES, st.integers(1, 5), st.integers(1, 5), st.integers(0, 60))
    def test_a_ranks_state_goes_on_with_what_is_left(
        self, source: Source, world_size: int, ranks_afterwards: int, consumed: int
    ) -> None:
        consumed = min(consumed, source.num_rows // world_size)
        whole = [rank_order(source, rank, world_size, epoch=2) for rank in range(world_size)]
        dataset = source.open(0, world_size)
        dataset.set_epoch(2)
        assert keys_of(iter(dataset), consumed) == whole[0][:consumed]
        state = json.loads(json.dumps(dataset.state_dict()))
        assert state == source.open(0, world_size).state_dict() | {"epoch": 2, "consumed": consumed}
        # As many ranks as before go on exactly where they were.
        for rank in range(world_size):
            again = source.open(rank, world_size)
            again.load_state_dict(state)
            again.set_epoch(again.epoch)
            assert keys_of(iter(again)) == whole[rank][consumed:]
            again.set_epoch(3)
            assert keys_of(iter(again)) == rank_order(source, rank, world_size, epoch=3)
        # Any other number of them has the same rows.
        rows: list[str] = []
        for rank in range(ranks_afterwards):
            again = source.open(rank, ranks_afterwards)
            again.load_state_dict(state)
            rows += keys_of(iter(again))
        left = {key for order in whole for key in order[consumed:]}
        assert len(set(rows)) == len(rows)
        assert set(rows) <= left
        assert len(rows) == len(left) - (len(left) % ranks_afterwards if source.drop_uneven else 0)

    @given(SOURCES, st.lists(st.integers(1, 9), min_size=1, max_size=4))
    def test_states_of_states(self, source: Source, steps: list[int]) -> None:
        whole, seen = rank_order(source, 1, 3), []
        state = None
        for step in steps:
            dataset = source.open(1, 3)
            if state is not None:
                dataset.load_state_dict(state)
            seen += keys_of(iter(dataset), min(step, source.num_rows // 3 - len(seen)))
            state = dataset.state_dict()
        assert seen == whole[: len(seen)]

    @given(SOURCES, st.integers(2, 4), st.integers(0, 20))
    def test_a_workers_state_goes_on_in_that_worker(self, source: Source, num_workers: int, consumed: int) -> None:
        with as_worker(num_workers - 1, num_workers):
            whole = keys_of(iter(source.open(0, 2)))
            dataset = source.open(0, 2)
            consumed = len(keys_of(iter(dataset), consumed))
            state = dataset.state_dict()
            again = source.open(0, 2)
            again.load_state_dict(state)
            rows = iter(again)
            assert keys_of(rows, 3) == whole[consumed : consumed + 3]
            once_more = source.open(0, 2)
            once_more.load_state_dict(again.state_dict())
            assert keys_of(iter(once_more)) == whole[consumed + 3 :]
            with pytest.raises(ValueError, match="saved with rank 0, here it is 1"):
                source.open(1, 2).load_state_dict(state)
        with pytest.raises(ValueError, match=f"saved with num_workers {num_workers}, here it is 1"):
            source.open(0, 2).load_state_dict(state)
        with as_worker(0, num_workers):
            other = source.open(0, 2)
            other.load_state_dict(state)
            with pytest.raises(ValueError, match=f"worker 0 has the state of worker {num_workers - 1}"):
                next(iter(other))

    def test_a_state_of_something_else(self) -> None:
        source = Source(((5,),), True, 0, 1, False)
        state = source.open(0, 1).state_dict()
        for other, words in (
            (Source(((6,),), True, 0, 1, False), "num_rows 5, here it is 6"),
            (Source(((5,),), "rows", 0, 1, False), "shuffle True, here it is rows"),
            (Source(((5,),), True, 1, 1, False), "seed 0, here it is 1"),
        ):
            with pytest.raises(ValueError, match=words):
                other.open(0, 1).load_state_dict(state)
        with pytest.raises(ValueError, match="no state of a TokenDataset"):
            source.open(0, 1).load_state_dict({"epoch": 1})


class TestRanks:
    def test_from_the_environment(self, monkeypatch: pytest.MonkeyPatch, shards: Path) -> None:
        monkeypatch.setenv("RANK", "2")
        monkeypatch.setenv("WORLD_SIZE", "4")
        dataset = TokenDataset(shards)
        assert (dataset.rank, dataset.world_size) == (2, 4)
        dataset = TokenDataset(shards, rank=0, world_size=1)
        assert (dataset.rank, dataset.world_size) == (0, 1)
        monkeypatch.setenv("RANK", "x")
        with pytest.raises(ValueError, match="RANK=x"):
            TokenDataset(shards)

    def test_from_a_process_group(self, monkeypatch: pytest.MonkeyPatch, shards: Path) -> None:
        monkeypatch.setenv("RANK", "2")
        monkeypatch.setenv("WORLD_SIZE", "4")
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
        dataset = TokenDataset(shards)
        assert (dataset.rank, dataset.world_size) == (1, 3)

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ({"rank": 1}, "give both or none"),
            ({"rank": 2, "world_size": 2}, "rank 2 of 2"),
            ({"shuffle": "shards"}, "shuffle='shards'"),
            ({"seed": -1}, "seed=-1"),
            ({"batch_size": 0}, "batch_size=0"),
        ],
    )
    def test_arguments_that_cannot_be(self, shards: Path, arguments: dict[str, Any], words: str) -> None:
        with pytest.raises(ValueError, match=words):
            TokenDataset(shards, **arguments)


@pytest.fixture(scope="module")
def results() -> list[Any]:
    samples = [np.full(100 + line, line / 20, np.float32) for line in range(9)]
    return [
        tokenized(line, samples=samples[line], key=f"utt.{line}/a", text=f"text {line}", deep={"a": [1, None, "щ"]})
        for line in range(9)
    ]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, results: list[Any]) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    write_shard(folder / "0.tar", results[:4], audio=True)
    write_shard(folder / "1.tar", results[4:], audio=True, audio_format="flac")
    return folder


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest of token files and audio, as a run to files leaves them."""
    folder = tmp_path_factory.mktemp("files")
    sink = FileSink("wav2token2wav", 24000, RUN_INFO)
    lines = []
    for line in range(9):
        fields = {
            "key": f"utt.{line}/a", "text": f"text {line}", "deep": {"a": [1, None, "щ"]},
            "quantized_tokens": str(folder / f"in/{line}.json"), "reconstructed_wav": str(folder / f"in/{line}.wav"),
        }  # fmt: skip
        sink.write(tokenized(line, samples=np.full(100 + line, line / 20, np.float32), **fields))
        lines.append(json.dumps(fields) + "\n\n")
    (folder / "data.jsonl").write_text("".join(lines).rstrip())
    return folder / "data.jsonl"


class TestSources:
    def check(self, source: object, results: list[Any], *, audio: bool) -> None:
        """The dataset has the rows of ``stored_rows``, which are those of ``results``."""
        dataset = TokenDataset(str(source))
        rows = list(dataset)
        assert [row["key"] for row in rows] == [row.key for row in stored_rows(str(source))]
        assert dataset.num_rows == len(dataset) == len(rows) == len(results)
        by_key = {row["key"]: row for row in rows}
        for result in results:
            row = by_key[result.row.key]
            assert row["codes"].dtype == torch.int64
            assert np.array_equal(row["codes"], result.codes)
            assert row["fields"]["text"] == result.row.fields["text"]
            assert row["fields"]["deep"] == result.row.fields["deep"]
            assert row["fields"]["fingerprint"] == "feedface"
            assert ("audio" in row) == audio
            if audio:
                assert row["sample_rate"] == 24000
                np.testing.assert_allclose(row["audio"], result.samples, atol=1 / 32768)
        assert dataset.codebook_sizes == (1024, 128, 128)
        assert all("audio" not in row for row in TokenDataset(str(source), audio=False))
        assert [row["key"] for row in TokenDataset(str(source), shuffle=True)] != [row["key"] for row in rows]

    def test_tars(self, shards: Path, results: list[Any]) -> None:
        self.check(shards, results, audio=True)
        self.check(f"{shards}/*.tar", results, audio=True)
        self.check(f"{shards}/{{0,1}}.tar", results, audio=True)

    def test_a_manifest_of_files(self, manifest: Path, results: list[Any]) -> None:
        self.check(manifest, results, audio=True)
        self.check(manifest.parent / "in", results, audio=True)
        self.check(f"{manifest.parent}/in/*.json", results, audio=True)

    def test_a_folder_that_was_moved(self, tmp_path: Path, manifest: Path, results: list[Any]) -> None:
        shutil.copytree(manifest.parent / "in", tmp_path / "moved")
        text = (tmp_path / "moved" / "3.json").read_text().replace(f"{manifest.parent}/in/", "/gone/")
        (tmp_path / "moved" / "3.json").write_text(text)
        self.check(tmp_path / "moved", results, audio=True)

    @pytest.mark.parametrize("sink", ["npy", "tar", "parquet"])
    def test_a_runs_folders(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sink: str) -> None:
        """The run folder, the folder of outputs and their manifest name the rows that are done, with their audio."""
        corpus = make_corpus(tmp_path, 3)
        monkeypatch.chdir(tmp_path)
        lines = [json.loads(line) for line in corpus.manifest_lines]
        rows = [{"key": line["key"], "wav": line["wav"], "text": "x"} for line in lines]
        (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, [*rows, {"key": "bad", "wav": "gone.wav"}])))
        arguments = f"--model_path checkpoint --sink {sink} --output_dir out --run_dir run --num_workers 0 --device cpu"
        assert main([*arguments.split(), "--task", "wav2token2wav"]) == 0
        for source in ("run", "out", "out/manifest.jsonl"):
            found = {row["key"]: row for row in TokenDataset(source, shuffle="rows")}
            assert found.keys() == set(corpus.keys), source
            for row in found.values():
                assert (row["fields"]["text"], row["sample_rate"], row["codes"].dtype) == ("x", 24000, torch.int64)
                assert len(row["audio"]) > 0

    @pytest.mark.parametrize("form", ["json", "npy", "jsonl", "tar", "parquet"])
    def test_what_convert_writes(self, tmp_path: Path, shards: Path, results: list[Any], form: str) -> None:
        out = tmp_path / form
        more = ["--tokens_only"] if form == "jsonl" else []
        assert main(["convert", str(shards), "--to", form, "--out", str(out), *more]) == 0
        self.check(out, results, audio=form != "jsonl")

    @pytest.mark.parametrize("form", ["flat", "megatron"])
    @pytest.mark.parametrize("pattern", ["interleaved", "delayed"])
    def test_streams(self, tmp_path: Path, shards: Path, results: list[Any], form: str, pattern: str) -> None:
        out = tmp_path / "out"
        assert main(["convert", str(shards), "--to", form, "--pattern", pattern, "--out", str(out)]) == 0
        dataset = TokenDataset(out)
        rows = list(dataset)
        assert [row["key"] for row in rows] == [result.row.key for result in results]
        for row, result in zip(rows, results, strict=True):
            assert np.array_equal(row["codes"], result.codes)
            assert (row["fields"]["fingerprint"], row["fields"]["num_frames"]) == ("feedface", len(result.codes))
        assert dataset.codebook_sizes == (1024, 128, 128)
        assert [row.key for row in stored_rows(str(out), "utt.5/a")] == ["utt.5/a"]
        # A stream that lost its end, or a key, is no stream.
        tokens = out / ("tokens.npy" if form == "flat" else "tokens.bin")
        content = tokens.read_bytes()
        tokens.write_bytes(content[:-2])
        with pytest.raises(ValueError, match="out"):
            TokenDataset(out)
        tokens.write_bytes(content)
        (out / "keys.jsonl").write_text('"a"\n')
        with pytest.raises(ValueError, match="9 utterances, 1 keys"):
            TokenDataset(out)

    @pytest.mark.parametrize("form", ["json", "npy"])
    def test_token_files(self, tmp_path: Path, results: list[Any], form: Any) -> None:
        sink = FileSink("wav2token", 24000, RUN_INFO, form=form)
        for line, result in enumerate(results):
            place = str(tmp_path / f"in/{line % 3}/{line}.{form}")
            sink.write(tokenized(line, result.codes, **{**result.row.fields, "quantized_tokens": place}))
        # A run folder in the folder of its outputs has JSON files too.
        (tmp_path / "in" / "x.run" / "status").mkdir(parents=True)
        (tmp_path / "in" / "x.run" / "run.json").write_text("{}")
        self.check(tmp_path / "in", results, audio=False)

    def test_parquet_of_many_groups(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, results: list[Any]) -> None:
        monkeypatch.setattr("batch_tokenizer.writers.parquet_shard.ROWS_PER_GROUP", 2)
        write_shard(tmp_path / "x.parquet", results, audio=True)
        self.check(tmp_path / "x.parquet", results, audio=True)
        assert IndexedRows.open(str(tmp_path / "x.parquet")).block_starts().tolist() == [0, 2, 4, 6, 8]


class TestTrouble:
    def test_sources_that_are_none(self, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        (tmp_path / "bad.tar").write_bytes(b"x" * 2000)
        (tmp_path / "bad.parquet").write_bytes(b"x" * 2000)
        for name, words in (
            ("nowhere", "nowhere"),
            ("empty", "empty: has no rows"),
            ("bad.tar", "bad.tar: it is no tar"),
            ("bad.parquet", "bad.parquet: cannot be read: Parquet magic bytes not found"),
        ):
            with pytest.raises(ValueError, match=words) as raised:
                TokenDataset(tmp_path / name)
            assert "\n" not in str(raised.value)

    def test_a_row_that_cannot_be_read_names_its_file(self, tmp_path: Path, manifest: Path) -> None:
        lines = [json.loads(line) for line in manifest.read_text().splitlines() if line]
        lines[1]["quantized_tokens"] = str(tmp_path / "gone.json")
        (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
        rows = iter(TokenDataset(tmp_path / "a.jsonl"))
        next(rows)
        with pytest.raises(ValueError, match=r"gone\.json: no such file"):
            next(rows)

    def test_a_torn_tar_names_itself(self, tmp_path: Path, shards: Path) -> None:
        content = (shards / "0.tar").read_bytes()
        (tmp_path / "torn.tar").write_bytes(content[: len(content) // 2])
        with pytest.raises(ValueError, match=r"torn\.tar: it ends"):
            TokenDataset(tmp_path)

    def test_a_tar_that_changed_since_it_was_opened(self, tmp_path: Path, shards: Path) -> None:
        path = tmp_path / "x.tar"
        path.write_bytes((shards / "0.tar").read_bytes())
        dataset = TokenDataset(path)
        path.write_bytes(b"\0" * path.stat().st_size)
        with pytest.raises(ValueError, match=r"x\.tar: has changed"):
            next(iter(dataset))

    @pytest.mark.parametrize("ending", ["tar", "parquet", "jsonl"])
    def test_a_file_that_was_replaced_is_read_anew(self, tmp_path: Path, results: list[Any], ending: str) -> None:
        path = tmp_path / f"x.{ending}"
        for rows in (results[:3], results[3:]):
            path.unlink(missing_ok=True)
            write_shard(path, rows)
            assert [row["key"] for row in TokenDataset(path)] == [row.row.key for row in rows]

    def test_sizes_of_codebooks_that_nobody_says(self, tmp_path: Path) -> None:
        np.save(tmp_path / "a.npy", np.zeros((2, 3), np.uint16))
        dataset = TokenDataset(tmp_path)
        assert [row["key"] for row in dataset] == ["a"]
        with pytest.raises(ValueError, match="does not say how large its codebooks are"):
            dataset.codebook_sizes  # noqa: B018


def test_a_data_loader_with_workers(shards: Path) -> None:
    """Real processes: batches in the order of one process, the next epoch's order, and the state of a rank."""
    dataset = TokenDataset(shards, shuffle=True, batch_size=2)
    collate = partial(collate_tokens, padding_id=9999)
    loader = DataLoader(dataset, batch_size=2, collate_fn=collate, num_workers=2, persistent_workers=True)
    alone = TokenDataset(shards, shuffle=True)
    for epoch in range(2):
        alone.set_epoch(epoch)
        dataset.set_epoch(epoch)
        assert [key for batch in loader for key in batch["keys"]] == [row["key"] for row in alone]
    assert len(loader) == 5
    with pytest.raises(ValueError, match="DataLoader workers read the rows"):
        dataset.state_dict()
    again = TokenDataset(shards, shuffle=True)
    again.load_state_dict(dataset.state_dict(consumed=4))
    assert [row["key"] for row in again] == [row["key"] for row in alone][4:]


def test_torchdatas_loader_keeps_a_state_for_each_worker(shards: Path) -> None:
    loaders = pytest.importorskip("torchdata.stateful_dataloader", reason="torchdata is not installed")

    def open_loader() -> tuple[TokenDataset, Any]:
        dataset = TokenDataset(shards, shuffle=True)
        return dataset, loaders.StatefulDataLoader(dataset, batch_size=None, num_workers=2)

    dataset, loader = open_loader()
    dataset.set_epoch(2)
    rows = iter(loader)
    keys = [next(rows)["key"] for _ in range(5)]
    again, other_loader = open_loader()
    other_loader.load_state_dict(loader.state_dict())
    keys += [row["key"] for row in other_loader]
    assert again.epoch == 2
    alone = TokenDataset(shards, shuffle=True)
    alone.set_epoch(2)
    assert keys == [row["key"] for row in alone]


def test_the_package_lists_its_names_without_torch() -> None:
    assert {"TokenDataset", "collate_tokens", "load_codec"} <= set(batch_tokenizer.__all__)
