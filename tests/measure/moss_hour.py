"""Measures MOSS on a long recording: an hour by default, from a wav file to codes and back to a wav file, as streams.

    python -m tests.measure.moss_hour [--seconds 3600] [--chunk_seconds 10] [--model_path FOLDER]

Without a checkpoint it makes a small one with random weights and the published context of 10 s. It prints resident
memory along the way and how codes and audio agree with one pass over the first minutes; the last line is JSON. It
exits with status 1 if memory grew by more than 200 MB beyond the loaded model, or the results differ by more than
near-ties in the codes (2 frames in 1,000) or 1e-5 in audio.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import psutil
import soundfile
import torch

from batch_tokenizer.codecs.checkpoint import Checkpoint
from batch_tokenizer.codecs.loading import LoadRequest
from batch_tokenizer.codecs.moss.codec import MossCodec, load_codec, open_spec
from tests.support.moss import noise, patch, stage, tiny, write_moss_checkpoint

MEGABYTE = 1 << 20

SMALL = tiny(
    sampling_rate=24000,
    downsample_rate=1920,
    causal_transformer_context_duration=10,
    encoder_kwargs=[
        patch(240), stage(240, 48, 96, 3, layers=2), patch(2), stage(96, 48, 96, 3), patch(2), stage(96, 80, 96, 3),
        patch(2), stage(160, 96, 160, 5, layers=4),
    ],
    decoder_kwargs=[
        stage(96, 160, 160, 5, layers=4), patch(2), stage(80, 96, 96, 3), patch(2), stage(48, 96, 96, 3), patch(2),
        stage(48, 240, 96, 3, layers=2), patch(240),
    ],
    quantizer_kwargs={
        "codebook_dim": 8, "codebook_size": 1024, "input_dim": 96, "num_quantizers": 32, "output_dim": 96,
        "rvq_dim": 64,
    },
)  # fmt: skip


class PeakMemory:
    """Highest resident memory of this process while it is entered, sampled every 10 ms."""

    def __init__(self) -> None:
        self.process = psutil.Process()
        self.peak = 0

    def __enter__(self) -> PeakMemory:
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()

    def now(self) -> int:
        """Resident bytes."""
        return int(self.process.memory_info().rss)

    def _watch(self) -> None:
        while not self.stop.wait(0.01):
            self.peak = max(self.peak, self.now())


def write_recording(path: Path, sample_rate: int, seconds: int) -> None:
    """Noise that swells and fades, PCM-16, made a second at a time."""
    with soundfile.SoundFile(path, "w", sample_rate, 1, "PCM_16") as file:
        for second in range(seconds):
            file.write(noise(sample_rate, seed=second % 97))


def blocks(path: Path, size: int) -> Iterator[list[npt.NDArray[np.float32]]]:
    """The file's samples, ``size`` at a time."""
    with soundfile.SoundFile(path) as file:
        while len(block := file.read(size, dtype="float32")):
            yield [block]


def measure(codec: MossCodec, folder: Path, seconds: int, chunk_seconds: float) -> dict[str, float | int | str]:
    """Streams the recording through encode and decode, then compares with one pass over its beginning."""
    spec = codec.spec
    rate = spec.info.sample_rate
    recording, decoded = folder / "recording.wav", folder / "decoded.wav"
    write_recording(recording, rate, seconds)
    chunk = max(1, int(chunk_seconds * rate))
    chunk_frames = spec.num_frames(chunk)
    list(codec.encode_stream([[noise(rate)]], spec.info.num_codebooks))  # what the first call sets up once
    with PeakMemory() as memory:
        base = memory.now()
        started = time.perf_counter()
        parts = []
        for step, (codes,) in enumerate(codec.encode_stream(blocks(recording, chunk), spec.info.num_codebooks)):
            parts.append(codes)
            if step % max(1, int(600 / chunk_seconds)) == 0:
                print(f"encoded {step * chunk_seconds:6.0f} s, resident +{(memory.now() - base) / MEGABYTE:.1f} MB")
        codes = np.concatenate(parts)
        encode_seconds = time.perf_counter() - started
        started = time.perf_counter()
        chunks = ([codes[start : start + chunk_frames]] for start in range(0, len(codes), chunk_frames))
        with soundfile.SoundFile(decoded, "w", rate, 1, "FLOAT") as file:
            for step, (samples,) in enumerate(codec.decode_stream(chunks)):
                file.write(samples)
                if step % max(1, int(600 / chunk_seconds)) == 0:
                    print(f"decoded {step * chunk_seconds:6.0f} s, resident +{(memory.now() - base) / MEGABYTE:.1f} MB")
        decode_seconds = time.perf_counter() - started
        grown = memory.peak - base
    beginning = min(seconds, 180) * rate
    codec.model.stream_above = spec.num_frames(beginning)
    samples, _ = soundfile.read(recording, frames=beginning, dtype="float32")
    (one_pass,) = codec.encode([spec.features(samples)], spec.info.num_codebooks)
    whole = beginning // spec.info.samples_per_frame
    (audio,) = codec.decode([codes[:whole]])
    streamed, _ = soundfile.read(decoded, frames=len(audio), dtype="float32")
    return {
        "seconds": seconds,
        "chunk_seconds": chunk_seconds,
        "frames": len(codes),
        "parameters": sum(parameter.numel() for parameter in codec.model.parameters()),
        "grown_mb": round(grown / MEGABYTE, 1),
        "encode_rtf": round(encode_seconds / seconds, 6),
        "decode_rtf": round(decode_seconds / seconds, 6),
        "frames_that_differ_from_one_pass": round(float(np.mean((one_pass[:whole] != codes[:whole]).any(axis=1))), 6),
        "audio_difference_from_one_pass": float(np.abs(audio - streamed).max()),
    }


def main() -> int:
    """Runs the measurement; the exit status says whether the bounds held."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=3600)
    parser.add_argument("--chunk_seconds", type=float, default=10)
    parser.add_argument("--model_path")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model_path = arguments.model_path or str(write_moss_checkpoint(folder / "small", SMALL))
        checkpoint = Checkpoint.open(model_path)
        codec = load_codec(LoadRequest(checkpoint, open_spec(checkpoint)))
        result = measure(codec, folder, arguments.seconds, arguments.chunk_seconds)
    print(json.dumps(result))
    held = (
        result["grown_mb"] < 200
        and result["frames_that_differ_from_one_pass"] <= 2e-3
        and result["audio_difference_from_one_pass"] <= 1e-5
    )
    return 0 if held else 1


if __name__ == "__main__":
    raise SystemExit(main())
