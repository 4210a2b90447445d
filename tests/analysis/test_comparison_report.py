# SPDX-License-Identifier: Apache-2.0
"""The report of a comparison as its readers get it."""

from __future__ import annotations

import base64
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pandas as pd
import pytest

from monai_cggm.analysis.cells import read_cells
from monai_cggm.analysis.comparison import compare
from monai_cggm.analysis.comparison_figures import subset_heat_map
from monai_cggm.analysis.comparison_report import CONVENTION_NOTES, write_report
from monai_cggm.analysis.measures import HD95_PENALTIES
from monai_cggm.analysis.pages import DASH, without_folders
from monai_cggm.metrics import EMPTY_CONVENTIONS
from tests.analysis.fake_cells import facts, sample_cell, scored_cell, subsets, write_cell

TITLE = "Does <script>alert('x')</script> help & $why$ | how?"
FIGURES = ("figures/subsets.svg", "figures/differences.svg")
TABLES = ("full_set", "subsets", "differences", "classifiers", "alone", "costs", "cells")


class Page(HTMLParser):
    """What a browser would make of it: tags, attributes, the cells of the tables, the text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[str]]] = []
        self.text = ""
        self._in_cell = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self._in_cell = True

    def handle_endtag(self, tag: str) -> None:
        self._in_cell = self._in_cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._in_cell:
            self.tables[-1][-1][-1] += data


def markdown_tables(text: str) -> list[list[list[str]]]:
    tables: list[list[list[str]]] = []
    before = ""
    for line in text.splitlines():
        if line.startswith("|"):
            if not before.startswith("|"):
                tables.append([])
            cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip())[1:-1]]
            if not all(re.fullmatch(r"-+:?", cell) for cell in cells):
                tables[-1].append(cells)
        before = line
    return tables


def plain(cell: str) -> str:
    """A cell of Markdown as it is shown."""
    return re.sub(r"\\(.)", r"\1", cell).replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")


def a_study(**changes: Any) -> dict[str, Any]:
    return {
        "title": TITLE,
        "reference": "joint",
        "part": "test",
        "convention": "brats_legacy",
        "settings": {"val_interval": 10},
        "splits": ["/somewhere/splits/a.json", "b.json"],
        "seeds": [0, 1],
        "key_modality": "t1ce",
        "alone": True,
        "arms": {
            "joint": {"title": "Joint"},
            "recipe": {
                "title": "Recipe <script>alert(1)</script> a|b",
                "controls": {"constant": "even", "shuffled": "shuffled", "uniform": "even"},
                "overlays": ["/home/somebody/recipe.yaml"],
                "settings": {"cache_dir": "/scratch/somebody/cache"},
            },
            "shuffled": {"title": "Shuffled"},
            "even": {},
        },
    } | changes


def fill(folder: Path, *, splits: tuple[str, ...] = ("a", "b"), seeds: tuple[int, ...] = (0, 1), **kwargs: Any) -> None:
    for index, arm in enumerate(("joint", "recipe", "shuffled")):
        for split in splits:
            for seed in seeds:
                scored_cell(
                    folder,
                    arm,
                    split,
                    seed,
                    lambda case, subset, i=index, s=seed: (
                        0.2 + 0.1 * subset.count("+") + 0.1 * i + 0.02 * case * (i + s)
                    ),
                    classifiers=arm == "recipe",
                    **kwargs,
                )


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two splits and two seeds; one cell failed, two are outstanding."""
    folder = tmp_path_factory.mktemp("comparison")
    fill(folder, splits=("a",))
    fill(folder, splits=("b",), seeds=(0,))
    error = "CaseError: case x: no <b>label</b> (/data/secret folder/x_seg.nii.gz) at C:\\Users\\me\\x.py"
    write_cell(folder, facts("recipe", "b", 1, status="failed", error=error), [])
    for modality in ("flair", "t1ce", "t2"):
        scored_cell(folder, f"alone_{modality}", "a", 0, lambda case, subset: 0.3, modalities=(modality,))
    untrained = dict.fromkeys(("epochs", "iterations", "validations", "best_epoch", "training_seconds"))
    scored_cell(folder, "ensemble", "a", 0, lambda case, subset: 0.35, **untrained)
    write_report(folder, a_study())
    return folder


