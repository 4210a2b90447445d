#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Write the reference pages that the code, the command's help texts and the configurations' comments make.

    python scripts/make_reference.py            # docs/reference/cli.md, configuration.md, handlers.md
    python scripts/make_reference.py --check    # write nothing; exit code 1 where a page is not what it would be

Do not edit these pages: edit help texts, comments and docstrings, and run this again.
"""

from __future__ import annotations

import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer
import yaml
from typer.models import ArgumentInfo, OptionInfo

from monai_cggm.cli import app as cli
from monai_cggm.files import atomic_path

ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT / "docs" / "reference"
WIDTH = 118
MADE = "<!-- Made by scripts/make_reference.py: do not edit. -->"

#: parameters whose default depends on the machine
OF_THE_MACHINE = {"workers": "one a core, 4 at most"}

#: files of a bundle, and the key that ends the block of what users change
FIRST_BLOCKS = {"train.yaml": "cases", "evaluate.yaml": "averaged", "inference.yaml": "network_class"}
BUNDLE = ROOT / "bundles" / "brats_cggm" / "configs"
#: folders of overlays in their order, and what goes for all of one; further folders come after these
OVERLAYS = {
    "methods": "Methods: after `train.yaml` and `hardware/*.yaml`. Each switches the recipe's parts off.",
    "parts": "Parts that go with any method, after it.",
    "ablations": "Parts and variants of CGGM, after `methods/cggm.yaml`.",
    "protocols": "What is trained and scored on.",
    "hardware": "What it runs on, after `train.yaml`.",
}
#: folders of `configs` that hold no overlays
NO_OVERLAYS = {"studies", "splits"}

#: objects of train.yaml that an overlay may set to null
PARTS = ("dropout", "auxiliary", "distillation", "average", "method", "gradients", "classifiers", "classifiers_def")
#: how a key ends that changes what an object of another file is built from
BUILT = "#_target_"

MODULES = {
    "methods": "Balancing methods, and parts that combine with them",
    "handlers": "Handlers of a run",
    "networks": "Networks and classifiers",
    "metrics": "Metrics",
    "losses": "Losses",
    "transforms": "Transforms",
    "inferers": "Inferers",
    "data": "Data",
    "schedules": "Learning rates",
}


# --------------------------------------------------------------------------------------------------- the command line


def cli_page() -> str:
    """Every command with its arguments, options, defaults and examples."""
    group: Any = typer.main.get_command(cli)
    callbacks = [info.callback for info in cli.registered_commands]
    parts = [
        "# Commands",
        MADE,
        "`monai-cggm --help` and `monai-cggm COMMAND --help` print the same. Training, evaluation and inference are "
        "MONAI's own command, `python -m monai.bundle run`: see [configuration](configuration.md). Every command ends "
        "with exit code 1 and one line that begins with `Error:` where data or arguments are at fault, and with exit "
        "code 2 where the command line itself is.",
        "\n".join(f"- [`{name}`](#{name}): {first_line(command.help)}" for name, command in group.commands.items()),
        " ".join(f"{code('monai-cggm ' + p.opts[0])}: {prose(p.help)}" for p in group.params if not p.hidden),
    ]
    for (name, command), callback in zip(group.commands.items(), callbacks, strict=True):
        parts += command_section(name, command, callback)
    return page(parts)


def command_section(name: str, command: Any, callback: Any) -> Iterator[str]:
    text, _, examples = inspect.cleandoc(command.help).partition("\b\n")
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option"]
    places = [p.name.upper() + ("..." if p.nargs == -1 else "") for p in arguments]
    places = [place if p.required else f"[{place}]" for place, p in zip(places, arguments, strict=True)]
    must = [f"{p.opts[0]} {p.metavar or p.name.upper()}" for p in options if p.required]
    yield f"## {name}"
    yield text.strip()
    yield fenced(" ".join(["monai-cggm", name, *places, *must, *(["[OPTIONS]"] if len(options) > len(must) else [])]))
    hints = get_type_hints(callback, include_extras=True)
    rows = [parameter_row(parameter, hints[parameter.name]) for parameter in [*arguments, *options]]
    yield table(["", "takes", "default", ""], rows)
    if examples:
        # the heading line, Example: or Examples:, goes
        yield fenced(textwrap.dedent("\n".join(examples.strip("\n").splitlines()[1:])), "bash")


def parameter_row(parameter: Any, hint: Any) -> list[str]:
    is_option = parameter.param_type_name == "option"
    names = [*parameter.opts, *parameter.secondary_opts] if is_option else [parameter.name.upper()]
    return [
        ", ".join(map(code, names)),
        what_it_takes(parameter, hint),
        default_of(parameter),
        prose(parameter.help or ""),
    ]


def what_it_takes(parameter: Any, hint: Any) -> str:
    inner, *info = get_args(hint) if get_origin(hint) is Annotated else (hint,)
    kinds = [kind for kind in get_args(inner) or [inner] if kind is not type(None)]
    many = parameter.nargs == -1 or getattr(parameter, "multiple", False)
    kind = next(a for k in kinds for a in (get_args(k) or [k])) if kinds else inner
    if parameter.metavar:
        text = code(parameter.metavar)
    elif kind is bool:
        text = "no value"
    else:
        text = {int: "whole number", float: "number", Path: "path", str: "text"}.get(kind, code(kind.__name__))
    found = [i for i in info if isinstance(i, (ArgumentInfo, OptionInfo))]
    low, high = (next((getattr(i, end) for i in found if getattr(i, end) is not None), None) for end in ("min", "max"))
    text += f", {low} to {high}" if None not in (low, high) else f", at least {low}" if low is not None else ""
    return text + (", again for each" if many and parameter.param_type_name == "option" else "")


def default_of(parameter: Any) -> str:
    if parameter.required:
        return "required"
    if parameter.name in OF_THE_MACHINE and parameter.default is not None:
        return OF_THE_MACHINE[parameter.name]
    if parameter.default is None or parameter.default is False or parameter.default == "":
        return "–"
    return code(str(parameter.default))


# --------------------------------------------------------------------------------------------------- configurations


@dataclass(frozen=True)
class Setting:
    """A key of a configuration file, as it stands there."""

    key: str
    value: str
    comment: str


@dataclass(frozen=True)
class Overlay:
    """What a configuration file does when it is merged over another."""

    text: str
    settings: list[Setting]
    builds: dict[str, str]
    off: list[str]
    replaces: list[str]
    adds: list[str]


def configuration_page() -> str:
    """The keys of the BraTS bundle that users change, and what every overlay changes."""
    parts = [
        "# Configuration",
        MADE,
        "The keys that the BraTS bundle is meant to be changed by, and the overlays of `configs/`. Any key can be "
        "given on the command line, `--epochs 50`; of one that has parts, `--encoder#width 32`. Files merge in the "
        "order in which they are named. A value that begins with `$` is a Python expression, one with `@` refers to "
        "another key. The other bundles' keys are in their `configs/train.yaml`.",
        fenced(
            "python -m monai.bundle run --config_file \"['$B/train.yaml','$C/hardware/cpu.yaml']\" --dataset_dir DIR "
            "--epochs 50",
            "bash",
        ),
    ]
    for name, end in FIRST_BLOCKS.items():
        parts += [f"## {name}", opening(BUNDLE / name), settings_table(first_block(BUNDLE / name, end))]
    multi = BUNDLE / "multi_gpu_train.yaml"
    parts += ["## multi_gpu_train.yaml", *overlay_section(read_overlay(multi))]
    for folder in overlay_folders():
        parts += [f"## {folder}/", *([OVERLAYS[folder]] if folder in OVERLAYS else [])]
        for path in sorted((ROOT / "configs" / folder).glob("*.yaml")):
            parts += [f"### {folder}/{path.name}", *overlay_section(read_overlay(path))]
    return page(parts)


def overlay_folders() -> list[str]:
    there = {path.parent.name for path in (ROOT / "configs").glob("*/*.yaml")} - NO_OVERLAYS
    return [*(name for name in OVERLAYS if name in there), *sorted(there - set(OVERLAYS))]


def first_block(path: Path, end: str) -> list[Setting]:
    """The settings of a bundle's file that come after its imports and before ``end``, the first part.

    Raises:
        ValueError: where the file has no key ``end``, or nothing before it.
    """
    keys = [key for key, _ in entries(path)]
    if end not in keys:
        raise ValueError(f"{path} has no key {end!r}, which ends its first block")
    before = keys[: keys.index(end)]
    chosen = [s for s in settings_of(path) if s.key.split("#")[0] in before and s.key != "imports"]
    if not chosen:
        raise ValueError(f"{path} has no setting before {end!r}")
    return chosen


def read_overlay(path: Path) -> Overlay:
    """Take an overlay to pieces: its settings, and what it builds, switches off, replaces or adds to."""
    nodes = dict(entries(path))
    builds = {key: target_of(node) for key, node in nodes.items() if target_of(node)}
    builds |= {key.removesuffix(BUILT): node.value for key, node in nodes.items() if key.endswith(BUILT)}
    off = [key for key, node in nodes.items() if is_null(node) and key in PARTS]
    lists = [key for key, node in nodes.items() if is_block_list(node)]
    return Overlay(
        text=opening(path),
        settings=[s for s in settings_of(path) if s.key not in off and not s.key.endswith(BUILT)],
        builds=builds,
        off=off,
        replaces=[key for key in lists if not key.startswith("+")],
        adds=[key.removeprefix("+") for key in lists if key.startswith("+")],
    )


def overlay_section(overlay: Overlay) -> Iterator[str]:
    yield overlay.text
    if overlay.settings:
        yield settings_table(overlay.settings)
    does = [
        ("Builds", [f"`{key}` ({code(target)})" for key, target in overlay.builds.items()]),
        ("Switches off", [code(key) for key in overlay.off]),
        ("Replaces", [code(key) for key in overlay.replaces]),
        ("Adds to", [code(key) for key in overlay.adds]),
    ]
    text = " ".join(f"{verb} {', '.join(what)}." for verb, what in does if what)
    if text:
        yield text


def entries(path: Path) -> list[tuple[str, yaml.Node]]:
    root = yaml.compose(path.read_text(encoding="utf-8"))
    if not isinstance(root, yaml.MappingNode):
        raise ValueError(f"{path} is no mapping")
    return [(key.value, value) for key, value in root.value]


def settings_of(path: Path) -> Iterator[Setting]:
    """Yield the keys of a file whose value stands beside them, with their comments; parts of a mapping by ``#``."""
    lines = path.read_text(encoding="utf-8").splitlines()

    def walk(prefix: str, pairs: Sequence[tuple[str, yaml.Node]]) -> Iterator[Setting]:
        for key, node in pairs:
            if isinstance(node, yaml.MappingNode) and not node.flow_style and not target_of(node):
                yield from walk(f"{prefix}{key}#", [(k.value, v) for k, v in node.value])
            elif not target_of(node) and not is_block_list(node):
                yield Setting(prefix + key, source_of(node, lines), comment_of(node, lines))

    yield from walk("", entries(path))


