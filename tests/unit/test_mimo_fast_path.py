"""What makes MiMo fast on CUDA, as far as a CPU can show it: fixed shapes, compiled layers, no copies that wait."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from torch._dynamo.exc import TorchDynamoException
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from batch_tokenizer.codecs.layers.packed import Rotation
from batch_tokenizer.codecs.mimo.codec import MiMoCodec
from batch_tokenizer.codecs.mimo.compiled import CompiledLayers, compile_stack
from batch_tokenizer.codecs.mimo.config import MiMoConfig
from batch_tokenizer.codecs.mimo.decoder import InverseSTFT, overlap_add
from batch_tokenizer.codecs.mimo.layers import TransformerStack
from batch_tokenizer.codecs.mimo.sized import random_model
from batch_tokenizer.kernels import segments as segments_module
from batch_tokenizer.kernels.segments import GappedAxis, Segments, to_device
from tests.support.checkpoints import TINY


@pytest.fixture(scope="module")
def config():
    return MiMoConfig.from_json(TINY)


@pytest.fixture(scope="module")
def model(config):
    return random_model(config)


class MatrixShapes(TorchDispatchMode):
    """The shapes of all matrix products, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[tuple[int, ...], ...]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.shapes.append(tuple(tuple(arg.shape) for arg in args if isinstance(arg, torch.Tensor)))
        return function(*args, **(kwargs or {}))


def random_mels(config: MiMoConfig, lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(config.n_mels, length, generator=generator) - 3 for length in lengths]


def test_every_matrix_product_of_a_pack_has_one_shape(config):
    """So that one kernel computes it, and a row's bits cannot depend on what it is packed with."""
    model = random_model(config)
    model.capacity = 128
    seen = []
    for lengths in ((40, 90, 17), (400,), (1,) * 9, (8, 12, 16, 300)):
        with MatrixShapes() as encoding:
            codes = model.encode_utterances(random_mels(config, lengths))
        with MatrixShapes() as decoding:
            model.decode_utterances(codes)
        seen.append((encoding.shapes, decoding.shapes))
    assert len(seen[0][0]) > 10
    assert len(seen[0][1]) > 10
    for other in seen[1:]:
        assert other == seen[0]


def stack(layers=3, norm="LayerNorm"):
    torch.manual_seed(0)
    return TransformerStack(layers, 32, 2, 64, (5, 3), False, norm, 1e4).requires_grad_(False)


@pytest.mark.parametrize("norm", ["LayerNorm", "RMSNorm"])
def test_layers_are_compiled_once_and_whole(norm):
    """Traced without a break, whatever begins and ends where, and shared by all layers of a stack."""
    layers, x = stack(norm=norm), torch.randn(96, 32)
    torch._dynamo.reset()
    counters.clear()
    with torch.inference_mode():
        packs = [Segments(lengths) for lengths in ([50, 30, 16], [96], [1] * 96)]
        expected = [layers(x.clone(), segments) for segments in packs]
        compile_stack(layers, 96, backend="aot_eager")
        for segments, want in zip(packs, expected, strict=True):
            torch.testing.assert_close(layers(x.clone(), segments), want, atol=1e-5, rtol=0)
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]


def test_a_longer_axis_runs_uncompiled(config):
    """A recording longer than a pack has an axis of its own: any number of those lengths compiles nothing new."""
    model = random_model(config)
    model.capacity = capacity = 32
    torch._dynamo.reset()
    counters.clear()
    for name, rows in (("encoder", 1), ("decoder", 1), ("vocoder", config.decoder_stride_size)):
        owner = {"encoder": model.encoder, "decoder": model.decoder, "vocoder": model.decoder.vocoder}[name]
        compile_stack(owner.layers, capacity * config.avg_pooler * rows, backend="aot_eager")
    compiled = counters["stats"]["unique_graphs"]
    uncompiled = random_model(config)
    uncompiled.capacity = capacity
    with torch.inference_mode():
        for packs in range(1, 12):
            mels = random_mels(config, [packs * capacity * config.stride_size * config.avg_pooler - 2])
            codes = model.encode_utterances(mels)
            model.decode_utterances(codes)
            if packs > 1:
                assert all(map(torch.equal, codes, uncompiled.encode_utterances(mels)))
    assert counters["stats"]["unique_graphs"] == compiled


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_kernels_equal_the_layers():
    layers, x = stack(2), torch.randn(96, 32)
    torch._dynamo.reset()
    with torch.inference_mode():
        expected = layers(x.clone(), Segments([50, 46]))
        compile_stack(layers, 96)
        torch.testing.assert_close(layers(x.clone(), Segments([50, 46])), expected, atol=1e-5, rtol=0)


