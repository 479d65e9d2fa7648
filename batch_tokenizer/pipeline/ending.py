"""The last lines of a run: what was done, how fast, and where the outputs are."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from batch_tokenizer.config import RunConfig
from batch_tokenizer.manifest.manifest import Manifest
from batch_tokenizer.records import SHARD_SINKS, ManifestRow
from batch_tokenizer.runtime.ledger import LedgerState, RowStatus
from batch_tokenizer.runtime.progress import duration_text, speed_text
from batch_tokenizer.storage.names import display_name, is_url

#: What a summary says about the attempt that did the work; one that finds nothing left to do keeps them.
WORK_FIGURES = (
    "audio_hours", "wall_seconds", "startup_seconds", "rtf", "rtf_after_startup", "rtf_per_stage", "world_size",
)  # fmt: skip


def work_figures(
    audio_seconds: float, wall_seconds: float, startup_seconds: float, stage_seconds: Mapping[str, float], ranks: int
) -> dict[str, Any]:
    """The values of ``WORK_FIGURES``; real-time factors are seconds for a second of audio, None without audio.

    Args:
        startup_seconds: of the wall time, those before the first row could be computed.
        stage_seconds: as in ``JobStatus``.
    """
    audio = audio_seconds
    per_stage = {stage: round(seconds / audio, 6) for stage, seconds in stage_seconds.items()} if audio else {}
    return {
        "audio_hours": round(audio / 3600, 6),
        "wall_seconds": round(wall_seconds, 3),
        "startup_seconds": round(startup_seconds, 3),
        "rtf": round(wall_seconds / audio, 6) if audio else None,
        "rtf_after_startup": round((wall_seconds - startup_seconds) / audio, 6) if audio else None,
        "rtf_per_stage": per_stage,
        "world_size": ranks,
    }


def ending_lines(
    config: RunConfig,
    manifest: Manifest,
    state: LedgerState,
    figures: Mapping[str, Any],
    *,
    had_work: bool,
    run_dir: Path,
    failures: Path,
    outputs_manifest: str | None,
) -> Iterator[str]:
    """The lines, most general first.

    Args:
        figures: of this attempt, as ``work_figures`` makes them.
        had_work: whether it found rows to do.
        outputs_manifest: the manifest of all that was made, where one was written.
    """
    yield f"{state.num_done} rows done, {state.num_failed} failed, {state.num_pending} to do"
    if not had_work:
        yield "nothing was left to do" + (" (--retry_failed does failed rows again)" if state.num_failed else "")
    elif figures["rtf"]:
        audio, wall, startup = figures["audio_hours"] * 3600, figures["wall_seconds"], figures["startup_seconds"]
        yield (
            f"{duration_text(audio)} of audio in {duration_text(wall)}, {speed_text(audio, wall)}; "
            f"without {duration_text(startup)} of start-up {speed_text(audio, wall - startup)}"
        )
        stages = ", ".join(f"{stage} {rate:.5f}" for stage, rate in figures["rtf_per_stage"].items())
        yield f"seconds for a second of audio (RTF): {figures['rtf_after_startup']:.5f} without start-up; {stages}"
    if state.num_done:
        yield f"outputs: {_outputs(config, manifest, state)}"
    if outputs_manifest is not None:
        yield f"manifest with the outputs: {outputs_manifest}"
    if state.num_failed:
        yield f"failures: {failures}"
    yield f"run folder: {run_dir}"
    if state.num_done and config.task == "wav2token2wav":
        yield f"to listen and compare: batch_tokenizer report {run_dir}"


def _outputs(config: RunConfig, manifest: Manifest, state: LedgerState) -> str:
    if config.sink in SHARD_SINKS:
        return f"{config.sink} shards in {display_name(str(config.output_dir))}"
    done = np.flatnonzero(state.status == RowStatus.DONE)
    paths = []
    for line in (int(done[0]), int(done[-1])):
        row = manifest.row(line)
        paths.append([str(row.fields[name]) for name in manifest.form.outputs] if isinstance(row, ManifestRow) else [])
    first, all_paths = paths[0], paths[0] + paths[1]
    if len(done) == 1 or any(map(is_url, all_paths)):
        return ", ".join(map(display_name, first)) + (f", and {len(done) - 1} rows more" if len(done) > 1 else "")
    folder = config.output_dir or os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in all_paths])
    return f"in {os.path.relpath(folder)}, the first {' and '.join(first)}"
