"""MiMo on small random checkpoints: shapes that the golden one does not have, loading, the published interface."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import conv1d, conv_transpose1d, gelu

import batch_tokenizer
from batch_tokenizer.codecs.checkpoint import Checkpoint
from batch_tokenizer.codecs.layers.packed import convolve
from batch_tokenizer.codecs.mimo.codec import load_model
from batch_tokenizer.codecs.mimo.config import MiMoConfig
from batch_tokenizer.codecs.mimo.quantizer import Codebook
from batch_tokenizer.codecs.registry import find_family
from batch_tokenizer.records import RunError
from tests.support.checkpoints import TINY, random_mimo, write_mimo_checkpoint

VARIANTS = {
    "causal encoder, windows, 80 mels": {
        "encoder_causal": True, "encoder_attn_window_size": [20, -1], "decoder_attn_window_size": [16, 0], "n_mels": 80,
        "vocoder_attn_window_size": [7, 3],
    },
    "no pooling": {"avg_pooler": 1},
    "pooling by three, stride one": {"avg_pooler": 3, "stride_size": 1},
    "kernel 5": {"kernel_size": 5},
    "kernel 1": {"kernel_size": 1},
    "decoder kernel 6, stride 4": {"decoder_kernel_size": 6, "decoder_stride_size": 4},
    "decoder kernel 2, stride 2": {"decoder_kernel_size": 2},
    "RMSNorm, no skip": {"ln_type": "RMSNorm", "encoder_skip_layer_id": None},
    "centred inverse transform": {"vocoder_padding": "center"},
    "16 kHz, hop not dividing the window": {
        "sampling_rate": 16000, "hop_length": 160, "nfft": 400, "window_size": 400, "fmin": 50, "fmax": 7600,
    },
}  # fmt: skip


def mels(config: MiMoConfig, lengths=(3, 4, 5, 8, 16, 17, 90, 1)) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(config.n_mels, length, generator=generator) - 3 for length in lengths]


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_packing_changes_nothing(changes):
    config = MiMoConfig.from_json({**TINY, **changes})
    model = random_mimo(config)
    utterances = mels(config, (5, 8, 9, 12, 16, 17, 90, 7))
    model.capacity = None
    alone = model.encode_utterances(utterances)
    wavs = model.decode_utterances(alone)
    for utterance, codes, wav in zip(utterances, alone, wavs, strict=True):
        assert len(codes) == config.num_token_frames(utterance.shape[1])
        assert len(wav) == config.num_output_samples(len(codes))
        assert torch.isfinite(wav).all()
    for capacity in (40, 512):
        model.capacity = capacity
        packed = model.encode_utterances(utterances[::-1])[::-1]
        assert all(torch.equal(a, b) for a, b in zip(alone, packed, strict=True))
        for a, b in zip(wavs, model.decode_utterances(packed), strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


@pytest.mark.parametrize("capacity", [64, 256, "auto"])
def test_one_shape_gives_the_same_bits_whatever_the_neighbours(capacity):
    """What CUDA relies on in bfloat16: with a fixed capacity a row's bits do not depend on what it is packed with."""
    config = MiMoConfig.from_json(TINY)
    model = random_mimo(config)
    model.capacity = capacity
    utterances = mels(config)
    together = model.encode_utterances(utterances)
    samples = model.decode_utterances(together)
    for index in range(len(utterances)):
        assert torch.equal(model.encode_utterances([utterances[index]])[0], together[index])
        assert torch.equal(model.decode_utterances([together[index]])[0], samples[index])


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (5, 2), (1, 1), (4, 3)])
def test_convolution_as_a_matrix_product(kernel, stride):
    torch.manual_seed(0)
    layer = torch.nn.Conv1d(6, 4, kernel, stride=stride, padding=1)
    rows = torch.randn(23, 6)
    torch.testing.assert_close(convolve(rows, layer), layer(rows.t()[None])[0].t())


