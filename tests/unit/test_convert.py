"""``convert`` and ``show``: every form into every other, and streams read back by readers written from descriptions."""

from __future__ import annotations

import json
import re
import struct
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from batch_tokenizer.cli import main
from batch_tokenizer.runs.indexed_rows import stored_rows
from batch_tokenizer.writers.file_sink import FileSink
from batch_tokenizer.writers.token_streams import Layout
from tests.support.shards import RUN_INFO, tokenized

KEYS = ["plain", "a.b/c d", "..", "щ" * 300, "x" * 300]


def convert(source: object, form: str, out: Path, *more: object) -> Path:
    assert main(["convert", str(source), "--to", form, "--out", str(out), *map(str, more)]) == 0
    return out


def contents(source: object) -> dict[str, tuple[list[list[int]], str, bytes | None]]:
    rows = {}
    for row in stored_rows(str(source)):
        assert row.codes is not None
        assert row.info["fingerprint"] == "feedface"
        assert row.key not in rows
        rows[row.key] = row.codes.tolist(), row.info["text"], row.audio
    return rows


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """Token files and audio as a run to files leaves them, and their manifest."""
    sink = FileSink("wav2token2wav", 24000, RUN_INFO)
    lines = []
    for number, key in enumerate(KEYS):
        fields = {
            "key": key, "text": f"text {number}", "quantized_tokens": str(tmp_path / f"in/{number}.json"),
            "reconstructed_wav": str(tmp_path / f"in/{number}.wav"),
        }  # fmt: skip
        sink.write(tokenized(number, samples=np.full(100 + number, 0.5, np.float32), **fields))
        lines.append(json.dumps(fields) + "\n")
    path = tmp_path / "data.jsonl"
    path.write_text("".join(lines))
    return path


def test_every_form_into_every_other(tmp_path: Path, manifest: Path) -> None:
    expected = contents(manifest)
    assert set(expected) == set(KEYS)
    source: object = manifest
    for number, form in enumerate(["tar", "parquet", "npy", "parquet", "tar", "json", "npy", "json"]):
        source = convert(source, form, tmp_path / f"{number}-{form}")
        assert contents(source) == expected, form
    assert soundfile.info(json.loads(Path(source, "data.jsonl").read_text().splitlines()[0])["reconstructed_wav"])


def test_a_tar_and_a_parquet_file_by_their_names(tmp_path: Path, manifest: Path) -> None:
    out = convert(manifest, "tar", tmp_path / "t", "--tokens_only")
    assert {audio for _, _, audio in contents(f"{out}/*.tar").values()} == {None}


def test_json_lines_hold_tokens_and_the_rows_own_fields(tmp_path: Path, manifest: Path) -> None:
    words = ["convert", str(manifest), "--to", "jsonl", "--out", str(tmp_path / "none")]
    assert main(words) == 2  # it has audio
    assert main([*words, "--tokens_only", "--codes_field", "key"]) == 2
    out = convert(manifest, "jsonl", tmp_path / "j", "--tokens_only", "--codes_field", "codes")
    rows = [json.loads(line) for line in (out / "tokens-000000.jsonl").read_text().splitlines()]
    assert [row["key"] for row in rows] == KEYS
    assert {row["codec"] for row in rows} == {"fake"}
    expected = {key: (codes, text, None) for key, (codes, text, _) in contents(manifest).items()}
    assert {row["key"]: (row["codes"], row["text"], None) for row in rows} == expected
    for form in ("parquet", "jsonl", "npy"):
        out = convert(out, form, tmp_path / f"{form}-again")
        assert contents(out) == expected, form


def test_shards_are_cut_at_their_size(tmp_path: Path) -> None:
    sink = FileSink("wav2token", 24000, RUN_INFO, form="npy")
    rng = np.random.default_rng(0)
    for number in range(40):
        codes = rng.integers(0, 128, (10_000, 3)).astype(np.uint16)
        sink.write(tokenized(number, codes, quantized_tokens=str(tmp_path / f"in/{number}.npy"), text=""))
    for form in ("tar", "parquet", "jsonl"):
        out = convert(tmp_path / "in", form, tmp_path / form, "--shard_megabytes", 1)
        assert len(list(out.iterdir())) > 1
        assert len(list(stored_rows(str(out)))) == 40


