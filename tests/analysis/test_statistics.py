# SPDX-License-Identifier: Apache-2.0
"""Statistics against slow loops, enumeration and simulated data whose truth is known."""

from __future__ import annotations

import itertools
import math
import statistics

import numpy as np
import pandas as pd
import pytest

from monai_cggm.analysis.statistics import _drawn_deviations, _draws, paired_bootstrap, paired_p, seed_mean

#: 97.5 % quantiles of Student's t by degrees of freedom, from a printed table.
T = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 5: 2.5706, 6: 2.4469, 7: 2.3646, 9: 2.2622, 11: 2.2010}


def table(values: np.ndarray, split: str = "a") -> pd.DataFrame:
    """A row for each entry of ``(cases, seeds)`` that is not NaN."""
    rows = [
        (f"case{i}", split, j, float(values[i, j])) for i, j in np.ndindex(values.shape) if not np.isnan(values[i, j])
    ]
    return pd.DataFrame(rows, columns=["case", "split", "seed", "difference"])


def slow_bootstrap(tables: list[np.ndarray], draws: int, seed: int) -> tuple[float, float]:
    """Cases and seeds drawn one by one; every draw's deviation in parts, widened; stretched by an averaged t."""
    generator = np.random.default_rng(seed)
    deviations = []
    of_cases: list[list[float]] = [[] for _ in tables]
    of_seeds: list[list[float]] = [[] for _ in tables]
    for _ in range(draws):
        of_splits = []
        for i, values in enumerate(tables):
            n, k = values.shape
            rows, columns = generator.integers(0, n, n), generator.integers(0, k, k)
            by_cases = statistics.fmean(values[r, c] for r in rows for c in range(k)) - values.mean()
            by_seeds = statistics.fmean(values[r, c] for r in range(n) for c in columns) - values.mean()
            both = statistics.fmean(values[r, c] for r in rows for c in columns) - values.mean() - by_cases - by_seeds
            of_cases[i].append(by_cases * math.sqrt(n / (n - 1)))
            of_seeds[i].append(by_seeds * math.sqrt(k / (k - 1)) if k > 1 else 0.0)
            of_splits.append(of_cases[i][-1] + of_seeds[i][-1] + both)
        deviations.append(statistics.fmean(of_splits))
    freedom = [sum(values.shape[axis] - 1 for values in tables) for axis in (0, 1)]
    weighted = [(sum(map(statistics.pvariance, of_cases)), T[freedom[0]])]
    weighted += [(sum(map(statistics.pvariance, of_seeds)), T.get(freedom[1], 0.0))]
    stretch = sum(v * quantile for v, quantile in weighted) / sum(v for v, _ in weighted) / 1.959964
    low, high = np.percentile(deviations, [2.5, 97.5]) * stretch
    mean = statistics.fmean(float(values.mean()) for values in tables)
    return mean + float(low), mean + float(high)


@pytest.mark.parametrize("shapes", [[(5, 2)], [(12, 3)], [(6, 1)], [(7, 3), (4, 2)], [(5, 2), (4, 2)]])
def test_bootstrap_is_what_a_slow_loop_gives(shapes: list[tuple[int, int]]) -> None:
    generator = np.random.default_rng(1)
    tables = [
        0.1 + generator.normal(0, 0.2, (n, 1)) + generator.normal(0, 0.1, (1, k)) + generator.normal(0, 0.05, (n, k))
        for n, k in shapes
    ]
    rows = pd.concat([table(values, f"split{i}") for i, values in enumerate(tables)])
    interval = paired_bootstrap(rows, draws=20_000)
    low, high = slow_bootstrap(tables, draws=4000, seed=5)
    width = high - low
    assert interval.low == pytest.approx(low, abs=0.05 * width)
    assert interval.high == pytest.approx(high, abs=0.05 * width)
    assert interval.mean == pytest.approx(np.mean([values.mean() for values in tables]))
    assert interval.cases == sum(n for n, _ in shapes)
    assert interval.seeds == interval.most_seeds == max(k for _, k in shapes)
    assert interval.seeds_resampled == all(k > 1 for _, k in shapes)
    assert not interval.splits_resampled


