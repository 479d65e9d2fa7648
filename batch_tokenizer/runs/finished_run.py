"""``FinishedRun``: a run folder read back by the commands that look at what a run made."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast, get_args

from batch_tokenizer.manifest.manifest import Manifest
from batch_tokenizer.records import SHARD_SINKS, TASKS, RunError, Sink, Task, short_repr
from batch_tokenizer.runs.source import find_manifest, recorded_source
from batch_tokenizer.runtime.ledger_lines import read_shard_lines
from batch_tokenizer.runtime.run_files import (
    RUN,
    SUMMARY,
    is_run_folder,
    ledger_files,
    read_record,
    shard_name,
)
from batch_tokenizer.runtime.run_settings import read_settings
from batch_tokenizer.storage.atomic import os_error_ends_run
from batch_tokenizer.writers.shard_folder import shard_folder


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 1e9


#: Settings that commands read, and what each must be where it is there.
_SETTINGS: Mapping[str, Callable[[Any], bool]] = {
    "task": lambda value: value in list(TASKS),
    "num_quantizers": lambda value: _is_number(value) and isinstance(value, int),
    "sink": lambda value: value in list(get_args(Sink)),
    "output_dir": lambda value: value is None or isinstance(value, str),
    "sample_rate": _is_number,
    "frame_rate": _is_number,
    "fingerprint": lambda value: isinstance(value, str),
    "codebook_sizes": lambda value: isinstance(value, list) and all(map(_is_number, value)),
    "audio_format": lambda value: isinstance(value, str),
    "resampler": lambda value: isinstance(value, str),
    "segment_samples": lambda value: value is None or (_is_number(value) and isinstance(value, int)),
}

_REQUIRED = ("task", "num_quantizers", "sample_rate", "frame_rate", "fingerprint")


class PublishedShard(NamedTuple):
    """A shard that counts: its name, its location, and the ledger file that names its rows."""

    name: str
    location: str
    ledger: Path


def find_run_folder(folder: Path) -> Path:
    """The run folder that a folder is, or that made the outputs in it: one inside, or the one whose shards it has.

    Raises:
        RunError: there is none, or more than one.
    """
    if not folder.is_dir() or is_run_folder(folder):
        return folder
    found = {path.parent.resolve(): path.parent for path in sorted(folder.glob(f"*/{RUN}"))}
    for marker in sorted(folder.glob(".batch_tokenizer.*.json")):
        named = read_record(marker).get("run_folder")
        if isinstance(named, str) and is_run_folder(named):
            found.setdefault(Path(named).resolve(), Path(named))
    if len(found) > 1:
        names = ", ".join(str(path) for path in found.values())
        raise RunError(f"{folder} has outputs of several runs: name the folder of one: {names}")
    if not found:
        raise RunError(f"{folder} is not a run folder, and no run folder lies in it")
    return next(iter(found.values()))


@dataclass(frozen=True, slots=True)
class FinishedRun:
    """What a run folder says. The run need not have come to its end.

    Attributes:
        path: the folder.
        settings: of the run, as ``run.json`` has them.
    """

    path: Path
    settings: Mapping[str, Any]

    @classmethod
    def open(cls, run_dir: Path) -> FinishedRun:
        """Read ``run.json``.

        Raises:
            RunError: there is no such folder, it is no run folder, or ``run.json`` is damaged.
        """
        if not run_dir.is_dir():
            raise RunError(f"run folder {run_dir} does not exist")
        settings = read_settings(run_dir)
        if settings is None:
            raise RunError(f"{run_dir} is not a run folder: it has no run.json")
        for name, is_right in _SETTINGS.items():
            value = settings.get(name)
            if (name in settings or name in _REQUIRED) and not is_right(value):
                raise RunError(f"{run_dir / 'run.json'} is damaged: its {name} is {short_repr(value)}")
        run = cls(run_dir, settings)
        if run.has_shards and not isinstance(settings.get("output_dir"), str):
            raise RunError(f"{run_dir / 'run.json'} is damaged: it names no folder of its shards (output_dir)")
        return run

    @property
    def task(self) -> Task:
        """What the run did."""
        return cast(Task, self.settings["task"])

    @property
    def sink(self) -> Sink:
        """What it made of its results."""
        return cast(Sink, self.settings.get("sink", "json"))

    @property
    def has_shards(self) -> bool:
        """Whether its results are in shards, and not in files that its rows name."""
        return self.sink in SHARD_SINKS

    @property
    def model_path(self) -> str | None:
        """The checkpoint as the user named it; None for the bundled one, and where nothing recorded it."""
        recorded = self.summary().get("model_path")
        return recorded if isinstance(recorded, str) else None

    @property
    def data_list(self) -> str | None:
        """The source of the rows as the user named it; None where nothing recorded it."""
        return recorded_source(self.path)

    def manifest(self, data_list: str | Path | None = None) -> Manifest:
        """The run's rows.

        Args:
            data_list: the source of the rows, where the run folder cannot find it.

        Raises:
            RunError: it is not to be found, or cannot be read.
        """
        return Manifest.open(find_manifest(self.path, data_list), self.task, self.path / "index", sink=self.sink)

    def summary(self) -> dict[str, Any]:
        """``summary.json``; empty where the run has not come to its end."""
        return read_record(self.path / SUMMARY)

    def shards(self) -> Iterator[PublishedShard]:
        """The shards that count, earliest first. One whose ledger file is damaged does not: its rows are done again.

        Raises:
            RunError: a ledger file cannot be read (exit code 1).
        """
        folder = shard_folder(str(self.settings.get("output_dir")))
        with os_error_ends_run(f"ledger in {self.path} cannot be read"):
            for file in ledger_files(self.path):
                if file.shard is not None and read_shard_lines(file.path) is not None:
                    name = f"{shard_name(self.task, file.attempt, file.rank, file.shard)}.{self.sink}"
                    yield PublishedShard(name, folder.location(name), file.path)
