"""What the report shows beside its verdicts, as plain data: the same numbers go into json, tables
and figures.

Each function takes the units of one comparison (`verdicts.units`) and returns rows of numbers.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from . import aggregates, stats
from .load import Table, lines, lower_is_better
from .verdicts import Rules, Unit, margin_of

Rows = list[dict[str, Any]]
COSTS = {
    "trained": "trained numbers",
    "peak_bytes": "peak memory, bytes",
    "saved_bytes": "kept for backward, bytes",
    "train_s": "training, s",
    "init_s": "initialisation, s",
    "eval_s": "evaluation, s",
    "step_ms": "a step, ms",
    "tokens": "tokens seen",
    "flops": "FLOPs",
    "bits": "bits a base number",
}


def sign_of(unit: Unit, rules: Rules) -> float:
    """1 where more of the metric is better, else -1."""
    lower = rules.lower_is_better
    return -1.0 if (lower_is_better(unit.metric) if lower is None else lower) else 1.0


def curves(units: Sequence[Unit], rules: Rules) -> Rows:
    """Score by learning rate: mean, spread over seeds, bracket, usable width, expected best."""
    found = []
    for unit in units:
        own, sign = unit.selected.curve, sign_of(unit, rules)
        with np.errstate(all="ignore"):
            mean = np.array([_mean(column) for column in own.scores.T])
            sd = np.array([_sd(column) for column in own.scores.T])
        known = np.isfinite(mean)
        scale = margin_of([unit], rules)
        found.append({
            "variant": unit.variant, "rank": unit.rank, "task": unit.task, "scope": unit.scope,
            "metric": unit.metric, "lr": own.lrs.tolist(), "mean": _plain(mean), "sd": _plain(sd),
            "seeds": (~np.isnan(own.criterion)).sum(axis=0).tolist(),
            "diverged": np.isinf(own.criterion).sum(axis=0).tolist(),
            "chosen": unit.selected.lr, "bracket": unit.selected.bracket,
            "rule": unit.selected.rule, "sign": sign,
            "width": aggregates.usable_width(own.lrs, sign * mean, scale) if scale else None,
            "expected_best": (sign * aggregates.expected_best(sign * mean[known])).tolist()
            if known.any() else [],
        })  # fmt: skip
    return found


def _mean(column: Any) -> float:
    finite = column[np.isfinite(column)]
    return float(finite.mean()) if len(finite) else math.nan


def _sd(column: Any) -> float:
    finite = column[np.isfinite(column)]
    return float(finite.std(ddof=1)) if len(finite) > 1 else math.nan


def _plain(values: Any) -> list[float | None]:
    return [float(v) if math.isfinite(v) else None for v in values]


def winners(found: Rows, baseline: str) -> Rows:
    """Who is ahead at each learning rate that several have, and by how much over the baseline."""
    places: dict[tuple[Any, ...], list[tuple[str, float, float]]] = defaultdict(list)
    for row in found:
        for lr, mean in zip(row["lr"], row["mean"], strict=True):
            if mean is not None:
                key = (row["scope"], row["task"], row["rank"], lr)
                places[key].append((row["variant"], mean, row["sign"]))
    rows = []
    for (scope, task, rank, lr), here in sorted(places.items(), key=lambda p: str(p[0][:3])):
        if len(here) < 2:
            continue
        best = max(here, key=lambda e: e[1] * e[2])
        first = ", ".join(name for name, mean, _ in here if mean == best[1])
        base = next((mean for name, mean, _ in here if name == baseline), None)
        rows.append({
            "scope": scope, "task": task, "rank": rank, "lr": lr, "first": first,
            "score": best[1], "ahead": None if base is None else best[2] * (best[1] - base),
        })  # fmt: skip
    return sorted(rows, key=lambda r: (r["scope"], r["task"], str(r["rank"]), r["lr"]))


def regret(found: Rows, baseline: str, papers: Mapping[str, float]) -> Rows:
    """What a variant loses at the baseline's chosen rate, and at its paper's, against its own
    chosen one, in the scores by which rates are compared; less than 0: it gains."""
    base = {(r["scope"], r["task"], r["rank"]): r["chosen"]
            for r in found if r["variant"] == baseline}  # fmt: skip
    rows = []
    for row in found:
        # None where a run diverged: the others of its rate are those that had luck
        known = [(lr, None if diverged else m)
                 for lr, m, diverged in zip(row["lr"], row["mean"], row["diverged"], strict=True)
                 if diverged or m is not None]  # fmt: skip
        if sum(m is not None for _, m in known) < 2:
            continue
        theirs = base.get((row["scope"], row["task"], row["rank"]))
        papers_own = papers.get(row["variant"])
        entry = {k: row[k] for k in ("scope", "task", "variant", "rank", "chosen")}
        own, there, stated = (_at(known, lr) for lr in (row["chosen"], theirs, papers_own))
        entry["at_baseline_lr"] = _lost(own, there, row["sign"])
        entry["paper_lr"] = papers_own
        entry["at_paper_lr"] = _lost(own, stated, row["sign"])
        rows.append(entry)
    return rows


def _at(known: Sequence[tuple[float, float | None]], lr: float | None) -> float | None:
    """The score at `lr`, by straight lines between the rates; None outside them, and beside one
    without a score."""
    if lr is None or not known[0][0] * (1 - 1e-6) <= lr <= known[-1][0] * (1 + 1e-6):
        return None
    scores = [math.nan if m is None else m for _, m in known]
    at = [i for i, (x, _) in enumerate(known) if math.isclose(x, lr, rel_tol=1e-6)]
    found = scores[at[0]] if at else float(
        np.interp(math.log10(lr), [math.log10(x) for x, _ in known], scores)
    )  # fmt: skip
    return found if math.isfinite(found) else None


def _lost(own: float | None, other: float | None, sign: float) -> float | None:
    return None if own is None or other is None else sign * (own - other)


def costs(units: Sequence[Unit], rules: Rules) -> Rows:
    """Quality with its interval beside every cost, of the runs that are reported."""
    found = []
    for unit in units:
        rows = unit.rows
        at = rows[np.isclose(rows["lr"].astype(float), unit.selected.lr, rtol=1e-6)]
        if unit.selected.rule == "confirmed":
            at = at[at["split"] == "test"]
        scores = np.array(list(unit.selected.scores.values()))
        entry: dict[str, Any] = {
            "variant": unit.variant, "rank": unit.rank, "task": unit.task, "scope": unit.scope,
            "score": float(scores.mean()) if len(scores) else None, "sign": sign_of(unit, rules),
            "score_interval": _interval(scores), "n": len(scores),
        }  # fmt: skip
        for key in (*COSTS, "forgetting"):
            if key == "peak_bytes" and key in at:
                entry["peak_of"] = "; ".join(sorted(set(at["peak_of"])))
                if ";" in entry["peak_of"]:
                    continue  # nothing of which there is a median
            if key in at and at[key].notna().any():
                values = at[key].astype(float).dropna().to_numpy()
                entry[key] = float(np.median(values))
                entry[f"{key}_range"] = [float(values.min()), float(values.max())]
        size = [s for s in map(_disk, at["source"]) if s] if "split" in at else []
        if size:
            entry["disk_bytes"] = float(np.median(size))
        found.append(entry)
    return found


def _interval(scores: Any) -> list[float] | None:
    found = stats.interval([scores]) if len(scores) > 1 else None
    return None if found is None else [found.low, found.high]


@cache
def _disk(source: str) -> int:
    try:
        return sum(f.stat().st_size for f in (Path(source) / "adapter").iterdir())
    except OSError:
        return 0


def alike(found: Sequence[Mapping[str, Any]]) -> bool:
    """Whether peaks of memory are of the same: a process is no match for a count of tensors."""
    return len({entry.get("peak_of") for entry in found}) == 1


def fronts(found: Rows) -> Rows:
    """Which variants no other beats on quality and a cost, by task and cost."""
    rows = []
    groups: dict[tuple[str, str], Rows] = defaultdict(list)
    for entry in found:
        groups[entry["scope"], entry["task"]].append(entry)
    for (scope, task), here in groups.items():
        for cost in ("forgetting", "peak_bytes", "train_s", "trained", "disk_bytes"):
            known = [e for e in here if e.get(cost) is not None and e["score"] is not None]
            if len(known) < 2 or (cost == "peak_bytes" and not alike(known)):
                continue
            best = aggregates.front([(e[cost], e["sign"] * e["score"]) for e in known])
            rows.append({
                "scope": scope, "task": task, "cost": cost,
                "front": [_name(known[i]) for i in best],
                "beaten": [_name(e) for i, e in enumerate(known) if i not in best],
            })  # fmt: skip
    return rows


def _name(row: Mapping[str, Any]) -> str:
    return row["variant"] if row["rank"] is None else f"{row['variant']} r{row['rank']}"


def stability(units: Sequence[Unit]) -> Rows:
    """Divergences, spread over seeds, and spikes of the gradient's norm in the reported runs."""
    found = []
    for unit in units:
        scores = np.array(list(unit.selected.scores.values()))
        spikes = [_spikes(s) for s in unit.selected.sources.values()]
        known = [s for s in spikes if s is not None]
        found.append({
            "variant": unit.variant, "rank": unit.rank, "task": unit.task, "scope": unit.scope,
            "runs": len(unit.rows), "diverged": int((unit.rows["status"] == "diverged").sum()),
            "sd": float(scores.std(ddof=1)) if len(scores) > 1 else None,
            "spikes": float(np.mean(known)) if known else None,
        })  # fmt: skip
    return found


