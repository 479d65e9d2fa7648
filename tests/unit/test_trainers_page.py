"""The Python blocks of docs/trainers.md run as they stand, one after the other, in a folder with tokens."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.shards import tokenized
from tests.unit.test_sinks_round_trip import write_shard

PAGE = Path(__file__).resolve().parents[2] / "docs/trainers.md"

BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokens").mkdir()
    codes = (np.arange(36).reshape(12, 3) % 7).astype(np.uint16)
    write_shard(
        tmp_path / "tokens" / "x.parquet", [tokenized(line, codes[line % 3 :], key=f"u{line}") for line in range(12)]
    )
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    loop, resuming = BLOCKS
    exec(compile(loop, "the loop of docs/trainers.md", "exec"), names)
    assert len([line for line in loop.splitlines() if line.strip()]) < 30
    assert len(names["losses"]) == 9
    assert names["losses"][-1] < names["losses"][0] / 2
    exec(compile(resuming, "resuming in docs/trainers.md", "exec"), names)
    assert names["rows"] == 3 * 12  # each row once in each of three epochs
    assert torch.load("checkpoint.pt")["data"]["consumed"] == 8


def test_the_commands_flags_are_there() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for flag in set(re.findall(r"--[a-z_]+", page)) - {"--to", "--out"}:
        assert f"`{flag}`" in (PAGE.parent / "flags.md").read_text(encoding="utf-8"), flag
