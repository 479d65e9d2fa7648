"""Webdataset shards: rows enter, a tar of ``KEY.json``, ``KEY.tokens.npy`` and ``KEY.wav`` or ``KEY.flac`` leaves.

``KEY`` is the row's key where that is a plain name, otherwise a name made from it (``storage/member_names.py``). The
true key is in ``KEY.json``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import BinaryIO

from batch_tokenizer.storage.member_names import member_name
from batch_tokenizer.writers.row_encoding import EncodedRow, json_bytes
from batch_tokenizer.writers.token_files import npy_bytes

_BLOCK = 512


class TarShard:
    """A tar that is being written.

    Attributes:
        num_bytes: written so far.
    """

    suffix = "tar"

    def __init__(self, stream: BinaryIO) -> None:
        # Imported here, as the package imports torch, which reading a shard does not need.
        from webdataset.writer import TarWriter

        self.num_bytes = 0
        self._tar = TarWriter(stream, encoder=False, user="", group="", mtime=0)

    @staticmethod
    def encode(row: EncodedRow) -> dict[str, bytes | str]:
        """The row as a sample of webdataset.

        Raises:
            RowError: its info is nested too deeply to be written.
        """
        sample: dict[str, bytes | str] = {"__key__": member_name(row.key), "json": json_bytes(row.info)}
        if row.codes is not None:
            sample["tokens.npy"] = npy_bytes(row.codes)
        if row.audio is not None:
            sample[row.audio_format] = bytes(row.audio)
        return sample

    def append(self, sample: Mapping[str, bytes | str]) -> None:
        """Write what ``encode`` made."""
        self._tar.write(dict(sample))
        self.num_bytes += sum(_BLOCK + -(-len(value) // _BLOCK) * _BLOCK for value in sample.values()) - 2 * _BLOCK

    def finish(self) -> None:
        """Write the end of the tar. The stream stays open."""
        self._tar.close()
