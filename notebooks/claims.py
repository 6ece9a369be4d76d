"""Claims of papers, and what came of them here: the rows of docs/claims.md.

A notebook collects its rows and keeps them:

    claims = Claims("LoRA (Hu et al., 2021), arXiv:2106.09685")
    claims.add("GPT-2 M, q and v, r = 4 (Table 3)", published="0.35M", found="393,216",
               holds=False, how="closed form")
    claims.add("A very small rank suffices (Table 6)", published="73.4 at r = 1", found="0.07",
               holds=False, unlike="150 steps are too few at any rank",
               how=Run("embedded model", "six new skills", 150, (0,), "python run.py ..."))
    claims.keep("01_lora")          # results/01_lora.json, and a table under the cell

A row's verdict is `not comparable` where `unlike` says what the run lacks for the claim to be
decided by it, however its numbers fall.

What was not run stands in conf/experiment/NAME.yaml, in comments `# paper:`, `# claim:`,
`# published:` and `# needs:`. Published numbers of trained parameters are computed here, from
analysis/published/counts.csv. `page` joins the three.
"""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
EXPERIMENTS = HERE.parent / "conf" / "experiment"
UNLIKE = "not comparable"
NAMES = {True: "holds", False: "does not hold", None: "not run"}
VERDICTS = ("holds", "does not hold", UNLIKE, "not run")
KEYS = ("paper", "claim", "published", "found", "verdict", "how")

# What a paper's published numbers were checked against, by arXiv's number; others: nothing.
FULL = "the full text"
READ = {
    "2106.09685": f"{FULL}, v2",
    "2303.10512": f"{FULL}, v2",
    "2404.02948": f"{FULL}, v4; Figure 2a's losses stand in the authors' animation alone",
    "2402.09353": f"{FULL} of July 2024",
    "2602.04998": f"{FULL}, v1; of v2 the abstract",
    "2405.09673": f"{FULL}, v2",
    "2410.21228": "the abstract alone, v2; the definition is that of PEFT's intruders.py",
    "2310.11454": f"{FULL}, v2",
    "2405.03003": f"{FULL}",
    "2407.19342": f"{FULL}",
    "2311.06243": f"{FULL}, v2",
    "2405.17484": f"{FULL}, v3",
    "2205.05638": f"{FULL}, v2",
    "2409.15371": f"{FULL}",
    "2503.18225": f"{FULL}, v2",
    "2409.00119": f"{FULL}, v2",
}


class Run(NamedTuple):
    """What a row was run on, and the command where it is not the notebook's own."""

    model: str
    data: str
    steps: int  # of training; 0: none
    seeds: Iterable[int]
    command: str = ""

    def __str__(self) -> str:
        seeds = list(self.seeds)
        parts = [
            self.model,
            self.data,
            f"{self.steps} steps" if self.steps else "no training",
            f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}" if seeds else "no seed",
            self.command,
        ]
        return "run: " + "; ".join(filter(None, parts))


class Claims:
    """The rows of one notebook."""

    def __init__(self, paper: str) -> None:
        self.paper = paper
        self.rows: list[dict[str, str]] = []

    def add(
        self, claim: str, *, published: str, found: str, holds: bool | None, how: str | Run,
        rule: str = "", unlike: str | None = None, paper: str | None = None,
    ) -> None:  # fmt: skip
        """One claim. `how`: `closed form`, a Run, or what a run would need; `rule`: when it holds;
        `unlike`: why the run cannot decide it."""
        if isinstance(how, str) and how.startswith("run"):
            raise ValueError(f"{claim}: say what was run by Run(model, data, steps, seeds)")
        verdict = UNLIKE if unlike else NAMES[holds]
        told = (str(how), f"rule: {rule}" if rule else "", f"{UNLIKE}: {unlike}" if unlike else "")
        values = (
            paper or self.paper,
            claim,
            published,
            found,
            verdict,
            "; ".join(filter(None, told)),
        )
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
            row |= {"found": "-", "verdict": NAMES[None], "how": head["needs"]}
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
            f"{number:,}{share}" + (f" and {row.beside:,}" if row.beside else ""),
            NAMES[fits(row.printed, value + row.beside)],
            "closed form" + (f"; {row.off}" if row.off else ""),
        )
        found.append(dict(zip(KEYS, values, strict=True)) | {"where": "analysis.params"})
    return found


def page() -> str:
    """docs/claims.md."""
    counted = "closed form: python -m analysis.params"  # a notebook's rows that `closed` has too
    own = [row for row in kept() if not row["how"].startswith(counted)]
    rows: list[dict[str, Any]] = [*own, *closed(), *waiting()]
    counts = {v: sum(row["verdict"] == v for row in rows) for v in VERDICTS}
    lines = [
        "# Claims",
        "",
        "Made by `make claims` from notebooks/results (written by the notebooks), the head of each "
        "file of conf/experiment (claims that were not run, with what they need) and "
        "analysis/published/counts.csv (numbers of trained parameters, each counted anew as "
        "`python -m analysis.params --model M --variant V --rank R --targets T` does). Found is "
        "what the notebook printed. The embedded model is a Llama of 0.3M parameters: width 96, "
        "three layers, 21 linear matrices. A print holds that is the number, rounded or cut.",
        "",
        "A claim that does not hold here may hold on the paper's models. Not comparable is one "
        "that the run cannot decide, however its numbers fall: a best learning rate at an edge of "
        "its grid, or a setting without what the claim rests on; the row says which.",
        "",
        ", ".join(f"{count} {verdict}" for verdict, count in counts.items()) + ".",
    ]
    for paper in dict.fromkeys(row["paper"] for row in rows):
        own = [row for row in rows if row["paper"] == paper]
        (number,) = re.findall(r"arXiv:([\d.]+)", paper) or [""]
        read = READ.get(number, "nothing, as the paper could not be opened")
        lines += ["", f"## {paper}", ""]
        lines += [f"What is published was checked against {read}.", ""] if number else []
        lines += [table(own, [*KEYS[1:], "where"])]
    return "\n".join(lines) + "\n"
