"""The configuration: typed keys, the choices of each group, defaults filled in, and a hash.

Nothing here imports torch: this is what `--help`, completion and a sweep's driver run.
"""

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from omegaconf import MISSING, DictConfig, OmegaConf

from variants import _registry as registry

from .tasks import BadInput, Task, tasks


@dataclass
class Optim:
    """Learning rate, schedule, decay, clipping. The rule of update is the axis variant/update."""

    lr: float | None = None  # null: the preset's own, carried to the model's width
    # A preset's lr holds at its own width w; at width d it is times (w / d)^width_exponent.
    # 0.781 was fitted on Llama models (tinker-cookbook, hyperparam_utils.get_lr); 0 turns it off.
    width_exponent: float | None = None  # null: the preset's own, 0.781 unless it says otherwise
    schedule: str = "cosine"  # cosine, linear, constant
    warmup: float = 0.03  # below 1 a share of the steps, else steps
    weight_decay: float = 0.0
    clip: float = 1.0  # largest gradient norm; 0: none
    beta1: float = 0.9
    beta2: float = 0.999


@dataclass
class Train:
    """How long, and in what portions. null: the task's own."""

    steps: int | None = None
    epochs: float | None = None  # in place of steps
    batch_size: int | None = None  # items an optimizer step
    seq_len: int | None = None  # tokens
    accumulate: int = 1  # portions of a batch, one after the other
    autocast: str = "none"  # none, bf16
    activation_checkpointing: bool = False
    eval_every: int | None = None  # steps between validations; null: an eighth of the run; 0: none
    checkpoint_every: int | None = None  # steps; null: a tenth of the run; 0: none
    log_every: int | None = None  # steps; null: a hundredth of the run
    parallel: str = "ddp"  # under torchrun; ddp: the base on every process, fsdp: in shards


@dataclass
class Eval:
    """What is scored, at the end and on the way."""

    split: str = "validation"  # validation, test
    batch_size: int = 64
    limit: int | None = None  # items at the end, new and old ones each; null: all
    limit_during: int = 256  # items in a validation on the way
    forgetting: str | None = None  # a text file like what the base was pretrained on
    max_new_tokens: int | None = None  # null: the task's own


@dataclass
class Track:
    """Weights & Biases. auto: online with a key and a network, else offline."""

    mode: str = "auto"  # auto, online, offline, disabled
    project: str = "lora-variants"
    entity: str | None = None
    group: str | None = None  # null: the sweep
    stage: str | None = None  # a tag: the part of a study that asked for the run first
    frozen: str | None = None  # a tag: the hash of that study's statement


@dataclass
class Sweep:
    """What a multirun (-m) does with its runs."""

    isolate: bool = True  # each run in a process of its own, which alone is lost when it dies
    time_limit: Any = None  # of an attempt: seconds, or 90s, 30m, 2h, 1d; null: none
    grace: float = 30.0  # seconds from the request to stop until a run is killed
    retry: Any = None  # states to run again: failed, refused, stale, done, diverged; or a list


@dataclass
class Tiny:
    """The embedded default: a Llama of 0.3M parameters, pretrained by experiments/pretrain.py."""

    kind: str = "tiny"
    dtype: str = "fp32"  # fp32, bf16, fp16


@dataclass
class HF:
    """A causal LM or sequence classifier of transformers, from a folder or the hub."""

    kind: str = "hf"
    path: str | None = None
    dtype: str = "fp32"
    revision: str | None = None
    trust_remote_code: bool = False


@dataclass
class Config:
    """A Llama of a given size with random weights, for benchmarks."""

    kind: str = "config"
    dtype: str = "fp32"
    hidden_size: int = 256
    layers: int = 2
    heads: int = 4
    kv_heads: int | None = None
    intermediate_size: int | None = None
    vocab_size: int | None = None  # null: the tokenizer's
    tokenizer: str | None = None  # a folder; null: bytes
    seed: int = 0


