"""``verify`` on runs to shards: every way in which a shard can be wrong is found, and one repair puts it right."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from batch_tokenizer.cli import main
from batch_tokenizer.codecs.checkpoint import Checkpoint
from batch_tokenizer.codecs.registry import find_family
from batch_tokenizer.config import RunConfig
from batch_tokenizer.manifest.manifest import Manifest
from batch_tokenizer.records import ManifestRow, RunError, TokenizedRow
from batch_tokenizer.runs.checks import CheckFailed, check_audio
from batch_tokenizer.runs.finished_run import FinishedRun
from batch_tokenizer.runs.indexed_rows import stored_rows
from batch_tokenizer.runtime.ledger import RowStatus, read_ledger
from batch_tokenizer.runtime.ledger_lines import decode_entry, encode_shard, read_shard_lines
from batch_tokenizer.runtime.processes import ProcessGroup
from batch_tokenizer.runtime.run_folder import RunFolder
from batch_tokenizer.writers.open import audio_encoder, open_sink, recover_shards, run_settings
from tests.support.checkpoints import write_mimo_checkpoint
from tests.support.shards import read_shards

ALONE = ProcessGroup.from_environment({})
NUM_ROWS, NUM_QUANTIZERS = 6, 3


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mimo_checkpoint(tmp_path_factory.mktemp("model"))


class ShardRun:
    """A run of three shards of two rows, made without a model."""

    def __init__(self, folder: Path, checkpoint: Path, sink: str) -> None:
        self.folder, self.checkpoint = folder, checkpoint
        opened = Checkpoint.open(str(checkpoint))
        self.spec = find_family(opened).open_spec(opened)
        info = self.spec.info
        self.info = {
            "codec": info.family, "fingerprint": info.fingerprint, "sample_rate": info.sample_rate,
            "frame_rate": info.frame_rate, "codebook_sizes": list(info.codebook_sizes[:NUM_QUANTIZERS]),
        }  # fmt: skip
        rows = [{"key": f"r.{number}", "wav": "in.wav"} for number in range(NUM_ROWS)]
        self.data_list = folder / "data.jsonl"
        self.data_list.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.config = RunConfig(
            data_list=self.data_list,
            task="wav2token" if sink == "jsonl" else "wav2token2wav",
            sink=sink,  # type: ignore[arg-type]
            output_dir=str(folder / "out"),
            audio_format="flac",
        )
        self.attempt(range(NUM_ROWS))

    @property
    def shards(self) -> list[Path]:
        return sorted((self.folder / "out").glob(f"{self.config.task}-*"))

    @property
    def run_dir(self) -> Path:
        return self.config.default_run_dir()

    def attempt(self, wanted: range, per_shard: int = 2) -> None:
        """An attempt that does those rows that are pending."""
        settings = run_settings(self.config, NUM_QUANTIZERS, self.info)
        with RunFolder.open(self.run_dir, settings, processes=ALONE) as folder:
            recover_shards(self.config, folder)
            manifest = Manifest.open(self.data_list, self.config.task, folder.index_dir, sink=self.config.sink)
            pending = read_ledger(folder.path, manifest).status == RowStatus.PENDING
            rate = self.spec.info.output_sample_rate
            with open_sink(self.config, folder, self.info, NUM_QUANTIZERS, rate, lambda entry: None) as sink:
                sink._most_rows = per_shard  # type: ignore[attr-defined]
                for row in manifest.read(0, manifest.num_lines):
                    if row.line in wanted and pending[row.line]:
                        assert isinstance(row, ManifestRow)
                        sink.write(self.result(row))

    def result(self, row: ManifestRow) -> TokenizedRow:
        num_samples = 9000 + 1000 * row.line
        frames = self.spec.num_frames(num_samples)
        codes = np.random.default_rng(row.line).integers(0, 8, (frames, NUM_QUANTIZERS)).astype(np.uint16)
        return TokenizedRow(row, codes, np.zeros(self.spec.num_output_samples(frames), np.float32), num_samples)

    def verify(self, *more: str) -> set[tuple[int | None, str]]:
        """(line, kind) of what is found."""
        place = ["--data_list", str(self.data_list), "--output_dir", str(self.config.output_dir)]
        words = [*place, "--model_path", str(self.checkpoint), *more]
        status = main(["verify", *words])
        found = [json.loads(line) for line in (self.run_dir / "verify.jsonl").read_text().splitlines()]
        assert status == (1 if found else 0)
        return {(problem["line"], problem["kind"]) for problem in found}

    def repair(self) -> None:
        """Repair, run again, and look: all must be well, with every row in one shard."""
        self.verify("--repair")
        self.attempt(range(NUM_ROWS))
        assert self.verify() == set()
        assert sorted(read_shards(self.folder / "out")) == [f"r.{number}" for number in range(NUM_ROWS)]


@pytest.fixture(params=["tar", "parquet", "jsonl"])
def run(request: pytest.FixtureRequest, tmp_path: Path, checkpoint: Path) -> ShardRun:
    return ShardRun(tmp_path, checkpoint, request.param)


def test_a_good_run(run: ShardRun, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.verify() == set()
    assert "checked    3 files" in capsys.readouterr().out


def test_a_shard_that_is_gone(run: ShardRun) -> None:
    run.shards[1].unlink()
    assert run.verify() == {(None, "missing")}
    run.repair()


def test_a_shard_of_other_rows(run: ShardRun) -> None:
    shutil.copy(run.shards[0], run.shards[2])
    assert run.verify() == {(5, "content"), (6, "content")}
    run.repair()


def test_a_shard_that_is_cut_short(run: ShardRun) -> None:
    content = run.shards[1].read_bytes()
    run.shards[1].write_bytes(content[: len(content) // 2])
    assert (None, "unreadable") in run.verify()
    run.repair()


def test_a_flipped_bit_in_the_codes(run: ShardRun) -> None:
    """Parquet's pages have checksums; in a tar, only what makes a code impossible can be seen."""
    content = bytearray(run.shards[0].read_bytes())
    if run.config.sink == "tar":
        place = content.index(b"\x93NUMPY") + 129
        content[place] |= 0x80
    else:
        content[200] ^= 0x40
    run.shards[0].write_bytes(content)
    assert {kind for _, kind in run.verify()} <= {"content", "unreadable"}
    assert run.verify()
    run.repair()


