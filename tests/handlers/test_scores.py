# SPDX-License-Identifier: Apache-2.0
"""Rows, means and tables of an evaluation, in one process and in two."""

import csv
import io
import logging
import math
import statistics

import ignite.distributed as idist
import numpy as np
import pandas as pd
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from ignite.engine import Engine
from ignite.exceptions import NotComputableError
from monai.data import DataLoader, MetaTensor
from monai.engines import SupervisedEvaluator
from torch import nn
from torch.utils.data import DistributedSampler

from monai_cggm.errors import CaseError
from monai_cggm.handlers.scores import RegionScores, ScoresWriter
from monai_cggm.inferers import VolumeInferer
from monai_cggm.metrics import BRATS_REGIONS, region_scores

AFFINE = torch.diag(torch.tensor([1.0, 2.0, -3.0, 1.0], dtype=torch.float64))
SHAPE = (10, 9, 8)


class Predictors(nn.Module):
    """Reads predictions out of the image's channels, so that a test knows what was predicted."""

    def forward(self, x):
        classes = torch.arange(4).view(1, 4, 1, 1)
        return {name: -(x[:, i : i + 1] - classes).abs() for i, name in enumerate(("fusion", "flair", "t1"))}


class FusionOnly(Predictors):
    def forward(self, x):
        return super().forward(x)["fusion"]


def make_cases(number, seed=0):
    """Items with three predicted class maps in ``image`` and another one in ``label``."""
    generator = torch.Generator().manual_seed(seed)
    items = []
    for index in range(number):
        maps = torch.zeros(4, *SHAPE)
        for channel in maps:
            start = torch.randint(0, 4, (3,), generator=generator).tolist()
            for size, value in ((5, 2), (3, 1), (2, 3)):
                channel[tuple(slice(s, s + size) for s in start)] = value
        label = MetaTensor(maps[3:].byte(), affine=AFFINE)
        items.append({"case": f"case{index}", "image": MetaTensor(maps[:3], affine=AFFINE), "label": label})
    return items


def evaluate(items, metric, *, network=None, batch_size=1, handlers=(), sampler=None, **kwargs):
    evaluator = SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader(items, batch_size=batch_size, sampler=sampler),
        network=network or Predictors(),
        inferer=VolumeInferer(sw_batch_size=3),
        key_val_metric={"val_dice": metric},
        val_handlers=list(handlers),
        **{"decollate": False} | kwargs,
    )
    evaluator.run()
    return evaluator.state


def expected_rows(items, predictors=("fusion", "flair", "t1"), hd95=False):
    rows = []
    for item in items:
        for channel, predictor in enumerate(predictors):
            scores = region_scores(
                item["image"][channel].as_tensor(),
                item["label"][0].as_tensor(),
                spacing=(1, 2, 3),
                hd95=hd95 and predictor == "fusion",
            )
            rows.append({"case": item["case"], "predictor": predictor, "convention": "brats_legacy", **scores})
    return rows


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("hd95", [False, True])
def test_a_row_for_each_case_and_predictor(batch_size, hd95):
    items = make_cases(3)
    state = evaluate(items, RegionScores(hd95=hd95), batch_size=batch_size)
    expected = expected_rows(items, hd95=hd95)
    assert state.metric_details["cases"] == expected
    fusion = [row["dice_mean"] for row in expected if row["predictor"] == "fusion"]
    assert state.metrics["val_dice"] == pytest.approx(statistics.fmean(fusion))
    assert 0 < state.metrics["val_dice"] < 1
    for predictor in ("fusion", "flair", "t1"):
        for score in ("dice_WT", "dice_TC", "dice_ET", "dice_mean"):
            values = [row[score] for row in expected if row["predictor"] == predictor]
            assert state.metrics[f"{predictor}_{score}"] == pytest.approx(statistics.fmean(values))
    assert ("fusion_hd95_WT" in state.metrics) == hd95
    assert "flair_hd95_WT" not in state.metrics
    assert state.best_metric == state.metrics["val_dice"]


