"""Modules import only leftwards: the table of ARCHITECTURE.md, held by reading every import statement."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "batch_tokenizer"
PAGE = PACKAGE.parent / "ARCHITECTURE.md"


def rooms() -> dict[str, set[str]]:
    """Room to the rooms that it may import, by the table of ARCHITECTURE.md; what is not in it may import all."""
    table = re.findall(r"^\| `(\w+)` \| .* \| (.*?) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return {room: {name for name in allowed.split(", ") if name != "–"} for room, allowed in table}


ROOMS = rooms()

#: Packages that one room alone imports.
KEPT_IN = {"torchaudio": "audio", "soundfile": "audio", "av": "audio", "soxr": "audio"}

FILES = sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imported(path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are written in full"
            names.append(node.module or "")
            names += [f"{node.module}.{alias.name}" for alias in node.names if node.module == "batch_tokenizer"]
    return names


def wrong_imports(path: Path) -> Iterator[str]:
    room = room_of(path)
    for name in imported(path):
        top, *rest = name.split(".")
        # The published loop is timed as published, with its own reading of files.
        if top in KEPT_IN and room != KEPT_IN[top] and path.name != "published_loop.py":
            yield f"{path}: only {KEPT_IN[top]} imports {top}"
        if top != "batch_tokenizer" or not rest or room not in ROOMS or rest[0] in (room, "__version__"):
            continue
        allowed = ROOMS[room]
        if rest[0] not in allowed and ".".join(rest[:2]) not in allowed:
            yield f"{path}: {room} must not import {name}"


def test_imports_point_leftwards():
    assert len(FILES) > 100
    assert [wrong for path in FILES for wrong in wrong_imports(path)] == []


def test_a_wrong_import_is_found(monkeypatch):
    monkeypatch.setitem(KEPT_IN, "torch", "audio")
    monkeypatch.setitem(ROOMS, "pipeline", ROOMS["pipeline"] - {"data"})
    found = list(wrong_imports(PACKAGE / "pipeline" / "rank_loop.py"))
    assert any("pipeline must not import batch_tokenizer.data.batching" in wrong for wrong in found)
    assert any("only audio imports torch" in wrong for wrong in wrong_imports(PACKAGE / "kernels" / "segments.py"))


def test_the_table_names_every_room():
    folders = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    assert folders | {"records", "audio_fields", "config"} == ROOMS.keys() | {"commands"}
    assert {name.split(".")[0] for allowed in ROOMS.values() for name in allowed} <= ROOMS.keys()


def test_kernels_import_torch_and_nothing_heavier():
    for path in (PACKAGE / "kernels").glob("*.py"):
        for name in imported(path):
            assert name.split(".")[0] not in {"transformers", "accelerate", "torchaudio", "soundfile"}, path


def test_every_file_says_what_it_is_for():
    assert [path for path in FILES if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))] == []
