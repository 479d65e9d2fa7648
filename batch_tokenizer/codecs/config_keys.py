"""Keys of a JSON configuration, checked one by one, with messages that say where in the file they are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from batch_tokenizer.records import RunError

_ABSENT: Any = object()


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
        return RunError(f"{self.file}: {self.place}{key} = {self.mapping[key]!r}: {rule}")

    def value(self, key: str, default: Any = _ABSENT) -> Any:
        """Whatever is there."""
        if key not in self.mapping and default is _ABSENT:
            raise self.wrong(key, "")
        return self.mapping.get(key, default)

    def size(self, key: str, default: int = _ABSENT) -> int:
        """A whole number above 0."""
        value = self.value(key, default)
        if not _is_size(value):
            raise self.wrong(key, "must be a whole number above 0")
        return int(value)

    def sizes(self, key: str, default: Sequence[int] = _ABSENT) -> tuple[int, ...]:
        """A list of at least one whole number above 0."""
        value = self.value(key, default)
        if not isinstance(value, (list, tuple)) or not value or not all(map(_is_size, value)):
            raise self.wrong(key, "must be a list of whole numbers above 0")
        return tuple(map(int, value))

    def number(self, key: str, default: float = _ABSENT) -> float:
        """A finite number."""
        value = self.value(key, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
            raise self.wrong(key, "must be a number")
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

    def inside(self, key: str) -> ConfigKeys:
        """The object under ``key``."""
        value = self.value(key)
        if not isinstance(value, Mapping):
            raise self.wrong(key, "must be an object")
        return ConfigKeys(value, f"{self.place}{key}.", self.file)


def _is_size(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and 0 < value < 1 << 31 and float(value).is_integer()
