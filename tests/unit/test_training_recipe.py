"""Training end to end on a tiny model and synthetic audio: it learns, it resumes, and what it exports runs."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given
from hypothesis import strategies as st

from batch_tokenizer.audio.mel import log_mel
from batch_tokenizer.codecs.checkpoint import Checkpoint
from batch_tokenizer.codecs.mimo.codec import load_model, open_spec
from batch_tokenizer.codecs.mimo.config import MiMoConfig
from batch_tokenizer.codecs.mimo.decoder import UpSampling
from batch_tokenizer.kernels.segments import Segments
from batch_tokenizer.records import RunError
from batch_tokenizer.training.__main__ import main
from batch_tokenizer.training.augmentation import Augmentation, augment
from batch_tokenizer.training.crops import Audio, AudioFile, BatchNumbers, Crops, crop_length, read_manifest
from batch_tokenizer.training.discriminators import Adversary
from batch_tokenizer.training.losses import RESOLUTIONS, SpectralLoss
from batch_tokenizer.training.recipe import SMALL, Recipe
from batch_tokenizer.training.run import load_utterances, train
from batch_tokenizer.training.starting import make_model, protect_level
from batch_tokenizer.training.trainer import Trainer
from tests.support.checkpoints import TINY
from tests.support.command import ROOT

CONFIG: dict[str, Any] = {
    **TINY,
    "num_quantizers": 3,
    "codebook_size": [16, 8],
    "encoder_attn_window_size": [8, 8],
    "decoder_attn_window_size": [8, 0],
}


def tone(seconds: float, pitch: float) -> np.ndarray:
    t = np.arange(int(seconds * 24000)) / 24000
    wave = sum(np.sin(2 * math.pi * pitch * k * t) / k for k in (1, 2, 3))
    return (0.2 * wave * (1 + np.sin(2 * math.pi * 3 * t))).astype(np.float32) / 2


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tones")
    lines = []
    for index, seconds in enumerate((0.2, 0.7, 1.5)):
        path = folder / f"{index}.wav"
        soundfile.write(path, tone(seconds, 120 + 60 * index), 24000)
        lines.append(json.dumps({"key": str(index), "wav": str(path), "duration": seconds}))
    (folder / "manifest.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "manifest.jsonl"


def tiny(manifest: Path, out: Path, **changes: Any) -> Recipe:
    values: dict[str, Any] = {
        "data": manifest, "out": out, "config": CONFIG, "steps": 30, "batch_size": 4, "token_frames": 8,
        "learning_rate": 5e-3, "warmup": 3, "quantize_from": 8, "num_workers": 0, "log_every": 5, "save_every": 1e9,
        "augmentation": Augmentation(level_low=-30.0, level_high=-12.0),
    }  # fmt: skip
    return Recipe(**{**values, **changes})


def read_log(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_it_learns_and_its_export_runs(manifest: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        trainer = train(tiny(manifest, tmp_path, held_out=manifest, steps=60, average_over=10))
    epochs = [line.split()[1] for line in caplog.messages if line.startswith("epoch ")]
    assert epochs == [str(number + 1) for number in range(len(epochs))] != []
    assert f"saved step 60, after {len(epochs)}." in caplog.text
    assert f"left: {tmp_path / 'checkpoint'}" in caplog.text
    lines = read_log(tmp_path)
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 12
    assert np.median(losses[-4:]) < 0.6 * losses[0]
    assert {"step", "minutes", "minutes_left", "hours"} <= lines[0].keys()
    assert lines[-1]["held_out"].keys() == {"envelope_3", "level_3", "perplexity"}
    assert len(lines[-1]["held_out"]["perplexity"]) == 3

    checkpoint = Checkpoint.open(str(tmp_path / "checkpoint"))
    spec = open_spec(checkpoint)
    model = load_model(checkpoint, device=torch.device("cpu"))
    samples = tone(0.8, 200)
    codes = model.encode_utterances([torch.from_numpy(spec.features(samples))])[0]
    assert codes.shape == (spec.num_frames(len(samples)), 3)
    (made,) = model.decode_utterances([codes])
    assert len(made) == spec.num_output_samples(len(codes))
    assert made.isfinite().all()
    # Half precision on disk: parameters lose some digits, codebooks and the window none.
    with trainer.averaged():
        averaged = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    for name, tensor in averaged.items():
        loaded = model.state_dict()[name]
        assert loaded.dtype == torch.float32, name
        exact = "embed" in name.split(".")[-1] or name.endswith("istft.window")
        assert torch.equal(loaded, tensor) if exact else torch.allclose(loaded, tensor, rtol=2e-3, atol=1e-4), name


def test_what_is_trained_is_what_runs(manifest: Path, tmp_path: Path) -> None:
    """Crops in one batch through ``reconstruct`` against each alone through the published interface."""
    trainer = Trainer(tiny(manifest, tmp_path))
    trainer.codebooks.start(torch.randn(200, CONFIG["d_model"]))
    trainer.codebooks.eval()
    audio = Audio(read_manifest(manifest, manifest.parent), 24000, 0)
    crops = Crops(audio, trainer.config, 8, seed=1)
    mels = torch.stack([torch.from_numpy(crops[index][1]) for index in range(3)])
    used = torch.tensor([3, 1, 2])
    made, _ = trainer.reconstruct(mels, used)
    codes = trainer.model.encode_utterances(list(mels))
    for index, number in enumerate(used.tolist()):
        (alone,) = trainer.model.decode_utterances([codes[index][:, :number]])
        assert torch.allclose(made[index], alone, atol=1e-4)


def test_every_parameter_gets_a_gradient(manifest: Path, tmp_path: Path) -> None:
    trainer = Trainer(tiny(manifest, tmp_path, quantize_from=1))
    crops = Crops(Audio(read_manifest(manifest, manifest.parent), 24000, 0), trainer.config, 8, seed=1)
    parts = [torch.stack([torch.from_numpy(crops[index][part]) for index in range(4)]) for part in range(3)]
    for _ in range(2):
        trainer.train_step(*parts)
    assert bool(trainer.codebooks.ready)
    without = [name for name, p in trainer.model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_a_killed_and_then_stopped_run_resumes_as_if_it_had_not_ended(manifest: Path, tmp_path: Path) -> None:
    whole = train(tiny(manifest, tmp_path / "whole", steps=8, quantize_from=3))
    part = tiny(manifest, tmp_path / "part", steps=8, quantize_from=3, save_every=0.0)

    def kill() -> bool:
        raise KeyboardInterrupt

    # 1. Ended without another save, after the second step's.
    calls = iter((lambda: False, lambda: False, kill))
    with pytest.raises(KeyboardInterrupt):
        train(part, stop=lambda: next(calls)())
    assert torch.load(tmp_path / "part" / "state.pt", weights_only=True)["step"] == 2
    # 2. Stopped after three more.
    stops = iter((False, False, False, True))
    assert train(part, stop=lambda: next(stops)).step == 5
    assert (tmp_path / "part" / "checkpoint" / "model.safetensors").exists()
    # 3. To its end.
    ended = train(part)
    assert ended.step == 8
    for name, tensor in whole.model.state_dict().items():
        assert torch.allclose(tensor, ended.model.state_dict()[name], atol=1e-5), name
    # 4. A finished run stays as it is.
    before = (tmp_path / "part" / "state.pt").read_bytes()
    assert train(part).step == 8
    assert (tmp_path / "part" / "state.pt").read_bytes() == before


def test_a_damaged_state_is_one_line(manifest: Path, tmp_path: Path) -> None:
    (tmp_path / "state.pt").write_bytes(b"not a state")
    with pytest.raises(RunError, match=r"state\.pt: is damaged; remove it"):
        train(tiny(manifest, tmp_path))


def test_a_full_disk_is_one_line(manifest: Path, tmp_path: Path) -> None:
    trainer = Trainer(tiny(manifest, tmp_path / "run"))
    (tmp_path / "run").write_text("a file where the folder should be")
    with pytest.raises(RunError, match=r"cannot be written: .*; make room"):
        trainer.save()


def test_a_signal_to_the_whole_job_ends_it_with_its_last_step_saved(manifest: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    words = ("--data", manifest, "--out", tmp_path / "run", "--config", tmp_path / "config.json", "--token_frames", "8",
             "--batch_size", "1")  # fmt: skip
    with subprocess.Popen(
        [sys.executable, "-m", "batch_tokenizer.training", *words, "--num_workers", "1", "--threads", "1"],
        start_new_session=True, stderr=subprocess.PIPE, text=True, cwd=ROOT,
    ) as process:  # fmt: skip
        assert process.stderr is not None
        said = ""
        while '"step": 50' not in said:
            line = process.stderr.readline()
            assert line, said
            said += line
        os.killpg(process.pid, signal.SIGTERM)
        said += process.stderr.read()
    assert process.returncode == 0, said
    assert "Traceback" not in said
    assert torch.load(tmp_path / "run" / "state.pt", weights_only=True)["step"] >= 50


def test_a_lost_loading_process_is_one_line(manifest: Path, tmp_path: Path) -> None:
    def kill_the_loader() -> bool:
        for process in multiprocessing.active_children():
            process.kill()
        return False

    with pytest.raises(RunError, match="a loading process ended"):
        train(tiny(manifest, tmp_path, num_workers=1), stop=kill_the_loader)


def test_a_state_of_another_shape_is_refused(manifest: Path, tmp_path: Path) -> None:
    train(tiny(manifest, tmp_path, steps=1))
    with pytest.raises(RunError, match="another config"):
        train(tiny(manifest, tmp_path, config={**CONFIG, "decoder_layers": 1}))


def test_unequal_strides_are_refused(manifest: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="decoder_stride_size"):
        train(tiny(manifest, tmp_path, config={**CONFIG, "decoder_stride_size": 1}))


def test_the_learning_rate_rises_then_falls_with_steps_or_minutes(manifest: Path, tmp_path: Path) -> None:
    trainer = Trainer(tiny(manifest, tmp_path, steps=100, minutes=10, warmup=10, learning_rate=1.0))
    rates = []
    for step in range(101):
        trainer.step = step
        rates.append(trainer.learning_rate())
    peak = rates.index(max(rates))
    assert 8 <= peak <= 12
    assert rates[0] < 0.11
    assert rates[100] == pytest.approx(0.01)
    assert all(a >= b for a, b in zip(rates[peak:], rates[peak + 1 :], strict=False))
    trainer.step, trainer.seconds = 20, 600.0
    assert trainer.progress == 1
    assert trainer.learning_rate() == pytest.approx(0.01)


def test_any_number_of_codebooks_is_drawn_and_all_of_them_most(manifest: Path, tmp_path: Path) -> None:
    trainer = Trainer(tiny(manifest, tmp_path))
    counts: Counter[int] = Counter()
    for step in range(200):
        trainer.step = step
        counts.update(trainer._draw_used(4).tolist())
    assert set(counts) == {1, 2, 3}
    assert counts[3] > 1.5 * (counts[1] + counts[2])


def test_group_norms_start_as_all_but_linear() -> None:
    """Twice the signal comes out twice, so that loudness survives and an utterance's length does not matter."""
    config = MiMoConfig.from_json(CONFIG)
    decoder = make_model(config, 3).decoder
    assert decoder is not None
    rows = 0.3 * torch.randn(12, config.d_model)
    lengths = Segments([12])
    with torch.no_grad():
        none, _ = decoder.dconv1(torch.zeros_like(rows), lengths)
        once, _ = decoder.dconv1(rows, lengths)
        twice, _ = decoder.dconv1(2 * rows, lengths)
    assert none.abs().max() < 0.1
    once, twice = once - none, twice - none
    assert ((twice - 2 * once).norm() / twice.norm()) < 0.1


