"""A row's codes and what is known of them, as the bytes of a file of its own: ``token_json`` or ``token_npy``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from batch_tokenizer.records import TokenizedRow
from batch_tokenizer.writers.row_encoding import json_bytes, row_info


def token_json(result: TokenizedRow, run_info: Mapping[str, Any]) -> bytes:
    """The token file of one row; see ``tokens_as_json`` and ``row_info``."""
    return tokens_as_json(result.codes, row_info(result, run_info))


def tokens_as_json(codes: npt.NDArray[np.uint16], info: Mapping[str, Any]) -> bytes:
    """``{"quantized_tokens": [[K ints] x T], "info": {...}}``, UTF-8.

    Raises:
        RowError: ``info`` is nested too deeply to be written.
    """
    return json_bytes({"quantized_tokens": np.ascontiguousarray(codes), "info": info})


def tokens_as_npy(codes: npt.NDArray[np.uint16], info: Mapping[str, Any]) -> bytes:
    """What ``numpy.load`` reads as uint16 (T, K), then ``info`` as JSON, UTF-8, up to the end of the file.

    Readers of ``.npy`` know the array's size from its header and do not look beyond it, so that one file holds both
    and is published in one step.

    Raises:
        RowError: ``info`` is nested too deeply to be written.
    """
    return npy_bytes(codes) + json_bytes({"info": info})


def npy_bytes(codes: npt.NDArray[np.uint16]) -> bytes:
    """An ``.npy`` file of uint16 (T, K), as ``numpy.save`` writes it, in a tenth of the time."""
    header = f"{{'descr': '<u2', 'fortran_order': False, 'shape': ({codes.shape[0]}, {codes.shape[1]}), }}"
    padded = header.ljust(-(-(len(header) + 11) // 64) * 64 - 11) + "\n"
    length = len(padded).to_bytes(2, "little")
    return b"\x93NUMPY\x01\x00" + length + padded.encode() + np.ascontiguousarray(codes, dtype="<u2").tobytes()
