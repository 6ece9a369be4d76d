"""A study: a question, asked of every variant with the same care.

    python run.py -m study=smoke             any launcher; the same command again goes on

conf/studies/NAME.yaml, or study=FILE.yaml, states it (statement.py), and it is frozen before its
first run: OUT_DIR/NAME/study.json holds it with its hash, and another statement under the same name
is refused. Then, for every variant on every model and task: learning rates on a grid around the
preset's own (stage 1, a seed), beyond the grid where the best lies on its edge, finer and with more
seeds around the best (stage 2); the choice by validation loss; and a confirmation on fresh seeds,
the same for all, which alone reads the test split. All variants get equal
trials: where one has to look beyond its grid, the others spend as many on theirs. ledger.json keeps
what each was given.
"""

import hashlib
import json
import math
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from variants._registry import unknown

from . import attempt
from .provenance import ROOT
from .record import make, read_json, write_json
from .statement import FRESH, OWN, Spec, read
from .tasks import BadInput

if TYPE_CHECKING:
    from .plan import Job
    from .sweep import Sweep

FOLDER = ROOT / "conf" / "studies"
PER_DECADE = 4  # the finest grid; all rates lie on 10^(k / 4), so that variants share them

Cell = tuple[int, int]  # a step of the grid, a seed


@dataclass
class Arm:
    """One variant at one size on one model and task, and what is known of it so far."""

    words: tuple[str, ...]
    name: str
    centre: int  # of its grid, in steps of PER_DECADE
    trained: int
    target: int | None  # trained numbers of the budget
    tried: dict[int, dict[int, float]] = field(default_factory=dict)  # rate -> seed -> loss
    tokens: int = 0
    extensions: int = 0

    @property
    def unmatched(self) -> bool:
        """More than 2 % from the budget."""
        return self.target is not None and abs(self.trained / self.target - 1) > 0.02

    @property
    def trials(self) -> int:
        return sum(len(seeds) for seeds in self.tried.values())

    def has(self, cell: Cell) -> bool:
        """Whether it was tried."""
        return cell[1] in self.tried.get(cell[0], {})

    def around(self, seeds: int) -> Iterator[Cell]:
        """What was not tried, from the best rate outwards, without end."""
        for distance in count():
            for k in dict.fromkeys((self.best - distance, self.best + distance)):
                yield from (cell for cell in cells([k], seeds) if not self.has(cell))

    @property
    def best(self) -> int:
        """The rate with the lowest mean loss, of those that the most seeds have tried."""
        most = max(len(seeds) for seeds in self.tried.values())
        means = {k: sum(v.values()) / most for k, v in self.tried.items() if len(v) == most}
        return min(means, key=lambda k: (means[k], k))

    @property
    def gap(self) -> int:
        """The larger factor between the best rate and those tried next to it, in steps."""
        above = min((k - self.best for k in self.tried if k > self.best), default=0)
        below = min((self.best - k for k in self.tried if k < self.best), default=0)
        return max(above, below)

    @property
    def edge(self) -> int:
        """-1 or 1 where the best rate is the lowest or highest of those tried, else 0."""
        return (self.best == max(self.tried)) - (self.best == min(self.tried))


def names() -> list[str]:
    """The studies that ship."""
    return sorted(file.stem for file in FOLDER.glob("*.yaml"))


def find(given: str) -> Spec | None:
    """The statement of the study of that name, or in that file (.yaml); None: there is none."""
    if not given.endswith(".yaml"):
        file = FOLDER / f"{given}.yaml"
        return read(file) if file.is_file() else None
    file = Path(given).expanduser()
    if not file.is_file():
        raise BadInput(f"study={given}: no such file")
    if not re.fullmatch(r"[\w.-]+", file.stem):
        raise BadInput(f"study={given}: its name is the study's: letters, digits, '.', '_', '-'")
    return read(file)


def name_of(given: str) -> str:
    """A study's name: what was given, or the stem of that file."""
    return Path(given).stem if given.endswith(".yaml") else given


def missing(name: str) -> BadInput:
    """The error for a study that does not exist."""
    return BadInput(str(unknown("study", name, names())))


def rate(k: int) -> float:
    """The learning rate at step k of the common grid, in four digits.

    >>> rate(-12), rate(-11)
    (0.001, 0.001778)
    """
    return float(f"{10 ** (k / PER_DECADE):.4g}")


def grid(centre: int, decades: float, per_decade: int) -> list[int]:
    """Steps of stage 1, as many on either side.

    >>> [rate(k) for k in grid(-12, 2, 2)]
    [0.0001, 0.0003162, 0.001, 0.003162, 0.01]
    """
    step, half = PER_DECADE // per_decade, int(decades * per_decade // 2)
    return [centre + step * i for i in range(-half, half + 1)]


