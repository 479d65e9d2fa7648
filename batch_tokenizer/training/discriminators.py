"""The adversarial stage: small networks that learn to distinguish reconstructions from originals.

Two families, after HiFi-GAN and Vocos, small enough for a processor: one sees the waveform folded at a prime period,
the other its complex spectrum at one resolution. They see excerpts at unit level, so that loudness is no clue.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu, pad
from torch.nn.utils.parametrizations import weight_norm

PERIODS: Sequence[int] = (2, 3, 5, 7, 11)
WINDOWS: Sequence[int] = (512, 1024, 2048)

#: Samples of an excerpt that the discriminators see.
EXCERPT = 8192

#: Outputs of every layer but the last, and the last one's: a score for each place, 1 for original, 0 for made.
Judgement = tuple[list[Tensor], Tensor]


class PeriodDiscriminator(nn.Module):
    """Sees every ``period``-th sample as one signal, ``period`` of them side by side."""

    def __init__(self, period: int, channels: Sequence[int] = (8, 24, 48, 64)) -> None:
        super().__init__()
        self.period = period
        widths = [1, *channels]
        self.layers = nn.ModuleList(
            weight_norm(nn.Conv1d(before, after, 5, stride=3, padding=2)) for before, after in pairwise(widths)
        )
        self.last = weight_norm(nn.Conv1d(widths[-1], 1, 3, padding=1))

    def forward(self, samples: Tensor) -> Judgement:
        """Samples (B, S)."""
        x = pad(samples, (0, -samples.shape[1] % self.period))
        x = x.unflatten(1, (-1, self.period)).transpose(1, 2).flatten(0, 1)[:, None]
        features = []
        for layer in self.layers:
            x = leaky_relu(layer(x), 0.1)
            features.append(x)
        return features, self.last(x)


class SpectrumDiscriminator(nn.Module):
    """Sees real and imaginary parts of a short-time spectrum, time by frequency."""

    window: Tensor

    def __init__(self, size: int, channels: Sequence[int] = (8, 16, 16, 24)) -> None:
        super().__init__()
        self.size = size
        self.register_buffer("window", torch.hann_window(size))
        widths = [2, *channels]
        self.layers = nn.ModuleList(
            weight_norm(nn.Conv2d(before, after, (3, 7), stride=(1, 3), padding=(1, 3)))
            for before, after in pairwise(widths)
        )
        self.last = weight_norm(nn.Conv2d(widths[-1], 1, 3, padding=1))

    def forward(self, samples: Tensor) -> Judgement:
        """Samples (B, S)."""
        spectrum = torch.stft(samples, self.size, self.size // 4, window=self.window, return_complex=True)
        x = torch.view_as_real(spectrum).permute(0, 3, 2, 1) / self.size**0.5
        # A power law of the magnitudes, so that weak harmonics are seen too.
        x = x / (x.square().sum(dim=1, keepdim=True) + 1e-4) ** 0.35
        features = []
        for layer in self.layers:
            x = leaky_relu(layer(x), 0.1)
            features.append(x)
        return features, self.last(x)


class Adversary(nn.Module):
    """All discriminators, their optimizer, and both sides' losses."""

    steps: Tensor

    def __init__(self, learning_rate: float) -> None:
        super().__init__()
        self.register_buffer("steps", torch.tensor(0))
        self.periods = nn.ModuleList(PeriodDiscriminator(period) for period in PERIODS)
        self.spectra = nn.ModuleList(SpectrumDiscriminator(size) for size in WINDOWS)
        self.optimizer = torch.optim.AdamW(self.parameters(), lr=learning_rate, betas=(0.8, 0.99), fused=True)

    def chosen(self, step: int) -> list[nn.Module]:
        """Those that take part in a step: all periods' and, in turn, one of the spectra's."""
        return [*self.periods, self.spectra[step % len(self.spectra)]]

    @staticmethod
    def excerpts(made: Tensor, original: Tensor) -> tuple[Tensor, Tensor]:
        """Excerpts (B, ``EXCERPT``) from the same random place of both, at the original's level brought to one."""
        level = original.square().mean(dim=1, keepdim=True).sqrt().clamp(min=1e-4)
        start = int(torch.randint(0, max(1, original.shape[1] - EXCERPT), ()))
        place = slice(start, start + EXCERPT)
        return made[:, place] / level, original[:, place] / level

    def learn(self, made: Tensor, original: Tensor, step: int) -> tuple[Tensor, list[list[Tensor]]]:
        """One step of the discriminators on excerpts; returns their loss and their features of the original."""
        self.requires_grad_(True)
        loss = made.new_zeros(())
        features = []
        networks = self.chosen(step)
        for network in networks:
            known, real = network(original)
            _, fake = network(made.detach())
            loss = loss + ((real - 1).square().mean() + fake.square().mean()) / len(networks)
            features.append([feature.detach() for feature in known])
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.requires_grad_(False)
        return loss.detach(), features

    def generator_losses(self, made: Tensor, features: list[list[Tensor]], step: int) -> tuple[Tensor, Tensor]:
        """The model's adversarial loss (least squares) and feature-matching loss (relative L1) on its excerpts."""
        fooled, apart = made.new_zeros(()), made.new_zeros(())
        networks = self.chosen(step)
        for network, theirs in zip(networks, features, strict=True):
            ours, score = network(made)
            fooled = fooled + (score - 1).square().mean() / len(networks)
            for our, their in zip(ours, theirs, strict=True):
                apart = apart + (our - their).abs().mean() / their.abs().mean() / (len(networks) * len(ours))
        return fooled, apart
