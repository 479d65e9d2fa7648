"""Spectral losses between reconstructions and originals.

Both are divided by the original's root mean square first, so a quiet example counts as much as a loud one and its
silence is as far below it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import l1_loss

from batch_tokenizer.audio.mel import transforms

#: Window in samples and mel bands of each resolution. Short windows resolve time, long ones harmonics.
RESOLUTIONS: Sequence[tuple[int, int]] = ((512, 40), (1024, 80), (2048, 128))

#: Magnitudes below this share of the original's root mean square count as silence (-60 dB).
FLOOR = 1e-3

#: Root mean square below which an original counts as silent and is no longer amplified (-80 dB of full scale).
MIN_LEVEL = 1e-4

#: Hz. The front end ends here, so the model has no input from above.
MEL_TOP = 8000.0

#: Frames of 13 ms over which envelopes are correlated, as in STOI: 384 ms.
ENVELOPE_FRAMES = 29

#: Weight of each distance in the loss.
WEIGHTS = {"mel": 1.0, "magnitude": 1.0, "envelope": 1.0, "loudness": 0.5, "level": 0.3}


class Spectrum(nn.Module):
    """Short-time magnitudes at one resolution, scaled so that a sine of amplitude 1 has magnitude 1."""

    window: Tensor
    filters: Tensor

    def __init__(self, size: int, bands: int, sample_rate: int) -> None:
        super().__init__()
        window = torch.hann_window(size)
        top = min(MEL_TOP, sample_rate / 2)
        self.size = size
        self.register_buffer("window", window * (2 / window.sum()))
        self.register_buffer(
            "filters", transforms.MelScale(bands, sample_rate, f_min=0.0, f_max=top, n_stft=size // 2 + 1).fb
        )

    def forward(self, samples: Tensor) -> Tensor:
        """float32 (B, S) to float32 (B, frames, size / 2 + 1), at least ``FLOOR``."""
        spectrum = torch.stft(samples, self.size, self.size // 4, window=self.window, return_complex=True)
        return (spectrum.real.square() + spectrum.imag.square() + FLOOR**2).sqrt().transpose(1, 2)


class EnvelopeLoss(nn.Module):
    """One minus the mean correlation of band envelopes over 384 ms, in third-octave bands from 150 Hz.

    It is the differentiable core of STOI (Taal et al., 2011), without its removal of silent frames and its clipping,
    in windows of 27 ms every 13 ms.
    """

    window: Tensor
    bands: Tensor

    def __init__(self, sample_rate: int, bands: int = 16) -> None:
        super().__init__()
        self.size = 2 * round(sample_rate / 75)
        frequencies = torch.arange(self.size // 2 + 1) * (sample_rate / self.size)
        centres = 150 * 2 ** (torch.arange(bands) / 3)
        low, high = centres * 2 ** (-1 / 6), centres * 2 ** (1 / 6)
        # A bin's share in a band is the overlap of both, so that narrow low bands have a part of a bin at least.
        half = sample_rate / self.size / 2
        overlap = torch.minimum(frequencies + half, high[:, None]) - torch.maximum(frequencies - half, low[:, None])
        self.register_buffer("window", torch.hann_window(self.size))
        self.register_buffer("bands", (overlap.clamp(min=0) / (2 * half)).t().contiguous())

    def envelopes(self, samples: Tensor) -> Tensor:
        """float32 (B, S) to band amplitudes (B, frames, bands)."""
        hop = self.size // 2
        spectrum = torch.stft(samples, self.size, hop, window=self.window, return_complex=True)
        power = (spectrum.real.square() + spectrum.imag.square()).transpose(1, 2)
        return (power @ self.bands + 1e-4).sqrt()

    def forward(self, output: Tensor, original: Tensor) -> Tensor:
        """Samples float32 (B, S) each, to a scalar. Segments more than 30 dB below the example's level count less."""
        ours, theirs = self.envelopes(output), self.envelopes(original)
        segment = min(ENVELOPE_FRAMES, ours.shape[1])
        ours, theirs = (envelopes.unfold(1, segment, max(1, segment // 4)) for envelopes in (ours, theirs))
        weight = theirs.square().mean(-1)
        weight = weight / (weight + 1e-3 * weight.mean(dim=(1, 2), keepdim=True))
        ours = ours - ours.mean(-1, keepdim=True)
        theirs = theirs - theirs.mean(-1, keepdim=True)
        norms = (ours.square().sum(-1) + 1e-4).sqrt() * (theirs.square().sum(-1) + 1e-4).sqrt()
        correlation = ((ours * theirs).sum(-1) + 1e-4) / norms
        return ((1 - correlation) * weight).sum() / weight.sum()


class LoudnessLoss(nn.Module):
    """Difference of loudness in 42 Bark bands, relative to the original's. Added sound counts more than missing sound.

    After the perceptual model of ITU-T P.862: windows of 32 ms, loudness as a power law of exponent 0.23 above the
    threshold of hearing, differences below a quarter of the lesser loudness masked, and an asymmetry factor
    ((added + c) / (original + c))^1.2. The original is taken to be heard at 79 dB.
    """

    window: Tensor
    bands: Tensor
    threshold: Tensor

    def __init__(self, sample_rate: int, bands: int = 42) -> None:
        super().__init__()
        self.size = 2 * round(sample_rate * 0.016)
        frequencies = torch.arange(self.size // 2 + 1) * (sample_rate / self.size)
        # Band edges by the inverse of Traunmüller's Bark scale; a bin's share of a band is the overlap of both.
        bark = torch.linspace(0.5, 21.2, bands + 1)
        edges = 1960 * (bark + 0.53) / (26.28 - bark)
        half = sample_rate / self.size / 2
        overlap = torch.minimum(frequencies + half, edges[1:, None]) - torch.maximum(
            frequencies - half, edges[:-1, None]
        )
        window = torch.hann_window(self.size)
        centres = (edges[1:] + edges[:-1]) / 2000  # kHz
        quiet = 3.64 * centres**-0.8 - 6.5 * torch.exp(-0.6 * (centres - 3.3) ** 2) + 1e-3 * centres**4  # Terhardt, dB
        self.register_buffer("window", window * (2 / window.square().sum()).sqrt() / self.size**0.5)
        self.register_buffer("bands", (overlap.clamp(min=0) / (2 * half)).t().contiguous())
        self.register_buffer("threshold", 10 ** ((quiet.clamp(0, 40) - 79) / 10))

    def powers(self, samples: Tensor) -> Tensor:
        """float32 (B, S) to power in each band (B, frames, bands); all bands of noise of unit power add up to 1."""
        spectrum = torch.stft(samples, self.size, self.size // 2, window=self.window, return_complex=True)
        return (spectrum.real.square() + spectrum.imag.square()).transpose(1, 2) @ self.bands

    def loudness(self, power: Tensor) -> Tensor:
        """Band powers to sones, up to a factor."""
        return (0.5 + 0.5 * power / self.threshold).pow(0.23) - 1

    def forward(self, output: Tensor, original: Tensor) -> Tensor:
        """Samples float32 (B, S) each, the original at unit root mean square, to a scalar."""
        ours, theirs = self.powers(output), self.powers(original)
        loud, target = self.loudness(ours).clamp(min=0), self.loudness(theirs).clamp(min=0)
        apart = (loud - target).abs() - 0.25 * torch.minimum(loud, target)
        apart = apart.clamp(min=0)
        factor = ((ours.detach() + 3e-5) / (theirs + 3e-5)).pow(1.2)
        factor = torch.where(factor < 3, 0.0, factor.clamp(max=12))
        frames = (apart.square().mean(-1) + 1e-8).sqrt() - 1e-4 + 0.309 * (apart * factor).mean(-1)
        return frames.mean() / target.mean().clamp(min=1e-3)


class SpectralLoss(nn.Module):
    """The weighted sum of five distances, the first two averaged over resolutions.

    ``mel``: mean absolute difference of log-mel spectra, in which quiet bands count as much as loud ones.
    ``magnitude``: that of square roots of magnitudes, bin by bin, which resolves harmonics. ``envelope``, ``loudness``:
    the classes above. ``level``: that of logarithms of root mean squares; the others alone leave sounds some decibels
    too quiet, as the median of an uncertain magnitude is below its mean.

    Waveforms are not compared: a mel front end keeps too little of the phases.
    """

    def __init__(self, sample_rate: int) -> None:
        super().__init__()
        self.spectra = nn.ModuleList(Spectrum(size, bands, sample_rate) for size, bands in RESOLUTIONS)
        self.envelope = EnvelopeLoss(sample_rate)
        self.loudness = LoudnessLoss(sample_rate)

    def forward(self, output: Tensor, original: Tensor, number: int | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Samples float32 (B, S) each to the loss and its parts by name.

        With a step's ``number`` two of the three resolutions are used, in turn: cheaper, and equal on average.
        """
        level = original.square().mean(dim=1, keepdim=True).sqrt().clamp(min=MIN_LEVEL)
        output, original = output / level, original / level
        count = len(self.spectra)
        chosen = (
            range(count) if number is None else {number % count, (number + 1 + number // count % (count - 1)) % count}
        )
        parts: dict[str, Tensor] = {name: output.new_zeros(()) for name in ("mel", "magnitude")}
        for index in chosen:
            spectrum = self.spectra[index]
            our_magnitude = spectrum(output)
            with torch.no_grad():
                their_magnitude = spectrum(original)
                their_mel = (their_magnitude @ spectrum.filters).clamp_(min=FLOOR).log_()
                their_root = their_magnitude.sqrt()
            # A mel band's amplitude is the sum of its bins, as in the front end.
            parts["mel"] = parts["mel"] + l1_loss((our_magnitude @ spectrum.filters).clamp(min=FLOOR).log(), their_mel)
            apart = l1_loss(our_magnitude.sqrt(), their_root)
            parts["magnitude"] = parts["magnitude"] + apart / their_root.mean()
        parts = {name: part / len(chosen) for name, part in parts.items()}
        parts["envelope"] = self.envelope(output, original)
        parts["loudness"] = self.loudness(output, original)
        ours, theirs = (0.5 * (samples.square().mean(dim=1) + FLOOR**2).log() for samples in (output, original))
        parts["level"] = l1_loss(ours, theirs)
        return torch.stack([WEIGHTS[name] * part for name, part in parts.items()]).sum(), parts
