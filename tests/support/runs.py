"""Runs as a user starts them: a corpus of short clips, the command as real processes, and what they left behind.

A ``Corpus`` lies in one place, and every run of it gets a ``Workspace`` of its own: the manifest names its files
relative to the working directory, so two runs of one corpus must leave the same bytes under the same names.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
import wave
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
import pytest

from batch_tokenizer.codecs.base import Computed
from batch_tokenizer.pipeline.rank_loop import RankLoop
from batch_tokenizer.records import Batch
from tests.support.checkpoints import write_mimo_checkpoint
from tests.support.command import run_here

ROOT = Path(__file__).resolve().parents[2]
TASK = "wav2token2wav"

#: Only what hangs takes so long, also on a machine that does much else.
HANG_SECONDS = 900.0

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0")


# -------------------------------------------------------------------------------------------------------------- corpus


@dataclass(frozen=True)
class Corpus:
    """Clips, a manifest that names them as ``wavs/KEY.wav``, and a small random checkpoint."""

    folder: Path
    keys: tuple[str, ...]

    def first(self, num_rows: int) -> Corpus:
        """The same with fewer rows. What becomes of a row does not depend on which others there are."""
        return Corpus(self.folder, self.keys[:num_rows])

    @property
    def manifest_lines(self) -> list[bytes]:
        """JSON lines, one a key."""
        return (self.folder / "data.jsonl").read_bytes().splitlines(keepends=True)[: len(self.keys)]

    @property
    def checkpoint(self) -> Path:
        """A tiny MiMo."""
        return self.folder / "checkpoint"


def make_corpus(folder: Path, num_rows: int, seconds: tuple[float, float] = (0.1, 0.3), seed: int = 0) -> Corpus:
    """``num_rows`` clips of noise and tones; every fourth at 16 kHz, the others at the checkpoint's 24 kHz.

    A folder where this was done before is taken as it is.
    """
    keys = tuple(f"row{number:05d}" for number in range(num_rows))
    if (folder / "checkpoint" / "model.safetensors").exists():
        return Corpus(folder, keys)
    generator = np.random.default_rng(seed)
    (folder / "wavs").mkdir(parents=True)
    lines = []
    for number, key in enumerate(keys):
        rate = 24000 if number % 4 else 16000
        duration = generator.uniform(*seconds)
        time_axis = np.arange(int(duration * rate)) / rate
        tone = np.sin(2 * np.pi * generator.uniform(80, 2000) * time_axis)
        samples = 0.4 * tone + 0.1 * generator.standard_normal(len(time_axis))
        with wave.open(str(folder / "wavs" / f"{key}.wav"), "wb") as stream:
            stream.setnchannels(1)
            stream.setsampwidth(2)
            stream.setframerate(rate)
            stream.writeframes((samples.clip(-1, 1) * 32767).astype("<i2").tobytes())
        row = {
            "key": key,
            "wav": f"wavs/{key}.wav",
            "quantized_tokens": f"out/{key}.json",
            "reconstructed_wav": f"out/{key}.wav",
            "duration": round(duration, 4),
        }
        lines.append(json.dumps(row) + "\n")
    (folder / "data.jsonl").write_text("".join(lines))
    write_mimo_checkpoint(folder / "checkpoint")
    return Corpus(folder, keys)


# ----------------------------------------------------------------------------------------------------------- workspace


@dataclass(frozen=True)
class Workspace:
    """Where one or several attempts at a corpus run: its manifest, and whatever the runs write."""

    corpus: Corpus
    folder: Path

    @classmethod
    def make(cls, corpus: Corpus, folder: Path) -> Workspace:
        """A new folder with the manifest in it and the clips linked."""
        folder.mkdir(parents=True)
        (folder / "log").mkdir()
        (folder / "wavs").symlink_to(corpus.folder / "wavs")
        (folder / "data.jsonl").write_bytes(b"".join(corpus.manifest_lines))
        return cls(corpus, folder)

    @property
    def run_dir(self) -> Path:
        """The run folder that the command chooses by itself."""
        return self.folder / f"data.{TASK}.run"

    def arguments(self, *more: object) -> list[str]:
        """The command line after ``-m batch_tokenizer``. Loading is in the ranks unless ``more`` says otherwise: every
        interpreter costs seconds to start."""
        source = [] if "--data_list" in more else ["--data_list", "data.jsonl"]
        fixed: list[object] = [
            *source, "--task", TASK, "--model_path", self.corpus.checkpoint, "--num_workers", 0,
            "--batch_size", 8, "--prefetch", 1,
        ]  # fmt: skip
        return [str(word) for word in (*fixed, *more)]

    def command(self, num_processes: int, *more: object, launcher: Sequence[str] = ()) -> list[str]:
        """A process alone, or several under torchrun; ``launcher`` are further flags of torchrun."""
        alone = [sys.executable] if num_processes == 1 and not launcher else []
        several = [] if alone else [*TORCHRUN, *launcher, f"--nproc_per_node={num_processes}"]
        return [*(alone or several), "-m", "batch_tokenizer", *self.arguments(*more)]

    def start(self, num_processes: int, *more: object, launcher: Sequence[str] = ()) -> Run:
        """Start a run and return at once."""
        return Run.start(self.command(num_processes, *more, launcher=launcher), self.folder)

    def finish(
        self, num_processes: int, *more: object, launcher: Sequence[str] = (), timeout: float = HANG_SECONDS
    ) -> Run:
        """Run to the end, which must be a good one."""
        with self.start(num_processes, *more, launcher=launcher) as run:
            assert run.wait(timeout) == 0, run.output()
        return run

    def finish_here(self, *more: object) -> str:
        """The same in this process, which costs no start of another; returns what it printed."""
        done = run_here(*self.arguments(*more), cwd=self.folder)
        assert done.returncode == 0, done.stderr
        return done.stderr + done.stdout

    def outputs(self) -> dict[str, bytes]:
        """Every file under ``out``, hidden ones too, by its relative path."""
        out = self.folder / "out"
        return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}

    def ledger(self) -> list[dict[str, object]]:
        """Every whole entry of every ledger file, earliest file first."""
        entries = []
        for path in sorted((self.run_dir / "ledger").glob("*.jsonl")):
            for line in path.read_bytes().split(b"\n"):
                with contextlib.suppress(ValueError):  # torn by a kill
                    entries.append(json.loads(line))
        return [entry for entry in entries if "line" in entry]  # not the trailers of shards

    def rows_done(self) -> int:
        """Rows that the ledger has, while runs are at work."""
        return len({entry["key"] for entry in self.ledger()})

    def await_rows(self, count: int, run: Run, timeout: float = HANG_SECONDS) -> None:
        """Wait until ``count`` rows are in the ledger, while ``run`` is at work."""
        run.wait_until(lambda: self.rows_done() >= count, f"{count} rows in the ledger", timeout)

    def check_complete(self, expected: Mapping[str, bytes] | None = None, *, redone: bool = False) -> None:
        """Each row is done exactly once, outputs are those of ``expected`` to the byte, and nothing else lies about.

        Args:
            redone: rows may have several entries, as after kills, if these say the same.
        """
        entries = self.ledger()
        by_key: dict[object, list[dict[str, object]]] = {}
        for entry in entries:
            by_key.setdefault(entry["key"], []).append(entry)
        assert sorted(map(str, by_key)) == list(self.corpus.keys)
        for key, group in by_key.items():
            assert all(entry["status"] == "done" for entry in group), group
            assert all(entry == group[0] for entry in group), f"entries of {key} disagree: {group}"
        if not redone:
            assert len(entries) == len(self.corpus.keys), "a row was done twice"
        outputs = self.outputs()
        assert sorted(outputs) == sorted(f"{key}.{kind}" for key in self.corpus.keys for kind in ("json", "wav"))
        if expected is not None:
            different = [name for name in outputs if outputs[name] != expected[name]]
            assert not different, f"{len(different)} files differ from an undisturbed run: {different[:5]}"
        left = {path.name for path in self.folder.iterdir()}
        assert left == {"wavs", "data.jsonl", "out", self.run_dir.name, "log"}


def after_batches(monkeypatch: pytest.MonkeyPatch, count: int, action: Callable[[], object]) -> None:
    """Have the next run in this process do ``action`` once, when ``count`` batches have been handed to the writers."""
    hand_over, batches = RankLoop._hand_over, itertools.count()

    def handing_over(self: RankLoop, batch: Batch, computed: Computed) -> None:
        if next(batches) == count:
            action()
        hand_over(self, batch, computed)

    monkeypatch.setattr(RankLoop, "_hand_over", handing_over)


# --------------------------------------------------------------------------------------------------------------- run


@dataclass
class Run:
    """A started command with its process tree. A context manager: leaving it kills what is left of the tree."""

    process: subprocess.Popen[bytes]
    log: Path
    seen: dict[int, psutil.Process] = field(default_factory=dict)

    @classmethod
    def start(cls, command: Sequence[str], folder: Path, environment: Mapping[str, str] | None = None) -> Run:
        """Start ``command`` in ``folder``; what it prints goes to files there."""
        log = folder / "log" / f"{len(list((folder / 'log').iterdir())):03d}.txt"
        with log.open("wb") as stream:
            process = subprocess.Popen(
                command,
                cwd=folder,
                env=run_environment() | dict(environment or {}),
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return cls(process, log)

    def output(self) -> str:
        """What the processes have printed so far."""
        return self.log.read_text(errors="replace")

    def wait(self, timeout: float = HANG_SECONDS) -> int:
        """The exit status, as a shell shows it (128 + n for signal n)."""
        try:
            status = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"still running after {timeout} s:\n{self.output()}") from None
        return status if status >= 0 else 128 - status

    def wait_until(self, condition: Callable[[], bool], what: str, timeout: float = HANG_SECONDS) -> None:
        """Wait for a condition while the run is at work; it must not end before."""
        deadline = time.monotonic() + timeout
        looked = time.process_time()
        while not condition():
            ended = self.process.poll() is not None
            assert not ended or condition(), f"ended with {self.process.returncode} before {what}:\n{self.output()}"
            assert time.monotonic() < deadline, f"no {what} after {timeout} s:\n{self.output()}"
            # Looking through all processes is dear: most of the time is the run's.
            time.sleep(max(0.02, 5 * (time.process_time() - looked)))
            looked = time.process_time()

    def tree(self) -> list[psutil.Process]:
        """All living processes of the run, the starter first. Orphans count, if they were seen before."""
        with contextlib.suppress(psutil.NoSuchProcess):
            root = psutil.Process(self.process.pid)
            for process in [root, *root.children(recursive=True)]:
                self.seen[process.pid] = process
        return [process for process in self.seen.values() if _is_alive(process)]

    def ranks(self) -> list[psutil.Process]:
        """The computing processes."""
        return [process for process in self.tree() if _is_rank(process)]

    def loader_servers(self) -> list[psutil.Process]:
        """The processes that fork loader processes."""
        ranks = {process.pid for process in self.ranks()}
        return [process for process in self.tree() if _parent(process) in ranks and _is_fork_server(process)]

    def loaders(self) -> list[psutil.Process]:
        """The processes that load rows."""
        servers = {process.pid for process in self.loader_servers()}
        return [process for process in self.tree() if _parent(process) in servers]

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process that was started."""
        self.process.send_signal(number)

    def kill(self) -> int:
        """SIGKILL to all processes of the tree at once; returns how many there were."""
        tree = self.tree()
        for process in tree:  # no more processes come while the others are being killed
            with contextlib.suppress(psutil.NoSuchProcess):
                process.suspend()
        tree = self.tree()
        for process in tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait(30)
        psutil.wait_procs(tree, 30)
        return len(tree)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *exception: object) -> None:
        self.kill()


