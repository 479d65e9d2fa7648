"""``RunConfig``: everything a run was asked for, checked once at the door and frozen. ``cli.py`` makes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Literal, get_args

from batch_tokenizer.records import SHARD_SINKS, TASKS, LongAudio, RunError, Sink, Task

Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Resampler = Literal["reference", "soxr"]
AudioFormat = Literal["wav", "flac"]
Channels = Literal["mean", "left", "right", "split"]
StopMetric = Literal["stoi", "si_sdr", "level_change"]
FrontEnd = Literal["auto", "host", "device"]
AttentionBackend = Literal["auto", "torch_varlen", "flash_attn", "sdpa", "reference"]


#: Settings of a run that say where its outputs go, and nothing of what was computed.
OUTPUT_SETTINGS = ("sink", "output_dir", "audio_format")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """One run.

    Attributes:
        sink: what the results become: files that the rows name (``json``, ``npy``), or shards (``tar``, ``parquet``).
        output_dir: folder of the shards, or of the files of rows that name none; a path or an fsspec URL.
        audio_format: of reconstructed audio.
        shard_megabytes: a shard is closed when it has grown to this size.
        max_seconds: longest audio that goes through the model in one piece.
        long_audio: what happens to longer audio: ``native`` fails the row, ``segment`` cuts it into consecutive pieces
            of ``max_seconds``, ``stream`` carries the model's state from piece to piece.
        channels: of audio with several: their mean, the first, the second, or a row for each.
        model_path: checkpoint folder, hub id, or None for the bundled default.
        data_list: the rows: a file of JSON lines, or any other source that ``sources`` reads (tars, folders, URLs …).
        allow_pipe: sources and rows may run shell commands (``pipe:``).
        run_dir: ledger, failures, summary; None means beside the manifest (``default_run_dir``).
        batch_size: most utterances in one batch.
        frame_budget: most token frames in one batch; None lets the device decide.
        num_workers: loader processes per rank; 0 loads in the computing process; None lets the device decide.
        prefetch: batches that the loader keeps ready ahead of the model.
        num_quantizers: codebooks used; None means all that the checkpoint has.
        front_end: where the codec's features are made: in loader processes (``host``), or in the codec (``device``).
        row_timeout: seconds that loading one row may take before its worker is replaced.
        grace: seconds that work in flight may take after SIGTERM, SIGUSR1 or SIGINT.
        num_shards, shard: the manifest is divided among independent jobs, and this job does part ``shard`` of it.
        strict: exit with status 1 if any row failed.
        retry_failed: do rows again that an earlier run recorded as failed.
        overwrite: discard a run folder that was made with other settings.
        evaluate_every: in ``wav2token2wav``, score one of so many rows of a rank while the run goes; 0 scores none.
        stop_below: (metric, value): stop the run when the mean of the last scores is below the value.
        dry_run: print the plan and stop.

    Raises:
        RunError: a value is out of range; the message names the flag.
    """

    data_list: str | Path
    task: Task = "wav2token"
    model_path: str | None = None
    run_dir: Path | None = None
    batch_size: int = 64
    frame_budget: int | None = None
    num_workers: int | None = None
    prefetch: int = 4
    num_quantizers: int | None = None
    seed: int = 1986
    device: Device = "auto"
    dtype: Dtype = "auto"
    resampler: Resampler = "reference"
    attention: AttentionBackend = "auto"
    front_end: FrontEnd = "auto"
    row_timeout: float = 120.0
    grace: float = 20.0  # torchrun and Slurm kill 30 s after their signal
    num_shards: int = 1
    shard: int = 0
    strict: bool = False
    retry_failed: bool = False
    overwrite: bool = False
    evaluate_every: int = 0
    stop_below: Sequence[tuple[str, float]] = ()
    dry_run: bool = False
    sink: Sink = "json"
    output_dir: str | None = None
    audio_format: AudioFormat = "wav"
    shard_megabytes: int = 256
    max_seconds: float | None = None
    long_audio: LongAudio = "native"
    channels: Channels = "mean"
    allow_pipe: bool = False

    def __post_init__(self) -> None:
        for flag, value, choices in (
            ("task", self.task, TASKS),
            ("device", self.device, get_args(Device)),
            ("dtype", self.dtype, get_args(Dtype)),
            ("resampler", self.resampler, get_args(Resampler)),
            ("attention", self.attention, get_args(AttentionBackend)),
            ("front_end", self.front_end, get_args(FrontEnd)),
            ("sink", self.sink, get_args(Sink)),
            ("audio_format", self.audio_format, get_args(AudioFormat)),
            ("long_audio", self.long_audio, get_args(LongAudio)),
            ("channels", self.channels, get_args(Channels)),
        ):
            if value not in choices:
                raise RunError(f"--{flag} {value}: choose one of {', '.join(choices)}")
        for flag, number, least in (
            ("batch_size", self.batch_size, 1),
            ("num_workers", self.num_workers or 0, 0),
            ("prefetch", self.prefetch, 1),
            ("num_shards", self.num_shards, 1),
            ("shard", self.shard, 0),
            ("row_timeout", self.row_timeout, 0.1),
            ("grace", self.grace, 0.0),
            ("evaluate_every", self.evaluate_every, 0),
            ("shard_megabytes", self.shard_megabytes, 1),
        ):
            if number < least:
                raise RunError(f"--{flag} {number}: must be at least {least}")
        for flag, optional in (("num_quantizers", self.num_quantizers), ("frame_budget", self.frame_budget)):
            if optional is not None and optional < 1:
                raise RunError(f"--{flag} {optional}: must be at least 1")
        if self.evaluate_every and self.task != "wav2token2wav":
            raise RunError(f"--evaluate_every needs --task wav2token2wav: {self.task} has nothing to compare")
        if self.stop_below and not self.evaluate_every:
            raise RunError("--stop_below needs --evaluate_every N, which scores rows while the run goes")
        for metric, _ in self.stop_below:
            if metric not in get_args(StopMetric):
                raise RunError(f"--stop_below {metric}: choose one of {', '.join(get_args(StopMetric))}")
        if self.sink in SHARD_SINKS and self.output_dir is None:
            raise RunError(f"--sink {self.sink} needs --output_dir, the folder of its shards")
        if self.max_seconds is not None and not self.max_seconds > 0:
            raise RunError(f"--max_seconds {self.max_seconds:g}: must be above 0")
        if self.shard >= self.num_shards:
            raise RunError(f"--shard {self.shard}: must be below --num_shards {self.num_shards}")

    def default_run_dir(self) -> Path:
        """Beside the manifest, one folder a task: ``data.jsonl`` and ``wav2token`` give ``data.wav2token.run``."""
        return beside(self.data_list, f".{self.task}.run")


def beside(data_list: str | Path, ending: str) -> Path:
    """A name beside a source: ``a/data.jsonl`` and ``.x`` give ``a/data.x``, the shards ``a/tars/{0..9}.tar`` and the
    folder ``a/tars`` give ``a/tars.x``. What is elsewhere (a URL) has it in the working directory."""
    text = str(data_list)
    if text.startswith("pipe:"):
        return Path(f"pipe{ending}")
    elsewhere = "://" in text
    path = Path(text.split("?")[0].split("://", 1)[1]) if elsewhere else Path(text)
    if any(mark in text for mark in "*{[") and (elsewhere or not path.exists()):
        path = Path(*takewhile(lambda part: not any(mark in part for mark in "*?{["), path.parts))
        path = path / "shards" if path.name in ("", "..") else path
        name = path.name
    elif not elsewhere and path.is_dir():
        path = path.resolve() if path.name in ("", "..") else path
        name = path.name
    else:
        name = Path(path.name.removesuffix(".gz")).stem
    return Path(f"{name}{ending}") if elsewhere else path.with_name(f"{name}{ending}")


def shard_of_slurm_array(environment: Mapping[str, str], num_shards: int | None = None) -> tuple[int, int]:
    """(num_shards, shard) of this task of a Slurm job array, for ``--shard slurm``.

    Tasks ``--array=F-L:S`` are shards 0, 1, … of as many as there are tasks. With ``num_shards`` given, a task's own
    number is its shard, so that single ones of them can be submitted again.

    Raises:
        RunError: this is no array task, or its numbers are not a range.
    """
    try:
        task, first, step, count = (
            int(environment[f"SLURM_ARRAY_TASK_{name}"]) for name in ("ID", "MIN", "STEP", "COUNT")
        )
    except (KeyError, ValueError) as error:
        raise RunError("--shard slurm: this is not a task of a Slurm job array (sbatch --array=0-9)") from error
    if num_shards is not None:
        return num_shards, task
    shard, rest = divmod(task - first, max(1, step))
    if rest or shard >= count:
        raise RunError(
            "--shard slurm: the array's task numbers are not a range; submit one such as --array=0-9, "
            "or say how many shards there are with --num_shards"
        )
    return count, shard
