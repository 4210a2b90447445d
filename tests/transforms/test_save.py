# SPDX-License-Identifier: Apache-2.0
"""Segmentations on disk: geometry, header and labels, read back by two independent libraries."""

import gzip
import math

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
import torch
import yaml
from monai.bundle import ConfigParser
from monai.data import DataLoader, Dataset, MetaTensor
from monai.engines import SupervisedEvaluator
from monai.transforms import Compose, LoadImaged, Orientationd
from nibabel.nifti1 import Nifti1Extension
from torch import nn

from monai_cggm.errors import CaseError
from monai_cggm.inferers import VolumeInferer
from monai_cggm.transforms.save import SaveSegmentationd

SHAPE = (12, 14, 9)


def rotation(degrees, axes):
    matrix = np.eye(4)
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    matrix[np.ix_(axes, axes)] = [[c, -s], [s, c]]
    return matrix


def moved(matrix, origin):
    matrix = matrix.copy()
    matrix[:3, 3] = origin
    return matrix


AFFINES = {
    "RAS": np.eye(4),
    "BraTS": moved(np.diag([-1.0, -1.0, 1.0, 1.0]), (0, 239, 0)),
    "anisotropic": moved(np.diag([-1.0, 1.0, 3.0, 1.0]), (90, -126, -72)),
    "permuted": moved(np.array([[0, 0, 2.0, 0], [-1, 0, 0, 0], [0, 1.5, 0, 0], [0, 0, 0, 1]]), (-5, 7, 11)),
    "oblique": moved(rotation(17, [0, 1]) @ rotation(-9, [1, 2]) @ np.diag([-1.0, -1.0, 2.5, 1.0]), (12.5, 80, -30)),
}
LABELS = {"brats2018": (0, 1, 2, 4), "brats2023": (0, 1, 2, 3), "msd": (0, 2, 1, 3)}


def class_map(seed=0):
    """Classes 0..3 without any symmetry, inside a margin of background."""
    classes = np.zeros(SHAPE, np.uint8)
    classes[2:8, 3:10, 1:6] = np.random.default_rng(seed).integers(0, 4, (6, 7, 5))
    classes[2, 3, 1] = classes[7, 9, 5] = 3
    return classes


def write_image(path, data=None, affine=AFFINES["BraTS"], codes=(1, 1)):
    """An image with everything in its header that a file may have."""
    data = np.random.default_rng(1).normal(100, 30, SHAPE).astype(np.float32) if data is None else data
    image = nib.Nifti1Image(data, affine)
    image.set_qform(affine, codes[0])
    image.set_sform(affine, codes[1])
    image.header.set_xyzt_units("mm", "sec")
    image.header["descrip"] = b"patient 12345"
    image.header["aux_file"] = b"secret"
    image.header["cal_max"] = 4000
    image.header.set_intent("t test", (2,), "name")
    image.header.extensions.append(Nifti1Extension("comment", b"patient 12345"))
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image, path)
    return path


def item_of(path, classes, case="Phantom_000", **more):
    return {"case": case, "flair": str(path), "pred": torch.from_numpy(classes)[None]} | more


def save(item, folder, **kwargs):
    SaveSegmentationd(keys="pred", output_dir=folder, image_keys=["flair", "t1"], **kwargs)(item)
    return folder / f"{item['case']}_seg.nii.gz"


def raw_header(path):
    with gzip.open(path) as file:
        return nib.Nifti1Header(file.read(348))


def assert_same_space(written, source, voxels):
    """Both libraries see the voxels where the source's header puts them."""
    output, image = nib.load(written), nib.load(source)
    assert output.get_data_dtype() == np.uint8
    assert np.array_equal(np.asarray(output.dataobj), voxels)
    assert np.array_equal(output.affine, image.affine)
    for field in ("pixdim", "qform_code", "sform_code", "xyzt_units", "srow_x", "srow_y", "srow_z", "quatern_b"):
        assert np.array_equal(output.header[field], image.header[field]), field

    output, image = SimpleITK.ReadImage(str(written)), SimpleITK.ReadImage(str(source))
    assert np.array_equal(SimpleITK.GetArrayFromImage(output).T, voxels)
    assert output.GetSize() == image.GetSize()
    assert output.GetSpacing() == image.GetSpacing()
    assert output.GetOrigin() == image.GetOrigin()
    assert output.GetDirection() == image.GetDirection()
    assert output.GetPixelID() == SimpleITK.sitkUInt8


