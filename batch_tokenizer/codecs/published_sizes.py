"""Checkpoints of the published sizes with random weights, for benchmarks.

``sizes/`` holds configurations as ``config.json`` files have them. MiMo's are in ``mimo/sized.py``.
"""

from __future__ import annotations

import importlib
import json
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import nn

from batch_tokenizer.codecs.checkpoint import Checkpoint
from batch_tokenizer.codecs.registry import FAMILIES, find_family

_FOLDER = Path(str(resources.files("batch_tokenizer") / "codecs" / "sizes"))


def published_sizes() -> tuple[str, ...]:
    """Names of the sizes that ship with the package."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.json")))


def write_random_checkpoint(name: str, folder: Path, seed: int = 0) -> Path:
    """A checkpoint of one of ``published_sizes`` in ``folder``, with weights that keep a signal's level. Returns it."""
    from safetensors.torch import save_file

    config = json.loads((_FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    family: Any = find_family(Checkpoint(folder=folder, name=name, config=config))
    torch.manual_seed(seed)
    model = family.blank_model(config)
    randomise(model)
    folder.mkdir(parents=True, exist_ok=True)
    if family is importlib.import_module(FAMILIES["transformers"]):
        model.save_pretrained(folder)
    else:
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        save_file(
            {key: tensor.contiguous() for key, tensor in model.state_dict().items()}, folder / "model.safetensors"
        )
    return folder


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Normal weights of a variance that keeps a signal's level, codebooks of variance 1, gains of 1, no biases."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        last = name.rpartition(".")[2]
        if last == "cluster_usage":
            tensor.fill_(1.0)
        elif last in ("embed", "embed_sum") or "codebook" in name.split("."):
            tensor.normal_()
        elif last == "bias" or last.startswith("bias_"):
            tensor.zero_()
        elif last in ("original0", "alpha") or tensor.ndim == 1:
            tensor.fill_(1.0)
        elif tensor.ndim > 1:
            tensor.normal_(std=tensor[0].numel() ** -0.5)
