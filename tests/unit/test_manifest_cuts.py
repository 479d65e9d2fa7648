"""The part of its file that a row means, and that the index and the rows agree about it."""

from __future__ import annotations

import json
import math
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batch_tokenizer.manifest.manifest import Manifest
from batch_tokenizer.manifest.row import LineState, cut_of
from batch_tokenizer.records import AudioCut, RowFailure


@pytest.mark.parametrize(
    ("fields", "cut"),
    [
        ({}, None),
        ({"duration": 3.5}, None),
        ({"duration": "long"}, None),
        ({"start": None, "end": None, "channel": None, "duration": 2}, None),
        ({"start": 1.5}, AudioCut(1.5, None)),
        ({"offset": 1}, AudioCut(1.0, None)),
        ({"start": 1.5, "offset": 1.5}, AudioCut(1.5, None)),
        ({"start": 1.5, "end": 2}, AudioCut(1.5, 2.0)),
        ({"offset": 1.5, "duration": 2}, AudioCut(1.5, 3.5)),
        ({"start": 0, "duration": 2}, AudioCut(0.0, 2.0)),
        ({"start": 1, "end": 2, "duration": 9}, AudioCut(1.0, 2.0)),
        ({"end": 2, "duration": 9}, AudioCut(0.0, 2.0)),
        ({"start": 1, "duration": -1}, AudioCut(1.0, None)),
        ({"channel": 0}, AudioCut(0.0, None, 0)),
        ({"channel": 1, "duration": 4}, AudioCut(0.0, None, 1)),
        ({"channel": 1, "start": 1, "duration": 4}, AudioCut(1.0, 5.0, 1)),
    ],
)
def test_fields_and_their_cut(fields: dict[str, Any], cut: AudioCut | None) -> None:
    assert cut_of(fields) == cut


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"start": -0.1}, 'field "start" is -0.1, not seconds'),
        ({"start": "1"}, "field \"start\" is '1', not seconds"),
        ({"start": True}, 'field "start" is True, not seconds'),
        ({"offset": False, "duration": 1}, 'field "offset" is False, not seconds'),
        ({"end": math.nan}, 'field "end" is nan, not seconds'),
        ({"end": math.inf}, 'field "end" is inf, not seconds'),
        ({"start": 10**9}, "not seconds"),
        ({"end": [1]}, "not seconds"),
        ({"start": 1, "offset": 2}, "say different things"),
        ({"start": 2, "end": 2}, "the segment ends at 2 s, where it has not begun"),
        ({"start": 2, "end": 1}, "the segment ends at 1 s, where it has not begun"),
        ({"end": 0}, "the segment ends at 0 s, where it has not begun"),
        ({"start": 2, "duration": 0}, "the segment ends at 2 s, where it has not begun"),
        ({"channel": -1}, 'field "channel" is -1, not a number from 0'),
        ({"channel": True}, 'field "channel" is True, not a number from 0'),
        ({"channel": 1.0}, 'field "channel" is 1.0, not a number from 0'),
        ({"channel": "left"}, "not a number from 0"),
    ],
)
def test_fields_that_are_no_cut(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=re.escape(reason)):
        cut_of(fields)


numbers = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 9), st.floats(-1, 9), st.sampled_from([1e9, 1e300, "1", [], {}]),
)  # fmt: skip
rows = st.dictionaries(
    st.sampled_from(["start", "end", "offset", "duration", "channel", "speaker"]), numbers, max_size=4
)


@given(st.lists(rows, min_size=1, max_size=12))
def test_the_index_says_of_each_line_what_reading_it_says(lines: list[dict[str, Any]]) -> None:
    """The index has a way of its own for rows without a cut; its states and durations must not show it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "data.jsonl")
        whole = [
            {"key": f"k{n}", "wav": f"{n}.wav", "quantized_tokens": f"{n}.json", **line} for n, line in enumerate(lines)
        ]
        path.write_text("".join(json.dumps(line) + "\n" for line in whole))
        manifest = Manifest.open(path, "wav2token", Path(folder, "index"))
        for line, item in zip(whole, manifest.read(0, len(whole)), strict=True):
            state, seconds = manifest.states[item.line], float(manifest.durations[item.line])
            if isinstance(item, RowFailure):
                with pytest.raises(ValueError, match="^" + re.escape(item.reason) + "$"):
                    cut_of(line)
                assert (item.key, state) == (line["key"], LineState.MALFORMED)
                continue
            assert state == LineState.ROW
            cut = cut_of(line)
            assert item.cut == cut
            duration = line.get("duration")
            if cut is not None and cut.end is not None:
                assert seconds == np.float32(cut.end - cut.start)
            elif type(duration) in (int, float) and 0 <= duration < 1e9:
                assert seconds == np.float32(duration)
            else:
                assert math.isnan(seconds)
