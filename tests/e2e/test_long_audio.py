"""Long rows through whole runs: segments are the cuts they stand for, streams are one pass, and memory stays flat.

Runs are made in this process, where they take a second and not six; ``tests/measure/long_audio_memory.py`` starts the
command itself.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from batch_tokenizer.cli import main
from batch_tokenizer.pipeline.long_audio import LongRows
from batch_tokenizer.quality.evaluation import recordings
from batch_tokenizer.records import ManifestRow, TokenizedRow
from batch_tokenizer.runs.scored_rows import open_source, rows_with_outputs
from tests.support.checkpoints import write_mimo_checkpoint
from tests.support.long_audio import anonymous_bytes, write_recording
from tests.support.moss import write_moss_checkpoint

SECONDS = 25.3
PIECE = 4.0
RATE = 24000


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("long")
    write_mimo_checkpoint(folder / "mimo")
    write_moss_checkpoint(folder / "moss")
    write_recording(folder / "long.flac", SECONDS, 44100, 2)
    write_recording(folder / "short.wav", 2, 16000)
    return folder


@pytest.fixture
def place(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the corpus in it."""
    for path in corpus.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def row(key: str, wav: str = "long.flac", **fields: Any) -> dict[str, Any]:
    return {
        "key": key, "wav": wav, "quantized_tokens": f"out/{key}.json", "reconstructed_wav": f"out/{key}.wav", **fields,
    }  # fmt: skip


