"""Codebooks that follow data by moving averages: what they learn, what passes through them, what revives them."""

from __future__ import annotations

import pytest
import torch

from batch_tokenizer.codecs.mimo.quantizer import ResidualVectorQuantizer
from batch_tokenizer.kernels.codebook import nearest_rows
from batch_tokenizer.training.codebooks import CodebookTrainer, k_means, perplexity


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(7)


def clusters(count: int, dim: int, each: int) -> tuple[torch.Tensor, torch.Tensor]:
    centres = torch.randn(count, dim) * 20
    return centres, (centres[:, None] + 0.1 * torch.randn(count, each, dim)).flatten(0, 1)


def started(sizes: list[int], dim: int, rows: torch.Tensor) -> tuple[ResidualVectorQuantizer, CodebookTrainer]:
    quantizer = ResidualVectorQuantizer(sizes, dim)
    trainer = CodebookTrainer(quantizer)
    trainer.start(rows)
    return quantizer, trainer


def test_k_means_centres_are_means_of_what_is_nearest_to_them() -> None:
    rows = torch.randn(500, 3)
    centres = k_means(rows, 8, iterations=60)
    codes = nearest_rows(rows, centres)
    for code in range(8):
        assert torch.allclose(centres[code], rows[codes == code].mean(0), atol=1e-3)


def test_k_means_takes_fewer_rows_than_centres() -> None:
    centres = k_means(torch.randn(3, 4), 10)
    assert centres.shape == (10, 4)
    assert centres.isfinite().all()


def test_a_started_residual_chain_leaves_less_with_each_codebook() -> None:
    rows = torch.randn(4000, 6)
    quantizer, trainer = started([16, 16, 16, 16], 6, rows)
    codes = quantizer.encode(rows, 4)
    left = [(rows - quantizer.decode(codes[:, :n])).square().mean().item() for n in (1, 2, 3, 4)]
    assert left == sorted(left, reverse=True)
    assert left[3] < 0.25 * left[0] < 0.25
    assert bool(trainer.ready)


def test_value_is_the_codes_sum_and_gradient_passes_straight_through() -> None:
    rows = torch.randn(200, 4)
    quantizer, trainer = started([8, 8, 8], 4, rows)
    trainer.eval()
    hidden = rows[:6].clone().requires_grad_()
    used = torch.tensor([1, 2, 3, 1, 2, 3])
    out = trainer(hidden, used)
    codes = quantizer.encode(rows[:6], 3)
    for index, number in enumerate(used.tolist()):
        assert torch.allclose(out.rows[index], quantizer.decode(codes[index : index + 1, :number])[0], atol=1e-5)
    weights = torch.randn(6, 4)
    (gradient,) = torch.autograd.grad((out.rows * weights).sum(), hidden)
    assert torch.allclose(gradient, weights)


def test_commitment_counts_only_codebooks_in_use_and_pulls_towards_them() -> None:
    rows = torch.randn(300, 4)
    quantizer, trainer = started([8, 8], 4, rows)
    trainer.eval()
    hidden = rows[:5].clone().requires_grad_()
    first = quantizer.decode(quantizer.encode(rows[:5], 1))
    commitment = trainer(hidden, torch.ones(5, dtype=torch.int64)).commitment
    assert torch.allclose(commitment, (rows[:5] - first).square().mean() / 2, atol=1e-6)
    (gradient,) = torch.autograd.grad(commitment, hidden)
    assert torch.allclose(gradient, (rows[:5] - first) / (5 * 4), atol=1e-6)


def test_training_moves_rows_to_the_data_and_evaluation_moves_nothing() -> None:
    centres, rows = clusters(4, 5, 200)
    quantizer, trainer = started([4], 5, rows)
    before = quantizer.codebooks[0].embed.clone()
    moved = rows + 3.0
    every = torch.ones(len(rows), dtype=torch.int64)
    trainer.eval()
    trainer(moved, every)
    assert torch.equal(quantizer.codebooks[0].embed, before)
    trainer.train()
    trainer(moved, every)
    # One step goes a hundredth of the way, since both averages start in balance.
    assert torch.allclose(quantizer.codebooks[0].embed - before, torch.full_like(before, 0.03), atol=0.01)
    for _ in range(300):
        trainer(moved, every)
    assert (torch.cdist(centres + 3.0, quantizer.codebooks[0].embed).amin(1) < 0.4).all()


def test_dead_rows_are_put_on_data_and_live_ones_stay() -> None:
    _, rows = clusters(4, 5, 100)
    quantizer, trainer = started([4], 5, rows)
    embed = quantizer.codebooks[0].embed
    alive = embed[[0, 2, 3]].clone()
    embed[1] = 1e4
    trainer.count_0[1] = 1e-3
    assert trainer.revive(0, rows) == 1
    assert torch.equal(embed[[0, 2, 3]], alive)
    assert (rows == embed[1]).all(1).any()
    assert trainer.revive(0, rows) == 0
    assert torch.allclose(trainer.sum_0, embed * trainer.count_0[:, None])


def test_rows_nobody_chooses_come_back_in_the_course_of_training() -> None:
    rows = torch.randn(2000, 3)
    quantizer, trainer = started([32], 3, rows)
    quantizer.codebooks[0].embed[5:] = 1e3 + torch.arange(27.0)[:, None]
    trainer.sum_0[5:] = quantizer.codebooks[0].embed[5:] * trainer.count_0[5:, None]
    every = torch.ones(400, dtype=torch.int64)
    assert perplexity(quantizer.encode(rows, 1), 32) <= 5
    for _ in range(400):
        trainer(rows[torch.randperm(2000)[:400]], every)
    assert perplexity(quantizer.encode(rows, 1), 32) > 20


def test_perplexity() -> None:
    assert perplexity(torch.arange(16).repeat(3), 16) == pytest.approx(16)
    assert perplexity(torch.zeros(9, dtype=torch.int64), 16) == pytest.approx(1)
    assert perplexity(torch.tensor([0, 0, 1, 1]), 16) == pytest.approx(2)