def test_dice_equals_a_plain_count():
    items = make_cases(2, seed=3)
    state = evaluate(items, RegionScores())
    for row in state.metric_details["cases"]:
        item = items[int(row["case"][-1])]
        channel = ("fusion", "flair", "t1").index(row["predictor"])
        for region, classes in BRATS_REGIONS.items():
            pred, truth = (np.isin(np.asarray(x), classes) for x in (item["image"][channel], item["label"][0]))
            assert row[f"dice_{region}"] == pytest.approx(2 * (pred & truth).sum() / (pred.sum() + truth.sum()))


def test_hd95_is_in_millimetres_of_an_oblique_label():
    """The voxels' sizes are the lengths of the affine's columns, whichever way these point."""
    angle = math.radians(30)
    turn = torch.eye(4, dtype=torch.float64)
    turn[:2, :2] = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    items = make_cases(1)
    straight = evaluate(items, RegionScores(hd95=True)).metrics["fusion_hd95_WT"]
    items[0]["label"].affine = turn @ AFFINE
    oblique = evaluate(items, RegionScores(hd95=True)).metrics["fusion_hd95_WT"]
    items[0]["label"].affine = torch.eye(4, dtype=torch.float64)
    voxels = evaluate(items, RegionScores(hd95=True)).metrics["fusion_hd95_WT"]
    assert oblique == pytest.approx(straight, rel=1e-6)
    assert voxels != pytest.approx(straight, rel=1e-2)


def test_a_lone_tensor_is_the_fusion():
    items = make_cases(2)
    state = evaluate(items, RegionScores(), network=FusionOnly())
    assert state.metric_details["cases"] == expected_rows(items, predictors=("fusion",))


def test_slices_score_too():
    label = torch.zeros(2, 1, 6, 6, dtype=torch.uint8)
    label[:, :, 2:4] = 1
    logits = nn.functional.one_hot(label[:, 0].long(), 2).movedim(-1, 1).float()
    evaluator = Engine(lambda engine, batch: {"pred": logits, "label": batch["label"]})
    RegionScores({"lesion": [1]}).attach(evaluator, "dice")
    state = evaluator.run([{"label": label, "case": ["a", "b"]}])
    assert state.metrics["dice"] == 1.0


def test_the_convention_reaches_the_scores():
    items = make_cases(1)
    items[0]["label"].zero_()
    assert evaluate(items, RegionScores()).metrics["val_dice"] == 0.0
    state = evaluate(items, RegionScores(convention="monai"))
    assert math.isnan(state.metrics["val_dice"])
    assert {row["convention"] for row in state.metric_details["cases"]} == {"monai"}


@pytest.mark.parametrize("convention", ["brats_legacy_et500", "brats2023_lesionwise"])
@pytest.mark.parametrize("hd95", [False, True])
def test_conventions_with_thresholds_in_mm3(tmp_path, capsys, convention, hd95):
    """They need the spacing without HD95 too, and go through to the files and the table."""
    items = make_cases(2)
    writer = ScoresWriter(tmp_path)
    state = evaluate(items, RegionScores(convention=convention, hd95=hd95), handlers=[writer])
    for row in state.metric_details["cases"]:
        item = items[int(row["case"][-1])]
        channel = ("fusion", "flair", "t1").index(row["predictor"])
        scores = region_scores(
            item["image"][channel].as_tensor(),
            item["label"][0].as_tensor(),
            spacing=(1, 2, 3),
            convention=convention,
            hd95=hd95 and row["predictor"] == "fusion",
        )
        assert row == {"case": row["case"], "predictor": row["predictor"], "convention": convention, **scores}
    summary = pd.read_csv(tmp_path / "summary.csv")
    assert set(summary["convention"]) == {convention}
    assert ("hd95_WT" in set(summary["score"])) == hd95
    assert convention in capsys.readouterr().out


@pytest.mark.parametrize("convention", ["brats_legacy_et500", "brats2023_lesionwise"])
def test_thresholds_in_mm3_without_a_spacing(convention):
    items = make_cases(1)
    items[0]["label"] = items[0]["label"].as_tensor()
    with pytest.raises(CaseError, match=f"case case0: fusion: the convention '{convention}' .* needs the spacing"):
        evaluate(items, RegionScores(convention=convention))


def test_every_evaluation_starts_anew():
    metric = RegionScores()
    evaluate(make_cases(3), metric)
    assert len(evaluate(make_cases(2), metric).metric_details["cases"]) == 6


# --- what it refuses


