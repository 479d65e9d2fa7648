"""The published way of running MiMo, to compare with: padded batches in the manifest's order, one thing after another.

It is the published script and model with torch's scaled dot-product attention in place of flash-attn, which needs CUDA:
convolutions see the padded batch, the layers' matrix products the valid frames only, attention the padded batch under a
mask. So it has the published faults too: padding leaks into tokens and audio. It is here for its time
alone. Loading is by torch's DataLoader with as many workers as ours; files are written by the same functions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import soundfile
import torch
from torch import Tensor
from torch.nn.functional import conv1d, conv_transpose1d, gelu, group_norm, pad, scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from batch_tokenizer.audio.mel import transforms
from batch_tokenizer.codecs.layers.packed import Rotation
from batch_tokenizer.codecs.mimo.codec import MiMoSpec
from batch_tokenizer.codecs.mimo.decoder import UpSampling
from batch_tokenizer.codecs.mimo.layers import TransformerLayer, TransformerStack
from batch_tokenizer.codecs.mimo.model import MiMoAudioTokenizer
from batch_tokenizer.records import LoadedRow, ManifestRow, TokenizedRow


@lru_cache(maxsize=16)
def _resampler(from_rate: int, to_rate: int) -> Any:
    return transforms.Resample(from_rate, to_rate)


def load_bare(path: str, sample_rate: int) -> npt.NDArray[np.float32]:
    """A file's samples (S,), resampled by torchaudio and averaged over channels."""
    samples, file_rate = soundfile.read(path, dtype="float32", always_2d=True)
    channels = torch.from_numpy(samples.T)
    if file_rate != sample_rate:
        channels = _resampler(file_rate, sample_rate)(channels.contiguous())
    return channels.mean(dim=0).numpy()


@dataclass(frozen=True)
class Utterances(Dataset[LoadedRow]):
    """Rows as the published data set yields them: audio loaded, resampled, log-mel."""

    rows: Sequence[ManifestRow]
    spec: MiMoSpec

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> LoadedRow:
        row = self.rows[index]
        samples = load_bare(str(row.wav), self.spec.info.sample_rate)
        features = self.spec.features(samples)
        return LoadedRow(row, features, None, len(samples), self.spec.num_frames(len(samples)))


def _as_list(rows: list[LoadedRow]) -> list[LoadedRow]:
    return rows


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)


class PublishedLoop:
    """Encodes and decodes rows in padded batches of ``batch_size``, the next when a batch's results were taken."""

    def __init__(
        self, model: MiMoAudioTokenizer, rows: Sequence[ManifestRow], spec: MiMoSpec, batch_size: int, num_workers: int
    ) -> None:
        self._model = model
        self._loader = DataLoader(
            Utterances(rows, spec), batch_size=batch_size, num_workers=num_workers, collate_fn=_as_list,
            persistent_workers=num_workers > 0, worker_init_fn=_one_thread,
        )  # fmt: skip

    def run(self, num_quantizers: int, num_batches: int | None = None) -> Iterator[TokenizedRow]:
        """One pass over all rows, or over the first ``num_batches`` batches."""
        for rows in islice(self._loader, num_batches):
            yield from self._batch(rows, num_quantizers)

    @torch.inference_mode()
    def _batch(self, rows: Sequence[LoadedRow], num_quantizers: int) -> Iterator[TokenizedRow]:
        mels = [torch.from_numpy(row.features).t() for row in rows if row.features is not None]
        lengths = torch.tensor([len(mel) for mel in mels])
        device, dtype = self._model.device, self._model.encoder.conv1.weight.dtype
        codes = encode_padded(
            self._model, pad_sequence(mels, batch_first=True).to(device, dtype), lengths, num_quantizers
        )
        wavs = decode_padded(self._model, codes)
        for row, code, wav in zip(rows, codes, wavs, strict=True):
            yield TokenizedRow(
                row.row, code.cpu().numpy().astype(np.uint16), wav.float().cpu().numpy(), row.num_samples
            )


