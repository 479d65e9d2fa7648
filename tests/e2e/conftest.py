"""One corpus for the tests that kill, stop and restart runs, and what an undisturbed run makes of it."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from tests.support.runs import Workspace, make_corpus

#: Opens a workspace for the corpus's first rows, in a new folder.
Open = Callable[[int], Workspace]

NUM_ROWS = 400


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Clips of 0.1 to 0.3 s, done in this process, which nobody disturbs.

    Test processes of pytest-xdist share it: the first one makes it, the others wait.
    """
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    with (folder / "reference.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        corpus = make_corpus(folder / "corpus", NUM_ROWS)
        if (folder / "reference").exists():
            return Workspace(corpus, folder / "reference")
        workspace = Workspace.make(corpus, folder / "reference")
        workspace.finish_here()
        workspace.check_complete()
        return workspace


@pytest.fixture(scope="session")
def undisturbed(reference: Workspace) -> Mapping[str, bytes]:
    """Every output of the undisturbed run."""
    return reference.outputs()


@pytest.fixture
def open_workspace(reference: Workspace, tmp_path: Path) -> Open:
    """A place to run in."""
    return lambda num_rows: Workspace.make(reference.corpus.first(num_rows), tmp_path / "run")
