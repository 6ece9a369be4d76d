"""The analyses of `python -m analysis.inspect`, each a function of an opened adapter.

Those of one matrix after the other need weights alone. The others need the model with data, or the
run's files; they open what they change anew, so that none sees what another did.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.tasks import BadInput
from variants import Incompatible
from variants._api import wide
from variants._kinds import matrix_of
from variants._targets import all_layers

from . import curvature, forgetting, starts
from .data import begun, first_batch, samples
from .direction import magnitude_direction, slope
from .errors import norms
from .intruders import counts, newcomers, rescaled
from .opened import Opened, change
from .ranks import heatmap, trajectory
from .spectra import Change, Triplets, spectrum, triplets
from .subspaces import (
    alignment,
    amplification,
    chance,
    directions,
    energies,
    random_directions,
    similarity,
)

SHOWN = 32  # directions in a table of phi
FACTORS = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the intruders' singular values in the causal test


@dataclass(frozen=True)
class Asked:
    """What the command was asked, and how to open the folder again."""

    open: Callable[[], Opened]
    text: Path | None = None
    against: Opened | None = None
    eps: float = 0.5
    k: int = 10  # singular vectors that are looked at for intruders
    device: str = "cpu"
    reference: str = ""  # the preset that learning rates are relative to


@dataclass(frozen=True)
class Matrix:
    """One adapted matrix; what several analyses need of it is computed once."""

    o: Opened
    name: str

    @cached_property
    def layer(self) -> Any:
        return self.o.adapter.layers[self.name]

    @cached_property
    def W0(self) -> Tensor:
        W0 = self.layer.original.detach()
        return W0.to(wide(W0.dtype))

    @cached_property
    def dW(self) -> Change:
        return change(self.layer)

    @cached_property
    def svd(self) -> Triplets:
        """dW's."""
        return triplets(self.dW)

    @cached_property
    def base(self) -> Triplets:
        """W0's: the dearest part of an analysis."""
        return triplets(self.W0)

    @property
    def rank(self) -> int:
        """The directions that a table shows of dW."""
        return max(1, min(self.layer.rank, *self.W0.shape))


def of_spectrum(x: Matrix, asked: Asked) -> dict[str, Any]:
    """Singular values of dW, their norms, effective rank, stable rank, rank for 90 %."""
    return spectrum(x.svd)


def of_similarity(x: Matrix, asked: Asked) -> dict[str, Any]:
    """phi(i, j) of dW's right singular vectors with those of another adapter, else of W0; with that
    of random ones."""
    U = directions(x.svd)[:, : min(SHOWN, x.rank)]
    n = U.shape[0]
    if asked.against is not None:
        if x.name not in asked.against.adapter.layers:
            raise Incompatible(f"--against: no layer {x.name} there")
        other = Matrix(asked.against, x.name)
        V = directions(other.svd)[:, : min(SHOWN, other.rank)].to(U.device)
    else:
        V = x.base[2].mT[:, : U.shape[1]]
    if V.shape[0] != n:
        raise Incompatible(f"--against: {x.name} has {V.shape[0]} inputs there, {n} here")
    phi = similarity(U, V)
    random = similarity(random_directions(n, U.shape[1], 1), random_directions(n, V.shape[1], 2))
    return {
        "phi": phi.tolist(), "first": phi[0, 0].item(), "all": phi[-1, -1].item(),
        "random": random.tolist(), "random_all": random[-1, -1].item(),
        "chance": chance(n, *phi.shape),
    }  # fmt: skip


def of_amplification(x: Matrix, asked: Asked) -> dict[str, Any]:
    """||dW|| / ||U^T W0 V||, U and V the singular vectors of dW; random ones beside."""
    return amplification(x.W0, x.svd, x.rank)


def of_alignment(x: Matrix, asked: Asked) -> dict[str, Any]:
    """The share of dW's energy in the top and the bottom singular subspaces of W0."""
    profile = energies(x.base, x.svd, "left").cumsum(0)
    at = [max(0, round(len(profile) * p / 100) - 1) for p in range(5, 101, 5)]
    return alignment(x.base, x.svd, x.rank) | {"k": x.rank, "cumulative": profile[at].tolist()}


def of_intruders(x: Matrix, asked: Asked) -> dict[str, Any]:
    """How many of the top singular vectors of W are none of W0's, by eps."""
    found = newcomers(x.base[0], x.layer.weight, asked.k)
    swept = {str(eps): n for eps, n in counts(found.cosines).items()}
    return {"k": len(found.S), "cosines": found.cosines.tolist(), "counts": swept,
            "intruders": int(found.under(asked.eps).sum())}  # fmt: skip


def of_quantization(x: Matrix, asked: Asked) -> dict[str, Any]:
    """||W - Q|| of the stored base, and of what the adapter started from (Q + s B0 A0)."""
    W = x.o.file_matrix(x.name)
    W = W.to(wide(W.dtype))
    stored = x.layer.frozen.base.store(W).dense().to(W)
    plain, start, own = norms(W - stored, None), norms(W - x.W0.to(W), None), norms(W, None)
    found: dict[str, Any] = {}
    for key in ("frobenius", "nuclear"):
        error, left, size = plain[key], start[key], own[key]
        found |= {key: error, f"{key}_relative": error / size if size else None,
                  f"{key}_start": left,
                  f"{key}_reduction": 100 * (1 - left / error) if error else None}  # fmt: skip
    return found


