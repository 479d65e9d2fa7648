"""Models of a published size without a checkpoint, for benchmarks and tests: a configuration and random weights.

``sizes/`` holds configurations as ``config.json`` files have them: ``mimo-1.2b`` is the published one, ``mimo-11m`` a
small one for measurements on a CPU.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import torch

from batch_tokenizer.codecs.mimo.config import MiMoConfig
from batch_tokenizer.codecs.mimo.model import MiMoAudioTokenizer
from batch_tokenizer.records import RunError

_FOLDER = Path(str(resources.files("batch_tokenizer") / "codecs" / "mimo" / "sizes"))


def size_names() -> tuple[str, ...]:
    """The sizes that ship with the package."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.json")))


def sized_config(name: str) -> MiMoConfig:
    """The configuration of a size, or of a ``config.json`` anywhere.

    Raises:
        RunError: there is no such size or file, or its configuration is wrong.
    """
    path = _FOLDER / f"{name}.json" if name in size_names() else Path(name)
    try:
        return MiMoConfig.from_json(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise RunError(
            f"--config {name}: no such file, and no size of {', '.join(size_names())}; "
            "bench --help names those of other codecs, for --random_weights"
        ) from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise RunError(f"--config {name}: cannot be read as JSON: {error}") from error


def random_model(
    config: MiMoConfig,
    *,
    parts: Sequence[str] = ("encoder", "decoder"),
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> MiMoAudioTokenizer:
    """A frozen model whose tokens vary with the audio, and whose audio has ordinary levels."""
    torch.manual_seed(seed)
    with torch.device(device):
        model = MiMoAudioTokenizer(config, parts=parts)
        for index, codebook in enumerate(model.encoder.quantizer.codebooks):
            codebook.embed.normal_(std=0.9**index)
        if model.decoder is not None:
            torch.nn.init.normal_(model.decoder.vocoder.head.out.weight, std=0.5 / config.vocoder_dim**0.5)
    return model.to(dtype).freeze()
