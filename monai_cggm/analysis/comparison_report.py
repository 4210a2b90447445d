# SPDX-License-Identifier: Apache-2.0
"""Report of a comparison: one HTML page, the same in Markdown, and its tables as CSV."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from monai_cggm.analysis.cells import ALONE, ENSEMBLE, FUSION, CellKey, read_cells
from monai_cggm.analysis.comparison import (
    Comparison,
    arm_title,
    compare,
    controls_of,
    interval_text,
    outcome,
    points,
    score_labels,
    score_of,
    subset_groups,
    subsets_of,
    verdicts,
)
from monai_cggm.analysis.comparison_figures import MOST_SUBSETS, difference_plot, subset_heat_map
from monai_cggm.analysis.measures import Measure, difference_scale, is_dice, measure_of, scales, score_title
from monai_cggm.analysis.pages import DASH, Picture, Section, Table, markdown, one_line, page, without_folders
from monai_cggm.files import atomic_path

#: What the conventions for empty regions mean, in the words of ``monai_cggm.metrics.EMPTY_CONVENTIONS`` (which a test
#: holds them to): reading that needs PyTorch, which takes seconds to load.
CONVENTION_NOTES: Mapping[str, str] = {
    "brats_legacy": "both empty: Dice 1, HD95 0 mm; one empty: Dice 0, HD95 373 mm",
    "brats_legacy_et500": (
        "predicted ET below 500 mm³ counts as none; both empty: Dice 1, HD95 0 mm; one empty: 0, 373 mm"
    ),
    "brats2023_lesionwise": (
        "mean over lesions above 50 mm³; none: Dice 1, HD95 0 mm; missed or false: Dice 0, HD95 374 mm"
    ),
    "monai": "a region that the truth lacks is left out, false positives with it",
}

_BUDGET = ("epochs", "iterations")
_MANY = 12  # names listed before a count takes over


def write_report(folder: Path, study: Mapping[str, Any]) -> Path:
    """Write ``report.html``, ``report.md``, ``tables/*.csv`` and ``figures/*.svg`` of a comparison into its folder.

    The page stands alone: style and figures are inside it, and it loads nothing. The same cells give the same bytes. It
    can be written at any time: cells that failed or are outstanding are named.

    Args:
        folder: the comparison's folder, which holds ``cells/<arm>/<split>-seed<seed>/``.
        study: the study as resolved; see :func:`monai_cggm.analysis.compare`. ``title`` and an arm's ``title`` are what
            readers see.

    Returns:
        Path of the page.

    Raises:
        DataError: where a cell's files or the study do not fit.

    Example:
        >>> import tempfile
        >>> study = {"title": "Nothing yet", "reference": "joint", "splits": ["brats.json"], "seeds": [0],
        ...          "arms": {"joint": {}}}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Path(folder, "cells").mkdir()
        ...     write_report(Path(folder), study).name, "Nothing yet" in Path(folder, "report.md").read_text()
        ('report.html', True)
    """
    folder = Path(folder)
    comparison = compare(read_cells(folder, score=score_of(study)), study)
    for name, frame in _csv_tables(comparison).items():
        with atomic_path(folder / "tables" / f"{name}.csv") as path:
            frame.to_csv(path, index=False, float_format="%.6f", lineterminator="\n")
    title = one_line(study.get("title") or "Comparison of training methods")
    sections = _sections(comparison, study)
    for picture in (block for section in sections for block in section.blocks if isinstance(block, Picture)):
        with atomic_path(folder / "figures" / f"{picture.name}.svg") as path:
            path.write_bytes(picture.svg)
    for name, text in (("report.md", markdown(title, sections)), ("report.html", page(title, sections))):
        with atomic_path(folder / name) as path:
            path.write_text(text, encoding="utf-8", newline="\n")
    return folder / "report.html"


def _csv_tables(comparison: Comparison) -> dict[str, pd.DataFrame]:
    facts = comparison.cells.facts
    columns = ["arm", "split", "seed", "status", "error", "epochs", "iterations", "validations", "best_epoch"]
    cells = facts[columns].assign(error=[without_folders(error) if error else None for error in facts["error"]])
    return {
        "full_set": comparison.full_set,
        "subsets": comparison.subsets,
        "differences": comparison.differences,
        "classifiers": comparison.classifiers,
        "alone": comparison.alone,
        "costs": comparison.costs,
        "cells": cells,
    }


def _sections(comparison: Comparison, study: Mapping[str, Any]) -> list[Section]:
    made = [
        _verdict_section(comparison, study),
        _run_section(comparison, study),
        _full_set_section(comparison, study),
        _subsets_section(comparison, study),
        _differences_section(comparison, study),
        _classifiers_section(comparison, study),
        _alone_section(comparison, study),
        _costs_section(comparison, study),
        _reading_section(comparison, study),
        Section(
            "Research use only",
            [
                "These numbers describe research software on research data. It is not a medical device, and nothing "
                "here may guide the care of a patient."
            ],
        ),
    ]
    return [section for section in made if section is not None]


def _verdict_section(comparison: Comparison, study: Mapping[str, Any]) -> Section:
    missing = len(comparison.outstanding) + len(comparison.cells.failed)
    total = missing + len(comparison.cells.done)
    notes = [f"Preliminary: {missing} of {total} cells are missing."] if missing else []
    uneven = _uneven_budget(_trained(comparison))
    if uneven:
        notes.append(f"The arms did NOT have the same budget, so what follows compares no methods: {uneven}.")
    return Section("Verdicts", notes, verdicts(study, comparison.differences))


def _run_section(comparison: Comparison, study: Mapping[str, Any]) -> Section:
    cells = comparison.cells
    keys = {"done": cells.done, "failed": list(cells.failed), "outstanding": comparison.outstanding}
    rows = []
    for arm in comparison.arms:
        spec = study["arms"].get(arm) or {}
        overlays = ", ".join(map(without_folders, spec.get("overlays") or [])) or DASH
        controls = ", ".join(f"{role}: {control}" for role, control in controls_of(study, arm).items()) or DASH
        counts = (str(sum(key.arm == arm for key in group)) for group in keys.values())
        rows.append([arm, arm_title(study, arm), overlays, controls, _settings(spec.get("settings")), *counts])
    header = ["name", "arm", "overlays", "controls", "own settings", *(f"cells {state}" for state in keys)]
    blocks = [Table("The arms. A cell is one arm, trained on one split with one seed.", header, rows)]
    if cells.failed:
        failures = [[key.arm, key.split, str(key.seed), without_folders(error)] for key, error in cells.failed.items()]
        blocks.append(Table("Failed cells; no table counts them.", ["arm", "split", "seed", "error"], failures))
    return Section("What was run", [], _run_bullets(comparison, study), blocks)


def _run_bullets(comparison: Comparison, study: Mapping[str, Any]) -> list[str]:
    cells = comparison.cells
    facts = cells.facts[cells.facts["status"] == "done"]
    trained = _trained(comparison)
    selected = not _nothing_selected(trained)
    dice = is_dice(score_of(study))
    bullets = [
        f"Cells: {len(cells.done)} done, {len(cells.failed)} failed, {len(comparison.outstanding)} outstanding.",
        _budget(trained, study),
        f"Settings of every arm: {_settings(study.get('settings'))}.",
        f"Scored on the {_part(study)} cases{', whole volumes' if dice else ''}."
        + _validation_note(study, selected=selected),
        *([_empty_regions(study, facts)] if dice else []),
        f"Seeds: {', '.join(str(seed) for seed in study['seeds'])}. Splits: {', '.join(comparison.splits) or DASH}.",
        _selection(trained, selected=selected),
    ]
    if comparison.modalities:
        bullets.append(f"Modalities: {', '.join(comparison.modalities)}.")
    if comparison.outstanding:
        bullets.append(f"Outstanding: {_names(comparison.outstanding)}.")
    if comparison.outside:
        bullets.append(f"There, but not of this study, and not counted: {_names(comparison.outside)}.")
    return bullets


def _empty_regions(study: Mapping[str, Any], facts: pd.DataFrame) -> str:
    convention = str(study.get("convention") or next(iter(facts["convention"]), "not known yet"))
    note = CONVENTION_NOTES.get(convention)
    return f"Empty regions: {convention}" + (f" ({note})." if note else ".")


def _full_set_section(comparison: Comparison, study: Mapping[str, Any]) -> Section:
    title = "All modalities given"
    if comparison.full_set.empty:
        return Section(title, ["No arm has a finished cell yet."])
    table = comparison.full_set
    caption = (
        f"Scores on the {_part(study)} cases from all modalities: mean ± sample standard deviation over seeds (a dash "
        f"with one seed, and where a cell lacks the score). {scales(_scores_in(table))}{_penalty_note(table)}"
    )
    return Section(title, blocks=[_score_rows(table, study, caption)])


def _subsets_section(comparison: Comparison, study: Mapping[str, Any]) -> Section:
    title = "Modalities missing"
    subsets = comparison.subsets
    if subsets.empty:
        fused = comparison.cells.scores[~comparison.cells.scores["arm"].str.startswith(ALONE)]
        scored = fused.loc[fused["predictor"] == FUSION, "subset"].nunique() > 1
        none = "No case has every modality: subsets are not compared, for each would have cases of its own."
        return Section(title, [none if scored else "No subset of the modalities was scored."])
    labels = _group_labels(comparison.modalities, study.get("key_modality"))
    rows = [
        [
            arm_title(study, row["arm"]),
            *(_mean_sd(row[name], row[f"{name}_sd"], 3) for name in labels),
            _mean_sd(row["worst"], row["worst_sd"], 3),
            _text(row["worst_subset"]),
        ]
        for row in subsets.to_dict("records")
    ]
    score = score_of(study)
    caption = (
        f"Mean {score_title(score)} {measure_of(score).bounds} on the {_part(study)} cases over groups of subsets: "
        "mean ± sample standard deviation over seeds. The modalities outside of a subset count as missing."
        f"{_incomplete(comparison, study)}"
    )
    tables = [Table(caption, ["arm", *labels.values(), "worst subset", "which"], rows)]
    if len(subsets_of(comparison.modalities)) > MOST_SUBSETS:
        tables.append(_single_table(comparison, study))
    return Section(title, blocks=[*tables, subset_heat_map(comparison, study)])


def _incomplete(comparison: Comparison, study: Mapping[str, Any]) -> str:
    """A sentence on the cases that lack a modality; "" where there are none."""
    rows = comparison.cells.scores
    rows = rows[(rows["predictor"] == FUSION) & (rows["part"] == _part(study)) & rows[score_of(study)].notna()]
    of_all = rows.drop_duplicates(["arm", "split", "case"]).groupby("arm").size()
    pairs = zip(comparison.subsets["arm"], comparison.subsets["cases"], strict=True)
    counts = {(cases, int(of_all[arm])) for arm, cases in pairs if cases < of_all[arm]}
    if not counts:
        return ""
    shown = ", ".join(f"{cases} of {total}" for cases, total in sorted(counts))
    return f" Only cases with every modality count here, {shown}; the full set is scored on all of them elsewhere."


def _single_table(comparison: Comparison, study: Mapping[str, Any]) -> Table:
    """Stands for the numbers of the subsets where there are too many of them to be shown."""
    rows = [
        [arm_title(study, row["arm"]), *(_number(row[modality], 3) for modality in comparison.modalities)]
        for row in comparison.subsets.to_dict("records")
    ]
    caption = f"Mean {score_title(score_of(study))} where one modality is given. All subsets are in tables/subsets.csv."
    return Table(caption, ["arm", *comparison.modalities], rows)


def _group_labels(modalities: Sequence[str], key: str | None) -> dict[str, str]:
    numbers = {1: "one", 2: "two", 3: "three", 4: "four", 5: "five"}
    labels = {"subsets": "all subsets"}
    for group in subset_groups(modalities, key):
        if group.startswith("missing_"):
            missing = int(group.removeprefix("missing_"))
            single = " (single)" if missing == len(modalities) - 1 else ""
            labels[group] = f"{numbers.get(missing, str(missing))} missing{single}"
        elif group != "subsets":
            labels[group] = f"{group.removesuffix('_key')} {key}"
    return labels


def _differences_section(comparison: Comparison, study: Mapping[str, Any]) -> Section:
    title = "Differences between arms"
    differences = comparison.differences
    if differences.empty:
        return Section(title, ["No two arms that are compared share a finished cell yet."])
    measure = measure_of(score_of(study))
    notes = [
        f"Paired differences of {difference_scale(score_of(study))}. Only cells, that is splits and seeds, that both "
        "arms have count. The outcome follows the interval. p is that of Wilcoxon's signed-rank test over cases "
        "(a dash with fewer than six that differ); it is not corrected for the number of comparisons, and it takes the "
        "trained networks as given, so that it can be small where an interval that resamples seeds spans zero.",
    ]
    if differences["splits_resampled"].any():
        notes.append("Where one of several splits has one seed in common, whole splits are resampled.")
    if not (differences["seeds_resampled"] | differences["splits_resampled"]).all():
        notes.append("Where the only split has one seed in common, the interval leaves the chance of training out.")
    tables = [
        _differences_table(differences[differences["score"] == score], f"Difference on: {label}.", measure)
        for score, label in score_labels(study).items()
        if (differences["score"] == score).any()
    ]
    return Section(title, notes, blocks=[difference_plot(comparison, study), *tables])


def _differences_table(differences: pd.DataFrame, caption: str, measure: Measure) -> Table:
    digits = measure.gain_digits + 1
    rows = [
        [
            row["arm"],
            row["against"],
            row["role"],
            points(row["difference"], sign=True, digits=digits),
            _interval(row["low"], row["high"], digits),
            outcome(row["low"], row["high"]).replace("unknown", DASH),
            _p(row["p"]),
            *(str(row[count]) for count in ("cases", "seeds", "cells", "cells_left_out")),
        ]
        for row in differences.to_dict("records")
    ]
    header = ["arm", "against", "role", measure.gain, "95 % interval", "outcome", "p"]
    return Table(caption, [*header, "cases", "seeds", "cells", "cells left out"], rows)


def _classifiers_section(comparison: Comparison, study: Mapping[str, Any]) -> Section | None:
    if comparison.classifiers.empty:
        return None
    caption = (
        f"Scores of the small classifier of each modality on the {_part(study)} cases, for the arms that have them: "
        f"mean ± sample standard deviation over seeds. {scales(_scores_in(comparison.classifiers))}"
    )
    return Section("Each modality's classifier", blocks=[_score_rows(comparison.classifiers, study, caption)])


def _alone_section(comparison: Comparison, study: Mapping[str, Any]) -> Section | None:
    if comparison.alone.empty:
        return None
    caption = (
        "Networks that saw one modality only, with the same budget, and the ensemble that averages their "
        f"probabilities: mean ± sample standard deviation over seeds. {scales(_scores_in(comparison.alone))} A network "
        "of all modalities that does not beat the ensemble has shown no gain from seeing them together."
        f"{_fewer(comparison)}"
    )
    return Section("Each modality alone", blocks=[_score_rows(comparison.alone, study, caption)])


def _fewer(comparison: Comparison) -> str:
    """A sentence on the networks of one modality that some cases lack; "" where there are none."""
    scores = comparison.cells.scores
    scores = scores[scores["predictor"] == FUSION]
    of_split = scores.groupby("split")["case"].nunique()
    few = []
    for arm, rows in scores[scores["arm"].str.startswith(ALONE)].groupby("arm"):
        found = rows.groupby("split")["case"].nunique()
        expected = int(of_split[found.index].sum())
        if found.sum() < expected:
            few.append(f"{arm} {found.sum()} of {expected}")
    return f" Cases that lack the modality are left out, of training too; scored are {', '.join(few)}." if few else ""


def _costs_section(comparison: Comparison, study: Mapping[str, Any]) -> Section | None:
    costs = comparison.costs
    if costs.empty:
        return None
    rows = [
        [
            arm_title(study, row["arm"]),
            str(row["cells"]),
            _number(row["iterations"], 0),
            _number(row["training_seconds"], 0),
            _number(row["peak_memory_mb"], 0),
            _number(row["parameters"], 0),
            _number(row["classifier_parameters"], 0),
        ]
        for row in costs.to_dict("records")
    ]
    header = ["arm", "cells", "iterations", "training (s)", "peak memory (MB)", "parameters", "of the classifiers"]
    facts = comparison.cells.facts[comparison.cells.facts["status"] == "done"]
    found = {(name, version) for each in facts["versions"] if isinstance(each, dict) for name, version in each.items()}
    versions = [f"{name} {version}" for name, version in sorted(found, key=str) if version]
    caption = (
        f"Means over cells. Devices: {_range(facts['device'])}; threads: {_range(facts['threads'])}; "
        f"software: {', '.join(versions) or DASH}. Times of cells that shared a machine with other work are too long."
    )
    return Section("Costs", blocks=[Table(caption, header, rows)])


def _reading_section(comparison: Comparison, study: Mapping[str, Any]) -> Section:
    bullets = [
        "Means: over the cases of a split and seed first, then over seeds and splits, each split counting alike. The "
        "standard deviation is that of the seeds' means, so it shows the chance of training, not the spread of cases.",
        "Intervals: 95 % intervals of 10,000 bootstrap draws, in which the cases of each split and, independently, its "
        "seeds are drawn with replacement (Owen 2007, the pigeonhole bootstrap), widened for few cases and few seeds "
        "by the quantiles of Student's t. With two seeds they are wide: two trainings say little about chance. They "
        "speak of these splits, not of other hospitals. Where one of several splits has one seed, whole splits are "
        "drawn instead, or their cases where that interval is wider; folds share training cases, so that it may still "
        "be too narrow.",
        "Outcomes: better or worse where the interval lies on one side of zero. No difference shown does not mean that "
        "there is none.",
        "Worst subset: each arm's own, the one with its worst mean; differences subtract each arm's worst.",
        "Controls: they take away what balancing claims, and keep the rest. Constant: every encoder's gradient × the "
        "mean of B. Shuffled: the same B, given to another modality. Uniform: the same losses with equal weights. An "
        "arm that does not beat all three may gain by the size of the steps, by noise or by the extra losses instead; "
        "so that balancing helps is said only of an arm that does. Arms may name further controls, by other roles.",
    ]
    return Section("How to read this", [], bullets)


def _score_rows(table: pd.DataFrame, study: Mapping[str, Any], caption: str) -> Table:
    scores = _scores_in(table)
    counts = ["splits", "seeds", "cases"]
    names = [column for column in ("modality",) if column in table]
    penalties = ["HD95 penalties"] if "penalties" in table else []
    header = ["arm", *names, *(measure_of(score).label for score in scores), *penalties, *counts]
    rows = [
        [
            arm_title(study, row["arm"]),
            *(_text(row[name]) for name in names),
            *(_mean_sd(row[s], row[f"{s}_sd"], measure_of(s).digits) for s in scores),
            *(f"{row['penalties']} of {row['distances']}" for _ in penalties),
            *(str(row[count]) for count in counts),
        ]
        for row in table.to_dict("records")
    ]
    return Table(caption, header, rows)


def _penalty_note(table: pd.DataFrame) -> str:
    if "penalties" not in table:
        return ""
    return " HD95 penalties: values that are no distance but stand for a region that is empty on one side only."


def _scores_in(table: pd.DataFrame) -> list[str]:
    """The scores of a table, each of which has its spread in a column beside it."""
    return [column for column in table if f"{column}_sd" in table]


def _part(study: Mapping[str, Any]) -> str:
    return one_line(study.get("part", "test"))


def _text(value: object) -> str:
    return one_line(value) if isinstance(value, str) and value else DASH


def _number(value: float, digits: int) -> str:
    return DASH if math.isnan(value) else f"{value:,.{digits}f}"


def _mean_sd(mean: float, sd: float, digits: int) -> str:
    return DASH if math.isnan(mean) else f"{mean:.{digits}f} ± {_number(sd, digits)}"


def _interval(low: float, high: float, digits: int) -> str:
    return DASH if math.isnan(low) else interval_text(low, high, digits)


def _p(value: float) -> str:
    if math.isnan(value):
        return DASH
    return f"{value:.3f}" if value >= 0.001 else "< 0.001"


def _settings(settings: Mapping[str, Any] | None) -> str:
    if not settings:
        return DASH
    return ", ".join(
        f"{key} {without_folders(v if isinstance(v, str) else json.dumps(v))}" for key, v in settings.items()
    )


def _trained(comparison: Comparison) -> pd.DataFrame:
    """The facts of the finished cells that were trained, which an ensemble is not."""
    facts = comparison.cells.facts
    return facts[(facts["status"] == "done") & (facts["arm"] != ENSEMBLE)]


def _budget(trained: pd.DataFrame, study: Mapping[str, Any]) -> str:
    uneven = _uneven_budget(trained)
    if uneven:
        return f"Budget: NOT the same for every arm: {uneven}."
    amounts = {name: _range(trained[name]) for name in _BUDGET}
    if amounts["epochs"] == DASH:
        amounts["epochs"] = one_line((study.get("settings") or {}).get("epochs", DASH))
    known = [f"{amount} {name}" for name, amount in amounts.items() if amount != DASH]
    return f"Budget: {', '.join(known)}, the same for every arm." if known else "Budget: not known yet."


def _uneven_budget(trained: pd.DataFrame) -> str:
    """What differs between cells of the same split, by arm; splits of other sizes have other numbers of iterations.

    Networks of one modality are left out for iterations: an epoch has fewer where cases lack the modality.
    """
    texts = []
    for name in _BUDGET:
        known = trained[trained[name].notna()]
        if name == "iterations":
            known = known[~known["arm"].str.startswith(ALONE)]
        if (known.groupby("split")[name].nunique() > 1).any():
            each = (f"{arm} {_range(rows[name])}" for arm, rows in known.groupby("arm", sort=False))
            texts.append(f"{name}: {'; '.join(each)}")
    return "; ".join(texts)


def _nothing_selected(trained: pd.DataFrame) -> bool:
    """Whether every cell is known to have validated once, after its last epoch."""
    earlier = trained["best_epoch"].notna() & trained["epochs"].notna() & (trained["best_epoch"] != trained["epochs"])
    return bool(len(trained)) and bool((trained["validations"] == 1).all()) and not earlier.any()


def _selection(trained: pd.DataFrame, *, selected: bool) -> str:
    if not selected:
        return "The last epoch's weights are kept: nothing was selected on the way."
    epochs = f" Selected epochs: {_range(trained['best_epoch'])}." if trained["best_epoch"].notna().any() else ""
    return f"Models are selected on validation cases; test cases choose nothing.{epochs}"


def _validation_note(study: Mapping[str, Any], *, selected: bool) -> str:
    if _part(study) != "validation":
        return ""
    optimistic = " Models are selected on them too, so the scores are optimistic." if selected else ""
    return f"{optimistic} Scores on validation cases are for choosing between arms."


def _range(values: Iterable[Any]) -> str:
    """The different values, numbers as a range."""
    known = sorted({value for value in values if not pd.isna(value)})
    if known and all(isinstance(value, (int, float, np.number)) for value in known):
        return f"{known[0]:g}" if len(known) == 1 else f"{known[0]:g} to {known[-1]:g}"
    return ", ".join(one_line(value) for value in known) or DASH


def _names(keys: Sequence[CellKey]) -> str:
    more = f"; and {len(keys) - _MANY} more" if len(keys) > _MANY else ""
    return "; ".join(str(key) for key in keys[:_MANY]) + more