@pytest.mark.parametrize("convention", LABELS)
@pytest.mark.parametrize("affine", AFFINES.values(), ids=AFFINES)
def test_geometry_and_labels(tmp_path, affine, convention):
    source = write_image(tmp_path / "in" / "a_flair.nii.gz", affine=affine)
    classes = class_map()
    written = save(item_of(source, classes, labels=convention), tmp_path / "out")
    assert_same_space(written, source, np.take(LABELS[convention], classes))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["Phantom_000_seg.nii.gz"]


@pytest.mark.parametrize(
    ("convention", "values", "dtype"),
    [("1=1, 7=3, 5=2", (0, 1, 5, 7), np.uint8), ("2=1, 255=2, 2035=3, 3=1", (0, 2, 255, 2035), np.int16)],
)
def test_a_map_that_is_spelt_out(tmp_path, convention, values, dtype):
    source = write_image(tmp_path / "in" / "a_flair.nii.gz")
    written = save(item_of(source, class_map(), case="patient7", labels=convention), tmp_path / "out")
    assert nib.load(written).get_data_dtype() == dtype
    assert np.array_equal(np.asarray(nib.load(written).dataobj), np.take(values, class_map()))
    read = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(written))).T
    assert read.dtype == dtype
    assert np.array_equal(read, np.take(values, class_map()))


@pytest.mark.parametrize(
    ("case", "labels"),
    [("Brats18_CBICA_APZ_1", (0, 1, 2, 4)), ("BraTS-GLI-00000-000", (0, 1, 2, 3)), ("BRATS_001", (0, 2, 1, 3))],
)
def test_the_id_tells_the_labels_where_the_item_does_not(tmp_path, case, labels):
    source = write_image(tmp_path / "in" / "x.nii.gz")
    written = save(item_of(source, class_map(), case=case), tmp_path / "out")
    assert np.array_equal(np.asarray(nib.load(written).dataobj), np.take(labels, class_map()))


@pytest.mark.parametrize("codes", [(1, 1), (1, 0), (0, 2), (0, 0), (3, 4)])
def test_codes_stay(tmp_path, codes):
    source = write_image(tmp_path / "in" / "x.nii.gz", affine=AFFINES["oblique"], codes=codes)
    header = nib.load(save(item_of(source, class_map()), tmp_path / "out")).header
    assert (int(header["qform_code"]), int(header["sform_code"])) == codes
    assert header.get_xyzt_units() == ("mm", "sec")


def test_only_the_geometry_is_copied(tmp_path):
    data = np.random.default_rng(0).uniform(-5, 4000, SHAPE)
    source = write_image(tmp_path / "in" / "x.nii", data=data)
    scaled = nib.load(source)
    scaled.set_data_dtype(np.int16)  # stored with a slope and an intercept
    nib.save(scaled, tmp_path / "in" / "scaled.nii")
    assert nib.load(tmp_path / "in" / "scaled.nii").dataobj.slope != 1
    written = save(item_of(tmp_path / "in" / "scaled.nii", class_map()), tmp_path / "out")
    header = raw_header(written)
    assert (header["scl_slope"], header["scl_inter"]) == (1, 0)
    assert (header["cal_max"], header["intent_code"]) == (0, 0)
    assert header["descrip"] == header["aux_file"] == header["intent_name"] == b""
    assert not nib.load(written).header.extensions
    assert b"patient" not in gzip.decompress(written.read_bytes())
    assert np.array_equal(np.asarray(nib.load(written).dataobj), np.take(LABELS["brats2018"], class_map()))


def test_a_trailing_axis_of_one_is_no_other_shape(tmp_path):
    source = write_image(tmp_path / "in" / "x.nii.gz", data=np.ones((*SHAPE, 1), np.float32))
    assert nib.load(save(item_of(source, class_map()), tmp_path / "out")).shape == SHAPE


