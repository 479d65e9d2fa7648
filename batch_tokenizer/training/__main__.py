"""``python -m batch_tokenizer.training``: trains a tokenizer on the audio of a source."""

from __future__ import annotations

import argparse
import json
import logging
import math
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from batch_tokenizer.records import RunError
from batch_tokenizer.training.recipe import SMALL, Recipe
from batch_tokenizer.training.run import train


def parser() -> argparse.ArgumentParser:
    """The parser of the command's flags."""
    flags = argparse.ArgumentParser(
        prog="python -m batch_tokenizer.training",
        description="Train a tokenizer of the MiMo architecture. Stop it at any time; the same command resumes. "
        "OUT/checkpoint is what --model_path takes, OUT/log.jsonl has losses and held-out scores.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    flags.add_argument(
        "--data", required=True, help="training audio: any source that --data_list takes; rows may have a speaker"
    )
    flags.add_argument("--out", type=Path, required=True, help="run folder: state, log and checkpoint")
    flags.add_argument("--held_out", help="audio to score during training, never trained on: any such source")
    flags.add_argument("--config", type=Path, help="config.json of the model; that of the bundled default if not given")
    flags.add_argument("--start_from", help="checkpoint folder with initial weights; random if not given")
    flags.add_argument("--steps", type=int, default=40000, help="end after this many steps")
    flags.add_argument("--minutes", type=float, default=math.inf, help="or after this long, whichever comes first")
    flags.add_argument("--batch_size", type=int, default=4, help="crops per step")
    flags.add_argument("--token_frames", type=int, default=32, help="length of a crop in token frames")
    flags.add_argument("--learning_rate", type=float, default=1.2e-3, help="peak learning rate of AdamW")
    flags.add_argument("--seed", type=int, default=1986, help="of weights, data order and augmentation")
    flags.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch device")
    flags.add_argument("--threads", type=int, help="CPU threads; torch's default if not given")
    flags.add_argument("--num_workers", type=int, default=1, help="processes that load audio")
    flags.add_argument("--cache_gib", type=float, default=4.0, help="memory for decoded audio in each of them")
    flags.add_argument("--save_every", type=float, default=300.0, help="seconds between two saves")
    return flags


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains. Returns 0 when done or stopped by a signal, otherwise the exit code of a ``RunError``."""
    values = vars(parser().parse_args(arguments))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    threads, config = values.pop("threads"), values.pop("config")
    if threads is not None:
        torch.set_num_threads(threads)
    stopped: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda received, _: stopped.append(received))
    try:
        shape = SMALL if config is None else _read(config)
        train(Recipe(config=shape, **values), stop=lambda: bool(stopped))
    except RunError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def _read(path: Path) -> dict[str, object]:
    """
    Raises:
        RunError: it is no readable JSON object.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"--config {path}: cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise RunError(f"--config {path}: must hold a JSON object")
    return config


if __name__ == "__main__":
    sys.exit(main())