def texts(folder: Path) -> tuple[Page, str]:
    return Page((folder / "report.html").read_text("utf-8")), (folder / "report.md").read_text("utf-8")


def test_files(report: Path) -> None:
    made = {str(p.relative_to(report)) for p in report.rglob("*") if p.is_file() and "cells/" not in str(p)}
    assert made == {"report.html", "report.md", *(f"tables/{name}.csv" for name in TABLES), *FIGURES}


def test_sections_are_in_order(report: Path) -> None:
    _, markdown = texts(report)
    assert re.findall(r"^## (.*)", markdown, flags=re.M) == [
        "Verdicts",
        "What was run",
        "All modalities given",
        "Modalities missing",
        "Differences between arms",
        "Each modality's classifier",
        "Each modality alone",
        "Costs",
        "How to read this",
        "Research use only",
    ]


def test_cases_without_a_modality_are_counted(tmp_path: Path, report: Path) -> None:
    assert "lack the modality" not in texts(report)[1]
    shutil.copytree(report / "cells", tmp_path / "cells")
    shutil.rmtree(tmp_path / "cells" / "alone_t2")
    scored_cell(tmp_path, "alone_t2", "a", 0, lambda case, subset: 0.3, modalities=("t2",), cases=1, iterations=3)
    write_report(tmp_path, a_study())
    markdown = texts(tmp_path)[1]
    assert "Cases that lack the modality are left out, of training too; scored are alone_t2 1 of 3." in markdown
    assert "NOT" not in markdown  # an epoch of fewer cases has fewer iterations, and that is no other budget


def test_complete_cases_of_the_subsets_are_counted(tmp_path: Path, report: Path) -> None:
    assert "with every modality count" not in texts(report)[1]
    shutil.copytree(report / "cells", tmp_path / "cells")
    lost = [subset for subset in subsets(("flair", "t1ce", "t2"))[1:] if "t2" in subset]
    for table in tmp_path.glob("cells/*/*/scores.csv"):
        rows = table.read_text(encoding="utf-8").splitlines()
        one = rows[1].split(",")[0]  # from now on it lacks t2
        kept = [r for r in rows if r.split(",")[0] != one or r.split(",")[3] not in lost]
        table.write_text("\n".join(kept) + "\n", encoding="utf-8")
    write_report(tmp_path, a_study())
    assert "Only cases with every modality count here, 2 of 3, 4 of 6; the full set" in texts(tmp_path)[1]


def test_texts_of_files_are_escaped(report: Path) -> None:
    page, markdown = texts(report)
    assert {tag for tag, _ in page.tags} & {"script", "b"} == set()
    assert TITLE in page.text
    assert "Recipe <script>alert(1)</script> a|b" in page.text
    assert "no <b>label</b>" in page.text
    assert "<" not in markdown
    assert "a\\|b" in markdown


def test_nothing_is_loaded_and_pictures_have_a_text(report: Path) -> None:
    page, _ = texts(report)
    sources = [attrs.get("src") or attrs.get("href") for _, attrs in page.tags if "src" in attrs or "href" in attrs]
    assert len(sources) == 2
    for source in sources:
        assert source is not None
        assert source.startswith("data:image/svg+xml;base64,")
        svg = base64.b64decode(source.partition(",")[2])
        assert ElementTree.fromstring(svg).tag.endswith("svg")
        assert not re.search(rb'href="(?!#|data:)', svg)
    alts = [attrs["alt"] for tag, attrs in page.tags if tag == "img"]
    assert all(alts)
    assert "@import" not in (report / "report.html").read_text("utf-8")


def test_pictures_lie_beside_the_markdown_page(report: Path) -> None:
    _, text = texts(report)
    assert re.findall(r"!\[.*\]\((.*)\)", text) == list(FIGURES)
    for name in FIGURES:
        assert ElementTree.parse(report / name).getroot().tag.endswith("svg")


def test_no_absolute_path_and_no_nan(report: Path) -> None:
    page, markdown = texts(report)
    tables = "".join(path.read_text("utf-8") for path in (report / "tables").iterdir())
    for text in (page.text, markdown, tables):
        for secret in ("/somewhere", "/home", "/scratch", "/data", "C:\\", str(report)):
            assert secret not in text
        assert not re.search(r"\b([Nn]a[Nn]|None|NaT)\b", text)
    assert "x_seg.nii.gz" in page.text
    assert "…/recipe.yaml" in page.text


