"""``batch_tokenizer verify``: proves that a run lost nothing, did nothing twice, and left outputs that are what they
should be.

What enters is the manifest, the run's ledger and the files that its rows name. What leaves is the verdict, printed, and
``verify.jsonl`` in the run folder, a line for everything that is not right. Nothing is believed because the run says
so: the lengths that files must have are worked out again from the codec's frame arithmetic. Codes are checked to be
possible, not recomputed, and of a wav file only the header and the size are read.

With ``--repair``, rows whose outputs are wrong are taken back in the ledger, so that the next run does just those.
Files are checked by processes that import neither torch nor a codec; the memory used depends on the number of output
folders, and grows by some twenty bytes a row.
"""

from __future__ import annotations

import argparse
import logging
import math
import multiprocessing
import os
import re
import stat
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import orjson
from tqdm import tqdm

from batch_tokenizer.codecs.base import CodecSpec
from batch_tokenizer.commands.status import seems_at_work
from batch_tokenizer.commands.verify_shards import (
    AUDIO_HEADER_BYTES,
    Places,
    Shard,
    ShardChecker,
    ShardReport,
    Wrong,
    check_audio,
    check_codes,
    check_info,
    orphans,
    shards_of_ledger,
    take_back,
)
from batch_tokenizer.config import OUTPUT_SETTINGS, RunConfig, add_options
from batch_tokenizer.data.token_files import ANY_CODEBOOKS, take_apart
from batch_tokenizer.manifest.manifest import Manifest
from batch_tokenizer.records import SHARD_SINKS, TASKS, LedgerEntry, ManifestRow, RowError, RunError, Task
from batch_tokenizer.runs.source import find_manifest
from batch_tokenizer.runtime.ledger import LedgerState, LedgerWriter, RowStatus, matched_entries, read_ledger
from batch_tokenizer.runtime.processes import ProcessGroup
from batch_tokenizer.runtime.run_folder import RunFolder, read_settings
from batch_tokenizer.runtime.shard_ledger import recover
from batch_tokenizer.storage.names import is_url
from batch_tokenizer.storage.opening import opened
from batch_tokenizer.writers.shard_folder import shard_folder

log = logging.getLogger(__name__)

#: What may be wrong, in the order in which it is told.
KINDS: Mapping[str, str] = {
    "pending": "rows neither done nor failed",
    "ledger": "rows of which the ledger contradicts itself or the codec's arithmetic",
    "missing": "outputs that are not there",
    "unreadable": "outputs that cannot be read",
    "length": "outputs of another length than their row's audio",
    "content": "outputs with content that this run does not write",
    "twice": "rows in more than one place",
    "orphan": "files in the folder of shards that no ledger file names",
    "stray": "temporary files in output folders",
}

#: Told, but not held against the run: the manifest's durations are often estimates.
DURATION = "duration"

#: Seconds, and share of its length, by which a row's audio may differ from the manifest's duration.
_DURATION_SECONDS, _DURATION_SHARE = 0.5, 0.02

_CHUNK_LINES = 256
_LEAST_LINES_FOR_PROCESSES = 4 * _CHUNK_LINES
#: Settings of a run that its outputs do not name.
_NOT_IN_INFO = ("task", "num_quantizers", "segment_samples", *OUTPUT_SETTINGS)

_TEMPORARY = re.compile(r"\.[0-9a-f]{16}\.part")


# --------------------------------------------------------------------------------------------------------------- files


@contextmanager
def _regular_file(path: str) -> Iterator[tuple[int, int]]:
    """A descriptor and the size of a regular file; whatever the system has against reading it is ``Wrong``."""
    if is_url(path):
        try:
            with opened(path, "an output") as place:
                yield place
        except RowError as error:
            raise Wrong("missing" if "no such file" in error.reason else "unreadable", error.reason) from error
        return
    try:
        # Without waiting for a writer, should it be a pipe.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise Wrong("unreadable", "is not a regular file")
            yield descriptor, status.st_size
        finally:
            os.close(descriptor)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise Wrong("missing", "no such file") from error
    except OSError as error:
        raise Wrong("unreadable", f"cannot be read: {error.strerror}") from error