def test_content_that_only_its_checksum_tells(run: ShardRun) -> None:
    """A possible code, and a bit of the audio; parquet's own checksums find both without being asked."""
    assert run.verify("--content") == set()
    content = bytearray(run.shards[0].read_bytes())
    if run.config.sink == "parquet":  # which has the bytes in its statistics as well
        for found in re.finditer(b"fLaC", bytes(content)):
            content[found.start() + 200] ^= 1
    if run.config.sink == "tar":
        content[content.index(b"fLaC") + 200] ^= 1
        content[content.index(b"\x93NUMPY") + 128] ^= 1
    if run.config.sink == "jsonl":
        content[content.index(b"[[") + 2] ^= 1
    run.shards[0].write_bytes(content)
    if run.config.sink != "parquet":
        assert run.verify() == set()
        assert run.verify("--content") == {(1, "changed")}
    else:
        assert run.verify("--content") == {(None, "unreadable")}
    run.verify("--content", "--repair")
    run.attempt(range(NUM_ROWS))
    assert run.verify("--content") == set()


def test_a_row_in_two_shards(run: ShardRun) -> None:
    first, second = sorted((run.run_dir / "ledger").glob("*.000*.jsonl"))[:2]
    second.write_bytes(first.read_bytes())
    shutil.copy(run.shards[0], run.shards[1])
    assert run.verify() == {(1, "twice"), (2, "twice"), (3, "pending"), (4, "pending")}
    run.repair()


def test_rows_are_known_by_their_digest_when_the_manifest_grows_or_is_reordered(run: ShardRun) -> None:
    """Lines of the manifest have moved between two attempts; nothing is wrong, and a repair removes nothing."""
    rows = run.data_list.read_text().splitlines(keepends=True)
    new = [json.dumps({"key": f"new.{number}", "wav": "in.wav"}) + "\n" for number in range(3)]
    run.data_list.write_text("".join([*new[:2], *reversed(rows), new[2]]))
    run.attempt(range(NUM_ROWS + 3))
    assert run.verify() == set()
    before = {path: path.read_bytes() for path in run.shards}
    assert run.verify("--repair") == set()
    assert {path: path.read_bytes() for path in run.shards} == before
    assert len(read_shards(run.folder / "out")) == NUM_ROWS + 3


def test_rows_that_the_manifest_no_longer_has_are_let_alone(run: ShardRun) -> None:
    rows = run.data_list.read_text().splitlines(keepends=True)
    run.data_list.write_text("".join(rows[1:]))
    before = {path: path.read_bytes() for path in run.shards}
    assert run.verify("--repair") == set()
    assert {path: path.read_bytes() for path in run.shards} == before


