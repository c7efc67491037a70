"""A report as one HTML file: nothing is fetched, all text is escaped, one column on a phone, black on white in print."""

import base64
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from caldpo_ray.reporting.drawing import Picture

STYLE = """
:root { color-scheme: light; --ink: #1b1f24; --quiet: #57606a; --line: #d8dee4; --soft: #f6f8fa; --accent: #0072b2; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 76rem; color: var(--ink); background: #fff;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  -webkit-text-size-adjust: 100%; overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: .5rem 0 .25rem; }
h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; padding-bottom: .25rem; border-bottom: 2px solid var(--accent); }
p { margin: .5rem 0; }
.quiet { color: var(--quiet); }
.verdict { padding: .75rem 1rem; background: var(--soft); border-left: 4px solid var(--accent); }
code, pre { font: .85em/1.45 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre { padding: .75rem; background: var(--soft); overflow-x: auto; white-space: pre-wrap; }
.figures { display: grid; gap: 1.5rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }
figure { margin: 0; break-inside: avoid; }
figure img { display: block; width: 100%; max-width: 40rem; height: auto; margin: 0 auto; }
figcaption { font-size: .9rem; color: var(--quiet); max-width: 40rem; margin: .25rem auto 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { padding: .3rem .6rem .3rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
.wide th, .wide td { overflow-wrap: break-word; }
td small { display: block; color: var(--quiet); }
th { font-weight: 600; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
td.number { white-space: nowrap; }
.facts th { width: 12rem; font-weight: 400; color: var(--quiet); }
summary { cursor: pointer; color: var(--accent); padding: .4rem 0; }
footer { margin-top: 2.5rem; font-size: .85rem; color: var(--quiet); }
@media (max-width: 30rem) {
  body { padding: .75rem; }
  .facts, .facts tbody, .facts tr, .facts th, .facts td { display: block; width: auto; }
  .facts th { border: 0; padding-bottom: 0; }
  .facts td { padding-top: 0; }
  .wide table { font-size: .82rem; }
  td.number { white-space: normal; }
}
@media print {
  html { font-size: 12px; }
  body { max-width: none; padding: 0; font-size: 1rem; }
  .figures { display: block; columns: 2; column-gap: 1.2rem; }
  figure { margin-bottom: 1rem; }
  h2 { break-after: avoid; }
  tr { break-inside: avoid; }
  .wide { overflow: visible; }
  summary, .screen { display: none; }
  details::details-content { display: block; content-visibility: visible; }
  @page { margin: 1.5cm; }
}
"""
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="generator" content="caldpo_ray">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<header>
<h1>{title}</h1>
<p class="quiet">{subtitle}</p>
</header>
<main>
{body}
</main>
<footer>{footer}</footer>
</body>
</html>
"""


def page(title: str, subtitle: str, parts: Iterable[str], footer: str) -> str:
    """The whole file; `parts` are HTML, the rest is text."""
    body = "\n".join(part for part in parts if part)
    return PAGE.format(title=escape(title), subtitle=escape(subtitle), style=STYLE, body=body, footer=escape(footer))


def section(title: str, *parts: str) -> str:
    """A heading and what is below it; nothing where nothing is."""
    inner = "\n".join(part for part in parts if part)
    return f"<section>\n<h2>{escape(title)}</h2>\n{inner}\n</section>" if inner else ""


def paragraph(text: str, kind: str = "") -> str:
    """Text, with what is to be typed between backticks; `kind` is a class of the style: `quiet` or `verdict`."""
    attribute = f' class="{escape(kind)}"' if kind else ""
    inner = re.sub("`(.+?)`", r"<code>\1</code>", escape(text))
    return f"<p{attribute}>{inner}</p>"


def facts_table(facts: Mapping[str, Any]) -> str:
    """Name and value, a line each; values of None are left out."""
    lines = [
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(show(value))}</td></tr>'
        for name, value in facts.items()
        if value is not None
    ]
    return f'<table class="facts"><tbody>{"".join(lines)}</tbody></table>' if lines else ""


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Columns of numbers stand right; a wide table scrolls in itself, not the page."""
    if not rows:
        return ""
    numeric = [all(_is_number(row[at]) or row[at] in (None, "") for row in rows) for at in range(len(header))]
    kinds = [' class="number"' if number else "" for number in numeric]
    head = "".join(f'<th scope="col"{kind}>{_breakable(name)}</th>' for name, kind in zip(header, kinds, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{kind}>{_cell(value)}</td>" for value, kind in zip(row, kinds, strict=True)) + "</tr>"
        for row in rows
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


class Named(NamedTuple):
    """A name of ours, which may break after its slashes, and below it in small what it means."""

    name: str
    meaning: str


def _cell(value: Any) -> str:
    if not isinstance(value, Named):
        return escape(show(value))
    return f"{_breakable(value.name)}<small>{escape(value.meaning)}</small>"


def _breakable(name: str) -> str:
    return escape(name).replace("/", "/<wbr>").replace("_", "_<wbr>")


def _is_number(value: Any) -> bool:
    return (isinstance(value, int | float) and not isinstance(value, bool)) or isinstance(value, Interval)


class Interval(tuple[float, float]):
    """Both ends, shown as [low, high]."""


def show(value: Any, digits: int = 4) -> str:
    """A value as people read it: the digits that count, thousands apart, a dash for nothing."""
    if isinstance(value, Interval):
        return f"[{show(value[0], 3)}, {show(value[1], 3)}]"
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if 10 ** (digits - 1) <= abs(value) < 1e9:
            return f"{value:,.0f}".replace("-", "−")
        text = f"{value:.{digits}g}" if math.isfinite(value) else f"{'-' * (value < 0)}∞"
        return text.replace("-", "−").replace("e−0", "e−").replace("e+", "e").replace("e0", "e")
    return str(value)


def figures(pictures: Iterable[Picture]) -> str:
    """The pictures inside the file, each with the line that says how to read it."""
    parts = [
        f'<figure id="{escape(each.name)}"><img alt="{escape(f"{each.title}. {each.reading}")}"'
        f' src="data:image/png;base64,{base64.b64encode(each.png).decode()}"><figcaption>{escape(each.reading)}</figcaption>'
        "</figure>"
        for each in pictures
    ]
    return f'<div class="figures">{"".join(parts)}</div>' if parts else ""


def folded(summary: str, inner: str, printed: bool = True) -> str:
    """HTML that is there when it is asked for, and in print unless that would be pages of little use."""
    kind = "" if printed else ' class="screen"'
    return f"<details{kind}><summary>{escape(summary)}</summary>\n{inner}\n</details>" if inner else ""


def verbatim(text: str) -> str:
    """A file as it is."""
    return f"<pre>{escape(text)}</pre>"
