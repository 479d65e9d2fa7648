"""Webdataset shards: a tar with ``KEY.json``, ``KEY.tokens.npy`` and ``KEY.wav`` or ``KEY.flac`` for each row,
``KEY.NAME.npy`` for codes of the row's other audio (``--audio_fields``), and ``KEY.hidden.npy`` for hidden states.

``KEY`` is the row's key where that is a plain name, otherwise a name made from it (``storage/names.py``). The true key
is in ``KEY.json``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import BinaryIO

from batch_tokenizer.storage.names import HIDDEN_STATES_ENDING, member_name
from batch_tokenizer.writers.row_encoding import EncodedRow, json_bytes, npy_bytes


class TarShard:
    """A tar that is being written by webdataset's ``TarWriter``."""

    suffix = "tar"

    def __init__(self, stream: BinaryIO) -> None:
        # Imported here, as webdataset imports torch, which commands that only read shards do not need.
        from webdataset.writer import TarWriter

        # No owner and no time, so that the same rows make the same bytes.
        self._writer = TarWriter(stream, encoder=False, user="", group="", mtime=0)

    @property
    def num_bytes(self) -> int:
        """Bytes of all members so far, headers and padding included."""
        return int(self._writer.tarstream.offset)

    @staticmethod
    def encode(row: EncodedRow) -> Mapping[str, str | bytes | memoryview]:
        """The row as webdataset's sample: ``__key__`` and the content of each member by its ending.

        Raises:
            RowError: its info is nested too deeply to be written.
        """
        sample: dict[str, str | bytes | memoryview] = {"__key__": member_name(row.key), "json": json_bytes(row.info)}
        if row.codes is not None:
            sample["tokens.npy"] = npy_bytes(row.codes)
        sample |= {f"{name}.npy": npy_bytes(codes) for name, codes in row.other_codes.items()}
        if row.hidden_states is not None:
            sample[HIDDEN_STATES_ENDING.removeprefix(".")] = npy_bytes(row.hidden_states)
        if row.audio is not None:
            sample[row.audio_format] = row.audio
        return sample

    @staticmethod
    def stored(sample: Mapping[str, str | bytes | memoryview]) -> Mapping[str, bytes | memoryview]:
        """The members' contents by their ending."""
        return {name: content for name, content in sample.items() if not isinstance(content, str)}

    def append(self, sample: Mapping[str, str | bytes | memoryview]) -> None:
        """Write what ``encode`` made.

        Raises:
            OSError: the stream cannot be written.
        """
        self._writer.write(sample)

    def finish(self) -> None:
        """Write the end of the tar. The stream stays open."""
        self._writer.close()
