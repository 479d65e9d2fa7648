"""``batch_tokenizer verify``: every way in which a run can be wrong is told, and a run that is right passes.

No model runs here: outputs are written by the run's own writers, with random codes of the right shape.
"""

from __future__ import annotations

import json
import os
import struct
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pytest

from batch_tokenizer.cli import main
from batch_tokenizer.codecs.checkpoint import Checkpoint
from batch_tokenizer.codecs.registry import find_family
from batch_tokenizer.manifest.manifest import Manifest
from batch_tokenizer.records import LedgerEntry, ManifestRow, RowFailure, TokenizedRow
from batch_tokenizer.runs.checks import CheckFailed, OutputForm, check_audio_file, check_token_file
from batch_tokenizer.runtime.ledger import RowStatus, read_ledger
from batch_tokenizer.runtime.ledger_lines import decode_entry, encode_entry
from batch_tokenizer.runtime.ledger_writer import LedgerWriter
from batch_tokenizer.runtime.processes import ProcessGroup
from batch_tokenizer.runtime.run_folder import RunFolder
from batch_tokenizer.writers.file_sink import FileSink
from batch_tokenizer.writers.row_encoding import wav_bytes
from tests.support.checkpoints import write_mimo_checkpoint
from tests.support.command import write_manifest

NUM_QUANTIZERS = 3
ALONE = ProcessGroup.from_environment({})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_mimo_checkpoint(tmp_path_factory.mktemp("model"))


def ledger_line(fields):
    """An entry's line, from its fields."""
    return encode_entry(LedgerEntry(**fields))


@dataclass
class FakeRun:
    """A finished run in ``folder``, made without a model."""

    folder: Path
    checkpoint: Path
    task: str = "wav2token2wav"

    def __post_init__(self):
        opened = Checkpoint.open(str(self.checkpoint))
        self.spec = find_family(opened).open_spec(opened)
        info = self.spec.info
        self.info = {
            "codec": info.family, "fingerprint": info.fingerprint, "sample_rate": info.sample_rate,
            "frame_rate": info.frame_rate, "dtype": "float32", "resampler": "reference", "version": "0.1.0",
        }  # fmt: skip
        self.settings = {"task": self.task, "num_quantizers": NUM_QUANTIZERS, **self.info}

    @property
    def form(self):
        return OutputForm.of(self.spec.info, self.settings)

    @property
    def data_list(self):
        return self.folder / "data.jsonl"

    @property
    def run_dir(self):
        return self.folder / f"data.{self.task}.run"

    def tokens(self, number):
        return self.folder / "out" / f"r{number}.json"

    def wav(self, number):
        return self.folder / "out" / f"r{number}.wav"

    def part(self, name):
        return self.folder / "out" / name

    def row(self, number, **more):
        paths = {"wav": "in.wav", "quantized_tokens": self.tokens(number), "reconstructed_wav": self.wav(number)}
        return {"key": f"r{number}", **{name: str(path) for name, path in paths.items()}, **more}

    def manifest(self):
        return Manifest.open(self.data_list, self.task, self.run_dir / "index")

    def open(self):
        return RunFolder.open(self.run_dir, self.settings, processes=ALONE)

    def attempt(self, *, lines=None, fail=(), samples_of=lambda line: 9000 + 1000 * line):
        """An attempt that does ``lines`` (all that are pending when None) and fails those of ``fail``."""
        with self.open() as folder, LedgerWriter(folder.ledger_path) as ledger:
            sink = FileSink(self.task, self.spec.info.sample_rate, self.info, record=ledger.append)
            manifest = self.manifest()
            status = read_ledger(self.run_dir, manifest).status
            for row in manifest.read(0, manifest.num_lines):
                if status[row.line] != RowStatus.PENDING if lines is None else row.line not in lines:
                    continue
                if isinstance(row, RowFailure) or row.line in fail:
                    stage = row.stage if isinstance(row, RowFailure) else "load"
                    ledger.append(LedgerEntry(row.line, row.digest, row.key, "failed", stage=stage, reason="bad"))
                    continue
                self.do(sink, row, samples_of(row.line))
        return self

    def do(self, sink, row: ManifestRow, num_samples):
        frames = self.spec.num_frames(num_samples)
        sizes = self.spec.info.codebook_sizes[:NUM_QUANTIZERS]
        generator = np.random.default_rng(row.line)
        codes = np.stack([generator.integers(0, size, frames) for size in sizes], axis=1).astype(np.uint16)
        samples = np.zeros(self.spec.num_output_samples(frames), np.float32) if self.task != "wav2token" else None
        if self.task == "token2wav":
            num_samples = len(samples)
        sink.write(TokenizedRow(row, codes, samples, num_samples))

    def append(self, *entries, attempt_file="000001-00007.jsonl"):
        """Ledger lines as another process would have left them."""
        with (self.run_dir / "ledger" / attempt_file).open("ab") as stream:
            for entry in entries:
                stream.write(ledger_line(entry))

    def entries(self):
        """All ledger lines, earliest file first."""
        files = sorted((self.run_dir / "ledger").iterdir())
        return [asdict(decode_entry(line)) for path in files for line in path.read_bytes().splitlines()]

    def entry(self, number):
        [entry] = [entry for entry in self.entries() if entry["line"] == number]
        return entry

    def verify(self, *more):
        words = ["--data_list", self.data_list, "--model_path", self.checkpoint, *more]
        return main(["verify", *map(str, words)])

    def problems(self):
        """(line, kind) of all that the last verification found."""
        lines = (self.run_dir / "verify.jsonl").read_text().splitlines()
        return [(problem["line"], problem["kind"]) for problem in map(json.loads, lines)]

    def finds(self, *expected):
        """Verify; exactly these (line, kind) must be found, and the exit status must agree."""
        assert self.verify() == (1 if any(kind != "duration" for _, kind in expected) else 0)
        assert sorted(self.problems(), key=str) == sorted(expected, key=str)
        return True