def test_bootstrap_resamples_seeds_and_not_only_cases() -> None:
    """All cases alike, seeds apart: a bootstrap of cases alone would give an interval without width.

    One draw in 27 takes the lowest seed three times, so the percentiles are -0.1 and 0.1 from the mean.
    """
    values = np.tile([0.0, 0.1, 0.2], (20, 1))
    interval = paired_bootstrap(table(values))
    half = 0.1 * math.sqrt(3 / 2) * T[2] / 1.959964
    assert (interval.low, interval.high) == (pytest.approx(0.1 - half, abs=1e-5), pytest.approx(0.1 + half, abs=1e-5))


def test_folds_with_one_seed_each_are_resampled_as_wholes() -> None:
    """Each fold's training was lucky or not, its cases agree: resampling cases would give no width at all."""
    of_folds = [0.0, 0.1, 0.2]
    rows = pd.concat([table(np.full((n, 1), v), f"fold{n}") for n, v in zip((4, 6, 9), of_folds, strict=True)])
    interval = paired_bootstrap(rows)
    half = 0.1 * math.sqrt(3 / 2) * T[2] / 1.959964
    assert (interval.low, interval.high) == (pytest.approx(0.1 - half, abs=1e-5), pytest.approx(0.1 + half, abs=1e-5))
    assert (interval.cases, interval.seeds, interval.most_seeds) == (19, 1, 1)
    assert interval.splits_resampled
    assert not interval.seeds_resampled


def test_folds_whose_means_agree_by_luck_are_as_uncertain_as_their_cases() -> None:
    values = np.array([[-0.3], [0.3], [0.1], [0.1]])
    interval = paired_bootstrap(pd.concat([table(values, "a"), table(values[::-1] * 1.0, "b")]))
    low, high = slow_bootstrap([values, values[::-1]], draws=4000, seed=5)
    assert (interval.low, interval.high) == (pytest.approx(low, abs=0.03), pytest.approx(high, abs=0.03))
    assert interval.high - interval.low > 0.3
    assert interval.splits_resampled


@pytest.mark.parametrize("folds", [3, 5])
def test_a_second_seed_in_one_fold_changes_little(folds: int) -> None:
    """Until every fold has two, the folds' means stay the observations: one more training must not make certain."""
    generator = np.random.default_rng(8)
    tables = [generator.normal(0, 1, (7, 1)) + generator.normal(0, 2) for _ in range(folds)]
    again = [np.hstack([tables[0], tables[0] + generator.normal(0, 0.5, (7, 1))]), *tables[1:]]
    few, more = (
        paired_bootstrap(pd.concat([table(values, f"fold{i}") for i, values in enumerate(each)]))
        for each in (tables, again)
    )
    assert (more.most_seeds, more.splits_resampled, more.seeds_resampled) == (2, True, False)
    assert more.high - more.low == pytest.approx(few.high - few.low, rel=0.1)


def test_seeds_of_several_folds_count_together() -> None:
    """Five folds with two seeds each hold five degrees of freedom, not one: all of the spread is the seeds'."""
    rows = pd.concat([table(np.tile([0.0, 0.2], (6, 1)), f"fold{i}") for i in range(5)])
    interval = paired_bootstrap(rows)
    generator = np.random.default_rng(0)
    means = generator.binomial(2, 0.5, (200_000, 5)).mean(axis=1) * 0.1
    half = (np.quantile(means, 0.975) - 0.1) * math.sqrt(2) * T[5] / 1.959964
    assert interval.high - interval.mean == pytest.approx(half, rel=0.02)
    assert interval.seeds_resampled


@pytest.mark.parametrize(
    ("splits", "cases", "seeds", "of_seeds", "least"),
    [
        (1, 7, 2, 0.5, 0.0),
        (1, 33, 2, 2.0, 0.02),
        (1, 11, 3, 1.0, 0.0),
        (1, 33, 5, 2.0, 0.01),
        pytest.param(5, 7, 1, 2.0, 0.0, marks=pytest.mark.slow),
        pytest.param(5, 7, 2, 2.0, 0.0, marks=pytest.mark.slow),
    ],
)
def test_no_difference_is_seldom_taken_for_one(
    splits: int, cases: int, seeds: int, of_seeds: float, least: float
) -> None:
    """Standard deviations in points: 2 between cases; the bare percentiles would be wrong in up to a third."""
    generator = np.random.default_rng(6)
    trials, wrong = 150, 0
    for trial in range(trials):
        tables = [
            generator.normal(0, 2, (cases, 1)) + generator.normal(0, of_seeds, (1, seeds))
            + generator.normal(0, 1, (cases, seeds))
            for _ in range(splits)
        ]  # fmt: skip
        rows = pd.concat([table(values, f"split{i}") for i, values in enumerate(tables)])
        interval = paired_bootstrap(rows, draws=400, seed=trial)
        wrong += interval.low > 0 or interval.high < 0
    assert least <= wrong / trials <= 0.1


