# SPDX-License-Identifier: Apache-2.0
"""Networks of runs on one modality alone: loaded, refused, and trained first."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from monai.bundle import ConfigParser
from torch import nn

from monai_cggm.data.phantom import write_phantoms
from monai_cggm.errors import DataError
from monai_cggm.methods import teachers
from monai_cggm.methods.teachers import ensure_teachers, load_networks, load_teachers, network_builder, run_folder
from tests.bundles.running import TINY, run
from tests.methods import toy

NAMES = ("flair", "t1ce", "t1")


def build(modalities):
    return toy.ToyNetwork(modalities)


def write_run(folder, modalities, seed=0):
    torch.manual_seed(seed)
    network = build(modalities)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"model": network.state_dict(), "epoch": 3}, folder / "model.pt")
    return network


def test_teachers_are_the_encoders_of_the_runs(tmp_path):
    networks = {m: write_run(tmp_path / f"alone_{m}", [m], seed) for seed, m in enumerate(NAMES)}
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    found = load_teachers(f"{tmp_path}/alone_{{modality}}", NAMES, build)
    assert torch.equal(torch.rand(4), expected)  # building them has cost the run no random number
    assert list(found) == list(NAMES)
    x = torch.randn(2, 1, 5, 5)
    for name, teacher in found.items():
        assert torch.equal(teacher(x), networks[name].encoders[name](x))
        assert not teacher.training
        assert not any(p.requires_grad for p in teacher.parameters())


def test_all_that_is_wrong_is_said_at_once(tmp_path):
    write_run(tmp_path / "flair", ["flair"])
    (tmp_path / "t1ce").mkdir()
    torch.save({"weights": 1}, tmp_path / "t1ce" / "model.pt")
    write_run(tmp_path / "t1", ["t2"])
    write_run(tmp_path / "t2", ["t2"])
    wide = toy.ToyNetwork(["pd"], width=9)
    (tmp_path / "pd").mkdir()
    torch.save({"model": wide.state_dict()}, tmp_path / "pd" / "model.pt")
    (tmp_path / "swi").mkdir()
    (tmp_path / "swi" / "model.pt").write_bytes(b"no model")
    with pytest.raises(DataError) as error:
        load_teachers(f"{tmp_path}/{{modality}}", ["flair", "t1ce", "t1", "t2", "pd", "swi", "dwi"], build)
    problems = error.value.problems
    assert [problem.split(":")[0].split()[1] for problem in problems] == ["t1ce", "t1", "pd", "swi", "dwi"]
    assert "expected a dictionary with the weights under 'model', got KeyError" in problems[0]
    assert "not those of this network: encoders.t1.0.weight is missing" in problems[1]
    assert "trunk.0.weight has shape (9, 3, 1, 1), expected (5, 3, 1, 1)" in problems[2]
    assert "expected a dictionary with the weights under 'model'" in problems[3]
    assert "there is no model.pt; expected the folder of a finished run of methods/unimodal.yaml" in problems[4]
    assert all(f"({tmp_path}/" in problem for problem in problems)
    more = toy.ToyNetwork(["flair"])
    more.another = nn.Linear(1, 1)
    torch.save({"model": more.state_dict()}, tmp_path / "flair" / "model.pt")
    with pytest.raises(DataError, match=r"another\.weight is not a part of it"):
        load_networks(f"{tmp_path}/{{modality}}", {"flair": ["flair"]}, build)


def test_a_pattern_needs_a_place_for_the_modality():
    assert run_folder("a/{modality}/b", "t1") == Path("a/t1/b")
    with pytest.raises(ValueError, match=r"a path with \{modality\} in it, .* got 'runs/alone'"):
        run_folder("runs/alone", "t1")


# ------------------------------------------------------------------ in a bundle's configuration


def parser_of(tmp_path, **content):
    """A configuration as a bundle has it: references, a split, parts that are switched on."""
    return ConfigParser(
        {
            "_meta_": {"version": "1"},
            "imports": [
                "$from monai_cggm.methods.teachers import ensure_teachers",
                "$from tests.methods.toy import ToyNetwork",
            ],
            "modalities": list(NAMES),
            "seed": 7,
            "epochs": 5,
            "width": 6,
            "run_dir": str(tmp_path / "run"),
            "teacher_runs": "$@run_dir + '/teachers/{modality}'",
            "train_teachers": True,
            "dropout": {"_target_": "no.such.Thing"},
            "split": {part: [{"case": f"{part}0"}] for part in ("train", "validation", "test")},
            "network_def": {"_target_": "tests.methods.toy.ToyNetwork", "modalities": "@modalities", "width": "@width"},
            "build": {"_target_": "monai_cggm.methods.teachers.network_builder"},
            "ensure": "$ensure_teachers(@teacher_runs, @modalities, train=@train_teachers)",
            "ensure_joint": "$ensure_teachers(@teacher_runs, @modalities, train=@train_teachers, joint=True)",
            **content,
        }
    )


class Launched:
    """Stands for the child processes: notes what each was told, and does what training does to the folder."""

    def __init__(self, fail=()):
        self.commands = []
        self.fail = fail

    def __call__(self, command, log):
        self.commands.append(list(command))
        if log.parent.name in self.fail:
            log.write_text("epoch 1\nValueError: no cases\n\n")
            return 1
        (log.parent / "checkpoints").mkdir(exist_ok=True)
        (log.parent / "checkpoints" / "epoch_0005.pt").touch()
        (log.parent / "model.pt").touch()
        return 0


@pytest.fixture
def launched(monkeypatch):
    launch = Launched()
    monkeypatch.setattr(teachers, "_start", launch)
    return launch


def test_the_builder_makes_the_bundle_s_network_for_other_modalities(tmp_path):
    parser = parser_of(tmp_path)
    made = parser.get_parsed_content("build")
    assert list(parser.get_parsed_content("network_def").encoders) == list(NAMES)
    alone = made(["t1"])
    assert list(alone.encoders) == ["t1"]
    assert alone.head.in_channels == 6
    with pytest.raises(RuntimeError, match="network_builder reads the configuration of a MONAI bundle"):
        network_builder()


def test_missing_runs_are_trained_by_the_run_s_own_configuration(tmp_path, launched):
    parser = parser_of(tmp_path)
    parser.get_parsed_content("network_def")  # what has been made already must not get into the files
    parser.get_parsed_content("ensure_joint")
    assert len(launched.commands) == 4
    for name, command in zip((*NAMES, "joint"), launched.commands, strict=True):
        folder = tmp_path / "run" / "teachers" / name
        assert command[1:4] == ["-m", "monai.bundle", "run"]
        base, overlay, settings = map(Path, yaml.safe_load(command[-1]))
        assert overlay.name == ("joint.yaml" if name == "joint" else "unimodal.yaml")
        merged = {}
        for file in (base, overlay, settings):
            merged |= yaml.safe_load(file.read_text())
        assert merged["modalities"] == (list(NAMES) if name == "joint" else [name])
        assert (merged["run_dir"], merged["resume"], merged["method"]) == (str(folder), True, None)
        assert merged["dropout"] is merged["auxiliary"] is merged["distillation"] is merged["teacher_runs"] is None
        assert (merged["seed"], merged["epochs"], merged["train_teachers"]) == (7, 5, False)
        assert merged["network_def"]["modalities"] == "@modalities"
        assert "_meta_" not in merged
        split = json.loads(Path(merged["split_file"]).read_text())
        assert split == {"seed": 7, "train": ["train0"], "validation": ["validation0"], "test": ["test0"]}
        # nothing is trained for a run that is trained first
        assert ConfigParser(merged).get_parsed_content("ensure") is None
    assert len(launched.commands) == 4


def test_what_has_ended_is_kept_and_what_was_killed_goes_on(tmp_path, launched):
    parser_of(tmp_path).get_parsed_content("ensure")
    parser_of(tmp_path).get_parsed_content("ensure")
    assert len(launched.commands) == 3
    (tmp_path / "run" / "teachers" / "t1ce" / "finished").unlink()
    parser_of(tmp_path).get_parsed_content("ensure")
    assert len(launched.commands) == 4
    assert "t1ce" in launched.commands[-1][-1]


def test_runs_of_one_s_own_are_kept(tmp_path, launched):
    """A folder with model.pt and no checkpoints, as a comparison leaves it, is not trained again."""
    for name in NAMES:
        write_run(tmp_path / f"alone_{name}", [name])
    parser_of(tmp_path, teacher_runs=f"{tmp_path}/alone_{{modality}}").get_parsed_content("ensure")
    assert not launched.commands


def split_of(**parts):
    return {part: [{"case": case} for case in parts.get(part, ())] for part in ("train", "validation", "test")}


@pytest.mark.parametrize(
    ("theirs", "told"),
    [
        ({"train": "ab", "validation": "c", "test": "d"}, None),
        ({"train": "a", "validation": "b", "test": "cd"}, None),  # chosen on what this run learns from: no harm
        ({"train": "abd", "validation": "c"}, "used 1 cases for train that are this run's test cases, the first is d"),
        ({"train": "ac", "validation": "b"}, "for train that are this run's validation cases, the first is c"),
        ({"train": "ab", "validation": "cde"}, "used 2 cases for validation that are this run's test cases"),
    ],
)
@pytest.mark.parametrize("train", [False, True])
def test_runs_that_have_seen_what_scores_this_one_are_refused(theirs, told, train, tmp_path):
    for name in NAMES:
        write_run(tmp_path / name, [name])
    (tmp_path / "t1ce" / "split.json").write_text(json.dumps({part: list(cases) for part, cases in theirs.items()}))
    mine = split_of(train="ab", validation="c", test="de")
    if told is None:
        ensure_teachers(f"{tmp_path}/{{modality}}", NAMES, train=train, split=mine)
        return
    with pytest.raises(DataError) as error:
        ensure_teachers(f"{tmp_path}/{{modality}}", NAMES, train=train, split=mine)
    (problem,) = error.value.problems
    assert problem.startswith("modality t1ce: its run ")
    assert told in problem
    assert problem.endswith(f"({tmp_path}/t1ce/split.json)")


@pytest.mark.parametrize("train", [False, "false"])
def test_without_the_flag_all_that_is_missing_is_named(tmp_path, train):
    write_run(tmp_path / "t1ce", ["t1ce"])
    with pytest.raises(DataError, match="train_teachers: true") as error:
        ensure_teachers(f"{tmp_path}/{{modality}}", NAMES, train=train, joint=True)
    assert [problem.split(":")[0] for problem in error.value.problems] == [
        "modality flair",
        "modality t1",
        "modality joint",
    ]
    assert "methods/joint.yaml" in error.value.problems[-1]


def test_a_training_that_fails_is_told_by_its_last_line(tmp_path, monkeypatch):
    launch = Launched(fail=["t1ce"])
    monkeypatch.setattr(teachers, "_start", launch)
    with pytest.raises(RuntimeError) as error:
        parser_of(tmp_path).get_parsed_content("ensure")
    causes = [error.value]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    assert isinstance(causes[-1], DataError)
    assert "modality t1ce: its training ended with exit code 1; last line: ValueError: no cases" in str(causes[-1])
    assert len(launch.commands) == 2
    assert not (tmp_path / "run" / "teachers" / "t1ce" / "finished").exists()


def test_several_processes_train_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(teachers.idist, "get_world_size", lambda: 2)
    with pytest.raises(DataError, match="cannot be trained by several processes: flair, t1ce, t1"):
        ensure_teachers(f"{tmp_path}/{{modality}}", NAMES, train=True)


def test_outside_a_bundle_there_is_nothing_to_train_by(tmp_path):
    with pytest.raises(RuntimeError, match="ensure_teachers reads the configuration of a MONAI bundle"):
        ensure_teachers(f"{tmp_path}/{{modality}}", NAMES, train=True)


@pytest.mark.slow
def test_runs_that_train_their_teachers_first(tmp_path):
    """UMT trains the two modalities alone; G-Blending keeps them and trains the joint one."""
    write_phantoms(tmp_path / "in", cases=6, shape=(40, 44, 20), spacing=4.0)
    settings = {
        **TINY, "dataset_dir": str(tmp_path / "in"), "modalities": ["flair", "t1ce"], "train_teachers": True,
        "teacher_runs": str(tmp_path / "teachers" / "{modality}"),
    }  # fmt: skip
    rows = {}
    for name in ("pmr", "umt", "g_blending"):
        run("train.yaml", f"methods/{name}.yaml", **settings, run_dir=str(tmp_path / name))
        table = np.genfromtxt(tmp_path / name / "iterations.csv", delimiter=",", names=True)
        rows[name] = table
    assert sorted(p.name for p in (tmp_path / "teachers").iterdir()) == ["flair", "joint", "t1ce"]
    # training and loading them has not changed what the run itself begins with
    assert rows["umt"]["losstask"][0] == rows["g_blending"]["losstask"][0] == rows["pmr"]["losstask"][0]
    assert rows["umt"]["lossteachers"].min() > 0
    log = (tmp_path / "teachers" / "flair" / "log.txt").read_text()
    assert log.count("training starts from scratch") == 1
    weights = [rows["g_blending"][f"blending{m}"] for m in ("flair", "t1ce", "fusion")]
    assert np.sum(weights, axis=0) == pytest.approx(1.0)
    splits = [
        json.loads((tmp_path / f / "split.json").read_text()) for f in ("umt", "teachers/flair", "teachers/joint")
    ]
    assert splits[0] == splits[1] == splits[2]
