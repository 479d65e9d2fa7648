"""What every sink wrote goes into every command that reads tokens, with the same keys, fields and codes."""

from __future__ import annotations

import json
import shutil
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from batch_tokenizer.cli import main
from batch_tokenizer.records import Sink
from batch_tokenizer.runs.indexed_rows import stored_rows
from batch_tokenizer.storage.row_info import split_info
from tests.support.checkpoints import write_mimo_checkpoint

KEYS = ["plain", "a.b/c d", "Щ"]

#: Fields of one row; other rows have none of them, or others of their name.
ODD: dict[str, Any] = {
    "big": 2**80, "nested": {"a": [1, None, {"b": "\u2028щ"}]}, "nothing": None, "score": float("nan"),
    "kind": [1, "two"], "num_frames": 7, "codec": "mine", "start_of": 1e300,
}  # fmt: skip
SINKS: tuple[Sink, ...] = ("json", "npy", "jsonl", "tar", "parquet")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three clips, a manifest and a tiny codec."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    rows = []
    for number, key in enumerate(KEYS):
        with wave.open(str(folder / f"{number}.wav"), "wb") as stream:
            stream.setnchannels(1)
            stream.setsampwidth(2)
            stream.setframerate(24000)
            stream.writeframes((rng.uniform(-0.3, 0.3, 4000 + 1000 * number) * 32767).astype("<i2").tobytes())
        fields = ODD if number == 0 else {"kind": number, "score": 0.5}
        rows.append(
            {"key": key, "wav": str(folder / f"{number}.wav"), "text": f"text {number}", "speaker": number, **fields}
        )
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_mimo_checkpoint(folder / "model")
    return folder


def run(corpus: Path, source: object, task: str, out: Path, *more: object) -> Path:
    """A run in this process; returns its run folder."""
    run_dir = out.with_name(f"{out.name}.run")
    words = [
        "--data_list", source, "--task", task, "--output_dir", out, "--run_dir", run_dir,
        "--model_path", corpus / "model", "--device", "cpu", "--num_workers", 0, "--strict", *more,
    ]  # fmt: skip
    assert main(list(map(str, words))) == 0
    return run_dir


def contents(source: object) -> dict[str, Any]:
    """Key to codes, text and speaker; odd fields are looked at here."""
    rows = {}
    for row in stored_rows(str(source)):
        assert row.codes is not None
        assert row.key not in rows
        rows[row.key] = row.codes.tolist(), row.info["text"], row.info["speaker"]
        if row.key == "plain":
            fields, _ = split_info(row.info)
            assert {name: fields[name] for name in ODD} == ODD | {"score": None}  # NaN is no JSON
        else:
            assert (row.info["kind"], row.info["score"]) == (row.info["speaker"], 0.5)
    return rows


def decoded(run_dir: Path) -> dict[str, str]:
    """Key to text of the rows whose audio a run made."""
    rows = (json.loads(line) for path in run_dir.glob("../*/manifest.jsonl") for line in path.read_bytes().splitlines())
    return {row["key"]: row["text"] for row in rows if Path(row["reconstructed_wav"]).is_file()}


@pytest.mark.parametrize("sink", SINKS)
def test_everything_that_a_sink_wrote_is_an_input(
    corpus: Path, tmp_path: Path, sink: Sink, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "tokens"
    run_dir = run(corpus, corpus / "data.jsonl", "wav2token", out, "--sink", sink)
    expected = contents(run_dir)
    assert list(expected) == KEYS
    assert {(text, speaker) for _, text, speaker in expected.values()} == {(f"text {n}", n) for n in range(3)}

    manifest = out / "manifest.jsonl"
    if sink == "jsonl":  # whose shards name their rows themselves
        assert not manifest.exists()
        [manifest] = out.glob("*.jsonl")
    rows = [json.loads(line) for line in manifest.read_bytes().splitlines()]
    assert sorted(row["key"] for row in rows) == sorted(KEYS)
    assert contents(manifest) == expected
    assert contents(out) == expected
    converted = tmp_path / "converted"
    assert main(["convert", str(out), "--to", sink, "--out", str(converted)]) == 0
    assert contents(converted) == expected

    audio = {}
    for name, source in (("folder", out), ("run", run_dir), ("manifest", manifest), ("conv", converted)):
        place = tmp_path / name
        place.mkdir()
        made = decoded(run(corpus, source, "token2wav", place / "out"))
        assert made == {key: f"text {number}" for number, key in enumerate(KEYS)}, name
        audio[name] = sorted(path.read_bytes() for path in place.rglob("*.wav"))
    assert audio["folder"] == audio["run"] == audio["manifest"] == audio["conv"]

    for source in (out, run_dir, converted):
        assert main(["show", "a.b/c d", "--in", str(source)]) == 0
        assert "text 1" in capsys.readouterr().out


def test_a_manifest_of_outputs_names_each_row_once_also_after_resuming(corpus: Path, tmp_path: Path) -> None:
    rows = (corpus / "data.jsonl").read_bytes().splitlines(keepends=True)
    source = tmp_path / "data.jsonl"
    out = tmp_path / "tokens"
    for number in (2, 3, 3):
        source.write_bytes(b"".join(rows[:number]))
        run(corpus, source, "wav2token", out, "--sink", "tar")
        names = [json.loads(line)["key"] for line in (out / "manifest.jsonl").read_bytes().splitlines()]
        assert sorted(names) == sorted(KEYS[:number])
    # The order of the manifest is not that of the shards.
    source.write_bytes(b"".join(reversed(rows)))
    run_dir = run(corpus, source, "wav2token", out, "--sink", "tar")
    stream = tmp_path / "stream"
    assert main(["convert", str(run_dir), "--to", "flat", "--out", str(stream), "--order", "manifest"]) == 0
    assert [row.key for row in stored_rows(str(stream))] == KEYS[::-1]


def test_a_file_of_that_name_that_the_run_did_not_write_stays(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "tokens"
    out.mkdir()
    shutil.copy(corpus / "data.jsonl", out / "manifest.jsonl")
    run(corpus, out / "manifest.jsonl", "wav2token", out)
    assert (out / "manifest.jsonl").read_bytes() == (corpus / "data.jsonl").read_bytes()
    assert len((out / "manifest.wav2token.jsonl").read_bytes().splitlines()) == 3


@pytest.mark.parametrize("sink", ["json", "tar", "jsonl"])
def test_evaluate_takes_the_folder_of_a_runs_outputs(corpus: Path, tmp_path: Path, sink: Sink) -> None:
    out = tmp_path / "tokens"
    task = "wav2token" if sink == "jsonl" else "wav2token2wav"
    words = ["--data_list", corpus / "data.jsonl", "--task", task, "--output_dir", out, "--sink", sink]
    words += ["--model_path", corpus / "model", "--device", "cpu", "--num_workers", 0, "--run_dir", out / "x.run"]
    assert main(list(map(str, words))) == 0
    scored = ["evaluate", str(out), "--metrics", "si_sdr", "--workers", "1", "--out", str(tmp_path / "scores")]
    assert main(scored) == 0
    lines = (tmp_path / "scores" / "utterances.jsonl").read_bytes().splitlines()
    assert sorted(json.loads(line)["key"] for line in lines) == sorted(KEYS)
