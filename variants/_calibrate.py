"""Statistics of calibration batches, for parts that look at the model before training.

One pass serves every part that asks for as many batches. Raw activations are never kept: what a
batch adds is summed at once, and what a layer's statistics are reduced to (`reduce`) takes their
place before the next group of layers is measured. A group is as many layers as fit into `HELD`
bytes; what came of it lies in a cache, under the content of the model, of the batches and of the
code that reduced it.

The model is measured in eval mode: no dropout, so that equal batches give equal statistics.

Means over tokens that are no padding, or over batches; a layer that is stored transposed and
fused gets its own rows; the model's own gradients stay, and its dropout does not act:

>>> from transformers.pytorch_utils import Conv1D
>>> from ._adapter import choose, plan
>>> class Net(nn.Module):
...     def __init__(self):
...         super().__init__()
...         self.c_attn, self.drop = Conv1D(6, 3), nn.Dropout(0.5)
...     def forward(self, x, attention_mask):
...         return {"loss": self.c_attn(self.drop(x)).square().sum() / 2}
>>> g, net, mask = torch.Generator().manual_seed(0), Net(), torch.tensor([[1, 1], [1, 0]])
>>> batches = [{"x": torch.randn(2, 2, 3, generator=g), "attention_mask": mask} for _ in range(2)]
>>> net.c_attn.weight.grad = torch.ones(3, 6)
>>> planned = plan(net, choose("lora", 1), "v")
>>> ((item, found),) = _measure(net, planned, batches, STATISTICS)
>>> x = torch.cat([batch["x"].flatten(0, 1) for batch in batches])
>>> wanted = (net.c_attn(x).T @ x / 2)[4:]
>>> torch.allclose(found["gradient"], wanted, atol=1e-5), bool((net.c_attn.weight.grad == 1).all())
(True, True)
>>> real = x[[0, 1, 2, 4, 5, 6]]
>>> torch.allclose(found["covariance"], real.T @ real / 6)
True
>>> torch.allclose(found["mean"], real.mean(0))
True
>>> samples = [s / s.max().abs() for s in (real[:2], real[2:3], real[3:5], real[5:])]
>>> torch.allclose(found["scaled_covariance"], sum(s.T @ s for s in samples) / 4)
True

The model is left as it was, and no more batches are drawn than the part takes:

>>> drawn, choice = iter(batches * 2), choose("lora", 1, init={"name": "eva", "batches": 2})
>>> _ = calibrate(net.train(), choice, planned, drawn, {"c_attn": choice.base})
>>> len(list(drawn)), net.drop.training, all(p.requires_grad for p in net.parameters())
(2, True, True)
"""

import hashlib
import inspect
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import _quantize, _svd
from ._api import Allocation, Base, Init, Measuring, wide
from ._experts import apart
from ._kinds import Keeper, kind_of, matrix_of
from ._registry import Incompatible

if TYPE_CHECKING:
    from ._adapter import Choice, Planned

HELD = 4 * 2**30  # bytes of statistics at a time
CACHED_FROM = 2**22  # numbers in the model: below, measuring is cheaper than the file
CACHED_TO = 2 * 2**30  # bytes that were kept: above, the file is not worth its place
BATCHES = 8  # for a part that does not say how many it takes
INPUTS = ("covariance", "mean", "scaled_covariance")
STATISTICS = (*INPUTS, "gradient")
Found = dict[str, dict[str, Tensor]]  # by layer, by statistic


def calibrate(
    model: nn.Module,
    choice: "Choice",
    planned: "Sequence[Planned]",
    calibration: Iterable[Mapping[str, Any]],
    bases: Mapping[str, Base],
) -> tuple[Found, Found]:
    """(what the init, what the allocation kept) of each planned matrix.

    Each part sees as many batches as it asks for; where there are fewer, those that there are.
    `bases` says by path how each layer will be stored.

    Raises:
        Incompatible: no batch, a loss that is missing, or statistics that are not finite.
    """
    parts = (choice.init, choice.allocation)
    wanted = tuple(dict.fromkeys((*choice.init.needs, *choice.allocation.needs)))
    unknown = [k for k in wanted if k not in STATISTICS]
    if unknown:
        raise Incompatible(f"needs={unknown[0]}: no such statistic; choices: {STATISTICS}")
    batches = []
    counts = [getattr(part, "batches", BATCHES) if part.needs else 0 for part in parts]
    for batch in calibration:
        if not isinstance(batch, Mapping):
            raise Incompatible(
                f"calibration: a batch is a mapping, passed as model(**batch), not a "
                f"{type(batch).__name__}"
            )
        batches.append(batch)
        if len(batches) >= max(counts):
            break
    if not batches:
        raise Incompatible("calibration: no batches in it")
    with apart(model, [item.site.path for item in planned]):
        return _calibrated(model, planned, batches, counts, parts, bases)


