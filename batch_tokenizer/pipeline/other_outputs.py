"""Whether outputs of another run, with other settings, are in the place of a run's own."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from batch_tokenizer.data.token_files import parse_token_file
from batch_tokenizer.manifest.manifest import Manifest
from batch_tokenizer.records import ManifestRow, RowError
from batch_tokenizer.runtime.ledger import RowStatus

log = logging.getLogger(__name__)

#: Pending rows that are looked at, spread over the manifest, and token files of them that are read.
_ROWS_SAMPLED, _FILES_READ = 64, 4


def warn_of_other_outputs(manifest: Manifest, status: npt.NDArray[np.uint8], run_info: Mapping[str, Any]) -> None:
    """Log a warning if pending rows have outputs of a run with other settings.

    Each of the two runs ends well, but the files hold a mixture of both.

    Args:
        status: uint8 (num_lines,) of ``RowStatus``.
        run_info: what every token file of this run says of its settings.
    """
    pending = np.flatnonzero((status == RowStatus.PENDING) & manifest.is_row)
    num_read = 0
    for row in manifest.sample(pending, _ROWS_SAMPLED):
        if not isinstance(row, ManifestRow) or "quantized_tokens" not in manifest.form.outputs:
            continue
        path = str(row.quantized_tokens)
        if num_read == _FILES_READ or not os.path.isfile(path):
            continue
        num_read += 1
        if differences := _differences(Path(path), run_info):
            log.warning(
                "%s is of a run with other settings (%s): this run replaces such files, so do not let both write here",
                path, "; ".join(differences),
            )  # fmt: skip
            return


def _differences(path: Path, run_info: Mapping[str, Any]) -> list[str]:
    """In which settings the token file at ``path`` differs; none where it does not name its settings."""
    try:
        _, info = parse_token_file(path.read_bytes(), str(path))
    except (OSError, RowError):
        return []  # not a token file: whatever it is, it is replaced
    if not isinstance(info, Mapping):
        return []
    return [
        f"{name} {info[name]} there, {value} here"
        for name, value in run_info.items()
        if name in info and info[name] != value
    ]
