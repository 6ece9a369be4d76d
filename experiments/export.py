"""Exports a run: PEFT's format, a merged Hugging Face folder, or the project's own format.

python -m experiments.export RUN --to peft|merged|native --out DIR
"""

import argparse
import sys
from pathlib import Path

from variants import Incompatible

from .saved import open_run
from .tasks import BadInput


def export(run: str | Path, to: str, out: str | Path) -> str:
    """Writes the export into `out` and returns what there is to say of it."""
    loaded, adapter = open_run(run)
    out = Path(out)
    if out.is_file():
        raise BadInput(f"--out {out}: a file, not a folder")
    if out.exists() and any(out.iterdir()):
        raise BadInput(f"--out {out}: not empty")
    if to == "native":
        adapter.save(out)
        return f"{out}: variants.load(model, path)"
    if to == "peft":
        adapter.save_peft(out)
        return f"{out}: peft.PeftModel.from_pretrained(model, path)"
    lossy = adapter.choice.base.lossy
    model = adapter.merge()
    model.save_pretrained(out)  # type: ignore[operator]
    loaded.tokenizer.save_pretrained(out)
    return (
        f"{out}: transformers' from_pretrained(path); merge error {adapter.merge_error:.2e} "
        f"(relative, of the worst matrix, by rounding to the model's dtype)"
        + ("; merged onto the weights as the base stored them, dequantized" if lossy else "")
    )


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m experiments.export", description=__doc__)
    parser.add_argument("run", help="the folder of a finished run")
    parser.add_argument("--to", choices=("peft", "merged", "native"), required=True)
    parser.add_argument("--out", required=True, help="a new folder")
    given = parser.parse_args()
    try:
        print(export(given.run, given.to, given.out))
    except (BadInput, Incompatible, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
