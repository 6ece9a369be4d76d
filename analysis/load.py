"""Reads results into one table: run folders, a csv, or a W&B project. Nothing is dropped unsaid.

A row is a run. Columns: `variant` (the preset, and the parts that differ from its own), `rank`,
`lr`, `seed`, `task`, `model`, `split`, `status`, `score` (the primary metric of the tuned model),
`base` (the same of the untouched one), `loss`, `source` (where the row came from), what the run
cost, and `setting`: what must be equal for two runs to be compared (model, data, steps, batch,
code). Runs of unequal settings are never averaged.
"""

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

Table = Any  # a pandas.DataFrame, of which its own types say too little
LOWER = ("loss", "perplexity", "bits_per_byte", "mse")  # metrics of which less is better
NEEDED = ("variant", "lr", "seed", "task", "score")
OPTIONAL = ("rank", "model", "batch_size", "items")
# What `saved` writes of each run.
SAVED = ("variant", "rank", "lr", "seed", "task", "model", "split", "metric", "score", "base",
         "loss", "forgetting", "trained", "targets", "steps", "batch_size", "tokens", "peak_bytes",
         "peak_of", "train_s", "init_s", "model_hash", "data_hash", "code", "run")  # fmt: skip
SPLITS = ("validation", "test")
# settings that make two methods of one variant, where runs that are else alike differ in them
TOLD = ("alpha", "dropout", "targets", "rank_pattern", "alpha_pattern", "optim.schedule",
        "optim.warmup", "optim.weight_decay", "optim.clip", "optim.beta1", "optim.beta2",
        "train.seq_len", "train.autocast", "eval.limit")  # fmt: skip


class Unreadable(ValueError):
    """A folder or table that cannot be compared; the message names what and where."""


class Truncated(Unreadable):
    """A file that was cut short, or is not json."""


def lower_is_better(metric: str) -> bool:
    """Whether less of the metric is better."""
    return metric in LOWER


def runs(paths: Iterable[str | Path]) -> tuple[Table, list[dict[str, str]]]:
    """(finished runs below the folders, what is there and not finished: state and reason)."""
    rows, unfinished = [], []
    found = False
    for path in paths:
        top = Path(path).expanduser()
        if not top.exists():
            raise Unreadable(f"{path}: no such folder")
        for folder in _folders(top):
            found = True
            try:
                result = read(folder / "result.json")
                if result is None:
                    unfinished.append(_state(folder))
                else:
                    rows.append(_row(folder, result))
            except Truncated as error:
                unfinished.append({"run": folder.name, "status": "truncated", "error": str(error)})
    if not rows:
        what = f"{len(unfinished)} unfinished runs" if found else "no run folders"
        raise Unreadable(f"{', '.join(map(str, paths))}: {what}, and no finished one")
    table: Table = pd.DataFrame(rows)
    table["code"] = _revisions(table.pop("sources"))
    _tell_apart(table)
    parts = ["model_hash", "data_hash", "steps", "batch_size", "code"]
    table["setting"] = [_digest(row) for row in table[parts].itertuples(index=False)]
    return table, unfinished


def _tell_apart(table: Table) -> None:
    """Names in `variant` what differs among runs that are else one method's, rate and seed aside:
    `lora +alpha=64` beside `lora`, whose alpha is the preset's."""
    alike = ["variant", "task", "model_hash", "data_hash", "steps", "batch_size", "split"]
    settings = table.pop("settings")
    for _, rows in table.groupby([*alike, table["rank"].fillna(-1)]):
        for key in TOLD:
            shown = {i: _shown(settings[i].get(key)) for i in rows.index}
            if len(set(shown.values())) > 1:
                for i, value in shown.items():
                    if value != _shown(settings[i].get(f"{key} of the preset")):
                        table.loc[i, "variant"] += f" +{key}={value}"


def _shown(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value).replace(" ", "").replace("'", "")
    return f"{value:g}"


