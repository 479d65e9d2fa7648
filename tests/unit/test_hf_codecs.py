"""Codecs of transformers: tokens and audio as the library itself makes them of each utterance; lengths; errors."""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

transformers = pytest.importorskip("transformers")

from batch_tokenizer.codecs.checkpoint import Checkpoint  # noqa: E402
from batch_tokenizer.codecs.hf import codec as hf  # noqa: E402
from batch_tokenizer.codecs.hf import spectrum  # noqa: E402
from batch_tokenizer.codecs.hf.lengths import Chunks, Conv  # noqa: E402
from batch_tokenizer.codecs.loading import LoadRequest  # noqa: E402
from batch_tokenizer.codecs.registry import FAMILIES, find_family  # noqa: E402
from batch_tokenizer.records import RowError, RunError  # noqa: E402
from tests.support.hf import CONFIGS, library_audio, library_codes, save_checkpoint  # noqa: E402

#: Lengths of one batch, in samples; each of these the models take as they are.
MIXED = (2999, 640, 3201, 1999)

Samples = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Opened:
    """A checkpoint, the model that was saved, and our codec of it."""

    folder: Path
    model: Any
    spec: hf.HfSpec
    codec: hf.HfCodec


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as the command does on a CPU
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=list(CONFIGS))
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Opened:
    folder = tmp_path_factory.mktemp(request.param)
    return open_codec(folder, save_checkpoint(folder, request.param))


def open_codec(folder: Path, model: Any = None, **changes: Any) -> Opened:
    checkpoint = Checkpoint.open(str(folder))
    spec = pickle.loads(pickle.dumps(hf.open_spec(checkpoint)))
    return Opened(folder, model, spec, hf.load_codec(LoadRequest(checkpoint, spec, threads=2, **changes)))


def noise(num_samples: int, seed: int = 0) -> Samples:
    return np.random.default_rng(seed).normal(0, 0.3, num_samples).astype(np.float32)


