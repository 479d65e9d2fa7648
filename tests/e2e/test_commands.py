"""``verify``, ``status`` and ``--dry_run`` as a user meets them: beside, before and after real runs."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter

import pytest

from batch_tokenizer.cli import main
from tests.support.runs import Workspace, make_corpus

NUM_ROWS = 40


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("corpus"), NUM_ROWS)


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    """A run that nothing disturbed. Tests that change it work on their own."""
    workspace = Workspace.make(corpus, tmp_path_factory.mktemp("finished") / "work")
    workspace.finish_here()
    return workspace


@pytest.fixture
def here(monkeypatch, capsys):
    """Runs a command of the package in this process, in a workspace: its exit status and output."""

    def run(workspace, *words):
        monkeypatch.chdir(workspace.folder)
        capsys.readouterr()
        return main([str(word) for word in words]), capsys.readouterr().out

    return run


def verification(workspace, *more):
    return ["verify", "--data_list", "data.jsonl", "--model_path", workspace.corpus.checkpoint, *more]


def findings(workspace):
    lines = (workspace.run_dir / "verify.jsonl").read_text().splitlines()
    return Counter((finding["key"], finding["kind"]) for finding in map(json.loads, lines))


def files_of(folder):
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}


def test_verify_passes_what_a_run_left(finished, here):
    code, said = here(finished, *verification(finished, "--workers", 2))
    assert code == 0, said
    assert f"{NUM_ROWS} = {NUM_ROWS} done + 0 failed + 0 pending" in said
    assert f"{2 * NUM_ROWS} files" in said
    assert "everything holds" in said


def test_damage_is_found_taken_back_and_done_again(finished, tmp_path, here):
    workspace = Workspace(finished.corpus, shutil.copytree(finished.folder, tmp_path / "work", symlinks=True))
    out = workspace.folder / "out"
    keys = workspace.corpus.keys
    (out / f"{keys[3]}.json").unlink()
    wav = (out / f"{keys[7]}.wav").read_bytes()
    (out / f"{keys[7]}.wav").write_bytes(wav[: len(wav) // 2])
    tokens = bytearray((out / f"{keys[11]}.json").read_bytes())
    tokens[tokens.index(b"]")] ^= 4
    (out / f"{keys[11]}.json").write_bytes(tokens)
    (out / f"{keys[15]}.wav").write_bytes((out / f"{keys[15]}.wav").read_bytes() + bytes(960))
    wrong = {keys[number] for number in (3, 7, 11, 15)}
    untouched = {name: stamp for name, stamp in files_of(out).items() if name.split(".")[0] not in wrong}

    assert here(workspace, *verification(workspace))[0] == 1
    assert {key for key, _ in findings(workspace)} == wrong
    assert findings(workspace)[keys[3], "missing"] == findings(workspace)[keys[7], "length"] == 1
    assert findings(workspace)[keys[11], "unreadable"] == findings(workspace)[keys[15], "content"] == 1

    assert here(workspace, *verification(workspace, "--repair"))[0] == 1
    assert here(workspace, *verification(workspace))[0] == 1
    assert findings(workspace) == Counter((key, "pending") for key in wrong)
    before = Counter(entry["key"] for entry in workspace.ledger() if entry["status"] == "done")
    workspace.finish_here()
    after = Counter(entry["key"] for entry in workspace.ledger() if entry["status"] == "done")
    assert after - before == Counter(wrong)
    assert here(workspace, *verification(workspace))[0] == 0
    assert workspace.outputs() == finished.outputs()
    assert untouched.items() <= files_of(out).items()


def test_a_run_at_work_and_a_killed_one(corpus, tmp_path, here, caplog):
    workspace = Workspace.make(corpus, tmp_path / "work")
    with workspace.start(1, "--batch_size", 1) as run:
        workspace.await_rows(3, run)
        for process in run.tree():  # or it might finish before it was looked at
            process.suspend()
        code, shown = here(workspace, "status", workspace.run_dir)
        assert code == 0
        assert f"of {NUM_ROWS}" in shown
        assert re.search("1 of 1 ranks (starting|running)", shown)
        run.kill()
    assert here(workspace, *verification(workspace))[0] == 1
    assert "a job seems to be at work" in caplog.text  # nobody can know yet that it is dead
    kinds = {kind for _, kind in findings(workspace)}
    assert {"pending"} <= kinds <= {"pending", "stray"}
    [status] = (workspace.run_dir / "status").glob("0*.json")
    said = json.loads(status.read_text())
    status.write_text(json.dumps({**said, "updated": said["updated"] - 1000}))
    assert "1 of 1 ranks silent" in here(workspace, "status", workspace.run_dir)[1]
    caplog.clear()
    here(workspace, *verification(workspace))
    assert "at work" not in caplog.text


def test_shards_are_verified_together(corpus, tmp_path, here):
    workspace = Workspace.make(corpus, tmp_path / "work")
    workspace.finish_here("--num_shards", 2, "--shard", 1)
    shown = here(workspace, "status", workspace.run_dir)[1]
    assert "1 of 2 have started; not yet: 0" in shown
    half = len({entry["key"] for entry in workspace.ledger()})
    assert 0 < half < NUM_ROWS
    assert f"{half} done, 0 failed, 0 left of {half}" in shown
    code, said = here(workspace, *verification(workspace))
    assert code == 1
    assert f"{NUM_ROWS} = {half} done + 0 failed + {NUM_ROWS - half} pending" in said
    missing = [key for key in corpus.keys if not (workspace.folder / "out" / f"{key}.wav").exists()]
    assert findings(workspace) == Counter((key, "pending") for key in missing)
    workspace.finish_here("--num_shards", 2, "--shard", 0)
    assert here(workspace, *verification(workspace))[0] == 0
    code, shown = here(workspace, "status", workspace.run_dir, "--watch", 1)  # ends, as the run is over
    assert code == 0
    assert f"{NUM_ROWS} done, 0 failed, 0 left of {NUM_ROWS}" in shown


def test_dry_run_under_torchrun_prints_once_and_leaves_nothing(corpus, tmp_path, here, monkeypatch):
    """Each rank in its turn, as none waits for another."""
    workspace = Workspace.make(corpus, tmp_path / "work")
    before = files_of(workspace.folder)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name, value in (("TORCHELASTIC_RUN_ID", "job"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "9")):
        monkeypatch.setenv(name, value)
    said = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)
        code, printed = here(workspace, *workspace.arguments("--dry_run"))
        assert code == 0, printed
        said.append(printed)
    assert said[0].count("nothing would fail") == 1
    assert f"{NUM_ROWS} rows in" in said[0]
    assert "for 2 ranks (torchrun)" in said[0]
    assert said[1] == ""
    assert files_of(workspace.folder) == before


def test_rows_tokenized_again_have_the_codes_that_stand(finished, tmp_path, here):
    code, said = here(finished, *verification(finished, "--recompute", 12, "--dtype", "bfloat16", "--device", "cpu"))
    assert code == 0, said
    assert re.search(r"recomputed 12 rows, [\d,]+ codes, on cpu, float32", said)
    assert re.search(r"alone +100\.0000 % +0\n", said)
    assert re.search(r"together, shuffled +100\.0000 % +0\n", said)
    assert "in bfloat16" in said

    # A code that is possible, and not the one that the audio has.
    workspace = Workspace(finished.corpus, shutil.copytree(finished.folder, tmp_path / "work", symlinks=True))
    key = workspace.corpus.keys[5]
    path = workspace.folder / "out" / f"{key}.json"
    document = json.loads(path.read_text())
    document["quantized_tokens"][1][0] = (document["quantized_tokens"][1][0] + 1) % 16
    path.write_text(json.dumps(document))
    assert here(workspace, *verification(workspace))[0] == 0
    code, said = here(workspace, *verification(workspace, "--recompute", NUM_ROWS, "--device", "cpu"))
    assert code == 1
    assert "alone: 1 of" in said
    assert findings(workspace) == Counter({(key, "recomputed"): 2})
