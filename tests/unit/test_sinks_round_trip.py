"""Any codes under any key go into any sink and come back equal, by our own readers and by those of other programs."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from batch_tokenizer.audio.decoding import decode_audio
from batch_tokenizer.codecs.base import CodecInfo
from batch_tokenizer.data.token_files import parse_tokens, read_any_tokens, read_tokens
from batch_tokenizer.manifest.row import REFUSED
from batch_tokenizer.records import RowError, RunError, Sink
from batch_tokenizer.runs.stored_rows import shard_rows
from batch_tokenizer.sources.parquet_rows import parquet_rows
from batch_tokenizer.sources.tar_rows import tar_rows
from batch_tokenizer.sources.token_lines import token_line_rows
from batch_tokenizer.storage.names import member_name, row_location
from batch_tokenizer.storage.parquet_rows import TokenParquet
from batch_tokenizer.writers import parquet_shard
from batch_tokenizer.writers.file_sink import FileSink
from batch_tokenizer.writers.open import audio_encoder
from batch_tokenizer.writers.row_encoding import RowEncoder, npy_bytes, row_info, tokens_as_npy
from batch_tokenizer.writers.shard_sink import shard_form
from tests.support.loading import INFO, make_row
from tests.support.shards import RUN_INFO, tokenized

WIDE = replace(INFO, codebook_sizes=(65536,) * 4)
KEYS = st.one_of(
    st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), min_size=1, max_size=300),
    st.sampled_from(["a.b.c", "../../etc/passwd", "/abs", "spk/utt.1", "..", ".", "x" * 300, "щ" * 300, "a~b", "con:"]),
)
CODES = st.tuples(st.integers(1, 9), st.just(3)).flatmap(lambda shape: arrays(np.uint16, shape))
ROWS = st.lists(st.tuples(KEYS, CODES), min_size=1, max_size=6, unique_by=lambda row: row[0])


def write_shard(path: Path, results: list[Any], *, audio: bool = False, audio_format: str = "wav") -> Path:
    encode = RowEncoder("wav2token2wav" if audio else "wav2token", RUN_INFO, 24000)
    if audio_format == "flac":
        encode = replace(encode, encode_audio=audio_encoder("flac"), audio_format="flac")
    form = shard_form(path.suffix[1:], RUN_INFO, 3, audio)
    with path.open("wb") as stream:
        shard = form.open(stream)
        for result in results:
            shard.append(form.encode(encode(result)))
        shard.finish()
    return path


def listed(path: str) -> Iterator[dict[str, Any]]:
    """The rows of a shard as ``--task token2wav`` lists them."""
    if path.endswith(".jsonl"):
        return token_line_rows(path)
    return parquet_rows(path) if path.endswith(".parquet") else tar_rows(path, "quantized_tokens", print)  # type: ignore[arg-type]


@given(rows=ROWS, sink=st.sampled_from(["json", "npy", "jsonl", "tar", "parquet"]))
def test_what_goes_in_comes_out(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, Any]], sink: Sink
) -> None:
    folder = tmp_path_factory.mktemp("sink")
    results = [
        tokenized(line, codes, key=key, quantized_tokens=str(folder / f"{line}.tokens"), text="щи")
        for line, (key, codes) in enumerate(rows)
    ]
    locations: Iterator[dict[str, Any]]
    if sink == "json" or sink == "npy":
        files = FileSink("wav2token", 24000, RUN_INFO, form=sink)
        for result in results:
            files.write(result)
        locations = iter([dict(result.row.fields) for result in results])
    else:
        path = str(write_shard(folder / f"x.{sink}", results))
        locations = listed(path)
        for (key, codes), stored in zip(rows, shard_rows(path), strict=True):
            assert (stored.key, stored.info["key"]) == (key, key)
            assert np.array_equal(stored.codes, codes)  # type: ignore[arg-type]
            assert stored.info["text"] == "щи"
    for (key, codes), row in zip(rows, locations, strict=True):
        assert row["key"] == key
        found, about = read_tokens(row["quantized_tokens"], WIDE, row)
        assert np.array_equal(found, codes)
        assert (about["fingerprint"], about["num_frames"]) == ("feedface", len(codes))


@pytest.mark.parametrize("sink", ["json", "npy", "jsonl", "tar", "parquet"])
def test_the_same_row_has_the_same_bytes(tmp_path: Path, sink: Sink) -> None:
    contents = []
    for number in range(2):
        result = tokenized(3, quantized_tokens=str(tmp_path / "a"))
        if sink == "json" or sink == "npy":
            FileSink("wav2token", 24000, RUN_INFO, form=sink).write(result)
            contents.append((tmp_path / "a").read_bytes())
        else:
            contents.append(write_shard(tmp_path / f"{number}.{sink}", [result]).read_bytes())
    assert contents[0] == contents[1]


@pytest.mark.parametrize("sink", ["tar", "parquet"])
def test_audio_lies_beside_the_tokens(tmp_path: Path, sink: str) -> None:
    samples = np.sin(np.arange(2000, dtype=np.float32) / 9) / 2
    path = write_shard(tmp_path / f"x.{sink}", [tokenized(0, samples=samples)], audio=True, audio_format="flac")
    [row] = shard_rows(str(path))
    assert row.audio is not None
    assert row.audio_format == "flac"
    read, rate = soundfile.read(io.BytesIO(row.audio), dtype="float32")
    assert rate == 24000
    np.testing.assert_allclose(read, samples, atol=1 / 32768)


class TestNames:
    def test_plain_keys_are_their_own_names(self) -> None:
        assert member_name("LJ001-0001_a") == "LJ001-0001_a"

    @given(KEYS, KEYS)
    def test_names_are_safe_and_tell_keys_apart(self, first: str, second: str) -> None:
        name = member_name(first)
        assert len(name) <= 90
        assert name.isascii()
        assert not set("./\\ \n") & set(name)
        assert (first == second) == (name == member_name(second))


class TestOtherReaders:
    """The same rows, by programs that know nothing of ours."""

    @pytest.fixture
    def results(self) -> list[Any]:
        samples = np.zeros(1000, np.float32)
        return [tokenized(line, samples=samples, key=f"utt.{line}/a", text=f"text {line}") for line in range(2500)]

    def test_webdataset(self, tmp_path: Path, results: list[Any]) -> None:
        import webdataset as wds

        path = write_shard(tmp_path / "x.tar", results[:50], audio=True)
        dataset = wds.WebDataset(str(path), shardshuffle=False, empty_check=False).decode()
        samples = list(dataset)
        assert len(samples) == 50
        for sample, result in zip(samples, results, strict=False):
            assert np.array_equal(sample["tokens.npy"], result.codes)
            assert sample["json"]["key"] == result.row.key
            assert sample["wav"][:4] == b"RIFF"

    def test_datasets(self, tmp_path: Path, results: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
        datasets = pytest.importorskip("datasets", reason="datasets is not installed")
        path = write_shard(tmp_path / "x.parquet", results[:30], audio=True)
        for streaming in (True, False):
            cache = str(tmp_path / "cache")
            read = datasets.load_dataset(
                "parquet", data_files=str(path), split="train", streaming=streaming, cache_dir=cache
            )
            plain = read.cast_column("audio", datasets.Audio(decode=False))
            for row, result in zip(plain, results[:30], strict=True):
                assert (row["key"], row["text"]) == (result.row.key, result.row.fields["text"])
                assert np.array_equal(row["audio_codes"], result.codes)
                assert row["audio"]["bytes"][:4] == b"RIFF"
        assert isinstance(read.features["audio"], datasets.Audio)
        pytest.importorskip("torchcodec", reason="datasets decodes audio with torchcodec, which is not installed")
        audio = read[0]["audio"]
        assert (audio["sampling_rate"], len(audio["array"])) == (24000, 1000)

    def test_datasets_reads_json_lines(
        self, tmp_path: Path, results: list[Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
        datasets = pytest.importorskip("datasets", reason="datasets is not installed")
        path = write_shard(tmp_path / "x.jsonl", results[:30])
        read = datasets.load_dataset("json", data_files=str(path), split="train", streaming=True)
        for row, result in zip(read, results[:30], strict=True):
            assert (row["key"], row["text"]) == (result.row.key, result.row.fields["text"])
            assert np.array_equal(row["audio_codes"], result.codes)

    def test_polars(self, tmp_path: Path, results: list[Any]) -> None:
        polars = pytest.importorskip("polars", reason="polars is not installed")
        frame = polars.read_parquet(write_shard(tmp_path / "x.parquet", results))
        assert frame["key"].to_list() == [result.row.key for result in results]
        assert frame["audio_codes"][7].to_list() == results[7].codes.tolist()
        assert frame["text"][7] == "text 7"

    def test_duckdb(self, tmp_path: Path, results: list[Any]) -> None:
        duckdb = pytest.importorskip("duckdb", reason="duckdb is not installed")
        path = write_shard(tmp_path / "x.parquet", results)
        query = f"select count(*), sum(num_frames), sum(len(flatten(audio_codes))), sum(duration) from '{path}'"
        [(rows, frames, codes, seconds)] = duckdb.sql(query).fetchall()
        expected = sum(len(result.codes) for result in results)
        assert (rows, frames, codes) == (2500, expected, 3 * expected)
        assert seconds == pytest.approx(expected * 960 / 24000)

    @pytest.mark.parametrize("shape", [(1, 1), (1, 8), (987, 20), (10**5, 8), (12345678, 1)])
    def test_our_arrays_are_numpys_own_to_the_byte(self, shape: tuple[int, int]) -> None:
        codes = np.zeros(shape, np.uint16)
        stream = io.BytesIO()
        np.save(stream, codes)
        assert npy_bytes(codes) == stream.getvalue()

    def test_numpy_reads_the_array_and_json_what_is_behind_it(self, tmp_path: Path, results: list[Any]) -> None:
        codes = results[4].codes
        (tmp_path / "a.npy").write_bytes(content := tokens_as_npy(codes, {"key": "щ"}))
        assert np.array_equal(np.load(tmp_path / "a.npy"), codes)
        assert np.array_equal(np.load(tmp_path / "a.npy", mmap_mode="r"), codes)
        assert json.loads(content[len(npy_bytes(codes)) :]) == {"info": {"key": "щ"}}


def test_row_groups_are_small_enough_to_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_shard(tmp_path / "x.parquet", [tokenized(line) for line in range(2500)])
    about = pq.ParquetFile(path).metadata
    assert [about.row_group(group).num_rows for group in range(about.num_row_groups)] == [1024, 1024, 452]
    assert json.loads(about.metadata[b"batch_tokenizer"]) == {**RUN_INFO, "num_quantizers": 3}
    assert about.metadata[b"num_quantizers"] == b"3"
    monkeypatch.setattr(parquet_shard, "BYTES_PER_GROUP", 4096)
    path = write_shard(tmp_path / "y.parquet", [tokenized(line) for line in range(100)])
    assert pq.ParquetFile(path).metadata.num_row_groups > 2


def test_a_parquet_rows_audio_opens_by_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_shard, "ROWS_PER_GROUP", 3)
    results = [tokenized(line, samples=np.full(100 + line, line / 9, np.float32)) for line in range(8)]
    path = str(write_shard(tmp_path / "x.parquet", results, audio=True))
    for line in (7, 0, 3, 2):
        np.testing.assert_allclose(decode_audio(row_location(path, line))[0], results[line].samples[None], atol=1e-4)
        assert read_tokens(row_location(path, line), WIDE)[0].tolist() == results[line].codes.tolist()
    for location, words in (
        (row_location(path, 8), "has 8 rows, and no row 8"),
        (row_location(str(write_shard(tmp_path / "y.parquet", results)), 1), "y.parquet: row 1 has no audio"),
    ):
        with pytest.raises(RowError, match=words):
            decode_audio(location)


def test_audio_beyond_what_parquet_counts_fails_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_shard, "_MOST_BINARY_BYTES", 2043)
    row = tokenized(0, samples=np.zeros(1000, np.float32))
    form = parquet_shard.ParquetForm(RUN_INFO, True, True)
    with pytest.raises(RowError, match=r"2,044 bytes do not fit into parquet"):
        parquet_shard.parquet_row(RowEncoder("wav2token2wav", RUN_INFO, 24000)(row), form)


def test_parquet_without_its_library_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(RunError, match=r"pip install 'batch_tokenizer\[parquet\]'"):
        shard_form("parquet", RUN_INFO, 3, False)
    with pytest.raises(RowError, match="parquet needs pyarrow"):
        read_tokens(row_location(__file__, 0), INFO)


class TestHostile:
    """Files that anybody may have made."""

    INFO: CodecInfo = INFO

    def reason(self, content: bytes) -> str:
        with pytest.raises(RowError) as raised:
            parse_tokens(content, "x")
        assert "\n" not in raised.value.reason
        return raised.value.reason

    def npy(self, array: Any) -> bytes:
        stream = io.BytesIO()
        np.save(stream, array, allow_pickle=True)
        return stream.getvalue()

    @pytest.mark.parametrize(
        ("array", "words"),
        [
            (np.array([{"a": 1}], dtype=object), "not integers"),
            (np.zeros((2, 3)), "not integers"),
            (np.zeros(3, np.uint16), "not integers"),
            (np.zeros((2, 2, 2), np.uint16), "not integers"),
            (np.zeros((0, 3), np.uint16), "no frames"),
            (np.zeros((3, 0), np.uint16), "no codes"),
            (np.full((1, 2), -1), "outside"),
            (np.full((1, 2), 65536), "outside"),
            (np.zeros((1, 300), np.uint16), "300 codes"),
            (np.array([[(1, 2)]], dtype="i4,i4"), "not integers"),
        ],
    )
    def test_arrays_that_are_no_codes(self, array: Any, words: str) -> None:
        assert words in self.reason(self.npy(array))

    def test_a_header_that_promises_more_than_there_is(self) -> None:
        content = self.npy(np.zeros((2, 3), np.uint16))
        for shape in (b"(2**40, 3)", b"(9999999999999, 8)", b"(-2, -3)", b"(2, 3" + b"0" * 30 + b")"):
            bomb = content.replace(b"(2, 3)", shape)[: 128 + 12]
            self.reason(bomb)

    def test_a_header_that_never_ends(self) -> None:
        self.reason(b"\x93NUMPY\x02\x00" + (1 << 30).to_bytes(4, "little") + b"{" * 5000)
        self.reason(b"\x93NUMPY\x09\x00" + bytes(50))
        self.reason(b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 65535)

    @pytest.mark.parametrize("cut", [7, 60, 129, 139])
    def test_cut_short(self, cut: int) -> None:
        self.reason(self.npy(np.zeros((2, 3), np.uint16))[:cut])

    def test_what_is_behind_an_array_must_be_info(self) -> None:
        assert "behind the array" in self.reason(npy_bytes(np.zeros((1, 1), np.uint16)) + b"PK\x03\x04")

    @given(st.binary(max_size=200))
    def test_any_bytes_behind_the_magic(self, noise: bytes) -> None:
        try:
            codes, _ = parse_tokens(b"\x93NUMPY" + noise, "x")
        except RowError:
            return
        assert codes.dtype == np.uint16

    def test_arrays_in_fortran_order_and_of_other_integers(self) -> None:
        array = np.asfortranarray(np.arange(6).reshape(2, 3).astype(">i4"))
        assert parse_tokens(self.npy(array), "x")[0].tolist() == [[0, 1, 2], [3, 4, 5]]

    @pytest.mark.parametrize(
        ("table", "words"),
        [
            (pa.table({"key": ["a"]}), "no column audio_codes"),
            (pa.table({"key": ["a"], "codes": [[[1, 2], [3]]]}), "frames of 1 and of 2 codes"),
            (pa.table({"key": ["a"], "codes": [[[1, 2], None]]}), "frames that are null"),
            (pa.table({"key": ["a"], "codes": [1]}), "no column codes"),
            (pa.table({"key": ["a"], "codes": [[0.5]]}), "no column codes"),
            (pa.table({"key": ["a"], "codes": [[1, 2]], "num_frames": [3]}), "2 codes"),
            (pa.table({"key": ["a"], "codes": [[1, None]], "num_frames": [1]}), "null"),
            (pa.table({"key": ["a"], "codes": pa.array([None], pa.list_(pa.uint16()))}), "has no codes"),
            (pa.table({"key": ["a"], "codes": [[-1, 2]], "num_frames": [1]}), "outside"),
        ],
    )
    def test_parquet_of_others(self, tmp_path: Path, table: Any, words: str) -> None:
        path = tmp_path / "x.parquet"
        pq.write_table(table, path)
        with pytest.raises(RowError, match=words):
            read_tokens(row_location(str(path), 0), INFO)

    def test_parquet_that_is_none(self, tmp_path: Path) -> None:
        path = tmp_path / "x.parquet"
        write_shard(path, [tokenized(line) for line in range(20)])
        content = path.read_bytes()
        with pytest.raises(RowError, match="no row 20"):
            read_tokens(row_location(str(path), 20), INFO)
        for damaged in (b"", b"PAR1", content[:-9], content[: len(content) // 2], b"\0" * 500):
            other = tmp_path / f"{len(damaged)}.parquet"
            other.write_bytes(damaged)
            with pytest.raises(RowError):
                TokenParquet.open(str(other))
            [row] = parquet_rows(str(other))
            assert REFUSED in row

    def test_tokens_of_another_codec(self, tmp_path: Path) -> None:
        other = replace(INFO, fingerprint="0123")
        path = write_shard(tmp_path / "x.parquet", [tokenized(0)])
        with pytest.raises(RowError, match="made by codec fake"):
            read_tokens(row_location(str(path), 0), other)
        path = write_shard(tmp_path / "x.tar", [tokenized(0)])
        [row] = tar_rows(str(path), "quantized_tokens", print)  # type: ignore[arg-type]
        with pytest.raises(RowError, match="made by codec fake"):
            read_tokens(row["quantized_tokens"], other, row)

    def test_a_tar_member_may_not_take_another_rows_key(self, tmp_path: Path) -> None:
        path = write_shard(tmp_path / "x.tar", [tokenized(0, key="mine")])
        content = path.read_bytes().replace(b'"key":"mine"', b'"key":"your"')
        path.write_bytes(content)
        [row] = tar_rows(str(path), "quantized_tokens", print)  # type: ignore[arg-type]
        assert row["key"] == "mine"
        assert [stored.key for stored in shard_rows(str(path))] == ["mine"]


FIELD_NAMES = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=6) | st.sampled_from(
    ["text", "speaker", "audio_codes", "num_frames", "codec", "sample_rate", "manifest_row", "batch_tokenizer", "info"]
)
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**80), 2**80) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=("Cs",)), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(FIELD_NAMES, inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
FIELDS = st.dictionaries(FIELD_NAMES, JSON_VALUES, max_size=5)


def with_fields(line: int, codes: Any, fields: dict[str, Any]) -> Any:
    """A row's results; its fields may have any names."""
    return replace(tokenized(line, codes), row=make_row(line, **fields))


