"""``FileSink``: a row's results become the files that its row names, one of tokens and one of audio.

Hidden states, where a run keeps them, are one more file: ``a.json.hidden.npy`` beside ``a.json``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from batch_tokenizer.records import LedgerEntry, ManifestRow, RowError, Task, TokenizedRow
from batch_tokenizer.storage.names import HIDDEN_STATES_ENDING
from batch_tokenizer.writers.publish import publish
from batch_tokenizer.writers.row_encoding import (
    AudioEncoder,
    RowEncoder,
    done_entry,
    npy_bytes,
    tokens_as_json,
    tokens_as_npy,
    wav_bytes,
)


class FileSink:
    """Publishes each row's tokens (``quantized_tokens``) and audio (``reconstructed_wav``), as the task has them.

    Args:
        sample_rate: of the samples, in Hz.
        run_info: goes into every token file; see ``row_info``.
        form: of the token files, whatever their names end in.
        encode_audio: makes the audio files, likewise.
        record: called with the ledger entry of each row whose files are published.
    """

    def __init__(
        self,
        task: Task,
        sample_rate: int,
        run_info: Mapping[str, Any],
        *,
        form: Literal["json", "npy"] = "json",
        encode_audio: AudioEncoder = wav_bytes,
        record: Callable[[LedgerEntry], None] | None = None,
    ) -> None:
        self._encode = RowEncoder(task, run_info, sample_rate, encode_audio)
        self._to_bytes = tokens_as_json if form == "json" else tokens_as_npy
        self._record = record

    def write(self, result: TokenizedRow) -> None:
        """Publish all files of one row, and record it. Contents are made before the first is published.

        Raises:
            RowError: a file could not be made or published. Another of the row's files may have been.
        """
        encoded = self._encode(result)
        contents: dict[str, bytes | memoryview] = {}
        if encoded.hidden_states is not None:
            contents["hidden_states"] = npy_bytes(encoded.hidden_states)
        if encoded.codes is not None:
            contents["quantized_tokens"] = self._to_bytes(encoded.codes, encoded.info_with_codes)
        if encoded.audio is not None:
            contents["reconstructed_wav"] = encoded.audio
        paths = [self._path(result.row, name) for name in contents]
        for path, content in zip(paths, contents.values(), strict=True):
            publish(path, content)
        if self._record is not None:
            self._record(done_entry(result, contents))

    @staticmethod
    def _path(row: ManifestRow, name: str) -> str:
        path: str | None = getattr(row, "quantized_tokens" if name == "hidden_states" else name)
        if path is None:
            raise ValueError("the manifest passed a row without a path for its output")
        if name != "hidden_states":
            return path
        if path.endswith(HIDDEN_STATES_ENDING):
            # It may be where the hidden states of another row are.
            raise RowError("write", f"{path}: with --hidden_states no token file may end in {HIDDEN_STATES_ENDING}")
        return path + HIDDEN_STATES_ENDING

    def close(self) -> None:
        """Nothing is open."""

    def __enter__(self) -> FileSink:
        return self

    def __exit__(self, *exception: object) -> None:
        return None
