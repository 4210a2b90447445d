# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import pytest
import yaml

from monai_cggm.compare import read_study
from monai_cggm.errors import DataError
from monai_cggm.resources import share_path

TRAIN = "bundles/brats_cggm/configs/train.yaml"
EVALUATE = "bundles/brats_cggm/configs/evaluate.yaml"


def written(tmp_path, **changes):
    content = {
        "title": "trial",
        "reference": "joint",
        "config": [TRAIN],
        "evaluation": [EVALUATE],
        "settings": {"epochs": 4},
        "seeds": [0, 1, 2],
        "arms": {
            "joint": {"overlays": ["configs/methods/joint.yaml"]},
            "recipe": {"title": "ours", "overlays": ["configs/parts/dropout.yaml"], "controls": {"uniform": "joint"}},
            "plain": None,
        },
        **changes,
    }
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in content.items() if v is not None}, sort_keys=False))
    return path


def problems(path, **kwargs):
    with pytest.raises(DataError) as error:
        read_study(path, **kwargs)
    return error.value.problems


def test_a_study_is_every_arm_on_every_split_with_every_seed(tmp_path):
    study = read_study(written(tmp_path))
    cells = study.cells([Path("a/one.json"), Path("two.json")])
    assert len(cells) == 3 * 2 * 3
    assert cells[0].folder == "joint/one-seed0"
    # seed by seed, so that what is there when it is stopped is paired
    assert [c.seed for c in cells] == sorted(c.seed for c in cells)
    assert {c.folder for c in cells} == {
        f"{arm}/{split}-seed{seed}"
        for arm in ("joint", "recipe", "plain")
        for split in ("one", "two")
        for seed in (0, 1, 2)
    }
    assert study.arms["recipe"].title == "ours"
    assert study.arms["recipe"].controls == {"uniform": "joint"}
    assert study.modalities == ("flair", "t1ce", "t1", "t2")
    assert study.ensembles([Path("one.json")]) == []


def test_arms_seeds_and_settings_from_the_command_line(tmp_path):
    study = read_study(written(tmp_path), arms=["recipe"], seeds=[7], settings={"epochs": 9, "momentum": 0.0})
    assert list(study.arms) == ["joint", "recipe"]
    assert study.seeds == (7,)
    assert study.settings == {"epochs": 9, "momentum": 0.0}
    assert study.described()["arms"]["recipe"]["controls"] == {"uniform": "joint"}


def test_an_arm_brings_in_its_controls(tmp_path):
    """Without them nothing could be said of it; theirs do not come along."""
    arms = {
        "joint": None,
        "dropout": None,
        "plain": {"controls": {"without": "dropout"}},
        "recipe": {"controls": {"uniform": "plain"}},
    }
    assert list(read_study(written(tmp_path, arms=arms), arms=["recipe"]).arms) == ["joint", "plain", "recipe"]
    assert list(read_study(written(tmp_path, arms=arms), arms=["plain"]).arms) == ["joint", "dropout", "plain"]


def test_each_modality_alone_and_their_ensemble(tmp_path):
    study = read_study(written(tmp_path, alone=True, settings={"modalities": ["t1", "t2"]}))
    assert list(study.arms) == ["joint", "recipe", "plain", "alone_t1", "alone_t2"]
    assert study.arms["alone_t2"].settings == {"modalities": ["t2"]}
    assert [c.folder for c in study.ensembles([Path("s.json")])] == [f"ensemble/s-seed{n}" for n in (0, 1, 2)]
    # without all of its members there is no ensemble
    some = read_study(written(tmp_path, alone=True), arms=["recipe", "alone_t1"])
    assert list(some.arms) == ["joint", "recipe", "alone_t1"]
    assert some.alone
    assert some.ensembles([Path("s.json")]) == []
    assert not read_study(written(tmp_path, alone=True), arms=["recipe"]).alone


def test_the_ensemble_as_a_control(tmp_path):
    """It brings in its members; without them there is none to name."""
    arms = {"joint": None, "recipe": {"controls": {"ensemble": "ensemble"}}, "plain": None}
    values = {"arms": arms, "settings": {"modalities": ["t1", "t2"]}}
    assert list(read_study(written(tmp_path, alone=True, **values), arms=["recipe"]).arms) == [
        *("joint", "recipe", "alone_t1", "alone_t2")
    ]
    assert list(read_study(written(tmp_path, alone=True, **values), arms=["plain"]).arms) == ["joint", "plain"]
    with pytest.raises(DataError, match=r"'ensemble' as its control ensemble.*an ensemble there is with alone: true"):
        read_study(written(tmp_path, **values))


