"""Corpora in shards, as real processes: killed, resumed, mended, and the same tokens as from files."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from pathlib import Path

from batch_tokenizer.storage import remote
from tests.e2e.conftest import Open
from tests.support.command import run_here
from tests.support.runs import Workspace
from tests.support.stores import s3_store, web_store
from tests.support.tars import tar_bytes

NUM_ROWS = 100


def pack(workspace: Workspace, shards: int) -> list[Path]:
    """The workspace's clips in shards, every second one compressed, with a text beside each clip."""
    folder = workspace.folder / "shards"
    folder.mkdir()
    paths = []
    for number in range(shards):
        members = []
        for key in workspace.corpus.keys[number::shards]:
            members.append((f"{key}.txt", f"text of {key}".encode()))
            members.append((f"{key}.wav", (workspace.folder / "wavs" / f"{key}.wav").read_bytes()))
        content = tar_bytes(members)
        path = folder / (f"{number:03d}.tar.gz" if number % 2 else f"{number:03d}.tar")
        path.write_bytes(gzip.compress(content, 1) if number % 2 else content)
        paths.append(path)
    return paths


def results(workspace: Workspace) -> dict[str, bytes]:
    """Codes and audio by the names that the undisturbed run gave them."""
    found = {}
    for path in (workspace.folder / "tokens").rglob("*.*"):
        if path.suffix not in (".json", ".wav"):
            continue  # the manifest of the outputs
        content = path.read_bytes()
        if path.suffix == ".json":
            document = json.loads(content)
            assert document["info"]["text"] == f"text of {document['info']['key']}"
            content = json.dumps(document["quantized_tokens"]).encode()
        found[path.name] = content
    return found


def of_files(undisturbed: Mapping[str, bytes], keys: tuple[str, ...]) -> dict[str, bytes]:
    """The same of the run on files."""
    return {
        f"{key}{ending}": content if ending == ".wav" else json.dumps(json.loads(content)["quantized_tokens"]).encode()
        for key in keys
        for ending, content in ((ending, undisturbed[f"{key}{ending}"]) for ending in (".json", ".wav"))
    }


def test_shards_killed_resumed_and_mended_give_what_files_give(
    open_workspace: Open, undisturbed: Mapping[str, bytes]
) -> None:
    workspace = open_workspace(NUM_ROWS)
    shards = pack(workspace, 5)
    expected = of_files(undisturbed, workspace.corpus.keys)
    whole = shards[4].read_bytes()
    shards[4].write_bytes(whole[: len(whole) // 2])
    source = ("--data_list", "shards/{000..004}.tar*", "--output_dir", "tokens", "--run_dir", workspace.run_dir)

    with workspace.start(1, *source) as run:
        workspace.await_rows(25, run)
        run.kill()
    assert workspace.rows_done() < NUM_ROWS
    assert "resuming: " in workspace.finish_here(*source, "--num_workers", 1)
    (failure,) = [json.loads(line) for line in (workspace.run_dir / "failures.jsonl").read_bytes().splitlines()]
    assert failure["key"] == "shards/004.tar"
    assert "fetch or pack it again" in failure["reason"]
    found = results(workspace)
    assert len(found) // 2 in range(NUM_ROWS - 12, NUM_ROWS - 8)
    assert all(expected[name] == content for name, content in found.items())

    shards[4].write_bytes(whole)
    before = {str(entry["key"]) for entry in workspace.ledger() if entry["status"] == "done"}
    num_entries = len(workspace.ledger())
    workspace.finish_here(*source)
    again = {str(entry["key"]) for entry in workspace.ledger()[num_entries:]}
    assert again == set(workspace.corpus.keys) - before  # what was done is not done again
    assert results(workspace) == expected
    verified = run_here(
        "verify", "--data_list", source[1], "--run_dir", workspace.run_dir, "--model_path",
        workspace.corpus.checkpoint, cwd=workspace.folder,
    )  # fmt: skip
    assert verified.returncode == 0, verified.stdout + verified.stderr
    assert f"{NUM_ROWS} done + 0 failed" in verified.stdout


def test_a_corpus_behind_http_whose_server_fails_now_and_then_to_a_bucket(
    open_workspace: Open, undisturbed: Mapping[str, bytes]
) -> None:
    workspace = open_workspace(12)
    (shard,) = pack(workspace, 1)
    with web_store() as store, s3_store(["corpus"]):
        store.files["x.tar"] = shard.read_bytes()
        store.faults[:] = ["none", "none", 503, "drop", "none", "none", 502, "none", "drop"]
        source = f"{store.url}/x.tar"
        said = workspace.finish_here("--data_list", source, "--output_dir", "s3://corpus/tokens")
        assert "trying again" in said
        verified = run_here(
            "verify", "--data_list", source, "--model_path", workspace.corpus.checkpoint, cwd=workspace.folder
        )
        assert "12 done + 0 failed" in verified.stdout
        assert verified.returncode == 0, verified.stdout + verified.stderr
        outputs = remote.list_folder("s3://corpus/tokens")
        assert len(outputs) == 24
        for url in outputs:
            path = workspace.folder / "tokens" / url.rpartition("/")[2]
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(b"".join(remote.fetch(url)))
    assert results(workspace) == of_files(undisturbed, workspace.corpus.keys)
    assert (workspace.folder / "x.wav2token2wav.run" / "summary.json").exists()


def test_a_manifest_is_made_of_a_folder_and_described(open_workspace: Open) -> None:
    workspace = open_workspace(20)
    clips = workspace.folder / "clips"
    clips.mkdir()
    for key in workspace.corpus.keys:
        (clips / f"{key}.wav").write_bytes((workspace.folder / "wavs" / f"{key}.wav").read_bytes())
    (clips / "torn.wav").write_bytes(b"RIFF")
    made = run_here("manifest", "from", "clips", "--out", "m.jsonl", "--output_dir", "out", cwd=workspace.folder)
    assert made.returncode == 0, made.stderr
    rows = [json.loads(line) for line in (workspace.folder / "m.jsonl").read_bytes().splitlines()]
    by_key = {str(json.loads(line)["key"]): json.loads(line) for line in workspace.corpus.manifest_lines}
    assert [row["key"] for row in rows] == list(workspace.corpus.keys)
    for row in rows:
        assert abs(row["duration"] - by_key[row["key"]]["duration"]) < 1e-3
        assert row["quantized_tokens"].startswith("out/")
    (refused,) = [json.loads(line) for line in (workspace.folder / "m.unreadable.jsonl").read_bytes().splitlines()]
    assert refused["key"] == "torn"
    assert "clips/torn.wav" in refused["reason"]
    assert "1 that are not in it" in made.stdout
    stats = run_here("manifest", "stats", "m.jsonl", "--rtf", "3.6", cwd=workspace.folder)
    assert stats.returncode == 0, stats.stderr
    seconds = sum(row["duration"] for row in rows)
    assert "rows       20: 20 good" in stats.stdout
    assert f"GPU-hours  {seconds / 1000:.2f}" in stats.stdout
    assert "24,000 Hz (75 %), 16,000 Hz (25 %)" in stats.stdout
    assert f"tokens     {seconds * 500:,.0f}:" in stats.stdout