@pytest.fixture
def run(tmp_path, checkpoint):
    """Six rows, all done."""
    fake = FakeRun(tmp_path, checkpoint)
    write_manifest(fake.data_list, [fake.row(number) for number in range(6)])
    return fake.attempt()


class TestRight:
    def test_a_run_that_is_right_passes(self, run, capsys):
        assert run.verify() == 0
        out = capsys.readouterr().out
        assert "6 = 6 done + 0 failed + 0 pending" in out
        assert "everything holds" in out
        assert "12 files" in out
        assert run.problems() == []

    def test_failed_rows_need_no_outputs(self, tmp_path, checkpoint, capsys):
        fake = FakeRun(tmp_path, checkpoint)
        rows = [fake.row(0), b"no JSON", b"", fake.row(0), fake.row(4), fake.row(5)]
        write_manifest(fake.data_list, rows)
        fake.attempt(fail={4})
        assert fake.finds()
        assert "5 = 2 done + 3 failed + 0 pending" in capsys.readouterr().out

    @pytest.mark.parametrize("task", ["wav2token", "token2wav"])
    def test_tasks_with_one_output_check_that_one(self, tmp_path, checkpoint, task):
        fake = FakeRun(tmp_path, checkpoint, task)
        write_manifest(fake.data_list, [fake.row(number) for number in range(3)])
        fake.attempt()
        assert fake.finds()
        output, other = (fake.tokens(1), fake.wav(1)) if task == "wav2token" else (fake.wav(1), fake.tokens(1))
        assert not other.exists()
        output.unlink()
        assert fake.finds((2, "missing"))

    def test_several_processes_find_the_same(self, run):
        run.wav(2).unlink()
        run.part(".0123456789abcdef.part").touch()
        assert run.verify("--workers", 2) == 1
        assert run.problems() == [(3, "missing"), (None, "stray")]

    def test_a_folder_that_was_looked_at_can_be_resumed(self, run):
        run.tokens(0).unlink()
        run.verify()
        assert (read_ledger(run.run_dir, run.manifest()).status == RowStatus.DONE).all()


