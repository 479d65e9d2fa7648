"""``--dry_run``: what it says of a run, what it finds wrong before the run does, and that it leaves nothing behind."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile

from batch_tokenizer.cli import main
from batch_tokenizer.commands.dry_run import dry_run
from batch_tokenizer.config import RunConfig
from batch_tokenizer.pipeline.setup import open_context
from batch_tokenizer.runtime.processes import ProcessGroup
from tests.support.checkpoints import write_mimo_checkpoint
from tests.support.command import output_row, write_manifest


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_mimo_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Five clips of 0.2 to 0.6 s."""
    folder = tmp_path_factory.mktemp("clips")
    generator = np.random.default_rng(0)
    for number in range(5):
        samples = 0.3 * generator.standard_normal(4800 + 2400 * number)
        soundfile.write(folder / f"{number}.wav", samples.clip(-1, 1), 24000)
    return folder


class Place:
    """A manifest, and the command on it."""

    def __init__(self, folder, checkpoint, clips):
        self.folder, self.checkpoint, self.clips = folder, checkpoint, clips
        self.data_list = folder / "data.jsonl"
        self.write([self.row(number) for number in range(5)])

    def row(self, number, **more):
        return output_row(f"r{number}", self.clips / f"{number}.wav", self.folder / "deep" / "out", **more)

    def write(self, rows):
        write_manifest(self.data_list, rows)

    def command(self, *more):
        words = ["--data_list", self.data_list, "--model_path", self.checkpoint, "--num_workers", 0, "--device", "cpu"]
        task = [] if "--task" in more else ["--task", "wav2token2wav"]
        return main([str(word) for word in [*words, *task, *more]])

    def plan(self, *more):
        return self.command("--dry_run", *more)


@pytest.fixture
def place(tmp_path, checkpoint, clips):
    (tmp_path / "place").mkdir()
    return Place(tmp_path / "place", checkpoint, clips)


def traces(folder):
    """All that can be seen of a folder: names, bytes, times of change."""
    paths = [folder, *sorted(folder.rglob("*"))]
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"") for path in paths}