def check_audio_file(path: str, audio_format: str, *, sample_rate: int, num_samples: int) -> None:
    """Whether ``path`` is such a file, by its header and its size; see ``check_audio``.

    Raises:
        Wrong: it is not.
    """
    with _regular_file(path) as (descriptor, size):
        head = os.pread(descriptor, AUDIO_HEADER_BYTES, 0)
    check_audio(audio_format, head, size, sample_rate=sample_rate, num_samples=num_samples)


def check_tokens(
    path: str,
    *,
    key: str,
    num_samples: int,
    num_frames: int,
    codebook_sizes: tuple[int, ...],
    settings: Mapping[str, Any],
) -> None:
    """Whether ``path`` is a token file with ``num_frames`` frames of one code for each of ``codebook_sizes``.

    Args:
        key, num_samples: that its ``info`` must name.
        settings: what else its ``info`` must say.

    Raises:
        Wrong: it is not.
    """
    with _regular_file(path) as (descriptor, size), open(descriptor, "rb", closefd=False) as stream:
        content = stream.read()
    try:
        raw, info = take_apart(content, "")
    except RowError as error:
        raise Wrong("unreadable", f"{error.reason[2:]} ({size} bytes)") from error
    if not isinstance(info, Mapping):
        raise Wrong("unreadable", "tokens without info")
    try:
        codes = raw.check("", ANY_CODEBOOKS)
    except RowError as error:
        raise Wrong("content", error.reason[2:]) from error
    check_codes(codes, codebook_sizes, num_samples=num_samples, num_frames=num_frames)
    own = {"key": key, "num_samples": num_samples, "num_frames": num_frames, "num_quantizers": len(codebook_sizes)}
    check_info(info, {**settings, **own})


# -------------------------------------------------------------------------------------------------------------- ledger


@dataclass(frozen=True, slots=True)
class LedgerAudit:
    """Whether the ledger's entries of one row say the same.

    Attributes:
        contradicts: bool (num_lines,), rows that are done with several lengths, or failed although they were done.
        num_repeated: further entries of rows that are done, which say the same as the first.
    """

    contradicts: npt.NDArray[np.bool_]
    num_repeated: int


def audit_ledger(run_dir: Path, manifest: Manifest, state: LedgerState) -> LedgerAudit:
    """Compare all entries of each row. A failure that a later attempt made good contradicts nothing, and neither does
    what was taken back.

    Raises:
        RunError: the ledger cannot be read.
    """
    taken_back = np.zeros(manifest.num_lines, np.int32)
    for entries in matched_entries(run_dir, manifest, "redo"):
        taken_back[entries.lines] = entries.attempt
    contradicts = np.zeros(manifest.num_lines, np.bool_)
    first_done = np.full(manifest.num_lines, -1, np.int32)
    num_done = 0
    for entries in matched_entries(run_dir, manifest, "done"):
        valid = entries.attempt >= taken_back[entries.lines]
        lines = entries.lines[valid]
        num_done += len(lines)
        unseen = lines[first_done[lines] < 0]
        first_done[unseen] = entries.attempt
        other = (entries.num_samples[valid] != state.num_samples[lines]) | (
            entries.frames[valid] != state.frames[lines]
        )
        contradicts[lines[other]] = True
    for entries in matched_entries(run_dir, manifest, "failed"):
        lines = entries.lines[entries.attempt >= taken_back[entries.lines]]
        after_done = (first_done[lines] >= 0) & (entries.attempt >= first_done[lines])
        contradicts[lines[after_done]] = True
    return LedgerAudit(contradicts, num_done - int(np.count_nonzero(first_done >= 0)))