def rewrite(path, change):
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


class TestTokenFiles:
    @pytest.mark.parametrize(
        ("kind", "change"),
        [
            ("length", lambda d: d["quantized_tokens"].pop()),
            ("length", lambda d: d["quantized_tokens"].append([0] * NUM_QUANTIZERS)),
            ("content", lambda d: [frame.pop() for frame in d["quantized_tokens"]]),
            ("content", lambda d: d["quantized_tokens"][1].pop()),
            ("content", lambda d: d["quantized_tokens"][1].__setitem__(0, 32)),
            ("content", lambda d: d["quantized_tokens"][1].__setitem__(1, 16)),
            ("content", lambda d: d["quantized_tokens"][1].__setitem__(0, -1)),
            ("content", lambda d: d["quantized_tokens"][1].__setitem__(0, 1.0)),
            ("content", lambda d: d["quantized_tokens"][1].__setitem__(0, True)),
            ("content", lambda d: d["quantized_tokens"][1].__setitem__(0, "1")),
            ("content", lambda d: d["quantized_tokens"][1].__setitem__(0, 2**70)),
            ("content", lambda d: d["info"].update(key="r3")),
            ("content", lambda d: d["info"].update(num_samples=1)),
            ("content", lambda d: d["info"].update(num_frames=1)),
            ("content", lambda d: d["info"].update(num_quantizers=1)),
            ("content", lambda d: d["info"].update(fingerprint="0" * 32)),
            ("content", lambda d: d["info"].update(resampler="soxr")),
            ("content", lambda d: d["info"].pop("dtype")),
            ("unreadable", lambda d: d.pop("info")),
            ("unreadable", lambda d: d.update(quantized_tokens=None)),
        ],
    )
    def test_what_is_not_the_rows_own(self, run, kind, change):
        rewrite(run.tokens(2), change)
        assert run.finds((3, kind))

    @pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\0" * 500])
    def test_what_is_no_token_file(self, run, content):
        run.tokens(2).write_bytes(content)
        assert run.finds((3, "unreadable"))

    def test_files_of_two_rows_changed_places(self, run):
        first, second = run.tokens(1).read_bytes(), run.tokens(2).read_bytes()
        run.tokens(1).write_bytes(second)
        run.tokens(2).write_bytes(first)
        assert run.verify() == 1
        assert {line for line, _ in run.problems()} == {2, 3}

    def test_a_flipped_bit_is_found_wherever_the_file_is_not_free(self, run):
        """A bit of each byte. What may pass: another possible code, and the manifest's own fields."""
        good = run.tokens(0).read_bytes()
        document = json.loads(good)
        checked = {name: document["info"].pop(name) for name in [*run.info, "num_samples", "num_frames"]}
        end_of_codes, begin_of_checked = good.index(b"]]"), good.index(b'"codec"')
        begin_of_free = good.index(b'"wav"')
        passed = 0
        for place in range(len(good)):
            flipped = bytes([good[place] ^ 1 << place * 5 % 8])
            run.tokens(0).write_bytes(good[:place] + flipped + good[place + 1 :])
            try:
                check_token_file(
                    str(run.tokens(0)), run.form, key="r0", num_samples=checked["num_samples"],
                    num_frames=checked["num_frames"],
                )  # fmt: skip
            except CheckFailed:
                continue
            passed += 1
            is_code = place < end_of_codes and good[place : place + 1].isdigit()
            is_free = begin_of_free <= place < begin_of_checked
            assert is_code or is_free, (place, good[max(0, place - 10) : place + 10])
        assert 0 < passed < len(good) / 2


