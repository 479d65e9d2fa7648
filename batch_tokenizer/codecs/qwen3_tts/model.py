"""The encoder and the decoder of a Qwen3-TTS-Tokenizer-12Hz as one module, under the published names."""

from __future__ import annotations

import torch
from torch import nn

from batch_tokenizer.codecs.layers.padded import PaddedBatch
from batch_tokenizer.codecs.qwen3_tts.config import Qwen3TtsConfig
from batch_tokenizer.codecs.qwen3_tts.decoder import Decoder
from batch_tokenizer.codecs.qwen3_tts.encoder import Encoder
from batch_tokenizer.codecs.qwen3_tts.layers import UsageCodebook


class Qwen3TtsTokenizer(nn.Module):
    """A Qwen3-TTS-Tokenizer-12Hz.

    Args:
        encoding: codebooks of the encoder, or None for no encoder.
        decoding: whether there is a decoder.
    """

    def __init__(self, config: Qwen3TtsConfig, *, encoding: int | None, decoding: bool = True) -> None:
        super().__init__()
        self.encoder = None if encoding is None else Encoder(config.encoder, encoding)
        self.decoder = Decoder(config.decoder) if decoding else None

    @torch.no_grad()
    def fold(self) -> None:
        """Makes codebook rows of the stored sums, once, after the published tensors are in place."""
        for module in list(self.modules()):
            if isinstance(module, UsageCodebook):
                module.fold()

    def hidden(self, samples: PaddedBatch) -> PaddedBatch:
        """Samples (B, 1, S) to frames float32 (B, d, T) before quantization."""
        if self.encoder is None:
            raise ValueError("this model was loaded without its encoder")
        return self.encoder.hidden(samples)
