# SPDX-License-Identifier: Apache-2.0
"""Change configuration files as texts, so that the comments in them stay."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from itertools import pairwise
from typing import Any

import yaml

#: Where the comments of the bundles' configurations begin.
_COMMENTS = 40

_KEY = re.compile(r"([^\s#:'\"-][^\s:]*):(\s|$)")


def blocks(text: str) -> dict[str, str]:
    r"""Split a configuration into its keys, each with all of its lines, comments beside them included.

    Comments between two keys belong to neither, and are not in what is returned.

    Example:
        >>> blocks("a: 1  # one\n# about b\nb:\n  c: 2\n")
        {'a': 'a: 1  # one', 'b': 'b:\n  c: 2'}
    """
    lines = text.splitlines()
    return {key: "\n".join(lines[start:end]) for key, (start, end) in _places(lines).items()}


def overlaid(text: str, overlay: str, *, known_only: bool = False) -> str:
    r"""Replace keys of a configuration by those of another one, where they stand; new ones come at the end.

    It says what merging the two files says, as one file. A key such as ``train#preprocessing`` replaces that part of
    what ``text`` defines as ``train``; where there is no such part, it comes at the end too.

    Args:
        text: the configuration.
        overlay: the other one.
        known_only: leave out keys that ``text`` does not have.

    Example:
        >>> print(overlaid("# first\na: 1\nb:\n  c: 2  # two\n  d: 3\n", "a: 4\nb#c: 5\nb#e: 6\n"), end="")
        # first
        a: 4
        b:
          c: 5
          d: 3
        b#e: 6
    """
    lines = text.splitlines()
    changed = blocks(overlay)
    places = _places(lines)
    within = {key: place for key, place in _inner_places(lines, places).items() if key.split("#")[0] not in changed}
    places |= within
    for key in sorted(changed.keys() & places.keys(), key=lambda key: -places[key][0]):
        start, end = places[key]
        new = changed[key].splitlines()
        if key in within:
            new = [f"  {line}".rstrip() for line in [new[0].split("#", 1)[1], *new[1:]]]
        lines[start:end] = new
    if not known_only:
        lines += [line for key, block in changed.items() if key not in places for line in block.splitlines()]
    return "\n".join(lines) + "\n"


def without(text: str, keys: Collection[str]) -> str:
    r"""Leave keys out of a configuration.

    Example:
        >>> print(without("a: 1\nb:\n  c: 2\n# of d\nd: 3\n", ["b"]), end="")
        a: 1
        # of d
        d: 3
    """
    lines = text.splitlines()
    for start, end in sorted((place for key, place in _places(lines).items() if key in keys), reverse=True):
        del lines[start:end]
    return "\n".join(lines) + "\n"


def as_text(values: Mapping[str, tuple[Any, str | None]]) -> str:
    """Write keys with plain values, a line each, with a comment or none.

    Example:
        >>> print(as_text({"modalities": (["ct", "pet"], "channel order"), "seed": (0, None)}), end="")
        modalities: [ct, pet]                    # channel order
        seed: 0
    """
    lines = []
    for key, (value, comment) in values.items():
        dumped = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6, allow_unicode=True)
        plain = dumped.removesuffix("...\n").strip()
        line = f"{key}: {plain}"
        lines.append(f"{line:<{_COMMENTS}} # {comment}" if comment else line)
    return "\n".join(lines) + "\n"


def headed(text: str, head: str) -> str:
    r"""Put another comment in place of the one that a file begins with.

    Example:
        >>> print(headed("# old\n# text\n\na: 1\n", "new"), end="")
        # new
        <BLANKLINE>
        a: 1
    """
    lines = text.splitlines()
    while lines and (lines[0].startswith("#") or not lines[0].strip()):
        lines.pop(0)
    comment = [f"# {line}".rstrip() for line in head.splitlines()]
    return "\n".join([*comment, "", *lines]) + "\n"


def _places(lines: list[str]) -> dict[str, tuple[int, int]]:
    """Key -> first line and the line behind its last."""
    starts = [(index, match[1]) for index, line in enumerate(lines) if (match := _KEY.match(line))]
    places = {}
    for (start, key), (behind, _) in pairwise([*starts, (len(lines), "")]):
        end = behind
        while end > start + 1 and not lines[end - 1].startswith((" ", "- ")):
            end -= 1  # blank lines, and comments that belong to what follows
        places[key] = (start, end)
    return places


def _inner_places(lines: list[str], places: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """The like of the keys right below each key, by names such as ``train#preprocessing``."""
    inner = {}
    for key, (start, end) in places.items():
        below = [line[2:] if line.startswith("  ") else "" for line in lines[start + 1 : end]]
        for name, (first, last) in _places(below).items():
            inner[f"{key}#{name}"] = (start + 1 + first, start + 1 + last)
    return inner
