"""Measures a data set of very many rows as a source: listing, and loading its audio. A command, not a test.

    python -m tests.measure.dataset_scale --rows 100000

Makes parquet files of short clips (``--seconds``) with a text each, in a temporary folder, in files of 25,000 rows and
row groups of ``--group`` rows. Lists them as a run does, and then reads and decodes every clip in the order of the
rows, as one loader process does. Memory is the resident set; it is to be the same in the second quarter and at the end.
Prints a table and, as the last line, JSON.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from batch_tokenizer.audio.decoding import decode_audio
from batch_tokenizer.manifest.manifest import Manifest
from batch_tokenizer.records import ManifestRow
from batch_tokenizer.sources.finishing import SourceSettings
from batch_tokenizer.sources.listing import local_manifest
from tests.measure.manifest_scale import resident
from tests.support.tars import wav_content

FILE_ROWS = 25_000


def write_data_set(folder: Path, rows: int, seconds: float, group: int) -> int:
    """Parquet files of clips, of which there are a hundred different ones. Returns their bytes."""
    clips = [wav_content(number, seconds=seconds) for number in range(100)]
    size = 0
    for first in range(0, rows, FILE_ROWS):
        numbers = range(first, min(rows, first + FILE_ROWS))
        table = pa.table(
            {
                "audio": [{"bytes": clips[n % 100], "path": f"clip-{n:07}.wav"} for n in numbers],
                "text": [f"what is said in clip {n}" for n in numbers],
                "speaker": [n % 997 for n in numbers],
            }
        )
        path = folder / f"train-{first // FILE_ROWS:05}.parquet"
        pq.write_table(table, path, row_group_size=group, use_dictionary=False, compression=None)
        size += path.stat().st_size
    return size


def measure(folder: Path, rows: int) -> dict[str, float]:
    """Times in seconds and resident memory in MiB of listing, and of loading every row."""
    settings = SourceSettings(sink="tar")
    before, began, spent = resident("VmRSS"), time.perf_counter(), time.process_time()
    path = local_manifest(f"{folder}/*.parquet", folder / "index", settings)
    found: dict[str, float] = {
        "list_seconds": time.perf_counter() - began,
        "list_processor_us_a_row": (time.process_time() - spent) / rows * 1e6,
        "list_peak_mib_more": resident("VmHWM") - before,
    }
    manifest = Manifest.open(path, "wav2token", folder / "manifest-index", sink="tar")
    assert len(manifest) == rows, f"{len(manifest)} rows were listed"
    began, spent = time.perf_counter(), time.process_time()
    memory: list[float] = []
    for first in range(0, rows, 64):
        for row in manifest.read(first, min(rows, first + 64)):
            assert isinstance(row, ManifestRow), row
            assert row.wav is not None
            samples, _ = decode_audio(row.wav)
            assert np.isfinite(samples).all()
        memory.append(resident("VmRSS"))
    quarter = len(memory) // 4
    return found | {
        "load_seconds": time.perf_counter() - began,
        "load_processor_us_a_row": (time.process_time() - spent) / rows * 1e6,
        "load_mib_second_quarter": float(np.mean(memory[quarter : 2 * quarter])),
        "load_mib_last_quarter": float(np.mean(memory[3 * quarter :])),
        "load_mib_peak": max(memory),
    }


def main() -> None:
    """Makes the data set, measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=0.1, help="of each clip (%(default)s)")
    parser.add_argument("--group", type=int, default=1000, help="rows of a row group (%(default)s)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dataset_scale-") as place:
        size = write_data_set(Path(place), arguments.rows, arguments.seconds, arguments.group)
        print(f"{arguments.rows:,} rows, {size / 1e6:,.0f} MB, row groups of {arguments.group:,}")
        found = measure(Path(place), arguments.rows)
    for name, value in found.items():
        print(f"{name:<28} {value:12,.1f}")
    print(json.dumps({"rows": arguments.rows, "bytes": size, "group": arguments.group} | found))


if __name__ == "__main__":
    main()