# ---------------------------------------------------------------------------------------------------------------- rows


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is not right.

    Attributes:
        line: of the manifest, from 1; None where it belongs to no row. So is ``key``, also where a line has none.
        kind: one of ``KINDS``, or ``DURATION``.
        path: the file, if it is about one.
    """

    line: int | None
    key: str | None
    kind: str
    path: str | None
    what: str

    def __str__(self) -> str:
        place = [] if self.line is None else [f"line {self.line}, {self.key or 'without key'}"]
        return ": ".join([*place, *([] if self.path is None else [self.path]), self.what])


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some lines of the manifest and what their files must be; arrays have one element a line.

    Attributes:
        status: of ``RowStatus``.
        num_samples: input samples by the ledger.
        frames: token frames by the codec's arithmetic.
        output_samples: samples of a decoded wav file, likewise.
        contradicts: 1 where the ledger contradicts itself, 2 where it contradicts the arithmetic, else 0.
    """

    first_line: int
    status: npt.NDArray[np.uint8]
    num_samples: npt.NDArray[np.int64]
    frames: npt.NDArray[np.int64]
    output_samples: npt.NDArray[np.int64]
    contradicts: npt.NDArray[np.uint8]


@dataclass(slots=True)
class ChunkReport:
    """What was found in a chunk.

    Attributes:
        num_lines: how long the chunk was.
        num_files: files that were looked at.
        wrong_rows: (line from 0, key) of rows whose outputs or entries are wrong.
        folders: in which the rows' outputs lie.
    """

    num_lines: int
    num_files: int = 0
    problems: list[Problem] = field(default_factory=list)
    wrong_rows: list[tuple[int, str]] = field(default_factory=list)
    folders: set[str] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class Checker:
    """Checks the files of rows. Picklable, without codec.

    Attributes:
        sample_rate, output_sample_rate: Hz, of the audio that was encoded, and of what was decoded.
        codebook_sizes: of the codebooks that the run used.
        settings: that every token file of the run must name.
    """

    manifest: Manifest
    sample_rate: int
    output_sample_rate: int
    audio_format: str
    codebook_sizes: tuple[int, ...]
    settings: Mapping[str, Any]

    def check(self, chunk: Chunk) -> ChunkReport:
        """Look at every row of the chunk.

        Raises:
            RunError: the manifest changes or cannot be read.
        """
        report = ChunkReport(len(chunk.status))
        last_line = chunk.first_line + len(chunk.status)
        for row in self.manifest.read(chunk.first_line, last_line):
            number = row.line - chunk.first_line
            status = chunk.status[number]
            if status == RowStatus.PENDING:
                report.problems.append(Problem(row.line + 1, row.key, "pending", None, "neither done nor failed"))
            if not isinstance(row, ManifestRow):
                continue
            outputs = [str(row.fields[name]) for name in self.manifest.form.outputs]
            report.folders.update(os.path.dirname(path) for path in outputs)
            before = len(report.problems)
            if chunk.contradicts[number] == 1:
                what = "the ledger's entries disagree"
                report.problems.append(Problem(row.line + 1, row.key, "ledger", None, what))
            if status == RowStatus.DONE:
                if chunk.contradicts[number] == 2:
                    what = f"{chunk.num_samples[number]} samples do not make the frames that the ledger says"
                    report.problems.append(Problem(row.line + 1, row.key, "ledger", None, what))
                report.problems += self._check_outputs(row, chunk, number)
                report.num_files += len(outputs)
            if len(report.problems) > before:
                report.wrong_rows.append((row.line, row.key))
            if status == RowStatus.DONE:
                report.problems += self._compare_duration(row, int(chunk.num_samples[number]))
        return report

    def _check_outputs(self, row: ManifestRow, chunk: Chunk, number: int) -> Iterator[Problem]:
        for name in self.manifest.form.outputs:
            path = str(row.fields[name])
            try:
                if name == "reconstructed_wav":
                    rate = self.output_sample_rate
                    check_audio_file(
                        path, self.audio_format, sample_rate=rate, num_samples=int(chunk.output_samples[number])
                    )
                else:
                    check_tokens(
                        path,
                        key=row.key,
                        num_samples=int(chunk.num_samples[number]),
                        num_frames=int(chunk.frames[number]),
                        codebook_sizes=self.codebook_sizes,
                        settings=self.settings,
                    )
            except Wrong as wrong:
                yield Problem(row.line + 1, row.key, wrong.kind, path, wrong.what)

    def _compare_duration(self, row: ManifestRow, num_samples: int) -> Iterator[Problem]:
        told, found = float(self.manifest.durations[row.line]), num_samples / self.sample_rate
        if not math.isnan(told) and abs(told - found) > max(_DURATION_SECONDS, _DURATION_SHARE * found):
            what = f"duration {told:.2f} s by the manifest, {found:.2f} s by its audio"
            yield Problem(row.line + 1, row.key, DURATION, None, what)

    def find_strays(self, folder: str) -> list[Problem]:
        """Temporary files of the publishing in a folder, which only a killed process leaves."""
        try:
            with os.scandir(folder or ".") as entries:
                strays = sorted(entry.path for entry in entries if _TEMPORARY.fullmatch(entry.name))
        except (FileNotFoundError, NotADirectoryError):
            return []  # nothing lies in it, which has been told file by file
        except OSError as error:
            what = f"cannot be searched for temporary files: {error.strerror}"
            return [Problem(None, None, "unreadable", folder, what)]
        what = "left by a killed process; remove it unless a run is writing there"
        return [Problem(None, None, "stray", path, what) for path in strays]


