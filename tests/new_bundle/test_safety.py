# SPDX-License-Identifier: Apache-2.0
"""Names of people's files, labels and modalities are names: no configuration that is made of them runs anything."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from monai.bundle import ConfigParser

from monai_cggm.discovery import discover
from monai_cggm.errors import DataError
from monai_cggm.new_bundle import Wishes, new_bundle
from tests.bundles.running import TINY, run
from tests.new_bundle.folders import PATIENTS, folders, nnunet, save, volumes

PROGRAM = "$__import__('pathlib').Path('pwned').touch()"
#: names that a parser of configurations takes for a program, a reference, another file's content; and odd ones
NAMES = (PROGRAM, "@network", "%x", "a b;c\nd: $print(1)", "x..%2e", "-rf", "null", "{a: 1}", "#!", "'\"")


KEYS = {"T2": "T2", "ADC": "ADC", "label": "seg"}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder, in which a program would leave a file."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


def nothing_ran(root: Path) -> bool:
    return not list(root.rglob("pwned"))


def tree(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in root.rglob("*")}


#: what of the configurations is neither a network nor a run
PARSED = ("modalities", "labels", "num_classes", "regions", "dataset_dir", "split_file", "orientation")
PARSED += ("encoder", "cache_dir", "cross_entropy_weight", "preprocessing", "cases", "split", ConfigParser.meta_key)


def parsed(folder: Path) -> None:
    """Resolve a bundle's configurations as MONAI's tools do, metadata included; no text of ours is taken for code."""
    metadata = json.loads((folder / "configs/metadata.json").read_text())
    for name in ("train.yaml", "inference.yaml"):
        parser = ConfigParser()
        parser.read_config(str(folder / "configs" / name))
        parser.read_meta(metadata)
        parser["bundle_root"] = str(folder)
        for key in PARSED:
            if key in parser:
                parser.get_parsed_content(key)
        assert parser.get_parsed_content(ConfigParser.meta_key) == metadata
    for path in (*folder.glob("*.json"), *folder.glob("*.yaml"), folder / "configs/metadata.json"):
        texts = strings(yaml.safe_load(path.read_text(encoding="utf-8")))
        assert not [text for text in texts if text[:1] in ("$", "@", "%")], path


def strings(value: object) -> list[str]:
    if isinstance(value, dict):
        return [text for pair in value.items() for part in pair for text in strings(part)]
    if isinstance(value, list):
        return [text for part in value for text in strings(part)]
    return [value] if isinstance(value, str) else []


def trains(folder: Path, out: Path) -> None:
    tiny = {key: value for key, value in TINY.items() if key not in ("split_sizes", "encoder")}
    network = {"encoder#width": 4, "encoder#aspp_channels": 8, "memory_format": "$torch.contiguous_format"}
    run(
        str(folder / "configs/train.yaml"), bundle_root=str(folder), run_dir=str(out),
        **{**tiny, **network, "epochs": 1, "image_interval": 1, "val_interval": 1, "warmup_epochs": 0},
    )  # fmt: skip
    assert (out / "epochs.csv").is_file()


def test_a_program_in_a_configuration_would_be_seen(here):
    ConfigParser({"title": PROGRAM}).get_parsed_content("title")
    assert not nothing_ran(here)


@pytest.mark.slow
@pytest.mark.parametrize("copy", [True, False])
def test_names_of_folders_and_files(copy, here):
    source = here / "data"
    for number, name in enumerate(NAMES):
        images, label = volumes(number)
        place = source / name
        for ending, voxels in (("T2", images[0]), ("ADC", images[1]), ("seg", label)):
            save(place / f"{NAMES[-1 - number]}_{ending}.nii.gz", voxels)
    before = tree(here)
    found = discover(source)
    assert found.modalities == ("adc", "t2")
    bundle = new_bundle(found, here / "bundle", Wishes(network="small"), copy=copy, progress=False)
    parsed(bundle.folder)
    assert {path.split("/")[0] for path in tree(here) - before} == {"bundle"}
    trains(bundle.folder, here / "bundle/run")
    assert {path.split("/")[0] for path in tree(here) - before} == {"bundle"}
    assert nothing_ran(here)
    items = json.loads((bundle.folder / "datalist.json").read_text())["training"]
    assert len({item["case"] for item in items}) == len(NAMES)


def test_names_in_a_datalist(here):
    folders(here / "data")
    ids, patients = ("..", PROGRAM, "../../x", "@run"), ("../..", "%y", PROGRAM, "$")
    entries = []
    for number, patient in enumerate(PATIENTS):
        files = {key: f"data/{patient}/{patient}_{name}.nii.gz" for key, name in KEYS.items()}
        names = {"case": ids[number], "patient": patients[number], "labels": PROGRAM, "fold": PROGRAM, PROGRAM: PROGRAM}
        entries.append({**names, **files})
    (here / "list.json").write_text(json.dumps({"training": entries}))
    before = tree(here)
    bundle = new_bundle(
        discover(here / "list.json"), here / "bundle", Wishes(network="small"), copy=True, progress=False
    )
    assert {path.split("/")[0] for path in tree(here) - before} == {"bundle"}
    items = json.loads((bundle.folder / "datalist.json").read_text())["training"]
    assert all(item["case"][0].isalnum() and item["patient"][0].isalnum() for item in items)
    # a datalist's convention stays a text, which nothing evaluates: train.yaml spells its own out
    assert {item["labels"] for item in items} == {PROGRAM}
    for item in items:
        del item["labels"]
    (bundle.folder / "datalist.json").write_text(json.dumps({"training": items}))
    parsed(bundle.folder)
    assert nothing_ran(here)


@pytest.mark.slow
def test_names_in_dataset_json(here):
    source = nnunet(here / "data")
    content = json.loads((source / "dataset.json").read_text())
    content |= {
        "channel_names": {"0": PROGRAM, "1": "@network"},
        "labels": {"background": 0, "$print(1)": 1, "@loss": 2, "%x": 3, "mean": 4, "腫瘍": 5},
        "name": PROGRAM,
        "description": "@run",
    }
    (source / "dataset.json").write_text(json.dumps(content))
    bundle = new_bundle(discover(source), here / "bundle", Wishes(network="small"), progress=False)
    parsed(bundle.folder)
    config = yaml.safe_load((bundle.folder / "configs/train.yaml").read_text())
    assert list(config["regions"]) == ["print_1", "loss", "x", "mean_4", "label_5"]
    assert len(config["modalities"]) == len(set(config["modalities"])) == 2
    trains(bundle.folder, here / "bundle/run")
    assert nothing_ran(here)


def test_names_that_a_user_gives(here):
    source = folders(here / "data")
    with pytest.raises(DataError, match="expected names of modalities such as"):
        discover(source, patterns={PROGRAM: "*T2*", "adc": "*ADC*"})
    found = discover(source)
    for title in (PROGRAM, "@x", "%x", "a\nb: 1", "a\u2028$b: 1", "a\x85$b", "bell\a", "nul\0", " a"):
        with pytest.raises(ValueError, match="title must be one line"):
            new_bundle(found, here / "bundle", Wishes(title=title), progress=False)
    with pytest.raises(DataError, match="expected a name of letters, digits and _"):
        new_bundle(found, here / "bundle", Wishes(regions={PROGRAM: [1]}), progress=False)
    assert not (here / "bundle").exists()
    title = "Zoë's: {a} # $x @y %z \"q\" 'r' – 3 mm"
    bundle = new_bundle(found, here / "$x @y", Wishes(title=title, network="small"), progress=False)
    assert json.loads((bundle.folder / "configs/metadata.json").read_text())["name"] == title
    assert yaml.safe_load((bundle.folder / "study.yaml").read_text())["title"] == title
    parsed(bundle.folder)
    assert nothing_ran(here)
