# SPDX-License-Identifier: Apache-2.0
"""Networks that were trained on one modality alone: loading them, and training those that are missing first."""

from __future__ import annotations

import copy
import logging
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import ignite.distributed as idist
import torch
import yaml
from monai.bundle import ConfigParser
from monai.utils.misc import str2bool
from torch import nn

from monai_cggm.data.splits import Item, read_split, write_split
from monai_cggm.errors import DataError
from monai_cggm.files import atomic_path
from monai_cggm.handlers.run_info import bundle_parser
from monai_cggm.resources import share_path

logger = logging.getLogger(__name__)

#: builds the network of some modalities
Build = Callable[[Sequence[str]], nn.Module]

#: starts a command, its output appended to a file, and returns its exit code; tests put a stand-in here
Launch = Callable[[Sequence[str], Path], int]

#: what stands for the modality in a pattern of run folders
PLACE = "{modality}"

#: the name, in that place, of the run of all modalities together
JOINT = "joint"

#: written into a run's folder once it has come to its end
FINISHED = "finished"

#: parts of a run that a run of one modality, or a plain joint one, must not have
_SWITCHED_OFF = ("dropout", "auxiliary", "distillation", "teacher_runs")


def run_folder(runs: str, name: str) -> Path:
    """Return the run folder of a modality.

    Args:
        runs: a path with ``{modality}`` in it.
        name: the modality.

    Raises:
        ValueError: for a path without it: all modalities would be one run.

    Example:
        >>> run_folder("runs/alone_{modality}", "t1ce").name
        'alone_t1ce'
    """
    if PLACE not in runs:
        raise ValueError(f"runs must be a path with {PLACE} in it, one folder a modality, got {runs!r}")
    return Path(runs.replace(PLACE, name))


def network_builder() -> Build:
    """Return what builds this bundle's ``network_def`` for other ``modalities``, the rest of it unchanged.

    It is for a bundle's configuration, and finds the configuration by itself, overlays and overrides included.

    Raises:
        RuntimeError: outside a bundle.

    Example:
        In a configuration::

            build: {_target_: monai_cggm.methods.teachers.network_builder}
    """
    config = _raw_config(_parser("network_builder"))

    def build(modalities: Sequence[str]) -> nn.Module:
        parser = ConfigParser(copy.deepcopy(config))
        parser["modalities"] = list(modalities)
        return cast(nn.Module, parser.get_parsed_content("network_def"))

    return build


def later(key: str) -> Callable[[], Any]:
    """Return what makes the part of this bundle's configuration under ``key``, once it is called.

    A reference (``@key``) makes a part before whatever refers to it; data sets, say, should not be read before the run
    has checked its folder.

    Raises:
        RuntimeError: outside a bundle.

    Example:
        In a configuration::

            loaders: {_target_: monai_cggm.methods.teachers.later, key: estimation}
    """
    parser = _parser("later")
    return lambda: parser.get_parsed_content(key)


def load_networks(runs: str, parts: Mapping[str, Sequence[str]], build: Build) -> dict[str, nn.Module]:
    """Load networks from run folders, in evaluation mode, on the CPU, without gradient.

    Args:
        runs: a path with ``{modality}`` in it.
        parts: what stands there → the modalities of that run's network.
        build: makes the network of some modalities; the random numbers that it draws are given back.

    Returns:
        What stands there → network.

    Raises:
        DataError: for folders without ``model.pt``, files that cannot be read, and weights of another network; all of
            them at once, each with the modality, the file, what was found and what was expected.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name in ("a", "b"):
        ...         Path(folder, name).mkdir()
        ...         torch.save({"model": nn.Linear(2, 1).state_dict()}, Path(folder, name, "model.pt"))
        ...     networks = load_networks(f"{folder}/{{modality}}", {"a": ["a"], "b": ["b"]}, lambda _: nn.Linear(2, 1))
        >>> list(networks), networks["a"].training
        (['a', 'b'], False)
    """
    problems: list[str] = []
    networks: dict[str, nn.Module] = {}
    for name, modalities in parts.items():
        path = run_folder(runs, name) / "model.pt"
        if not path.is_file():
            problems.append(_nothing_there(name, path))
            continue
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)["model"]
        except Exception as error:  # what a damaged file raises depends on where it is damaged
            reason = str(error).splitlines()[0] if str(error) else ""
            problems.append(
                f"modality {name}: expected a dictionary with the weights under 'model', got "
                f"{type(error).__name__}: {reason} ({path})"
            )
            continue
        network = built(build, modalities)
        different = _difference(state, network.state_dict())
        if different:
            problems.append(f"modality {name}: the weights are not those of this network: {different} ({path})")
            continue
        network.load_state_dict(state)
        networks[name] = network.requires_grad_(False).eval()
    if problems:
        raise DataError(problems)
    return networks


