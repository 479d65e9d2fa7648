"""The encoder, which is that of Mimi: convolutions, a causal transformer, one more convolution, two quantizers.

Everything is causal, so what lies beyond an utterance's end changes nothing but its last frame, and the convolutions
see there what they see when the utterance is alone.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from batch_tokenizer.codecs.layers.attention import Rotation
from batch_tokenizer.codecs.layers.convolution import Conv1d, Padding
from batch_tokenizer.codecs.layers.norms import LayerScale
from batch_tokenizer.codecs.layers.padded import PaddedBatch
from batch_tokenizer.codecs.layers.quantizers import residual_codes
from batch_tokenizer.codecs.layers.seanet import SeanetEncoder
from batch_tokenizer.codecs.qwen3_tts.config import EncoderConfig, TransformerConfig
from batch_tokenizer.codecs.qwen3_tts.layers import CausalAttention, Pointwise, UsageCodebook, in_pieces
from batch_tokenizer.kernels.codebook import Float32Buffers

#: Token frames whose convolutions are computed at once.
PIECE_FRAMES = 375


def _conv(channels_in: int, channels_out: int, kernel_size: int, *, stride: int = 1, dilation: int = 1) -> Conv1d:
    padding = Padding.causal(kernel_size, stride, dilation)
    return Conv1d(channels_in, channels_out, kernel_size, padding=padding, stride=stride, dilation=dilation)


class Layer(nn.Module):
    """x + scale · attention(norm(x)), then x + scale · fc2(gelu(fc1(norm(x))))."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.self_attn = CausalAttention(config)
        self.mlp = nn.ModuleDict(
            {
                "fc1": nn.Linear(width, config.intermediate_size, bias=False),
                "fc2": nn.Linear(config.intermediate_size, width, bias=False),
            }
        )
        self.input_layernorm = nn.LayerNorm(width, config.norm_eps)
        self.post_attention_layernorm = nn.LayerNorm(width, config.norm_eps)
        self.self_attn_layer_scale = LayerScale(width)
        self.mlp_layer_scale = LayerScale(width)

    def forward(self, x: Tensor, rotation: Rotation, window: int | None) -> Tensor:
        """(B, T, d) to (B, T, d)."""
        x = x + self.self_attn_layer_scale(self.self_attn(self.input_layernorm(x), rotation, window))
        hidden = self.mlp["fc2"](gelu(self.mlp["fc1"](self.post_attention_layernorm(x))))
        return x + self.mlp_layer_scale(hidden)


class Transformer(nn.Module):
    """Layers; no norm at the end."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))

    def forward(self, x: Tensor, window: int | None) -> Tensor:
        """(B, T, d) to (B, T, d)."""
        config = self.config
        rotation = Rotation.of(x.shape[1], config.head_dim, base=config.rope_theta, device=x.device)
        for layer in self.layers:
            x = layer(x, rotation, window)
        return x


class EncodingQuantizer(Float32Buffers):
    """A projection of the latent and the codebooks that quantize it, each the residual of those before it."""

    def __init__(self, config: EncoderConfig, count: int) -> None:
        super().__init__()
        width, dim = config.transformer.hidden_size, config.codebook_dim
        self.input_proj = Pointwise(width, dim)
        self.layers = nn.ModuleList()
        for _ in range(count):
            codebook = UsageCodebook(config.codebook_size, dim, "embed_sum")
            self.layers.append(nn.ModuleDict({"codebook": codebook}))

    @property
    def codebooks(self) -> list[UsageCodebook]:
        """The codebooks in order."""
        return [cast(nn.ModuleDict, layer)["codebook"] for layer in self.layers]  # type: ignore[misc]

    def forward(self, hidden: Tensor, count: int) -> list[Tensor]:
        """Hidden frames float32 (N, d) to the first ``count`` codes, int64 (N,) each."""
        return residual_codes(self.codebooks[:count], self.input_proj(hidden))


class Encoder(nn.Module):
    """Samples to codes, in float32.

    Attributes:
        window: latent frames that a query of the transformer sees; None for all earlier ones.
        piece: token frames whose convolutions are computed at once.
    """

    def __init__(self, config: EncoderConfig, num_quantizers: int) -> None:
        super().__init__()
        self.config = config
        self.window: int | None = None
        self.piece = PIECE_FRAMES
        width, stride = config.transformer.hidden_size, config.downsample
        self.encoder = SeanetEncoder(config, _conv, width)
        self.encoder_transformer = Transformer(config.transformer)
        down = Padding.causal(2 * stride, stride, mode="replicate")
        self.downsample = Conv1d(width, width, 2 * stride, padding=down, stride=stride, bias=False)
        semantic = config.num_semantic_quantizers
        self.quantizer = nn.ModuleDict(
            {
                "semantic_residual_vector_quantizer": EncodingQuantizer(config, min(semantic, num_quantizers)),
                "acoustic_residual_vector_quantizer": EncodingQuantizer(config, max(0, num_quantizers - semantic)),
            }
        )

    def hidden(self, samples: PaddedBatch) -> PaddedBatch:
        """Samples (B, 1, S) to frames float32 (B, d, T) before quantization."""
        config = self.config
        frame = config.samples_per_latent * config.downsample
        latent = in_pieces(
            self.encoder,
            samples,
            size=self.piece,
            context=math.ceil(self.encoder.reach / frame),
            positions_in=frame,
            positions_out=config.downsample,
        )
        latent = latent.with_values(self.encoder_transformer(latent.values.mT, self.window).mT)
        return cast(PaddedBatch, self.downsample(latent))

    def forward(self, samples: PaddedBatch, num_quantizers: int) -> Tensor:
        """Samples (B, 1, S) to codes int64 (B, T, ``num_quantizers``)."""
        hidden = self.hidden(samples).values.mT
        rows = hidden.flatten(0, 1)
        semantic, acoustic = (cast(EncodingQuantizer, module) for module in self.quantizer.values())
        codes = semantic(rows, num_quantizers)
        codes += acoustic(rows, num_quantizers - len(codes))
        return torch.stack(codes, dim=-1).unflatten(0, hidden.shape[:2])
