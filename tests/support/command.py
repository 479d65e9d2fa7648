"""The command line, as a user's process or in this one, and what it leaves behind."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from batch_tokenizer.cli import main

ROOT = Path(__file__).resolve().parents[2]


def environment(**more: str) -> dict[str, str]:
    """This process's environment without a launcher's variables, with the package importable and one thread each."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "TORCHELASTIC_"))}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        kept.pop(name, None)
    return {**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


def batch_tokenizer(
    *words: str | Path, ranks: int | None = None, cwd: Path | None = None, timeout: float = 900
) -> subprocess.CompletedProcess[str]:
    """``python -m batch_tokenizer WORDS``, or the same under torchrun with ``ranks`` processes."""
    launcher = (
        ["-m"] if ranks is None else ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "-m"]
    )
    return subprocess.run(
        [sys.executable, *launcher, "batch_tokenizer", *map(str, words)],
        capture_output=True, text=True, timeout=timeout, cwd=cwd or ROOT, env=environment(),
    )  # fmt: skip


def run_here(*words: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """``batch_tokenizer WORDS`` in this process, as starting another takes seconds of processor time.

    Logs go to ``stderr``, as they do for a user, and not to ``caplog``.
    """
    command = list(map(str, words))
    before = Path.cwd()
    root = logging.getLogger()
    level = root.level
    with (
        contextlib.redirect_stdout(io.StringIO()) as stdout,
        contextlib.redirect_stderr(io.StringIO()) as stderr,
        mock.patch.object(root, "handlers", []),  # those of pytest, beside which ``main`` would add none
    ):
        os.chdir(cwd or ROOT)
        try:
            status = main(command)
        finally:
            os.chdir(before)
            root.setLevel(level)
    return subprocess.CompletedProcess(command, status, stdout.getvalue(), stderr.getvalue())


def write_manifest(path: Path, rows: Sequence[Any]) -> Path:
    """Rows as JSON lines; a row that is bytes is written as it stands."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, bytes) else json.dumps(row, ensure_ascii=False).encode() for row in rows]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def output_row(key: str, wav: Path, out: Path, **more: Any) -> dict[str, Any]:
    """A manifest row with both outputs in the folder ``out``."""
    return {
        "key": key,
        "wav": str(wav),
        "quantized_tokens": str(out / f"{key}.json"),
        "reconstructed_wav": str(out / f"{key}.wav"),
        **more,
    }


def failures(run_dir: Path) -> dict[str | None, dict[str, Any]]:
    """``failures.jsonl`` by key."""
    lines = (run_dir / "failures.jsonl").read_text(encoding="utf-8").splitlines()
    return {row["key"]: row for row in map(json.loads, lines)}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below ``folder``, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