def load_teachers(runs: str, modalities: Sequence[str], build: Build) -> dict[str, nn.Module]:
    """Load the encoder of each modality from a run that was trained on it alone.

    Args:
        runs: a path with ``{modality}`` in it, such as ``runs/alone_{modality}``; each a run's folder with ``model.pt``
            (``methods/unimodal.yaml``).
        modalities: names of the modalities.
        build: makes the network of one modality, called with ``[modality]``; it names its ``encoders``.
            :func:`network_builder` in a bundle.

    Returns:
        Modality → encoder, in evaluation mode, on the CPU, without gradient.

    Raises:
        DataError: see :func:`load_networks`.
        ValueError: for a path without ``{modality}``.

    Example:
        >>> load_teachers("no_such/alone_{modality}", ["t1ce"], lambda modalities: nn.Identity())
        Traceback (most recent call last):
        monai_cggm.errors.DataError: modality t1ce: ... (no_such/alone_t1ce/model.pt)
    """
    networks = load_networks(runs, {m: [m] for m in modalities}, build)
    return {m: cast(nn.ModuleDict, network.encoders)[m] for m, network in networks.items()}


def built(build: Build, modalities: Sequence[str], seed: int | None = None) -> nn.Module:
    """Build a network, and give the random numbers back that it drew: the run must be what it is without it."""
    with torch.random.fork_rng(devices=[]):
        if seed is not None:
            torch.manual_seed(seed)
        return build(list(modalities))


def ensure_teachers(
    runs: str | None,
    modalities: Sequence[str],
    *,
    train: bool | str = False,
    joint: bool = False,
    split: Mapping[str, Sequence[Item]] | None = None,
    launch: Launch | None = None,
) -> None:
    """See to it that each modality's run is there; train those that are missing, if ``train``.

    It is for the ``initialize`` of a bundle's overlay. A run that is missing is trained by a process of its own,
    ``python -m monai.bundle run``, with this run's configuration, ``methods/unimodal.yaml`` (``methods/joint.yaml``)
    and the switchable parts off: the same seed, budget and split. Its output goes to ``log.txt`` in its folder. One
    that was killed goes on from its last epoch; one that has ended is kept, as is a folder that holds ``model.pt`` and
    no checkpoints.

    Args:
        runs: a path with ``{modality}`` in it; None: nothing is needed.
        modalities: names of the modalities.
        train: train what is missing; words such as "true" and "false" will do.
        joint: whether the run of all modalities together (``{modality}`` = ``joint``) is needed too.
        split: this run's. A run that learnt from what this one tests or validates on would make its scores too good;
            it is told by the ``split.json`` in its folder, if there is one.
        launch: starts a command; default: a child process.

    Raises:
        DataError: where runs are missing and ``train`` is off, or several processes are at work; where a training
            failed, with the last line that it said; where a run has seen cases that this one tests or validates on.
        RuntimeError: outside a bundle, where something must be trained.

    Example:
        >>> ensure_teachers(None, ["flair", "t1ce"])
    """
    if runs is None:
        return
    parts = {m: [m] for m in modalities} | ({JOINT: list(modalities)} if joint else {})
    folders = {name: run_folder(runs, name) for name in parts}
    if not str2bool(train):
        missing = [name for name, folder in folders.items() if not (folder / "model.pt").is_file()]
        if missing:
            raise DataError([_nothing_there(name, folders[name] / "model.pt") for name in missing])
    if split is not None:
        _refuse_other_splits(folders, split)
    missing = [name for name, folder in folders.items() if not _is_finished(folder)]
    if not missing or not str2bool(train):
        return
    if idist.get_world_size() > 1 or torch.distributed.is_initialized():
        raise DataError(
            [
                f"these runs are missing and cannot be trained by several processes: {', '.join(missing)}; train them "
                "first, by one process (this configuration without multi_gpu_train.yaml) or each by itself"
            ]
        )
    parser = _parser("ensure_teachers")
    for name in missing:
        _train(parser, name, parts[name], folders[name], launch or _start)


