# SPDX-License-Identifier: Apache-2.0
"""MONAI's own tools take a new bundle as they take one of the model zoo."""

from __future__ import annotations

import json
import sys
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.bundle import (
    ConfigParser,
    ConfigWorkflow,
    create_workflow,
    load,
    verify_metadata,
    verify_net_in_out,
)
from monai.transforms import Compose, LoadImaged

from monai_cggm.discovery import discover
from monai_cggm.networks import MultimodalSegmenter
from monai_cggm.new_bundle import Wishes, new_bundle
from tests.bundles.running import assert_exports_agree
from tests.new_bundle.folders import CUBES, PATIENTS, nnunet

#: the network at a size that takes seconds, and how it is said to a bundle
NETWORK: dict[str, Any] = {
    "encoder": {"backbone": "resnet18", "output_stride": 16, "aspp_channels": 8, "width": 4, "norm": "batch"},
    "decoder_channels": 8,
    "low_reduced": 4,
}
PLAIN = {"memory_format": "$torch.contiguous_format"}
MODALITIES = ["t2", "adc"]

#: MONAI's names of what a workflow has, required and optional ones, that ours have
TRAIN = ("bundle_root", "device", "dataset_dir", "trainer", "network_def", "max_epochs")
TRAIN += ("train_dataset", "train_inferer", "train_handlers", "train_preprocessing", "evaluator", "val_interval")
TRAIN += ("val_handlers", "val_dataset", "val_inferer", "val_key_metric")
INFER = ("bundle_root", "device", "dataset_dir", "dataset", "evaluator", "network_def", "inferer", "dataset_data")
INFER += ("handlers", "preprocessing", "postprocessing")
META = ("version", "monai_version", "pytorch_version", "numpy_version", "description", "spatial_shape", "channel_def")


#: the same for a bundle of patches, over the encoder that it states itself
SOLID: dict[str, Any] = {
    "encoder#width": 4,
    "encoder#aspp_channels": 8,
    **{key: value for key, value in NETWORK.items() if key != "encoder"},
}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """A bundle with the weights of a network in ``models/model.pt``, as the model zoo keeps them."""
    root = tmp_path_factory.mktemp("zoo")
    made = new_bundle(discover(nnunet(root / "data")), root / "two_zones", Wishes(network="small"), progress=False)
    torch.manual_seed(0)
    return with_weights(made.folder, network())


def with_weights(folder: Path, network: MultimodalSegmenter) -> Path:
    (folder / "models").mkdir()
    torch.save({"model": network.state_dict(), "epoch": 1}, folder / "models/model.pt")
    return folder


def network() -> MultimodalSegmenter:
    return MultimodalSegmenter(MODALITIES, 3, **NETWORK)


def config(bundle: Path, name: str) -> str:
    return str(bundle / "configs" / name)


def test_the_metadata_are_verified(bundle, tmp_path):
    tensor = {"required": ["type", "format", "num_channels", "spatial_shape", "dtype", "value_range", "channel_def"]}
    schema = {
        "type": "object",
        "required": [
            "version",
            "monai_version",
            "pytorch_version",
            "numpy_version",
            "required_packages_version",
            "task",
            "description",
            "authors",
            "copyright",
            "network_data_format",
        ],
        "properties": {
            "network_data_format": {
                "required": ["inputs", "outputs"],
                "additionalProperties": {"additionalProperties": tensor},
            }
        },
    }
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    metadata = json.loads(Path(config(bundle, "metadata.json")).read_text())
    metadata["schema"] = "https://example.invalid/schema.json"  # not fetched: the file is there
    (tmp_path / "metadata.json").write_text(json.dumps(metadata))
    verify_metadata(meta_file=str(tmp_path / "metadata.json"), filepath=str(tmp_path / "schema.json"))
    assert metadata["version"] in metadata["changelog"]


def test_the_network_takes_and_gives_what_the_metadata_says(bundle):
    shared: dict[str, Any] = {"net_id": "network_def", "meta_file": config(bundle, "metadata.json"), "any": 48}
    shared |= {f"network_def#{key}": value for key, value in NETWORK.items()}
    for name in ("inference.yaml", "train.yaml"):
        verify_net_in_out(config_file=config(bundle, name), **shared)
    with pytest.raises(ValueError, match="output channel"):
        verify_net_in_out(config_file=config(bundle, "inference.yaml"), num_classes=5, **shared)


def export_arguments(bundle: Path) -> dict[str, Any]:
    return {
        "net_id": "network_def",
        "ckpt_file": str(bundle / "models/model.pt"),
        "meta_file": config(bundle, "metadata.json"),
        "config_file": config(bundle, "inference.yaml"),
        "key_in_ckpt": "model",
    }


def test_the_bundle_exports(bundle, tmp_path):
    size = {f"network_def#{key}": value for key, value in NETWORK.items()}
    assert_exports_agree(
        network().eval(), tmp_path, sizes=[(1, 2, 48, 64), (3, 2, 37, 50)], **export_arguments(bundle), **size
    )


