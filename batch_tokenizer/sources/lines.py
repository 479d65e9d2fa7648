"""``lines_of``: the lines of a text file, wherever it lies and however it is compressed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

from batch_tokenizer.manifest.row import MAX_LINE
from batch_tokenizer.records import RunError
from batch_tokenizer.storage.remote import StorageError
from batch_tokenizer.storage.streams import StreamReader


def lines_of(location: str) -> Iterator[bytes]:
    """The lines of a plain or compressed file or object, without line ends, cut to a byte more than a line may have.

    Raises:
        RunError: it cannot be read to its end.
    """
    unfinished = b""
    try:
        with closing(StreamReader(location)) as reader:
            while block := reader.read(1 << 20):
                first, *others = block.split(b"\n")
                if len(unfinished) <= MAX_LINE:
                    unfinished = (unfinished + first)[: MAX_LINE + 1]
                for line in others:
                    yield unfinished
                    unfinished = line
    except StorageError as error:
        raise RunError(f"--data_list {error.reason}", exit_code=1) from error
    if unfinished:
        yield unfinished
