"""``RunConfig``: the settings of a run. Each field also declares its flag, so that the parsers of the command line
(``add_options``), the checks of values and ``docs/flags.md`` all follow from one place.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import lru_cache
from itertools import takewhile
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from batch_tokenizer.audio_fields import OtherAudio, check_codes_field, parse_audio_fields
from batch_tokenizer.records import (
    CODES_FIELD,
    OUTPUT_FIELDS,
    SHARD_SINKS,
    AttentionWindow,
    DecoderChunks,
    LongAudio,
    Loudness,
    RunError,
    Sink,
    Task,
    WindowMerge,
)

Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Resampler = Literal["reference", "soxr"]
AudioFormat = Literal["wav", "flac"]
Channels = Literal["mean", "left", "right", "split", "split_row"]
Names = Literal["auto", "mirror", "hash"]
StopMetric = Literal["stoi", "si_sdr", "level_change"]
FrontEnd = Literal["auto", "host", "device"]
AttentionBackend = Literal["auto", "torch_varlen", "flash_attn", "sdpa", "reference"]
Group = Literal["input", "output", "model", "single codecs", "speed", "long audio", "run and resume", "quality"]

#: Settings of a run that decide where its outputs go and in which form, but not what is computed.
OUTPUT_SETTINGS = ("sink", "output_dir", "audio_format")

_METAVARS = {int: "N", float: "SECONDS"}


class _JoinLines(argparse.Action):
    """Values of a flag, also of one that is given several times, as one text with a value a line."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._given: list[str] = []

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: Any = None
    ) -> None:
        self._given += values
        setattr(namespace, self.dest, "\n".join(self._given))


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """A flag of the command line, as a field of ``RunConfig`` declares it.

    Attributes:
        name: the field's name; the flag is ``--name``.
        group: the heading in ``--help`` and in ``docs/flags.md``.
        help: what it sets, without the default and the choices.
        default: the field's default.
        value_type: of the field; a bool is a switch without a value.
        choices: the allowed values; empty where any is allowed.
        unset: what None, as the default, stands for.
        minimum: the least value allowed.
        parse: from the text on the command line to the value, where that is more than ``value_type(text)``.
        metavar: what stands for the value in the help; N for whole numbers and SECONDS for others unless it is given.
        repeated: whether the flag may be given several times.
        joined: whether it takes several values, which become one text, a value a line.
        short: a second name, such as ``-o``.
    """

    name: str
    group: Group
    help: str
    default: Any
    value_type: type
    choices: tuple[str, ...]
    unset: str = ""
    minimum: float | None = None
    parse: Callable[[str], Any] | None = None
    metavar: str | None = None
    repeated: bool = False
    joined: bool = False
    short: str = ""

    @property
    def default_text(self) -> str:
        """The default as documentation shows it; empty for switches and flags that are simply left out."""
        if self.default is None or self.default is False or self.default == ():
            return self.unset
        return f"{self.default:g}" if isinstance(self.default, float) else str(self.default)

    def check(self, value: Any) -> None:
        """
        Raises:
            RunError: the value is out of range or not one of the choices; the message names the flag.
        """
        if self.choices and value not in self.choices:
            raise RunError(f"--{self.name} {value}: choose one of {', '.join(self.choices)}")
        if self.minimum is not None and value is not None and not value >= self.minimum:
            raise RunError(f"--{self.name} {value:g}: must be at least {self.minimum:g}")

    def add_to(self, parser: argparse._ActionsContainer) -> None:
        """Adds the flag to a parser or to one of its groups."""
        shown = f" (default: {self.default_text})" if self.default_text else ""
        keywords: dict[str, Any] = {"default": self.default, "help": f"{self.help}{shown}".replace("%", "%%")}
        if self.value_type is bool:
            keywords["action"] = "store_true"
        else:
            keywords |= {
                "type": self.parse or self.value_type,
                "metavar": self.metavar or _METAVARS.get(self.value_type),
            }
            if self.choices:
                keywords["choices"] = self.choices
            if self.joined:
                keywords |= {"action": _JoinLines, "nargs": "+"}
            if self.repeated:
                keywords |= {"action": "append", "default": list(self.default)}
        parser.add_argument(*filter(None, (self.short,)), f"--{self.name}", **keywords)


