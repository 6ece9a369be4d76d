"""What storage in few bits costs a model, matrix by matrix, without training anything.

    python -m analysis.quantization --model DIR --formats nf4,fp4,int4,int8 --out DIR
    python -m analysis.quantization --model DIR --formats nf4.block=128,nf4 --text FILE --out DIR
    python -m analysis.quantization --model DIR --formats nf4 --init pissa,loftq --rank 16 --out DIR

A format is a part of the base axis, with settings as NAME.SETTING=VALUE. Of each matrix W, stored
as Q, with E = W - Q: the Frobenius norm of E, its nuclear norm (the sum of its singular values),
and with --text ||E C^(1/2)||_F, C the mean of x x^T over the inputs x that the layer had on that
text: each also relative to the same norm of W. Bits a number, counted from the stored tensors; how
often each code stands, and the entropy of that; the worst groups of numbers that share a scale.

With --init, E = W - (Q + s B A) where the init starts, and how much less it is than the format's
alone, in percent: (1 - ||W - (Q + s B A)|| / ||W - Q||) 100. Of several matrices: the root of the
summed squares; of nuclear norms the sum.

Without --text the folder is read one matrix at a time and the model is never built. With it the
model is loaded in full and runs over the text. Into --out: quantization.json, .csv, .md, .tex, and
the figures errors, codes and inits as .svg and .png.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from experiments.model import DTYPES
from experiments.record import complaining
from variants import Incompatible
from variants._io import write_atomically

from . import figures
from .errors import NORMS, Plan, measured, planned, summed
from .tables import Table, csv_of
from .weights import Weights

SCHEMA = 1


def analysed(source: Any, plan: Plan, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """`matrices`, and what they come to, of a source of matrices: the numbers of the json."""
    rows = []
    steps = track(source, "measuring", len(source.places), console=Console(stderr=True),
                  transient=True, disable=not sys.stderr.isatty())  # fmt: skip
    for place, W, found in steps:
        rows.append(measured(place, W.to(device, dtype), plan, found))
    return summed(rows, plan) | {"matrices": rows}


def tables(found: Mapping[str, Any]) -> list[Table]:
    """Formats; formats by role; worst groups; inits by role."""
    rows, formats = found["matrices"], found["formats"]
    numbers = sum(row["rows"] * row["columns"] for row in rows)
    norms = [k for k in NORMS if any(f[k] is not None for f in formats.values())]
    title = f"{found['model']}: {len(rows)} matrices, {numbers:,} numbers"
    first = Table(title, ("format", "bits a number",
                          *(name for k in norms for name in (k, "relative")),
                          "codes used", "entropy"))  # fmt: skip
    for text, f in formats.items():
        own = (_digits(f[key]) for k in norms for key in (k, f"{k}_relative"))
        used = f["codes"] and f"{f['codes']['used']} of {f['codes']['possible']}"
        entropy = _digits(f["codes"] and f["codes"]["entropy"])
        first.rows.append((text, f"{f['bits_per_number']:.12g}", *own, used or "-", entropy))
    roles = list(next(iter(formats.values()))["roles"])
    key = "activation" if "activation" in norms else "frobenius"
    second = Table(f"{key} error by role, relative", ("format", *roles, "all"))
    for text, f in formats.items():
        values = (f["roles"][role] for role in roles)
        second.rows.append((text, *(_digits(v[f"{key}_relative"]) for v in (*values, f))))
    columns = ("matrix", "format", "row", "column", "numbers", "root of mean squared error",
               "largest number")  # fmt: skip
    third = Table("worst groups", columns, left=2)
    for text, f in formats.items():
        for g in f["worst"]:
            where = (str(g[k]) for k in ("row", "column", "numbers"))
            sizes = (_digits(g[k]) for k in ("rms", "largest"))
            third.rows.append((g["name"], text, *where, *sizes))
    made = [first, second, third]
    for k in norms if found["inits"] else ():
        table = Table(f"{k} error, percent less than the format's alone",
                      ("init", "format", "rank", *roles, "all"), left=2)  # fmt: skip
        for init, by_format in found["inits"].items():
            for text, f in by_format.items():
                values = (*(f["roles"][role] for role in roles), f)
                ranks = {row["inits"][init][text]["rank"] for row in rows}
                shown = "-".join(map(str, sorted({min(ranks), max(ranks)})))
                reduced = (v[f"{k}_reduction"] for v in values)
                table.rows.append((init, text, shown, *(_digits(v, ".2f") for v in reduced)))
        made.append(table)
    return made


def _digits(value: float | None, form: str = ".5g") -> str:
    return "-" if value is None else format(value, form)


def flat(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each matrix and format, and for each init on it: the csv."""
    found = []
    kept = (*NORMS, *(f"{k}_relative" for k in NORMS))
    for row in rows:
        own = {k: row[k] for k in ("name", "role", "stack", "layer", "rows", "columns")}
        plain = {(text, "", None): f for text, f in row["formats"].items()}
        joint = {(text, init, f["rank"]): f for init, by in row["inits"].items()
                 for text, f in by.items()}  # fmt: skip
        for (text, init, rank), f in (plain | joint).items():
            stored = row["formats"][text]
            found.append({
                **own, "format": text, "init": init, "rank": rank,
                "bits_per_number": stored["bits_per_number"], **{k: f[k] for k in kept},
                **{f"{k}_reduction": f.get(f"{k}_reduction") for k in NORMS},
                "entropy": stored["codes"] and stored["codes"]["entropy"],
            })  # fmt: skip
    return found


