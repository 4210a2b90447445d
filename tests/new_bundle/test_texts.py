# SPDX-License-Identifier: Apache-2.0
"""Changing configurations as texts says what MONAI's merging of files says."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from monai.bundle import ConfigParser

from monai_cggm.new_bundle.texts import as_text, blocks, headed, overlaid
from monai_cggm.resources import share_path

TRAIN = share_path("bundles/brats_cggm/configs/train.yaml")
OVERLAYS = sorted(
    str(path.relative_to(share_path("configs")))
    for folder in ("hardware", "methods", "parts", "protocols")
    for path in share_path(f"configs/{folder}").glob("*.yaml")
    if "inference" not in path.name
)


@pytest.mark.parametrize("path", sorted(share_path("bundles").rglob("*.yaml")), ids=lambda p: p.parent.parent.name)
def test_the_blocks_of_a_configuration_are_its_keys(path: Path) -> None:
    text = path.read_text()
    parsed = yaml.safe_load(text)
    assert {key: yaml.safe_load(block)[key] for key, block in blocks(text).items()} == parsed


@pytest.mark.parametrize("name", OVERLAYS)
def test_one_file_says_what_the_two_say(name: str, tmp_path: Path) -> None:
    overlay = share_path(f"configs/{name}")
    one = tmp_path / "one.yaml"
    one.write_text(overlaid(TRAIN.read_text(), overlay.read_text()))
    assert ConfigParser.load_config_files(str(one)) == ConfigParser.load_config_files([str(TRAIN), str(overlay)])


def test_comments_stay_with_what_they_are_about() -> None:
    text = "# head\n\n# of a\na: 1  # one\n# of b\nb:\n  c: 1  # inner\n\n  d: 2\n# of e\ne: [1,\n  2]\n"
    changed = overlaid(text, "b: 3  # three\n# of nothing\nz:\n- 1\n")
    assert changed == "# head\n\n# of a\na: 1  # one\n# of b\nb: 3  # three\n# of e\ne: [1,\n  2]\nz:\n- 1\n"
    assert overlaid(text, "b: 3\nz: 1\n", known_only=True) == text.replace("b:\n  c: 1  # inner\n\n  d: 2", "b: 3")


def test_parts_are_replaced_where_they_stand() -> None:
    text = "a:\n  b:\n  - x: 1\n    y: 2\n  # of c\n  c: {d: 1}\nb: 2\n"
    assert overlaid(text, "a#b: 3  # three\n") == "a:\n  b: 3  # three\n  # of c\n  c: {d: 1}\nb: 2\n"
    assert overlaid(text, "a#c:\n  e:\n  - 1\n\n  f: 2\n") == (
        "a:\n  b:\n  - x: 1\n    y: 2\n  # of c\n  c:\n    e:\n    - 1\n\n    f: 2\nb: 2\n"
    )
    # what the other file defines anew has none of the old parts
    assert overlaid(text, "a: {c: 1}\na#c: 2\n") == "a: {c: 1}\nb: 2\na#c: 2\n"


def test_no_key_of_a_patch_bundle_is_set_twice() -> None:
    """Neither what is for slices nor what patches replace stays beside it."""
    patches = share_path("configs/protocols/patches_3d.yaml").read_text()
    whole = overlaid(TRAIN.read_text(), patches)
    assert "RandCropByPosNegLabeld" in whole
    assert "RandSlicesd" not in whole
    assert "SliceInferer" not in whole
    assert [key for key in yaml.safe_load(whole) if "#" in key] == ["encoder#spatial_dims"]


def test_plain_values_are_read_back() -> None:
    values = {
        "names": ["a b", "$not a program", "@nor a reference"],
        "regions": {"WT": [1, 2], "no": [2]},
        "label": "0=0,1=1",
        "none": None,
        "allowed": True,
        "long": list(range(200)),
    }
    text = as_text({key: (value, "a comment") for key, value in values.items()})
    assert yaml.safe_load(text) == values
    assert len(text.splitlines()) == len(values)


def test_another_head() -> None:
    assert headed("# a\n#\n# b\n\n# c\nx: 1\n", "new\n\nhead") == "# new\n#\n# head\n\nx: 1\n"