@given(rows=ROWS, fields=FIELDS)
def test_a_line_has_the_rows_fields_as_they_were(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, Any]], fields: dict[str, Any]
) -> None:
    """Fields that have one of our names and say something else are kept under ``manifest_row``; nothing is lost."""
    path = tmp_path_factory.mktemp("sink") / "x.jsonl"
    results = [with_fields(line, codes, {**fields, "key": key}) for line, (key, codes) in enumerate(rows)]
    write_shard(path, results)
    for line, result in zip(path.read_bytes().splitlines(), results, strict=True):
        row = json.loads(line)
        assert row["audio_codes"] == result.codes.tolist()
        assert (row["num_frames"], row["codec"], row["fingerprint"]) == (len(result.codes), "fake", "feedface")
        for name, value in result.row.fields.items():
            ours = name in ("audio_codes", "num_frames", "codec", "fingerprint", "batch_tokenizer", "manifest_row")
            assert row[name] == value or (ours and row["manifest_row"][name] == value)


@given(
    rows=st.lists(st.tuples(KEYS, CODES, FIELDS), min_size=1, max_size=5, unique_by=lambda row: row[0]),
    sink=st.sampled_from(["json", "npy", "jsonl", "tar", "parquet"]),
)
def test_whatever_a_row_says_comes_out_of_every_sink(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, Any, dict[str, Any]]], sink: Sink
) -> None:
    """Nested, null, of other kinds from row to row, integers of any size, and names that the run uses itself."""
    folder = tmp_path_factory.mktemp("sink")
    results = [
        with_fields(line, codes, {**fields, "key": key, "quantized_tokens": str(folder / f"{line}.tokens")})
        for line, (key, codes, fields) in enumerate(rows)
    ]
    if sink == "json" or sink == "npy":
        files = FileSink("wav2token", 24000, RUN_INFO, form=sink)
        for result in results:
            files.write(result)
        infos = [read_any_tokens(str(result.row.quantized_tokens))[1] for result in results]
    else:
        infos = [stored.info for stored in shard_rows(str(write_shard(folder / f"x.{sink}", results)))]
    for result, info in zip(results, infos, strict=True):
        assert info == row_info(result, RUN_INFO)


