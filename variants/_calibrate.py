"""Statistics of calibration batches, for parts that look at the model before training.

One pass serves every part that asks. Raw activations are never kept: what a batch adds is summed
at once, and what a layer's statistics are reduced to (`reduce`) takes their place before the next
group of layers is measured. A group is as many layers as fit into `HELD` bytes; what came of it
lies in a cache, under the model's and the batches' content.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ._api import Measuring, wide
from ._kinds import kind_of, matrix_of
from ._registry import Incompatible

if TYPE_CHECKING:
    from ._adapter import Choice, Planned

HELD = 4 * 2**30  # bytes of statistics at a time
Found = dict[str, dict[str, Tensor]]  # by layer, by statistic


def calibrate(
    model: nn.Module,
    choice: "Choice",
    planned: "Sequence[Planned]",
    calibration: Iterable[Mapping[str, Any]],
) -> tuple[Found, Found]:
    """(what the init, what the allocation kept) of each planned matrix.

    Raises:
        Incompatible: no batch, a loss that is missing, or statistics that are not finite.
    """
    count = max((getattr(p, "batches", 0) for p in (choice.init, choice.allocation)), default=0)
    batches = []
    for batch in calibration:
        batches.append(batch)
        if len(batches) == count:
            break
    if not batches:
        raise Incompatible("calibration: no batches in it")
    parts: tuple[Measuring, Measuring] = (choice.init, choice.allocation)
    wanted = tuple(dict.fromkeys((*choice.init.needs, *choice.allocation.needs)))
    path = _cache_file(model, planned, batches, wanted, parts)
    kept = _read(path)
    if kept is None:
        kept = ({}, {})
        for group in _groups(planned, wanted):
            for item, found in _measure(model, group, batches, wanted):
                W0 = _matrix(model, item)
                for part, into in zip(parts, kept, strict=True):
                    if part.needs:
                        own = {k: found[k] for k in part.needs}
                        into[item.site.name] = dict(part.reduce(W0, own, item.rank))
        _write(path, kept)
    return kept


def _matrix(model: nn.Module, item: "Planned") -> Tensor:
    W = matrix_of(model.get_submodule(item.site.path))
    W = W if item.site.rows is None else W[slice(*item.site.rows)]
    return W.detach().to(wide(W.dtype))


def _groups(planned: "Sequence[Planned]", wanted: tuple[str, ...]) -> Iterator[list["Planned"]]:
    group: list[Planned] = []
    held = 0
    for item in planned:
        m, n = item.shape
        own = 4 * (n * n * ("covariance" in wanted) + m * n * ("gradient" in wanted))
        if group and held + own > HELD:
            yield group
            group, held = [], 0
        group.append(item)
        held += own
    yield group


def _measure(
    model: nn.Module,
    group: "Sequence[Planned]",
    batches: Sequence[Mapping[str, Any]],
    wanted: tuple[str, ...],
) -> Iterator[tuple["Planned", dict[str, Tensor]]]:
    """One pass over the batches; then each layer's means, freed as they are taken."""
    by_path: dict[str, list[Planned]] = {}
    for item in group:
        by_path.setdefault(item.site.path, []).append(item)
    sums: dict[str, dict[str, Tensor]] = {path: {} for path in by_path}
    rows = dict.fromkeys(by_path, 0)
    with _watched(model, by_path, wanted, sums, rows) as mask:
        for batch in batches:
            mask["of"] = batch.get("attention_mask")
            with torch.set_grad_enabled("gradient" in wanted):
                out = model(**batch)
            if "gradient" in wanted:
                _loss(out).backward()
                for path in by_path:
                    _add_gradient(model.get_submodule(path), sums[path])
    for path, items in by_path.items():
        means = {
            k: t / (rows[path] if k == "covariance" else len(batches))
            for k, t in sums.pop(path).items()
        }
        for k in wanted:
            if k not in means or not torch.isfinite(means[k]).all():
                what = "not finite" if k in means else "missing: nothing reached the layer"
                raise Incompatible(f"calibration: the {k} of {path} is {what}")
        for item in items:
            own = dict(means)
            if item.site.rows is not None and "gradient" in own:
                own["gradient"] = own["gradient"][slice(*item.site.rows)]
            yield item, own