class TestWavFiles:
    @pytest.mark.parametrize(
        ("kind", "size"), [("unreadable", 0), ("unreadable", 20), ("unreadable", 43), ("length", 44), ("length", -1)]
    )
    def test_cut_short(self, run, kind, size):
        content = run.wav(4).read_bytes()
        run.wav(4).write_bytes(content[:size])
        assert run.finds((5, kind))

    @pytest.mark.parametrize("change", [-1, 1, 960])
    def test_whole_but_of_another_length(self, run, change):
        samples = (run.wav(4).stat().st_size - 44) // 2 + change
        run.wav(4).write_bytes(wav_bytes(np.zeros(samples, np.float32), 24000))
        assert run.finds((5, "length"))

    @pytest.mark.parametrize(
        ("place", "form", "value"),
        [(20, "<H", 3), (22, "<H", 2), (24, "<I", 16000), (34, "<H", 24), (4, "<I", 7)],
        ids=["format", "channels", "rate", "bits", "RIFF size"],
    )
    def test_another_header(self, run, place, form, value):
        content = bytearray(run.wav(4).read_bytes())
        struct.pack_into(form, content, place, value)
        run.wav(4).write_bytes(content)
        assert run.finds((5, "content"))

    def test_bytes_after_the_end(self, run):
        with run.wav(4).open("ab") as stream:
            stream.write(b"\0" * 2)
        assert run.finds((5, "content"))

    def test_an_unknown_chunk_before_the_audio_is_read_over(self, run, tmp_path):
        content = wav_bytes(np.zeros(100, np.float32), 24000)
        chunk = struct.pack("<4sI", b"LIST", 5) + b"12345\0"
        content = content[:36] + chunk + content[36:]
        content = content[:4] + struct.pack("<I", len(content) - 8) + content[8:]
        (tmp_path / "a.wav").write_bytes(content)
        check_audio_file(str(tmp_path / "a.wav"), run.form, 100)

    def test_reads_the_header_only(self, run, monkeypatch):
        read = []
        pread = os.pread
        monkeypatch.setattr(os, "pread", lambda *call: read.append(call[1]) or pread(*call))
        expected = run.spec.num_output_samples(run.spec.num_frames(14000))
        check_audio_file(str(run.wav(5)), run.form, expected)
        assert sum(read) <= 4096 < run.wav(5).stat().st_size


class TestContent:
    """What only the checksums tell: plain ``verify`` finds nothing wrong with it."""

    def test_a_changed_code(self, run):
        rewrite(run.tokens(2), lambda d: d["quantized_tokens"][1].__setitem__(0, d["quantized_tokens"][1][0] ^ 1))
        assert run.finds()
        assert run.verify("--content") == 1
        assert run.problems() == [(3, "changed")]

    def test_silenced_audio(self, run):
        content = run.wav(4).read_bytes()
        run.wav(4).write_bytes(content[:44] + b"\1" * (len(content) - 44))
        assert run.finds()
        assert run.verify("--content", "--workers", 2) == 1
        assert run.problems() == [(5, "changed")]
        assert run.verify("--content", "--repair") == 1
        run.attempt()
        assert run.verify("--content") == 0

    def test_a_run_that_is_right(self, run):
        assert run.verify("--content") == 0

    def test_entries_without_checksums_are_let_pass(self, run):
        [path] = (run.run_dir / "ledger").iterdir()
        entries = run.entries()
        path.write_bytes(b"".join(ledger_line({**entry, "checksums": {}}) for entry in entries))
        assert run.verify("--content") == 0


class TestPlaces:
    def test_deleted(self, run):
        run.tokens(0).unlink()
        run.wav(0).unlink()
        run.wav(3).unlink()
        assert run.finds((1, "missing"), (1, "missing"), (4, "missing"))

    def test_a_whole_folder_deleted(self, run):
        for path in run.part("").iterdir():
            path.unlink()
        run.part("").rmdir()
        assert run.finds(*[(line, "missing") for line in range(1, 7)] * 2)

    def test_what_is_no_file(self, run):
        run.wav(0).unlink()
        run.wav(0).mkdir()
        run.wav(1).unlink()
        os.mkfifo(run.wav(1))
        run.wav(2).unlink()
        run.wav(2).symlink_to(run.part("nowhere"))
        assert run.finds((1, "unreadable"), (2, "unreadable"), (3, "missing"))

    def test_temporaries_of_killed_processes(self, run):
        run.part(".0123456789abcdef.part").write_bytes(b"half")
        run.part(".other.part").touch()
        run.part("0123456789abcdef.part").touch()
        assert run.finds((None, "stray"))


