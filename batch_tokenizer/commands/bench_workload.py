"""What a benchmark works on: utterances in files, and a codec that needs no checkpoint.

Utterances are those of a manifest, or are made: noise and harmonics under a moving envelope, of lengths drawn from a
distribution. What they sound like changes no cost, except that audio which compresses badly takes longer to decode.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from batch_tokenizer.audio.encoding import encoded_bytes
from batch_tokenizer.codecs.base import Codec, CodecInfo, CodecSpec
from batch_tokenizer.codecs.checkpoint import Checkpoint
from batch_tokenizer.codecs.loading import LoadRequest, log_attention
from batch_tokenizer.codecs.mimo.codec import MiMoSpec, head_sizes, prepare_codec
from batch_tokenizer.codecs.mimo.config import MiMoConfig
from batch_tokenizer.codecs.mimo.sized import random_model
from batch_tokenizer.records import ManifestRow, RunError

#: Lengths in seconds, by name; ``uniform:A-B`` and ``constant:S`` are understood beside these. ``seed-tts`` is a
#: log-normal like that test set's prompts and sentences: half below 4.5 s, few above 10 s.
LENGTHS: Mapping[str, tuple[float, float, float, float]] = {
    # median, sigma of the logarithm, shortest, longest
    "seed-tts": (4.5, 0.40, 1.5, 15.0),
    "speech": (6.0, 0.60, 0.5, 30.0),
}


def draw_lengths(distribution: str, count: int, seed: int) -> list[float]:
    """``count`` lengths in seconds.

    Raises:
        RunError: there is no such distribution.
    """
    generator = random.Random(seed)
    kind, _, numbers = distribution.partition(":")
    try:
        if distribution in LENGTHS:
            median, sigma, shortest, longest = LENGTHS[distribution]
            drawn = (median * generator.lognormvariate(0.0, sigma) for _ in range(count))
            return [min(longest, max(shortest, length)) for length in drawn]
        if kind == "constant" and float(numbers) > 0:
            return [float(numbers)] * count
        if kind == "uniform":
            shortest, longest = map(float, numbers.split("-"))
            if 0 < shortest <= longest:
                return [generator.uniform(shortest, longest) for _ in range(count)]
    except ValueError:
        pass  # not numbers: reported below
    raise RunError(f"--lengths {distribution}: choose {', '.join(LENGTHS)}, uniform:A-B or constant:S, in seconds")


def make_samples(seconds: float, sample_rate: int, seed: int) -> npt.NDArray[np.float32]:
    """Something between a voice and noise, float32 (S,), below full scale."""
    generator = np.random.default_rng(seed)
    count = max(1, round(seconds * sample_rate))
    times = np.arange(count, dtype=np.float32) / sample_rate
    voice = sum(np.sin(2 * np.pi * 120 * k * times + 3 * np.sin(5 * times)) / k for k in (1, 2, 3, 5))
    envelope = 0.55 + 0.45 * np.sin(2 * np.pi * 3 * times)
    samples = envelope * (0.2 * voice + 0.05 * generator.standard_normal(count))
    return np.clip(samples, -0.99, 0.99).astype(np.float32)


def write_utterances(folder: Path, lengths: Sequence[float], sample_rate: int, form: str, seed: int) -> list[Path]:
    """One file of made audio for each length.

    Args:
        form: ``wav``, ``flac`` or ``mp3``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for index, length in enumerate(lengths):
        path = folder / f"{index:06d}.{form}"
        path.write_bytes(encoded_bytes(make_samples(length, sample_rate, seed + index), sample_rate, form))
        paths.append(path)
    return paths


def manifest_wavs(manifest: Path, count: int | None, seed: int) -> list[str]:
    """The ``wav`` of each row, in the manifest's order; of ``count`` rows drawn at random if it has more.

    Raises:
        RunError: the manifest cannot be read, or a row has no ``wav``.
    """
    try:
        rows = [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines() if line.strip()]
        wavs = [str(row["wav"]) for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"--data_list {manifest}: needs lines of JSON with a field wav ({error})") from error
    if not wavs:
        raise RunError(f"--data_list {manifest}: has no rows")
    if count is not None and count < len(wavs):
        wavs = [wavs[index] for index in sorted(random.Random(seed).sample(range(len(wavs)), count))]
    return wavs


