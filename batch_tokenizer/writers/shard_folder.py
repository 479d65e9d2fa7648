"""``ShardFolder``: the folder that shards are published in, and which run it belongs to.

A shard is written under ``.NAME.part`` and renamed to ``NAME`` when it is whole. Shards that no ledger names are
removed when a run starts, so a folder belongs to one run alone: ``.batch_tokenizer.TASK.json`` says which.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import BinaryIO

from batch_tokenizer.records import RunError


class ShardFolder:
    """A folder of shards.

    Args:
        place: its path.
    """

    def __init__(self, place: str) -> None:
        self.place = place
        self._path = Path(place)

    def claim(self, task: str, run_id: str, run_dir: Path) -> None:
        """Make the folder, and take it for a run.

        Raises:
            RunError: it holds shards of the task that another run made (exit code 2), or cannot be written (1).
        """
        marker = self._path / f".batch_tokenizer.{task}.json"
        try:
            self._path.mkdir(parents=True, exist_ok=True)
            try:
                owner = json.loads(marker.read_bytes())
                if owner.get("id") == run_id:
                    return
                whose = f" (run folder {owner.get('run_folder')})"
            except FileNotFoundError:
                whose = ""
            except (ValueError, AttributeError):
                whose = ""
            if any(name.startswith(f"{task}-") for name in self.names()):
                raise RunError(
                    f"--output_dir {self.place} holds shards of another {task} run{whose}: choose another folder, or "
                    "remove them"
                )
            marker.write_text(json.dumps({"id": run_id, "run_folder": str(run_dir.resolve())}) + "\n")
        except OSError as error:
            raise RunError(f"--output_dir {self.place}: {error.strerror or error}", exit_code=1) from error

    def names(self) -> list[str]:
        """Published files, sorted.

        Raises:
            OSError: the folder cannot be read.
        """
        return sorted(entry.name for entry in self._entries() if not entry.name.startswith("."))

    def names_aside(self) -> list[str]:
        """Files that are not published, by the names that they would have, sorted.

        Raises:
            OSError: the folder cannot be read.
        """
        return sorted(
            entry.name[1 : -len(".part")]
            for entry in self._entries()
            if entry.name.startswith(".") and entry.name.endswith(".part")
        )

    def _entries(self) -> list[os.DirEntry[str]]:
        try:
            with os.scandir(self._path) as entries:
                return [entry for entry in entries if entry.is_file()]
        except FileNotFoundError:
            return []

    def path(self, name: str) -> Path:
        """Where a published file lies."""
        return self._path / name

    def create(self, name: str) -> BinaryIO:
        """Begin a file aside, in the place of one that a killed process left.

        Raises:
            OSError: it cannot be.
        """
        self.discard(name)
        return (self._aside(name)).open("xb")

    def publish(self, name: str) -> None:
        """Let a file that was written aside appear.

        Raises:
            OSError: it cannot be, or was taken away.
        """
        os.rename(self._aside(name), self._path / name)

    def exists(self, name: str) -> bool:
        """Whether a file is published."""
        return (self._path / name).is_file()

    def discard(self, name: str) -> None:
        """Remove a file that was written aside, if it is there. After that it cannot be published any more."""
        self._aside(name).unlink(missing_ok=True)

    def remove(self, name: str) -> None:
        """Remove a published file, if it is there."""
        (self._path / name).unlink(missing_ok=True)

    def _aside(self, name: str) -> Path:
        return self._path / f".{name}.part"
