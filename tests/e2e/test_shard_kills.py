"""Sinks of shards under kills: whatever was killed when, at the end every row is in exactly one shard."""

from __future__ import annotations

import json
import random
import signal
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from tests.e2e.conftest import Open
from tests.support.runs import TASK, Run, Workspace
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


def start(workspace: Workspace, num_processes: int, sink: str) -> Run:
    command = workspace.command(num_processes, *flags(sink))
    path = f"{workspace.folder}:{Path(__file__).resolve().parents[2]}"
    return Run.start(command, workspace.folder, {"PYTHONPATH": path})


@pytest.mark.parametrize(("sink", "killed", "resumed"), [("tar", 2, 1), ("parquet", 1, 2), ("jsonl", 1, 1)])
def test_killed_at_a_random_moment_and_resumed_by_others(
    open_workspace: Open, undisturbed: Mapping[str, bytes], sink: str, killed: int, resumed: int
) -> None:
    workspace = open_workspace(200)
    shrink_shards(workspace)
    with start(workspace, killed, sink) as run:
        workspace.await_rows(random.Random(sink).randint(1, 100), run)
        run.kill()
    assert 0 < workspace.rows_done() < 200
    if resumed == 1:
        said = workspace.finish_here(*flags(sink))
    else:
        said = workspace.finish(resumed, *flags(sink)).output()
    assert "resuming: " in said
    check(workspace, undisturbed, sink)


def test_a_stop_signal_publishes_the_open_shard(open_workspace: Open, undisturbed: Mapping[str, bytes]) -> None:
    workspace = open_workspace(200)
    with workspace.start(1, *flags("tar")) as run:
        run.wait_until(lambda: bool(list((workspace.folder / "shards").glob(".*.part"))), "a shard")
        run.signal(signal.SIGTERM)
        assert run.wait() == 143, run.output()
    assert 0 < workspace.rows_done() < 200
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
    path = f"{workspace.folder}:{Path(__file__).resolve().parents[2]}"

    def begin(num_processes: int) -> Run:
        command = workspace.command(num_processes, *flags("jsonl"), *fields)
        return Run.start(command, workspace.folder, {"PYTHONPATH": path})

    with begin(2) as run:
        workspace.await_rows(30, run)
        run.kill()
    assert 0 < workspace.rows_done() < 120
    with begin(1) as run:
        assert run.wait() == 0, run.output()
    check(workspace, undisturbed, "jsonl")
    for key, row in read_shards(workspace.folder / "shards").items():
        expected = json.loads(undisturbed[f"{others[key]}.json"])["quantized_tokens"] if key in others else None
        assert row["info"].get("ref_audio_codes") == expected, key
