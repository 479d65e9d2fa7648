"""Training of the residual quantizer: codebooks that follow the data by moving averages, not by gradients.

Each codebook is initialized by k-means of the residuals of the one before, and then follows the residuals that chose
each of its rows (van den Oord et al., 2017, appendix A.1). Rows that fall out of use are replaced by random residuals.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from batch_tokenizer.codecs.mimo.quantizer import ResidualVectorQuantizer
from batch_tokenizer.kernels.codebook import nearest_rows

#: A row chosen less often than this share of its codebook's average is replaced.
DEAD_SHARE = 0.1


def k_means(rows: Tensor, size: int, iterations: int = 10) -> Tensor:
    """``size`` centres (size, d) of rows (N, d), N >= 1, from random rows; an empty cluster gets a random row."""
    draw = torch.randint(len(rows), (size,), device=rows.device)
    if len(rows) >= size:
        draw = torch.randperm(len(rows), device=rows.device)[:size]
    centres = rows[draw].clone()
    for _ in range(iterations):
        counts, sums = _gather(rows, nearest_rows(rows, centres), size)
        fresh = rows[torch.randint(len(rows), (size,), device=rows.device)]
        centres = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], fresh)
    return centres


def _gather(rows: Tensor, codes: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """For each code the number of rows that have it, float32 (size,), and their sum (size, d)."""
    counts = torch.bincount(codes, minlength=size).to(rows.dtype)
    sums = rows.new_zeros(size, rows.shape[1]).index_add_(0, codes, rows)
    return counts, sums


@dataclass(frozen=True)
class Quantized:
    """N hidden frames after quantization.

    Attributes:
        rows: (N, d), sums of codebook rows, with the gradient of the hidden frames (straight-through).
        commitment: scalar, mean squared distance between the hidden frames and their sums after each codebook.
    """

    rows: Tensor
    commitment: Tensor


class CodebookTrainer(nn.Module):
    """Moving averages for each codebook of a quantizer. Its buffers are part of the training state.

    For codebook i: ``count_i`` (size,), how often each row is chosen per batch, and ``sum_i`` (size, d), the sum of the
    residuals that chose it. A row is their quotient.
    """

    ready: Tensor

    def __init__(self, quantizer: ResidualVectorQuantizer, decay: float = 0.99) -> None:
        super().__init__()
        self._quantizer = [quantizer]  # in a list, so that it is no part of this module
        self.decay = decay
        self.register_buffer("ready", torch.tensor(False))
        for index, codebook in enumerate(quantizer.codebooks):
            self.register_buffer(f"count_{index}", torch.zeros(len(codebook.embed)))
            self.register_buffer(f"sum_{index}", torch.zeros_like(codebook.embed))

    @torch.no_grad()
    def start(self, rows: Tensor) -> None:
        """K-means of hidden frames (N, d), codebook after codebook."""
        residual = rows.detach().float()
        for index, codebook in enumerate(self._quantizer[0].codebooks):
            size = len(codebook.embed)
            codebook.embed.copy_(k_means(residual, size))
            codes = nearest_rows(residual, codebook.embed)
            counts = torch.bincount(codes, minlength=size).float()
            # The average is that of a codebook in use for long, but light enough to move in the first steps.
            getattr(self, f"count_{index}").copy_(counts.clamp(min=counts.mean()))
            self._restore_sum(index)
            residual = residual - codebook.embed[codes]
        self.ready.fill_(True)

    def forward(self, hidden: Tensor, used: Tensor) -> Quantized:
        """Quantizes, and in training mode moves the codebooks towards ``hidden``.

        Args:
            hidden: (N, d).
            used: int64 (N,), number of codebooks that each frame is decoded from. All frames update all codebooks.
        """
        target = hidden.detach().float()
        total = torch.zeros_like(target)
        commitment = hidden.new_zeros(())
        chosen = torch.zeros_like(target)
        for index, codebook in enumerate(self._quantizer[0].codebooks):
            residual = target - total
            codes = nearest_rows(residual, codebook.embed)
            total = total + codebook.embed[codes]
            active = (index < used)[:, None]
            chosen = torch.where(active, total, chosen)
            commitment = commitment + ((hidden - total).square() * active).mean()
            if self.training:
                self._move(index, residual, codes)
        return Quantized(rows=hidden + (chosen - target), commitment=commitment / len(self._quantizer[0].codebooks))

    @torch.no_grad()
    def _move(self, index: int, residual: Tensor, codes: Tensor) -> None:
        codebook = self._quantizer[0].codebooks[index]
        count, total = getattr(self, f"count_{index}"), getattr(self, f"sum_{index}")
        counts, sums = _gather(residual, codes, len(count))
        count.lerp_(counts, 1 - self.decay)
        total.lerp_(sums, 1 - self.decay)
        codebook.embed.copy_(total / count.clamp(min=1e-6)[:, None])
        self.revive(index, residual)

    @torch.no_grad()
    def revive(self, index: int, residual: Tensor) -> int:
        """Replaces unused rows of codebook ``index`` by random rows of ``residual`` (N, d). Returns how many."""
        codebook = self._quantizer[0].codebooks[index]
        count = getattr(self, f"count_{index}")
        mean = count.mean()
        dead = (count < DEAD_SHARE * mean).nonzero()[:, 0]
        if len(dead):
            draw = torch.randint(len(residual), (len(dead),), device=residual.device)
            codebook.embed[dead] = residual[draw]
            count[dead] = mean
            self._restore_sum(index)
        return len(dead)

    def _restore_sum(self, index: int) -> None:
        """Sets the sums to rows times counts."""
        embed = self._quantizer[0].codebooks[index].embed
        getattr(self, f"sum_{index}").copy_(embed * getattr(self, f"count_{index}")[:, None])


def perplexity(codes: Tensor, size: int) -> float:
    """Exponential of the entropy of the codes' frequencies, between 1 and ``size``."""
    shares = torch.bincount(codes.flatten(), minlength=size).double()
    shares = shares[shares > 0] / shares.sum()
    return float((-(shares * shares.log()).sum()).exp())
