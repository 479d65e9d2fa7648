"""The benchmark at tiny sizes: it measures what it says, and its last line is JSON."""

from __future__ import annotations

import argparse
import json

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from batch_tokenizer.codecs.mimo.config import MiMoConfig
from batch_tokenizer.codecs.mimo.operations import decoder_operations, encoder_operations, visible_pairs
from batch_tokenizer.codecs.mimo.sized import random_model, size_names, sized_config
from batch_tokenizer.commands import bench
from batch_tokenizer.commands.bench_timing import by_kind
from batch_tokenizer.commands.bench_workload import FreeCodec, FreeSpec, draw_lengths, manifest_wavs
from batch_tokenizer.commands.published_loop import decode_padded, encode_padded
from batch_tokenizer.kernels.attention import _visible
from batch_tokenizer.records import RunError
from tests.support.checkpoints import TINY


def run(capsys, *words):
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    threads = torch.get_num_threads()
    try:
        assert bench.main(parser.parse_args([str(word) for word in words])) == 0
    finally:
        torch.set_num_threads(threads)
    table = capsys.readouterr().out.splitlines()
    return json.loads(table[-1]), table


@pytest.fixture
def tiny(tmp_path):
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(TINY))
    return path


def test_all_parts_of_a_model(capsys, tiny):
    report, table = run(
        capsys, "--config", tiny, "--random_weights", "--num_utterances", 3, "--lengths", "uniform:0.5-1.5",
        "--repeats", 1, "--num_workers", 1, "--baseline", 2, "--device", "cpu",
    )  # fmt: skip
    assert {"conditions", "peak_tflops", "model", "end_to_end", "loader_per_core", "writer_per_core"} <= set(report)
    assert report["conditions"]["utterances"] == 3
    assert report["end_to_end"]["device_idle_share"] == "not applicable"
    assert 0 < report["model"]["share_of_peak"] < 1
    assert report["published_loop_batch_2"]["rtf"]["median"] > 0
    stages = report["end_to_end"]["seconds_of_stages_a_second"]
    assert set(stages) == {"load", "encode", "decode", "write"}
    assert any(line.startswith("end to end: rtf") for line in table)


def test_operators_are_summed_by_kind():
    report = by_kind(
        [
            ("sm90_xmma_gemm_bf16bf16_bf16f32", 60.0, 200),
            ("void flash_fwd_kernel<128>", 9.0, 80),
            ("triton_poi_fused_gelu_0", 20.0, 160),
            ("Memcpy HtoD (Pinned -> Device)", 2.0, 9),
            ("aten::addmm", 6.0, 1),
            ("something new", 0.5, 1),
        ]
    )
    assert report["milliseconds"] == {
        "matrix products": 66.0, "fused by the compiler": 20.0, "attention": 9.0, "copies": 2.0, "other": 0.5,
    }  # fmt: skip
    assert (report["all_milliseconds"], report["operators"]) == (97.5, 451)


def test_a_profile_has_the_matrix_products_of_a_model(capsys, tiny):
    report, _ = run(
        capsys, "--config", tiny, "--random_weights", "--num_utterances", 2, "--lengths", "constant:0.5",
        "--repeats", 1, "--num_workers", 0, "--device", "cpu", "--parts", "profile",
    )  # fmt: skip
    profile = report["profile"]
    assert profile["batches"] == 1
    assert profile["milliseconds"]["matrix products"] > 0
    assert profile["operators"] > 50


@pytest.mark.parametrize("task", ["wav2token", "token2wav"])
def test_the_free_codec(capsys, tmp_path, task):
    report, _ = run(
        capsys, "--config", "free", "--num_utterances", 4, "--lengths", "constant:0.2", "--task", task, "--repeats", 2,
        "--num_workers", 1, "--parts", "end_to_end", "--work_dir", tmp_path / "w", "--device", "cpu",
    )  # fmt: skip
    rtf = report["end_to_end"]["rtf"]
    assert 0 < rtf["least"] <= rtf["median"] <= rtf["most"]
    suffix = "json" if task == "wav2token" else "wav"
    for number in range(3):  # one to warm up
        made = sorted(path.name for path in (tmp_path / "w" / f"pass{number}" / "out").iterdir())
        assert made == [f"{index:06d}.{suffix}" for index in range(4)]


