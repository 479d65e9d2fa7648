"""``environments.json``: the devices and library versions that a run's rows were computed with.

Settings are the same for a whole run, or it is refused. The environment may change from one start to the next and from
rank to rank; where that changes the bits of tokens, it is refused too, unless ``--allow_mixed_devices``.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from batch_tokenizer.records import RunError
from batch_tokenizer.runtime.run_files import ENVIRONMENTS
from batch_tokenizer.runtime.run_folder import RunFolder
from batch_tokenizer.storage.atomic import os_error_ends_run, replace_json

logger = logging.getLogger(__name__)

#: Of these, matrix products in 16 bits depend on the type of GPU, and fused layers on whether they were compiled.
_DECIDES_BITS = ("device", "compiled")


def read_environments(run_dir: Path) -> list[dict[str, Any]]:
    """The environments of a run so far, in the order in which they joined it; empty where none is recorded.

    Raises:
        RunError: the file cannot be read (exit code 1).
    """
    path = run_dir / ENVIRONMENTS
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return []
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{path} cannot be read; remove it and start the same command again", exit_code=1) from error
    return [entry for entry in content if isinstance(entry, dict)] if isinstance(content, list) else []


def agree_on_environment(
    folder: RunFolder, environment: Mapping[str, Any], *, sixteen_bits: bool, allow_mixed: bool
) -> None:
    """Records what this process computes with, before its first row.

    Args:
        environment: JSON values, as ``devices.environment_of`` has them, and whether layers are ``compiled``.
        sixteen_bits: whether the model computes in 16 bits.
        allow_mixed: go on where bits may differ from those of the rows that are done.

    Raises:
        RunError: earlier rows were computed where bits may differ (exit code 1), or the record cannot be written.
    """
    # Under the lock, as all ranks come here at about the same time.
    with folder.exclusive_lock():
        known = read_environments(folder.path)
        if environment in known:
            return
        differing = [
            f"{name} {known[0][name]} before, {environment[name]} here"
            for name in _DECIDES_BITS
            if known and name in known[0] and known[0][name] != environment[name]
        ]
        if differing and sixteen_bits:
            reason = f"run folder {folder.path}: {'; '.join(differing)}: 16-bit tokens may differ in some bits"
            if not allow_mixed:
                raise RunError(
                    f"{reason}. Use the same GPUs (TORCHDYNAMO_DISABLE=1 turns compiling off), another "
                    "--run_dir, or --allow_mixed_devices",
                    exit_code=1,
                )
            logger.warning("%s", reason)
        with os_error_ends_run(f"run folder {folder.path}: environments.json cannot be written"):
            replace_json(folder.path / ENVIRONMENTS, [*known, environment])
