"""``python -m batch_tokenizer.training``: trains on a manifest and writes a checkpoint into a folder."""

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
from batch_tokenizer.training.recipe import SMALL, Recipe, train


def parser() -> argparse.ArgumentParser:
    """The flags."""
    flags = argparse.ArgumentParser(
        prog="python -m batch_tokenizer.training",
        description="Train a MiMo-shaped tokenizer. Stop it at any time; the same command resumes. "
        "OUT/checkpoint is what --model_path takes.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    flags.add_argument(
        "--data", required=True, help="audio to learn from: whatever --data_list takes; speaker where known"
    )
    flags.add_argument("--out", type=Path, required=True, help="folder of the run")
    flags.add_argument("--held_out", help="audio to watch but not to learn from, of the same kinds")
    flags.add_argument("--config", type=Path, help="config.json of the model; the bundled default's shape if not given")
    flags.add_argument("--start_from", help="checkpoint folder whose weights training begins with; random if not given")
    flags.add_argument("--steps", type=int, default=40000, help="end after this many steps")
    flags.add_argument("--minutes", type=float, default=math.inf, help="or after this long, whichever comes first")
    flags.add_argument("--batch_size", type=int, default=4, help="crops a step")
    flags.add_argument("--token_frames", type=int, default=32, help="length of a crop in frames of tokens")
    flags.add_argument("--learning_rate", type=float, default=1.2e-3, help="of AdamW at its peak")
    flags.add_argument("--seed", type=int, default=1986)
    flags.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    flags.add_argument("--threads", type=int, help="processor threads; torch decides if not given")
    flags.add_argument("--num_workers", type=int, default=1, help="processes that load audio")
    flags.add_argument("--cache_gib", type=float, default=4.0, help="memory in which each of them keeps audio")
    flags.add_argument("--save_every", type=float, default=300.0, help="seconds between two saves")
    return flags


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains. 0 when done or stopped, 2 for what cannot be done as asked."""
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
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"--config {path}: cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise RunError(f"--config {path}: must hold a JSON object")
    return config


if __name__ == "__main__":
    sys.exit(main())
