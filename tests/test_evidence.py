# SPDX-License-Identifier: Apache-2.0
"""The numbers that the page of evidence shows are those of the committed tables."""

import json
import re
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).parents[1]
#: rows of the table of the cross-validation, in its order
ARMS = (
    "joint", "dropout", "recipe", "balance", "balance_shuffled", "ensemble", "joint_unclipped", "cggm_paper",
    "cggm_clipped", "segresnet",
)  # fmt: skip
#: rows of the table of differences
PAIRS = (
    ("recipe", "joint"), ("dropout", "joint"), ("recipe", "dropout"), ("recipe", "ensemble"), ("balance", "recipe"),
    ("balance", "balance_shuffled"), ("cggm_clipped", "joint"), ("cggm_paper", "joint_unclipped"),
)  # fmt: skip


#: folder of a cross-validation -> its section of the page
SECTIONS = {
    "brats_2mm": "BraTS at 2 mm",
    "confirm_brats_2mm": "BraTS at 2 mm, a second seed",
    "phantom": "phantoms with strong imbalance",
}
ONE_SEED = ("brats_2mm", "phantom")


def section(study: str) -> str:
    page = (ROOT / "docs/evidence.md").read_text(encoding="utf-8")
    return page.split(f"\n## Cross-validation: {SECTIONS[study]}\n")[1].split("\n## ")[0]


def rows_of(text: str, header: str) -> list[list[str]]:
    lines = text[text.index(header) :].splitlines()
    table = lines[2 : next(i for i, line in enumerate(lines) if not line.startswith("|"))]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


def numbers_in(cell: str) -> list[float]:
    """Of a difference with its interval."""
    return [float(part) for part in cell.replace("−", "-").replace("[", "").strip("]").replace(",", "").split()]


def table(study: str, name: str) -> pd.DataFrame:
    return pd.read_csv(ROOT / "docs/evidence" / study / "tables" / f"{name}.csv")


@pytest.mark.parametrize("study", ONE_SEED)
def test_scores_are_those_of_the_tables(study: str) -> None:
    found = rows_of(section(study), "| arm | full set |")
    subsets = table(study, "subsets").set_index("arm")
    columns = ["flair+t1ce+t1+t2", "subsets", "missing_1", "missing_3", "with_key", "without_key"]
    assert len(found) == len(ARMS)
    for row, arm in zip(found, ARMS, strict=True):
        assert row[1:] == [f"{value:.3f}" for value in subsets.loc[arm, columns]], arm


@pytest.mark.parametrize("study", ONE_SEED)
def test_differences_are_those_of_the_tables(study: str) -> None:
    found = rows_of(section(study), "| difference | all subsets |")
    differences = table(study, "differences").set_index(["arm", "against", "score"])
    assert len(found) == len(PAIRS)
    for row, pair in zip(found, PAIRS, strict=True):
        for cell, score in zip(row[1:], ("subsets", "full"), strict=True):
            numbers = differences.loc[(*pair, score), ["difference", "low", "high"]]
            assert numbers_in(cell) == pytest.approx(list(numbers), abs=0.0501), (pair, score)


def test_the_readme_shows_the_same() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    found = rows_of(readme, "| training | all subsets |")
    subsets = table("confirm_brats_2mm", "subsets").set_index("arm")
    for row, arm in zip(found, ("joint", "dropout", "recipe", "balance"), strict=True):
        expected = subsets.loc[arm, ["subsets", "without_key", "flair+t1ce+t1+t2"]]
        assert row[1:] == [f"{value:.3f}" for value in expected], arm
    differences = table("confirm_brats_2mm", "differences").set_index(["arm", "against", "score"]).sort_index()
    default, balance = (differences.loc[(*pair, "subsets")] for pair in (("recipe", "joint"), ("balance", "recipe")))
    text = " ".join(readme.split())
    gain, low, high = (f"{default[name]:.0f}" for name in ("difference", "low", "high"))
    assert f"{gain} points [95 % interval {low}, {high}] above joint training" in text
    low, high = (f"{balance[name]:.1f}".replace("-", "−") for name in ("low", "high"))
    assert f"a point [{low}, {high}] above the same losses" in text


