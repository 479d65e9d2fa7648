"""``FileSink``: a row's results become the files that its row names, one of tokens and one of audio."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from batch_tokenizer.records import OUTPUT_FIELDS, Task, TokenizedRow
from batch_tokenizer.writers.publish import publish
from batch_tokenizer.writers.token_json import token_json
from batch_tokenizer.writers.wav_file import wav_bytes


class FileSink:
    """Publishes each row's token JSON (``quantized_tokens``) and wav (``reconstructed_wav``), as the task has them.

    Args:
        sample_rate: of the samples, in Hz.
        run_info: goes into every token file; see ``token_json``.
    """

    def __init__(self, task: Task, sample_rate: int, run_info: Mapping[str, Any]) -> None:
        self._fields = OUTPUT_FIELDS[task]
        self._sample_rate = sample_rate
        self._run_info = run_info

    def write(self, result: TokenizedRow) -> None:
        """Publish all files of one row. Contents are made before the first is published.

        Raises:
            RowError: a file could not be made or published. Another of the row's files may have been.
        """
        contents = []
        if "quantized_tokens" in self._fields:
            contents.append((result.row.quantized_tokens, token_json(result, self._run_info)))
        if "reconstructed_wav" in self._fields:
            if result.samples is None:
                raise ValueError("a row without samples has no wav file")
            contents.append((result.row.reconstructed_wav, wav_bytes(result.samples, self._sample_rate)))
        for path, content in contents:
            if path is None:
                raise ValueError("the manifest passed a row without a path for its output")
            publish(path, content)