def needing(**needs):
    arms = {"joint": None, "umt": {"needs": "alone"}, "blending": {"needs": ["alone", "joint"]}, "plain": None}
    return {"alone": True, "arms": {name: {**(arms[name] or {}), **needs.get(name, {})} for name in arms}}


def test_an_arm_brings_in_what_it_needs(tmp_path):
    path = written(tmp_path, **needing(), settings={"modalities": ["t1", "t2"]})
    study = read_study(path, arms=["umt"])
    assert list(study.arms) == ["joint", "umt", "alone_t1", "alone_t2"]
    assert study.alone
    other = written(tmp_path, **needing(), settings={"modalities": ["t1", "t2"]}, reference="plain")
    assert list(read_study(other, arms=["blending"]).arms) == ["joint", "blending", "plain", "alone_t1", "alone_t2"]
    cells = {cell.arm.name: cell for cell in read_study(path, seeds=[4]).cells([Path("s.json")])}
    needed = {name: {key: c.folder for key, c in study.needed_by(cells[name]).items()} for name in ("umt", "joint")}
    assert needed == {"umt": {"t1": "alone_t1/s-seed4", "t2": "alone_t2/s-seed4"}, "joint": {}}
    needed = {key: c.folder for key, c in study.needed_by(cells["blending"]).items()}
    assert needed == {"t1": "alone_t1/s-seed4", "t2": "alone_t2/s-seed4", "joint": "joint/s-seed4"}
    described = study.described()["arms"]
    assert (described["umt"]["needs"], "needs" in described["joint"]) == (["alone"], False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({**needing(), "alone": False}, "umt needs one network a modality, which a study has with alone: true"),
        (needing(umt={"needs": "joined"}), "umt needs 'joined', which is neither another arm nor alone"),
        (needing(umt={"needs": ["umt"]}), "umt needs 'umt', which is neither another arm nor alone"),
        (needing(plain={"needs": ["umt"]}), "plain needs umt, which needs others itself"),
        (needing(umt={"needs": 3}), "umt: needs must be alone, or a list of that and arms, found 3"),
        ({"arms": {"joint": None, "alone": None}}, "arm alone is reserved"),
    ],
)
def test_refuses_needs_that_cannot_be_met(tmp_path, changes, message):
    assert message in "\n".join(problems(written(tmp_path, **changes)))


def test_another_score_than_dice(tmp_path):
    study = read_study(written(tmp_path, score="accuracy"))
    assert study.score == "accuracy"
    assert study.described()["score"] == "accuracy"
    assert "convention" not in study.described()
    assert read_study(written(tmp_path, score="absolute_error")).score == "absolute_error"
    dice = read_study(written(tmp_path)).described()
    assert (dice["score"], dice["convention"]) == ("dice_mean", "brats_legacy")
    # a study over one of Dice takes its convention back
    base = written(tmp_path, convention="monai")
    (tmp_path / "other.yaml").write_text(f"base: {base}\nscore: accuracy\nconvention: null\n")
    assert read_study(tmp_path / "other.yaml").score == "accuracy"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"score": "hd95_WT"}, "score must be a column from 0 to 1, such as accuracy, or absolute_error"),
        ({"score": ["accuracy"]}, "score must be a column from 0 to 1, such as accuracy, or absolute_error"),
        ({"score": "accuracy", "convention": "monai"}, "convention is for Dice and says nothing of accuracy"),
    ],
)
def test_refuses_scores(tmp_path, changes, message):
    assert message in "\n".join(problems(written(tmp_path, **changes)))


@pytest.mark.parametrize("left_open", ["null", "$found_in(@dataset_dir)"])
def test_modalities_that_the_configuration_leaves_open_come_from_the_settings(tmp_path, left_open):
    (tmp_path / "train.yaml").write_text(f"modalities: {left_open}\nepochs: 3\nseed: 0\n")
    changes = {"config": [str(tmp_path / "train.yaml")], "arms": {"joint": None}, "alone": True}
    (message,) = problems(written(tmp_path, **changes))
    assert "modalities are not named by the configuration files: give the settings a list of them" in message
    assert str(tmp_path / "study.yaml") in message
    study = read_study(written(tmp_path, **changes, settings={"modalities": ["view1", "view2"]}))
    assert study.modalities == ("view1", "view2")
    assert list(study.arms) == ["joint", "alone_view1", "alone_view2"]
    assert study.key_modality is None


