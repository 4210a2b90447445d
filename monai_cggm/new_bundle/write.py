# SPDX-License-Identifier: Apache-2.0
"""Write a bundle for a data set: configurations, metadata, datalist, split, a study, a model card."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from monai_cggm.data.splits import PART_OF, PARTS, Split, check_patients, fold_splits, split_cases, write_split
from monai_cggm.discovery import Found, Survey, survey_cases, write_datalist
from monai_cggm.discovery.convert import refuse_folder
from monai_cggm.discovery.names import NAMES
from monai_cggm.errors import DataError
from monai_cggm.files import atomic_path
from monai_cggm.new_bundle.background import plain_number, with_background
from monai_cggm.new_bundle.card import model_card
from monai_cggm.new_bundle.plan import BundlePlan, Wishes, check_wishes, plan_bundle
from monai_cggm.new_bundle.texts import as_text, headed, overlaid, without
from monai_cggm.resources import share_path

TEMPLATE = "bundles/brats_cggm"
STUDY, SPLIT = "study.yaml", "split.json"

#: File of the bundle -> what it is a copy of.
_COPIED = {
    "LICENSE": f"{TEMPLATE}/LICENSE",
    "configs/logging.conf": f"{TEMPLATE}/configs/logging.conf",
    "configs/mlflow.json": "configs/tracking/mlflow.json",
}


@dataclass(frozen=True)
class NewBundle:
    """A bundle that was written.

    Attributes:
        folder: where it is.
        plan: its numbers and names.
        survey: of the labelled cases.
        parts: part -> cases, of the first split.
        parts_from: where they come from, in words.
        unlabelled: cases without a label, which are in no part.
    """

    folder: Path
    plan: BundlePlan
    survey: Survey
    parts: Mapping[str, int]
    parts_from: str
    unlabelled: tuple[str, ...]


def new_bundle(
    found: Found,
    out: str | Path,
    wishes: Wishes | None = None,
    *,
    copy: bool = False,
    workers: int = 0,
    progress: bool = True,
) -> NewBundle:
    """Write a bundle that trains on a discovered data set.

    It is ``bundles/brats_cggm`` with other names and numbers: every method, part and command works with it as with that
    one. Beside ``configs/`` it has ``datalist.json`` (and ``volumes/``, of what is no plain NIfTI), ``split.json`` or
    one a fold, ``study.yaml`` for ``monai-cggm compare``, and ``docs/README.md``, a model card. Configurations come
    last: a folder that has them is complete. What was converted before an interruption is kept.

    Args:
        found: see :func:`monai_cggm.discovery.discover`. Cases without a label are left out.
        out: the bundle's folder, outside of the data.
        wishes: what wins over the data.
        copy: copy plain NIfTI files too, under names of case and modality; otherwise they stay where they are and the
            datalist has their paths.
        workers: threads that read and convert.
        progress: show progress bars.

    Returns:
        The bundle.

    Raises:
        DataError: lists everything that is wrong with cases, wishes or folder, before anything is written.
        ValueError: where a wish makes no sense for any data.
    """
    wishes = wishes or Wishes()
    folder = Path(out).expanduser().absolute()
    if (folder / "configs").exists():
        raise DataError([f"{folder} has a bundle already (configs): choose another folder, or remove it"])
    refuse_folder(folder, found)
    unlabelled = tuple(case.case_id for case in found.cases if case.label is None)
    labelled = found.without(unlabelled)
    _refuse_mixed_labels(labelled)
    splits, seed = _splits(labelled, wishes)
    check_wishes(labelled, wishes)
    survey = survey_cases(labelled, workers=workers, progress=progress)
    trained = [{str(item["case"]) for item in split["train"]} for split in splits]
    plan = plan_bundle(labelled, survey, trained, wishes)
    listed = replace(
        labelled,
        label_names={**plan.classes, **(labelled.label_names or {})},
        label_regions={name: tuple(values) for name, values in wishes.regions.items()} or labelled.label_regions,
    )
    write_datalist(listed, folder, copy=copy, workers=workers, progress=progress)
    names = [SPLIT] if len(splits) == 1 else [f"split_fold{number}.json" for number in range(len(splits))]
    for name, split in zip(names, splits, strict=True):
        write_split(split, folder / name, seed)
    parts = {part: len(splits[0][part]) for part in PARTS}
    files = {
        STUDY: _study(plan, names, wishes.seed),
        "docs/README.md": model_card(plan, survey, parts, folder.name),
        "docs/data_license.txt": "This bundle holds no data. State here whose they are, and under which terms.\n",
        **{f"configs/{name}": text for name, text in configurations(plan, names[0], wishes.seed).items()},
    }
    for name, text in files.items():
        with atomic_path(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8", newline="\n")
    for name, source in _COPIED.items():
        with atomic_path(folder / name) as temporary:
            shutil.copyfile(share_path(source), temporary)
    return NewBundle(folder, plan, survey, parts, _parts_from(labelled, wishes), unlabelled)


def configurations(plan: BundlePlan, split: str, seed: int) -> dict[str, str]:
    """Return the texts of a bundle's configuration files, by name.

    Args:
        plan: its numbers and names.
        split: name of the split file in the bundle.
        seed: of training.
    """
    texts = {path.name: path.read_text(encoding="utf-8") for path in share_path(f"{TEMPLATE}/configs").glob("*.yaml")}
    train, inference = texts["train.yaml"], texts["inference.yaml"]
    if plan.network == "small":
        small = _overlay("configs/hardware/cpu.yaml")
        train, inference = overlaid(train, small), overlaid(inference, small, known_only=True)
    if plan.spatial_dims == 3:
        train = overlaid(train, _overlay("configs/protocols/patches_3d.yaml") + _SOLID[plan.network])
        inference = overlaid(inference, _overlay("configs/protocols/patches_3d_inference.yaml") + _SOLID[plan.network])
        train, inference = without(train, _OF_SLICES), without(inference, _OF_SLICES)
    train, inference = with_background(train, plan.floors), with_background(inference, plan.floors)
    values = _values(plan, split, seed)
    command = "python -m monai.bundle run --config_file"
    return {
        "train.yaml": headed(
            overlaid(train, as_text(values), known_only=True),
            f"{plan.title}: training.\n\n  {command} configs/train.yaml --run_dir runs/recipe\n\n"
            "Run it in the bundle's folder, or give --bundle_root. Every name of the first block can be set on the\n"
            "command line, and further files merge over this one; configs/methods of the package has other methods.",
        ),
        "inference.yaml": headed(
            overlaid(inference, as_text(values | {"dataset_dir": _NEW_CASES}), known_only=True),
            f"{plan.title}: segment cases that need no truth.\n\n"
            f"  {command} configs/inference.yaml --dataset_dir CASES --model_file runs/recipe/model.pt\n\n"
            "CASES has files ID_<modality>.nii.gz, or is a datalist (.json), which is made of any other layout by\n\n"
            "  monai-cggm datalist LIST --data CASES --no-labels",
        ),
        "evaluate.yaml": headed(
            texts["evaluate.yaml"],
            "Score a trained run on whole volumes, region by region and case by case.\n\n"
            f"  {command} \"['configs/train.yaml','configs/evaluate.yaml']\" --run_dir runs/recipe --part test\n\n"
            "Give the same overlays as in training. The split is read back from the run's folder.",
        ),
        "multi_gpu_train.yaml": headed(
            texts["multi_gpu_train.yaml"],
            "Several processes, one GPU each; merge it over train.yaml, last:\n\n"
            "  torchrun --standalone --nproc_per_node=2 -m monai.bundle run \\\n"
            "    --config_file \"['configs/train.yaml','configs/multi_gpu_train.yaml']\"\n\n"
            "volumes_per_batch counts over all processes, which must divide it.",
        ),
        "metadata.json": json.dumps(_metadata(plan), indent=2, ensure_ascii=False) + "\n",
    }


#: What only slices have, and would be read by nothing.
_OF_SLICES = ("slice_size", "slices_per_volume", "tumour_free_share", "slices_at_once")

#: The paper's four ResNet-101 have 520 million parameters in three dimensions.
_SOLID = {
    "paper": as_text({"encoder#backbone": ("resnet18", "the paper's is for slices"), "encoder#width": (32, None)}),
    "small": "",
}

_NEW_CASES = ("./new_cases", "a folder of cases, or a datalist (.json)")


def _values(plan: BundlePlan, split: str, seed: int) -> dict[str, tuple[Any, str | None]]:
    names = list(plan.classes.values())
    two = plan.spatial_dims == 2
    return {
        "dataset_dir": ("$@bundle_root + '/datalist.json'", "or a folder of cases ID_<modality>.nii.gz"),
        "run_dir": ("./runs/recipe", "everything that a run writes"),
        "model_file": ("./runs/recipe/model.pt", None),
        "modalities": (list(plan.modalities), "channel order"),
        "labels": (plan.label_map, "value in the files=class"),
        "num_classes": (len(names), ", ".join(names)),
        "class_names": (names[1:], "in pictures"),
        "regions": ({name: list(classes) for name, classes in plan.regions.items()}, "of classes; may overlap"),
        "orientation": (plan.orientation, "of prepared volumes" + ("; slices are along the last axis" if two else "")),
        "allow_missing": (plan.allow_missing, "accept cases that lack modalities, in training too"),
        "split_file": (f"$@bundle_root + '/{split}'", "null: draw by patient"),
        "seed": (seed, None),
        "epochs": (plan.epochs, None),
        "volumes_per_batch": (plan.volumes_per_batch, None),
        **(
            {
                "slices_per_volume": (plan.samples_per_volume, None),
                "slice_size": (list(plan.size), None),
                "tumour_free_share": (0.25, "share of slices without foreground"),
            }
            if two
            else {"patches_per_volume": (plan.samples_per_volume, None), "patch_size": (list(plan.size), None)}
        ),
        "cross_entropy_weight": (list(plan.class_weights), "one over the root of the share of voxels, bounded"),
        "val_interval": (plan.val_interval, "epochs between validations, on whole volumes"),
        "image_interval": (plan.val_interval, "epochs between pictures in TensorBoard, a multiple of val_interval"),
        "cache_dir": (
            "$@bundle_root + '/cache'" if plan.on_disk else None,
            "keep prepared volumes on disk instead of in memory",
        ),
    }


def _overlay(name: str) -> str:
    return share_path(name).read_text(encoding="utf-8")


def _refuse_mixed_labels(found: Found) -> None:
    """Refuse cases in which one value means different things, as a datalist tells or the IDs of BraTS releases."""
    conventions = {case.told_convention(): case.case_id for case in found.cases}
    if len(conventions) > 1:
        shown = ", ".join(f"{case_id} {name or 'none'}" for name, case_id in conventions.items())
        raise DataError(
            [
                f"{found.source}: the cases have different label conventions ({shown}), so that one value means "
                "different things: write the labels anew in one convention, or make a bundle of each; for BraTS, "
                "bundles/brats_cggm reads all of them"
            ]
        )


def _splits(found: Found, wishes: Wishes) -> tuple[list[Split], int]:
    """One split, or one a fold; the data set's own parts, where it has some, and what it lacks drawn from training."""
    items = [{"case": case.case_id, "patient": case.patient} for case in found.cases]
    patients = len({item["patient"] for item in items})
    fewest = max(3, wishes.folds or 0)
    if patients < fewest:
        raise DataError(
            [
                f"{found.source}: {patients} patients with a label, expected {fewest} at least: training, validation "
                "and test have different ones"
                + (f", and {wishes.folds} folds too" if wishes.folds else "")
                + found.patients_advice
            ]
        )
    if wishes.folds:
        return fold_splits(items, folds=wishes.folds, seed=wishes.seed), wishes.seed
    told: Split = {part: [] for part in PARTS}
    for case, item in zip(found.cases, items, strict=True):
        told[PART_OF[case.section]].append(item)
    if not told["train"] or not (told["validation"] or told["test"]):
        return [split_cases(items, seed=wishes.seed)], wishes.seed
    try:
        check_patients(told)
    except DataError as error:
        raise DataError([text + found.patients_advice for text in error.problems]) from error
    lacking = [part for part in ("validation", "test") if not told[part]]
    if not lacking:
        return [told], wishes.seed
    # no case that the data set tests on may train, nor the other way about
    fractions = [0.85 if part == "train" else 0.15 * (part in lacking) for part in PARTS]
    drawn = split_cases(told["train"], fractions=fractions, seed=wishes.seed)
    return [{part: drawn[part] or told[part] for part in PARTS}], wishes.seed