MATRICES = {
    "spectrum": of_spectrum,
    "amplification": of_amplification,
    "similarity": of_similarity,
    "alignment": of_alignment,
    "intruders": of_intruders,
    "quantization": of_quantization,
}


def magnitude(o: Opened, asked: Asked) -> dict[str, Any]:
    """(dD, dM) of each matrix at each checkpoint that the run keeps and at its end, and the slope
    of dM on dD."""
    rows = []
    kept = o.checkpoints()[:-1]  # the last one is the end
    now = {k: t.clone() for k, t in o.adapter.tensors().items()}
    states = [(f"step {step}", tensors) for step, tensors in kept] + [("end", now)]
    for state, tensors in states:
        o.adapter.restore(tensors)
        for name in o.adapter.layers:
            x = Matrix(o, name)
            if 1 in x.W0.shape:
                continue
            dM, dD = magnitude_direction(x.W0, x.dW)
            rows.append({"name": name, "role": o.places[name].role, "state": state,
                         "dM": dM, "dD": dD})  # fmt: skip
    line, correlation = slope([(row["dD"], row["dM"]) for row in rows])
    return {"rows": rows, "slope": line, "correlation": correlation}


def ranks(o: Opened, asked: Asked) -> dict[str, Any]:
    """The directions in use, by layer, and how the budget got there."""
    final = o.adapter.ranks()
    roles, layers, table = heatmap(list(o.places.values()), final)
    found = None if o.settings is None else trajectory(o.path)
    return {"final": final, "roles": roles, "layers": layers, "heatmap": table,
            "trajectory": None if found is None else asdict(found)}  # fmt: skip


@torch.no_grad()
def causal(o: Opened, asked: Asked) -> dict[str, Any]:
    """The loss when the intruders' singular values are scaled by 0 (taken out) to 1 (as tuned)."""
    o = asked.open()
    data = samples(o, asked.text)
    found = {}
    for name in o.adapter.layers:
        x = Matrix(o, name)
        found[name] = newcomers(x.base[0], x.layer.weight, asked.k)
    with o.adapter.disabled():
        base = {name: sample.loss() for name, sample in data.items()}
    matrices = _merged(o)
    before = {name: W.clone() for name, W in matrices.items()}
    rows = []
    for factor in FACTORS:
        for name, W in matrices.items():
            W.copy_(rescaled(before[name], found[name], asked.eps, factor))
        rows.append({"factor": factor} | {name: sample.loss() for name, sample in data.items()})
    count = sum(int(f.under(asked.eps).sum()) for f in found.values())
    return {"eps": asked.eps, "intruders": count, "base": base, "rows": rows}


def _merged(o: Opened) -> dict[str, Tensor]:
    """Merges the adapter; the model's own matrices [m, n] by layer, which can be written to."""
    model = o.adapter.merge()
    layers, found = all_layers(model), {}
    for name, place in o.places.items():
        W = matrix_of(layers[place.site.path]).detach()
        found[name] = W if place.site.rows is None else W[slice(*place.site.rows)]
    return found


def hessian(o: Opened, asked: Asked) -> dict[str, Any]:
    """The top eigenvalue of the loss's Hessian over the adapter's tensors: of a run at its start,
    beside the reference's there, and the learning-rate ratio that follows; else as it is."""
    if o.settings is None:
        o = asked.open()
        for tensor in o.adapter.parameters():
            tensor.requires_grad_(True)
        batch = first_batch(o, asked.text)
        return {"trained": asdict(curvature.top_eigenvalue(batch.loss, o.adapter.parameters()))}
    found: dict[str, Any] = {}
    for key, variant in (("start", None), ("reference", asked.reference)):
        own = begun(o.settings, variant, asked.device)
        own.adapter.model.eval()
        found[key] = asdict(curvature.top_eigenvalue(own.batch.loss, own.adapter.parameters()))
    values = found["reference"]["value"], found["start"]["value"]
    ratio = curvature.learning_rate_ratio(*values)
    return found | {"reference_variant": asked.reference, "learning_rate_ratio": ratio}


def init(o: Opened, asked: Asked) -> dict[str, Any]:
    """Loss, gradient norms and the first step of dW against the full gradient, at the start."""
    if o.settings is None:
        raise BadInput("an adapter's files do not say how it started")
    own = begun(o.settings, device=asked.device, gradients=True)
    lr, steps = o.settings.optim.lr, o.settings.train.steps
    return starts.start(own.adapter, own.batch.loss, own.gradients, lr or 1e-4, steps)


def forgotten(o: Opened, asked: Asked) -> dict[str, Any]:
    """Cross-entropy and KL(base || tuned) on held-out text, against the true base."""
    data = samples(o, asked.text)
    if "held out" not in data:
        raise BadInput("no held-out text: give --text FILE, or eval.forgetting to the run")
    sample = data["held out"]
    return forgetting.forgetting(o.adapter, sample.batches()) | {"items": len(sample.examples)}
