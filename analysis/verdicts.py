"""Verdicts: better, equivalent, worse, inconclusive, not comparable, against the tuned baseline.

A verdict rests on paired blocks (one seed of one task, scored by both): an exact sign-flip test,
adjusted by Holm's rule over the variants that are compared; two one-sided tests of equivalence;
and Student's interval of the effect. With several tasks the row `all` comes first, and a task's
own row can only say what `all` lets it say: its p is at least that one's, and Holm's over tasks.

What would make the two unlike is no matter of averages: other learning rates than the grid shows,
another number of trials, no common seed. Then the verdict is `not comparable`, with the reason.
"""

import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd

from . import stats
from .load import Table, items, lower_is_better
from .select import Selected, redrawn, select

ALL = "all"
REDRAWN = 2000  # studies in which the rate is chosen again
CHOOSING = 4  # seeds that choose a rate for one another: fewer are too few to draw it again
FEW_SEEDS = 20  # below, Student's interval; from there on the bootstrap's, which needs more


@dataclass(frozen=True)
class Rules:
    """What the reader fixes before looking."""

    baseline: str
    margin: float | None = None  # null: one point, in the unit of the metric
    level: float = 0.05
    lower_is_better: bool | None = None  # null: by the metric's name


@dataclass(frozen=True)
class Verdict:
    """One row of the report. Effects are in the metric's own unit, and positive is better."""

    variant: str
    task: str
    verdict: str
    reason: str = ""
    effect: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None  # of the sign-flip test, adjusted
    n: int = 0  # blocks
    lr: float | None = None
    score_naive: float | None = None
    score_corrected: float | None = None
    # more about the same comparison
    rank: int | None = None
    scope: str = ""
    baseline: str = ""
    baseline_lr: float | None = None
    baseline_naive: float | None = None
    baseline_corrected: float | None = None
    effect_naive: float | None = None
    p_raw: float | None = None
    p_equivalence: float | None = None
    bootstrap_low: float | None = None
    bootstrap_high: float | None = None
    sd: float | None = None
    detectable: float | None = None  # smallest effect found with a power of .8; None: unreachable
    unreachable: bool = False
    seeds: int = 0
    seeds_needed: int | None = None
    mcnemar: float | None = None
    item_wins: list[int] | None = None
    improvement: float | None = None  # probability that a run of it beats one of the baseline
    margin: float | None = None
    bracket: str = ""  # where in its grid the best rate lies (select.bracket)
    baseline_bracket: str = ""
    metric: str = ""
    selection: str = ""
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Unit:
    """One variant at one rank on one task, in one scope: model and code."""

    variant: str
    rank: int | None
    task: str
    scope: str
    metric: str
    trained: float  # numbers; nan: unknown
    rows: Table
    selected: Selected

    @property
    def name(self) -> str:
        return self.variant if self.rank is None else f"{self.variant} r{self.rank}"


def units(table: Table, lower: bool | None = None) -> list[Unit]:
    """Every comparable heap of runs; what differs within a task is said in its label. `lower`:
    less of the score is better, by the metric's name where None."""
    table = _labelled(table)
    found = []
    keys = ["scope", "label", "variant", "rank_key"]
    for (scope, label, variant, _), rows in table.groupby(keys, sort=True):
        _refuse_twins(rows)
        rank = rows["rank"].iloc[0]
        trained = rows["trained"].iloc[0] if "trained" in rows else math.nan
        metric = rows["metric"].iloc[0]
        found.append(Unit(variant, None if pd.isna(rank) else int(rank), label, scope, metric,
                          trained, rows, select(rows, lower)))  # fmt: skip
    return found


def _labelled(table: Table) -> Table:
    """With `scope` (model and code, where there are several) and `label` of task and setting."""
    table = table.copy()
    table["rank_key"] = [-1 if pd.isna(r) else int(r) for r in table["rank"]]
    table["scope"] = _said(table, [("model", "model_hash"), ("code", "code")])
    inside = [("steps", "steps"), ("batch", "batch_size"), ("data", "data_hash"),
              ("metric", "metric")]  # fmt: skip
    table["label"] = ""
    for _, rows in table.groupby(["scope", "task"]):
        words = _said(rows, inside)
        table.loc[rows.index, "label"] = [
            f"{task} ({word})" if word else task
            for task, word in zip(rows["task"], words, strict=True)
        ]
    return table


