"""How far a reconstruction is from the original: waveforms enter, one number leaves.

They are compared by their spectra at several resolutions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import l1_loss

from batch_tokenizer.audio.mel import transforms

#: Window in samples and mel bands of each resolution. Short windows see when, long ones see which harmonic.
RESOLUTIONS: Sequence[tuple[int, int]] = ((512, 40), (1024, 80), (2048, 128))

#: Amplitudes below this count as silence, -80 dB of full scale.
FLOOR = 1e-4


class Spectrum(nn.Module):
    """Short-time magnitudes at one resolution, scaled so that a full-scale sine has magnitude 1."""

    window: Tensor
    filters: Tensor

    def __init__(self, size: int, bands: int, sample_rate: int) -> None:
        super().__init__()
        window = torch.hann_window(size)
        self.size = size
        self.register_buffer("window", window * (2 / window.sum()))
        self.register_buffer("filters", transforms.MelScale(bands, sample_rate, n_stft=size // 2 + 1).fb)

    def forward(self, samples: Tensor) -> Tensor:
        """float32 (B, S) to float32 (B, frames, size / 2 + 1), at least ``FLOOR``."""
        spectrum = torch.stft(samples, self.size, self.size // 4, window=self.window, return_complex=True)
        return (spectrum.real.square() + spectrum.imag.square() + FLOOR**2).sqrt().transpose(1, 2)


class SpectralLoss(nn.Module):
    """Two distances between spectra, added, and averaged over all resolutions.

    That of log-mel hears each band, the quiet ones too; that of square roots of magnitudes, bin by bin, the harmonics.

    Phases are left to the model: what a mel front end keeps of them does not suffice to foretell them.
    """

    def __init__(self, sample_rate: int) -> None:
        super().__init__()
        self.spectra = nn.ModuleList(Spectrum(size, bands, sample_rate) for size, bands in RESOLUTIONS)

    def forward(self, made: Tensor, original: Tensor, number: int | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Samples float32 (B, S) each to the loss, and its parts by name for the log.

        ``number`` takes two of the resolutions in turn, which costs half as much and is the same on average.
        """
        count = len(self.spectra)
        chosen = (
            range(count) if number is None else {number % count, (number + 1 + number // count % (count - 1)) % count}
        )
        parts: dict[str, Tensor] = {name: made.new_zeros(()) for name in ("mel", "magnitude")}
        for index in chosen:
            spectrum = self.spectra[index]
            our_magnitude = spectrum(made)
            with torch.no_grad():
                their_magnitude = spectrum(original)
                their_mel = (their_magnitude @ spectrum.filters).clamp_(min=FLOOR).log_()
                their_root = their_magnitude.sqrt()
            # A mel band's amplitude is the sum of its bins, as in the front end.
            parts["mel"] = parts["mel"] + l1_loss((our_magnitude @ spectrum.filters).clamp(min=FLOOR).log(), their_mel)
            apart = l1_loss(our_magnitude.sqrt(), their_root)
            parts["magnitude"] = parts["magnitude"] + apart / their_root.mean()
        parts = {name: part / len(chosen) for name, part in parts.items()}
        return parts["mel"] + parts["magnitude"], parts
