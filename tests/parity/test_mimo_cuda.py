"""MiMo on a GPU: known answers, equal bits in any batch in bfloat16, no wait for the device inside a batch.

Needs a CUDA device; ``launch/gpu_check.sh`` runs it with the benchmark. What a CPU can show of the same code is in
``tests/unit/test_mimo_fast_path.py``.
"""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import batch_tokenizer
from batch_tokenizer.audio.mel import log_mel
from batch_tokenizer.codecs.base import CodecInfo
from batch_tokenizer.codecs.mimo.codec import MiMoCodec, MiMoSpec
from batch_tokenizer.codecs.mimo.compiled import CompiledLayers
from batch_tokenizer.codecs.mimo.encoder import EncoderLayout
from batch_tokenizer.codecs.mimo.model import packed_log_mel
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
    model.capacity = 2048
    if compiled:
        model.join_projections()
        model.compile_layers(2048)
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
        runners = [module.run_layer for module in model.modules() if hasattr(module, "run_layer")]
        assert all(isinstance(runner, CompiledLayers) for runner in runners)


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


def noise(length, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, length).astype(np.float32)


def make_codec(config, model, where):
    info = CodecInfo("mimo", "random", config.sampling_rate, config.samples_per_frame, config.codebook_size, "random")
    spec = MiMoSpec(info, config)
    return MiMoCodec(spec.with_device_front_end() if where == "device" else spec, model)


def test_the_front_end_equals_that_of_the_host(config):
    """By magnitude, each frame against its loudest band, as a logarithm magnifies the last bits of quiet ones."""
    wavs = [noise(length) for length in (481, 2400, 24_000, 24_239, 24_240, 720_000)]
    frames = [config.num_mel_frames(len(wav)) for wav in wavs]
    axis = EncoderLayout.build(config, frames, torch.device("cuda"), 4096).mel
    samples = torch.from_numpy(np.concatenate(wavs)).cuda()
    mel = packed_log_mel(samples, np.array([len(wav) for wav in wavs]), axis, config.mel)
    for wav, rows in zip(wavs, axis.gather(mel).cpu().split(frames), strict=True):
        want, got = np.exp(log_mel(wav, config.mel).astype(np.float64)), np.exp(rows.t().numpy().astype(np.float64))
        assert (np.abs(want - got) / want.max(axis=0)).max() < 2e-6


def test_no_code_depends_on_the_batch_with_the_front_end_on_the_device(config, model):
    draw = random.Random(3)
    wavs = [torch.from_numpy(noise(draw.randint(1000, 200_000), seed)) for seed in range(400)]
    model.capacity = 2048
    order = draw.sample(range(len(wavs)), len(wavs))
    straight = [codes for codes, _ in model.encode_samples(wavs)]
    shuffled = [codes for codes, _ in model.encode_samples([wavs[index] for index in order])]
    mixed = dict(zip(order, shuffled, strict=True))
    assert sum(not torch.equal(straight[index], mixed[index]) for index in order) == 0


@pytest.mark.parametrize("where", ["host", "device"])
def test_a_batch_that_is_begun_has_the_results_of_one_that_is_waited_for(config, model, where):
    codec = make_codec(config, model, where)
    assert codec.runs_ahead
    batches = [[codec.spec.features(noise(9000 + 5000 * n, n + 20 * k)) for n in range(20)] for k in range(3)]
    codes = [codec.encode(batch, 8) for batch in batches]
    samples = [codec.decode(batch) for batch in codes]
    begun = [codec.begin("wav2token2wav", batch, 8) for batch in batches]
    for computation, some_codes, some_samples in zip(begun, codes, samples, strict=True):
        computed = computation.finish()
        assert computed.seconds["encode"] > 0
        assert computed.seconds["decode"] > 0
        assert all(np.array_equal(a, b) for a, b in zip(computed.codes, some_codes, strict=True))
        assert all(np.array_equal(a, b) for a, b in zip(computed.samples or [], some_samples, strict=True))


@pytest.mark.parametrize("where", ["host", "device"])
def test_nothing_waits_for_the_device_inside_a_batch(config, model, where):
    codec = make_codec(config, model, where)
    batch = [codec.spec.features(noise(9000 + 3000 * n, n)) for n in range(40)]
    codec.begin("wav2token2wav", batch, 20).finish()  # codebooks are looked through once
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        begun = codec.begin("wav2token2wav", batch, 20)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(begun.finish().codes) == 40