class TestPlan:
    def test_says_what_the_run_would_do_and_leaves_no_trace(self, place, tmp_path, monkeypatch, capsys):
        (tmp_path / "temporary").mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
        before = traces(place.folder)
        assert place.plan() == 0
        assert traces(place.folder) == before
        assert list((tmp_path / "temporary").glob("batch_tokenizer*")) == []
        out = capsys.readouterr().out
        assert "5 rows, 0 malformed, 0 duplicate" in out
        assert "5 rows in 5 units for 1 ranks" in out
        assert "5 inputs opened, 5 of 5 decoded" in out
        assert re.search(r"time +about \d", out)
        assert "nothing would fail" in out

    def test_a_working_directory_full_of_relative_names(self, place, monkeypatch):
        monkeypatch.chdir(place.folder)
        row = {
            "key": "a",
            "wav": str(place.clips / "0.wav"),
            "quantized_tokens": "a.json",
            "reconstructed_wav": "a.wav",
        }
        place.write([row])
        before = traces(place.folder)
        assert place.plan() == 0
        assert traces(place.folder) == before

    def test_estimates_the_bytes_that_the_run_then_writes(self, place, capsys):
        assert place.plan() == 0
        said = dict(re.findall(r"(quantized_tokens|reconstructed_wav) ([\d.]+) kB", capsys.readouterr().out))
        assert place.command() == 0
        for field, suffix in (("quantized_tokens", "json"), ("reconstructed_wav", "wav")):
            written = sum(path.stat().st_size for path in (place.folder / "deep" / "out").glob(f"*.{suffix}"))
            assert float(said[field]) == pytest.approx(written / 1000, rel=0.02)

    def test_hours_by_the_manifest_or_by_the_sample(self, place, capsys):
        place.write([place.row(number, duration=3600.0) for number in range(2)])
        place.plan()
        assert "2.000 h, by the manifest's durations" in capsys.readouterr().out
        place.write([place.row(number) for number in range(3)])
        place.plan()
        seconds = (4800 + 7200 + 9600) / 24000
        assert f"{seconds / 3600:.3f} h, extrapolated from the headers of 3 rows\n" in capsys.readouterr().out
        place.write([place.row(0, duration=1800.0), place.row(1)])
        place.plan()
        assert "0.500 h, extrapolated from the headers of 2 rows for the 1 rows without" in capsys.readouterr().out

    def test_the_sample_is_spread_over_the_manifest(self, place, capsys):
        rows = [output_row(f"k{number}", place.clips / f"{number % 5}.wav", place.folder) for number in range(300)]
        rows[299]["wav"] = rows[0]["wav"] = str(place.folder / "nowhere.wav")
        place.write(rows)
        assert place.plan() == 1
        out = capsys.readouterr().out
        assert "30 inputs opened, 8 of 8 decoded" in out
        assert "line 1, k0" in out
        assert "line 300, k299" in out

    def test_a_shard_counts_its_own_rows(self, place, capsys):
        for shard in range(2):
            assert place.plan("--num_shards", 2, "--shard", shard) == 0
        counts = re.findall(r"(\d) rows of shard (\d) of 2", capsys.readouterr().out)
        assert counts == [("3", "0"), ("2", "1")]

    def test_tokens_to_audio(self, place, capsys):
        assert place.command("--task", "wav2token") == 0
        before = traces(place.folder)
        assert place.plan("--task", "token2wav") == 0
        assert traces(place.folder) == before
        assert "decode" in capsys.readouterr().out
        place.folder.joinpath("deep/out/r2.json").unlink()
        assert place.plan("--task", "token2wav") == 1
        assert re.search(r"would fail: line 3, r2: .*no such file", capsys.readouterr().out)

    def test_other_ranks_say_nothing(self, capsys):
        processes = ProcessGroup(1, 2, 1, "torchrun", "host", 1, "job")
        with open_context(RunConfig(data_list="data.jsonl", dry_run=True)) as context:
            assert dry_run(replace(context, processes=processes)) == 0
        assert capsys.readouterr().out == ""


class TestEarlierRun:
    @pytest.fixture
    def done(self, place):
        """Three rows done, then two more in the manifest."""
        place.write([place.row(number) for number in range(3)])
        assert place.command() == 0
        with place.data_list.open("a") as stream:
            for number in (3, 4):
                stream.write(json.dumps(place.row(number)) + "\n")
        return place

    def test_is_read_and_left_alone(self, done, capsys):
        before = traces(done.folder)
        assert done.plan() == 0
        assert traces(done.folder) == before
        out = capsys.readouterr().out
        assert "resumed, 3 rows are done, 0 failed" in out
        assert "2 rows in 2 units" in out

    def test_with_other_settings(self, done, capsys):
        before = traces(done.folder)
        assert done.plan("--num_quantizers", 2) == 1
        assert "num_quantizers: run folder has 5, this run has 2" in capsys.readouterr().out
        assert done.plan("--num_quantizers", 2, "--overwrite") == 0
        assert "5 rows in 5 units" in capsys.readouterr().out
        assert traces(done.folder) == before

    def test_of_a_manifest_that_changed(self, done, capsys):
        done.write([done.row(number, text="new") for number in range(5)])
        assert done.plan() == 1
        assert "3 finished rows changed" in capsys.readouterr().out
        assert done.plan("--overwrite") == 0
        assert "5 rows in 5 units" in capsys.readouterr().out

    def test_nothing_left_to_do(self, done, capsys):
        assert done.command() == 0
        assert done.plan() == 0
        assert "0 rows in 0 units" in capsys.readouterr().out

    def test_failed_rows_count_when_they_are_to_be_tried_again(self, place, clips, capsys):
        place.write([place.row(0), {**place.row(1), "wav": str(place.folder / "late.wav")}])
        place.command()
        shutil.copy(clips / "1.wav", place.folder / "late.wav")
        assert place.plan() == 0
        assert place.plan("--retry_failed") == 0
        assert re.findall(r"(\d) rows in", capsys.readouterr().out) == ["0", "1"]