def test_failed_and_outstanding_cells_are_told(report: Path) -> None:
    page, _ = texts(report)
    # 4 arms, 3 networks alone and the ensemble, on 2 splits with 2 seeds
    assert "Cells: 13 done, 1 failed, 18 outstanding." in page.text
    assert "Preliminary: 19 of 32 cells are missing." in page.text
    assert "joint, b, seed 1" in page.text
    failures = page.tables[1]
    assert failures[1][:3] == ["recipe", "b", "1"]
    assert "CaseError: case x" in failures[1][3]


def test_what_was_run_is_told(report: Path) -> None:
    page, _ = texts(report)
    # the ensemble has none, and is no other budget
    assert "Budget: 120 epochs, 600 iterations, the same for every arm." in page.text
    assert "Settings of every arm: val_interval 10." in page.text
    assert EMPTY_CONVENTIONS["brats_legacy"].note in page.text
    assert "Seeds: 0, 1. Splits: a, b." in page.text
    assert "Models are selected on validation cases; test cases choose nothing. Selected epochs: 120." in page.text


def test_roles_are_told(report: Path) -> None:
    page, _ = texts(report)
    arms = {row[0]: row for row in page.tables[0]}
    assert arms["name"][3] == "controls"
    assert arms["recipe"][3] == "constant: even, shuffled: shuffled, uniform: even"
    assert arms["joint"][3] == DASH
    differences = pd.read_csv(report / "tables" / "differences.csv")
    roles = differences.groupby(["arm", "against"])["role"].unique().map(list).to_dict()
    assert roles == {
        ("recipe", "joint"): ["reference"],
        ("recipe", "shuffled"): ["shuffled"],
        ("shuffled", "joint"): ["reference"],
        ("ensemble", "joint"): ["reference"],
    }


