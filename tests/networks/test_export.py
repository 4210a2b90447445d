# SPDX-License-Identifier: Apache-2.0
"""TorchScript and ONNX, through MONAI's own exporters."""

import json

import numpy as np
import onnxruntime
import pytest
import torch
from monai.bundle import ckpt_export, onnx_export, verify_net_in_out
from monai.networks.utils import convert_to_onnx

from monai_cggm.networks import MultimodalSegmenter

AXES = {0: "batch", 2: "height", 3: "width", 4: "depth"}
SIZES = [(1, (32, 48)), (3, (50, 37))]  # the second is no multiple of 16


def arguments(backbone: str, spatial_dims: int = 2) -> dict:
    return {
        "modalities": ["flair", "t1ce"],
        "num_classes": 3,
        "encoder": {"backbone": backbone, "width": 8, "aspp_channels": 8, "spatial_dims": spatial_dims},
        "decoder_channels": 8,
        "low_reduced": 8,
    }


def network_of(backbone: str, spatial_dims: int = 2) -> MultimodalSegmenter:
    """A network whose running statistics differ from their initial values, as trained ones do."""
    network = MultimodalSegmenter(**arguments(backbone, spatial_dims))
    with torch.no_grad():
        network.train()(torch.randn(2, 2, *[32] * spatial_dims))
    return network.eval()


@pytest.fixture
def bundle(tmp_path, request):
    """The files that MONAI's exporters read, for the backbone that the test is parametrized by."""
    network = network_of(request.param)
    torch.save({"model": network.state_dict()}, tmp_path / "model.pt")
    config = {"network_def": {"_target_": "monai_cggm.networks.MultimodalSegmenter", **arguments(request.param)}}
    (tmp_path / "inference.json").write_text(json.dumps(config))
    image = {"dtype": "float32", "num_channels": 2, "spatial_shape": ["16*n", "16*n"]}
    formats = {"inputs": {"image": image}, "outputs": {"pred": {**image, "num_channels": 3}}}
    (tmp_path / "metadata.json").write_text(json.dumps({"network_data_format": formats}))
    files = {
        "net_id": "network_def",
        "meta_file": str(tmp_path / "metadata.json"),
        "config_file": str(tmp_path / "inference.json"),
    }
    return network, files, tmp_path


def assert_onnx_agrees(path, network, spatial_dims=2):
    session = onnxruntime.InferenceSession(path)
    for batch, size in SIZES:
        x = torch.randn(batch, 2, *[*size, 20][:spatial_dims])
        with torch.no_grad():
            expected = network(x).numpy()
        (logits,) = session.run(None, {"image": x.numpy()})
        assert logits.shape == expected.shape
        np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)


def axes(spatial_dims: int) -> dict:
    return {axis: name for axis, name in AXES.items() if axis < 2 + spatial_dims}


@pytest.mark.parametrize(("backbone", "spatial_dims"), [("resnet18", 2), ("resnet50", 2), ("resnet18", 3)])
def test_scripts_with_an_optional_mask(backbone, spatial_dims):
    network = network_of(backbone, spatial_dims)
    scripted = torch.jit.script(network)
    present = torch.tensor([[True, False], [True, True]])
    for size in ([32, 32, 32], [37, 50, 20]):
        x = torch.randn(2, 2, *size[:spatial_dims])
        with torch.no_grad():
            torch.testing.assert_close(scripted(x), network(x))
            torch.testing.assert_close(scripted(x, present), network(x, present))
            assert not torch.allclose(scripted(x), scripted(x, present))


@pytest.mark.parametrize("bundle", ["resnet18", "resnet50"], indirect=True)
def test_ckpt_export(bundle):
    network, files, folder = bundle
    verify_net_in_out(**files, n=2)
    ckpt_export(**files, ckpt_file=str(folder / "model.pt"), filepath=str(folder / "model.ts"), key_in_ckpt="model")
    loaded = torch.jit.load(folder / "model.ts")
    for batch, size in SIZES:
        x = torch.randn(batch, 2, *size)
        with torch.no_grad():
            torch.testing.assert_close(loaded(x), network(x))


@pytest.mark.parametrize("bundle", ["resnet18", "resnet50"], indirect=True)
def test_onnx_export(bundle):
    """The traced exporter: seconds."""
    network, files, folder = bundle
    onnx_export(
        **files,
        ckpt_file=str(folder / "model.pt"),
        filepath=str(folder / "model.onnx"),
        key_in_ckpt="model",
        use_trace=True,
        input_shape=[1, 2, 64, 64],
        converter_kwargs={
            "dynamo": False,
            "opset_version": 18,
            "input_names": ["image"],
            "output_names": ["logits"],
            "dynamic_axes": {"image": axes(2), "logits": axes(2)},
        },
    )
    assert_onnx_agrees(folder / "model.onnx", network)


def test_onnx_of_a_3d_network(tmp_path):
    network = network_of("resnet18", 3)
    convert_to_onnx(
        network,
        [torch.rand(1, 2, 32, 32, 32)],
        filename=tmp_path / "model.onnx",
        opset_version=18,
        input_names=["image"],
        output_names=["logits"],
        dynamic_axes={"image": axes(3), "logits": axes(3)},
        dynamo=False,
    )
    assert_onnx_agrees(tmp_path / "model.onnx", network, 3)


@pytest.mark.slow
def test_onnx_by_the_default_exporter(tmp_path):
    """PyTorch's own default, which exports the program instead of a trace, and takes minutes for four ResNet-50."""
    network = network_of("resnet18")
    convert_to_onnx(
        network,
        [torch.rand(2, 2, 32, 32)],
        filename=tmp_path / "model.onnx",
        input_names=["image"],
        output_names=["logits"],
        dynamic_axes={"image": axes(2), "logits": axes(2)},
    )
    assert_onnx_agrees(tmp_path / "model.onnx", network)