def test_a_bundle_of_patches_exports(tmp_path):
    found = discover(nnunet(tmp_path / "data", affine=CUBES))
    folder = new_bundle(found, tmp_path / "two_zones", Wishes(network="small"), progress=False).folder
    parser = ConfigParser()
    parser.read_config(config(folder, "inference.yaml"))
    parser.update(SOLID)
    solid = parser.get_parsed_content("network_def").eval()
    assert solid.head.weight.shape == (3, 8, 1, 1, 1)
    with_weights(folder, solid)
    shared = export_arguments(folder)
    assert_exports_agree(solid, tmp_path, sizes=[(1, 2, 32, 16, 24), (2, 2, 19, 30, 21)], **shared, **SOLID)
    names = {name: shared[name] for name in ("net_id", "meta_file", "config_file")}
    verify_net_in_out(**names, any=16, **SOLID)
    with pytest.raises(ValueError, match="output channel"):
        verify_net_in_out(**names, any=16, num_classes=5, **SOLID)


def test_a_training_workflow_has_what_monai_asks_for(bundle, tmp_path):
    hook = sys.excepthook
    made = create_workflow(
        config_file=config(bundle, "train.yaml"), workflow_type="train", logging_file=False, bundle_root=str(bundle),
        run_dir=str(tmp_path), num_workers=0, **NETWORK, **PLAIN,
    )  # fmt: skip
    sys.excepthook = hook
    assert isinstance(made, ConfigWorkflow)
    assert made.check_properties() == []
    assert [name for name in (*TRAIN, *META) if getattr(made, name) is None] == []
    assert made.channel_def == {"0": "background", "1": "transition_zone", "2": "peripheral_zone"}
    assert made.trainer.state.max_epochs == made.max_epochs
    assert len(made.val_dataset) == 1
    assert made.version == "0.1.0"


def test_an_inference_workflow_has_what_monai_asks_for(bundle, tmp_path):
    hook = sys.excepthook
    made = create_workflow(
        config_file=config(bundle, "inference.yaml"), workflow_type="infer", logging_file=False,
        bundle_root=str(bundle), dataset_dir=str(bundle / "datalist.json"), model_file=str(bundle / "models/model.pt"),
        output_dir=str(tmp_path / "out"), **NETWORK, **PLAIN,
    )  # fmt: skip
    sys.excepthook = hook
    assert made.check_properties() == []
    assert [name for name in (*INFER, *META) if getattr(made, name) is None] == []
    assert len(made.dataset) == len(PATIENTS)
    assert ForkingPickler.dumps(made.dataset)  # workers that share nothing get it so
    made.run()
    assert len(list((tmp_path / "out").glob("*_seg.nii.gz"))) == len(PATIENTS)


def test_monai_loads_the_weights_of_a_local_bundle(bundle):
    """``load`` makes a network itself from .json configurations only; with ours it is given one."""
    shared = {"name": bundle.name, "bundle_dir": str(bundle.parent), "device": "cpu", "key_in_ckpt": "model"}
    torch.manual_seed(1)
    loaded = load(model=network(), **shared)
    torch.manual_seed(0)
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), network().state_dict().values(), strict=True)
    )
    with pytest.warns(UserWarning, match="return state dict instead"):
        assert set(load(**shared)) == {"model", "epoch"}
    with pytest.warns(UserWarning, match="return state dict instead"):
        state = load(**shared)["model"]
    parser = ConfigParser()
    parser.read_config(config(bundle, "inference.yaml"))
    parser.update({f"network_def#{key}": value for key, value in NETWORK.items()})
    parser.get_parsed_content("network_def").load_state_dict(state)


def test_the_names_that_monai_label_reads(bundle):
    """What MONAI Label's bundle tasks look up (monailabel/tasks/infer/bundle.py, train/bundle.py), without its server.

    These find network, weights, labels and steps by name. They cannot run them: an entry of its datastore
    is one file, ``image``, where a case of ours has one a modality, and it gives a training such entries as
    ``train#dataset#data``, which ours does not have.
    """
    parser = ConfigParser()
    parser.read_config(config(bundle, "inference.yaml"))
    parser.config.update({"bundle_root": str(bundle), **NETWORK, **PLAIN})
    metadata = json.loads(Path(config(bundle, "metadata.json")).read_text())
    formats = metadata["network_data_format"]
    assert next(iter(formats["inputs"])) == "image"
    assert next(iter(formats["outputs"])) == "pred"
    assert formats["outputs"]["pred"]["channel_def"]["0"] == "background"
    assert len(formats["inputs"]["image"]["spatial_shape"]) == 2
    network_def = parser.get_parsed_content("network_def", instantiate=True)
    checkpoint = torch.load(bundle / "models/model.pt", weights_only=True)
    assert set(checkpoint.get("model", checkpoint)) == set(network_def.state_dict())
    for key in ("preprocessing", "postprocessing"):
        made = parser.get_parsed_content(key, instantiate=True)
        assert isinstance(made, Compose)
        assert isinstance(made.transforms, (list, tuple))
    assert any(isinstance(step, LoadImaged) for step in parser.get_parsed_content("preprocessing").transforms)
    assert callable(parser.get_parsed_content("inferer", instantiate=True))
    train = ConfigParser.load_config_file(config(bundle, "train.yaml"))
    assert {"device", "bundle_root", "network", "network_def", "run"} <= set(train)
    assert isinstance(train["train"]["handlers"], list)
    assert "max_epochs" in train["train"]["trainer"]
    assert Path(config(bundle, "multi_gpu_train.yaml")).is_file()
    assert "data" not in train["train"]["dataset"]
    with pytest.raises(Exception, match="ValidateCased"):
        parser.get_parsed_content("preprocessing")({"image": str(next(bundle.parent.rglob("*.nii.gz")))})
