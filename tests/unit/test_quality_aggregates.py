"""Means, intervals, groups, tables, and the use of codebooks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batch_tokenizer.quality.aggregates import ALL, estimate, group, level_notes, score_table
from batch_tokenizer.quality.codebooks import CodebookUse, bit_rate


def record(key, language=None, quantizers=8, scores=None, not_scored=None):
    row = {} if language is None else {"language": language}
    return {
        "key": key, "row": row, "num_quantizers": quantizers, "scores": scores or {}, "not_scored": not_scored or {},
    }  # fmt: skip


@given(st.lists(st.floats(-100, 100), min_size=3, max_size=40))
def test_the_interval_holds_the_mean_whatever_the_order(values):
    found = estimate(values)
    assert found.mean == pytest.approx(np.mean(values), abs=1e-9)
    assert found.low - 1e-9 <= found.mean <= found.high + 1e-9
    assert estimate(values[::-1]) == found


def test_the_interval_is_as_wide_as_theory_says():
    values = np.random.default_rng(3).normal(2, 1, 400)
    found = estimate(values)
    assert (found.high - found.low) / 2 == pytest.approx(1.96 / 20, rel=0.15)


def test_few_values_have_no_interval_and_nan_is_refused():
    assert estimate([1.0, 2.0]).low is None
    with pytest.raises(ValueError, match="finite"):
        estimate([1.0, float("nan")])
    with pytest.raises(ValueError, match="one or more"):
        estimate([])


def test_groups_by_field_and_codebooks():
    utterances = [
        record("a", "it", 8, {"stoi": 0.5}),
        record("b", "it", 8, {"stoi": 0.7}),
        record("c", "ru", 8, {"stoi": 0.9}),
        record("c", "ru", 4, {"stoi": 0.1}),
        record("d", None, 8, {}, {"stoi": "the original is silent"}),
    ]
    groups = {(one.name, one.num_quantizers): one for one in group(utterances, "language")}
    assert groups["language=it", 8].estimates["stoi"].mean == pytest.approx(0.6)
    assert groups["language=ru", 4].estimates["stoi"].mean == 0.1
    assert groups[ALL, 8].estimates["stoi"].count == 3
    assert groups[ALL, 8].count == 4
    assert groups["(none)", 8].estimates == {}
    assert groups[ALL, 8].reasons == {"stoi": {"the original is silent": 1}}
    assert next(iter(reversed(groups)))[0] == ALL
    assert {one.name for one in group(utterances)} == {ALL}


def test_the_table_never_drops_a_metric():
    utterances = [
        record("a", scores={"stoi": 0.5}, not_scored={"sim": "not run: no model", "pesq_wb": "shorter than 0.25 s"})
    ]
    table = score_table(group(utterances), ["pesq_wb", "sim", "stoi"], 80)
    lines = table.splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| ")]
    assert cells == [["", "all"], ["PESQ-WB", "-"], ["SIM", "not run"], ["STOI", "0.500"], ["utterances", "1"]]
    assert "PESQ-WB: 1 of 1 without a value: shorter than 0.25 s" in lines
    assert "SIM: 1 of 1 without a value: not run: no model" in lines


@pytest.mark.parametrize("width", [20, 60, 80, 200])
def test_the_table_fits_its_width_and_drops_no_group(width):
    utterances = [
        record(str(number), f"language {number % 9}", count, {"stoi": number / 40, "level_change": 1.0})
        for number in range(40)
        for count in (2, 8)
    ]
    groups = group(utterances, "language")
    table = score_table(groups, ["stoi", "level_change"], width)
    for one in groups:
        assert f"{one.name}, {one.num_quantizers} codebooks" in table
    longest = max(len(line) for line in table.splitlines())
    assert longest <= max(width, 60)  # one column of a group and that of the names are never parted


def test_a_level_that_changed_is_said_in_words():
    assert level_notes([record("a", scores={"level_change": 2.9}), record("b", scores={"stoi": 1.0})]) == []
    [note] = level_notes([record("a", scores={"level_change": 13.04}), record("b", scores={"level_change": -4.0})])
    assert note.startswith("level: 2 of 2 utterances")
    assert note.endswith("a is 13.0 dB louder")


class TestCodebookUse:
    def test_even_use_and_no_use(self):
        use = CodebookUse([16, 16, 16])
        codes = np.stack([np.arange(64) % 16, np.arange(64) % 4, np.zeros(64)], axis=1).astype(np.uint16)
        use.add(codes[:10])
        use.add(codes[10:])
        even, quarter, one = use.table()
        assert even == {"codebook": 1, "size": 16, "used": 16, "dead": 0, "entropy": 4.0, "perplexity": 16.0}
        assert (quarter["perplexity"], quarter["dead"]) == (4.0, 12)
        assert (one["perplexity"], one["used"], one["dead"]) == (1.0, 1, 15)
        assert use.frames == 64
        assert use.entropy_rate(25) == pytest.approx(25 * (4 + 2 + 0))

    def test_unknown_sizes(self):
        use = CodebookUse()
        use.add(np.array([[3], [5]], np.uint16))
        assert use.table()[0]["dead"] is None

    def test_bit_rate(self):
        assert bit_rate([1024, 1024, 128], 25) == pytest.approx(25 * 27)
