"""``find_parts``: what a source of stored rows consists of: shards, lines, streams, token files, or a run folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

from batch_tokenizer.records import TASKS, RunError
from batch_tokenizer.runs.finished_run import FinishedRun
from batch_tokenizer.runs.token_stream import is_stream
from batch_tokenizer.runtime.run_files import is_run_folder, parse_shard_name
from batch_tokenizer.sources.patterns import find_sources
from batch_tokenizer.storage.json_lines import parse_json
from batch_tokenizer.storage.jsonl_rows import holds_codes, numbered_lines
from batch_tokenizer.storage.names import HIDDEN_STATES_ENDING
from batch_tokenizer.writers.token_streams import SPLIT_NAMES

_SHARD_ENDINGS = (".tar", ".parquet")

_FILE_ENDINGS = (".json", ".npy")


@dataclass(frozen=True, slots=True)
class Part:
    """Rows of a source that lie together.

    Attributes:
        kind: ``tar``, ``parquet`` and ``jsonl`` (lines with codes in them) are shards; ``lines`` is JSON lines whose
            rows name their files; ``stream`` is a folder that ``convert --to flat`` or ``megatron`` wrote; ``files`` is
            a folder of token files, or one such file; ``run`` is a run folder whose rows are in files.
        ledger: of a run's shard, the ledger file that names its rows.
    """

    kind: Literal["tar", "parquet", "jsonl", "lines", "stream", "files", "run"]
    location: str
    ledger: Path | None = None


def find_parts(source: str) -> Iterator[Part]:
    """The parts of a source, in order.

    Raises:
        RunError: the source is none.
    """
    folder = Path(source)
    if not folder.is_dir():
        for found in find_sources(source):
            if found.kind == "tar" or found.kind == "parquet":
                yield Part(found.kind, found.location)
            elif found.kind == "rows":
                yield Part(_kind_of_lines(found.location), found.location)
            elif found.kind == "folder":
                yield from _folder_parts(Path(found.location))
            else:
                yield Part("files", found.location)
    elif is_run_folder(folder):
        run = FinishedRun.open(folder)
        if not run.has_shards:
            yield Part("run", source)
            return
        for shard in run.shards():
            yield Part(shard_kind(shard.location), shard.location, shard.ledger)
    else:
        yield from _folder_parts(folder)


def _folder_parts(folder: Path) -> Iterator[Part]:
    """A folder of shards, of what ``convert`` wrote, or of token files."""
    names = sorted(entry.name for entry in os.scandir(folder) if not entry.name.startswith("."))
    shards = [name for name in names if name.endswith(_SHARD_ENDINGS)]
    shards += [name for name in names if name.endswith(".jsonl") and holds_codes(str(folder / name))]
    if shards:
        _refuse_mixture(folder, shards)
        for name in shards:
            yield Part(shard_kind(name), str(folder / name))
    elif streams := [place for place in (folder, *map(folder.joinpath, SPLIT_NAMES)) if is_stream(place)]:
        for place in streams:
            yield Part("stream", str(place))
    elif "data.jsonl" in names:
        yield Part("lines", str(folder / "data.jsonl"))
    else:
        yield Part("files", str(folder))


def _kind_of_lines(location: str) -> Literal["jsonl", "lines", "files"]:
    """Lines with codes in them, lines that name files, or a token file, whose one line has no key of its own."""
    if not holds_codes(location):
        return "lines"
    if location.endswith(".json"):
        for _, line in islice(numbered_lines(location), 1):
            return "jsonl" if "key" in parse_json(line) else "files"
    return "jsonl"


def shard_kind(name: str) -> Literal["tar", "parquet", "jsonl"]:
    """By the ending of its name."""
    if name.endswith(".jsonl"):
        return "jsonl"
    return "parquet" if name.endswith(".parquet") else "tar"


def _refuse_mixture(folder: Path, shards: list[str]) -> None:
    """Several runs may share a folder of shards; their rows are not one source."""
    tasks = {task for name in shards for task in TASKS if parse_shard_name(task, name) is not None}
    if len(tasks) > 1:
        raise RunError(
            f"{folder}: has shards of several tasks: name those of one, such as '{folder}/{sorted(tasks)[0]}-*'"
        )


def token_files(location: str) -> Iterator[str]:
    """The paths of the token files of a folder, in order; of one such file, its own. Run folders in it have none."""
    if not os.path.isdir(location):
        yield location
        return
    for place, folders, names in os.walk(location):
        folders[:] = sorted(name for name in folders if not is_run_folder(os.path.join(place, name)))
        for name in sorted(names):
            if name.endswith(_FILE_ENDINGS) and not name.endswith(HIDDEN_STATES_ENDING) and not name.startswith("."):
                yield os.path.join(place, name)
