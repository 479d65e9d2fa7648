"""Layers of MiMo's encoder, decoder and vocoder: pre-norm transformer layers over packed rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear

from batch_tokenizer.codecs.layers.packed import Rotation
from batch_tokenizer.kernels.attention import Window, choose_backend, varlen_attention
from batch_tokenizer.kernels.norms import RMSNorm
from batch_tokenizer.kernels.segments import Segments


class CompilationFailed(Exception):
    """Layers cannot be compiled here; the message is the compiler's first line."""


def make_norm(kind: str, channels: int) -> nn.Module:
    """``LayerNorm`` (eps 1e-5) or ``RMSNorm`` (eps 1e-6)."""
    return nn.LayerNorm(channels) if kind == "LayerNorm" else RMSNorm(channels)


def activate(x: Tensor) -> Tensor:
    """The exact GELU; in place where no gradient needs what was there, as new memory for wide rows is slow on a CPU."""
    return gelu(x) if x.requires_grad else torch.ops.aten.gelu_(x)


class SelfAttention(nn.Module):
    """softmax(rot(q) rot(k)ᵀ / sqrt(D)) v within each utterance; q, v and out have biases, k has none."""

    def __init__(self, width: int, heads: int, window: Window) -> None:
        super().__init__()
        self.heads = heads
        self.window = window
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)
        #: Weight (3 width, width) and bias (3 width,) of queries, keys and values together; None for one by one.
        self.joined: tuple[Tensor, Tensor] | None = None

    def project(self, rows: Tensor, rotate: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        """(N, width) to queries and keys, rotated, and values, (N, H, D) each."""
        if self.joined is None:
            q, k, v = self.q_proj(rows), self.k_proj(rows), self.v_proj(rows)
        else:
            q, k, v = linear(rows, *self.joined).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in (q, k, v))
        return rotate(q), rotate(k), v

    def join_projections(self) -> None:
        """Computes queries, keys and values in one matrix product from now on, which is faster on a GPU.

        The three weights become views of the joined one, so that no memory is added.
        """
        weight = torch.cat([self.q_proj.weight, self.k_proj.weight, self.v_proj.weight])
        no_bias = torch.zeros_like(self.q_proj.bias)
        self.joined = weight, torch.cat([self.q_proj.bias, no_bias, self.v_proj.bias])
        for projection, part in zip((self.q_proj, self.k_proj, self.v_proj), weight.chunk(3), strict=True):
            projection.weight = nn.Parameter(part, requires_grad=False)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments, backend: str) -> Tensor:
        """(N, H, D) each to (N, width)."""
        return varlen_attention(q, k, v, segments, window=self.window, backend=backend).flatten(1)


class TransformerLayer(nn.Module):
    """x + attention(norm(x)), then x + fc2(gelu(fc1(norm(x))))."""

    def __init__(self, width: int, heads: int, hidden: int, window: Window, norm: str) -> None:
        super().__init__()
        self.self_attn = SelfAttention(width, heads, window)
        self.self_attn_layer_norm = make_norm(norm, width)
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.final_layer_norm = make_norm(norm, width)

    def before(self, x: Tensor, rotate: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        """(N, width) to what attention takes, (N, H, D) each."""
        return self.self_attn.project(self.self_attn_layer_norm(x), rotate)

    def after(self, x: Tensor, attended: Tensor) -> Tensor:
        """The layer's input and its attention's output, (N, width) both, to the layer's output."""
        x = x + self.self_attn.out_proj(attended)
        return x + self.fc2(activate(self.fc1(self.final_layer_norm(x))))

    def forward(self, x: Tensor, rotate: Rotation, segments: Segments, backend: str) -> Tensor:
        """(N, width) to (N, width)."""
        return self.after(x, self.self_attn.attend(*self.before(x, rotate), segments, backend))


class TransformerStack(nn.ModuleList):
    """Layers of one width that share positions and a window. An ``nn.ModuleList``, so parameters are ``layers.N.…``."""

    def __init__(
        self, count: int, width: int, heads: int, hidden: int, window: Window, causal: bool, norm: str, theta: float
    ) -> None:
        seen = (window[0], 0) if causal else window
        super().__init__(TransformerLayer(width, heads, hidden, seen, norm) for _ in range(count))
        self.head_dim = width // heads
        self.theta = theta
        self.attention = "auto"
        #: Runs a layer, as ``TransformerLayer.__call__`` does.
        self.run_layer: Callable[..., Tensor] = TransformerLayer.__call__

    def forward(self, x: Tensor, segments: Segments, skip: int | None = None) -> Tensor:
        """(N, width) to (N, width). The output of layer number ``skip``, from 1, is added to the last one's."""
        rotate = Rotation(segments.positions, self.head_dim, self.theta)
        backend, _ = choose_backend(self.attention, x.device, x.dtype, self.head_dim)
        skipped: Tensor | None = None
        for number, layer in enumerate(self, start=1):
            x = self.run_layer(layer, x, rotate, segments, backend)
            if number == skip:
                skipped = x
        return x if skipped is None else x + skipped