def write_manifest(path: Path, wavs: Sequence[str | Path], tokens: Path, audio: Path) -> Path:
    """Rows with all fields that any task needs; tokens are in the folder ``tokens``, audio goes to ``audio``."""
    with path.open("w", encoding="utf-8") as file:
        for index, wav in enumerate(wavs):
            row = {
                "key": f"{index:06d}",
                "wav": str(wav),
                "quantized_tokens": str(tokens / f"{index:06d}.json"),
                "reconstructed_wav": str(audio / f"{index:06d}.wav"),
            }
            file.write(json.dumps(row) + "\n")
    return path


def manifest_rows(manifest: Path) -> list[ManifestRow]:
    """The rows of a manifest that ``write_manifest`` wrote."""
    return [
        ManifestRow(line, f"{line:016x}", row["key"], row["wav"], row["quantized_tokens"],
                    row["reconstructed_wav"], row)
        for line, row in enumerate(map(json.loads, manifest.read_text(encoding="utf-8").splitlines()))
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------------- random weights


@dataclass(frozen=True)
class RandomMiMo:
    """A family (``registry.Family``) of one member: MiMo of some configuration with random weights."""

    name: str
    config: MiMoConfig

    def recognises(self, config: Mapping[str, Any]) -> bool:
        return False

    def open_spec(self, checkpoint: Checkpoint) -> CodecSpec:
        config = self.config
        info = CodecInfo(
            family="mimo",
            name=self.name,
            sample_rate=config.sampling_rate,
            samples_per_frame=config.samples_per_frame,
            codebook_sizes=config.codebook_size,
            fingerprint="random",
            max_samples=config.max_samples,
        )
        return MiMoSpec(info=info, config=config)

    def load_codec(self, request: LoadRequest[MiMoSpec]) -> Codec:
        log_attention(head_sizes(self.config, request.parts), request.attention, request.device, request.dtype)
        model = random_model(self.config, parts=request.parts, device=request.device, dtype=request.dtype)
        return prepare_codec(request.spec, model, request.attention, request.threads)


# ----------------------------------------------------------------------------------------------------- a codec for free

_FREE_INFO = CodecInfo(
    family="free",
    name="free",
    sample_rate=24000,
    samples_per_frame=960,
    codebook_sizes=(1024,) * 20,
    fingerprint="free",
)


@dataclass(frozen=True)
class FreeSpec(CodecSpec):
    """Features are the samples themselves; 25 frames a second, 20 codebooks."""

    info: CodecInfo = _FREE_INFO

    def features(self, samples: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        return samples[None]


class FreeCodec(Codec):
    """Takes no time: its tokens and its audio are made beforehand. What a run then takes is all ours."""

    def __init__(self, spec: CodecSpec) -> None:
        self.spec = spec
        self.frame_budget = 1 << 20
        generator = np.random.default_rng(0)
        self._codes = generator.integers(0, 1024, (1 << 12, spec.info.num_codebooks), dtype=np.uint16)
        self._samples = generator.uniform(-0.5, 0.5, 1 << 18).astype(np.float32)

    def encode_batch(
        self, features: Sequence[npt.NDArray[np.float32]], num_quantizers: int
    ) -> list[npt.NDArray[np.uint16]]:
        lengths = [self.spec.num_frames(part.shape[1]) for part in features]
        return [_repeated(self._codes, length)[:, :num_quantizers] for length in lengths]

    def decode_batch(self, codes: Sequence[npt.NDArray[np.uint16]]) -> list[npt.NDArray[np.float32]]:
        return [_repeated(self._samples, self.spec.num_output_samples(len(code))) for code in codes]


def _repeated(rows: npt.NDArray[Any], length: int) -> npt.NDArray[Any]:
    """``length`` of ``rows``, which begin again when they are at their end; a view where they are enough."""
    return rows[:length] if length <= len(rows) else np.resize(rows, (length, *rows.shape[1:]))


@dataclass(frozen=True)
class FreeFamily:
    """A family of the free codec alone."""

    def recognises(self, config: Mapping[str, Any]) -> bool:
        return False

    def open_spec(self, checkpoint: Checkpoint) -> CodecSpec:
        return FreeSpec()

    def load_codec(self, request: LoadRequest[FreeSpec]) -> Codec:
        return FreeCodec(request.spec)