def encode_padded(model: MiMoAudioTokenizer, mels: Tensor, lengths: Tensor, num_quantizers: int) -> list[Tensor]:
    """Log-mel (B, T, n_mels) padded with zeros to codes int64 (T_i, K) each."""
    # 1. Convolutions see the padding, as published.
    config, encoder = model.config, model.encoder
    x = gelu(conv1d(mels.transpose(1, 2), encoder.conv1.weight, encoder.conv1.bias, padding=1))
    x = gelu(conv1d(x, encoder.conv2.weight, encoder.conv2.bias, stride=config.stride_size, padding=1))
    frames = torch.tensor([config.num_encoder_frames(int(length)) for length in lengths])
    valid = _valid(frames, x.shape[2], x.device)
    x = encoder.layer_norm(_layers(encoder.layers, x.transpose(1, 2)[valid], valid, config.encoder_skip_layer_id))
    x = _unpack(x, valid).transpose(1, 2)
    if config.avg_pooler != 1:
        x = pad(x, (0, -x.shape[2] % config.avg_pooler))
        x = gelu(conv1d(x, encoder.down_sample_layer.get_parameter("0.weight"), stride=config.avg_pooler))
        x = encoder.down_sample_norm(x.transpose(1, 2)).transpose(1, 2)
        frames = -(-frames // config.avg_pooler)
    # 2. Residual quantization of the valid frames.
    packed = x.transpose(1, 2)[_valid(frames, x.shape[2], x.device)].float()
    codes = []
    for codebook in encoder.quantizer.codebooks[:num_quantizers]:
        rows = codebook.embed
        distances = (
            packed.square().sum(1, keepdim=True) - 2 * packed @ rows.t() + rows.t().square().sum(0, keepdim=True)
        )
        nearest = distances.argmin(dim=1)
        packed = packed - rows[nearest]
        codes.append(nearest)
    return list(torch.stack(codes, dim=1).split(frames.tolist()))


def decode_padded(model: MiMoAudioTokenizer, codes: Sequence[Tensor]) -> list[Tensor]:
    """Codes (T_i, K) each to samples float32 (S_i,) each."""
    decoder, config = model.decoder, model.config
    assert decoder is not None
    # 1. Codes to hidden frames, up-sampled to the decoder's rate.
    frames = torch.tensor([len(code) for code in codes])
    summed = model.encoder.quantizer.decode(torch.cat(list(codes)))
    x = pad_sequence(summed.split(frames.tolist()), batch_first=True).to(decoder.dconv2.conv.weight.dtype)
    if decoder.pooled:
        x = _up_sample(decoder.dconv1, x)
        frames = frames * config.avg_pooler
    # 2. The decoder's layers on the valid frames, up-sampled to mel frames.
    valid = _valid(frames, x.shape[1], x.device)
    x = _unpack(decoder.layer_norm(_layers(decoder.layers, x[valid], valid)), valid)
    x = _up_sample(decoder.dconv2, x)
    frames = frames * config.decoder_stride_size
    valid = _valid(frames, x.shape[1], x.device)
    # 3. The vocoder: layers, spectrum, inverse transform.
    vocoder = decoder.vocoder
    x = _layers(vocoder.layers, vocoder.embeddings(x[valid]), valid)
    x = _unpack(vocoder.head.out(vocoder.layer_norm(x)).float(), valid)
    log_magnitude, phase = x.chunk(2, dim=2)
    magnitude = log_magnitude.exp().clamp(max=100.0)
    spectrum = magnitude * (phase.cos() + 1j * phase.sin())
    # 4. Overlap-add, divided by the sum of squared windows.
    window = vocoder.head.istft.window
    width, hop = len(window), config.hop_length
    pieces = (torch.fft.irfft(spectrum, n=width, dim=2) * window).transpose(1, 2)
    length = (pieces.shape[2] - 1) * hop + width

    def overlapped(parts: Tensor) -> Tensor:
        folded = torch.nn.functional.fold(parts, (1, length), (1, width), stride=(1, hop))
        return folded[:, 0, 0, vocoder.head.trim : length - vocoder.head.trim]

    envelope = overlapped(window.square()[None, :, None].expand(1, -1, pieces.shape[2]))
    samples = overlapped(pieces) / envelope
    return [wav[: config.num_output_samples(len(code))] for wav, code in zip(samples, codes, strict=True)]


def _valid(frames: Tensor, longest: int, device: torch.device) -> Tensor:
    """bool (B, longest)."""
    return (torch.arange(longest)[None] < frames[:, None]).to(device)


def _unpack(rows: Tensor, valid: Tensor) -> Tensor:
    """Valid rows (N, C) to a batch (B, T, C) padded with zeros."""
    padded = rows.new_zeros(*valid.shape, rows.shape[1])
    padded[valid] = rows
    return padded


def _layers(stack: TransformerStack, rows: Tensor, valid: Tensor, skip: int | None = None) -> Tensor:
    batch, longest = valid.shape
    positions = torch.arange(longest, device=rows.device).expand(batch, -1)[valid]
    rotate = Rotation(positions, stack.head_dim, stack.theta)
    i, j = torch.arange(longest, device=rows.device)[:, None], torch.arange(longest, device=rows.device)[None]
    skipped = None
    seen: Tensor | None = None
    for number, layer in enumerate(stack, start=1):
        assert isinstance(layer, TransformerLayer)
        if seen is None:
            left, right = layer.self_attn.window
            band = (j >= i - left if left >= 0 else j >= 0) & (j <= i + right if right >= 0 else j >= 0)
            # A padded query sees itself, so that no row of the softmax is empty.
            seen = ((band[None] & valid[:, None, :]) | (i == j)[None])[:, None]
        attention = layer.self_attn
        normed = layer.self_attn_layer_norm(rows)
        q, k, v = (
            project(normed).unflatten(-1, (attention.heads, -1))
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        q, k, v = (
            _unpack(part.flatten(1), valid).unflatten(2, (attention.heads, -1)).transpose(1, 2)
            for part in (rotate(q), rotate(k), v)
        )
        attended = scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2).flatten(2)
        rows = rows + attention.out_proj(attended[valid])
        rows = rows + layer.fc2(gelu(layer.fc1(layer.final_layer_norm(rows))))
        if number == skip:
            skipped = rows
    return rows if skipped is None else rows + skipped


def _up_sample(up: UpSampling, x: Tensor) -> Tensor:
    """(B, T, C) to (B, T · stride, C'), statistics over the padding too."""
    full = conv_transpose1d(x.transpose(1, 2), up.conv.weight, up.conv.bias, stride=up.stride)
    full = group_norm(full, 1, up.norm.weight, up.norm.bias, up.norm.eps)
    return full[:, :, : full.shape[2] - (up.kernel - up.stride)].transpose(1, 2)
