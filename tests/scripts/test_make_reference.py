# SPDX-License-Identifier: Apache-2.0
"""The reference pages are those that code and configurations make today, and say what these say."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from typer.testing import CliRunner

from monai_cggm import cli, handlers, methods
from tests.scripts.loading import script_module

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("cli.md", "configuration.md", "handlers.md")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return script_module("make_reference")


@pytest.mark.parametrize("name", PAGES)
def test_the_pages_are_up_to_date(name: str, script: ModuleType) -> None:
    assert tuple(script.MAKERS) == PAGES
    found = (ROOT / "docs/reference" / name).read_text(encoding="utf-8")
    assert found == script.MAKERS[name](), "run python scripts/make_reference.py"


def test_check_notices_a_stale_page_and_writing_mends_it(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(script, "PAGES", tmp_path)
    monkeypatch.setattr(script, "MAKERS", {"one.md": lambda: "new\n", "two.md": lambda: "same\n"})
    (tmp_path / "one.md").write_text("old\n")
    (tmp_path / "two.md").write_text("same\n")
    with pytest.raises(script.typer.Exit):
        script.main(check=True)
    assert (tmp_path / "one.md").read_text() == "old\n"
    assert "one.md would change" in capsys.readouterr().out
    script.main(check=False)
    assert (tmp_path / "one.md").read_text() == "new\n"
    script.main(check=True)
    assert "up to date" in capsys.readouterr().out


# ----------------------------------------------------------------------------- the command line


def section(page: str, name: str) -> str:
    return page.split(f"\n## {name}\n")[1].split("\n## ")[0]


def rows(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


COMMANDS = re.findall(r"^## ([\w-]+)$", (ROOT / "docs/reference/cli.md").read_text(encoding="utf-8"), re.MULTILINE)


def test_every_command_has_a_section(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    shown = CliRunner().invoke(cli.app, ["--help"]).output
    assert set(COMMANDS) == set(re.findall(r"^│ ([\w-]+) ", shown.split("Commands")[1], re.MULTILINE))


@pytest.mark.parametrize("command", COMMANDS)
def test_the_options_are_those_that_help_prints(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    shown = CliRunner().invoke(cli.app, [command, "--help"]).output.split("Options")[-1]
    expected = set(re.findall(r"^│ [* ]*(--[\w-]+)", shown, re.MULTILINE)) - {"--help"}
    page = (ROOT / "docs/reference/cli.md").read_text(encoding="utf-8")
    found = {row[0].strip("`") for row in rows(section(page, command))}
    assert {name for name in found if name.startswith("--")} == expected


def test_defaults_do_not_depend_on_the_machine_and_zero_is_one() -> None:
    page = (ROOT / "docs/reference/cli.md").read_text(encoding="utf-8")
    check = {row[0]: row for row in rows(section(page, "check"))}
    assert check["`--workers`"][1:3] == ["whole number, at least 1", "one a core, 4 at most"]
    assert check["`--skip-bad`"][1:3] == ["no value", "–"]
    phantom = {row[0]: row for row in rows(section(page, "phantom"))}
    assert phantom["`--seed`"][1:3] == ["whole number", "`0`"]
    assert phantom["`OUT`"][1:3] == ["path", "required"]
    assert phantom["`--informativeness`"][2] == "–"
    compare = {row[0]: row for row in rows(section(page, "compare"))}
    assert compare["`--set`"][1] == "`KEY=VALUE`, again for each"
    assert "monai-cggm compare STUDY --out OUT [OPTIONS]" in page


# ----------------------------------------------------------------------------- configurations


def test_the_first_block_of_the_training_is_there_with_its_values() -> None:
    """Read another way: the text between the two lines that say what is to be changed."""
    text = (ROOT / "bundles/brats_cggm/configs/train.yaml").read_text(encoding="utf-8")
    block = text.split(" what to change\n")[1].split("# -----")[0]
    page = (ROOT / "docs/reference/configuration.md").read_text(encoding="utf-8")
    found = {row[0].strip("`"): row[1].strip("`") for row in rows(section(page, "train.yaml"))}
    expected = {}
    for key, value in yaml.safe_load(block).items():
        nested = isinstance(value, dict) and key == "encoder"
        expected |= {f"{key}#{part}": v for part, v in value.items()} if nested else {key: value}
    assert {key: yaml.safe_load(value) for key, value in found.items()} == expected


def test_every_overlay_has_a_section() -> None:
    page = (ROOT / "docs/reference/configuration.md").read_text(encoding="utf-8")
    files = [path for path in (ROOT / "configs").glob("*/*.yaml") if path.parent.name != "studies"]
    expected = {f"{path.parent.name}/{path.name}" for path in files}
    assert set(re.findall(r"^### (\S+)$", page, re.MULTILINE)) == expected


OVERLAY = """\
# One line of text,
# and `a|b` more [of it] than 3 < 4; see docs/evidence.md.
#
#   python -m monai.bundle run \\
#     --epochs 3

