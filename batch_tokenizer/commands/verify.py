"""``batch_tokenizer verify``: proves that a run lost nothing, did nothing twice, and left outputs that are what they
should be.

It reads the manifest, the run's ledger and the outputs, prints a verdict, and writes ``verify.jsonl`` into the run
folder, a line for everything that is wrong. Nothing is believed because the run says so: the lengths that outputs must
have are computed again from the codec's frame arithmetic. Codes are checked to be possible, and of audio only the
header and the size are read. With ``--content`` all bytes are read and compared with the ledger's checksums, so that
a changed code or a silenced recording is found as well; ``--recompute N`` tokenizes a sample of rows again.

With ``--repair``, rows whose outputs are wrong are taken back in the ledger, so that the next run does just those.
Files are checked by processes that import neither torch nor a codec; the memory used depends on the number of output
folders, and grows by some twenty bytes a row.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import jsonlines
import numpy as np
import orjson

from batch_tokenizer.codecs.base import CodecSpec
from batch_tokenizer.commands.status import seems_at_work
from batch_tokenizer.commands.verify_processes import (
    Checkers,
    Map,
    check_chunk,
    check_shard,
    checking_processes,
)
from batch_tokenizer.commands.verify_rows import (
    DURATION,
    ChunkReport,
    ExpectedLengths,
    LedgerAudit,
    Problem,
    RowChecker,
    audit_ledger,
    chunks,
    find_strays,
)
from batch_tokenizer.commands.verify_shards import (
    Shard,
    ShardChecker,
    ShardReport,
    orphans,
    repeated_entries,
    shards_to_check,
    take_back,
)
from batch_tokenizer.config import Dtype, RunConfig, add_options, check_least
from batch_tokenizer.manifest.manifest import Manifest
from batch_tokenizer.records import TASKS, LedgerEntry, RunError, Task, printable
from batch_tokenizer.runs.checks import OutputForm
from batch_tokenizer.runs.finished_run import FinishedRun, find_run_folder
from batch_tokenizer.runtime.ledger import LedgerState, read_checksums, read_ledger
from batch_tokenizer.runtime.ledger_writer import LedgerWriter
from batch_tokenizer.runtime.processes import ProcessGroup
from batch_tokenizer.runtime.row_counter import RowCounter
from batch_tokenizer.runtime.run_folder import RunFolder
from batch_tokenizer.storage.atomic import atomic_write, os_error_ends_run
from batch_tokenizer.storage.json_lines import json_lines_writer
from batch_tokenizer.writers.shard_folder import shard_folder
from batch_tokenizer.writers.shard_recovery import recover

if TYPE_CHECKING:
    from batch_tokenizer.commands.verify_recompute import Recomputation

log = logging.getLogger(__name__)

#: What may be wrong, in the order in which it is printed.
KINDS: Mapping[str, str] = {
    "pending": "rows neither done nor failed",
    "ledger": "rows of which the ledger contradicts itself or the codec's arithmetic",
    "missing": "outputs that are not there",
    "unreadable": "outputs that cannot be read",
    "length": "outputs of another length than their row's audio",
    "content": "outputs with content that this run does not write",
    "changed": "outputs whose content is not the one that was written",
    "twice": "rows in more than one place",
    "recomputed": "rows whose codes are not those that this device computes with the run's settings",
    "orphan": "files in the folder of shards that no ledger file names",
    "stray": "temporary files in output folders",
    DURATION: "rows with another duration in the manifest (not held against the run)",
}

#: Kinds that taking rows back does not mend.
_NOT_REPAIRED = {"pending", "stray", "orphan", "recomputed", DURATION}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    add = parser.add_argument
    add("run", type=Path, nargs="?", metavar="RUN",
        help="the run folder, or the folder of its outputs; looked for beside the manifest when absent")  # fmt: skip
    add_options(parser, "data_list")
    parser.set_defaults(data_list=None)  # a run that is named knows its own
    add("--task", choices=TASKS, help="of the run, where several ran on this manifest")
    add("--model_path", help="the checkpoint that the run used; the bundled default when absent")
    add("--output_dir", help="of the run: its run folder is looked for there, and beside the manifest")
    add("--run_dir", type=Path, help="the run folder itself")
    add("--workers", type=int, help="processes that check files; one a core when absent, more help on network disks")
    add("--repair", action="store_true", help="take rows with wrong outputs back, for the next run to do again")
    add("--content", action="store_true", help="read all bytes of all outputs and compare their checksums")
    add("--recompute", type=int, metavar="N", help="tokenize N rows again, alone and in another order, and compare")
    add_options(parser, "device")
    add("--dtype", choices=get_args(Dtype), help="with --recompute: also compare with this number format")
    add("--show", type=int, default=10, help="examples printed of each kind of problem (%(default)s)")


def main(arguments: argparse.Namespace) -> int:
    """Verifies a run. Returns 0 if everything holds, otherwise 1, also after a repair.

    Raises:
        RunError: there is nothing that could be verified, or not with these arguments.
    """
    check_least(arguments, workers=1, show=0, recompute=1)
    if arguments.dtype is not None and arguments.recompute is None:
        raise RunError("--dtype needs --recompute N, the number of rows to tokenize again")
    data_list: str | Path | None = arguments.data_list
    named: Path | None = arguments.run or arguments.run_dir
    if named is None:
        data_list = data_list or RunConfig().data_list
        run = FinishedRun.open(find_run_dir(data_list, arguments.task, arguments.output_dir))
    else:
        run = FinishedRun.open(find_run_folder(named))
    if arguments.task not in (None, run.task):
        raise RunError(f"--task {arguments.task}: run folder {run.path} is of a {run.task} run")
    spec = _open_spec(arguments.model_path, run)
    recomputation = None
    if arguments.recompute is not None:
        # Imported here, as this imports torch, which the processes that check files do not need.
        from batch_tokenizer.commands.verify_recompute import Recomputation

        recomputation = Recomputation(arguments.recompute, arguments.model_path, arguments.device, arguments.dtype)
        recomputation.check(run)
    with ExitStack() as stack:
        folder = ledger = None
        if arguments.repair:
            # With the lock of a job of one shard no other job can start, and none can be at work.
            alone = ProcessGroup.from_environment({})
            folder = stack.enter_context(RunFolder.open(run.path, run.settings, processes=alone))
            ledger = stack.enter_context(LedgerWriter(folder.ledger_path))
        elif seems_at_work(run.path):
            log.warning("a job seems to be at work on %s: what it has not done yet will be reported", run.path)
        manifest = run.manifest(data_list)
        verification = Verification(run, manifest, spec, folder, ledger, arguments.content, recomputation)
        return verification.run_checks(workers=arguments.workers, show=arguments.show)


def find_run_dir(data_list: str | Path, task: Task | None, output_dir: str | None) -> Path:
    """The only run folder in the folder of outputs and beside the manifest.

    Raises:
        RunError: there is none, or several.
    """
    tasks = TASKS if task is None else (task,)
    places = (None,) if output_dir is None else (output_dir, None)
    candidates = [
        RunConfig(data_list=data_list, task=name, output_dir=place).default_run_dir()
        for place in places
        for name in tasks
    ]
    there = [folder for folder in candidates if folder.is_dir()]
    if len(there) == 1:
        return there[0]
    if there:
        raise RunError(f"several runs of {data_list} ({', '.join(map(str, there))}): choose with --task or --run_dir")
    raise RunError(
        f"no run folder of {data_list} ({', '.join(map(str, candidates))}): name it, or the run's --output_dir"
    )


def _open_spec(model_path: str | None, run: FinishedRun) -> CodecSpec:
    # Imported here, as this imports torch, which the processes that check files do not need.
    from batch_tokenizer.codecs.opening import open_spec

    spec = open_spec(model_path)
    fingerprint = run.settings.get("fingerprint")
    if fingerprint != spec.info.fingerprint:
        raise RunError(
            f"run folder {run.path} is of another checkpoint (fingerprint {fingerprint}) than {spec.info.name} "
            f"({spec.info.fingerprint}): name the run's own with --model_path"
        )
    return spec.with_recorded(run.settings)


@dataclass(slots=True)
class Findings:
    """Collects problems: writes all, keeps the first of each kind for the printed report."""

    writer: jsonlines.Writer
    examples_kept: int
    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[Problem]] = field(default_factory=dict)

    def add(self, problem: Problem) -> None:
        """Take in one."""
        self.counts[problem.kind] += 1
        examples = self.examples.setdefault(problem.kind, [])
        if len(examples) < self.examples_kept:
            examples.append(problem)
        fields = asdict(problem)
        try:
            self.writer.write(fields)
        except orjson.JSONEncodeError:  # a path that is not UTF-8
            self.writer.write(
                {name: ascii(value) if isinstance(value, str) else value for name, value in fields.items()}
            )

    @property
    def num_wrong(self) -> int:
        """Problems that are held against the run."""
        return sum(count for kind, count in self.counts.items() if kind != DURATION)


@dataclass(slots=True)
class Verification:
    """One verification of a run.

    Attributes:
        folder, ledger: open for repairing; None to look only.
        content: whether all bytes are compared with their checksums.
        recomputation: of a sample of rows, if that was asked for.
        kept: shards with something wrong that were not taken back, as rows of theirs would be lost.
    """

    run: FinishedRun
    manifest: Manifest
    spec: CodecSpec
    folder: RunFolder | None
    ledger: LedgerWriter | None
    content: bool
    recomputation: Recomputation | None
    num_checked: int = 0
    num_taken_back: int = 0
    kept: Sequence[Shard] = ()

    def run_checks(self, *, workers: int | None, show: int) -> int:
        """Check everything, print what was found, repair if that was asked for. Returns the exit status.

        Raises:
            RunError: something could not be read or written.
        """
        began = time.monotonic()
        # 1. What the ledger says of each row, and whether it agrees with itself.
        state = read_ledger(self.run.path, self.manifest)
        audit = audit_ledger(self.run.path, self.manifest, state)
        path = self.run.path / "verify.jsonl"
        form = OutputForm.of(self.spec.info, self.run.settings)
        checkers = Checkers(RowChecker(self.manifest, form), ShardChecker(self.run.task, form, self.content))
        with (
            os_error_ends_run(f"{path} cannot be written"),
            atomic_write(path) as file,
            json_lines_writer(file) as writer,
            checking_processes(checkers, self.manifest, workers) as map_items,
        ):
            findings = Findings(writer, show)
            # 2. Each row's entries, and the files that it names.
            wrong_lines = self._check_rows(map_items, state, audit, findings)
            # 3. The shards.
            if self.run.has_shards:
                self._check_shards(map_items, wrong_lines, findings)
            # 4. Rows tokenized again.
            if self.recomputation is not None:
                for comparison in self.recomputation.compare(self.run, self.manifest, state):
                    if comparison.held_against:
                        for problem in comparison.problems:
                            findings.add(problem)

        seconds = time.monotonic() - began
        _print_findings(findings)
        _print_counts(self.run, self.manifest, state, audit)
        print(f"checked    {self.num_checked:,} files in {seconds:.1f} s, {len(self.manifest) / seconds:,.0f} rows/s")
        if not findings.num_wrong:
            print("everything holds")
            return 0
        print(f"NOT RIGHT  {findings.num_wrong:,} findings, all of them in {path}")
        if self.folder is not None:
            print(f"repair     {self.num_taken_back:,} rows taken back: start the run again, and it does just those")
            if self.kept:
                print(f"kept       {printable(_kept(self.kept))}")
        elif findings.counts.keys() - _NOT_REPAIRED:
            print("           --repair takes the rows with wrong outputs back, so that the next run does them again")
        return 1

    @property
    def _lengths(self) -> ExpectedLengths:
        return ExpectedLengths(self.spec, self.run.task, self.run.settings.get("segment_samples"))

    def _check_rows(self, map_items: Map, state: LedgerState, audit: LedgerAudit, findings: Findings) -> set[int]:
        """Checks the ledger and the rows' own files; returns the lines that are wrong."""
        # Those of shards are in the shards' own ledger files.
        wanted = self.content and not self.run.has_shards
        checksums = read_checksums(self.run.path, self.manifest, state) if wanted else {}
        folders: set[str] = set()
        wrong_lines: set[int] = set()
        # Rows of shards are taken back with their whole shard.
        ledger = None if self.run.has_shards else self.ledger
        with RowCounter("verified", len(self.manifest), delay=5.0) as counter:
            reports: Iterator[ChunkReport]
            reports = map_items(check_chunk, chunks(self.manifest, self._lengths, state, audit, checksums))
            for report in reports:
                for problem in report.problems:
                    findings.add(problem)
                wrong_lines.update(line for line, _ in report.wrong_rows)
                if ledger is not None:
                    for line, key in report.wrong_rows:
                        ledger.append(LedgerEntry(line, self.manifest.digest(line), key, "redo"))
                    self.num_taken_back += len(report.wrong_rows)
                self.num_checked += report.num_files
                folders |= report.folders
                counter.update(report.num_lines)
        for strays in map_items(find_strays, iter(sorted(folders))):
            for problem in strays:
                findings.add(problem)
        return wrong_lines

    def _check_shards(self, map_items: Map, wrong_lines: set[int], findings: Findings) -> None:
        """Checks the shards, and with ``--repair`` takes those back that are wrong or have a row that is."""
        folder = shard_folder(str(self.run.settings["output_dir"]))
        seen = np.zeros(self.manifest.num_lines, np.bool_)
        wrong: list[Shard] = []
        reports: Iterator[ShardReport]
        reports = map_items(check_shard, shards_to_check(self.run, folder, self._lengths, self.manifest))
        for report in reports:
            shard = report.shard
            self.num_checked += 1
            repeated = repeated_entries(shard, seen)
            for entry in repeated:
                findings.add(entry.problem("twice", shard.path, "is in an earlier shard as well"))
            for problem in report.problems:
                findings.add(problem)
            if repeated or report.problems or any(entry.line in wrong_lines for entry in shard.entries):
                wrong.append(shard)
        for problem in orphans(self.run.path, folder, self.run.task):
            findings.add(problem)
        if self.folder is not None:
            # The next run cannot do rows again that the manifest no longer has.
            self.kept = [shard for shard in wrong if shard.exists and shard.removed_keys]
            self.num_taken_back += take_back([shard for shard in wrong if shard not in self.kept])
            recover(
                self.run.path, folder, self.run.task, self.run.sink,
                attempt=self.folder.attempt, num_shards=1, shard=0,
            )  # fmt: skip


def _kept(shards: Sequence[Shard]) -> str:
    keys = [key for shard in shards for key in shard.removed_keys]
    names = ", ".join(keys[:5]) + (" …" if len(keys) > 5 else "")
    paths = ", ".join(shard.path for shard in shards[:5]) + (" …" if len(shards) > 5 else "")
    return (
        f"{len(shards):,} shards, as {len(keys):,} rows in them are no longer in the manifest and would be lost "
        f"({names}): put these rows back into the manifest, or delete the shards ({paths}), and repair again"
    )


def _print_findings(findings: Findings) -> None:
    for kind, about in KINDS.items():
        if count := findings.counts[kind]:
            print(f"{about}: {count:,}")
            for problem in findings.examples[kind]:
                print(f"  {printable(str(problem))}")
            if count > len(findings.examples[kind]):
                print(f"  … and {count - len(findings.examples[kind]):,} more")


def _print_counts(run: FinishedRun, manifest: Manifest, state: LedgerState, audit: LedgerAudit) -> None:
    print(f"verified   {manifest.path}, {manifest.task}, run folder {run.path}")
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