def _said(rows: Table, keys: Sequence[tuple[str, str]]) -> list[str]:
    """For each row the keys that differ among the rows, with its own value."""
    words: list[list[str]] = [[] for _ in range(len(rows))]
    for name, column in keys:
        if column not in rows:
            column = name
        if column not in rows:
            continue
        values = ["-" if pd.isna(v) else str(v) for v in rows[column]]
        if len(set(values)) > 1:
            shown = rows[name] if name in rows and name == "model" else values
            for word, value, short in zip(words, values, shown, strict=True):
                own = str(short) if str(short) == value else f"{short} {value[:8]}"
                word.append(f"{name} {value[:8] if name in ('data', 'code') else own}")
    return [", ".join(word) for word in words]


def _refuse_twins(rows: Table) -> None:
    cell = ["lr", "seed", "split"]
    twice = rows[rows.duplicated(cell, keep=False)].sort_values(cell)
    if len(twice):
        from .load import Unreadable

        a, b = twice.iloc[0], twice.iloc[1]
        raise Unreadable(
            f"{a['variant']}, lr {a['lr']:g}, seed {a['seed']}, task {a['task']} is there twice: "
            f"{a['source']} and {b['source']}; compare one of the two"
        )


def judge(found: Sequence[Unit], rules: Rules) -> list[Verdict]:
    """A verdict for every variant, rank and task, and one over all tasks."""
    rows: list[Verdict] = []
    for scope in sorted({u.scope for u in found}):
        inside = [u for u in found if u.scope == scope]
        names = sorted({u.variant for u in inside})
        if rules.baseline not in names:
            rows += [_bare(u, "not comparable", f"no run of {rules.baseline} here") for u in inside]
            continue
        pairs = _pairs(inside, rules.baseline)
        rows += [_bare(u, "not comparable", why) for u, _, why in pairs if why]
        rows += _family([(u, b) for u, b, why in pairs if b is not None and not why], rules, scope)
    return rows


def _pairs(inside: Sequence[Unit], name: str) -> list[tuple[Unit, Unit | None, str]]:
    """Each unit with its baseline: of its rank, else of the nearest number of trained numbers."""
    found: list[tuple[Unit, Unit | None, str]] = []
    used: set[int] = set()
    bases = [u for u in inside if u.variant == name]
    for unit in inside:
        if unit.variant == name:
            continue
        here = [b for b in bases if b.task == unit.task]
        same = [b for b in here if b.rank == unit.rank]
        if not here:
            found.append((unit, None, f"no run of {name} on this task in this setting"))
            continue
        base = same[0] if same else min(here, key=lambda b: _distance(b, unit))
        used.add(id(base))
        found.append((unit, base, ""))
    for base in bases:  # the baseline at another rank is an anchor beside the one that was used
        here = [b for b in bases if b.task == base.task and id(b) in used]
        if id(base) not in used and here:
            found.append((base, here[0], ""))
    return found


def _distance(base: Unit, unit: Unit) -> float:
    if math.isnan(base.trained) or math.isnan(unit.trained):
        return abs((base.rank or 0) - (unit.rank or 0))
    return abs(math.log(base.trained / unit.trained))


def _bare(unit: Unit, verdict: str, reason: str) -> Verdict:
    own = unit.selected
    return Verdict(
        unit.variant, unit.task, verdict, reason, rank=unit.rank, scope=unit.scope, lr=own.lr,
        score_naive=_known(own.naive), score_corrected=_known(own.corrected), metric=unit.metric,
        seeds=len(own.scores), bracket=own.bracket, selection=own.rule, notes=list(own.notes),
    )  # fmt: skip


def _known(value: float) -> float | None:
    return None if not math.isfinite(value) else float(value)


@dataclass
class _Compared:
    """The blocks of one row before its verdict."""

    row: Verdict
    blocks: list[stats.Array]
    items: list[stats.Array | None]
    problem: str
    again: stats.Array | None = None  # the effect less its mean, in studies that choose again
    parts: "list[_Compared]" = field(default_factory=list)  # the tasks of a row `all`


