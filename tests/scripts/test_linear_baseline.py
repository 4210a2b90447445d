# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from types import ModuleType

import numpy as np
import pytest
import typer
from sklearn.linear_model import LogisticRegression
from typer.testing import CliRunner

from tests.scripts.loading import script_module


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return script_module("linear_baseline")


@pytest.mark.parametrize(
    ("accuracies", "samples", "expected"),
    [
        ([0.5, 0.84, 0.87, 0.9], 64, 2),  # the best 0.9 ± 0.0375
        ([0.5, 0.84, 0.87, 0.9], 10_000, 3),
        ([0.9, 0.8], 64, 0),
        ([0.2, 1.0, 1.0], 64, 1),
        ([0.2, 0.99, 1.0], 64, 1),  # of 64 right out of 64 the error is not 0, but 0.015
        ([0.2, 0.98, 1.0], 64, 2),
    ],
)
def test_the_rule_of_one_standard_error_by_hand(script, accuracies, samples, expected):
    assert script.strongest_within_one_error(accuracies, samples) == expected


def test_it_is_a_logistic_regression_on_the_split_s_own_parts(script, tmp_path):
    rng = np.random.default_rng(0)
    label = np.arange(120) % 2
    a, b = rng.normal(size=(120, 3)) + label[:, None], rng.normal(size=(120, 2)) * 50
    np.savez(tmp_path / "two.npz", a=a, b=b, y=label)
    width = len(str(120))
    ids = [f"row_{i:0{width}d}" for i in range(1, 121)]
    split = {"train": ids[:70], "validation": ids[70:95], "test": ids[95:]}
    (tmp_path / "split.json").write_text(json.dumps(split))
    app = typer.Typer()
    app.command()(script.main)
    words = [tmp_path / "two.npz", "--split", tmp_path / "split.json", "--json", tmp_path / "out.json"]
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "out.json").read_text())
    assert list(rows) == ["a", "b", "all"]
    for name, x in {"a": a, "b": b, "all": np.hstack([a, b])}.items():
        x = (x - x[:70].mean(axis=0)) / x[:70].std(axis=0)
        model = LogisticRegression(C=rows[name]["C"], max_iter=5000).fit(x[:70], label[:70])
        assert rows[name]["validation"] == pytest.approx((model.predict(x[70:95]) == label[70:95]).mean())
        assert rows[name]["test"] == pytest.approx((model.predict(x[95:]) == label[95:]).mean())
        assert f"{rows[name]['test']:.3f}" in result.output
        chosen = {key: value for key, value in rows[name].items() if key != "every"}
        assert [row["C"] for row in rows[name]["every"]] == list(script.STRENGTHS)
        assert chosen in rows[name]["every"]
    x = (a - a[:95].mean(axis=0)) / a[:95].std(axis=0)
    model = LogisticRegression(C=rows["a"]["C"], max_iter=5000).fit(x[:95], label[:95])
    assert rows["a"]["test_refitted"] == pytest.approx((model.predict(x[95:]) == label[95:]).mean())
    assert rows["a"]["test"] > rows["b"]["test"]
