"""Finds the family of a checkpoint and opens it. Adding a family is one module and one line of ``FAMILIES``."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, Protocol, cast

import torch

from batch_tokenizer.codecs.base import Codec, CodecSpec
from batch_tokenizer.codecs.checkpoint import Checkpoint
from batch_tokenizer.records import RunError, Task


class Family(Protocol):
    """What a family's module offers."""

    def recognises(self, config: Mapping[str, Any]) -> bool:
        """Whether ``config.json`` is of this family. Must not raise."""

    def open_spec(self, checkpoint: Checkpoint) -> CodecSpec:
        """The spec, without reading weights beyond the fingerprint. Raises RunError for a checkpoint that is wrong."""

    def load_codec(
        self,
        checkpoint: Checkpoint,
        spec: CodecSpec,
        *,
        task: Task,
        device: torch.device,
        dtype: torch.dtype,
        attention: str,
        threads: int,
    ) -> Codec:
        """The weights that ``task`` needs, on ``device``; ``threads`` processor cores are this process's share."""


#: Family name to module. Modules are imported when a checkpoint is opened, in this order.
FAMILIES: Mapping[str, str] = {
    "s3tokenizer": "batch_tokenizer.codecs.s3tokenizer.codec",
    "moss_onnx": "batch_tokenizer.codecs.onnx.codec",
    "mimo": "batch_tokenizer.codecs.mimo.codec",
    "moss": "batch_tokenizer.codecs.moss.codec",
    "qwen3_tts": "batch_tokenizer.codecs.qwen3_tts.codec",
    "snac": "batch_tokenizer.codecs.snac.codec",
    "nanocodec": "batch_tokenizer.codecs.nanocodec.codec",
    "wavtokenizer": "batch_tokenizer.codecs.wavtokenizer.codec",
    "transformers": "batch_tokenizer.codecs.hf.codec",
}


def find_family(checkpoint: Checkpoint) -> Family:
    """The family that recognises the checkpoint.

    Raises:
        RunError: none does.
    """
    for module in FAMILIES.values():
        family = cast(Family, importlib.import_module(module))
        if family.recognises(checkpoint.config):
            return family
    kind = checkpoint.config.get("model_type", "absent")
    raise RunError(
        f"{checkpoint.folder}: config.json (model_type {kind}) is of no known family; known: {', '.join(FAMILIES)}"
    )
