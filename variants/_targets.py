"""Which layers a variant adapts: roles (`all-linear`, `attention`, `mlp`, `q`, ...) or names."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import nn

from ._experts import experts
from ._kinds import (
    Conv1DKind,
    Conv2dKind,
    EmbeddingKind,
    ExpertKind,
    Kind,
    NormKind,
    kind_of,
    shape_of,
)
from ._registry import Incompatible

# The names that model families of transformers give to each role; two components where one name
# alone is ambiguous (BERT calls three layers `dense`). The first role that fits wins.
ROLES = {
    "q": ("q_proj", "query", "query_proj", "q_lin", "q"),
    "k": ("k_proj", "key", "key_proj", "k_lin", "k"),
    "v": ("v_proj", "value", "value_proj", "v_lin", "v"),
    "o": (
        "o_proj",
        "out_proj",
        "out_lin",
        "o",
        "attention.output.dense",
        "attention.dense",
        "attn.c_proj",
    ),
    "gate": ("gate_proj", "wi_0"),
    "up": ("up_proj", "fc1", "wi", "wi_1", "lin1", "c_fc", "intermediate.dense", "dense_h_to_4h"),
    "down": ("down_proj", "fc2", "wo", "lin2", "mlp.c_proj", "output.dense", "dense_4h_to_h"),
}
# Layers whose output rows are several roles side by side: q as wide as its heads, k and v as
# wide as theirs, all else in equal shares.
FUSED = {
    "c_attn": ("q", "k", "v"),
    "qkv_proj": ("q", "k", "v"),
    "gate_up_proj": ("gate", "up"),
}
GROUPS = {
    "attention": ("q", "k", "v", "o"),
    "mlp": ("gate", "up", "down"),
}
# Roles by the kind of the layer.
OTHERS = {
    "embeddings": EmbeddingKind,
    "convolutions": Conv2dKind,
    "norms": NormKind,
    "experts": ExpertKind,
}
# Modules that are, or hold, an output head; `get_output_embeddings` of the model adds its own.
HEADS = ("lm_head", "score", "classifier", "qa_outputs", "embed_out", "cls")


@dataclass(frozen=True)
class Site:
    """One matrix to adapt: a whole layer, or the rows of one role of a fused layer."""

    path: str
    role: str | None = None  # of a fused layer
    rows: tuple[int, int] | None = None  # first, and one past the last

    @property
    def name(self) -> str:
        return self.path if self.role is None else f"{self.path}.{self.role}"


@cache
def role_of(path: str) -> str | None:
    """The role of the layer at `path`, or None."""
    for role, names in ROLES.items():
        if any(_ends(path, name) for name in names):
            return role
    return None


def _ends(path: str, name: str) -> bool:
    stem = _stem(path)
    return path == name or path.endswith("." + name) or stem.endswith("." + name)


def _stem(path: str) -> str:
    """The path without the number of an expert."""
    front, _, last = path.rpartition(".")
    return front if last.isdigit() else path


def all_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every layer of a kind that can be adapted, by path, the output head included."""
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        if kind_of(module):
            found[path] = module
        else:
            found |= {f"{path}.{name}": expert for name, expert in experts(module)}
    return found


