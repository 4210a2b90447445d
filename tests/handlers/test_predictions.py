# SPDX-License-Identifier: Apache-2.0
"""Scores and files of predicted classes and numbers."""

import numpy as np
import pandas as pd
import pytest
import torch
from ignite.engine import Engine
from sklearn.metrics import f1_score

from monai_cggm.errors import CaseError
from monai_cggm.handlers.predictions import PredictionScores, PredictionScoresWriter, PredictionsWriter

CLASSES = ["ape", "bee", "cat"]


def batches(task, samples=11, size=4, predictors=("fusion", "audio"), seed=0):
    generator = torch.Generator().manual_seed(seed)
    outputs = 3 if task == "classification" else 1
    result = []
    for start in range(0, samples, size):
        n = min(size, samples - start)
        label = (
            torch.randint(0, 3, (n,), generator=generator) if outputs == 3 else torch.randn(n, 1, generator=generator)
        )
        pred = {p: torch.randn(n, outputs, generator=generator) for p in predictors}
        result.append({"case": [f"s{start + i:02d}" for i in range(n)], "label": label, "pred": pred})
    return result[::-1]


def evaluate(data, *handlers, classes=CLASSES, **kwargs):
    engine = Engine(lambda _, batch: {"pred": batch["pred"], "label": batch["label"]})
    PredictionScores(classes, **kwargs).attach(engine, "value")
    for handler in handlers:
        handler.attach(engine)
    engine.run(data)
    return engine.state


def joined(data, key):
    return torch.cat([b["pred"][key] if key in b["pred"] else b[key] for b in data])


def test_classes_are_scored_over_all_batches(tmp_path):
    data = batches("classification")
    state = evaluate(data, PredictionScoresWriter(tmp_path))
    truth = joined(data, "label")
    for name in ("fusion", "audio"):
        predicted = joined(data, name).argmax(dim=1)
        assert state.metrics[f"{name}_accuracy"] == pytest.approx((predicted == truth).double().mean().item())
        assert state.metrics[f"{name}_f1"] == pytest.approx(f1_score(truth, predicted, average="weighted"))
    assert state.metrics["value"] == state.metrics["fusion_accuracy"]
    rows = pd.read_csv(tmp_path / "cases.csv")
    assert list(rows.columns) == ["case", "predictor", "truth", "prediction", "accuracy"]
    assert rows["case"].tolist() == sorted(rows["case"])
    assert rows["predictor"].tolist() == ["fusion", "audio"] * 11
    assert set(rows["truth"]) <= set(CLASSES)
    assert rows[rows["predictor"] == "audio"]["accuracy"].mean() == pytest.approx(state.metrics["audio_accuracy"])
    assert (rows["accuracy"] == (rows["truth"] == rows["prediction"])).all()
    summary = pd.read_csv(tmp_path / "summary.csv").set_index(["predictor", "score"])
    assert summary.loc[("audio", "f1"), "mean"] == pytest.approx(state.metrics["audio_f1"])
    assert (summary["n"] == 11).all()


def test_numbers_are_scored_and_the_value_grows_with_quality(tmp_path):
    data = batches("regression")
    state = evaluate(data, PredictionScoresWriter(tmp_path, quiet=True), classes=None)
    errors = (joined(data, "fusion") - joined(data, "label")).abs()
    assert state.metrics["value"] == pytest.approx(-errors.mean().item())
    assert {f"fusion_{s}" for s in ("mae", "pearson", "acc2", "acc7", "f1")} <= set(state.metrics)
    rows = pd.read_csv(tmp_path / "cases.csv")
    fusion = rows[rows["predictor"] == "fusion"]
    np.testing.assert_allclose(fusion["absolute_error"], (fusion["truth"] - fusion["prediction"]).abs())
    assert fusion["absolute_error"].mean() == pytest.approx(errors.mean().item())
    assert "fusion_acc7" not in evaluate(data, classes=[], sentiment=False).metrics


def test_a_lone_tensor_is_the_fusion_and_an_epoch_forgets_the_last_one():
    data = [{**b, "pred": b["pred"]["fusion"]} for b in batches("classification")]
    engine = Engine(lambda _, batch: {"pred": batch["pred"], "label": batch["label"]})
    PredictionScores(CLASSES).attach(engine, "value")
    engine.run(data)
    engine.run(data[:1])
    assert [row["predictor"] for row in engine.state.metric_details["cases"]] == ["fusion"] * 3


