# SPDX-License-Identifier: Apache-2.0
"""What the overlays of configs/hardware do to a training of the BraTS bundle."""

import json
import os
import shutil

import pytest
import torch
from ignite.engine import Events
from monai.data import set_track_meta
from torch import nn
from torch._dynamo.utils import counters

from monai_cggm.data.phantom import write_phantoms
from monai_cggm.methods import CGGM
from monai_cggm.networks import MultimodalSegmenter, UnimodalClassifiers
from tests.bundles.running import BIT_FOR_BIT, CONFIGS, TINY, workflow
from tests.methods import toy

#: bounded, so that one step of so small a network is no accident of a ratio
BOUNDED = {"rule": "positive", "max_share": 0.1, "gradient_clip": 1.0}
LOSS_SCALE = 2.0**12


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phantoms")
    write_phantoms(folder, cases=6, shape=(40, 44, 20), spacing=4.0)
    return folder


@pytest.fixture
def training(cases, tmp_path):
    """Build a training with an overlay, or without."""

    size = tmp_path / "tiny.json"  # a file, because the command line's `encoder` would replace that of an overlay
    size.write_text(json.dumps(TINY))

    def build(*names):
        folder = tmp_path / ("plain" if not names else names[0].replace("/", "_"))
        files = ("train.yaml", str(size), "methods/cggm.yaml", *names)
        return workflow(*files, **BOUNDED, dataset_dir=str(cases), run_dir=str(folder))

    return build


def part_of(made, name):
    return made.parser.get_parsed_content(name)


def take_a_step(made):
    """Train for one step, and return what the trainer knows then."""
    trainer = part_of(made, "train#trainer")
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: engine.terminate())
    try:
        made.run()
    finally:
        set_track_meta(True)
    assert trainer.state.iteration == 1
    return trainer.state


def gradient_norms(state):
    return [value for name, value in state.scalars.items() if name.startswith("gradient_norm/")]


def assert_same_state(one, other, **tolerance):
    one, other = (part_of(made, "network_def").state_dict() for made in (one, other))
    assert list(one) == list(other)
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, **tolerance, msg=name)


def test_every_overlay_has_a_test():
    here = {"channels_last", "amp_bf16", "amp_fp16", "fused_optimizer", "checkpointing", "compile"}
    assert {path.stem for path in (CONFIGS / "hardware").glob("*.yaml")} == {*here, "cpu"}