def test_encoder_equals_the_equations_written_with_torchs_own_modules():
    """An independent reading of the specification, one utterance, plain convolutions and masks."""
    config = MiMoConfig.from_json({**TINY, "encoder_attn_window_size": [9, 2]})
    model = random_mimo(config)
    encoder = model.encoder
    mel = mels(config, (45,))[0]
    x = gelu(conv1d(mel[None], encoder.conv1.weight, encoder.conv1.bias, padding=1))
    x = gelu(conv1d(x, encoder.conv2.weight, encoder.conv2.bias, stride=2, padding=1))[0].t()
    length, heads, size = len(x), 2, 16
    frequency = 1.0 / 10000 ** (torch.arange(0, size, 2) / size)
    angle = torch.outer(torch.arange(length), frequency).repeat(1, 2)
    i, j = torch.arange(length)[:, None], torch.arange(length)[None]
    mask = (j >= i - 9) & (j <= i + 2)

    def rotate(t):
        turned = torch.cat((-t[..., size // 2 :], t[..., : size // 2]), dim=-1)
        return t * angle.cos() + turned * angle.sin()

    for number, layer in enumerate(encoder.layers, start=1):
        h = layer.self_attn_layer_norm(x)
        q, k, v = (
            p(h).view(length, heads, size).transpose(0, 1)
            for p in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)
        )
        scores = (rotate(q) @ rotate(k).transpose(1, 2) / size**0.5).masked_fill(~mask, -torch.inf)
        x = x + layer.self_attn.out_proj((scores.softmax(-1) @ v).transpose(0, 1).reshape(length, -1))
        x = x + layer.fc2(gelu(layer.fc1(layer.final_layer_norm(x))))
        if number == 2:
            skip = x
    x = encoder.layer_norm(x + skip)
    x = torch.cat([x, x.new_zeros(1, 32)]).t()[None]  # 23 frames, padded to 24
    x = gelu(conv1d(x, encoder.down_sample_layer[0].weight, stride=2))[0].t()
    torch.testing.assert_close(model.hidden(mel), encoder.down_sample_norm(x), atol=1e-5, rtol=0)


def test_up_sampling_counts_the_frames_it_cuts_in_its_statistics():
    config = MiMoConfig.from_json(TINY)
    decoder = random_mimo(config).decoder
    rows = torch.randn(7, 32)
    from batch_tokenizer.kernels.segments import Segments

    ours, segments = decoder.dconv2(rows, Segments([7]))
    full = conv_transpose1d(rows.t()[None], decoder.dconv2.conv.weight, decoder.dconv2.conv.bias, stride=2)
    assert full.shape[-1] == 15
    normed = torch.nn.functional.group_norm(full, 1, decoder.dconv2.norm.weight, decoder.dconv2.norm.bias)
    torch.testing.assert_close(ours, normed[0, :, :14].t(), atol=1e-5, rtol=0)
    assert segments.lengths.tolist() == [14]


def test_of_equal_codebook_rows_the_first_wins():
    codebook = Codebook(70, 5)
    codebook.embed.copy_(torch.randn(70, 5))
    codebook.embed[[9, 33, 69]] = codebook.embed[2].clone()
    rows = codebook.embed[[69, 33, 2, 9, 50]] + 1e-3
    assert codebook.nearest(rows).tolist() == [2, 2, 2, 2, 50]
    codebook.embed[50] = codebook.embed[4].clone()  # in place, as training does: the choice must follow
    assert codebook.nearest(codebook.embed[[50]]).tolist() == [4]


def test_sixteen_bit_casts_leave_codebooks_and_window_alone(tmp_path):
    model = batch_tokenizer.load_model(write_mimo_checkpoint(tmp_path))
    before = model.encoder.quantizer.codebooks[0].embed.clone()
    model.bfloat16()
    assert model.encoder.conv1.weight.dtype == torch.bfloat16
    assert torch.equal(model.encoder.quantizer.codebooks[0].embed, before)
    assert model.decoder.vocoder.head.istft.window.dtype == torch.float32
    utterances = mels(model.config)
    codes = model.encode_utterances(utterances)
    assert all(wav.dtype == torch.float32 and torch.isfinite(wav).all() for wav in model.decode_utterances(codes))


def test_bfloat16_stays_close_to_float32(tmp_path):
    model = batch_tokenizer.load_model(write_mimo_checkpoint(tmp_path))
    mel = mels(model.config, (200,))[0]
    exact = model.hidden(mel)
    rounded = model.bfloat16().hidden(mel).float()
    assert (exact - rounded).square().mean().sqrt() < 0.03 * exact.square().mean().sqrt()


class TestPublishedInterface:
    @pytest.fixture
    def model(self, tmp_path):
        return batch_tokenizer.load_model(write_mimo_checkpoint(tmp_path))

    def test_an_utterance_is_the_same_alone_and_in_a_batch(self, model):
        utterances = mels(model.config)
        batch, lengths = batch_tokenizer.padding(utterances)
        codes, codes_lens, stats = model.encode(batch, lengths, n_q=4)
        assert codes.shape == (8, int(codes_lens.max()), 4)
        assert set(stats) == {"batch_size", "encode_time"}
        wavs, wavs_lens, _ = model.decode(codes, codes_lens)
        for row, mel in enumerate(utterances):
            alone, alone_lens, _ = model.encode(mel[None], torch.tensor([mel.shape[1]]), n_q=4)
            assert torch.equal(alone[0], codes[row, : codes_lens[row]])
            wav, _, _ = model.decode(alone, alone_lens)
            assert torch.equal(wav[0, 0], wavs[row, 0, : wavs_lens[row]])

    def test_serves_inside_a_training_forward(self, model):
        class AudioLanguageModel(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.audio_tokenizer = model
                self.audio_tokenizer.freeze()
                self.embedding = torch.nn.Embedding(32, 8)

            def forward(self, mels, mels_lens):
                codes, codes_lens, _ = self.audio_tokenizer.encode(mels, mels_lens)
                return self.embedding(codes.clone()).sum(), codes_lens.clone()

        outer = AudioLanguageModel().train()
        batch, lengths = batch_tokenizer.padding(mels(model.config))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss, _ = outer(batch, lengths)
        loss.backward()
        assert outer.embedding.weight.grad is not None
        trained = [name for name, parameter in outer.named_parameters() if parameter.requires_grad]
        assert trained == ["embedding.weight"]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = outer.audio_tokenizer.encode(batch, lengths)[0]
        assert torch.equal(inside, outer.audio_tokenizer.encode(batch, lengths)[0])

    def test_wraps_in_distributed_data_parallel(self, model):
        class Outer(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.tokenizer = model
                self.embedding = torch.nn.Embedding(32, 8)

            def forward(self, batch, lengths):
                return self.embedding(self.tokenizer.encode(batch, lengths)[0].clone()).sum()

        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        try:
            outer = torch.nn.parallel.DistributedDataParallel(Outer())
            for _ in range(2):
                outer(torch.randn(2, 40, 50), torch.tensor([50, 20])).backward()
            assert outer.module.embedding.weight.grad is not None
        finally:
            torch.distributed.destroy_process_group()

    def test_outputs_can_be_saved_for_backward(self, model):
        batch, lengths = batch_tokenizer.padding(mels(model.config))
        codes, codes_lens, _ = model.encode(batch, lengths)
        wavs, _, _ = model.decode(codes, codes_lens)
        assert not wavs.is_inference()
        weight = torch.ones(1, requires_grad=True)
        (wavs * weight).sum().backward()

    def test_encoder_alone(self, tmp_path):
        encoder = batch_tokenizer.load_model(write_mimo_checkpoint(tmp_path), load_encoder_only=True)
        assert not any(name.startswith("decoder") for name, _ in encoder.named_parameters())
        batch, lengths = batch_tokenizer.padding(mels(encoder.config))
        codes, codes_lens, _ = encoder.encode(batch, lengths)
        with pytest.raises(ValueError, match="without its decoder"):
            encoder.decode(codes, codes_lens)

    @pytest.mark.parametrize("codes", [[[32, 0]], [[0, 16]], [[-1, 0]], [[0] * 6]], ids=str)
    def test_codes_out_of_range_are_refused(self, model, codes):
        with pytest.raises(ValueError, match="codebook"):
            model.decode(torch.tensor([codes]), torch.tensor([1]))

    @pytest.mark.parametrize("n_q", [0, 6, -1])
    def test_quantizer_counts_out_of_range_are_refused(self, model, n_q):
        with pytest.raises(ValueError, match="1 to 5"):
            model.encode(torch.randn(1, 40, 9), torch.tensor([9]), n_q=n_q)

    def test_audio_files_to_codes(self, model, tmp_path):
        import soundfile

        samples = np.random.default_rng(0).normal(size=(16000, 2)).astype(np.float32) * 0.1
        soundfile.write(tmp_path / "a.wav", samples, 16000)
        wav = batch_tokenizer.load_audio(tmp_path / "a.wav", model.config.sampling_rate)
        assert wav.shape == (24000,)
        assert wav.dtype == torch.float32
        mel = batch_tokenizer.mel_spectrogram(wav, model.config)
        assert mel.shape == (40, 101)


class TestLoading:
    @pytest.fixture
    def folder(self, tmp_path):
        return write_mimo_checkpoint(tmp_path / "checkpoint")

    def load(self, folder, **arguments):
        return load_model(Checkpoint.open(str(folder)), device=torch.device("cpu"), **arguments)

    def edit(self, folder, **changes):
        config = json.loads((folder / "config.json").read_text())
        config.update(changes)
        (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v != "absent"}))

    def test_other_layouts_give_the_same_model_and_fingerprint(self, folder, tmp_path):
        state = load_file(folder / "model.safetensors")
        config = (folder / "config.json").read_text()
        whole = self.load(folder)
        layouts = {name: tmp_path / name for name in ("bin", "sharded", "prefixed")}
        for other in layouts.values():
            other.mkdir()
            (other / "config.json").write_text(config)
        torch.save(state, layouts["bin"] / "pytorch_model.bin")
        save_file({f"audio_tokenizer.{k}": v for k, v in state.items()}, layouts["prefixed"] / "model.safetensors")
        names = sorted(state)
        parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
        for file, members in parts.items():
            save_file({name: state[name] for name in members}, layouts["sharded"] / file)
        index = {"weight_map": {name: file for file, members in parts.items() for name in members}}
        (layouts["sharded"] / "model.safetensors.index.json").write_text(json.dumps(index))
        fingerprint = find_family(Checkpoint.open(str(folder))).open_spec(Checkpoint.open(str(folder))).info.fingerprint
        for other in layouts.values():
            loaded = self.load(other)
            for name, tensor in whole.state_dict().items():
                assert torch.equal(tensor, loaded.state_dict()[name]), (other, name)
            spec = find_family(Checkpoint.open(str(other))).open_spec(Checkpoint.open(str(other)))
            assert spec.info.fingerprint == fingerprint

    def test_training_state_of_codebooks_is_left_on_disk(self, folder):
        state = load_file(folder / "model.safetensors")
        for index in range(5):
            stem = f"encoder.quantizer.vq.layers.{index}._codebook"
            state |= {
                f"{stem}.embed_avg": torch.ones(3),
                f"{stem}.cluster_size": torch.ones(3),
                f"{stem}.inited": torch.ones(1),
            }
        save_file(state, folder / "model.safetensors")
        self.load(folder)

    def test_the_fingerprint_follows_the_weights_and_the_configuration(self, folder, tmp_path):
        def fingerprint(path):
            checkpoint = Checkpoint.open(str(path))
            return find_family(checkpoint).open_spec(checkpoint).info.fingerprint

        first = fingerprint(folder)
        assert fingerprint(write_mimo_checkpoint(tmp_path / "other", seed=1)) != first
        self.edit(folder, rope_theta=20000)
        assert fingerprint(folder) != first

    @pytest.mark.parametrize(
        ("changes", "named"),
        [
            ({"d_model": "absent"}, "d_model is absent"),
            ({"vocoder_dim": "absent"}, "vocoder_dim is absent"),
            ({"d_model": -1}, "d_model"),
            ({"d_model": 32.5}, "d_model"),
            ({"d_model": True}, "d_model"),
            ({"encoder_attention_heads": 5}, "encoder_attention_heads"),
            ({"encoder_skip_layer_id": 9}, "encoder_skip_layer_id"),
            ({"encoder_causal": "yes"}, "encoder_causal"),
            ({"encoder_attn_window_size": [1]}, "encoder_attn_window_size"),
            ({"num_quantizers": 0}, "num_quantizers"),
            ({"codebook_size": []}, "codebook_size"),
            ({"codebook_size": [4] * 9}, "codebook_size"),
            ({"codebook_size": [0]}, "codebook_size"),
            ({"hop_length": 0}, "hop_length"),
            ({"window_size": 480}, "window_size"),
            ({"fmax": 13000}, "fmax"),
            ({"ln_type": "BatchNorm"}, "ln_type"),
            ({"rope_type": "yarn"}, "rope_type"),
            ({"activation_function": "relu"}, "activation_function"),
            ({"vocoder_padding": "valid"}, "vocoder_padding"),
            ({"decoder_kernel_size": 1}, "decoder_kernel_size"),
            ({"d_model": 64}, "shape"),
            ({"encoder_layers": 4}, "lacks encoder.layers.3"),
            ({"encoder_layers": 2}, "has encoder.layers.2"),
        ],
        ids=str,
    )
    def test_a_configuration_that_is_wrong_is_named(self, folder, changes, named):
        self.edit(folder, **changes)
        with pytest.raises(RunError, match=named):
            self.load(folder)

    def test_broken_files_are_named(self, folder, tmp_path):
        weights = folder / "model.safetensors"
        whole = weights.read_bytes()
        for damage in (b"", whole[:100], whole[: len(whole) // 2], b"\0" * 500):
            weights.write_bytes(damage)
            with pytest.raises(RunError, match=r"model\.safetensors.*download"):
                self.load(folder)
        weights.unlink()
        with pytest.raises(RunError, match="has none of"):
            self.load(folder)
        (folder / "pytorch_model.bin").write_bytes(b"junk")
        with pytest.raises(RunError, match=r"pytorch_model\.bin"):
            self.load(folder)
        (folder / "config.json").write_text("{")
        with pytest.raises(RunError, match="not JSON"):
            Checkpoint.open(str(folder))
        with pytest.raises(RunError, match="no such folder"):
            Checkpoint.open(str(tmp_path / "nowhere"))
        with pytest.raises(RunError, match=r"no config\.json"):
            Checkpoint.open(str(tmp_path))

    def test_weights_are_in_memory_once(self, tmp_path):
        folder = write_mimo_checkpoint(
            tmp_path / "large", d_model=512, encoder_layers=10, encoder_ffn_dim=2048, decoder_layers=10,
            decoder_ffn_dim=2048, encoder_attention_heads=8, decoder_attention_heads=8,
        )  # fmt: skip
        size = (folder / "model.safetensors").stat().st_size
        script = f"""
import resource, torch, batch_tokenizer.api
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
model = batch_tokenizer.load_model({str(folder)!r})
print(peak() - before)
"""
        grown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=600, check=True)
        assert size > 250e6
        assert int(grown.stdout) < 1.6 * size

    def test_a_foreign_checkpoint_is_no_known_family(self, folder):
        (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
        with pytest.raises(RunError, match="llama"):
            find_family(Checkpoint.open(str(folder)))

    def test_parts_hold_no_more_than_their_task_needs(self, folder):
        encoder = self.load(folder, parts=("encoder",))
        decoder = self.load(folder, parts=("decoder",))
        assert encoder.decoder is None
        kept = {name for name in decoder.state_dict() if name.startswith("encoder.")}
        assert kept == {f"encoder.quantizer.vq.layers.{i}._codebook.embed" for i in range(5)}
        codes = encoder.encode_utterances(mels(encoder.config))
        whole = self.load(folder)
        for a, b in zip(decoder.decode_utterances(codes), whole.decode_utterances(codes), strict=True):
            assert torch.equal(a, b)
