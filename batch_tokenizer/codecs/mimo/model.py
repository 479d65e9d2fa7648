"""``MiMoAudioTokenizer``: the encoder and the decoder as one ``nn.Module``, with the published batch interface.

``encode`` and ``decode`` take padded batches as the published package does. Inside, utterances are never padded against
each other: on a CPU each is computed alone, on CUDA they are packed on one axis of fixed size, so that a result does
not depend on what it was batched with.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from batch_tokenizer.audio.mel import FLOOR, MelForm, mel_transform
from batch_tokenizer.codecs.layers.packed import Capacity, packs_of
from batch_tokenizer.codecs.mimo.config import MiMoConfig
from batch_tokenizer.codecs.mimo.decoder import AudioDecoder
from batch_tokenizer.codecs.mimo.encoder import AudioEncoder, EncoderLayout
from batch_tokenizer.codecs.mimo.layers import SelfAttention, TransformerStack
from batch_tokenizer.kernels.segments import GappedAxis, Lengths, filler_runs, joined_on, to_device, within

#: Rows of the axis whose windows are in memory at once, 160 MB of them at 960 samples.
BLOCK_ROWS = 8192


def packed_log_mel(samples: Tensor, lengths: Lengths, axis: GappedAxis, form: MelForm) -> Tensor:
    """Log-mel float32 (axis.size, n_mels), zero where the axis has no frame.

    Args:
        samples: float32 (N,) on any device: utterances one after the other.
        lengths: int64 (S,), samples of each, more than half a transform (``form.least_samples``).
        axis: where each utterance's frames lie; ``axis.lengths`` are 1 + lengths // hop.
    """
    device = samples.device
    transform = mel_transform(form, device)
    window, filters = transform.spectrogram.window, transform.mel_scale.fb  # the window is as long as the transform
    # Of each row: whether it is a frame, its utterance's first and last sample, and where its window begins there.
    table = np.zeros((axis.size, 4), np.int32)
    frames = within(axis.lengths)
    rows = frames + np.repeat(axis.starts, axis.lengths)
    table[rows, 0] = 1
    table[rows, 1] = np.repeat(np.cumsum(lengths) - lengths, axis.lengths)
    table[rows, 2] = np.repeat(lengths - 1, axis.lengths)
    table[rows, 3] = frames * form.hop_length - form.n_fft // 2
    is_frame, first, last, begin = to_device(table, device)[:, :, None].unbind(1)
    steps = torch.arange(form.n_fft, dtype=torch.int32, device=device)
    mel = torch.empty(axis.size, form.n_mels, device=device)
    for start in range(0, axis.size, BLOCK_ROWS):
        block = slice(start, min(axis.size, start + BLOCK_ROWS))
        # Reflected at both ends: -p for a place p < 0, and 2 · last - p for one behind the last.
        place = last[block] - (last[block] - (begin[block] + steps).abs()).abs()
        windows = samples[(first[block] + place) * is_frame[block]] * window
        mel[block] = torch.fft.rfft(windows).abs() @ filters
    return mel.clamp_(min=FLOOR).log_().mul_(is_frame)


Stats = dict[str, Any]

#: Token frames of axis that a pack on CUDA has by default.
DEFAULT_CAPACITY = 8192


class MiMoAudioTokenizer(nn.Module):
    """MiMo-Audio-Tokenizer.

    Attributes:
        config: the checkpoint's configuration.
        capacity: token frames of axis per pack; None runs each utterance alone; ``auto`` packs ``DEFAULT_CAPACITY`` on
            CUDA, and on a CPU short utterances only (``layers/packed.py``). All packs of one capacity have the same
            shapes, and results are equal to the bit only among equal shapes; an utterance longer than a pack gets an
            axis of a multiple of it to itself.
    """

    def __init__(
        self, config: MiMoConfig, *, parts: Sequence[str] = ("encoder", "decoder"), outer_norm: str | None = None
    ) -> None:
        super().__init__()
        norm = outer_norm or config.ln_type
        self.config = config
        self.capacity: Capacity = "auto"
        self.encoder = AudioEncoder(config, norm)
        self.decoder = AudioDecoder(config, norm) if "decoder" in parts else None
        if "encoder" not in parts:  # decoding needs the codebooks and nothing else of it
            for name in [name for name, _ in self.encoder.named_children() if name != "quantizer"]:
                delattr(self.encoder, name)

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.encoder.quantizer.codebooks[0].embed.device

    def freeze(self) -> MiMoAudioTokenizer:
        """Takes all parameters out of training, as ``load_model`` has already done."""
        return self.requires_grad_(False).eval()

    def use_attention(self, backend: str) -> None:
        """Forces an attention backend (``batch_tokenizer.kernels.attention``); ``auto`` chooses the fastest."""
        for module in self.modules():
            if isinstance(module, TransformerStack):
                module.attention = backend

    def join_projections(self) -> None:
        """Computes queries, keys and values of each layer in one matrix product from now on."""
        for module in self.modules():
            if isinstance(module, SelfAttention):
                module.join_projections()

    def compile_layers(self, capacity: int) -> None:
        """Compiles the transformer layers for packs of ``capacity`` token frames, before it returns.

        Raises:
            CompilationFailed: they cannot be compiled here; all layers then run as they are.
        """
        from batch_tokenizer.codecs.mimo.compiled import compile_stacks  # imports torch's compiler, which takes seconds

        config, frames = self.config, capacity * self.config.avg_pooler
        rows = {"encoder.layers": frames, "decoder.layers": frames}
        rows["decoder.vocoder.layers"] = frames * config.decoder_stride_size
        stacks = {name: module for name, module in self.named_modules() if isinstance(module, TransformerStack)}
        compile_stacks([(stack, rows[name]) for name, stack in stacks.items()])

    @torch.no_grad()
    def encode(self, mels: Tensor, mels_lens: Tensor, n_q: int | None = None, **_: Any) -> tuple[Tensor, Tensor, Stats]:
        """Codes of a padded batch.

        Args:
            mels: log-mel (B, n_mels, T), any float dtype.
            mels_lens: int (B,), frames of each.
            n_q: codebooks to use; None is all of them.

        Returns:
            codes int64 (B, T', n_q) padded with zeros, their lengths int64 (B,), and
            ``{"batch_size", "encode_time"}``, seconds.

        Raises:
            ValueError: ``mels`` are of another shape or type, or ``n_q`` or a length is out of range.
        """
        started = time.perf_counter()
        if mels.ndim != 3 or mels.shape[1] != self.config.n_mels or not mels.is_floating_point():
            raise ValueError(
                f"mels must be log-mel (B, {self.config.n_mels}, T) of floats, got {tuple(mels.shape)} of {mels.dtype}"
            )
        lens = _checked_lengths("mels_lens", mels_lens, len(mels), mels.shape[2])
        utterances = [mel[:, :length] for mel, length in zip(mels, lens, strict=True)]
        codes = self.encode_utterances(utterances, n_q)
        lengths = torch.tensor([len(code) for code in codes], dtype=torch.int64, device=mels.device)
        stats = {"batch_size": len(codes), "encode_time": time.perf_counter() - started}
        return pad_sequence(codes, batch_first=True).to(mels.device), lengths, stats

    @torch.no_grad()
    def decode(self, codes: Tensor, codes_lens: Tensor, **_: Any) -> tuple[Tensor, Tensor, Stats]:
        """Samples of a padded batch of codes.

        Args:
            codes: int (B, T, K), 1 <= K <= num_quantizers.
            codes_lens: int (B,), frames of each.

        Returns:
            samples float32 (B, 1, S) padded with zeros, their lengths int64 (B,), and
            ``{"batch_size", "decode_time"}``, seconds.

        Raises:
            ValueError: a code, a length or K is out of range, or the decoder was not loaded.
        """
        started = time.perf_counter()
        if codes.ndim != 3 or codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
            raise ValueError(f"codes must be (B, T, K) of integers, got {tuple(codes.shape)} of {codes.dtype}")
        lens = _checked_lengths("codes_lens", codes_lens, len(codes), codes.shape[1])
        utterances = [code[:length] for code, length in zip(codes, lens, strict=True)]
        for index, code in enumerate(utterances):
            self._check_codes(code, index)
        samples = self.decode_utterances(utterances)
        lengths = torch.tensor([len(wav) for wav in samples], dtype=torch.int64, device=codes.device)
        stats = {"batch_size": len(samples), "decode_time": time.perf_counter() - started}
        return pad_sequence(samples, batch_first=True).to(codes.device)[:, None], lengths, stats

    def encode_utterances(self, mels: Sequence[Tensor], n_q: int | None = None) -> list[Tensor]:
        """Log-mel (n_mels, L_i) each to codes int64 (T_i, n_q) each, on the model's device."""
        return [codes for codes, _ in self.encode_mels(mels, n_q)]

    def encode_mels(self, mels: Sequence[Tensor], n_q: int | None = None) -> list[tuple[Tensor, Tensor]]:
        """As ``encode_utterances``, each with the hidden states (T_i, d_model) that were quantized."""

        def rows(members: list[int], layout: EncoderLayout) -> Tensor:
            return layout.mel.scatter(joined_on([mels[index].t() for index in members], self.device))

        return self._encode([mel.shape[1] for mel in mels], rows, n_q)

    def encode_samples(self, samples: Sequence[Tensor], n_q: int | None = None) -> list[tuple[Tensor, Tensor]]:
        """Float32 samples (S_i,) each, S_i >= ``config.mel.least_samples``, to codes and hidden states as
        ``encode_mels``. Log-mel is made on the model's device.
        """
        form = self.config.mel
        lengths = np.array([len(part) for part in samples], np.int64)
        if any(lengths < form.least_samples):
            raise ValueError(f"an utterance has less than {form.least_samples} samples")

        def rows(members: list[int], layout: EncoderLayout) -> Tensor:
            tight = joined_on([samples[index] for index in members], self.device)
            return packed_log_mel(tight, lengths[members], layout.mel, form)

        return self._encode([self.config.num_mel_frames(length) for length in lengths.tolist()], rows, n_q)

    def _encode(
        self, mel_frames: Sequence[int], rows: Callable[[list[int], EncoderLayout], Tensor], n_q: int | None
    ) -> list[tuple[Tensor, Tensor]]:
        """Codes and hidden states of each; ``rows`` returns the log-mel of a pack, ``mel_frames`` each, on its axis."""
        if not hasattr(self.encoder, "conv1"):
            raise ValueError("this model was loaded without its encoder")
        num_quantizers = self.config.num_quantizers if n_q is None else n_q
        if not 1 <= num_quantizers <= self.config.num_quantizers:
            raise ValueError(f"n_q = {n_q}: this checkpoint has 1 to {self.config.num_quantizers} codebooks")
        if any(frames < 1 for frames in mel_frames):
            raise ValueError("an utterance has no mel frames")
        results: dict[int, tuple[Tensor, Tensor]] = {}
        spans = EncoderLayout.spans(self.config, mel_frames)
        with torch.autocast(self.device.type, enabled=False):
            for members, capacity in self._packs(spans.tolist()):
                lengths = [mel_frames[index] for index in members]
                layout = EncoderLayout.build(self.config, lengths, self.device, capacity)
                hidden = self.encoder(rows(members, layout), layout)
                quantized = self.encoder.quantizer.encode(hidden, num_quantizers)
                counts = layout.tokens.lengths.tolist()
                parts = (layout.tokens.gather(of_pack).split(counts) for of_pack in (quantized, hidden))
                results.update(zip(members, zip(*parts, strict=True), strict=True))
        return [results[index] for index in range(len(mel_frames))]

    def decode_utterances(self, codes: Sequence[Tensor]) -> list[Tensor]:
        """Codes (T_i, K_i) each, T_i >= 1, in range, to float32 samples (S_i,) each, on the model's device."""
        if self.decoder is None:
            raise ValueError("this model was loaded without its decoder")
        samples: list[Tensor] = [torch.empty(0)] * len(codes)
        with torch.autocast(self.device.type, enabled=False):
            for members, capacity in self._packs([len(code) for code in codes], [code.shape[1] for code in codes]):
                packed = joined_on([codes[index] for index in members], self.device).to(torch.int64)
                lengths = [len(codes[index]) for index in members]
                filler = 0 if capacity is None else capacity - len(packed)
                packed = torch.nn.functional.pad(packed, (0, 0, 0, filler))
                wavs, segments = self.decoder(self.encoder.quantizer.decode(packed), lengths + filler_runs(filler))
                parts = wavs.split(segments.lengths.tolist())
                for index, part in zip(members, parts, strict=False):
                    samples[index] = part
        return samples

    def hidden(self, mel: Tensor) -> Tensor:
        """Log-mel (n_mels, L) of one utterance to hidden frames (T, d_model) before quantization."""
        layout = EncoderLayout.build(self.config, [mel.shape[1]], self.device)
        return layout.tokens.gather(self.encoder(layout.mel.scatter(to_device(mel.t(), self.device)), layout))

    def _packs(
        self, spans: Sequence[int], groups: Sequence[int] | None = None
    ) -> Iterator[tuple[list[int], int | None]]:
        return packs_of(spans, self.capacity, DEFAULT_CAPACITY, self.device, groups)

    def _check_codes(self, codes: Tensor, index: int) -> None:
        frames, used = codes.shape
        if frames < 1 or not 1 <= used <= self.config.num_quantizers:
            raise ValueError(
                f"utterance {index}: codes are {frames} frames of {used} codebooks; this checkpoint takes at least one "
                f"frame of 1 to {self.config.num_quantizers}"
            )
        sizes = torch.tensor(self.config.codebook_size[:used], device=codes.device)
        if bool(((codes < 0) | (codes >= sizes)).any()):
            raise ValueError(f"utterance {index}: a code is negative or not below its codebook's size {sizes.tolist()}")


def _checked_lengths(name: str, lengths: Tensor, count: int, most: int) -> list[int]:
    """Lengths of a padded batch's members.

    Raises:
        ValueError: they are not ``count`` integers from 1 to ``most``.
    """
    if lengths.shape != (count,) or lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
        raise ValueError(
            f"{name} must be {count} integers, one for each utterance; got {tuple(lengths.shape)} of {lengths.dtype}"
        )
    listed: list[int] = lengths.tolist()
    for index, length in enumerate(listed):
        if not 1 <= length <= most:
            raise ValueError(f"{name}[{index}] = {length}: must be 1 to {most}, the length of the batch")
    return listed
