# SPDX-License-Identifier: Apache-2.0
"""What a comparison is to run: arms, splits, seeds, and one budget for all of them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from monai_cggm.analysis.cells import ALONE, ENSEMBLE
from monai_cggm.analysis.measures import DICE, is_dice
from monai_cggm.errors import DataError
from monai_cggm.metrics import EMPTY_CONVENTIONS
from monai_cggm.resources import share_path

#: what an arm needs that needs all arms of one modality alone
NEEDS_ALONE = "alone"

_NAME = re.compile(r"[a-z0-9_]+")
_KEYS = {
    "base",
    "title",
    "reference",
    "part",
    "score",
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
_ARM_KEYS = {"title", "overlays", "settings", "controls", "needs"}


@dataclass(frozen=True, eq=False)
class Arm:
    """One way to train.

    Attributes:
        name: its name in folders and tables.
        title: in words.
        overlays: configuration files that merge over the study's.
        settings: values that win over the study's settings.
        controls: role → arm that it has to be better than, to show that what that one lacks helps; ``constant``,
            ``shuffled`` and ``uniform`` are the controls of a balance. With ``alone: true`` the arm may be
            ``ensemble``.
        needs: arms whose networks it is trained with; ``alone`` stands for all of one modality alone.
    """

    name: str
    title: str
    overlays: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    controls: Mapping[str, str] = field(default_factory=dict)
    needs: tuple[str, ...] = ()


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
        score: the column of the cases' scores that arms are compared by: from 0 to 1, and more is better; or
            ``absolute_error``.
        convention: see :data:`monai_cggm.metrics.EMPTY_CONVENTIONS`; for Dice alone.
        key_modality: means over subsets are also given with and without this one.
        alone: some arms are one network a modality; with all of them there is their ensemble, too.
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
    score: str = DICE
    convention: str = "brats_legacy"
    key_modality: str | None = None
    alone: bool = False
    modalities: tuple[str, ...] = ()

    def cells(self, splits: Sequence[Path]) -> list[Cell]:
        """Return what there is to train: seed by seed, so that an early stop leaves comparisons that are paired."""
        return [Cell(arm, s, seed) for seed in self.seeds for s in splits for arm in self.arms.values()]

    def ensembles(self, splits: Sequence[Path]) -> list[Cell]:
        """Return the ensembles, which are evaluated once their members are trained."""
        if not all(f"{ALONE}{modality}" in self.arms for modality in self.modalities):
            return []
        arm = Arm(ENSEMBLE, "ensemble of one network a modality", ("configs/methods/ensemble.yaml",))
        return [Cell(arm, split, seed) for seed in self.seeds for split in splits]

    def needed_by(self, cell: Cell) -> dict[str, Cell]:
        """Return the cells that a cell needs, by the modality or, for other arms, by the arm's name."""
        names: dict[str, str] = {}
        for name in cell.arm.needs:
            names |= {m: f"{ALONE}{m}" for m in self.modalities} if name == NEEDS_ALONE else {name: name}
        return {name: Cell(self.arms[arm], cell.split, cell.seed) for name, arm in names.items()}

    def described(self) -> dict[str, Any]:
        """Return the study as plain values, for ``study.yaml`` and the report."""
        arms = {
            name: {
                "title": arm.title,
                "overlays": list(arm.overlays),
                "settings": dict(arm.settings),
                "controls": dict(arm.controls),
                **({"needs": list(arm.needs)} if arm.needs else {}),
            }
            for name, arm in self.arms.items()
        }
        return {
            "title": self.title,
            "reference": self.reference,
            "part": self.part,
            "score": self.score,
            **({"convention": self.convention} if is_dice(self.score) else {}),
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
        arms: only these arms, those that they need, and the reference.
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
    if seeds is not None:
        content["seeds"] = list(seeds)
    if settings:
        content["settings"] = {**(content.get("settings") or {}), **settings}
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
        settings=dict(content.get("settings") or {}),
        splits=tuple(content.get("splits") or ()),
        seeds=tuple(content.get("seeds", [0])),
        part=content.get("part", "test"),
        score=content.get("score") or DICE,
        convention=content.get("convention") or "brats_legacy",
        key_modality=content.get("key_modality"),
        alone=any(name.startswith(ALONE) for name in chosen),
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
    content, seen = _load_one(path), [path]
    while "base" in content:
        base = find_study(content.pop("base"))
        if base in seen:
            raise DataError([f"study {path}: {base} is its own base"])
        seen.append(base)
        content = {**_load_one(base), **content}
    return content


def _load_one(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise DataError([f"study {path} is no YAML: {error}"]) from error
    if not isinstance(content, dict):
        raise DataError([f"study {path}: expected keys such as arms, config and reference, found {content!r}"])
    return _with_files_beside(content, path.parent)


def _with_files_beside(content: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Name the files that lie beside a study by their paths; others are looked up later, by :func:`find_file`."""

    def beside(names: Any) -> Any:
        if not isinstance(names, list):
            return names
        return [str(folder / name) if isinstance(name, str) and (folder / name).is_file() else name for name in names]

    content |= {key: beside(content[key]) for key in ("config", "evaluation", "splits") if key in content}
    arms = content.get("arms")
    for arm in arms.values() if isinstance(arms, Mapping) else ():
        if isinstance(arm, dict) and "overlays" in arm:
            arm["overlays"] = beside(arm["overlays"])
    return content


def _problems(content: Mapping[str, Any], path: Path) -> list[str]:
    problems = [f"has no {key!r}" for key in ("arms", "config", "evaluation", "reference") if not content.get(key)]
    unknown = sorted(set(content) - _KEYS)
    if unknown:
        problems.append(f"unknown {', '.join(unknown)}; expected {', '.join(sorted(_KEYS))}")
    if not problems:
        problems = [p for check in (_arm_problems, _value_problems) for p in check(content)]
    if not problems:
        problems = _file_problems(content)
    return [f"study {path}: {problem}" for problem in problems]


def _arm_problems(content: Mapping[str, Any]) -> list[str]:
    arms = content["arms"]
    if not isinstance(arms, Mapping) or not all(isinstance(arm or {}, Mapping) for arm in arms.values()):
        return [f"arms must be names with keys such as overlays below them, found {arms!r}"]
    arms = {name: arm or {} for name, arm in arms.items()}
    problems = [f"arm {n!r} must be named by a-z, 0-9 and _" for n in arms if not _NAME.fullmatch(str(n))]
    reserved = (ENSEMBLE, NEEDS_ALONE)
    problems += [f"arm {n} is reserved" for n in arms if n in reserved or str(n).startswith(ALONE)]
    if content["reference"] not in arms:
        problems.append(f"reference {content['reference']!r} is not among the arms {', '.join(arms)}")
    for name, arm in arms.items():
        extra = sorted(set(arm) - _ARM_KEYS)
        if extra:
            problems.append(f"arm {name} has unknown {', '.join(extra)}")
        if not isinstance(arm.get("overlays", []), list):
            problems.append(f"arm {name}: overlays must be a list of files, found {arm['overlays']!r}")
        if not isinstance(arm.get("needs") or [], (str, list)):
            problems.append(
                f"arm {name}: needs must be {NEEDS_ALONE}, or a list of that and arms, found {arm['needs']!r}"
            )
        controls = arm.get("controls", {})
        if not isinstance(controls, Mapping):
            problems.append(f"arm {name}: controls must be roles and arms, such as uniform: {next(iter(arms))}")
            continue
        others = {*arms, ENSEMBLE} if content.get("alone") else {*arms}
        problems += [
            f"arm {name} names {control!r} as its control {role}, which is no other arm"
            + (" (an ensemble there is with alone: true)" if control == ENSEMBLE else "")
            for role, control in controls.items()
            if control not in others - {name}
        ]
    return problems or _need_problems(arms, alone=bool(content.get("alone")))


def _need_problems(arms: Mapping[str, Mapping[str, Any]], *, alone: bool) -> list[str]:
    problems = []
    for name, arm in arms.items():
        for need in _needs(arm):
            if need == NEEDS_ALONE and not alone:
                problems.append(f"arm {name} needs one network a modality, which a study has with alone: true")
            elif need != NEEDS_ALONE and (need not in arms or need == name):
                problems.append(f"arm {name} needs {need!r}, which is neither another arm nor {NEEDS_ALONE}")
            elif need != NEEDS_ALONE and _needs(arms[need]):
                problems.append(f"arm {name} needs {need}, which needs others itself: expected one that needs none")
    return problems


def _needs(arm: Mapping[str, Any]) -> tuple[str, ...]:
    """What an arm needs, as a list or as one word in the file."""
    needs = arm.get("needs") or []
    return (needs,) if isinstance(needs, str) else tuple(map(str, needs))


def _value_problems(content: Mapping[str, Any]) -> list[str]:
    problems = []
    if content.get("part", "test") not in ("validation", "test"):
        problems.append(f"part must be validation or test, found {content['part']!r}")
    problems += _score_problems(content.get("score") or DICE, content.get("convention"))
    problems += _seed_problems(content.get("seeds", [0]))
    lists = {key: content.get(key) or [] for key in ("config", "evaluation", "splits")}
    problems += [f"{key} must be a list of files, found {v!r}" for key, v in lists.items() if not isinstance(v, list)]
    if not isinstance(content.get("settings") or {}, Mapping):
        problems.append(f"settings must be keys and values, found {content['settings']!r}")
    return problems


def _score_problems(score: object, convention: object) -> list[str]:
    if not isinstance(score, str) or not re.fullmatch(r"\w+", score) or score.startswith("hd95_"):
        return [f"score must be a column from 0 to 1, such as accuracy, or absolute_error, found {score!r}"]
    if convention is None:
        return []
    if not is_dice(score):
        return [f"convention is for Dice and says nothing of {score}: leave it out, found {convention!r}"]
    if convention not in EMPTY_CONVENTIONS:
        return [f"convention must be one of {', '.join(EMPTY_CONVENTIONS)}, found {convention!r}"]
    return []


def _seed_problems(seeds: object) -> list[str]:
    found = list(seeds) if isinstance(seeds, (list, tuple)) else []
    if found and all(type(seed) is int and seed >= 0 for seed in found) and len(set(found)) == len(found):
        return []
    return [f"seeds must be different whole numbers, one at least, found {seeds!r}"]


def _file_problems(content: Mapping[str, Any]) -> list[str]:
    arms = content["arms"]
    overlays = [overlay for arm in arms.values() for overlay in (arm or {}).get("overlays", [])]
    problems = []
    for file in dict.fromkeys([*content["config"], *content["evaluation"], *(content.get("splits") or ()), *overlays]):
        try:
            find_file(file)
        except DataError as error:
            problems += error.problems
    if problems:
        return problems
    try:
        modalities = _modalities(content)
    except DataError as error:
        return error.problems
    key = content.get("key_modality")
    if key is not None and key not in modalities:
        problems.append(f"key_modality must be one of {', '.join(modalities)}, found {key!r}")
    shared = [*content["config"], *content["evaluation"]]
    problems += _unread(content.get("settings") or {}, [*shared, *overlays], "the settings")
    for name, arm in arms.items():
        own = (arm or {}).get("overlays", [])
        problems += _unread((arm or {}).get("settings", {}), [*shared, *own], f"arm {name}")
    return problems


def _unread(settings: Mapping[str, Any], files: Sequence[str], where: str) -> list[str]:
    """Settings that no configuration file has, which nothing would read."""
    known = {str(key) for file in dict.fromkeys(files) for key in yaml.safe_load(find_file(file).read_text("utf-8"))}
    return [
        f"{where} has {key!r}, which is in none of the configuration files"
        for key in settings
        if key not in known and str(key).split("#")[0] not in known
    ]


def _modalities(content: Mapping[str, Any]) -> tuple[str, ...]:
    """The last word on ``modalities`` in the study's settings and configuration files."""
    files = [yaml.safe_load(find_file(file).read_text(encoding="utf-8")) for file in content["config"]]
    said = [values["modalities"] for values in (*files, content.get("settings") or {}) if "modalities" in values]
    modalities = said[-1] if said else None
    if not isinstance(modalities, list) or not modalities:
        raise DataError(
            [
                "modalities are not named by the configuration files: give the settings a list of them, "
                f"such as modalities: [view1, view2], found {modalities!r}"
            ]
        )
    return tuple(modalities)


def _arm(name: str, values: Mapping[str, Any]) -> Arm:
    return Arm(
        name,
        str(values.get("title", name)),
        tuple(values.get("overlays", ())),
        dict(values.get("settings", {})),
        dict(values.get("controls", {})),
        _needs(values),
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
    controls = {control for name in wanted for control in everything[name].controls.values()}
    needs = {need for name in (reference, *wanted, *controls - {ENSEMBLE}) for need in everything[name].needs}
    if ENSEMBLE in controls:
        needs.add(NEEDS_ALONE)
    return {
        name: arm
        for name, arm in everything.items()
        if name in (reference, *wanted, *controls, *needs) or (NEEDS_ALONE in needs and name.startswith(ALONE))
    }
