"""``run.json``: the settings that all commands on a run folder share, and the run's id."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from batch_tokenizer.config import RunConfig, beside
from batch_tokenizer.records import RunError
from batch_tokenizer.runtime.run_files import RUN, is_run_folder
from batch_tokenizer.storage.atomic import replace_json

#: Of the ledger's lines. Those of batch_tokenizer 0.1, which wrote no format, had no check values.
FORMAT = 2


def write_run(run_dir: Path, settings: Mapping[str, Any], run_id: str = "") -> None:
    """Write ``run.json``, with a new id unless one is given.

    Raises:
        OSError: it cannot be written.
    """
    content = {"settings": settings, "id": run_id or uuid.uuid4().hex[:16], "format": FORMAT}
    replace_json(run_dir / RUN, content)


def read_run(run_dir: Path) -> dict[str, Any] | None:
    """The content of ``run.json``, or None where there is none.

    Raises:
        RunError: it cannot be read, or holds something else (exit code 1).
    """
    path = run_dir / RUN
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
        RunError: it cannot be read, or holds something else (exit code 1); it is of another version (2).
    """
    content = read_run(run_dir)
    if content is None:
        return None
    if other := other_version(content):
        raise RunError(
            f"run folder {run_dir} is of {other}, whose ledger this version does not read: use that version for it, or "
            "start the run with another --run_dir, or with --overwrite to discard what it holds"
        )
    return dict(content["settings"])


def other_version(content: Mapping[str, Any]) -> str | None:
    """Which version of batch_tokenizer a run folder is of, by its ``run.json``; None if it is this one."""
    if content.get("format") == FORMAT:
        return None
    return "batch_tokenizer 0.1" if "format" not in content else "another batch_tokenizer"


def run_dir_of(config: RunConfig) -> Path:
    """The run folder of a run: the one it names, or the default.

    Versions before 0.2 had it beside the source; one that was begun there, for the same outputs, is used on.

    Raises:
        RunError: a ``run.json`` beside the source cannot be read (exit code 1).
    """
    if config.run_dir is not None:
        return config.run_dir
    default = config.default_run_dir()
    earlier = beside(config.data_list, f".{config.task}.run")
    if earlier != default and not is_run_folder(default):
        content = read_run(earlier)
        if content is not None and content["settings"].get("output_dir") == config.output_dir:
            return earlier
    return default


def setting_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """A line for each setting in which a run differs from its folder."""
    nothing = "nothing"
    return [
        f"{name}: run folder has {before.get(name, nothing)}, this run has {now.get(name, nothing)}"
        for name in dict.fromkeys((*before, *now))
        if before.get(name, nothing) != now.get(name, nothing)
    ]