class TestLedger:
    def test_rows_without_a_word_are_pending(self, tmp_path, checkpoint, capsys):
        fake = FakeRun(tmp_path, checkpoint)
        write_manifest(fake.data_list, [fake.row(0), fake.row(1), b"{}"])
        fake.attempt(lines={0})
        assert fake.finds((2, "pending"), (3, "pending"))
        assert "3 = 1 done + 0 failed + 2 pending" in capsys.readouterr().out

    def test_a_torn_line_leaves_its_row_pending(self, run, capsys):
        [path] = (run.run_dir / "ledger").iterdir()
        path.write_bytes(path.read_bytes()[:-20])
        assert run.finds((6, "pending"))
        assert "1 lines unreadable" in capsys.readouterr().out

    def test_the_same_twice_is_counted(self, run, capsys):
        run.append(run.entry(2), run.entry(3), run.entry(3))
        run.append(run.entry(0), attempt_file="000002-00000.jsonl")
        assert run.finds()
        assert "4 rows done again with the same result" in capsys.readouterr().out

    @pytest.mark.parametrize("attempt_file", ["000001-00007.jsonl", "000002-00000.jsonl"])
    @pytest.mark.parametrize("change", [{"num_samples": 11999}, {"frames": 11}])
    def test_done_with_two_lengths(self, run, attempt_file, change):
        run.append({**run.entry(3), **change}, attempt_file=attempt_file)
        assert run.verify() == 1
        assert (4, "ledger") in run.problems()
        assert {line for line, _ in run.problems()} == {4}

    @pytest.mark.parametrize("attempt_file", ["000001-00007.jsonl", "000002-00000.jsonl"])
    def test_failed_although_done(self, run, attempt_file):
        failed = {**run.entry(3), "status": "failed", "stage": "load", "reason": "no such file"}
        run.append(failed, attempt_file=attempt_file)
        assert run.finds((4, "ledger"))

    def test_done_after_it_had_failed(self, tmp_path, checkpoint):
        fake = FakeRun(tmp_path, checkpoint)
        write_manifest(fake.data_list, [fake.row(0), fake.row(1)])
        fake.attempt(fail={1})
        fake.attempt(lines={1})  # as --retry_failed does
        assert fake.finds()

    def test_lengths_that_the_codec_does_not_make(self, run):
        path = run.run_dir / "ledger" / "000001-00000.jsonl"
        entries = run.entries()
        entries[1]["frames"] += 1
        path.write_bytes(b"".join(map(ledger_line, entries)))
        assert run.finds((2, "ledger"))

    def test_audio_of_another_length_than_the_manifest_says_is_told(self, tmp_path, checkpoint, capsys):
        fake = FakeRun(tmp_path, checkpoint)
        seconds = [9000 / 24000, 100.0, 12000 / 24000]
        write_manifest(fake.data_list, [fake.row(n, duration=length) for n, length in enumerate(seconds)])
        fake.attempt()
        assert fake.finds((2, "duration"))
        assert "100.00 s by the manifest, 0.42 s by its audio" in capsys.readouterr().out


