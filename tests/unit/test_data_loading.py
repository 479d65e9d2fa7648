"""Rows to features and codes, and everything that can be wrong with a token file."""

from __future__ import annotations

import json
import os
import pickle
import tracemalloc
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from batch_tokenizer.data import token_files
from batch_tokenizer.data.code_checks import Codebooks
from batch_tokenizer.data.loading import RowLoader
from batch_tokenizer.data.token_files import parse_tokens, read_tokens
from batch_tokenizer.records import RowError
from batch_tokenizer.storage.names import display_name
from tests.support.loading import INFO, FakeSpec, make_row

CODEBOOKS = Codebooks(INFO.name, INFO.codebook_sizes)
CODES = [[1023, 0, 127], [5, 6, 7]]


def write(folder: Path, content: object) -> str:
    """A token file; bytes as they stand, anything else as JSON."""
    path = folder / "tokens.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return str(path)


def reason_of(path: str) -> str:
    with pytest.raises(RowError) as raised:
        read_tokens(path, INFO)
    assert raised.value.stage == "load"
    assert raised.value.reason.startswith(f"{display_name(path)}: ")
    assert "\n" not in raised.value.reason
    return raised.value.reason.removeprefix(f"{path}: ")


def test_audio_rows_come_out_as_features(tmp_path: Path) -> None:
    audio = np.arange(-2000, 2000, dtype=np.int16)
    soundfile.write(tmp_path / "a.wav", audio, 24000)
    loader = pickle.loads(pickle.dumps(RowLoader("wav2token2wav", FakeSpec())))
    row = make_row(3, wav=str(tmp_path / "a.wav"))
    loaded = loader(row)
    assert loaded.row is row
    np.testing.assert_array_equal(loaded.features, audio[None].astype(np.float32) / 32768)
    assert (loaded.codes, loaded.num_samples, loaded.frames) == (None, 4000, 5)
    assert loaded.load_seconds > 0


def test_audio_longer_than_the_codec_takes_fails(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.zeros(24000), 24000)
    spec = FakeSpec(replace(INFO, max_samples=23999))
    with pytest.raises(RowError, match="too long"):
        RowLoader("wav2token", spec)(make_row(wav=str(tmp_path / "a.wav")))


def test_tokens_of_the_longest_audio_are_taken_and_longer_ones_fail(tmp_path: Path) -> None:
    """The longest audio may end in a frame that is not full, as a front end that pads has it."""

    class PaddingSpec(FakeSpec):
        def num_frames(self, num_samples: int) -> int:
            return super().num_frames(num_samples) + 1

    load = RowLoader("token2wav", PaddingSpec())
    assert load(make_row(quantized_tokens=write(tmp_path, [[1]] * 1501))).frames == 1501
    with pytest.raises(RowError, match="too long, 1502 frames where 1501 is the most; --long_audio segment"):
        load(make_row(quantized_tokens=write(tmp_path, [[1]] * 1502)))


@pytest.mark.parametrize(("num_quantizers", "width"), [(None, 3), (1, 1), (2, 2), (20, 3)])
def test_token_rows_come_out_as_codes(tmp_path: Path, num_quantizers: int | None, width: int) -> None:
    row = make_row(quantized_tokens=write(tmp_path, {"quantized_tokens": CODES, "info": {"key": "x"}}))
    loaded = RowLoader("token2wav", FakeSpec(), num_quantizers=num_quantizers)(row)
    assert loaded.codes is not None
    assert loaded.codes.dtype == np.uint16
    assert loaded.codes.flags.c_contiguous
    assert loaded.codes.tolist() == [frame[:width] for frame in CODES]
    assert (loaded.features, loaded.num_samples, loaded.frames) == (None, 1920, 2)


