"""HTML as a strict reader sees it: its tags, its ids, and what is wrong with their nesting."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"meta", "link", "br", "img", "input", "hr"}


@dataclass
class Document:
    """What was found."""

    found: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def tags(self, name: str) -> list[dict[str, str]]:
        """The attributes of every tag of a name."""
        return [attributes for tag, attributes in self.found if tag == name]

    @property
    def ids(self) -> list[str]:
        """All ids."""
        return [attributes["id"] for _, attributes in self.found if "id" in attributes]


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.document = Document()
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.document.found.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.document.found.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.document.problems.append(f"</{tag}> in the wrong place, line {self.getpos()[0]}")


def parse(text: str) -> Document:
    """Reads a whole page."""
    reader = _Reader()
    reader.feed(text)
    reader.close()
    document = reader.document
    document.problems += [f"<{tag}> is not closed" for tag in reader.open]
    document.problems += [f"id {name} twice" for name in {n for n in document.ids if document.ids.count(n) > 1}]
    return document