def test_an_equal_change_of_all_mel_channels_passes_a_group_norm() -> None:
    """Such a change is an utterance's level. The norm alone would take it away altogether."""
    module = UpSampling(8, 32, 3, 1)
    rows = torch.ones(50, 8)
    zero, one = torch.tensor(0.0), torch.tensor(1.0)
    with torch.no_grad():
        module.conv.weight.fill_(0.02)
        module.conv.get_parameter("bias").zero_()
        plain = [module(level * rows, Segments([50]))[0][10] for level in (-3.0, 0.0, 3.0)]
        protect_level(module, torch.zeros(32), zero, one, one)
        low, middle, high = (module(level * rows, Segments([50]))[0][10] for level in (-3.0, 0.0, 3.0))
    change = 3 * 0.02 * 8 * 3
    assert (plain[2] - plain[0]).mean().abs() < 0.3 * 2 * change
    assert torch.allclose(high - middle, torch.full((32,), change), rtol=0.15)
    assert torch.allclose(middle - low, torch.full((32,), change), rtol=0.15)


def test_a_run_starts_from_a_checkpoint_that_may_have_fewer_vocoder_layers(manifest: Path, tmp_path: Path) -> None:
    small = train(tiny(manifest, tmp_path / "small", steps=10))
    folder = str(tmp_path / "small" / "checkpoint")
    grown = Trainer(tiny(manifest, tmp_path / "grown", config={**CONFIG, "vocoder_num_layers": 3}))
    grown.start_from(folder, [torch.from_numpy(tone(1.0, 150))])
    mel = torch.from_numpy(log_mel(tone(1.0, 200), grown.config.mel))
    with small.averaged():
        (wanted,) = small.model.decode_utterances(small.model.encode_utterances([mel]))
    (made,) = grown.model.decode_utterances(grown.model.encode_utterances([mel]))
    assert torch.allclose(made, wanted, atol=5e-3 * float(wanted.abs().max()))  # the checkpoint has half precision
    with pytest.raises(RunError, match="--start_from"):
        Trainer(tiny(manifest, tmp_path / "other", config={**CONFIG, "decoder_layers": 1})).start_from(folder, [])


