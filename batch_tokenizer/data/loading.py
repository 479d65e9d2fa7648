"""``RowLoader``: reads the input of a manifest row and makes it what the codec takes. It runs in loader processes.

In ``wav2token`` and ``wav2token2wav`` that is the front end's features of an audio file, in ``token2wav`` the codes
that ``token_files.py`` reads.

Features are of one row and not padded: the codec lays the rows of a batch on one packed axis, or masks what it pads,
which is why tokens do not depend on batch composition.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np

from batch_tokenizer.audio.loading import load_samples, measure_samples
from batch_tokenizer.audio.reader import AudioTooLong
from batch_tokenizer.audio.resampling import Resampler
from batch_tokenizer.codecs.base import CodecSpec
from batch_tokenizer.data.pieces import PassLimit
from batch_tokenizer.data.token_files import read_tokens
from batch_tokenizer.records import LoadedRow, ManifestRow, RowError, Task


@dataclass(frozen=True, slots=True)
class RowLoader:
    """Loads the rows of one run. Picklable.

    Attributes:
        resampler: how audio reaches the codec's rate.
        num_quantizers: in ``token2wav``, the most codebooks to use of those that a file has; None for all.
        limit: what the model takes in one pass; None is the model's own limit.
    """

    task: Task
    spec: CodecSpec
    resampler: Resampler = "reference"
    num_quantizers: int | None = None
    limit: PassLimit | None = None

    def __call__(self, row: ManifestRow) -> LoadedRow:
        """Load one row. If it is too long for one pass, ``pieces`` of the result says where to cut it.

        Raises:
            RowError: its file cannot be read, or is not what the codec takes.
        """
        began = time.thread_time()
        limit = self.limit or PassLimit.of(self.spec)
        loaded = self._load_codes(row, limit) if self.task == "token2wav" else self._load_audio(row, limit)
        return replace(loaded, load_seconds=time.thread_time() - began)

    def _load_audio(self, row: ManifestRow, limit: PassLimit) -> LoadedRow:
        if row.wav is None:
            raise RowError("load", "the row has no wav")
        rate = self.spec.info.sample_rate
        try:
            samples = load_samples(
                row.wav, rate, self.resampler, cut=row.cut, max_samples=limit.samples,
                channels=self.spec.info.channels, downmix=self.spec.downmix,
            )  # fmt: skip
        except AudioTooLong as error:
            if limit.policy == "native":
                raise RowError("load", f"{error.reason}; {limit.remedy(self.spec)}") from error
            pieces = limit.of_audio(measure_samples(row.wav, rate, self.resampler, cut=row.cut))
            return LoadedRow(row, None, None, pieces.samples[-1], 0, pieces=pieces)
        length = samples.shape[-1]
        return LoadedRow(row, self.spec.features(samples), None, length, self.spec.num_frames(length))

    def _load_codes(self, row: ManifestRow, limit: PassLimit) -> LoadedRow:
        if row.quantized_tokens is None:
            raise RowError("load", "the row has no quantized_tokens")
        codes, origin = read_tokens(row.quantized_tokens, self.spec.info, row.fields)
        frames = len(codes)
        try:
            pieces = limit.of_codes(self.spec, frames, origin)
        except RowError as error:
            raise RowError("load", f"{row.quantized_tokens}: {error.reason}") from error
        if self.num_quantizers is not None:
            codes = np.ascontiguousarray(codes[:, : self.num_quantizers])
        if pieces is not None and pieces.kind == "segments":
            info = self.spec.info
            decoded = round(pieces.samples[-1] * info.output_sample_rate / info.sample_rate)
            return LoadedRow(row, None, codes, decoded, 0, pieces=pieces)
        return LoadedRow(row, None, codes, self.spec.num_output_samples(frames), frames, pieces=pieces)
