"""The tokenizer of a language model for the text beside codes: a ``tokenizer.json`` of the library ``tokenizers``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from batch_tokenizer.records import RunError, first_line

_FILE = "tokenizer.json"


def open_tokenizer(name: str) -> Any:
    """A ``tokenizers.Tokenizer``.

    Args:
        name: a ``tokenizer.json``, a folder with one, or a hub id.

    Raises:
        RunError: there is none, it cannot be read or fetched, or the library is not installed.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise RunError("text beside codes needs tokenizers: pip install tokenizers") from error
    path = Path(name)
    file = path / _FILE if path.is_dir() else path
    if not file.is_file():
        if path.exists() or name.count("/") != 1 or name.startswith((".", "/")):
            raise RunError(f"--tokenizer {name}: has no {_FILE}")
        file = _fetch(name)
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:
        raise RunError(f"--tokenizer {file}: not a tokenizer that can be read: {first_line(error)}") from error


def _fetch(hub_id: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(hub_id, _FILE))
    except (OSError, ValueError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise RunError(
            f"--tokenizer {hub_id}: {_FILE} cannot be fetched: {first_line(error)}; name a local {_FILE} instead",
            exit_code=1,
        ) from error


def vocabulary_size(tokenizer: Any) -> int:
    """The number above all of its ids, special ones included."""
    return int(max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)) + 1
