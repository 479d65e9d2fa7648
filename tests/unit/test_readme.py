"""README.md: short, its Python block runs as pasted, and its commands, flags, extras and files are there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from batch_tokenizer import cli

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    """Words of each command line that starts the package."""
    found = [shlex.split(line, comments=True) for block in blocks("sh") for line in block.splitlines()]
    return [
        words[next(place for place, word in enumerate(words) if word == "batch_tokenizer") + 1 :]
        for words in found
        if "batch_tokenizer" in words
    ]


def test_it_is_short() -> None:
    assert len(TEXT.splitlines()) < 160


def test_the_extras_are_those_of_the_project() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = project.split("[project.optional-dependencies]")[1].split("\n[")[0]
    table = TEXT.split("| extra | for |")[1].split("\n\n")[0]
    named = re.findall(r"`(\w+)`", "".join(line.split("|")[1] for line in table.splitlines() if line.startswith("| `")))
    assert sorted(named) == sorted(re.findall(r"^(\w+) = ", section, re.MULTILINE))


def test_files_that_it_names_are_there() -> None:
    for name in re.findall(r"(?:docs|launch|sample_data|batch_tokenizer)/[\w./-]+\w", TEXT):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_its_commands_are_understood(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    if words[0] in cli.COMMANDS:
        cli._command_parser(words[0]).parse_args(words[1:])
    else:
        cli._run_config(cli.run_parser().parse_intermixed_args(words))


def test_its_python_block_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sample_data").symlink_to(ROOT / "sample_data")
    monkeypatch.chdir(tmp_path)
    (block,) = blocks("python")
    names: dict[str, Any] = {}
    exec(compile(block, "README.md", "exec"), names)
    assert names["codes"].shape == (1, 111, 20)
    assert all((tmp_path / "out" / name).stat().st_size > 100_000 for name in ("it-01.wav", "ru-02.wav"))
