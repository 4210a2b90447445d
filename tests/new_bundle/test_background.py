# SPDX-License-Identifier: Apache-2.0
"""Which value is background, and what a bundle's own preparation makes of images that go below 0."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from monai.bundle import ConfigParser
from typer.testing import CliRunner

from monai_cggm.cli import app
from monai_cggm.discovery import CaseSurvey, Intensities, Survey, discover, survey_cases
from monai_cggm.errors import CaseError, DataError
from monai_cggm.new_bundle import NewBundle, Wishes, new_bundle
from monai_cggm.new_bundle.background import choose_floors, with_background
from tests.new_bundle.folders import PATIENTS, save

SHAPE = (24, 20, 6)
#: in Hounsfield units
AIR, FAT, WATER, LESION = -1000, -100, 0, 40


def body() -> np.ndarray:
    """Three layers around a lesion: 0 outside, 1 fat, 2 water, 3 lesion."""
    tissue = np.zeros(SHAPE, np.uint8)
    tissue[3:20, 4:17, 1:5] = 1
    tissue[4:19, 5:16, 1:5] = 2
    tissue[8:12, 9:12, 2:4] = 3
    return tissue


def written(root: Path, images: dict[str, np.ndarray]) -> Path:
    """The same images for every patient, with the lesion as the label."""
    for patient in PATIENTS:
        for name, image in images.items():
            save(root / patient / f"{name}.nii.gz", image)
        save(root / patient / "seg.nii.gz", (body() == 3).astype(np.uint8))
    return root


def ct_and_pet(root: Path) -> Path:
    ct = np.choose(body(), [AIR, FAT, WATER, LESION]).astype(np.int16)
    ct[20:, :2, 3] = 300  # a table, in one corner
    pet = np.choose(body(), [0, 1, 1, 4]).astype(np.float32)
    return written(root, {"CT": ct, "PET": pet})


def made(tmp_path: Path, source: Path, **wishes) -> NewBundle:
    return new_bundle(discover(source), tmp_path / "bundle", Wishes(network="small", **wishes), progress=False)


def prepared(bundle: NewBundle, name: str) -> np.ndarray:
    """The first case's image after the deterministic transforms of a configuration, in the order of the files' axes."""
    parser = ConfigParser()
    parser.read_config(str(bundle.folder / f"configs/{name}.yaml"))
    parser["bundle_root"] = str(bundle.folder)
    parser["dataset_dir"] = str(bundle.folder / "datalist.json")
    case = parser.get_parsed_content("cases" if name == "train" else "dataset#data")[0]
    return parser.get_parsed_content("preprocessing")(case)["image"].numpy().astype(float)


def z_scores(values: np.ndarray, where: np.ndarray) -> np.ndarray:
    return np.where(where, (values - values[where].mean()) / values[where].std(), 0)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> NewBundle:
    """One for CT and PET."""
    root = tmp_path_factory.mktemp("ct")
    return made(root, ct_and_pet(root / "data"))


@pytest.mark.parametrize("name", ["train", "inference"])
def test_ct_keeps_water_and_fat_and_only_air_is_background(name, bundle):
    image = prepared(bundle, name)
    ct = np.choose(body(), [AIR, FAT, WATER, LESION]).astype(float)
    ct[20:, :2, 3] = 300
    box = (slice(3, 24), slice(0, 17), slice(1, 5))  # the body, and the table
    expected = z_scores(ct, ct > AIR)[box]
    np.testing.assert_allclose(image[0], expected, atol=2e-3)  # float16 in training
    layers = [np.unique(image[0][body()[box] == layer]) for layer in range(4)]
    assert all(len(values) == 1 for values in layers[1:])
    fat, water, lesion = (values.item() for values in layers[1:])
    assert 0 != fat < water < lesion
    assert water != 0
    np.testing.assert_allclose(image[1], z_scores(np.choose(body(), [0, 1, 1, 4]), body() > 0)[box], atol=2e-3)


def test_noisy_air_beside_a_scanner_s_padding_is_background(tmp_path):
    """Outside of its circle a scanner writes a number without noise, and inside of it air has noise."""
    noise = np.random.default_rng(0).normal(0, 15, SHAPE)
    ct = np.choose(body(), [AIR, FAT, WATER, LESION]) + np.where(body(), 0, noise)
    for side in (slice(0, 2), slice(-2, None)):
        ct[side, :2] = ct[side, -2:] = -1024
    bundle = made(tmp_path, written(tmp_path / "data", {"CT": ct.astype(np.int16), "PET": body().astype(np.float32)}))
    image = prepared(bundle, "train")
    assert image.shape[1:] == (17, 13, 4)  # the body's
    expected = z_scores(np.choose(body(), [AIR, FAT, WATER, LESION]).astype(float), body() > 0)[3:20, 4:17, 1:5]
    np.testing.assert_allclose(image[0], expected, atol=2e-3)


def test_the_floor_is_a_number_that_a_user_reads_and_changes(bundle):
    for name in ("train", "inference"):
        config = yaml.safe_load((bundle.folder / f"configs/{name}.yaml").read_text())
        assert config["floors"] == {"ct": -900}
        parser = ConfigParser()
        parser.read_config(str(bundle.folder / f"configs/{name}.yaml"))
        parser["floors#ct"] = FAT
        step = next(s for s in parser.get_parsed_content("preprocessing").transforms if "Scale" in type(s).__name__)
        np.testing.assert_array_equal(step({"ct": np.array([[AIR, FAT, WATER]])})["ct"], [[0, 0, 100]])
        assert step({}) == {}
    assert "in ct -900 and below" in (bundle.folder / "docs/README.md").read_text()
    metadata = json.loads((bundle.folder / "configs/metadata.json").read_text())
    assert "-900 and below in ct" in metadata["image_classes"]
    assert bundle.plan.reasons["background of ct"] == "-900 and below: air in Hounsfield units"
    assert "background of pet" not in bundle.plan.reasons
    assert bundle.plan.size == (32, 32)  # of 24 voxels along the longer axis, with the table


@pytest.mark.parametrize("name", ["train", "inference"])
def test_ct_in_other_units_is_refused_by_name(name, tmp_path):
    source = ct_and_pet(tmp_path / "data")
    bundle = made(tmp_path, source)
    shifted = np.choose(body(), [AIR, FAT, WATER, LESION]).astype(np.int16) + 1024
    for patient in PATIENTS:
        save(source / patient / "CT.nii.gz", shifted)
    with pytest.raises(RuntimeError, match="applying transform") as error:
        prepared(bundle, name)
    assert isinstance(error.value.__cause__, CaseError)
    assert "ct has no background: found 24 as its lowest value" in str(error.value.__cause__)


def test_z_scores_around_a_background_of_0_keep_their_dark_rim(tmp_path):
    """Somebody normalised within a mask: the rim of the object is below 0 in every modality, the background 0."""
    t1 = np.choose(body(), [0, -1.5, 0.25, 2]).astype(np.float32)
    bundle = made(tmp_path, written(tmp_path / "data", {"T1": t1, "T2": t1 / 2}))
    expected = z_scores(t1.astype(float), body() > 0)[3:20, 4:17, 1:5]
    for name in ("train", "inference"):
        assert "floors" not in yaml.safe_load((bundle.folder / f"configs/{name}.yaml").read_text())
        np.testing.assert_allclose(prepared(bundle, name), [expected, expected], atol=2e-3)
    assert bundle.plan.reasons["background of t1"].startswith("0: it fills the corners of all volumes")
    assert bundle.plan.size == (32, 32)  # 17 voxels, of which 15 are above 0


def test_corners_are_what_most_of_them_hold(tmp_path):
    survey = survey_cases(discover(ct_and_pet(tmp_path)), progress=False)
    assert survey.cases[0].intensities == {"ct": Intensities(AIR, 300, AIR), "pet": Intensities(0, 4, 0)}
    noisy = np.random.default_rng(0).integers(-1020, -980, (64, 64, 32), dtype=np.int16)
    noisy[8:56, 8:56, 4:28] = 0
    corners = [noisy[x, y, z].max() for x in (slice(2), slice(-2, None)) for y in (slice(2), slice(-2, None))
               for z in (slice(1), slice(-1, None))]  # fmt: skip
    for patient in PATIENTS:
        save(tmp_path / patient / "CT.nii.gz", noisy)
        save(tmp_path / patient / "PET.nii.gz", np.abs(noisy))
        save(tmp_path / patient / "seg.nii.gz", (noisy == 0).astype(np.uint8))
    survey = survey_cases(discover(tmp_path), progress=False)
    assert survey.cases[0].intensities["ct"] == Intensities(noisy.min(), 0, sorted(corners)[3])


def decided(*values: tuple[float, float, float], key: str = "ct", **wanted: float | None) -> dict[str, float]:
    """The floors of cases with these smallest and largest values, and corners."""
    cases = tuple(CaseSurvey(f"p{n:02d}", intensities={key: Intensities(*three)}) for n, three in enumerate(values))
    return choose_floors(Survey(cases), (key, "pet"), wanted)[0]


@pytest.mark.parametrize(
    ("values", "floors"),
    [
        ([(0, 9, 0), (3, 9, 5)], {}),
        ([(-3, 4, 0), (-2, 5, 0)], {}),  # z-scores within a mask
        ([(-1024, 3000, -1024), (-3024, 2000, -3024), (-1000, 1500, -1000)], {"ct": -900}),
        ([(-1040, 2000, -975), (-1024, 2000, -982)], {"ct": -900}),  # with the noise of air
        ([(-3024, 2000, -3024), (-3024, 2000, -3024)], {"ct": -900}),  # what lies outside of a scanner's circle
        ([(-160, 240, -160), (-160, 239, -160)], {"ct": -160}),  # cut off
    ],
)
def test_what_the_data_say(values, floors):
    assert decided(*values) == floors


def test_ringing_is_no_background():
    rung = [(-30, 800, 12), (-2, 700, -1)]
    assert decided(*rung, key="t1") == {}
    for key, values in (("t1", [*rung, (-90, 800, 12)]), ("ct_lung", rung), ("cta", rung)):
        with pytest.raises(DataError, match="cannot be told"):
            decided(*values, key=key)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        (
            [(-1024, 99, -1024), (-150, 99, 37)],
            "hold -1024 in case p00 and 37 in case p01, the smallest value is -1",
        ),
        ([(-0.41, 3, -0.41), (-0.37, 3, -0.37)], "the corners hold -0.41 in case p00 and -0.37 in case p01"),
        ([(-3, 4, -1), (-3, 4, -1)], "hold -1 in case p00 and -1 in case p00, the smallest value is -3"),
        ([(-1000, 4, 0), (-1, 4, 0)], "hold 0 in case p00 and 0 in case p00, the smallest value is -1000"),
    ],
)
def test_where_the_data_do_not_tell_the_user_does(values, text):
    with pytest.raises(DataError) as error:
        decided(*values)
    assert text in str(error.value)
    assert "--floor ct=-900 for air in CT" in str(error.value)
    assert "--floor ct=none where the background is 0" in str(error.value)
    assert decided(*values, ct=-1000.0) == {"ct": -1000}
    assert decided(*values, ct=None) == {}
    assert decided((0, 90, 20), ct=20.5) == {"ct": 20.5}


def test_wishes_that_are_none(tmp_path):
    with pytest.raises(DataError) as error:
        decided((0, 1, 0), mr=1.0, ct=float("nan"))
    assert error.value.problems == ["floor of mr: expected one of ct, pet", "floor of ct: found nan, expected a number"]
    source = ct_and_pet(tmp_path / "data")
    arguments = ["new-bundle", str(tmp_path / "bundle"), "--data", str(source), "--network", "small", "--floor"]
    result = CliRunner().invoke(app, [*arguments, "ct=air"])
    assert (result.exit_code, "--floor is ct=air: expected numbers or none" in result.output) == (1, True)
    result = CliRunner().invoke(app, [*arguments, "ct=-950.5", "--floor", "pet=none"])
    assert "-950.5 and below: asked for" in result.output
    assert "0: asked for" in result.output
    config = yaml.safe_load((tmp_path / "bundle/configs/train.yaml").read_text())
    assert config["floors"] == {"ct": -950.5}


def test_a_template_that_changed_is_noticed():
    with pytest.raises(ValueError, match="expected one crop"):
        with_background("orientation: LPS\n", {})
    with pytest.raises(ValueError, match="expected one orientation, one ValidateCased"):
        with_background("crop: {_target_: C, keys: image, source_key: image}\n", {"ct": -1000})
