"""One corpus for the tests that kill, stop and restart runs, and what an undisturbed run makes of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from tests.support.runs import Corpus, Workspace, make_corpus

#: Opens a workspace for the corpus's first rows, in a new folder.
Open = Callable[[int], Workspace]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """A thousand clips of 0.1 to 0.3 s."""
    return make_corpus(tmp_path_factory.mktemp("corpus") / "corpus", 1000)


@pytest.fixture(scope="session")
def undisturbed(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, bytes]:
    """Every output of one process alone that nobody disturbed."""
    workspace = Workspace.make(corpus, tmp_path_factory.mktemp("undisturbed") / "run")
    workspace.finish(1)
    workspace.check_complete()
    return workspace.outputs()


@pytest.fixture
def open_workspace(corpus: Corpus, tmp_path: Path) -> Open:
    """A place to run in."""
    return lambda num_rows: Workspace.make(corpus.first(num_rows), tmp_path / "run")
