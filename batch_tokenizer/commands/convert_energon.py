"""Where ``convert`` puts rows as webdataset shards with the index of Megatron-Energon, which its own library makes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from batch_tokenizer.commands.convert_targets import ShardTarget
from batch_tokenizer.records import RunError, first_line

#: Energon's names of the parts of a split.
_SPLIT_NAMES = ("train", "val", "test")

#: Samples as they are, for a task encoder of the user's with a cooker of its own.
_DATASET = "__module__: megatron.energon\n__class__: CrudeWebdataset\n"


class EnergonTarget(ShardTarget):
    """Shards ``tokens-000000.tar`` and so on, and ``.nv-meta`` with their index.

    Args:
        shares: of ``train``, ``val`` and ``test``, among which Energon divides whole shards; all are ``train`` where
            there are none.
    """

    def __init__(self, folder: Path, most_bytes: int, codes_field: str, shares: Sequence[float], seed: int) -> None:
        super().__init__(folder, "tar", most_bytes, codes_field)
        self._preparator = _preparator()
        self._parts = list(zip(_SPLIT_NAMES, shares or (1.0,), strict=False))
        self._seed = seed

    def finish(self) -> None:
        super().finish()
        self._preparator(self._folder, self._parts, self._seed)


def _preparator() -> Any:
    try:
        from megatron.energon.epathlib import EPath
        from megatron.energon.flavors.webdataset.prepare import WebdatasetPreparator
    except ImportError as error:
        raise RunError(
            f"--to energon needs megatron-energon: pip install megatron-energon ({first_line(error)})"
        ) from error

    def prepare(folder: Path, parts: list[tuple[str, float]], seed: int) -> None:
        names = sorted(path.name for path in folder.glob("*.tar"))
        if names:
            WebdatasetPreparator.prepare_dataset(
                EPath(str(folder)),
                names,
                split_parts_ratio=parts,
                shuffle_seed=seed if len(parts) > 1 else None,
                workers=2,
            )
            (folder / ".nv-meta" / "dataset.yaml").write_text(_DATASET)

    return prepare
