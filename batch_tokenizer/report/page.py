"""The page's HTML: sections of blocks, rendered by jinja2 with ``templates/page.html`` into one file that needs nothing
else.

Every text is escaped. The page forbids itself the network by its content policy, works without its script (which only
keeps two players from sounding at once and switches between them), and follows the reader's colour scheme.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from jinja2 import Environment, PackageLoader, StrictUndefined

from batch_tokenizer.audio.encoding import encoded_bytes
from batch_tokenizer.quality.recordings import Recording


@dataclass(frozen=True, slots=True)
class Paragraph:
    """Plain text."""

    kind: ClassVar[str] = "paragraph"
    text: str
    quiet: bool = False


@dataclass(frozen=True, slots=True)
class Facts:
    """Names and their values, as a list."""

    kind: ClassVar[str] = "facts"
    values: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Table:
    """A table, which scrolls by itself where it is wider than the screen.

    Attributes:
        wide: columns of long text, which is broken into lines.
    """

    kind: ClassVar[str] = "table"
    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[object]]
    wide: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class Charts:
    """Figures of ``figures.py`` (inline ``<svg>``) beside each other, each under its title."""

    kind: ClassVar[str] = "charts"
    figures: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Notes:
    """Lines of text that are folded away under a summary."""

    kind: ClassVar[str] = "notes"
    summary: str
    lines: Sequence[str]


@dataclass(frozen=True, slots=True)
class Folded:
    """Another block, folded away under a summary."""

    kind: ClassVar[str] = "folded"
    summary: str
    block: Table | Facts


@dataclass(frozen=True, slots=True)
class Side:
    """A recording in a comparison: its name, its figure (inline ``<svg>``) and what plays it."""

    name: str
    figure: str
    audio_url: str


@dataclass(frozen=True, slots=True)
class Comparison:
    """One utterance: recordings side by side, with their players and scores."""

    kind: ClassVar[str] = "comparison"
    title: str
    notes: Sequence[str]
    sides: Sequence[Side]
    scores: Mapping[str, str]

    @property
    def num_bytes(self) -> int:
        """About what it adds to the page."""
        return sum(len(side.figure) + len(side.audio_url) for side in self.sides)


Block = Paragraph | Facts | Table | Charts | Notes | Folded | Comparison


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the page; ``folded`` ones are opened by a click."""

    title: str
    blocks: Sequence[Block]
    folded: bool = False

    @property
    def anchor(self) -> str:
        """The name that links use."""
        return "".join(letter if letter.isalnum() else "-" for letter in self.title.lower())


def render(title: str, subtitle: str, numbers: Mapping[str, str], sections: Sequence[Section], made_by: str) -> str:
    """The whole page.

    Args:
        numbers: the few that matter most, as text.
        made_by: the last line.
    """
    environment = Environment(
        loader=PackageLoader("batch_tokenizer.report"), autoescape=True, undefined=StrictUndefined
    )  # fmt: skip
    return environment.get_template("page.html").render(
        title=title, subtitle=subtitle, numbers=numbers, sections=sections, made_by=made_by
    )


def audio_url(sound: Recording) -> str:
    """``data:audio/flac;base64,…`` of 16-bit samples: FLAC is exact, and every browser plays it."""
    return (
        "data:audio/flac;base64," + base64.b64encode(encoded_bytes(sound.samples, sound.sample_rate, "flac")).decode()
    )
