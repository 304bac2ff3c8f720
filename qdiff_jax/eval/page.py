"""report.html: one file that needs nothing else, to be mailed, archived or opened offline."""

import base64
import html
import pathlib
from collections.abc import Mapping, Sequence

from qdiff_jax.eval.tables import Column

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2129; --soft: #5b6472; --line: #d9dee6;
  --page: #f6f7f9; --card: #ffffff; --mark: #eef3fb; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ee; --soft: #a0a9b8; --line: #363d49;
  --page: #14171c; --card: #1c2027; --mark: #232a35; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 2rem 1.1rem 4rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .4rem; }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .7rem; }
.lead { color: var(--soft); margin: 0; max-width: 46rem; }
.scroll { overflow-x: auto; background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .5rem .8rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
thead th { font-size: .85rem; vertical-align: bottom; }
thead small { display: block; color: var(--soft); font-weight: 400; }
th:first-child { text-align: left; position: sticky; left: 0; background: var(--card); }
tbody tr:last-child > * { border-bottom: 0; }
tbody tr:hover > * { background: var(--mark); }
dl { margin: .8rem 0 0; display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem;
  font-size: .88rem; color: var(--soft); }
dt { font-weight: 600; color: var(--ink); }
dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 34rem) { dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin: 0 0 .4rem; } }
figure { margin: 0 0 1.4rem; padding: .8rem; background: #ffffff; color: #1d2129;
  border: 1px solid var(--line); border-radius: 10px; }
figure img { display: block; max-width: 100%; height: auto; margin: 0 auto; }
figcaption { font-size: .88rem; margin-top: .6rem; color: #5b6472; }
code { font: .92em ui-monospace, SFMono-Regular, Menlo, "DejaVu Sans Mono", monospace; }
"""


def _table(columns: Sequence[Column], cells: Sequence[Sequence[str]]) -> str:
    def heading(column: Column) -> str:
        unit = f"<small>{html.escape(column.unit)}</small>" if column.unit else ""
        return (
            f'<th scope="col" title="{html.escape(column.meaning)}">'
            f"{html.escape(column.header)}{unit}</th>"
        )

    def line(texts: Sequence[str]) -> str:
        first, *rest = (html.escape(text) for text in texts)
        return (
            f'<tr><th scope="row">{first}</th>' + "".join(f"<td>{t}</td>" for t in rest) + "</tr>"
        )

    head = "".join(map(heading, columns))
    body = "\n".join(map(line, cells))
    return (
        f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>\n"
        + _pairs({column.header: html.escape(column.meaning) for column in columns})
    )


def _pairs(entries: Mapping[str, str]) -> str:
    """A definition list; the values are HTML already."""
    items = "\n".join(
        f"<dt>{html.escape(key)}</dt><dd>{value}</dd>" for key, value in entries.items()
    )
    return f"<dl>\n{items}\n</dl>"


def _figure(caption: str, path: pathlib.Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    text = html.escape(caption)
    return (
        f'<figure><img alt="{text}" src="data:image/png;base64,{data}">'
        f"<figcaption>{text}</figcaption></figure>"
    )


def page(
    title: str,
    lead: str,
    tables: Sequence[tuple[str, Sequence[Column], Sequence[Sequence[str]]]],
    pictures: Mapping[str, pathlib.Path],
    provenance: Mapping[str, str],
) -> str:
    """The whole document: the tables, the pictures by caption, and where it all came from.

    All text is escaped; the pictures, PNG files, are embedded, so the page loads nothing.
    """
    sections = [f"<h2>{html.escape(name)}</h2>\n{_table(c, cells)}" for name, c, cells in tables]
    if pictures:
        shown = "\n".join(_figure(caption, path) for caption, path in pictures.items())
        sections.append(f"<h2>Pictures</h2>\n{shown}")
    entries = {key: f"<code>{html.escape(value)}</code>" for key, value in provenance.items()}
    sections.append(f"<h2>Provenance</h2>\n{_pairs(entries)}")
    body = "\n".join(f"<section>\n{section}\n</section>" for section in sections)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        f'<h1>{html.escape(title)}</h1>\n<p class="lead">{html.escape(lead)}</p>\n'
        f"{body}\n</main>\n</body>\n</html>\n"
    )