def test_several_maps_have_several_names(tmp_path):
    item = item_of(write_image(tmp_path / "in" / "x.nii.gz"), class_map())
    item["flair_only"] = torch.zeros_like(item["pred"])
    SaveSegmentationd(["pred", "flair_only"], output_dir=tmp_path / "out", image_keys="flair")(item)
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["Phantom_000_flair_only_seg.nii.gz", "Phantom_000_pred_seg.nii.gz"]


def test_the_item_is_returned_as_it_was(tmp_path):
    item = item_of(write_image(tmp_path / "in" / "x.nii.gz"), class_map())
    returned = SaveSegmentationd(output_dir=tmp_path / "out", image_keys="flair")(item)
    assert returned.keys() == item.keys()
    assert torch.equal(returned["pred"], torch.from_numpy(class_map())[None])  # classes still


def test_the_first_known_file_gives_the_header(tmp_path):
    source = write_image(tmp_path / "in" / "t1.nii.gz")
    loaded = LoadImaged(keys="t1", ensure_channel_first=True)({"case": "Phantom_001", "t1": str(source)})
    item = loaded | {"pred": torch.from_numpy(class_map())[None]}
    assert_same_space(save(item, tmp_path / "out"), source, np.take(LABELS["brats2018"], class_map()))


# --- what it refuses


