"""``batch_tokenizer status``: what it says of a run folder's status files, and that it only reads."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict

import pytest

from batch_tokenizer.cli import main
from batch_tokenizer.commands.status import is_over, json_report, missing_ranks, report, state_of
from batch_tokenizer.runtime.progress import JobStatus, RankStatus
from tests.support.command import ROOT, contents

NOW = 1_000_000.0


def rank(number=0, **more):
    """A rank that runs well; ``more`` overrides."""
    fields = {
        "attempt": 2, "rank": number, "world_size": 1, "num_shards": 1, "shard": 0, "state": "running",
        "host": f"node{number}", "pid": 100 + number, "device": f"cuda:{number}", "rows_done": 300, "rows_failed": 4,
        "audio_seconds": 7200.0, "stage_seconds": {"load": 1.5, "encode": 2.0}, "elapsed": 600.0, "started": NOW - 600,
        "updated": NOW - 3, "rows_total": 1000, "rows_done_before": 90, "rows_failed_before": 6,
    }  # fmt: skip
    return RankStatus(**{**fields, **more})


def run_folder(folder, *ranks):
    (folder / "status").mkdir(parents=True)
    (folder / "run.json").write_text('{"settings": {}}')
    for status in ranks:
        path = folder / "status" / f"{status.attempt:06d}-{status.rank:05d}.json"
        path.write_text(json.dumps(asdict(status)))
    return folder


def text_of(*ranks):
    return "\n".join(report(ROOT / "x.run", JobStatus(ranks), NOW))


class TestReport:
    def test_counts_earlier_attempts_and_this_one(self):
        text = text_of(rank(0, world_size=2), rank(1, world_size=2))
        assert "690 done, 14 failed, 296 left of 1,000 (70.4 %)" in text
        assert "4 h in 10 min 0 s, 24 × real time, about 4 min 52 s left" in text  # 608 rows in 600 s
        assert "load 3.0, encode 4.0" in text
        assert "2 of 2 ranks running" in text

    def test_a_line_per_rank(self):
        text = text_of(rank(0, world_size=2), rank(1, world_size=2, state="finished", updated=NOW - 7200))
        [first] = [line for line in text.splitlines() if "node0" in line]
        [second] = [line for line in text.splitlines() if "node1" in line]
        assert first.split() == ["0", "2", "node0", "cuda:0", "running", "300", "4", "2", "h", "12", "3", "s", "ago"]
        assert second.split()[4] == "finished"
        assert second.endswith("2 h 0 min ago")

    @pytest.mark.parametrize(
        ("state", "age", "expected"),
        [
            ("running", 80, "running"),
            ("running", 100, "silent"),
            ("starting", 100, "silent"),
            ("finished", 10_000, "finished"),
            ("interrupted", 10_000, "interrupted"),
            ("running", -50, "running"),  # another machine's clock is ahead
        ],
    )
    def test_silent_is_what_should_work_and_says_nothing(self, state, age, expected):
        assert state_of(rank(state=state, updated=NOW - age), NOW) == expected

    def test_no_time_left_is_claimed_when_nobody_works(self):
        assert "left" not in text_of(rank(updated=NOW - 500)).splitlines()[2]
        assert "1 of 1 ranks silent" in text_of(rank(updated=NOW - 500))

    def test_ranks_and_shards_that_said_nothing_are_named(self):
        ranks = [rank(0, world_size=3, num_shards=9, shard=shard) for shard in (0, 1, 5)]
        job = JobStatus(tuple(ranks))
        assert missing_ranks(job) == [(shard, number) for shard in (0, 1, 5) for number in (1, 2)]
        text = text_of(*ranks)
        assert "3 of 9 have started; not yet: 2-4, 6-8" in text
        assert text.count("not heard of") == 7  # six lines and the sum
        assert "6 of 9 ranks not heard of" in text

    def test_nothing_started(self):
        assert text_of() == f"{ROOT / 'x.run'}: no process has started yet"


def test_json_has_the_sums_and_each_rank():
    report = json_report(JobStatus((rank(0, world_size=2, updated=NOW - 500),)), NOW)
    assert json.loads(json.dumps(report)) == report
    assert report["done"] + report["failed"] + report["left"] == report["rows"] == 1000
    assert (report["over"], report["ranks"][0]["state"]) == (False, "silent")
    assert report["not_heard_of"] == [{"shard": 0, "rank": 1}]


class TestIsOver:
    def test_only_when_all_ranks_of_all_shards_have_finished(self):
        done = rank(state="finished")
        assert is_over(JobStatus((done,)))
        assert not is_over(JobStatus(()))
        assert not is_over(JobStatus((rank(),)))
        assert not is_over(JobStatus((rank(state="interrupted"),)))
        assert not is_over(JobStatus((rank(state="finished", world_size=2),)))
        assert not is_over(JobStatus((rank(state="finished", num_shards=2),)))


class TestCommand:
    def test_reads_only_and_starts_without_torch(self, tmp_path):
        folder = run_folder(tmp_path / "x.run", rank(updated=time.time()))
        before = contents(folder)
        code = (
            "import sys; from batch_tokenizer.cli import main; status = main(sys.argv[1:]); "
            "assert 'torch' not in sys.modules; sys.exit(status)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, "status", str(folder)], capture_output=True, text=True, cwd=ROOT, timeout=600
        )
        assert done.returncode == 0, done.stderr
        assert "390 done" in done.stdout
        assert contents(folder) == before

    def test_watch_goes_on_until_the_run_is_over(self, tmp_path, monkeypatch, capsys):
        folder = run_folder(tmp_path / "x.run", rank(updated=time.time()))
        slept = []

        def sleep(seconds):
            slept.append(seconds)
            (folder / "status" / "000002-00000.json").write_text(json.dumps(asdict(rank(state="finished"))))

        monkeypatch.setattr("batch_tokenizer.commands.status.time.sleep", sleep)
        assert main(["status", str(folder), "--watch", "0.5"]) == 0
        assert slept == [0.5]
        assert "1 of 1 ranks running" in (out := capsys.readouterr().out)
        assert "1 of 1 ranks finished" in out

    def test_refuses_what_is_no_run_folder(self, tmp_path):
        assert main(["status", str(tmp_path / "nowhere")]) == 2
        assert main(["status", str(tmp_path)]) == 2
        assert main(["status", str(run_folder(tmp_path / "x.run")), "--watch", "0"]) == 2

    def test_a_folder_where_nothing_has_started(self, tmp_path, capsys):
        assert main(["status", str(run_folder(tmp_path / "x.run"))]) == 0
        assert "no process has started yet" in capsys.readouterr().out
