"""Any number of processes makes the same files of a corpus, and does no row twice."""

from __future__ import annotations

from collections.abc import Mapping

from tests.e2e.conftest import Open


def test_each_row_once_and_the_same_bytes(open_workspace: Open, undisturbed: Mapping[str, bytes]) -> None:
    """Five ranks here; one, two and three in the other end-to-end tests."""
    workspace = open_workspace(200)
    workspace.finish(5)
    workspace.check_complete(undisturbed)
    ledgers = sorted((workspace.run_dir / "ledger").glob("000001-*.jsonl"))
    assert len(ledgers) == 5