def test_what_cannot_be_run_is_refused(capsys, tmp_path):
    for words, reason in (
        (["--config", "mimo-11m"], "random_weights"),
        (["--random_weights"], "--config"),
        (["--config", "mimo-12m", "--random_weights"], "mimo-1.2b"),
        (["--config", "free", "--num_quantizers", "21"], "20 codebooks"),
        (["--config", "free", "--model_path", "x"], "one of them"),
        (["--config", "free", "--lengths", "uniform:3-1"], "--lengths"),
        (["--config", "free", "--data_list", str(tmp_path / "none")], "--data_list"),
    ):
        with pytest.raises(RunError, match=reason):
            run(capsys, *words, "--num_utterances", "1", "--device", "cpu")


def test_lengths_are_drawn_within_their_bounds():
    assert draw_lengths("constant:3", 2, 0) == [3.0, 3.0]
    assert all(1 <= length <= 2 for length in draw_lengths("uniform:1-2", 50, 1))
    drawn = draw_lengths("seed-tts", 2000, 2)
    assert 1.5 <= min(drawn) <= max(drawn) <= 15
    assert np.median(drawn) == pytest.approx(4.5, rel=0.1)
    assert drawn == draw_lengths("seed-tts", 2000, 2)


def test_utterances_of_a_manifest_are_drawn_in_its_order(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text("".join(json.dumps({"wav": f"{index:02d}.wav"}) + "\n" for index in range(20)))
    some = manifest_wavs(path, 7, 0)
    assert len(some) == 7
    assert some == sorted(some)


def test_the_free_codec_keeps_the_protocol():
    spec = FreeSpec()
    codec = FreeCodec(spec)
    features = [spec.features(np.zeros(count, np.float32)) for count in (1, 960, 961)]
    codes = codec.encode(features, 8)
    assert [code.shape for code in codes] == [(1, 8), (1, 8), (2, 8)]
    assert [len(wav) for wav in codec.decode(codes)] == [spec.num_output_samples(n) for n in (1, 1, 2)]


@pytest.mark.parametrize(("seconds", "gflop"), [(5, 133), (30, 148)])
def test_operations_of_the_published_size(seconds, gflop):
    config = sized_config("mimo-1.2b")
    mel_frames = config.num_mel_frames(seconds * config.sampling_rate)
    total = encoder_operations(config, mel_frames, 20) + decoder_operations(config, config.num_token_frames(mel_frames))
    assert total / seconds / 1e9 == pytest.approx(gflop, rel=0.01)


@pytest.mark.parametrize("window", [(-1, -1), (4, 2), (0, 0), (-1, 3), (30, -1)])
@pytest.mark.parametrize("causal", [False, True])
def test_visible_pairs(window, causal):
    for length in (1, 3, 17):
        seen = _visible(length, length, (window[0], 0) if causal else window, torch.device("cpu"))
        assert visible_pairs(length, window, causal) == int(seen.sum())


def test_operations_are_those_that_torch_counts():
    """With attention over everything, as the definition computes pairs that do not see each other too."""
    whole = {"decoder_causal": False, "vocoder_attn_window_size": [-1, -1]}
    config = MiMoConfig.from_json({**TINY, **whole})
    model = random_model(config)
    model.use_attention("reference")  # torch does not count what its fused attention does on a CPU
    mel = torch.randn(config.n_mels, 104)
    with FlopCounterMode(display=False) as encoding:
        codes = model.encode_utterances([mel])[0]
    # conv2 makes 52 frames; the gap after the utterance adds two more to the convolutions' axes
    assert encoding.get_total_flops() == pytest.approx(encoder_operations(config, 104, 5), rel=0.05)
    with FlopCounterMode(display=False) as decoding:
        model.decode_utterances([codes])
    assert decoding.get_total_flops() == pytest.approx(decoder_operations(config, len(codes)), rel=0.05)


def test_sizes_that_ship():
    assert size_names() == ("mimo-1.2b", "mimo-11m")
    model = random_model(sized_config("mimo-11m"))
    assert sum(weight.numel() for weight in model.parameters()) == pytest.approx(11e6, rel=0.03)


def test_the_published_loop_computes_the_same_model():
    """On equal lengths without padding, where its faults do not show; and they do show otherwise."""
    config = MiMoConfig.from_json(TINY)
    model = random_model(config)
    generator = torch.Generator().manual_seed(0)
    mels = [torch.randn(config.n_mels, 96, generator=generator) - 3 for _ in range(3)]
    with torch.inference_mode():
        ours = model.encode_utterances(mels)
        theirs = encode_padded(model, torch.stack([mel.t() for mel in mels]), torch.tensor([96] * 3), 5)
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a, b)
        for a, b in zip(model.decode_utterances(ours), decode_padded(model, theirs), strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=0)
