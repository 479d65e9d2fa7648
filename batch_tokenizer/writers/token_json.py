"""``token_json``: a row's codes and what is known of them, as the bytes of its token file.

Nothing in it tells when, where, or beside which rows the codes were computed, so the same row has the same bytes on any
number of processes and after any number of restarts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import orjson

from batch_tokenizer.records import RowError, TokenizedRow


def token_json(result: TokenizedRow, run_info: Mapping[str, Any]) -> bytes:
    """``{"quantized_tokens": [[K ints] x T], "info": {...}}``, UTF-8.

    ``info`` is the manifest's row, then ``run_info`` (codec, fingerprint and so on, the same for all rows of a run),
    then ``num_samples`` (input samples at the codec's rate), ``num_frames`` (T) and ``num_quantizers`` (K). Fields of
    the row that have the name of another one there are kept under ``manifest_row``.

    Raises:
        RowError: the row's fields are nested too deeply to be written.
    """
    codes = result.codes
    if codes is None:
        raise ValueError("a row without codes has no token file")
    ours = {
        **run_info,
        "num_samples": result.num_samples,
        "num_frames": codes.shape[0],
        "num_quantizers": codes.shape[1],
    }
    fields = result.row.fields
    hidden = {name: value for name, value in fields.items() if name in ours or name == "manifest_row"}
    info = {**fields, **ours}
    info.pop("manifest_row", None)
    if hidden:
        info["manifest_row"] = hidden
    try:
        document = {"quantized_tokens": np.ascontiguousarray(codes), "info": info}
        return orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)
    except orjson.JSONEncodeError:
        # Rows may hold what orjson does not write: integers beyond 64 bits, halves of surrogate pairs, deep nesting.
        return _plain_json({"quantized_tokens": codes.tolist(), "info": info})


def _plain_json(document: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(document, separators=(",", ":")).encode("ascii")
    except RecursionError as error:
        raise RowError("write", "the row's fields are nested too deeply to be written beside its tokens") from error