def test_orphans_and_leftovers(run: ShardRun) -> None:
    shutil.copy(run.shards[0], run.shards[0].with_name(run.shards[0].name.replace("-000000.", "-000099.")))
    run.shards[0].with_name(f".{run.shards[0].name}.part").write_bytes(b"half")
    assert run.verify() == {(None, "orphan")}
    run.repair()


def test_a_ledger_that_contradicts_the_arithmetic(run: ShardRun) -> None:
    path = sorted((run.run_dir / "ledger").glob("*.000*.jsonl"))[1]
    entries = [decode_entry(line) for line in read_shard_lines(path) or []]
    path.write_bytes(encode_shard([replace(entries[0], num_samples=31000), *entries[1:]]))
    assert {(3, "ledger"), (3, "content")} <= run.verify()
    run.repair()


flac = audio_encoder("flac")


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"RIFF" + bytes(60), "unreadable"),
        (flac(np.zeros(100, np.float32), 24000)[:20], "unreadable"),
        (flac(np.zeros(99, np.float32), 24000), "length"),
        (flac(np.zeros(100, np.float32), 16000), "content"),
    ],
)
def test_flac_is_looked_at(content: bytes, kind: str) -> None:
    check_audio("flac", flac(np.zeros(100, np.float32), 24000), 999, sample_rate=24000, num_samples=100)
    with pytest.raises(CheckFailed) as raised:
        check_audio("flac", content, len(content), sample_rate=24000, num_samples=100)
    assert raised.value.kind == kind


def test_outputs_stay_where_they_are(run: ShardRun) -> None:
    for change in ({"sink": "json"}, {"output_dir": "elsewhere"}, {"audio_format": "wav"}):
        settings = run_settings(replace(run.config, **change), NUM_QUANTIZERS, run.info)  # type: ignore[arg-type]
        with pytest.raises(RunError, match="of a run with other settings"):
            RunFolder.open(run.run_dir, settings, processes=ALONE)


def test_a_run_folder_is_a_source_of_what_is_done(run: ShardRun, capsys: pytest.CaptureFixture[str]) -> None:
    """A shard that the ledger does not name is none of the run's."""
    shutil.copy(run.shards[0], run.shards[0].with_name(run.shards[0].name.replace("-000000.", "-000099.")))
    assert [row.key for row in stored_rows(str(run.run_dir))] == [f"r.{number}" for number in range(NUM_ROWS)]
    assert [row.key for row in stored_rows(str(run.run_dir), "r.3")] == ["r.3"]
    assert main(["show", "r.3", "--in", str(run.run_dir)]) == 0
    assert "12,000 samples at 24000 Hz" in capsys.readouterr().out


def test_a_wrong_shard_with_rows_that_the_manifest_lost_is_kept(
    run: ShardRun, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = run.data_list.read_text().splitlines(keepends=True)
    run.data_list.write_text("".join(lines[:2] + lines[3:]))  # without r.2, whose shard has r.3 as well
    shard = run.shards[1]
    ledger = next(path for path in run.run_dir.rglob("*") if path.is_file() and b'"r.3"' in path.read_bytes())
    before = shard.read_bytes(), ledger.read_bytes()
    shard.write_bytes(before[0][: len(before[0]) // 2])  # what makes it wrong
    damaged = shard.read_bytes()
    run.verify("--repair")
    out = capsys.readouterr().out
    assert "0 rows taken back" in out
    assert re.search(r"kept +1 shards, as 1 rows in them are no longer in the manifest and would be lost \(r\.2\)", out)
    assert (shard.read_bytes(), ledger.read_bytes()) == (damaged, before[1])
    shard.unlink()  # given up: nothing more can be lost
    run.verify("--repair")
    assert "2 rows taken back" in capsys.readouterr().out
    run.attempt(range(NUM_ROWS))
    assert run.verify() == set()
    assert sorted(read_shards(run.folder / "out")) == ["r.0", "r.1", "r.3", "r.4", "r.5"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("task", ["wav2token"]), ("num_quantizers", True), ("num_quantizers", 1e30), ("sink", []), ("sample_rate", "x"),
        ("frame_rate", None), ("fingerprint", 7), ("codebook_sizes", {}), ("output_dir", 3), ("output_dir", None),
    ],
)  # fmt: skip
def test_a_run_json_of_another_shape_is_named(tmp_path: Path, checkpoint: Path, name: str, value: object) -> None:
    run = ShardRun(tmp_path, checkpoint, "tar")
    path = run.run_dir / "run.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "settings": {**content["settings"], name: value}}))
    with pytest.raises(RunError, match=rf"run\.json is damaged: it.* {name}|output_dir"):
        FinishedRun.open(run.run_dir)
