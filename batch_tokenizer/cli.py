"""The command line: flags to ``RunConfig``, errors to one line and an exit status.

    batch_tokenizer --data_list data.jsonl --task wav2token2wav [--model_path M] …     a run
    batch_tokenizer verify …, batch_tokenizer status …                                 subcommands, see ``COMMANDS``

Exit status: 0 the run finished; 1 it could not go on, or every row failed, or any did under ``--strict``; 2 bad
arguments; 128 + n when signal n stopped it.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, get_args

from batch_tokenizer import __version__
from batch_tokenizer.config import (
    AttentionBackend,
    AudioFormat,
    Channels,
    Device,
    Dtype,
    FrontEnd,
    Resampler,
    RunConfig,
    StopMetric,
    shard_of_slurm_array,
)
from batch_tokenizer.records import TASKS, LongAudio, RunError, Sink

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

log = logging.getLogger("batch_tokenizer")


def run_parser() -> argparse.ArgumentParser:
    """The parser of a run."""
    parser = argparse.ArgumentParser(
        prog="batch_tokenizer",
        description="Turn a corpus of audio into the discrete tokens of a neural codec, and tokens back into audio.",
        epilog="Other commands: " + ("; ".join(f"{name}: {about}" for name, (_, about) in COMMANDS.items()) or "none"),
    )
    default = RunConfig(data_list=Path())
    add = parser.add_argument
    add("--version", action="version", version=f"batch_tokenizer {__version__}")
    add("--model_path", help="checkpoint folder or hub id; the small bundled one when absent")
    add("--data_list", required=True,
        help="manifest: JSON lines with key, wav, quantized_tokens, …; or tars, a folder: docs/corpora.md")  # fmt: skip
    add("--allow_pipe", action="store_true", help="let pipe: sources run their shell commands")
    add("--task", choices=TASKS, default=default.task)
    add("--run_dir", type=Path, help="ledger, failures, summary; beside the manifest when absent")
    add("--sink", choices=get_args(Sink), default=default.sink,
        help="files that rows name (json, npy), or shards of many rows (tar, parquet); %(default)s")  # fmt: skip
    add("--output_dir", help="folder of the shards, or of the files of rows that name none; a path or a URL")
    add("--audio_format", choices=get_args(AudioFormat), default=default.audio_format, help="of reconstructed audio")
    add("--shard_megabytes", type=int, default=default.shard_megabytes, help="size at which a shard is closed")
    add("--max_seconds", type=float, help="longest audio that goes through the model in one piece")
    add("--long_audio", choices=get_args(LongAudio), default=default.long_audio,
        help="longer audio fails (native), is cut (segment), or is streamed by models that can")  # fmt: skip
    add("--channels", choices=get_args(Channels), default=default.channels,
        help="of audio with several: their mean, one of them, or a row for each (%(default)s)")  # fmt: skip
    add("--batch_size", type=int, default=default.batch_size, help="most utterances in one batch (%(default)s)")
    add("--frame_budget", type=int, help="most token frames in one batch; chosen for the device when absent")
    add("--num_workers", type=int, help="loader processes per rank; chosen for the device when absent")
    add("--prefetch", type=int, default=default.prefetch, help="batches loaded ahead of the model (%(default)s)")
    add("--num_quantizers", type=int, help="codebooks to use; all when absent")
    add("--seed", type=int, default=default.seed, help="of torch's generators; encoding and decoding draw nothing")
    add("--device", choices=get_args(Device), default=default.device)
    add("--dtype", choices=get_args(Dtype), default=default.dtype, help="auto: bfloat16 on CUDA, float32 on a CPU")
    add("--resampler", choices=get_args(Resampler), default=default.resampler, help="reference: as published")
    add("--attention", choices=get_args(AttentionBackend), default=default.attention, help="force a backend")
    add("--front_end", choices=get_args(FrontEnd), default=default.front_end,
        help="make features in loader processes (host) or in the codec (device); auto: the latter on CUDA")  # fmt: skip
    add("--row_timeout", type=float, default=default.row_timeout, help="seconds to load one row (%(default)s)")
    add("--grace", type=float, default=default.grace, help="seconds to finish what is in flight when stopped")
    add("--num_shards", type=int, help="independent jobs that share the manifest (1)")
    add(
        "--shard",
        type=_shard,
        default=default.shard,
        help="which of them this is, from 0; slurm: as the job array says",
    )
    add("--strict", action="store_true", help="exit with status 1 if any row failed")
    add("--retry_failed", action="store_true", help="try rows again that an earlier run recorded as failed")
    add("--overwrite", action="store_true", help="discard a run folder made with other settings")
    add("--evaluate_every", type=int, default=default.evaluate_every, metavar="N",
        help="score one of N rows of a rank while the run goes (wav2token2wav only)")  # fmt: skip
    add("--stop_below", type=_threshold, action="append", default=[], metavar="METRIC=VALUE",
        help="stop when the mean of the last scores is below: " + ", ".join(get_args(StopMetric)))  # fmt: skip
    add("--dry_run", action="store_true", help="check everything, print the plan and stop")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr
    )
    try:
        if words and words[0] in COMMANDS:
            return _command(words[0], words[1:])
        config = _run_config(run_parser().parse_args(words))
        from batch_tokenizer.pipeline.run import run

        if config.dry_run:
            from batch_tokenizer.commands.dry_run import execute

            return run(config, execute)
        return run(config)
    except RunError as error:
        log.error("%s", error)
        return error.exit_code
    except KeyboardInterrupt:
        log.error("interrupted; start the same command again to resume")
        return 130


def _shard(text: str) -> int | Literal["slurm"]:
    if text == "slurm":
        return "slurm"
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text}: a number from 0, or slurm")
    return int(text)


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
    return RunConfig(**values)


def _threshold(text: str) -> tuple[str, float]:
    """``METRIC=VALUE``."""
    name, _, value = text.partition("=")
    try:
        return name, float(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not METRIC=VALUE") from error


def _command(name: str, words: Sequence[str]) -> int:
    module_name, about = COMMANDS[name]
    module = importlib.import_module(module_name)
    parser = argparse.ArgumentParser(prog=f"batch_tokenizer {name}", description=about)
    module.add_arguments(parser)
    status: int = module.main(parser.parse_args(words))
    return status