@dataclass
class MLP:
    """Two linear layers on an image's principal components, pretrained on odd digits (mlp.py)."""

    kind: str = "mlp"
    dtype: str = "fp32"
    path: str | None = "${oc.select:task.path,null}"  # images as task=digits reads them
    components: int = 8
    hidden: int = 128
    steps: int = 200  # of pretraining
    seed: int = 0


MODELS = {"tiny": Tiny, "hf": HF, "config": Config, "mlp": MLP}


@dataclass
class Settings:
    """A run."""

    variant: Any = MISSING
    model: Any = MISSING
    task: Any = MISSING
    rank: int | None = None
    alpha: Any = None  # a number, or a multiple of each layer's rank: 2r
    targets: Any = None  # null: the preset's own, all-linear for most
    rank_pattern: Any = None  # {role or layer: rank}
    alpha_pattern: Any = None  # {role or layer: alpha}
    dropout: float = 0.0
    seed: int = 0
    optim: Optim = field(default_factory=Optim)
    train: Train = field(default_factory=Train)
    eval: Eval = field(default_factory=Eval)
    track: Track = field(default_factory=Track)
    sweep: Sweep = field(default_factory=Sweep)
    device: str = "auto"
    out_dir: str = "runs"
    study: str | None = None
    dry: bool = False
    rerun: bool = False


# Keys that cannot change a result: not in the hash.
OUTSIDE = ("track", "sweep", "device", "out_dir", "study", "dry", "rerun")
# `parallel`, and how many processes there are, change sums by their rounding and the masks of
# dropout by their draws, as `device` does.
OUTSIDE_TRAIN = ("checkpoint_every", "log_every", "parallel")
MODES = ("auto", "online", "offline", "disabled")
CHOICES = {
    "optim.schedule": ("cosine", "linear", "constant"),
    "train.autocast": ("none", "bf16"),
    "train.parallel": ("ddp", "fsdp"),
    "eval.split": ("validation", "test"),
    "track.mode": MODES,
    "model.dtype": ("fp32", "bf16", "fp16"),
}
AGAIN = ("failed", "refused", "stale", "done", "diverged")  # states that sweep.retry takes
DEVICES = "auto, cpu, cuda, cuda:N"
TIMES = "seconds, or a time such as 90s, 30m, 1h30m, 2d"
UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
TYPES = {"int": int, "float": float, "bool": bool, "str": str}


_registered: Any = None  # the registry's index whose choices Hydra has


def register() -> None:
    """Puts the schema and every choice of every group before Hydra, once in a process."""
    global _registered
    if _registered is registry.index():
        return
    _registered = registry.index()
    store: Any = ConfigStore.instance()
    # Hydra copies the whole store for each group that it lists or composes; nothing changes it
    store.__deepcopy__ = lambda memo: store
    store.store(name="schema", node=Settings)
    OmegaConf.register_new_resolver("more_keys", more_keys, replace=True)
    Plugins.instance()  # finds launchers, whose defaults those of conf/hydra/launcher replace
    for file in (Path(__file__).parents[1] / "conf" / "hydra" / "launcher").glob("*.yaml"):
        store.repo["hydra"]["launcher"].pop(file.name, None)
    # here too, so that conf/ composes from where hydra_plugins/ is not on the path
    sweeper = {"_target_": "hydra_plugins.lab_sweeper.LabSweeper", "params": None}
    store.store(group="hydra/sweeper", name="lab", node=sweeper)
    for name, cls in MODELS.items():
        store.store(group="model", name=name, node=cls)
    for name, task in tasks().items():
        store.store(group="task", name=name, node=twin(task))
    parts, presets = registry.index()
    OmegaConf.register_new_resolver("own", _own, replace=True)
    for axis, found in parts.items():
        for name, part in found.items():
            homes = [p.axes[axis] for p in presets.values() if p.axes[axis]["name"] == name]
            fields = [("name", str, name)] + [
                (key, TYPES[kind], f"${{own:{axis},{name},{key}}}"
                 if any(home.get(key, default) != default for home in homes) else default)
                for key, (kind, default) in part.fields.items()
            ]  # fmt: skip
            store.store(
                group=f"variant/{axis}", name=name, node=dataclasses.make_dataclass(name, fields)
            )
    for name, preset in presets.items():
        chosen = [{axis: part["name"]} for axis, part in preset.axes.items()]
        node = {"defaults": [*chosen, "_self_"], "name": name}
        store.store(group="variant", name=name, node=node)


