"""The ledger: whatever is torn, moved or repeated, the state is what a simple model says."""

from __future__ import annotations

import errno
import json
import os
import tempfile
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batch_tokenizer.manifest.manifest import Manifest
from batch_tokenizer.records import LedgerEntry, RunError
from batch_tokenizer.runtime import ledger_lines
from batch_tokenizer.runtime.ledger import (
    LedgerState,
    RowStatus,
    iter_failures,
    read_checksums,
    read_ledger,
    write_failures,
)
from batch_tokenizer.runtime.ledger_lines import encode_entry
from batch_tokenizer.runtime.ledger_writer import LedgerWriter
from batch_tokenizer.runtime.run_files import ledger_file


def good_line(key: str, wav: str = "x.wav") -> bytes:
    return json.dumps({"key": key, "wav": wav, "quantized_tokens": f"out/{key}.json"}).encode()


def open_lines(folder: Path, lines: Iterable[bytes]) -> Manifest:
    path = folder / "data.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n")
    return Manifest.open(path, "wav2token", folder / "index")


def entry(manifest: Manifest, line: int, status: Any = "done", **changes: Any) -> LedgerEntry:
    """An entry for a line as it stands in ``manifest``."""
    item = manifest.read(line, line + 1)[0]
    if status == "done":
        changes = {"num_samples": 100 + line, "frames": 1 + line} | changes
    if status == "failed":
        changes = {"stage": "load", "reason": f"reason of {item.key}"} | changes
    return LedgerEntry(line, item.digest, item.key, status, **changes)


def write(run_dir: Path, attempt: int, rank: int, *entries: LedgerEntry | bytes) -> Path:
    path = ledger_file(run_dir, attempt, rank)
    path.parent.mkdir(exist_ok=True)
    with path.open("ab") as stream:
        for item in entries:
            stream.write(item if isinstance(item, bytes) else encode_entry(item))
    return path


def statuses(state: LedgerState) -> list[str]:
    return [RowStatus(status).name.lower() for status in state.status]


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return open_lines(tmp_path, [good_line(key) for key in "abcdef"])


# ------------------------------------------------------------------------------------------------------ against a model

event = st.tuples(
    st.integers(1, 3),  # attempt
    st.integers(0, 2),  # rank
    st.integers(0, 7),  # line
    st.sampled_from(["done", "failed", "redo"]),
    st.sampled_from([None, None, None, "torn", "garbage", "nul"]),
)