def _settings(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Those of TOLD that config.yaml has, and what each is where nobody sets it."""
    import yaml

    from experiments.config import Settings
    from variants._adapter import choose
    from variants._registry import Incompatible, find_preset

    try:
        text = (folder / "config.yaml").read_text()
        saved = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (OSError, yaml.YAMLError):
        return {}
    default = asdict(Settings())
    try:
        default["alpha"] = choose(config["variant"], config["rank"], **config["axes"]).alpha
        default["targets"] = find_preset(config["variant"]).targets
    except (Incompatible, KeyError):  # a variant of the user's own, which is not at hand here
        pass
    found: dict[str, Any] = {}
    for name, tree in (("", saved), (" of the preset", default)):
        for key in TOLD:
            value: Any = tree
            for word in key.split("."):
                value = value.get(word) if isinstance(value, dict) else None
            found[key + name] = value
    return found


def _folders(top: Path) -> list[Path]:
    """The run folders at or below `top`; those set aside for a new run are left out, and what lies
    inside a run is a part of it (`evaluations/`), not another."""
    if (top / "status.json").exists() or (top / "result.json").exists():
        return [top]
    marks = {p.parent for name in ("status.json", "result.json") for p in top.glob(f"**/{name}")}
    return sorted(p for p in marks if ".old" not in p.name and marks.isdisjoint(p.parents))


def read(path: Path) -> Any:
    """The json in a file; None where there is no such file."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError:
        raise Truncated(f"{path}: truncated, or not json") from None


def lines(path: Path) -> Iterator[Any]:
    """The json of each line of a file."""
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            row = json.loads(line)
        except ValueError:
            raise Truncated(f"{path}, line {number}: truncated, or not json") from None
        yield row


def _state(folder: Path) -> dict[str, str]:
    status = read(folder / "status.json") or {}
    lines = str(status.get("error") or "").splitlines() or [""]
    return {"run": folder.name, "status": status.get("status", "missing"), "error": lines[0]}


def _row(folder: Path, result: Mapping[str, Any]) -> dict[str, Any]:
    from experiments.record import SCHEMA

    try:
        if result["schema"] != SCHEMA:
            raise Unreadable(f"{folder / 'result.json'}: schema {result['schema']}; this code "
                             f"reads schema {SCHEMA}")  # fmt: skip
        config, metrics = result["config"], result["metrics"]
        primary = metrics["primary"]
        env = read(folder / "env.json") or {}
        old = result.get("forgetting") or {}
        peak, peak_of = _peak(result["memory"])
        forgotten = None
        if old.get("tuned"):
            forgotten = old["tuned"]["loss"] - old["base"]["loss"]
        return {
            "source": str(folder),
            "run": folder.name,
            "status": result["status"],
            "variant": label(config),
            "rank": config["rank"],
            "lr": config["lr"],
            "lr_origin": config.get("lr_origin", ""),
            "seed": config["seed"],
            "task": config["task"],
            "model": config["model"],
            "split": config["split"],
            "metric": primary,
            "score": _number(metrics["tuned"][primary]),
            "base": _number(metrics["base"][primary]),
            "loss": _number(metrics["tuned"]["loss"]),
            "base_loss": _number(metrics["base"]["loss"]),
            "mean_loss": _number((result.get("learning") or {}).get("mean_loss")),
            "forgetting": _number(forgotten),
            "trained": result["params"]["trainable"],
            "total": result["params"]["total"],
            "targets": json.dumps(config["targets"]),
            "steps": config["steps"],
            "batch_size": config["batch_size"],
            "tokens": result["tokens"]["seen"],
            "flops": _number(result["flops"]),
            "peak_bytes": peak,
            "peak_of": peak_of,
            "saved_bytes": result["memory"]["saved_activation_bytes"],
            "bits": result["memory"]["stored_bits"],
            "init_s": result["time"]["init_s"],
            "train_s": result["time"]["train_s"],
            "eval_s": result["time"]["eval_s"],
            "step_ms": _number(result["time"]["step_ms"]),
            "model_hash": result["provenance"]["model"],
            "data_hash": result["provenance"]["data"],
            "git": str((result["provenance"].get("git") or {}).get("commit")),
            "dirty": (result["provenance"].get("git") or {}).get("dirty"),
            "device": result["provenance"].get("device"),
            "packages": json.dumps(result["provenance"].get("packages"), sort_keys=True),
            "sources": env.get("sources", {}),
            "settings": _settings(folder, config),
        }
    except (KeyError, TypeError) as error:
        raise Unreadable(f"{folder / 'result.json'}: no {error} in it") from None


def _peak(memory: Mapping[str, Any]) -> tuple[float, str]:
    """(bytes at most, of what). On a CPU the peak is that of the whole process, its imports and the
    runs before it included; there the count of one backward says what a variant takes."""
    of = memory.get("peak_of", "the process")
    if of == "the process" and memory.get("step_peak_bytes") is not None:
        return memory["step_peak_bytes"], "tensors of one backward"
    return memory["peak_bytes"], of


def label(config: Mapping[str, Any]) -> str:
    """The preset's name, and what it was joined with: `dora +init=pissa`.

    >>> label({"variant": "lora", "axes": {"init": {"name": "pissa", "method": "exact"}}})
    'lora +init=pissa +init.method=exact'
    """
    from variants import Incompatible, describe

    name = config["variant"]
    try:
        own = describe(name)["axes"]
    except Incompatible:  # a variant of the user's own, which is not at hand here
        return name
    words = []
    for axis, part in config["axes"].items():
        if part["name"] != own[axis]["name"]:
            words.append(f"+{axis}={part['name']}")
        home = _defaults(axis, part["name"]) | (own[axis] if own[axis]["name"] == part["name"]
                                                else {})  # fmt: skip
        words += [f"+{axis}.{k}={v}" for k, v in part.items() if k != "name" and home.get(k) != v]
    return " ".join([name, *words])


def _defaults(axis: str, part: str) -> dict[str, Any]:
    from variants._registry import find_part

    return {k: default for k, (_, default) in find_part(axis, part).fields.items()}


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _digest(values: Iterable[Any]) -> str:
    return hashlib.sha256(json.dumps([str(v) for v in values]).encode()).hexdigest()[:8]


def _revisions(sources: Any) -> list[str]:
    """A name for the code of each run, by the files of which two versions were used.

    Runs of two variants import different files, so only files that differ tell them apart.
    """
    versions: dict[str, set[str]] = defaultdict(set)
    for files in sources:
        for name, digest in files.items():
            versions[name].add(digest)
    torn = sorted(name for name, found in versions.items() if len(found) > 1)
    return [_digest(files.get(name, "") for name in torn) if torn else "one" for files in sources]


def csv(path: str | Path) -> Table:
    """A table with columns variant, lr, seed, task, score; a score that is no finite number is a
    divergence, which `unsaid` marks unless the cell says so: `diverged`.

    Optional: rank, model, batch_size, and `items`: a file of that run's scores, one item a line;
    split (validation or test; all are test without it), and with it loss, base and metric, as
    `saved` writes them.
    """
    file = Path(path).expanduser()
    try:
        table: Table = pd.read_csv(file, skipinitialspace=True, skip_blank_lines=False)
    except (OSError, ValueError) as error:
        raise Unreadable(f"--csv {path}: {' '.join(str(error).split())}") from None
    missing = [name for name in NEEDED if name not in table.columns]
    if missing:
        raise Unreadable(
            f"--csv {path}: no column {missing[0]!r}; needed: {', '.join(NEEDED)}; "
            f"there: {', '.join(map(str, table.columns))}"
        )
    table = table.dropna(how="all")  # blank lines, which the numbers of lines count
    if not len(table):
        raise Unreadable(f"--csv {path}: no rows")
    for name in ("variant", "task"):
        table[name] = table[name].astype(object).where(table[name].notna(), "").map(str).str.strip()
        _refused(path, table, name, table[name] == "", "a name is needed")
    ends = table["score"].map(str).str.strip().str.lower() == "diverged"
    odd = {name: _numbers(table, name) for name in ("seed", "lr", "score", "rank")}
    _refused(path, table, "seed", table["seed"].isna() | (table["seed"] % 1 != 0),
             "not a whole number")  # fmt: skip
    _refused(path, table, "lr", odd["lr"], "not a number")
    _refused(path, table, "lr", ~((table["lr"] > 0) & table["lr"].map(math.isfinite)),
             "a positive number is needed")  # fmt: skip
    _refused(path, table, "score", odd["score"] & ~ends, "not a number")
    _refused(path, table, "rank", odd["rank"] | (table["rank"].notna() & (table["rank"] % 1 != 0)),
             "not a whole number")  # fmt: skip
    finite = table["score"].map(math.isfinite)
    if "split" in table:
        _refused(path, table, "split", ~table["split"].isin(SPLITS), "validation or test")
    table = table.assign(
        status=["done" if ok else "diverged" for ok in finite],
        seed=table["seed"].astype(int),
        unsaid=~finite & ~ends,
        score=table["score"].where(finite),
        source=[f"{file}:{i + 2}" for i in table.index],
        split=table.get("split", "test"),
        metric=table.get("metric", "score"),
    )
    for name in ("model", "batch_size"):
        if name not in table:
            table[name] = None
    keys = table[["model", "batch_size"]].astype(object)
    keys = keys.where(keys.notna(), None)
    table["setting"] = [_digest(row) for row in keys.itertuples(index=False)]
    return table


def saved(table: Table, path: Path) -> None:
    """Writes runs as the table that `csv` reads: the same verdicts, without what lies in the run
    folders (items, histories)."""
    kept = table[[name for name in SAVED if name in table]]
    score = kept["score"].astype(object).where(table["status"] == "done", "diverged")
    kept.assign(score=score).to_csv(path, index=False)


def _numbers(table: Table, name: str) -> Any:
    """Makes a column one of numbers, nan where there is none; which cells have something else."""
    given = table[name] if name in table else pd.Series(math.nan, table.index)
    numbers: Table = pd.to_numeric(given, errors="coerce")
    table[name] = numbers
    return numbers.isna() & given.notna() & (given.map(str).str.strip().str.lower() != "nan")


def _refused(path: str | Path, table: Table, name: str, odd: Any, why: str) -> None:
    """Names the first line with an odd cell, as it stands in the file."""
    for i in table.index[odd]:
        text = pd.read_csv(Path(path).expanduser(), dtype=str, keep_default_na=False,
                           skip_blank_lines=False, skipinitialspace=True)[name][i]  # fmt: skip
        raise Unreadable(f"--csv {path}, line {i + 2}: {name}={text}: {why}")


def unsaid(table: Table) -> str:
    """Which lines of a csv have no number as a score, and count as a diverged run; or nothing."""
    if "unsaid" not in table or not table["unsaid"].any():
        return ""
    file, *_ = table["source"].iloc[0].rpartition(":")
    lines = [source.rpartition(":")[2] for source in table["source"][table["unsaid"]]]
    more = f" and {len(lines) - 20} more" if len(lines) > 20 else ""
    return (f"{file}, line{'s' * (len(lines) > 1)} {', '.join(lines[:20])}{more}: no finite number "
            "as score, counted as a diverged run")  # fmt: skip


def wandb(project: str) -> Table:
    """The finished runs of a W&B project, as the tracker wrote them."""
    import wandb as client
    from wandb.errors import Error

    if project.count("/") != 1:
        raise Unreadable(f"--wandb {project}: ENTITY/PROJECT")
    rows = []
    try:
        for run in client.Api(timeout=30).runs(project):
            summary = dict(run.summary)
            if "result" in summary:
                rows.append(_row(Path(run.name), json.loads(summary["result"])))
    except (Error, OSError, ValueError) as error:
        first = str(error).strip().splitlines() or [type(error).__name__]
        raise Unreadable(f"--wandb {project}: {first[0]}") from None
    if not rows:
        raise Unreadable(f"--wandb {project}: no finished run of this laboratory there")
    table: Table = pd.DataFrame(rows)
    table["code"] = table["git"]
    del table["sources"]
    parts = ["model_hash", "data_hash", "steps", "batch_size", "code"]
    table["setting"] = [_digest(row) for row in table[parts].itertuples(index=False)]
    return table


def items(sources: Sequence[str]) -> list[list[float]] | None:
    """Each run's score of each item, in one order; None where a run has none, or others.

    An item's score is 1 where the prediction is the reference, as exact match has it.
    """
    found, ids = [], None
    for source in sources:
        path = Path(source)
        if path.is_dir():
            path = path / "predictions.jsonl"
        if not path.is_file():
            return None
        names, values = [], []
        for row in lines(path):
            if isinstance(row, dict):
                names.append(row.get("id"))
                if isinstance(row.get("tuned"), float):
                    return None  # a loss, not a hit or a miss
                values.append(float(str(row.get("tuned")).strip() == str(row["reference"]).strip()))
            else:
                names.append(len(names))
                values.append(float(row))
        if ids is not None and names != ids:
            return None
        ids = names
        found.append(values)
    return found if found and found[0] else None
