# SPDX-License-Identifier: Apache-2.0
"""The documentation: links lead somewhere, commands use what exists, and every TensorBoard tag is explained."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
import unicodedata
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote

import monai.bundle
import pytest
import typer
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from monai_cggm import cli
from monai_cggm.data.phantom import write_phantoms
from tests.bundles.running import TINY, run

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
NOTEBOOK = DOCS / "notebooks" / "phantoms.ipynb"
FOLDERS = ("docs", "bundles")  # besides the root itself, whose other folders may hold environments and runs

LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\(\s*<?([^)\s>]+)>?[^)]*\)|^\[[^\]]+\]:\s*(\S+)", re.MULTILINE)
FENCE = re.compile(r"^( *)(```|~~~).*?^\1\2\s*$", re.MULTILINE | re.DOTALL)


def markdown_files(root: Path) -> list[Path]:
    return sorted([*root.glob("*.md"), *(p for folder in FOLDERS for p in (root / folder).rglob("*.md"))])


def links(text: str) -> Iterator[str]:
    """Targets of links and images, those in code left out."""
    text = re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", FENCE.sub("", text))
    return (inline or reference for inline, reference in LINK.findall(text))


def anchors(path: Path) -> set[str]:
    """Anchors that lead to a heading on GitHub and in MkDocs alike."""
    heads = re.findall(r"^#{1,6} +(.+?) *#*$", FENCE.sub("", path.read_text(encoding="utf-8")), re.MULTILINE)
    plain = [re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", head) for head in heads]
    on_github = {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in plain}
    return on_github & {slug(head) for head in plain}


def slug(heading: str) -> str:
    """What Python-Markdown makes of a heading."""
    ascii_only = unicodedata.normalize("NFKD", heading).encode("ascii", "ignore").decode()
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", ascii_only).strip().lower())


def exists_as_written(path: Path, root: Path) -> bool:
    """Whether a file is there under this very name, on systems that ignore capitals too."""
    if not path.exists() or not path.is_relative_to(root):
        return False
    parts = path.relative_to(root).parts
    return all(part in os.listdir(root.joinpath(*parts[:i])) for i, part in enumerate(parts))


def broken_links(root: Path) -> list[str]:
    """Say which links of the Markdown files lead nowhere, and which leave the pages of ``docs``."""
    problems = []
    for page in markdown_files(root):
        for target in links(page.read_text(encoding="utf-8")):
            if re.match(r"[a-z]+:", target):
                continue
            name, _, anchor = target.partition("#")
            to = Path(os.path.normpath(page.parent / unquote(name))) if name else page
            where = f"{page.relative_to(root)}: {target}"
            if target.startswith("/"):
                problems.append(f"{where} is absolute")
            elif not exists_as_written(to, root):
                problems.append(f"{where} does not exist")
            elif page.is_relative_to(root / "docs") and not to.is_relative_to(root / "docs"):
                problems.append(f"{where} leaves docs, and the built pages: name the file in code instead")
            elif anchor and anchor not in anchors(to):
                problems.append(f"{where} has no such heading")
    return problems


def test_links_lead_somewhere() -> None:
    assert len(markdown_files(ROOT)) > 25
    assert broken_links(ROOT) == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[a](other.md#rules-for-b) ![b](i.png) [c](https://x.org/y) `[d](no.md)` [e](#a-page)", None),
        ("```\n[a](no.md)\n```\n[b]( other.md )", None),
        ("[a](no.md)", "no.md does not exist"),
        ("![a [b]](no.png)", "no.png does not exist"),
        ("[a](Other.md)", "Other.md does not exist"),
        ("[a]: no.md", "no.md does not exist"),
        ("[a](other.md#no)", "other.md#no has no such heading"),
        ("[a](#no)", "#no has no such heading"),
        ("[a](/docs/other.md)", "/docs/other.md is absolute"),
        ("[a](../README.md)", "../README.md leaves docs, and the built pages: name the file in code instead"),
        ("[a](../../README.md)", "../../README.md does not exist"),
    ],
)
def test_a_link_that_leads_nowhere_is_found(text: str, problem: str | None, tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("[docs](docs/page.md)\n")
    (tmp_path / "docs/other.md").write_text("# Other\n\n## Rules for `B`\n\n```bash\n# no\n```\n")
    (tmp_path / "docs/i.png").touch()
    (tmp_path / "docs/page.md").write_text(f"# A page\n\n{text}\n")
    assert broken_links(tmp_path) == ([] if problem is None else [f"docs/page.md: {problem}"])


# ----------------------------------------------------------------------------- MkDocs


def site() -> dict:
    return yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))


def pages_of(nav: list) -> Iterator[str]:
    for entry in nav:
        for value in entry.values():
            yield from pages_of(value) if isinstance(value, list) else [value]


def test_every_page_is_in_the_navigation_once() -> None:
    listed = list(pages_of(site()["nav"]))
    hidden = [pattern for pattern in site()["not_in_nav"].split() if pattern]
    pages = [p for p in DOCS.rglob("*.md") if not any(p.relative_to(DOCS).match(pattern) for pattern in hidden)]
    assert sorted(listed) == sorted(str(page.relative_to(DOCS)) for page in pages)


@pytest.mark.slow
def test_mkdocs_builds_and_warns_of_nothing(tmp_path: Path) -> None:
    if find_spec("mkdocs") is None:
        pytest.skip("needs mkdocs: pip install -c constraints.txt -e '.[docs]'")
    ended = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "site/reference/cli/index.html").is_file()


# ----------------------------------------------------------------------------- commands in the pages


def commands(kind: str) -> list[tuple[str, str]]:
    """Page and command of every shell command in the pages that begins with ``kind``, its lines joined."""
    found = []
    for page in markdown_files(ROOT):
        for block in re.findall(r"^```bash\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
            lines = re.sub(r"\\\n\s*", " ", block).splitlines()
            found += [(str(page.relative_to(ROOT)), line.split("  #")[0]) for line in lines if kind in line]
    return found


def options(command: str) -> list[str]:
    return re.findall(r"(?:^|\s)--([a-zA-Z][\w-]*)", re.sub(r"\"[^\"]*\"", "", command))


def test_options_of_monai_cggm_exist() -> None:
    known = {
        name: {option for p in command.params for option in [*p.opts, *p.secondary_opts]}
        for name, command in typer.main.get_command(cli.app).commands.items()
    }
    unknown = []
    for page, line in commands("monai-cggm "):
        for name, rest in re.findall(r"monai-cggm ([\w-]+)([^|;)]*)", line):
            if name not in known:
                unknown.append(f"{page}: monai-cggm {name}")
                continue
            unknown += [f"{page}: {name} --{o}" for o in options(rest) if f"--{o}" not in known[name]]
    assert unknown == []


def test_keys_of_bundle_commands_exist() -> None:
    """Every --key of ``python -m monai.bundle run`` is an argument of it, or a key of some configuration file."""
    known = set(inspect.signature(monai.bundle.run).parameters)
    for path in ROOT.glob("configs/tracking/*.json"):
        known |= set(json.loads(path.read_text(encoding="utf-8"))["configs"])
    for path in [*ROOT.glob("bundles/*/configs/*.yaml"), *ROOT.glob("configs/*/*.yaml")]:
        known |= {str(key).split("#")[0] for key in yaml.safe_load(path.read_text(encoding="utf-8")) or {}}
    lines = commands("-m monai.bundle run")
    assert len(lines) > 15
    pages_own = {"docs/how-to/add_a_method.md": {"power"}}  # of the method that the page writes
    unknown = [
        f"{page}: --{key}"
        for page, line in lines
        for key in options(line.split("-m monai.bundle run")[1])
        if key not in known | pages_own.get(page, set())
    ]
    assert unknown == []


def test_configuration_files_that_pages_name_exist() -> None:
    missing = []
    for page in markdown_files(ROOT):
        text = page.read_text(encoding="utf-8")
        named = [f"configs/{name}" for name in re.findall(r"\$C/([\w/]+\.(?:yaml|json))", text)]
        named += [f"bundles/brats_cggm/configs/{n}" for n in re.findall(r"\$B/([\w/]+\.(?:yaml|json))", text)]
        folders = "methods|parts|ablations|protocols|hardware|studies|splits"
        named += [f"configs/{name}" for name in re.findall(rf"(?<![\w$])((?:{folders})/\w+\.(?:yaml|json))", text)]
        if page.name == "figures_of_the_paper.md" or "C=$(monai-cggm path configs)/methods" in text:
            named = [name for name in named if name.count("/") > 1]  # $C is another folder there
        missing += [f"{page.relative_to(ROOT)}: {name}" for name in named if not (ROOT / name).is_file()]
    assert missing == []


# ----------------------------------------------------------------------------- numbers


def test_the_page_on_balancing_has_the_numbers_of_the_evidence() -> None:
    """Which other tests hold against the tables of the comparison."""
    evidence = (DOCS / "evidence.md").read_text(encoding="utf-8")
    page = (DOCS / "explanation/balance.md").read_text(encoding="utf-8")
    one_seed, two_seeds = (
        evidence.split(f"\n## Cross-validation: BraTS at 2 mm{rest}\n")[1].split("\n## ")[0]
        for rest in ("", ", a second seed")
    )
    rows = [line.strip("|").split("|") for line in page.splitlines() if line.startswith("| ") and "[" in line]
    assert [seeds.strip() for _, seeds, _ in rows] == ["2"] * 4 + ["1"] * 2
    for name, seeds, difference in rows:
        of = two_seeds if seeds.strip() == "2" else one_seed
        (row,) = [line for line in of.splitlines() if line.startswith(f"|{name.split(':')[0].rstrip()}")]
        assert row.split("|")[2] == difference, name  # there further columns follow
    text = " ".join(page.split())
    assert "with one seed, joint training has 0.174, CGGM 0.173, modality dropout 0.326." in text
    for arm, number in (("(a) joint", "0.174"), ("(i) CGGM, clipped", "0.173"), ("(b) + modality dropout", "0.326")):
        row = next(line for line in one_seed.splitlines() if line.startswith(f"| {arm}"))
        assert row.endswith(f"| {number} |")
    assert "B went from −3330 to 2490" in text
    assert "B went from −3330 to 2490" in " ".join(evidence.split())


# ----------------------------------------------------------------------------- TensorBoard


@pytest.fixture(scope="module")
def events(tmp_path_factory: pytest.TempPathFactory) -> EventAccumulator:
    """Of a tiny run with CGGM and the parts that log something."""
    folder = tmp_path_factory.mktemp("tags")
    write_phantoms(folder / "phantoms", cases=6, shape=(40, 44, 20), spacing=4.0)
    run(
        "train.yaml", "methods/cggm.yaml", "parts/dropout.yaml", "parts/distillation.yaml",
        dataset_dir=str(folder / "phantoms"), run_dir=str(folder / "run"), max_share=0.1, **TINY,
    )  # fmt: skip
    found = EventAccumulator(str(folder / "run"))
    found.Reload()
    return found


def documented() -> dict[str, re.Pattern[str]]:
    """The tags that the page names, as patterns."""
    page = (DOCS / "reference/tensorboard.md").read_text(encoding="utf-8")
    tags = [
        t for line in page.splitlines() if line.startswith("| `") for t in re.findall(r"`([^`]+)`", line.split("|")[1])
    ]
    places = {
        "modality": "(flair|t1ce|t1|t2)",
        "predictor": "(fusion|flair|t1ce|t1|t2)",
        "group": "(network|classifiers)",
    }
    places |= {"region": "(WT|TC|ET|mean)", "score": "(accuracy|f1|mae|pearson|acc2|acc7)"}
    return {tag: re.compile(re.sub(r"<(\w+)>", lambda found: places[found[1]], tag)) for tag in tags}


def test_every_tag_of_a_run_is_in_the_page(events: EventAccumulator) -> None:
    tags = events.Tags()
    patterns = documented().values()
    assert [tag for tag in tags["scalars"] if not any(p.fullmatch(tag) for p in patterns)] == []
    assert tags["images"] == ["validation"]
    page = (DOCS / "reference/tensorboard.md").read_text(encoding="utf-8")
    assert "*Images*, `validation`" in page
    assert "*Text*, `config`" in page
    assert "config/text_summary" in tags["tensors"]


def test_every_tag_of_training_in_the_page_is_in_a_run(events: EventAccumulator) -> None:
    """Of the sections that are about all runs with classifiers, and of CGGM's own."""
    single = ("epsilon_mean", "discrepancy", "update", "share_loss", "loss/prototype", "prototype_", "loss/teachers")
    single += ("teacher_distance", "blending", "loss/boosted", "loss/agreement", "learns", "loss/rank", "confidence")
    single += ("validation/val_accuracy", "validation/val_negative_mae", "validation/<predictor>_<score>")
    found = events.Tags()["scalars"]
    expected = {tag: pattern for tag, pattern in documented().items() if not tag.startswith(single)}
    assert [tag for tag, pattern in expected.items() if not any(map(pattern.fullmatch, found))] == []


