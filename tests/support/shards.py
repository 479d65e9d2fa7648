"""Shards read by their own formats' libraries alone, and rows to fill them with."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from batch_tokenizer.records import TokenizedRow
from tests.support.loading import make_row

RUN_INFO: dict[str, Any] = {
    "codec": "fake",
    "fingerprint": "feedface",
    "sample_rate": 24000,
    "frame_rate": 25.0,
    "codebook_sizes": [1024, 128, 128],
    "version": "0.0.0",
}


def tokenized(line: int, codes: Any = None, samples: Any = None, **fields: Any) -> TokenizedRow:
    """A row's results; codes of its own where none are given."""
    if codes is None:
        codes = np.random.default_rng(line).integers(0, 128, (1 + line % 5, 3)).astype(np.uint16)
    return TokenizedRow(make_row(line, **fields), codes, samples, 960 * len(codes))


def read_shard(path: Path) -> dict[str, dict[str, Any]]:
    """Key to ``codes``, ``info`` and ``audio`` of a shard. A key that is there twice is an error."""
    rows: dict[str, dict[str, Any]] = {}
    readers = {".tar": _tar_rows, ".parquet": _parquet_rows, ".jsonl": _jsonl_rows}
    for key, row in readers[path.suffix](path):
        assert key not in rows, f"{key} is twice in {path}"
        rows[key] = row
    return rows


def read_shards(folder: Path) -> dict[str, dict[str, Any]]:
    """All rows of all shards of a folder; a key in two of them is an error."""
    rows: dict[str, dict[str, Any]] = {}
    for path in sorted(path for path in folder.glob("[!.]*-*") if path.is_file()):
        for key, row in read_shard(path).items():
            assert key not in rows, f"{key} is in two shards"
            rows[key] = row
    return rows


def _tar_rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    samples: dict[str, dict[str, bytes]] = {}
    with tarfile.open(path) as tar:
        for member in tar:
            base, _, kind = member.name.partition(".")
            stream = tar.extractfile(member)
            assert stream is not None
            assert kind not in samples.get(base, {}), member.name
            samples.setdefault(base, {})[kind] = stream.read()
    rows = []
    for sample in samples.values():
        info = json.loads(sample["json"])
        codes = np.load(io.BytesIO(sample["tokens.npy"])) if "tokens.npy" in sample else None
        rows.append((info["key"], {"codes": codes, "info": info, "audio": sample.get("wav", sample.get("flac"))}))
    return rows


def _jsonl_rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        info = {**row["batch_tokenizer"], **row}
        rows.append((row["key"], {"codes": np.array(row["audio_codes"], np.uint16), "info": info, "audio": None}))
    return rows


def _parquet_rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    table = pq.read_table(path)
    common = json.loads(table.schema.metadata[b"batch_tokenizer"])
    fields = json.loads(table.schema.metadata[b"fields"])
    rows = []
    for row in table.to_pylist():
        codes = np.array(row["audio_codes"], np.uint16) if "audio_codes" in row else None
        audio = (row.get("audio") or {}).get("bytes")
        own = {name: row[name] for name in ("num_frames", "num_samples", *fields) if row[name] is not None}
        info = {**common, **own, **json.loads(row["info"] or "{}")}
        rows.append((row["key"], {"codes": codes, "info": info, "audio": audio}))
    return rows
