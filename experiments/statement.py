"""What a study states: conf/studies/NAME.yaml, or a file of your own, read and checked.

>>> [f.name for f in fields(Spec)][:4]
['question', 'tier', 'variants', 'anchors']
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError, YAMLError

from variants._registry import unknown

from .tasks import BadInput

TIERS = ("smoke", "standard", "paper")
FRESH = 1000  # the first seed of a confirmation: no run of the tuning has it
# what a study chooses by itself
OWN = ("variant=", "variant/", "rank=", "seed=", "optim.lr=", "eval.split=")


@dataclass
class Tuning:
    """How a learning rate is found."""

    decades: float = 3.0  # of stage 1, centred on the preset's own rate
    per_decade: int = 2  # points of stage 1: 1, 2 or 4
    seeds: int = 1
    refine: bool = True  # stage 2: the best rate and its neighbours at four points a decade
    refine_seeds: int = 2
    extensions: int = 2  # times that a grid may be extended, by two points each


@dataclass
class Spec:
    """What a study freezes."""

    question: str = MISSING
    tier: str = MISSING  # smoke, standard, paper
    variants: list[str] = MISSING  # each a line of words: `lora`, `lora variant/init=pissa`
    anchors: list[str] = MISSING  # compared as well, whatever the question
    models: list[str] = field(default_factory=lambda: ["model=tiny"])
    tasks: list[str] = field(default_factory=lambda: ["task=skills"])
    ranks: list[int] = field(default_factory=list)  # every variant at each
    budget: int | None = None  # or: as many trained numbers as the baseline has at this rank
    settings: list[str] = field(default_factory=list)  # words of all runs
    baseline: str | None = None
    margin: float | None = None  # of the primary metric, in its own unit; null: one point
    level: float = 0.05
    tuning: Tuning = field(default_factory=Tuning)
    confirm: int = MISSING  # fresh seeds of each variant, at the chosen rate, on test


def read(file: Path) -> Spec:
    """The statement in a file. What is wrong with it is one line, with the key and the choices."""
    try:
        spec = _typed(_loaded(file))
        for wrong in _wrong(spec):
            raise BadInput(wrong)
    except BadInput as error:
        raise BadInput(f"study={file.stem}: {error}") from None
    return spec


def _loaded(file: Path) -> DictConfig:
    try:
        found = OmegaConf.load(file)
    except YAMLError as error:
        where = error.problem_mark if isinstance(error, MarkedYAMLError) else None
        said = error.problem if isinstance(error, MarkedYAMLError) else str(error)
        line = f", line {where.line + 1}" if where is not None else ""
        raise BadInput(f"{file.name}{line}: no YAML: {' '.join(str(said).split())}") from None
    except (OSError, UnicodeDecodeError) as error:  # a file that holds one word is one, too
        raise BadInput(f"{file}: {' '.join(str(error).split())}") from None
    if not isinstance(found, DictConfig):
        raise BadInput(f"{file.name} is no mapping; its keys: {', '.join(_names(Spec))}")
    return found


def _names(kind: type) -> list[str]:
    return [f.name for f in fields(kind)]


def _typed(found: DictConfig) -> Spec:
    _refuse_unknown(found, Spec, "")
    tuning = found.get("tuning")
    if isinstance(tuning, DictConfig):
        _refuse_unknown(tuning, Tuning, "tuning.")
    elif "tuning" in found:
        raise BadInput(f"tuning={tuning}: a mapping; its keys: {', '.join(_names(Tuning))}")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Spec), found)
        lacking = [key for key in _names(Spec) if OmegaConf.is_missing(merged, key)]
        if lacking:
            raise BadInput(f"lacks {', '.join(lacking)}")
        return OmegaConf.to_object(merged)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        said = " ".join(str(error).split()).partition(" full_key:")[0]
        raise BadInput(f"{error.full_key}: {said}") from None


def _refuse_unknown(found: DictConfig, kind: type, prefix: str) -> None:
    for key in found:
        if key not in _names(kind):
            raise BadInput(prefix + str(unknown("key", key, _names(kind))).partition("=")[2])


def _wrong(spec: Spec) -> Iterator[str]:
    """Values that cannot be, by key."""
    tuning = spec.tuning
    if not spec.question.strip():
        yield "question: empty"
    if spec.tier not in TIERS:
        yield str(unknown("tier", spec.tier, list(TIERS)))
    if tuning.per_decade not in (1, 2, 4):
        yield f"tuning.per_decade={tuning.per_decade}: 1, 2 or 4"
    least = {"confirm": (spec.confirm, 1), "tuning.seeds": (tuning.seeds, 1),
             "tuning.refine_seeds": (tuning.refine_seeds, 1),
             "tuning.extensions": (tuning.extensions, 0),
             "budget": (spec.budget, 1)}  # fmt: skip
    least |= {"ranks": (min(spec.ranks, default=1), 1)}
    for key, (value, lowest) in least.items():
        if value is not None and value < lowest:
            yield f"{key}={value}: a whole number of {lowest} or more"
    for key in ("seeds", "refine_seeds"):
        if getattr(tuning, key) > FRESH:
            yield f"tuning.{key}={getattr(tuning, key)}: at most {FRESH}; later ones confirm"
    if not 0 <= tuning.decades < math.inf:
        yield f"tuning.decades={tuning.decades}: zero or a positive number"
    elif tuning.per_decade in (1, 2, 4) and tuning.decades * tuning.per_decade % 2:
        yield (f"tuning.decades={tuning.decades}: as many rates lie on either side of the first, "
               f"so with per_decade={tuning.per_decade} it is a multiple of "
               f"{2 / tuning.per_decade:g}")  # fmt: skip
    if not 0 < spec.level < 1:
        yield f"level={spec.level}: between 0 and 1, such as 0.05"
    if spec.margin is not None and not 0 < spec.margin < math.inf:
        yield f"margin={spec.margin}: a positive number in the primary metric's unit, or null"
    if not (spec.ranks or spec.budget) or (spec.ranks and spec.budget):
        yield "ranks or budget, one of the two"
    yield from _wrong_words(spec)


def _wrong_words(spec: Spec) -> Iterator[str]:
    """Lines of words: none empty, none twice, and none that the study would overrule."""
    for key in ("variants", "models", "tasks"):
        if not getattr(spec, key):
            yield f"{key}: empty; name one or more"
    for key in ("variants", "anchors", "models", "tasks", "ranks", "settings"):
        lines = [str(line).removeprefix("variant=").strip() for line in getattr(spec, key)]
        twice = [line for line in dict.fromkeys(lines) if lines.count(line) > 1]
        if "" in lines:
            yield f"{key}: an empty line"
        if twice:
            yield f"{key}: {twice[0]} is there twice"
    free = ("variant=", "variant/", "rank=")  # a variant's own
    for key, own in {"variants": [own for own in OWN if own not in free],
                     "anchors": [own for own in OWN if own not in free],
                     "models": OWN, "tasks": OWN, "settings": OWN}.items():  # fmt: skip
        for line in getattr(spec, key):
            first, *rest = line.split()
            words = rest if key in ("variants", "anchors") and "=" not in first else [first, *rest]
            for word in words:
                if "=" not in word:
                    yield f"{key}: {word}: words are KEY=VALUE, as on the command line"
                if word.startswith(tuple(own)):
                    yield f"{key}: {word}: a study chooses that"