# -------------------------------------------------------------------------------------------------------------- streams

SIZES = st.lists(st.integers(1, 2000), min_size=1, max_size=5)


@given(SIZES.flatmap(lambda sizes: st.tuples(st.just(sizes), arrays(np.uint16, (3, len(sizes))))))
def test_layouts_by_their_description(case: tuple[list[int], npt.NDArray[np.uint16]]) -> None:
    sizes, raw = case
    codes = (raw % np.array(sizes)).astype(np.uint16)
    width = len(sizes)
    plain, late = (Layout(pattern, tuple(sizes)) for pattern in ("interleaved", "delayed"))  # type: ignore[arg-type]
    starts = [sum(sizes[:codebook]) for codebook in range(width)]
    expected = [starts[book] + int(code) for frame in codes for book, code in enumerate(frame)]
    assert plain.encode(codes).tolist() == [*expected, sum(sizes)]
    expected = []
    for step in range(len(codes) + width - 1):
        for book in range(width):
            inside = 0 <= step - book < len(codes)
            expected.append(starts[book] + int(codes[step - book, book]) if inside else sum(sizes) + 1)
    assert late.encode(codes).tolist() == [*expected, sum(sizes)]
    for layout in (plain, late):
        assert layout.vocabulary_size == sum(sizes) + 2
        assert np.array_equal(layout.decode(layout.encode(codes)), codes)
        assert np.array_equal(layout.decode(layout.encode(codes)[:-1]), codes)


@pytest.mark.parametrize("tokens", [[0, 1, 2], [4, 0], [7, 4], [-1, 5]])
def test_tokens_that_are_no_utterance(tokens: list[int]) -> None:
    with pytest.raises(ValueError, match="tokens"):
        Layout("interleaved", (4, 4)).decode(np.array(tokens))
    with pytest.raises(ValueError, match="steps"):
        Layout("delayed", (4, 4, 4)).decode(np.array([0, 13, 13, 12]))


def test_two_bytes_a_token_as_long_as_they_are_enough() -> None:
    assert Layout("interleaved", (65497,)).dtype == np.dtype("<u2")
    assert Layout("interleaved", (65498,)).dtype == np.dtype("<i4")
    assert Layout("interleaved", (65536, 65536)).encode(np.array([[0, 65535]], np.uint16)).tolist() == [
        0,
        131071,
        131072,
    ]


def read_megatron(prefix: Path) -> list[npt.NDArray[Any]]:
    """Sequences by the format's description: header, lengths, byte positions, documents; little-endian throughout."""
    index = prefix.with_suffix(".idx").read_bytes()
    assert index[:9] == b"MMIDIDX\x00\x00"
    version, type_code, num_sequences, num_documents = struct.unpack_from("<QBQQ", index, 9)
    assert version == 1
    dtype = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}[type_code]
    at = 9 + 8 + 1 + 8 + 8
    lengths = struct.unpack_from(f"<{num_sequences}i", index, at)
    at += 4 * num_sequences
    positions = struct.unpack_from(f"<{num_sequences}q", index, at)
    at += 8 * num_sequences
    documents = struct.unpack_from(f"<{num_documents}q", index, at)
    assert at + 8 * num_documents == len(index)
    assert documents == tuple(range(num_sequences + 1))
    data = prefix.with_suffix(".bin").read_bytes()
    width = np.dtype(dtype).itemsize
    assert len(data) == width * sum(lengths)
    return [np.frombuffer(data, dtype, length, at) for length, at in zip(lengths, positions, strict=True)]


def read_flat(folder: Path) -> list[npt.NDArray[Any]]:
    tokens, offsets = np.load(folder / "tokens.npy", mmap_mode="r"), np.load(folder / "offsets.npy")
    assert offsets[-1] == len(tokens)
    return [tokens[begin:end] for begin, end in pairwise(offsets)]