def _own(axis: str, part: str, key: str, *, _root_: Any) -> Any:
    """A part's setting where presets differ: that of the preset in use if the part is its own."""
    parts, presets = registry.index()
    chosen, default = presets[_root_.variant.name].axes[axis], parts[axis][part].fields[key][1]
    return chosen.get(key, default) if chosen["name"] == part else default


def more_keys() -> str:
    """For `--help`: the keys that come with each model and task, and the words that keys take."""
    own: dict[str, Any] = {f"model={name}": cls for name, cls in MODELS.items()}
    own |= {f"task={name}": task for name, task in tasks().items()}
    lines = ["Keys that come with a choice:", ""]
    for choice, cls in own.items():
        group = choice.partition("=")[0]
        keys = [f"{group}.{f.name}={_shown(f.default)}" for f in dataclasses.fields(cls)
                if f.name != "kind"]  # fmt: skip
        lines.append(f"  {choice:<14} {' '.join(keys) or '-'}")
    lines += ["", "Keys that take a word:", ""]
    from .study import names  # no choice of Hydra's, since a study is also the name of a folder

    takes = {key: ", ".join(words) for key, words in CHOICES.items()}
    takes |= {
        "device": DEVICES,
        "sweep.time_limit": TIMES,
        "sweep.retry": f"{', '.join(AGAIN)}; several: '[failed,stale]'",
        "study": f"(with -m) {', '.join(names())}; or FILE.yaml (docs/sweeps.md)",
    }
    return "\n".join([*lines, *(f"  {key:<16} {words}" for key, words in takes.items())])


def _shown(value: Any) -> str:
    if isinstance(value, str) and value.startswith("${"):  # the key that it is taken from
        return re.sub(r"\$\{(?:oc\.select:)?([\w.]+).*", r"\1", value)
    text = json.dumps(value)
    return text if len(text) < 24 else f"{text[:20]}..."


def twin(task: type[Task]) -> Any:
    """A mutable dataclass of the same fields: Hydra takes a frozen one for read-only."""
    fields = [(f.name, f.type, f.default) for f in dataclasses.fields(task)]  # type: ignore[arg-type]
    return dataclasses.make_dataclass(task.name, [("name", str, task.name), *fields])


def settings_of(cfg: DictConfig) -> Settings:
    """The composed configuration as typed objects, with choices checked and defaults filled in."""
    _refuse_unknown(cfg, "")
    check_outside(cfg)
    settings: Settings = OmegaConf.to_object(cfg)  # type: ignore[assignment]
    settings.task = _task(settings.task)
    settings.model = _model(settings.model)
    settings.variant = OmegaConf.to_container(cfg.variant, resolve=True)
    settings.targets = _targets(settings.targets)
    for key in ("rank_pattern", "alpha_pattern"):
        pattern = getattr(settings, key)
        if pattern is not None and not isinstance(pattern, dict):
            raise BadInput(f"{key}={pattern}: a mapping, such as {{mlp:16,q:4}}")
    for key, choices in CHOICES.items():
        group, name = key.split(".")
        value = getattr(getattr(settings, group), name)
        if value not in choices:
            raise BadInput(f"{key}={value}: choices: {', '.join(choices)}")
    settings.sweep.time_limit = seconds("sweep.time_limit", settings.sweep.time_limit)
    settings.sweep.retry = states_of(settings.sweep.retry)
    _check_numbers(settings)
    return settings


