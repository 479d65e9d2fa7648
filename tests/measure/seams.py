"""Measures what it costs to decode long token sequences in windows: the seam error against one pass.

    python -m tests.measure.seams [--model_path FOLDER] [--seconds 250] [--window 60] [--audio FILE …]

The clips of ``sample_data`` are laid end to end (or the given files), encoded in one pass and decoded twice: in one
pass, and in windows with several contexts, as ``token2wav --long_audio segment`` does it for tokens that record no
segments. For each context it prints the signal-to-error ratio over everything and over the second around each seam, and
the largest difference there. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from batch_tokenizer.audio.loading import load_samples
from batch_tokenizer.codecs.base import Codec
from batch_tokenizer.codecs.opening import open_codec
from batch_tokenizer.pipeline.long_audio import FADE_FRAMES, fade, window

ROOT = Path(__file__).resolve().parents[2]
CONTEXTS = (0.0, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)

Samples = npt.NDArray[np.float32]


def decode_in_windows(codec: Codec, codes: npt.NDArray[np.uint16], step: int, context: int) -> Samples:
    """Codes (T, K) decoded in windows of ``step`` frames with ``context`` frames on each side."""
    info = codec.info
    samples_per_frame = info.samples_per_frame * info.output_sample_rate // info.sample_rate
    places = (*range(0, len(codes), step), len(codes))
    output = np.zeros(codec.spec.num_output_samples(len(codes)), np.float32)
    for number, (begin, end) in enumerate(pairwise(places)):
        first, last = window(places, number, context)
        (made,) = codec.decode([codes[first:last]])
        place, used = fade(
            made,
            (begin - first) * samples_per_frame,
            None if end == len(codes) else (end - first) * samples_per_frame,
            FADE_FRAMES * samples_per_frame,
        )
        output[first * samples_per_frame + place :][: len(used)] += used
    return output


def error_ratio(error: Samples, signal: Samples) -> float:
    """Signal-to-error ratio in dB."""
    return round(float(10 * np.log10(np.mean(np.square(signal)) / max(1e-20, np.mean(np.square(error))))), 1)


def main() -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_path")
    parser.add_argument("--seconds", type=float, default=250.0)
    parser.add_argument("--window", type=float, default=60.0)
    parser.add_argument("--audio", nargs="+", type=Path)
    arguments = parser.parse_args()
    codec = open_codec(arguments.model_path)
    info = codec.info
    files = arguments.audio or sorted((ROOT / "sample_data" / "clips").iterdir())
    clips = np.concatenate([load_samples(str(path), info.sample_rate) for path in files])
    samples = np.resize(clips, round(arguments.seconds * info.sample_rate))
    (codes,) = codec.encode([codec.spec.features(samples)], info.num_codebooks)
    (one_pass,) = codec.decode([codes])
    step = round(arguments.window * info.frame_rate)
    rate = info.output_sample_rate
    near = np.zeros(len(one_pass), bool)
    for seam in range(step, len(codes), step):
        middle = round(seam / info.frame_rate * rate)
        near[middle - rate // 2 : middle + rate // 2] = True
    rows = []
    print(f"{info.name}: {arguments.seconds:g} s in windows of {arguments.window:g} s, against one pass")
    print("context   everything   around seams   largest difference there")
    for seconds in CONTEXTS:
        error = decode_in_windows(codec, codes, step, round(seconds * info.frame_rate)) - one_pass
        row = {
            "context": seconds,
            "all_db": error_ratio(error, one_pass),
            "seams_db": error_ratio(error[near], one_pass[near]),
            "largest": round(float(np.abs(error[near]).max()), 4),
        }
        rows.append(row)
        print(
            f"{seconds:5.1f} s   {row['all_db']:7.1f} dB   {row['seams_db']:9.1f} dB   {row['largest']:.4f}", flush=True
        )
    print(json.dumps({"model": info.name, "window": arguments.window, "seconds": arguments.seconds, "rows": rows}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
