# SPDX-License-Identifier: Apache-2.0
"""A trained model is loaded whole, and one that does not fit is an error that says what to do."""

import pytest
import torch
from ignite.engine import Engine
from torch import nn

from monai_cggm.errors import DataError
from monai_cggm.handlers import ModelLoader


def start(path, **modules):
    engine = Engine(lambda engine, batch: None)
    ModelLoader(str(path), modules, map_location="cpu").attach(engine)
    engine.run([0])


def test_every_object_is_loaded(tmp_path):
    saved = {"model": nn.Linear(3, 2), "classifiers": nn.Linear(2, 2)}
    torch.save({name: module.state_dict() for name, module in saved.items()}, tmp_path / "model.pt")
    loaded = {"model": nn.Linear(3, 2), "classifiers": nn.Linear(2, 2)}
    start(tmp_path / "model.pt", **loaded)
    for name, module in saved.items():
        torch.testing.assert_close(loaded[name].state_dict(), module.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("network", "reason"),
    [
        (nn.Linear(3, 4), r"size mismatch for weight.*\[2, 3\].*\[4, 3\]"),
        (nn.Sequential(nn.Linear(3, 2)), "Missing key.*0.weight"),
    ],
)
def test_other_weights_are_refused_in_words(network, reason, tmp_path):
    torch.save({"model": nn.Linear(3, 2).state_dict()}, tmp_path / "model.pt")
    with pytest.raises(DataError, match=rf"model.pt: its weights do not fit this network; give the overlays.*{reason}"):
        start(tmp_path / "model.pt", model=network)


def test_what_a_checkpoint_does_not_hold_is_refused(tmp_path):
    torch.save({"model": nn.Linear(3, 2).state_dict()}, tmp_path / "model.pt")
    with pytest.raises(DataError, match=r"model.pt: its weights do not fit.*'classifiers'"):
        start(tmp_path / "model.pt", model=nn.Linear(3, 2), classifiers=nn.Linear(2, 2))


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(DataError, match=r"nowhere.pt: no such file; a training writes model.pt"):
        start(tmp_path / "nowhere.pt", model=nn.Linear(3, 2))
