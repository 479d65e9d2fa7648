"""The command line: flags to ``RunConfig``, errors to one line and an exit status.

    batch_tokenizer FILE_OR_FOLDER… -o DIR                          a run on audio files, with defaults of its own
    batch_tokenizer --data_list data.jsonl --task wav2token2wav …   a run by flags alone
    batch_tokenizer verify …, batch_tokenizer status …              the subcommands of ``COMMANDS``
    batch_tokenizer help [COMMAND]

Exit status: 0 the run finished; 1 it could not go on, or every row failed, or any did under ``--strict``, or more
than ``--max_failed``; 2 bad arguments; 128 + n when signal n stopped it, 141 (SIGPIPE) when the reader of its
output has ended.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import logging
import os
import re
import select
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn, TextIO

from batch_tokenizer import __version__
from batch_tokenizer.config import RunConfig, add_options
from batch_tokenizer.records import RunError, printable_lines
from batch_tokenizer.runtime.processes import ProcessGroup, shard_of_slurm_array
from batch_tokenizer.runtime.signals import Aborted, Stopped

#: Subcommand to the module that has ``add_arguments(parser)`` and ``main(arguments) -> int``, and a line of help.
COMMANDS: Mapping[str, tuple[str, str]] = {
    "inspect": ("batch_tokenizer.commands.inspect", "put one file through a codec: tokens, scores, a picture"),
    "status": ("batch_tokenizer.commands.status", "show how far a run is, while it runs and after"),
    "evaluate": ("batch_tokenizer.commands.evaluate", "score reconstructions against originals"),
    "report": ("batch_tokenizer.commands.report", "write a run's page: one HTML file with figures and audio"),
    "verify": ("batch_tokenizer.commands.verify", "prove that a run is complete and its outputs right"),
    "show": ("batch_tokenizer.commands.show", "print one item, wherever it is stored"),
    "convert": ("batch_tokenizer.commands.convert", "turn tokens into another sink or a language model's stream"),
    "manifest": ("batch_tokenizer.commands.manifest", "make a manifest of a folder, tars or rows; describe one"),
    "codecs": ("batch_tokenizer.commands.codecs", "list the families of codecs, or describe a checkpoint"),
    "onnx": ("batch_tokenizer.commands.onnx", "export a codec as ONNX graphs, check and describe graphs"),
    "bench": ("batch_tokenizer.commands.bench", "measure how fast a codec and everything around it run here"),
}

_USAGE = """batch_tokenizer FILE_OR_FOLDER... -o DIR [flags]
       batch_tokenizer --data_list SOURCE [flags]
       batch_tokenizer COMMAND ..."""

_EXAMPLES = """examples:
  batch_tokenizer recordings/ -o tokens     tokens of every audio file in a folder
  batch_tokenizer a.wav b.mp3 -o out        tokens of a few files, and audio made from the tokens
  torchrun --nproc_per_node=8 -m batch_tokenizer --data_list data.jsonl --task wav2token2wav
                                            both for a manifest's rows, on eight GPUs"""

#: Most audio files, named one by one, that are decoded again from their tokens unless ``--task`` says otherwise.
FEW_FILES = 10

#: Seconds in which the other ranks of a machine end by themselves; torchrun lists those that it has to end.
_OTHERS_END_SECONDS = 1.0

log = logging.getLogger("batch_tokenizer")


class Parser(argparse.ArgumentParser):
    """A parser that reports a wrong argument as a RunError, so that only one rank of a job prints it."""

    def error(self, message: str) -> NoReturn:
        unknown = re.findall(r"--\w+", message) if message.startswith("unrecognized arguments") else []
        meant = [like for flag in unknown for like in get_close_matches(flag, self._option_string_actions, 1, 0.75)]
        question = f"; did you mean {' '.join(meant)}?" if meant else ""
        raise RunError(f"{message}{question} ({self.prog} --help lists all flags)")