def test_what_cannot_be_scored_is_refused():
    data = batches("classification")
    data[0]["pred"]["audio"][1] = float("nan")
    with pytest.raises(CaseError, match="case s09: audio: the prediction is not a number"):
        evaluate(data)
    endless = batches("regression")
    endless[0]["pred"]["audio"][1] = float("inf")
    with pytest.raises(CaseError, match="case s09: audio: the prediction is not a number, or infinite"):
        evaluate(endless, classes=[])
    mixed = [{**data[1], "present": torch.tensor([[True, False]] + [[True, True]] * 3)}]
    with pytest.raises(ValueError, match="PresenceBatches"):
        evaluate(mixed)
    alike = [{**data[1], "present": torch.tensor([[True, False]] * 4)}]
    assert len(evaluate(alike).metric_details["cases"]) == 8
    with pytest.raises(ValueError, match="lack 'fusion'"):
        evaluate([{**data[1], "pred": {"audio": data[1]["pred"]["audio"]}}])
    with pytest.raises(ValueError, match="expected 4 case IDs"):
        evaluate([{**data[1], "case": ["s"]}])
    engine = Engine(lambda *_: None)
    PredictionScoresWriter("nowhere").attach(engine)
    with pytest.raises(ValueError, match="found no scores"):
        engine.run([0])


@pytest.mark.parametrize("classes", [CLASSES, None])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_prediction_that_is_no_number_is_named_and_nothing_is_written(classes, bad, tmp_path):
    prediction = torch.zeros(3, 1 if classes is None else len(CLASSES))
    prediction[1, 0] = bad

    def run(fusion, audio):
        engine = Engine(lambda *_: {"pred": {"fusion": fusion, "audio": audio}})
        PredictionsWriter(tmp_path, classes).attach(engine)
        engine.run([{"case": ["s1", "s2", "s3"]}])

    fine = torch.zeros_like(prediction)
    with pytest.raises(CaseError, match="case s2: fusion predicts NaN or infinity"):
        run(prediction, fine)
    with pytest.raises(CaseError, match="case s2: audio predicts NaN or infinity"):
        run(fine, prediction)
    assert list(tmp_path.iterdir()) == []
    run(fine, fine)
    assert len(pd.read_csv(tmp_path / "predictions.csv")) == 3


def test_the_printed_table_leaves_out_subsets_of_which_there_are_too_many(tmp_path, capsys):
    predictors = ("fusion", "fusion[a+b]", "fusion[a]", "a")
    state_of = evaluate(batches("classification", predictors=predictors), PredictionScoresWriter(tmp_path, rows=3))
    printed = capsys.readouterr().out
    assert "fusion[a]" in printed
    assert "fusion[a+b]" not in printed
    assert "fusion[a+b]_accuracy" in state_of.metrics
    assert max(map(len, printed.splitlines())) <= 80


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_predictions_are_written_by_case(task, tmp_path):
    data = batches(task)
    del data[0]["pred"]["audio"]  # a batch of samples that lack it
    engine = Engine(lambda _, batch: {"pred": batch["pred"]})
    PredictionsWriter(tmp_path, CLASSES if task == "classification" else None).attach(engine)
    engine.run(data)
    assert [p.name for p in tmp_path.iterdir()] == ["predictions.csv"]
    table = pd.read_csv(tmp_path / "predictions.csv")
    cases = [c for b in data for c in b["case"]]
    order = np.argsort(cases)
    assert table["case"].tolist() == sorted(cases)
    logits = joined(data, "fusion")[order]
    if task == "classification":
        expected = logits.softmax(dim=1).numpy()
        np.testing.assert_allclose(table[[f"probability_{c}" for c in CLASSES]], expected, atol=1e-6)
        assert table["prediction"].tolist() == [CLASSES[i] for i in logits.argmax(dim=1)]
    else:
        np.testing.assert_allclose(table["prediction"], logits[:, 0], rtol=1e-6)
    lacking = table["case"].isin(data[0]["case"])
    assert table.loc[lacking, "audio_prediction"].isna().all()
    assert table.loc[~lacking, "audio_prediction"].notna().all()
