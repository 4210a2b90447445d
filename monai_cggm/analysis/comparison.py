# SPDX-License-Identifier: Apache-2.0
"""Tables of a comparison of training methods, and what they say about balancing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import pandas as pd

from monai_cggm.analysis.cells import ALONE, CELL, ENSEMBLE, FUSION, CellKey, Cells, split_name
from monai_cggm.analysis.measures import DICE, HD95_PENALTIES, Measure, is_dice, measure_of, score_columns
from monai_cggm.analysis.pages import one_line
from monai_cggm.analysis.statistics import Interval, paired_bootstrap, paired_p, seed_mean, seed_means
from monai_cggm.errors import DataError

#: What two arms are compared by. ``without_key`` needs the study's ``key_modality``.
SCORES = ("full", "subsets", "worst", "without_key")

#: Roles of the controls of a balance. Only an arm that names and beats all of them shows that balancing helps.
BALANCE_CONTROLS = ("constant", "shuffled", "uniform")

_COUNTS = ("splits", "seeds", "cases")
_ENOUGH_SEEDS = 3
_COSTS = ("iterations", "training_seconds", "peak_memory_mb", "parameters", "classifier_parameters")
_DIFFERENCES = (
    "arm",
    "against",
    "role",
    "score",
    "difference",
    "low",
    "high",
    "p",
    "cases",
    "seeds",
    "cells",
    "cells_left_out",
    "most_seeds",
    "seeds_resampled",
    "splits_resampled",
)
_REQUIRED = ("reference", "seeds", "arms")


@dataclass(frozen=True)
class Comparison:
    """The tables of a comparison.

    "The score" is what the study compares arms by, mean Dice unless it says otherwise. It and its kind run from 0 to 1,
    HD95 is in mm, and differences are in points (the score × 100). Of an absolute error less is better: its differences
    are how much less of it there is, so that more is better of every difference.

    A score's column has the mean, its ``<column>_sd`` the spread over seeds; see
    :func:`monai_cggm.analysis.seed_mean`. Arms are in the study's order.

    Attributes:
        arms: all arms of the study, in its order, those that ``alone: true`` adds at the end.
        splits: names of its splits; those of the cells, where the study names none.
        modalities: in channel order; empty where the study names none and no cell has finished.
        cells: those that the study plans, as far as they are there.
        outstanding: planned cells that have neither finished nor failed.
        outside: cells that are there and that the study does not plan; nothing else counts them.
        full_set: arm; ``splits, seeds, cases``; the scores (Dice by region and their mean, HD95 by region) from all
            modalities; with HD95, ``penalties`` of ``distances``: how many of its values are the penalty for a
            region that is empty on one side only.
        subsets: arm; ``cases``; the mean score over all subsets (``subsets``), over those that lack one modality
            (``missing_1``), two …, over those with and without the key modality (``with_key``, ``without_key``), of
            the worst subset (``worst``, its name in ``worst_subset``), and of each subset. A mean that lacks a subset
            is NaN. Only cases with every modality count, so that all columns are of the same cases.
        differences: arm minus another (``against``; of an error, the other minus the arm), by ``score``
            (:data:`SCORES`): ``difference``, its 95 % interval ``low`` to ``high``, ``p``, and how many ``cases`` and
            ``seeds`` it rests on. ``role`` says what the other one is: ``reference``, or a control's roles, joined with
            "+". Only the ``cells`` (split and seed) that both arms have count; ``cells_left_out`` are those that one of
            them has alone. For the last three columns see :class:`monai_cggm.analysis.Interval`.
        classifiers: arm and modality; the scores of that modality's classifier, without HD95.
        alone: the networks of one modality and their ensemble, as in ``full_set``.
        costs: arm; number of ``cells`` and means over them.
    """

    arms: tuple[str, ...]
    splits: tuple[str, ...]
    modalities: tuple[str, ...]
    cells: Cells
    outstanding: list[CellKey]
    outside: list[CellKey]
    full_set: pd.DataFrame
    subsets: pd.DataFrame
    differences: pd.DataFrame
    classifiers: pd.DataFrame
    alone: pd.DataFrame
    costs: pd.DataFrame


def subsets_of(modalities: Sequence[str]) -> list[str]:
    """Return the names of all subsets of the modalities that are not empty, the largest first.

    Example:
        >>> subsets_of(["flair", "t1ce", "t2"])[:4]
        ['flair+t1ce+t2', 'flair+t1ce', 'flair+t2', 't1ce+t2']
    """
    return ["+".join(s) for size in range(len(modalities), 0, -1) for s in combinations(modalities, size)]


def subset_groups(modalities: Sequence[str], key_modality: str | None = None) -> dict[str, list[str]]:
    """Return the subsets that each summary averages over, by the summary's column.

    Example:
        >>> subset_groups(["flair", "t1ce"], "t1ce")["with_key"]
        ['flair+t1ce', 't1ce']
    """
    names = subsets_of(modalities)
    groups = {"subsets": names}
    for missing in range(1, len(modalities)):
        groups[f"missing_{missing}"] = [name for name in names if name.count("+") == len(modalities) - missing - 1]
    if key_modality is not None and len(modalities) > 1:
        groups["with_key"] = [name for name in names if key_modality in name.split("+")]
        groups["without_key"] = [name for name in names if key_modality not in name.split("+")]
    return groups


def compare(cells: Cells, study: Mapping[str, Any]) -> Comparison:
    """Make the tables of a comparison.

    Args:
        cells: what was read from its folder.
        study: the study, with ``reference``, ``seeds``, ``arms`` (name → mapping, in which ``controls`` may hold roles
            and the arms that have them), and optionally ``splits``, ``modalities``, ``part`` (default: test),
            ``score`` (default: mean Dice), ``convention``, ``key_modality`` and ``alone``.

    Raises:
        DataError: where the study's reference, score or key modality is not there, controls have no roles, or cells
            cannot be compared: other modalities, another convention, other cases of the same split, or no score of the
            study's part.

    Example:
        >>> from monai_cggm.analysis.cells import FACTS, ROW
        >>> nothing = Cells(pd.DataFrame(columns=[*CELL, *ROW, "dice_mean"]), pd.DataFrame(columns=list(FACTS)))
        >>> study = {"reference": "joint", "splits": ["brats.json"], "seeds": [0], "arms": {"joint": {}}}
        >>> [str(key) for key in compare(nothing, study).outstanding]
        ['joint, brats, seed 0']
    """
    _check_study(study)
    modalities = _modalities(cells, study)
    own = [arm for arm in study["arms"] if not _is_alone(arm)]
    alone = _alone_arms(cells, modalities) if study.get("alone") else []
    arms = tuple(dict.fromkeys([*own, *alone]))
    splits = tuple(split_name(str(split)) for split in study.get("splits") or sorted(set(cells.facts["split"])))
    planned = [CellKey(arm, split, int(seed)) for arm in arms for split in splits for seed in study["seeds"]]
    used = cells.only(planned)
    part, score = str(study.get("part", "test")), score_of(study)
    _check_cells(used, study, part, score)
    scores = used.scores[used.scores["part"] == part]
    full = scores[(scores["predictor"] == FUSION) & (scores["subset"] == _full_subset(scores, used.facts))]
    fused = [arm for arm in arms if not arm.startswith(ALONE)]
    by_subset = _by_subset(scores, score, modalities)
    by_subset = by_subset[by_subset.index.isin(fused, level="arm")]
    groups = subset_groups(modalities, study.get("key_modality"))
    measure = measure_of(score)
    complete = _of_complete_cases(by_subset)
    subsets = _subsets_table(complete, fused, groups, measure)
    by_score = _by_score(by_subset, complete, groups, subsets)
    columns = _score_columns(scores, score)
    classifier_rows = scores[scores["predictor"] != FUSION].rename(columns={"predictor": "modality"})
    return Comparison(
        arms=arms,
        splits=splits,
        modalities=modalities,
        cells=used,
        outstanding=used.outstanding(planned),
        outside=[key for key in cells.done + list(cells.failed) if key not in set(planned)],
        full_set=_with_penalties(_score_table(full, [(arm,) for arm in own], ("arm",), columns), full),
        subsets=subsets,
        differences=_differences(by_score, _pairs(study, fused), measure),
        classifiers=_score_table(
            classifier_rows,
            [(arm, m) for arm in own for m in modalities],
            ("arm", "modality"),
            [column for column in columns if not column.startswith("hd95_")],
        ),
        alone=_with_penalties(_score_table(full, [(arm,) for arm in alone], ("arm",), columns), full),
        costs=_costs(used.facts, arms),
    )


def score_of(study: Mapping[str, Any]) -> str:
    """Return the column that a study compares arms by.

    Example:
        >>> score_of({}), score_of({"score": "accuracy"})
        ('dice_mean', 'accuracy')
    """
    return str(study.get("score") or DICE)


def controls_of(study: Mapping[str, Any], arm: str) -> dict[str, str]:
    """Return an arm's controls, role → arm; several roles may name the same arm.

    Raises:
        DataError: where the controls have no roles.

    Example:
        >>> controls_of({"arms": {"lag": {"controls": {"shuffled": "lag_shuffled"}}}}, "lag")
        {'shuffled': 'lag_shuffled'}
    """
    controls = (study["arms"].get(arm) or {}).get("controls") or {}
    if not isinstance(controls, Mapping):
        raise DataError([f"study: arm {arm} has the controls {controls!r}, expected roles and arms (shuffled: …)"])
    return {str(role): str(control) for role, control in controls.items()}


def verdicts(study: Mapping[str, Any], differences: pd.DataFrame) -> list[str]:
    """Say in plain words whether balancing helped, for each arm that names controls and for each of two scores.

    The scores are the mean over all subsets and that of the full set. An arm is better than another where the
    interval of their difference is above zero, worse where it is below, and otherwise no difference is shown. Balancing
    helps where the arm is better than the reference *and* than every control, and where its controls have all the
    roles of :data:`BALANCE_CONTROLS`. Without some of these, something else than balancing may be what helped: the
    roles that were not tested are named, and nothing is said of balancing, nor of an arm that has none of them.

    Args:
        study: as for :func:`compare`.
        differences: of a :class:`Comparison`.

    Raises:
        DataError: where an arm's controls have no roles.

    Example:
        >>> row = {"arm": "b", "against": "joint", "score": "full", "difference": 2.0, "low": 1.0, "high": 3.0,
        ...        "cases": 5, "seeds": 3, "most_seeds": 3, "seeds_resampled": True, "splits_resampled": False}
        >>> rows = pd.DataFrame([row, row | {"against": "even", "difference": 0.9, "low": 0.1, "high": 1.7}])
        >>> study = {"reference": "joint", "arms": {"b": {"controls": {"constant": "even", "uniform": "even"}}}}
        >>> print(verdicts(study, rows)[0])
        b: +2.0 points [1.0, 3.0] over joint on the full set; +0.9 [0.1, 1.7] over even (constant and uniform); 5 cases,
        3 seeds. Better than joint and better than its controls (even); shuffled was not run: nothing is said of
        balancing.
    """
    measure = measure_of(score_of(study))
    arms = {arm: controls_of(study, arm) for arm in study["arms"]}
    arms = {arm: controls for arm, controls in arms.items() if controls}
    if not arms:
        return ["No arm names controls: this study cannot show whether balancing helps."]
    scored = [score for score in ("subsets", "full") if (differences["score"] == score).any()]
    if not scored:
        return [f"{arm}: nothing can be said yet, it shares no scored cell with {study['reference']}." for arm in arms]
    sentences = []
    for arm, controls in arms.items():
        of_arm = differences[differences["arm"] == arm]
        for score in scored:
            found = {row.against: row for row in of_arm[of_arm["score"] == score].itertuples()}
            sentences.append(_verdict(arm, score, str(study["reference"]), controls, found, measure))
    return sentences


def outcome(low: float, high: float) -> str:
    """Return ``better``, ``worse``, ``no difference shown``, or ``unknown`` without an interval.

    Example:
        >>> outcome(0.2, 1.3), outcome(-0.2, 1.3)
        ('better', 'no difference shown')
    """
    if math.isnan(low) or math.isnan(high):
        return "unknown"
    if low > 0:
        return "better"
    return "worse" if high < 0 else "no difference shown"


def points(value: float, *, sign: bool = False, digits: int = 1) -> str:
    """Write a number of points, never as a negative zero.

    Example:
        >>> points(-0.04), points(21.32, sign=True)
        ('0.0', '+21.3')
    """
    rounded = round(value, digits) + 0.0
    return f"{rounded:{'+' if sign else ''}.{digits}f}"


def interval_text(low: float, high: float, digits: int = 1) -> str:
    """Write an interval of points, an end with more digits where rounding would hide on which side of zero it is.

    Example:
        >>> interval_text(-2.31, -0.02)
        '[-2.3, -0.02]'
    """
    ends = []
    for value in (low, high):
        needed = next((n for n in range(digits, digits + 3) if round(value, n)), digits)
        ends.append(points(value, digits=needed))
    return f"[{', '.join(ends)}]"


def arm_title(study: Mapping[str, Any], arm: str) -> str:
    """Return what readers see of an arm: its title on one line, or its name.

    Example:
        >>> arm_title({"arms": {"dropout": {"title": "+ uniform dropout"}}}, "dropout")
        '+ uniform dropout'
    """
    fallback = "networks of one modality, averaged" if arm == ENSEMBLE else arm
    return one_line((study["arms"].get(arm) or {}).get("title") or fallback)


def score_labels(study: Mapping[str, Any]) -> dict[str, str]:
    """Return what readers see of each of :data:`SCORES`."""
    key = one_line(study.get("key_modality"))
    return {"full": "full set", "subsets": "all subsets", "worst": "worst subset", "without_key": f"without {key}"}


def _verdict(
    arm: str, score: str, reference: str, controls: Mapping[str, str], found: Mapping[str, Any], measure: Measure
) -> str:
    where = {"subsets": "the mean over subsets", "full": "the full set"}[score]
    rivals = list(dict.fromkeys([reference, *controls.values()]))
    outcomes = {
        rival: outcome(found[rival].low, found[rival].high) if rival in found else "unknown" for rival in rivals
    }
    unknown = [rival for rival, result in outcomes.items() if result == "unknown"]
    if unknown:
        return (
            f"{arm}, on {where}: nothing can be said yet; no interval against {_listed(unknown)} "
            "(not run, outstanding, or too few cases)."
        )
    rows = [found[rival] for rival in rivals]
    digits = measure.gain_digits
    numbers = [
        f"{points(row.difference, sign=True, digits=digits)} {interval_text(row.low, row.high, digits)}" for row in rows
    ]
    numbers[0] = numbers[0].replace(" [", f" {measure.gain} [", 1)
    over = "over" if measure.more_is_better else "than"
    texts = [f"{number} {over} {_with_roles(rival, controls)}" for number, rival in zip(numbers, rivals, strict=True)]
    shown = "; ".join(filter(None, [f"{texts[0]} on {where}", ", ".join(texts[1:])]))
    counts = f"{_counted([row.cases for row in rows], 'case')}, {_counted([row.seeds for row in rows], 'seed')}"
    notes = "".join(f" {note}" for note in _seed_notes(rows))
    return f"{arm}: {shown}; {counts}. {_conclusion(reference, controls, outcomes)}{notes}"


def _with_roles(rival: str, controls: Mapping[str, str]) -> str:
    """An arm with the roles that it has as a control, unless its name says them."""
    roles = [role for role, control in controls.items() if control == rival]
    return rival if roles in ([], [rival]) else f"{rival} ({_listed(roles)})"


def _seed_notes(rows: Sequence[Any]) -> list[str]:
    notes = []
    left_out = [row for row in rows if not (row.seeds_resampled or row.splits_resampled)]
    if any(row.splits_resampled for row in rows):
        notes.append(
            "With one seed in a split, whole splits are resampled: the chance of training is in their differences."
        )
    if left_out:
        notes.append("With one seed, the intervals leave the chance of training out.")
    if min(row.most_seeds for row in rows) < _ENOUGH_SEEDS:
        notes.append("Few seeds: the interval may be too narrow.")
    return notes


def _conclusion(reference: str, controls: Mapping[str, str], outcomes: Mapping[str, str]) -> str:
    names = list(dict.fromkeys(controls.values()))
    of = {
        result: [name for name in names if name != reference and outcomes[name] == result]
        for result in ("worse", "no difference shown")
    }
    untested = [role for role in BALANCE_CONTROLS if role not in controls]
    unproven = ": it has not shown that balancing helps."
    if untested:
        unproven = f"; {_listed(untested)} {'was' if len(untested) == 1 else 'were'} not run: "
        unproven += "nothing is said of balancing."
    if len(untested) == len(BALANCE_CONTROLS):  # the arm claims no balance
        unproven = "."
    against_controls = []
    if of["worse"]:
        against_controls.append(f"worse than {_listed(of['worse'])}")
    if of["no difference shown"]:
        against_controls.append(f"no gain over {_listed(of['no difference shown'])} is shown")
    match outcomes[reference]:
        case "better" if against_controls:
            return f"Better than {reference}, but {' and '.join(against_controls)}{unproven}"
        case "better" if untested:
            return f"Better than {reference} and better than its controls ({', '.join(names)}){unproven}"
        case "better":
            return f"Better than {reference} and than every control: balancing helps here."
        case "worse":
            return f"Worse than {reference}{unproven}"
        case _:
            also = f", and it is worse than {_listed(of['worse'])}" if of["worse"] else ""
            return f"No difference from {reference} is shown{also}{unproven}"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _counted(numbers: Sequence[int], what: str) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low if low == high else f'{low} to {high}'} {what}{'' if high == 1 else 's'}"


def _check_study(study: Mapping[str, Any]) -> None:
    missing = [key for key in _REQUIRED if not study.get(key)]
    if missing:
        raise DataError([f"study: no {', '.join(missing)}, expected all of {', '.join(_REQUIRED)}"])
    if study["reference"] not in study["arms"]:
        raise DataError(
            [f"study: reference {study['reference']!r}, expected one of the arms {', '.join(study['arms'])}"]
        )
    for arm in study["arms"]:
        controls_of(study, arm)


def _modalities(cells: Cells, study: Mapping[str, Any]) -> tuple[str, ...]:
    """The modalities of the study, in channel order: those that it names, and otherwise those of its finished cells."""
    own = [arm for arm in study["arms"] if not _is_alone(arm)]
    facts = cells.facts[(cells.facts["status"] == "done") & cells.facts["arm"].isin(own)]
    found = {tuple(study["modalities"]): "study"} if study.get("modalities") else {}
    found |= {tuple(modalities): arm for arm, modalities in zip(facts["arm"], facts["modalities"], strict=True)}
    if len(found) > 1:
        each = "; ".join(f"{arm}: {'+'.join(modalities)}" for modalities, arm in found.items())
        raise DataError([f"arms with different modalities cannot be compared by subsets: {each}"])
    modalities: tuple[str, ...] = next(iter(found), ())
    key = study.get("key_modality")
    if modalities and key is not None and key not in modalities:
        raise DataError([f"study: key_modality {key!r}, expected one of {', '.join(modalities)}"])
    return modalities


def _is_alone(arm: str) -> bool:
    return arm.startswith(ALONE) or arm == ENSEMBLE


def _alone_arms(cells: Cells, modalities: Sequence[str]) -> list[str]:
    """The arms that ``alone: true`` adds; those that are there, as long as the modalities are not known."""
    seen = sorted({str(arm) for arm in cells.facts["arm"] if str(arm).startswith(ALONE)})
    return [*([ALONE + modality for modality in modalities] or seen), ENSEMBLE]


def _check_cells(cells: Cells, study: Mapping[str, Any], part: str, score: str) -> None:
    """Raise where the finished cells of a study cannot be set side by side."""
    if score not in cells.scores:
        raise DataError([f"study: score {score!r}, which is no column of the cells' scores"])
    problems = _convention_problems(cells, study) if is_dice(score) else []
    rows = cells.scores[(cells.scores["part"] == part) & (cells.scores["predictor"] == FUSION)]
    cases = {key: frozenset(group["case"]) for key, group in rows.groupby(list(CELL), sort=False)}
    first: dict[str, CellKey] = {}
    for key in sorted(cells.done, key=lambda key: key.arm.startswith(ALONE)):
        if key not in cases:
            problems.append(f"cell {key}: no score of the part {part!r}")
            continue
        # a network of one modality has no score of a case without it
        few = key.arm.startswith(ALONE)
        other = first.get(key.split, key) if few else first.setdefault(key.split, key)
        odd = sorted(cases[key] - cases[other] if few else cases[key] ^ cases[other])
        if odd:
            problems.append(f"cells {other} and {key}: scores of different cases ({', '.join(odd)})")
    if problems:
        raise DataError(problems)


def _convention_problems(cells: Cells, study: Mapping[str, Any]) -> list[str]:
    facts = cells.facts[cells.facts["status"] == "done"]
    expected = study.get("convention", next(iter(facts["convention"]), None))
    return [
        f"cell {CellKey(row.arm, row.split, row.seed)}: convention {row.convention!r}, expected {expected!r}"
        for row in facts.itertuples()
        if row.convention != expected
    ]


def _full_subset(scores: pd.DataFrame, facts: pd.DataFrame) -> pd.Series:
    """The subset that holds all modalities of a row's own network."""
    done = facts[facts["status"] == "done"]
    full = {arm: "+".join(modalities) for arm, modalities in zip(done["arm"], done["modalities"], strict=True)}
    return scores["arm"].map(full)


