"""``--audio_fields`` and ``--channels split_row``: the codes of several files or channels in one row.

Each is what its file gets as a row of its own; a row ends once; every sink keeps them, and every command reads them.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from batch_tokenizer import TokenDataset, collate_tokens
from batch_tokenizer.audio_fields import OtherAudio, from_settings, parts_of
from batch_tokenizer.cli import main
from batch_tokenizer.commands.convert_targets import FileTarget, ShardTarget
from batch_tokenizer.config import RunConfig
from batch_tokenizer.pipeline.joined_rows import JoinedRows
from batch_tokenizer.records import RowError, RowFailure, RunError, Sink, TokenizedRow, short_repr
from batch_tokenizer.runs.indexed_rows import stored_rows
from batch_tokenizer.runs.stored_rows import StoredRow
from batch_tokenizer.sources.finishing import SourceSettings
from batch_tokenizer.sources.listing import local_manifest
from batch_tokenizer.writers.file_sink import FileSink
from batch_tokenizer.writers.row_encoding import RowEncoder, tokens_as_json, tokens_as_npy
from batch_tokenizer.writers.shard_sink import shard_form
from tests.support.checkpoints import write_mimo_checkpoint
from tests.support.command import failures
from tests.support.loading import make_row
from tests.support.moss import write_moss_checkpoint
from tests.support.shards import RUN_INFO, tokenized

REFERENCE = ("--audio_fields", "wav=audio_codes,ref_audio=ref_audio_codes")
SINKS: tuple[Sink, ...] = ("json", "npy", "jsonl", "tar", "parquet")
OTHERS = (OtherAudio("ref_codes", "ref"), OtherAudio("b", "second", channel=1))

# ------------------------------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"audio_fields": "wav"}, "FIELD=CODES"),
        ({"audio_fields": "wav=a,ref="}, "FIELD=CODES"),
        ({"audio_fields": "wav=a,ref=a"}, "has a name twice"),
        ({"audio_fields": "wav=a,key=b"}, "key is no field of audio"),
        ({"audio_fields": "wav=a,ref=tokens"}, "codes cannot be named tokens"),
        ({"audio_fields": "wav=a,ref=b.c"}, "codes cannot be named b.c"),
        ({"audio_fields": "wav=a,ref=num_frames"}, "codes cannot be named num_frames"),
        ({"audio_fields": "wav=a,ref=version"}, "codes cannot be named version"),
        ({"audio_fields": "wav=a,ref=Tokens"}, "codes cannot be named Tokens"),
        ({"audio_fields": "wav=a,ref=codes"}, "codes cannot be named codes"),
        ({"audio_fields": "wav=a,ref=_b"}, "codes cannot be named _b"),
        ({"audio_fields": "wav=a,ref=b,context=B"}, "has a name twice"),
        ({"audio_fields": "wav=a", "codes_field": "b"}, "--codes_field says b"),
        ({"audio_fields": "wav=a,ref=b", "task": "wav2token2wav"}, "use --task wav2token"),
        ({"audio_fields": "wav=a,ref=b", "hidden_states": True}, "no --hidden_states of several"),
        ({"audio_fields": "wav=a", "task": "token2wav"}, "token2wav decodes the codes of a row's own audio"),
        ({"audio_fields": "wav=a,ref=b", "channels": "split_row"}, "leave one of them out"),
        ({"channels": "split_row", "task": "wav2token2wav"}, "--channels split_row"),
    ],
)
def test_settings_that_contradict_are_refused(settings: Mapping[str, Any], message: str) -> None:
    with pytest.raises(RunError) as refused:
        RunConfig(**settings)
    assert message in str(refused.value)


def test_what_the_flags_mean() -> None:
    config = RunConfig(audio_fields="audio=codes, ref_audio=ref_audio_codes", channels="right")
    assert (config.audio_field, config.codes_field) == ("audio", "codes")
    assert config.other_audio == (OtherAudio("ref_audio_codes", "ref_audio", 1),)
    assert RunConfig(channels="split_row").other_audio == (OtherAudio("audio_codes_1", channel=1),)
    assert RunConfig(channels="split_row", task="token2wav").other_audio == ()
    recorded = {"other_audio": {other.codes: other.setting for other in OTHERS}}
    assert from_settings(json.loads(json.dumps(recorded))) == OTHERS


# --------------------------------------------------------------------------------------------------------- parts, ends


@pytest.mark.parametrize("absent", [{}, {"ref": None}, {"ref": ""}])
def test_a_row_has_the_parts_that_it_names(absent: Mapping[str, Any]) -> None:
    own = make_row(wav="a.wav", second="b.wav", **absent)
    parts = parts_of(own, OTHERS)
    assert [(part.wav, part.other_codes) for part in parts] == [("a.wav", None), ("b.wav", "b")]
    assert parts[1].cut is not None
    assert parts[1].cut.channel == 1


@pytest.mark.parametrize("value", [["a.wav", "b.wav"], 7, {"bytes": "…"}, "a\0b"])
def test_a_field_that_is_no_path_fails_the_row(value: object) -> None:
    row = make_row(wav="a.wav", ref=value)
    with pytest.raises(RowError, match='field "ref" is'):
        parts_of(row, OTHERS)
    joined = JoinedRows(OTHERS)
    failure = joined.split(row)
    assert isinstance(failure, RowFailure)
    assert joined.join(failure) == failure


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=6), data=st.data(), seed=st.integers(0)
)
def test_every_row_ends_once_in_whatever_order_its_parts_do(
    rows: list[tuple[bool, bool]], data: st.DataObject, seed: int
) -> None:
    joined = JoinedRows(OTHERS)
    parts = []
    for line, fields in enumerate(rows):
        named = {name: f"{name}.wav" for name, there in zip(("ref", "second"), fields, strict=True) if there}
        split = joined.split(make_row(line, wav="own.wav", **named))
        assert not isinstance(split, RowFailure)
        parts += split
    np.random.default_rng(seed).shuffle(parts)  # type: ignore[arg-type]
    failing = {(part.line, part.other_codes) for part in parts if data.draw(st.integers(0, 4)) == 0}
    ended: dict[int, TokenizedRow | RowFailure] = {}
    for part in parts:
        codes = np.full((1, 3), part.line, np.uint16)
        result = TokenizedRow(part, codes, None, 960)
        is_failing = (part.line, part.other_codes) in failing
        end = joined.join(RowFailure.of(part, "load", "gone") if is_failing else result)
        if end is not None:
            line = end.line if isinstance(end, RowFailure) else end.row.line
            assert line not in ended
            ended[line] = end
    assert sorted(ended) == list(range(len(rows)))
    for line, end in ended.items():
        assert isinstance(end, RowFailure) == any(line == failed for failed, _ in failing)
        if isinstance(end, TokenizedRow):
            assert end.row.other_codes is None
            there = {name for name, given in zip(("ref_codes", "b"), rows[line], strict=True) if given}
            assert set(end.others) == there
    assert not joined._pending


# --------------------------------------------------------------------------------------------------------------- sinks

SEVERAL = {**RUN_INFO, "other_audio": {other.codes: other.setting for other in OTHERS}}


def several(line: int, names: tuple[str, ...], **fields: Any) -> TokenizedRow:
    others = {name: tokenized(10 * line + len(name), **fields) for name in names}
    own = tokenized(line, **fields)
    return TokenizedRow(own.row, own.codes, None, own.num_samples, others=others)


def read_back(source: Path) -> dict[str, StoredRow]:
    return {row.key: row for row in stored_rows(str(source))}


@settings(max_examples=25, deadline=None)
@given(
    names=st.lists(st.sampled_from([(), ("ref_codes",), ("b",), ("ref_codes", "b")]), min_size=1, max_size=4),
    stale=st.booleans(),
    first=st.sampled_from(SINKS),
    second=st.sampled_from(SINKS),
)
def test_other_codes_go_through_any_two_sinks(
    tmp_path_factory: pytest.TempPathFactory, names: list[tuple[str, ...]], stale: bool, first: Sink, second: Sink
) -> None:
    folder = tmp_path_factory.mktemp("sinks")
    # A field of a row that has the name of codes says something else, and is kept.
    old = {"b": [[1, 2, 3]]} if stale else {}
    results = [
        several(
            line, others, key=f"k {line}", wav="a.wav", quantized_tokens=str(folder / "a" / f"{line}.{first}"), **old
        )
        for line, others in enumerate(names)
    ]
    (folder / "a").mkdir()
    if first == "json" or first == "npy":
        sink = FileSink("wav2token", 24000, SEVERAL, form=first)
        for result in results:
            sink.write(result)
    else:
        encode, form = RowEncoder("wav2token", SEVERAL, 24000), shard_form(first, SEVERAL, 3, False)
        with (folder / "a" / f"x.{form.suffix}").open("wb") as stream:
            shard = form.open(stream)
            for result in results:
                shard.append(form.encode(encode(result)))
            shard.finish()
    (folder / "b").mkdir()
    if second == "json" or second == "npy":
        to_bytes = tokens_as_json if second == "json" else tokens_as_npy
        target: Any = FileTarget(folder / "b", folder / "b", to_bytes, f".{second}")
    else:
        target = ShardTarget(folder / "b", second, 1 << 20, "audio_codes")
    for row in read_back(folder / "a").values():
        target.add(row)
    target.finish()
    for place in ("a", "b"):
        found = read_back(folder / place)
        assert sorted(found) == sorted(result.row.key for result in results)
        for result in results:
            row = found[result.row.key]
            assert np.array_equal(row.codes, result.codes)  # type: ignore[arg-type]
            assert {name: codes.tolist() for name, codes in row.other_codes.items()} == {
                name: other.codes.tolist() for name, other in result.others.items()
            }
            assert row.info.get("manifest_row", {}) == old
            lengths = {name: other.num_samples for name, other in result.others.items()}
            assert {name: said["num_samples"] for name, said in row.info.get("other_codes", {}).items()} == lengths


def test_codes_that_a_row_should_have_and_has_not_are_named(tmp_path: Path) -> None:
    sink = FileSink("wav2token", 24000, SEVERAL)
    sink.write(several(0, ("b",), quantized_tokens=str(tmp_path / "x.json")))
    document = json.loads((tmp_path / "x.json").read_text())
    faults = {"b of the row are not there": None, "code -1 is outside": [[1, -1, 2]], "b is a number, not a list": 7}
    for message, broken in faults.items():
        document["info"]["b"] = broken
        (tmp_path / "x.json").write_text(json.dumps(document))
        with pytest.raises(RunError, match=message):
            read_back(tmp_path)


# ---------------------------------------------------------------------------------------------------------------- runs

SECONDS = (0.31, 1.4, 0.12, 0.85, 2.3)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips of several lengths and rates, a stereo one, and a tiny codec of each kind."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    for number, seconds in enumerate(SECONDS):
        rate = (24000, 16000)[number % 2]
        soundfile.write(folder / f"{number}.wav", rng.uniform(-0.3, 0.3, round(seconds * rate)), rate)
    soundfile.write(folder / "stereo.wav", rng.uniform(-0.3, 0.3, (20000, 2)), 24000)
    soundfile.write(folder / "three.wav", rng.uniform(-0.3, 0.3, (2000, 3)), 24000)
    write_mimo_checkpoint(folder / "mimo")
    write_moss_checkpoint(folder / "moss")
    return folder


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(corpus: Path, source: object, out: Path, *more: object, model: str = "mimo") -> int:
    words = [
        "--data_list", source, "--task", "wav2token", "--output_dir", out, "--run_dir", f"{out}.run",
        "--model_path", corpus / model, "--device", "cpu", "--num_workers", 0, "--quiet", *more,
    ]  # fmt: skip
    return main(list(map(str, words)))


def alone(corpus: Path, out: Path, names: list[str], *more: object, model: str = "mimo") -> dict[str, Any]:
    """The codes of files as rows of their own."""
    rows = [{"key": name, "wav": str(corpus / f"{name}.wav")} for name in names]
    assert run(corpus, write_rows(out.with_suffix(".jsonl"), rows), out, "--sink", "jsonl", *more, model=model) == 0
    return {row.key: row.codes for row in stored_rows(str(out))}


@pytest.mark.parametrize(
    ("model", "more"),
    [
        ("mimo", ()),
        ("mimo", ("--long_audio", "segment", "--max_seconds", 0.5)),
        ("moss", ("--long_audio", "stream", "--max_seconds", 0.5)),
    ],
)
def test_codes_are_those_of_each_file_alone(corpus: Path, tmp_path: Path, model: str, more: tuple[object, ...]) -> None:
    names = [str(number) for number in range(len(SECONDS))]
    expected = alone(corpus, tmp_path / "alone", names, *more, model=model)
    pairs = {name: (name, names[number - 1]) for number, name in enumerate(names)}
    rows = [
        {"key": key, "wav": str(corpus / f"{own}.wav"), "ref_audio": str(corpus / f"{other}.wav")}
        for key, (own, other) in pairs.items()
    ]
    source = write_rows(tmp_path / "data.jsonl", rows)
    assert run(corpus, source, tmp_path / "out", "--sink", "jsonl", *REFERENCE, *more, model=model) == 0
    found = {row.key: row for row in stored_rows(str(tmp_path / "out"))}
    assert sorted(found) == names
    for key, (own, other) in pairs.items():
        assert np.array_equal(found[key].codes, expected[own])
        assert np.array_equal(found[key].other_codes["ref_audio_codes"], expected[other])
    # As a trainer reads it: lists (T, K) under the names that were asked for.
    line = json.loads(next((tmp_path / "out").glob("*.jsonl")).read_text().splitlines()[0])
    assert np.array_equal(line["ref_audio_codes"], expected[pairs[line["key"]][1]])
    assert np.array_equal(line["audio_codes"], expected[line["key"]])


@pytest.mark.parametrize("sink", ["json", "jsonl", "tar", "parquet"])
def test_a_run_with_reference_audio(
    corpus: Path,
    tmp_path: Path,
    sink: Sink,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Rows with, without and with missing reference audio; what fails is done again; every command reads the run."""
    (tmp_path / "late.wav").write_bytes(b"")
    reference = {"a": str(corpus / "1.wav"), "b": None, "c": str(tmp_path / "late.wav")}
    rows = [{"key": key, "wav": str(corpus / "0.wav"), "ref_audio": path} for key, path in reference.items()]
    source, out = (
        write_rows(tmp_path / "data.jsonl", [*rows, {"key": "d", "wav": str(corpus / "2.wav")}]),
        tmp_path / "out",
    )
    flags = ("--sink", sink, *REFERENCE)
    # 1. Before the run: what would fail is named, and both files are counted.
    assert run(corpus, source, out, *flags, "--dry_run") == 1
    plan = capsys.readouterr().out
    assert "late.wav" in plan
    assert "of other audio, extrapolated from the headers of" in plan
    # 2. The row whose reference fails does; the others are done.
    assert run(corpus, source, out, *flags) == 0
    assert failures(Path(f"{out}.run"))["c"]["reason"].startswith("for ref_audio_codes: ")
    assert sorted(read_back(out)) == ["a", "b", "d"]
    # 3. Once it is there, the row is done again, by the same command alone.
    (tmp_path / "late.wav").write_bytes((corpus / "3.wav").read_bytes())
    assert run(corpus, source, out, "--sink", sink, "--retry_failed") == 2
    assert "other_audio: run folder has" in caplog.text
    assert run(corpus, source, out, *flags, "--retry_failed") == 0
    # 4. Reading it, checking it, computing it again.
    found = read_back(out)
    assert {key: sorted(row.other_codes) for key, row in found.items()} == {
        "a": ["ref_audio_codes"], "b": [], "c": ["ref_audio_codes"], "d": []
    }  # fmt: skip
    checked = ["verify", "--data_list", source, "--run_dir", f"{out}.run", "--recompute", 4]
    assert main([*map(str, checked), "--model_path", str(corpus / "mimo"), "--device", "cpu"]) == 0
    capsys.readouterr()
    assert main(["show", "c", "--in", str(out)]) == 0
    assert f"ref_audio_codes {len(found['c'].other_codes['ref_audio_codes'])} frames" in capsys.readouterr().out
    samples = list(TokenDataset(str(out)))
    assert {sample["key"]: sorted(sample.get("other_codes", {})) for sample in samples} == {
        key: sorted(row.other_codes) for key, row in found.items()
    }
    batch = collate_tokens(samples, padding_id=9999)
    assert [sorted(codes) for codes in batch["other_codes"]] == [sorted(row.get("other_codes", {})) for row in samples]
    # 5. Decoding takes the codes of the row's own audio.
    words = ["--data_list", out, "--task", "token2wav", "--output_dir", tmp_path / "wavs", "--run_dir", tmp_path / "r"]
    words += ["--model_path", corpus / "mimo", "--device", "cpu", "--num_workers", 0, "--names", "hash"]
    assert main(list(map(str, words))) == 0
    frames = sorted(soundfile.info(path).frames for path in (tmp_path / "wavs").rglob("*.wav"))
    assert frames == sorted(960 * len(row.codes) for row in found.values() if row.codes is not None)


