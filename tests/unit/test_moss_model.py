"""MOSS against its definition in float64, batches, loading, and casting; on small random checkpoints."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from batch_tokenizer.codecs.checkpoint import Checkpoint
from batch_tokenizer.codecs.loading import LoadRequest
from batch_tokenizer.codecs.moss.codec import MossCodec, load_codec, load_model, open_spec, recognises
from batch_tokenizer.codecs.moss.layers import rotation
from batch_tokenizer.codecs.registry import find_family
from batch_tokenizer.records import RunError
from tests.support.moss import Reference, assert_codes_match, noise, patch, random_tensors, stage, tiny
from tests.support.moss import write_moss_checkpoint as write

CPU = torch.device("cpu")
LENGTHS = (1, 639, 640, 641, 16000, 40007)


def codec_of(
    folder: Path, task: str = "wav2token2wav", dtype: torch.dtype = torch.float32, threads: int = 1
) -> MossCodec:
    checkpoint = Checkpoint.open(str(folder))
    spec = open_spec(checkpoint)
    return load_codec(LoadRequest(checkpoint, spec, task=task, dtype=dtype, threads=threads))  # type: ignore[arg-type]


def encode(codec: MossCodec, lengths=LENGTHS, num_quantizers: int = 5) -> list[np.ndarray]:
    return codec.encode([codec.spec.features(noise(length, seed=length)) for length in lengths], num_quantizers)


ODD = tiny(
    sampling_rate=24000,
    downsample_rate=1920,
    causal_transformer_context_duration=0.5,
    encoder_kwargs=[patch(96), patch(5), stage(480, 40, 40, 4, layer_scale=None), patch(4), stage(160, 24, 24, 2)],
    decoder_kwargs=[stage(16, 160, 48, 2), patch(4), stage(40, 480, 40, 4, max_period=500), patch(480)],
    quantizer_kwargs={
        "codebook_dim": 24,
        "codebook_size": 50,
        "input_dim": 24,
        "num_quantizers": 3,
        "output_dim": 16,
        "rvq_dim": 24,
    },
)


@pytest.mark.parametrize("config", [tiny(), ODD], ids=["tiny", "odd"])
@pytest.mark.parametrize("capacity", [None, 128])
def test_equals_its_definition(tmp_path, config, capacity):
    tensors = random_tensors(config, seed=3)
    codec = codec_of(write(tmp_path, config, tensors))
    codec.model.capacity = capacity
    reference = Reference(config, tensors)
    books = config["quantizer_kwargs"]["num_quantizers"]
    for num_quantizers in (books, 2):
        codes = encode(codec, num_quantizers=num_quantizers)
        assert len(np.unique(np.concatenate(codes)[:, 0])) > 10
        samples = codec.decode(codes)
        for length, code, decoded in zip(LENGTHS, codes, samples, strict=True):
            wav = noise(length, seed=length)
            wanted = reference.encode(wav, num_quantizers)
            assert_codes_match(code, wanted)
            torch.testing.assert_close(
                codec.model.hidden(torch.from_numpy(wav)), wanted.hidden.float(), rtol=0, atol=2e-5
            )
            np.testing.assert_allclose(decoded, reference.decode(code), rtol=0, atol=2e-6)


def test_stereo_is_the_interleaved_sequence(tmp_path):
    tensors = random_tensors(tiny(), seed=4)
    stereo = tiny(sampling_rate=8000, downsample_rate=320, number_channels=2, enable_channel_interleave=True)
    codec, mono = (
        codec_of(write(tmp_path / "stereo", stereo, tensors)),
        codec_of(write(tmp_path / "mono", None, tensors)),
    )
    assert (codec.info.channels, codec.info.sample_rate, codec.info.frame_rate) == (2, 8000, 25)
    wavs = [noise(2 * length, seed=length).reshape(2, length) for length in LENGTHS]
    codes = codec.encode([codec.spec.features(wav) for wav in wavs], 5)
    single = mono.encode([mono.spec.features(wav.T.flatten()) for wav in wavs], 5)
    for wav, code, same in zip(wavs, codes, single, strict=True):
        np.testing.assert_array_equal(code, same)
        assert codec.spec.num_frames(wav.shape[1]) == len(code)
    for code, samples, same in zip(codes, codec.decode(codes), mono.decode(codes), strict=True):
        assert samples.shape == (2, codec.spec.num_output_samples(len(code)))
        np.testing.assert_array_equal(samples.T.flatten(), same)
    with pytest.raises(ValueError, match=r"must be \(2, S\)"):
        list(codec.encode_stream([[wavs[0][0]]], 5))


V2_NAMES = {"self_attn.in_projs.0": "self_attn.in_proj", "self_attn.out_projs.0": "self_attn.out_proj",
            "linear1": "ffn.0", "linear2": "ffn.2"}  # fmt: skip
OLDEST_NAMES = {
    "self_attn.in_projs.0.weight": "self_attn.in_proj_weight",
    "parametrizations.weight.original0": "weight_g",
    "parametrizations.weight.original1": "weight_v",
}


@pytest.mark.parametrize("names", [V2_NAMES, OLDEST_NAMES], ids=["v2", "oldest"])
def test_other_names_of_the_same_tensors(tmp_path, names):
    tensors = random_tensors(tiny())
    renamed = {}
    for name, tensor in tensors.items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        renamed[name] = tensor
    assert renamed.keys() != tensors.keys()
    codes = encode(codec_of(write(tmp_path / "renamed", tensors=renamed)))
    for code, same in zip(codes, encode(codec_of(write(tmp_path / "published", tensors=tensors))), strict=True):
        np.testing.assert_array_equal(code, same)


def test_a_projection_between_equal_sizes_is_used_where_the_checkpoint_has_one(tmp_path):
    config = tiny(encoder_kwargs=[patch(160), stage(160, 12, 24, 2), patch(4), stage(48, 20, 48, 2)])
    tensors = random_tensors(config)
    without = np.concatenate(encode(codec_of(write(tmp_path / "without", config, tensors))))
    tensors["encoder.3.input_proj.weight"] = torch.eye(48)
    same = np.concatenate(encode(codec_of(write(tmp_path / "same", config, tensors))))
    np.testing.assert_array_equal(same, without)
    tensors["encoder.3.input_proj.weight"] = torch.eye(48).flip(0)
    assert (np.concatenate(encode(codec_of(write(tmp_path / "other", config, tensors)))) != without).any()


def test_loudness_is_set_before_encoding_and_recorded(tmp_path):
    checkpoint = Checkpoint.open(str(write(tmp_path)))
    spec = open_spec(checkpoint).with_options({"loudness": "moss_tts"})
    wav = noise(5000)
    gain = np.clip(-20 - 10 * np.log10(np.mean(np.square(wav)) + 1e-9), -3, 3)
    np.testing.assert_allclose(spec.features(wav)[0], wav * 10 ** (gain / 20), rtol=1e-6)
    assert spec.settings == {"loudness": "moss_tts"}
    codec = MossCodec(spec, load_model(checkpoint, device=CPU))
    with pytest.raises(ValueError, match="loudness is of whole utterances"):
        next(codec.encode_stream([[wav]], 5))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("capacity", [None, 90])
def test_a_result_does_not_depend_on_the_batch_to_the_bit(tmp_path, capacity, threads):
    codec = codec_of(write(tmp_path), threads=threads)
    codec.model.capacity = capacity
    together = dict(zip(LENGTHS, encode(codec), strict=True))
    audio = dict(zip(LENGTHS, codec.decode(list(together.values())), strict=True))
    for lengths in ((640,), (40007, 1), LENGTHS[::-1], (16000, 16000, 641)):
        codes = encode(codec, lengths)
        for length, code, decoded in zip(lengths, codes, codec.decode(codes), strict=True):
            np.testing.assert_array_equal(code, together[length])
            np.testing.assert_array_equal(decoded, audio[length])


def test_of_equal_rows_the_first_wins(tmp_path):
    tensors = random_tensors(tiny())
    name = "quantizer.quantizers.0.codebook.weight"
    tensors[name] = tensors[name][torch.arange(32) % 7] * (1 + torch.arange(32) // 7).clamp(max=2)[:, None]
    codes = np.concatenate(encode(codec_of(write(tmp_path, tensors=tensors))))
    assert set(codes[:, 0]) == set(range(7))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_models_keep_the_quantizer_in_float32(tmp_path, dtype):
    folder = write(tmp_path)
    exact, codec = codec_of(folder), codec_of(folder, dtype=dtype)
    assert {parameter.dtype for parameter in codec.model.parameters()} == {dtype}
    hidden = torch.randn(50, 20)
    for model in (codec.model, exact.model.to(dtype)):
        assert {buffer.dtype for buffer in model.quantizer.buffers()} == {torch.float32, torch.int64}
    exact = codec_of(folder)
    codes = exact.model.quantizer.encode(hidden, 5)
    assert torch.equal(codec.model.quantizer.encode(hidden, 5), codes)
    assert torch.equal(codec.model.quantizer.decode(codes), exact.model.quantizer.decode(codes))
    wanted, got = encode(exact), encode(codec)
    assert [code.shape for code in got] == [code.shape for code in wanted]
    assert np.mean(np.concatenate(got)[:, 0] == np.concatenate(wanted)[:, 0]) > 0.8
    for decoded, better in zip(codec.decode(wanted), exact.decode(wanted), strict=True):
        assert decoded.dtype == np.float32
        assert np.abs(decoded - better).max() < 0.05 * np.abs(better).max()


def test_tasks_load_only_what_they_need(tmp_path):
    folder = write(tmp_path)
    whole = codec_of(folder)
    tokens, audio = codec_of(folder, "wav2token"), codec_of(folder, "token2wav")
    assert not [name for name in tokens.model.state_dict() if name.startswith("decoder")]
    assert not [name for name in audio.model.state_dict() if name.startswith("encoder")]
    codes = encode(tokens)
    for code, same in zip(codes, encode(whole), strict=True):
        np.testing.assert_array_equal(code, same)
    for decoded, same in zip(audio.decode(codes), whole.decode(codes), strict=True):
        np.testing.assert_array_equal(decoded, same)
    with pytest.raises(ValueError, match="without its decoder"):
        tokens.decode(codes)
    with pytest.raises(ValueError, match="without its encoder"):
        encode(audio)


@pytest.mark.parametrize("style", ["in_proj_weight", "in_proj.weight", "sharded", "bfloat16"])
def test_other_layouts_load(tmp_path, style):
    tensors = random_tensors(tiny())
    if style == "bfloat16":
        tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    wanted = encode(codec_of(write(tmp_path / "plain", tensors={n: t.float() for n, t in tensors.items()})))
    other = write(tmp_path / "other")
    if style in ("in_proj_weight", "in_proj.weight"):
        tensors = {
            name.replace("in_projs.0.weight", style).replace("out_projs.0.weight", "out_proj.weight"): tensor
            for name, tensor in tensors.items()
        }
    if style == "sharded":
        names = sorted(tensors)
        shards = {f"model-0000{part + 1}-of-00003.safetensors": names[part::3] for part in range(3)}
        for shard, members in shards.items():
            save_file({name: tensors[name] for name in members}, other / shard)
        index = {"weight_map": {name: shard for shard, members in shards.items() for name in members}}
        (other / "model.safetensors.index.json").write_text(json.dumps(index))
        (other / "model.safetensors").unlink()
    else:
        save_file(tensors, other / "model.safetensors")
    for code, same in zip(encode(codec_of(other)), wanted, strict=True):
        np.testing.assert_array_equal(code, same)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("encoder.1.transformer.layers.1.norm2.bias"),
            "lacks encoder.1.transformer.layers.1.norm2.bias",
        ),
        (lambda t: t.pop("quantizer.input_proj.bias"), "lacks quantizer.input_proj.bias"),
        (
            lambda t: t.pop("quantizer.quantizers.4.in_proj.parametrizations.weight.original0"),
            "lacks quantizer.quantizers.4.in_proj.parametrizations.weight.original0",
        ),
        (
            lambda t: t.update({"encoder.3.transformer.norm.weight": torch.ones(3)}),
            "has encoder.3.transformer.norm.weight",
        ),
        (
            lambda t: t.update({"decoder.0.output_proj.weight": torch.ones(48, 31)}),
            r"decoder.0.output_proj.weight has shape \(48, 31\), config.json implies \(48, 32\)",
        ),
    ],
)
@pytest.mark.parametrize("parts", [("encoder",), ("decoder",), ("encoder", "decoder")])
def test_a_checkpoint_that_differs_is_one_clear_error(tmp_path, change, message, parts):
    tensors = random_tensors(tiny())
    change(tensors)
    checkpoint = Checkpoint.open(str(write(tmp_path, tensors=tensors)))
    with pytest.raises(RunError, match=message):
        load_model(checkpoint, parts=parts, device=CPU)


def test_the_registry_finds_it(tmp_path):
    checkpoint = Checkpoint.open(str(write(tmp_path)))
    assert find_family(checkpoint).__name__.endswith("moss.codec")  # type: ignore[attr-defined]
    assert not recognises({"model_type": "moss_audio_tokenizer", "encoder_config": {}})
    info = open_spec(checkpoint).info
    assert (info.family, info.sample_rate, info.samples_per_frame) == ("moss", 16000, 640)
    assert info.codebook_sizes == (32,) * 5
    changed = write(tmp_path / "changed", seed=1)
    assert open_spec(Checkpoint.open(str(changed))).info.fingerprint != info.fingerprint


def test_codes_and_counts_out_of_range_are_named(tmp_path):
    codec = codec_of(write(tmp_path))
    good = np.zeros((3, 5), dtype=np.uint16)
    for bad, message in (
        (np.full((2, 5), 32, dtype=np.uint16), "utterance 1: a code is negative or not below its codebook's size"),
        (np.zeros((2, 6), dtype=np.uint16), r"utterance 1: codes have shape \(2, 6\)"),
        (np.zeros((2, 0), dtype=np.uint16), r"utterance 1: codes have shape \(2, 0\)"),
        (np.zeros((0, 5), dtype=np.uint16), r"utterance 1: codes have shape \(0, 5\)"),
    ):
        with pytest.raises(ValueError, match=message):
            codec.decode([good, bad])
    for count in (0, 6):
        with pytest.raises(ValueError, match="has 1 to 5"):
            encode(codec, (640,), num_quantizers=count)
    with pytest.raises(ValueError, match=r"features have shape \(1, 0\)"):
        codec.encode([np.zeros((1, 0), dtype=np.float32)], 5)


def test_rotation_is_the_published_formula_hours_into_a_recording():
    positions = torch.tensor([0, 1, 360_000, 3_600_000])
    frequencies = torch.exp(torch.arange(4, dtype=torch.float32) * (-np.log(10000.0) * 2 / 8))
    angles = positions.float()[:, None] * frequencies
    x = torch.randn(4, 2, 3, 8)
    turned = rotation(positions, 8, 10000.0).pairs(x)
    for pair in range(4):
        real, imaginary, angle = x[..., 2 * pair], x[..., 2 * pair + 1], angles[:, None, None, pair]
        assert torch.equal(turned[..., 2 * pair], real * angle.cos() - imaginary * angle.sin())
        assert torch.equal(turned[..., 2 * pair + 1], real * angle.sin() + imaginary * angle.cos())


def test_the_training_process_keeps_its_settings(tmp_path):
    model = codec_of(write(tmp_path)).model
    wav = torch.from_numpy(noise(5000)).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = model.encode_utterances([wav])[0]
    assert torch.equal(mixed, model.encode_utterances([wav.detach()])[0])
    assert not mixed.requires_grad
    assert not model.decode_utterances([mixed])[0].requires_grad
    assert torch.is_grad_enabled()
    assert not any(parameter.requires_grad for parameter in copy.deepcopy(model).parameters())


def test_published_names_are_what_the_module_has(tmp_path):
    from batch_tokenizer.codecs.moss.config import MossConfig
    from batch_tokenizer.codecs.moss.model import MossAudioTokenizer

    published = load_file(write(tmp_path) / "model.safetensors")
    assert set(MossAudioTokenizer(MossConfig.from_json(tiny())).state_dict()) == set(published)
