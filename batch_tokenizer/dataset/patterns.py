"""Codes as language models read them: one sequence of ids, or codebooks that are delayed against each other.

    flattened   frame by frame, the K codes of each one after the other            (T * K,)
    delayed     codebook k comes k steps late; where it has no code, padding       (T + K - 1, K)

Code c of codebook k becomes the id ``offsets[k] + c``, so that codebooks share one vocabulary without meeting. Offsets
of zero leave codes as they are, for models with a vocabulary for each codebook. The delayed pattern is that of MusicGen
(Copet et al., Simple and Controllable Music Generation, 2023: codebook interleaving patterns).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

Pattern = Literal["flattened", "delayed"]


def flatten_codes(codes: Tensor, offsets: Sequence[int] | None = None) -> Tensor:
    """Codes of an utterance as one sequence.

    Args:
        codes: integers (T, K).
        offsets: the first id of each codebook; None for zeros.

    Returns:
        int64 (T * K,): id ``t * K + k`` is that of frame t and codebook k.

    Raises:
        ValueError: there are not K offsets.
    """
    return (codes.long() + _offsets(offsets, codes.shape[-1], codes.device)).reshape(-1)


def unflatten_codes(tokens: Tensor, num_codebooks: int, offsets: Sequence[int] | None = None) -> Tensor:
    """The codes int64 (T, K) of ids (T * K,) that ``flatten_codes`` made.

    Raises:
        ValueError: they are no whole frames, or there are not K offsets.
    """
    if tokens.ndim != 1 or len(tokens) % num_codebooks:
        raise ValueError(f"ids {tuple(tokens.shape)} are no frames of {num_codebooks} codebooks")
    return tokens.long().reshape(-1, num_codebooks) - _offsets(offsets, num_codebooks, tokens.device)


def delay_codes(codes: Tensor, padding_id: int, offsets: Sequence[int] | None = None) -> Tensor:
    """Codes of an utterance with codebook k shifted by k steps.

    Args:
        codes: integers (T, K).
        padding_id: stands where a codebook has no code: k times before its codes, K - 1 - k times behind them.
        offsets: the first id of each codebook; None for zeros.

    Returns:
        int64 (T + K - 1, K): step ``t + k`` of codebook k is its id of frame t.

    Raises:
        ValueError: there are not K offsets.
    """
    num_frames, num_codebooks = codes.shape
    ids = codes.long() + _offsets(offsets, num_codebooks, codes.device)
    delayed = ids.new_full((num_frames + num_codebooks - 1, num_codebooks), padding_id)
    for codebook in range(num_codebooks):
        delayed[codebook : codebook + num_frames, codebook] = ids[:, codebook]
    return delayed


def undelay_codes(tokens: Tensor, offsets: Sequence[int] | None = None) -> Tensor:
    """The codes int64 (T, K) of ids (T + K - 1, K) that ``delay_codes`` made.

    Raises:
        ValueError: there are fewer steps than K, or not K offsets.
    """
    num_steps, num_codebooks = tokens.shape
    num_frames = num_steps - num_codebooks + 1
    if num_frames < 1:
        raise ValueError(f"{num_steps} steps are too few for {num_codebooks} delayed codebooks")
    columns = [tokens[codebook : codebook + num_frames, codebook] for codebook in range(num_codebooks)]
    return torch.stack(columns, dim=1).long() - _offsets(offsets, num_codebooks, tokens.device)


def collate_tokens(
    batch: Sequence[Mapping[str, Any]],
    pattern: Pattern = "flattened",
    *,
    padding_id: int,
    offsets: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Rows of a ``TokenDataset`` as one batch: ``collate_fn=functools.partial(collate_tokens, padding_id=...)``.

    Args:
        batch: B rows, with codes (T_i, K) of one K.
        padding_id: fills what is behind the end of a row, and in the delayed pattern what has no code.
        offsets: the first id of each codebook; None for zeros.

    Returns:
        ``tokens``: int64 (B, L), L the largest T_i * K, or delayed (B, L, K), L the largest T_i + K - 1;
        ``lengths``: int64 (B,), of each row along L: ``tokens[i, :lengths[i]]`` is what ``unflatten_codes`` and
        ``undelay_codes`` take; ``keys``: list of B str; ``fields``: list of B dict; where rows have other codes,
        ``other_codes``: list of B dict, as the rows have them; and where all rows have audio, ``audio``: float32
        (B, S), or (B, channels, S), padded with zeros, ``audio_lengths``: int64 (B,), and ``sample_rate``: list of B
        Hz.

    Raises:
        ValueError: the rows have different numbers of codebooks or of channels, or another number than there are
            offsets, or the pattern is unknown.
    """
    if pattern not in ("flattened", "delayed"):
        raise ValueError(f'pattern {pattern!r}: must be "flattened" or "delayed"')
    codes = [row["codes"] for row in batch]
    _same([item.shape[1] for item in codes], batch, "codebooks")
    if pattern == "delayed":
        sequences = [delay_codes(item, padding_id, offsets) for item in codes]
    else:
        sequences = [flatten_codes(item, offsets) for item in codes]
    result: dict[str, Any] = {
        "tokens": pad_sequence(sequences, batch_first=True, padding_value=padding_id),
        "lengths": torch.tensor([len(sequence) for sequence in sequences]),
        "keys": [row["key"] for row in batch],
        "fields": [row["fields"] for row in batch],
    }
    if any("other_codes" in row for row in batch):
        result["other_codes"] = [row.get("other_codes", {}) for row in batch]
    if all("audio" in row for row in batch):
        audio = [row["audio"] for row in batch]
        _same([1 if item.ndim == 1 else len(item) for item in audio], batch, "channels")
        padded = pad_sequence([item.movedim(-1, 0) for item in audio], batch_first=True)
        result["audio"] = padded.movedim(1, -1).contiguous()
        result["audio_lengths"] = torch.tensor([item.shape[-1] for item in audio])
        result["sample_rate"] = [row["sample_rate"] for row in batch]
    return result


def _same(counts: list[int], batch: Sequence[Mapping[str, Any]], what: str) -> None:
    for number, found in enumerate(counts):
        if found != counts[0]:
            raise ValueError(
                f"row {batch[number]['key']} has {found} {what}, row {batch[0]['key']} has {counts[0]}: "
                "they do not go into one batch"
            )


def _offsets(offsets: Sequence[int] | None, num_codebooks: int, device: torch.device) -> Tensor:
    """int64 (K,)."""
    if offsets is None:
        return torch.zeros(num_codebooks, dtype=torch.int64, device=device)
    if len(offsets) != num_codebooks:
        raise ValueError(f"{len(offsets)} offsets for {num_codebooks} codebooks")
    return torch.tensor(offsets, dtype=torch.int64, device=device)