def test_a_study_over_another_one(tmp_path):
    base = written(tmp_path)
    changed = {"base": str(base), "seeds": [5], "settings": {"momentum": 0.2}}
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(changed))
    study = read_study(tmp_path / "other.yaml")
    assert list(study.arms) == ["joint", "recipe", "plain"]
    assert study.seeds == (5,)
    assert study.settings == {"momentum": 0.2}  # a key is replaced as a whole


def test_bases_of_bases_and_circles(tmp_path):
    first = written(tmp_path)
    (tmp_path / "two.yaml").write_text(yaml.safe_dump({"base": str(first), "seeds": [5]}))
    (tmp_path / "three.yaml").write_text(yaml.safe_dump({"base": str(tmp_path / "two.yaml"), "title": "third"}))
    study = read_study(tmp_path / "three.yaml")
    assert (study.title, study.seeds, study.reference) == ("third", (5,), "joint")
    (tmp_path / "a.yaml").write_text(yaml.safe_dump({"base": str(tmp_path / "b.yaml")}))
    (tmp_path / "b.yaml").write_text(yaml.safe_dump({"base": str(tmp_path / "a.yaml")}))
    assert "is its own base" in problems(tmp_path / "a.yaml")[0]


def test_settings_may_reach_into_parts(tmp_path):
    assert read_study(written(tmp_path, settings={"encoder#width": 4})).settings == {"encoder#width": 4}


def test_everything_that_is_wrong_is_said_at_once(tmp_path):
    arms = {
        "joint": None,
        "Bad Name": None,
        "alone_t1": None,
        "x": {"controls": {"uniform": "y", "constant": "x"}, "sead": 1},
        "y1": {"overlays": "configs/methods/joint.yaml", "controls": ["joint"]},
    }
    changes = {"reference": "other", "part": "train", "convention": "brats_legcy", "seeds": [0, 0]}
    found = "\n".join(problems(written(tmp_path, arms=arms, **changes)))
    for part in (
        "'Bad Name' must be named by a-z",
        "alone_t1 is reserved",
        "reference 'other' is not among the arms",
        "x names 'y' as its control uniform, which is no other arm",
        "x names 'x' as its control constant, which is no other arm",
        "y1: overlays must be a list of files, found 'configs/methods/joint.yaml'",
        "y1: controls must be roles and arms, such as uniform: joint",
        "convention must be one of brats_legacy",
        "seeds must be different whole numbers, one at least, found [0, 0]",
        "x has unknown sead",
        "part must be validation or test, found 'train'",
    ):
        assert part in found


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": {}}, "has no 'arms'"),
        ({"config": None}, "has no 'config'"),
        ({"seed": [1]}, "unknown seed"),
        ({"seeds": []}, "seeds must be different whole numbers"),
        ({"seeds": "0"}, "seeds must be different whole numbers"),
        ({"seeds": [True]}, "seeds must be different whole numbers"),
        ({"arms": ["joint"]}, "arms must be names with keys"),
        ({"arms": {"joint": ["a"]}}, "arms must be names with keys"),
        ({"arms": {"joint": {"overlays": ["configs/nowhere.yaml"]}}}, "no file configs/nowhere.yaml"),
        ({"key_modality": "t1c"}, "key_modality must be one of flair, t1ce, t1, t2, found 't1c'"),
        ({"settings": {"epochz": 3}}, "the settings has 'epochz', which is in none of the configuration files"),
        ({"arms": {"joint": {"settings": {"rho": 0.5}}}}, "arm joint has 'rho'"),
    ],
)
def test_refuses(tmp_path, changes, message):
    assert message in "\n".join(problems(written(tmp_path, **changes)))


def test_refuses_an_arm_that_is_not_there(tmp_path):
    assert "has no arm dropuot; it has joint, recipe, plain" in problems(written(tmp_path), arms=["dropuot"])[0]


def test_refuses_what_is_no_study(tmp_path):
    assert "there is no study nowhere" in problems("nowhere")[0]
    path = tmp_path / "s.yaml"
    path.write_text("[1, 2")
    assert "is no YAML" in problems(path)[0]
    path.write_text("[1, 2]")
    assert "expected keys such as arms" in problems(path)[0]


@pytest.mark.parametrize("name", sorted(p.stem for p in share_path("configs/studies").glob("*.yaml")))
def test_the_studies_that_come_along_are_sound(name):
    study = read_study(name)
    assert study.reference in study.arms
    for arm in study.arms.values():
        assert set(arm.controls.values()) <= {*study.arms, "ensemble"}
