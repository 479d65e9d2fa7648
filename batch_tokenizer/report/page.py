"""The page's HTML: sections enter, one file leaves that needs nothing else.

Every text that comes from outside goes through ``escape``. The page forbids itself the network by its content policy,
works without its script (which only keeps two players from sounding at once and switches between them), and follows
the reader's colour scheme.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

_POLICY = (
    "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "base-uri 'none'; form-action 'none'"
)

_STYLE = """
:root { color-scheme: light dark; --ground: #fcfcfb; --card: #ffffff; --text: #1c2024; --quiet: #5b626b;
  --line: #d9dce0; --accent: #1f6fb2; --bad: #b3402a; }
@media (prefers-color-scheme: dark) { :root { --ground: #15181b; --card: #1d2125; --text: #e6e8ea; --quiet: #a0a7b0;
  --line: #363c43; --accent: #74b3ea; --bad: #f08b74; } }
* { box-sizing: border-box; }
html { scroll-behavior: smooth; }
@media (prefers-reduced-motion: reduce) { html { scroll-behavior: auto; } }
body { margin: 0; background: var(--ground); color: var(--text);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
.skip { position: absolute; left: -99em; }
.skip:focus { left: 1em; top: .5em; background: var(--card); padding: .3em .6em; z-index: 2; }
header, main, footer { max-width: 1120px; margin: 0 auto; padding: 0 1.1rem; }
header { padding-top: 1.6rem; }
h1 { font-size: 1.55rem; line-height: 1.25; margin: 0 0 .2rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .7rem; padding-bottom: .25rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.2rem 0 .4rem; overflow-wrap: anywhere; }
p { margin: .4rem 0 .8rem; max-width: 72ch; }
.quiet { color: var(--quiet); font-size: .9rem; }
a { color: var(--accent); }
nav ul { list-style: none; margin: .8rem 0 0; padding: 0; display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; }
nav a { display: inline-block; padding: .3rem 0; }
.numbers { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .7rem;
  margin: 1.2rem 0 0; }
.numbers div { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .55rem .8rem; }
.numbers dt { color: var(--quiet); font-size: .85rem; }
.numbers dd { margin: 0; font-size: 1.3rem; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.facts { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.2rem; margin: 0; }
.facts dt { color: var(--quiet); }
.facts dd { margin: 0; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; margin: .6rem 0 1rem; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--quiet); font-size: .9rem; padding-bottom: .3rem; }
th, td { text-align: left; padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; white-space: nowrap; }
td.wide { min-width: 18rem; white-space: normal; }
tbody td, tbody th { white-space: nowrap; }
.charts { display: flex; flex-wrap: wrap; gap: 1rem 1.6rem; align-items: flex-start;
  margin-top: 1rem; }
figure { margin: 0 0 .6rem; flex: 0 1 auto; min-width: 0; }
figcaption { font-size: .92rem; font-weight: 600; margin-bottom: .2rem; }
svg { display: block; max-width: 100%; height: auto; }
svg text { font-family: inherit; }
article { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .3rem 1rem 1rem;
  margin: 0 0 1.1rem; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: .4rem 1.4rem; }
.pair > div { min-width: 0; }
.pair svg { width: 100% !important; }
.pair h4 { margin: .4rem 0 .1rem; font-size: .92rem; }
@media (max-width: 720px) { .pair { grid-template-columns: 1fr; } .facts { grid-template-columns: 1fr; }
  .facts dd { margin-bottom: .45rem; } }
audio { width: 100%; height: 40px; margin-top: .3rem; }
button { font: inherit; color: var(--accent); background: none; border: 1px solid var(--line); border-radius: 6px;
  padding: .3rem .8rem; margin-top: .6rem; cursor: pointer; }
.scores { display: flex; flex-wrap: wrap; gap: .1rem 1.3rem; margin: .5rem 0 0; font-size: .92rem; }
.scores div { display: flex; gap: .4rem; }
.scores dt { color: var(--quiet); }
.scores dd { margin: 0; font-variant-numeric: tabular-nums; }
.bad { color: var(--bad); }
details > summary { cursor: pointer; padding: .3rem 0; }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; }
footer { color: var(--quiet); font-size: .88rem; padding-top: 2rem; padding-bottom: 2.5rem; }
@media print { nav, audio, button { display: none; } }
"""

_SCRIPT = """
const players = [...document.querySelectorAll('audio')];
for (const player of players) {
  player.addEventListener('play', () => players.forEach(other => other === player || other.pause()));
}
for (const button of document.querySelectorAll('button[data-switch]')) {
  button.hidden = false;
  button.addEventListener('click', () => {
    const pair = [...button.closest('article').querySelectorAll('audio')];
    const from = pair.findIndex(player => !player.paused);
    const to = pair[from === 0 ? 1 : 0];
    if (from >= 0) to.currentTime = Math.min(pair[from].currentTime, to.duration || 0);
    to.play();
  });
}
"""


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the page: its heading, and HTML."""

    title: str
    body: str

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
    links = "".join(f'<li><a href="#{one.anchor}">{escape(one.title)}</a></li>' for one in sections)
    cards = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in numbers.items())
    body = "".join(
        f'<section aria-labelledby="{one.anchor}"><h2 id="{one.anchor}">{escape(one.title)}</h2>{one.body}</section>'
        for one in sections
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<link rel="icon" href="data:,">
<title>{escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<a class="skip" href="#content">Skip to the content</a>
<header><h1>{escape(title)}</h1><p class="quiet">{escape(subtitle)}</p>
<dl class="numbers">{cards}</dl>
<nav aria-label="Sections"><ul>{links}</ul></nav></header>
<main id="content">{body}</main>
<footer>{escape(made_by)}</footer>
<script>{_SCRIPT}</script>
</body>
</html>
"""


def paragraph(text: str, *, quiet: bool = False) -> str:
    """Plain text as a paragraph."""
    return f'<p class="quiet">{escape(text)}</p>' if quiet else f"<p>{escape(text)}</p>"


def facts(values: Mapping[str, object]) -> str:
    """Names and what they are, as a list."""
    items = "".join(f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>" for name, value in values.items())
    return f'<dl class="facts">{items}</dl>'


def table(caption: str, head: Sequence[str], rows: Iterable[Sequence[object]], *, wide: Sequence[int] = ()) -> str:
    """A table that scrolls by itself where it is wider than the screen.

    Args:
        wide: columns of long text, which is broken into lines.
    """

    def cell(number: int, value: object) -> str:
        if number == 0:
            return f'<th scope="row">{escape(str(value))}</th>'
        return f"<td{' class=wide' if number in wide else ''}>{escape(str(value))}</td>"

    titles = "".join(f'<th scope="col">{escape(one)}</th>' for one in head)
    body = "".join(f"<tr>{''.join(cell(number, value) for number, value in enumerate(row))}</tr>" for row in rows)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}"><table>'
        f"<caption>{escape(caption)}</caption><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def charts(drawings: Mapping[str, str]) -> str:
    """Figures (HTML) beside each other, each under its title."""
    return (
        '<div class="charts">'
        + "".join(f"<figure><figcaption>{escape(name)}</figcaption>{svg}</figure>" for name, svg in drawings.items())
        + "</div>"
    )


def comparison(
    title: str, notes: Sequence[str], sides: Mapping[str, tuple[str, str]], scores: Mapping[str, str]
) -> str:
    """One utterance: recordings side by side, with their players and scores.

    Args:
        sides: name of the recording to its figure (HTML) and its data URL.
    """
    parts = "".join(
        f'<div><h4>{escape(name)}</h4>{svg}<audio controls preload="metadata" src="{url}" '
        f'aria-label="{escape(name)} of {escape(title)}"></audio></div>'
        for name, (svg, url) in sides.items()
    )
    values = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in scores.items())
    about = "".join(paragraph(note, quiet=True) for note in notes)
    return (
        f'<article><h3>{escape(title)}</h3>{about}<div class="pair">{parts}</div><dl class="scores">{values}</dl>'
        "<button type=button data-switch hidden>Switch between the two at the same moment</button></article>"
    )
