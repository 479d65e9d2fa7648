"""The manifest's index: every non-blank line is one row or one failure, whatever its bytes."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from batch_tokenizer.manifest import index as index_module
from batch_tokenizer.manifest import manifest as manifest_module
from batch_tokenizer.manifest import row as row_module
from batch_tokenizer.manifest.manifest import Manifest
from batch_tokenizer.manifest.row import LineState
from batch_tokenizer.records import OUTPUT_FIELDS, REQUIRED_FIELDS, TASKS, ManifestRow, RowFailure, RunError, Task


def row(number: int, **changes: Any) -> dict[str, Any]:
    """A good row for every task, unlike the row of any other number."""
    return {
        "key": f"key-{number}",
        "wav": f"in/{number}.wav",
        "quantized_tokens": f"out/{number}.json",
        "reconstructed_wav": f"out/{number}.wav",
    } | changes


def open_lines(folder: Path, lines: list[dict[str, Any] | bytes], task: Task = "wav2token2wav") -> Manifest:
    path = folder / "data.jsonl"
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines))
    return Manifest.open(path, task, folder / "index")


def items(manifest: Manifest) -> list[ManifestRow | RowFailure]:
    return manifest.read(0, manifest.num_lines)


def reasons(manifest: Manifest) -> dict[int, str]:
    """Reason of each failed line."""
    failures = [item for item in items(manifest) if isinstance(item, RowFailure)]
    assert all(failure.stage == "manifest" for failure in failures)
    return {failure.line: failure.reason for failure in failures}


# ----------------------------------------------------------------------------------------------------- any bytes at all

names = st.sampled_from(["a", "b", "./a", "c/../a", "d//e", "d/e", "d/e/", "ключ", "", "x\0", "/r"])
values = st.one_of(names, st.none(), st.integers(), st.booleans(), st.lists(st.integers(), max_size=1))
fields = st.sampled_from(["key", "wav", "quantized_tokens", "reconstructed_wav", "duration", "speaker"])
objects = st.one_of(
    st.dictionaries(fields, values, max_size=6),
    st.builds(lambda *four: dict(zip(REQUIRED_FIELDS["wav2token2wav"], four, strict=True)), *[names] * 4),
)
texts = st.one_of(
    objects.map(lambda value: json.dumps(value).encode()),
    objects.map(lambda value: json.dumps(value, ensure_ascii=False).encode()[:-3]),
    st.binary(max_size=20).map(lambda data: data.replace(b"\n", b"")),
    st.sampled_from([b"", b"  \t", b"\r", b"null", b"3", b"[]", b'{"key":"\\ud800"}', b"\xef\xbb\xbf{}", b"[" * 2000]),
)


def expected(lines: list[bytes], task: Task) -> list[tuple[int, bool]]:
    """A naive model: (line, whether it is a good row) of every non-blank line, by dictionaries and the json module."""
    keys: set[str] = set()
    paths: set[str] = set()
    found: list[tuple[int, bool]] = []
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            value = json.loads(line.strip().decode("utf-8"), parse_constant=lambda text: 1 / 0)
            wanted = [value[name] for name in REQUIRED_FIELDS[task]]
            outputs = [os.path.normpath(value[name]) for name in OUTPUT_FIELDS[task]]
            inside = [os.path.normpath(path) for path in wanted[1:]]
            good = all(isinstance(text, str) and text and "\0" not in text and text.encode() for text in wanted)
            good = good and len(set(inside)) == len(inside)
        except (ValueError, KeyError, TypeError, ZeroDivisionError, RecursionError):
            good = False
        if good and wanted[0] not in keys and not paths & set(outputs):
            keys.add(wanted[0])
            paths.update(outputs)
        else:
            good = False
        found.append((number, good))
    return found


@given(st.lists(texts, max_size=12), st.sampled_from(TASKS), st.sampled_from([b"\n", b"\r\n"]), st.booleans())
@example([b"\xef\xbb\xbf"], "wav2token", b"\n", False)
def test_every_line_is_one_row_or_one_failure(lines: list[bytes], task: Task, end: bytes, last_end: bool) -> None:
    data = end.join(lines) + (end if last_end else b"")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "data.jsonl"
        path.write_bytes(data)
        body = data.removeprefix(b"\xef\xbb\xbf")
        split = body.removesuffix(b"\n").split(b"\n") if body else []
        model = expected(split, task)
        if not model:
            with pytest.raises(RunError, match="is empty"):
                Manifest.open(path, task, Path(folder) / "index")
            return
        manifest = Manifest.open(path, task, Path(folder) / "index")
        assert manifest.num_lines == len(split)
        start = len(data) - len(body)
        for number, line in enumerate(split):
            assert data[manifest.offsets[number] :].startswith(line)
            assert int(manifest.offsets[number]) == start
            start += len(line) + 1
        assert int(manifest.offsets[-1]) == len(data)
        read = items(manifest)
        assert [(item.line, isinstance(item, ManifestRow)) for item in read] == model
        assert len(manifest) == len(model)
        assert list(np.flatnonzero(manifest.is_row)) == [line for line, good in model if good]
        assert [item.digest for item in read] == [f"{int(manifest.digests[item.line]):016x}" for item in read]
        middle = manifest.num_lines // 2
        assert manifest.read(0, middle) + manifest.read(middle, manifest.num_lines) == read


def test_a_row_carries_what_the_line_says(tmp_path: Path) -> None:
    line = row(1, duration=2.5, speaker={"name": "Ю"})
    (item,) = items(open_lines(tmp_path, [line]))
    assert isinstance(item, ManifestRow)
    assert (item.key, item.wav, item.quantized_tokens) == ("key-1", "in/1.wav", "out/1.json")
    assert item.reconstructed_wav == "out/1.wav"
    assert item.fields == line


def test_a_path_that_the_task_does_not_need_may_be_anything(tmp_path: Path) -> None:
    lines: list[Any] = [row(1, reconstructed_wav=7), row(2, reconstructed_wav=None)]
    read = items(open_lines(tmp_path, lines, "wav2token"))
    assert [item.reconstructed_wav for item in read if isinstance(item, ManifestRow)] == [None, None]


# ------------------------------------------------------------------------------------------------------------ the words


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "not valid JSON"),
        (b"[1]", "not a JSON object but a list"),
        (b'"text"', "not a JSON object but a string"),
        (b"null", "not a JSON object but null"),
        (b'{"key": "\xff"}', "not UTF-8: byte 0xff at column 10"),
        (b'{"key": "a", "wav": "\\ud800"}', 'field "wav" has half a surrogate pair'),
        (b'{"key": "a"}', 'field "wav" is missing'),
        (json.dumps(row(1, wav=None)).encode(), 'field "wav" is null'),
        (json.dumps(row(1, wav=3)).encode(), 'field "wav" is a number, not a string'),
        (json.dumps(row(1, key=True)).encode(), 'field "key" is a boolean, not a string'),
        (json.dumps(row(1, key="")).encode(), 'field "key" is empty'),
        (json.dumps(row(1, wav="a\0b")).encode(), 'field "wav" has a NUL character'),
        (json.dumps(row(1, wav="out/./1.wav")).encode(), 'fields "wav" and "reconstructed_wav" name one file'),
        (
            json.dumps(row(1, quantized_tokens="out/1.wav")).encode(),
            'fields "quantized_tokens" and "reconstructed_wav" name one file, out/1.wav',
        ),
        *(
            (
                json.dumps(row(1, quantized_tokens=path)).encode(),
                f'field "quantized_tokens" is {path!r}: outputs are files',
            )
            for path in ("tar://0+5::x.tar", "parquet://7::x", "jsonl://0+5::x", "pipe:cat x |")
        ),
        (json.dumps({**row(1), "start": "x" * 9999}).encode(), 'field "start" is \'xxxx'),
        (b'{"key": NaN}', 'field "key" is null'),
        (b'{"key": nan}', "not valid JSON"),
        (b'{"key": "a", "other": ["\\udc00"]}', 'field "other" has half a surrogate pair'),
        (b"[" * 5000, "not valid JSON"),
    ],
)
def test_reasons_name_field_and_problem(tmp_path: Path, line: bytes, reason: str) -> None:
    manifest = open_lines(tmp_path, [row(7), line, row(8)])
    assert list(reasons(manifest)) == [1]
    assert reasons(manifest)[1].startswith(reason)
    assert "\n" not in reasons(manifest)[1]


def test_a_failure_knows_its_key_where_it_can(tmp_path: Path) -> None:
    manifest = open_lines(tmp_path, [b'{"key": "a", "wav": "\\ud800"}', b'{"key": "b"}', b'{"key": 3}', b"{"])
    assert [item.key for item in items(manifest)] == ["a", "b", None, None]


# ----------------------------------------------------------------------------------------------------------- duplicates


def test_the_first_line_keeps_a_key_or_an_output(tmp_path: Path) -> None:
    lines: list[Any] = [
        row(0),
        b"",
        row(2, key="key-0"),
        row(3, quantized_tokens="out//x/../0.json"),
        row(4, reconstructed_wav="./out/0.json"),
        row(5, key="key-3"),  # line 3 was refused, so it owns no key
        row(6, quantized_tokens="out/2.json"),  # nor does line 2 own its outputs
    ]
    assert reasons(open_lines(tmp_path, lines)) == {
        2: 'duplicate key "key-0": first on line 1',
        3: 'output path out/0.json of field "quantized_tokens" is taken: first on line 1',
        4: 'output path out/0.json of field "reconstructed_wav" is taken: first on line 1',
    }


def test_inputs_may_be_shared(tmp_path: Path) -> None:
    manifest = open_lines(tmp_path, [row(1, wav="in.wav"), row(2, wav="in.wav")])
    assert reasons(manifest) == {}


def test_equal_hashes_are_no_duplicates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "_hash_path", lambda path: len(path) % 2)
    for module in (index_module, manifest_module):
        monkeypatch.setattr(module, "hash_bytes", lambda data: bytes(7) + bytes([1 + len(data) % 2]))
    lines = [row(number) for number in range(30)] + [row(30, key="key-17"), row(31, reconstructed_wav="out/23.json")]
    assert reasons(open_lines(tmp_path, lines)) == {
        30: 'duplicate key "key-17": first on line 18',
        31: 'output path out/23.json of field "reconstructed_wav" is taken: first on line 24',
    }


# -------------------------------------------------------------------------------------------------------- block borders


@pytest.mark.parametrize("block", [1, 7, 64, 1000])
def test_lines_across_block_borders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(index_module, "BLOCK_BYTES", block)
    lines = [b"\xef\xbb\xbf" + json.dumps(row(0)).encode(), *(row(number) for number in range(1, 20)), b"", row(20)]
    manifest = open_lines(tmp_path, lines)
    read = items(manifest)
    assert [item.key for item in read] == [f"key-{number}" for number in range(21)]
    assert all(isinstance(item, ManifestRow) for item in read)


def test_a_line_without_end_costs_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "BLOCK_BYTES", 512)
    for module in (index_module, manifest_module, row_module):
        monkeypatch.setattr(module, "MAX_LINE", 1000)
    monkeypatch.setattr(manifest_module, "BLOCK_BYTES", 512)
    longest = json.dumps(row(2, note="x")).encode()
    longest = longest.replace(b'"x"', b'"' + b"x" * (1001 - len(longest)) + b'"')
    assert len(longest) == 1000
    blank = b" " * 30000
    lines: list[Any] = [row(0), b'{"a": "' + b"y" * 50000, row(1), longest, longest[:-2] + b' "}', blank, row(3)]
    read = []
    real_pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, length, offset: read.append(length) or real_pread(fd, length, offset))
    manifest = open_lines(tmp_path, lines)
    assert reasons(manifest).keys() == {1, 4}
    assert "longer than" in reasons(manifest)[1]
    assert len(manifest) == 6
    assert max(read) <= 1002


# ------------------------------------------------------------------------------------------------------------ durations


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (2, 2.0),
        (0, 0.0),
        (3.25, 3.25),
        (-1, None),
        ("3", None),
        (True, None),
        (None, None),
        (1e300, None),
        (2**62, None),
    ],
)
def test_durations(tmp_path: Path, value: Any, seconds: float | None) -> None:
    manifest = open_lines(tmp_path, [row(1, duration=value), row(2)])
    assert np.isnan(manifest.durations[1])
    if seconds is None:
        assert np.isnan(manifest.durations[0])
    else:
        assert manifest.durations[0] == seconds


# ---------------------------------------------------------------------------------------------------------------- cache


def test_the_index_is_kept_for_the_same_file_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = open_lines(tmp_path, [row(1), row(2)])
    built: list[Path] = []
    build = manifest_module.build_index
    monkeypatch.setattr(manifest_module, "build_index", lambda path, *rest: (built.append(path), build(path, *rest)))
    assert items(Manifest.open(first.path, first.task, tmp_path / "index")) == items(first)
    assert not built
    with first.path.open("ab") as stream:
        stream.write(b"\n" + json.dumps(row(3)).encode())
    assert len(Manifest.open(first.path, first.task, tmp_path / "index")) == 3
    Manifest.open(first.path, "wav2token", tmp_path / "index")
    assert len(built) == 2
    # One byte changed in place, size and time kept: seen by the hash of the file's ends.
    status = first.path.stat()
    first.path.write_bytes(first.path.read_bytes().replace(b"key-1", b"key-7"))
    os.utime(first.path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert items(Manifest.open(first.path, first.task, tmp_path / "index"))[0].key == "key-7"
    assert not list((tmp_path / "index").glob("building-*"))


def test_an_index_of_an_earlier_manifest_goes_after_a_day(tmp_path: Path) -> None:
    open_lines(tmp_path, [row(1)])
    (old,) = (tmp_path / "index").glob("wav2token2wav-*")
    open_lines(tmp_path, [row(1), row(2)])
    assert old.is_dir()
    os.utime(old, (time.time() - 2 * 86400,) * 2)
    open_lines(tmp_path, [row(1), row(2), row(3)])
    assert not old.exists()
    assert len(list((tmp_path / "index").glob("wav2token2wav-*"))) == 2


def test_reading_notices_a_changed_manifest(tmp_path: Path) -> None:
    manifest = open_lines(tmp_path, [row(1), row(2)])
    manifest.path.write_bytes(manifest.path.read_bytes().replace(b"key-2", b"key-9"))
    assert len(manifest.read(0, 1)) == 1
    with pytest.raises(RunError, match=r"line 2 of manifest .* changed during the run"):
        manifest.read(0, 2)


def test_a_manifest_travels_to_another_process(tmp_path: Path) -> None:
    manifest = open_lines(tmp_path, [row(1), b"x", row(2)])
    expected_items = items(manifest)
    data = pickle.dumps(manifest)
    assert len(data) < 1000
    assert items(pickle.loads(data)) == expected_items


def test_progress_rises_and_may_stop_the_building(tmp_path: Path) -> None:
    class Enough(Exception):
        pass

    def stop(done: int, total: int) -> None:
        raise Enough

    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(row(1)))
    with pytest.raises(Enough):
        Manifest.open(path, "wav2token", tmp_path / "index", progress=stop)
    assert [entry.name for entry in (tmp_path / "index").iterdir()] == ["lock"]
    seen: list[tuple[int, int]] = []
    Manifest.open(path, "wav2token", tmp_path / "index", progress=lambda *counts: seen.append(counts))
    assert seen[0] == (0, path.stat().st_size)
    assert seen[-1] == (path.stat().st_size,) * 2


def test_two_processes_build_once(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(json.dumps(row(number)) for number in range(20)))
    program = textwrap.dedent(
        """
        import logging, sys, time
        from batch_tokenizer.manifest import manifest
        logging.basicConfig()
        build = manifest.build_index
        def slow(*arguments):
            print("built", flush=True)
            time.sleep(1)
            build(*arguments)
        manifest.build_index = slow
        print(len(manifest.Manifest.open(sys.argv[1], "wav2token", sys.argv[2])))
        """
    )
    command = [sys.executable, "-c", program, str(path), str(tmp_path / "index")]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=600) for process in both]
    assert sorted(out for out, _ in outputs) == ["20\n", "built\n20\n"]


# --------------------------------------------------------------------------------------------------------------- errors


def test_manifests_that_cannot_be_read(tmp_path: Path) -> None:
    def message(path: Path) -> str:
        with pytest.raises(RunError) as raised:
            Manifest.open(path, "wav2token", tmp_path / "index")
        return str(raised.value)

    assert "does not exist" in message(tmp_path / "none.jsonl")
    assert "is a folder" in message(tmp_path)
    assert "not a regular file" in message(Path("/dev/null"))
    for content in (b"", b"\n \n\r\n", b"\xef\xbb\xbf"):
        (tmp_path / "empty.jsonl").write_bytes(content)
        assert "is empty" in message(tmp_path / "empty.jsonl")
        assert "empty.jsonl" in message(tmp_path / "empty.jsonl")


def test_states_are_told_apart(tmp_path: Path) -> None:
    manifest = open_lines(tmp_path, [row(1), b"", b"{", row(1)])
    assert list(manifest.states) == [LineState.ROW, LineState.BLANK, LineState.MALFORMED, LineState.DUPLICATE]
    assert not manifest.states.flags.writeable


@pytest.mark.parametrize("column", ["offsets", "digests", "key_hashes", "durations", "states", "duplicates"])
@pytest.mark.parametrize("damage", ["cut", "emptied", "removed", "flipped", "zeros"])
def test_a_damaged_index_is_built_again(tmp_path: Path, column: str, damage: str) -> None:
    """An index is a cache, and says nothing that the manifest does not."""
    path, index = tmp_path / "data.jsonl", tmp_path / "index"
    path.write_text("\n".join(json.dumps(row(number % 3)) for number in range(5)))
    before = Manifest.open(path, "wav2token", index)
    expected = before.read(0, 5)
    [file] = index.glob(f"*/{column}.npy")
    content = bytearray(file.read_bytes())
    if damage == "removed":
        file.unlink()
    else:
        content[-1] ^= 0x40
        damaged = {"cut": content[:-3], "emptied": b"", "flipped": content, "zeros": bytes(len(content))}
        file.write_bytes(damaged[damage])
    again = Manifest.open(path, "wav2token", index)
    assert again.read(0, 5) == expected
    assert again.num_lines == 5


def test_rows_as_python_writes_them_pass_through(tmp_path: Path) -> None:
    """NaN and Infinity become null, integers of any length keep their digits."""
    line = json.dumps(row(1, snr=float("nan"), deep=[{"x": float("-inf")}], big=2**70, small=-(10**30), n=2**63))
    assert "NaN" in line
    [item] = open_lines(tmp_path, [line.encode()]).read(0, 1)
    assert isinstance(item, ManifestRow)
    fields = dict(item.fields)
    assert (fields["snr"], fields["deep"]) == (None, [{"x": None}])
    assert (fields["big"], fields["small"], fields["n"]) == (2**70, -(10**30), 2**63)
