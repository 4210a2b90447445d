# SPDX-License-Identifier: Apache-2.0
"""What a run was: its configuration, its software and machine, its cases."""

from __future__ import annotations

import getpass
import inspect
import json
import logging
import os
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
import yaml
from ignite.engine import Engine, Events
from monai.bundle import ConfigParser, ReferenceResolver

import monai_cggm
from monai_cggm.data.splits import write_split
from monai_cggm.files import atomic_path

logger = logging.getLogger(__name__)

_PACKAGES = (
    "monai",
    "torch",
    "pytorch-ignite",
    "numpy",
    "scipy",
    "nibabel",
    "pandas",
    "tensorboard",
)

Split = Mapping[str, Sequence[Mapping[str, Any]]]


class RunInfo:
    """Write what a run is into its folder when it starts; see :func:`write_run_info` for the files.

    In a MONAI bundle it finds the configuration by itself: all files merged, overrides of the command line included.

    Args:
        run_dir: the run's folder.
        split: datalist items of each part, as :func:`monai_cggm.data.split_cases` gives them.
        seed: the seed of the split.
        skipped: cases that were left out, with the reason.
        config: the configuration, outside a bundle.

    Raises:
        ValueError: when a run starts that goes on from a checkpoint, where the folder holds another split.

    Example:
        >>> info = RunInfo("runs/one", config={"rho": 1.2})
        >>> info.config()
        {'rho': 1.2}
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        split: Split | None = None,
        seed: int = 0,
        skipped: Mapping[str, str] | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self.run_dir = Path(run_dir)
        self.split = split
        self.seed = seed
        self.skipped = skipped
        self._config = config
        self._parser = bundle_parser() if config is None else None

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer, after :class:`Checkpoints`, or to an evaluator."""
        engine.add_event_handler(Events.STARTED, self)

    def config(self) -> dict[str, Any]:
        """Return the configuration with references and expressions replaced by the plain values they have now."""
        if self._parser is not None:
            return resolved_config(self._parser)
        return dict(self._config or {})

    def __call__(self, engine: Engine) -> None:
        """Write the files, on the first process."""
        if idist.get_rank() != 0:
            return
        if self.split is not None and engine.state.iteration > 0:
            _refuse_another_split(self.run_dir / "split.json", self.split)
        write_run_info(self.run_dir, self.config(), split=self.split, seed=self.seed, skipped=self.skipped)


def write_run_info(
    run_dir: str | Path,
    config: Mapping[str, Any],
    *,
    split: Split | None = None,
    seed: int = 0,
    skipped: Mapping[str, str] | None = None,
) -> None:
    """Write ``config.yaml``, ``environment.json``, ``split.json`` and ``skipped.json``, each whole or not at all.

    The home folder is written as ``~``, and ``environment.json`` holds no user's name, so the files can be passed on.

    Args:
        run_dir: the run's folder.
        config: plain values; paths may be among them.
        split: datalist items of each part; without it there is no ``split.json``.
        seed: the seed of the split.
        skipped: cases that were left out, with the reason; without any there is no ``skipped.json``.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_run_info(folder, {"rho": 1.2})
        ...     print(Path(folder, "config.yaml").read_text().strip())
        rho: 1.2
    """
    folder = Path(run_dir)
    _write_text(folder / "config.yaml", yaml.safe_dump(_plain(config), sort_keys=False, allow_unicode=True, width=120))
    _write_json(folder / "environment.json", environment())
    if split is not None:
        write_split(split, folder / "split.json", seed)
    if skipped:
        _write_json(folder / "skipped.json", dict(skipped))


def environment() -> dict[str, Any]:
    """Return versions, machine and command line, without the user's name or home folder.

    Example:
        >>> sorted(environment())
        ['command', 'deterministic', 'devices', 'packages', 'platform', 'processes', 'python', 'threads']
    """
    return {
        "command": [_anonymous(word) for word in _command()],
        "python": platform.python_version(),
        "packages": {
            "monai_cggm": monai_cggm.__version__,
            **{name: version for name in _PACKAGES if (version := _version(name)) is not None},
        },
        "platform": platform.platform(),
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] or ["cpu"],
        "processes": idist.get_world_size(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


def bundle_parser() -> ConfigParser | None:
    """Return the parser of the MONAI bundle that is being built, or None outside one.

    A bundle's configuration has no way to name itself as a whole, so the parser is looked up among the callers: it is
    the one whose ``get_parsed_content`` is making the object that asks.
    """
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, ConfigParser):
            return caller
        frame = frame.f_back
    return None


def resolved_config(parser: ConfigParser) -> dict[str, Any]:
    """Return a parser's configuration, plain values in the place of the references and expressions that gave them.

    What stands for an object (a network, a device, cases) stays as it is written. Numbers that followed from others no
    longer do: to repeat a run with changes, use its command, which ``environment.json`` keeps.

    Example:
        >>> parser = ConfigParser({"lr": 0.01, "rate": "$@lr * 2", "device": "$torch.device('cpu')"})
        >>> parser.get_parsed_content("rate")
        0.02
        >>> resolved_config(parser)
        {'lr': 0.01, 'rate': 0.02, 'device': "$torch.device('cpu')"}
    """
    values = parser.ref_resolver.resolved_content

    def resolve(item: Any, identifier: str) -> Any:
        if isinstance(item, dict):
            return {k: resolve(item[k], sub) for k, sub, _ in ReferenceResolver.iter_subconfigs(identifier, item)}
        if isinstance(item, list):
            return [resolve(v, sub) for _, sub, v in ReferenceResolver.iter_subconfigs(identifier, item)]
        if isinstance(item, str) and item[:1] in ("$", "@"):
            known = values.get(identifier, values.get(ReferenceResolver.normalize_id(item[1:]), item))
            return known if _is_plain(known) else item
        return item

    config: dict[str, Any] = resolve(parser.get(), "")
    config.pop(ConfigParser.meta_key, None)  # metadata.json is a file of its own
    return config


def _is_plain(value: Any) -> bool:
    """Whether a value tells something in the place of its expression: lists of cases, say, would bury the rest."""
    if isinstance(value, (list, tuple)):
        return all(_is_plain(v) and not isinstance(v, (list, tuple)) for v in value)
    return value is None or isinstance(value, (bool, int, float, str, Path))


def _plain(value: Any) -> Any:
    """The value in types that YAML's safe loader knows, the home folder as ``~``."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if value is None or type(value) in (bool, int, float):
        return value
    return _without_home(str(value))


def _without_home(text: str) -> str:
    home = str(Path.home())
    return text if home in ("/", "") else re.sub(rf"{re.escape(home)}(?=$|[/\\'\"])", "~", text)


def _anonymous(text: str) -> str:
    text = _without_home(text)
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a container's user may have no name
        return text
    return re.sub(rf"(?<=[/\\]){re.escape(user)}(?=$|[/\\])", "user", text)


def _command() -> list[str]:
    # Python's own arguments tell `python -m monai.bundle run` from a script; its folder is nobody's business
    words = list(sys.orig_argv) or list(sys.argv)
    return [os.path.basename(words[0]), *words[1:]] if words else []


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _refuse_another_split(path: Path, split: Split) -> None:
    if not path.is_file():
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    for part, items in split.items():
        now, then = {str(item["case"]) for item in items}, set(before.get(part, []))
        if now != then:
            different = ", ".join(sorted(now ^ then))
            raise ValueError(
                f"{path}: the {part} cases are not those that this run began with (different: {different}); resume "
                "with the same split, for example by naming this file as the split file"
            )


def _write_text(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    _write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
