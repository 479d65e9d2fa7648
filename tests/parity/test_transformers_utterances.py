"""Mimi, EnCodec and DAC with random weights: 200 utterances of random lengths as transformers computes each alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from batch_tokenizer.codecs.checkpoint import Checkpoint
from batch_tokenizer.codecs.hf.codec import HfCodec, load_codec, open_spec
from batch_tokenizer.codecs.loading import LoadRequest
from tests.support.hf import library_audio, library_codes, save_checkpoint

NUM_UTTERANCES = 200


def opened(folder: Path) -> HfCodec:
    checkpoint = Checkpoint.open(str(folder))
    return load_codec(LoadRequest(checkpoint, open_spec(checkpoint)))


def compare(model: object, codec: HfCodec, utterances: list[np.ndarray]) -> tuple[int, float]:
    """Encodes and decodes all utterances in one call in padded batches, and the first quarter of them one by one, and
    compares both with the library's results.

    Returns:
        the number of codes, and the greatest difference in decoded audio over the audio's peak.
    """
    features = [codec.spec.features(samples) for samples in utterances]  # DAC takes no less than two frames
    expected = [library_codes(model, samples[0]) for samples in features]
    audio = [library_audio(model, codes.astype(np.uint16)) for codes in expected]
    worst = 0.0
    for codec.batch_frames, count in ((64, len(utterances)), (0, len(utterances) // 4)):
        found = codec.encode(features[:count])
        for samples, codes, wanted in zip(utterances[:count], found, expected[:count], strict=True):
            assert len(codes) == codec.spec.num_frames(len(samples))
            np.testing.assert_array_equal(codes, wanted)
        for decoded, wanted in zip(codec.decode(found), audio[:count], strict=True):
            worst = max(worst, float(np.abs(decoded - wanted).max() / np.abs(wanted).max()))
    return sum(codes.size for codes in expected), worst


@pytest.mark.parametrize("name", ["mimi", "encodec", "dac"])
def test_200_utterances(name: str, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the command does on a CPU
    try:
        model = save_checkpoint(tmp_path, name)
        generator = np.random.default_rng(15)
        lengths = [1, 2, *generator.integers(3, 500, NUM_UTTERANCES - 2).tolist()]
        utterances = [generator.normal(0, 0.3, length).astype(np.float32) for length in lengths]
        codes, worst = compare(model, opened(tmp_path), utterances)
    finally:
        torch.set_num_threads(threads)
    assert codes > 10 * NUM_UTTERANCES
    assert worst < 1e-4  # rounding, of a sum of thousands of terms in another order