def all_linear(model: nn.Module, layers: Mapping[str, nn.Module] | None = None) -> list[str]:
    """Every linear layer but the output head, experts' matrices included: what the base axis
    stores. `layers`: all of the model's, where they are at hand."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    kinds = (Kind, Conv1DKind, ExpertKind)
    return [path for path, module in (layers or all_layers(model)).items()
            if kind_of(module) in kinds and module is not head
            and not any(part in HEADS for part in path.split("."))]  # fmt: skip


def resolve(
    model: nn.Module, targets: str | Sequence[str], layers: dict[str, nn.Module] | None = None
) -> list[Site]:
    """The matrices that `targets` means, in the model's order.

    A target is a role, a group of roles, `all-linear`, or the (end of the) path of a layer;
    several come as a list or with commas. One that matches nothing is refused.
    `layers`: all of the model's, where they are at hand.
    """
    words = targets.split(",") if isinstance(targets, str) else list(targets)
    layers = layers or all_layers(model)
    body = all_linear(model, layers)
    found: dict[Site, None] = {}
    for word in (str(w).strip() for w in words):
        sites = list(_match(model, word, body, layers))
        if not sites:
            raise _nothing(word, layers)
        found |= dict.fromkeys(sites)
    order = {path: i for i, path in enumerate(layers)}
    whole = {site.path for site in found if site.role is None}
    sites = [s for s in found if s.role is None or s.path not in whole]
    sites.sort(key=lambda s: (order[s.path], s.rows or (0, 0)))
    _refuse_shared(model, {site.path: layers[site.path] for site in sites})
    return sites


def _match(
    model: nn.Module, word: str, body: list[str], layers: dict[str, nn.Module]
) -> Iterator[Site]:
    if word == "all-linear":
        yield from map(Site, body)
        return
    if word in OTHERS:
        yield from (Site(path) for path, m in layers.items() if kind_of(m) is OTHERS[word])
        return
    roles = GROUPS.get(word, (word,) if word in ROLES else ())
    for path in body:
        parts = FUSED.get(_stem(path).rpartition(".")[2], ())
        if role_of(path) in roles or (parts and set(parts) <= set(roles)):
            yield Site(path)
        elif roles and parts:
            begin = 0
            for part, rows in zip(parts, _shares(model, parts, layers[path]), strict=True):
                if part in roles:
                    yield Site(path, part, (begin, begin + rows))
                begin += rows
    if not roles:
        yield from (Site(path) for path in layers if _ends(path, word))


def _shares(model: nn.Module, parts: tuple[str, ...], module: nn.Module) -> list[int]:
    """The output rows of each part of a fused layer."""
    m, _ = shape_of(module)
    heads = dict.fromkeys(parts, 1)
    config: Any = getattr(model, "config", None)
    config = getattr(config, "get_text_config", lambda: config)()
    if parts[0] == "q" and getattr(config, "num_key_value_heads", None):
        heads |= {"q": config.num_attention_heads, "k": config.num_key_value_heads,
                  "v": config.num_key_value_heads}  # fmt: skip
    unit, rest = divmod(m, sum(heads.values()))
    if rest:
        raise Incompatible(f"targets: {m} rows are no multiple of the heads {heads}")
    return [unit * heads[part] for part in parts]


def _nothing(word: str, layers: dict[str, nn.Module]) -> Incompatible:
    return Incompatible(
        f"targets={word}: matches no layer; roles: all-linear, "
        f"{', '.join((*GROUPS, *ROLES, *OTHERS))}; "
        f"layers of this model: {leaves(layers)}"
    )


def leaves(paths: Iterable[str]) -> str:
    """The last names of these layers, each once."""
    names = (_stem(path).rpartition(".")[2] or path for path in paths)
    return ", ".join(dict.fromkeys(names)) or "none"


def _refuse_shared(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """A layer or a weight that stands at a second place, where it would stay as it was."""
    modules: dict[int, list[str]] = {}
    weights: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        modules.setdefault(id(module), []).append(path)
        weight = module._parameters.get("weight")
        if weight is not None:
            weights.setdefault(id(weight), []).append(path)
    for path, module in layers.items():
        for other in modules.get(id(module), ()):
            if other != path:
                raise Incompatible(
                    f"targets={path}: the same layer stands at {other} too, "
                    f"and would stay as it was"
                )
        for other in weights.get(id(module._parameters.get("weight")), ()):
            if other != path:
                raise Incompatible(
                    f"targets={path}: its weight is tied to {other}, which would change with it; "
                    f"untie them (tie_word_embeddings=False) or leave it out"
                )