def check_outside(cfg: DictConfig) -> None:
    """The keys of OUTSIDE, of which a run's folder knows nothing; a sweep asks before it plans.

    Whether a device is there is for the machine to say that runs it.
    """
    seconds("sweep.time_limit", cfg.sweep.time_limit)
    states_of(cfg.sweep.retry)
    if not 0 < cfg.sweep.grace < math.inf:
        raise BadInput(f"sweep.grace={cfg.sweep.grace}: a positive number")
    if cfg.track.mode not in MODES:
        raise BadInput(f"track.mode={cfg.track.mode}: choices: {', '.join(MODES)}")
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", cfg.device):
        raise BadInput(f"device={cfg.device}: choices: {DEVICES}")
    if not cfg.out_dir.strip():
        raise BadInput("out_dir=: the name of a folder")
    if cfg.study is not None and (not cfg.study.strip() or Path(cfg.study).name != cfg.study):
        raise BadInput(f"study={cfg.study}: the name of one folder inside out_dir")


def _targets(given: Any) -> str | list[str] | None:
    """Words, also where Hydra read a number (`targets=0`, a layer of nn.Sequential)."""
    if isinstance(given, dict):
        raise BadInput(f"targets={given}: a role or a layer, or a list of them")
    if isinstance(given, list):
        return [str(target) for target in given]
    return None if given is None else str(given)


def restored(plain: dict[str, Any]) -> DictConfig:
    """The configuration of which `plain` is the content."""
    return OmegaConf.merge(_schema(), plain)  # type: ignore[return-value]


@cache
def _schema() -> DictConfig:
    """For merging into; a merge leaves it as it is."""
    return OmegaConf.structured(Settings)


def seconds(key: str, value: Any) -> float | None:
    """A duration; None: none.

    >>> seconds("sweep.time_limit", "1h30m")
    5400.0
    """
    if value is None:
        return None
    pieces = re.findall(r"([\d.]+)([smhd]?)", str(value))
    try:
        found = sum(float(number) * UNITS[unit] for number, unit in pieces)
    except ValueError:
        found = 0.0
    if found <= 0 or "".join(n + u for n, u in pieces) != str(value):
        raise BadInput(f"{key}={value}: {TIMES}")
    return found


def states_of(value: Any) -> list[str]:
    """`sweep.retry` as a list."""
    found: list[Any] = [value] if isinstance(value, str | int | float) else list(value or ())
    for state in found:
        if state not in AGAIN:
            raise BadInput(f"sweep.retry={state}: choices: {', '.join(AGAIN)}")
    return found


def stamp(values: Mapping[str, Any]) -> list[Any]:
    """[file, size, time] of every file that a value names, and of those in a folder so named.

    While it is the same, so are model and data.
    """
    found = []
    for value in values.values():
        path = Path(value).expanduser() if isinstance(value, str) and value else None
        if path is None or len(str(path)) > 1000 or not path.exists():
            continue
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            stat = file.stat()
            found.append([str(file.resolve()), stat.st_size, stat.st_mtime_ns])
    return found


