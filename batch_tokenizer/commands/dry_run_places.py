"""The part of ``--dry_run`` about where outputs go: whether they can be written there, and whether there is room."""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from batch_tokenizer.commands.status import format_size
from batch_tokenizer.records import ManifestRow, RowForm
from batch_tokenizer.storage.names import is_url


def print_fact(name: str, text: str) -> None:
    """A line of the plan."""
    print(f"{name:<10} {text}".encode(errors="backslashreplace").decode(), flush=True)


def check_places(
    sample: Sequence[ManifestRow], form: RowForm, output_dir: str | None, run_dir: Path, needed: Mapping[str, float]
) -> Iterator[str]:
    """Prints where there is how much space; yields a line for each place where the sampled outputs cannot go.

    Args:
        needed: estimated bytes of all outputs, by output field, or of ``shards``, which go to ``output_dir``.
    """
    # 1. Where the sampled outputs go, each with its share of the estimated bytes.
    places: dict[Path, str | None] = {}
    shares: Counter[int] = Counter()
    spaces: dict[int, tuple[Path, int]] = {}
    num_existing = 0
    outputs = [
        (f"line {row.line + 1}, {row.key}", str(row.fields[field]), needed.get(field, 0.0) / len(sample))
        for field in form.outputs
        for row in sample
    ]
    if not form.outputs and output_dir is not None:
        outputs = [("--output_dir", f"{output_dir}/shard", needed.get("shards", 0.0))]
    # 2. The nearest folder that exists above each of them, and its file system. Every folder is tried once.
    for whose, output, size in outputs:
        if is_url(output):
            continue  # a store says what it does not take when it is asked to
        path = Path(output)
        if path.is_dir():
            yield f"{whose}: {path}: is a folder, where the output should go"
            continue
        num_existing += path.exists()
        try:
            ancestor = _existing_ancestor(path)
            if ancestor not in places:
                places[ancestor] = _why_not_writable(ancestor)
            device = ancestor.stat().st_dev
            spaces[device] = ancestor, shutil.disk_usage(ancestor).free
        except OSError as error:
            yield f"{whose}: {path}: cannot be written: {error.strerror}"
            continue
        shares[device] += round(size)
    ancestor = run_dir if run_dir.is_dir() else _existing_ancestor(run_dir)
    places.setdefault(ancestor, _why_not_writable(ancestor))
    # 3. What cannot be written, and which disks are too small.
    for place, reason in places.items():
        if reason is not None:
            yield f"{place}: nothing can be written there: {reason}"
    for device, (place, free) in spaces.items():
        share = format_size(shares[device])
        print_fact("free space", f"{format_size(free)} on the disk of {place}, about {share} to be written there")
        if shares[device] > free:
            yield f"{place}: about {share} would be written where {format_size(free)} are free"
    if num_existing:
        print_fact("outputs", f"{num_existing} of the sample's exist and would be replaced")


def _existing_ancestor(path: Path) -> Path:
    """The folder, or whatever stands in its place, that a path would be created in or below."""
    for folder in path.parents:
        try:
            folder.stat()
        except (FileNotFoundError, NotADirectoryError):
            continue
        return folder
    return Path()


def _why_not_writable(folder: Path) -> str | None:
    try:
        # Where the system has files without names, this is one, and vanishes even if the process is killed.
        with tempfile.TemporaryFile(dir=folder):
            return None
    except NotADirectoryError:
        return "it is not a folder"
    except OSError as error:
        return error.strerror or str(error)