def cells(rates: Iterable[int], seeds: int) -> list[Cell]:
    """Every rate with each of so many seeds."""
    return [(k, seed) for k in rates for seed in range(seeds)]


class Study:
    """One study, under way."""

    def __init__(self, work: "Sweep", name: str, spec: Spec, words: Sequence[str]) -> None:
        self.work, self.name, self.spec = work, name, spec
        self.words = [w for w in words if w.partition("=")[0] != "study"]
        self.given = {w.partition("=")[0] for w in self.words}
        self.folder = Path(work.config.out_dir) / name
        self.dry = bool(work.config.dry)
        self.baseline = spec.baseline or str(_defaults().baseline)
        self.inputs: dict[str, dict[str, str]] = {}  # hashes of model and data, by name
        self.hash = ""  # of the statement, in study.json and in every run's config.yaml

    def run(self) -> None:
        """Everything that is missing of it; its verdicts at the end."""
        own = sorted(w for w in self.words if w.startswith(OWN))
        if own:
            raise BadInput(
                f"{own[0]}: a study chooses that; its statement, {self.name}.yaml, says how"
            )
        arms = self._arms()
        self._freeze()
        print(f"{self.name} ({self.spec.tier}): {self.spec.question}")
        for arm in arms:
            if arm.unmatched:
                print(f"unmatched: {arm.name} trains {arm.trained:,}, the budget is {arm.target:,}")
        if not self._tune(arms):
            return
        if self._confirm(arms):
            self._verdicts()

    def _arms(self) -> list[Arm]:
        spec, found = self.spec, []
        for model in spec.models:
            for task in spec.tasks:
                stated = (*spec.settings, *model.split(), *task.split())
                place = tuple(w for w in stated if w.partition("=")[0] not in self.given)
                for line in dict.fromkeys([*spec.variants, *spec.anchors]):
                    first, *rest = line.split()
                    own = (first if "=" in first else f"variant={first}", *rest)
                    found += self._sized(place, own, line)
        if not any(f"variant={self.baseline}" in arm.words for arm in found):
            raise BadInput(f"study={self.name}: the baseline {self.baseline} is not among variants")
        return found

    def _sized(self, place: tuple[str, ...], own: tuple[str, ...], line: str) -> list[Arm]:
        """The arm at each rank, or at the rank whose trained numbers are nearest the budget."""
        from .budget import Sizes

        ranked = any(word.startswith("rank=") for word in own)
        if self.spec.budget is not None and not ranked:
            base = Sizes(self._prepared((*place, f"variant={self.baseline}")))
            target = base.trained(self.spec.budget)
            sizes = Sizes(self._prepared((*place, *own)))
            r = sizes.nearest(target)
            words = (*place, *own, *(() if r is None else (f"rank={r}",)))
            return [self._arm(words, line, sizes.trained(r), target)]
        ranks: Sequence[int | None] = [None] if ranked else self.spec.ranks
        found = []
        for r in ranks:
            words = (*place, *own, *(() if r is None else (f"rank={r}",)))
            prepared = self._prepared(words)
            if prepared.choice.rank is None and found:
                break  # a form without rank has one size
            found.append(self._arm(words, line, Sizes(prepared).trained(prepared.choice.rank)))
        return found

    def _prepared(self, words: Sequence[str]) -> Any:
        from . import job
        from .config import settings_of

        planner = self.work.planner
        planner.inputs = planner.inputs or job.Inputs()
        composed = planner.composer.compose([*words, *self.words])
        return job.prepare(settings_of(composed), planner.inputs)

    def _arm(
        self, words: tuple[str, ...], line: str, trained: int, target: int | None = None
    ) -> Arm:
        prepared = self._prepared(words)
        data, model = prepared.splits.digest(), prepared.source.digest
        place = f"{prepared.source.name}, {prepared.settings.task.name}"
        self.inputs[place] = {"model": model, "data": data}
        centre = round(PER_DECADE * math.log10(prepared.lr))
        step = PER_DECADE // self.spec.tuning.per_decade
        rank = "" if prepared.choice.rank is None else f" r{prepared.choice.rank}"
        return Arm(words, f"{line}{rank}", step * round(centre / step), trained, target)

    def _freeze(self) -> None:
        """Writes the statement with its hash, or refuses one that differs from what was frozen."""
        words = [w for w in self.words if not _is_display(w)]
        frozen = asdict(self.spec) | {"baseline": self.baseline, "words": words,
                                      "inputs": self.inputs}  # fmt: skip
        digest = hashlib.sha256(json.dumps(frozen, sort_keys=True).encode()).hexdigest()[:10]
        self.hash = digest
        before = read_json(self.folder / "study.json")
        if before is not None and before["hash"] != digest:
            changed = [k for k in frozen if before.get(k) != frozen[k]]
            if "words" in changed:
                others = set(words).symmetric_difference(before.get("words", ()))
                told = " ".join(sorted(others)) or "order, or one of them twice"
                changed[changed.index("words")] = f"words ({told})"
            raise BadInput(
                f"study={self.name}: {self.folder} was frozen as {before['hash']} with another "
                f"{', '.join(changed)}; give it another out_dir, or take the folder away"
            )
        if before is None and not self.dry:
            make(self.folder, self.work.config.out_dir)
            write_json(self.folder / "study.json", {"name": self.name, "hash": digest, **frozen})

    def _tune(self, arms: list[Arm]) -> bool:
        """Stage 1, extensions, stage 2; False where runs are missing that the next step needs."""
        tuning, step = self.spec.tuning, PER_DECADE // self.spec.tuning.per_decade
        first = [cells(grid(a.centre, tuning.decades, tuning.per_decade), tuning.seeds)
                 for a in arms]  # fmt: skip
        if not self._try(arms, first, "stage 1"):
            return False
        for turn in range(tuning.extensions):
            edges = [arm.edge for arm in arms]
            if not any(edges):
                break
            beyond = [[a.best + e * step * i for i in (1, 2)] if e else []
                      for a, e in zip(arms, edges, strict=True)]  # fmt: skip
            if not self._try(
                arms, [cells(k, tuning.seeds) for k in beyond], f"extension {turn + 1}"
            ):
                return False
            for arm, edge in zip(arms, edges, strict=True):
                arm.extensions += bool(edge)
        if tuning.refine:
            near = [cells([a.best - 1, a.best, a.best + 1], tuning.refine_seeds) for a in arms]
            if not self._try(arms, near, "stage 2"):
                return False
        self._write(arms)
        return True

    def _even(self, arms: list[Arm], asked: list[list[Cell]]) -> list[list[Cell]]:
        """As many new trials for every arm: who needs fewer tries more rates around its best."""
        found = [[cell for cell in own if not arm.has(cell)]
                 for arm, own in zip(arms, asked, strict=True)]  # fmt: skip
        totals = [arm.trials + len(own) for arm, own in zip(arms, found, strict=True)]
        for arm, own, total in zip(arms, found, totals, strict=True):
            more = (cell for cell in arm.around(self.spec.tuning.seeds) if cell not in own)
            own += islice(more, max(totals) - total)
        return found

    def _try(self, arms: list[Arm], asked: list[list[Cell]], stage: str) -> bool:
        """Runs these cells of every arm, and what makes them even; reads the losses."""
        wanted = [(arm, cell) for arm, own in zip(arms, self._even(arms, asked), strict=True)
                  for cell in own]  # fmt: skip
        jobs = self._finish([self._run_words(arm, *cell, stage) for arm, cell in wanted], stage)
        if self.dry:
            print("dry: what comes after stage 1 depends on its results")
            return False
        lost = 0
        for (arm, (k, seed)), job in zip(wanted, jobs, strict=True):
            result = job.folder.result if job.path is not None else None
            if result is None:
                lost += 1
                continue
            loss = result["metrics"]["tuned"]["loss"]
            if result["status"] != "done" or loss is None:
                loss = math.inf
            arm.tried.setdefault(k, {})[seed] = loss
            arm.tokens += result["tokens"]["seen"]
        return self._whole(lost, len(jobs), stage)

    def _run_words(self, arm: Arm, k: int, seed: int, stage: str, *more: str) -> list[str]:
        tag = stage.replace(" ", "_")
        return [*arm.words, *self.words, f"study={self.name}", f"optim.lr={rate(k)}",
                f"seed={seed}", f"track.stage={tag}", f"track.frozen='{self.hash}'",
                *more]  # fmt: skip

    def _finish(self, combinations: Iterable[list[str]], stage: str) -> "list[Job]":
        print(f"\n{stage}", flush=True)
        return self.work.finish(list(combinations))

    def _whole(self, lost: int, total: int, stage: str) -> bool:
        if lost:
            print(f"{stage}: {lost} of {total} runs are not finished; nothing is chosen without "
                  f"them: the same command goes on", file=sys.stderr)  # fmt: skip
        return not lost

    def _confirm(self, arms: list[Arm]) -> bool:
        """Fresh seeds at the chosen rate, the only runs that read the test split."""
        seeds = range(FRESH, FRESH + self.spec.confirm)
        wanted = [(arm, seed) for arm in arms for seed in seeds]
        words = [self._run_words(arm, arm.best, seed, "confirm", "eval.split=test")
                 for arm, seed in wanted]  # fmt: skip
        jobs = self._finish(words, "confirmation, on test")
        lost = sum(job.path is None or job.folder.result is None for job in jobs)
        return self._whole(lost, len(jobs), "confirmation")

    def _write(self, arms: list[Arm]) -> None:
        """The ledger: what every variant was given, and what was chosen."""
        rows = []
        for arm in arms:
            rows.append({
                "arm": arm.name, "words": list(arm.words), "trained": arm.trained,
                "budget": arm.target, "unmatched": arm.unmatched,
                "trials": arm.trials, "tokens": arm.tokens,
                "rates": {f"{rate(k):g}": list(arm.tried[k].values()) for k in sorted(arm.tried)},
                "chosen": rate(arm.best), "extensions": arm.extensions,
                "bracket": {-1: "low edge", 0: "inside", 1: "high edge"}[arm.edge],
                "confirmations": self.spec.confirm,
            })  # fmt: skip
        less = self._departures(arms)
        ledger = {"study": self.name, "tier": self.spec.tier, "departures": less, "arms": rows}
        write_json(self.folder / "ledger.json", ledger)
        self._show(rows)
        for line in less:
            print(f"less than the protocol: {line}")

    def _departures(self, arms: Sequence[Arm]) -> list[str]:
        """Where the study does less than a comparison should (docs/sweeps.md, Studies)."""
        spec, tuning, said = self.spec, self.spec.tuning, []
        there = (*spec.anchors, *spec.variants)
        lacking = [line for line in _defaults().anchors if line not in there]
        if lacking:
            said.append(f"no anchor {', '.join(lacking)}")
        if tuning.decades < 3 or tuning.per_decade < 2:
            said.append(f"stage 1 has {tuning.per_decade} points a decade over {tuning.decades:g} "
                        f"decades, not 2 over 3")  # fmt: skip
        if not tuning.refine:
            said.append("no stage 2, of four points a decade and two seeds around the best")
        elif tuning.refine_seeds < 2:
            said.append(f"stage 2 has {tuning.refine_seeds} seed, not two")
        blocks, others = spec.confirm * len(spec.tasks), max(1, len({a.name for a in arms}) - 1)
        least, needed = 2.0 ** (1 - blocks), spec.level / others
        if least > needed:
            said.append(f"unreachable: {blocks} paired blocks cannot go below p = {least:.3g}, and "
                        f"{others} comparisons need {needed:.3g}")  # fmt: skip
        gaps = {f"{arm.name} x{10 ** (arm.gap / PER_DECADE):.3g}": arm.gap for arm in arms}
        if len(set(gaps.values())) > 1:
            said.append(f"unequal steps around the rates chosen: {', '.join(gaps)}")
        return said

    def _show(self, rows: list[dict[str, Any]]) -> None:
        from rich.console import Console
        from rich.table import Table

        table = Table(title=f"{self.name}: what each variant was given")
        for name in ("variant", "trained", "trials", "tokens", "rates", "chosen", "bracket"):
            table.add_column(name)
        for row in rows:
            mark = " (unmatched)" if row["unmatched"] else ""
            table.add_row(row["arm"], f"{row['trained']:,}{mark}", str(row["trials"]),
                          f"{row['tokens']:,}", ", ".join(row["rates"]), f"{row['chosen']:g}",
                          row["bracket"])  # fmt: skip
        Console(width=None if sys.stdout.isatty() else 160).print(table)

    def _verdicts(self) -> None:
        try:
            from analysis.compare import main
        except ImportError as error:
            print(f"verdicts need {error.name}: pip install -c constraints.txt -e '.[report]', and "
                  f"then: python -m analysis.compare {self.folder} --out DIR")  # fmt: skip
            return
        code = main([str(self.folder), "--out", str(self.folder / "report")])
        attempt.exit_code = max(attempt.exit_code, code)


def _is_display(word: str) -> bool:
    """Keys that cannot change a result are no part of what is frozen."""
    from .config import OUTSIDE

    return word.partition("=")[0].partition(".")[0] in OUTSIDE


def _defaults() -> Any:
    """What comparisons take for granted."""
    return OmegaConf.load(ROOT / "conf" / "compare.yaml")