def test_fields_are_columns_of_their_own_kind(tmp_path: Path) -> None:
    fields: list[dict[str, Any]] = [
        {"speaker": 7, "text": "a", "tags": ["x", "y"], "score": 0.5, "words": {"start": 0.0, "word": "a"}},
        {"speaker": 2**70, "text": None, "score": 3, "noisy": True, "words": {"start": 0.5}, "duration": 1.25},
        {"speaker": "seven", "tags": [], "sample_rate": 16000, "mixed": 1},
        {"mixed": "one", "codec": "mine", "audio": "a.wav"},
    ]
    results = [tokenized(line, **row) for line, row in enumerate(fields)]
    path = write_shard(tmp_path / "x.parquet", results)
    table = pq.read_table(path)
    types = {name: str(table.schema.field(name).type) for name in table.schema.names}
    kept = {"speaker": "int64", "text": "string", "score": "double", "noisy": "bool", "sample_rate": "int64"}
    assert kept.items() <= types.items()
    assert types["tags"] == "list<element: string>"
    assert "audio" not in types  # the name of a column of ours
    assert types["duration"] == "double"
    assert table.column("duration").to_pylist() == [None, 1.25, None, None]  # the rows' own
    assert table.column("speaker").to_pylist() == [7, None, None, None]
    left = [json.loads(text or "{}") for text in table.column("info").to_pylist()]
    assert left[0] == {}
    assert left[1] == {"speaker": 2**70, "text": None, "words": {"start": 0.5}}
    assert left[2]["speaker"] == "seven"
    assert left[3]["mixed"] == "one"
    for result, stored in zip(results, shard_rows(str(path)), strict=True):
        assert stored.info == row_info(result, RUN_INFO)


def test_parquet_of_version_0_1_is_read_as_before(tmp_path: Path) -> None:
    """Codes as one list a row, and fields in a column of JSON."""
    about = {"codec": "fake", "fingerprint": "feedface", "num_quantizers": 3}
    metadata = {"batch_tokenizer": json.dumps(about), "num_quantizers": "3"}
    columns = {
        "key": ["a"], "codes": pa.array([[1, 2, 3, 4, 5, 6]], pa.list_(pa.uint16())),
        "num_frames": pa.array([2], pa.int32()), "duration": [0.08], "text": ["t"],
        "info": ['{"key":"a","text":"t","num_samples":1920}'],
    }  # fmt: skip
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), tmp_path / "x.parquet")
    [row] = shard_rows(str(tmp_path / "x.parquet"))
    assert row.codes is not None
    assert row.codes.tolist() == [[1, 2, 3], [4, 5, 6]]
    assert row.info == {**about, "key": "a", "text": "t", "num_samples": 1920, "num_frames": 2}
    [listed_row] = parquet_rows(str(tmp_path / "x.parquet"))
    assert (listed_row["key"], listed_row["text"]) == ("a", "t")