def drawn(found: Mapping[str, Any]) -> dict[str, Any]:
    """The figures: errors and what inits take off them by layer, a panel for each role; and how
    often each code stands."""
    key = "frobenius" if found["text"] is None else "activation"

    def plain(row: Any) -> dict[str, tuple[float, float]]:
        return {text: (f[key], row["norms"][key]) for text, f in row["formats"].items()}

    def joint(row: Any) -> dict[str, tuple[float, float]]:
        return {f"{text}, {init}": (f[key], row["formats"][text][key])
                for init, by_format in row["inits"].items()
                for text, f in by_format.items()}  # fmt: skip

    made = {}
    errors, left = _by_layer(found, key, plain), _by_layer(found, key, joint)
    if errors:
        made["errors"] = figures.lines(errors, "layer", f"relative {key} error")
    if left:
        less = {
            title: {name: [(x, 100 * (1 - y)) for x, y in line] for name, line in own.items()}
            for title, own in left.items()
        }
        made["inits"] = figures.lines(less, "layer", f"{key} error, percent less")
    counts = {text: f["codes"]["counts"] for text, f in found["formats"].items() if f["codes"]}
    if counts:
        shares = {text: [c / sum(own) for c in own] for text, own in counts.items()}
        made["codes"] = figures.bars(shares, "code, by its value", "share of the numbers")
    return made


def _by_layer(
    found: Mapping[str, Any], key: str, pick: Callable[[Any], Mapping[str, tuple[Any, Any]]]
) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """{role: {line: [(layer, error over norm)]}} of the pairs (error, norm) that `pick` gives;
    several matrices of one role and layer (experts) all together."""
    rows = [row for row in found["matrices"]
            if row["layer"] is not None and row["norms"][key] is not None]  # fmt: skip
    several = len({row["stack"] for row in rows}) > 1
    squares: dict[str, dict[str, dict[int, list[float]]]] = {}
    for row in rows:
        title = f"{row['stack']} {row['role']}" if several else row["role"]
        for name, pair in pick(row).items():
            line = squares.setdefault(title, {}).setdefault(name, {})
            sums = line.setdefault(row["layer"], [0.0, 0.0])
            line[row["layer"]] = [total + v * v for total, v in zip(sums, pair, strict=True)]
    return {title: {name: [(layer, (e / w) ** 0.5) for layer, (e, w) in line.items() if w]
                    for name, line in own.items()}
            for title, own in squares.items()}  # fmt: skip


