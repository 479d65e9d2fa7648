"""Reads codes from token files of any sink, and checks that a codec can decode them.

    a.json                          {"quantized_tokens": [[K ints] x T], "info": {...}}, or the bare list of lists
    a.npy                           integers (T, K); behind the array, info as JSON, or nothing
    tar://1536+480/a.tokens.npy::x.tar, s3://…     either of them, wherever ``storage`` finds it; known by its content
    parquet://7::x.parquet          row 7, counted from 0, of a parquet file
    jsonl://1536+480::x.jsonl       a line of JSON that has the codes in one of its fields

Token files may come from anywhere, so nothing in them is believed, and none takes much more memory than its own size: a
large JSON file is parsed some frames at a time, as Python's numbers take 34 times the space of their digits. Arrays are
read without pickle. ``code_checks.py`` checks what comes out.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from batch_tokenizer.codecs.base import CodecInfo
from batch_tokenizer.data.code_checks import ANY_CODEBOOKS, Codebooks, UncheckedArray, UncheckedFrames, kind_of
from batch_tokenizer.records import CODES_FIELD, RowError
from batch_tokenizer.storage.files import open_file
from batch_tokenizer.storage.json_lines import dump_json, parse_json
from batch_tokenizer.storage.jsonl_rows import (
    CODES_FIELDS,
    FRAMES_MARK,
    codes_field_of,
    line_info,
    parse_line,
    read_line,
)
from batch_tokenizer.storage.names import display_name, parse_line_location, parse_member, parse_row_location
from batch_tokenizer.storage.npy import read_header
from batch_tokenizer.storage.parquet_rows import read_row

#: Largest token file that is read; a day of audio at 20 codebooks takes about 200 MB.
_MOST_BYTES = 1 << 30

#: Largest ``info`` of a large JSON file, with the codes of the row's other audio.
_MOST_INFO_BYTES = 64 << 20

#: Bytes of JSON that are turned into Python's numbers at a time.
_PIECE_BYTES = 1 << 20

_NPY = b"\x93NUMPY"

#: In a large JSON file: what stands before the list of frames, between two of them, and where that list ends.
_FRAMES_BEGIN = re.compile(rb'"quantized_tokens"\s*:\s*(?=\[)|\A\s*(?=\[)')
_BETWEEN_FRAMES = re.compile(rb"\s*,\s*")
_FRAMES_END = re.compile(rb"\]\s*\]")

#: In a line of JSON: the field that has the codes, where it says so.
_CODES_FIELD_NAMED = re.compile(rb'"codes_field"\s*:\s*("(?:[^"\\]|\\.)*")')

Rest = TypeVar("Rest")

#: Places that are tried as the beginning of the frames.
_MOST_PLACES = 8


def read_tokens(
    location: str, info: CodecInfo, beside: Mapping[str, Any] | None = None
) -> tuple[npt.NDArray[np.uint16], Mapping[str, Any]]:
    """Codes of this codec, and what is known of them.

    Args:
        beside: what a member of a tar says of itself in the member beside it; the ``info`` of tokens that have none.

    Returns:
        uint16 (T, K), T >= 1 and 1 <= K <= ``info.num_codebooks``, each within its codebook; and the ``info`` that is
        stored with them, empty where there is none.

    Raises:
        RowError: they cannot be read, are not of such a form, were made by another codec (by ``info.fingerprint``), or
            have codes that this one does not have.
    """
    raw, origin = _open(location)
    name = display_name(location)
    if not origin and beside is not None and parse_member(location) is not None:
        origin = beside
    # Before the codes, as another codec's are out of range as well.
    if isinstance(origin, Mapping) and origin.get("fingerprint") not in (None, info.fingerprint):
        raise RowError(
            "load",
            f"{name}: made by codec {origin.get('codec')} (fingerprint {origin['fingerprint']}), "
            f"this is {info.name} (fingerprint {info.fingerprint})",
        )
    codes = raw.check(name, Codebooks(info.name, info.codebook_sizes))
    return codes, origin if isinstance(origin, Mapping) else {}


def parse_tokens(
    content: bytes, name: str, codebooks: Codebooks = ANY_CODEBOOKS
) -> tuple[npt.NDArray[np.uint16], Mapping[str, Any]]:
    """Codes uint16 (T, K) and ``info`` of a JSON or npy file's bytes.

    Args:
        name: for messages.

    Raises:
        RowError: they are not of such a form.
    """
    raw, origin = parse_token_file(content, name)
    return raw.check(name, codebooks), origin if isinstance(origin, Mapping) else {}


def parse_codes_line(content: bytes, name: str) -> tuple[npt.NDArray[np.uint16], dict[str, Any]]:
    """Codes uint16 (T, K) of a line of JSON, and what it says beside them.

    Args:
        name: for messages.

    Raises:
        RowError: it is no such line.
    """
    raw, info = parse_token_line(content, name)
    return raw.check(name, ANY_CODEBOOKS), info


def read_any_tokens(location: str) -> tuple[npt.NDArray[np.uint16], Mapping[str, Any]]:
    """As ``read_tokens``, of whatever codec.

    Raises:
        RowError: they cannot be read, or are not of such a form.
    """
    raw, origin = _open(location)
    return raw.check(display_name(location), ANY_CODEBOOKS), origin if isinstance(origin, Mapping) else {}


def _open(location: str) -> tuple[UncheckedFrames | UncheckedArray, object]:
    row = parse_row_location(location)
    if row is not None:
        values, about = read_row(*row)
        return UncheckedArray(values), about
    line = parse_line_location(location)
    if line is not None:
        return parse_token_line(read_line(*line), display_name(location))
    return parse_token_file(_read(location), display_name(location))


def _read(location: str) -> bytes:
    """A token file's bytes. Not a pipe's or a device's, which might never end."""
    with open_file(location, "a token file") as (file, size):
        if size > _MOST_BYTES:
            raise RowError("load", f"{display_name(location)}: {size:,} bytes, too large for a token file")
        try:
            return file.read()
        except OSError as error:
            raise RowError("load", f"{display_name(location)}: cannot be read: {error.strerror}") from error


