# SPDX-License-Identifier: Apache-2.0
"""What a comparison is to run: arms, splits, seeds, and one budget for all of them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from monai_cggm.errors import DataError
from monai_cggm.resources import share_path

#: arms of one modality alone, and what they are together
ALONE = "alone_"
ENSEMBLE = "ensemble"

_NAME = re.compile(r"[a-z0-9_]+")
_KEYS = {
    "base",
    "title",
    "reference",
    "part",
    "convention",
    "config",
    "evaluation",
    "settings",
    "splits",
    "seeds",
    "key_modality",
    "arms",
    "alone",
}


@dataclass(frozen=True, eq=False)
class Arm:
    """One way to train.

    Attributes:
        name: its name in folders and tables.
        title: in words.
        overlays: configuration files that merge over the study's.
        settings: values that win over the study's settings.
        controls: arms that it has to be better than, to show that what they lack helps.
    """

    name: str
    title: str
    overlays: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    controls: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Cell:
    """One arm on one split with one seed.

    Attributes:
        arm: the arm.
        split: file of the split.
        seed: the seed of everything that is random.
    """

    arm: Arm
    split: Path
    seed: int

    @property
    def folder(self) -> str:
        """Its folder below ``cells`` and ``runs``."""
        return f"{self.arm.name}/{self.split.stem}-seed{self.seed}"


@dataclass(frozen=True)
class Study:
    """A comparison: the content of a study file.

    Attributes:
        title: what it asks.
        reference: the arm that every other one is compared with.
        arms: by name, in the order of the report.
        config: the bundle's training configuration, and overlays that every arm has.
        evaluation: what is merged over those to score a trained cell.
        settings: the budget and other values, the same for every arm.
        splits: split files; none: one split is drawn.
        seeds: one training each.
        part: the cases that the report scores: ``test``, or ``validation`` while methods are still being chosen.
        convention: see :data:`monai_cggm.metrics.EMPTY_CONVENTIONS`.
        key_modality: means over subsets are also given with and without this one.
        alone: also one network a modality, and their ensemble.
        modalities: the modalities of the configuration.
    """

    title: str
    reference: str
    arms: Mapping[str, Arm]
    config: tuple[str, ...]
    evaluation: tuple[str, ...]
    settings: Mapping[str, Any]
    splits: tuple[str, ...]
    seeds: tuple[int, ...]
    part: str = "test"
    convention: str = "brats_legacy"
    key_modality: str | None = None
    alone: bool = False
    modalities: tuple[str, ...] = ()

    def cells(self, splits: Sequence[Path]) -> list[Cell]:
        """Return what there is to train: seed by seed, so that an early stop leaves comparisons that are paired."""
        return [Cell(arm, s, seed) for seed in self.seeds for s in splits for arm in self.arms.values()]

    def ensembles(self, splits: Sequence[Path]) -> list[Cell]:
        """Return the ensembles, which are evaluated once their members are trained."""
        if not self.alone:
            return []
        arm = Arm(ENSEMBLE, "ensemble of one network a modality", ("configs/methods/ensemble.yaml",))
        return [Cell(arm, split, seed) for seed in self.seeds for split in splits]

    def described(self) -> dict[str, Any]:
        """Return the study as plain values, for ``study.yaml`` and the report."""
        arms = {
            name: {
                "title": arm.title,
                "overlays": list(arm.overlays),
                "settings": dict(arm.settings),
                "controls": list(arm.controls),
            }
            for name, arm in self.arms.items()
        }
        return {
            "title": self.title,
            "reference": self.reference,
            "part": self.part,
            "convention": self.convention,
            "config": list(self.config),
            "evaluation": list(self.evaluation),
            "settings": dict(self.settings),
            "splits": list(self.splits),
            "seeds": list(self.seeds),
            "key_modality": self.key_modality,
            "modalities": list(self.modalities),
            "alone": self.alone,
            "arms": arms,
        }


def read_study(
    source: str | Path,
    *,
    arms: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Study:
    """Read a study file and check it.

    A study may name another one as its ``base``: it has all of that one's keys, except those that it gives itself.

    Args:
        source: a YAML file, or the name of one that comes with the package (``configs/studies``).
        arms: only these arms, and the reference.
        seeds: other seeds than the file's.
        settings: values that win over the file's settings.

    Returns:
        The study.

    Raises:
        DataError: lists everything that is wrong with it.

    Example:
        >>> study = read_study("small", arms=["dropout"], seeds=[0])
        >>> list(study.arms), study.seeds
        (['joint', 'dropout'], (0,))
    """
    path = find_study(source)
    content = _load(path)
    problems = _problems(content, path)
    if problems:
        raise DataError(problems)
    modalities = _modalities(content)
    everything = {name: _arm(name, values or {}) for name, values in content["arms"].items()}
    if content.get("alone"):
        everything |= {f"{ALONE}{m}": _alone(m) for m in modalities}
    chosen = _chosen(everything, content["reference"], arms, path)
    return Study(
        title=str(content.get("title", path.stem)),
        reference=content["reference"],
        arms=chosen,
        config=tuple(content["config"]),
        evaluation=tuple(content["evaluation"]),
        settings={**content.get("settings", {}), **(settings or {})},
        splits=tuple(content.get("splits") or ()),
        seeds=tuple(seeds if seeds is not None else content.get("seeds", [0])),
        part=content.get("part", "test"),
        convention=content.get("convention", "brats_legacy"),
        key_modality=content.get("key_modality"),
        alone=all(f"{ALONE}{m}" in chosen for m in modalities),
        modalities=modalities,
    )


def find_study(source: str | Path) -> Path:
    """Return the file of a study: a path, or a name from ``configs/studies``.

    Raises:
        DataError: where there is neither.
    """
    if Path(source).is_file():
        return Path(source)
    folder = share_path("configs/studies")
    named = folder / f"{source}.yaml"
    if named.is_file():
        return named
    known = ", ".join(sorted(p.stem for p in folder.glob("*.yaml")))
    raise DataError([f"there is no study {source}: expected a YAML file, or one of {known}"])


def find_file(name: str) -> Path:
    """Return a configuration file named in a study: a path from here, or from the package's configurations.

    Raises:
        DataError: where there is neither.
    """
    if Path(name).is_file():
        return Path(name).resolve()
    try:
        return share_path(name)
    except (OSError, ValueError) as error:
        raise DataError([f"there is no file {name}, neither here nor in the package"]) from error


def _load(path: Path) -> dict[str, Any]:
    """The content of a study file, over that of the study that it names as its ``base``."""
    content = _load_one(path)
    return {**_load_one(find_study(content["base"])), **content} if "base" in content else content


def _load_one(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise DataError([f"study {path} is no YAML: {error}"]) from error
    if not isinstance(content, dict):
        raise DataError([f"study {path}: expected keys such as arms, config and reference, found {content!r}"])
    return content


def _problems(content: Mapping[str, Any], path: Path) -> list[str]:
    problems = [
        f"study {path} has no {key!r}" for key in ("arms", "config", "evaluation", "reference") if not content.get(key)
    ]
    unknown = sorted(set(content) - _KEYS)
    if unknown:
        problems.append(f"study {path}: unknown {', '.join(unknown)}; expected {', '.join(sorted(_KEYS))}")
    if problems:
        return problems
    arms: Mapping[str, Any] = content["arms"]
    problems += [
        f"study {path}: arm {n!r} must be named by a-z, 0-9 and _" for n in arms if not _NAME.fullmatch(str(n))
    ]
    problems += [f"study {path}: arm {n} is reserved" for n in arms if n == ENSEMBLE or str(n).startswith(ALONE)]
    if content["reference"] not in arms:
        problems.append(f"study {path}: reference {content['reference']!r} is not among the arms {', '.join(arms)}")
    for name, arm in arms.items():
        extra = sorted(set(arm or {}) - {"title", "overlays", "settings", "controls"})
        if extra:
            problems.append(f"study {path}: arm {name} has unknown {', '.join(extra)}")
        for control in (arm or {}).get("controls", []):
            if control not in arms:
                problems.append(f"study {path}: arm {name} names control {control!r}, which is no arm")
    if content.get("part", "test") not in ("validation", "test"):
        problems.append(f"study {path}: part must be validation or test, found {content['part']!r}")
    files = [*content["config"], *content["evaluation"], *(content.get("splits") or ())]
    files += [overlay for arm in arms.values() for overlay in (arm or {}).get("overlays", [])]
    for file in dict.fromkeys(files):
        try:
            find_file(file)
        except DataError as error:
            problems += [f"study {path}: {p}" for p in error.problems]
    return problems


def _modalities(content: Mapping[str, Any]) -> tuple[str, ...]:
    """The last word on ``modalities`` in the study's settings and configuration files."""
    if "modalities" in content.get("settings", {}):
        return tuple(content["settings"]["modalities"])
    for file in reversed(content["config"]):
        values = yaml.safe_load(find_file(file).read_text(encoding="utf-8"))
        if "modalities" in values:
            return tuple(values["modalities"])
    raise DataError(["none of the study's configuration files names the modalities"])


def _arm(name: str, values: Mapping[str, Any]) -> Arm:
    return Arm(
        name,
        str(values.get("title", name)),
        tuple(values.get("overlays", ())),
        dict(values.get("settings", {})),
        tuple(values.get("controls", ())),
    )


def _alone(modality: str) -> Arm:
    overlays = ("configs/methods/unimodal.yaml",)
    return Arm(f"{ALONE}{modality}", f"{modality} alone", overlays, {"modalities": [modality]})


def _chosen(everything: Mapping[str, Arm], reference: str, wanted: Sequence[str] | None, path: Path) -> dict[str, Arm]:
    if wanted is None:
        return dict(everything)
    unknown = [name for name in wanted if name not in everything]
    if unknown:
        raise DataError([f"study {path} has no arm {name}; it has {', '.join(everything)}" for name in unknown])
    return {name: arm for name, arm in everything.items() if name in wanted or name == reference}