def _parts_from(found: Found, wishes: Wishes) -> str:
    """Say what :func:`_splits` did."""
    if wishes.folds:
        return f"the first of {wishes.folds} folds, drawn by patient"
    told = {PART_OF[case.section] for case in found.cases}
    if "train" not in told or len(told) == 1:
        return "drawn by patient"
    lacking = [part for part in PARTS if part not in told]
    return f"the data set's own, {lacking[0]} drawn from training by patient" if lacking else "the data set's own"


def _study(plan: BundlePlan, splits: Sequence[str], seed: int) -> str:
    parts = ["configs/parts/dropout.yaml"]
    head = (
        f"# Does balancing help on these data?\n#\n"
        f"#   monai-cggm compare {STUDY} --data datalist.json --out comparison\n#\n"
        "# With seeds: [0, 1, 2] the differences say more, and alone: true adds one network a modality.\n"
    )
    content = {
        "title": plan.title,
        "reference": "joint",
        "part": "test",
        "convention": "brats_legacy",
        "seeds": [seed],
        "splits": list(splits),
        "config": ["configs/train.yaml"],
        "evaluation": ["configs/evaluate.yaml", "configs/protocols/subsets.yaml"],
        "alone": False,
        "arms": {
            "joint": {"title": "joint training", "overlays": ["configs/methods/joint.yaml"]},
            "dropout": {"title": "+ modality dropout", "overlays": ["configs/methods/joint.yaml", *parts]},
            "recipe": {
                "title": "+ auxiliary losses",
                "overlays": ["configs/methods/observe.yaml", *parts, "configs/parts/auxiliary.yaml"],
                "controls": {"without": "dropout"},
            },
            "cggm": {
                "title": "CGGM, clipped",
                "overlays": ["configs/methods/cggm.yaml"],
                "settings": {"gradient_clip": 1.0},
            },
        },
    }
    return head + yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120)


