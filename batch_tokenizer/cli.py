"""The command line: flags to ``RunConfig``, errors to one line and an exit status.

    batch_tokenizer --data_list data.jsonl --task wav2token2wav [--model_path M] …     a run
    batch_tokenizer verify …, batch_tokenizer status …                                 the subcommands of ``COMMANDS``

Exit status: 0 the run finished; 1 it could not go on, or every row failed, or any did under ``--strict``; 2 bad
arguments; 128 + n when signal n stopped it, 141 (SIGPIPE) when nobody reads the output any more.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import logging
import os
import select
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn, TextIO

from batch_tokenizer import __version__
from batch_tokenizer.config import RunConfig, add_options, shard_of_slurm_array
from batch_tokenizer.records import RunError, printable_lines
from batch_tokenizer.runtime.processes import ProcessGroup
from batch_tokenizer.runtime.signals import Aborted, Stopped

#: Subcommand to the module that has ``add_arguments(parser)`` and ``main(arguments) -> int``, and a line of help.
COMMANDS: Mapping[str, tuple[str, str]] = {
    "status": ("batch_tokenizer.commands.status", "show how far a run is, while it runs and after"),
    "evaluate": ("batch_tokenizer.commands.evaluate", "score reconstructions against originals"),
    "report": ("batch_tokenizer.commands.report", "write a run's page: one HTML file with figures and audio"),
    "inspect": ("batch_tokenizer.commands.inspect", "put one audio file through the codec, and look"),
    "verify": ("batch_tokenizer.commands.verify", "prove that a run is complete and its outputs right"),
    "bench": ("batch_tokenizer.commands.bench", "measure how fast a codec and everything around it run here"),
    "manifest": ("batch_tokenizer.commands.manifest", "make a manifest of a folder, tars or other rows; describe one"),
    "convert": (
        "batch_tokenizer.commands.convert",
        "tokens from one sink into another, or into a language model's stream",
    ),
    "show": ("batch_tokenizer.commands.show", "print one item, wherever it is stored"),
    "onnx": ("batch_tokenizer.commands.onnx", "export a codec as ONNX graphs, check graphs, describe them"),
    "codecs": ("batch_tokenizer.commands.codecs", "list the families of codecs, or describe a checkpoint"),
}

#: Seconds in which the other ranks of a machine end by themselves; torchrun lists those that it has to end.
_OTHERS_END_SECONDS = 1.0

log = logging.getLogger("batch_tokenizer")


class Parser(argparse.ArgumentParser):
    """A parser that reports a wrong argument as a RunError, so that only one rank of a job prints it."""

    def error(self, message: str) -> NoReturn:
        raise RunError(f"{message} ({self.prog} --help lists all flags)")


def run_parser() -> argparse.ArgumentParser:
    """The parser of a run."""
    parser = Parser(
        prog="batch_tokenizer",
        description="Turn a corpus of audio into the discrete tokens of a neural codec, and tokens back into audio.",
        epilog="Other commands: " + "; ".join(f"{name}: {about}" for name, (_, about) in COMMANDS.items()),
    )
    parser.add_argument("--version", action="version", version=f"batch_tokenizer {__version__}")
    add_options(parser)
    parser.set_defaults(num_shards=None)  # a number that was given means another thing to --shard slurm
    return parser


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
        # The reader went away, as ``head`` does. What is still buffered goes nowhere, without an error at the exit.
        for stream in broken:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return 128 + signal.SIGPIPE


def _reader_is_gone(stream: TextIO) -> bool:
    """Whether an output stream is a pipe that nobody reads any more."""
    poll = select.poll()
    poll.register(stream.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _main(argv: Sequence[str] | None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_LogFormatter("%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    try:
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
        config = _run_config(run_parser().parse_args(words))
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
    if values["shard"] == "slurm":
        values["num_shards"], values["shard"] = shard_of_slurm_array(os.environ, values["num_shards"])
    elif values["num_shards"] is None:
        del values["num_shards"]
    return RunConfig(**values | {"stop_below": tuple(values["stop_below"])})


def _check_source(data_list: str | Path) -> None:
    """Whether a local file or folder that is named without a pattern is there, before anything else is begun.

    Raises:
        RunError: it is not.
    """
    text = str(data_list)
    if "://" in text or text.startswith("pipe:") or any(mark in text for mark in "*?{[") or Path(text).exists():
        return
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


def _command(name: str, words: Sequence[str]) -> int:
    module_name, about = COMMANDS[name]
    module = importlib.import_module(module_name)
    parser = Parser(prog=f"batch_tokenizer {name}", description=about)
    module.add_arguments(parser)
    status: int = module.main(parser.parse_args(words))
    return status
