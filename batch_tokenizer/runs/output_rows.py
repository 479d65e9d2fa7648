"""The rows that a run has done, each with its fields and the locations of its outputs.

``manifest.jsonl`` in the output folder has them at the end of a run, and a run folder given as ``--data_list`` stands
for them.
"""

from __future__ import annotations

import filecmp
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from batch_tokenizer.manifest.manifest import Manifest
from batch_tokenizer.records import OUTPUT_FIELDS, ManifestRow, RowError, RunError
from batch_tokenizer.runs.finished_run import FinishedRun
from batch_tokenizer.runs.shards import find_places
from batch_tokenizer.runtime.ledger import RowStatus, read_ledger
from batch_tokenizer.runtime.run_files import is_run_folder
from batch_tokenizer.storage.atomic import atomic_write, os_error_ends_run
from batch_tokenizer.storage.json_lines import dump_json
from batch_tokenizer.storage.jsonl_rows import ABOUT
from batch_tokenizer.storage.row_info import join_info, split_info

log = logging.getLogger(__name__)

#: Rows between two calls of ``idle``.
_ROWS_PER_CALL = 1000


def output_rows(run: FinishedRun, manifest: Manifest) -> Iterator[dict[str, Any]]:
    """The rows, in the manifest's order, or shard by shard where outputs are in shards.

    Raises:
        RunError: the manifest, the ledger or a shard cannot be read.
    """
    if not run.has_shards:
        done = read_ledger(run.path, manifest).status == RowStatus.DONE
        for first in range(0, manifest.num_lines, _ROWS_PER_CALL):
            last = min(first + _ROWS_PER_CALL, manifest.num_lines)
            for row in manifest.read(first, last) if done[first:last].any() else ():
                if isinstance(row, ManifestRow) and done[row.line]:
                    yield _without_about(row.fields)
        return
    for digest, place in find_places(run, lambda digest: manifest.line_of(digest) is not None):
        if isinstance(place, RowError):
            raise RunError(place.reason, exit_code=1)
        line = manifest.line_of(digest)
        assert line is not None
        outputs = {"quantized_tokens": place.tokens, "reconstructed_wav": place.audio}
        # Tokens in a tar do not say what made them: the member beside them does, and here the row.
        _, about = split_info(place.info)
        row = manifest.row(line)
        if isinstance(row, ManifestRow):
            fields = join_info(row.fields, about) if about else row.fields
            yield {**_without_about(fields), **{name: place for name, place in outputs.items() if place is not None}}


def _without_about(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a row, less what they say of codes in the row itself: those that count are where the outputs are."""
    return {name: value for name, value in fields.items() if name != ABOUT}


def write_output_rows(
    run: FinishedRun,
    manifest: Manifest,
    path: Path,
    idle: Callable[[], None] = lambda: None,
    *,
    left_out: str | None = None,
) -> int:
    """Write the rows to a file of JSON lines, which appears whole. Returns how many there are.

    Args:
        left_out: a field that is not written.
        idle: called now and then; an exception that it raises leaves the file as it was.

    Raises:
        RunError: the run cannot be read, or the file not be written.
    """
    count = 0
    with os_error_ends_run(f"{path} cannot be written"), atomic_write(path) as stream:
        for count, row in enumerate(output_rows(run, manifest), 1):
            stream.write(dump_json({name: value for name, value in row.items() if name != left_out}) + b"\n")
            if count % _ROWS_PER_CALL == 0:
                idle()
    return count


def write_run_manifest(
    run: FinishedRun, manifest: Manifest, output_dir: Path, earlier: object, idle: Callable[[], None]
) -> Path | None:
    """Write ``manifest.jsonl`` into the folder of outputs. Returns its path; None where it cannot be written.

    A file of this name that this run has not written stays: then it is ``manifest.TASK.jsonl``.

    Args:
        earlier: the path of the file that this run has written before, as its summary has it.

    Raises:
        RunError: the run cannot be read.
    """
    for path in (output_dir / "manifest.jsonl", output_dir / f"manifest.{run.task}.jsonl"):
        if not path.exists() or str(path) == earlier:
            break
    else:
        log.warning("%s is there and not of this run: no manifest of the outputs is written", path)
        return None
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        write_output_rows(run, manifest, path, idle)
    except OSError as error:
        log.warning("%s cannot be written: %s", path, error.strerror)
        return None
    return path


def run_as_source(data_list: str, folder: Path, idle: Callable[[], None] = lambda: None) -> str:
    """The source that stands for ``data_list``: of a run folder, a file in ``folder`` that names what is done.

    Raises:
        RunError: the run cannot be read, has no tokens, or the file not be written.
    """
    if not is_run_folder(data_list):
        return data_list
    run = FinishedRun.open(Path(data_list))
    if "quantized_tokens" not in OUTPUT_FIELDS[run.task]:
        raise RunError(f"--data_list {data_list}: the folder of a {run.task} run, which made no tokens")
    manifest = run.manifest()
    path = folder / "run-rows.jsonl"
    written = folder / "run-rows.new.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    # The audio that the run made is not to be replaced by that which is made of its tokens.
    audio = next((name for name in OUTPUT_FIELDS[run.task] if name == "reconstructed_wav"), None)
    if not write_output_rows(run, manifest, written, idle, left_out=audio):
        raise RunError(f"--data_list {data_list}: no row of this run is done")
    # A file with the same rows stays as it is, so that what was listed from it is found again.
    if path.exists() and filecmp.cmp(path, written, shallow=False):
        written.unlink()
    else:
        os.replace(written, path)
    return str(path)
