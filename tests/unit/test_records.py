"""What untrusted text looks like where it is printed."""

from __future__ import annotations

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batch_tokenizer import cli
from batch_tokenizer.records import printable, printable_lines
from batch_tokenizer.storage.names import display_name


@given(st.text())
def test_printable_text_is_one_line_that_a_terminal_does_not_obey(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable()
    assert shown.encode() is not None
    assert shown == text or not text.isprintable()
    assert display_name(text.replace("://", "")).isprintable()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("ключ 音声 é", "ключ 音声 é"),
        ("a\x1b[31mb", r"a\x1b[31mb"),
        ("a\u2028b\u202ec\x9b", r"a\u2028b\u202ec\x9b"),
        ("a\r\nb\ud800", r"a\r\nb\ud800"),
    ],
)
def test_what_is_escaped(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert printable_lines(f"{text.strip()}\nx").endswith("\nx")


def test_the_log_is_printable() -> None:
    record = logging.makeLogRecord({"msg": "row %s failed\nsecond line", "args": ("k\x1b]0;title\x07",)})
    assert cli._LogFormatter("%(message)s").format(record) == "row k\\x1b]0;title\\x07 failed\nsecond line"
