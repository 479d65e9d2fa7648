"""``batch_tokenizer show KEY --in SOURCE_OR_RUN``: prints one item, wherever it is stored."""

from __future__ import annotations

import argparse
import json

import numpy as np
import numpy.typing as npt

from batch_tokenizer.records import RunError, printable
from batch_tokenizer.runs.indexed_rows import stored_rows
from batch_tokenizer.runs.stored_rows import StoredRow

#: Frames that are printed at each end.
_FRAMES = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("key")
    parser.add_argument(
        "--in", dest="source", required=True,
        help="a run folder, shards ('out/*.tar'), a manifest of token files, or a folder of either",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print all of it as the token JSON")


def main(arguments: argparse.Namespace) -> int:
    """Prints the item. Returns 0.

    Raises:
        RunError: the source has none of this key, or cannot be read.
    """
    row = next(stored_rows(arguments.source, arguments.key), None)
    if row is None:
        raise RunError(f"{arguments.source}: has no {arguments.key}", exit_code=1)
    if arguments.json:
        tokens = None if row.codes is None else row.codes.tolist()
        others = {name: codes.tolist() for name, codes in row.other_codes.items()}
        print(json.dumps({"quantized_tokens": tokens, "info": {**row.info, **others}}))
        return 0
    for line in describe(row):
        print(printable(line))
    return 0


def describe(row: StoredRow) -> list[str]:
    """The item's lines."""
    info = row.info
    lines = [f"key        {row.key}"]
    if "codec" in info:
        lines.append(f"codec      {info['codec']} (fingerprint {info.get('fingerprint', 'unknown')})")
    samples, rate = info.get("num_samples"), info.get("sample_rate")
    if isinstance(samples, int) and isinstance(rate, int) and rate > 0:
        lines.append(f"audio      {samples / rate:.3f} s, {samples:,} samples at {rate} Hz")
    if row.audio is not None:
        lines.append(f"decoded    {row.audio_format}, {len(row.audio):,} bytes")
    if isinstance(info.get("text"), str):
        lines.append(f"text       {info['text']}")
    if row.codes is not None:
        lines.append(f"codes      {row.codes.shape[0]} frames of {row.codes.shape[1]} codebooks")
        lines += _frames(row.codes)
    for name, codes in row.other_codes.items():
        lines.append(f"{name:<10} {codes.shape[0]} frames of {codes.shape[1]} codebooks")
        lines += _frames(codes)
    others = {name: value for name, value in info.items() if name not in ("key", "text")}
    lines.append(f"info       {json.dumps(others, ensure_ascii=False)}")
    return lines


def _frames(codes: npt.NDArray[np.uint16]) -> list[str]:
    num_frames = len(codes)
    shown = sorted({*range(min(_FRAMES, num_frames)), *range(max(0, num_frames - _FRAMES), num_frames)})
    lines = []
    for before, frame in zip([-1, *shown], shown, strict=False):
        if frame != before + 1:
            lines.append("           …")
        lines.append(f"{frame:>10} " + " ".join(f"{code:>5}" for code in codes[frame].tolist()))
    return lines