def _score_columns(scores: pd.DataFrame, score: str) -> list[str]:
    """Columns of scores that are shown: regions before their mean, HD95 after Dice and only where it was computed."""
    columns = [c for c in score_columns(scores, score) if not c.startswith("hd95_") or scores[c].notna().any()]
    return sorted(columns, key=lambda column: 2 * column.startswith("hd95_") + (column == DICE))


def _score_table(
    rows: pd.DataFrame, order: Iterable[tuple[str, ...]], by: tuple[str, ...], columns: Sequence[str]
) -> pd.DataFrame:
    """Means and spreads of score columns for each group of ``order`` that has rows."""
    groups = {key: group for key, group in rows.groupby(list(by), sort=False)}
    table = []
    for key in order:
        if key not in groups:
            continue
        group = groups[key]
        counts = (group["split"].nunique(), group["seed"].nunique(), len(group[["split", "case"]].drop_duplicates()))
        table.append({**dict(zip(by, key, strict=True)), **dict(zip(_COUNTS, counts, strict=True))})
        table[-1] |= _means(group, columns)
    both = [name for column in columns for name in (column, f"{column}_sd")]
    return pd.DataFrame(table, columns=[*by, *_COUNTS, *both])


def _with_penalties(table: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """Add how many of an arm's values of HD95 are penalties, of all cells, cases and regions."""
    columns = [column for column in table if column.startswith("hd95_") and not column.endswith("_sd")]
    if not columns:
        return table
    counts = []
    for arm in table["arm"]:
        of_arm = rows[rows["arm"] == arm]
        empty = [of_arm[c].isin(HD95_PENALTIES) & (of_arm[c.replace("hd95_", "dice_")] == 0) for c in columns]
        counts.append((int(sum(e.sum() for e in empty)), int(of_arm[columns].notna().sum().sum())))
    return table.assign(penalties=[n for n, _ in counts], distances=[n for _, n in counts])


def _means(rows: pd.DataFrame, columns: Iterable[str]) -> dict[str, float]:
    """Mean and spread of each column; NaN where some cell lacks it: means over different cells do not compare."""
    means: dict[str, float] = {}
    scored = rows.groupby(list(CELL))[list(columns)].count().gt(0).all()
    for column, result in seed_means(rows, columns).items():
        mean, sd = (result.mean, result.sd) if scored[column] else (math.nan, math.nan)
        means |= {column: mean, f"{column}_sd": sd}
    return means


def _by_subset(scores: pd.DataFrame, score: str, modalities: Sequence[str]) -> pd.DataFrame:
    """The score, a row a case of a cell and a column a subset; NaN where it was not scored."""
    fusion = scores[scores["predictor"] == FUSION]
    wide = fusion.pivot(index=[*CELL, "case"], columns="subset", values=score)
    return wide.reindex(columns=subsets_of(modalities))


def _of_complete_cases(by_subset: pd.DataFrame) -> pd.DataFrame:
    """Only NaN for a case that lacks a score from a subset that its arm was scored from: it lacks a modality."""
    scored = by_subset.notna()
    if scored.empty:
        return by_subset
    return by_subset.where((scored | ~scored.groupby("arm").transform("any")).all(axis=1))


def _subsets_table(
    by_subset: pd.DataFrame, arms: Iterable[str], groups: Mapping[str, Sequence[str]], measure: Measure
) -> pd.DataFrame:
    worst_of = min if measure.more_is_better else max
    names = list(by_subset.columns)
    columns = [column for group in groups for column in (group, f"{group}_sd")]
    there = set(by_subset.index.get_level_values("arm"))
    table = []
    for arm in (arm for arm in arms if arm in there):
        of_arm = by_subset.loc[[arm]]
        rows = of_arm.assign(**{group: of_arm[list(s)].mean(axis=1, skipna=False) for group, s in groups.items()})
        rows = rows.reset_index()
        each = {name: result.mean for name, result in seed_means(rows, names).items()}
        if sum(not math.isnan(mean) for mean in each.values()) < 2:
            continue  # only the full set was scored
        worst = worst_of(each, key=each.__getitem__) if not any(map(math.isnan, each.values())) else None
        of_worst = seed_mean(rows, worst) if worst is not None else None
        cases = len(of_arm.dropna(how="all").reset_index()[["split", "case"]].drop_duplicates())
        table.append({"arm": arm, "cases": cases, **_means(rows, groups)})
        table[-1] |= {"worst": of_worst.mean, "worst_sd": of_worst.sd} if of_worst else {}
        table[-1] |= {"worst_subset": worst, **each}
    return pd.DataFrame(table, columns=["arm", "cases", *columns, "worst", "worst_sd", "worst_subset", *names])


def _by_score(
    by_subset: pd.DataFrame, complete: pd.DataFrame, groups: Mapping[str, Sequence[str]], subsets: pd.DataFrame
) -> pd.DataFrame:
    """The scores that arms are compared by, a row a case of a cell and a column a score (:data:`SCORES`)."""
    worst = dict(zip(subsets["arm"], subsets["worst_subset"], strict=True))
    names = list(by_subset.columns)
    by_score = pd.DataFrame(math.nan, index=by_subset.index, columns=list(SCORES))
    if not names:
        return by_score
    by_score["full"] = by_subset[names[0]]
    for score in ("subsets", "without_key"):
        if score in groups:
            by_score[score] = complete[list(groups[score])].mean(axis=1, skipna=False)
    for arm, subset in worst.items():
        if isinstance(subset, str):
            rows = by_score.index.get_level_values("arm") == arm
            by_score.loc[rows, "worst"] = complete.loc[rows, subset]
    return by_score


def _pairs(study: Mapping[str, Any], arms: Iterable[str]) -> list[tuple[str, str, str]]:
    """Arm, what it is compared with, and as what: each with the reference, and with its controls."""
    reference = str(study["reference"])
    pairs = []
    for arm in arms:
        roles: dict[str, list[str]] = {reference: ["reference"]}
        for role, control in controls_of(study, arm).items():
            roles.setdefault(control, []).append(role)
        pairs += [(arm, against, "+".join(of_against)) for against, of_against in roles.items() if against != arm]
    return pairs


def _differences(by_score: pd.DataFrame, pairs: Iterable[tuple[str, str, str]], measure: Measure) -> pd.DataFrame:
    there = set(by_score.index.get_level_values("arm"))
    table = []
    for arm, against, role in pairs:
        if arm not in there or against not in there:
            continue
        one, other = by_score.loc[arm], by_score.loc[against]
        cells_of_one, cells_of_other = (set(part.index.droplevel("case")) for part in (one, other))
        shared, either = cells_of_one & cells_of_other, cells_of_one | cells_of_other
        for score in SCORES:
            gain = measure.gain_factor * (one[score] - other[score])
            rows = gain.dropna().rename("difference").reset_index()
            if rows.empty:
                continue
            interval = paired_bootstrap(rows)
            table.append({"arm": arm, "against": against, "role": role, "score": score, "p": paired_p(rows)})
            table[-1] |= _as_row(interval)
            table[-1] |= {"cells": len(shared), "cells_left_out": len(either) - len(shared)}
    return pd.DataFrame(table, columns=list(_DIFFERENCES))


def _as_row(interval: Interval) -> dict[str, Any]:
    return {
        "difference": interval.mean,
        "low": interval.low,
        "high": interval.high,
        "cases": interval.cases,
        "seeds": interval.seeds,
        "most_seeds": interval.most_seeds,
        "seeds_resampled": interval.seeds_resampled,
        "splits_resampled": interval.splits_resampled,
    }


def _costs(facts: pd.DataFrame, arms: Sequence[str]) -> pd.DataFrame:
    done = facts[facts["status"] == "done"]
    numbers = done[["arm", *_COSTS]].astype(dict.fromkeys(_COSTS, float))
    table = numbers.groupby("arm")[list(_COSTS)].mean()
    table.insert(0, "cells", numbers.groupby("arm").size())
    return table.reindex([arm for arm in arms if arm in table.index]).rename_axis("arm").reset_index()
