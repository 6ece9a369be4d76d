"""What an adapter did to its model: tables, figures and JSON of a run, or of any PEFT adapter.

    python -m analysis.inspect RUN
    python -m analysis.inspect RUN --what spectrum,ranks --out DIR
    python -m analysis.inspect RUN --against OTHER_RUN --what similarity
    python -m analysis.inspect PEFT_FOLDER --model DIR --what forgetting --text FILE

RUN is the folder of a finished run, of a PEFT adapter, or of an adapter that this project saved.
docs/analysis.md says what each analysis asks and where it is defined.

From weights alone, and made unless --what says otherwise: {default}.
With the model and data, when asked: {data}. A run brings its own data.

Into --out: inspect.json, .csv (a row a matrix), .md, .tex, and figures as .svg and .png.
"""

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from experiments.record import complaining, finite
from variants import Incompatible
from variants._io import write_atomically
from variants._registry import unknown

from . import drawings, figures, views
from .by_model import DATA
from .measures import DEFAULT, NAMES, measured
from .opened import Asked, Opened, opened
from .quantization import default_variant
from .tables import Table, csv_of

SCHEMA = 1


def inspected(
    path: str | Path,
    what: Sequence[str] = DEFAULT,
    *,
    model: str | Path | None = None,
    text: Path | None = None,
    against: str | Path | None = None,
    eps: float = 0.5,
    device: str = "cpu",
) -> dict[str, Any]:
    """The content of the json.

    Args:
        what: names of analyses.
        model: see `opened.opened`; text, against, eps: see `opened.Asked`.

    Raises:
        Incompatible, BadInput: an unknown name, a folder or file that is missing or broken.
    """
    for name in what:
        if name not in NAMES:
            raise unknown("--what", name, list(NAMES))
    open_ = partial(opened, path, model, device)
    o = open_()
    other = None if against is None else opened(against, model, device)
    asked = Asked(open_, text, other, eps, device=device, reference=default_variant())
    found, missing = measured(o, what, asked)
    choice = o.adapter.choice
    return finite({
        "schema": SCHEMA, "name": o.name, "variant": choice.preset, "axes": choice.axes(),
        "rank": choice.rank, "against": None if other is None else other.name,
        "matrices": _matrices(o), "analyses": found, "missing": missing,
        "notes": list(o.adapter.notes),
    })  # fmt: skip


def _matrices(o: Opened) -> list[dict[str, Any]]:
    return [
        {"name": name, "role": place.role, "stack": place.stack, "layer": place.layer,
         "rows": place.shape[0], "columns": place.shape[1], "rank": o.adapter.layers[name].rank}
        for name, place in o.places.items()
    ]  # fmt: skip


def written(found: dict[str, Any], made: Sequence[Table], out: Path, draw: bool) -> list[Path]:
    """Puts all of it into the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    texts = {
        "json": json.dumps(found, indent=1) + "\n",
        "csv": csv_of(views.flat(found)),
        "md": "\n\n".join(table.markdown() for table in made) + "\n",
        "tex": "\n\n".join(table.tex() for table in made) + "\n",
    }
    paths = [out / f"inspect.{kind}" for kind in texts]
    for path, text in zip(paths, texts.values(), strict=True):
        write_atomically(path, text)
    for name, figure in drawings.drawn(found).items() if draw else ():
        paths += figures.save(figure, out / name)
    return paths


@complaining
def main() -> int:
    """The command."""
    lists = {"default": ", ".join(DEFAULT), "data": ", ".join(DATA)}
    parser = argparse.ArgumentParser(
        prog="python -m analysis.inspect",
        description=(__doc__ or "").format(**lists),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", help="a folder")
    parser.add_argument("--what", metavar="NAME,...", help="analyses, with commas")
    parser.add_argument("--out", type=Path, help="a folder for the files")
    parser.add_argument("--json", action="store_true", help="one json object and no tables")
    parser.add_argument("--model", help="folder or hub name, in place of the adapter's own base")
    parser.add_argument("--against", help="similarity: another folder like RUN, in place of W0")
    parser.add_argument("--text", type=Path, help="held-out text, in place of the run's old items")
    parser.add_argument("--eps", type=float, default=0.5, help="intruders are under it (0.5)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:N (%(default)s)")
    parser.add_argument("--no-figures", action="store_true", help="needs no matplotlib then")
    given = parser.parse_args()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        found = _run(given)
    heard = (str(w.message) for w in said if issubclass(w.category, UserWarning))
    found["notes"] = list(dict.fromkeys((*found["notes"], *heard)))
    made = views.tables(found)
    draw = not given.no_figures
    paths = [] if given.out is None else written(found, made, given.out, draw)
    if given.json:
        print(json.dumps(found))
        return 0
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    for table in made:
        table.show(console)
    for line in (*found["notes"], *(f"{k}: {why}" for k, why in found["missing"].items())):
        console.print(line, markup=False, soft_wrap=True)
    console.print(" ".join(map(str, paths)), markup=False, soft_wrap=True)
    return 0


def _run(given: argparse.Namespace) -> dict[str, Any]:
    if given.out is not None and not given.no_figures:
        figures.need_matplotlib()
    if given.device.partition(":")[0] not in ("cpu", "cuda") or (
        given.device != "cpu" and not torch.cuda.is_available()
    ):
        raise Incompatible(f"--device {given.device}: no such device here")
    if not 0 < given.eps <= 1:
        raise Incompatible(f"--eps {given.eps}: a cosine, above 0 and at most 1")
    names = DEFAULT if given.what is None else [n for n in given.what.split(",") if n]
    found = inspected(given.run, names, model=given.model, text=given.text,
                      against=given.against, eps=given.eps, device=given.device)  # fmt: skip
    if not found["analyses"]:
        raise Incompatible("; ".join(f"{k}: {why}" for k, why in found["missing"].items())
                           or "--what: no name in it")  # fmt: skip
    return found


if __name__ == "__main__":
    sys.exit(main())