def test_two_seeds_on_brats_are_those_of_the_tables() -> None:
    text = section("confirm_brats_2mm")
    full, subsets = (table("confirm_brats_2mm", name).set_index("arm") for name in ("full_set", "subsets"))
    columns = ["subsets", "missing_1", "missing_3", "with_key", "without_key"]
    for row, arm in zip(rows_of(text, "| arm | full set |"), ARMS[:5], strict=True):
        shown = [f"{full.loc[arm, 'dice_mean']:.3f} ± {full.loc[arm, 'dice_mean_sd']:.3f}"]
        shown += [f"{subsets.loc[arm, c]:.3f} ± {subsets.loc[arm, f'{c}_sd']:.3f}" for c in columns]
        assert row[1:] == shown, arm
    pairs = [pair for pair in PAIRS if pair[0] in ARMS[:5] and pair[1] in ARMS[:5]]
    found = rows_of(text, "| difference | all subsets |")
    differences = table("confirm_brats_2mm", "differences").set_index(["arm", "against", "score"]).sort_index()
    for row, pair in zip(found, pairs, strict=True):
        for cell, score in zip(row[1:], ("subsets", "full", "without_key", "worst"), strict=True):
            numbers = differences.loc[(*pair, score), ["difference", "low", "high"]]
            assert numbers_in(cell) == pytest.approx(list(numbers), abs=0.0501), (pair, score)


def test_what_is_said_of_balance_terms_is_in_their_table() -> None:
    terms = pd.read_csv(ROOT / "docs/evidence/inside/figure_7.csv").pivot(
        index="iteration", columns="series", values="mean"
    )
    page = " ".join((ROOT / "docs/evidence.md").read_text(encoding="utf-8").split())
    low, high = (f"{round(value, -1):.0f}".replace("-", "−") for value in (terms.min().min(), terms.max().max()))
    assert f"B went from {low} to {high} here, and in {(terms.abs() > 10).any(axis=1).sum()} of {len(terms)}" in page
    progress = pd.read_csv(ROOT / "docs/evidence/inside/figure_3.csv").query(
        "panel == 'ε on training batches' and series == 't1'"
    )
    seen = progress[progress["mean"] > 5e-5].groupby("kind")["epoch"].max()
    assert set(seen) == {5}  # "from the sixth epoch on"


@pytest.mark.parametrize(
    ("pair", "score"),
    [
        (("balance", "recipe"), "without_key"),
        (("balance", "balance_shuffled"), "without_key"),
        (("cggm_clipped", "joint"), "without_key"),
    ],
)
def test_differences_in_the_text_are_those_of_the_tables(pair: tuple[str, str], score: str) -> None:
    row = table("phantom", "differences").set_index(["arm", "against", "score"]).loc[(*pair, score)]
    numbers = [f"{row[name]:.1f}".replace("-", "−") for name in ("difference", "low", "high")]
    shown = f"{'+' if row['difference'] > 0 else ''}{numbers[0]} [{numbers[1]}, {numbers[2]}]"
    assert shown in " ".join(section("phantom").split())


#: arms in the order of a table of the page of results -> how their rows begin
METHODS = {
    "joint": "joint training", "mrd": "MRD", "mslr": "MSLR", "g_blending": "G-Blending", "greedy": "Greedy",
    "ogm_ge": "OGM-GE", "agm": "AGM", "pmr": "PMR", "umt": "UMT", "ume": "UME", "qmf": "QMF",
    "reconboost": "ReconBoost", "cggm": "CGGM, as in the paper", "cggm_bounded": "CGGM, rule `positive`",
    "recipe": "the default", "ensemble": "ensemble",
}  # fmt: skip
MOSI = {
    "joint": "joint training", "dropout": "+ modality dropout", "recipe": "+ light auxiliary losses",
    "cggm": "CGGM, as in the paper", "cggm_constant": "the same, the mean", "cggm_shuffled": "the same, another",
    "cggm_bounded": "CGGM, rule `positive`", "cggm_update": "CGGM, rule `positive`, on",
    "cggm_update_constant": "the same, the mean", "cggm_update_shuffled": "the same, another", "ensemble": "each ",
}  # fmt: skip
#: study -> the heading of its section, its score, the arms, columns of subsets
RESULTS = {
    "methods_brats_2mm": (
        "Methods of the literature, 33 cases", "dice_mean", METHODS, ["missing_1", "missing_3", "without_key"],
    ),
    "methods_digits": ("Methods of the literature, handwritten", "accuracy", METHODS, ["missing_1", "missing_5"]),
    "digits": ("Balance on handwritten digits", "accuracy", MOSI, ["missing_1", "missing_5"]),
    "mosi": ("CMU-MOSI, utterance level", "accuracy", MOSI, ["missing_1", "missing_2", "without_key"]),
}  # fmt: skip


