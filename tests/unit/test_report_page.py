"""The page's parts: HTML that parses, figures that follow the text's colour, audio that decodes to what it was."""

from __future__ import annotations

import base64
import io
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import soundfile

from batch_tokenizer.quality.recordings import Recording
from batch_tokenizer.report import page
from batch_tokenizer.report.sections import choose, reason_pattern
from tests.support.html import parse

RATE = 24000


@pytest.fixture(scope="module")
def tone():
    samples = 0.3 * np.sin(2 * np.pi * 440 * np.arange(int(1.5 * RATE)) / RATE)
    return Recording(samples.astype(np.float32), RATE)


def test_what_comes_from_outside_is_text_not_markup():
    evil = '<script>alert("1")</script>&amp;'
    table = page.Table(evil, [evil], [[evil, evil]])
    blocks = [
        table, page.Facts({evil: evil}), page.Notes(evil, [evil]), page.Folded(evil, table), page.Charts({evil: ""}),
        page.Comparison(evil, [evil], [page.Side(evil, "", "data:,")], {evil: evil}), page.Paragraph(evil, quiet=True),
    ]  # fmt: skip
    text = page.render(evil, evil, {evil: evil}, [page.Section(evil, blocks)], evil)
    assert "<script>alert" not in text
    assert text.count("&lt;script&gt;") > 10


def test_the_page_is_well_formed_and_forbids_itself_the_network():
    text = page.render("t", "s", {"rows": "1"}, [page.Section("One & two", [page.Paragraph("p")])], "by")
    document = parse(text)
    assert not document.problems
    policy = next(tag for tag in document.tags("meta") if tag.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy["content"]
    assert ":root {" in text
    (link,) = [tag["href"] for tag in document.tags("a") if tag["href"] != "#content"]
    assert link.removeprefix("#") in document.ids


def test_audio_comes_back_from_its_url(tone):
    url = page.audio_url(Recording(np.append(tone.samples, np.float32([2, -2])), RATE))
    samples, rate = soundfile.read(io.BytesIO(base64.b64decode(url.partition(",")[2])), dtype="float32")
    assert rate == RATE
    assert len(samples) == len(tone.samples) + 2
    assert np.abs(samples[:-2] - tone.samples).max() <= 1 / 32768
    assert samples[-2] > 0.999
    assert samples[-1] == -1


class TestFigures:
    @staticmethod
    def drawings(tone):
        from batch_tokenizer.report import figures

        return [
            figures.histogram("lengths", [1.0, 2.0, 2.0, 5.0], "seconds"),
            figures.histogram("all the same", [3.0, 3.0], "seconds"),
            figures.bars("stages", {"load": 1.0, "encode <&>": 2.5}, "seconds", limits={"load": 3, "encode <&>": 3}),
            figures.lines("over time", {"a": [(0, 0), (1, 2)], "b": [(0, 0), (1, 1)]}, "hours", "hours"),
            figures.recording("sound", tone, peak=0.5),
            figures.recording("a click", Recording(np.ones(1, np.float32), RATE), peak=1),
            figures.recording("silence", Recording(np.zeros(3000, np.float32), RATE), peak=1),
        ]

    @pytest.fixture(scope="class")
    @classmethod
    def drawn(cls, tone):
        pytest.importorskip("matplotlib")
        return cls.drawings(tone)

    def test_they_are_xml_and_take_the_colour_of_the_text(self, drawn):
        for svg in drawn:
            root = ElementTree.fromstring(svg)
            assert root.get("role") == "img"
            assert root.get("aria-label")
            assert "currentColor" in svg
            assert "#010203" not in svg
            assert "#000000" not in svg
            assert len(svg) < 300_000

    def test_their_names_do_not_collide_on_one_page(self, drawn):
        names = [name for svg in drawn for name in set(re.findall(r'\bid="([^"]*)"', svg))]
        assert len(names) == len(set(names))
        for svg in drawn:
            known = set(re.findall(r'\bid="([^"]*)"', svg))
            used = set(re.findall(r'url\(#([^)]*)\)|xlink:href="#([^"]*)"', svg))
            assert {first or second for first, second in used} <= known

    def test_the_same_numbers_give_the_same_figure(self, tone, drawn):
        assert self.drawings(tone) == drawn


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("audio/a.wav: no such file", "b/c/d.flac: no such file"),
        ("x.wav: too long, 100 samples where 50 is the most", "/y/z.wav: too long, 7 samples where 9 is the most"),
        ('duplicate key "a": first on line 3', 'duplicate key "b b": first on line 77'),
    ],
)  # fmt: skip
def test_reasons_that_differ_in_names_and_numbers_are_one(one, other):
    assert reason_pattern(one) == reason_pattern(other)
    assert reason_pattern(one) != reason_pattern("audio/a.wav: is empty")


def test_utterances_to_hear_go_from_the_worst_to_the_best():
    records = [{"key": str(value), "scores": {"pesq_wb": float(value)}} for value in (3, 1, 4, 2, 5)]
    name, chosen = choose(records, 3)
    assert name == "pesq_wb"
    assert [record["key"] for record in chosen] == ["1", "3", "5"]
    name, chosen = choose([{"key": str(value), "scores": {"mel_distance": float(value)}} for value in (3, 1, 2)], 9)
    assert [record["key"] for record in chosen] == ["3", "2", "1"]
    assert choose([{"key": "a", "scores": {}}], 3) == ("", [{"key": "a", "scores": {}}])