@pytest.mark.parametrize("pattern", ["interleaved", "delayed"])
@pytest.mark.parametrize("form", ["megatron", "flat"])
def test_streams_are_read_by_others(tmp_path: Path, manifest: Path, form: str, pattern: str) -> None:
    expected = contents(manifest)
    out = convert(convert(manifest, "parquet", tmp_path / "p"), form, tmp_path / "s", "--pattern", pattern)
    about = json.loads((out / "tokens.json").read_text())
    assert (about["vocabulary_size"], about["end_of_utterance"]) == (1024 + 128 + 128 + 2, 1280)
    assert about["codebook_offsets"] == [0, 1024, 1152]
    assert about["made_by"]["fingerprint"] == "feedface"
    sequences = read_megatron(out / "tokens") if form == "megatron" else read_flat(out)
    rows = [json.loads(line) for line in (out / "keys.jsonl").read_text().splitlines()]
    keys = [row["key"] for row in rows]
    assert sorted(keys) == sorted(KEYS)
    assert [row["text"] for row in rows] == [expected[key][1] for key in keys]
    layout = Layout(pattern, tuple(about["codebook_sizes"]))  # type: ignore[arg-type]
    for key, tokens in zip(keys, sequences, strict=True):
        assert tokens[-1] == about["end_of_utterance"]
        assert layout.decode(tokens).tolist() == expected[key][0]
    assert about["num_tokens"] == sum(map(len, sequences))


# --------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("prepare", "words", "reason"),
    [
        (lambda folder: None, ["nothing.jsonl"], "does not exist|nothing"),
        (lambda folder: (folder / "empty").mkdir(), ["empty"], "neither shards"),
        (lambda folder: (folder / "x.tar").write_bytes(b"no tar" * 200), ["x.tar"], "no tar"),
        (lambda folder: (folder / "x.jsonl").write_text('{"key": "a"}\n'), ["x.jsonl"], "has no quantized_tokens"),
        (
            lambda folder: (folder / "x.jsonl").write_text("[1]\n"),
            ["x.jsonl"],
            "is a JSON array: write one object a line",
        ),
        (
            lambda folder: (folder / "a.json").write_text("[[1, 2]]") and (folder / "b.json").write_text("[[1]]"),
            ["."],
            "row b: has 1 codebooks, row a has 2: convert them apart",
        ),
        (lambda folder: (folder / "a.json").write_text("[[1, 2]]"), [".", "--to", "flat"], "give --codebook_sizes"),
        (
            lambda folder: (folder / "a.json").write_text("[[1, 9]]"),
            [".", "--to", "flat", "--codebook_sizes", "4,4"],
            "codes beyond the codebooks' sizes",
        ),
    ],
)
def test_what_cannot_be_converted_is_told_in_one_line_and_leaves_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    prepare: Any,
    words: Any,
    reason: str,
) -> None:
    prepare(tmp_path)
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.iterdir())
    assert main(["convert", "--to", "tar", "--out", "new", *words]) in (1, 2)
    [record] = [record for record in caplog.records if record.levelname == "ERROR"]
    assert re.search(reason, record.getMessage())
    assert "\n" not in record.getMessage()
    assert set(tmp_path.iterdir()) == before


def test_a_folder_that_is_there_is_left_alone(tmp_path: Path, manifest: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine").write_text("precious")
    assert main(["convert", str(manifest), "--to", "tar", "--out", str(tmp_path / "there")]) == 2
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["mine"]


def test_show(tmp_path: Path, manifest: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tar = convert(manifest, "tar", tmp_path / "t")
    for source in (manifest, tar):
        capsys.readouterr()
        assert main(["show", KEYS[1], "--in", str(source)]) == 0
        printed = capsys.readouterr().out
        assert "a.b/c d" in printed
        assert "2 frames of 3 codebooks" in printed
        assert "fingerprint feedface" in printed
    assert main(["show", "plain", "--in", str(tar), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["quantized_tokens"] == contents(manifest)["plain"][0]
    assert main(["show", "nobody", "--in", str(tar)]) == 1