def test_the_page_says_when_a_tag_is_written(events: EventAccumulator) -> None:
    """A run of two epochs of two iterations each, validated after each."""
    steps = {
        "train/loss": [1, 2, 3, 4], "train/epoch_loss": [2, 4], "learning_rate/network": [2, 4],
        "balance/mean": [1, 2, 4], "balance/t1": [1, 2, 3, 4], "lam": [1, 2, 3, 4], "validation/loss": [2, 4],
    }  # fmt: skip
    for tag, expected in steps.items():
        assert [event.step for event in events.Scalars(tag)] == expected, tag
    page = (DOCS / "reference/tensorboard.md").read_text(encoding="utf-8")
    when = {row.split("|")[1].strip(): row.split("|")[-2].strip() for row in page.splitlines() if row.startswith("| `")}
    assert when["`train/epoch_loss`"] == when["`learning_rate/<group>`"] == "epoch"
    assert when["`balance/mean`"] == "first iteration, epoch"
    assert when["`validation/loss`"] == "validation"


def test_every_tag_that_methods_write_is_in_the_page() -> None:
    """From their source, so that a new method's tags are not forgotten."""
    groups, names = set(), set()
    for path in (ROOT / "monai_cggm/methods").glob("*.py"):
        text = path.read_text(encoding="utf-8")
        groups |= {f"{group}/<modality>" for group in re.findall(r"_add_scalars\(\s*\"([\w/]+)\"", text)}
        names |= set(re.findall(r"_scalars\[\"([\w/]+)\"\] =", text))
        names |= {
            key
            for keys in re.findall(r"_scalars(?:\.update\(| \|= )\{(.*?)\}", text)
            for key in re.findall(r"\"([\w/]+)\":", keys)
        }
    assert {"balance_bounded", "lam", "loss/rank"} <= names
    assert (groups | names) - set(documented()) == set()


