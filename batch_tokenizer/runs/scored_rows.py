"""The utterances that ``evaluate`` and ``report`` score: a run's outputs, or a manifest's audio through the codec."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from batch_tokenizer.audio.loading import load_samples
from batch_tokenizer.codecs.base import Codec, CodecInfo
from batch_tokenizer.codecs.offline import check_num_quantizers
from batch_tokenizer.codecs.opening import open_codec, open_spec
from batch_tokenizer.config import Device, Dtype
from batch_tokenizer.data.pieces import PassLimit
from batch_tokenizer.data.token_files import read_any_tokens, read_tokens
from batch_tokenizer.manifest.manifest import Manifest
from batch_tokenizer.records import ManifestRow, Pieces, RowError, RowFailure, RunError
from batch_tokenizer.runs.finished_run import FinishedRun
from batch_tokenizer.runs.shards import find_places
from batch_tokenizer.runtime.ledger import RowStatus, read_ledger
from batch_tokenizer.sources.finishing import SourceSettings
from batch_tokenizer.sources.listing import local_manifest

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Source:
    """Where utterances come from.

    Attributes:
        manifest: of which ``lines`` (int64) may be scored.
        run: whose outputs are scored, or None if the codec makes them.
        num_quantizers: numbers of codebooks to score.
        sample_rate: Hz, of the comparison.
        resampler: how originals reach it.
        codec: decodes (and without a run, encodes); None where the run's own audio is scored.
        info: of the codec, where its checkpoint is available.
    """

    manifest: Manifest
    lines: npt.NDArray[np.int64]
    run: FinishedRun | None
    num_quantizers: tuple[int, ...]
    sample_rate: int
    frame_rate: float
    resampler: Any
    codec: Codec | None
    info: CodecInfo | None
    fingerprint: str


def rows_with_outputs(
    run: FinishedRun | None, manifest: Manifest, lines: Sequence[int]
) -> Iterator[tuple[ManifestRow | RowFailure, Mapping[str, Any]]]:
    """Rows with the locations of their outputs, and with each the ``info`` of tokens that have none of their own.

    Rows in shards come in the order of the shards, others in that of ``lines``.

    Raises:
        RunError: a shard's ledger file or storage cannot be read.
    """
    if run is None or not run.has_shards:
        for line in lines:
            row = manifest.row(line)
            yield row, row.fields if isinstance(row, ManifestRow) else {}
        return
    left = {manifest.digest(line): line for line in lines}
    for digest, place in find_places(run, left.__contains__):
        if digest not in left:  # a second place, which ``verify`` reports
            continue
        row = manifest.row(left.pop(digest))
        if isinstance(row, RowFailure):
            yield row, {}
        elif isinstance(place, RowError):
            yield RowFailure.of(row, place.stage, place.reason), {}
        else:
            known = row.fields if place.tokens is None else place.info
            tokens, audio = place.tokens or row.quantized_tokens, place.audio or row.reconstructed_wav
            yield replace(row, quantized_tokens=tokens, reconstructed_wav=audio), known
    for digest, line in left.items():
        yield RowFailure(line, digest, None, "load", "no shard of the run has this row any more"), {}


def open_source(
    *,
    run_dir: Path | None,
    data_list: str | Path | None,
    model_path: str | None,
    num_quantizers: Sequence[int],
    index_dir: Path,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> Source:
    """A run's outputs where ``run_dir`` is given, else the manifest ``data_list`` through the codec.

    Args:
        num_quantizers: numbers of codebooks; empty means as many as the run, or the checkpoint, has.
        index_dir: where the manifest's index goes if there is no run folder.

    Raises:
        RunError: the run folder, the manifest or the checkpoint cannot be used, or do not fit together.
    """
    # 1. Without a run: a manifest, and a codec that encodes and decodes.
    if run_dir is None:
        if data_list is None:
            raise RunError("evaluate needs a run folder or --data_list")
        encoder = open_codec(model_path, device, dtype)
        info = encoder.info
        # Nothing is written where outputs go, so rows need none: as with a sink that makes shards.
        listed = local_manifest(str(data_list), index_dir, SourceSettings("wav2token", "tar"))
        manifest = Manifest.open(listed, "wav2token", index_dir, sink="tar")
        return Source(
            manifest, np.flatnonzero(manifest.is_row), None,
            check_num_quantizers(num_quantizers, info.num_codebooks),
            info.sample_rate, info.frame_rate, "reference", encoder, info, info.fingerprint,
        )  # fmt: skip
    # 2. A run's outputs.
    run = FinishedRun.open(run_dir)
    settings = run.settings
    manifest = run.manifest(data_list)
    lines = np.flatnonzero(read_ledger(run_dir, manifest).status == RowStatus.DONE)
    model_path = model_path or run.model_path
    numbers = check_num_quantizers(num_quantizers, settings["num_quantizers"])
    # 3. A codec is needed only where audio has to be decoded from the run's tokens.
    needs_codec = run.task == "wav2token" or numbers != (settings["num_quantizers"],)
    codec = open_codec(model_path, device, dtype, settings) if needs_codec else None
    known: CodecInfo | None
    if codec is not None:
        known = codec.info
        if known.fingerprint != settings["fingerprint"]:
            raise RunError(
                f"{run_dir} has fingerprint {settings['fingerprint']}, {known.name} has {known.fingerprint}: "
                "pass the run's checkpoint with --model_path"
            )
    else:
        known = _info_if_here(model_path, settings["fingerprint"])
    return Source(
        manifest, lines, run, numbers, settings["sample_rate"], settings["frame_rate"],
        settings.get("resampler", "reference"), codec, known, settings["fingerprint"],
    )  # fmt: skip


def _info_if_here(model_path: str | None, fingerprint: str) -> CodecInfo | None:
    """The codec's ``info``, if its checkpoint is available; without it only the sizes of codebooks are unknown."""
    try:
        info = open_spec(model_path).info
    except RunError as error:
        log.warning("sizes of codebooks are not known: %s", error)
        return None
    if info.fingerprint != fingerprint:
        log.warning("sizes of codebooks are not known: pass the run's checkpoint with --model_path")
        return None
    return info


def load_input(source: Source, row: ManifestRow, known: Mapping[str, Any]) -> tuple[Any, Pieces | None]:
    """The row's samples where the codec starts from audio; else its codes, and the segments that they were made in.

    Args:
        known: what came with the row from ``rows_with_outputs``.

    Raises:
        RowError: they cannot be had.
    """
    if row.wav is None:
        raise RowError("load", "the row has no wav to compare with")
    if source.run is None:
        assert source.info is not None
        samples = load_samples(
            row.wav, source.sample_rate, source.resampler, cut=row.cut, max_samples=source.info.max_samples,
            channels=source.info.channels,
        )  # fmt: skip
        return samples, None
    if row.quantized_tokens is None:
        raise RowError("load", "the row has no quantized_tokens")
    if source.info is None:
        return read_any_tokens(row.quantized_tokens)[0], None
    codes, origin = read_tokens(row.quantized_tokens, source.info, known)
    if source.codec is None:
        return codes, None
    return codes, PassLimit().of_codes(source.codec.spec, len(codes), origin)