def run(rows: Sequence[Mapping[str, Any]], *flags: object, task: str = "wav2token2wav", model: str = "mimo") -> int:
    """A run in this process. Its folder is new each time, its manifest is ``data.jsonl``."""
    Path("data.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    shutil.rmtree(f"data.{task}.run", ignore_errors=True)
    words = ["--data_list", "data.jsonl", "--task", task, "--model_path", model, "--num_workers", 0, *flags]
    return main([str(word) for word in words])


def tokens(key: str) -> tuple[np.ndarray, dict[str, Any]]:
    document = json.loads(Path(f"out/{key}.json").read_bytes())
    return np.array(document["quantized_tokens"]), document["info"]


def samples(key: str) -> np.ndarray:
    read, _ = soundfile.read(f"out/{key}.wav", dtype="int16")
    return read


def ledger(task: str = "wav2token2wav") -> list[dict[str, Any]]:
    paths = sorted(Path(f"data.{task}.run/ledger").glob("*.jsonl"))
    return [json.loads(line) for path in paths for line in path.read_bytes().splitlines()]


def verify(task: str = "wav2token2wav", model: str = "mimo") -> int:
    return main(["verify", "--data_list", "data.jsonl", "--task", task, "--model_path", model])


# ------------------------------------------------------------------------------------------------------------- segments


@pytest.mark.parametrize("offset", [0.0, 1.23456])
def test_segments_are_what_rows_cut_by_time_give(place: Path, offset: float) -> None:
    cut = {"start": offset} if offset else {}
    assert run([row("long", **cut), row("short", "short.wav")], "--long_audio", "segment", "--max_seconds", PIECE) == 0
    codes, info = tokens("long")
    assert verify() == 0
    assert sorted(entry["key"] for entry in ledger()) == ["long", "short"]
    first = round(offset * RATE)
    places = [*range(first, round(SECONDS * RATE), int(PIECE * RATE)), round(SECONDS * RATE)]
    cuts = [row(f"cut{n}", start=a / RATE, end=b / RATE) for n, (a, b) in enumerate(pairwise(places))]
    assert run([*cuts, row("alone", "short.wav")]) == 0
    parts = [tokens(one["key"])[0] for one in cuts]
    np.testing.assert_array_equal(codes, np.concatenate(parts))
    starts = np.cumsum([0, *map(len, parts[:-1])]).tolist()
    assert info["segments"] == [[frame, sample - first] for frame, sample in zip(starts, places, strict=False)]
    assert info["num_samples"] == places[-1] - first
    lengths = np.diff(places)
    joined = [samples(one["key"])[:length] for one, length in zip(cuts, lengths, strict=True)]
    np.testing.assert_array_equal(samples("long"), np.concatenate(joined))
    # A row that is short enough does not know of segments.
    assert tokens("short")[0].tolist() == tokens("alone")[0].tolist()
    assert "segments" not in tokens("short")[1]


def test_a_token_file_of_segments_is_decoded_in_them_whatever_the_flags(place: Path) -> None:
    assert run([row("long")], "--long_audio", "segment", "--max_seconds", PIECE) == 0
    for flags in ([], ["--long_audio", "segment", "--max_seconds", 9]):
        again = {"key": "again", "quantized_tokens": "out/long.json", "reconstructed_wav": "out/again.wav"}
        assert run([again], *flags, task="token2wav") == 0
        np.testing.assert_array_equal(samples("again"), samples("long"))
        assert verify("token2wav") == 0
        assert len(ledger("token2wav")) == 1


@pytest.mark.parametrize(("policy", "model"), [("segment", "mimo"), ("stream", "moss")])
def test_many_long_rows_beside_short_ones(place: Path, policy: str, model: str) -> None:
    rows = [row(f"row{n}", ("long.flac", "short.wav")[n % 3 == 0], start=n / 10) for n in range(12)]
    flags = ["--long_audio", policy, "--max_seconds", 9]
    assert run(rows, *flags, "--batch_size", 4, "--prefetch", 2, model=model) == 0
    together = {one["key"]: (tokens(one["key"]), samples(one["key"]).tobytes()) for one in rows}
    assert sorted(entry["key"] for entry in ledger()) == sorted(together)
    for one in rows[4:6]:
        assert run([one], *flags, model=model) == 0
        (codes, info), audio = together[one["key"]]
        np.testing.assert_array_equal(tokens(one["key"])[0], codes)
        assert (tokens(one["key"])[1], samples(one["key"]).tobytes()) == (info, audio)


@pytest.mark.parametrize("form", ["npy", "tar"])
def test_every_sink_keeps_segments(place: Path, form: str) -> None:
    flags = ["--long_audio", "segment", "--max_seconds", PIECE]
    assert run([row("long")], *flags) == 0
    shutil.move("out", "kept")
    where = ["--output_dir", "shards"] if form == "tar" else []
    assert run([row("long")], *flags, "--sink", form, *where) == 0
    if form == "npy":
        assert Path("out/long.wav").read_bytes() == Path("kept/long.wav").read_bytes()
    again = {"key": "long", "reconstructed_wav": "out/again.wav", "quantized_tokens": "out/long.json"}
    if form == "npy":
        assert run([again], task="token2wav") == 0
        np.testing.assert_array_equal(samples("again"), soundfile.read("kept/long.wav", dtype="int16")[0])


@pytest.mark.parametrize("sink", ["json", "tar", "parquet"])
def test_evaluate_decodes_segments_as_the_run_does(place: Path, sink: str) -> None:
    flags = ["--long_audio", "segment", "--max_seconds", PIECE]
    assert run([row("short", "short.wav"), row("long")], *flags) == 0
    where = [] if sink == "json" else ["--output_dir", "shards"]
    assert run([row("short", "short.wav"), row("long")], *flags, "--sink", sink, *where, task="wav2token") == 0
    run_dir = Path("shards" if where else ".", "data.wav2token.run")
    source = open_source(run_dir=run_dir, data_list=None, model_path="mimo", num_quantizers=(), index_dir=place)
    keys = set()
    for found, known in rows_with_outputs(source.run, source.manifest, [0, 1]):
        assert isinstance(found, ManifestRow)
        _, made = recordings(source, found, known)
        np.testing.assert_allclose(made.samples, samples(found.key)[: len(made.samples)] / 32768, atol=1e-4)
        assert len(made.samples) >= 2 * RATE
        keys.add(found.key)
    assert keys == {"short", "long"}


def test_native_fails_long_rows_and_names_the_remedy(place: Path) -> None:
    assert run([row("long"), row("short", "short.wav")], "--max_seconds", PIECE) == 0
    (failed,) = (entry for entry in ledger() if entry["status"] == "failed")
    assert failed["key"] == "long"
    assert "too long" in failed["reason"]
    assert "raise --max_seconds, or --long_audio segment takes it" in failed["reason"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--long_audio", "stream"), "mimo has no exact streams; use --long_audio segment"),
        (("--max_seconds", 1801), "takes 1800 s in one pass"),
    ],
)
def test_what_the_model_cannot_do_is_refused(
    place: Path, flags: tuple[object, ...], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert run([row("long")], *flags) == 2
    assert message in caplog.text


def test_other_segments_are_other_settings(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert run([row("short", "short.wav")], "--long_audio", "segment", "--max_seconds", PIECE) == 0
    words = ["--data_list", "data.jsonl", "--task", "wav2token2wav", "--model_path", "mimo", "--num_workers", "0"]
    assert main(words) == 2
    assert "segment_samples" in caplog.text


def test_a_piece_that_fails_fails_its_row_once_and_says_where(place: Path) -> None:
    content = Path("long.flac").read_bytes()
    Path("torn.flac").write_bytes(content[: len(content) * 2 // 3])
    rows = [row("torn", "torn.flac"), row("short", "short.wav")]
    assert run(rows, "--long_audio", "segment", "--max_seconds", PIECE) == 0
    entries = {entry["key"]: entry for entry in ledger()}
    assert len(ledger()) == 2
    assert entries["short"]["status"] == "done"
    assert entries["torn"]["status"] == "failed"
    assert "damaged or cut short" in entries["torn"]["reason"]
    assert "(in its piece from 16 to 20 s)" in entries["torn"]["reason"]
    assert not Path("out/torn.json").exists()


# -------------------------------------------------------------------------------------------------------------- streams


def test_streams_are_one_pass(place: Path) -> None:
    assert run([row("native"), row("short", "short.wav")], model="moss") == 0
    assert (
        run([row("long"), row("brief", "short.wav")], "--long_audio", "stream", "--max_seconds", 3.3, model="moss") == 0
    )
    assert verify(model="moss") == 0
    codes, info = tokens("long")
    expected, _ = tokens("native")
    assert codes.shape == expected.shape
    assert (codes != expected).any(axis=1).mean() < 2e-3  # near-ties
    assert "segments" not in info
    assert np.abs(samples("long").astype(int) - samples("native")).max() <= 1
    np.testing.assert_array_equal(samples("brief"), samples("short"))
    again = {"key": "again", "quantized_tokens": "out/long.json", "reconstructed_wav": "out/again.wav"}
    assert run([again], "--long_audio", "stream", "--max_seconds", 2, task="token2wav", model="moss") == 0
    assert np.abs(samples("again").astype(int) - samples("long")).max() <= 1


# -------------------------------------------------------------------------------------------------------------- windows


def test_codes_without_segments_are_decoded_in_windows_that_overlap(place: Path) -> None:
    assert run([row("whole")]) == 0
    again = {"key": "again", "quantized_tokens": "out/whole.json", "reconstructed_wav": "out/again.wav"}
    assert run([again], "--long_audio", "segment", "--max_seconds", 8, task="token2wav") == 0
    assert verify("token2wav") == 0
    made, whole = samples("again").astype(float), samples("whole").astype(float)
    assert made.shape == whole.shape
    # Random weights forget slowly, but not so slowly that a sample would be out of place.
    assert np.corrcoef(made, whole)[0, 1] > 0.9


# ---------------------------------------------------------------------------------------------------- memory, stopping


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_length_of_a_row(place: Path) -> None:
    """At 96 kHz a minute is 23 MB of samples for little computation, and what the long recording has more of it 110 MB.
    Allocators take 30 to 60 MB more over a longer run."""
    rate = 96000
    write_mimo_checkpoint(place / "fine", sampling_rate=rate, hop_length=960, nfft=3840, window_size=3840)
    write_recording(place / "a.flac", 40, 8000)
    write_recording(place / "b.flac", 330, 8000)

    def peak_of(one: Mapping[str, Any]) -> int:
        seen: list[int] = []
        over = threading.Event()

        def watch() -> None:
            while not over.wait(0.01):
                seen.append(anonymous_bytes(os.getpid()))

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            assert run([one], "--long_audio", "segment", "--max_seconds", 5, "--batch_size", 2, model="fine") == 0
        finally:
            over.set()
            watcher.join()
        return max(seen)

    peak_of(row("short", "a.flac"))
    short = peak_of(row("short", "a.flac"))
    assert peak_of(row("long", "b.flac")) - short < 90e6
    assert len(samples("long")) == 330 * rate


@pytest.mark.parametrize(("policy", "model"), [("segment", "mimo"), ("stream", "moss")])
def test_a_row_that_was_stopped_half_way_is_done_again_with_the_same_bytes(
    place: Path, monkeypatch: pytest.MonkeyPatch, policy: str, model: str
) -> None:
    rows = [row("long"), row("other")]
    flags = ["--long_audio", policy, "--max_seconds", PIECE, "--batch_size", 1]
    assert run(rows, *flags, model=model) == 0
    expected = {path.name: path.read_bytes() for path in Path("out").iterdir()}
    shutil.rmtree("out")
    folded: list[int | None] = []
    fold = LongRows.fold

    def stop_at_the_third(self: LongRows, result: TokenizedRow) -> TokenizedRow | None:
        folded.append(result.row.piece)
        if len(folded) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return fold(self, result)

    with monkeypatch.context() as patched:
        patched.setattr(LongRows, "fold", stop_at_the_third)
        assert run(rows, *flags, model=model) == 128 + signal.SIGTERM
    assert 3 <= len(folded) < 14
    assert ledger() == []
    assert not Path("out").exists()
    words = ["--data_list", "data.jsonl", "--task", "wav2token2wav", "--model_path", model, "--num_workers", 0, *flags]
    assert main([str(word) for word in words]) == 0
    assert {path.name: path.read_bytes() for path in Path("out").iterdir()} == expected
    assert sorted(entry["key"] for entry in ledger()) == ["long", "other"]
