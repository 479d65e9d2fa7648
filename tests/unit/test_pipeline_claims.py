"""How far ahead a process claims: far while much is left, a little at the end, at least a quarter of a unit."""

from __future__ import annotations

import json

import numpy as np

from batch_tokenizer.manifest.manifest import Manifest
from batch_tokenizer.manifest.units import plan_units
from batch_tokenizer.pipeline.claimed_rows import ClaimedRows
from batch_tokenizer.runtime.work_queue import WorkQueue


def claims(tmp_path, rows, world_size, taken=()):
    path = tmp_path / "data.jsonl"
    path.write_text(
        "".join(
            json.dumps({"key": str(n), "wav": f"{n}.wav", "quantized_tokens": f"{n}.json"}) + "\n" for n in range(rows)
        )
    )
    manifest = Manifest.open(path, "wav2token", tmp_path / "index")
    units = plan_units(manifest, world_size=world_size)
    numbers = iter(unit for unit in range(len(units) + 1) if unit not in taken)
    todo = np.ones(rows, bool)
    return ClaimedRows(WorkQueue(len(units), numbers.__next__), units, manifest, todo, world_size), units


def test_the_limit_shrinks_to_a_quarter_of_a_unit(tmp_path):
    held, units = claims(tmp_path, 3000, world_size=2)
    assert held.prefetch_limit(64) == 64
    assert held.prefetch_limit(256) == 3000 // 32
    limits = []
    lines = []
    for item in held:
        lines.append(item.line)
        limits.append(held.prefetch_limit(64))
    assert sorted(lines) == list(range(3000))
    assert limits == sorted(limits, reverse=True)
    assert limits[-1] == 3000 // len(units) // 4


def test_units_that_others_took_count_as_claimed(tmp_path):
    _, units = claims(tmp_path, 1000, world_size=2)
    last, _ = claims(tmp_path, 1000, world_size=2, taken=range(len(units) - 1))
    next(iter(last))
    assert last.prefetch_limit(64) == 1000 // len(units) // 4


def test_a_small_job_is_held_row_by_row(tmp_path):
    held, _ = claims(tmp_path, 10, world_size=2)
    assert held.prefetch_limit(64) == 1


def test_a_process_alone_holds_what_it_likes(tmp_path):
    held, _ = claims(tmp_path, 10, world_size=1)
    for _ in held:
        assert held.prefetch_limit(256) == 256


def test_lines_that_are_not_to_do_are_left_out(tmp_path):
    held, _ = claims(tmp_path, 50, world_size=2)
    held._todo[10:20] = False
    assert {item.line for item in held} == {*range(10), *range(20, 50)}