@pytest.mark.parametrize(
    "document",
    [
        CODES,
        {"quantized_tokens": CODES},
        {"quantized_tokens": CODES, "info": None},
        {"quantized_tokens": CODES, "info": {"fingerprint": None}},
        {"quantized_tokens": CODES, "info": {"fingerprint": INFO.fingerprint, "codec": "a copy", "clean": True}},
    ],
)
def test_accepted_forms(tmp_path: Path, document: object) -> None:
    assert read_tokens(write(tmp_path, document), INFO)[0].tolist() == CODES


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b"\xff\xfejunk", "not JSON"),
        (json.dumps({"quantized_tokens": CODES}).encode()[:-4], "not JSON"),
        (b"[" * 5000, "not JSON"),
        ({"tokens": CODES}, "has no field quantized_tokens"),
        ({"quantized_tokens": None}, "quantized_tokens is null, not a list"),
        ("text", "quantized_tokens is a string, not a list"),
        (7, "quantized_tokens is a number, not a list"),
        ([], "has no frames"),
        ([1, 2, 3], "frame 0 is a number, not a list"),
        ([[1], 2], "frame 1 is a number, not a list"),
        ([[], []], "frame 0 has no codes"),
        ([[1], []], "frame 1 has no codes"),
        ([[1, 2], [3]], "frame 1 has 1 codes where frame 0 has 2"),
        ([[1, 2, 3, 4]], "frame 0 has 4 codes where fake-24k has 3 codebooks"),
        ([[1, 2], [3, True]], "frame 1, codebook 1: true or false, not an integer"),
        ([[True, False]], "frame 0, codebook 0: true or false, not an integer"),
        ([[1, 2], [3.0, 4]], "frame 1, codebook 0: the number 3.0, not an integer"),
        ([["1", "2"]], "frame 0, codebook 0: a string, not an integer"),
        ([[1, None]], "frame 0, codebook 1: null, not an integer"),
        ([[[1], [2]]], "frame 0, codebook 0: a list, not an integer"),
        ([[1, 2], [3, -4]], "frame 1, codebook 1: code -4 is outside 0 to 127"),
        ([[1024, 2]], "frame 0, codebook 0: code 1024 is outside 0 to 1023"),
        ([[1023, 128]], "frame 0, codebook 1: code 128 is outside 0 to 127"),
        ([[65536, 1]], "frame 0, codebook 0: code 65536 is outside"),
        ([[2**64 - 1, -1]], "frame 0, codebook 0: code 18446744073709551615 is outside"),
        ([[10**30, 1]], "frame 0, codebook 0: code 1000000000000000000000000000000 is outside"),
        (
            {"quantized_tokens": [[99999]], "info": {"codec": "other-16k", "fingerprint": "0123"}},
            "made by codec other-16k (fingerprint 0123), this is fake-24k (fingerprint feedface)",
        ),
    ],
)
def test_faults_are_named(tmp_path: Path, content: object, reason: str) -> None:
    assert reason in reason_of(write(tmp_path, content))


def test_paths_that_are_no_files_are_named(tmp_path: Path) -> None:
    fifo, huge = tmp_path / "fifo", tmp_path / "huge"
    os.mkfifo(fifo)
    with huge.open("wb") as file:
        file.truncate(2**30 + 1)
    assert reason_of(str(tmp_path / "none")) == "no such file"
    assert "is a folder" in reason_of(str(tmp_path))
    assert "not a regular file" in reason_of(str(fifo))
    assert "too large" in reason_of(str(huge))
    assert "not a possible path" in reason_of(str(tmp_path / "none\0"))
    assert "cannot be opened: File name too long" in reason_of(str(tmp_path / ("n" * 300)))


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 1100) | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=4),
    max_leaves=12,
)


@given(ANY_JSON)
def test_any_document_is_codes_or_a_row_error(tmp_path_factory: pytest.TempPathFactory, document: Any) -> None:
    """No document gets through that is not codes, and none ends in another exception."""
    path = write(tmp_path_factory.getbasetemp(), {"quantized_tokens": document})
    try:
        codes, _ = read_tokens(path, INFO)
    except RowError:
        return
    assert codes.tolist() == document
    assert all(type(code) is int for frame in document for code in frame)


#: What other tools put around codes, and fields inside ``info`` that look like them.
INFOS = st.fixed_dictionaries(
    {},
    optional={
        "fingerprint": st.just(INFO.fingerprint),
        "quantized_tokens": st.sampled_from([[[1, 2]], [1, 2], "[[1]]", None, {"quantized_tokens": [[9]]}]),
        "text": st.sampled_from(['"quantized_tokens": [[1]]', "]]", "true", "ü"]),
    },
)


