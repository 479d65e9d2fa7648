"""``batch_tokenizer inspect FILE``: one recording through the codec, to see and hear what becomes of it.

It writes a folder: ``KEY.json`` (the tokens, as a run writes them), ``KEY.wav`` (the reconstruction), ``KEY.png``
(both spectrograms and the token matrix); and on the terminal the tokens' beginning and the scores.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from batch_tokenizer.audio.loading import load_samples
from batch_tokenizer.codecs.base import CodecInfo
from batch_tokenizer.codecs.checkpoint import Checkpoint
from batch_tokenizer.codecs.offline import at_input_rate, check_num_quantizers, decode, encode
from batch_tokenizer.codecs.opening import CodecSetup
from batch_tokenizer.config import add_options
from batch_tokenizer.quality.aggregates import score_texts
from batch_tokenizer.quality.codebooks import bit_rate
from batch_tokenizer.quality.metrics import METRICS, Scorer, Scores
from batch_tokenizer.quality.recordings import align
from batch_tokenizer.records import ManifestRow, RowError, RunError, TokenizedRow, printable
from batch_tokenizer.report.figures import draw_comparison
from batch_tokenizer.storage.names import display_name, file_name
from batch_tokenizer.writers.publish import publish
from batch_tokenizer.writers.row_encoding import token_json, wav_bytes

_FRAMES_PRINTED = 5
_CODES_PRINTED = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    add = parser.add_argument
    add("file", help="an audio file, or another location: docs/corpora.md")
    add_options(parser, "model_path", "num_quantizers")
    add("--metrics", nargs="+", choices=list(METRICS), default=list(METRICS), metavar="METRIC",
        help="of " + ", ".join(METRICS))  # fmt: skip
    add("--speaker_model", default="auto", help="as in evaluate")
    add_options(parser, "device", "dtype")
    add("--out", type=Path, metavar="DIR", help="where results go; FILE's name with .inspect, here, when absent")


def main(arguments: argparse.Namespace) -> int:
    """Encodes, decodes, scores and draws one recording. Returns 0.

    Raises:
        RunError: the file or the checkpoint cannot be used, or the results not be written.
    """
    # 1. The codec and what is asked of it.
    location: str = arguments.file
    name = Path(file_name(location)).stem
    setup = CodecSetup.open(Checkpoint.open(arguments.model_path), device=arguments.device, dtype=arguments.dtype)
    codec = setup.load()
    info = codec.info
    wanted = () if arguments.num_quantizers is None else (arguments.num_quantizers,)
    (num_quantizers,) = check_num_quantizers(wanted, info.num_codebooks)
    about = setup.token_info(num_quantizers, "reference")
    out: Path = arguments.out or Path(f"{name}.inspect")
    # 2. Encode and decode, and write the files that a run would write.
    try:
        samples = load_samples(location, info.sample_rate, max_samples=info.max_samples, channels=info.channels)
        codes = _result(encode(codec, [samples], num_quantizers))
        made = _result(decode(codec, [codes]))
        mono = samples if samples.ndim == 1 else samples.mean(axis=0)
        original, (reconstruction,) = align(mono, [at_input_rate(info, made)], info.sample_rate)
        row = ManifestRow(0, "", name, location, None, None, {"key": name, "wav": location})
        publish(str(out / f"{name}.json"), token_json(TokenizedRow(row, codes, made, len(mono)), about))
        publish(str(out / f"{name}.wav"), wav_bytes(made, info.output_sample_rate))
    except RowError as error:
        raise RunError(error.reason) from error
    # 3. Scores, picture and text.
    scores = Scorer(tuple(name for name in METRICS if name in arguments.metrics), arguments.speaker_model).score(
        original, reconstruction
    )
    picture = out / f"{name}.png"
    drawn = draw_comparison(
        picture, f"{file_name(location)} through {info.name}", original, reconstruction, codes,
        info.codebook_sizes[:num_quantizers], info.frame_rate, scores,
    )  # fmt: skip
    for line in summary(display_name(location), info, codes, len(mono), scores):
        print(printable(line))
    print(f"tokens: {out / name}.json\nreconstruction: {out / name}.wav")
    print(f"picture: {picture}" if drawn else "picture: not drawn; pip install 'batch_tokenizer[report]'")
    return 0


def _result(results: list[Any]) -> Any:
    """The only result."""
    (result,) = results
    if isinstance(result, RowError):
        raise result
    return result


def summary(source: str, info: CodecInfo, codes: npt.NDArray[np.uint16], num_samples: int, scores: Scores) -> list[str]:
    """The lines that the command prints."""
    frames, used = codes.shape
    sizes = info.codebook_sizes[:used]
    lines = [
        f"{source}: {num_samples / info.sample_rate:.2f} s at {info.sample_rate} Hz",
        f"model {info.name} ({info.family}, fingerprint {info.fingerprint})",
        f"{frames} frames of {used} codes, {info.frame_rate:g} frames a second, "
        f"{bit_rate(sizes, info.frame_rate) / 1000:.2f} kbit/s",
        "codes (a line a frame, codebook 1 first):",
    ]
    for frame in codes[:_FRAMES_PRINTED]:
        more = " …" if used > _CODES_PRINTED else ""
        lines.append("  " + " ".join(f"{code:4d}" for code in frame[:_CODES_PRINTED]) + more)
    if frames > _FRAMES_PRINTED:
        lines.append(f"  … {frames - _FRAMES_PRINTED} more")
    lines.append("reconstruction against original:")
    lines += [f"  {heading:<22}{text}" for heading, text in score_texts(scores.values, scores.reasons).items()]
    return lines