def test_one_seed_is_the_ordinary_bootstrap_of_means() -> None:
    values = np.random.default_rng(2).normal(0.3, 1.0, (200, 1))
    interval = paired_bootstrap(table(values))
    error = values.std() / math.sqrt(200)
    assert interval.low == pytest.approx(values.mean() - 1.96 * error, abs=0.1 * error)
    assert interval.high == pytest.approx(values.mean() + 1.96 * error, abs=0.1 * error)
    assert not interval.seeds_resampled


@pytest.mark.parametrize(("cases", "seeds", "of_seeds"), [(30, 10, 0.15), (40, 1, 0.0)])
def test_coverage_of_the_true_mean(cases: int, seeds: int, of_seeds: float) -> None:
    """The truth lies in about 95 % of the intervals; taking all scores as independent would cover far less."""
    generator = np.random.default_rng(3)
    covered = naive = 0
    trials = 120
    for _ in range(trials):
        values = (
            0.2
            + generator.normal(0, 0.3, (cases, 1))
            + generator.normal(0, of_seeds, (1, seeds))
            + generator.normal(0, 0.1, (cases, seeds))
        )
        interval = paired_bootstrap(table(values), draws=500)
        covered += interval.low < 0.2 < interval.high
        naive += abs(values.mean() - 0.2) < 1.96 * values.std() / math.sqrt(values.size)
    assert 0.88 <= covered / trials <= 0.99
    if seeds > 1:
        assert naive / trials < 0.7


def test_every_split_counts_alike() -> None:
    rows = pd.concat([table(np.full((8, 2), 0.0), "a"), table(np.full((2, 2), 1.0), "b")])
    assert paired_bootstrap(rows).mean == 0.5


def test_values_that_are_missing_are_left_out() -> None:
    values = np.arange(12.0).reshape(6, 2)
    values[0, 1] = np.nan
    interval = paired_bootstrap(table(values))
    assert interval.mean == pytest.approx(np.nanmean(values))
    assert interval.cases == 6
    assert interval.low < interval.mean < interval.high


def test_draws_in_parts_are_those_of_one_go() -> None:
    generator = np.random.default_rng(3)
    expected = [generator.multinomial(n, np.full(n, 1 / n), size=2500) for n in (300, 5, 7, 2)]
    drawn = [counts for pair in _draws(((300, 5), (7, 2)), 2500, 3) for counts in pair]
    for one, other in zip(drawn, expected, strict=True):
        assert np.array_equal(one, other)


def test_deviations_of_draws_with_values_missing() -> None:
    """Draw by draw, with each value as often as its row and its column were drawn."""
    values = np.random.default_rng(0).normal(0, 1, (6, 3))
    values[[0, 2, 5], [1, 0, 0]] = np.nan
    ((rows, columns),) = _draws((values.shape,), 1200, 5)
    by_rows, by_columns, by_both = _drawn_deviations(values, rows, columns)

    def mean(of_rows: np.ndarray, of_columns: np.ndarray) -> float:
        return float(np.nanmean(np.repeat(np.repeat(values, of_rows, axis=0), of_columns, axis=1)))

    for draw in (0, 7, 999, 1000, 1199):
        of_rows = mean(rows[draw], np.ones(3, dtype=int)) - mean(np.ones(6, dtype=int), np.ones(3, dtype=int))
        of_columns = mean(np.ones(6, dtype=int), columns[draw]) - np.nanmean(values)
        assert by_rows[draw] == pytest.approx(of_rows)
        assert by_columns[draw] == pytest.approx(of_columns)
        both = mean(rows[draw], columns[draw]) - np.nanmean(values)
        assert by_both[draw] == pytest.approx(both - of_rows - of_columns)


def test_bootstrap_of_nothing_of_one_case_and_of_no_spread() -> None:
    nothing = paired_bootstrap(table(np.full((3, 2), np.nan)))
    assert (nothing.cases, nothing.seeds) == (0, 0)
    assert math.isnan(nothing.mean)
    one = paired_bootstrap(table(np.array([[0.1, 0.3]])))
    assert one.mean == pytest.approx(0.2)
    assert math.isnan(one.low)
    assert math.isnan(one.high)
    same = paired_bootstrap(table(np.full((4, 2), 0.25)))
    assert (same.mean, same.low, same.high) == (0.25, 0.25, 0.25)


