"""Fixtures that need no module of the package at import."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def golden_root() -> Path:
    """Known answers of the published models; they lie beside the repository where they are at hand."""
    folder = ROOT.parent / "shared" / "golden"
    if not folder.is_dir():
        pytest.skip("the golden checkpoints (../shared/golden) are not here")
    return folder
