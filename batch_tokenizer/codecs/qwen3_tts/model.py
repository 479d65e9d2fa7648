"""The encoder and the decoder of a Qwen3-TTS-Tokenizer-12Hz as one module, under the published names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from batch_tokenizer.codecs.layers.padded import PaddedBatch
from batch_tokenizer.codecs.qwen3_tts.config import Qwen3TtsConfig
from batch_tokenizer.codecs.qwen3_tts.decoder import Decoder
from batch_tokenizer.codecs.qwen3_tts.encoder import Encoder
from batch_tokenizer.codecs.qwen3_tts.layers import UsageCodebook


class Qwen3TtsTokenizer(nn.Module):
    """The parts of a Qwen3-TTS-Tokenizer-12Hz that are needed.

    Args:
        codebooks: of the encoder; those that are used where not given. The published encoder has more.
    """

    def __init__(
        self, config: Qwen3TtsConfig, parts: Sequence[str] = ("encoder", "decoder"), codebooks: int | None = None
    ) -> None:
        super().__init__()
        self.encoder = Encoder(config.encoder, codebooks or config.num_quantizers) if "encoder" in parts else None
        self.decoder = Decoder(config.decoder) if "decoder" in parts else None

    @torch.no_grad()
    def fold(self) -> None:
        """Makes codebook rows of the stored sums, once, after the published tensors are in place."""
        for module in list(self.modules()):
            if isinstance(module, UsageCodebook):
                module.fold()

    def hidden(self, samples: PaddedBatch) -> PaddedBatch:
        """Samples (B, 1, S) to frames float32 (B, d, T) before quantization."""
        return self._encoder().hidden(samples)

    def encode(self, samples: PaddedBatch, num_quantizers: int) -> Tensor:
        """Samples (B, 1, S) to codes int64 (B, T, ``num_quantizers``)."""
        return cast(Tensor, self._encoder()(samples, num_quantizers))

    def decode(self, codes: PaddedBatch) -> Tensor:
        """Codes int64 (B, K, T) to samples float32 (B, S); of fewer codebooks than all the rows are summed."""
        if self.decoder is None:
            raise ValueError("this model was loaded without its decoder")
        return cast(Tensor, self.decoder(codes)).float()

    def _encoder(self) -> Encoder:
        if self.encoder is None:
            raise ValueError("this model was loaded without its encoder")
        return self.encoder