class TestTrouble:
    def lines(self, capsys):
        """What would fail, by the output."""
        out = capsys.readouterr().out
        lines = [line.removeprefix("would fail: ") for line in out.splitlines() if line.startswith("would fail: ")]
        assert f"{len(lines)} things would fail" in out
        return lines

    def test_a_bad_manifest(self, place, capsys):
        place.write([place.row(0), b"no JSON", *[b'{"key": "half"}'] * 4, place.row(0), place.row(1)])
        assert place.plan() == 1
        lines = self.lines(capsys)
        assert len(lines) == 5
        assert lines[0].startswith("line 2, without key: not valid JSON")
        assert lines[1].startswith('line 3, half: field "wav" is missing')
        assert lines[3] == "2 more malformed lines"
        assert lines[4] == 'line 7, r0: duplicate key "r0": first on line 1'

    def test_inputs(self, place, capsys):
        cut = place.folder / "cut.flac"
        soundfile.write(cut, np.random.default_rng(0).standard_normal(24000) * 0.1, 24000)
        cut.write_bytes(cut.read_bytes()[:-2000])  # its header is whole
        place.write([place.row(0), {**place.row(1), "wav": "nowhere.wav"}, {**place.row(2), "wav": str(cut)}])
        assert place.plan() == 1
        missing, damaged = self.lines(capsys)
        assert missing == "line 2, r1: load: nowhere.wav: no such file"
        assert damaged.startswith("line 3, r2: load: ")

    def test_outputs_below_a_file_or_in_the_place_of_a_folder(self, place, capsys):
        (place.folder / "deep").write_text("a file")
        (place.folder / "r1.json").mkdir()
        place.write([place.row(0), {**place.row(1), "quantized_tokens": str(place.folder / "r1.json")}])
        assert place.plan() == 1
        lines = self.lines(capsys)
        assert any("r1.json: is a folder" in line for line in lines)
        assert any("deep" in line and "not a folder" in line.lower() for line in lines)

    def test_a_folder_that_cannot_be_written(self, place, monkeypatch, capsys):
        def refuse(*arguments, **options):
            raise OSError(30, os.strerror(30))

        monkeypatch.setattr("batch_tokenizer.commands.dry_run_places.tempfile.TemporaryFile", refuse)
        assert place.plan() == 1
        assert self.lines(capsys) == [f"{place.folder}: nothing can be written there: Read-only file system"]

    def test_a_disk_that_is_too_small(self, place, monkeypatch, capsys):
        monkeypatch.setattr(
            "batch_tokenizer.commands.dry_run_places.shutil.disk_usage",
            lambda path: shutil._ntuple_diskusage(9, 8, 1000),
        )
        assert place.plan() == 1
        [line] = self.lines(capsys)
        assert re.search(r"about [\d.]+ kB would be written where 1.0 kB are free", line)

    def test_rows_that_are_too_long_for_the_model(self, place, capsys):
        place.write([place.row(0), place.row(1, duration=1801.0)])
        assert place.plan() == 1
        [line] = self.lines(capsys)
        assert line.startswith("1 rows are by the manifest longer than the 1800 s")

    def test_weights_that_do_not_fit_the_configuration(self, place, checkpoint, tmp_path, capsys):
        place.checkpoint = Path(shutil.copytree(checkpoint, tmp_path / "broken"))
        config = json.loads((place.checkpoint / "config.json").read_text())
        (place.checkpoint / "config.json").write_text(json.dumps({**config, "encoder_layers": 4}))
        assert place.plan() == 1
        [line] = self.lines(capsys)
        assert "which config.json implies" in line

    def test_a_run_folder_in_the_place_of_a_file(self, place, capsys):
        (place.folder / "x").touch()
        assert place.plan("--run_dir", place.folder / "x") == 1
        assert place.plan("--run_dir", place.folder / "x" / "y") == 1
        assert "not a folder" in capsys.readouterr().out

    def test_a_manifest_that_is_not_there_ends_it(self, place):
        place.data_list.unlink()
        assert place.plan() == 2
