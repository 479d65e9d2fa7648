"""The packed attention against its definition in float64, over random lengths, windows, heads and head sizes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from batch_tokenizer.kernels.attention import BackendUnavailable, choose_backend, varlen_attention
from batch_tokenizer.kernels.segments import Segments

CUDA = torch.cuda.is_available()

#: Largest absolute difference from the float64 definition on unit-variance inputs.
TOLERANCE = {torch.float32: 3e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}

lengths = st.lists(st.one_of(st.sampled_from([0, 1, 2, 64, 65, 256, 513]), st.integers(0, 70)), min_size=1, max_size=5)
windows = st.tuples(st.sampled_from([-1, 0, 1, 7, 40, 600]), st.sampled_from([-1, 0, 1, 10, 600]))


def packed(lengths: list[int], heads: int, size: int, dtype: torch.dtype, seed: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(sum(lengths), heads, size, generator=generator).to(dtype) for _ in range(3))


@given(lengths, windows, st.sampled_from([1, 2, 5]), st.sampled_from([2, 8, 24]), st.integers(0, 9))
def test_sdpa_equals_the_definition(lengths, window, heads, size, seed):
    q, k, v = packed(lengths, heads, size, torch.float32, seed)
    segments = Segments(lengths)
    ours = varlen_attention(q, k, v, segments, window=window, backend="sdpa")
    exact = varlen_attention(q.double(), k.double(), v.double(), segments, window=window, backend="reference")
    assert ours.shape == q.shape
    torch.testing.assert_close(ours.double(), exact, atol=TOLERANCE[torch.float32], rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (40, 10)])
def test_sixteen_bit_types_stay_within_their_tolerance(dtype, window):
    lengths = [3, 0, 1, 620]
    q, k, v = packed(lengths, 2, 16, dtype, 3)
    ours = varlen_attention(q, k, v, Segments(lengths), window=window, backend="sdpa")
    exact = varlen_attention(q.double(), k.double(), v.double(), Segments(lengths), window=window, backend="reference")
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.double(), exact, atol=TOLERANCE[dtype], rtol=0)


@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=4),
    st.sampled_from([(-1, 0), (5, 0), (30, 0), (-1, -1), (4, 3)]),
)
def test_cached_keys_align_the_last_query_with_the_last_key(pairs, window):
    """More keys than queries: as if the queries were the tail of a longer utterance."""
    query_lengths = [new for new, _ in pairs]
    key_lengths = [new + old if new else 0 for new, old in pairs]
    _, k, v = packed(key_lengths, 2, 8, torch.float32, 1)
    q_whole, _, _ = packed(key_lengths, 2, 8, torch.float32, 2)
    keys, queries = Segments(key_lengths), Segments(query_lengths)
    whole = varlen_attention(q_whole, k, v, keys, window=window, backend="reference")
    tails = [slice(end - new, end) for end, new in zip(keys.starts + keys.lengths, query_lengths, strict=True)]
    q = torch.cat([q_whole[tail] for tail in tails])
    ours = varlen_attention(q, k, v, queries, window=window, key_segments=keys, backend="sdpa")
    torch.testing.assert_close(ours, torch.cat([whole[tail] for tail in tails]), atol=3e-6, rtol=0)


def test_an_utterance_does_not_see_its_neighbours():
    lengths = [30, 50, 20]
    q, k, v = packed(lengths, 2, 8, torch.float32, 0)
    before = varlen_attention(q, k, v, Segments(lengths), backend="sdpa")
    k[:30], v[80:] = 1e4, -1e4
    after = varlen_attention(q, k, v, Segments(lengths), backend="sdpa")
    assert torch.equal(before[30:80], after[30:80])


def test_the_choice_says_why():
    backend, reason = choose_backend("auto", torch.device("cpu"), torch.float32, 64)
    assert backend == "sdpa"
    assert "CUDA" in reason
    assert choose_backend("reference", torch.device("cpu"), torch.float32, 64) == ("reference", "asked for")
    with pytest.raises(BackendUnavailable, match="CUDA"):
        choose_backend("flash_attn", torch.device("cpu"), torch.float32, 64)
    with pytest.raises(ValueError, match="choose one of"):
        choose_backend("fastest", torch.device("cpu"), torch.float32, 64)


@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["torch_varlen", "flash_attn", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (40, 10), (100, 0)])
@pytest.mark.parametrize("size", [16, 64, 128])
def test_cuda_backends_equal_the_definition(backend, dtype, window, size):
    device = torch.device("cuda")
    try:
        choose_backend(backend, device, dtype, size)
    except BackendUnavailable as error:
        pytest.skip(str(error))
    lengths = [1, 0, 7, 300, 64, 1000]
    q, k, v = (x.to(device) for x in packed(lengths, 4, size, dtype, 5))
    segments = Segments(lengths, device)
    ours = varlen_attention(q, k, v, segments, window=window, backend=backend)
    exact = varlen_attention(q.double(), k.double(), v.double(), segments, window=window, backend="reference")
    torch.testing.assert_close(ours.double(), exact, atol=TOLERANCE[dtype], rtol=0)