def _family(
    pairs: Sequence[tuple[Unit, Unit]], rules: Rules, scope: str
) -> Iterator[Verdict] | list[Verdict]:
    """Verdicts of all variants that are compared in one scope: one family of tests."""
    by_name: dict[tuple[str, str], list[_Compared]] = {}
    for unit, base in pairs:
        by_name.setdefault((unit.name, base.variant), []).append(_compared(unit, base, rules))
    heads = []
    for tasks in by_name.values():
        heads.append(tasks[0] if len(tasks) == 1 else _over_all(tasks, scope))
    raw = [_p(h) for h in heads]
    counted = [i for i, h in enumerate(heads) if not h.problem]
    adjusted = np.ones(len(heads))
    if counted:
        adjusted[counted] = stats.holm([raw[i] for i in counted])
    found = []
    for head, p_raw, p in zip(heads, raw, adjusted, strict=True):
        found.append(_said_of(head, p_raw, float(p), rules, max(1, len(counted))))
        if head.parts:
            own = [_p(part) for part in head.parts]
            within = np.maximum(stats.holm(own), p)
            for part, p_own, p_part in zip(head.parts, own, within, strict=True):
                found.append(_said_of(part, p_own, float(p_part), rules, len(counted) or 1))
    return found


def _p(found: _Compared) -> float:
    """Of the sign-flip test; where seeds chose the rate for each other, of the worse of two."""
    if not found.blocks:
        return 1.0
    p = stats.sign_flip(found.blocks)
    if found.again is not None:
        p = max(p, float(np.mean(np.abs(found.again) >= abs(stats.effect(found.blocks)))))
    return p


def _compared(unit: Unit, base: Unit, rules: Rules) -> _Compared:
    mine, theirs = unit.selected, base.selected
    lower = lower_is_better(unit.metric) if rules.lower_is_better is None else rules.lower_is_better
    sign = -1.0 if lower else 1.0
    seeds = sorted(set(mine.scores) & set(theirs.scores))
    d = sign * np.array([mine.scores[s] - theirs.scores[s] for s in seeds])
    per_item = _items(unit, base, seeds)
    wins = None
    if per_item is not None:
        wins = [int((per_item > 0).sum()), int((per_item < 0).sum())]
    naive = sign * (mine.naive - theirs.naive)
    row = replace(
        _bare(unit, "", ""),
        baseline=base.name,
        baseline_lr=theirs.lr,
        baseline_bracket=theirs.bracket,
        baseline_naive=_known(theirs.naive),
        baseline_corrected=_known(theirs.corrected),
        effect_naive=_known(naive),
        seeds=len(seeds),
        item_wins=wins,
        mcnemar=stats.mcnemar(wins[0], wins[1]) if wins and len(seeds) == 1 else None,
        improvement=_improvement(mine, theirs, sign),
        margin=margin_of([unit, base], rules),
        notes=[*mine.notes, *(f"{base.name}: {note}" for note in theirs.notes)],
    )
    problem = _problem(unit, base, seeds)
    again = None
    if "left one out" in (mine.rule, theirs.rule) and len(seeds) > 1 and not problem:
        again = _again(mine, theirs, seeds, unit.task)
    return _Compared(row, [d] if len(d) else [], [per_item], problem, again)


def _again(mine: Selected, theirs: Selected, seeds: Sequence[int], task: str) -> Any:
    generator = np.random.default_rng(zlib.crc32(task.encode()))  # tasks are independent
    signs = generator.choice([-1.0, 1.0], (REDRAWN, len(seeds)))
    both = [redrawn(own.curve, seeds, signs) for own in (mine, theirs)]
    return None if both[0] is None or both[1] is None else both[0] - both[1]


def _problem(unit: Unit, base: Unit, seeds: Sequence[int]) -> str:
    """Why the two cannot be compared, or nothing."""
    mine, theirs = unit.selected, base.selected
    for name, own in ((unit.name, mine), (base.name, theirs)):
        if "diverged" in own.bracket:
            return f"every learning rate of {name} diverged"
        if own.bracket.endswith("edge"):
            where = "below" if own.bracket.startswith("low") else "above"
            return (f"the best learning rate of {name}, {own.lr:.3g}, is the {own.bracket} of its "
                    f"grid: try rates {where} it")  # fmt: skip
    if (mine.rates, mine.trials) != (theirs.rates, theirs.trials):
        return (f"unequal trials: {mine.rates} learning rates in {mine.trials} runs, "
                f"{base.name} {theirs.rates} in {theirs.trials}")  # fmt: skip
    if mine.rule != theirs.rule:
        return f"{unit.name} is {mine.rule}, {base.name} {theirs.rule}"
    if not seeds:
        if not mine.scores or not theirs.scores:
            return ""
        return f"no seed in common with {base.name}"
    return ""


