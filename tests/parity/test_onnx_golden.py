"""Our ONNX export of MOSS against the public implementation's values, in one pass and in steps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from batch_tokenizer.codecs.checkpoint import Checkpoint
from batch_tokenizer.codecs.loading import LoadRequest
from batch_tokenizer.codecs.onnx.codec import OnnxCodec, load_codec, open_spec
from batch_tokenizer.codecs.onnx.export import export_moss

GOLDEN = Path(__file__).parents[3] / "shared" / "golden" / "moss_tiny"
UTTERANCES = range(5)

pytestmark = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"the known answers are not at {GOLDEN}")


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> OnnxCodec:
    folder = tmp_path_factory.mktemp("graphs")
    export_moss(Checkpoint.open(str(GOLDEN)), folder)
    checkpoint = Checkpoint.open(str(folder))
    return load_codec(LoadRequest(checkpoint, open_spec(checkpoint)))


@pytest.mark.parametrize("step", [None, 7])
@pytest.mark.parametrize("num_quantizers", [8, 3])
def test_known_answers(codec, num_quantizers, step):
    codec.pieces_above, codec.step = (750, 125) if step is None else (1, step)
    expected = load_file(GOLDEN / "expected.safetensors")
    waves = [expected[f"{index}.wav"].numpy()[None] for index in UTTERANCES]
    codes = codec.encode(waves, num_quantizers)
    for index, code, samples in zip(UTTERANCES, codes, codec.decode(codes), strict=True):
        np.testing.assert_array_equal(code, expected[f"{index}.codes"].numpy()[:, :num_quantizers])
        recon = expected[f"{index}.recon_nq{num_quantizers}"].numpy()
        np.testing.assert_allclose(samples, recon, rtol=0, atol=2e-6)
