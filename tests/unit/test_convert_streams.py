"""Streams for language models: text, marks, offsets, splits and orders; and cuts of Lhotse."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import batch_tokenizer
from batch_tokenizer.cli import main
from batch_tokenizer.commands.convert_streams import part_of
from batch_tokenizer.runs.indexed_rows import stored_rows
from batch_tokenizer.writers.token_streams import Layout
from tests.support.shards import RUN_INFO, tokenized
from tests.unit.test_sinks_round_trip import write_shard

WORDS = ["[UNK]", "say", ":", "one", "two", "three", "<eos>", "<audio>"]
NUMBER = ["one", "two", "three"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Forty rows with text and a speaker."""
    results = [tokenized(line, key=f"row {line}", text=NUMBER[line % 3], speaker=line) for line in range(40)]
    return write_shard(tmp_path / "x.jsonl", results)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    model = tokenizers.models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]")
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def convert(source: Path, out: Path, *more: object) -> Path:
    assert main(["convert", str(source), "--out", str(out), *map(str, more)]) == 0
    return out


@pytest.mark.parametrize("form", ["megatron", "flat"])
@pytest.mark.parametrize("pattern", ["interleaved", "delayed"])
def test_text_stands_beside_the_codes(tmp_path: Path, source: Path, tokenizer: Path, form: str, pattern: str) -> None:
    out = convert(
        source, tmp_path / "out", "--to", form, "--pattern", pattern, "--text", "text", "--tokenizer", tokenizer,
        "--audio_start", 7, "--audio_end", 2000, "--template", "say: {text}{audio}", "--template", "{audio}{text}",
    )  # fmt: skip
    about = json.loads((out / "tokens.json").read_text())
    assert (about["base_offset"], about["codebook_offsets"]) == (8, [8, 8 + 1024, 8 + 1152])
    assert (about["end_of_utterance"], about["vocabulary_size"]) == (8 + 1280, 2001)
    meanings = {(item["first"], item["last"]): item["meaning"] for item in about["ids"]}
    assert meanings[0, 7] == "text, by tokenizer.json"
    assert meanings[8, 1031] == "codes 0 to 1023 of codebook 0"
    assert meanings[2000, 2000] == "end of audio"
    stream = batch_tokenizer.open_token_stream(out)
    rows = list(stored_rows(str(source)))
    assert len(stream) == 2 * len(rows)
    for number, row in enumerate(rows):
        for which in (0, 1):
            key, codes, info = stream.read(2 * number + which)
            assert (key, info["speaker"], info["template"]) == (row.key, row.info["speaker"], which)
            assert np.array_equal(codes, row.codes)  # type: ignore[arg-type]
        assert stream.text(2 * number) == f"say : {row.info['text']}"
        assert stream.text(2 * number + 1) == row.info["text"]
    tokens = np.fromfile(stream.path, stream.dtype, offset=int(stream.starts[0]))[:5].tolist()
    assert tokens[:4] == [1, 2, 3, 7]  # say : one <audio>
    assert 8 <= tokens[4] < 8 + 1024


def test_an_offset_marks_and_an_end_without_text(tmp_path: Path, source: Path) -> None:
    words = ("--to", "flat", "--base_offset", 100_000, "--audio_start", 5, "--audio_end", 6, "--end_of_utterance", 2)
    out = convert(source, tmp_path / "out", *words)
    tokens = np.load(out / "tokens.npy")
    assert tokens.dtype == np.int32
    offsets = np.load(out / "offsets.npy")
    first = tokens[: offsets[1]].tolist()
    [row, *_] = stored_rows(str(source))
    assert row.codes is not None
    expected = [
        100_000 + code + (0, 1024, 1152)[book] for frame in row.codes.tolist() for book, code in enumerate(frame)
    ]
    assert first == [5, *expected, 6, 2]
    assert batch_tokenizer.open_token_stream(out).text(0) is None


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--text", "text"], "needs --tokenizer"),
        (["--template", "{text}"], "must have {audio} once"),
        (["--split", "0.5,0.4"], "add up to 1"),
        (["--audio_start", "3"], "is a token of the codes"),
        (["--audio_start", "1280"], "are different tokens"),
        (["--base_offset", "4", "--text", "text", "--tokenizer", "TOKENIZER"], "has 8 tokens, above which"),
        (["--text", "words", "--tokenizer", "TOKENIZER"], "has no text in its field words"),
        (["--text", "text", "--tokenizer", "nowhere"], "has no tokenizer.json"),
    ],
)
def test_settings_that_cannot_be(
    tmp_path: Path, source: Path, tokenizer: Path, caplog: pytest.LogCaptureFixture, words: list[str], reason: str
) -> None:
    words = [str(tokenizer) if word == "TOKENIZER" else word for word in words]
    assert main(["convert", str(source), "--to", "flat", "--out", str(tmp_path / "out"), *words]) == 2
    assert reason in caplog.messages[-1]
    assert not (tmp_path / "out").exists()


def test_a_split_has_every_row_once_and_is_read_as_one_source(tmp_path: Path, source: Path) -> None:
    out = convert(source, tmp_path / "out", "--to", "megatron", "--split", "0.7,0.2,0.1", "--seed", 3)
    keys = {name: [row.key for row in stored_rows(str(out / name))] for name in ("train", "valid", "test")}
    assert sorted(key for part in keys.values() for key in part) == sorted(f"row {line}" for line in range(40))
    assert len(keys["train"]) > len(keys["valid"]) > 0
    assert len(list(stored_rows(str(out)))) == 40
    again = convert(source, tmp_path / "again", "--to", "megatron", "--split", "0.7,0.2,0.1", "--seed", 3)
    assert (again / "train" / "tokens.bin").read_bytes() == (out / "train" / "tokens.bin").read_bytes()


