"""Our ONNX graphs of MOSS against the model in PyTorch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from batch_tokenizer.codecs.checkpoint import Checkpoint
from batch_tokenizer.codecs.loading import LoadRequest
from batch_tokenizer.codecs.moss.codec import MossCodec, load_codec, open_spec
from batch_tokenizer.codecs.onnx import codec as onnx_codec
from batch_tokenizer.codecs.onnx.export import export_moss
from batch_tokenizer.records import RunError
from tests.support.moss import noise, patch, stage, tiny, write_moss_checkpoint

LENGTHS = (40007, 1, 640, 16000, 639)

#: Projections and scales that are absent, a window of one row, layers of several blocks.
ODD = tiny(
    sampling_rate=24000,
    downsample_rate=1920,
    causal_transformer_context_duration=0.5,
    encoder_kwargs=[
        patch(96),
        patch(5),
        stage(480, 40, 40, 4, layer_scale=None),
        patch(4),
        stage(160, 24, 24, 2, context_duration=0.08),
    ],
    decoder_kwargs=[stage(24, 160, 48, 2), patch(4), stage(40, 480, 40, 4, max_period=500), patch(480)],
    quantizer_kwargs={
        "codebook_dim": 24,
        "codebook_size": 50,
        "input_dim": 24,
        "num_quantizers": 3,
        "output_dim": 24,
        "rvq_dim": 24,
    },
)


class Pair:
    """A model in PyTorch and its graphs in onnxruntime."""

    def __init__(self, folder: Path, config: dict | None = None, **options: int) -> None:
        source = write_moss_checkpoint(folder / "torch", config)
        checkpoint = Checkpoint.open(str(source))
        self.torch: MossCodec = load_codec(LoadRequest(checkpoint, open_spec(checkpoint)))
        self.folder = folder / "graphs"
        self.paths = export_moss(checkpoint, self.folder, **options)
        one_thread = onnxruntime.SessionOptions()
        one_thread.intra_op_num_threads = 1
        self.sessions = {path.stem: onnxruntime.InferenceSession(str(path), one_thread) for path in self.paths}

    def encode(self, waves: list[np.ndarray], count: int, filler: float = 0.0) -> list[np.ndarray]:
        batch = np.full((len(waves), max(map(len, waves))), filler, dtype=np.float32)
        for row, wave in zip(batch, waves, strict=True):
            row[: len(wave)] = wave
        feeds = {
            "audio": batch,
            "lengths": np.array([len(wave) for wave in waves]),
            "num_quantizers": np.array(count),
        }
        codes, frames = self.sessions["encoder"].run(None, feeds)
        assert codes.dtype == np.int64
        assert codes.shape == (len(waves), count, frames.max())
        for code, length in zip(codes, frames, strict=True):
            assert not code[:, length:].any()
        return [code[:, :length].T for code, length in zip(codes, frames, strict=True)]

    def decode(self, codes: list[np.ndarray], filler: int = 0) -> list[np.ndarray]:
        frames = np.array([len(code) for code in codes])
        batch = np.full((len(codes), codes[0].shape[1], frames.max()), filler, dtype=np.int64)
        for row, code in zip(batch, codes, strict=True):
            row[:, : len(code)] = code.T
        audio, lengths = self.sessions["decoder"].run(None, {"codes": batch, "code_lengths": frames})
        for row, length in zip(audio, lengths, strict=True):
            assert not row[length:].any()
        return [row[:length] for row, length in zip(audio, lengths, strict=True)]

    def steps(self, name: str, pieces: list[tuple[np.ndarray, np.ndarray]]) -> list[np.ndarray]:
        """Outputs of a step graph; each piece is an input and the frames before it."""
        session = self.sessions[f"{name}_step"]
        key = "audio" if name == "encoder" else "codes"
        batch = len(pieces[0][0])
        past = {
            port.name: np.zeros([batch if dim == "batch" else dim for dim in port.shape], dtype=np.float32)
            for port in session.get_inputs()
            if port.name.startswith("past_")
        }
        sizes = {name: value.shape for name, value in past.items()}
        outputs = []
        for piece, before in pieces:
            feeds = {key: piece, "frames_before": before, **past}
            if name == "encoder":
                feeds["num_quantizers"] = np.array(self.torch.info.num_codebooks)
            output, *present = session.run(None, feeds)
            past = {f"past_{index}": value for index, value in enumerate(present)}
            assert {name: value.shape for name, value in past.items()} == sizes, "the past grows"
            outputs.append(output)
        return outputs


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(tmp_path_factory.mktemp("onnx"))


def waves(lengths=LENGTHS) -> list[np.ndarray]:
    return [noise(length, seed=length) for length in lengths]


def assert_equal_to_torch(pair: Pair, members: list[np.ndarray], count: int, **filler: float) -> None:
    wanted = pair.torch.encode([wave[None] for wave in members], count)
    codes = pair.encode(members, count, **filler)
    for code, expected in zip(codes, wanted, strict=True):
        np.testing.assert_array_equal(code, expected)
    for samples, expected in zip(pair.decode(wanted), pair.torch.decode(wanted), strict=True):
        np.testing.assert_allclose(samples, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("count", [5, 2, 1])
def test_a_batch_of_mixed_lengths_equals_pytorch(pair, count):
    assert_equal_to_torch(pair, waves(), count)


@pytest.mark.parametrize("length", [1, 640, 641, 130000])
def test_one_utterance_equals_pytorch(pair, length):
    assert_equal_to_torch(pair, waves([length]), 5)


def test_what_is_beyond_a_length_changes_nothing(pair):
    assert_equal_to_torch(pair, waves(), 5, filler=7.0)
    codes = pair.torch.encode([wave[None] for wave in waves()], 5)
    for one, other in zip(pair.decode(codes), pair.decode(codes, filler=31), strict=True):
        np.testing.assert_array_equal(one, other)


def test_another_architecture(tmp_path):
    other = Pair(tmp_path, ODD)
    assert_equal_to_torch(other, waves([1, 1920, 300001]), 3)
    wave = waves([20 * 1920])[0]
    expected = other.torch.encode([wave[None]], 3)[0]
    pieces = [
        (wave[None, start : start + 7 * 1920], np.array([start // 1920])) for start in range(0, len(wave), 7 * 1920)
    ]
    np.testing.assert_array_equal(np.concatenate(other.steps("encoder", pieces), axis=2)[0].T, expected)


@pytest.mark.parametrize("frames", [1, 6, 70])
def test_steps_equal_one_pass(pair, frames):
    wave = waves([70 * 640])[0]
    codes = pair.torch.encode([wave[None]], 5)[0]
    samples = pair.torch.decode([codes])[0]
    starts = range(0, 70, frames)
    audio = [(wave[None, 640 * start : 640 * (start + frames)], np.array([start])) for start in starts]
    np.testing.assert_array_equal(np.concatenate(pair.steps("encoder", audio), axis=2)[0].T, codes)
    table = codes.T[None].astype(np.int64)
    tokens = [(table[:, :, start : start + frames], np.array([start])) for start in starts]
    found = np.concatenate(pair.steps("decoder", tokens), axis=1)[0]
    np.testing.assert_allclose(found, samples, rtol=0, atol=2e-6)


def test_streams_of_one_batch_may_be_at_different_places(pair):
    first, second = waves([60 * 640, 60 * 640 + 1])
    wanted = pair.torch.encode([first[None], second[None]], 5)
    session = pair.sessions["encoder_step"]
    count = np.array(5)

    def step(audio: np.ndarray, before: list[int], past: list[np.ndarray]) -> list[np.ndarray]:
        names = {f"past_{index}": value for index, value in enumerate(past)}
        return session.run(None, {"audio": audio, "frames_before": np.array(before), "num_quantizers": count, **names})

    ports = [port for port in session.get_inputs() if port.name.startswith("past_")]
    zeros = [np.zeros([1 if dim == "batch" else dim for dim in port.shape], dtype=np.float32) for port in ports]
    _, *past = step(first[None, : 30 * 640], [0], zeros)
    joined = [np.concatenate((one, other), axis=2) for one, other in zip(past, zeros, strict=True)]
    codes, *_ = step(np.stack((first[30 * 640 :], second[: 30 * 640])), [30, 0], joined)
    np.testing.assert_array_equal(codes[0].T, wanted[0][30:])
    np.testing.assert_array_equal(codes[1].T, wanted[1][:30])


def test_positions_go_on_where_they_were(pair):
    """Hours into a recording, rotation is not what it is at its beginning: positions must not start again."""
    near, far = (
        pair.steps("decoder", [(np.full((1, 5, 40), 3), np.array([before]))])[0] for before in (10_000, 900_000)
    )
    assert 1e-6 < np.abs(near - far).max() < 1e-2


def test_large_weights_lie_beside_the_graphs(tmp_path, pair):
    split = Pair(tmp_path, external_above=1000)
    assert sorted(path.name for path in split.folder.iterdir()) == [
        "decoder.onnx",
        "decoder.onnx.data",
        "decoder_step.onnx",
        "encoder.onnx",
        "encoder.onnx.data",
        "encoder_step.onnx",
    ]
    inside = sum(path.stat().st_size for path in pair.paths)
    outside = sum(path.stat().st_size for path in split.folder.glob("*.data"))
    assert outside < inside * 0.8, "a graph and its step graph share their weights"
    assert_equal_to_torch(split, waves([5000, 9000]), 5)
    export_moss(Checkpoint.open(str(tmp_path / "torch")), split.folder)
    assert not list(split.folder.glob("*.data")), "weights of an earlier export are left"


def test_graphs_describe_themselves(pair):
    info = onnx_codec.open_spec(Checkpoint.open(str(pair.folder))).info
    assert (info.sample_rate, info.samples_per_frame, info.codebook_sizes) == (16000, 640, (32,) * 5)
    assert info.fingerprint == pair.torch.info.fingerprint, "tokens are interchangeable with the torch checkpoint's"
    for path in pair.paths:
        model = onnx.load(path)
        assert model.opset_import[0].version >= 18
        metadata = {entry.key: entry.value for entry in model.metadata_props}
        assert metadata["batch_tokenizer.role"] == path.stem
        assert metadata["batch_tokenizer.codes"].startswith("(batch, codebooks, frames)")


def test_only_moss_is_exported(tmp_path):
    with pytest.raises(RunError, match="only MOSS checkpoints are exported"):
        export_moss(Checkpoint.open(None), tmp_path)
