"""Where long rows are taken apart, and that what is put together again is whole."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from batch_tokenizer.data.loading import RowLoader
from batch_tokenizer.data.pieces import PassLimit, piece_of
from batch_tokenizer.pipeline.long_audio import _SampleFile, fade
from batch_tokenizer.records import AudioCut, Pieces, RowError, RowFailure, RunError
from tests.support.loading import INFO, FakeSpec, make_row

SPEC = FakeSpec(replace(INFO, max_samples=None))


class StreamingSpec(FakeSpec):
    streams = True


def test_limits_of_a_run() -> None:
    assert PassLimit.of(FakeSpec()).samples == INFO.max_samples
    assert PassLimit.of(SPEC).samples is None
    assert PassLimit.of(SPEC, "segment").samples == 60 * 24000
    assert PassLimit.of(FakeSpec(replace(INFO, max_samples=1000)), "segment").samples == 1000
    assert PassLimit.of(SPEC, "segment", 2.5).samples == 60000
    assert PassLimit.of(StreamingSpec(), "stream", 1.0).samples == 24000  # 25 whole frames
    assert PassLimit.of(StreamingSpec(), "stream", 0.09).samples == 2 * 960
    assert PassLimit.of(StreamingSpec(), "stream", 0.001).samples == 960
    with pytest.raises(RunError, match="takes 60 s in one pass"):
        PassLimit.of(FakeSpec(), "native", 61)
    with pytest.raises(RunError, match="no exact streams"):
        PassLimit.of(SPEC, "stream")


def test_only_segments_are_settings_of_a_run_folder() -> None:
    assert PassLimit.of(SPEC, "segment", 2).settings == {"segment_samples": 48000}
    assert PassLimit.of(SPEC, "native", 2).settings == {}
    assert PassLimit.of(StreamingSpec(), "stream", 2).settings == {}


@given(st.integers(1, 5000), st.integers(1, 700), st.floats(0, 3000), st.sampled_from([8000, 24000, 44100]))
def test_pieces_of_audio_touch_and_are_the_whole(total: int, step: int, start: float, rate: int) -> None:
    pieces = PassLimit("segment", step).of_audio(total)
    row = replace(make_row(wav="a.wav"), cut=AudioCut(start, None, 1))
    rows = [piece_of(row, pieces, number, rate) for number in range(len(pieces))]
    assert [one.piece for one in rows] == list(range(len(rows)))
    assert all(one.cut is not None and one.cut.channel == 1 and one.key == row.key for one in rows)
    edges = [(round(one.cut.start * rate), round(one.cut.end * rate)) for one in rows if one.cut and one.cut.end]
    assert edges[0][0] == round(start * rate)
    assert edges[-1][1] == round(start * rate) + total
    assert all(a[1] == b[0] for a, b in pairwise(edges))
    assert all(end - begin == step for begin, end in edges[:-1])
    assert 1 <= edges[-1][1] - edges[-1][0] <= step


def test_loading_says_how_a_long_row_is_taken_apart(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.zeros(50000), 24000)
    load = RowLoader("wav2token", SPEC, limit=PassLimit.of(SPEC, "segment", 1.0))
    row = make_row(wav=str(tmp_path / "a.wav"))
    loaded = load(row)
    assert loaded.features is None
    assert loaded.pieces == Pieces("segments", (0, 24000, 48000, 50000))
    assert loaded.num_samples == 50000
    piece = load(piece_of(row, loaded.pieces, 2, 24000))
    assert (piece.num_samples, piece.pieces) == (2000, None)
    assert load(replace(row, cut=AudioCut(1.5))).pieces is None
    assert load(replace(row, cut=AudioCut(0.5))).pieces == Pieces("segments", (0, 24000, 38000))
    with pytest.raises(RowError, match=r"too long.*raise --max_seconds, or --long_audio segment takes it in segments"):
        RowLoader("wav2token", SPEC, limit=PassLimit.of(SPEC, "native", 1.0))(row)


def test_codes_go_by_the_segments_that_they_were_made_in() -> None:
    origin = {"segments": [[0, 0], [25, 24000]], "num_samples": 30000, "fingerprint": "feedface"}
    for limit in (PassLimit("native", 24000), PassLimit("segment", 960), PassLimit("stream", 960), PassLimit()):
        assert limit.of_codes(SPEC, 32, origin) == Pieces("segments", (0, 24000, 30000), (0, 25, 32))


@pytest.mark.parametrize(
    "origin",
    [
        {"segments": 3, "num_samples": 30000},
        {"segments": [], "num_samples": 30000},
        {"segments": [[0]], "num_samples": 30000},
        {"segments": [["a", "b"]], "num_samples": 30000},
        {"segments": [[1, 0], [25, 24000]], "num_samples": 30000},
        {"segments": [[0, 5], [25, 24000]], "num_samples": 30000},
        {"segments": [[0, 0], [25, 24000], [25, 24000]], "num_samples": 30000},
        {"segments": [[0, 0], [40, 24000]], "num_samples": 30000},
        {"segments": [[0, 0], [24, 24000]], "num_samples": 30000},
        {"segments": [[0, 0], [25, 24000]], "num_samples": 24000},
        {"segments": [[0, 0], [25, 24000]]},
        {"segments": [[0, 0], [float("inf"), 24000]], "num_samples": 30000},
    ],
)
def test_segments_that_are_none_are_refused(origin: dict[str, object]) -> None:
    with pytest.raises(RowError, match="segment"):
        PassLimit().of_codes(SPEC, 32, {**origin, "fingerprint": "feedface"})
    assert PassLimit().of_codes(SPEC, 32, origin) is None


def test_codes_without_segments_are_taken_apart_as_the_policy_says() -> None:
    assert PassLimit("segment", 24000).of_codes(SPEC, 25, {}) is None
    assert PassLimit("segment", 24000).of_codes(SPEC, 60, {}) == Pieces(
        "windows", (0, 24000, 48000, 57600), (0, 25, 50, 60)
    )
    pieces = PassLimit("stream", 24000).of_codes(SPEC, 60, {})
    assert pieces is not None
    assert pieces.kind == "stream"
    with pytest.raises(RowError, match="too long, 60 frames where 25 is the most"):
        PassLimit("native", 24000).of_codes(SPEC, 60, {})


def test_the_failure_of_a_piece_says_where_it_is() -> None:
    row = make_row(3, wav="a.wav")
    assert RowFailure.of(row, "load", "torn").reason == "torn"
    piece = piece_of(row, Pieces("segments", (0, 24000, 36000)), 1, 24000)
    failure = RowFailure.of(piece, "load", "torn")
    assert failure.reason == "torn (in its piece from 1 to 1.5 s)"
    assert (failure.line, failure.digest, failure.key) == (3, row.digest, row.key)


@given(st.integers(1, 6), st.integers(4, 40), st.integers(0, 90), st.sampled_from([2, 4]), st.randoms())
def test_windows_faded_into_each_other_are_the_whole(
    count: int, step: int, context: int, width: int, order: object
) -> None:
    """Where windows agree with the whole, so does what is put together, in whatever order they come."""
    whole = np.random.default_rng(count * step).uniform(-1, 1, count * step).astype(np.float32)
    context = max(context, width // 2)
    file = _SampleFile(Path("."), 1)
    numbers = list(range(count))
    order.shuffle(numbers)  # type: ignore[attr-defined]
    for number in numbers:
        begin, end = number * step, (number + 1) * step
        first, last = max(0, begin - context), min(len(whole), end + context)
        window = whole[first:last]
        place, used = fade(window, begin - first, None if end == len(whole) else end - first, width)
        file.add(first + place, used)
    made = file.map()
    assert made is not None
    np.testing.assert_allclose(made, whole, atol=1e-6)
