# SPDX-License-Identifier: Apache-2.0
"""The command ``monai-cggm``: what is needed around ``python -m monai.bundle``, which trains, evaluates and infers."""

from __future__ import annotations

# The commands import what they need when they run: PyTorch and MONAI take seconds, `--help` should not.
import os
import shlex
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, ParamSpec, TypeVar

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from monai_cggm import __version__
from monai_cggm.errors import CaseError, DataError
from monai_cggm.resources import share_path

if TYPE_CHECKING:
    from monai_cggm.data.checks import CaseReport
    from monai_cggm.data.layouts import Case
    from monai_cggm.discovery import Found, Survey
    from monai_cggm.new_bundle import NewBundle

MODALITIES = "flair,t1ce,t1,t2"
TABLE_WIDTH = 100
WORKERS = min(4, os.cpu_count() or 1)

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Balanced training of multimodal MRI segmentation. Training itself runs with: "
    'python -m monai.bundle run --config_file "$(monai-cggm path bundles/brats_cggm)/configs/train.yaml"',
)

P = ParamSpec("P")
R = TypeVar("R")

Source = Annotated[Path, typer.Argument(help="Folder of cases (searched through), or a datalist .json.")]
Modalities = Annotated[str, typer.Option(help="Sequences, with commas between them.")]
Labels = Annotated[
    str | None,
    typer.Option(
        help="Label convention of every case: brats2018, brats2023, brats2024, msd, or pairs of value=class such as "
        "0=0,1=1,4=2. By the ID otherwise."
    ),
]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="List bad cases and go on without them.")]
Workers = Annotated[int, typer.Option(min=1, help="Cases read at a time.")]
# of commands that recognise layouts
Data = Annotated[Path, typer.Option(help="Folder of cases, in any layout that is known, or a datalist .json.")]
ModalityFiles = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=PATTERN",
        help="Files of a modality, such as flair=*_FLAIR*.nii.gz. One alone: the others by their names. Several: only "
        "these, in this order.",
    ),
]
LabelFiles = Annotated[str | None, typer.Option(metavar="PATTERN", help="Files of the labels, such as *_mask*.")]
FoundModalities = Annotated[
    str | None, typer.Option(help="Only these of what is found, in this order; or the names of a file's channels.")
]
PatientPattern = Annotated[
    str | None,
    typer.Option(
        metavar="REGEX",
        help=r"Finds the patient in a case's ID, such as 'p\d+'; default: by names of visits and dates.",
    ),
]


def _reports_errors(command: Callable[P, R]) -> Callable[P, R]:
    """End a command with one clear message and exit code 1 where the user's data or arguments are at fault."""

    @wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except DataError as error:
            many = len(error.problems)
            for problem in error.problems if many > 1 else ():
                typer.echo(problem, err=True)
            _fail(f"{many} problems" if many > 1 else error.problems[0])
        except (CaseError, ValueError, OSError) as error:
            _fail(str(error))

    return wrapped


def _fail(message: str) -> NoReturn:
    typer.echo(f"Error: {message}", err=True)
    raise typer.Exit(1)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"monai-cggm {__version__}")
        raise typer.Exit


