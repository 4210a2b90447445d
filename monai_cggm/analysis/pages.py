# SPDX-License-Identifier: Apache-2.0
"""Reports as one self-contained HTML page and as Markdown, from the same plain text, tables and pictures."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass

#: What stands in a table where there is no number.
DASH = "–"


@dataclass(frozen=True)
class Table:
    """A table of texts.

    Attributes:
        caption: a sentence above it.
        header: the columns' names.
        rows: the texts, a row of ``len(header)`` each; columns of numbers are set flush right.
    """

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Picture:
    """A picture.

    Attributes:
        svg: an SVG file.
        alt: what it shows, for readers who do not see it.
        caption: text below it.
        name: of its file, ``figures/<name>.svg`` beside the Markdown page.
    """

    svg: bytes
    alt: str
    caption: str
    name: str


@dataclass(frozen=True)
class Section:
    """A part of a report. All text is plain: it is escaped when it is written.

    Attributes:
        title: its heading.
        paragraphs: come first.
        bullets: a list after them.
        blocks: tables and pictures after that.
    """

    title: str
    paragraphs: Sequence[str] = ()
    bullets: Sequence[str] = ()
    blocks: Sequence[Table | Picture] = ()


def one_line(text: object) -> str:
    r"""Return a text on one line.

    Example:
        >>> one_line(" a\n  b ")
        'a b'
    """
    return " ".join(str(text).split())


def without_folders(text: object) -> str:
    """Return a text on one line, without the folders of absolute paths: they say more about a machine than about a run.

    Example:
        >>> without_folders("case a: no label (/home/me/data/a_seg.nii.gz)")
        'case a: no label (…/a_seg.nii.gz)'
    """
    return _FOLDERS.sub("…/", _HOME.sub("~", one_line(text)))


_HOME = re.compile(r"""(?<![\w.…/\\])/(?:home|Users)/[^\s/\\'":()\[\],]+(?=$|[\s'":()\[\],])""")
_ROOT = r"(?<![\w.…/\\])(?:file:/{2,3}|[A-Za-z]:[\\/]|(?<!:)//|/|~/|\\\\)"
_FOLDERS = re.compile(_ROOT + r"""(?:[^\s/\\'":()\[\],]+[\\/])+""")


def markdown(title: str, sections: Sequence[Section]) -> str:
    """Return a report in GitHub's Markdown; pictures are named, not shown.

    Example:
        >>> print(markdown("Report", [Section("Costs", blocks=[Table("Seconds.", ["arm", "s"], [["joint", "412"]])])]))
        # Report
        <BLANKLINE>
        ## Costs
        <BLANKLINE>
        Seconds.
        <BLANKLINE>
        | arm | s |
        | --- | ---: |
        | joint | 412 |
        <BLANKLINE>
    """
    lines = [f"# {_escaped(title)}", ""]
    for section in sections:
        lines += [f"## {_escaped(section.title)}", ""]
        for paragraph in section.paragraphs:
            lines += [_escaped(paragraph), ""]
        if section.bullets:
            lines += [*(f"- {_escaped(bullet)}" for bullet in section.bullets), ""]
        for block in section.blocks:
            if isinstance(block, Table):
                lines += _markdown_table(block)
            else:
                lines += [f"![{_escaped(block.alt)}](figures/{block.name}.svg)", "", _escaped(block.caption)]
            lines += [""]
    return "\n".join(lines)


def _markdown_table(table: Table) -> list[str]:
    numeric = _numeric_columns(table)
    rule = ["---:" if number else "---" for number in numeric]
    rows = [list(map(_escaped, row)) for row in (table.header, *table.rows)]
    lines = [f"| {' | '.join(row)} |" for row in (rows[0], rule, *rows[1:])]
    return [_escaped(table.caption), "", *lines]


def _escaped(text: str) -> str:
    """Text that Markdown shows as it stands: neither markup nor the end of a table's cell."""
    text = re.sub(r"([\\`*|]|\](?=\())", r"\\\1", text)
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


