"""Time of a codec's batches against the same utterances one by one, in turns: processor time of one thread, or on a
GPU the time until it has finished.

    python -m tests.measure.batched mimi --num_utterances 20        a published size, random weights
    python -m tests.measure.batched mimi snac --small               the tests' small checkpoints
    python -m tests.measure.batched mimi dac-44khz --device cuda

Batches are those of a GPU: packed, or padded to a few shapes, or of equal lengths; a run on a CPU takes utterances one
by one. Processor time is not disturbed by other work, but a busy core still computes more slowly: compare what stands
side by side.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from batch_tokenizer.codecs.base import PARTS, Codec
from batch_tokenizer.codecs.checkpoint import Checkpoint
from batch_tokenizer.codecs.execution import padded_size
from batch_tokenizer.codecs.loading import LoadRequest
from batch_tokenizer.codecs.padded_codec import PaddedCodec
from batch_tokenizer.codecs.published_sizes import write_random_checkpoint
from batch_tokenizer.codecs.registry import find_family
from batch_tokenizer.commands.bench_workload import draw_lengths, make_samples
from batch_tokenizer.records import Task
from tests.support import families


def timed(compute: Callable[[], list[Any]], device: torch.device) -> tuple[list[Any], float]:
    """Its result, which is on the host, and seconds."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    start = clock()
    result = compute()
    return result, clock() - start


def measure(name: str, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Medians of ``--repeats`` in turns after one to warm up, by direction, and whether all codes were equal."""
    if arguments.small:
        families.write(name, folder)
    else:
        write_random_checkpoint(name, folder)
    checkpoint = Checkpoint.open(str(folder))
    family = find_family(checkpoint)
    spec = family.open_spec(checkpoint)
    device = torch.device(arguments.device)
    dtype = torch.float32 if device.type == "cpu" else getattr(torch, spec.cuda_dtype)
    task: Task = "wav2token" if spec.info.family == "s3tokenizer" else "wav2token2wav"
    codec: Codec = family.load_codec(LoadRequest(checkpoint, spec, task, device, dtype))
    rate, channels = spec.info.sample_rate, spec.info.channels
    lengths = draw_lengths(arguments.lengths, arguments.num_utterances, seed=15)
    waves = [make_samples(seconds, rate, index) for index, seconds in enumerate(lengths)]
    features = [spec.features(wave if channels == 1 else np.stack([wave] * channels)) for wave in waves]

    def compute_together(together: bool) -> None:
        if isinstance(codec, PaddedCodec):
            codec.batch_frames = frames if together else 0
        else:
            codec.model.capacity = frames if together else None

    def run(call: Callable[[list[Any]], list[Any]], members: list[Any], together: bool) -> tuple[list[Any], float]:
        compute_together(together)
        return timed(lambda: call(members) if together else [call([member])[0] for member in members], device)

    frames = arguments.rows * padded_size(max(spec.num_frames(len(wave)) for wave in waves))
    codes = codec.encode(features[:2])
    report: dict[str, Any] = {
        "name": name, "batching": spec.batching, "utterances": len(waves), "seconds_of_audio": round(sum(lengths), 1),
    }  # fmt: skip
    for direction in PARTS[task]:
        seconds: dict[bool, list[float]] = {True: [], False: []}
        for repeat in range(arguments.repeats):
            call, members = (codec.encode, features) if direction == "encoder" else (codec.decode, codes)
            results = {}
            for together in (True, False) if repeat % 2 else (False, True):
                results[together], spent = run(call, members, together)
                seconds[together].append(spent)
            if direction == "encoder":
                codes = results[False]
                same = sum(int((one == other).sum()) for one, other in zip(codes, results[True], strict=True))
                report["codes"], report["codes_equal"] = sum(part.size for part in codes), same
        alone, together_seconds = (statistics.median(seconds[together]) for together in (False, True))
        report |= {f"{direction}_alone_s": round(alone, 2), f"{direction}_batched_s": round(together_seconds, 2)}
    # Batches have fixed shapes, so that the codes of an utterance are the same bits beside others and without them.
    compute_together(True)
    few = features[:8]
    pairs = zip(codec.encode(few), [codec.encode([one])[0] for one in few], strict=True)
    report["changed_by_neighbours"] = sum(int((one != other).sum()) for one, other in pairs)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "names", nargs="+", metavar="NAME", help="sizes of bench --config; of tests/support with --small"
    )
    parser.add_argument("--small", action="store_true", help="the names are those of tests/support/families.py")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--num_utterances", type=int, default=500)
    parser.add_argument("--rows", type=int, default=8, help="of a padded batch of the longest utterances")
    parser.add_argument("--lengths", default="uniform:0.2-1", help="as bench takes them")
    parser.add_argument("--repeats", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.names:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measure(name, Path(folder), arguments)), flush=True)


if __name__ == "__main__":
    main()