_checker: Checker


def _start_process(checker: Checker) -> None:
    global _checker
    _checker = checker


def _check(chunk: Chunk) -> ChunkReport:
    return _checker.check(chunk)


def _find_strays(folder: str) -> list[Problem]:
    return _checker.find_strays(folder)


# ----------------------------------------------------------------------------------------------------------------- run


@dataclass(slots=True)
class Findings:
    """Collects problems: writes all, keeps the first of each kind for the printed report."""

    stream: IO[bytes]
    examples_kept: int
    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[Problem]] = field(default_factory=dict)

    def add(self, problem: Problem) -> None:
        """Take in one."""
        self.counts[problem.kind] += 1
        examples = self.examples.setdefault(problem.kind, [])
        if len(examples) < self.examples_kept:
            examples.append(problem)
        fields = {name: getattr(problem, name) for name in ("line", "key", "kind", "path", "what")}
        try:
            self.stream.write(orjson.dumps(fields, option=orjson.OPT_APPEND_NEWLINE))
        except orjson.JSONEncodeError:  # a path that is not UTF-8
            readable = {name: ascii(value) if isinstance(value, str) else value for name, value in fields.items()}
            self.stream.write(orjson.dumps(readable, option=orjson.OPT_APPEND_NEWLINE))

    @property
    def num_wrong(self) -> int:
        """Problems that are held against the run."""
        return sum(count for kind, count in self.counts.items() if kind != DURATION)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    add = parser.add_argument
    add_options(parser, "data_list")
    add("--task", choices=TASKS, help="of the run, where several ran on this manifest")
    add("--model_path", help="the checkpoint that the run used; the bundled default when absent")
    add("--run_dir", type=Path, help="the run folder; looked for beside the manifest when absent")
    add("--workers", type=int, help="processes that check files; one a core when absent, more help on network disks")
    add("--repair", action="store_true", help="take rows with wrong outputs back, for the next run to do again")
    add("--show", type=int, default=10, help="examples printed of each kind of trouble (%(default)s)")


def main(arguments: argparse.Namespace) -> int:
    """Verifies a run. Returns 0 if everything holds, otherwise 1, also after a repair.

    Raises:
        RunError: there is nothing that could be verified, or not with these arguments.
    """
    for flag, value, least in (("workers", arguments.workers, 1), ("show", arguments.show, 0)):
        if value is not None and value < least:
            raise RunError(f"--{flag} {value}: must be at least {least}")
    run_dir = find_run_dir(arguments.data_list, arguments.task, arguments.run_dir)
    settings = read_settings(run_dir)
    if settings is None:
        raise RunError(f"{run_dir} has no run.json, so it is no run folder")
    task, num_quantizers = settings.get("task"), settings.get("num_quantizers")
    if task not in TASKS or not isinstance(num_quantizers, int):
        raise RunError(f"{run_dir / 'run.json'} is damaged: it names no task or no num_quantizers")
    if arguments.task not in (None, task):
        raise RunError(f"--task {arguments.task}: run folder {run_dir} is of a {task} run")
    spec = _open_spec(arguments.model_path, settings, run_dir)

    with ExitStack() as stack:
        folder = ledger = None
        if arguments.repair:
            # With the lock of a job of one shard no other job can start, and none can be at work.
            alone = ProcessGroup.from_environment({})
            folder = stack.enter_context(RunFolder.open(run_dir, settings, processes=alone))
            ledger = stack.enter_context(LedgerWriter(folder.ledger_path))
        else:
            if seems_at_work(run_dir):
                log.warning("a job seems to be at work on %s: what it has not done yet will be found wanting", run_dir)
        sink = settings.get("sink", "json")
        manifest = Manifest.open(find_manifest(run_dir, arguments.data_list), task, run_dir / "index", sink=sink)
        verification = Verification(run_dir, manifest, spec, settings, folder, ledger)
        return verification.run(workers=arguments.workers, show=arguments.show)