def twice(items):
    items[1]["case"] = "case0"


def unmapped_label(items):
    items[0]["label"][0, 0, 0, 0] = 4


def nan_logits(items):
    items[0]["image"][1, 0, 0, 0] = math.nan


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (twice, "case case0: scored twice in one evaluation"),
        (unmapped_label, r"case case0: fusion: the label's values go from 0 to 4, expected classes 0 to 3"),
        (nan_logits, "case case0: flair: the logits hold NaN"),
    ],
)
def test_a_case_that_cannot_be_scored(spoil, message, batch_size):
    items = make_cases(2)
    spoil(items)
    with pytest.raises(CaseError, match=message):
        evaluate(items, RegionScores(), batch_size=batch_size)


def test_a_label_of_another_shape():
    items = make_cases(1)
    items[0]["label"] = items[0]["label"][..., :-1]
    with pytest.raises(CaseError, match="case case0: fusion: the prediction has shape"):
        evaluate(items, RegionScores())


def test_hd95_without_a_spacing():
    items = make_cases(1)
    items[0]["label"] = items[0]["label"].as_tensor()
    with pytest.raises(CaseError, match="case case0: fusion: HD95 is in mm and needs the spacing"):
        evaluate(items, RegionScores(hd95=True))


def test_a_decollated_batch_says_what_to_do():
    with pytest.raises(TypeError, match="decollate=False"):
        evaluate(make_cases(1), RegionScores(), decollate=True)


def test_a_batch_without_ids():
    items = [{key: value for key, value in item.items() if key != "case"} for item in make_cases(1)]
    with pytest.raises(KeyError, match="needs 'case', found"):
        evaluate(items, RegionScores())


@pytest.mark.parametrize(
    ("predictions", "cases", "message"),
    [
        ({"flair": torch.zeros(2, 4, 3, 3, 3)}, ["a", "b"], "lack 'fusion'"),
        ({"fusion": torch.zeros(2, 4, 3, 3, 3)}, ["a"], "expected 2 case IDs"),
        ({"fusion": torch.zeros(2, 4, 3, 3, 3)}, "ab", "expected 2 case IDs"),
    ],
)
def test_predictions_and_ids_that_do_not_fit(predictions, cases, message):
    with pytest.raises(ValueError, match=message):
        RegionScores().update((predictions, torch.zeros(2, 1, 3, 3, 3, dtype=torch.uint8), cases))


def test_nothing_scored_and_an_unknown_convention():
    with pytest.raises(NotComputableError):
        RegionScores().compute()
    with pytest.raises(ValueError, match="'lenient'"):
        RegionScores(convention="lenient")


# --- several processes


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    records = io.StringIO()
    logging.getLogger("monai_cggm").addHandler(logging.StreamHandler(records))
    items = make_cases(3)
    sampler = DistributedSampler(items, num_replicas=2, rank=rank, shuffle=False)  # the padding repeats case0 on rank 1
    writer = ScoresWriter(f"{folder}/scores{rank}", quiet=True)
    state = evaluate(items, RegionScores(hd95=True), sampler=sampler, handlers=[writer])
    torch.save(
        {"rows": state.metric_details["cases"], "metrics": dict(state.metrics), "log": records.getvalue()},
        f"{folder}/{rank}.pt",
    )
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_give_what_one_gives(tmp_path):
    mp.spawn(worker, args=(str(tmp_path),), nprocs=2)
    alone = evaluate(make_cases(3), RegionScores(hd95=True))
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    for rank in ranks:
        assert rank["rows"] == alone.metric_details["cases"]  # three cases, not four
        assert rank["metrics"] == alone.metrics
    assert "1 case(s) were scored by more than one process" in ranks[0]["log"]
    assert "case0" in ranks[0]["log"]
    assert ranks[1]["log"] == ""
    assert (tmp_path / "scores0" / "cases.csv").is_file()
    assert not (tmp_path / "scores1").exists()


# --- files and table


def test_a_subset_keeps_its_name_in_the_table(tmp_path, capsys):
    """What stands in brackets could be taken for a mark-up of the terminal's."""
    engine = Engine(lambda *_: None)
    row = {"case": "a", "convention": "brats_legacy", "dice_WT": 0.9, "dice_mean": 0.9}
    engine.state.metric_details = {"cases": [{**row, "predictor": p} for p in ("fusion", "fusion[flair]")]}
    ScoresWriter(tmp_path).attach(engine)
    engine.run([0])
    assert "fusion[flair]" in capsys.readouterr().out


