"""What a run makes of its results: the sink that its flags ask for, and the settings that must not change with it."""

from __future__ import annotations

import io
import json
import mmap
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from batch_tokenizer.audio.encoding import encoded_bytes, write_flac
from batch_tokenizer.config import OUTPUT_SETTINGS, RunConfig
from batch_tokenizer.records import (
    CODES_FIELD_SINKS,
    OUTPUT_FIELDS,
    SHARD_SINKS,
    LedgerEntry,
    RowError,
    RunError,
    TokenizedRow,
    first_line,
)
from batch_tokenizer.runtime.run_folder import RunFolder
from batch_tokenizer.runtime.shard_ledger import ShardJournal
from batch_tokenizer.storage.atomic import atomic_write
from batch_tokenizer.writers.file_sink import FileSink
from batch_tokenizer.writers.parquet_columns import DECIDING_ROWS, ColumnType, column_types
from batch_tokenizer.writers.parquet_shard import reserved_columns
from batch_tokenizer.writers.row_encoding import (
    AudioEncoder,
    RowEncoder,
    tokens_as_json,
    tokens_as_npy,
    wav_bytes,
    wav_pieces,
)
from batch_tokenizer.writers.shard_folder import shard_folder
from batch_tokenizer.writers.shard_recovery import recover
from batch_tokenizer.writers.shard_sink import ShardForm, ShardSink, shard_form


class ResultSink(Protocol):
    """Where results go. A context manager: leaving it publishes what is open, after an exception throws it away."""

    def write(self, result: TokenizedRow) -> None:
        """Take in one row; when it is published, the sink records it in the ledger. Called by several threads.

        Raises:
            RowError: the row could not be encoded or published.
            RunError: nothing can be published.
        """

    def close(self) -> None:
        """Publish what is open.

        Raises:
            RunError: it could not be.
        """


def run_settings(config: RunConfig, num_quantizers: int, run_info: Mapping[str, Any]) -> dict[str, Any]:
    """What the run folder holds a run to."""
    outputs = {name: getattr(config, name) for name in OUTPUT_SETTINGS}
    if config.sink in CODES_FIELD_SINKS:
        outputs["codes_field"] = config.codes_field
    return {"task": config.task, "num_quantizers": num_quantizers, **outputs, **run_info}


def audio_encoder(audio_format: str) -> AudioEncoder:
    """Samples to ``wav`` or ``flac``."""
    return wav_bytes if audio_format == "wav" else _flac


def _flac(samples: npt.NDArray[np.float32], sample_rate: int) -> bytes:
    if not np.isfinite(samples).all():
        count = int((~np.isfinite(samples)).sum())
        raise RowError("decode", f"the codec made {count} of {samples.size} samples NaN or infinite")
    return encoded_bytes(samples, sample_rate, "flac")


def _encode_long(
    encode: AudioEncoder, audio_format: str, scratch: Path, samples: npt.NDArray[np.float32], sample_rate: int
) -> bytes | memoryview:
    """As ``encode``; samples that are in a file become bytes in another, without a name, in the folder ``scratch``.

    Raises:
        RowError: as ``encode``, or the file cannot be written.
    """
    if not isinstance(samples, np.memmap):
        return encode(samples, sample_rate)
    try:
        with tempfile.TemporaryFile(dir=scratch) as file:
            if audio_format == "wav":
                file.writelines(wav_pieces(samples, sample_rate))
            else:
                write_flac(file, samples, sample_rate)
            file.flush()
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except OSError as error:
        raise RowError("write", f"{scratch}: audio of a long row cannot be kept: {error.strerror}") from error


def recover_shards(config: RunConfig, folder: RunFolder) -> None:
    """Rank 0, before the ledger is read: take the output folder, and end what a killed run left there half done.

    Raises:
        RunError: the output folder is of another run, or cannot be read or written.
    """
    if config.sink not in SHARD_SINKS:
        return
    shards = shard_folder(str(config.output_dir))
    with folder.exclusive_lock():
        shards.claim(config.task, folder.run_id, folder.path)
        recover(
            folder.path, shards, config.task, config.sink,
            attempt=folder.attempt, num_shards=folder.num_shards, shard=folder.shard,
        )  # fmt: skip


