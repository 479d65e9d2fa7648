"""``run.json``: the settings that all commands on a run folder share, and the run's id."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from batch_tokenizer.records import RunError
from batch_tokenizer.storage.atomic import atomic_write


def write_run(run_dir: Path, settings: Mapping[str, Any], run_id: str = "") -> None:
    """Write ``run.json``, with a new id unless one is given.

    Raises:
        OSError: it cannot be written.
    """
    content = {"settings": settings, "id": run_id or uuid.uuid4().hex[:16]}
    with atomic_write(run_dir / "run.json") as file:
        file.write((json.dumps(content, indent=2) + "\n").encode())


def read_run(run_dir: Path) -> dict[str, Any] | None:
    """The content of ``run.json``, or None where there is none.

    Raises:
        RunError: it cannot be read, or holds something else (exit code 1).
    """
    path = run_dir / "run.json"
    damaged = f"{path} is damaged: remove it and start the same command with --overwrite"
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror}", exit_code=1) from error
    except (ValueError, RecursionError) as error:
        raise RunError(damaged, exit_code=1) from error
    if not isinstance(content, dict) or not isinstance(content.get("settings"), dict):
        raise RunError(damaged, exit_code=1)
    return content


def read_settings(run_dir: Path) -> dict[str, Any] | None:
    """The settings in ``run.json``, or None where there is none.

    Raises:
        RunError: it cannot be read, or holds something else (exit code 1).
    """
    content = read_run(run_dir)
    return None if content is None else dict(content["settings"])


def setting_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """A line for each setting in which a run differs from its folder."""
    nothing = "nothing"
    return [
        f"{name}: run folder has {before.get(name, nothing)}, this run has {now.get(name, nothing)}"
        for name in dict.fromkeys((*before, *now))
        if before.get(name, nothing) != now.get(name, nothing)
    ]