@cache
def history(source: str) -> tuple[dict[str, Any], ...]:
    """The rows of a run's metrics.jsonl; none where there is no such file."""
    file = Path(source) / "metrics.jsonl"
    return tuple(lines(file)) if file.is_file() else ()


def _spikes(source: str) -> int | None:
    """Logged gradient norms above four times the median of the ten before."""
    norms = [row["grad_norm"] for row in history(source) if row.get("grad_norm") is not None]
    if len(norms) < 12:
        return None
    return sum(n > 4 * float(np.median(norms[i - 10 : i])) for i, n in enumerate(norms) if i >= 10)


def to_target(units: Sequence[Unit], rules: Rules) -> Rows:
    """Steps, tokens and seconds until the baseline's median final validation loss is reached."""
    groups: dict[tuple[str, str], list[Unit]] = defaultdict(list)
    for unit in units:
        groups[unit.scope, unit.task].append(unit)
    found = []
    for (scope, task), here in groups.items():
        finals = [
            rows[-1]
            for unit in here if unit.variant == rules.baseline
            for rows in [_losses(s) for s in unit.selected.sources.values()] if rows
        ]  # fmt: skip
        if not finals:
            continue
        target = float(np.median([loss for _, _, loss in finals]))
        for unit in here:
            own = _reached(unit, target)
            if own is not None:
                found.append({"variant": unit.variant, "rank": unit.rank, "task": task,
                              "scope": scope, "target": target, **own})  # fmt: skip
    return found


