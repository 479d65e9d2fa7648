"""Patterns of codebooks and their inverses, and batches of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from batch_tokenizer import collate_tokens, delay_codes, flatten_codes, undelay_codes, unflatten_codes


def random_codes(sizes: list[int], num_frames: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randint(size, (num_frames,), generator=generator) for size in sizes], dim=1)


def rows_of(lengths: list[int], sizes: list[int]) -> list[dict[str, Any]]:
    return [
        {"key": f"row{number}", "codes": random_codes(sizes, length, number), "fields": {"number": number}}
        for number, length in enumerate(lengths)
    ]


SIZES = st.lists(st.integers(1, 50), min_size=1, max_size=5)
LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=5)


def test_the_layouts_by_hand() -> None:
    codes = torch.tensor([[1, 2, 3], [4, 5, 6]])
    assert flatten_codes(codes, (0, 10, 20)).tolist() == [1, 12, 23, 4, 15, 26]
    assert delay_codes(codes, 99).tolist() == [[1, 99, 99], [4, 2, 99], [99, 5, 3], [99, 99, 6]]
    assert delay_codes(codes, 99, (0, 10, 20)).tolist() == [[1, 99, 99], [4, 12, 99], [99, 15, 23], [99, 99, 26]]


@given(SIZES, LENGTHS, st.booleans(), st.sampled_from(["flattened", "delayed"]))
def test_a_batch_gives_back_its_codes(sizes: list[int], lengths: list[int], shared: bool, pattern: Any) -> None:
    rows = rows_of(lengths, sizes)
    offsets = [sum(sizes[:codebook]) for codebook in range(len(sizes))] if shared else None
    padding_id = sum(sizes)
    batch = collate_tokens(rows, pattern, padding_id=padding_id, offsets=offsets)
    width = len(sizes)
    expected = [length * width if pattern == "flattened" else length + width - 1 for length in lengths]
    assert batch["lengths"].tolist() == expected
    assert batch["tokens"].dtype == torch.int64
    assert batch["tokens"].shape == (len(rows), max(expected), *(() if pattern == "flattened" else (width,)))
    assert batch["keys"] == [row["key"] for row in rows]
    assert batch["fields"] == [row["fields"] for row in rows]
    for row, tokens, length in zip(rows, batch["tokens"], expected, strict=True):
        own = tokens[:length]
        codes = unflatten_codes(own, width, offsets) if pattern == "flattened" else undelay_codes(own, offsets)
        assert torch.equal(codes, row["codes"])
        assert (tokens[length:] == padding_id).all()
        num_padding = 0 if pattern == "flattened" else width * (width - 1)
        assert (own == padding_id).sum() == num_padding


def test_audio_is_padded_too() -> None:
    rows = rows_of([2, 3], [5, 5])
    for number, row in enumerate(rows):
        row |= {"audio": torch.ones(2 + number), "sample_rate": 24000}
    batch = collate_tokens(rows, padding_id=10)
    assert batch["audio"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch["audio_lengths"].tolist() == [2, 3]
    assert batch["sample_rate"] == [24000, 24000]
    for row in rows:
        row["audio"] = torch.stack([row["audio"], -row["audio"]])
    batch = collate_tokens(rows, padding_id=10)
    assert batch["audio"].tolist() == [[[1, 1, 0], [-1, -1, 0]], [[1, 1, 1], [-1, -1, -1]]]
    rows[1]["audio"] = rows[1]["audio"][:1]
    with pytest.raises(ValueError, match="row row1 has 1 channels, row row0 has 2"):
        collate_tokens(rows, padding_id=10)
    del rows[0]["audio"]
    assert "audio" not in collate_tokens(rows, padding_id=10)


def test_what_cannot_be_a_batch() -> None:
    rows = [*rows_of([2], [5, 5]), *rows_of([2], [5])]
    with pytest.raises(ValueError, match="row row0 has 1 codebooks"):
        collate_tokens(rows, padding_id=10)
    with pytest.raises(ValueError, match="pattern 'parallel'"):
        collate_tokens(rows[:1], "parallel", padding_id=10)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="3 offsets for 2 codebooks"):
        collate_tokens(rows[:1], padding_id=10, offsets=(0, 5, 10))
    with pytest.raises(ValueError, match=r"ids \(5,\) are no frames of 2 codebooks"):
        unflatten_codes(torch.zeros(5), 2)
    with pytest.raises(ValueError, match="2 steps are too few for 3 delayed codebooks"):
        undelay_codes(torch.zeros(2, 3))