def results(heading: str) -> str:
    page = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    return page.split(f"\n## {heading}")[1].split("\n## ")[0]


@pytest.mark.parametrize("study", RESULTS)
def test_intervals_in_the_results_are_those_of_the_tables(study: str) -> None:
    shown = re.findall(r"\[(−?[\d.]+),\s+(−?[\d.]+)\]", results(RESULTS[study][0]))
    assert shown
    intervals = table(study, "differences")[["low", "high"]].to_numpy()
    for low, high in shown:
        ends = [float(end.replace("−", "-")) for end in (low, high)]
        half = [0.5001 * 10.0 ** -len(end.partition(".")[2]) for end in (low, high)]
        assert (abs(intervals - ends) <= half).all(axis=1).any(), (low, high)


@pytest.mark.parametrize("study", RESULTS)
def test_results_are_those_of_the_tables(study: str) -> None:
    heading, score, arms, columns = RESULTS[study]
    page = results(heading)
    shown = rows_of(page, "| method |" if "| method |" in page else "| training |")
    if shown[0][0].startswith('"positive"'):  # no arm, and nothing that was trained
        shown = shown[1:]
    full, alone, subsets = (table(study, name).set_index("arm") for name in ("full_set", "alone", "subsets"))
    scores = pd.concat([full, alone])
    for row, (arm, label) in zip(shown, arms.items(), strict=False):
        assert row[0].startswith(label), arm
        expected = [
            f"{frame.loc[arm, of]:.3f} ± {frame.loc[arm, f'{of}_sd']:.3f}"
            for frame, of in ((scores, score), (subsets, "subsets"))
        ]
        assert row[1:] == expected + [f"{value:.3f}" for value in subsets.loc[arm, columns]], arm
    single = [arm for arm in alone.index if arm.startswith("alone_")]
    for row, arm in zip(shown[len(arms) :], single, strict=False):
        assert row[0].strip("`").lower().startswith(arm.removeprefix("alone_")), arm
        assert row[1] == f"{alone.loc[arm, score]:.3f} ± {alone.loc[arm, f'{score}_sd']:.3f}", arm
    assert len(shown) >= len(arms) + len(single)


#: what stands before a difference from joint training in the text of a section -> study, arm and score
SAID = {
    "clear of zero: ": ("methods_brats_2mm", "recipe", "subsets"),
    "UME is, too (": ("methods_brats_2mm", "ume", "without_key"),
    "[3.3, 24.2]; the default ": ("methods_brats_2mm", "recipe", "without_key"),
    "worst subset UME (": ("methods_brats_2mm", "ume", "worst"),
    "and the ensemble (": ("methods_brats_2mm", "ensemble", "worst"),
    "not shown to be (": ("methods_brats_2mm", "recipe", "worst"),
    "below joint training on the full set (": ("methods_brats_2mm", "ume", "full"),
    "[−60.8, −8.3] and ": ("methods_brats_2mm", "ensemble", "full"),
    "all subsets UME (": ("methods_digits", "ume", "subsets"),
    "QMF (": ("methods_digits", "qmf", "subsets"),
    "MRD (": ("methods_digits", "mrd", "subsets"),
    "the default (": ("methods_digits", "recipe", "subsets"),
    "PMR (": ("methods_digits", "pmr", "subsets"),
    "highest number (": ("methods_digits", "ensemble", "subsets"),
    "Dropout (": ("digits", "dropout", "subsets"),
    "and the default (": ("digits", "recipe", "subsets"),
    "above both (": ("digits", "ensemble", "subsets"),
}


@pytest.mark.parametrize("before", SAID)
def test_differences_in_the_results_are_those_of_the_tables(before: str) -> None:
    study, arm, score = SAID[before]
    row = table(study, "differences").set_index(["arm", "against", "score"]).loc[(arm, "joint", score)]
    sign = "+" if row["difference"] > 0 else ""
    shown = f"{sign}{row['difference']:.1f} [{row['low']:.1f}, {row['high']:.1f}]".replace("-", "−")
    text = " ".join(results(RESULTS[study][0]).split()).replace(" points", "")
    assert f"{before}{shown}" in text


def test_the_costs_of_the_methods_are_those_of_the_file() -> None:
    costs = json.loads((ROOT / "docs/evidence/costs/methods.json").read_text(encoding="utf-8"))["times_joint"]
    page = (ROOT / "docs/methods.md").read_text(encoding="utf-8")
    shown = {row[1].strip("`"): row[5] for row in rows_of(page, "| method | overlay |")}
    assert {name: cost for name, cost in shown.items() if cost != "–"} == {
        name: f"{costs[name]:.2f}" for name in shown if name in costs
    }
    assert f"(`observe`) costs {costs['observe']:.2f} there" in " ".join(page.split())
    assert f"the recipe costs {costs['recipe']:.2f}" in " ".join(page.split())