def test_bootstrap_does_not_depend_on_the_order_of_rows() -> None:
    rows = table(np.random.default_rng(4).normal(size=(9, 3)))
    again = paired_bootstrap(rows.sample(frac=1, random_state=1))
    first = paired_bootstrap(rows)
    assert (again.low, again.high) == (pytest.approx(first.low), pytest.approx(first.high))


def test_a_case_that_is_there_twice_is_an_error() -> None:
    rows = table(np.ones((3, 2)))
    with pytest.raises(ValueError, match="two differences"):
        paired_bootstrap(pd.concat([rows, rows.head(1)]))


def enumerated_p(values: list[float]) -> float:
    """Two-sided p of the signed-rank sum over all signs, without ties."""
    ranks = np.argsort(np.argsort(np.abs(values))) + 1
    found = sum(rank for rank, value in zip(ranks, values, strict=True) if value > 0)
    sums = [
        sum(s * r for s, r in zip(signs, ranks, strict=True)) for signs in itertools.product([0, 1], repeat=len(values))
    ]
    lower, upper = (np.mean([sign * s <= sign * found for s in sums]) for sign in (1, -1))
    return min(1.0, 2 * min(lower, upper))


@pytest.mark.parametrize(
    "values",
    [
        [0.1, 0.2, -0.05, 0.3, 0.4, 0.15],
        [-0.3, 0.1, 0.2, -0.4, 0.5, 0.6, 0.7, 0.8],
        [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7],
    ],
)
def test_p_is_exact(values: list[float]) -> None:
    assert paired_p(table(np.array(values)[:, None])) == pytest.approx(enumerated_p(values))


def test_p_averages_seeds_first() -> None:
    values = np.array([0.1, 0.2, -0.05, 0.3, 0.4, 0.15])
    noise = np.array([[0.5], [-0.4], [0.3], [0.2], [-0.1], [0.6]])
    both = np.hstack([values[:, None] + noise, values[:, None] - noise])
    assert paired_p(table(both)) == pytest.approx(enumerated_p(list(values)))


@pytest.mark.parametrize("values", [[0.1, 0.2, 0.3, 0.4, 0.5], [0.0] * 8, [0.1, 0.2, 0.3, 0.0, 0.0, 0.0, 0.0], []])
def test_p_needs_six_pairs_that_differ(values: list[float]) -> None:
    assert math.isnan(paired_p(table(np.array(values).reshape(-1, 1))))


def test_seed_mean_by_hand() -> None:
    """Split a: cell means 0.2 and 0.4; split b: 0.8 and 0.6. Seeds: 0.5 and 0.5, though splits and cases spread."""
    rows = [("a", 0, 0.1), ("a", 0, 0.3), ("a", 1, 0.4), ("b", 0, 0.8), ("b", 1, 0.5), ("b", 1, 0.7)]
    result = seed_mean(pd.DataFrame(rows, columns=["split", "seed", "value"]))
    assert (result.mean, result.sd, result.seeds) == (pytest.approx(0.5), pytest.approx(0.0), 2)


def test_seed_mean_of_cells_that_are_missing() -> None:
    """Seed 2 is there for split a alone: it counts in the mean of a, and not in the spread."""
    rows = [("a", 0, 0.1), ("a", 1, 0.2), ("a", 2, 0.6), ("b", 0, 0.5), ("b", 1, 0.8)]
    result = seed_mean(pd.DataFrame(rows, columns=["split", "seed", "value"]))
    assert result.mean == pytest.approx((0.3 + 0.65) / 2)
    assert result.sd == pytest.approx(statistics.stdev([0.3, 0.5]))
    assert result.seeds == 2


def test_seed_mean_of_one_seed_and_of_nothing() -> None:
    one = seed_mean(pd.DataFrame({"split": ["a"] * 2, "seed": [0] * 2, "value": [0.25, 0.75]}))
    assert (one.mean, one.seeds) == (0.5, 1)
    assert math.isnan(one.sd)
    assert math.isnan(seed_mean(pd.DataFrame({"split": ["a"], "seed": [0], "value": [np.nan]})).mean)