def test_verify_finds_other_codes_that_changed(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"key": "a", "wav": str(corpus / "0.wav"), "ref_audio": str(corpus / "1.wav")}
    source = write_rows(tmp_path / "data.jsonl", [row])
    for sink in ("json", "jsonl"):
        out = tmp_path / sink
        assert run(corpus, source, out, "--sink", sink, *REFERENCE) == 0
        [path] = [path for path in out.rglob(f"*.{sink}") if path.name != "manifest.jsonl"]
        document = json.loads(path.read_text())
        holder = document["info"] if sink == "json" else document
        for change, message in ((lambda codes: codes[:-1], "ref_audio_codes: "), (lambda codes: None, "not there")):
            holder_codes = holder["ref_audio_codes"]
            holder["ref_audio_codes"] = change(holder_codes)
            path.write_text(json.dumps(document))
            holder["ref_audio_codes"] = holder_codes
            words = ["verify", "--data_list", source, "--run_dir", f"{out}.run", "--model_path", corpus / "mimo"]
            assert main(list(map(str, words))) == 1
            assert message in capsys.readouterr().out


@pytest.mark.parametrize("sink", ["json", "tar", "parquet"])
def test_codes_that_rows_had_before_do_not_replace_those_of_the_run(corpus: Path, tmp_path: Path, sink: str) -> None:
    old = {"audio_codes": [[1, 2], [3, 4]], "ref_codes": [[5, 6]]}
    rows = [{"key": "a", "wav": str(corpus / "0.wav"), "ref": str(corpus / "1.wav"), **old}]
    fields = ("--sink", sink, "--audio_fields", "wav=audio_codes,ref=ref_codes")
    assert run(corpus, write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "out", *fields) == 0
    expected = alone(corpus, tmp_path / "alone", ["0", "1"])
    (row,) = list(TokenDataset(tmp_path / "out"))
    assert np.array_equal(row["codes"], expected["0"])
    assert np.array_equal(row["other_codes"]["ref_codes"], expected["1"])
    assert row["fields"]["audio_codes"] == old["audio_codes"]