def test_an_arm_with_two_roles_is_one_row(tmp_path: Path) -> None:
    fill(tmp_path, splits=("a",))
    controls = {"constant": "shuffled", "uniform": "shuffled"}
    write_report(tmp_path, a_study(arms={"joint": {}, "recipe": {"controls": controls}, "shuffled": {}}))
    table = next(table for table in texts(tmp_path)[0].tables if table[0][:3] == ["arm", "against", "role"])
    assert [row[2] for row in table[1:] if row[:2] == ["recipe", "shuffled"]] == ["constant+uniform"]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"iterations": 1200}, "iterations: joint 600; longer 1200"),
        ({"epochs": 240}, "epochs: joint 120; longer 240"),
        ({"epochs": 240, "iterations": 1200}, "epochs: joint 120; longer 240; iterations: joint 600; longer 1200"),
    ],
)
def test_another_budget_is_told_loudly(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    fill(tmp_path, splits=("a",))
    scored_cell(tmp_path, "longer", "a", 0, lambda case, subset: 0.5, **changes)
    write_report(tmp_path, a_study(arms={"joint": {}, "longer": {}}))
    text = texts(tmp_path)[1]
    assert f"Budget: NOT the same for every arm: {told}." in text
    loud = f"The arms did NOT have the same budget, so what follows compares no methods: {told}."
    assert loud in text[text.index("## Verdicts") : text.index("## What was run")]
    assert "the same for every arm." not in text


def test_splits_of_other_sizes_are_the_same_budget(tmp_path: Path) -> None:
    """Split b has more cases for training; only one arm has run there."""
    for arm, split, iterations in (("joint", "a", 600), ("longer", "a", 600), ("longer", "b", 800)):
        scored_cell(tmp_path, arm, split, 0, lambda case, subset: 0.5, iterations=iterations)
    write_report(tmp_path, a_study(arms={"joint": {}, "longer": {}}))
    assert "Budget: 120 epochs, 600 to 800 iterations, the same for every arm." in texts(tmp_path)[0].text


@pytest.mark.parametrize(
    ("facts_of_cells", "settings", "budget"),
    [
        ({"epochs": None}, {"epochs": 40}, "Budget: 40 epochs, 600 iterations, the same for every arm."),
        ({"epochs": None}, {}, "Budget: 600 iterations, the same for every arm."),
        ({"epochs": None, "iterations": None}, {}, "Budget: not known yet."),
    ],
)
def test_budgets_that_cells_do_not_know(
    tmp_path: Path, facts_of_cells: dict[str, Any], settings: dict[str, Any], budget: str
) -> None:
    fill(tmp_path, splits=("a",), **facts_of_cells)
    write_report(tmp_path, a_study(settings=settings))
    assert budget in texts(tmp_path)[0].text


LAST = "The last epoch's weights are kept: nothing was selected on the way."
SELECTED = "Models are selected on validation cases"
OPTIMISTIC = "so the scores are optimistic"
CHOOSING = "Scores on validation cases are for choosing between arms."


@pytest.mark.parametrize("part", ["test", "validation"])
@pytest.mark.parametrize(
    ("validations", "best_epoch", "selected"),
    [(1, 120, False), (1, None, False), (2, 120, True), (None, 120, True), (1, 100, True)],
)
def test_selection_is_claimed_only_where_there_was_one(
    tmp_path: Path, part: str, validations: int | None, best_epoch: int | None, selected: bool
) -> None:
    """One validation selects nothing; how often a cell validated may not be known."""
    for seed in (0, 1):
        path = scored_cell(
            tmp_path,
            "joint",
            "a",
            seed,
            lambda case, subset: 0.5,
            validations=1 if seed == 0 else validations,
            best_epoch=120 if seed == 0 else best_epoch,
        )
        scores = path / "scores.csv"
        scores.write_text(scores.read_text("utf-8").replace(",test,", f",{part},"), encoding="utf-8")
    write_report(tmp_path, a_study(part=part, arms={"joint": {}}, alone=False))
    text = texts(tmp_path)[0].text
    assert (LAST in text, SELECTED in text) == (not selected, selected)
    assert (OPTIMISTIC in text) == (selected and part == "validation")
    assert (CHOOSING in text) == (part == "validation")


def shown(row: dict[str, Any], column: str, digits: int) -> str:
    spread = DASH if pd.isna(row[f"{column}_sd"]) else f"{row[f'{column}_sd']:.{digits}f}"
    return f"{row[column]:.{digits}f} ± {spread}"


def test_markdown_page_and_csv_have_the_same_numbers(report: Path) -> None:
    page, markdown = texts(report)
    tables = [[[plain(cell) for cell in row] for row in table] for table in markdown_tables(markdown)]
    assert tables == page.tables
    of_header = {tuple(table[0][:3]): table for table in reversed(tables)}  # the first of each
    full = pd.read_csv(report / "tables" / "full_set.csv")
    table = of_header["arm", "Dice WT", "Dice TC"]
    for line, row in zip(table[1:4], full.to_dict("records"), strict=True):
        assert line[1] == shown(row, "dice_WT", 3)
        assert line[4] == shown(row, "dice_mean", 3)
        assert line[5] == shown(row, "hd95_WT", 1)
        assert line[-4:] == [
            f"{row['penalties']} of {row['distances']}",
            *(str(row[count]) for count in ("splits", "seeds", "cases")),
        ]
    by_subsets = pd.read_csv(report / "tables" / "subsets.csv").to_dict("records")
    table = of_header["arm", "all subsets", "one missing"]
    assert [line[1] for line in table[1:]] == [shown(row, "subsets", 3) for row in by_subsets]
    assert [line[-1] for line in table[1:]] == [row["worst_subset"] for row in by_subsets]
    differences = pd.read_csv(report / "tables" / "differences.csv")
    on_full = differences[differences["score"] == "full"].to_dict("records")
    lines = of_header["arm", "against", "role"][1:]
    assert [line[0] for line in lines] == [row["arm"] for row in on_full]
    assert [float(line[3]) for line in lines] == pytest.approx([row["difference"] for row in on_full], abs=0.0051)
    assert [line[4] for line in lines] == [f"[{row['low']:.2f}, {row['high']:.2f}]" for row in on_full]


def test_numbers_by_hand(report: Path) -> None:
    """Joint: 0.40 with seed 0, and 0.02 more with seed 1, which split b lacks; HD95 of 10, 11 and 12."""
    full = pd.read_csv(report / "tables" / "full_set.csv").set_index("arm")
    assert full.loc["joint", "dice_mean"] == pytest.approx(((0.40 + 0.42) / 2 + 0.40) / 2)
    assert full.loc["joint", "hd95_WT"] == pytest.approx(11.0)
    cells = pd.read_csv(report / "tables" / "cells.csv")
    assert cells["status"].value_counts().to_dict() == {"done": 13, "failed": 1}


def test_same_cells_same_bytes(report: Path) -> None:
    before = {path: path.read_bytes() for path in report.rglob("*") if path.is_file()}
    write_report(report, a_study())
    assert {path: path.read_bytes() for path in report.rglob("*") if path.is_file()} == before


def test_one_seed_is_a_dash(tmp_path: Path) -> None:
    fill(tmp_path, splits=("a",), seeds=(0,))
    arms = {"joint": {}, "recipe": {"controls": {"shuffled": "shuffled"}}, "shuffled": {}}
    write_report(tmp_path, a_study(splits=["a.json"], seeds=[0], alone=False, arms=arms))
    page, _ = texts(tmp_path)
    full = next(table for table in page.tables if table[0][1].startswith("Dice"))
    assert full[1][1] == f"0.400 ± {DASH}"
    assert "With one seed, the intervals leave the chance of training out." in page.text
    assert "Each modality alone" not in page.text


def test_other_regions_and_modalities(tmp_path: Path) -> None:
    fill(tmp_path, splits=("a",), regions=("lesion",), modalities=("ct", "pet"), hd95=None)
    write_report(tmp_path, a_study(splits=["a.json"], key_modality=None, alone=False))
    page, _ = texts(tmp_path)
    full = next(table for table in page.tables if "Dice lesion" in table[0])
    assert full[0] == ["arm", "Dice lesion", "Dice mean", "splits", "seeds", "cases"]
    header = next(table[0] for table in page.tables if "all subsets" in table[0])
    assert header == ["arm", "all subsets", "one missing (single)", "worst subset", "which"]
    assert list(pd.read_csv(tmp_path / "tables" / "subsets.csv").columns[-3:]) == subsets(("ct", "pet"))


def test_errors_are_told_as_errors(tmp_path: Path) -> None:
    for arm, error in (("joint", 1.2), ("recipe", 1.5)):
        sample_cell(tmp_path, arm, "a", 0, lambda c, s, e=error: e + 0.125 * c, score="absolute_error")
    study = a_study(splits=["a.json"], seeds=[0], score="absolute_error", arms={"joint": {}, "recipe": {}})
    del study["convention"]
    write_report(tmp_path, study)
    page, markdown = texts(tmp_path)
    assert "Absolute error from 0." in page.text
    assert "Mean absolute error (from 0, less is better) on the test cases" in page.text
    assert "Paired differences of absolute error: how much less of it there is." in page.text
    assert "to the right of zero the arm that is named first is better" in page.text
    assert "points" not in markdown.replace("in points", "")
    table = next(table for table in page.tables if table[0][:3] == ["arm", "against", "role"])
    assert table[0][3] == "less absolute error"
    assert table[1][3] == "-0.3000"


SIX = tuple(f"view{number}" for number in range(1, 7))


def test_accuracy_of_six_modalities(tmp_path: Path) -> None:
    """A case is right from a subset that has more modalities than the case's number; with recipe one fewer will do."""
    for extra, arm in enumerate(("joint", "recipe")):
        for seed in (0, 1):
            sample_cell(
                tmp_path, arm, "a", seed, lambda c, s, e=extra: s.count("+") + 1 + e > c, cases=6, modalities=SIX
            )
    study = a_study(splits=["a.json"], score="accuracy", key_modality=None, alone=False)
    del study["convention"]
    write_report(tmp_path, study | {"arms": {"joint": {}, "recipe": {}}})
    page, markdown = texts(tmp_path)
    for text in (page.text, markdown, *(attrs["alt"] for tag, attrs in page.tags if tag == "img")):
        for word in ("Dice", "HD95", "volumes", "Empty regions", "convention"):
            assert word not in str(text)
    assert "Accuracy from 0 to 1." in page.text
    assert "Paired differences of accuracy in points (accuracy × 100)." in page.text
    assert "Mean accuracy (0 to 1) on the test cases" in page.text
    tables = {tuple(table[0]): table for table in page.tables}
    assert tables["arm", "accuracy", "splits", "seeds", "cases"][1][1] == "1.000 ± 0.000"
    groups = tables[
        (
            "arm", "all subsets", "one missing", "two missing", "three missing", "four missing",
            "five missing (single)", "worst subset", "which",
        )
    ]  # fmt: skip
    assert groups[1][2:7] == [f"{given / 6:.3f} ± 0.000" for given in (5, 4, 3, 2, 1)]
    assert tables["arm", *SIX][1:] == [["joint", *["0.167"] * 6], ["recipe", *["0.333"] * 6]]
    written = pd.read_csv(tmp_path / "tables" / "subsets.csv")
    assert list(written.columns[-63:]) == subsets(SIX)
    assert written["view1+view4"].tolist() == pytest.approx([2 / 6, 3 / 6], abs=1e-6)


@pytest.mark.parametrize(("modalities", "columns"), [(SIX[:4], 15), (SIX[:5], 2 + 4 + 1 + 5), (SIX, 2 + 5 + 1 + 6)])
def test_the_heat_map_stays_readable(tmp_path: Path, modalities: tuple[str, ...], columns: int) -> None:
    """A field holds one number, whose two digits after the point are drawn as shapes."""
    sample_cell(tmp_path, "joint", "a", 0, lambda c, s: c < 2, cases=4, modalities=modalities)
    study = a_study(splits=["a.json"], seeds=[0], score="accuracy", key_modality=None, alone=False, arms={"joint": {}})
    study["reference"] = "joint"
    comparison = compare(read_cells(tmp_path, score="accuracy"), study)
    picture = subset_heat_map(comparison, study)
    fields = re.findall(rb'<g id="QuadMesh_1">.*?</g>', picture.svg, flags=re.S)[0].count(b"<path")
    assert fields == columns
    assert ("one, two and so on" in picture.caption) == (len(modalities) > 4)
    assert "Mean accuracy over cases, seeds and splits" in picture.caption


def test_a_comparison_that_has_only_begun(tmp_path: Path) -> None:
    (tmp_path / "cells").mkdir()
    write_report(tmp_path, a_study())
    page, markdown = texts(tmp_path)
    assert "recipe: nothing can be said yet" in page.text
    assert "No arm has a finished cell yet." in markdown
    assert {path.name for path in (tmp_path / "tables").iterdir()} == {f"{name}.csv" for name in TABLES}
    assert not pd.read_csv(tmp_path / "tables" / "differences.csv").columns.empty


def test_validation_scores_are_called_optimistic(tmp_path: Path) -> None:
    (tmp_path / "cells").mkdir()
    write_report(tmp_path, a_study(part="validation"))
    assert "so the scores are optimistic" in texts(tmp_path)[0].text


def test_conventions_are_described_as_the_metrics_describe_them() -> None:
    assert dict(CONVENTION_NOTES) == {name: convention.note for name, convention in EMPTY_CONVENTIONS.items()}
    penalties = {c.prediction_empty[1] for c in EMPTY_CONVENTIONS.values() if not math.isnan(c.prediction_empty[1])}
    assert set(HD95_PENALTIES) == penalties


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("no file /data/a b/x.nii.gz", "no file …/a b/x.nii.gz"),
        ("in (/home/me/x.nii.gz): bad", "in (…/x.nii.gz): bad"),
        ("C:\\Users\\me\\x.py", "…/x.py"),
        ("~/data/x.json", "…/x.json"),
        ("see file:///home/alice/x.yaml", "see …/x.yaml"),
        ("//server/share/alice/x.yaml", "…/x.yaml"),
        ("no folder /home/alice", "no folder ~"),
        ("see https://example.org/a/b", "see https://example.org/a/b"),
        ("configs/methods/joint.yaml and/or 3 / 4 mm", "configs/methods/joint.yaml and/or 3 / 4 mm"),
        ("two\n  lines", "two lines"),
    ],
)
def test_folders_are_left_out(text: str, expected: str) -> None:
    assert without_folders(text) == expected