@given(st.lists(event, max_size=40), st.sampled_from([64, 300, 2**20]))
def test_any_interleaving_and_tearing(events: list[tuple[int, int, int, str, str | None]], block: int) -> None:
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(ledger_lines, "_BLOCK", block)
        folder = Path(name)
        lines = [good_line(key) for key in "abcdef"]
        lines[2:2] = [b"", b"not a row"]  # lines 2 and 3
        manifest = open_lines(folder, lines)
        best: dict[int, tuple[int, int]] = {}
        damaged = 0
        torn: set[tuple[int, int]] = set()
        for attempt, rank, line, status, damage in events:
            if line == 2:
                continue
            stage = "manifest" if line == 3 else "load"
            changes = {"stage": stage} if status == "failed" else {}
            data = encode_entry(entry(manifest, line, status, **changes))
            if damage == "torn":
                data = data[: len(data) * 2 // 3]
            elif damage == "garbage":
                data = b'{"line": 1}\n[]\n3\n'
            elif damage == "nul":
                data = bytes(200) + b"\n"
            # A torn line swallows the line after it, unless its writer begins a new one.
            if (attempt, rank) in torn:
                data = b"\n" + data
            torn.discard((attempt, rank))
            if damage == "torn":
                torn.add((attempt, rank))
            damaged += {None: 0, "torn": 1, "garbage": 3, "nul": 1}[damage]
            write(folder, attempt, rank, data)
            applies = (status == "failed") if line == 3 else True
            if damage is None and applies:
                priority = ["redo", "failed", "done"].index(status)
                best[line] = max(best.get(line, (0, 0)), (attempt, priority))
        state = read_ledger(folder, manifest)
        model = ["pending"] * 8
        model[2] = "blank"
        for line, (_, priority) in best.items():
            model[line] = ["pending", "failed", "done"][priority]
        assert statuses(state) == model
        assert (state.num_done, state.num_failed) == (model.count("done"), model.count("failed"))
        assert state.num_pending == model.count("pending") == np.count_nonzero(state.pending)
        assert state.num_unreadable == damaged
        assert list(state.num_samples) == [100 + n if word == "done" else 0 for n, word in enumerate(model)]
        assert list(state.frames) == [1 + n if word == "done" else 0 for n, word in enumerate(model)]
        failures = list(iter_failures(folder, manifest, state))
        assert [failure.line for failure in failures] == [n for n, word in enumerate(model) if word == "failed"]


# ----------------------------------------------------------------------------------------------- manifests that change


def test_rows_are_found_again_where_they_moved(tmp_path: Path) -> None:
    manifest = open_lines(tmp_path, [good_line(key) for key in "abc"])
    write(tmp_path, 1, 0, entry(manifest, 0), entry(manifest, 1, "failed"), entry(manifest, 2))
    moved = open_lines(tmp_path, [good_line(key) for key in ["new", "c", "", "b", "a", "last"]])
    state = read_ledger(tmp_path, moved)
    assert statuses(state) == ["pending", "done", "pending", "failed", "done", "pending"]
    assert list(state.frames) == [0, 3, 0, 0, 1, 0]
    assert [(item.line, item.key) for item in iter_failures(tmp_path, moved, state)] == [(3, "b")]
    assert (state.num_changed, state.num_removed) == (0, 0)


def test_changed_and_removed_rows_are_told_apart(tmp_path: Path) -> None:
    manifest = open_lines(tmp_path, [good_line(key) for key in "abcde"])
    done = [entry(manifest, line) for line in range(4)]
    write(tmp_path, 1, 0, *done, entry(manifest, 4, "failed"))
    write(tmp_path, 2, 0, done[0])
    lines = [good_line("a", wav="other.wav"), good_line("b"), b'{"key": "c"}', good_line("e", wav="other.wav")]
    state = read_ledger(tmp_path, open_lines(tmp_path, lines))
    assert statuses(state) == ["pending", "done", "pending", "pending"]
    assert state.num_changed == 2
    assert state.changed_keys == ("a", "c")
    assert state.num_removed == 1


def test_a_refusal_holds_as_long_as_the_manifest_refuses(tmp_path: Path) -> None:
    twice = open_lines(tmp_path, [good_line("a"), good_line("a", wav="second.wav"), b"{"])
    entries = [entry(twice, line, "failed", stage="manifest") for line in (1, 2)]
    write(tmp_path, 1, 0, *entries)
    assert statuses(read_ledger(tmp_path, twice)) == ["pending", "failed", "failed"]
    once = open_lines(tmp_path, [good_line("a", wav="second.wav"), b"{"])
    assert statuses(read_ledger(tmp_path, once)) == ["pending", "failed"]


def test_a_finished_row_that_became_a_duplicate_is_not_done(tmp_path: Path) -> None:
    alone = open_lines(tmp_path, [good_line("a")])
    write(tmp_path, 1, 0, entry(alone, 0))
    behind = open_lines(tmp_path, [good_line("a", wav="other.wav"), good_line("a")])
    assert statuses(read_ledger(tmp_path, behind)) == ["pending", "pending"]


def test_lines_that_are_alike_keep_their_own_entries(tmp_path: Path) -> None:
    manifest = open_lines(tmp_path, [good_line("a"), good_line("a")])
    write(tmp_path, 1, 0, entry(manifest, 0), entry(manifest, 1, "failed", stage="manifest"))
    assert statuses(read_ledger(tmp_path, manifest)) == ["done", "failed"]


# ----------------------------------------------------------------------------------------------------------- odd files


def test_odd_files(tmp_path: Path, manifest: Manifest, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, 1, 0)
    write(tmp_path, 1, 1, bytes(5000))
    last = encode_entry(entry(manifest, 0)).removesuffix(b"\n")
    write(tmp_path, 2, 0, b"\n\n", entry(manifest, 1), b"\xff\xfe\n", last)
    (tmp_path / "ledger" / "notes.txt").write_text("mine")
    state = read_ledger(tmp_path, manifest)
    assert statuses(state)[:3] == ["done", "done", "pending"]
    assert state.num_unreadable == 2
    assert "notes.txt is no ledger file" in caplog.text
    assert "000002-00000.jsonl: 1 unreadable" in caplog.text


@pytest.mark.parametrize(
    "change",
    [
        {"line": 1.0}, {"line": True}, {"line": None}, {"line": "1"}, {"line": 2**70}, {"digest": "12"}, {"digest": 3},
        {"digest": "x" * 16}, {"status": "fine"}, {"status": []}, {"key": 3}, {"num_samples": "1"}, {"frames": -1},
        {"frames": 2**40},
    ],
)  # fmt: skip
def test_entries_of_wrong_shape_do_not_count(tmp_path: Path, manifest: Manifest, change: dict[str, Any]) -> None:
    wrong = json.dumps(json.loads(encode_entry(entry(manifest, 1))) | change).encode() + b"\n"
    write(tmp_path, 1, 0, entry(manifest, 0), wrong, entry(manifest, 2))
    assert statuses(read_ledger(tmp_path, manifest))[:4] == ["done", "pending", "done", "pending"]


@given(st.integers(0, 10**6), st.integers(1, 255))
def test_a_damaged_line_costs_its_row_alone(place: int, change: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        manifest = open_lines(Path(name), [good_line(key) for key in "abc"])
        path = write(Path(name), 1, 0, *(entry(manifest, line) for line in range(3)))
        content = bytearray(path.read_bytes())
        place %= len(content)
        row = content[:place].count(b"\n")
        content[place] ^= change
        path.write_bytes(content)
        state = read_ledger(Path(name), manifest)
        damaged = {row, row + 1} if content.count(b"\n") < 3 else {row}  # the newline itself joins two lines
        assert {line for line in range(3) if state.status[line] != RowStatus.DONE} == damaged & {0, 1, 2}
        assert (state.num_changed, state.num_removed) == (0, 0)


def test_checksums_of_the_entry_that_counts(tmp_path: Path, manifest: Manifest) -> None:
    write(tmp_path, 1, 0, *(entry(manifest, line, checksums={"codes": line, "audio": 9}) for line in range(3)))
    write(tmp_path, 2, 0, entry(manifest, 1, checksums={"codes": 2**32 - 1}), entry(manifest, 2, "failed"))
    checksums = read_checksums(tmp_path, manifest, read_ledger(tmp_path, manifest))
    assert checksums["codes"].tolist() == [0, 2**32 - 1, -1, -1, -1, -1]
    assert checksums["audio"].tolist() == [9, -1, -1, -1, -1, -1]


def test_no_ledger_is_nothing_done(tmp_path: Path, manifest: Manifest) -> None:
    state = read_ledger(tmp_path / "none", manifest)
    assert (state.num_done, state.num_failed, state.num_pending) == (0, 0, 6)
    assert list(iter_failures(tmp_path / "none", manifest, state)) == []


# ------------------------------------------------------------------------------------------------------------- failures


def test_failures_tell_the_reason_that_counts(tmp_path: Path, manifest: Manifest) -> None:
    write(tmp_path, 1, 0, *(entry(manifest, line, "failed", reason="first") for line in (4, 3, 2, 1)))
    write(tmp_path, 2, 1, entry(manifest, 3), entry(manifest, 2, "redo"), entry(manifest, 1, "failed", reason="後\n"))
    path = write_failures(tmp_path, manifest, read_ledger(tmp_path, manifest))
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"line": 2, "key": "b", "stage": "load", "reason": "後\n"},
        {"line": 5, "key": "e", "stage": "load", "reason": "first"},
    ]
    assert sorted(entry.name for entry in tmp_path.iterdir() if entry.is_file()) == ["data.jsonl", "failures.jsonl"]


