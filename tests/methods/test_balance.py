# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch

from monai_cggm.methods.balance import balance, equation_7, mean_factor

CASES = [
    ([0.3, 0.1], 1.3),
    ([0.05, 0.2, 0.15], 1.3),
    ([0.1, 0.2, 0.3, 0.4], 1.2),
    ([0.1, -0.02, 0.03, 0.04], 1.2),
    ([-0.1, -0.2, -0.3, 0.05, 0.02], 1.0),
]


def numpy_equation_7(delta, rho):
    """Equation 7, written as the paper does: the sum over the others over the sum over all."""
    delta = np.asarray(delta, dtype=np.float64)
    return np.array([rho * sum(d for k, d in enumerate(delta) if k != i) / delta.sum() for i in range(len(delta))])


@pytest.mark.parametrize(("delta", "rho"), CASES)
def test_equation_7_against_numpy(delta, rho):
    terms = equation_7(torch.tensor(delta, dtype=torch.float64), rho)
    np.testing.assert_allclose(terms.numpy(), numpy_equation_7(delta, rho), rtol=1e-12)


@pytest.mark.parametrize(("delta", "rho"), CASES)
def test_terms_of_the_paper_add_up_to_rho_times_the_others(delta, rho):
    terms = balance(torch.tensor(delta, dtype=torch.float64), rho).terms
    assert terms.sum().item() == pytest.approx(rho * (len(delta) - 1))
    assert terms.mean().item() == pytest.approx(mean_factor(rho, len(delta)))


@pytest.mark.parametrize(("delta", "rho"), CASES)
def test_everybody_worse_looks_like_everybody_better(delta, rho):
    delta = torch.tensor(delta, dtype=torch.float64)
    torch.testing.assert_close(equation_7(delta, rho), equation_7(-delta, rho))


def test_the_faster_modality_gets_the_smaller_term():
    terms = balance(torch.tensor([0.4, 0.1, 0.2]), 1.2).terms
    assert terms.argsort().tolist() == [0, 2, 1]


def test_clamped_cuts_to_twice_the_mean_factor_and_says_so():
    delta = torch.tensor([0.3, -0.25, 0.01], dtype=torch.float64)
    raw = numpy_equation_7(delta, 1.2)
    assert raw.min() < 0
    assert raw.max() > 2 * 0.8
    result = balance(delta, 1.2, "clamped")
    np.testing.assert_allclose(result.terms.numpy(), np.clip(raw, 0, 1.6))
    assert result.bounded
    calm = balance(torch.tensor([0.1, 0.1, 0.1]), 1.2, "clamped")
    assert not calm.bounded
    torch.testing.assert_close(calm.terms, torch.full((3,), 0.8))


def test_positive_keeps_the_sum_and_lies_between_zero_and_rho():
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        delta = torch.randn(4, generator=generator, dtype=torch.float64)
        result = balance(delta, 1.2, "positive")
        assert result.terms.sum().item() == pytest.approx(3.6)
        assert result.terms.min() >= 0
        assert result.terms.max() <= 1.2 + 1e-12
        assert bool(result.bounded) == bool((delta < 0).any() and (delta > 0).any())


def test_positive_equals_the_paper_where_everybody_improves():
    delta = torch.tensor([0.1, 0.2, 0.3, 0.4])
    torch.testing.assert_close(balance(delta, 1.2, "positive").terms, balance(delta, 1.2).terms)


@pytest.mark.parametrize("rule", ["paper", "clamped", "positive"])
def test_no_progress_gives_everyone_the_mean_factor(rule):
    result = balance(torch.zeros(4), 1.2, rule)
    assert result.undefined
    assert not result.bounded
    torch.testing.assert_close(result.terms, torch.full((4,), 0.9))


def test_the_raw_ratio_is_negative_in_a_large_share_of_noisy_iterations():
    generator = torch.Generator().manual_seed(0)
    delta = torch.randn(2000, 4, generator=generator) + 0.2
    negative = sum((balance(d, 1.2).terms < 0).any().item() for d in delta) / len(delta)
    assert 0.4 < negative < 0.9


@pytest.mark.parametrize(("modalities", "rho", "expected"), [(2, 1.3, 0.65), (3, 1.3, 0.8666667), (4, 1.2, 0.9)])
def test_mean_factor(modalities, rho, expected):
    assert mean_factor(rho, modalities) == pytest.approx(expected)


def test_refusals():
    with pytest.raises(ValueError, match="at least two modalities"):
        balance(torch.ones(1), 1.0)
    with pytest.raises(ValueError, match="'paper', 'clamped' or 'positive', got 'soft'"):
        balance(torch.ones(2), 1.0, "soft")
