"""The page: one html file with its figures in it, sortable tables, nothing from the network."""

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .cells import columns, shown

CSS = """
:root { --ink: #1a1a1a; --dim: #5c5c5c; --back: #ffffff; --line: #d9d9d9; --band: #f4f4f4;
  --red: #b3261e; --green: #00704a; --blue: #0059a3; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8e8; --dim: #a8a8a8; --back: #16181b;
  --line: #3a3d41; --band: #202327; --red: #ff8a80; --green: #6ddaa9; --blue: #82bfff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 70rem; padding: 1.2rem 1rem 4rem; color: var(--ink);
  background: var(--back); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .3rem; } h2 { font-size: 1.15rem; margin: 2.4rem 0 .6rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem; } p { margin: .4rem 0; max-width: 46rem; }
.dim { color: var(--dim); } .red { color: var(--red); font-weight: 600; }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1rem; margin: .8rem 0; }
nav a, a { color: var(--blue); }
.wide { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; margin: .6rem 0; }
table { border-collapse: collapse; width: 100%; font-size: .86rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .32rem .6rem; text-align: left; border-bottom: 1px solid var(--line);
  white-space: nowrap; } td.text { white-space: normal; min-width: 16rem; }
th { background: var(--band); position: sticky; top: 0; }
td.number, th.number { text-align: right; }
th button { all: unset; cursor: pointer; } th button:focus-visible { outline: 2px solid; }
th[aria-sort="ascending"] button::after { content: " \\25B2"; }
th[aria-sort="descending"] button::after { content: " \\25BC"; }
tr:last-child td { border-bottom: 0; }
.better { color: var(--green); font-weight: 700; } .worse { color: var(--red); font-weight: 700; }
.equivalent { color: var(--blue); font-weight: 700; }
.inconclusive, .not-comparable { color: var(--dim); font-weight: 600; }
figure { margin: 0; } figcaption { color: var(--dim); font-size: .82rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr));
  gap: 1rem; } .figures svg { width: 100%; height: auto; max-width: 36rem; }
.single svg { max-width: 44rem; }
"""
SCRIPT = """
for (const table of document.querySelectorAll('table')) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.querySelector('button').addEventListener('click', () => {
    const up = head.getAttribute('aria-sort') !== 'ascending';
    heads.forEach(h => h.removeAttribute('aria-sort'));
    head.setAttribute('aria-sort', up ? 'ascending' : 'descending');
    const body = table.tBodies[0];
    const value = row => row.cells[column].dataset.value ?? '';
    const compare = (a, b) => {
      const [x, y] = [value(a), value(b)];
      if (x === '' || y === '') return (x === '') - (y === '');
      const [p, q] = [Number(x), Number(y)];
      const order = Number.isNaN(p) || Number.isNaN(q) ? x.localeCompare(y) : p - q;
      return up ? order : -order;
    };
    [...body.rows].sort(compare).forEach(row => body.append(row));
  }));
}
"""


def page(title: str, lead: Sequence[str], sections: Iterable[tuple[str, str]]) -> str:
    """The whole file; `sections` are (heading, html), those without content left out."""
    found = [(name, body) for name, body in sections if body]
    links = "".join(f'<a href="#s{i}">{escaped(name)}</a>' for i, (name, _) in enumerate(found))
    bodies = "".join(
        f'<section id="s{i}"><h2>{escaped(name)}</h2>{body}</section>'
        for i, (name, body) in enumerate(found)
    )
    first = "".join(f"<p>{line}</p>" for line in lead)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'
        f"<title>{escaped(title)}</title><style>{CSS}</style></head><body>"
        f"<h1>{escaped(title)}</h1>{first}<nav>{links}</nav>{bodies}"
        f"<script>{SCRIPT}</script></body></html>\n"
    )


def escaped(text: Any) -> str:
    return html.escape(str(text))


def paragraph(text: str) -> str:
    return f'<p class="dim">{escaped(text)}</p>'


def table(rows: Sequence[Mapping[str, Any]], keys: Sequence[str] | None = None) -> str:
    """A sortable table; a row's `unlike` names the cells to be shown in red."""
    if not rows:
        return ""
    keys = [k for k in (columns(rows) if keys is None else keys) if k != "unlike"]
    heads = "".join(
        f'<th scope="col"{_side(rows, k)}><button type="button">{escaped(k.replace("_", " "))}'
        f"</button></th>"
        for k in keys
    )
    body = "".join(f"<tr>{''.join(_cell(row, k) for k in keys)}</tr>" for row in rows)
    return (f'<div class="wide"><table><thead><tr>{heads}</tr></thead>'
            f"<tbody>{body}</tbody></table></div>")  # fmt: skip


def _side(rows: Sequence[Mapping[str, Any]], key: str) -> str:
    """Heads stand over their numbers."""
    values = [row[key] for row in rows if row.get(key) is not None]
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    return ' class="number"' if values and numbers else ""


def _cell(row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    kind = []
    if isinstance(value, int | float) and not isinstance(value, bool):
        kind.append("number")
    if isinstance(value, str) and len(value) > 40:
        kind.append("text")
    if key in (row.get("unlike") or ()):
        kind.append("red")
    if key == "verdict":
        kind.append(str(value).replace(" ", "-"))
    raw = "" if value is None else value
    classes = f' class="{" ".join(kind)}"' if kind else ""
    return f'<td{classes} data-value="{escaped(raw)}">{escaped(shown(value, key))}</td>'


def figures(drawn: Mapping[str, str], single: bool = False) -> str:
    """Inline svgs with their names below."""
    if not drawn:
        return ""
    parts = "".join(
        f"<figure>{svg}<figcaption>{escaped(name)}</figcaption></figure>"
        for name, svg in drawn.items()
    )
    return f'<div class="{"figures single" if single else "figures"}">{parts}</div>'
