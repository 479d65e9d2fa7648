"""``batch_tokenizer evaluate``: originals against reconstructions, an utterance at a time and on average.

    batch_tokenizer evaluate RUN_DIR                          what a run wrote: its wav files and tokens
    batch_tokenizer evaluate RUN_DIR --num_quantizers 4 8     its tokens, decoded again from their first codebooks
    batch_tokenizer evaluate --data_list data.jsonl           the manifest's audio through the codec, in memory

Results go to a folder: ``utterances.jsonl`` (a line an utterance and number of codebooks; also ``.parquet`` where
pyarrow is installed), ``tokens.jsonl`` (its codes, for counting), ``table.md`` and ``summary.json``.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from shutil import get_terminal_size

from batch_tokenizer.config import add_options
from batch_tokenizer.quality.evaluation import Request, evaluate
from batch_tokenizer.quality.metrics import METRICS
from batch_tokenizer.records import printable, printable_lines
from batch_tokenizer.runs.finished_run import find_run_folder
from batch_tokenizer.runtime.processes import num_cores


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    add = parser.add_argument
    add("run_dir", type=Path, nargs="?", help="a run folder, or the folder of its outputs: score what the run made")
    add("--data_list", help="a manifest: put its audio through the codec; with RUN_DIR, the run's manifest")
    add("--model_path", help="checkpoint folder or hub id; the run's, or the bundled default, when absent")
    add("--sample", type=int, metavar="N", help="score N utterances, in effect drawn at random; all when absent")
    add("--by", metavar="FIELD", help="a column of the table for each value of this field of the manifest's rows")
    add("--num_quantizers", type=int, nargs="+", default=[], metavar="K", help="numbers of codebooks to decode from")
    add("--metrics", nargs="+", choices=list(METRICS), default=list(METRICS), metavar="METRIC",
        help="of " + ", ".join(METRICS))  # fmt: skip
    add("--speaker_model", default="auto", help="a transformers x-vector model, or resemblyzer; auto: WavLM if cached")
    add("--workers", type=int, default=num_cores(), help="processes that score (%(default)s)")
    add_options(parser, "device", "dtype")
    add("--out", type=Path, metavar="DIR", help="where results go; RUN_DIR/quality or MANIFEST.quality when absent")
    add("--overwrite", action="store_true", help="discard results of other settings in DIR")


def main(arguments: argparse.Namespace) -> int:
    """Scores, prints the table and where everything lies. Returns 1 if no utterance could be scored, else 0.

    Raises:
        RunError: there is nothing to score, or it cannot be scored this way; the message names flag and remedy.
    """
    values = vars(arguments) | {
        "run_dir": None if arguments.run_dir is None else find_run_folder(arguments.run_dir),
        "num_quantizers": tuple(arguments.num_quantizers),
        "metrics": tuple(name for name in METRICS if name in arguments.metrics),
    }
    evaluation = evaluate(Request(**values))
    print(printable_lines(evaluation.table(get_terminal_size().columns)))
    for line in evaluation.notes():
        print(printable(line))
    print(f"results: {evaluation.folder}")
    return 0 if evaluation.utterances else 1
