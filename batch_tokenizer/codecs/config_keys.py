"""JSON files of checkpoints: read within bounds, and their keys checked one by one, with messages that name the key."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from batch_tokenizer.records import RunError, first_line, short_repr

#: Upper bounds of values in a configuration, far above every published model: widths, lengths and rates; layers,
#: codebooks and entries of a list; numbers that are no sizes.
MOST_SIZE = 1 << 18
MOST_COUNT = 1024
MOST_NUMBER = 1e9

#: Bytes of a JSON file. An index of weight files, the longest, has about 100 for each tensor.
_MOST_BYTES = 1 << 26

#: Digits of an integer that fits in 64 bits for certain.
_DIGITS = 18

_ABSENT: Any = object()


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a checkpoint.

    Integers of more digits than 64 bits have become floats, which no size is, so that reading their key refuses them.

    Raises:
        FileNotFoundError, NotADirectoryError: it is not there.
        RunError: it cannot be read, is longer than ``_MOST_BYTES``, or is not a JSON object.
    """
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise RunError(f"{path}: is not a file")
        if size > _MOST_BYTES:
            raise RunError(f"{path}: has {size:,} bytes; a checkpoint's JSON has at most {_MOST_BYTES:,}")
        found = json.loads(path.read_text(encoding="utf-8"), parse_int=_number)
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        raise RunError(f"{path}: cannot be read: {error}") from error
    except RecursionError as error:
        raise RunError(f"{path}: is nested too deeply") from error
    except (ValueError, MemoryError) as error:
        raise RunError(f"{path}: is not JSON: {first_line(error)}") from error
    if not isinstance(found, dict):
        raise RunError(f"{path}: must hold a JSON object, holds a {type(found).__name__}")
    return found


def _number(text: str) -> int | float:
    return int(text) if len(text) <= _DIGITS else float(text)


class ConfigKeys:
    """A mapping inside a JSON file. Every method raises RunError, one line, where a key is absent or wrong.

    ``default`` is the value of a key that is absent; without one the key must be there.
    """

    def __init__(self, mapping: Mapping[str, Any], place: str = "", file: str = "config.json") -> None:
        self.mapping = mapping
        self.place = place
        self.file = file

    def wrong(self, key: str, rule: str) -> RunError:
        """The error for ``key``."""
        if key not in self.mapping:
            return RunError(f"{self.file}: {self.place}{key} is absent")
        return RunError(f"{self.file}: {self.place}{key} = {short_repr(self.mapping[key])}: {rule}")

    def value(self, key: str, default: Any = _ABSENT) -> Any:
        """The value, of any type."""
        if key not in self.mapping and default is _ABSENT:
            raise self.wrong(key, "")
        return self.mapping.get(key, default)

    def size(self, key: str, default: int = _ABSENT, *, most: int = MOST_SIZE) -> int:
        """A whole number above 0: a width, a length, a rate."""
        value = self.value(key, default)
        if not _is_size(value, most):
            raise self.wrong(key, f"must be a whole number above 0, and at most {most}")
        return int(value)

    def count(self, key: str, default: int = _ABSENT) -> int:
        """A whole number above 0 of things that each take memory or time: layers, codebooks."""
        return self.size(key, default, most=MOST_COUNT)

    def sizes(self, key: str, default: Sequence[int] = _ABSENT) -> tuple[int, ...]:
        """A list of whole numbers above 0, such as strides, with a product that is a size as well."""
        value = self.value(key, default)
        if not isinstance(value, (list, tuple)) or not 0 < len(value) <= MOST_COUNT:
            raise self.wrong(key, f"must be a list of 1 to {MOST_COUNT} whole numbers above 0")
        if not all(_is_size(item, MOST_SIZE) for item in value) or math.prod(map(int, value)) > MOST_SIZE:
            raise self.wrong(key, f"must be a list of whole numbers above 0 with a product of at most {MOST_SIZE}")
        return tuple(map(int, value))

    def number(self, key: str, default: float = _ABSENT) -> float:
        """A number."""
        value = self.value(key, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) <= MOST_NUMBER:
            raise self.wrong(key, "must be a number")
        return float(value)

    def positive(self, key: str) -> float:
        """A number above 0."""
        value = self.value(key)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value <= MOST_NUMBER:
            raise self.wrong(key, "must be a number above 0")
        return float(value)

    def flag(self, key: str, default: bool = _ABSENT) -> bool:
        """true or false."""
        value = self.value(key, default)
        if not isinstance(value, bool):
            raise self.wrong(key, "must be true or false")
        return value

    def known(self, key: str, known: Any, default: Any = _ABSENT) -> None:
        """A key of which one value is known."""
        value = self.value(key, default)
        if value != known or isinstance(value, bool) != isinstance(known, bool):
            raise self.wrong(key, f"only {known!r} is known")

    def objects(self, key: str) -> list[dict[str, Any]]:
        """A list of at least one object."""
        value = self.value(key)
        if not isinstance(value, list) or not 0 < len(value) <= MOST_COUNT:
            raise self.wrong(key, f"must be a list of 1 to {MOST_COUNT} objects")
        if not all(isinstance(item, dict) for item in value):
            raise self.wrong(key, "must be a list of objects")
        return value

    def inside(self, key: str) -> ConfigKeys:
        """The object under ``key``."""
        value = self.value(key)
        if not isinstance(value, Mapping):
            raise self.wrong(key, "must be an object")
        return ConfigKeys(value, f"{self.place}{key}.", self.file)


def _is_size(value: Any, most: int) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and 0 < value <= most and float(value).is_integer()
