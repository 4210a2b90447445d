# SPDX-License-Identifier: Apache-2.0
"""Statistics of scores that were repeated over cases, seeds and splits."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import norm, t, wilcoxon

Array = NDArray[np.float64]
Counts = NDArray[np.uint8]

#: With fewer pairs than this no two-sided p of a signed-rank test can lie below 0.05.
FEWEST_PAIRS = 6

_LEVEL = 0.95
_UPPER = (1 + _LEVEL) / 2
_AT_ONCE = 1000  # draws that are weighed together: a bound on the memory
_DECIMALS = 10  # far below what score files hold; keeps 0.9001 - 0.9 and 0.8001 - 0.8 the same difference


@dataclass(frozen=True)
class SeedMean:
    """A mean and its spread over training seeds.

    Attributes:
        mean: over cases, seeds and splits; NaN without a value.
        sd: sample standard deviation over the seeds' means; NaN with fewer than two seeds.
        seeds: the number of seeds that ``sd`` rests on.
    """

    mean: float
    sd: float
    seeds: int


@dataclass(frozen=True)
class Interval:
    """A mean difference with its 95 % interval.

    Attributes:
        mean: the mean difference; NaN without a value.
        low: lower end; NaN where there are too few cases to resample.
        high: upper end.
        cases: cases that have a difference, counted in each split.
        seeds: different seeds.
        most_seeds: the most seeds that one split has.
        seeds_resampled: whether every split had at least two seeds, so that the interval holds the chance of training.
        splits_resampled: whether whole splits were resampled, because some of them have one seed: then the chance of
            training is in the differences between them. Where neither is True, the interval is about the cases alone.
    """

    mean: float
    low: float
    high: float
    cases: int
    seeds: int
    most_seeds: int
    seeds_resampled: bool
    splits_resampled: bool


def seed_mean(values: pd.DataFrame, column: str = "value") -> SeedMean:
    """Average over cases, seeds and splits, and take the spread over seeds.

    The mean of each split and seed over its cases comes first. The mean is that of the splits' means over their seeds,
    so that every split counts alike, whatever its size. For the spread, the means of a seed are averaged over the
    splits, and the sample standard deviation is taken over the seeds that every split has: splits differ in difficulty,
    and that is not the chance of training. Where all splits have all seeds, the mean is that of these seeds' means too.

    Args:
        values: a row a case, with ``split``, ``seed`` and the value; NaN is left out.
        column: the value's column.

    Example:
        >>> values = pd.DataFrame({"split": ["a"] * 4, "seed": [0, 0, 1, 1], "value": [0.5, 0.7, 0.7, 0.9]})
        >>> result = seed_mean(values)
        >>> round(result.mean, 3), round(result.sd, 3), result.seeds
        (0.7, 0.141, 2)
    """
    return seed_means(values, [column])[column]


def seed_means(values: pd.DataFrame, columns: Iterable[str]) -> dict[str, SeedMean]:
    """Return :func:`seed_mean` of several columns of one table.

    Example:
        >>> values = pd.DataFrame({"split": ["a", "a"], "seed": [0, 1], "dice": [0.5, 0.7], "hd95": [4.0, 8.0]})
        >>> {name: result.mean for name, result in seed_means(values, ["dice", "hd95"]).items()}
        {'dice': 0.6, 'hd95': 6.0}
    """
    names = list(columns)
    means = values.groupby(["split", "seed"])[names].mean()
    return {name: _over_seeds(means[name].unstack("seed")) for name in names}


def _over_seeds(cells: pd.DataFrame) -> SeedMean:
    """Mean and spread of cells' means, a row a split and a column a seed."""
    cells = cells.dropna(how="all")
    if cells.empty:
        return SeedMean(math.nan, math.nan, 0)
    of_seeds = cells.dropna(axis="columns").mean(axis="index")
    sd = float(of_seeds.std(ddof=1)) if len(of_seeds) > 1 else math.nan
    return SeedMean(float(cells.mean(axis="columns").mean()), sd, len(of_seeds))


