"""Hugging Face PEFT's format, in and out, for the methods that both have.

Keys: `base_model.model.` + path + `.lora_A.weight` and so on. What PEFT cannot say is refused.
"""

import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ._adapter import Adapter, build, choose, planned_item
from ._io import read_settings, read_tensors, write_atomically, write_tensors
from ._kinds import Conv1DKind, matrix_of
from ._layer import Adapted
from ._registry import Incompatible
from ._svd import exact
from ._targets import Site, all_layers, resolve

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
# Settings of PEFT's LoRA that change the maths and that no variant here has: refused when set.
UNSUPPORTED = (
    "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "lora_bias",
    "megatron_config", "monteclora_config", "target_parameters", "trainable_token_indices",
    "use_bdlora", "use_qalora", "velora_config",
)  # fmt: skip
READ = re.compile(r"\.lora_([AB](\.weight)?|E|magnitude_vector)$")
# Inits that move the base and cannot be repeated exactly from the base alone.
UNREPEATABLE = ("pissa_niter_", "olora", "corda", "lora_ga", "loftq")


def save_peft(adapter: Adapter, path: Path) -> Path:
    """Writes the adapter as PEFT would. An init that moved the base doubles the rank: the export
    is A = [A; A0], B = [B, -B0] on the untouched base."""
    fused = [name for name, site in adapter.sites.items() if site.rows is not None]
    if fused:
        raise Incompatible(f"PEFT's format has no place for a slice of a fused layer: {fused[0]}")
    form = adapter.choice.form.name
    if form not in ("lora", "dora", "triplet"):
        raise Incompatible(f"PEFT's format has no place for form {form}: it takes lora, dora and "
                           f"triplet here; export it merged instead")  # fmt: skip
    moved = any(layer.subtracted is not None for layer in adapter.layers.values())
    base = adapter.choice.base
    if base.lossy and moved:
        raise Incompatible(
            f"PEFT's format cannot say that {adapter.choice.init} moved the weight before base "
            f"{base.name} stored it; export it merged or native"
        )
    if base.lossy:
        warnings.warn(
            f"the adapter was trained on base {base.name}: on weights stored otherwise its outputs "
            f"differ by that storage's error",
            stacklevel=3,
        )
    if form == "triplet" and not moved:
        config, tensors = _adalora(adapter)
    else:
        config, tensors = _lora(adapter)
    for name, module in adapter.saved_modules.items():
        tensors |= {f"{PREFIX}{name}.{k}": t for k, t in module.copy.state_dict().items()}
    model_config = getattr(adapter.model, "config", None)
    config |= {
        "auto_mapping": None,
        "base_model_name_or_path": getattr(model_config, "name_or_path", None),
        "bias": "none",
        "fan_in_fan_out": any(
            isinstance(layer.kind, Conv1DKind) for layer in adapter.layers.values()
        ),
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_dropout": adapter.dropout,
        "modules_to_save": list(adapter.saved_modules) or None,
        "target_modules": _target_modules(adapter),
        "task_type": _task_type(adapter.model),
    }
    path.mkdir(parents=True, exist_ok=True)
    write_tensors(path / WEIGHTS, tensors)
    write_atomically(path / CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")
    return path


def _target_modules(adapter: Adapter) -> list[str] | str:
    """The adapted paths; as one expression where PEFT would take the end of another path too."""
    own = set(adapter.layers)
    if any(path.endswith(f".{name}") and path not in own
           for path, _ in adapter.model.named_modules() for name in own):  # fmt: skip
        return "|".join(map(re.escape, sorted(own)))
    return sorted(own)


def _task_type(model: nn.Module) -> str | None:
    name = type(model).__name__
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return "CAUSAL_LM"
    return "SEQ_CLS" if name.endswith("ForSequenceClassification") else None


def _factors(layer: Adapted) -> tuple[Tensor, Tensor, float]:
    """(A, B, s) of W = W_original + s B A, whatever low-rank form and init the layer has."""
    p = layer.params
    A, B = (p["Q"], p["P"] * p["E"]) if "E" in p else (p["A"], p["B"])
    if layer.subtracted is not None:
        A0, B0 = layer.subtracted
        A, B = _balanced(torch.cat([A, A0]), torch.cat([B, -B0 / layer.full_s], dim=1))
    return A.detach(), B.detach(), layer.full_s


def _balanced(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of the same rank and product, as small as they can be: what was trained is the
    small difference of two large parts, which fp32 products would each round."""
    left, right = torch.linalg.qr(B.double()), torch.linalg.qr(A.double().mT)
    U, S, Vh = torch.linalg.svd(left.R @ right.R.mT)
    root = S.sqrt()
    return (root[:, None] * Vh @ right.Q.mT).to(A), (left.Q @ U * root).to(B)


def _lora(adapter: Adapter) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """alpha = s r for each layer, so that PEFT's alpha / r is the s that was trained."""
    tensors, ranks, alphas = {}, {}, {}
    for name, layer in adapter.layers.items():
        A, B, s = _factors(layer)
        tensors[f"{PREFIX}{name}.lora_A.weight"] = A
        tensors[f"{PREFIX}{name}.lora_B.weight"] = B
        if adapter.choice.form.name == "dora":
            tensors[f"{PREFIX}{name}.lora_magnitude_vector"] = layer.params["m"]
        ranks[name], alphas[name] = A.shape[0], s * A.shape[0]
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        # whole paths: PEFT takes a key for the end of any path that it fits
        "rank_pattern": {f"^{re.escape(k)}": r for k, r in ranks.items() if r != rank},
        "alpha_pattern": {f"^{re.escape(k)}": a for k, a in alphas.items() if a != alpha},
        "use_dora": adapter.choice.form.name == "dora",
        "use_rslora": False,
    }
    return config, tensors


def _adalora(adapter: Adapter) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """All triplets, the pruned ones with E = 0. PEFT divides alpha by (init_r + 1e-5)."""
    tensors = {}
    ranks = {layer.rank for layer in adapter.layers.values()}
    scales = {layer.full_s for layer in adapter.layers.values()}
    if len(ranks) > 1 or len(scales) > 1:
        raise Incompatible("PEFT's AdaLoRA has one initial rank and one alpha for all layers")
    for name, layer in adapter.layers.items():
        tensors[f"{PREFIX}{name}.lora_A"] = layer.params["Q"]
        tensors[f"{PREFIX}{name}.lora_E"] = layer.params["E"][:, None]
        tensors[f"{PREFIX}{name}.lora_B"] = layer.params["P"]
    rank = ranks.pop()
    config = {
        "peft_type": "ADALORA",
        "r": rank,
        "init_r": rank,
        "target_r": rank,
        "lora_alpha": scales.pop() * (rank + 1e-5),
        "rank_pattern": None,
        "total_step": max(1, adapter.step),
    }
    return config, tensors


def load_peft(model: nn.Module, path: str | Path, *, trainable: bool = True) -> Adapter:
    """Puts an adapter in PEFT's format into `model`.

    Raises:
        Incompatible: a method or a setting that has no equal here, a missing or truncated file.
    """
    path = Path(path)
    config, tensors = read_settings(path / CONFIG), read_tensors(path / WEIGHTS)
    kind = config.get("peft_type")
    if kind not in ("LORA", "ADALORA"):
        raise Incompatible(f"{path}: peft_type {kind} is not read; choices: LORA, ADALORA")
    for key in UNSUPPORTED:
        if config.get(key):
            raise Incompatible(f"{path}: {key}={config[key]} has no equal here")
    if config.get("bias", "none") != "none":
        raise Incompatible(f"{path}: bias={config['bias']}: trained biases are not read")
    init = str(config.get("init_lora_weights", True)).lower()
    if init.startswith(UNREPEATABLE):
        raise Incompatible(
            f"{path}: init_lora_weights={init} moved the base in a way that its files do not say; "
            f"save it with path_initial_model_for_weight_conversion"
        )
    modules = _saved_modules(tensors, config)
    _refuse_unread(model, path, tensors, modules)
    if kind == "ADALORA":
        return _read_adalora(model, config, tensors, modules, trainable)
    return _read_lora(model, config, tensors, modules, trainable, repeat_pissa=init == "pissa")


def _saved_modules(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """{"modules.<path>.<tensor>": ...} of modules_to_save, whose keys carry no mark in PEFT."""
    names = config.get("modules_to_save") or []
    found = {}
    for key, tensor in tensors.items():
        path = key.removeprefix(PREFIX)
        if ".lora_" not in path and any(re.search(rf"(^|\.){re.escape(n)}\.", path) for n in names):
            found[f"modules.{path}"] = tensor
    return found


def _refuse_unread(
    model: nn.Module, path: Path, tensors: Mapping[str, Tensor], modules: Mapping[str, Tensor]
) -> None:
    """Every tensor is read, or is the model's own number for number (PEFT saves embeddings)."""
    own = model.state_dict()
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        if READ.search(name) or f"modules.{name}" in modules:
            continue
        mine = own.get(name.replace(".base_layer.", "."))
        if mine is None or mine.shape != tensor.shape or not torch.equal(mine.cpu(), tensor):
            raise Incompatible(f"{path}: the tensor {key} has no equal here")


def _pattern(path: str, patterns: Mapping[str, Any] | None, default: Any) -> Any:
    """PEFT's rule: keys are regular expressions on the end of the path, the first match wins."""
    for key, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({key})$", path):
            return value
    return default


def _read_lora(
    model: nn.Module,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    modules: dict[str, Tensor],
    trainable: bool,
    repeat_pissa: bool,
) -> Adapter:
    use_dora, use_rslora = bool(config.get("use_dora")), bool(config.get("use_rslora"))
    own: dict[str, Tensor] = dict(modules)
    ranks, alphas = {}, {}
    for key, A in tensors.items():
        if not key.endswith(".lora_A.weight"):
            continue
        name = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        stem = key.removesuffix("lora_A.weight")
        own[f"{name}.A"], own[f"{name}.B"] = A, tensors[f"{stem}lora_B.weight"]
        if use_dora:
            own[f"{name}.m"] = tensors[f"{stem}lora_magnitude_vector"]
        ranks[name] = A.shape[0]
        alphas[name] = _pattern(name, config.get("alpha_pattern"), config["lora_alpha"])
    choice = choose(
        "dora" if use_dora else "lora",
        rank=config["r"],
        alpha=config["lora_alpha"],
        scale="rslora" if use_rslora else "standard",
    )
    scales = {name: choice.scale.value(alphas[name], ranks[name]) for name in ranks}
    if repeat_pissa:
        own |= _repeated_pissa(model, ranks, scales)
    return _built(model, choice, ranks, scales, own, config, trainable)


def _repeated_pissa(
    model: nn.Module, ranks: Mapping[str, int], scales: Mapping[str, float]
) -> dict[str, Tensor]:
    """PEFT's raw PiSSA files leave the residual out and repeat the exact SVD; so does this."""
    found, layers = {}, all_layers(model)
    for name, r in ranks.items():
        W = matrix_of(layers[name]).detach().float()
        U, S, Vh = exact(W, r)
        root = (S / scales[name]).sqrt()
        found[f"{name}.subtracted.A"] = root[:, None] * Vh
        found[f"{name}.subtracted.B"] = scales[name] * U * root
    return found


def _read_adalora(
    model: nn.Module,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    modules: dict[str, Tensor],
    trainable: bool,
) -> Adapter:
    own: dict[str, Tensor] = dict(modules)
    ranks = {}
    for key, Q in tensors.items():
        if not key.endswith(".lora_A"):
            continue
        name, stem = key.removeprefix(PREFIX).removesuffix(".lora_A"), key.removesuffix("lora_A")
        own[f"{name}.Q"], own[f"{name}.P"] = Q, tensors[f"{stem}lora_B"]
        own[f"{name}.E"] = tensors[f"{stem}lora_E"].view(-1)
        ranks[name] = Q.shape[0]
    init_r, alpha = config["init_r"], config["lora_alpha"]
    choice = choose("adalora", rank=init_r, alpha=alpha if alpha > 0 else init_r)
    scales = {name: choice.s(init_r) for name in ranks}
    return _built(model, choice, ranks, scales, own, config, trainable)


def _built(
    model: nn.Module,
    choice: Any,
    ranks: Mapping[str, int],
    scales: Mapping[str, float],
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    trainable: bool,
) -> Adapter:
    layers, planned = all_layers(model), []
    if not ranks:
        raise Incompatible("the PEFT adapter has no layer that is read here")
    for name, r in ranks.items():
        if name not in layers:
            resolve(model, [name])  # names what the model has instead
        m, n = matrix_of(layers[name]).shape
        planned.append(planned_item(choice, Site(name), (m, n), r, scales[name]))
    names = config.get("modules_to_save") or []
    saved = [
        path
        for path, _ in model.named_modules()
        if any(_is(path, name) for name in names)
        and any(key.startswith(f"modules.{path}.") for key in tensors)
    ]
    adapter = build(
        model,
        choice,
        planned,
        targets=sorted(ranks),
        dropout=config.get("lora_dropout") or 0.0,
        seed=0,
        modules_to_save=tuple(saved),
        tensors=tensors,
    )
    if not trainable:
        for tensor in adapter.parameters():
            tensor.requires_grad_(False)
    return adapter


def _is(path: str, name: str) -> bool:
    return path == name or path.endswith("." + name)