@contextmanager
def _watched(
    model: nn.Module,
    paths: Iterable[str],
    wanted: tuple[str, ...],
    sums: dict[str, dict[str, Tensor]],
    rows: dict[str, int],
) -> Iterator[dict[str, Any]]:
    """The model in eval mode, only the watched weights asking for gradients; then as before."""
    modules = {path: model.get_submodule(path) for path in paths}
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    training = [(m, m.training) for m in model.modules()]
    mask: dict[str, Any] = {"of": None}
    hooks = []
    model.eval()
    model.requires_grad_(False)
    for path, module in modules.items():
        if "gradient" in wanted:
            module.weight.requires_grad_(True)  # type: ignore[union-attr]
            module.weight.grad = None  # type: ignore[union-attr]
        if "covariance" in wanted:

            def add(module: nn.Module, args: Any, path: str = path) -> None:
                x = _tokens(module, args[0].detach(), mask["of"])
                x = x.to(wide(x.dtype))
                total = sums[path].setdefault("covariance", x.new_zeros(x.shape[1], x.shape[1]))
                total.addmm_(x.mT, x)
                rows[path] += x.shape[0]

            hooks.append(module.register_forward_pre_hook(add))
    try:
        yield mask
    finally:
        for hook in hooks:
            hook.remove()
        for p, asked, grad in before:
            p.requires_grad_(asked)
            p.grad = grad
        for module, was in training:
            module.training = was


def _tokens(module: nn.Module, x: Tensor, mask: Any) -> Tensor:
    """The inputs [tokens, n] that W multiplies, without padding."""
    x = kind_of(module)(module).inputs(x)
    if mask is not None and x.ndim == 3 and tuple(mask.shape) == tuple(x.shape[:2]):
        return x[mask.to(x.device).bool()]
    return x.reshape(-1, x.shape[-1])


def _add_gradient(module: Any, sums: dict[str, Tensor]) -> None:
    grad, module.weight.grad = module.weight.grad, None
    if grad is None:
        return
    G = kind_of(module)(module).to_matrix(grad).to(wide(grad.dtype))
    sums["gradient"] = sums["gradient"] + G if "gradient" in sums else G.clone()


def _loss(out: Any) -> Tensor:
    loss = out.get("loss") if isinstance(out, dict) else getattr(out, "loss", None)
    if loss is None and isinstance(out, Tensor) and out.ndim == 0:
        loss = out
    if loss is None:
        raise Incompatible("calibration: the model gave no loss; put labels into the batches")
    return loss


def _cache_file(
    model: nn.Module,
    planned: "Sequence[Planned]",
    batches: Sequence[Mapping[str, Any]],
    wanted: tuple[str, ...],
    parts: tuple[Measuring, Measuring],
) -> Path:
    """Named by all that the statistics depend on."""
    what = [(i.site.name, i.shape, i.rank) for i in planned]
    digest = hashlib.sha256(f"{what} {wanted} {parts}".encode())
    for name, p in model.named_parameters():
        digest.update(name.encode())
        flat = p.detach().reshape(-1)
        step = max(1, flat.numel() // 4096)
        digest.update(flat[::step].float().cpu().contiguous().view(torch.uint8).numpy().data)
        digest.update(f"{flat.double().sum().item():.17g}".encode())
    for batch in batches:
        for name, value in sorted(batch.items()):
            digest.update(name.encode())
            if isinstance(value, Tensor):
                digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().data)
            else:
                digest.update(repr(value).encode())
    root = os.environ.get("LORA_CACHE") or Path.home() / ".cache" / "lora-variants-lab"
    return Path(root) / "statistics" / f"{digest.hexdigest()}.safetensors"


def _write(path: Path, kept: tuple[Found, Found]) -> None:
    from ._io import write_tensors

    flat = {
        f"{i}|{name}|{k}": t
        for i, found in enumerate(kept)
        for name, own in found.items()
        for k, t in own.items()
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(path, flat)
    except OSError:
        return  # a cache that cannot be written costs time, no more


def _read(path: Path) -> tuple[Found, Found] | None:
    from safetensors.torch import load_file

    if not path.exists():
        return None
    kept: tuple[Found, Found] = ({}, {})
    try:
        flat = load_file(path)
    except Exception:  # cut short or not ours: measured again, and replaced
        path.unlink(missing_ok=True)
        return None
    for key, t in flat.items():
        i, name, k = key.split("|")
        kept[int(i)].setdefault(name, {})[k] = t
    return kept