def default_variant() -> str:
    """The variant of a run that names none: conf/ says it."""
    from omegaconf import OmegaConf

    import conf

    defaults = OmegaConf.load(Path(str(conf.__file__)).with_name("config.yaml")).defaults
    return next(entry["variant"] for entry in defaults if "variant" in entry)


def written(found: Mapping[str, Any], made: Sequence[Table], out: Path, draw: bool) -> list[Path]:
    """Puts all of it into the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    texts = {
        "json": json.dumps(found, indent=1) + "\n",
        "csv": csv_of(flat(found["matrices"])),
        "md": "\n\n".join(table.markdown() for table in made) + "\n",
        "tex": "\n\n".join(table.tex() for table in made) + "\n",
    }
    paths = [out / f"quantization.{kind}" for kind in texts]
    for path, text in zip(paths, texts.values(), strict=True):
        write_atomically(path, text)
    for name, figure in drawn(found).items() if draw else ():
        paths += figures.save(figure, out / name)
    return paths


@complaining
def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m analysis.quantization",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, type=Path, help="a folder of transformers")
    parser.add_argument("--formats", required=True, help="parts of the base axis, with commas")
    parser.add_argument("--out", required=True, type=Path, help="a folder")
    parser.add_argument("--targets", default="all-linear", help="roles or names, with commas")
    parser.add_argument("--text", type=Path, help="a file to run the model on")
    parser.add_argument("--batches", type=int, default=8, help="windows of the text (8)")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens of a window (512)")
    parser.add_argument("--init", default="", help="parts of the init axis, with commas")
    parser.add_argument("--rank", type=int, help="of the inits; default: the variant's")
    parser.add_argument("--variant", default=default_variant(), help="of the inits (%(default)s)")
    parser.add_argument(
        "--with",
        dest="words",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="of the inits: AXIS=PART, AXIS.SETTING=VALUE",
    )
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32", help="of W (%(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:N (%(default)s)")
    parser.add_argument("--worst", type=int, default=3, help="groups that are named (3)")
    parser.add_argument("--no-nuclear", action="store_true", help="leave the nuclear norms out")
    parser.add_argument("--no-figures", action="store_true", help="needs no matplotlib then")
    given = parser.parse_args()
    found = run(given)
    made = tables(found)
    paths = written(found, made, given.out, not given.no_figures)
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    for table in made:
        table.show(console)
    console.print(" ".join(map(str, paths)), markup=False, soft_wrap=True)
    return 0


def run(given: argparse.Namespace) -> dict[str, Any]:
    """The content of the json."""
    if not given.no_figures:
        figures.need_matplotlib()
    if given.device.partition(":")[0] not in ("cpu", "cuda") or (
        given.device != "cpu" and not torch.cuda.is_available()
    ):
        raise Incompatible(f"--device {given.device}: no such device here")
    plan = planned(given.formats.split(","), [n for n in given.init.split(",") if n],
                   variant=given.variant, rank=given.rank, words=given.words,
                   nuclear=not given.no_nuclear, worst=given.worst)  # fmt: skip
    if given.text is None:
        if plan.needs:
            raise Incompatible(f"--init {given.init}: needs the {plan.needs[0]} of each layer: "
                               f"give --text FILE")  # fmt: skip
        source: Any = Weights(given.model, given.targets)
    else:
        from .activations import Activations

        wanted = tuple(dict.fromkeys(("covariance", *plan.needs)))
        source = Activations(
            given.model,
            given.text,
            wanted=wanted,
            targets=given.targets,
            batches=given.batches,
            length=given.seq_len,
            dtype=given.dtype,
            device=given.device,
        )
    text = None if given.text is None else {"name": given.text.name, "tokens": source.tokens}
    about = {"schema": SCHEMA, "model": given.model.resolve().name, "targets": given.targets,
             "dtype": given.dtype, "text": text, "parts": plan.parts}  # fmt: skip
    return about | analysed(source, plan, DTYPES[given.dtype], given.device)


if __name__ == "__main__":
    sys.exit(main())
