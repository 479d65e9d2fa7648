"""MiMo's mel front end on the device: samples of packed utterances enter, log-mel rows on the encoder's axis leave.

The same equation as ``audio.mel``, for all utterances of a pack at once. Each row of the axis gathers its own window of
samples, reflected at its utterance's ends, so that no window sees a neighbour, and every row goes through transform and
filters at a shape that depends on the length of the axis alone.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from batch_tokenizer.audio.mel import FLOOR, MelForm, mel_transform
from batch_tokenizer.kernels.segments import GappedAxis, Lengths, to_device, within

#: Rows of the axis whose windows are in memory at once, 160 MB of them at 960 samples.
BLOCK_ROWS = 8192


def packed_log_mel(samples: Tensor, lengths: Lengths, axis: GappedAxis, form: MelForm) -> Tensor:
    """Log-mel float32 (axis.size, n_mels), zero where the axis has no frame.

    Args:
        samples: float32 (N,) on any device: utterances one after the other.
        lengths: int64 (S,), samples of each, more than half a transform (``form.least_samples``).
        axis: where each utterance's frames lie; ``axis.lengths`` are 1 + lengths // hop.
    """
    device = samples.device
    transform = mel_transform(form, device)
    window, filters = transform.spectrogram.window, transform.mel_scale.fb  # the window is as long as the transform
    # Of each row: whether it is a frame, its utterance's first and last sample, and where its window begins there.
    table = np.zeros((axis.size, 4), np.int32)
    frames = within(axis.lengths)
    rows = frames + np.repeat(axis.starts, axis.lengths)
    table[rows, 0] = 1
    table[rows, 1] = np.repeat(np.cumsum(lengths) - lengths, axis.lengths)
    table[rows, 2] = np.repeat(lengths - 1, axis.lengths)
    table[rows, 3] = frames * form.hop_length - form.n_fft // 2
    is_frame, first, last, begin = to_device(table, device)[:, :, None].unbind(1)
    steps = torch.arange(form.n_fft, dtype=torch.int32, device=device)
    mel = torch.empty(axis.size, form.n_mels, device=device)
    for start in range(0, axis.size, BLOCK_ROWS):
        block = slice(start, min(axis.size, start + BLOCK_ROWS))
        # Reflected at both ends: -p for a place p < 0, and 2 · last - p for one behind the last.
        place = last[block] - (last[block] - (begin[block] + steps).abs()).abs()
        windows = samples[(first[block] + place) * is_frame[block]] * window
        mel[block] = torch.fft.rfft(windows).abs() @ filters
    return mel.clamp_(min=FLOOR).log_().mul_(is_frame)