def _metadata(plan: BundlePlan) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(share_path(f"{TEMPLATE}/configs/metadata.json").read_text(encoding="utf-8"))
    classes = {str(number): name for number, name in enumerate(plan.classes.values())}
    modalities = {str(number): name for number, name in enumerate(plan.modalities)}
    listed = ", ".join(f"{number} {name}" for number, name in classes.items())
    above = ", ".join(["0", *(f"{plain_number(floor)} and below in {key}" for key, floor in plan.floors.items())])
    content |= {
        "name": plan.title,
        "task": f"Segmentation of {', '.join(plan.regions)} from {', '.join(plan.modalities)}",
        "data_source": "see docs/data_license.txt",
        "authors": "",
        "copyright": "",
        "image_classes": f"{', '.join(plan.modalities)}: one volume each, on one grid, z-scores without the background "
        f"({above})",
        "label_classes": listed,
        "pred_classes": "the label's classes; files carry the data set's own values",
    }
    content["references"] = content["references"][:2]
    shape = ["*"] * plan.spatial_dims
    formats = content["network_data_format"]
    formats["inputs"]["image"] |= {
        "modality": "/".join(dict.fromkeys(_kind(name) for name in plan.modalities)),
        "num_channels": len(modalities),
        "spatial_shape": shape,
        "channel_def": modalities,
    }
    formats["outputs"]["pred"] |= {"num_channels": len(classes), "spatial_shape": shape, "channel_def": classes}
    return content


def _kind(modality: str) -> str:
    """The machine that an image is of, by its name, in DICOM's words; unknown where the name tells nothing.

    Example:
        >>> [_kind(name) for name in ("flair", "cta", "suv", "cbf", "zscore_1")]
        ['MR', 'CT', 'PT', 'unknown', 'unknown']
    """
    if modality in ("ct", "cta", "ctp", "ctres"):
        return "CT"
    if modality in ("pet", "suv"):
        return "PT"
    # perfusion is measured by both
    return "MR" if modality in NAMES and modality not in ("cbf", "cbv", "mtt", "tmax", "ttp") else "unknown"