def _refuse_other_splits(folders: Mapping[str, Path], split: Mapping[str, Sequence[Item]]) -> None:
    """Refuse runs that have seen what this run is scored by; what they have not seen does no harm."""
    mine = {part: {str(item["case"]) for item in items} for part, items in split.items()}
    problems = []
    for name, folder in folders.items():
        file = folder / "split.json"
        if not file.is_file():
            continue
        theirs = read_split(file)
        # validation chose their weights, as it will choose this run's
        for seen, scored in (("train", "validation"), ("train", "test"), ("validation", "test")):
            shared = sorted(theirs[seen] & mine.get(scored, set()))
            if shared:
                problems.append(
                    f"modality {name}: its run used {len(shared)} cases for {seen} that are this run's {scored} cases, "
                    f"the first is {shared[0]}; expected a run with this run's split ({file})"
                )
    if problems:
        raise DataError(problems)


def _train(parser: ConfigParser, name: str, modalities: Sequence[str], folder: Path, launch: Launch) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    config = _raw_config(parser)
    settings: dict[str, Any] = {
        "modalities": list(modalities),
        "run_dir": str(folder),
        "resume": True,
        "train_teachers": False,
        **dict.fromkeys(_SWITCHED_OFF),
    }
    if "split" in config:  # of one modality alone more cases might be usable, and the draw would be another
        split_file = folder / "teacher_split.json"
        write_split(parser.get_parsed_content("split"), split_file, int(config.get("seed", 0)))
        settings["split_file"] = str(split_file)
    _write_yaml(config, folder / "teacher_base.yaml")
    _write_yaml(settings, folder / "teacher_settings.yaml")
    overlay = share_path(f"configs/methods/{JOINT if name == JOINT else 'unimodal'}.yaml")
    files = [str(folder / "teacher_base.yaml"), str(overlay), str(folder / "teacher_settings.yaml")]
    command = [sys.executable, "-m", "monai.bundle", "run", "--logging_file", "False", "--config_file", str(files)]
    log = folder / "log.txt"
    logger.warning(f"training {', '.join(modalities)} first, into {folder} (output in {log.name})")
    code = launch(command, log)
    if code != 0 or not (folder / "model.pt").is_file():
        raise DataError([f"modality {name}: its training ended with exit code {code}; {_last_line(log)} ({log})"])
    (folder / FINISHED).touch()


def _start(command: Sequence[str], log: Path) -> int:
    with log.open("ab") as file:
        return subprocess.run(list(command), stdout=file, stderr=subprocess.STDOUT, check=False).returncode


def _is_finished(folder: Path) -> bool:
    if not (folder / "model.pt").is_file():
        return False
    return (folder / FINISHED).is_file() or not any((folder / "checkpoints").glob("*.pt"))


def _nothing_there(name: str, path: Path) -> str:
    overlay = "joint" if name == JOINT else "unimodal"
    return (
        f"modality {name}: there is no model.pt; expected the folder of a finished run of methods/{overlay}.yaml "
        f"(teacher_runs), or train_teachers: true, which trains it first ({path})"
    )


def _difference(found: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    """What tells two states apart, in a few words; empty if nothing does."""
    for key in expected:
        if key not in found:
            return f"{key} is missing"
        if found[key].shape != expected[key].shape:
            return f"{key} has shape {tuple(found[key].shape)}, expected {tuple(expected[key].shape)}"
    unknown = next((key for key in found if key not in expected), None)
    return "" if unknown is None else f"{unknown} is not a part of it"


def _parser(name: str) -> ConfigParser:
    parser = bundle_parser()
    if parser is None:
        raise RuntimeError(f"{name} reads the configuration of a MONAI bundle, and is called outside one")
    return parser


def _raw_config(parser: ConfigParser) -> dict[str, Any]:
    """The configuration as it is written, all files merged, references and expressions unresolved."""
    config = _plain(parser.get())
    config.pop(ConfigParser.meta_key, None)  # metadata.json is a file of its own
    return cast(dict[str, Any], config)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _write_yaml(content: Mapping[str, Any], path: Path) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True), encoding="utf-8")


def _last_line(log: Path) -> str:
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return f"last line: {lines[-1][:300]}" if lines else "no output"