# -------------------------------------------------------------------------------------------------------------- writing


def test_threads_write_whole_lines(tmp_path: Path, manifest: Manifest) -> None:
    (tmp_path / "ledger").mkdir()
    with LedgerWriter(ledger_file(tmp_path, 1, 0)) as writer:
        item = entry(manifest, 1, "failed", reason="r" * 5000)
        threads = [threading.Thread(target=lambda: [writer.append(item) for _ in range(50)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert ledger_file(tmp_path, 1, 0).read_bytes() == encode_entry(item) * 200


def test_a_file_name_that_is_no_text_can_be_a_reason(manifest: Manifest) -> None:
    assert b"caf?.wav" in encode_entry(entry(manifest, 0, "failed", reason="no file caf\udce9.wav"))


def test_a_short_write_tears_one_line_only(tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ledger").mkdir()
    real_write = os.write
    budget = [60]

    def full_disk(descriptor: int, data: bytes) -> int:
        if budget[0] == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        part = data[: budget[0]]
        budget[0] -= len(part)
        return real_write(descriptor, part)

    with LedgerWriter(ledger_file(tmp_path, 1, 0)) as writer:
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", full_disk)
            with pytest.raises(RunError, match="No space left") as raised:
                writer.append(entry(manifest, 0))
        assert raised.value.exit_code == 1
        assert "free some space" in str(raised.value)
        writer.append(entry(manifest, 1))
    # The restarted process of the same rank and attempt goes on behind a line that its predecessor tore.
    write(tmp_path, 1, 0, encode_entry(entry(manifest, 2))[:30])
    with LedgerWriter(ledger_file(tmp_path, 1, 0)) as writer:
        writer.append(entry(manifest, 3))
    state = read_ledger(tmp_path, manifest)
    assert statuses(state) == ["pending", "done", "pending", "done", "pending", "pending"]
    assert state.num_unreadable == 2


def test_a_removed_run_folder_is_noticed(tmp_path: Path, manifest: Manifest) -> None:
    (tmp_path / "ledger").mkdir()
    path = ledger_file(tmp_path, 1, 0)
    with LedgerWriter(path) as writer:
        writer.append(entry(manifest, 0))
        path.unlink()
        with pytest.raises(RunError, match="removed") as raised:
            writer.append(entry(manifest, 1))
    assert raised.value.exit_code == 1
    with pytest.raises(RunError, match="No such file"):
        LedgerWriter(tmp_path / "gone" / "ledger.jsonl")