def find_run_dir(data_list: str | Path, task: Task | None, run_dir: Path | None) -> Path:
    """The run folder that was named, or the only one beside the manifest.

    Raises:
        RunError: there is none, or several.
    """
    if run_dir is not None:
        if not run_dir.is_dir():
            raise RunError(f"run folder {run_dir} does not exist")
        return run_dir
    tasks = TASKS if task is None else (task,)
    candidates = [RunConfig(data_list=data_list, task=name).default_run_dir() for name in tasks]
    there = [folder for folder in candidates if folder.is_dir()]
    if len(there) == 1:
        return there[0]
    if there:
        raise RunError(f"several runs beside {data_list} ({', '.join(map(str, there))}): choose with --task")
    raise RunError(f"no run folder beside {data_list} ({', '.join(map(str, candidates))}): name it with --run_dir")


def _open_spec(model_path: str | None, settings: Mapping[str, Any], run_dir: Path) -> CodecSpec:
    # Imported here, as this takes torch, which the processes that check files do not need.
    from batch_tokenizer.codecs.checkpoint import Checkpoint
    from batch_tokenizer.codecs.registry import find_family

    checkpoint = Checkpoint.open(model_path)
    spec = find_family(checkpoint).open_spec(checkpoint)
    if settings.get("fingerprint") != spec.info.fingerprint:
        raise RunError(
            f"run folder {run_dir} is of another checkpoint (fingerprint {settings.get('fingerprint')}) than "
            f"{checkpoint.folder} ({spec.info.fingerprint}): name the run's own with --model_path"
        )
    return spec