@app.callback()
def main(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Take the options that come before a command."""


@app.command()
@_reports_errors
def check(
    source: Source,
    modalities: Modalities = MODALITIES,
    labels: Labels = None,
    skip_bad: SkipBad = False,
    no_labels: Annotated[bool, typer.Option("--no-labels", help="Cases need no segmentation.")] = False,
    allow_missing: Annotated[bool, typer.Option("--allow-missing", help="One sequence of a case is enough.")] = False,
    workers: Workers = WORKERS,
) -> None:
    """Read every case, print a table, and end with exit code 1 where a case is bad.

    \b
    Examples:
      monai-cggm check BraTS2021_Training_Data
      monai-cggm check BraTS2024 --labels brats2024
      monai-cggm check new_patients --no-labels --allow-missing
      monai-cggm check my_datalist.json --modalities flair,t1,t2
    """  # noqa: D301
    from monai_cggm.data.checks import format_conventions
    from monai_cggm.data.layouts import find_cases

    names = _names(modalities)
    cases = find_cases(source, names, labels=labels)
    reports = _check_all(cases, names, need_label=not no_labels, allow_missing=allow_missing, workers=workers)
    _console().print(_table(reports))
    bad = [report for report in reports if report.problems]
    for report in bad:
        for problem in report.problems:
            typer.echo(f"case {report.case_id}: {problem}")
    typer.echo(f"Label conventions: {format_conventions(reports)}")
    if not bad:
        typer.echo(f"{len(reports)} cases, no problem found")
    elif skip_bad and len(bad) < len(reports):
        typer.echo(f"{len(reports)} cases, {len(bad)} bad ones to be left out (--skip-bad)")
    else:
        _fail(f"{len(bad)} of {len(reports)} cases have problems")


@app.command()
@_reports_errors
def phantom(
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
    cases: Annotated[int, typer.Option(min=1, help="How many.")] = 12,
    seed: Annotated[int, typer.Option(help="Seed; the same seed makes the same cases.")] = 0,
    informativeness: Annotated[
        str, typer.Option(help="How much of the tumour a sequence shows, 0 to 1; all that are not named: 1.")
    ] = "",
) -> None:
    """Make brain phantoms with a tumour, in the BraTS folder layout.

    \b
    Examples:
      monai-cggm phantom demo_data --cases 12 --seed 0
      monai-cggm phantom imbalanced --informativeness flair=0.2,t2=0.2
    """  # noqa: D301
    from monai_cggm.data.phantom import write_phantoms

    shares = _shares(informativeness)
    ids = write_phantoms(out, cases=cases, seed=seed, informativeness=shares, progress=True)
    typer.echo(f"{len(ids)} cases in {out}: {ids[0]} to {ids[-1]}")


@app.command()
@_reports_errors
def phantom_features(
    out: Annotated[Path, typer.Argument(help="File to write, .pkl.")],
    samples: Annotated[int, typer.Option(min=60, help="How many utterances.")] = 400,
    seed: Annotated[int, typer.Option(help="Seed; the same seed makes the same file.")] = 0,
    informativeness: Annotated[
        str, typer.Option(help="How much a modality says, 0 to 1; as here for all that are not named.")
    ] = "text=1,audio=0.4,vision=0.3",
    task: Annotated[
        str, typer.Option(help="sentiment: a score from -3 to 3, for task=regression. emotion: one of four.")
    ] = "sentiment",
) -> None:
    """Make feature sequences like those of CMU-MOSI or IEMOCAP, in the format in which these are published.

    \b
    Examples:
      monai-cggm phantom-features sentiment.pkl --samples 1000 --seed 0
      monai-cggm phantom-features emotions.pkl --task emotion --informativeness text=0.8,audio=0.8
    """  # noqa: D301
    from monai_cggm.data.phantom_features import write_phantom_features

    shares = _shares(informativeness, "modality=share pairs, such as audio=0.5")
    sizes = write_phantom_features(out, samples=samples, seed=seed, informativeness=shares, task=task)
    typer.echo(f"{out}: " + ", ".join(f"{part} {count}" for part, count in sizes.items()))


@app.command()
@_reports_errors
def prepare_food101(
    source: Annotated[Path, typer.Argument(help="UPMC-Food 101 as published: the folder of images and texts.")],
    out: Annotated[Path, typer.Argument(help="Folder of features to make; what is begun goes on.")],
    bert: Annotated[
        str, typer.Option(help="Text model: a folder, or a name on the Hugging Face Hub.")
    ] = "bert-base-uncased",
    vit: Annotated[str, typer.Option(help="Image model: the same.")] = "google/vit-base-patch16-224",
    download: Annotated[
        bool, typer.Option("--download", help="Get the models from the network where they are not on this machine.")
    ] = False,
    tokens: Annotated[str, typer.Option(help="cls: one vector a sample. all: every token, 65 times as much.")] = "cls",
    max_length: Annotated[int, typer.Option(help="Tokens at which a title is cut.")] = 64,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out samples whose image is missing or broken, and repeated ones.")
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples encoded at a time.")] = 32,
    device: Annotated[str | None, typer.Option(help="Such as cuda:0; default: a GPU if there is one.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Threads that decode images; default: one a core.")] = None,
) -> None:
    """Turn UPMC-Food 101 into features of a BERT and a ViT, once, for the bundle food101_cggm.

    It goes on where it was stopped, and what is left out is listed in OUT/features.json.

    \b
    Examples:
      monai-cggm prepare-food101 UPMC_Food101 food101_features --download
      monai-cggm prepare-food101 UPMC_Food101 food101_tokens --tokens all --bert models/bert --vit models/vit
    """  # noqa: D301
    from monai_cggm.data.food101 import prepare_food101 as prepare

    made = prepare(
        source,
        out,
        bert=bert,
        vit=vit,
        tokens=tokens,
        max_length=max_length,
        skip_bad=skip_bad,
        download=download,
        batch_size=batch_size,
        device=device,
        workers=workers,
        console=_console(stderr=True),
    )
    counts = ", ".join(f"{part} {count}" for part, count in made.samples.items())
    shapes = ", ".join(f"{name} {' × '.join(map(str, shape[1:]))}" for name, shape in made.shapes.items())
    left_out = f"; {len(made.skipped)} left out, see features.json" if made.skipped else ""
    typer.echo(f"{made.folder}: {counts}; {shapes}{left_out}" + ("" if made.computed else " (was complete)"))


@app.command()
@_reports_errors
def align(
    source: Annotated[Path, typer.Argument(help="Folder of cases, in any layout that is known, or a datalist .json.")],
    out: Annotated[Path, typer.Argument(help="Folder to make, outside the data; what is finished in it is kept.")],
    reference: Annotated[str, typer.Option(help="Sequence on whose grid the others are resampled.")],
    modality: ModalityFiles = None,
    label: LabelFiles = None,
    modalities: FoundModalities = None,
    patient: PatientPattern = None,
    no_labels: Annotated[
        bool, typer.Option("--no-labels", help="Look for no segmentation that no name tells (new cases to predict).")
    ] = False,
    labels: Labels = None,
    register: Annotated[
        bool, typer.Option("--register", help="Find a rigid transform to the reference for each other sequence.")
    ] = False,
    n4: Annotated[bool, typer.Option("--n4", help="Correct bias fields of all sequences; MR only.")] = False,
    n4_on: Annotated[str | None, typer.Option(help="Correct those of these sequences only.")] = None,
    mask: Annotated[str, typer.Option(help="Write ID_mask.nii.gz: brain, body or none.")] = "none",
    apply_mask: Annotated[
        bool, typer.Option("--apply-mask", help="Set images to their background outside the mask.")
    ] = False,
    spacing: Annotated[
        str | None, typer.Option(help="Voxel size in mm, such as 1,1,1; default: the reference's.")
    ] = None,
    label_interpolation: Annotated[str, typer.Option(help="nearest, or gaussian for smoother outlines.")] = "nearest",
    label_on: Annotated[
        str | None, typer.Option(help="Sequence on which labels were drawn; default: the reference.")
    ] = None,
    fill: Annotated[
        str,
        typer.Option(help="Values outside the field of view, such as ct=-1000; default: 0, or a lower minimum."),
    ] = "",
    workers: Annotated[
        int, typer.Option(min=0, help="Processes, a case each at a time; 0: none beside this one.")
    ] = WORKERS,
) -> None:
    """Put the sequences of each case on one grid, with --register after finding out how the patient moved.

    Layouts and formats are those of monai-cggm new-bundle, which reads OUT/datalist.json. It goes on where it was
    stopped. OUT/report.html shows the sequences over the reference.

    \b
    Examples:
      monai-cggm align my_cases aligned --reference flair
      monai-cggm align my_cases aligned --reference t1ce --register --n4 --spacing 1,1,1
      monai-cggm align pet_ct aligned --reference ct --mask body
      monai-cggm align Dataset501_Neck aligned --reference ct
    """  # noqa: D301
    from monai_cggm.alignment import AlignSettings
    from monai_cggm.alignment import align as align_cases
    from monai_cggm.alignment.report import unlisted_text
    from monai_cggm.alignment.settings import REPORT
    from monai_cggm.discovery import discover
    from monai_cggm.discovery.convert import DATALIST
    from monai_cggm.discovery.names import modality_of

    found = discover(
        source,
        **_chosen_files(modality, label, modalities),
        patient_pattern=patient,
        need_label=not no_labels,
        keep_bad=True,
    )
    some = None if n4_on is None else tuple(modality_of(name.strip()) for name in n4_on.split(","))
    settings = AlignSettings(
        reference=modality_of(reference),
        modalities=found.modalities,
        register=register,
        n4=some or (found.modalities if n4 else ()),
        mask=mask,
        apply_mask=apply_mask,
        spacing=None if spacing is None else _three(_numbers(spacing, float, "--spacing")),
        label_interpolation=label_interpolation,
        label_on=None if label_on is None else modality_of(label_on),
        fill={modality_of(name): value for name, value in _fills(fill).items()},
    )
    for note in found.notes:
        typer.echo(note)
    try:
        done = align_cases(found, out, settings, labels=labels, workers=workers, console=_console(stderr=True))
    except KeyboardInterrupt:
        typer.echo(f"Stopped. What is finished is in {out}; the same command goes on.", err=True)
        raise typer.Exit(130) from None
    for text, cases in (("lacks", done.incomplete), ("keeps its place, see the report:", done.unregistered)):
        for case_id, sequences in cases.items():
            typer.echo(f"case {case_id} {text} {', '.join(sequences)}")
    counts = f"{len(done.made)} cases aligned, {len(done.kept)} were there already, {len(done.refused)} refused"
    typer.echo(f"{out}: {counts}")
    typer.echo(f"Report: {out / REPORT}")
    if done.unlisted:
        typer.echo(unlisted_text(done.unlisted, str(out / DATALIST)))
    if done.refused:
        _fail(f"{len(done.refused)} cases have problems")


def _fills(text: str) -> dict[str, float]:
    try:
        pairs = [part.split("=") for part in text.split(",") if part.strip()]
        return {name.strip(): float(value) for name, value in pairs}
    except ValueError:
        raise DataError([f"--fill is {text!r}: expected sequence=value pairs, such as ct=-1000"]) from None


def _three(numbers: Sequence[float]) -> tuple[float, float, float]:
    if len(numbers) != 3:
        raise ValueError(f"--spacing has {len(numbers)} numbers: expected three with commas between them")
    return numbers[0], numbers[1], numbers[2]


def _shares(text: str, expected: str = "sequence=share pairs, such as t1=0.5") -> dict[str, float]:
    try:
        pairs = [part.split("=") for part in text.split(",") if part.strip()]
        return {name.strip(): float(share) for name, share in pairs}
    except ValueError:
        raise DataError([f"--informativeness is {text!r}: expected {expected}"]) from None


@app.command("new-bundle")
@_reports_errors
def new_bundle(
    out: Annotated[Path, typer.Argument(help="Folder to make, outside the data.")],
    data: Data,
    modality: ModalityFiles = None,
    label: LabelFiles = None,
    modalities: FoundModalities = None,
    patient: PatientPattern = None,
    region: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUES", help="A region to score, such as WT=1,2,4; default: each label."),
    ] = None,
    spatial_dims: Annotated[
        int | None, typer.Option(min=2, max=3, help="2: slices; 3: patches. By the voxels' shape otherwise.")
    ] = None,
    network: Annotated[
        str | None, typer.Option(help="paper, or small for CPUs. By whether there is a GPU otherwise.")
    ] = None,
    allow_missing: Annotated[bool, typer.Option("--allow-missing", help="Cases may lack modalities.")] = False,
    folds: Annotated[int | None, typer.Option(min=2, help="Splits for cross-validation instead of one.")] = None,
    floor: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="Where a modality's background ends, such as ct=-1000; ct=none: it is 0. By the values otherwise.",
        ),
    ] = None,
    copy: Annotated[
        bool, typer.Option("--copy", help="Copy all volumes, so that no name of a file comes along.")
    ] = False,
    title: Annotated[str | None, typer.Option(help="The bundle's name in words.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the split and of training.")] = 0,
    workers: Workers = WORKERS,
) -> None:
    """Look at a folder of cases, say what it is, and write a bundle that trains on it.

    Layouts: a folder a case, files side by side, nnU-Net, Medical Segmentation Decathlon, BIDS, a datalist. Formats:
    NIfTI, NRRD, MHA, DICOM series. Volumes of a case must lie on one grid: see monai-cggm align.

    \b
    Examples:
      monai-cggm new-bundle ms_bundle --data ms_lesions
      monai-cggm new-bundle prostate --data Task05_Prostate --region gland=1,2 --region peripheral=1
      monai-cggm new-bundle my_bundle --data my_cases --modality t2=*_T2*.nii.gz --modality adc=*_ADC*.nii.gz
    """  # noqa: D301
    import torch

    from monai_cggm.discovery import discover
    from monai_cggm.new_bundle import Wishes
    from monai_cggm.new_bundle import new_bundle as write_bundle

    found = discover(
        data,
        **_chosen_files(modality, label, modalities),
        patient_pattern=patient,
        allow_missing=allow_missing,
    )
    for note in found.notes:
        typer.echo(note)
    wishes = Wishes(
        title=title,
        spatial_dims=spatial_dims,
        regions=_regions(region),
        network=network or ("paper" if torch.cuda.is_available() else "small"),
        allow_missing=allow_missing,
        folds=folds,
        seed=seed,
        floors=_floors(floor),
    )
    made = write_bundle(found, out, wishes, copy=copy, workers=workers)
    console = _console()
    for table in _survey_tables(made):
        console.print(table)
    for warning in made.plan.warnings:
        typer.echo(f"Note: {warning}")
    if made.unlabelled:
        typer.echo(f"Left out: {len(made.unlabelled)} cases without a label.")
    counts = ", ".join(f"{part} {count}" for part, count in made.parts.items())
    typer.echo(f"{out}: {counts} ({made.parts_from}). To compare, and to train:")
    study, datalist = (shlex.quote(str(out / name)) for name in ("study.yaml", "datalist.json"))
    typer.echo(f"  monai-cggm compare {study} --data {datalist} --out comparison")
    typer.echo(f"  cd {shlex.quote(str(out))} && python -m monai.bundle run --config_file configs/train.yaml")


@app.command()
@_reports_errors
def datalist(
    out: Annotated[Path, typer.Argument(help="Folder to make, outside the data.")],
    data: Data,
    no_labels: Annotated[
        bool, typer.Option("--no-labels", help="List new cases to predict: segmentations are not needed, and left out.")
    ] = False,
    modality: ModalityFiles = None,
    label: LabelFiles = None,
    modalities: FoundModalities = None,
    patient: PatientPattern = None,
    allow_missing: Annotated[bool, typer.Option("--allow-missing", help="Cases may lack modalities.")] = False,
    copy: Annotated[
        bool, typer.Option("--copy", help="Copy all volumes, so that no name of a file comes along.")
    ] = False,
    workers: Workers = WORKERS,
) -> None:
    """Look at a folder of cases, say what it is, and list it for what reads no other layout: inference, check, split.

    Layouts and formats are those of monai-cggm new-bundle. OUT/datalist.json has one path a modality; what is no plain
    3-D NIfTI becomes NIfTI in OUT/volumes. Volumes of a case must lie on one grid: see monai-cggm align.

    \b
    Examples:
      monai-cggm datalist new_list --data new_patients --no-labels
      monai-cggm datalist new_list --data dicom_export --no-labels --modalities flair,t1 --allow-missing
      monai-cggm datalist ms_list --data ms_bids
    """  # noqa: D301
    from monai_cggm.discovery import discover, survey_cases, write_datalist
    from monai_cggm.discovery.convert import DATALIST, refuse_folder

    found = discover(
        data,
        **_chosen_files(modality, label, modalities),
        patient_pattern=patient,
        need_label=not no_labels,
        allow_missing=allow_missing,
    )
    for note in found.notes:
        typer.echo(note)
    if no_labels:
        found = found.to_predict()
    refuse_folder(out.absolute(), found)
    survey = survey_cases(found, workers=workers)
    items = write_datalist(found, out, copy=copy, workers=workers)
    typer.echo(f"{out / DATALIST}: {len(items)} cases with {', '.join(found.modalities)}")
    listed = shlex.quote(str((out / DATALIST).absolute()))
    if not no_labels:
        typer.echo("To check its voxels, and to draw a split:")
        for line in _next_commands(found, survey, listed, allow_missing=allow_missing):
            typer.echo(f"  {line}")
    if no_labels:
        typer.echo("To segment them, in a bundle that was trained on these modalities:")
        typer.echo(f"  python -m monai.bundle run --config_file configs/inference.yaml --dataset_dir {listed}")


def _next_commands(found: Found, survey: Survey, listed: str, *, allow_missing: bool) -> list[str]:
    """What to do with a list of labelled cases, as far as the commands can read it."""
    incomplete = allow_missing and any(survey.missing.values())
    unlabelled = sum(case.label is None for case in found.cases)
    values = sorted({0, *survey.label_values} | found.named_values)
    spelt = ",".join(f"{value}={number}" for number, value in enumerate(values))
    # What a case's ID or its entry says is not overruled.
    told = sum(case.told_convention() is not None for case in found.cases)
    labels = "" if told else f" --labels {spelt}"
    options = f"--modalities {','.join(found.modalities)}{labels}"
    if unlabelled:
        return [f"Without a label: {unlabelled} of {len(found.cases)} cases; check and split want one of every case."]
    if 0 < told < len(found.cases):
        return [
            f"A label convention is told of {told} of {len(found.cases)} cases: give the others 'labels' in the list."
        ]
    check = f"monai-cggm check {listed} {options}{' --allow-missing' * incomplete}"
    if incomplete:
        return [check, "Some cases lack modalities: a training draws its split itself."]
    if any(case.section != "training" for case in found.cases):
        return [check, "The data set has parts of its own: new-bundle keeps them."]
    return [check, f"monai-cggm split {listed} split.json {options}"]


@app.command("to-nnunet")
@_reports_errors
def to_nnunet(
    out: Annotated[Path, typer.Argument(help="Folder of nnU-Net's raw data sets ($nnUNet_raw), outside the data.")],
    data: Data,
    dataset_id: Annotated[int, typer.Option("--id", min=1, max=999, help="Number of the data set.")],
    name: Annotated[str, typer.Option(help="Its name: letters, digits, _ and -.")],
    split: Annotated[
        Path | None, typer.Option(help="A split of a run, a bundle or monai-cggm split; default: the data set's own.")
    ] = None,
    modality: ModalityFiles = None,
    label: LabelFiles = None,
    modalities: FoundModalities = None,
    patient: PatientPattern = None,
    region: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUES", help="Train on regions, such as WT=1,2,4; default: the data set's own, else labels."
        ),
    ] = None,
    no_regions: Annotated[
        bool, typer.Option("--no-regions", help="Train on the labels, though the data set has regions of its own.")
    ] = False,
    workers: Workers = WORKERS,
) -> None:
    """Write a data set as raw data of nnU-Net 2, to train it on the same cases and the same split.

    Labels are numbered 0, 1, 2, ... without gaps, and what they were is printed. Every case needs every modality. What
    was written before is kept where it fits.

    \b
    Examples:
      monai-cggm to-nnunet nnUNet_raw --data ms_lesions --id 501 --name MsLesions --split ms_bundle/split.json
      monai-cggm to-nnunet nnUNet_raw --data BraTS2018 --id 502 --name BraTS --region WT=1,2,4 --region TC=1,4
    """  # noqa: D301
    from monai_cggm.discovery import discover
    from monai_cggm.discovery.nnunet import write_nnunet

    found = discover(
        data,
        **_chosen_files(modality, label, modalities),
        patient_pattern=patient,
        need_label=split is None,  # a split lists the labelled cases
        allow_missing=True,  # refused by write_nnunet, all of them at once and with the reason
    )
    for note in found.notes:
        typer.echo(note)
    if no_regions and region:
        raise ValueError("--region and --no-regions exclude each other")
    regions = _regions(region) if region or no_regions else None
    made = write_nnunet(found, out, dataset_id=dataset_id, name=name, split=split, regions=regions, workers=workers)
    typer.echo("Channels: " + ", ".join(f"{n:04d} {key}" for n, key in enumerate(found.modalities)))
    for number, values in made.original_values.items():
        typer.echo(f"class {number} was {', '.join(map(str, values))}")
    for key, classes in made.labels.items():
        typer.echo(f"{key}: {classes}")
    if made.left_out:
        typer.echo(f"Left out: {len(made.left_out)} cases without a label.")
    typer.echo(f"{made.folder}: " + ", ".join(f"{part} {len(ids)}" for part, ids in made.parts.items()))
    if made.splits is not None:
        typer.echo(
            f"The fold: after nnUNetv2_plan_and_preprocess, copy {made.splits} to "
            f"$nnUNet_preprocessed/{made.folder.name}, and train with fold 0."
        )


def _chosen_files(modality: list[str] | None, label: str | None, modalities: str | None) -> dict[str, Any]:
    """The arguments of discover that say which files are what."""
    return {
        "patterns": _patterns(modality),
        "label_pattern": label,
        "modalities": _names(modalities) if modalities else None,
    }


def _patterns(texts: list[str] | None) -> dict[str, str]:
    return _pairs(texts or [], "--modality", "flair=*_FLAIR*.nii.gz")


def _regions(texts: list[str] | None) -> dict[str, list[int]]:
    pairs = _pairs(texts or [], "--region", "WT=1,2,4")
    return {name: _numbers(values, int, "--region", "whole numbers") for name, values in pairs.items()}


def _floors(texts: list[str] | None) -> dict[str, float | None]:
    pairs = _pairs(texts or [], "--floor", "ct=-1000")
    try:
        return {name: None if value.lower() == "none" else float(value) for name, value in pairs.items()}
    except ValueError:
        raise ValueError(f"--floor is {', '.join(texts or [])}: expected numbers or none, such as ct=-1000") from None


def _pairs(texts: Sequence[str], option: str, example: str) -> dict[str, str]:
    pairs = [text.partition("=") for text in texts]
    bad = [text for text, (name, _, value) in zip(texts, pairs, strict=True) if not (name.strip() and value.strip())]
    names = [name.strip() for name, _, _ in pairs]
    bad += [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if bad:
        raise ValueError(f"{option} is {', '.join(map(repr, bad))}: expected different names, such as {example}")
    return dict(zip(names, (value.strip() for _, _, value in pairs), strict=True))


def _survey_tables(made: NewBundle) -> list[Table]:
    from monai_cggm.data.checks import format_shape

    def mostly(counts: dict, text: Callable) -> str:
        more = f", {len(counts) - 1} others" if len(counts) > 1 else ""
        return ", ".join(f"{text(key)} ({count} cases)" for key, count in list(counts.items())[:1]) + more

    survey, plan = made.survey, made.plan
    facts = {
        "modalities": ", ".join(plan.modalities),
        "shape": mostly(survey.shapes, format_shape),
        "orientation": ", ".join(f"{code} ({count} cases)" for code, count in survey.orientations.items())
        + f", turned to {plan.orientation}",
        "spacing (mm)": mostly(survey.spacings, lambda sizes: " × ".join(f"{size:g}" for size in sizes)),
        **{f"{key} missing": f"{len(ids)} cases" for key, ids in survey.missing.items()},
        **plan.reasons,
        "network": plan.network,
    }
    about = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_header=False)
    for name, text in facts.items():
        about.add_row(name, text)
    labels = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for head in ("value", "class", "name", "voxels", "cases", "weight", "regions"):
        labels.add_column(head, justify="right" if head in ("value", "class", "voxels", "cases", "weight") else "left")
    for number, (value, name) in enumerate(plan.classes.items()):
        labels.add_row(
            str(value),
            str(number),
            name,
            f"{survey.label_values.get(value, 0):,}",
            str(survey.label_cases.get(value, 0)),
            f"{plan.class_weights[number]:g}",
            ", ".join(region for region, classes in plan.regions.items() if number in classes),
        )
    return [about, labels]


@app.command()
@_reports_errors
def split(
    source: Source,
    out: Annotated[Path, typer.Argument(help="JSON file to write.")],
    sizes: Annotated[str | None, typer.Option(help="Cases for train,validation,test; all cases together.")] = None,
    fractions: Annotated[str, typer.Option(help="Shares of train,validation,test, without --sizes.")] = "0.7,0.15,0.15",
    seed: Annotated[int, typer.Option(help="Seed of the draw.")] = 0,
    folds: Annotated[
        int | None, typer.Option(min=2, help="Write so many splits, OUT_fold0.json on; each case is tested once.")
    ] = None,
    modalities: Modalities = MODALITIES,
    labels: Labels = None,
    skip_bad: SkipBad = False,
) -> None:
    """Draw a split by patient and write it, so that several runs can use the same one.

    \b
    Examples:
      monai-cggm split BraTS2018 split.json --seed 0
      monai-cggm split brats_2mm split.json --sizes 23,5,5
      monai-cggm split BraTS2018 split.json --folds 5
    """  # noqa: D301
    from monai_cggm.data.checks import load_cases
    from monai_cggm.data.splits import fold_splits, split_cases, write_split

    items = load_cases(source, _names(modalities), labels=labels, skip_bad=skip_bad)
    if folds is not None:
        if sizes is not None:
            raise ValueError("--sizes and --folds exclude each other: folds share the cases out evenly")
        for number, parts in enumerate(fold_splits(items, folds=folds, seed=seed)):
            path = out.with_name(f"{out.stem}_fold{number}{out.suffix or '.json'}")
            write_split(parts, path, seed)
            typer.echo(f"{path}: " + ", ".join(f"{part} {len(chosen)}" for part, chosen in parts.items()))
        return
    parts = split_cases(
        items,
        sizes=None if sizes is None else _numbers(sizes, int, "--sizes"),
        fractions=_numbers(fractions, float, "--fractions"),
        seed=seed,
    )
    write_split(parts, out, seed)
    typer.echo(f"{out}: " + ", ".join(f"{part} {len(chosen)}" for part, chosen in parts.items()))


@app.command()
@_reports_errors
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, finished or not.")],
    out: Annotated[Path, typer.Option(help="Folder to write to.")] = Path("report"),
) -> None:
    """Draw the paper's figures and tables from run folders, each with its numbers as CSV, and a page with all of them.

    Runs that differ in their seed alone are averaged. What needs other runs is left out, with the reason.

    \b
    Examples:
      monai-cggm report runs/cggm runs/observe
      monai-cggm report runs/rho_* --out sweep
    """  # noqa: D301
    from monai_cggm.analysis.run_report import write_report

    made = write_report(runs, out)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("", no_wrap=True)
    table.add_column("made, or why not", overflow="fold")
    for title, outcome in made.outcomes.items():
        table.add_row(title, outcome)
    _console().print(table)
    for note in made.notes:
        typer.echo(note)
    typer.echo(f"{made.page}: {len(made.made)} made, {len(made.left_out)} left out")
    if not made.made:
        _fail("nothing could be made of these runs")


@app.command()
@_reports_errors
def compare(
    study: Annotated[str, typer.Argument(help="Study file (.yaml), or the name of one that comes with the package.")],
    out: Annotated[Path, typer.Option(help="Folder of the comparison; what is finished in it is kept.")],
    data: Annotated[Path | None, typer.Option(help="Folder of cases, or a datalist .json.")] = None,
    arms: Annotated[
        str | None, typer.Option(help="Only these arms, with commas, their controls, and the reference.")
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="Other seeds than the study's, with commas.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Another budget, such as epochs=300.")
    ] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Trainings at a time; default: one a GPU or core.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of each training.")] = 1,
    report_only: Annotated[bool, typer.Option("--report-only", help="Train nothing, report what is there.")] = False,
) -> None:
    """Train several ways on the same cases with the same budget, and report which of them really help.

    Every arm is trained with every seed on every split, and scored on the cases that the study names, from all subsets
    of the modalities. It goes on where it was stopped; a training that fails is reported and the others go on.

    \b
    Examples:
      monai-cggm compare small --data demo_data --out comparison
      monai-cggm compare small --data brats_2mm --out comparison --arms joint,recipe --seeds 0,1,2 --set epochs=300
      monai-cggm compare my_study.yaml --out comparison --report-only
    """  # noqa: D301
    import yaml

    from monai_cggm.analysis.comparison_report import write_report
    from monai_cggm.compare import CellProgress, read_study, run_study

    plan = read_study(
        study,
        arms=None if arms is None else [name.strip() for name in arms.split(",")],
        seeds=None if seeds is None else _numbers(seeds, int, "--seeds", "whole numbers"),
        settings=_settings(settings or [], yaml.safe_load),
    )
    failed = 0
    if not report_only:
        if data is None:
            raise ValueError("--data is missing: the folder of cases to train on")
        with CellProgress(plan, out, _console(stderr=True)) as progress:
            facts = run_study(plan, data, out, jobs=jobs, threads=threads, watch=progress)
        failed = sum(fact["status"] != "done" for fact in facts)
    page = write_report(out, plan.described())
    typer.echo((out / "report.md").read_text(encoding="utf-8").split("\n## ")[1].partition("\n")[2].strip())
    typer.echo(f"Report: {page}")
    if failed:
        _fail(f"{failed} cells failed; the report names them, and the next start tries them again")


def _settings(pairs: Sequence[str], parse: Callable[[str], object]) -> dict[str, object]:
    for pair in pairs:
        if "=" not in pair:
            raise ValueError(f"--set is {pair!r}: expected KEY=VALUE, such as epochs=300")
    return {key: parse(value) for key, _, value in (pair.partition("=") for pair in pairs)}


@app.command()
@_reports_errors
def path(
    name: Annotated[str, typer.Argument(help="What to find; without it, the folder that holds everything.")] = "",
) -> None:
    """Print where a bundle or configuration that comes with the package is.

    \b
    Example:
      monai-cggm path bundles/brats_cggm
    """  # noqa: D301
    typer.echo(share_path(name))


def _names(modalities: str) -> list[str]:
    names = [name.strip() for name in modalities.split(",") if name.strip()]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"--modalities is {modalities!r}: expected different names such as {MODALITIES}")
    return names


N = TypeVar("N", int, float)


def _numbers(text: str, kind: type[N], option: str, what: str = "three numbers") -> list[N]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"{option} is {text!r}: expected {what} with commas between them") from error


def _console(*, stderr: bool = False) -> Console:
    console = Console(stderr=stderr)
    # A file or a pipe has no width of its own, and rich would take 80 columns.
    console.width = min(console.width, TABLE_WIDTH) if console.is_terminal else TABLE_WIDTH
    return console


def _check_all(
    cases: Sequence[Case], modalities: Sequence[str], *, need_label: bool, allow_missing: bool, workers: int
) -> list[CaseReport]:
    from monai_cggm.data.checks import check_case, repeated_ids

    check_one = partial(check_case, modalities=modalities, need_label=need_label, allow_missing=allow_missing)
    repeated = repeated_ids(cases)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=_console(stderr=True)) as progress, ThreadPoolExecutor(workers) as pool:
        # Threads are enough: most of the time goes into gzip, which releases the interpreter.
        reports = list(progress.track(pool.map(check_one, cases), total=len(cases), description="Reading"))
    return [
        report.with_problem(repeated[report.case_id]) if report.case_id in repeated else report for report in reports
    ]


def _table(reports: Sequence[CaseReport]) -> Table:
    from monai_cggm.data.checks import format_shape

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("case", overflow="fold")
    table.add_column("convention", overflow="fold")
    table.add_column("shape", no_wrap=True)
    table.add_column("spacing (mm)", no_wrap=True)
    table.add_column("labels", no_wrap=True)
    table.add_column("tumour voxels", justify="right")
    table.add_column("problems", justify="right")
    for report in reports:
        table.add_row(
            report.case_id,
            report.convention or "unknown",
            format_shape(report.shape) if report.shape else "-",
            " ".join(f"{size:.4g}" for size in report.spacing) if report.spacing else "-",
            " ".join(map(str, report.labels_found)) or "-",
            "-" if report.tumour_voxels is None else f"{report.tumour_voxels:,}",
            f"[bold red]{len(report.problems)}[/]" if report.problems else "0",
        )
    return table


if __name__ == "__main__":
    app()