def statistics(
    model: nn.Module,
    planned: "Sequence[Planned]",
    batches: Sequence[Mapping[str, Any]],
    wanted: tuple[str, ...],
) -> Iterator[tuple["Planned", dict[str, Tensor]]]:
    """The statistics of each planned matrix, one after the other, as a part's `reduce` has them."""
    with apart(model, [item.site.path for item in planned]):
        for group in _groups(planned, wanted):
            yield from _measure(model, group, batches, wanted)


def _calibrated(
    model: nn.Module,
    planned: "Sequence[Planned]",
    batches: Sequence[Mapping[str, Any]],
    counts: Sequence[int],
    parts: tuple[Init, Allocation],
    bases: Mapping[str, Base],
) -> tuple[Found, Found]:
    wanted = tuple(dict.fromkeys(k for part in parts for k in part.needs))
    for item in planned:
        module = model.get_submodule(item.site.path)
        for part in parts:
            inputs = [k for k in part.needs if k in INPUTS]
            if "gradient" in part.needs and isinstance(module, Keeper):
                raise Incompatible(
                    f"{part} needs the gradient of each weight, and {item.site.name} was loaded in "
                    f"codes, which have none"
                )
            if inputs and not kind_of(module)(module).measured:
                raise Incompatible(
                    f"{part} needs the {inputs[0]} of each layer's inputs, "
                    f"and those of {item.site.name} cannot be measured"
                )
    ranks = [parts[1].most(*item.shape, item.rank) for item in planned]
    own = {i.site.path: bases[i.site.path] for i in planned} if parts[0].joint else {}
    path = _cache_file(model, planned, ranks, batches, wanted, parts, own)
    kept = None if path is None else _read(path, model, planned)
    if kept is None:
        kept = ({}, {})
        most = {item.site.name: r for item, r in zip(planned, ranks, strict=True)}
        passes: dict[int, list[tuple[Measuring, Found]]] = {}
        for part, count, into in zip(parts, counts, kept, strict=True):
            if part.needs:
                passes.setdefault(min(count, len(batches)), []).append((part, into))
        for group in _groups(planned, wanted):
            for count, takers in passes.items():
                asked = tuple(dict.fromkeys(k for part, _ in takers for k in part.needs))
                for item, found in _measure(model, group, batches[:count], asked):
                    (W, W0), name = _matrix(model, item), item.site.name
                    stored = bases[item.site.path].storing(W.dtype)
                    for part, into in takers:
                        own = {k: found[k] for k in part.needs}
                        if isinstance(part, Init):
                            reduced = part.reduce_on(stored, W0, own, most[name])
                        else:
                            reduced = part.reduce(W0, own, item.rank)
                        # contiguous, as from the file
                        into[name] = {k: t.contiguous() for k, t in reduced.items()}
        if path is not None:
            _write(path, kept)
    return kept


def _matrix(model: nn.Module, item: "Planned") -> tuple[Tensor, Tensor]:
    """The matrix in the model's dtype, and in fp32 or wider."""
    W = matrix_of(model.get_submodule(item.site.path))
    W = W if item.site.rows is None else W[slice(*item.site.rows)]
    return W.detach(), W.detach().to(wide(W.dtype))


def _groups(planned: "Sequence[Planned]", wanted: tuple[str, ...]) -> Iterator[list["Planned"]]:
    group: list[Planned] = []
    held = 0
    for item in planned:
        m, n = item.shape
        squares = ("covariance" in wanted) + ("scaled_covariance" in wanted)
        own = 4 * (n * n * squares + n * ("mean" in wanted) + m * n * ("gradient" in wanted))
        if group and held + own > HELD:
            yield group
            group, held = [], 0
        group.append(item)
        held += own
    yield group