def option(default: Any, group: Group, help: str, **more: Any) -> Any:
    """A field of ``RunConfig`` with the declaration of its flag; ``more`` are further attributes of ``Option``."""
    return field(default=default, metadata={"group": group, "help": help, **more})


def _parse_shard(text: str) -> int | Literal["slurm"]:
    if text == "slurm":
        return "slurm"
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text}: a number from 0, or slurm")
    return int(text)


def _parse_threshold(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        return name, float(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not METRIC=VALUE") from error


def _parse_max_failed(text: str) -> str:
    number = text.removesuffix("%")
    is_share = number != text and number.replace(".", "", 1).isdecimal() and float(number) <= 100
    if not is_share and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of rows nor a share such as 1%")
    return text


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """The settings of one run; values are checked when it is made.

    Raises:
        RunError: a value is out of range, or two settings contradict each other; the message names the flag.
    """

    # fmt: off
    data_list: str | Path = option("data.jsonl", "input",
        "the utterances: a manifest of JSON lines with key, wav, quantized_tokens, …; or tars, folders, parquet, "
        "lists, audio files, URLs (docs/corpora.md); several are one after the other", metavar="SOURCE", joined=True)
    task: Task = option("wav2token", "input", "encode audio to tokens, decode tokens to audio, or both in one run")
    channels: Channels = option("mean", "input",
        "of audio with several channels, take their mean, the first, the second, make a row of each (split), or one "
        "row with the codes of both (split_row)")
    audio_fields: str | None = option(None, "input",
        "fields of a row that name audio, the row's own first, each with the name of its codes, such as "
        "wav=audio_codes,ref_audio=ref_audio_codes", metavar="FIELD=CODES,…", unset="the row's own audio alone")
    audio_column: str | None = option(None, "input", "of parquet and Arrow files, the column that holds the audio",
        metavar="NAME", unset="found by its type or name")
    allow_pipe: bool = option(False, "input", "let pipe: sources and rows run their shell commands")

    sink: Sink = option("json", "output",
        "write a token file for each row (json, npy), or shards of many rows: JSON lines with the row's own fields and "
        "its codes (jsonl), webdataset tars (tar), or parquet")
    output_dir: str | None = option(None, "output",
        "folder or URL of the shards, or of the files of rows that name none", metavar="DIR", short="-o")
    names: Names = option("auto", "output",
        "where outputs of rows that name none lie in --output_dir: as the inputs lie in theirs (mirror), or by a hash "
        "of the key, so that no folder holds very many (hash); auto: mirror for folders and lists of up to 10,000 rows")
    audio_format: AudioFormat = option("wav", "output", "file format of reconstructed audio")
    shard_megabytes: int = option(256, "output", "size at which a shard is closed", minimum=1)
    codes_field: str = option(CODES_FIELD, "output", "jsonl, parquet: field or column of a row's codes", metavar="NAME")

    model_path: str | None = option(None, "model", "checkpoint folder or hub id", metavar="MODEL",
        unset="the small bundled model")
    num_quantizers: int | None = option(None, "model", "codebooks to use", minimum=1, unset="all of the checkpoint")
    device: Device = option("auto", "model", "where to compute; auto is CUDA where there is any")
    dtype: Dtype = option("auto", "model",
        "number format of the model; auto is the codec's own on CUDA, mostly bfloat16, and float32 on a CPU")
    resampler: Resampler = option("reference", "model",
        "torchaudio's, with which published tokens were made (reference), or soxr's HQ, which is faster")
    attention: AttentionBackend = option("auto", "model", "force a backend of the attention kernel")

    loudness: Loudness = option("none", "single codecs",
        "MOSS: bring each utterance's level nearer to -20 dB first, as MOSS-TTS does before it encodes (moss_tts)")
    attention_window: AttentionWindow = option("full", "single codecs",
        "Qwen3-TTS: the encoder sees all earlier frames, as in Qwen's own data preparation (full), or those within the "
        "configuration's window, as the published code with flash attention does (published)")
    decoder_chunks: DecoderChunks = option("exact", "single codecs",
        "Qwen3-TTS: decode audio above 24 s as if in one pass (exact), or in the published chunks of 300 frames, whose "
        "starts see only 25 frames back (published)")
    window_merge: WindowMerge = option("complete", "single codecs",
        "S3Tokenizer: merge the windows of audio above 30 s without loss (complete), or as the published code does, "
        "which can lose up to 2 s of tokens before the end (published)")
    hidden_states: bool = option(False, "single codecs",
        "MiMo, MOSS: store the encoder's output before quantization as float16 (T, d) beside the codes")
    noise_seed: int | None = option(None, "single codecs",
        "SNAC: decode with noise, as the published code does, drawn from this seed and the utterance's own codes",
        minimum=0, unset="no noise, which is its mean")

    batch_size: int | None = option(None, "speed", "most utterances in a batch", minimum=1,
        unset="64; on CUDA as many as fill the frame budget")
    frame_budget: int | None = option(None, "speed", "most token frames in a batch", minimum=1,
        unset="chosen for the device")
    num_workers: int | None = option(None, "speed", "loader processes of a rank; 0 loads in the computing process",
        minimum=0, unset="2; on CUDA the cores of the rank less two, 2 to 12")
    prefetch: int = option(4, "speed", "batches that are loaded ahead of the model", minimum=1)
    front_end: FrontEnd = option("auto", "speed",
        "compute features such as log-mel in loader processes (host) or in the codec (device); auto: device on CUDA")

    long_audio: LongAudio = option("native", "long audio",
        "audio longer than one pass fails (native), is cut into segments (segment), or is streamed exactly by models "
        "that can (stream)")
    max_seconds: float | None = option(None, "long audio", "longest audio that goes through the model in one pass",
        minimum=0.001, unset="the model's limit")

    run_dir: Path | None = option(None, "run and resume", "run folder, with ledger, failures and summary",
        metavar="DIR", unset="SOURCE.TASK.run in --output_dir, or beside the source")
    retry_failed: bool = option(False, "run and resume", "do rows again that an earlier run recorded as failed")
    overwrite: bool = option(False, "run and resume", "discard a run folder of other settings")
    strict: bool = option(False, "run and resume", "exit with status 1 if any row failed")
    max_failed: str | None = option(None, "run and resume",
        "exit with status 1 if more rows than this failed, a number or a share such as 1%", parse=_parse_max_failed,
        metavar="N|P%", unset="all but one")
    row_timeout: float = option(120.0, "run and resume",
        "seconds that loading one row may take before its worker is replaced", minimum=0.1)
    # torchrun and Slurm kill a process 30 s after their signal.
    grace: float = option(20.0, "run and resume",
        "seconds to finish the batches in progress after SIGTERM, SIGUSR1 or SIGINT", minimum=0)
    num_shards: int = option(1, "run and resume", "independent jobs that divide the manifest among themselves",
        minimum=1)
    shard: int = option(0, "run and resume",
        "which of them this job is, from 0; slurm: both numbers are those of the job array", minimum=0,
        parse=_parse_shard, metavar="I")
    allow_mixed_devices: bool = option(False, "run and resume",
        "resume a run on another type of GPU, where 16-bit tokens may differ in some bits from those that are done")
    quiet: bool = option(False, "run and resume", "print warnings, errors and the last lines only")
    dry_run: bool = option(False, "run and resume", "check everything, print what the run would do, and stop")

    evaluate_every: int = option(0, "quality",
        "score one of N rows of each rank during the run, in wav2token2wav; 0 scores none", minimum=0)
    stop_below: Sequence[tuple[str, float]] = option((), "quality",
        "stop when the mean of the last eight scores is below VALUE, once there are three; at the end of a run, of "
        "however many there are. A rank that still scores a row skips others, so these may be fewer than one of N; "
        "metrics: " + ", ".join(get_args(StopMetric)),
        parse=_parse_threshold, metavar="METRIC=VALUE", repeated=True)
    # fmt: on

    def __post_init__(self) -> None:
        for name, declared in options().items():
            declared.check(getattr(self, name))
        if self.hidden_states and self.task == "token2wav":
            raise RunError("--hidden_states needs a task that encodes: wav2token or wav2token2wav")
        if self.evaluate_every and self.task != "wav2token2wav":
            raise RunError(f"--evaluate_every needs --task wav2token2wav: {self.task} has nothing to compare")
        if self.stop_below and not self.evaluate_every:
            raise RunError("--stop_below needs --evaluate_every N, which scores rows during the run")
        for metric, _ in self.stop_below:
            if metric not in get_args(StopMetric):
                raise RunError(f"--stop_below {metric}: choose one of {', '.join(get_args(StopMetric))}")
        if self.sink in SHARD_SINKS and self.output_dir is None:
            raise RunError(f"--sink {self.sink} needs --output_dir, the folder of its shards")
        self._check_audio_fields()
        check_codes_field(self.codes_field)
        if self.sink == "jsonl" and "reconstructed_wav" in OUTPUT_FIELDS[self.task]:
            raise RunError(
                f"--sink jsonl holds tokens and fields, and --task {self.task} makes audio: use --sink tar or parquet"
            )
        if self.strict and self.max_failed is not None:
            raise RunError(f"--strict is --max_failed 0, and not {self.max_failed}: leave one of them out")
        if self.sink == "jsonl" and self.hidden_states:
            raise RunError("--sink jsonl holds tokens and fields, and --hidden_states makes arrays: use another --sink")
        if self.shard >= self.num_shards:
            raise RunError(f"--shard {self.shard}: must be below --num_shards {self.num_shards}")

    def _check_audio_fields(self) -> None:
        """Checks ``audio_fields``, and takes the name of the codes of a row's own audio from it."""
        flag = "--channels split_row" if self.channels == "split_row" else f"--audio_fields {self.audio_fields}"
        if self.audio_fields is not None:
            own = parse_audio_fields(self.audio_fields)[0].codes
            if self.task == "token2wav":
                raise RunError(f"{flag}: token2wav decodes the codes of a row's own audio: leave it out")
            if self.codes_field not in (own, CODES_FIELD):
                raise RunError(f"{flag}: --codes_field says {self.codes_field}: leave one of them out")
            object.__setattr__(self, "codes_field", own)
        if self.other_audio:
            if self.channels == "split_row" and self.audio_fields is not None and "," in self.audio_fields:
                raise RunError(f"{flag} and --audio_fields with several: leave one of them out")
            if self.task == "wav2token2wav":
                raise RunError(
                    f"{flag}: only codes can be made of several: use --task wav2token, and then --task token2wav, "
                    "which decodes the codes of a row's own audio"
                )
            if self.hidden_states:
                raise RunError(f"{flag}: there can be no --hidden_states of several: leave one of them out")

    @property
    def audio_field(self) -> str:
        """The field that names a row's own audio."""
        return "wav" if self.audio_fields is None else str(parse_audio_fields(self.audio_fields)[0].field)

    @property
    def other_audio(self) -> tuple[OtherAudio, ...]:
        """What is encoded of a row beside its own audio."""
        if self.task == "token2wav":
            return ()
        if self.channels == "split_row":
            return (OtherAudio(f"{self.codes_field}_1", channel=1),)
        if self.audio_fields is None:
            return ()
        channel = {"left": 0, "right": 1}.get(self.channels)
        return tuple(replace(other, channel=channel) for other in parse_audio_fields(self.audio_fields)[1:])

    @property
    def codec_options(self) -> dict[str, Any]:
        """Settings of single codec families that are not left at their defaults."""
        names = [name for name, declared in options().items() if declared.group == "single codecs"]
        return {name: getattr(self, name) for name in names if getattr(self, name) != options()[name].default}

    def too_many_failed(self, num_failed: int, num_rows: int) -> bool:
        """Whether a run with so many failed rows of those that ended is to exit with status 1."""
        if num_failed == num_rows or self.strict:
            return num_failed > 0
        if self.max_failed is None:
            return False
        share = self.max_failed.removesuffix("%")
        most = int(share) if share == self.max_failed else float(share) / 100 * num_rows
        return num_failed > most

    def default_run_dir(self) -> Path:
        """One folder a source and task: ``data.jsonl`` and ``wav2token`` give ``data.wav2token.run``.

        It is in ``output_dir`` where that is no URL, otherwise beside the source, but never among files of a data
        set: of a single tar or parquet file it is in the working directory.
        """
        source = beside(self.data_list, f".{self.task}.run")
        if self.output_dir is not None and "://" not in self.output_dir:
            return Path(self.output_dir) / source.name
        path = Path(str(self.data_list).partition("\n")[0].lower().removesuffix(".gz"))
        is_shard = path.suffix in (".tar", ".tgz", ".parquet", ".arrow") and len(path.parts) == len(source.parts)
        return Path(source.name) if is_shard else source


@lru_cache(maxsize=1)
def options() -> Mapping[str, Option]:
    """The flags of a run by name, in the order of ``RunConfig``'s fields."""
    hints = get_type_hints(RunConfig)
    declared = {}
    for one in fields(RunConfig):
        assert one.default is not MISSING
        value_type, choices = _type_and_choices(hints[one.name])
        declared[one.name] = Option(
            name=one.name, default=one.default, value_type=value_type, choices=choices, **one.metadata
        )
    return declared


def _type_and_choices(hint: Any) -> tuple[type, tuple[str, ...]]:
    """The type that a flag's text is converted to: the first of a union; with the values of a Literal."""
    if get_origin(hint) in (Union, UnionType):
        hint = next(part for part in get_args(hint) if part is not NoneType)
    if get_origin(hint) is Literal:
        return str, get_args(hint)
    return get_origin(hint) or hint, ()


def add_options(parser: argparse.ArgumentParser, *names: str, **defaults: Any) -> None:
    """Adds flags of a run to a parser.

    Args:
        names: the flags that another command shares with a run; all of them, in groups, when none is named.
        defaults: where the command's default is not the run's.
    """
    if names:
        for name in names:
            declared = options()[name]
            (replace(declared, default=defaults[name]) if name in defaults else declared).add_to(parser)
        return
    for group in get_args(Group):
        heading = parser.add_argument_group(group)
        for declared in options().values():
            if declared.group == group:
                declared.add_to(heading)


def check_least(arguments: argparse.Namespace, **least: float) -> None:
    """
    Raises:
        RunError: an argument of a command is below the least value given under its name; None passes.
    """
    for name, minimum in least.items():
        value = getattr(arguments, name)
        if value is not None and value < minimum:
            raise RunError(f"--{name} {value:g}: must be at least {minimum:g}")


def beside(data_list: str | Path, ending: str) -> Path:
    """A name beside a source: ``a/data.jsonl`` and ``.x`` give ``a/data.x``, the shards ``a/tars/{0..9}.tar`` and the
    folder ``a/tars`` give ``a/tars.x``. What is elsewhere (a URL) has it in the working directory. Of several sources,
    one a line, the first counts."""
    text = str(data_list).partition("\n")[0]
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
