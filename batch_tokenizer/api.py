"""The Python interface of the published MiMo tokenizer package, under the same names.

    tokenizer = batch_tokenizer.load_model("XiaomiMiMo/MiMo-Audio-Tokenizer").bfloat16().cuda()
    wav = batch_tokenizer.load_audio("speech.flac", tokenizer.config.sampling_rate)
    mels, mels_lens = batch_tokenizer.padding([batch_tokenizer.mel_spectrogram(wav, tokenizer.config)])
    codes, codes_lens, _ = tokenizer.encode(mels.cuda(), mels_lens.cuda())
    wavs, wavs_lens, _ = tokenizer.decode(codes, codes_lens)

It computes no gradients and holds no state outside the model, so it also serves inside another module's ``forward``.

``load_codec`` opens a checkpoint of any family, and ``TokenDataset`` reads stored tokens back for training.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from batch_tokenizer.audio.loading import load_samples
from batch_tokenizer.audio.mel import log_mel_tensor
from batch_tokenizer.codecs.base import Codec
from batch_tokenizer.codecs.checkpoint import Checkpoint
from batch_tokenizer.codecs.mimo.codec import load_model as load_mimo
from batch_tokenizer.codecs.mimo.codec import recognises
from batch_tokenizer.codecs.mimo.config import MiMoConfig
from batch_tokenizer.codecs.mimo.model import MiMoAudioTokenizer
from batch_tokenizer.codecs.opening import CodecSetup
from batch_tokenizer.config import Device, Dtype, Resampler
from batch_tokenizer.dataset.patterns import (
    collate_tokens,
    delay_codes,
    flatten_codes,
    undelay_codes,
    unflatten_codes,
)
from batch_tokenizer.dataset.token_dataset import TokenDataset
from batch_tokenizer.records import RunError, Task
from batch_tokenizer.runs.token_stream import StoredStream

__all__ = [
    "TokenDataset",
    "collate_tokens",
    "delay_codes",
    "flatten_codes",
    "load_audio",
    "load_codec",
    "load_model",
    "mel_spectrogram",
    "open_token_stream",
    "padding",
    "undelay_codes",
    "unflatten_codes",
]


def load_model(path: str | os.PathLike[str] | None = None, *, load_encoder_only: bool = False) -> MiMoAudioTokenizer:
    """A MiMo checkpoint as a frozen ``nn.Module`` in float32 on the CPU.

    Args:
        path: checkpoint folder or hub id; None is the bundled default.
        load_encoder_only: leave the decoder's weights on disk; ``decode`` then raises ValueError.

    Raises:
        RunError: the checkpoint cannot be found or read, or is not a MiMo checkpoint; the message names what is wrong.
    """
    checkpoint = Checkpoint.open(None if path is None else os.fspath(path))
    if not recognises(checkpoint.config):
        raise RunError(f"{checkpoint.folder}: config.json is not of a MiMo-Audio-Tokenizer")
    parts = ("encoder",) if load_encoder_only else ("encoder", "decoder")
    return load_mimo(checkpoint, parts=parts, device=torch.device("cpu"))


def load_codec(
    path: str | os.PathLike[str] | None = None,
    *,
    task: Task = "wav2token2wav",
    device: Device = "auto",
    dtype: Dtype = "auto",
    threads: int = 1,
) -> Codec:
    """A checkpoint of any family behind one protocol: ``encode``, ``decode``, ``info``, and its ``spec``.

    ``codec.encode_files(paths)`` takes audio files to codes uint16 (T, K) each, ``codec.decode_to_files(codes, paths)``
    takes them back. ``codec.encode([codec.spec.features(samples)])`` does so with samples float32 (S,) at
    ``codec.info.sample_rate``, ``codec.decode`` gives samples. MOSS also has ``encode_stream`` and ``decode_stream``,
    which take chunks of several utterances as they arrive.

    Args:
        path: checkpoint folder, hub id or folder of ONNX graphs; None is the bundled default.
        task: decides which weights are read.
        dtype: ``auto`` is bfloat16 on CUDA where the family is made for it, else float32.
        threads: utterances computed side by side on a CPU, each with as many threads as torch is set to.

    Raises:
        RunError: the checkpoint or the device cannot be used; the message names what is wrong.
    """
    checkpoint = Checkpoint.open(None if path is None else os.fspath(path))
    return CodecSetup.open(checkpoint, device=device, dtype=dtype, threads=threads).load(task)


def load_audio(path: str | os.PathLike[str], sr: int, *, resampler: Resampler = "reference") -> Tensor:
    """Any audio file as mono float32 (S,) at ``sr`` Hz: each channel resampled, then their mean.

    Raises:
        RowError: the file cannot be read or holds no finite samples; the reason names it.
    """
    return torch.from_numpy(load_samples(os.fspath(path), sr, resampler, max_samples=None))


def mel_spectrogram(wav: Tensor, config: MiMoConfig) -> Tensor:
    """Log-mel float32 (n_mels, L) of samples (S,) at ``config.sampling_rate``; L = 1 + S // hop_length.

    Fewer than nfft/2 + 1 samples are padded with zeros to that many.

    Raises:
        ValueError: ``wav`` is of another shape or type, or empty.
    """
    if wav.ndim != 1 or not len(wav) or not wav.is_floating_point():
        raise ValueError(f"wav must be samples (S,) of floats, S >= 1; got {tuple(wav.shape)} of {wav.dtype}")
    return log_mel_tensor(wav, config.mel)


def padding(mels: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Log-mels (n_mels, L_i) to one batch (B, n_mels, max L) padded with zeros, and int64 (B,) lengths.

    Raises:
        ValueError: there are none, or they are not all (n_mels, L_i).
    """
    shapes = [tuple(mel.shape) for mel in mels]
    if not mels or any(len(shape) != 2 or shape[0] != shapes[0][0] for shape in shapes):
        raise ValueError(f"mels must be one or more log-mels (n_mels, L_i) of the same n_mels; got {shapes[:8]}")
    batch = pad_sequence([mel.t() for mel in mels], batch_first=True).transpose(1, 2)
    return batch, torch.tensor([mel.shape[1] for mel in mels], dtype=torch.int64)


def open_token_stream(folder: str | os.PathLike[str]) -> StoredStream:
    """A stream that ``batch_tokenizer convert --to megatron`` or ``flat`` wrote.

    ``len(stream)`` utterances; ``stream.read(n)`` is the key, the codes uint16 (T, K) and the fields of utterance n,
    and ``stream.text(n)`` the text that stands beside its codes.

    Raises:
        RowError: a file of it is missing, damaged, or does not fit the others.
    """
    return StoredStream.open(Path(folder))
