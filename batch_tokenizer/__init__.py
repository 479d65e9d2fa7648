"""Turns large audio corpora into the discrete tokens of a neural codec, and tokens back into audio.

The command is ``python -m batch_tokenizer``; the names below are the Python interface, imported on first use so that
the command line answers without waiting for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from batch_tokenizer.api import (
        TokenDataset,
        collate_tokens,
        delay_codes,
        flatten_codes,
        load_audio,
        load_codec,
        load_model,
        mel_spectrogram,
        open_token_stream,
        padding,
        undelay_codes,
        unflatten_codes,
    )

__version__ = "0.2.0"

__all__ = [
    "TokenDataset",
    "__version__",
    "collate_tokens",
    "delay_codes",
    "flatten_codes",
    "load_audio",
    "load_codec",
    "load_model",
    "mel_spectrogram",
    "open_token_stream",
    "padding",
    "undelay_codes",
    "unflatten_codes",
]


def __dir__() -> list[str]:
    return sorted(__all__)


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("batch_tokenizer.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
