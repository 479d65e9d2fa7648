"""Codes of a row's other audio (``--audio_fields``), wherever its own ones are stored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from batch_tokenizer.data.code_checks import ANY_CODEBOOKS, UncheckedArray, UncheckedFrames, kind_of
from batch_tokenizer.data.token_files import read_any_tokens
from batch_tokenizer.records import RowError
from batch_tokenizer.storage import parquet_rows
from batch_tokenizer.storage.names import display_name, parse_row_location
from batch_tokenizer.storage.row_info import other_names


def take_other_codes(info: Mapping[str, Any], name: str) -> tuple[dict[str, Any], dict[str, npt.NDArray[np.uint16]]]:
    """What is known of a row without the codes of its other audio, and these: uint16 (T, K) by their name.

    Args:
        info: has them as lists, or the locations of files of them, as a row of a tar has.
        name: for messages.

    Raises:
        RowError: they are not of such a form, cannot be read, or are not there although the row has some.
    """
    names = other_names(info)
    if not names:
        return dict(info), {}
    codes: dict[str, npt.NDArray[np.uint16]] = {}
    for field in names:
        value = info.get(field)
        if isinstance(value, str):
            codes[field] = read_any_tokens(value)[0]
        elif value is not None:
            if not isinstance(value, list):
                raise RowError("load", f"{name}: {field} is {kind_of(value)}, not a list of frames")
            codes[field] = UncheckedFrames(lambda: [(value, True)]).check(f"{name}: {field}", ANY_CODEBOOKS)  # noqa: B023
    check_other_names(info, codes, name)
    return {field: value for field, value in info.items() if field not in names}, codes


def check_other_names(info: Mapping[str, Any], codes: Mapping[str, Any], name: str) -> None:
    """
    Raises:
        RowError: a row has not all codes of other audio that its ``info`` says it has.
    """
    stated = info.get("other_codes")
    if not isinstance(stated, Mapping):
        return
    lost = [field for field in other_names(info) if field in stated and field not in codes]
    if lost:
        raise RowError("load", f"{name}: {', '.join(lost)} of the row are not there")


def read_other_codes(location: str, info: Mapping[str, Any]) -> Mapping[str, npt.NDArray[np.uint16]]:
    """Codes uint16 (T, K) of the other audio of a row whose tokens are at ``location``, by their name.

    Args:
        info: what is known of those tokens.

    Raises:
        RowError: they cannot be read, or are not of such a form.
    """
    row = parse_row_location(location)
    if row is None:
        return take_other_codes(info, display_name(location))[1]
    found = parquet_rows.read_other_codes(*row)
    return {
        field: UncheckedArray(values).check(f"{location}: {field}", ANY_CODEBOOKS) for field, values in found.items()
    }
