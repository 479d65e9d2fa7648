"""Opens, loads and uses every hostile checkpoint of ``tests/support/hostile_checkpoints.py``, or every n-th of them.

    python -m tests.measure.hostile_checkpoints [--every 1] [--only mimo] [--seconds 5]

Each must end in one line that names the folder, or work, within ``--seconds``. Prints those that do not, and counts.
"""

from __future__ import annotations

import argparse
import collections
import resource
import shutil
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from batch_tokenizer.codecs.checkpoint import Checkpoint
from batch_tokenizer.codecs.opening import CodecSetup
from batch_tokenizer.records import RowError, RunError
from tests.support.hostile_checkpoints import copied, faults, write_checkpoints, write_graphs


class TooLong(BaseException):
    """The limit of time for one checkpoint is over."""


def use(folder: Path) -> None:
    """Opens a checkpoint, and encodes and decodes a little."""
    setup = CodecSetup.open(Checkpoint.open(str(folder)), device="cpu", threads=1)
    encodes_only = setup.spec.info.family == "s3tokenizer"
    codec = setup.load("wav2token" if encodes_only else "wav2token2wav")
    info = setup.spec.info
    samples = np.random.default_rng(0).normal(0, 0.1, (info.channels, 4000)).astype(np.float32)
    codes = codec.encode([codec.spec.features(samples if info.channels > 1 else samples[0])], info.num_codebooks)
    if not encodes_only:
        codec.decode(codes)


def outcome(folder: Path, seconds: int) -> tuple[str, str]:
    """What became of a checkpoint: a word, and the message."""
    signal.alarm(seconds)
    try:
        use(folder)
        return "works", ""
    except (RunError, RowError) as error:
        text = str(error)
        if "\n" in text or len(text) > 1500:
            return "LONG", text[:300]
        return ("refused" if folder.name in text else "UNNAMED"), text
    except TooLong:
        return "HANGS", ""
    except Exception as error:  # noqa: BLE001  # the faults that are looked for
        return "TRACEBACK", f"{type(error).__name__}: {str(error)[:200]}"
    finally:
        signal.alarm(0)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--only", default="")
    parser.add_argument("--seconds", type=int, default=5)
    parser.add_argument("--verbose", action="store_true")
    arguments = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_DATA, (6 << 30, 6 << 30))

    def alarm(*_: Any) -> None:
        raise TooLong

    signal.signal(signal.SIGALRM, alarm)
    root = Path(tempfile.mkdtemp())
    checkpoints = write_checkpoints(root)
    checkpoints |= write_graphs(root, checkpoints["moss"])
    for family, source in checkpoints.items():
        if arguments.only not in family:
            continue
        counts: collections.Counter[str] = collections.Counter()
        slowest, begun = 0.0, time.monotonic()
        for number, (name, fault) in enumerate(faults(source)):
            if number % arguments.every:
                continue
            folder = copied(source, root / "hostile")
            fault(folder)
            started = time.monotonic()
            word, message = outcome(folder, arguments.seconds)
            slowest = max(slowest, time.monotonic() - started)
            counts[word] += 1
            if word.isupper() or arguments.verbose:
                print(f"{family} | {name} | {word} | {message}", flush=True)
            shutil.rmtree(folder)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(
            f"{family}: {dict(counts)}, slowest {slowest:.1f} s, {time.monotonic() - begun:.0f} s in all, "
            f"peak {peak:.0f} MB",
            flush=True,
        )
    shutil.rmtree(root)


if __name__ == "__main__":
    main()
