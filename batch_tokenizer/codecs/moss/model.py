"""``MossAudioTokenizer``: encoder, quantizer and decoder as one ``nn.Module``, for whole utterances and for streams.

Utterances are never padded against each other: on a CPU each is computed alone, on CUDA they are packed on one axis
of fixed size, so that a result does not depend on what it was batched with. The model is causal with bounded windows,
so an utterance may also be computed piece by piece, with its state in a ``Stream``; the result is the same within
rounding. Long utterances are computed so, alone and in pieces of one size, in constant memory.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from batch_tokenizer.codecs.layers.packed import Capacity, fixed_capacity, packs_of
from batch_tokenizer.codecs.moss.config import MossConfig
from batch_tokenizer.codecs.moss.layers import PackedFrames, PatchDown, PatchUp, Stages, Stream, Transformer
from batch_tokenizer.codecs.moss.quantizer import ResidualQuantizer
from batch_tokenizer.kernels.segments import filler_runs, to_device

Result = TypeVar("Result")

#: Token frames of axis that a pack on CUDA has by default.
DEFAULT_CAPACITY = 4096

#: Seconds of audio above which an utterance is computed in pieces, where utterances are not packed.
STREAM_ABOVE_SECONDS = 60.0


def interleave(samples: Tensor) -> Tensor:
    """Channels (C, S) to one sequence (S · C,), as the first stage takes them: L₀ R₀ L₁ R₁ …"""
    return samples.t().reshape(-1)


class MossAudioTokenizer(nn.Module):
    """MOSS-Audio-Tokenizer.

    Attributes:
        config: the checkpoint's configuration.
        capacity: token frames of axis per pack; None runs each utterance alone; ``auto`` does that on a CPU, where its
            many rows a frame make filler dear, and packs ``DEFAULT_CAPACITY`` on CUDA. Results are equal to the bit
            only among packs of one capacity.
        stream_above: token frames, ``STREAM_ABOVE_SECONDS`` of them. A longer utterance, or with a capacity one that is
            longer than that, is computed alone and in pieces of this many frames.
    """

    def __init__(self, config: MossConfig, *, parts: Sequence[str] = ("encoder", "decoder")) -> None:
        super().__init__()
        self.config = config
        self.capacity: Capacity = "auto"
        self.stream_above = max(1, int(STREAM_ABOVE_SECONDS * config.frame_rate))
        self.encoder = Stages(config.encoder, PatchDown) if "encoder" in parts else None
        self.quantizer = ResidualQuantizer(config.quantizer)
        self.decoder = Stages(config.decoder, PatchUp) if "decoder" in parts else None

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the encoder and the decoder; the quantizer is always float32."""
        return next(self.parameters()).dtype

    def use_attention(self, backend: str) -> None:
        """Forces an attention backend (``batch_tokenizer.kernels.attention``); ``auto`` chooses the fastest."""
        for module in self.modules():
            if isinstance(module, Transformer):
                module.attention = backend

    def add_projections(self, names: Collection[str]) -> None:
        """Puts projections between equal sizes in place where ``names``, those of a checkpoint's tensors, have them."""
        for part in ("encoder", "decoder"):
            for index, stage in enumerate(getattr(self, part) or ()):
                for projection in ("input_proj", "output_proj"):
                    if isinstance(stage, Transformer) and f"{part}.{index}.{projection}.weight" in names:
                        stage.add_projection(projection)

    def encode_utterances(self, samples: Sequence[Tensor], n_q: int | None = None) -> list[Tensor]:
        """Samples float32 (S_i,) each, S_i >= 1, to codes int64 (ceil(S_i / rows per frame), n_q) each.

        Here and below, samples of a stereo model are interleaved (``interleave``), so S counts those of both channels.

        Raises:
            ValueError: ``n_q`` is out of range, an utterance is empty, or the encoder was not loaded.
        """
        return [codes for codes, _ in self.encode_utterances_hidden(samples, n_q)]

    def encode_utterances_hidden(
        self, samples: Sequence[Tensor], n_q: int | None = None
    ) -> list[tuple[Tensor, Tensor]]:
        """As ``encode_utterances``, each with the hidden states float32 (T, d) that were quantized."""
        num_quantizers = self.config.quantizer.num_quantizers if n_q is None else n_q
        self._check_num_quantizers(num_quantizers)
        if any(len(wav) < 1 for wav in samples):
            raise ValueError("an utterance has no samples")
        frames = [-(-len(wav) // self.config.rows_per_frame) for wav in samples]
        return self._utterances(
            samples,
            frames,
            lambda wavs, packed: self._encode(wavs, packed, num_quantizers),
            lambda wav: self.encode_streams_hidden([Stream()], [wav], num_quantizers)[0],
        )

    def decode_utterances(self, codes: Sequence[Tensor]) -> list[Tensor]:
        """Codes (T_i, K_i) each, T_i >= 1, in range, to float32 samples (T_i · rows per frame,) each.

        Raises:
            ValueError: the decoder was not loaded.
        """
        return self._utterances(
            codes,
            [len(code) for code in codes],
            lambda members, packed: [samples for (samples,) in self._decode(members, packed)],
            lambda code: self.decode_streams([Stream()], [code])[0],
        )

    def encode_streams(self, streams: Sequence[Stream], samples: Sequence[Tensor], num_quantizers: int) -> list[Tensor]:
        """Continues each stream with its next samples, however many, in bounded memory.

        Args:
            samples: float32 (S_i,) each, whole frames; only an utterance's last ones may be fewer, and are zero-padded.

        Returns:
            codes int64 (T_i, ``num_quantizers``) each.
        """
        return [codes for codes, _ in self.encode_streams_hidden(streams, samples, num_quantizers)]

    def encode_streams_hidden(
        self, streams: Sequence[Stream], samples: Sequence[Tensor], num_quantizers: int
    ) -> list[tuple[Tensor, Tensor]]:
        """As ``encode_streams``, each with the hidden states float32 (T_i, d) that were quantized."""
        self._check_num_quantizers(num_quantizers)
        codes = torch.empty(0, num_quantizers, dtype=torch.int64, device=self.device)
        hidden = torch.empty(0, self.config.quantizer.input_dim, device=self.device)
        outputs = self._in_pieces(
            streams,
            samples,
            self.config.rows_per_frame,
            lambda wavs, packed: self._encode(wavs, packed, num_quantizers),
            (codes, hidden),
        )
        return [(codes, hidden) for codes, hidden in outputs]

    def decode_streams(self, streams: Sequence[Stream], codes: Sequence[Tensor]) -> list[Tensor]:
        """Continues each stream with its next codes (T_i, K_i), however many, in bounded memory.

        Returns:
            float32 samples (T_i · rows per frame,) each.
        """
        outputs = self._in_pieces(streams, codes, 1, self._decode, (torch.empty(0, device=self.device),))
        return [samples for (samples,) in outputs]

    @torch.no_grad()
    def hidden(self, samples: Tensor) -> Tensor:
        """Samples float32 (S,) of one utterance to hidden frames float32 (T, d) before the quantizer, in one pass."""
        return self._hidden([samples], PackedFrames([-(-len(samples) // self.config.rows_per_frame)], self.device))

    def _utterances(
        self,
        inputs: Sequence[Tensor],
        frames: Sequence[int],
        at_once: Callable[[list[Tensor], PackedFrames], Sequence[Result]],
        in_pieces: Callable[[Tensor], Result],
    ) -> list[Result]:
        """Each utterance as its own length requires: packed with others, alone, or in pieces."""
        results: dict[int, Result] = {}
        capacity = self._fixed_capacity()
        longest = self.stream_above if capacity is None else capacity
        short = [index for index, count in enumerate(frames) if count <= longest]
        for index in set(range(len(inputs))).difference(short):
            results[index] = in_pieces(inputs[index])
        lengths = [frames[index] for index in short]
        for group, size in packs_of(lengths, capacity, DEFAULT_CAPACITY, self.device):
            members = [short[place] for place in group]
            counts = [frames[index] for index in members]
            filler = [] if size is None else filler_runs(size - sum(counts))
            packed = PackedFrames([*counts, *filler], self.device)
            results.update(zip(members, at_once([inputs[index] for index in members], packed), strict=True))
        return [results[index] for index in range(len(inputs))]

    def _in_pieces(
        self,
        streams: Sequence[Stream],
        inputs: Sequence[Tensor],
        rows_a_frame: int,
        compute: Callable[[list[Tensor], PackedFrames], Sequence[tuple[Tensor, ...]]],
        empty: tuple[Tensor, ...],
    ) -> list[tuple[Tensor, ...]]:
        """Steps of at most one pass's frames, shared evenly by the streams that have input left.

        Args:
            compute: tensors of each input, all with a whole number of rows per frame.
            empty: these tensors for a stream without input.
        """
        capacity = self._fixed_capacity()
        longest = self.stream_above if capacity is None else capacity
        totals = [-(-len(rows) // rows_a_frame) for rows in inputs]
        outputs = [empty for _ in streams]
        done = [0] * len(streams)  # frames
        while active := [index for index, total in enumerate(totals) if done[index] < total]:
            share = max(1, longest // len(active))
            pieces = [inputs[index][done[index] * rows_a_frame :][: share * rows_a_frame] for index in active]
            frames = [min(share, totals[index] - done[index]) for index in active]
            packed = PackedFrames(frames, self.device, [streams[index] for index in active])
            for index, count, parts in zip(active, frames, compute(pieces, packed), strict=True):
                scales = [len(part) // count for part in parts]
                if not done[index]:
                    outputs[index] = tuple(
                        part.new_empty(totals[index] * scale, *part.shape[1:])
                        for part, scale in zip(parts, scales, strict=True)
                    )
                for output, part, scale in zip(outputs[index], parts, scales, strict=True):
                    output[done[index] * scale :][: len(part)] = part
                done[index] += count
            packed.advance()
        return outputs

    @torch.no_grad()
    def _encode(
        self, samples: Sequence[Tensor], packed: PackedFrames, num_quantizers: int
    ) -> list[tuple[Tensor, Tensor]]:
        """Codes and hidden states of each; filler beyond the last utterance is dropped."""
        with torch.autocast(self.device.type, enabled=False):
            hidden = self._hidden(samples, packed)
            codes = self.quantizer.encode(hidden, num_quantizers)
        counts = packed.frames.tolist()
        return list(zip(codes.split(counts), hidden.split(counts), strict=True))[: len(samples)]

    def _hidden(self, samples: Sequence[Tensor], packed: PackedFrames) -> Tensor:
        """Hidden float32 (N, d) of packed utterances, each zero-padded to its whole frames."""
        if self.encoder is None:
            raise ValueError("this model was loaded without its encoder")
        starts = packed.segments(self.config.rows_per_frame).starts.tolist()
        rows = samples[0].new_zeros(packed.segments(self.config.rows_per_frame).total)
        for start, wav in zip(starts, samples, strict=False):
            rows[start : start + len(wav)] = wav
        return self.encoder(to_device(rows, self.device).to(self.dtype)[:, None], packed).float()

    @torch.no_grad()
    def _decode(self, codes: Sequence[Tensor], packed: PackedFrames) -> list[tuple[Tensor]]:
        """Samples of each; filler beyond the last utterance is dropped."""
        if self.decoder is None:
            raise ValueError("this model was loaded without its decoder")
        segments = packed.segments(1)
        widest = max(code.shape[1] for code in codes)
        rows = torch.full((segments.total, widest), self.quantizer.unused, dtype=torch.int64, device=codes[0].device)
        for start, code in zip(segments.starts.tolist(), codes, strict=False):
            rows[start : start + len(code), : code.shape[1]] = code
        with torch.autocast(self.device.type, enabled=False):
            summed = self.quantizer.decode(to_device(rows, self.device))
            samples = self.decoder(summed.to(self.dtype), packed).float()[:, 0]
        counts = (packed.frames * self.config.rows_per_frame).tolist()
        return [(part,) for part in samples.split(counts)[: len(codes)]]

    def _fixed_capacity(self) -> int | None:
        return fixed_capacity(self.capacity, DEFAULT_CAPACITY, self.device)

    def _check_num_quantizers(self, num_quantizers: int) -> None:
        if not 1 <= num_quantizers <= self.config.quantizer.num_quantizers:
            raise ValueError(
                f"{num_quantizers} codebooks asked for: this checkpoint has 1 to {self.config.quantizer.num_quantizers}"
            )
