"""Analyses of an adapter as a whole: from the run's files, or by the model with data.

Those that change a model open it anew, so that none sees what another did.
"""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from experiments.tasks import BadInput
from variants._kinds import matrix_of
from variants._targets import all_layers

from . import curvature, forgetting, starts
from .by_matrix import Matrix
from .data import begun, first_batch, samples
from .direction import magnitude_direction, slope
from .intruders import newcomers, rescaled
from .opened import Asked, Opened
from .ranks import heatmap, trajectory

FACTORS = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the intruders' singular values in the causal test


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


OTHERS: dict[str, Callable[[Opened, Asked], dict[str, Any]]] = {
    "magnitude": magnitude,
    "ranks": ranks,
    "causal": causal,
    "hessian": hessian,
    "init": init,
    "forgetting": forgotten,
}
DATA = ("causal", "hessian", "init", "forgetting")  # need the model with data: only when asked