def _losses(source: str) -> list[tuple[float, float, float]]:
    return [(row["step"], row["seconds"], row["validation/loss"])
            for row in history(source) if row.get("validation/loss") is not None]  # fmt: skip


def _reached(unit: Unit, target: float) -> dict[str, Any] | None:
    by_source = {row.source: row for row in unit.rows.itertuples(index=False)}
    seconds, steps, tokens = [], [], []
    for source in unit.selected.sources.values():
        rows, run = _losses(source), by_source.get(source)
        if not rows or run is None:
            continue
        begun = float(run.init_s) if run.init_s is not None else 0.0
        seconds.append(aggregates.time_to(target, [(t, v) for _, t, v in rows], begun))
        step = aggregates.time_to(target, [(s, v) for s, _, v in rows])
        steps.append(step)
        tokens.append(step * run.tokens / run.steps)
    if not seconds:
        return None
    middle = [float(np.median(v)) for v in (seconds, steps, tokens)]
    names = ("seconds", "steps", "tokens")
    return {**{k: v if math.isfinite(v) else None for k, v in zip(names, middle, strict=True)},
            "missed": sum(math.isinf(v) for v in seconds), "runs": len(seconds)}  # fmt: skip


def fairness(units: Sequence[Unit], rules: Rules) -> Rows:
    """Trials, tokens, trained numbers and modules of each variant; what is unlike the baseline's.

    `unlike` lists the columns to be shown in red; trained numbers may differ by 2 %.
    """
    bases = [u for u in units if u.variant == rules.baseline]
    found = []
    for unit in units:
        row = _spent(unit)
        here = [b for b in bases if (b.task, b.scope) == (unit.task, unit.scope)]
        base = next((b for b in here if b.rank == unit.rank), here[0] if here else None)
        unlike = []
        if base is not None and base is not unit:
            theirs = _spent(base)
            unlike = [k for k in ("rates", "trials", "seeds", "tokens", "targets", "steps")
                      if row.get(k) != theirs.get(k)]  # fmt: skip
            counts = np.concatenate([np.atleast_1d(r.get("trained") or []) for r in (row, theirs)])
            if len(counts) and counts.max() > 1.02 * counts.min():
                unlike.append("trained")
        found.append(row | {"unlike": unlike})
    return found