class _Sums:
    """Of one layer: the sum of each statistic, and over how many it goes."""

    def __init__(self) -> None:
        self.totals: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def add(self, name: str, value: Tensor, count: int) -> None:
        if name in self.totals:
            self.totals[name] += value
        else:
            self.totals[name] = value
        self.counts[name] = self.counts.get(name, 0) + count

    def add_inputs(self, samples: Sequence[Tensor], wanted: Sequence[str]) -> None:
        """What the samples [tokens, n] of one forward add."""
        x = torch.cat(list(samples))
        if "covariance" in wanted:
            self.add("covariance", x.mT @ x, len(x))
        if "mean" in wanted:
            self.add("mean", x.sum(0), len(x))
        for sample in samples if "scaled_covariance" in wanted else ():
            scaled = sample / sample.max().abs()
            self.add("scaled_covariance", scaled.mT @ scaled, 1)

    def means(self) -> dict[str, Tensor]:
        return {k: t / self.counts[k] for k, t in self.totals.items()}


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
    sums = {path: _Sums() for path in by_path}
    with _watched(model, sums, wanted) as mask:
        for batch in batches:
            mask["of"] = batch.get("attention_mask")
            mask["decoder"] = batch.get("decoder_attention_mask")
            with torch.set_grad_enabled("gradient" in wanted):
                out = model(**batch)
            if "gradient" in wanted:
                _loss(out).backward()
                for path in by_path:
                    _add_gradient(model.get_submodule(path), sums[path])
    for path, items in by_path.items():
        if "gradient" in sums[path].counts:  # of the loss over all batches, wherever they went
            sums[path].counts["gradient"] = len(batches)
        means = sums.pop(path).means()
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
    model: nn.Module, sums: Mapping[str, _Sums], wanted: tuple[str, ...]
) -> Iterator[dict[str, Any]]:
    """The model in eval mode, only the watched weights asking for gradients; then as before."""
    modules = {path: model.get_submodule(path) for path in sums}
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    training = [(m, m.training) for m in model.modules()]
    mask: dict[str, Any] = {"of": None, "decoder": None, "memory": None}
    hooks = []
    encoder = _encoder(model)
    inside = None if encoder is None else {id(m) for m in encoder.modules()}

    def real(module: nn.Module, x: Tensor) -> Any:
        """The mask of the tokens in x: the encoder's, whose output the decoder reads as well."""
        if inside is None or id(module) in inside or x.data_ptr() == mask["memory"]:
            return mask["of"]
        return mask["decoder"]

    try:
        if encoder is not None:
            hooks.append(encoder.register_forward_hook(
                lambda module, args, out: mask.update(memory=out[0].data_ptr())
            ))  # fmt: skip
        model.eval()
        model.requires_grad_(False)
        for path, module in modules.items():
            if "gradient" in wanted:
                module.weight.requires_grad_(True)  # type: ignore[union-attr]
                module.weight.grad = None  # type: ignore[union-attr]
            if any(k in INPUTS for k in wanted):

                @torch.no_grad()
                def add(module: nn.Module, args: Any, path: str = path) -> None:
                    x = args[0].detach()
                    samples = _samples(module, x, real(module, x))
                    if samples:
                        sums[path].add_inputs(samples, wanted)

                hooks.append(module.register_forward_pre_hook(add))
        yield mask
    finally:
        for hook in hooks:
            hook.remove()
        for p, asked, grad in before:
            p.requires_grad_(asked)
            p.grad = grad
        for module, was in training:
            module.training = was


