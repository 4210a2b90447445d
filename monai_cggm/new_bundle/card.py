# SPDX-License-Identifier: Apache-2.0
"""The model card of a new bundle: what it is for, what it was made from, how it is used, and what it is not for."""

from __future__ import annotations

import shlex
from collections.abc import Mapping

from monai_cggm.data.checks import format_shape
from monai_cggm.discovery import Survey
from monai_cggm.new_bundle.background import plain_number
from monai_cggm.new_bundle.plan import BundlePlan


def model_card(plan: BundlePlan, survey: Survey, parts: Mapping[str, int], name: str) -> str:
    """Write the card as Markdown; it names no case and no file.

    Args:
        plan: the bundle's numbers and names.
        survey: of the labelled cases.
        parts: part -> cases.
        name: the bundle's folder.
    """
    labels, cases = survey.label_values, survey.label_cases
    total = max(sum(labels.values()), 1)
    regions_of = {
        number: [region for region, classes in plan.regions.items() if number in classes]
        for number in range(len(plan.classes))
    }
    rows = "\n".join(
        f"| {number} | {label} | {value} | {labels.get(value, 0):,} ({100 * labels.get(value, 0) / total:.3g} %) | "
        f"{cases.get(value, 0)} | {', '.join(regions_of[number])} |"
        for number, (value, label) in enumerate(plan.classes.items())
    )
    what = "slices" if plan.spatial_dims == 2 else "patches"
    counts = ", ".join(f"{part} {count}" for part, count in parts.items())
    missing = "".join(f"\n- {key} is missing in {len(ids)} cases." for key, ids in survey.missing.items())
    floors = "".join(
        f"; in {key} {plain_number(floor)} and below (`floors` in `configs/train.yaml` and `configs/inference.yaml`)"
        for key, floor in plan.floors.items()
    )
    return f"""# {plan.title}

**For research use only. Not a medical device; not for diagnosis or any clinical decision.** No weights come with it.

## Intended use

Segments {", ".join(plan.regions)} from {", ".join(plan.modalities)}: research on how much each of them contributes,
and on training that does not lean on one of them alone. State here for whom it is meant, and for whom not.

## Data

{len(survey.cases)} cases ({counts}; a patient's cases are in one part). State here where they come from, who labelled
them, and under which terms they may be used (`docs/data_license.txt`).

- Channels, in this order: {", ".join(plan.modalities)}.
- Intensities become z-scores over what is not background. The background is 0{floors}.
- Shapes: {_counted(survey.shapes, format_shape)}.
- Spacings (mm): {_counted(survey.spacings, lambda s: " × ".join(f"{size:g}" for size in s))}.{missing}

| class | name | value in the files | voxels | cases | regions |
|---|---|---|---|---|---|
{rows}

## Training

One DeepLab v3+ encoder a modality ({plan.network} size), a convolutional fusion decoder, modality dropout and light
auxiliary losses; {plan.epochs} epochs of {plan.volumes_per_batch} cases × {plan.samples_per_volume} {what} of
{" × ".join(map(str, plan.size))}. Every number is in `configs/train.yaml`.

```bash
cd {shlex.quote(name)}
python -m monai.bundle run --config_file configs/train.yaml --run_dir runs/recipe
tensorboard --logdir runs
```

## Metrics

Dice and HD95 of {", ".join(plan.regions)} on whole volumes, from all modalities and from every subset of them. State
here what was found.

```bash
python -m monai.bundle run --config_file "['configs/train.yaml','configs/evaluate.yaml']" \\
  --run_dir runs/recipe --part test
monai-cggm compare study.yaml --data datalist.json --out comparison
python -m monai.bundle run --config_file configs/inference.yaml --dataset_dir CASES --model_file runs/recipe/model.pt
```

## Limits

{parts["train"]} cases train, {parts["test"]} test: with few, the scores say little. Volumes must lie on one grid a case
(`monai-cggm align`). A modality in the wrong channel is not noticed. Nothing is known of other scanners and of people
that the data do not cover.
"""


def _counted(counts: Mapping[tuple, int], text: object, most: int = 3) -> str:
    shown = [f"{text(key)} ({count})" for key, count in list(counts.items())[:most]]  # type: ignore[operator]
    return ", ".join(shown) + (f" and {len(counts) - most} more" if len(counts) > most else "")