def source_of(node: yaml.Node, lines: Sequence[str]) -> str:
    start, end = node.start_mark, node.end_mark
    if isinstance(node, yaml.ScalarNode) and node.style and node.value.startswith(("@", "$")):
        return node.value  # without the quotes that YAML wants around an @
    if start.line == end.line:
        return lines[start.line][start.column : end.column].strip() or "null"
    taken = [lines[start.line][start.column :], *lines[start.line + 1 : end.line], lines[end.line][: end.column]]
    return " ".join(line.strip() for line in taken if line.strip())


def comment_of(node: yaml.Node, lines: Sequence[str]) -> str:
    """The comment behind a value, and the lines that go on with it, which begin as far to the right."""
    last = node.end_mark.line
    behind = lines[last][node.end_mark.column :] if last < len(lines) else ""
    if "#" not in behind:
        return ""
    column = node.end_mark.column + behind.index("#")
    taken = [lines[last][column:]]
    for line in lines[last + 1 :]:
        if line[:column].strip() or not line[column:].startswith("#"):
            break
        taken.append(line[column:])
    return " ".join(line.lstrip("# ").strip() for line in taken)


def opening(path: Path) -> str:
    """The comment that a file begins with, as Markdown: paragraphs, and commands as code."""
    blocks: list[str] = []
    lines: list[str] = []
    for line in [*path.read_text(encoding="utf-8").splitlines(), ""]:
        if not line.startswith("#"):
            break
        lines.append(line[2:] if line.startswith("# ") else line[1:])
    is_code = [line.startswith("  ") for line in lines]
    for start, end in runs(lines, is_code):
        text = textwrap.dedent("\n".join(lines[start:end]))
        blocks.append(fenced(text, "bash") if is_code[start] else prose(" ".join(text.split())))
    return "\n\n".join(blocks)