def _encoder(model: Any) -> nn.Module | None:
    """The encoder of a model that has a decoder beside it: the attention mask is of its tokens."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return None
    return model.get_encoder()


def _samples(module: nn.Module, x: Tensor, mask: Any) -> list[Tensor]:
    """The inputs [tokens, n] that W multiplies, one for each sample, without padding."""
    x = kind_of(module)(module).inputs(x)
    x = x.to(wide(x.dtype))
    mask = None if mask is None or mask.ndim != 2 else mask.to(x.device).bool()
    if mask is not None and x.ndim == 2 and len(x) == mask.numel():
        x = x.view(*mask.shape, -1)  # a layer that takes all tokens of the batch in one row
    if x.ndim == 2:
        return [x]
    x = x.reshape(-1, *x.shape[-2:])
    if mask is not None and mask.shape == x.shape[:2]:
        return [own[real] for own, real in zip(x, mask, strict=True) if real.any()]
    return list(x)


def _add_gradient(module: Any, sums: _Sums) -> None:
    grad, module.weight.grad = module.weight.grad, None
    if grad is not None:
        G = kind_of(module)(module).to_matrix(grad)
        sums.add("gradient", G.to(wide(grad.dtype)), 1)


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
    ranks: Sequence[int],
    batches: Sequence[Mapping[str, Any]],
    wanted: tuple[str, ...],
    parts: tuple[Measuring, Measuring],
    bases: Mapping[str, Base],
) -> Path | None:
    """Named by all that the statistics depend on; None where no file is worth it."""
    if sum(p.numel() for p in model.parameters()) < CACHED_FROM:
        return None
    what = [(i.site, i.shape, i.rank, r) for i, r in zip(planned, ranks, strict=True)]
    kind, config = type(model).__qualname__, getattr(model, "config", None)
    digest = hashlib.sha256(f"{what} {wanted} {parts} {bases} {kind} {config}".encode())
    try:
        files = {inspect.getfile(type(part)) for part in (*parts, *bases.values())}
        files |= {_svd.__file__, _quantize.__file__, __file__}
    except (OSError, TypeError):  # a part that was typed in: its code cannot be told apart
        return None
    for file in sorted(files):
        digest.update(Path(file).read_bytes())
    for name, p in (*model.named_parameters(), *model.named_buffers()):
        digest.update(f"{name} {p.dtype} {tuple(p.shape)} {p.device.type}".encode())
        flat = p.detach().reshape(-1)
        step = max(1, flat.numel() // 4096)
        digest.update(_bytes(flat[::step]))
        digest.update(f"{flat.sum(dtype=torch.float64).item():.17g}".encode())
    for batch in batches:
        for name, value in sorted(batch.items()):
            digest.update(name.encode())
            if isinstance(value, Tensor):
                digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
                digest.update(_bytes(value))
            elif isinstance(value, bool | int | float | str) or value is None:
                digest.update(repr(value).encode())
            else:  # no telling what a repr of it leaves out
                return None
    root = os.environ.get("LORA_CACHE") or Path.home() / ".cache" / "lora-variants-lab"
    return Path(root) / "statistics" / f"{digest.hexdigest()}.safetensors"


def _bytes(t: Tensor) -> Any:
    return t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _write(path: Path, kept: tuple[Found, Found]) -> None:
    from ._io import write_tensors

    flat, seen = {}, set()
    for i, found in enumerate(kept):
        for name, own in found.items():
            for k, t in own.items():  # slices of a fused layer share one covariance
                shared = t.untyped_storage().data_ptr() in seen
                seen.add(t.untyped_storage().data_ptr())
                flat[f"{i}|{name}|{k}"] = t.clone() if shared else t
    if sum(t.nbytes for t in flat.values()) > CACHED_TO:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(path, flat)
    except OSError:
        return  # a cache that cannot be written costs time, no more


def _read(path: Path, model: nn.Module, planned: "Sequence[Planned]") -> tuple[Found, Found] | None:
    from safetensors.torch import load_file

    if not path.exists():
        return None
    kept: tuple[Found, Found] = ({}, {})
    try:
        flat = load_file(path)
    except Exception:  # cut short or not ours: measured again, and replaced
        path.unlink(missing_ok=True)
        return None
    device = {i.site.name: model.get_submodule(i.site.path).weight.device for i in planned}
    for key, t in flat.items():
        i, name, k = key.split("|")
        # copied: products of memory that is not aligned as torch's differ in the last bit
        own = t.to(device[name], copy=True)  # type: ignore[arg-type]
        kept[int(i)].setdefault(name, {})[k] = own
    return kept