def _spent(unit: Unit) -> dict[str, Any]:
    rows, own = unit.rows, unit.selected
    entry: dict[str, Any] = {
        "variant": unit.variant, "rank": unit.rank, "task": unit.task, "scope": unit.scope,
        "rates": own.rates, "trials": own.trials, "seeds": len(own.scores),
        "selection": own.rule, "bracket": own.bracket, "diverged": own.diverged,
    }  # fmt: skip
    for key in ("trained", "targets", "steps", "batch_size"):
        if key in rows and rows[key].notna().any():
            values = sorted(set(rows[key].dropna()))
            entry[key] = _value(values[0]) if len(values) == 1 else [_value(v) for v in values]
    if "tokens" in rows:
        entry["tokens"] = int(rows["tokens"].sum())
    return entry


def _value(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value


def over_ranks(units: Sequence[Unit]) -> Rows:
    """Score at each rank, where a variant has several."""
    groups: dict[tuple[str, str, str], list[Unit]] = defaultdict(list)
    for unit in units:
        if unit.rank is not None:
            groups[unit.scope, unit.task, unit.variant].append(unit)
    return [
        {
            "scope": scope, "task": task, "variant": variant,
            "rank": [u.rank for u in here],
            "mean": [_finite(u.selected.corrected) for u in here],
            "interval": [_interval(np.array(list(u.selected.scores.values()))) for u in here],
        }
        for (scope, task, variant), own in groups.items()
        if len(here := sorted(own, key=lambda u: u.rank or 0)) > 1
    ]  # fmt: skip


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def summaries(units: Sequence[Unit], rules: Rules) -> Rows:
    """Interquartile means over tasks and seeds, optimality gaps, improvement, profiles."""
    groups: dict[tuple[str, str, Any], list[Unit]] = defaultdict(list)
    for unit in units:
        groups[unit.scope, unit.variant, unit.rank].append(unit)
    found = []
    for (scope, variant, rank), own in groups.items():
        strata = [sign_of(u, rules) * np.array(list(u.selected.scores.values())) for u in own]
        strata = [s for s in strata if len(s)]
        bases = {u.task: u for u in units if u.variant == rules.baseline and u.scope == scope}
        if not strata or len({u.metric for u in own}) > 1:
            continue
        sign, every = sign_of(own[0], rules), np.concatenate(strata)
        best = 1.0 if bool((np.abs(every) <= 1).all()) and sign > 0 else 100.0
        entry: dict[str, Any] = {
            "scope": scope, "variant": variant, "rank": rank, "runs": len(every),
            "iqm": sign * aggregates.iqm(every),
            "iqm_interval": sorted(sign * v for v in aggregates.stratified(
                strata, lambda s: aggregates.iqm(np.concatenate(s)))),
            "optimality_gap": aggregates.optimality_gap(every, best) if sign > 0 else None,
        }  # fmt: skip
        pairs = [(np.array(list(u.selected.scores.values())),
                  np.array(list(bases[u.task].selected.scores.values())))
                 for u in own if u.task in bases]  # fmt: skip
        pairs = [(sign * a, sign * b) for a, b in pairs if len(a) and len(b)]
        if pairs and variant != rules.baseline:
            entry["improvement"] = float(np.mean([aggregates.improvement(a, b) for a, b in pairs]))
            entry["improvement_interval"] = aggregates.stratified(
                [s for pair in pairs for s in pair],
                lambda s: float(np.mean([aggregates.improvement(a, b)
                                         for a, b in zip(s[::2], s[1::2], strict=True)])),
            )  # fmt: skip
        found.append(entry)
    return found


def profiles(units: Sequence[Unit], rules: Rules) -> Rows:
    """The share of runs above each score, by variant: one row a metric."""
    groups: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for unit in units:
        sign = sign_of(unit, rules)
        key = unit.scope, unit.metric
        groups[key][unit.name] += [sign * v for v in unit.selected.scores.values()]
    found = []
    for (scope, metric), by_name in groups.items():
        every = np.concatenate([np.array(v) for v in by_name.values() if v] or [np.zeros(0)])
        if not every.any():  # no run, or all of them 0: nothing to see
            continue
        grid = np.linspace(every.min(), every.max(), 101)
        above = {name: aggregates.profile(np.array(v), grid).tolist()
                 for name, v in by_name.items() if v}  # fmt: skip
        found.append({"scope": scope, "metric": metric, "at": grid.tolist(), "share": above})
    return found


def ranks_over_tasks(units: Sequence[Unit], rules: Rules) -> dict[str, Any] | None:
    """Friedman's test and Nemenyi's critical difference, where there are five tasks or more."""
    table: dict[str, dict[str, float]] = defaultdict(dict)
    for unit in units:
        table[unit.task][unit.name] = sign_of(unit, rules) * unit.selected.corrected
    names = sorted(set.intersection(*(set(row) for row in table.values())) if table else set())
    if len(table) < 5 or len(names) < 3:
        return None
    scores = np.array([[row[name] for name in names] for row in table.values()])
    if not np.isfinite(scores).all():
        return None
    p, mean = aggregates.friedman(scores)
    return {
        "p": p,
        "ranks": dict(zip(names, mean.tolist(), strict=True)),
        "tasks": len(table),
        "critical_difference": aggregates.critical_difference(len(names), len(table)),
    }


def provenance(table: Table) -> dict[str, list[str]]:
    """Every version of what the numbers rest on; more than one of a kind is a mixture."""
    found = {}
    for key in ("git", "dirty", "model_hash", "data_hash", "code", "packages", "device", "model"):
        if key in table and table[key].notna().any():
            found[key] = sorted({str(v) for v in table[key].dropna()})
    return found


def best_of(found: Rows) -> Rows:
    """The tuning-budget curve: the expected best of k trials (Dodge et al. 2019)."""
    keys = ("scope", "task", "variant", "rank")
    return [{**{k: row[k] for k in keys}, "expected_best": row["expected_best"]}
            for row in found if len(row["expected_best"]) > 1]  # fmt: skip


def papers(names: Sequence[str]) -> dict[str, float]:
    """The learning rate of each preset's paper, for models of the width it was given for."""
    from variants import Incompatible, describe

    found = {}
    for name in names:
        try:
            found[name] = float(describe(name)["defaults"]["lr"])
        except Incompatible:
            continue
    return found