@dataclass(slots=True)
class Verification:
    """One look at a run.

    Attributes:
        folder, ledger: open for repairing; None to look only.
    """

    run_dir: Path
    manifest: Manifest
    spec: CodecSpec
    settings: Mapping[str, Any]
    folder: RunFolder | None
    ledger: LedgerWriter | None
    num_checked: int = 0
    num_taken_back: int = 0

    def run(self, *, workers: int | None, show: int) -> int:
        """Look, print what was found, repair if that was asked for. Returns the exit status.

        Raises:
            RunError: something could not be read or written.
        """
        began = time.monotonic()
        run_dir, manifest = self.run_dir, self.manifest
        state = read_ledger(run_dir, manifest)
        audit = audit_ledger(run_dir, manifest, state)
        path = run_dir / "verify.jsonl"
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with aside.open("wb") as stream, _processes(self._checker(), manifest, workers) as processes:
                findings = Findings(stream, show)
                wrong_lines = self._look_at_rows(processes, state, audit, findings)
                if self.settings.get("sink") in SHARD_SINKS:
                    self._look_at_shards(processes, wrong_lines, findings)
            aside.replace(path)
        except OSError as error:
            raise RunError(f"{path} cannot be written: {error.strerror}", exit_code=1) from error
        finally:
            aside.unlink(missing_ok=True)

        seconds = time.monotonic() - began
        _print_report(run_dir, manifest, state, audit, findings)
        print(f"checked    {self.num_checked:,} files in {seconds:.1f} s, {len(manifest) / seconds:,.0f} rows/s")
        if not findings.num_wrong:
            print("everything holds")
            return 0
        print(f"NOT RIGHT  {findings.num_wrong:,} findings, all of them in {path}")
        if self.folder is not None:
            print(f"repair     {self.num_taken_back:,} rows taken back: start the run again, and it does just those")
        elif findings.counts.keys() - {"pending", "stray", "orphan", DURATION}:
            print("           --repair takes the rows with wrong outputs back, so that the next run does them again")
        return 1

    def _checker(self) -> Checker:
        info = self.spec.info
        return Checker(
            self.manifest,
            info.sample_rate,
            info.output_sample_rate,
            self.settings.get("audio_format", "wav"),
            info.codebook_sizes[: self.settings["num_quantizers"]],
            {name: value for name, value in self.settings.items() if name not in _NOT_IN_INFO},
        )

    def _look_at_rows(
        self, processes: _Processes, state: LedgerState, audit: LedgerAudit, findings: Findings
    ) -> set[int]:
        """What the ledger and the rows' own files say; returns the lines that are wrong."""
        folders: set[str] = set()
        wrong_lines: set[int] = set()
        # Rows of shards are taken back with their whole shard.
        ledger = None if self.settings.get("sink") in SHARD_SINKS else self.ledger
        segment_samples = self.settings.get("segment_samples")
        with _progress_bar(len(self.manifest)) as bar:
            for report in processes.map(_check, _chunks(self.manifest, self.spec, state, audit, segment_samples)):
                for problem in report.problems:
                    findings.add(problem)
                wrong_lines.update(line for line, _ in report.wrong_rows)
                if ledger is not None:
                    for line, key in report.wrong_rows:
                        ledger.append(LedgerEntry(line, f"{int(self.manifest.digests[line]):016x}", key, "redo"))
                    self.num_taken_back += len(report.wrong_rows)
                self.num_checked += report.num_files
                folders |= report.folders
                bar.update(report.num_lines)
        for strays in processes.map(_find_strays, iter(sorted(folders))):
            for problem in strays:
                findings.add(problem)
        return wrong_lines

    def _look_at_shards(self, processes: _Processes, wrong_lines: set[int], findings: Findings) -> None:
        """The shards, and with ``--repair`` those taken back that are wrong or have a row that is."""
        checker, task = self._checker(), self.manifest.task
        suffix = str(self.settings["sink"])
        shards = shard_folder(str(self.settings["output_dir"]))
        shard_checker = ShardChecker(
            task, checker.output_sample_rate, checker.audio_format, checker.codebook_sizes, checker.settings
        )
        places = Places(self.manifest.num_lines)
        wrong: list[Shard] = []

        def lengths(samples: int, counted: int) -> tuple[int, int]:
            if task == "token2wav":
                return counted, samples
            return _lengths(self.spec, samples, self.settings.get("segment_samples"))

        reports: Iterator[ShardReport] = processes.map(
            shard_checker.check, shards_of_ledger(self.run_dir, shards, task, suffix, lengths)
        )
        for report in reports:
            shard = report.shard
            self.num_checked += 1
            repeated = places.repeated(shard)
            for entry in repeated:
                what = "is in an earlier shard as well"
                findings.add(Problem(entry.line + 1, entry.key, "twice", shard.path, what))
            for problem in report.problems:
                findings.add(Problem(problem.line, problem.key, problem.kind, shard.path, problem.what))
            if repeated or report.problems or any(entry.line in wrong_lines for entry in shard.entries):
                wrong.append(shard)
        for path, what in orphans(self.run_dir, shards, task):
            findings.add(Problem(None, None, "orphan", path, what))
        if self.folder is not None:
            self.num_taken_back += take_back(wrong)
            recover(self.run_dir, shards, task, suffix, attempt=self.folder.attempt, num_shards=1, shard=0)


def _print_report(
    run_dir: Path, manifest: Manifest, state: LedgerState, audit: LedgerAudit, findings: Findings
) -> None:
    for kind, about in {
        **KINDS,
        DURATION: "rows with another duration in the manifest (not held against the run)",
    }.items():
        if count := findings.counts[kind]:
            print(f"{about}: {count:,}")
            for problem in findings.examples[kind]:
                print(f"  {problem}".encode(errors="backslashreplace").decode())
            if count > len(findings.examples[kind]):
                print(f"  … and {count - len(findings.examples[kind]):,} more")
    print(f"verified   {manifest.path}, {manifest.task}, run folder {run_dir}")
    print(
        f"rows       {len(manifest):,} = {state.num_done:,} done + {state.num_failed:,} failed + "
        f"{state.num_pending:,} pending"
    )
    notes = [f"{audit.num_repeated:,} rows done again with the same result"]
    if state.num_unreadable:
        notes.append(f"{state.num_unreadable:,} lines unreadable, as after a crash")
    if state.num_removed:
        notes.append(f"{state.num_removed:,} entries of rows that the manifest no longer has")
    if state.num_changed:
        keys = ", ".join(state.changed_keys)
        notes.append(f"{state.num_changed:,} rows were done with another manifest line ({keys})")
    print(f"ledger     {'; '.join(notes)}")


