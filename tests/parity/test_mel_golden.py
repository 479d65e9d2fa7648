"""The mel front end against the public MiMo implementation's, for every golden utterance."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from batch_tokenizer.audio.mel import log_mel
from batch_tokenizer.codecs.mimo.config import MiMoConfig

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden" / "mimo_tiny"

pytestmark = pytest.mark.skipif(not GOLDEN.is_dir(), reason="the golden values (../shared/golden/mimo_tiny) are absent")


def test_mel_of_every_golden_utterance() -> None:
    expected = load_file(GOLDEN / "expected.safetensors")
    config = MiMoConfig.from_json(json.loads((GOLDEN / "config.json").read_text()))
    utterances = [name.removesuffix(".mel") for name in expected if name.endswith(".mel")]
    assert utterances
    for utterance in utterances:
        mel = log_mel(expected[f"{utterance}.wav"], config.mel)
        # Fourier transforms differ between processors by the last bits of their loudest bin, which a logarithm
        # magnifies without bound in a quiet one: so magnitudes are compared, each frame against its loudest band.
        magnitudes, published = np.exp(mel.astype(np.float64)), np.exp(expected[f"{utterance}.mel"].astype(np.float64))
        assert magnitudes.shape == published.shape, utterance
        assert (np.abs(magnitudes - published) / published.max(axis=0)).max() < 2e-6, utterance
        assert np.abs(mel - expected[f"{utterance}.mel"]).mean() < 5e-5, utterance