def test_rows_of_a_jsonl_run_that_are_tokenized_again_have_their_new_codes(corpus: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [{"key": "a", "wav": str(corpus / "0.wav")}])
    assert run(corpus, rows, tmp_path / "first", "--sink", "jsonl") == 0
    (shard,) = (tmp_path / "first").glob("*.jsonl")
    assert run(corpus, shard, tmp_path / "again", "--sink", "tar", "--num_quantizers", 1) == 0
    (row,) = list(TokenDataset(tmp_path / "again"))
    assert row["codes"].shape[1] == 1


def test_a_row_whose_field_is_no_path_or_is_missing_ends_as_failed(corpus: Path, tmp_path: Path) -> None:
    wav = str(corpus / "0.wav")
    rows = [
        {"key": "a", "audio": wav, "ref": [wav]},
        {"key": "b", "audio": wav, "ref": wav},
        {"id": 3, "audio_filepath": wav, "ref": wav},
    ]
    fields = ("--sink", "jsonl", "--audio_fields", "audio=audio_codes,ref=ref_codes", "--max_failed", 2)
    assert run(corpus, write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "out", *fields) == 0
    lines = (tmp_path / "out.run" / "failures.jsonl").read_text().splitlines()
    assert [(row["key"], row["reason"]) for row in map(json.loads, lines)] == [
        ("a", f'field "ref" is {short_repr([wav])}, not a path'),
        ("3", 'field "audio" is missing'),
    ]


