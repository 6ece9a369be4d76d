"""Executes notebooks, checks that they are in step with their sources, prints the ledger of claims.

python -m notebooks [NAME ...]     execute and keep the outputs (QUICK=0: with all its seeds)
python -m notebooks --check        names what is not in step
python -m notebooks --claims       docs/claims.md, from notebooks/results and conf/experiment
"""

import argparse
import sys

from . import _room
from .claims import page


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m notebooks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", help="notebooks; none: all")
    parser.add_argument("--check", action="store_true", help="only look")
    parser.add_argument("--claims", action="store_true", help="print the ledger")
    given = parser.parse_args()
    if given.claims:
        print(page(), end="")
        return 0
    try:
        sources = _room.sources(given.names)
    except LookupError as error:
        print(f"error: {error.args[0]}", file=sys.stderr)
        return 1
    if given.check:
        wrong = [why for why in map(_room.out_of_step, sources) if why]
        print("\n".join(wrong) or f"{len(sources)} in step")
        return bool(wrong)
    for source in sources:
        print(f"{source.stem:<32}", end="", flush=True)
        print(f"{_room.made(source):6.1f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