def _items(unit: Unit, base: Unit, seeds: Sequence[int]) -> stats.Array | None:
    """[seeds, items] differences of hits, where both have them for the same items."""
    both = []
    for own in (unit.selected, base.selected):
        if not seeds or not all(s in own.sources for s in seeds):
            return None
        rows = unit.rows if own is unit.selected else base.rows
        sources = [own.sources[s] for s in seeds]
        if "items" in rows:
            named = dict(zip(rows["source"], rows["items"], strict=True))
            sources = ["" if pd.isna(named[s]) else str(named[s]) for s in sources]
        found = items(sources) if all(sources) else None
        if found is None:
            return None
        both.append(np.array(found))
    if both[0].shape != both[1].shape:
        return None
    return both[0] - both[1]


def _improvement(mine: Selected, theirs: Selected, sign: float) -> float | None:
    """The share of pairs of runs in which the variant's is better; ties count half."""
    a = sign * np.array(list(mine.scores.values()))
    b = sign * np.array(list(theirs.scores.values()))
    if not len(a) or not len(b):
        return None
    wins = (a[:, None] > b[None]).mean() + 0.5 * (a[:, None] == b[None]).mean()
    return float(wins)


def margin_of(units: Sequence[Unit], rules: Rules) -> float | None:
    """One point: .01 where all scores are shares, those of the tuning runs as well, as nothing else
    may be left. A loss has no points, so no margin of its own."""
    if rules.margin is not None:
        return rules.margin
    if any(lower_is_better(u.metric) for u in units):
        return None
    known = [u.selected.curve.scores.ravel() for u in units]
    known += [np.array(list(u.selected.scores.values()), dtype=float) for u in units]
    scores = np.concatenate(known)
    scores = scores[np.isfinite(scores)]
    return 0.01 if len(scores) and bool((np.abs(scores) <= 1).all()) else 1.0


def _over_all(tasks: Sequence[_Compared], scope: str) -> _Compared:
    """One row over the tasks of a variant: the mean of their effects."""
    rows = [t.row for t in tasks]
    problems = [f"{t.row.task}: {t.problem}" for t in tasks if t.problem]
    apart = ""  # why a mean over the tasks would say nothing: none is given
    if len({r.metric for r in rows}) > 1 or len({r.margin for r in rows}) > 1:
        apart = "tasks of different metrics have no common mean"
    bases = [name.split(" (")[0] for name in (r.task for r in rows)]
    if len(set(bases)) < len(bases):
        apart = apart or "one task in several settings has no common mean"
    problem = problems[0] if problems else apart

    def mean(values: Sequence[float | None]) -> float | None:
        known = [v for v in values if v is not None]
        return float(np.mean(known)) if len(known) == len(values) and not apart else None

    first = rows[0]
    row = replace(
        first,
        task=ALL,
        lr=first.lr if len({r.lr for r in rows}) == 1 else None,
        bracket=_all_of([r.bracket for r in rows]),
        baseline_bracket=_all_of([r.baseline_bracket for r in rows]),
        baseline_lr=first.baseline_lr if len({r.baseline_lr for r in rows}) == 1 else None,
        score_naive=mean([r.score_naive for r in rows]),
        score_corrected=mean([r.score_corrected for r in rows]),
        baseline_naive=mean([r.baseline_naive for r in rows]),
        baseline_corrected=mean([r.baseline_corrected for r in rows]),
        effect_naive=mean([r.effect_naive for r in rows]),
        improvement=mean([r.improvement for r in rows]),
        seeds=min(r.seeds for r in rows),
        item_wins=None,
        mcnemar=None,
        margin=None if apart else first.margin,
        metric="" if apart else first.metric,
        notes=[],
    )
    blocks = [t.blocks[0] for t in tasks if t.blocks]
    if len(blocks) < len(tasks) or apart:
        blocks = []
    drawn = [t.again for t in tasks if t.again is not None]
    again = np.mean(drawn, axis=0) if len(drawn) == len(tasks) else None
    return _Compared(row, blocks, [t.items[0] for t in tasks], problem, again, list(tasks))


def _all_of(words: Sequence[str]) -> str:
    """Each of them once."""
    return "; ".join(dict.fromkeys(words))