# not part of the opening
rate: 1.0e-2      # how fast
plain: word
long: [1, 2]      # a comment
                  # that goes on
  # and one that does not
dropout: null     # off
scale: '@rate'
'off': 'off'
encoder:
  width: 8        # wide
method:
  _target_: my.Method
  rate: '@rate'
network_def#_target_: my.Network
run:
- $@go()
+imports:
- $import os
"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("*_FLAIR*.nii.gz", "\\*\\_FLAIR\\*.nii.gz"),
        ("val_interval of `a_ *b*`", "val_interval of `a_ *b*`"),
        ("docs/no_such_page.md, docs/methods.md", "docs/no_such_page.md, [docs/methods.md](../methods.md)"),
    ],
)
def test_plain_text_stays_what_it_is(text: str, expected: str, script: ModuleType) -> None:
    assert script.prose(text) == expected


def test_an_overlay_is_taken_to_pieces(script: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "overlay.yaml"
    path.write_text(OVERLAY)
    overlay = script.read_overlay(path)
    assert overlay.text == (
        "One line of text, and `a\N{DIVIDES}b` more \\[of it\\] than 3 &lt; 4; "
        "see [docs/evidence.md](../evidence.md).\n\n"
        "```bash\npython -m monai.bundle run \\\n  --epochs 3\n```"
    )
    assert [(s.key, s.value, s.comment) for s in overlay.settings] == [
        ("rate", "1.0e-2", "how fast"),
        ("plain", "word", ""),
        ("long", "[1, 2]", "a comment that goes on"),
        ("scale", "@rate", ""),
        ("off", "'off'", ""),
        ("encoder#width", "8", "wide"),
    ]
    assert overlay.builds == {"method": "my.Method", "network_def": "my.Network"}
    assert (overlay.off, overlay.replaces, overlay.adds) == (["dropout"], ["run"], ["imports"])


def test_a_first_block_that_is_not_there_is_an_error(script: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "bundle.yaml"
    path.write_text("imports: [$import os]\nepochs: 3\ncases: {_target_: load}\n")
    assert [s.key for s in script.first_block(path, "cases")] == ["epochs"]
    with pytest.raises(ValueError, match="has no key 'split'"):
        script.first_block(path, "split")
    with pytest.raises(ValueError, match="has no setting before 'epochs'"):
        script.first_block(path, "epochs")


# ----------------------------------------------------------------------------- Python


def test_every_public_name_is_there_with_its_first_line() -> None:
    page = (ROOT / "docs/reference/handlers.md").read_text(encoding="utf-8")
    for module in (methods, handlers):
        found = {row[0].strip("`"): row[1] for row in rows(section(page, module.__name__))}
        assert set(found) == set(module.__all__)
    assert found["BestModel"] == (handlers.BestModel.__doc__ or "").splitlines()[0].replace("``", "`")


def test_a_public_name_without_a_docstring_is_an_error(script: ModuleType) -> None:
    class Documented:
        """Does :class:`~monai_cggm.methods.CGGM` things to ``a|b``."""

    class Silent(Documented):
        pass

    assert script.summary(Documented) == "Does `CGGM` things to `a\N{DIVIDES}b`."
    assert script.summary({"WT": 1}) == "A constant: `WT`."
    with pytest.raises(ValueError, match=r"Silent has no docstring"):
        script.summary(Silent)
