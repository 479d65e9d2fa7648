"""``ResultsFolder``: what ``evaluate`` keeps on disk, written so that a command that was killed can be resumed.

settings.json       what all results in the folder have in common
utterances.jsonl    a line an utterance and number of codebooks, also ``utterances.parquet`` where pyarrow is there
tokens.jsonl        a line an utterance: its codes, for counting
table.md            averages
summary.json        averages and the use of codebooks
"""

from __future__ import annotations

import base64
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from batch_tokenizer.quality.metrics import METRICS
from batch_tokenizer.records import RunError
from batch_tokenizer.storage.atomic import os_error_ends_run, replace_file, replace_json
from batch_tokenizer.storage.json_lines import json_lines_reader, json_lines_writer


class ResultsFolder:
    """The folder at ``path``; it need not exist to be read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._utterances = path / "utterances.jsonl"
        self._tokens = path / "tokens.jsonl"

    def open(self, settings: Mapping[str, Any], *, overwrite: bool) -> None:
        """Make the folder, or open one whose results have equal settings.

        Args:
            overwrite: discard results of other settings.

        Raises:
            RunError: the settings differ (exit code 2), or the folder cannot be written (exit code 1).
        """
        path = self.path / "settings.json"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            before = json.loads(path.read_bytes()) if path.exists() else settings
            names = [name for name in settings if before.get(name) != settings[name]]
            if names and not overwrite:
                raise RunError(
                    f"{self.path} has results of other settings ({', '.join(names)}): choose another --out, or "
                    "--overwrite"
                )
            if names:
                self._utterances.unlink(missing_ok=True)
                self._tokens.unlink(missing_ok=True)
            replace_json(path, settings)
        except (OSError, ValueError, AttributeError) as error:
            raise RunError(f"{path} cannot be used: {error}; choose another --out", exit_code=1) from error

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Keep records of utterances.

        Raises:
            RunError: they cannot be written (exit code 1).
        """
        _append(self._utterances, records)

    def records(self) -> Iterator[dict[str, Any]]:
        """All records that were kept, in the order in which they were."""
        return _read_lines(self._utterances)

    def append_codes(self, line: int, digest: str, codes: npt.NDArray[np.uint16]) -> None:
        """Keep an utterance's codes (T, K).

        Raises:
            RunError: they cannot be written (exit code 1).
        """
        text = base64.b64encode(np.ascontiguousarray(codes, "<u2").tobytes()).decode()
        _append(self._tokens, [{"line": line, "digest": digest, "codebooks": codes.shape[1], "codes": text}])

    def codes(self, wanted: set[tuple[int, str]], num_quantizers: int) -> Iterator[npt.NDArray[np.uint16]]:
        """The codes (T, ``num_quantizers``) of each wanted (line, digest), once; of those that have as many."""
        left = set(wanted)
        for record in _read_lines(self._tokens):
            place = (record["line"], record["digest"])
            if place in left and record["codebooks"] >= num_quantizers:
                left.discard(place)
                codes = np.frombuffer(base64.b64decode(record["codes"]), "<u2")
                yield codes.reshape(-1, record["codebooks"])[:, :num_quantizers].astype(np.uint16)

    def write_tables(self, table: str, summary: Mapping[str, Any], utterances: Sequence[Mapping[str, Any]]) -> None:
        """Replace the tables.

        Raises:
            RunError: they cannot be written (exit code 1).
        """
        with os_error_ends_run(f"{self.path} cannot be written"):
            replace_file(self.path / "table.md", table.encode())
            text = json.dumps(summary, indent=1, ensure_ascii=False, allow_nan=False)
            replace_file(self.path / "summary.json", f"{text}\n".encode())
            _write_parquet(self.path / "utterances.parquet", utterances)


def _append(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Whole lines at the end of a file, which may end in half of one. All of them in one write."""
    with os_error_ends_run(f"{path} cannot be written"), path.open("ab+") as file:
        data = io.BytesIO()
        if file.tell():
            file.seek(-1, os.SEEK_END)
            data.write(b"" if file.read(1) == b"\n" else b"\n")
        with json_lines_writer(data) as writer:
            writer.write_all(records)
        file.write(data.getvalue())


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Records of a file of JSON lines; a line torn by a crash is left out, and so is a file that is not there."""
    if not path.exists():
        return
    with path.open("rb") as file, json_lines_reader(file) as reader:
        yield from reader.iter(type=dict, skip_invalid=True)


def _write_parquet(path: Path, utterances: Sequence[Mapping[str, Any]]) -> None:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        return
    flat = [_flat(record) for record in utterances]
    names = dict.fromkeys(name for record in flat for name in record)
    table = pyarrow.table({name: _column([record.get(name) for record in flat]) for name in names})
    pyarrow.parquet.write_table(table, path)


def _flat(record: Mapping[str, Any]) -> dict[str, Any]:
    fixed = {name: record[name] for name in ("key", "line", "num_quantizers", "seconds", "scored_seconds", "frames")}
    reasons = "; ".join(f"{METRICS[name].label}: {reason}" for name, reason in record["not_scored"].items())
    row = {f"row_{name}": value for name, value in record["row"].items()}
    return {**fixed, **record["scores"], "not_scored": reasons, **row}


def _column(values: Sequence[Any]) -> list[Any]:
    """Values of one type, as a column needs: rows of a manifest may disagree, and then all become text."""
    kinds = {type(value) for value in values if value is not None}
    if kinds == {int, float}:
        return [None if value is None else float(value) for value in values]
    if len(kinds) > 1 or any(type(value) is int and abs(value) >= 2**63 for value in values):
        return [None if value is None else str(value) for value in values]
    return list(values)
