"""NeMo's archives: a tar of ``model_config.yaml`` and ``model_weights.ckpt``, read in place. Nothing is unpacked."""

from __future__ import annotations

import json
import lzma
import re
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from batch_tokenizer.records import RunError, first_line

SUFFIX = ".nemo"

_CONFIG, _WEIGHTS = "model_config.yaml", "model_weights.ckpt"

#: A published configuration has about 10 kB.
_MOST_CONFIG_BYTES = 1 << 20

#: A value that is another key's: ``${sample_rate}`` or ``${model.sample_rate}``.
_REFERENCE = re.compile(r"\$\{([\w.]+)\}")


def read_archive_config(path: Path) -> dict[str, Any]:
    """The mapping in an archive's ``model_config.yaml``, with references to other keys replaced by their values.

    Raises:
        RunError: there is none, or it is not a mapping that JSON could hold.
    """
    import yaml  # imported here, as most checkpoints need none

    with _member(path, _CONFIG) as (file, size):
        if size > _MOST_CONFIG_BYTES:
            raise RunError(f"{path}: {_CONFIG} has {size:,} bytes; at most {_MOST_CONFIG_BYTES:,} are read")
        try:
            text = file.read().decode("utf-8")
            if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):
                raise RunError(f"{path}: {_CONFIG} has aliases, which no archive of NeMo's has")
            config = json.loads(json.dumps(yaml.safe_load(text), default=str))
        except RecursionError as error:
            raise RunError(f"{path}: {_CONFIG} is nested too deeply") from error
        except (yaml.YAMLError, ValueError, TypeError) as error:
            raise RunError(f"{path}: {_CONFIG} cannot be read ({first_line(error)})") from error
    if not isinstance(config, dict):
        raise RunError(f"{path}: {_CONFIG} must hold a mapping, holds a {type(config).__name__}")
    resolved = _resolve(config, config)
    assert isinstance(resolved, dict)
    return resolved


@contextmanager
def open_archive_weights(path: Path) -> Iterator[IO[bytes]]:
    """The ``model_weights.ckpt`` of an archive, a file in torch's own format.

    Raises:
        RunError: there is none.
    """
    with _member(path, _WEIGHTS) as (file, _):
        yield file


@contextmanager
def _member(path: Path, name: str) -> Iterator[tuple[IO[bytes], int]]:
    """A member of the archive, seekable, and its size."""
    try:
        with tarfile.open(path, "r:*") as archive:
            member = next((one for one in archive if one.name.removeprefix("./") == name), None)
            file = None if member is None or not member.isfile() else archive.extractfile(member)
            if member is None or file is None:
                raise RunError(f"{path}: has no file {name}, so it is no archive of NeMo's")
            yield file, member.size
    except (tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError, ValueError) as error:
        raise RunError(f"{path}: cannot be read as a tar ({first_line(error)}); download it again") from error


def _resolve(value: Any, config: Mapping[str, Any]) -> Any:
    """``value`` with each string that is a reference replaced by the referenced value, where that is no reference."""
    if isinstance(value, dict):
        return {key: _resolve(item, config) for key, item in value.items()}
    if isinstance(value, list):
        return [_resolve(item, config) for item in value]
    reference = _REFERENCE.fullmatch(value) if isinstance(value, str) else None
    if reference is None:
        return value
    found: Any = config
    for key in reference[1].split("."):
        found = found.get(key) if isinstance(found, dict) else None
    return value if found is None or isinstance(found, (dict, list)) else found