def run_parser() -> argparse.ArgumentParser:
    """The parser of a run."""
    commands = "\n".join(f"  {name:<10} {about}" for name, (_, about) in COMMANDS.items())
    parser = Parser(
        prog="batch_tokenizer",
        usage=_USAGE,
        description="Turn a corpus of audio into the discrete tokens of a neural codec, and tokens back into audio.\n\n"
        f"{_EXAMPLES}\n\ncommands (batch_tokenizer help COMMAND):\n{commands}\n\n"
        "python -m batch_tokenizer.training trains a small codec on your own audio (docs/training.md).\n"
        "Everything below is about a run; docs/flags.md has it as a page.",
        formatter_class=_HelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"batch_tokenizer {__version__}")
    parser.add_argument(
        "inputs",
        nargs="*",
        metavar="FILE_OR_FOLDER",
        help="audio files, folders or any other source, in place of --data_list. Up to "
        f"{FEW_FILES} audio files are encoded and decoded (--task wav2token2wav), all else is encoded (wav2token)",
    )
    add_options(parser)
    # Whether these were given matters: a number of shards alone means nothing, and inputs may decide the task.
    parser.set_defaults(num_shards=None, shard=None, task=None)
    return parser


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of examples and commands."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28)


def console() -> NoReturn:
    """The console command: runs ``main`` and ends the process with its exit status."""
    status = main()
    # Everything is closed. Taking the interpreter down as well costs up to a second of processor time, which a rank
    # that was stopped may not have, and aborts if a thread that hangs in a write is in a native library.
    logging.shutdown()
    if "multiprocessing.util" in sys.modules:
        # Semaphores that are not given back are reported on the terminal by multiprocessing's resource tracker.
        sys.modules["multiprocessing.util"]._run_finalizers()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status."""
    try:
        status = _main(argv)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        broken = [stream for stream in (sys.stdout, sys.stderr) if _reader_is_gone(stream)]
        if not broken:
            raise
        # The reader has ended, as ``head`` does. What is still buffered goes nowhere, without an error at the exit.
        for stream in broken:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return 128 + signal.SIGPIPE


def _reader_is_gone(stream: TextIO) -> bool:
    """Whether an output stream is a pipe whose reader has ended."""
    poll = select.poll()
    poll.register(stream.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _main(argv: Sequence[str] | None) -> int:
    # Logs go to stderr, what a command prints to stdout. Every expected error ends in one line of the log.
    words = list(sys.argv[1:] if argv is None else argv)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_LogFormatter("%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    try:
        if words[:1] == ["help"]:
            return _help(words[1:])
        if words and words[0] in COMMANDS:
            return _command(words[0], words[1:])
        return _run(words)
    except RunError as error:
        return _fail(error)
    except Stopped as stopped:
        log.warning("stopped by %s; start the same command again to go on", stopped.signal.name)
        return 128 + stopped.signal
    except KeyboardInterrupt as interrupt:
        log.error("interrupted; start the same command again to resume")
        return 128 + (interrupt.signal if isinstance(interrupt, Aborted) else signal.SIGINT)


class _LogFormatter(logging.Formatter):
    """Keys and reasons in messages come from manifests and files, which may hold what a terminal would obey."""

    def format(self, record: logging.LogRecord) -> str:
        return printable_lines(super().format(record))


def _run(words: Sequence[str]) -> int:
    processes = ProcessGroup.from_environment()
    try:
        if not words and not os.path.exists(RunConfig().data_list) and processes.is_main:
            print(f"usage: {_USAGE}\n\n{_EXAMPLES}\n\nbatch_tokenizer --help lists all commands and flags.\n",
                  file=sys.stderr)  # fmt: skip
        config = _run_config(run_parser().parse_intermixed_args(words))
        _check_source(config.data_list)
    except RunError as error:
        # All ranks find the same; rank 0 reports it.
        raise RunError(str(error), exit_code=error.exit_code, reported=not processes.is_main) from error
    # torch is imported only now, so that the errors above come at once.
    from batch_tokenizer.commands.dry_run import dry_run
    from batch_tokenizer.pipeline.run import run_job
    from batch_tokenizer.pipeline.setup import open_context

    with open_context(config) as context:
        return dry_run(context) if config.dry_run else run_job(context)


def _run_config(arguments: argparse.Namespace) -> RunConfig:
    """
    Raises:
        RunError: a value is out of range.
    """
    values = vars(arguments)
    inputs = values.pop("inputs")
    if inputs:
        values |= _settings_of_inputs(inputs, values)
    elif values["task"] is None:
        del values["task"]
    if values["shard"] == "slurm":
        values["num_shards"], values["shard"] = shard_of_slurm_array(os.environ, values["num_shards"])
    elif values["shard"] is None and (values["num_shards"] or 1) > 1:
        raise RunError(
            f"--num_shards {values['num_shards']} needs --shard I, which of them this job is, from 0; or slurm"
        )
    values = {name: value for name, value in values.items() if value is not None or name not in ("num_shards", "shard")}
    return RunConfig(**values | {"stop_below": tuple(values["stop_below"])})


def _settings_of_inputs(inputs: Sequence[str], values: Mapping[str, Any]) -> dict[str, Any]:
    """The source and the task of a run whose inputs were named without a flag.

    Raises:
        RunError: ``--data_list`` names others, or one of them does not exist.
    """
    from batch_tokenizer.sources.sidecars import AUDIO_ENDINGS

    if values["data_list"] != RunConfig().data_list:
        raise RunError(f"both {inputs[0]} and --data_list {values['data_list']} name the utterances: give one")
    for name in inputs:
        if not _exists(name):
            like = get_close_matches(name, [*COMMANDS, "help"], 1) if name == inputs[0] else []
            question = f", did you mean the command {like[0]}?" if like else " (batch_tokenizer --help lists commands)"
            raise RunError(f"{name}: no such file or folder{question}")
    files = [Path(name) for name in inputs]
    are_audio = all(file.suffix[1:].lower() in AUDIO_ENDINGS and file.is_file() for file in files)
    task = values["task"] or ("wav2token2wav" if are_audio and len(files) <= FEW_FILES else "wav2token")
    return {"data_list": "\n".join(inputs), "task": task}


def _exists(source: str) -> bool:
    """Whether a source is a local file or folder; true of all that only a listing can find."""
    return (
        "://" in source
        or source.startswith("pipe:")
        or any(mark in source for mark in "*?{[")
        or os.path.exists(source)
    )


def _check_source(data_list: str | Path) -> None:
    """Whether a local file or folder that is named without a pattern is there, before anything else is begun.

    Raises:
        RunError: it is not.
    """
    missing = [text for text in str(data_list).split("\n") if not _exists(text)]
    if not missing or os.path.exists(data_list):
        return
    text = missing[0]
    if text == RunConfig().data_list:
        raise RunError(f"no {text} in the working directory: name the utterances with --data_list")
    raise RunError(f"--data_list {text} does not exist")


def _fail(error: RunError) -> int:
    """Logs an error, unless another rank does, and returns the exit status.

    torchrun prints a paragraph about every rank that fails, with the reason from a file that the rank writes. So of the
    ranks on one machine that would only repeat another rank's error, the first alone fails; torchrun ends the others.
    """
    under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    if error.reported:
        return 0 if under_torchrun and os.environ.get("LOCAL_RANK") != "0" else error.exit_code
    log.error("%s", error)
    if under_torchrun and (path := os.environ.get("TORCHELASTIC_ERROR_FILE")):
        reason = {"message": str(error), "extraInfo": {"py_callstack": str(error), "timestamp": str(int(time.time()))}}
        try:
            Path(path).write_text(json.dumps({"message": reason}), encoding="utf-8")
        except OSError as failed:
            log.warning("torchrun gets no reason: %s: %s", path, failed.strerror)
        time.sleep(_OTHERS_END_SECONDS)
    return error.exit_code


def _help(words: Sequence[str]) -> int:
    """Prints the help of a command, or of a run where none is named. Returns 0.

    Raises:
        RunError: there is no such command.
    """
    if not words:
        run_parser().print_help()
        return 0
    if words[0] not in COMMANDS:
        like = get_close_matches(words[0], COMMANDS, 1)
        question = f", did you mean {like[0]}?" if like else ": commands are " + ", ".join(COMMANDS)
        raise RunError(f"there is no command {words[0]}{question}")
    _command_parser(words[0]).print_help()
    return 0


def _command_parser(name: str) -> Parser:
    module_name, about = COMMANDS[name]
    parser = Parser(prog=f"batch_tokenizer {name}", description=about[0].upper() + about[1:] + ".")
    importlib.import_module(module_name).add_arguments(parser)
    return parser


def _command(name: str, words: Sequence[str]) -> int:
    arguments = _command_parser(name).parse_args(words)
    status: int = importlib.import_module(COMMANDS[name][0]).main(arguments)
    return status