def test_both_channels_of_a_dialogue_are_one_row(corpus: Path, tmp_path: Path) -> None:
    rows = [{"key": name, "wav": str(corpus / f"{name}.wav")} for name in ("stereo", "0", "three")]
    source = write_rows(
        tmp_path / "data.jsonl", [*rows, {"key": "one", "wav": str(corpus / "stereo.wav"), "channel": 1}]
    )
    assert run(corpus, source, tmp_path / "split", "--sink", "jsonl", "--channels", "split") == 0
    expected = read_back(tmp_path / "split")
    for sink in ("jsonl", "parquet"):
        out = tmp_path / sink
        assert run(corpus, source, out, "--sink", sink, "--channels", "split_row") == 0
        found = read_back(out)
        assert sorted(found) == ["0", "one", "stereo"]
        assert np.array_equal(found["stereo"].codes, expected["stereo-0"].codes)  # type: ignore[arg-type]
        assert np.array_equal(found["stereo"].other_codes["audio_codes_1"], expected["stereo-1"].codes)  # type: ignore[arg-type]
        assert np.array_equal(found["one"].codes, expected["stereo-1"].codes)  # type: ignore[arg-type]
        assert not found["0"].other_codes
        assert not found["one"].other_codes
        assert "3 channels, where --channels split_row takes two" in failures(Path(f"{out}.run"))["three"]["reason"]


