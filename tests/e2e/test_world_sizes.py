"""Any number of processes makes the same files of a corpus, and does no row twice."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from tests.e2e.conftest import NUM_ROWS, Open


@pytest.mark.parametrize("num_processes", [3, 5])
def test_each_row_once_and_the_same_bytes(
    open_workspace: Open, undisturbed: Mapping[str, bytes], num_processes: int
) -> None:
    workspace = open_workspace(NUM_ROWS)
    workspace.finish(num_processes)
    workspace.check_complete(undisturbed)
    ledgers = sorted((workspace.run_dir / "ledger").glob("000001-*.jsonl"))
    assert len(ledgers) == num_processes
