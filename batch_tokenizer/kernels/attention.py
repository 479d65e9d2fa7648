"""Attention over utterances packed on one axis, with a window and causality: one function, one seam per backend.

Query i of an utterance sees key j when ``i + shift - left <= j <= i + shift + right``, where ``shift`` is the number of
its keys less the number of its queries (0 unless keys of earlier chunks are cached: the last query is aligned with the
last key), and -1 is no limit. Causal is ``right = 0``. The scale is 1/sqrt(head_dim).

    torch_varlen   torch.nn.attention.varlen (CUDA, 16-bit)
    flash_attn     the flash-attn package (CUDA, 16-bit)
    sdpa           scaled_dot_product_attention, one utterance at a time (any device and dtype)
    reference      the definition in float64, for tests

``choose_backend`` picks one and says why; callers may force one. All give the same values within rounding.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from batch_tokenizer.kernels.segments import Segments

Window = tuple[int, int]

BACKENDS = ("torch_varlen", "flash_attn", "sdpa", "reference")


def block_size(left: int, right: int) -> int:
    """Queries that share one slice of keys under a window: many enough for the kernel, few enough to waste no keys.

    Depends on the window alone, so that an utterance is always cut at the same places.
    """
    if left < 0 or right < 0:
        return 256
    return min(512, max(64, 1 << ((left + right) // 2).bit_length()))


class BackendUnavailable(Exception):
    """A forced backend cannot run here; the message says why."""


@cache
def _has_torch_varlen() -> bool:
    return importlib.util.find_spec("torch.nn.attention.varlen") is not None


@cache
def _has_flash_attn() -> bool:
    try:
        # A build for another torch or CUDA is found, but cannot be imported.
        importlib.import_module("flash_attn")
    except (ImportError, OSError, RuntimeError):
        return False
    return True


def _why_not(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why ``backend`` cannot run on this device, dtype and head size; None if it can."""
    if backend in ("sdpa", "reference"):
        return None
    if device.type != "cuda":
        return f"{backend} needs a CUDA device, this is {device.type}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"{backend} needs float16 or bfloat16, this is {str(dtype).removeprefix('torch.')}"
    if head_dim % 8 or head_dim > 256:
        return f"{backend} needs a head size that is a multiple of 8 up to 256, this is {head_dim}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"{backend} needs an Ampere GPU or newer"
    if backend == "torch_varlen" and not _has_torch_varlen():
        return "torch.nn.attention.varlen is not in this torch"
    if backend == "flash_attn" and not _has_flash_attn():
        return "the flash-attn package is not installed, or not for this torch"
    return None


def choose_backend(requested: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[str, str]:
    """The backend to use, and the reason as text.

    Raises:
        BackendUnavailable: ``requested`` is not ``auto`` and cannot run here.
        ValueError: ``requested`` is no backend's name.
    """
    if requested != "auto":
        if requested not in BACKENDS:
            raise ValueError(f"attention backend {requested!r}: choose one of auto, {', '.join(BACKENDS)}")
        reason = _why_not(requested, device, dtype, head_dim)
        if reason is not None:
            raise BackendUnavailable(reason)
        return requested, "asked for"
    reasons = []
    for backend in ("torch_varlen", "flash_attn"):
        reason = _why_not(backend, device, dtype, head_dim)
        if reason is None:
            return backend, "the fastest that runs here"
        reasons.append(reason)
    return "sdpa", "; ".join(reasons)


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    *,
    window: Window = (-1, -1),
    key_segments: Segments | None = None,
    backend: str = "sdpa",
) -> Tensor:
    """Attention within each utterance of a packed axis.

    Args:
        query: (N, H, D).
        key, value: (M, H, D); M = N unless ``key_segments`` is given.
        segments: the utterances on the query axis.
        window: (left, right), -1 for no limit.
        key_segments: the utterances on the key axis, as many as ``segments``, none shorter than its queries.
        backend: one of ``BACKENDS``, as ``choose_backend`` returned it.

    Returns:
        (N, H, D), the dtype of ``query``.
    """
    keys = segments if key_segments is None else key_segments
    if segments.total == 0:
        return torch.zeros_like(query)
    match backend:
        case "torch_varlen":
            return _torch_varlen(query, key, value, segments, keys, window)
        case "flash_attn":
            return _flash_attn(query, key, value, segments, keys, window)
        case "sdpa":
            return _per_segment(query, key, value, segments, keys, window, _sdpa)
        case "reference":
            return _per_segment(query, key, value, segments, keys, window, _reference)
    raise ValueError(f"attention backend {backend!r}: choose one of {', '.join(BACKENDS)}")


def _torch_varlen(q: Tensor, k: Tensor, v: Tensor, queries: Segments, keys: Segments, window: Window) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    bound = keys.bound_above(window)
    # Without a window torch takes one kernel or another by the longest utterance of the pack, and a result would depend
    # on its neighbours. A window that reaches over all keys means the same and keeps to one kernel.
    if window == (-1, -1):
        window = (bound, bound)
    out: Tensor = varlen_attn(  # type: ignore[assignment]  # a tensor unless return_aux is given
        q, k, v, queries.offsets, keys.offsets, queries.longest_bound, bound, window_size=window
    )
    return out


def _flash_attn(q: Tensor, k: Tensor, v: Tensor, queries: Segments, keys: Segments, window: Window) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    out: Tensor = flash_attn_varlen_func(
        q, k, v, queries.offsets, keys.offsets, queries.longest_bound, keys.bound_above(window), window_size=window
    )
    return out