@given(
    st.lists(st.lists(st.integers(-1, 130), min_size=2, max_size=2), max_size=9) | ANY_JSON,
    INFOS,
    st.booleans(),
    st.sampled_from([None, 1]),
    st.integers(1, 40),
)
def test_a_large_document_is_read_as_a_small_one(
    tokens: Any, info: dict[str, Any], info_first: bool, indent: int | None, piece_bytes: int
) -> None:
    """Whatever else is in it and wherever pieces end: the same codes and info, or an error."""
    document = {"info": info, "quantized_tokens": tokens} if info_first else {"quantized_tokens": tokens, "info": info}
    for content in (json.dumps(document, indent=indent).encode(), json.dumps(tokens, indent=indent).encode()):
        expected = outcome_of(content)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(token_files, "_PIECE_BYTES", piece_bytes)
            assert outcome_of(content) == expected


def outcome_of(content: bytes) -> object:
    try:
        codes, info = parse_tokens(content, "x", CODEBOOKS)
    except RowError:
        return "refused"
    return codes.tolist(), info


def test_faults_in_a_large_document_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_files, "_PIECE_BYTES", 100)
    frames: list[Any] = [[1, 2]] * 500

    def reason(tokens: object) -> str:
        with pytest.raises(RowError) as raised:
            parse_tokens(json.dumps({"quantized_tokens": tokens}).encode(), "x", CODEBOOKS)
        return raised.value.reason

    assert reason([*frames, [1, 500]]) == "x: frame 500, codebook 1: code 500 is outside 0 to 127"
    assert reason([*frames, [1]]) == "x: frame 500 has 1 codes where frame 0 has 2"
    assert reason([*frames, [1, True]]) == "x: frame 500, codebook 1: true or false, not an integer"
    assert reason([*frames, 7]) == "x: not JSON with a list of frames of codes as its quantized_tokens"
    assert reason("x" * 1000) == "x: not JSON with a list of frames of codes as its quantized_tokens"


def test_a_large_document_takes_little_more_memory_than_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_files, "_PIECE_BYTES", 1 << 14)
    frames = np.random.default_rng(0).integers(0, 127, (100_000, 3))
    content = json.dumps({"quantized_tokens": frames.tolist(), "info": {"key": "x"}}).encode()
    tracemalloc.start()
    codes, _ = parse_tokens(content, "x", CODEBOOKS)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    np.testing.assert_array_equal(codes, frames)
    assert most < 2 * len(content)  # the codes, and once more while they are joined


ODD_HEADERS = [
    f"{{'descr': '<i4', 'fortran_order': False, 'shape': ({10**30}, 0)}}",
    f"{{'descr': '<i4', 'fortran_order': False, 'shape': (0, {2**63})}}",
    f"{{'descr': '<i4', 'fortran_order': True, 'shape': ({2**62}, {2**62})}}",
    "{'descr': '<i4', 'fortran_order': False, 'shape': (10**30, 0)}",
    "{'descr': '<i4', 'fortran_order': False, 'shape': (True, False)}",
    "{'descr': '<i4', 'fortran_order': False, 'shape': (-1, -1)}",
    "{'descr': '<i4', 'fortran_order': False, 'shape': ()}",
    "{'descr': '<i4', 'fortran_order': False, 'shape': (2, 2, 2)}",
    "{'descr': [('a', '<i4')], 'fortran_order': False, 'shape': (1, 1)}",
    "{'descr': ('<i4', (2,)), 'fortran_order': False, 'shape': (1, 1)}",
    "{'descr': '<i4', 'fortran_order': 7, 'shape': (1, 1)}",
    "{'descr': '', 'fortran_order': False, 'shape': (1, 1)}",
    "{'descr': '|O', 'fortran_order': False, 'shape': (1, 1)}",
    "{'descr': '<i4', 'fortran_order': False, 'shape': (1, 1)",
    "{'descr': '" + "''",
    "(" * 200,
    "1 is 1",
    "",
]


def npy(header: bytes, codes: bytes = b"") -> bytes:
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + codes


@pytest.mark.parametrize("header", ODD_HEADERS)
def test_odd_headers_of_arrays_are_refused_by_name(header: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RowError, match=r"^load: x: .") as raised:
            parse_tokens(npy(header.encode(), bytes(64)), "x")
    assert "\n" not in raised.value.reason


@given(st.integers(0, 70), st.binary(max_size=3), st.binary(max_size=16))
def test_any_damage_to_an_array_is_a_row_error(place: int, damage: bytes, codes: bytes) -> None:
    header = b"{'descr': '<i4', 'fortran_order': False, 'shape': (2, 2), }"
    content = npy(header[:place] + damage + header[place + len(damage) :], codes)
    try:
        found, _ = parse_tokens(content, "x")
    except RowError:
        return
    assert found.ndim == 2