def paired_bootstrap(differences: pd.DataFrame, *, draws: int = 10_000, seed: int = 0) -> Interval:
    """Mean of paired differences with a 95 % interval of a crossed ("pigeonhole") bootstrap, widened for few seeds.

    Within each split, cases are resampled with replacement and, independently, seeds are; the weight of a difference is
    the product of how often its case and its seed were drawn (A. B. Owen, "The pigeonhole bootstrap", Annals of Applied
    Statistics 1 (2007) 386-411). So all scores of a case stay together, and all scores of a seed do: neither 5 cases
    with 3 seeds are 15 observations, nor are 3 seeds with 300 cases 900. A draw's value is the mean of its splits'
    means, as in :func:`seed_mean`.

    The bare percentiles are too narrow, so two things are corrected:

    - Resampling k things shows (k - 1)/k of their variance: a draw's deviation by its cases and that by its seeds are
      each multiplied by the root of k/(k - 1).
    - A spread that rests on k things is itself uncertain: the interval is stretched about its mean by t/1.96, as in
      T. C. Hesterberg, "What teachers should know about the bootstrap", The American Statistician 69 (2015) 371-386. t
      is the 97.5 % quantile with k - 1 degrees of freedom, those of all splits together, averaged over cases and seeds
      with their variances as weights (W. G. Cochran and G. M. Cox, "Experimental designs", 1957).

    Simulated without a true difference (2, 3, 5 seeds; 7, 11, 33 cases), the interval excludes zero in 1 to 7 % of
    comparisons; the bare percentiles do in 4 to 33 %. ``docs/explanation/comparison_statistics.md`` has the table.

    With two splits or more, of which some have one seed (cross-validation), the chance of training is seen between the
    splits only. Then whole splits are resampled in the same way, their cases with them: the splits' means are the
    observations. Few splits may agree by luck, so that the interval is never narrower than the one from their cases.
    Otherwise splits are not resampled, and the interval speaks of these splits. Where the only split has one seed,
    nothing shows the chance of training: only the cases are resampled, and the result says so.

    Args:
        differences: a row a case and seed, with ``case``, ``split``, ``seed`` and ``difference``; NaN is left out.
        draws: bootstrap draws.
        seed: seed of the draws.

    Raises:
        ValueError: where a case is there twice for one split and seed.

    Example:
        >>> rows = [("case%d" % c, "a", s, 0.01 * c + 0.02 * s) for c in range(8) for s in range(2)]
        >>> interval = paired_bootstrap(pd.DataFrame(rows, columns=["case", "split", "seed", "difference"]))
        >>> round(interval.mean, 3), interval.low < 0.045 < interval.high, interval.cases, interval.seeds_resampled
        (0.045, True, 8, True)
        >>> round(interval.low, 2), round(interval.high, 2)  # two seeds: the t of one degree of freedom is 12.7
        (-0.06, 0.16)
    """
    differences = differences.dropna(subset=["difference"])
    if differences.duplicated(["split", "seed", "case"]).any():
        raise ValueError("a case has two differences for one split and seed, expected one")
    if differences.empty:
        return Interval(math.nan, math.nan, math.nan, 0, 0, 0, False, False)
    tables = [_crossed(rows) for _, rows in differences.groupby("split", sort=True)]
    most_seeds = max(table.shape[1] for table in tables)
    by_split = len(tables) > 1 and min(table.shape[1] for table in tables) == 1
    means = np.array([np.nanmean(table) for table in tables])
    ways = [[means[:, None]], [np.nanmean(table, axis=1)[:, None] for table in tables]] if by_split else [tables]
    ends = [
        _interval(way, _draws(tuple(table.shape for table in way), draws, seed))
        for way in ways
        if min(map(len, way)) > 1
    ]
    low, high = max(ends, key=lambda pair: pair[1] - pair[0], default=(math.nan, math.nan))
    return Interval(
        mean=float(means.mean()),
        low=low,
        high=high,
        cases=sum(len(table) for table in tables),
        seeds=differences["seed"].nunique(),
        most_seeds=most_seeds,
        seeds_resampled=all(table.shape[1] > 1 for table in tables),
        splits_resampled=by_split,
    )


def paired_p(differences: pd.DataFrame) -> float:
    """Two-sided p of Wilcoxon's signed-rank test on the cases' differences, averaged over seeds.

    A case is one pair, whatever the number of seeds. Differences of zero are left out. p is exact for up to 50 pairs
    without ties (SciPy's choice). It is not corrected for the number of comparisons.

    Args:
        differences: as for :func:`paired_bootstrap`.

    Returns:
        p; NaN with fewer than six pairs that differ, where it could not lie below 0.05.

    Example:
        >>> rows = [("case%d" % c, "a", 0, 0.01 * (c + 1)) for c in range(6)]
        >>> paired_p(pd.DataFrame(rows, columns=["case", "split", "seed", "difference"]))
        0.03125
    """
    means = differences.dropna(subset=["difference"]).groupby(["split", "case"])["difference"].mean()
    pairs = means.round(_DECIMALS)
    pairs = pairs[pairs != 0].to_numpy()
    return float(wilcoxon(pairs).pvalue) if len(pairs) >= FEWEST_PAIRS else math.nan