def collected(study: str, arm: str, score: str) -> str:
    scores = pd.read_csv(ROOT / "docs/evidence" / study / "full_set_scores.csv").query("arm == @arm")[score]
    return f"{scores.mean():.3f} ± {scores.std(ddof=1):.3f}"


#: arm -> how its row of the generated sentiment begins
SENTIMENT = {
    "joint": "joint training", "recipe": "the default", "cggm": "CGGM, as in", "cggm_constant": "the same, the mean",
    "cggm_shuffled": "the same, another", "ensemble": "each modality alone", "alone_text": "text",
    "alone_audio": "audio", "alone_vision": "vision",
}  # fmt: skip


def test_the_scores_of_generated_sentiment_are_those_of_the_tables() -> None:
    shown = rows_of(results("Generated sentiment"), "| training | MAE |")
    full, alone, subsets = (
        table("sentiment_phantom", name).set_index("arm") for name in ("full_set", "alone", "subsets")
    )
    errors = pd.concat([full, alone])
    assert len(shown) == len(SENTIMENT)
    for row, (arm, label) in zip(shown, SENTIMENT.items(), strict=True):
        assert row[0].startswith(label), arm
        mean, sd = errors.loc[arm, ["absolute_error", "absolute_error_sd"]]
        assert row[1] == f"{mean:.3f} ± {sd:.3f}" == collected("sentiment_phantom", arm, "mae"), arm
        assert row[2:5] == [collected("sentiment_phantom", arm, s) for s in ("acc7", "pearson", "acc2")], arm
        if arm in subsets.index:
            assert row[5] == f"{subsets.loc[arm, 'subsets']:.3f} ± {subsets.loc[arm, 'subsets_sd']:.3f}", arm


def test_the_weight_decay_of_mosi_is_the_best_on_validation() -> None:
    found = table("mosi_decay", "full_set").set_index("arm")["accuracy"]
    assert found.idxmax() == "decay_003"
    others = found.drop("decay_003")
    shown = f"{found.max():.3f}, the others {others.min():.3f} to {others.max():.3f}"
    assert shown in " ".join(results("CMU-MOSI, utterance level").split())


def test_f1_on_mosi_is_that_of_its_file() -> None:
    text = " ".join(results("CMU-MOSI, utterance level").split())
    said = text[text.index("F1, weighted by class") :].split(" - ")[0]
    for words, arm in {
        "joint training ": "joint", "the default ": "recipe", "CGGM ": "cggm", "its controls ": "cggm_constant",
        f"{collected('mosi', 'cggm_constant', 'f1')} and ": "cggm_shuffled", "text alone ": "alone_text",
    }.items():  # fmt: skip
        assert words + collected("mosi", arm, "f1") in said, arm
    full, alone = (table("mosi", name).set_index("arm") for name in ("full_set", "alone"))
    for arm, row in pd.concat([full, alone]).iterrows():
        expected = f"{row['accuracy']:.3f} ± {row['accuracy_sd']:.3f}"
        assert collected("mosi", str(arm), "accuracy") == expected


def test_the_logistic_regressions_are_those_of_their_files() -> None:
    page = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    mosi, digits = (
        json.loads((ROOT / f"docs/evidence/{study}/linear.json").read_text(encoding="utf-8"))
        for study in ("mosi", "digits")
    )
    assert f"(evidence/mosi/linear.json), all | {mosi['all']['test']:.3f} |" in page
    weaker = next(row for row in mosi["all"]["every"] if row["C"] == 0.01)
    said = f"C = 0.01 would have {weaker['test']:.3f} on the test part, and {weaker['test_refitted']:.3f} fitted"
    assert said in " ".join(page.split())
    joint = table("mosi", "full_set").set_index("arm").loc["joint", "accuracy"]
    below = [f"{row - joint:.3f}" for row in (mosi["all"]["test"], weaker["test"], weaker["test_refitted"])]
    assert below == ["0.011", "0.018", "0.017"]
    apart = " / ".join(f"{mosi[name]['test']:.3f}" for name in ("text", "audio", "video"))
    assert f"| logistic regression, text / audio / video | {apart} |" in page
    assert f"regression on the same samples has {digits['all']['test']:.3f} (" in page
