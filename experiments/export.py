"""Exports a run: PEFT's format, a merged Hugging Face folder, or the project's own format.

python -m experiments.export RUN --to peft|merged|native [--requantize] --out DIR

`--to merged` adds what was trained to the weights as the base stores them, dequantized. With
`--requantize` each sum is rounded to the base's codes again, and the folder holds the numbers that
those codes stand for. The merge error is printed.
"""

import argparse
import sys
from pathlib import Path

from variants import dequantize

from .record import complaining
from .saved import open_run
from .tasks import BadInput


def export(run: str | Path, to: str, out: str | Path, requantize: bool = False) -> str:
    """Writes the export into `out` and returns what there is to say of it."""
    out = Path(out)
    if out.is_file():
        raise BadInput(f"--out {out}: a file, not a folder")
    if requantize and to != "merged":
        raise BadInput(f"--requantize: means nothing with --to {to}, only with --to merged")
    loaded, adapter = open_run(run)
    if out.exists() and any(out.iterdir()):
        raise BadInput(f"--out {out}: not empty")
    if to == "native":
        adapter.save(out)
        return f"{out}: variants.load(model, path)"
    if to == "peft":
        adapter.save_peft(out)
        return f"{out}: peft.PeftModel.from_pretrained(model, path)"
    base = adapter.choice.base
    model = dequantize(adapter.merge(requantize))
    model.save_pretrained(out)  # type: ignore[operator]
    loaded.tokenizer.save_pretrained(out)
    rounding = f"to the codes of base {base.name} again" if requantize else "to the model's dtype"
    merged = f"; merged onto the weights as base {base.name} stores them, dequantized"
    return (
        f"{out}: transformers' from_pretrained(path); merge error {adapter.merge_error:.2e} "
        f"(relative, of the worst matrix, by rounding {rounding})"
        + (merged if base.lossy and not requantize else "")
    )


@complaining
def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", help="the folder of a finished run")
    parser.add_argument("--to", choices=("peft", "merged", "native"), required=True)
    parser.add_argument("--out", required=True, help="a new folder")
    parser.add_argument("--requantize", action="store_true", help="merged: in the base's codes")
    given = parser.parse_args()
    print(export(given.run, given.to, given.out, given.requantize))
    return 0


if __name__ == "__main__":
    sys.exit(main())
