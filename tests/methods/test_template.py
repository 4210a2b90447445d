# SPDX-License-Identifier: Apache-2.0
"""The method that the documentation writes as an example."""

import sys

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from monai_cggm.compare import read_study
from monai_cggm.compare.study import find_file
from monai_cggm.methods import UnimodalObserver
from tests.bundles import test_features_cggm as features
from tests.methods import toy
from tests.methods.toy import gradients_of_one_step, metric, parts


@pytest.fixture
def page(repository):
    return (repository / "docs/how-to/add_a_method.md").read_text(encoding="utf-8")


@pytest.fixture
def example(page):
    names = {}
    exec(page.split("```python\n")[1].split("```")[0], names)
    return names


@pytest.mark.parametrize("modalities", [2, 3, 4])
def test_the_example_does_what_it_says(example, modalities):
    names = toy.MODALITIES[:modalities]
    batch = toy.batches(1, modalities=modalities)
    network, classifiers = parts(names)
    plain = gradients_of_one_step(network, classifiers, batch, UnimodalObserver(network, classifiers, metric()))
    network, classifiers = parts(names)
    method = example["ErrorBalance"](network, classifiers, metric(), power=2.0)
    seen = gradients_of_one_step(network, classifiers, batch, method)
    errors = 1 - torch.tensor([seen["scalars"][f"epsilon/{m}"] for m in names])
    factors = errors**2 / (errors**2).mean()
    assert factors.max() > 1.01 * factors.min()
    for factor, m in zip(factors, names, strict=True):
        for key in (k for k in plain if k.startswith(f"encoders.{m}.")):
            torch.testing.assert_close(seen[key], factor * plain[key])
    torch.testing.assert_close(seen["head.weight"], plain["head.weight"])


def test_the_example_s_controls_come_by_themselves(example):
    network, classifiers = parts()
    method = example["ErrorBalance"](network, classifiers, metric(), control="constant")
    seen = gradients_of_one_step(network, classifiers, toy.batches(1), method)
    assert [seen["scalars"][f"balance/{m}"] for m in toy.MODALITIES] == pytest.approx([1.0] * 4)


@pytest.fixture
def folder(page, tmp_path, monkeypatch):
    """The three files of the page beside each other, and the method where Python finds it."""
    (tmp_path / "my_methods.py").write_text(page.split("```python\n")[1].split("```")[0], encoding="utf-8")
    overlay, study = (part.split("```")[0] for part in page.split("```yaml\n")[1:])
    (tmp_path / "my_method.yaml").write_text(overlay, encoding="utf-8")
    (tmp_path / "my_study.yaml").write_text(study, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("my_methods", None)


def test_the_example_s_overlay_trains(folder):
    data = features.write(folder)
    told = features.of(data, folder / "run", power=2.0, classifier_learning_rate=0.1)
    overlay = str(folder / "my_method.yaml")
    features.run("train.yaml", overlay, **told)
    table = pd.read_csv(folder / "run/iterations.csv")
    names = features.MODALITIES
    errors = (1 - table[[f"epsilon/{m}" for m in names]].to_numpy()) ** 2
    terms = table[[f"balance/{m}" for m in names]].to_numpy()
    np.testing.assert_allclose(terms, errors / errors.mean(axis=1, keepdims=True), rtol=1e-4, atol=1e-6)
    assert np.ptp(terms) > 0.1


def test_the_example_s_study_is_read(folder):
    study = read_study(folder / "my_study.yaml")
    assert set(study.arms) >= {"joint", "observe", "mine", "mine_shuffled"}
    mine, shuffled = study.arms["mine"], study.arms["mine_shuffled"]
    assert dict(mine.controls) == {"constant": "observe", "shuffled": "mine_shuffled"}
    assert find_file(mine.overlays[0]).read_bytes() == (folder / "my_method.yaml").read_bytes()
    assert dict(shuffled.settings) == {"control": "shuffled"}
    overlay = yaml.safe_load((folder / "my_method.yaml").read_text(encoding="utf-8"))
    assert set(shuffled.settings) <= set(overlay)
    assert set(overlay["method"]) - {"_target_", "network", "classifiers", "metric"} == {
        "power",
        "magnitude",
        "control",
    }
