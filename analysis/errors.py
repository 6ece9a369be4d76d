"""Errors of storage, matrix by matrix: norms, bits, codes, worst groups; and what inits make good.

Of a matrix W stored as Q, with E = W - Q: the Frobenius norm, the nuclear norm (the sum of singular
values) and, where statistics are given, ||E C^(1/2)||_F with C the mean of x x^T over the inputs x.
An init that starts at W ~ Q + s B A (PiSSA on codes: arXiv:2404.02948, Section 4; LoftQ:
arXiv:2310.08659) has E = W - (Q + s B A), and reduces the error by (1 - ||E|| / ||W - Q||) 100 %.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import variants
from variants import Incompatible
from variants._adapter import Choice, started
from variants._api import Base, Stored
from variants._registry import find_part, overrides, typed

from .weights import Place

NORMS = ("frobenius", "nuclear", "activation")
GROUP = 64  # numbers in a group where the storage has none of its own
Found = Mapping[str, Tensor]  # statistics of one layer


@dataclass(frozen=True)
class Plan:
    """What is measured of each matrix. Keys are the words that were typed."""

    formats: dict[str, Base]
    joint: dict[tuple[str, str], Choice]  # by init and format
    nuclear: bool = True
    worst: int = 3

    @property
    def parts(self) -> dict[str, Any]:
        """What the typed words mean, for the json: parts with all their settings."""
        formats = {text: {"name": base.name, **asdict(base)}  # type: ignore[call-overload]
                   for text, base in self.formats.items()}  # fmt: skip
        inits = {init: choice.axes() | {"rank": choice.rank, "alpha": choice.alpha}
                 for (init, _), choice in self.joint.items()}  # fmt: skip
        return {"formats": formats, "inits": inits}

    @property
    def needs(self) -> tuple[str, ...]:
        """The statistics of a text that inits ask for."""
        return tuple(dict.fromkeys(k for choice in self.joint.values() for k in choice.init.needs))


def planned(
    formats: Sequence[str],
    inits: Sequence[str] = (),
    *,
    variant: str,
    rank: int | None = None,
    words: Sequence[str] = (),
    nuclear: bool = True,
    worst: int = 3,
) -> Plan:
    """The parts that were typed; refuses what does not exist, or cannot be joined."""
    parts = {text: typed("base", text) for text in formats}
    bases: dict[str, Base] = {}
    for text, part in parts.items():
        settings = {k: v for k, v in part.items() if k != "name"}
        bases[text] = find_part("base", part["name"]).load(**settings)
        missing = bases[text].unavailable()
        if missing is not None:
            raise Incompatible(f"{bases[text]} needs {bases[text].requires}: {missing}")
    axes = overrides(variant, words)
    joint = {
        (init, text): variants.choose(
            variant, rank, None, **axes | {"init": typed("init", init), "base": part}
        )
        for init in inits
        for text, part in parts.items()
    }
    return Plan(bases, joint, nuclear, worst)


@torch.no_grad()
def measured(place: Place, W: Tensor, plan: Plan, found: Found) -> dict[str, Any]:
    """All that there is to say of one matrix W [m, n]: a row of `matrices` in the json."""
    C = found.get("covariance")
    own = norms(W, C, plan.nuclear)
    row: dict[str, Any] = {
        "name": place.name, "role": place.role, "stack": place.stack, "layer": place.layer,
        "rows": W.shape[0], "columns": W.shape[1], "norms": own, "formats": {}, "inits": {},
    }  # fmt: skip
    for text, base in plan.formats.items():
        stored = base.store(W)
        E = W.float() - stored.dense().float()
        row["formats"][text] = {
            "bits": stored.bits, "bits_per_number": stored.bits / W.numel(),
            **_relative(norms(E, C, plan.nuclear), own), "codes": codes(stored.histogram()),
            "worst": worst_groups(E, W, stored, plan.worst),
        }  # fmt: skip
    for (init, text), choice in plan.joint.items():
        layer = started(W, place.name, choice, found)
        E = W.float() - layer.weight.float()
        errors, plain = _relative(norms(E, C, plan.nuclear), own), row["formats"][text]
        reduced = {f"{k}_reduction": _reduction(errors[k], plain[k]) for k in NORMS}
        row["inits"].setdefault(init, {})[text] = {"rank": layer.rank, **errors, **reduced}
    return row


def norms(E: Tensor, C: Tensor | None, nuclear: bool = True) -> dict[str, float | None]:
    """Frobenius and nuclear norm of E [m, n], and ||E C^(1/2)||_F for a covariance C [n, n].

    >>> E = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    >>> norms(E, torch.tensor([[4.0, 0.0], [0.0, 0.0]]))
    {'frobenius': 5.0, 'nuclear': 7.0, 'activation': 6.0}
    """
    E = E.float()
    total = activation = None
    if nuclear:  # by the smaller Gram matrix, in fp64: as exact as fp32's own singular values
        short = (E if E.shape[0] <= E.shape[1] else E.mT).double()
        total = torch.linalg.eigvalsh(short @ short.mT).clamp(min=0).sqrt().sum().item()
    if C is not None:
        activation = ((E @ C.float()) * E).sum(dtype=torch.float64).clamp(min=0).sqrt().item()
    frobenius = torch.linalg.vector_norm(E, dtype=torch.float64).item()
    return {"frobenius": frobenius, "nuclear": total, "activation": activation}


def _relative(errors: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    return {**errors, **{f"{k}_relative": _ratio(errors[k], own[k]) for k in NORMS}}


def _ratio(a: float | None, b: float | None) -> float | None:
    """None where there is nothing to compare."""
    return None if a is None or not b else a / b


def _reduction(error: float | None, plain: float | None) -> float | None:
    ratio = _ratio(error, plain)
    return None if ratio is None else 100 * (1 - ratio)


def codes(counts: Tensor | None) -> dict[str, Any] | None:
    """How many codes there are and are used, the entropy of their shares in bits, the counts.

    >>> codes(torch.tensor([2, 0, 1, 1]))
    {'possible': 4, 'used': 3, 'entropy': 1.5, 'counts': [2, 0, 1, 1]}
    """
    if counts is None:
        return None
    shares = counts.double() / counts.sum()
    entropy = -torch.special.xlogy(shares, shares).sum().item() / math.log(2)
    used = int((counts > 0).sum())
    return {"possible": len(counts), "used": used, "entropy": entropy, "counts": counts.tolist()}


def worst_groups(E: Tensor, W: Tensor, stored: Stored, count: int) -> list[dict[str, Any]]:
    """Where the root of the mean squared error of a group is largest, and how large."""
    m, n = W.shape
    size = stored.group or GROUP
    size = n if size >= m * n else size  # one scale for all of it: by row
    squares, sizes = (
        F.pad(t.reshape(-1).float(), (0, -m * n % size)).view(-1, size)
        for t in (E.square(), W.abs())
    )
    lengths = torch.full((len(squares),), size, device=W.device)
    lengths[-1] = m * n - size * (len(squares) - 1)
    rms = (squares.sum(1) / lengths).sqrt()
    top = rms.topk(min(count, len(rms)))
    largest = sizes.amax(1)
    return [
        {"row": i * size // n, "column": i * size % n, "numbers": int(lengths[i]), "rms": value,
         "largest": largest[i].item()}
        for value, i in zip(top.values.tolist(), top.indices.tolist(), strict=True)
    ]  # fmt: skip


def summed(rows: Sequence[Mapping[str, Any]], plan: Plan) -> dict[str, Any]:
    """The same of several matrices together: of all of them, and of those of each role."""
    roles = dict.fromkeys(row["role"] for row in rows)

    def each(pick: Any) -> dict[str, Any]:
        of = {role: _together(pick, [r for r in rows if r["role"] == role]) for role in roles}
        return _together(pick, rows) | {"roles": of}

    formats = {}
    for text in plan.formats:
        formats[text] = each(lambda row, text=text: row["formats"][text])
        bits = sum(row["formats"][text]["bits"] for row in rows)
        numbers = sum(row["rows"] * row["columns"] for row in rows)
        worst = [{"name": row["name"], **group} for row in rows
                 for group in row["formats"][text]["worst"]]  # fmt: skip
        formats[text] |= {
            "bits": bits, "numbers": numbers, "bits_per_number": bits / numbers,
            "codes": codes(_counts(rows, text)),
            "worst": sorted(worst, key=lambda group: -group["rms"])[: plan.worst],
        }  # fmt: skip
    inits: dict[str, dict[str, Any]] = {}
    for init, text in plan.joint:
        found = each(lambda row, init=init, text=text: row["inits"][init][text])
        plain = formats[text]
        for own, against in ((found, plain),
                             *((found["roles"][r], plain["roles"][r]) for r in roles)):  # fmt: skip
            own |= {f"{k}_reduction": _reduction(own[k], against[k]) for k in NORMS}
        inits.setdefault(init, {})[text] = found
    return {"formats": formats, "inits": inits}


def _together(pick: Any, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Errors of several matrices: the root of the summed squares, or the sum of nuclear norms."""
    found: dict[str, Any] = {}
    for key in NORMS:
        pairs = [(pick(row)[key], row["norms"][key]) for row in rows
                 if pick(row)[key] is not None]  # fmt: skip
        power = 1 if key == "nuclear" else 2
        error, own = (sum(v**power for v in column) ** (1 / power) for column in zip(*pairs)
                      ) if pairs else (None, None)  # fmt: skip
        found |= {key: error, f"{key}_relative": _ratio(error, own)}
    return found


def _counts(rows: Sequence[Mapping[str, Any]], text: str) -> Tensor | None:
    found = [row["formats"][text]["codes"] for row in rows]
    if None in found:
        return None
    return torch.tensor([sum(column) for column in zip(*(f["counts"] for f in found), strict=True)])
