# SPDX-License-Identifier: Apache-2.0
"""The method that the documentation writes as an example."""

import pytest
import torch
import yaml

from monai_cggm.methods import UnimodalObserver
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


def test_the_example_s_configurations_are_whole(page, example):
    overlay, study = (yaml.safe_load(part.split("```")[0]) for part in page.split("```yaml\n")[1:])
    arguments = set(overlay["method"]) - {"_target_", "network", "classifiers", "metric"}
    assert arguments == {"power", "magnitude", "control"} <= set(overlay)
    arms = study["arms"]
    assert all(control in arms for arm in arms.values() for control in arm.get("controls", {}).values())
