"""Whoever reads a command's output may go away: that ends the command without a traceback."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support.command import ROOT

RUN = "import sys; from batch_tokenizer.cli import console; sys.argv[0] = 'batch_tokenizer'; console()"


def end_of(words: list[str], lines_read: int, *, merged: bool = False) -> tuple[int, str]:
    """Exit status and stderr of a command whose reader goes away after so many lines."""
    stderr = subprocess.STDOUT if merged else subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-c", RUN, *words], stdout=subprocess.PIPE, stderr=stderr, text=True, cwd=ROOT
    ) as process:
        assert process.stdout is not None
        for _ in range(lines_read):
            process.stdout.readline()
        process.stdout.close()
        rest = "" if process.stderr is None else process.stderr.read()
        return process.wait(600), rest


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["status", "--help"]])
def test_a_reader_that_reads_nothing(words: list[str]) -> None:
    status, errors = end_of(words, 0)
    assert status in (0, 141)
    assert errors == ""


def test_a_reader_that_reads_one_line() -> None:
    status, errors = end_of(["codecs"], 1)
    assert status in (0, 141)
    assert errors == ""


def test_errors_and_output_into_one_pipe_that_is_closed() -> None:
    status, _ = end_of(["status", "no_such_folder"], 0, merged=True)
    assert status in (2, 141)


def test_a_thread_that_is_left_behind_does_not_change_how_a_command_ends() -> None:
    """Taking the interpreter down around a thread in a native library aborts the process, now and then."""
    code = (
        "import threading, time; from batch_tokenizer import cli\n"
        "def main():\n"
        "    threading.Thread(target=time.sleep, args=(600,), name='quality', daemon=True).start()\n"
        "    print('the last line', end='')\n"
        "    return 7\n"
        "cli.main = main\n"
        "cli.os._exit = lambda status, end=cli.os._exit: (cli.sys.stdout.flush(), print(' and end'), "
        "cli.sys.stdout.flush(), end(status))\n"
        "cli.console()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert (done.returncode, done.stdout, done.stderr) == (7, "the last line and end\n", "")