# ------------------------------------------------------------------------------------------------------------- sources


def listed(source: object, folder: Path, **settings: Any) -> list[dict[str, Any]]:
    chosen = SourceSettings(sink="tar", **{"other_fields": ("ref_audio",), **settings})
    return [
        json.loads(line) for line in local_manifest(str(source), folder / "index", chosen).read_bytes().splitlines()
    ]


def test_relative_paths_of_all_fields_lie_beside_the_manifest(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(b"")
    (tmp_path / "b.wav").write_bytes(b"")
    nemo = {"audio_filepath": "a.wav", "context_audio_filepath": "b.wav", "text": "x", "duration": 1.0}
    source = write_rows(
        tmp_path / "nemo.jsonl", [nemo, {**nemo, "audio_filepath": "c.wav", "context_audio_filepath": None}]
    )
    rows = listed(source, tmp_path, audio_field="audio_filepath", other_fields=("context_audio_filepath",))
    assert [(row["wav"], row["context_audio_filepath"]) for row in rows] == [
        (f"{tmp_path}/a.wav", f"{tmp_path}/b.wav"), (f"{tmp_path}/c.wav", None)
    ]  # fmt: skip
    # A row of ours whose other audio alone is relative.
    source = write_rows(tmp_path / "ours.jsonl", [{"key": "k", "wav": f"{tmp_path}/a.wav", "ref_audio": "b.wav"}])
    assert listed(source, tmp_path)[0]["ref_audio"] == f"{tmp_path}/b.wav"


def test_the_field_that_is_named_is_the_rows_own_audio(tmp_path: Path) -> None:
    source = write_rows(
        tmp_path / "data.jsonl", [{"audio": "/x.wav", "target": "/t.wav", "ref_audio": {"path": "/r.wav"}}]
    )
    [row] = listed(source, tmp_path, audio_field="target")
    assert (row["wav"], row["ref_audio"], row["audio"]) == ("/t.wav", "/r.wav", "/x.wav")


def test_recordings_among_the_custom_fields_of_cuts(tmp_path: Path) -> None:
    def recording(name: str, **more: Any) -> dict[str, Any]:
        sources = [{"type": "file", "channels": [0], "source": f"/{name}.wav"}]
        return {"id": name, "sources": sources, "sampling_rate": 24000, "num_samples": 24000, "duration": 1.0, **more}

    cut = {"id": "u", "start": 0.0, "duration": 1.0, "channel": 0, "type": "MonoCut", "recording": recording("u")}
    source = write_rows(
        tmp_path / "cuts.jsonl", [cut | {"custom": {"ref_audio": recording("r")}}, cut | {"id": "v", "custom": {}}]
    )
    rows = listed(source, tmp_path)
    assert [(row["wav"], row.get("ref_audio")) for row in rows] == [("/u.wav", "/r.wav"), ("/u.wav", None)]


def test_columns_of_audio_in_parquet(corpus: Path, tmp_path: Path) -> None:
    def audio(name: str | None) -> dict[str, Any] | None:
        return None if name is None else {"bytes": (corpus / f"{name}.wav").read_bytes(), "path": None}

    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = {"id": pa.array(["a", "b"]), "audio": pa.array([audio("0"), audio("1")], kind)}
    columns["ref_audio"] = pa.array([audio("2"), None], kind)
    columns["noise"] = pa.array([None, audio("3")["bytes"]], pa.binary())  # type: ignore[index]
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    fields = ("--audio_fields", "audio=audio_codes,ref_audio=ref_audio_codes,noise=noise_codes")
    assert run(corpus, tmp_path / "x.parquet", tmp_path / "out", "--sink", "parquet", *fields) == 0
    expected = alone(corpus, tmp_path / "alone", ["0", "1", "2", "3"])
    found = read_back(tmp_path / "out")
    assert np.array_equal(found["a"].codes, expected["0"])  # type: ignore[arg-type]
    assert np.array_equal(found["b"].codes, expected["1"])  # type: ignore[arg-type]
    assert sorted(found["a"].other_codes) == ["ref_audio_codes"]
    assert sorted(found["b"].other_codes) == ["noise_codes"]
    assert np.array_equal(found["a"].other_codes["ref_audio_codes"], expected["2"])
    assert np.array_equal(found["b"].other_codes["noise_codes"], expected["3"])
    # Read by pyarrow alone, a row without has null.
    table = pq.read_table(next((tmp_path / "out").glob("*.parquet")))
    by_key = dict(zip(table.column("key").to_pylist(), table.column("ref_audio_codes").to_pylist(), strict=True))
    assert by_key["b"] is None
    assert np.array_equal(by_key["a"], expected["2"])


def test_members_of_a_tar(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name in ("u.flac", "u.json", "u.ref_audio.wav", "v.flac", "w.ref_audio.wav", "w.txt"):
            content = b'{"text": "t"}' if name.endswith("json") else b"x"
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    rows = {row["key"]: row for row in listed(tmp_path / "x.tar", tmp_path)}
    assert sorted(rows) == ["u", "v"]
    assert rows["u"]["ref_audio"].startswith("tar://")
    assert rows["u"]["ref_audio"].endswith(f"u.ref_audio.wav::{tmp_path}/x.tar")
    assert rows["u"]["text"] == "t"
    assert "ref_audio" not in rows["v"]
    assert sorted(row["key"] for row in listed(tmp_path / "x.tar", tmp_path, other_fields=())) == [
        "u", "u.ref_audio", "v", "w.ref_audio",
    ]  # fmt: skip


def test_a_shar_is_refused(tmp_path: Path) -> None:
    (tmp_path / "shar").mkdir()
    (tmp_path / "shar" / "cuts.000000.jsonl").write_text("{}\n")
    (tmp_path / "shar" / "recording.000000.tar").write_bytes(b"")
    with pytest.raises(RunError, match="give cuts as JSON lines"):
        listed(tmp_path / "shar", tmp_path)


def test_a_field_that_no_row_has_is_named(corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = write_rows(tmp_path / "data.jsonl", [{"key": "a", "wav": str(corpus / "2.wav")}])
    assert run(corpus, source, tmp_path / "out", "--sink", "jsonl", *REFERENCE) == 0
    assert "none of the first 1 rows has a field ref_audio" in caplog.text
    assert not read_back(tmp_path / "out")["a"].other_codes


def test_fields_of_other_programs_with_such_names_are_fields(tmp_path: Path) -> None:
    odd = {"other_audio": {"x": "/etc/passwd"}, "other_codes": {"x": 1}, "x": "/etc/passwd"}
    write_rows(tmp_path / "data.jsonl", [{"key": "a", "codes": [[1, 2]], **odd}])
    [row] = stored_rows(str(tmp_path / "data.jsonl"))
    assert not row.other_codes
    assert {name: row.info[name] for name in odd} == odd


def test_streams_hold_the_own_codes_of_rows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    result = several(0, ("b",), quantized_tokens=str(tmp_path / "tokens" / "x.json"))
    FileSink("wav2token", 24000, SEVERAL).write(result)
    assert main(["convert", str(tmp_path / "tokens"), "--to", "flat", "--out", str(tmp_path / "flat")]) == 0
    assert "--to flat holds the own codes of rows: ref_codes, b are left behind" in caplog.text
    [row] = read_back(tmp_path / "flat").values()
    assert np.array_equal(row.codes, result.codes)  # type: ignore[arg-type]
    assert not {"b", "other_audio", "other_codes"} & row.info.keys()