def test_tokens_and_audio_equal_the_library_alone(opened: Opened) -> None:
    utterances = [noise(length, seed) for seed, length in enumerate(MIXED)]
    most = opened.spec.info.num_codebooks
    together = opened.codec.encode([opened.spec.features(samples) for samples in utterances], most)
    for samples, codes in zip(utterances, together, strict=True):
        assert codes.dtype == np.uint16
        np.testing.assert_array_equal(codes, library_codes(opened.model, samples))
        assert len(codes) == opened.spec.num_frames(len(samples))
    assert len(np.unique(together[0])) > 2  # the comparison would mean nothing if all codes were equal
    decoded = opened.codec.decode(together)
    for codes, samples in zip(together, decoded, strict=True):
        assert samples.dtype == np.float32
        expected = library_audio(opened.model, codes)  # whose last bits depend on how codes lie in memory
        np.testing.assert_allclose(samples, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_batches_give_what_each_utterance_has_alone(opened: Opened) -> None:
    """Of mixed lengths where the model allows it, else of equal ones; codes equal, audio within rounding."""
    hop = opened.spec.info.samples_per_frame
    mixed = [1, 2, hop - 1, hop, hop + 1, *np.random.default_rng(5).integers(3, 60 * hop, 6), 640, 640, 640]
    utterances = [noise(int(length), seed) for seed, length in enumerate(mixed)]
    features = [opened.spec.features(samples) for samples in utterances]
    opened.codec.batch_frames = 0
    alone = opened.codec.encode(features, opened.spec.info.num_codebooks)
    expected = opened.codec.decode(alone)
    opened.codec.batch_frames = 64
    together = opened.codec.encode(features[::-1], opened.spec.info.num_codebooks)[::-1]
    decoded = opened.codec.decode(alone)
    assert opened.spec.batching == (
        "padded" if opened.folder.name.startswith(("mimi", "encodec0", "dac")) else "equal lengths"
    )
    for codes, other, samples, audio in zip(alone, together, expected, decoded, strict=True):
        np.testing.assert_array_equal(codes, other)
        np.testing.assert_allclose(samples, audio, rtol=0, atol=1e-4 * np.abs(samples).max())


def test_fewer_codebooks_are_the_first_ones(opened: Opened) -> None:
    features = [opened.spec.features(noise(2999))]
    [codes] = opened.codec.encode(features, opened.spec.info.num_codebooks)
    for used in range(1, opened.spec.info.num_codebooks):
        [fewer] = opened.codec.encode(features, used)
        np.testing.assert_array_equal(fewer, codes[:, :used])
        if used == 1:
            [samples] = opened.codec.decode([fewer])
            expected = library_audio(opened.model, fewer)
            np.testing.assert_allclose(samples, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_lengths_are_the_models(opened: Opened) -> None:
    hop = opened.spec.info.samples_per_frame
    for length in (1, 2, hop - 1, hop, hop + 1, 2 * hop + 79, 401, 1153, 1200, 1201, 2353):
        samples = noise(length)
        features = opened.spec.features(samples)
        given = opened.spec.lengths.inputs(torch.from_numpy(features[None]))[0].flatten().numpy()
        np.testing.assert_array_equal(given[:length], samples)
        assert not given[length:].any()
        [codes] = opened.codec.encode([features], 1)  # raises if the number of frames is not as computed
        assert len(codes) == opened.spec.num_frames(length)
        [decoded] = opened.codec.decode([codes])
        assert len(decoded) == opened.spec.num_output_samples(len(codes))


def test_longer_inputs_make_as_many_frames_as_the_configuration_says(opened: Opened) -> None:
    frames = [opened.spec.num_frames(length) for length in range(1, 20_000)]
    assert frames[0] >= 1
    assert frames == sorted(frames)


def test_bfloat16_runs(opened: Opened) -> None:
    if isinstance(opened.spec.lengths, Chunks):
        assert "float32 only" in refusal(opened.folder, dtype=torch.bfloat16)
        return
    codec = open_codec(opened.folder, dtype=torch.bfloat16).codec
    [codes] = codec.encode([opened.spec.features(noise(2999))], 1)
    [samples] = codec.decode([codes])
    assert samples.dtype == np.float32
    assert np.isfinite(samples).all()


@given(st.integers(1, 12), st.integers(1, 6), st.integers(0, 5), st.integers(0, 1), st.integers(12, 60))
def test_convolution_lengths_are_torchs(kernel: int, stride: int, padding: int, extra: int, length: int) -> None:
    sizes = {"kernel_size": kernel, "stride": stride, "padding": padding, "device": "meta"}
    values = torch.empty(1, 1, length, device="meta")
    conv = Conv(kernel, stride, padding, extra % stride)
    assert conv(length) == torch.nn.Conv1d(1, 1, **sizes)(values).shape[-1]
    if conv.transposed(length) > 0:
        back = torch.nn.ConvTranspose1d(1, 1, output_padding=extra % stride, **sizes)
        assert conv.transposed(length) == back(values).shape[-1]


def test_chunks_that_end_inside_their_overlap_cannot_be_decoded() -> None:
    chunks = Chunks(hop=40, length=1200, stride=1100)
    assert chunks.output_samples(30) == 1200
    assert chunks.output_samples(33) == 1100 + 120
    with pytest.raises(RowError, match="32 frames end in a chunk of 2"):
        chunks.output_samples(32)


@pytest.mark.parametrize(
    ("kind", "config", "quantizers", "hop", "frames", "samples"),
    [
        ("mimi", {}, 32, 1920, 125, 240_000),
        ("encodec", {}, 32, 320, 750, 240_000),
        (
            "encodec",
            {
                "target_bandwidths": [2.2], "sampling_rate": 32000, "upsampling_ratios": [8, 5, 4, 4],
                "codebook_size": 2048,
            },
            4, 640, 500, 320_000,
        ),
        ("dac", {"sampling_rate": 44100}, 9, 512, 861, 440_832),
        ("xcodec", {}, 8, 320, 500, 160_000),
        (
            "higgs_audio_v2_tokenizer",
            {
                "target_bandwidths": [0.5, 1, 1.5, 2],
                "acoustic_model_config": {
                    "model_type": "dac", "downsampling_ratios": [8, 5, 4, 2, 3], "upsampling_ratios": [8, 5, 4, 2, 3],
                },
            },
            8, 960, 250, 240_000,
        ),
        ("xcodec2", {}, 1, 320, 501, 160_320),
        ("neucodec", {}, 1, 320, 500, 240_000),
    ],
)  # fmt: skip
def test_published_sizes(
    kind: str, config: dict[str, Any], quantizers: int, hop: int, frames: int, samples: int
) -> None:
    """Ten seconds of audio, at the sizes of the published checkpoints."""
    adapter = hf.KINDS[kind]
    opened = getattr(transformers, adapter.model_class).config_class(**config)
    lengths = adapter.lengths(opened, {})
    ten_seconds = 10 * adapter.sample_rates(opened)[0]
    assert (len(adapter.codebook_sizes(opened)), lengths.hop) == (quantizers, hop)
    assert lengths.input_length(ten_seconds) == ten_seconds
    assert lengths.frames(ten_seconds) == frames
    assert lengths.output_samples(frames) == samples


def test_short_inputs_of_neucodec() -> None:
    strides = [Conv(2 * stride, stride, -(-stride // 2)) for stride in (2, 2, 4, 4, 5)]
    lengths = spectrum.SpectrumAndWaveform(320, 320, 16000, tuple(strides), 0, trims=True, output_hop=480)
    assert [lengths.input_length(samples) for samples in (1, 319, 320, 16000)] == [320, 320, 320, 16000]
    assert [lengths.frames(samples) for samples in (319, 320, 639, 640, 16000)] == [0, 1, 1, 2, 50]
    assert lengths.output_samples(50) == 24000


def test_neucodec_has_a_rate_for_each_direction(opened: Opened) -> None:
    info = opened.spec.info
    if opened.spec.kind == "neucodec":
        assert (info.sample_rate, info.output_sample_rate, info.frame_rate) == (16000, 24000, 50)
    else:
        assert info.output_sample_rate == info.sample_rate


def test_the_feature_extractors_padding_is_used_if_the_checkpoint_has_one(tmp_path: Path) -> None:
    model = save_checkpoint(tmp_path, "dac")
    bare = hf.open_spec(Checkpoint.open(str(tmp_path)))
    extractor = transformers.DacFeatureExtractor(sampling_rate=16000, hop_length=30)
    extractor.save_pretrained(tmp_path)
    padded = open_codec(tmp_path, model)
    samples = noise(1001)
    inputs = extractor(samples, sampling_rate=16000, return_tensors="pt")
    with torch.inference_mode():
        expected = model.encode(inputs["input_values"]).audio_codes[0].T.numpy()
    [codes] = padded.codec.encode([padded.spec.features(samples)], 4)
    np.testing.assert_array_equal(codes, expected)
    assert (len(codes), bare.num_frames(1001)) == (34, 33)
    assert padded.spec.info.fingerprint != bare.info.fingerprint


def write_config(folder: Path, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def refusal(folder: Path, **changes: Any) -> str:
    """The one line with which opening and loading a checkpoint ends."""
    with pytest.raises(RunError) as raised:
        open_codec(folder, **changes)
    assert "\n" not in str(raised.value)
    assert str(folder) in str(raised.value) or changes
    return str(raised.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "pocket_tts_audio_tokenizer"}, "continuous latents"),
        ({"model_type": "vibevoice_acoustic_tokenizer"}, "continuous latents"),
        ({"model_type": "encodec", "normalize": True, "chunk_length_s": 1.0, "overlap": 0.01}, "encodec_24khz"),
        ({"model_type": "encodec", "chunk_length_s": 1.0, "overlap": 0.8}, "overlap must be 0 to 0.5"),
        ({"model_type": "dac", "sampling_rate": "often"}, "transformers refuses config.json"),
        ({"model_type": "mimi", "codebook_size": 1000}, "power of 2"),
        ({"model_type": "xcodec2", "quantization_levels": [16] * 5}, "65536 codes"),
        ({"model_type": "xcodec2", "downsampling_ratios": [2, 3]}, "cannot take"),
    ],
)
def test_configurations_that_cannot_be_used(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    assert message in refusal(write_config(tmp_path, **config))


def test_a_missing_library_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    folder = write_config(tmp_path, model_type="mimi")
    family = find_family(Checkpoint.open(str(folder)))
    with pytest.raises(RunError, match=r"pip install 'batch_tokenizer\[transformers\]'"):
        family.open_spec(Checkpoint.open(str(folder)))


def test_a_library_without_the_model_is_named_with_its_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf, "KINDS", {"mimi": hf.KINDS["mimi"].__class__("NoSuchModel", *[lambda *_: None] * 4)})
    assert f"transformers {transformers.__version__} has no usable NoSuchModel" in refusal(
        write_config(tmp_path, model_type="mimi")
    )


def test_unknown_types_are_of_no_family(tmp_path: Path) -> None:
    folder = write_config(tmp_path, model_type="bert")
    with pytest.raises(RunError, match=r"model_type bert.*known: .*mimo, moss"):
        find_family(Checkpoint.open(str(folder)))


def test_other_families_are_found_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf, "recognises", lambda config: pytest.fail("asked although another family knows it"))
    assert find_family(Checkpoint.open(None)) is not hf
    assert list(FAMILIES)[-1] == "transformers"  # its question about unknown types imports the library


def test_audio_tokenizers_of_the_library_that_have_no_adapter_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_config(tmp_path, model_type="brand_new")
    monkeypatch.setattr(hf, "_is_audio_tokenizer", lambda kind: kind == "brand_new")
    assert hf.recognises(Checkpoint.open(str(folder)).config)
    assert "knows brand_new as an audio tokenizer" in refusal(folder)


def test_weights_that_are_not_as_they_should_be(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_checkpoint(tmp_path, "dac")
    path = tmp_path / "model.safetensors"
    whole = load_file(path)
    name = "encoder.conv1.weight"
    save_file({key: value for key, value in whole.items() if key != name}, path, {"format": "pt"})
    assert f"lacks {name}" in refusal(tmp_path)
    save_file({**whole, name: torch.zeros(3, 1, 7)}, path, {"format": "pt"})
    assert f"{name} has shape (3, 1, 7), config.json implies (4, 1, 7)" in refusal(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "upsampling_ratios": []}))
    assert "transformers cannot load it" in refusal(tmp_path)  # an UnboundLocalError there
    (tmp_path / "config.json").write_text(json.dumps(config))
    path.write_bytes(path.read_bytes()[:1000])
    assert "cannot be read as safetensors" in refusal(tmp_path)
    path.unlink()
    assert "has none of model.safetensors" in refusal(tmp_path)


def test_settings_that_contradict_the_model(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "dac")
    assert "--attention torch_varlen" in refusal(tmp_path, attention="torch_varlen")
    (tmp_path / "preprocessor_config.json").write_text('{"sampling_rate": 44100}')
    assert "config.json says 16000 Hz, preprocessor_config.json 44100 Hz" in refusal(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("[]")
    assert "must hold a JSON object" in refusal(tmp_path)


def test_half_a_mimi_does_half_the_tasks(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "mimi", decoder_config=None)
    assert "has no decoder" in refusal(tmp_path)
    half = open_codec(tmp_path, task="wav2token")
    [codes] = half.codec.encode([half.spec.features(noise(500))], 5)
    assert codes.shape == (11, 5)


@pytest.mark.parametrize("name", ["Xcodec2", "NeuCodec"])
def test_spectra_of_loader_workers_are_the_feature_extractors_to_the_bit(name: str) -> None:
    extractor = getattr(transformers, f"{name}FeatureExtractor")()
    config = getattr(transformers, f"{name}Model").config_class()
    lengths = hf.KINDS[name.lower()].lengths(config, {})
    for num_samples in (1, 319, 320, 639, 640, 641, 1000, 16000, 48123):
        samples = noise(num_samples)
        features = lengths.features(samples)
        given = lengths.input_length(num_samples)
        theirs = extractor(np.pad(samples, (0, given - num_samples)), sampling_rate=16000, return_tensors="pt")
        ours = lengths.inputs(torch.from_numpy(features[None]))
        for key, value in zip(("input_values", "input_features", "input_features_mask"), ours, strict=True):
            np.testing.assert_array_equal(value, theirs[key], err_msg=f"{key} of {num_samples} samples")
        assert lengths.takes(features.shape[1])
        assert not lengths.takes(features.shape[1] - 1)
        assert lengths.feature_frames(features.shape[1]) == lengths.frames(given)


def test_a_feature_extractor_that_is_not_known_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, "xcodec2")
    transformers.Xcodec2FeatureExtractor().save_pretrained(tmp_path)
    open_codec(tmp_path)
    ours = spectrum.kaldi_log_mel
    monkeypatch.setattr(spectrum, "kaldi_log_mel", lambda *arguments: ours(*arguments).square())
    assert "makes other input_features than are known here" in refusal(tmp_path)
