"""Claims of papers, and what came of them here: the rows of docs/claims.md.

A notebook collects its rows and keeps them:

    claims = Claims("LoRA (Hu et al., 2021), arXiv:2106.09685")
    claims.add("GPT-2 M, q and v, r = 4 (Table 3)", published="0.35M", found="393,216",
               holds=False, how="python -m analysis.params --model gpt2-medium ...")
    claims.keep("01_lora")          # results/01_lora.json, and a table under the cell

What was not run stands in conf/experiment/NAME.yaml, in comments `# paper:`, `# claim:`,
`# published:` and `# needs:`. Published numbers of trained parameters are computed here, from
analysis/published/counts.csv. `page` joins the three.
"""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
EXPERIMENTS = HERE.parent / "conf" / "experiment"
VERDICTS = {True: "holds", False: "does not hold", None: "not run"}
KEYS = ("paper", "claim", "published", "found", "verdict", "how")


class Claims:
    """The rows of one notebook."""

    def __init__(self, paper: str) -> None:
        self.paper = paper
        self.rows: list[dict[str, str]] = []

    def add(
        self, claim: str, *, published: str, found: str, holds: bool | None, how: str,
        paper: str | None = None,
    ) -> None:  # fmt: skip
        """One claim. `how`: `closed form`, the words of a run, or what a run would need."""
        values = (paper or self.paper, claim, published, found, VERDICTS[holds], how)
        self.rows.append(dict(zip(KEYS, values, strict=True)))

    def keep(self, name: str) -> "Claims":
        """Writes results/NAME.json in the working directory."""
        file = Path("results") / f"{name}.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(self.rows, indent=1, ensure_ascii=False) + "\n")
        return self

    def _repr_markdown_(self) -> str:
        return table(self.rows, KEYS[1:5])

    def __repr__(self) -> str:
        return "\n".join(f"{r['verdict']}: {r['claim']}: {r['found']}" for r in self.rows)


def table(rows: Iterable[dict[str, str]], keys: Sequence[str]) -> str:
    """Markdown."""
    lines = [" | ".join(("", *keys, "")).strip(), "|" + "---|" * len(keys)]
    for row in rows:
        cells = (str(row[k]).replace("|", "\\|").replace("\n", " ") for k in keys)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def kept(folder: Path = HERE / "results") -> list[dict[str, str]]:
    """The rows of every notebook, each with its notebook's name."""
    found = []
    for file in sorted(folder.glob("*.json")):
        found += [row | {"where": file.stem} for row in json.loads(file.read_text())]
    return found


def waiting(folder: Path = EXPERIMENTS) -> list[dict[str, str]]:
    """The claims of conf/experiment that were not run."""
    found = []
    for file in sorted(folder.glob("*.yaml")):
        head = dict(re.findall(r"^# (paper|claim|published|needs): (.+)$", file.read_text(), re.M))
        if "claim" in head:
            row = {k: head[k] for k in ("paper", "claim", "published")}
            row |= {"found": "-", "verdict": VERDICTS[None], "how": head["needs"]}
            found.append(row | {"where": f"experiment={file.stem}"})
    return found


def closed() -> list[dict[str, str]]:
    """Published counts of trained parameters, each computed from its model's shapes."""
    from analysis.counts import counted, fits, published

    found = []
    for row in published():
        if not row.printed:
            continue
        number, value = counted(row)
        given = [row.variant, f"r = {row.rank}" if row.rank else "", row.settings]
        where = f"on {row.targets}" if row.targets else ""
        what = "directions kept of" if row.of == "budget" else "trained:"
        share = f" ({100 * value:.4f}%)" if row.printed.endswith("%") else ""
        values = (
            row.paper,
            " ".join(filter(None, [f"{row.model}, {what}", *given, where])),
            row.printed + (f" ({row.table})" if row.table else ""),
            f"{number:,}{share}",
            VERDICTS[fits(row.printed, value)],
            "closed form" + (f"; {row.off}" if row.off else ""),
        )
        found.append(dict(zip(KEYS, values, strict=True)) | {"where": "analysis.params"})
    return found


def page() -> str:
    """docs/claims.md."""
    counted = "closed form: python -m analysis.params"  # a notebook's rows that `closed` has too
    own = [row for row in kept() if not row["how"].startswith(counted)]
    rows: list[dict[str, Any]] = [*own, *closed(), *waiting()]
    counts = {v: sum(row["verdict"] == v for row in rows) for v in VERDICTS.values()}
    lines = [
        "# Claims",
        "",
        "Made by `make claims` from notebooks/results (written by the notebooks), the head of each "
        "file of conf/experiment (claims that were not run, with what they need) and "
        "analysis/published/counts.csv (numbers of trained parameters, each counted anew as "
        "`python -m analysis.params --model M --variant V --rank R --targets T` does). Found is "
        "what the notebook printed on its small model; a claim that does not hold there may hold "
        "on the paper's. A print holds that is the number, rounded or cut.",
        "",
        ", ".join(f"{count} {verdict}" for verdict, count in counts.items()) + ".",
    ]
    for paper in dict.fromkeys(row["paper"] for row in rows):
        own = [row for row in rows if row["paper"] == paper]
        lines += ["", f"## {paper}", "", table(own, [*KEYS[1:], "where"])]
    return "\n".join(lines) + "\n"