def _crossed(rows: pd.DataFrame) -> Array:
    """The differences of one split, ``(cases, seeds)``; NaN where a case lacks a seed."""
    table: Array = rows.pivot(index="case", columns="seed", values="difference").to_numpy(dtype=np.float64)
    return table


@lru_cache(maxsize=4)
def _draws(shapes: tuple[tuple[int, int], ...], draws: int, seed: int) -> tuple[tuple[Counts, Counts], ...]:
    """How often each draw has each row and each column of tables of these shapes; comparisons of a study share them.

    Drawing takes longer than all that is done with the draws. A byte is enough: that one of n things is drawn more than
    255 times in n has a probability far below 1e-300.
    """
    generator = np.random.default_rng(seed)
    return tuple((_drawn(rows, draws, generator), _drawn(columns, draws, generator)) for rows, columns in shapes)


def _drawn(things: int, draws: int, generator: np.random.Generator) -> Counts:
    counts = np.empty((draws, things), dtype=np.uint8)
    for start in range(0, draws, _AT_ONCE):
        part = counts[start : start + _AT_ONCE]
        part[:] = generator.multinomial(things, np.full(things, 1 / things), size=len(part))
    return counts


def _interval(tables: Sequence[Array], draws: Sequence[tuple[Counts, Counts]]) -> tuple[float, float]:
    """The ends of the interval for the mean of the tables' means; see :func:`paired_bootstrap`."""
    deviations = np.zeros(len(draws[0][0]))
    # by rows (cases) and by columns (seeds): how much varies, and how many things of all tables show it
    variances, freedom = np.zeros(2), np.zeros(2)
    for table, (rows, columns) in zip(tables, draws, strict=True):
        parts = _drawn_deviations(table, rows, columns)
        for axis, (part, count) in enumerate(zip(parts, table.shape, strict=False)):  # the third part is both
            if count > 1:
                part *= math.sqrt(count / (count - 1))
                variances[axis] += np.nanvar(part)
                freedom[axis] += count - 1
        deviations += np.sum(parts, axis=0) / len(tables)
    mean = float(np.mean([np.nanmean(table) for table in tables]))
    seen = variances > 0
    stretch = 1.0
    if seen.any():
        stretch = np.average(t.ppf(_UPPER, freedom[seen]), weights=variances[seen]) / norm.ppf(_UPPER)
    low, high = np.nanquantile(deviations, [1 - _UPPER, _UPPER]) * stretch
    return mean + float(low), mean + float(high)


def _drawn_deviations(table: Array, rows: Counts, columns: Counts) -> tuple[Array, Array, Array]:
    """How far the means of resamples lie from the table's: by its rows, by its columns, by both at once.

    Args:
        table: ``(cases, seeds)``; NaN where a case lacks a seed.
        rows: how often each draw has each case, ``(draws, cases)``.
        columns: how often each draw has each seed, ``(draws, seeds)``.
    """
    observed = ~np.isnan(table)
    values, there = np.where(observed, table, 0.0), observed.astype(np.float64)
    sums, counts = np.split(_weighed(rows, np.hstack([values, there])), 2, axis=1)
    mean = np.nanmean(table)
    by_rows = _means(sums.sum(axis=1), counts.sum(axis=1)) - mean
    by_columns = _means(columns @ values.sum(axis=0), columns @ there.sum(axis=0)) - mean
    by_both = _means((sums * columns).sum(axis=1), (counts * columns).sum(axis=1)) - mean
    return by_rows, by_columns, by_both - by_rows - by_columns


def _weighed(weights: Counts, values: Array) -> Array:
    """The product of two matrices, some of the draws at a time."""
    parts = (weights[start : start + _AT_ONCE] for start in range(0, len(weights), _AT_ONCE))
    return np.concatenate([part.astype(np.float64) @ values for part in parts])


def _means(sums: Array, counts: Array) -> Array:
    """A mean for each draw; NaN where a draw has no value."""
    means: Array = np.divide(sums, counts, out=np.full(len(sums), np.nan), where=counts > 0)
    return means