def failing(monkeypatch, error):
    """Makes every compiled half of a layer raise ``error``."""

    def broken(*arguments):
        raise error

    monkeypatch.setattr(torch, "compile", lambda *arguments, **options: broken)


def test_layers_run_as_they_are_where_compiling_fails(monkeypatch, caplog, model, config):
    mels = random_mels(config, [40])
    expected = model.encode_utterances(mels)
    failing(monkeypatch, TorchDynamoException("no compiler here\nmore of it"))
    codec = MiMoCodec(None, model)
    codec.compile_layers()
    assert not codec.compiled
    (record,) = caplog.records
    assert "no compiler here" in record.getMessage()
    assert torch.equal(model.encode_utterances(mels)[0], expected[0])


def test_a_lack_of_memory_is_no_failed_compilation(monkeypatch):
    error = TorchDynamoException("backend failed")
    error.__cause__ = torch.OutOfMemoryError("CUDA out of memory")
    failing(monkeypatch, error)
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        compile_stack(stack(), 20)


def test_joined_projections_equal_single_ones(config):
    """Within rounding, and without a second copy of the weights."""
    model, joined = random_model(config), random_model(config)
    joined.join_projections()
    mel = random_mels(config, [200])[0]
    torch.testing.assert_close(joined.hidden(mel), model.hidden(mel), atol=1e-5, rtol=0)
    attention = joined.encoder.layers[0].self_attn
    assert attention.k_proj.weight.untyped_storage().data_ptr() == attention.joined[0].untyped_storage().data_ptr()
    assert joined.state_dict().keys() == model.state_dict().keys()


def test_only_large_models_on_cuda_are_compiled(model, config):
    codec = MiMoCodec(None, model)
    assert not isinstance(codec.model.encoder.layers.run_layer, CompiledLayers)


def test_rotation_turns_halves_by_position():
    positions = torch.tensor([0, 1, 7])
    x = torch.randn(3, 2, 8)
    turned = Rotation(positions, 8, 100.0)(x)
    for row, position in enumerate(positions.tolist()):
        for pair in range(4):
            angle = position * 100.0 ** (-2 * pair / 8)
            complex_in = torch.complex(x[row, :, pair], x[row, :, pair + 4])
            complex_out = complex_in * torch.polar(torch.tensor(1.0), torch.tensor(angle))
            torch.testing.assert_close(turned[row, :, pair], complex_out.real)
            torch.testing.assert_close(turned[row, :, pair + 4], complex_out.imag)


@pytest.mark.parametrize("trim", [360, 480, 100])
@pytest.mark.parametrize("lengths", [[5], [3, 2, 12, 40], [7, 200, 33]])
def test_blocks_of_samples_are_gathered_as_single_samples_would_be(lengths, trim):
    """Equal to the bit to each utterance's own inverse transform, also where the trim is no multiple of the hop."""
    transform, hop = InverseSTFT(960), 240
    spectrum = torch.randn(sum(lengths), 481, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    samples, segments = transform(spectrum, Segments(lengths), hop, trim)
    alone = [transform(part, Segments([len(part)]), hop, trim)[0] for part in spectrum.split(lengths)]
    assert segments.lengths.tolist() == [len(part) for part in alone]
    frames = torch.fft.irfft(spectrum, n=960, dim=1) * transform.window
    first = overlap_add(frames[: lengths[0]], hop) / overlap_add(
        transform.window.square().expand(lengths[0], -1).contiguous(), hop
    )
    assert torch.equal(samples, torch.cat(alone))
    torch.testing.assert_close(alone[0], first[trim : len(first) - trim], equal_nan=True)


@pytest.mark.parametrize(("width", "hop"), [(960, 240), (400, 160), (7, 7)])
@pytest.mark.parametrize("lengths", [[9], [1], [3, 1, 12]])
def test_the_envelope_is_the_squared_windows_overlap(width, hop, lengths):
    transform = InverseSTFT(width)
    axis = GappedAxis.spaced(lengths, -(-width // hop) - 1, "cpu")
    squared = transform.window.square().expand(sum(lengths), -1)
    assert torch.equal(transform._envelope(axis, hop), overlap_add(axis.scatter(squared), hop))


def test_host_arrays_reach_a_device_from_pinned_memory(monkeypatch):
    pinned = []

    class Recorder(torch.Tensor):
        def pin_memory(self):
            pinned.append(len(self))
            return self

        def to(self, device, non_blocking=False):
            assert non_blocking
            return self

    monkeypatch.setattr(segments_module.torch, "from_numpy", lambda array: torch.tensor(array).as_subclass(Recorder))
    to_device(np.arange(3), "cuda")
    to_device(np.arange(5), "cpu")
    assert pinned == [3]