@pytest.mark.parametrize("form", ["megatron", "flat"])
def test_a_part_of_a_split_may_be_empty(tmp_path: Path, source: Path, form: str) -> None:
    out = convert(source, tmp_path / "out", "--to", form, "--split", "1,0")
    assert len(batch_tokenizer.open_token_stream(out / "valid")) == 0
    assert len(list(stored_rows(str(out)))) == 40


@given(st.text(), st.integers(0, 100))
def test_a_rows_part_depends_on_its_key_and_the_seed_alone(key: str, seed: int) -> None:
    assert part_of(key, (1.0, 0.0), seed) == 0
    assert part_of(key, (0.5, 0.5), seed) in (0, 1)
    assert part_of(key, (0.5, 0.5), seed) == part_of(key, (0.5, 0.3, 0.2), seed) or part_of(key, (0.5, 0.5), seed) == 1


def test_a_shuffled_order_depends_on_the_seed(tmp_path: Path, source: Path) -> None:
    orders = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        out = convert(source, tmp_path / name, "--to", "flat", "--order", "shuffle", "--seed", seed)
        rows = {row.key: row for row in stored_rows(str(out))}
        for row in stored_rows(str(source)):
            assert np.array_equal(rows[row.key].codes, row.codes)  # type: ignore[arg-type]
            assert rows[row.key].info["speaker"] == row.info["speaker"]
        orders.append(list(rows))
    assert orders[0] == orders[1] != orders[2]
    assert orders[0] != [f"row {line}" for line in range(40)]


@given(st.data())
def test_text_and_codes_come_back_from_any_layout(data: st.DataObject) -> None:
    sizes = tuple(data.draw(st.lists(st.integers(1, 50), min_size=1, max_size=4)))
    text_vocabulary = data.draw(st.integers(0, 30))
    base = text_vocabulary + data.draw(st.integers(0, 5))
    beyond = base + sum(sizes) + 2
    marks = data.draw(st.sampled_from([(None, None), (beyond, beyond + 1)]))
    last = data.draw(st.sampled_from([None, beyond + 2]))
    pattern = data.draw(st.sampled_from(["interleaved", "delayed"]))
    layout = Layout(pattern, sizes, base, *marks, last, text_vocabulary)
    chance = random.Random(data.draw(st.integers(0, 2**32)))
    codes = np.array([[chance.randrange(size) for size in sizes] for _ in range(chance.randint(1, 6))], np.uint16)
    texts = [[chance.randrange(text_vocabulary) for _ in range(3)] if text_vocabulary else [] for _ in range(2)]
    tokens = layout.join([texts[0], codes, texts[1]])
    assert tokens.max() < layout.vocabulary_size
    found, text = layout.split(tokens)
    assert np.array_equal(found, codes)
    assert text.tolist() == [*texts[0], *texts[1]]


def test_a_shar_folder_is_read_by_lhotse(tmp_path: Path) -> None:
    lhotse = pytest.importorskip("lhotse", reason="lhotse is not installed")
    results: list[Any] = [
        tokenized(line, key=f"row.{line}", text=f"text {line}", speaker=f"s{line}", tags=["a"]) for line in range(5)
    ]
    out = convert(write_shard(tmp_path / "x.tar", results), tmp_path / "shar", "--to", "shar")
    cuts = list(lhotse.CutSet.from_shar(in_dir=str(out)))
    assert [cut.id for cut in cuts] == [result.row.key for result in results]
    for cut, result in zip(cuts, results, strict=True):
        assert type(cut.codes).__name__ == "TemporalArray"
        assert np.array_equal(cut.load_codes(), result.codes)
        assert cut.duration == pytest.approx(result.num_samples / RUN_INFO["sample_rate"])
        supervision = cut.supervisions[0]
        assert (supervision.text, supervision.speaker) == (result.row.fields["text"], result.row.fields["speaker"])
        assert (cut.custom["tags"], cut.custom["fingerprint"]) == (["a"], "feedface")


def test_shards_with_an_index_are_read_by_energon(tmp_path: Path) -> None:
    energon = pytest.importorskip("megatron.energon", reason="megatron-energon is not installed")
    results = [tokenized(line, key=f"row.{line}", text=f"text {line}") for line in range(5)]
    out = convert(write_shard(tmp_path / "x.jsonl", results), tmp_path / "energon", "--to", "energon")

    class Encoder(energon.DefaultTaskEncoder):  # type: ignore[misc, name-defined]
        cookers = (energon.Cooker(energon.stateless(lambda sample: sample)),)

        def encode_sample(self, sample: Any) -> Any:
            return sample

    dataset = energon.get_train_dataset(
        out, batch_size=None, shuffle_buffer_size=None, max_samples_per_sequence=None, repeat=False,
        worker_config=energon.WorkerConfig(rank=0, world_size=1, num_workers=0), task_encoder=Encoder(),
    )  # fmt: skip
    found = {sample["json"]["key"]: sample["tokens.npy"] for sample in energon.get_loader(dataset)}
    assert found.keys() == {result.row.key for result in results}
    for result in results:
        assert np.array_equal(found[result.row.key], result.codes)