def parse_token_file(content: bytes, name: str) -> tuple[UncheckedFrames | UncheckedArray, object]:
    """What stands for codes in a JSON or npy file's bytes, yet to be checked, and its ``info``.

    Raises:
        RowError: it is no such file.
    """
    if content.startswith(_NPY):
        return _parse_npy(content, name)
    if len(content) > _PIECE_BYTES:
        return _split_large_json(content, name, _FRAMES_BEGIN, partial(_tokens_of, name=name))
    document = _parse_json(content, name)
    tokens, origin = _tokens_of(document, name)
    if not isinstance(tokens, list):
        raise RowError("load", f"{name}: quantized_tokens is {kind_of(tokens)}, not a list of frames")
    return UncheckedFrames(lambda: [(tokens, _may_hold_bools(content))]), origin


def parse_token_line(content: bytes, name: str) -> tuple[UncheckedFrames | UncheckedArray, dict[str, Any]]:
    """As ``parse_token_file``, of a line of JSON that has codes in one of its fields."""
    if len(content) > _PIECE_BYTES:
        named = _CODES_FIELD_NAMED.findall(content)
        fields = (*(parse_json(text) for text in named), *CODES_FIELDS)
        begins = re.compile(b"|".join(rb"%b\s*:\s*(?=\[)" % re.escape(dump_json(field)) for field in fields))
        frames, (row, field) = _split_large_json(content, name, begins, partial(_line_parts, name=name))
        return frames, line_info(row, field)
    tokens, (row, field) = _line_parts(parse_line(content, name), name)
    return UncheckedFrames(lambda: [(tokens, _may_hold_bools(content))]), line_info(row, field)


def _line_parts(row: Any, name: str) -> tuple[Any, tuple[dict[str, Any], str]]:
    field = codes_field_of(row) if isinstance(row, dict) else None
    if field is None:
        raise RowError("load", f"{name}: has no field with codes, such as {CODES_FIELD}")
    return row[field], (row, field)


def parse_hidden_states(content: bytes, name: str) -> npt.NDArray[np.float16]:
    """Hidden states float16 (T, d) of an npy file's bytes.

    Raises:
        RowError: they are not of such a form.
    """
    array, _ = _parse_npy(content, name, "f", "hidden states float16 (T, d)")
    return np.asarray(array.values, np.float16)