@pytest.mark.parametrize("case", ["", ".", "..", "../x", "a/b", "/etc/x", "a\\b", "a..b", "a b"])
def test_an_id_that_is_no_file_name(tmp_path, case):
    item = item_of(write_image(tmp_path / "in" / "x.nii.gz"), class_map(), case=case, labels="brats2018")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CaseError, match="safe file name"):
        SaveSegmentationd(output_dir=tmp_path / "out", image_keys="flair")(item)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda item: {"pred": item["pred"][..., :-1]},
            r"case Phantom_000: the segmentation has shape \(1, 12, 14, 8\)",
        ),
        (
            lambda item: {"pred": item["pred"].expand(4, -1, -1, -1)},
            r"shape \(4, 12, 14, 9\), expected \(1, 12, 14, 9\)",
        ),
        (lambda item: {"pred": item["pred"][0]}, r"shape \(12, 14, 9\), expected \(1, 12, 14, 9\)"),
        (lambda item: {"pred": item["pred"] + 1}, r"case Phantom_000: values \[4\] are no classes"),
        (lambda item: {"pred": item["pred"] + 0.5}, "are no classes"),
        (lambda item: {"flair": None}, "no file is known for any of flair, t1"),
        (lambda item: {"flair": item["flair"] + "x"}, r"cannot read the input's header.*x\.nii\.gzx\)"),
        (lambda item: {"labels": "brats1999"}, "case Phantom_000: unknown label convention 'brats1999'"),
        (lambda item: {"labels": "0=0,1=1"}, r"case Phantom_000: values \[2, 3\] are no classes \(0 to 1\)"),
        (lambda item: {"case": "patient7"}, "case patient7: its ID tells no label convention"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_written(tmp_path, spoil, message):
    item = item_of(write_image(tmp_path / "in" / "x.nii.gz"), class_map())
    with pytest.raises(CaseError, match=message):
        save(item | spoil(item), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_truth_is_never_overwritten(tmp_path):
    source = write_image(tmp_path / "Phantom_000" / "Phantom_000_flair.nii.gz")
    with pytest.raises(CaseError, match="among the inputs"):
        save(item_of(source, class_map()), tmp_path / "other" / ".." / "Phantom_000")


def test_a_forgotten_inverse_is_seen_where_the_shape_is_the_same(tmp_path):
    source = write_image(tmp_path / "in" / "x.nii.gz")
    load = LoadImaged(keys="flair", ensure_channel_first=True)
    turned = Compose([load, Orientationd(keys="flair", axcodes="RAS", labels=None)])({"flair": str(source)})["flair"]
    pred = MetaTensor(torch.from_numpy(class_map())[None], affine=turned.affine)
    with pytest.raises(CaseError, match=r"up to 13 mm off the input's grid: it was not inverted"):
        save({"case": "Phantom_000", "flair": turned, "pred": pred}, tmp_path / "out")


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    item = item_of(write_image(tmp_path / "in" / "x.nii.gz"), class_map())
    written = save(item, tmp_path / "out")
    before = written.read_bytes()

    def interrupted(image, path):
        path.write_bytes(b"half a file")
        raise OSError("no space left on device")

    monkeypatch.setattr(nib, "save", interrupted)
    with pytest.raises(OSError, match="no space left"):
        save(item | {"pred": 0 * item["pred"]}, tmp_path / "out")
    assert written.read_bytes() == before
    assert [path.name for path in (tmp_path / "out").iterdir()] == [written.name]


# --- the whole way: a bundle's inference


INFERENCE = """
modalities: [flair, t1ce, t1, t2]
output_dir: set by the test
preprocessing:
  _target_: Compose
  transforms:
  - {_target_: LoadImaged, keys: '@modalities', ensure_channel_first: true, allow_missing_keys: true}
  - {_target_: monai_cggm.transforms.FillMissingd, keys: '@modalities'}
  - {_target_: ConcatItemsd, keys: '@modalities', name: image}
  - {_target_: DeleteItemsd, keys: '@modalities'}
  - {_target_: Orientationd, keys: image, axcodes: RAS, labels: null}
  - {_target_: CropForegroundd, keys: image, source_key: image, margin: 1, allow_smaller: true}
postprocessing:
  _target_: Compose
  transforms:
  - {_target_: AsDiscreted, keys: pred, argmax: true}
  - _target_: Invertd
    keys: pred
    transform: '@preprocessing'
    orig_keys: image
    nearest_interp: true
    to_tensor: true
  - {_target_: monai_cggm.transforms.SaveSegmentationd, keys: pred, output_dir: '@output_dir', image_keys: image}
"""


class ReadsTheFirstChannel(nn.Module):
    """Its image holds 10 + class inside the head and 0 outside, in the channel that is there."""

    def forward(self, x, present=None):
        channel = int(present[0].int().argmax()) if present is not None else 0
        return -(x[:, channel : channel + 1] - 10 - torch.arange(4).view(1, 4, 1, 1)).abs()


@pytest.mark.parametrize("there", [("flair", "t1ce", "t1", "t2"), ("t1", "t2")], ids=["complete", "missing"])
@pytest.mark.parametrize("affine", AFFINES.values(), ids=AFFINES)
def test_inference_in_the_inputs_own_space(tmp_path, affine, there):
    config = ConfigParser(yaml.safe_load(INFERENCE))
    config["output_dir"] = str(tmp_path / "out")
    items, expected = [], {}
    for index, case in enumerate(("Brats18_A_1", "BraTS-GLI-00001-000")):
        classes = class_map(seed=index)
        head = np.zeros(SHAPE, bool)
        head[1:9, 2:11, 0:7] = True  # off centre: the crop and the turn both matter
        paths = {
            name: write_image(
                tmp_path / case / f"{case}_{name}.nii.gz", np.where(head, classes + 10.0, 0).astype("f4"), affine
            )
            for name in there
        }
        items.append({"case": case, **{name: str(path) for name, path in paths.items()}})
        labels = LABELS["brats2018" if case.startswith("Brats18") else "brats2023"]
        expected[case] = (paths[there[0]], np.take(labels, classes))

    def prepare_batch(batch, device, non_blocking, **kwargs):
        return batch["image"], None, (), {"present": batch["present"]}

    preprocessing = config.get_parsed_content("preprocessing")
    evaluator = SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader(Dataset(items, preprocessing), batch_size=1),
        network=ReadsTheFirstChannel(),
        prepare_batch=prepare_batch,
        inferer=VolumeInferer(sw_batch_size=4),
        postprocessing=config.get_parsed_content("postprocessing"),
    )
    evaluator.run()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(f"{c}_seg.nii.gz" for c in expected)
    shape = tuple(evaluator.state.batch[0]["image"].shape[1:])
    assert math.prod(shape) < math.prod(SHAPE)  # cropped on the way in
    for case, (source, voxels) in expected.items():
        assert_same_space(tmp_path / "out" / f"{case}_seg.nii.gz", source, voxels)