def _said_of(found: _Compared, p_raw: float, p: float, rules: Rules, family: int) -> Verdict:
    """The verdict of a row whose p is known."""
    row, blocks = found.row, found.blocks
    n, tasks = sum(len(d) for d in blocks), max(1, len(blocks))
    if found.problem:
        return replace(row, verdict="not comparable", reason=found.problem, n=n,
                       unreachable=n > 0 and stats.least_p(n) > rules.level / family,
                       effect=stats.effect(blocks) if blocks else None)  # fmt: skip
    if not blocks:
        return replace(
            row, verdict="inconclusive", n=0,
            reason="one seed, and a learning rate chosen on it: nothing is left to report on",
            seeds_needed=-(-stats.blocks_needed(rules.level / family) // tasks),
        )  # fmt: skip
    spot = stats.interval(blocks, found.items)
    boot = stats.bootstrap_interval(blocks, found.items)
    shown = spot
    if boot is not None and min(len(d) for d in blocks) >= FEW_SEEDS:
        shown = _hull(boot, stats.interval(blocks))
    margin = row.margin
    p_same = None if margin is None else stats.equivalence(blocks, margin)
    sd, level = stats.spread(blocks), rules.level / family
    unknown = ""
    if stats.agree(blocks):
        sd, few = math.nan, min(map(len, blocks))
        unknown = f"the spread over seeds is unknown: the differences of {few} agree"
        row = replace(row, notes=[*row.notes, unknown])
    if found.again is not None and shown is not None:
        error = float(found.again.std())
        half = max((shown.high - shown.low) / 2, stats.t_quantile(0.975, math.inf) * error)
        shown = replace(shown, low=shown.effect - half, high=shown.effect + half)
        sd = max(sd, error * math.sqrt(n))
        if margin is not None and p_same is not None:
            beyond = margin - abs(shown.effect)
            p_same = max(p_same, float(np.mean(found.again >= beyond)))
    size = stats.detectable(n, level)
    row = replace(
        row,
        n=n,
        effect=stats.effect(blocks),
        low=shown.low if shown else None,
        high=shown.high if shown else None,
        bootstrap_low=boot.low if boot else None,
        bootstrap_high=boot.high if boot else None,
        p=p,
        p_raw=p_raw,
        p_equivalence=p_same,
        sd=_known(sd),
        detectable=_known(size * sd),
        unreachable=math.isinf(size),
    )
    if found.again is not None and row.seeds < CHOOSING:
        return replace(
            row, verdict="inconclusive", seeds_needed=CHOOSING,
            reason=f"{row.seeds} seeds chose the rates for one another: {CHOOSING} are the least",
        )  # fmt: skip
    # the test is about these items; where they are known, the interval is about others like them
    known = any(i is not None for i in found.items)
    zero = known and (bool(unknown) if shown is None else shown.low <= 0 <= shown.high)
    return _decided(row, p, p_same, rules, tasks, level, zero, unknown)


def _hull(found: stats.Interval, least: stats.Interval | None) -> stats.Interval:
    """The interval, made no narrower than `least` on either side."""
    if least is None:
        return found
    return replace(found, low=min(found.low, least.low), high=max(found.high, least.high))


def _decided(
    row: Verdict,
    p: float,
    p_same: float | None,
    rules: Rules,
    tasks: int,
    level: float,
    zero: bool,
    unknown: str,
) -> Verdict:
    """`zero`: other items of the kind could turn the effect around; `unknown`: why there is no
    spread."""
    effect, sd = row.effect or 0.0, math.nan if row.sd is None else row.sd
    if p <= rules.level and effect != 0 and not zero:
        small = row.margin is not None and row.low is not None and row.high is not None
        small = small and max(abs(row.low or 0), abs(row.high or 0)) < (row.margin or 0)
        return replace(row, verdict="better" if effect > 0 else "worse",
                       reason="by less than the margin" if small else "")  # fmt: skip
    if p_same is not None and p_same <= rules.level:
        return replace(row, verdict="equivalent", reason=f"within {row.margin:g}")
    target = row.margin or abs(effect)
    needed = stats.seeds_needed(target, sd, tasks, level)
    said = []
    if row.unreachable:
        least = stats.least_p(row.n)
        said.append(f"unreachable: {row.n} paired blocks cannot go below p = {least:.3g}")
    elif row.detectable is not None:
        said.append(f"an effect under {row.detectable:.3g} is not found by {row.n} blocks")
    else:
        unknown = unknown or "the spread over seeds is unknown: one a task"
    if needed:
        said.append(f"{needed} seeds a task would find {target:.3g}")
    elif sd > 0:
        said.append(f"not even {stats.MOST_SEEDS} seeds a task would find {target:.3g}")
    elif row.unreachable:  # the spread is not known
        said.append(f"{-(-stats.blocks_needed(level) // tasks)} seeds a task are the least")
    said += [unknown] if unknown else []
    return replace(row, verdict="inconclusive", reason="; ".join(said), seeds_needed=needed)


def records(rows: Sequence[Verdict]) -> list[dict[str, Any]]:
    """Plain dictionaries for json."""
    return [asdict(row) for row in rows]