# ----------------------------------------------------------------------------- the notebook


def cells(kind: str) -> list[str]:
    book = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in book["cells"] if cell["cell_type"] == kind]


def test_the_notebook_is_committed_without_outputs() -> None:
    book = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert book["nbformat"] == 4
    assert all(c["outputs"] == [] and c["execution_count"] is None for c in book["cells"] if c["cell_type"] == "code")
    assert len({cell["id"] for cell in book["cells"]}) == len(book["cells"])
    assert len(cells("code")) > 3


@pytest.mark.slow
def test_the_notebook_runs_and_its_network_has_learnt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib.pyplot as plt
    from monai.data import set_track_meta

    monkeypatch.chdir(tmp_path)
    hook = sys.excepthook
    names: dict = {}
    try:
        for source in cells("code"):
            exec(compile(source, "phantoms.ipynb", "exec"), names)
    finally:
        sys.excepthook = hook
        set_track_meta(True)
    epochs, truth, found = names["epochs"], names["truth"], names["found"]
    assert epochs["train/epoch_loss"].iloc[-1] < 0.8 * epochs["train/epoch_loss"].iloc[0]
    whole = 2 * ((truth > 0) & (found > 0)).sum() / ((truth > 0).sum() + (found > 0).sum())
    assert whole == pytest.approx(names["dice"])
    assert whole > 0.4
    scores = names["validated"].iloc[-1]
    assert scores["validation/fusion_dice_WT"] > 0.5
    assert scores["validation/flair_dice_WT"] >= scores["validation/t1_dice_WT"]  # which shows a third of the contrast
    assert len(plt.get_fignums()) >= 2
    plt.close("all")