def _parse_npy(
    content: bytes, name: str, kinds: str = "iu", wanted: str = "integers (T, K)"
) -> tuple[UncheckedArray, object]:
    """The array, whose dtype must be one of ``kinds``, and the JSON behind it."""
    stream = io.BytesIO(content)
    try:
        shape, fortran, dtype = read_header(stream)
    except ValueError as error:
        raise RowError("load", f"{name}: {error}") from error
    if dtype.kind not in kinds or len(shape) != 2 or min(shape) < 0:
        raise RowError("load", f"{name}: an array {shape} of {dtype}, not {wanted}")
    if 0 in shape:
        raise RowError("load", f"{name}: has no {'frames' if shape[0] == 0 else 'codes'}")
    count, begin = math.prod(shape), stream.tell()
    end = begin + count * dtype.itemsize
    if end > len(content):
        raise RowError("load", f"{name}: cut short: {len(content) - begin} of {end - begin} bytes of codes are there")
    values = np.frombuffer(content, dtype, count, begin).reshape(shape, order="F" if fortran else "C")
    if end == len(content):
        return UncheckedArray(values), None
    try:
        document = parse_json(content[end:])
    except ValueError as error:
        raise RowError("load", f"{name}: {len(content) - end} bytes behind the array that are not JSON") from error
    return UncheckedArray(values), document.get("info") if isinstance(document, Mapping) else None


# ----------------------------------------------------------------------------------------------------------------- JSON


def _split_large_json(
    content: bytes, name: str, begins: re.Pattern[bytes], parts: Callable[[Any], tuple[Any, Rest]]
) -> tuple[UncheckedFrames, Rest]:
    """As ``parse_token_file``. Frames are found by their brackets, and parsed only when they are checked.

    Args:
        begins: matches what stands before the list of frames.
        parts: what a document has in place of codes, and the rest that is returned beside them; raises ``RowError``.
    """
    for before in islice(begins.finditer(content), _MOST_PLACES):
        begin = before.end() + 1
        # 1. No codes are lists, so the first two brackets that close end the list of frames.
        last = _FRAMES_END.search(content, begin)
        if last is None or len(content) - (last.end() - before.end()) > _MOST_INFO_BYTES:
            continue
        # 2. The rest of the file shows whether these are the frames, and not a field of that name inside ``info``.
        rest = b'%b"%b"%b' % (content[: before.end()], FRAMES_MARK.encode(), content[last.end() :])
        try:
            tokens, origin = parts(_parse_json(rest, name))
        except RowError:
            continue
        if tokens == FRAMES_MARK:
            end = last.start() + 1
            return UncheckedFrames(lambda: _parse_pieces(content, begin, end, name)), origin  # noqa: B023 - returned at once
    raise RowError("load", f"{name}: not JSON with a list of frames of codes as its quantized_tokens")


def _parse_pieces(content: bytes, begin: int, end: int, name: str) -> Iterator[tuple[list[Any], bool]]:
    """The frames between two places of a large file, some at a time."""
    while begin < end:
        stop = content.index(b"]", min(begin + _PIECE_BYTES, end - 1)) + 1
        piece = b"[%b]" % content[begin:stop]
        yield _parse_json(piece, f"{name}: its frames from byte {begin} on"), _may_hold_bools(piece)
        between = _BETWEEN_FRAMES.match(content, stop)
        begin = stop if between is None or stop == end else between.end()


def _parse_json(content: bytes, name: str) -> Any:
    try:
        return parse_json(content)
    except ValueError as error:
        raise RowError("load", f"{name}: not JSON: {error}") from error


def _tokens_of(document: Any, name: str) -> tuple[Any, object]:
    """What a document has in place of codes, and its ``info``."""
    if not isinstance(document, Mapping):
        return document, None
    if "quantized_tokens" not in document:
        raise RowError("load", f"{name}: has no field quantized_tokens")
    return document["quantized_tokens"], document.get("info")


def _may_hold_bools(content: bytes) -> bool:
    """Whether to look for true and false, which numpy takes for 1 and 0 when they stand among integers."""
    return b"true" in content or b"false" in content
