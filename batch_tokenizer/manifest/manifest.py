"""The manifest: JSON lines read by byte offset, so that memory grows neither with rows nor with workers.

``Manifest`` opens a text file with one JSON object a line for a task, which decides the fields that a line must have.
It reads the rows of any range of lines, and has a few memory-mapped arrays with one element a line (``durations``,
``digests``, ...).

The arrays are the index (``index.py``). It is built in one pass, kept in a folder of its own and mapped by every
process that opens the same manifest for the same task, so that they share its pages and later starts do not read the
manifest. Whatever is wrong with a line alone or between lines (duplicates) is found while the index is built; the
message is made only when the line is read. Lines are counted from 0 in code and from 1 in messages.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from batch_tokenizer.manifest.index import (
    BLOCK_BYTES,
    Progress,
    build_index,
    check_index,
    file_identity,
    hash_bytes,
    map_index,
)
from batch_tokenizer.manifest.row import MAX_LINE, LineState, RefusedLine, check_line, cut_of, normalised_path, quoted
from batch_tokenizer.records import REQUIRED_FIELDS, ManifestRow, RowFailure, RowForm, RunError, Sink, Task
from batch_tokenizer.storage.file_lock import exclusive_lock

logger = logging.getLogger(__name__)


class Manifest:
    """A manifest opened for one task. Made by ``open``; picklable: the process that receives it opens it again.

    Attributes:
        path: the JSON-lines file.
        form: which fields a row must have and which of them are outputs.
        num_lines: lines, blank ones included.
        offsets: uint64 (num_lines + 1,), first byte of each line, and the file's size.
        digests: uint64 (num_lines,), hash of the line's bytes without surrounding white space.
        key_hashes: uint64 (num_lines,), hash of the key; 0 where the line has no readable key.
        durations: float32 (num_lines,), seconds from the row's ``duration`` field; NaN where it has no usable one.
        states: uint8 (num_lines,) of ``LineState``.
    """

    def __init__(self, path: Path, form: RowForm, index: Path) -> None:
        """Map the finished index in the folder ``index``. Made by ``Manifest.open``."""
        self.path = path
        self.form = form
        self._index = index
        self._file: IO[bytes] | None = None
        columns = map_index(index)
        self.offsets: npt.NDArray[np.uint64] = columns["offsets"]
        self.digests: npt.NDArray[np.uint64] = columns["digests"]
        self.key_hashes: npt.NDArray[np.uint64] = columns["key_hashes"]
        self.durations: npt.NDArray[np.float32] = columns["durations"]
        self.states: npt.NDArray[np.uint8] = columns["states"]
        self._duplicates: npt.NDArray[np.int64] = columns["duplicates"]
        self.num_lines = len(self.states)
        self._num_rows = int(np.count_nonzero(self.states != LineState.BLANK))

    @classmethod
    def open(
        cls,
        path: Path | str,
        task: Task,
        index_dir: Path | str,
        *,
        sink: Sink = "json",
        progress: Progress | None = None,
    ) -> Manifest:
        """Open ``path``, building its index in ``index_dir`` unless one of this very file, task and kind of sink is
        there.

        Args:
            progress: called now and then with (bytes done, bytes in all) while the index is built, and with (0, bytes
                in all) while another process builds it. An exception that it raises ends the opening, and no partial
                index remains.

        Raises:
            RunError: the manifest is missing, not a file, not readable, without rows, or changes while it is read; or
                ``index_dir`` cannot be written.
        """
        path, index_dir = Path(path), Path(index_dir)
        form = RowForm.of(task, sink)
        try:
            with path.open("rb") as stream:
                identity = file_identity(stream, form)
                size = os.fstat(stream.fileno()).st_size
        except (OSError, ValueError) as error:
            raise _unreadable(path, error) from error
        if size == 0:
            raise RunError(f"manifest {path} is empty")
        index = index_dir / f"{task}-{identity}"
        report = progress or (lambda done, total: None)
        try:
            if not _is_whole(index):
                index_dir.mkdir(parents=True, exist_ok=True)
                with exclusive_lock(index_dir / "lock", lambda: report(0, size), purpose="indexing the manifest"):
                    if not _is_whole(index):
                        # A damaged index is a cache that is of no use: it is removed, and built again.
                        if index.exists():
                            logger.warning("index %s is damaged: building it again", index)
                            shutil.rmtree(index)
                        build_index(path, form, index, report)
            return cls(path, form, index)
        except (OSError, ValueError) as error:
            raise RunError(f"index of the manifest in {index_dir}: {_cause(error)}", exit_code=1) from error

    def __len__(self) -> int:
        """Lines that are not blank: the rows that end as done or failed."""
        return self._num_rows

    def __reduce__(self) -> tuple[Any, ...]:
        return Manifest, (self.path, self.form, self._index)

    def digest(self, line: int) -> str:
        """The digest of a line as rows and the ledger have it: 16 hexadecimal digits."""
        return f"{int(self.digests[line]):016x}"

    @property
    def task(self) -> Task:
        """What the rows are for."""
        return self.form.task

    @property
    def is_row(self) -> npt.NDArray[np.bool_]:
        """Bool (num_lines,): lines that are worked on, neither blank nor refused."""
        return self.states == LineState.ROW

    @property
    def is_blank(self) -> npt.NDArray[np.bool_]:
        """Bool (num_lines,): lines without content, which count as no row."""
        return self.states == LineState.BLANK

    @staticmethod
    def hash_key(key: str) -> int:
        """The hash that ``key_hashes`` holds for ``key``."""
        return int.from_bytes(hash_bytes(key.encode("utf-8", "surrogatepass")), "big")

    def read(self, first_line: int, last_line: int) -> list[ManifestRow | RowFailure]:
        """The rows of lines ``first_line`` up to, not including, ``last_line``, in order; blank lines are left out.

        Raises:
            RunError: the manifest cannot be read, or is no longer what it was when it was indexed.
        """
        items: list[ManifestRow | RowFailure] = []
        digests, states = (array[first_line:last_line].tolist() for array in (self.digests, self.states))
        lines = self._raw_lines(first_line, last_line)
        for line, raw, digest, state in zip(range(first_line, last_line), lines, digests, states, strict=True):
            text = raw.strip()
            if hash_bytes(text) != digest.to_bytes(8, "big"):
                raise RunError(
                    f"line {line + 1} of manifest {self.path} changed during the run: start the same command again",
                    exit_code=1,
                )
            if state != LineState.BLANK:
                items.append(self._item(line, text, f"{digest:016x}", state == LineState.DUPLICATE))
        return items

    def row(self, line: int) -> ManifestRow | RowFailure:
        """The row of a line that is not blank; errors as in ``read``."""
        (row,) = self.read(line, line + 1)
        return row

    def sample(self, lines: npt.NDArray[np.int64], count: int) -> list[ManifestRow | RowFailure]:
        """At most ``count`` rows, spread evenly over some lines that are not blank; errors as in ``read``."""
        places = np.linspace(0, len(lines) - 1, min(len(lines), count)).round().astype(np.int64)
        return [self.row(line) for line in lines[np.unique(places)].tolist()]

    @cached_property
    def _lines_by_digest(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint64]]:
        order = np.argsort(self.digests, kind="stable")
        return order, self.digests[order]

    def find_lines(self, digests: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
        """int64: the first line that has each digest, -1 where none has."""
        order, ordered = self._lines_by_digest
        places = np.searchsorted(ordered, digests)
        places[places == len(ordered)] = 0
        return np.where(ordered[places] == digests, order[places], -1)

    def line_of(self, digest: str) -> int | None:
        """The first line that has a digest, as ``digest`` writes it; None where none has."""
        line = int(self.find_lines(np.array([int(digest, 16)], np.uint64))[0])
        return None if line < 0 else line

    def _item(self, line: int, text: bytes, digest: str, duplicate: bool) -> ManifestRow | RowFailure:
        # The reason is made here and not when the index is built, so that the index holds no text.
        try:
            row = check_line(text, self.form)
        except RefusedLine as refused:
            return RowFailure(line, digest, refused.key, "manifest", refused.reason)
        if duplicate:
            return RowFailure(line, digest, row["key"], "manifest", self._explain_duplicate(line, row))
        paths = {
            name: row[name] if isinstance(row.get(name), str) else None for name in REQUIRED_FIELDS["wav2token2wav"][1:]
        }
        return ManifestRow(
            line,
            digest,
            row["key"],
            paths["wav"],
            paths["quantized_tokens"],
            paths["reconstructed_wav"],
            row,
            cut_of(row),
        )

    def _explain_duplicate(self, line: int, row: dict[str, Any]) -> str:
        _, shared, first = self._duplicates[np.searchsorted(self._duplicates[:, 0], line)]
        if shared == 0:
            return f"duplicate key {quoted(row['key'])}: first on line {first + 1}"
        field = self.form.outputs[shared - 1]
        return f'output path {normalised_path(row[field])} of field "{field}" is taken: first on line {first + 1}'

    def _raw_lines(self, first_line: int, last_line: int) -> Iterator[bytes]:
        """Lines without newline, cut to ``MAX_LINE + 1`` bytes, read up to ``BLOCK_BYTES`` at a time."""
        try:
            if self._file is None:
                self._file = self.path.open("rb")
            descriptor = self._file.fileno()
            offsets = self.offsets[first_line : last_line + 1].astype(np.int64)
            line, count = 0, last_line - first_line
            while line < count:
                together = int(np.searchsorted(offsets, offsets[line] + BLOCK_BYTES, side="right")) - 1
                stop = min(max(together, line + 1), count)
                length = min(int(offsets[stop] - offsets[line]), max(BLOCK_BYTES, MAX_LINE + 2))
                data = os.pread(descriptor, length, int(offsets[line]))
                for begin, end in pairwise((offsets[line : stop + 1] - offsets[line]).tolist()):
                    yield data[begin:end].removesuffix(b"\n")[: MAX_LINE + 1]
                line = stop
        except OSError as error:
            raise RunError(f"manifest {self.path}: {_cause(error)}", exit_code=1) from error


def _is_whole(index: Path) -> bool:
    try:
        check_index(index)
    except (OSError, ValueError):
        return False
    return True


def _cause(error: OSError | ValueError) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _unreadable(path: Path, error: OSError | ValueError) -> RunError:
    if isinstance(error, FileNotFoundError):
        return RunError(f"manifest {path} does not exist")
    if isinstance(error, IsADirectoryError):
        return RunError(f"manifest {path} is a folder: --data_list wants the JSON-lines file")
    return RunError(f"manifest {path} cannot be read: {_cause(error)}")