def runs(lines: Sequence[str], is_code: Sequence[bool]) -> Iterator[tuple[int, int]]:
    """Yield where blocks of lines of one kind begin and end; empty lines part them."""
    start = None
    for index in range(len(lines) + 1):
        ends = index == len(lines) or not lines[index].strip()
        if start is not None and (ends or is_code[index] != is_code[start]):
            yield start, index
            start = None
        if not ends and start is None:
            start = index


def target_of(node: yaml.Node) -> str:
    """The class or function that a mapping builds; of one by name (a metric, say), the first."""
    if not isinstance(node, yaml.MappingNode):
        return ""
    for key, value in node.value:
        if key.value == "_target_":
            return str(value.value)
    return next((found for _, value in node.value if (found := target_of(value))), "")


def is_null(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:null"


def is_block_list(node: yaml.Node) -> bool:
    return isinstance(node, yaml.SequenceNode) and not node.flow_style


def settings_table(settings: Sequence[Setting]) -> str:
    return table(["key", "default", ""], [[code(s.key), code(s.value), prose(s.comment)] for s in settings])


# --------------------------------------------------------------------------------------------------- what Python has


def python_page() -> str:
    """The public classes and functions, one line each."""
    parts = [
        "# What Python has",
        MADE,
        "Public names by the module that they are imported from, as in `from monai_cggm.methods import CGGM`; "
        "`help(CGGM)` has arguments, shapes, errors and an example. In a configuration they are "
        "`_target_: monai_cggm.methods.CGGM`. [The same from Python](../how-to/use_from_python.md) shows how they go "
        "together.",
    ]
    for name, title in MODULES.items():
        module = importlib.import_module(f"monai_cggm.{name}")
        rows = [[code(public), summary(getattr(module, public))] for public in public_names(module)]
        parts += [f"## monai_cggm.{name}", f"{title}.", table(["name", ""], rows)]
    return page(parts)


def public_names(module: Any) -> list[str]:
    """What a module exports; without ``__all__``, the classes and functions that are written in it."""
    if hasattr(module, "__all__"):
        return list(module.__all__)
    own = [
        name
        for name, item in vars(module).items()
        if not name.startswith("_")
        and (inspect.isclass(item) or inspect.isfunction(item))
        and item.__module__ == module.__name__
    ]
    return sorted(own)


def summary(item: Any) -> str:
    """The first line of a docstring; of a constant, its keys.

    Raises:
        ValueError: where a class or a function has none.
    """
    if not (inspect.isclass(item) or inspect.isfunction(item)):
        keys = list(item) if hasattr(item, "__iter__") and not isinstance(item, str) else [item]
        return "A constant: " + ", ".join(code(str(key)) for key in keys) + "."
    text = first_line(item.__doc__)
    if not text:
        raise ValueError(f"{item.__module__}.{item.__name__} has no docstring")
    text = re.sub(r":math:`(.*?)`", r"`\1`", text)
    text = re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"`\1`", text)
    return prose(text.replace("``", "`"))


