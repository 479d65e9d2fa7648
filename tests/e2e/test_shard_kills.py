"""Sinks of shards under kills: whatever was killed when, at the end every row is in exactly one shard."""

from __future__ import annotations

import json
import os
import random
import signal
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from tests.e2e.conftest import Open
from tests.support.command import run_here
from tests.support.runs import TASK, Run, Workspace, after_batches
from tests.support.shards import read_shards


def task_of(sink: str) -> str:
    return "wav2token" if sink == "jsonl" else TASK  # JSON lines hold no audio


def flags(sink: str) -> list[object]:
    run_dir = f"data.{TASK}.run"
    return [
        "--sink", sink, "--output_dir", "shards", "--num_workers", 0, "--task", task_of(sink), "--run_dir", run_dir,
    ]  # fmt: skip


def check(workspace: Workspace, undisturbed: Mapping[str, bytes], sink: str) -> None:
    """Every row is done once and in one shard, which holds what an undisturbed run to files wrote."""
    keys = list(workspace.corpus.keys)
    assert Counter(str(entry["key"]) for entry in workspace.ledger()) == Counter(keys)
    rows = read_shards(workspace.folder / "shards")
    assert sorted(rows) == keys
    for key, row in rows.items():
        expected = json.loads(undisturbed[f"{key}.json"])
        assert np.array_equal(row["codes"], expected["quantized_tokens"]), key
        if sink != "jsonl":
            assert row["audio"] == undisturbed[f"{key}.wav"], key
    hidden = {path.name for path in (workspace.folder / "shards").glob(".*")}
    assert hidden == {f".batch_tokenizer.{task_of(sink)}.json"}
    assert not [path for path in (workspace.run_dir / "shards").rglob("*") if path.is_file()]


def shrink_shards(workspace: Workspace) -> None:
    """Shards of few rows, so that many are published while the run is being killed."""
    (workspace.folder / "sitecustomize.py").write_text(
        "import batch_tokenizer.writers.shard_sink as sink\nsink.ShardSink.__init__.__kwdefaults__['most_rows'] = 7\n"
    )


def start(workspace: Workspace, num_processes: int, sink: str, *more: object) -> Run:
    command = workspace.command(num_processes, *flags(sink), *more)
    path = f"{workspace.folder}:{Path(__file__).resolve().parents[2]}"
    return Run.start(command, workspace.folder, {"PYTHONPATH": path})


@pytest.mark.parametrize(("sink", "num_processes"), [("tar", 2), ("parquet", 1)])
def test_killed_at_a_random_moment_and_resumed_by_another(
    open_workspace: Open, undisturbed: Mapping[str, bytes], sink: str, num_processes: int
) -> None:
    """JSON lines: below, with more in each row."""
    workspace = open_workspace(200)
    shrink_shards(workspace)
    with start(workspace, num_processes, sink) as run:
        workspace.await_rows(random.Random(sink).randint(1, 100), run)
        run.kill()
    assert 0 < workspace.rows_done() < 200
    assert "resuming: " in workspace.finish_here(*flags(sink))
    check(workspace, undisturbed, sink)


def test_a_stop_signal_publishes_the_open_shard(
    open_workspace: Open, undisturbed: Mapping[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = open_workspace(64)
    after_batches(monkeypatch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    stopped = run_here(*workspace.arguments(*flags("tar")), cwd=workspace.folder)
    assert stopped.returncode == 143, stopped.stderr
    assert 24 <= workspace.rows_done() < 64
    assert len(read_shards(workspace.folder / "shards")) == workspace.rows_done()
    workspace.finish_here(*flags("tar"))
    check(workspace, undisturbed, "tar")


def test_killed_while_rows_with_reference_audio_are_encoded(
    open_workspace: Open, undisturbed: Mapping[str, bytes]
) -> None:
    """Both codes of a row are in its line, each as of the clip alone, whichever process did which half when."""
    workspace = open_workspace(120)
    shrink_shards(workspace)
    keys = list(workspace.corpus.keys)
    others = {key: keys[number - 7] for number, key in enumerate(keys) if number % 3}
    rows = [json.loads(line) for line in workspace.corpus.manifest_lines]
    manifest = [row | ({"ref_audio": f"wavs/{others[row['key']]}.wav"} if row["key"] in others else {}) for row in rows]
    (workspace.folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in manifest))
    fields = ["--audio_fields", "wav=audio_codes,ref_audio=ref_audio_codes"]
    with start(workspace, 1, "jsonl", *fields) as run:
        workspace.await_rows(30, run)
        run.kill()
    assert 0 < workspace.rows_done() < 120
    assert "resuming: " in workspace.finish_here(*flags("jsonl"), *fields)
    check(workspace, undisturbed, "jsonl")
    for key, row in read_shards(workspace.folder / "shards").items():
        expected = json.loads(undisturbed[f"{others[key]}.json"])["quantized_tokens"] if key in others else None
        assert row["info"].get("ref_audio_codes") == expected, key