def test_channels_last_reaches_weights_and_features(training):
    for names, expected in (((), False), (("hardware/channels_last.yaml",), True)):
        network = part_of(training(*names), "network")
        x = torch.randn(2, 1, 32, 32, device=network.head.weight.device)
        kernels = [m.weight for m in network.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
        wide = [w for w in kernels if w.shape[1] > 1]
        assert wide
        assert all(w.is_contiguous(memory_format=torch.channels_last) is expected for w in wide)
        _, high = network.encoders["flair"](x)
        assert high.is_contiguous(memory_format=torch.channels_last) is expected


@pytest.fixture
def mixed_precision(monkeypatch):
    """MONAI's trainer asks for CUDA's mixed precision; without a GPU it gets the CPU's."""
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    autocast = torch.autocast
    monkeypatch.setattr(torch, "autocast", lambda _device, **kwargs: autocast(kind, **kwargs))
    monkeypatch.setattr(torch.cuda.amp, "GradScaler", lambda: torch.amp.GradScaler(kind, init_scale=LOSS_SCALE))


def types_seen(made):
    """The types of the encoders' and the classifiers' outputs in training."""
    seen = set()
    for module in (*part_of(made, "network_def").encoders.values(), *part_of(made, "classifiers_def").heads.values()):
        module.register_forward_hook(lambda _m, _a, out: seen.add((out[1] if isinstance(out, tuple) else out).dtype))
    return seen


@pytest.mark.parametrize(("overlay", "dtype"), [("amp_bf16", torch.bfloat16), ("amp_fp16", torch.float16)])
def test_mixed_precision_and_gradients_that_are_unscaled(overlay, dtype, training, mixed_precision):
    full = training()
    made = training(f"hardware/{overlay}.yaml")
    seen = types_seen(made)
    right = take_a_step(full)
    found = take_a_step(made)
    trainer = part_of(made, "train#trainer")
    assert seen == {dtype}
    assert trainer.amp_kwargs == {"dtype": dtype}
    assert part_of(made, "validate#evaluator").amp_kwargs == {"dtype": dtype}
    assert trainer.scaler.get_scale() == LOSS_SCALE  # no overflow
    # half precision is coarse in so small a network, but scaled gradients would be 4096 times as large
    for value, expected in zip(gradient_norms(found), gradient_norms(right), strict=True):
        assert expected / 3 < value < 3 * expected
    # clipped to 1 after they were unscaled, and not unscaled again
    for state in (full, made):
        gradients = [p.grad for p in part_of(state, "network_def").parameters()]
        assert torch.nn.utils.get_total_norm(gradients).item() == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize("overlay", ["amp_bf16", "amp_fp16"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine with a GPU")
def test_mixed_precision_does_nothing_on_a_cpu(overlay, training):
    made = training(f"hardware/{overlay}.yaml")
    seen = types_seen(made)
    with pytest.warns(UserWarning, match="CUDA is not available"):
        take_a_step(made)
    assert seen == {torch.float32}
    assert not part_of(made, "train#trainer").scaler.is_enabled()


def test_fused_steps_are_the_plain_ones(training):
    plain, fused = training(), training("hardware/fused_optimizer.yaml")
    groups = part_of(fused, "optimizer").param_groups
    assert [group["fused"] for group in groups] == [True, True]
    held = {id(p) for group in groups for p in group["params"]}
    trained = part_of(fused, "trained").values()
    assert held == {id(p) for module in trained for p in module.parameters()}
    before = {name: value.clone() for name, value in part_of(plain, "network_def").named_parameters()}
    for made in (plain, fused):
        take_a_step(made)
    assert_same_state(plain, fused, rtol=1e-5, atol=1e-7)
    after = part_of(fused, "network_def").named_parameters()
    assert any(not torch.equal(value, before[name]) for name, value in after)


def test_mixed_precision_keeps_the_plain_step(training):
    made = training("hardware/fused_optimizer.yaml", "hardware/amp_fp16.yaml")
    assert [group["fused"] for group in part_of(made, "optimizer").param_groups] == [False, False]


def test_why_mixed_precision_keeps_the_plain_step():
    """A first step that is left out gives PyTorch's fused SGD a momentum that nothing has written."""
    for fused, expected in ((False, None), (True, torch.Size([3]))):
        weight = nn.Parameter(torch.ones(3))
        optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
        weight.grad = scaler.scale(torch.full((3,), torch.inf))
        scaler.step(optimizer)
        assert torch.equal(weight, torch.ones(3))
        momentum = optimizer.state[weight].get("momentum_buffer")
        assert (None if momentum is None else momentum.shape) == expected


@BIT_FOR_BIT
def test_checkpointing_computes_encoders_again_and_changes_nothing(training):
    counts = {}
    pair = (training(), training("hardware/checkpointing.yaml"))
    for index, made in enumerate(pair):
        encoders = part_of(made, "network_def").encoders
        assert all(encoder.checkpointing is bool(index) for encoder in encoders.values())
        counts[index] = dict.fromkeys(encoders, 0)
        for name, encoder in encoders.items():
            encoder.trunk.bn1.register_forward_hook(
                lambda *_, name=name, index=index: counts[index].__setitem__(name, counts[index][name] + 1)
            )
    states = [take_a_step(made) for made in pair]
    assert set(counts[0].values()) == {1}
    assert set(counts[1].values()) == {2}
    assert states[0].scalars == states[1].scalars
    assert_same_state(*pair, rtol=0, atol=0)


def test_parts_are_compiled_in_place_and_the_rest_is_not(training, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, **_: compiled.append(function.__self__) or function)
    made = training("hardware/compile.yaml")
    network = part_of(made, "network_def")
    names = list(network.state_dict())
    state = take_a_step(made)
    assert compiled == [*network.encoders.values(), network.decoder]
    assert all(part._compiled_call_impl is not None for part in compiled)
    assert network._compiled_call_impl is None
    assert network.head._compiled_call_impl is None
    assert list(network.state_dict()) == names
    assert state.scalars["loss/gm"] > 0


def segmenter_and_classifiers():
    torch.manual_seed(0)
    encoder = {"backbone": "resnet18", "width": 4, "aspp_channels": 8}
    network = MultimodalSegmenter(["flair", "t2"], 4, encoder=encoder, decoder_channels=8, low_reduced=4)
    return network, UnimodalClassifiers.for_network(network, low_reduced=4), network.decoder


def toy_and_classifiers():
    network, classifiers = toy.parts(("flair", "t2"))
    return network, classifiers, network.trunk


def two_steps_of_cggm(made, backend=None):
    """Train with CGGM; what was logged, and the network's state."""
    network, classifiers, decoder = made()
    if backend is not None:
        for part in (*network.encoders.values(), decoder):
            part.compile(backend=backend)
    method = CGGM(network, classifiers, toy.metric(), rule="positive", lam=0.5)
    data = toy.batches(2, modalities=2, size=32, batch=2)
    return toy.rows_of(method, network, classifiers, data), network.state_dict()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("made", "backend"),
    [
        pytest.param(segmenter_and_classifiers, "aot_eager", id="traced"),
        pytest.param(toy_and_classifiers, "inductor", id="compiled"),
    ],
)
def test_compiled_parts_train_by_cggm_as_eager_ones(made, backend):
    """Hooks see features that are on the loss's path, and the direction term is differentiated through them."""
    if backend == "inductor" and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
        pytest.skip("torch.compile needs a C++ compiler on a CPU, and there is none")
    torch.compiler.reset()
    counters.clear()
    (found, state), (right, expected) = two_steps_of_cggm(made, backend), two_steps_of_cggm(made)
    assert counters["stats"]["unique_graphs"] > 0
    assert list(state) == list(expected)
    for row, other in zip(found, right, strict=True):
        assert row == pytest.approx(other, rel=1e-3, abs=1e-4)
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value, rtol=1e-3, atol=1e-4, msg=name)
