"""Discriminators of the adversarial stage, and the least-squares losses of both sides (Mao et al., 2017).

Two families, small enough for a CPU: one takes the waveform folded at a prime period (HiFi-GAN, Kong et al., 2020), the
other its complex spectrum at one resolution (UnivNet, Jang et al., 2021). They take excerpts at unit level, so that
loudness does not tell originals from reconstructions.
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

#: Length in samples of the excerpts that the discriminators take.
EXCERPT = 8192

#: Outputs of every layer but the last (feature maps), and the scores of the last, with target 1 for originals and 0 for
#: reconstructions.
Judgement = tuple[list[Tensor], Tensor]


class PeriodDiscriminator(nn.Module):
    """Convolutions along every ``period``-th sample."""

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
    """Convolutions over real and imaginary parts of a short-time spectrum, time by frequency."""

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
        # A power law compresses the magnitudes, so that weak harmonics count too.
        x = x / (x.square().sum(dim=1, keepdim=True) + 1e-4) ** 0.35
        features = []
        for layer in self.layers:
            x = leaky_relu(layer(x), 0.1)
            features.append(x)
        return features, self.last(x)


class Adversary(nn.Module):
    """All discriminators with their optimizer and their count of steps."""

    steps: Tensor

    def __init__(self, learning_rate: float) -> None:
        super().__init__()
        self.register_buffer("steps", torch.tensor(0))
        self.periods = nn.ModuleList(PeriodDiscriminator(period) for period in PERIODS)
        self.spectra = nn.ModuleList(SpectrumDiscriminator(size) for size in WINDOWS)
        self.optimizer = torch.optim.AdamW(self.parameters(), lr=learning_rate, betas=(0.8, 0.99), fused=True)

    def chosen(self, step: int) -> list[nn.Module]:
        """Discriminators of a step: all of the periods and, in turn, one of the spectra."""
        return [*self.periods, self.spectra[step % len(self.spectra)]]

    @staticmethod
    def excerpts(output: Tensor, original: Tensor) -> tuple[Tensor, Tensor]:
        """Excerpts (B, ``EXCERPT``) from the same random place of both (B, S), divided by the original's level."""
        level = original.square().mean(dim=1, keepdim=True).sqrt().clamp(min=1e-4)
        start = int(torch.randint(0, max(1, original.shape[1] - EXCERPT), ()))
        place = slice(start, start + EXCERPT)
        return output[:, place] / level, original[:, place] / level

    def learn(self, output: Tensor, original: Tensor, step: int) -> tuple[Tensor, list[list[Tensor]]]:
        """One optimization step of the discriminators. Returns their loss and their feature maps of the originals."""
        self.requires_grad_(True)
        loss = output.new_zeros(())
        features = []
        networks = self.chosen(step)
        for network in networks:
            maps, real = network(original)
            _, fake = network(output.detach())
            loss = loss + ((real - 1).square().mean() + fake.square().mean()) / len(networks)
            features.append([feature.detach() for feature in maps])
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.requires_grad_(False)
        return loss.detach(), features

    def generator_losses(self, output: Tensor, features: list[list[Tensor]], step: int) -> tuple[Tensor, Tensor]:
        """Losses of the model: adversarial, and feature matching relative to the feature maps' magnitude."""
        adversarial, matching = output.new_zeros(()), output.new_zeros(())
        networks = self.chosen(step)
        for network, theirs in zip(networks, features, strict=True):
            ours, score = network(output)
            adversarial = adversarial + (score - 1).square().mean() / len(networks)
            for our, their in zip(ours, theirs, strict=True):
                matching = matching + (our - their).abs().mean() / their.abs().mean() / (len(networks) * len(ours))
        return adversarial, matching
