"""Fixtures that need no module of the package at import."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import hypothesis
import pytest

# The same few examples each time, and no deadline, which a busy machine would miss.
# ``pytest --hypothesis-profile=search`` tries many new ones.
hypothesis.settings.register_profile("any machine", deadline=None, derandomize=True, max_examples=40)
hypothesis.settings.register_profile("search", deadline=None, max_examples=300)
hypothesis.settings.load_profile("any machine")

# Tests run side by side, one for each core. Threads beyond that wait for one another: a test takes ten times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    """A test draws the same numbers, whichever tests ran before it in its process."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(scope="session")
def golden_root() -> Path:
    """Known answers of the published models; they lie beside the repository where they are at hand."""
    folder = ROOT.parent / "shared" / "golden"
    if not folder.is_dir():
        pytest.skip("the golden checkpoints (../shared/golden) are not here")
    return folder