def test_files_and_table(tmp_path, capsys):
    items = make_cases(4)
    state = evaluate(items, RegionScores(hd95=True), handlers=[ScoresWriter(tmp_path / "scores")])
    rows = state.metric_details["cases"]

    with (tmp_path / "scores" / "cases.csv").open(newline="") as file:
        written = list(csv.DictReader(file))
    assert [(row["case"], row["predictor"], row["convention"]) for row in written] == [
        (row["case"], row["predictor"], "brats_legacy") for row in rows
    ]
    for found, row in zip(written, rows, strict=True):
        for score in ("dice_WT", "dice_TC", "dice_ET", "dice_mean", "hd95_WT", "hd95_TC", "hd95_ET"):
            assert found[score] == (str(row[score]) if score in row else "")

    summary = pd.read_csv(tmp_path / "scores" / "summary.csv").set_index(["predictor", "score"])
    assert set(summary["convention"]) == {"brats_legacy"}
    assert ("flair", "hd95_WT") not in summary.index
    for (predictor, score), found in summary.iterrows():
        values = [row[score] for row in rows if row["predictor"] == predictor]
        assert found["mean"] == pytest.approx(statistics.fmean(values))
        assert found["sd"] == pytest.approx(statistics.stdev(values))
        assert found["n"] == 4
    assert list(summary.index.get_level_values("predictor").unique()) == ["fusion", "flair", "t1"]
    assert sorted(path.name for path in (tmp_path / "scores").iterdir()) == ["cases.csv", "summary.csv"]

    table = capsys.readouterr().out
    assert max(map(len, table.splitlines())) <= 80
    for text in ("4 cases", "brats_legacy", "Dice WT", "Dice TC", "Dice ET", "HD95 WT"):
        assert text in table
    fusion = next(line for line in table.splitlines() if "fusion" in line)
    means = [summary.loc[("fusion", f"dice_{name}"), "mean"] for name in ("WT", "TC", "ET", "mean")]
    distances = [summary.loc[("fusion", f"hd95_{name}"), "mean"] for name in ("WT", "TC", "ET")]
    assert [cell.strip() for cell in fusion.strip("│ \n").split("│")] == [
        "fusion",
        *(f"{mean:.3f}" for mean in means),
        *(f"{distance:.1f}" for distance in distances),
    ]


def test_one_case_has_no_deviation(tmp_path, capsys):
    evaluate(make_cases(1), RegionScores(), handlers=[ScoresWriter(tmp_path)])
    summary = pd.read_csv(tmp_path / "summary.csv")
    assert summary["sd"].isna().all()
    assert (summary["n"] == 1).all()
    out = capsys.readouterr().out
    assert "1 case," in out
    assert "HD95 WT" not in out


def test_quiet_prints_nothing(tmp_path, capsys):
    evaluate(make_cases(1), RegionScores(), handlers=[ScoresWriter(tmp_path, quiet=True)])
    assert capsys.readouterr().out == ""


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    evaluate(make_cases(1), RegionScores(), handlers=[ScoresWriter(tmp_path, quiet=True)])
    before = (tmp_path / "cases.csv").read_bytes()

    def interrupted(self, path, **kwargs):
        path.write_text("case,predic")
        raise OSError("no space left on device")

    monkeypatch.setattr(pd.DataFrame, "to_csv", interrupted)
    with pytest.raises(OSError, match="no space left"):
        evaluate(make_cases(2), RegionScores(), handlers=[ScoresWriter(tmp_path, quiet=True)])
    assert (tmp_path / "cases.csv").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 2


def test_a_writer_needs_scores(tmp_path):
    evaluator = Engine(lambda engine, batch: None)
    ScoresWriter(tmp_path).attach(evaluator)
    with pytest.raises(ValueError, match="needs a RegionScores"):
        evaluator.run([0])


def test_only_rank_0_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(idist, "get_rank", lambda: 1)
    evaluate(make_cases(1), RegionScores(), handlers=[ScoresWriter(tmp_path / "scores")])
    assert not (tmp_path / "scores").exists()