def _lengths(spec: CodecSpec, samples: int, segment_samples: int | None) -> tuple[int, int]:
    """Frames, and samples of the reconstruction, that audio of so many samples has; longer audio in segments."""
    if samples < 1:
        return 0, 0
    if segment_samples is None or samples <= segment_samples:
        frames = spec.num_frames(samples)
        return frames, spec.num_output_samples(frames)
    whole, rest = divmod(samples, segment_samples)
    frames = whole * spec.num_frames(segment_samples) + (spec.num_frames(rest) if rest else 0)
    return frames, round(samples * spec.info.output_sample_rate / spec.info.sample_rate)


def _chunks(
    manifest: Manifest, spec: CodecSpec, state: LedgerState, audit: LedgerAudit, segment_samples: int | None
) -> Iterator[Chunk]:
    for first in range(0, manifest.num_lines, _CHUNK_LINES):
        part = slice(first, min(first + _CHUNK_LINES, manifest.num_lines))
        status, num_samples, ledger_frames = state.status[part], state.num_samples[part], state.frames[part]
        contradicts = audit.contradicts[part].astype(np.uint8)
        frames = np.zeros(len(status), np.int64)
        output_samples = np.zeros(len(status), np.int64)
        for number in np.flatnonzero(status == RowStatus.DONE).tolist():
            samples, counted = int(num_samples[number]), int(ledger_frames[number])
            if manifest.task == "token2wav":
                # Codes of several segments are decoded to less than their frames hold: each segment is cut.
                frames[number] = counted
                fits = counted > 0 and 0 < samples <= spec.num_output_samples(counted)
                output_samples[number] = samples
            else:
                frames[number], output_samples[number] = _lengths(spec, samples, segment_samples)
                fits = counted > 0 and frames[number] == counted
            if not fits and not contradicts[number]:
                contradicts[number] = 2
        yield Chunk(first, status, num_samples, frames, output_samples, contradicts)


# ----------------------------------------------------------------------------------------------------------- processes


class _Processes:
    """Applies a function to items in several processes, or in this one; results come in the order of the items."""

    def __init__(self, pool: ProcessPoolExecutor | None, ahead: int) -> None:
        self._pool = pool
        self._ahead = ahead

    def map(self, function: Callable[[Any], Any], items: Iterator[Any]) -> Iterator[Any]:
        """As ``map``; takes only a few items ahead of the results that were taken.

        Raises:
            RunError: a process died.
        """
        if self._pool is None:
            yield from map(function, items)
            return
        waiting: deque[Future[Any]] = deque()
        try:
            for item in items:
                waiting.append(self._pool.submit(function, item))
                if len(waiting) >= self._ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise RunError(
                "a process that checked files died (out of memory?): try fewer --workers", exit_code=1
            ) from error


@contextmanager
def _processes(checker: Checker, manifest: Manifest, workers: int | None) -> Iterator[_Processes]:
    if workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        workers = cores if manifest.num_lines >= _LEAST_LINES_FOR_PROCESSES else 1
    if workers == 1:
        _start_process(checker)
        yield _Processes(None, 1)
        return
    # Not a fork of this process, which has torch's threads. The server imports this module once for all of them.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_process, initargs=(checker,))
    try:
        yield _Processes(pool, 4 * workers)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _progress_bar(num_rows: int) -> tqdm[Any]:
    on_terminal = sys.stderr.isatty()
    return tqdm(
        total=num_rows, unit=" rows", delay=5.0, dynamic_ncols=True, mininterval=0.5 if on_terminal else 30.0,
        desc="verify",
    )  # fmt: skip