def run_environment() -> dict[str, str]:
    """This environment without a launcher's variables, with the repository on the path of every Python."""
    launchers = ("SLURM", "TORCHELASTIC", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "GROUP_", "ROLE_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(launchers)}
    return kept | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}


def lingering(folder: Path) -> Iterator[psutil.Process]:
    """Living processes whose working directory is ``folder``: what a run has left behind."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.cwd() == str(folder) and _is_alive(process):
                yield process


def _is_alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _is_rank(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        words = process.cmdline()
        return "batch_tokenizer" in words and "torch.distributed.run" not in words
    return False


def _is_fork_server(process: psutil.Process) -> bool:
    """Or a loader process, which it has forked: not ``multiprocessing``'s tracker of semaphores."""
    with contextlib.suppress(psutil.Error):
        return "multiprocessing.forkserver" in " ".join(process.cmdline())
    return False


def _parent(process: psutil.Process) -> int:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.ppid()
    return -1


# ------------------------------------------------------------------------------------------------------------- killing


class Killer:
    """Kills single processes of a run with SIGKILL, each after the run has gone on since the kill before it.

    A row on which two loader processes die is failed, and rightly so. Therefore a second loader process of the same
    rank dies only after the rank has ended more rows than it can hold: then the row of the first one is behind it.
    """

    #: More than a rank of ``Workspace.arguments`` holds: eight rows being loaded and up to a batch that is open.
    ROWS_HELD = 24

    def __init__(self, workspace: Workspace, run: Run, seed: int) -> None:
        self._workspace = workspace
        self._run = run
        self._random = random.Random(seed)
        self._spared: dict[int, tuple[int, int]] = {}  # rank's process id: (its rank, its rows at the last kill)

    def kill(self, victim: str) -> None:
        """Kill a ``rank``, a ``loader`` process, a loader's fork ``server`` or torchrun's ``agent``, chosen at random
        where there are several, in the middle of work."""
        before = self._workspace.rows_done()
        self._workspace.await_rows(before + self._random.randint(1, 12), self._run)
        if victim == "agent":
            self._run.tree()  # the ranks are nobody's children afterwards
            self._run.process.kill()
            self._run.process.wait()
            return
        chosen: list[psutil.Process] = []

        def find() -> bool:
            chosen[:] = {
                "rank": self._run.ranks,
                "loader": self._loaders,
                "server": self._run.loader_servers,
            }[victim]()
            return bool(chosen)

        self._run.wait_until(find, f"{victim} to kill")
        process = self._random.choice(chosen)
        if victim == "loader":
            with contextlib.suppress(psutil.NoSuchProcess):
                rank = process.parents()[1]
                number = int(rank.environ()["RANK"])
                self._spared[rank.pid] = number, self._rows_of(number)
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()

    def _loaders(self) -> list[psutil.Process]:
        found = []
        for process in self._run.loaders():
            with contextlib.suppress(psutil.NoSuchProcess, IndexError):
                number, rows = self._spared.get(process.parents()[1].pid, (0, -self.ROWS_HELD))
                if self._rows_of(number) >= rows + self.ROWS_HELD:
                    found.append(process)
        return found

    def _rows_of(self, rank: int) -> int:
        """Rows that this rank has ended in all attempts."""
        ledgers = (self._workspace.run_dir / "ledger").glob(f"*-{rank:05d}.jsonl")
        return sum(path.read_bytes().count(b"\n") for path in ledgers)