def output_bytes(
    config: RunConfig,
    results: Sequence[TokenizedRow],
    run_info: Mapping[str, Any],
    num_quantizers: int,
    sample_rate: int,
) -> dict[str, int]:
    """What the sink would write for some rows: bytes by output field, or of ``shards``. Nothing is written."""
    encode = RowEncoder(
        config.task, run_info, sample_rate, audio_encoder(config.audio_format), config.audio_format
    )  # fmt: skip
    rows = [encode(result) for result in results]
    if config.sink in SHARD_SINKS:
        form = _shard_form(config, run_info, num_quantizers)
        stream = io.BytesIO()
        shard = form.open(stream)
        for row in rows:
            shard.append(form.encode(row))
        shard.finish()
        return {"shards": len(stream.getvalue())}
    to_bytes = tokens_as_json if config.sink == "json" else tokens_as_npy
    sizes = {
        "quantized_tokens": sum(len(to_bytes(row.codes, row.info)) for row in rows if row.codes is not None),
        "reconstructed_wav": sum(len(row.audio) for row in rows if row.audio is not None),
        "hidden_states": sum(row.hidden_states.nbytes for row in rows if row.hidden_states is not None),
    }
    return {name: size for name, size in sizes.items() if size or name in OUTPUT_FIELDS[config.task]}


def _shard_form(
    config: RunConfig,
    run_info: Mapping[str, Any],
    num_quantizers: int,
    fields: Mapping[str, ColumnType] | None = None,
) -> ShardForm:
    outputs = OUTPUT_FIELDS[config.task]
    width = num_quantizers if "quantized_tokens" in outputs else None
    return shard_form(config.sink, run_info, width, "reconstructed_wav" in outputs, config.codes_field, fields)


def run_columns(
    run_dir: Path, first_rows: Iterable[Mapping[str, Any]], codes_columns: Iterable[str]
) -> Mapping[str, ColumnType] | None:
    """The columns for fields of rows that all shards of a run have, kept in its folder (``columns.json``): the first
    rows of the manifest decide about them when the run begins, in every process alike. None where there are no rows.

    Raises:
        RunError: the run folder cannot be read or written (exit code 1).
    """
    path = run_dir / "columns.json"
    try:
        try:
            known: Mapping[str, ColumnType] = json.loads(path.read_bytes())
            return known
        except FileNotFoundError:
            pass
        rows = list(islice(first_rows, DECIDING_ROWS))
        if not rows:
            return None
        types = column_types(rows, reserved_columns(codes_columns))
        with atomic_write(path) as file:
            file.write((json.dumps(types, indent=2) + "\n").encode())
        return types
    except (OSError, ValueError) as error:
        raise RunError(
            f"{path}: {first_line(error)}; remove it and start the same command again", exit_code=1
        ) from error


def open_sink(
    config: RunConfig,
    folder: RunFolder,
    run_info: Mapping[str, Any],
    num_quantizers: int,
    sample_rate: int,
    record: Callable[[LedgerEntry], None],
    first_rows: Iterable[Mapping[str, Any]] = (),
) -> AbstractContextManager[ResultSink]:
    """The sink of one process.

    Args:
        sample_rate: of decoded samples, in Hz.
        record: takes the ledger entries of rows that are published one by one.
        first_rows: fields of the manifest's rows from the first on, which decide about the columns of parquet.

    Raises:
        RunError: a library is not installed, or the run folder cannot be written.
    """
    encode_audio = audio_encoder(config.audio_format)
    if config.sink == "json" or config.sink == "npy":
        return FileSink(
            config.task, sample_rate, run_info, form=config.sink, record=record,
            encode_audio=partial(_encode_long, encode_audio, config.audio_format, folder.path),
        )  # fmt: skip
    encode = RowEncoder(config.task, run_info, sample_rate, encode_audio, config.audio_format)
    codes_columns = (config.codes_field, *(other.codes for other in config.other_audio))
    fields = run_columns(folder.path, first_rows, codes_columns) if config.sink == "parquet" else None
    form = _shard_form(config, run_info, num_quantizers, fields)
    journal = ShardJournal(folder.path, config.task, folder.attempt, folder.processes.rank)
    return ShardSink(
        encode, form, shard_folder(str(config.output_dir)), journal, most_bytes=config.shard_megabytes * 1_000_000
    )