def _refuse_unknown(node: DictConfig, prefix: str) -> None:
    """`+key=value` adds keys that nothing would read."""
    kind = OmegaConf.get_type(node)
    known = [f.name for f in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else None
    for key in node:
        if known is not None and key not in known:
            raise BadInput(f"{prefix}{key}: no such key; choices: {', '.join(known)}")
        child = node._get_node(key)
        if isinstance(child, DictConfig) and not child._is_none():
            _refuse_unknown(child, f"{prefix}{key}.")


def _task(node: Any) -> Task:
    fields = _fields(node)
    return tasks()[fields.pop("name")](**fields)


def _model(node: Any) -> Any:
    fields = _fields(node)
    return MODELS[fields["kind"]](**fields)


def _fields(node: Any) -> dict[str, Any]:
    return dict(node) if isinstance(node, dict) else dataclasses.asdict(node)


def _check_numbers(settings: Settings) -> None:
    """Numbers that cannot be, by key."""
    train, optim, ev = settings.train, settings.optim, settings.eval
    positive = {
        "rank": settings.rank,
        "optim.lr": optim.lr,
        "train.steps": train.steps,
        "train.epochs": train.epochs,
        "train.batch_size": train.batch_size,
        "train.accumulate": train.accumulate,
        "eval.batch_size": ev.batch_size,
        "eval.limit": ev.limit,
        "eval.limit_during": ev.limit_during,
        "eval.max_new_tokens": ev.max_new_tokens,
    }
    if isinstance(settings.model, Config):
        sizes = ("hidden_size", "layers", "heads", "kv_heads", "intermediate_size", "vocab_size")
        positive |= {f"model.{key}": getattr(settings.model, key) for key in sizes}
    if isinstance(settings.model, MLP):
        sizes = ("components", "hidden", "steps")
        positive |= {f"model.{key}": getattr(settings.model, key) for key in sizes}
    for key, value in positive.items():
        if value is not None and not 0 < value < math.inf:
            raise BadInput(f"{key}={value}: a positive number")
    other = {
        "optim.weight_decay": optim.weight_decay,
        "optim.clip": optim.clip,
        "optim.warmup": optim.warmup,
        "train.eval_every": train.eval_every,
        "train.checkpoint_every": train.checkpoint_every,
        "train.log_every": train.log_every,
    }
    for key, value in other.items():
        if value is not None and not 0 <= value < math.inf:
            raise BadInput(f"{key}={value}: zero or a positive number")
    for key, value in {"dropout": settings.dropout, "optim.beta1": optim.beta1,
                       "optim.beta2": optim.beta2}.items():  # fmt: skip
        if not 0 <= value < 1:
            raise BadInput(f"{key}={value}: from 0 to below 1")
    if settings.seed < 0:
        raise BadInput(f"seed={settings.seed}: zero or a positive whole number")
    if settings.targets is not None and not settings.targets:
        raise BadInput("targets: empty; name a role or a layer")
    if train.seq_len is not None and train.seq_len < 2:
        raise BadInput(f"train.seq_len={train.seq_len}: two tokens or more")
    if train.steps is not None and train.epochs is not None:
        raise BadInput("train.epochs: give train.steps or train.epochs, not both")


def fill(settings: Settings, train_items: int) -> None:
    """What was left open to the task: steps, batch, lengths, intervals."""
    train, task = settings.train, settings.task
    batch = train.batch_size or task.batch_size
    steps = train.steps or task.steps
    if train.epochs is not None:
        steps, train.epochs = max(1, math.ceil(train.epochs * train_items / batch)), None
    if batch % train.accumulate:
        raise BadInput(
            f"train.accumulate={train.accumulate}: does not divide train.batch_size={batch}"
        )
    train.batch_size, train.steps = batch, steps
    train.seq_len = train.seq_len or task.seq_len
    settings.eval.max_new_tokens = settings.eval.max_new_tokens or task.max_new_tokens
    for key, share in {"eval_every": 8, "checkpoint_every": 10, "log_every": 100}.items():
        if getattr(train, key) is None:
            setattr(train, key, max(1, steps // share))


def run_hash(settings: Settings, variant: dict[str, Any], lr: float, model: str, data: str) -> str:
    """Names the run: all settings that can change its result, and the hashes of model and data.

    `variant` is the choice with its defaults filled in. Paths do not count, contents do.
    """
    plain = dataclasses.asdict(settings)
    for key in OUTSIDE:
        del plain[key]
    for key in OUTSIDE_TRAIN:
        del plain["train"][key]
    plain["model"].pop("path", None)
    plain["model"].pop("tokenizer", None)
    plain["task"].pop("path", None)
    plain["task"]["name"] = settings.task.name
    plain |= {"variant": variant, "model_hash": model, "data_hash": data}
    plain["optim"]["lr"] = lr
    text = json.dumps(_normal(plain), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def _normal(value: Any) -> Any:
    """Numbers as one kind: 1 and 1.0 are the same setting, in every release of OmegaConf."""
    if isinstance(value, dict):
        return {str(k): _normal(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_normal(v) for v in value]
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    return repr(float(value))
