"""Known answers of a family: its checkpoint, utterances and what the published code computes of each, on any path."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import soundfile
import torch
from safetensors.numpy import load_file

from batch_tokenizer.cli import main
from batch_tokenizer.codecs.base import Codec
from batch_tokenizer.codecs.checkpoint import Checkpoint
from batch_tokenizer.codecs.loading import LoadRequest
from batch_tokenizer.codecs.registry import find_family
from tests.support.command import write_manifest

Array = npt.NDArray[Any]


@dataclass
class KnownAnswers:
    """A folder of known answers; ``shared/golden/README.md`` describes its names.

    Attributes:
        expected: arrays by name, such as ``3.codes``.
        options: the family's settings with which the answers hold.
    """

    folder: Path
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.expected: dict[str, Array] = load_file(self.folder / "expected.safetensors")

    @property
    def utterances(self) -> list[int]:
        """Their numbers."""
        return sorted(int(name.removesuffix(".codes")) for name in self.expected if name.endswith(".codes"))

    def wav(self, utterance: int) -> Array:
        """Samples float32, (S,) or (channels, S)."""
        if f"{utterance}.wav" in self.expected:
            return self.expected[f"{utterance}.wav"]
        return self.expected[f"{utterance}.wav_s16"].astype(np.float32) / 32768

    def codes(self, utterance: int, name: str = "codes") -> Array:
        """(T, K)."""
        return self.expected[f"{utterance}.{name}"]

    def open(self, task: str = "wav2token2wav", *, threads: int = 1, device: str = "cpu") -> Codec:
        """The codec in float32."""
        checkpoint = Checkpoint.open(str(self.folder))
        family = find_family(checkpoint)
        return family.load_codec(
            LoadRequest(
                checkpoint,
                family.open_spec(checkpoint).with_options(self.options),
                task=task,
                device=torch.device(device),
                threads=threads,
            )
        )  # type: ignore[arg-type]

    def batches(self, size: int, order: Sequence[int] | None = None) -> Iterator[list[int]]:
        """Utterances in batches of ``size``, larger ones than there are utterances filled up with repetitions."""
        members = list(order or self.utterances)
        while len(members) < size:
            members += self.utterances
        members = members[: max(size, len(self.utterances))]
        return (members[start : start + size] for start in range(0, len(members), size))

    def orders(self) -> list[list[int]]:
        """Reversed, and shuffled."""
        members = self.utterances
        return [members[::-1], random.Random(7).sample(members, len(members))]

    def encode(self, codec: Codec, members: Sequence[int]) -> list[Array]:
        """Codes of some utterances in one batch, after a check that their number of frames was foretold."""
        wavs = [self.wav(utterance) for utterance in members]
        codes = codec.encode([codec.spec.features(wav) for wav in wavs], codec.info.num_codebooks)
        for wav, code in zip(wavs, codes, strict=True):
            assert codec.spec.num_frames(wav.shape[-1]) == len(code)
        return codes

    def run(self, tmp_path: Path, *flags: object, task: str = "wav2token2wav") -> tuple[list[Array], list[Array]]:
        """All utterances through the command line: codes (T, K) as written, samples (channels, S) of the wav files."""
        rows = []
        for utterance in self.utterances:
            wav = tmp_path / "in" / f"{utterance}.wav"
            wav.parent.mkdir(parents=True, exist_ok=True)
            rate = Checkpoint.open(str(self.folder)).config
            soundfile.write(wav, self.wav(utterance).T, self._sample_rate(rate), subtype="FLOAT")
            row = {"key": str(utterance), "wav": str(wav), "quantized_tokens": str(tmp_path / f"{utterance}.json")}
            if task == "wav2token2wav":
                row["reconstructed_wav"] = str(tmp_path / f"{utterance}.wav")
            rows.append(row)
        manifest = write_manifest(tmp_path / "rows.jsonl", rows)
        words = ["--model_path", self.folder, "--data_list", manifest, "--task", task, "--device", "cpu",
                 "--num_workers", 0, "--strict", *flags]  # fmt: skip
        assert main([*map(str, words)]) == 0
        tokens = [np.array(json.loads(Path(row["quantized_tokens"]).read_text())["quantized_tokens"]) for row in rows]
        if task == "wav2token":
            return tokens, []
        return tokens, [soundfile.read(row["reconstructed_wav"], always_2d=True)[0].T for row in rows]

    @staticmethod
    def _sample_rate(config: Mapping[str, Any]) -> int:
        return next(config[key] for key in ("sampling_rate", "input_sample_rate", "sample_rate") if key in config)