class TestRepair:
    def test_the_next_run_does_just_the_wrong_rows_again(self, run, capsys):
        run.wav(1).unlink()
        run.tokens(1).unlink()
        run.tokens(4).write_bytes(b"{")
        run.append({**run.entry(5), "frames": 99})
        good = {number: run.wav(number).stat().st_mtime_ns for number in (0, 2, 3)}
        assert run.verify("--repair") == 1
        assert "3 rows taken back" in capsys.readouterr().out
        redo = [entry for entry in run.entries() if entry["status"] == "redo"]
        assert [(entry["line"], entry["key"]) for entry in redo] == [(1, "r1"), (4, "r4"), (5, "r5")]
        assert run.finds((2, "pending"), (5, "pending"), (6, "pending"))
        run.attempt()
        assert run.finds()
        assert good == {number: run.wav(number).stat().st_mtime_ns for number in (0, 2, 3)}

    def test_rows_redone_may_have_another_length(self, run):
        run.wav(1).unlink()
        run.verify("--repair")
        run.attempt(samples_of=lambda line: 20000)
        assert run.finds()

    def test_a_row_that_failed_after_it_was_done_can_be_repaired(self, run):
        run.append({**run.entry(3), "status": "failed", "stage": "load", "reason": "x"})
        run.verify("--repair")
        assert run.finds((4, "pending"))
        run.attempt()
        assert run.finds()

    def test_pending_rows_and_strays_are_not_taken_back(self, tmp_path, checkpoint):
        fake = FakeRun(tmp_path, checkpoint)
        write_manifest(fake.data_list, [fake.row(0), fake.row(1)])
        fake.attempt(lines={0})
        fake.part(".0123456789abcdef.part").touch()
        assert fake.verify("--repair") == 1
        assert [entry["status"] for entry in fake.entries()] == ["done"]

    def test_not_while_a_job_is_at_work(self, run, monkeypatch, caplog):
        monkeypatch.setattr("batch_tokenizer.runtime.run_folder._LOCK_SECONDS", 0.0)
        run.wav(1).unlink()
        with RunFolder.open(run.run_dir, run.settings, processes=ALONE, num_shards=4, shard=2):
            assert run.verify("--repair") == 1
        assert "in use" in caplog.text
        assert all(entry["status"] == "done" for entry in run.entries())
        assert not (run.run_dir / "verify.jsonl").exists()


class TestArguments:
    def test_another_checkpoint_is_refused(self, run, tmp_path, caplog):
        other = write_mimo_checkpoint(tmp_path / "other", seed=1)
        assert main(["verify", "--data_list", str(run.data_list), "--model_path", str(other)]) == 2
        assert "--model_path" in caplog.text

    def test_another_task_is_refused(self, run, caplog):
        assert run.verify("--task", "wav2token") == 2
        assert run.verify("--task", "wav2token", "--run_dir", run.run_dir) == 2
        assert "is of a wav2token2wav run" in caplog.text

    def test_the_only_run_beside_the_manifest_is_found(self, run, caplog):
        assert run.verify() == 0
        run.run_dir.with_name("data.wav2token.run").mkdir()
        assert run.verify() == 2
        assert "choose with --task" in caplog.text
        assert run.verify("--task", run.task) == 0

    def test_a_named_run_knows_its_manifest(self, run, capsys):
        for folder in (run.run_dir, run.run_dir.parent):  # the second has the run folder in it, as outputs' folders do
            assert main(["verify", str(folder), "--model_path", str(run.checkpoint)]) == 0
            assert "6 = 6 done + 0 failed + 0 pending" in capsys.readouterr().out

    @pytest.mark.parametrize("words", [["--workers", "0"], ["--show", "-1"], ["--run_dir", "nowhere"]])
    def test_bad_values(self, run, words):
        assert run.verify(*words) == 2

    def test_a_folder_that_is_no_run_folder(self, run, tmp_path, caplog):
        (tmp_path / "empty").mkdir()
        assert run.verify("--run_dir", tmp_path / "empty") == 2
        assert list((tmp_path / "empty").iterdir()) == []

    def test_unknown_words(self, run, caplog):
        assert run.verify("--no_such_flag") == 2
        assert "unrecognized arguments: --no_such_flag" in caplog.text

    def test_show_limits_what_is_printed_not_what_is_found(self, run, capsys):
        for number in range(6):
            run.wav(number).unlink()
        assert run.verify("--show", 2) == 1
        out = capsys.readouterr().out
        assert "… and 4 more" in out
        assert out.count("no such file") == 2
        assert len(run.problems()) == 6