_NUMERIC = re.compile(r"[-+–<\d\[]")


def _numeric_columns(table: Table) -> list[bool]:
    """Which columns hold numbers in every row, and are set flush right."""
    if not table.rows:
        return [False] * len(table.header)
    columns = zip(*table.rows, strict=True)
    return [all(_NUMERIC.match(t) for t in column) and any(t != DASH for t in column) for column in columns]


_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1000px; padding: 1rem; background: #fff; color: #1b1b1b;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: .5rem 0 1rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; border-bottom: 1px solid #d0d0d0; padding-bottom: .2rem; }
p, li { max-width: 46rem; overflow-wrap: anywhere; }
ul { padding-left: 1.2rem; }
section:first-of-type li { margin-bottom: .5rem; }
.wide { overflow-x: auto; margin: .5rem 0 1.25rem; }
table { border-collapse: collapse; font-size: .8rem; line-height: 1.35; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .4rem; border-bottom: 1px solid #e2e2e2; text-align: left; vertical-align: top; }
thead th { border-bottom: 2px solid #888; vertical-align: bottom; }
tbody th { font-weight: 600; min-width: 6rem; }
td { max-width: 24rem; }
th:first-child, td:first-child { padding-left: 0; }
.number { text-align: right; white-space: nowrap; }
thead .number { white-space: normal; }
.caption { font-size: .9rem; color: #444; margin: 1rem 0 .25rem; }
figure { margin: 1rem 0; }
figure img { display: block; width: 100%; min-width: 720px; height: auto; }
figcaption { font-size: .9rem; color: #444; max-width: 46rem; }
@media print { .wide { overflow: visible; } figure img { min-width: 0; } }
"""


def page(title: str, sections: Sequence[Section]) -> str:
    """Return a report as one HTML page that loads nothing: its style and its pictures are inside.

    Example:
        >>> "&lt;b&gt;" in page("<b>", [Section("Costs", ["None."])])
        True
    """
    body = "\n".join(_html_section(section) for section in sections)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<main>\n<h1>{html.escape(title)}</h1>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _html_section(section: Section) -> str:
    parts = [f"<h2>{html.escape(section.title)}</h2>"]
    parts += [f"<p>{html.escape(paragraph)}</p>" for paragraph in section.paragraphs]
    if section.bullets:
        items = "".join(f"<li>{html.escape(bullet)}</li>\n" for bullet in section.bullets)
        parts.append(f"<ul>\n{items}</ul>")
    parts += [_html_table(b) if isinstance(b, Table) else _html_picture(b) for b in section.blocks]
    return "<section>\n" + "\n".join(parts) + "\n</section>"


def _html_table(table: Table) -> str:
    classes = [' class="number"' if number else "" for number in _numeric_columns(table)]
    head = "".join(_cell('th scope="col"', c, text) for c, text in zip(classes, table.header, strict=True))
    rows = []
    for row in table.rows:
        first, *rest = (
            _cell("td" if i else 'th scope="row"', c, text)
            for i, (c, text) in enumerate(zip(classes, row, strict=True))
        )
        rows.append("<tr>" + first + "".join(rest) + "</tr>")
    return (
        f'<p class="caption">{html.escape(table.caption)}</p>\n<div class="wide" tabindex="0" role="region" '
        f'aria-label="{html.escape(table.caption)}"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n'
        + "\n".join(rows)
        + "\n</tbody></table></div>"
    )


def _cell(tag: str, attributes: str, text: str) -> str:
    return f"<{tag}{attributes}>{html.escape(text)}</{tag.split()[0]}>"


def _html_picture(picture: Picture) -> str:
    data = base64.b64encode(picture.svg).decode("ascii")
    return (
        f'<figure><div class="wide"><img alt="{html.escape(picture.alt)}" '
        f'src="data:image/svg+xml;base64,{data}"></div>\n'
        f"<figcaption>{html.escape(picture.caption)}</figcaption></figure>"
    )