def test_voices_are_drawn_by_the_root_of_their_hours(tmp_path: Path) -> None:
    files = []
    for name, count in (("much", 16), ("little", 1)):
        path = tmp_path / f"{name}.wav"
        soundfile.write(path, np.full(24000, 0.5 if name == "much" else -0.5, np.float32), 24000)
        files += [AudioFile(str(path), 1.0, name)] * count
    audio, rng = Audio(files, 24000, 1 << 30), np.random.default_rng(0)
    share = np.mean([audio.draw(rng)[0] > 0 for _ in range(2000)])
    assert share == pytest.approx(4 / 5, abs=0.04)


def test_manifests_may_name_parts_of_files_and_sources_may_be_folders(manifest: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    wav = str(manifest.parent / "2.wav")
    path.write_text(json.dumps({"key": "a", "wav": wav, "start": 0.25, "end": 0.75, "speaker": "s"}) + "\n")
    (file,) = read_manifest(path, tmp_path)
    assert (file.seconds, file.speaker) == (0.5, "s")
    samples = Audio([file], 24000, 0)[0]
    assert samples is not None
    assert len(samples) == 12000
    assert len(read_manifest(str(manifest.parent / "*.wav"), tmp_path / "listing")) == 3


@pytest.mark.parametrize("level", [-60.0, -20.0])
def test_augmented_examples_have_the_level_that_was_drawn(level: float) -> None:
    how = Augmentation(level_low=level, level_high=level, keep_level_chance=0.0)
    rng = np.random.default_rng(3)
    source = tone(3.0, 170)
    for _ in range(20):
        samples = augment(lambda length: source[:length], 24000, 24000, rng, how)
        assert samples.shape == (24000,)
        assert samples.dtype == np.float32
        assert np.abs(samples).max() <= 0.99
        assert 20 * math.log10(np.sqrt(np.mean(samples**2))) == pytest.approx(level, abs=0.1)


def test_the_loss_is_the_same_for_a_quiet_copy_of_both_sides() -> None:
    torch.manual_seed(0)
    loss = SpectralLoss(24000)
    original = torch.from_numpy(tone(1.0, 150))[None]
    made = original + 0.02 * torch.randn_like(original)
    loud, quiet = (float(loss(level * made, level * original)[0]) for level in (1.0, 0.01))
    assert quiet == pytest.approx(loud, rel=1e-3)


def test_discriminators_learn_to_tell_noise_from_tones_and_resume(manifest: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    adversary = Adversary(2e-3)
    tones = torch.stack([torch.from_numpy(tone(0.5, pitch)) for pitch in (110, 160, 210)])
    losses = []
    for step in range(30):
        made, original = adversary.excerpts(0.1 * torch.randn_like(tones), tones)
        loss, features = adversary.learn(made, original, step)
        losses.append(float(loss))
    assert np.mean(losses[-5:]) < 0.5 * losses[0]
    made = made.requires_grad_()
    fooled, apart = adversary.generator_losses(made, features, 29)
    (fooled + apart).backward()
    assert made.grad is not None
    assert made.grad.abs().sum() > 0
    assert all(parameter.grad is None or not parameter.requires_grad for parameter in adversary.parameters())
    first = train(tiny(manifest, tmp_path, steps=4, adversarial_from=0.0))
    again = Trainer(tiny(manifest, tmp_path, steps=8, adversarial_from=0.0))
    assert again.resume()
    assert int(again.adversary.steps) == int(first.adversary.steps) == 4


def test_frames_start_symmetric_about_their_centre() -> None:
    config = MiMoConfig.from_json(CONFIG)
    decoder = make_model(config, 3).decoder
    assert decoder is not None
    log_magnitude, phase = decoder.vocoder.head.out.bias.detach().chunk(2)
    frame = torch.fft.irfft(torch.polar(log_magnitude.exp(), phase))
    assert int(frame.abs().argmax()) == config.nfft // 2


@given(frames=st.integers(1, 300), stride=st.sampled_from([1, 2]), pooler=st.sampled_from([1, 2, 3]))
def test_a_crop_fills_its_token_frames(frames: int, stride: int, pooler: int) -> None:
    config = MiMoConfig.from_json(
        {**CONFIG, "stride_size": stride, "avg_pooler": pooler, "decoder_stride_size": stride}
    )
    length = crop_length(config, frames)
    if length <= config.nfft // 2:
        return
    assert config.num_token_frames(config.num_mel_frames(length)) == frames
    assert config.num_token_frames(config.num_mel_frames(length + config.hop_length)) == frames + 1
    assert config.num_output_samples(frames) >= length


def test_crops_are_a_function_of_their_number(manifest: Path) -> None:
    config = MiMoConfig.from_json(CONFIG)
    files = read_manifest(manifest, manifest.parent)
    first, second = (Crops(Audio(files, 24000, room), config, 8, seed=5) for room in (0, 1 << 30))
    for index in (3, 0, 3, 7):
        for ours, theirs in zip(first[index], second[index], strict=True):
            assert np.array_equal(ours, theirs)
    samples, mel, target = first[3]
    assert samples.shape == (crop_length(config, 8),)
    assert samples.dtype == mel.dtype == np.float32
    assert np.array_equal(mel, log_mel(samples, config.mel))
    assert np.array_equal(target[:, :20], log_mel(samples[config.hop_length // 2 :], config.mel)[:, :20])
    assert not np.array_equal(samples, first[4][0])
    assert not np.array_equal(samples, Crops(Audio(files, 24000, 0), config, 8, seed=6)[3][0])
    assert max(np.abs(first[index][0]).max() for index in range(20)) <= 0.99


def test_batches_number_crops_without_gap_or_repeat() -> None:
    numbers = iter(BatchNumbers(2, 3))
    assert [next(numbers), next(numbers)] == [[6, 7, 8], [9, 10, 11]]


def test_a_file_that_cannot_be_read_is_left_out(
    manifest: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bad = tmp_path / "bad.wav"
    bad.write_bytes(b"not audio")
    audio = Audio([*read_manifest(manifest, manifest.parent), AudioFile(str(bad), 500.0)], 24000, 0)
    rng = np.random.default_rng(0)
    assert all(len(audio.draw(rng)) for _ in range(5))
    assert [record.message for record in caplog.records if "bad.wav" in record.message][1:] == []
    with pytest.raises(RunError, match="no file of the training manifest"):
        Audio([AudioFile(str(bad))], 24000, 0).draw(rng)


@pytest.mark.parametrize(
    ("text", "said"),
    [("", "no rows"), ("{}\n", "line 1"), ('{"wav": 3}\n', "line 1"), ("nonsense\n", "JSON"), ("[1]\n", "JSON array")],
)
def test_a_bad_manifest_is_named(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text(text)
    with pytest.raises(RunError, match=said):
        read_manifest(path, tmp_path)


def test_held_out_audio_must_be_readable(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text(json.dumps({"wav": str(tmp_path / "absent.wav"), "duration": 3}) + "\n")
    with pytest.raises(RunError, match="half a second"):
        load_utterances(path, tmp_path, MiMoConfig.from_json(CONFIG))


def test_the_loss_is_zero_for_a_copy_and_grows_with_noise() -> None:
    torch.manual_seed(0)
    loss = SpectralLoss(24000)
    original = torch.from_numpy(tone(0.5, 150))[None]
    noise = torch.randn_like(original)
    values = [float(loss(original + level * noise, original)[0]) for level in (0.0, 0.001, 0.01, 0.1)]
    assert abs(values[0]) < 1e-6
    assert values == sorted(values)
    assert values[1] > 0.01
    silence = torch.zeros_like(original).requires_grad_()
    loss(silence, original)[0].backward()
    assert silence.grad is not None
    assert silence.grad.isfinite().all()


def test_resolutions_in_turn_are_the_whole_loss_on_average() -> None:
    torch.manual_seed(0)
    loss = SpectralLoss(24000)
    original = torch.from_numpy(tone(0.5, 150))[None]
    made = original + 0.01 * torch.randn_like(original)
    count = len(RESOLUTIONS) * (len(RESOLUTIONS) - 1)
    in_turn = [float(loss(made, original, number)[0]) for number in range(count)]
    assert np.mean(in_turn) == pytest.approx(float(loss(made, original)[0]), rel=1e-4)


def test_the_shape_of_the_default_is_a_valid_config() -> None:
    config = MiMoConfig.from_json(dict(SMALL))
    assert config.sampling_rate / config.samples_per_frame == 25
    assert config.num_quantizers == 20


def test_the_command_trains_and_names_what_is_wrong(
    manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(CONFIG))
    flags = ["--out", str(tmp_path / "run"), "--config", str(config), "--num_workers", "0", "--device", "cpu"]
    flags += ["--batch_size", "2", "--token_frames", "8"]
    assert main(["--data", str(manifest), "--steps", "2", *flags]) == 0
    assert (tmp_path / "run" / "checkpoint" / "config.json").exists()
    assert main(["--data", str(tmp_path / "absent.jsonl"), *flags]) == 2
    assert "absent.jsonl: cannot be read" in capsys.readouterr().err
    config.write_text("[]")
    assert main(["--data", str(manifest), *flags]) == 2
    assert "JSON object" in capsys.readouterr().err


def test_calibration_leaves_no_change_of_level_on_average(manifest: Path, tmp_path: Path) -> None:
    trainer = Trainer(tiny(manifest, tmp_path))
    trainer.codebooks.start(torch.randn(200, CONFIG["d_model"]))
    utterances = [torch.from_numpy(tone(0.8, pitch)) for pitch in (120, 180, 240)]
    trainer.calibrate(utterances)
    assert trainer.calibrate(utterances) == pytest.approx(0.0, abs=0.01)
    assert abs(trainer.score(utterances, [3])["level_3"]) < 0.1
