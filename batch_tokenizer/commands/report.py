"""``batch_tokenizer report RUN_DIR``: the run's page, one HTML file with figures and audio that needs no network.

It is made of the run folder (settings, ledger, status files, summary), its manifest, and the audio of some utterances,
which are scored as by ``evaluate``, whose results are used where they are there.
"""

from __future__ import annotations

import argparse
import logging
import time
from pathlib import Path
from shutil import get_terminal_size

from batch_tokenizer import __version__
from batch_tokenizer.config import check_least
from batch_tokenizer.quality.evaluation import Evaluation, Request, evaluate, num_scored
from batch_tokenizer.records import RunError
from batch_tokenizer.report import page, sections
from batch_tokenizer.report.sections import RunFacts
from batch_tokenizer.runs.finished_run import FinishedRun, find_run_folder
from batch_tokenizer.runs.scored_rows import Source
from batch_tokenizer.runtime.ledger import read_ledger
from batch_tokenizer.storage.atomic import os_error_ends_run, replace_file

log = logging.getLogger(__name__)

#: The page stays below this, so that it can be sent around.
MOST_BYTES = 15_000_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    add = parser.add_argument
    add("run_dir", type=Path, help="the run folder, by default named MANIFEST.TASK.run, or the folder of its outputs")
    add("--data_list", help="the run's manifest, where it does not lie beside the run folder")
    add("--model_path", help="the run's checkpoint; needed for sizes of codebooks and for runs that made no audio")
    add("--sample", type=int, default=24, metavar="N", help="utterances to score, if not scored yet (%(default)s)")
    add("--listen", type=int, default=6, metavar="N", help="utterances to show and play (%(default)s)")
    add("--by", metavar="FIELD", help="scores for each value of this field of the manifest's rows")
    add("--speaker_model", default="auto", help="as in evaluate")
    add("--workers", type=int, default=1, help="processes that score (%(default)s)")
    add("--out", type=Path, metavar="FILE", help="the page; RUN_DIR/report.html when absent")


def main(arguments: argparse.Namespace) -> int:
    """Writes the page and prints its path and the averages. Returns 0.

    Raises:
        RunError: there is no such run folder, its manifest is not to be found, or the page cannot be written.
    """
    check_least(arguments, listen=0)
    # 1. The run's own records.
    run = FinishedRun.open(find_run_folder(arguments.run_dir))
    manifest = run.manifest(arguments.data_list)
    facts = RunFacts.of(run, manifest, read_ledger(run.path, manifest))
    # 2. Scores of a sample, and of what was scored before. The page is also of use without them.
    evaluation: Evaluation | None = None
    source: Source | None = None
    trouble = ""
    try:
        request = Request(
            run_dir=run.path,
            data_list=manifest.path,
            model_path=arguments.model_path,
            sample=max(arguments.sample, num_scored(run.path / "quality")),
            by=arguments.by,
            speaker_model=arguments.speaker_model,
            workers=arguments.workers,
        )
        source = request.open_source()
        evaluation = evaluate(request, source)
    except RunError as error:
        trouble = str(error)
        log.warning("utterances are not scored: %s", error)
    # 3. The page.
    content = run_page(facts, evaluation, source, trouble, arguments.listen).encode()
    path: Path = arguments.out or run.path / "report.html"
    with os_error_ends_run(f"{path} cannot be written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, content)
    if evaluation is not None:
        print(evaluation.table(get_terminal_size().columns))
    print(f"report: {path} ({len(content) / 1e6:.1f} MB)")
    return 0


def run_page(
    facts: RunFacts, evaluation: Evaluation | None, source: Source | None, trouble: str, num_listen: int
) -> str:
    """The page's HTML.

    Args:
        trouble: why there is no evaluation, if there is none.
        num_listen: most utterances to show with audio.
    """
    parts = []
    if evaluation is None:
        parts.append(page.Section("Quality", [page.Paragraph(f"Not scored: {trouble}")]))
    else:
        if source is not None and num_listen:
            parts.append(sections.listen(evaluation, source, num_listen))
        parts.append(sections.quality(evaluation))
    parts += [sections.failures(facts), sections.progress(facts), sections.lengths(facts)]
    if evaluation is not None:
        parts.append(sections.codebooks(evaluation))
    parts.append(sections.what_ran(facts))
    name = facts.run.path.resolve().name
    return page.render(
        name,
        f"{facts.run.task} over {facts.run.data_list or facts.manifest.path.name}",
        sections.key_numbers(facts),
        parts,
        f"Made by batch_tokenizer {__version__} on {time.strftime('%Y-%m-%d')} from {name}.",
    )
