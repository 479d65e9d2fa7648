"""A run's manifest: made from ``--data_list`` when the run starts, and found again afterwards.

``source.json`` in the run folder records what the user typed, which local file the rows were listed in, and the
settings that shaped them, so that ``verify``, ``evaluate`` and ``report`` read the very rows that the run did, without
the sources.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from batch_tokenizer.config import RunConfig
from batch_tokenizer.records import RunError
from batch_tokenizer.runtime.run_files import SOURCE, SUMMARY, read_record
from batch_tokenizer.sources.finishing import SourceSettings
from batch_tokenizer.sources.listing import local_manifest, names_of_outputs
from batch_tokenizer.sources.patterns import find_sources
from batch_tokenizer.storage.atomic import os_error_ends_run, replace_json
from batch_tokenizer.storage.names import display_source
from batch_tokenizer.storage.streams import ALLOW_PIPE


def settings_of(config: RunConfig, run_dir: Path) -> SourceSettings:
    """What shapes the rows of a run. Where ``--names auto`` was decided when the run began, it stays so, although there
    may be more files by now."""
    names: str = config.names
    path = run_dir / SOURCE
    record = read_record(path) if path.is_file() else {}
    before = record.get("settings")
    if names == "auto" and isinstance(before, dict) and record.get("data_list") == str(config.data_list):
        names = str(before.get("names", names))
    others = tuple(other.field for other in config.other_audio if other.field is not None)
    return SourceSettings(
        config.task, config.sink, config.output_dir, config.audio_format, config.channels, config.audio_column, names,
        config.audio_field, others,
    )  # fmt: skip


def allow_pipes(config: RunConfig) -> None:
    """Lets this process, and the loader processes that it starts, run ``pipe:`` commands, if that was asked for."""
    if config.allow_pipe:
        os.environ[ALLOW_PIPE] = "1"


def prepare(config: RunConfig, run_dir: Path, source: str, idle: Callable[[], None]) -> Path:
    """Rank 0, when a run starts: the local file of its rows, which ``source.json`` records.

    Args:
        source: what stands for ``--data_list``; the same, unless that is a run folder.

    Raises:
        RunError: the source cannot be listed, or the run folder not be written.
    """
    settings = settings_of(config, run_dir)
    settings = replace(settings, names=names_of_outputs(find_sources(source), settings))
    manifest = local_manifest(source, run_dir / "index", settings, idle)
    listed = manifest.parent == run_dir / "index"
    record = {
        "data_list": str(config.data_list),
        "manifest": manifest.name if listed else str(manifest.resolve()),
        "settings": asdict(settings),
    }
    with os_error_ends_run(f"run folder {run_dir}: source.json cannot be written"):
        replace_json(run_dir / SOURCE, record)
    return manifest


def find_manifest(run_dir: Path, data_list: str | Path | None) -> Path:
    """The local file of a run's rows: the recorded one, unless ``data_list`` names another; of a run folder without a
    record, what its summary says, or what lies beside it under the name that fits.

    Raises:
        RunError: it is not to be found.
    """
    record = read_record(run_dir / SOURCE)
    if record and data_list in (None, record.get("data_list")):
        path = run_dir / "index" / str(record.get("manifest"))  # an absolute path stays itself
        if path.is_file():
            return path
    if data_list is not None:
        settings = record.get("settings")
        known = SourceSettings(**settings) if isinstance(settings, dict) else SourceSettings()
        return local_manifest(str(data_list), run_dir / "index", known)
    recorded = read_record(run_dir / SUMMARY).get("data_list")
    if isinstance(recorded, str) and Path(recorded).is_file():
        return Path(recorded)
    parts = run_dir.resolve().name.rsplit(".", 2)
    if len(parts) == 3:
        for path in sorted(run_dir.resolve().parent.glob(f"{parts[0]}.json*")):
            if path.stem == parts[0] and path.is_file():
                return path
    raise RunError(f"the manifest of {run_dir} is not beside it: name it with --data_list")


def recorded_source(run_dir: Path) -> str | None:
    """What the user named as the source of a run's rows, without credentials; None where nothing recorded it."""
    record = read_record(run_dir / SOURCE).get("data_list")
    return display_source(record) if isinstance(record, str) else None


def typed(data_list: str | Path) -> str:
    """What a summary calls the source: a file's or folder's whole path, anything else as the user named it."""
    path = Path(data_list)
    return str(path.resolve()) if path.exists() else display_source(str(data_list))