# --------------------------------------------------------------------------------------------------- Markdown


def first_line(text: str | None) -> str:
    return " ".join(inspect.cleandoc(text or "").split("\n\n")[0].split())


def code(text: str) -> str:
    return f"`{no_pipes(text)}`"


def no_pipes(text: str) -> str:
    # in a table's code GitHub wants \| for a pipe and Python-Markdown shows the backslash: a look-alike does for both
    return text.replace("|", "\N{DIVIDES}")


def prose(text: str) -> str:
    """Plain text as Markdown shows it: code between backticks stays code, and names of pages become links."""
    pieces = re.split(r"(`[^`]*`)", text)
    return "".join(no_pipes(piece) if piece.startswith("`") else _escaped(piece) for piece in pieces)


def _escaped(text: str) -> str:
    # underscores within a word are no Markdown
    text = re.sub(r"([|*\[\]]|(?<!\w)_|_(?!\w))", r"\\\1", text).replace("<", "&lt;")
    return re.sub(r"\bdocs/([\w/-]+\.md)", _link, text)


def _link(found: re.Match[str]) -> str:
    is_there = (ROOT / found[0]).is_file()
    return f"[{found[0]}](../{found[1]})" if is_there else found[0]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def fenced(text: str, language: str = "text") -> str:
    return f"```{language}\n{text}\n```"


def page(parts: Sequence[str]) -> str:
    return "\n\n".join(wrapped(part) for part in parts) + "\n"


def wrapped(part: str) -> str:
    """Wrap what is one paragraph of text; lists, tables, code and headings stay."""
    blocks = part.split("\n\n")
    whole = part.startswith(("#", "|", "- ", "```", "<!--")) or "```" in part
    if whole and "```" in part:
        pieces = re.split(r"(```.*?```)", part, flags=re.DOTALL)
        return "".join(p if p.startswith("```") else _fill_all(p) for p in pieces)
    return part if whole else "\n\n".join(_fill(" ".join(block.split())) for block in blocks)


def _fill_all(text: str) -> str:
    lead, tail = text[: len(text) - len(text.lstrip("\n"))], text[len(text.rstrip("\n")) :]
    blocks = [_fill(" ".join(block.split())) for block in text.strip("\n").split("\n\n")]
    return lead + "\n\n".join(blocks) + tail if text.strip() else text


def _fill(text: str) -> str:
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False)


MAKERS = {"cli.md": cli_page, "configuration.md": configuration_page, "handlers.md": python_page}


def main(
    check: Annotated[bool, typer.Option("--check", help="Write nothing; exit code 1 where a page is stale.")] = False,
) -> None:
    """Write the reference pages that are made from code, help texts and configurations."""
    stale = []
    for name, make in MAKERS.items():
        path, text = PAGES / name, make()
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            continue
        stale.append(name)
        if not check:
            with atomic_path(path) as temporary:
                temporary.write_text(text, encoding="utf-8")
    if not stale:
        typer.echo(f"{PAGES}: up to date")
    else:
        typer.echo(f"{PAGES}: {', '.join(stale)} {'would change' if check else 'written'}")
    if check and stale:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
