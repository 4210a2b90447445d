# SPDX-License-Identifier: Apache-2.0
"""The balance term B of equation 7, and bounded versions of it.

Equation 7 divides by ΣΔε. Δε between two batches is noisy: the sum comes close to zero and its sign changes, so the
raw ratio is negative for some encoder in a large share of the iterations (the encoder then climbs its loss) and has no
upper limit. The rules here are pure functions of Δε; each also says whether it had to step in.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Rule = Literal["paper", "clamped", "positive"]


class Balance(NamedTuple):
    """Balance terms and what the rule had to do to get them.

    Attributes:
        terms: B, shape ``(M,)``.
        bounded: bool scalar; a bound changed a term.
        undefined: bool scalar; equation 7 has no finite value, and the mean factor ρ(M−1)/M stands for every term.
    """

    terms: Tensor
    bounded: Tensor
    undefined: Tensor


def mean_factor(rho: float, modalities: int) -> float:
    """Return ρ(M−1)/M, the mean of B under equation 7 whatever Δε is: what balancing does to the overall step size.

    Example:
        >>> round(mean_factor(1.2, 4), 6)
        0.9
    """
    return rho * (modalities - 1) / modalities


def equation_7(delta: Tensor, rho: float) -> Tensor:
    """Return ρ (ΣΔε − Δε_i) / ΣΔε, shape ``(M,)``, raw: it can be negative, huge, infinite or NaN.

    Note that ``equation_7(d, rho) == equation_7(-d, rho)``: "every classifier got worse" looks like "every one got
    better".

    Example:
        >>> equation_7(torch.tensor([0.3, 0.1]), rho=1.0)
        tensor([0.2500, 0.7500])
    """
    total = delta.sum()
    return rho * (total - delta) / total


def balance(delta: Tensor, rho: float, rule: Rule = "paper") -> Balance:
    """Turn the classifiers' progress into one gradient factor an encoder.

    Args:
        delta: Δε, the change of each classifier's metric since the last iteration, shape ``(M,)``, ``M ≥ 2``.
        rho: ρ of equation 7 (Table 7: 1.2 for BraTS, 1.3 elsewhere).
        rule: ``"paper"``: equation 7 as it stands. ``"clamped"``: equation 7 cut to ``[0, 2ρ(M−1)/M]``, so that the
            mean factor is the middle of the range; the sum is no longer ρ(M−1) when it acts. ``"positive"``:
            equation 7 of ``max(Δε, 0)``: the terms lie in ``[0, ρ]`` and still add up to ρ(M−1); a classifier that
            got worse counts as one that stood still.

    Returns:
        Terms and whether a bound acted. Where the ratio is not finite every term is ρ(M−1)/M.

    Raises:
        ValueError: for a rule that does not exist, or fewer than two modalities.

    Example:
        >>> balance(torch.tensor([0.3, -0.1]), rho=1.0).terms
        tensor([-0.5000,  1.5000])
        >>> balance(torch.tensor([0.3, -0.1]), rho=1.0, rule="positive").terms
        tensor([0., 1.])
    """
    if delta.numel() < 2:
        raise ValueError(f"balancing needs at least two modalities, got {delta.numel()}")
    mean = mean_factor(rho, delta.numel())
    if rule == "paper":
        raw = bounded_terms = equation_7(delta, rho)
        acted = torch.zeros((), dtype=torch.bool, device=delta.device)
    elif rule == "clamped":
        raw = equation_7(delta, rho)
        bounded_terms = raw.clamp(0.0, 2 * mean)
        acted = (raw != bounded_terms).any()
    elif rule == "positive":
        raw = bounded_terms = equation_7(delta.clamp(min=0.0), rho)
        acted = (delta < 0).any()
    else:
        raise ValueError(f"balance rule must be 'paper', 'clamped' or 'positive', got {rule!r}")
    undefined = ~torch.isfinite(raw).all()
    terms = torch.where(undefined, torch.full_like(raw, mean), bounded_terms)
    return Balance(terms, acted & ~undefined, undefined)
