"""Finds the family of a checkpoint and opens it. Adding a family is one module and one line of ``FAMILIES``."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, cast

from batch_tokenizer.codecs.base import Codec, CodecSpec
from batch_tokenizer.codecs.checkpoint import Checkpoint
from batch_tokenizer.codecs.loading import LoadRequest
from batch_tokenizer.records import RunError, first_line


class Family(Protocol):
    """Interface of a family's module."""

    def recognises(self, config: Mapping[str, Any]) -> bool:
        """Whether ``config.json`` is of this family. Must not raise."""

    def open_spec(self, checkpoint: Checkpoint) -> CodecSpec:
        """The spec, without reading weights beyond the fingerprint. Raises RunError for a checkpoint that is wrong."""

    def load_codec(self, request: LoadRequest[Any]) -> Codec:
        """The codec with the weights that the task needs. Raises RunError for weights that are wrong."""


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


@contextmanager
def errors_as_run_errors(checkpoint: Checkpoint) -> Iterator[None]:
    """Wraps what a family computes from a checkpoint's files, which are untrusted input.

    Raises:
        RunError: a value that the family's own checks do not cover made a computation fail.
    """
    try:
        yield
    except RecursionError as error:
        raise RunError(f"{checkpoint.folder}: config.json is nested too deeply") from error
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, MemoryError) as error:
        reason = f"{type(error).__name__}: {first_line(error)[:300]}"
        raise RunError(
            f"{checkpoint.folder}: config.json or the weights have a value that cannot be computed with ({reason})"
        ) from error


def open_spec(checkpoint: Checkpoint, family: Family | None = None) -> CodecSpec:
    """The spec of a checkpoint, of ``family`` where that is known.

    Raises:
        RunError: it is of no known family, or is not what its family needs.
    """
    family = family or find_family(checkpoint)
    with errors_as_run_errors(checkpoint):
        return family.open_spec(checkpoint)


def find_family(checkpoint: Checkpoint) -> Family:
    """The family that recognises the checkpoint.

    Raises:
        RunError: none does.
    """
    for module in FAMILIES.values():
        family = cast(Family, importlib.import_module(module))
        with errors_as_run_errors(checkpoint):
            if family.recognises(checkpoint.config):
                return family
    kind = str(checkpoint.config.get("model_type", "absent"))[:100]
    raise RunError(
        f"{checkpoint.folder}: config.json (model_type {kind}) is of no known family; known: {', '.join(FAMILIES)}"
    )