def _per_segment(q, k, v, queries: Segments, keys: Segments, window: Window, attend) -> Tensor:  # type: ignore[no-untyped-def]
    if len(queries) == 1:
        return attend(q, k, v, window)
    if q.requires_grad and attend is _sdpa and queries is keys and (queries.lengths == queries.longest).all():
        return _sdpa_equal_lengths(q, k, v, len(queries), window)
    out = torch.empty_like(q) if not q.requires_grad else None
    parts = []
    for q_start, q_length, k_start, k_length in zip(
        queries.starts, queries.lengths, keys.starts, keys.lengths, strict=True
    ):
        if q_length == 0:
            continue
        rows, columns = slice(q_start, q_start + q_length), slice(k_start, k_start + k_length)
        part = attend(q[rows], k[columns], v[columns], window)
        if out is None:
            parts.append(part)
        else:
            out[rows] = part
    return torch.cat(parts) if out is None else out


def _reference(q: Tensor, k: Tensor, v: Tensor, window: Window) -> Tensor:
    """The definition, (L, H, D) against (M, H, D), in float64."""
    scores = torch.einsum("ihd,jhd->hij", q.double(), k.double()) / math.sqrt(q.shape[-1])
    scores = scores.masked_fill(~_visible(len(q), len(k), window, q.device), -math.inf)
    return torch.einsum("hij,jhd->ihd", scores.softmax(dim=-1), v.double()).to(q.dtype)


def _visible(num_queries: int, num_keys: int, window: Window, device: torch.device) -> Tensor:
    """bool (num_queries, num_keys): which keys each query sees."""
    i = torch.arange(num_queries, device=device)[:, None] + (num_keys - num_queries)
    j = torch.arange(num_keys, device=device)[None, :]
    seen = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device)
    if window[0] >= 0:
        seen &= j >= i - window[0]
    if window[1] >= 0:
        seen &= j <= i + window[1]
    return seen


def _sdpa(q: Tensor, k: Tensor, v: Tensor, window: Window) -> Tensor:
    """One utterance through torch's kernel. A bounded window is cut into blocks at fixed places of the utterance."""
    num_queries, num_keys = len(q), len(k)
    left, right = window
    shift = num_keys - num_queries
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # (1, H, L, D)
    # 1. No mask, where the window reaches over all keys.
    if (left < 0 or left >= num_keys - 1) and (right < 0 or right >= num_keys - 1):
        out = scaled_dot_product_attention(q, k, v)
    # 2. Causal, without a bound to the left.
    elif (left < 0 or left >= num_keys - 1) and right == 0 and shift == 0:
        out = scaled_dot_product_attention(q, k, v, is_causal=True)
    # 3. Bounded on both sides: all blocks in one call.
    elif left >= 0 and right >= 0 and shift == 0:
        out = _banded(q, k, v, left, right)
    # 4. Everything else, such as chunks with cached keys: block by block.
    else:
        block = block_size(left, right)
        out = torch.cat(
            [
                _one_block(q[:, :, start : start + block], k, v, start + shift, left, right)
                for start in range(0, num_queries, block)
            ],
            dim=2,
        )
    return out[0].transpose(0, 1)


def _sdpa_equal_lengths(q: Tensor, k: Tensor, v: Tensor, count: int, window: Window) -> Tensor:
    """``count`` utterances of one length in one call, for training, where crops are short and all of one length.

    Not for inference: a call's shape, and with it the last bits of a result, would depend on what was batched.
    """
    q, k, v = (x.unflatten(0, (count, -1)).transpose(1, 2) for x in (q, k, v))  # (count, H, L, D)
    length = q.shape[2]
    seen = _visible(length, length, window, q.device)
    return scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2).flatten(0, 1)


def _one_block(q: Tensor, k: Tensor, v: Tensor, first: int, left: int, right: int) -> Tensor:
    """Queries at key positions first … first + B - 1, against the slice of keys that any of them sees."""
    block, num_keys = q.shape[2], k.shape[2]
    low = 0 if left < 0 else max(0, first - left)
    high = num_keys if right < 0 else min(num_keys, first + block + right)
    i = torch.arange(first, first + block, device=q.device)[:, None]
    j = torch.arange(low, high, device=q.device)[None, :]
    seen = (j >= i - left) if left >= 0 else torch.ones_like(j >= i)
    if right >= 0:
        seen = seen & (j <= i + right)
    return scaled_dot_product_attention(q, k[:, :, low:high], v[:, :, low:high], attn_mask=seen)


def _banded(q: Tensor, k: Tensor, v: Tensor, left: int, right: int) -> Tensor:
    """A window bounded on both sides, queries and keys of equal number: all blocks in one call, (1, H, L, D) each."""
    _, heads, length, size = q.shape
    block = block_size(left, right)
    blocks = math.ceil(length / block)
    padded = blocks * block
    q = pad(q, (0, 0, 0, padded - length)).reshape(heads, blocks, block, size).transpose(0, 1)
    span = block + left + right
    k, v = (
        pad(x[0], (0, 0, left, padded - length + right)).unfold(1, span, block).permute(1, 0, 3, 2) for x in (k, v)
    )  # (blocks, H, span, D)
    first = torch.arange(blocks, device=q.device)[:, None, None] * block
    i = torch.arange(block, device=q.device)[None, :, None] + first
    j = torch.arange(span, device=q.device)[None, None, :] - left + first
    # Padding queries see themselves, so that no row of the softmax is empty.
    seen = (j >= i - left) & (j <= i + right) & (j >= 0) & ((j < length) | (i >= length))
    out = scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None])
    return out.transpose(0, 1).reshape(1, heads, padded, size)[:, :, :length]
