"""MiMo on a GPU: known answers, equal bits in any batch in bfloat16, no wait for the device inside a batch.

Needs a CUDA device; ``launch/gpu_check.sh`` runs it with the benchmark. What a CPU can show of the same code is in
``tests/unit/test_mimo_fast_path.py``.
"""

from __future__ import annotations

import random

import pytest
import torch
from safetensors.torch import load_file

import batch_tokenizer
from batch_tokenizer.codecs.mimo.compiled import CompiledLayers
from batch_tokenizer.codecs.mimo.sized import random_model, sized_config

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

UTTERANCES = 3000


@pytest.fixture(scope="module")
def config():
    return sized_config("mimo-11m")


@pytest.fixture(scope="module")
def model(config):
    return random_model(config, device="cuda", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def utterances(config):
    draw = random.Random(0)
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(config.n_mels, draw.randint(30, 600), generator=generator) - 3 for _ in range(UTTERANCES)
    ]  # fmt: skip


def test_known_answers_in_float32(golden_root):
    expected = load_file(golden_root / "mimo_tiny" / "expected.safetensors")
    model = batch_tokenizer.load_model(golden_root / "mimo_tiny").cuda()
    codes = model.encode_utterances([expected[f"{i}.mel"] for i in range(10)])
    samples = model.decode_utterances(codes)
    for i in range(10):
        assert torch.equal(codes[i].int().cpu(), expected[f"{i}.codes"]), f"utterance {i}"
        torch.testing.assert_close(samples[i].cpu(), expected[f"{i}.recon_nq8"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_no_code_depends_on_the_batch(config, utterances, compiled):
    model = random_model(config, device="cuda", dtype=torch.bfloat16)
    if compiled:
        model.compile_layers()
    model.capacity = 2048
    results = []
    for seed in (1, 2):
        order = random.Random(seed).sample(range(UTTERANCES), UTTERANCES)
        codes = model.encode_utterances([utterances[index] for index in order])
        samples = model.decode_utterances(codes[:300])
        by_index = dict(zip(order, codes, strict=True))
        wavs = dict(zip(order, samples, strict=False))
        results.append((by_index, wavs))
    (codes, wavs), (others, other_wavs) = results
    assert sum(not torch.equal(codes[index], others[index]) for index in range(UTTERANCES)) == 0
    shared = wavs.keys() & other_wavs.keys()
    assert shared
    assert all(torch.equal(wavs[index], other_wavs[index]) for index in shared)
    if compiled:
        runners = {id(m.run_layer): m.run_layer for m in model.modules() if hasattr(m, "run_layer")}
        assert all(isinstance(runner, CompiledLayers) and runner.failed is None for runner in runners.values())


def test_bfloat16_stays_close_to_float32(config, model, utterances, record_property):
    exact = random_model(config, device="cuda")
    mel = utterances[0].cuda()
    want, got = exact.hidden(mel), model.hidden(mel).float()
    assert (want - got).square().mean().sqrt() < 0.03 * want.square().mean().sqrt()
    some = utterances[:200]
    pairs = list(zip(exact.encode_utterances(some), model.encode_utterances(some), strict=True))
    for codebook in (0, 1, 2):
        equal = torch.cat([(a == b)[:, codebook] for a, b in pairs]).float().mean()
        record_property(f"codes equal to float32, codebook {codebook}", round(float(equal), 4))


def test_nothing_waits_for_the_device_inside_a_batch(model, utterances):
    some = utterances[:40]
    model.decode_utterances(model.encode_utterances(some))  # codebooks are looked through once
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model.decode_utterances(model.encode_utterances(some))
    finally:
        torch.cuda.set_sync_debug_mode("default")
