"""Forms of products, blocks and sparse changes: equal to PEFT's layers from the same factors, and
to plain float64 formulas of the official rules; their settings pass the contract."""

import math
import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import variants
from variants._adapter import Adapter
from variants._contract import CLAUSES, Case, Toy, evaluated
from variants._registry import Incompatible, find_part
from variants.lokr import split

torch.set_num_threads(1)


class One(nn.Module):
    """One linear layer of 24 inputs and 20 outputs."""

    def __init__(self, m: int = 20, n: int = 24, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.proj = nn.Linear(n, m)
        generator = torch.Generator().manual_seed(m + n)
        for p in self.parameters():
            p.data = 0.3 * torch.randn(p.shape, generator=generator)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


def ours(preset: str, m: int = 20, n: int = 24, **settings: Any) -> tuple[Adapter, Any]:
    """An adapter on `One`, its trained tensors moved away from the start, and its layer."""
    adapter = variants.attach(One(m, n), preset, targets=["proj"], **settings)
    layer = adapter.layers["proj"]
    generator = torch.Generator().manual_seed(2)
    for t in layer.trained:
        t.data += 0.3 * torch.randn(t.shape, generator=generator)
    return adapter, layer


# ------------------------------------------------------------------ PEFT's layers


def blocks(k: int) -> Any:
    """Our A [r, n] as PEFT's GraLoRA has it: [k, n/k, r]."""
    return lambda t: t.mT.unflatten(0, (k, -1))


def rows(k: int) -> Any:
    """Our B [m, r] as PEFT's GraLoRA has it: [k, r, m/k]."""
    return lambda t: t.unflatten(0, (k, -1)).transpose(1, 2)


@dataclass
class Same:
    """A preset and PEFT's config of it, with {our tensor: (PEFT's, how ours is laid out there)}."""

    preset: str
    config: str
    theirs: dict[str, Any]
    pairs: dict[str, Any]
    settings: dict[str, Any]


TARGETS = {"target_modules": ["proj"]}
PEFT = {
    "hira": Same("hira", "HiraConfig", {"r": 4}, {"A": "hira_A", "B": "hira_B"}, {"rank": 4}),
    "loha": Same(
        "loha", "LoHaConfig", {"r": 4, "alpha": 6},
        {"A1": "hada_w1_b", "B1": "hada_w1_a", "A2": "hada_w2_b", "B2": "hada_w2_a"},
        {"rank": 4, "alpha": 6},
    ),
    "lokr": Same(
        "lokr", "LoKrConfig", {"r": 2, "alpha": 3},
        {"W1": "lokr_w1", "B2": "lokr_w2_a", "A2": "lokr_w2_b"}, {"rank": 2, "alpha": 3},
    ),
    "lokr, both": Same(
        "lokr", "LoKrConfig", {"r": 1, "alpha": 3, "decompose_both": True, "decompose_factor": 4},
        {"B1": "lokr_w1_a", "A1": "lokr_w1_b", "B2": "lokr_w2_a", "A2": "lokr_w2_b"},
        {"rank": 1, "alpha": 3, "form": {"name": "lokr", "decompose_both": True, "factor": 4}},
    ),
    "lokr, full": Same(
        "lokr", "LoKrConfig", {"r": 8, "alpha": 3}, {"W1": "lokr_w1", "W2": "lokr_w2"},
        {"rank": 8, "alpha": 3, "form": {"name": "lokr", "rule": "peft"}},
    ),
    "miss": Same("miss", "MissConfig", {"r": 4}, {"D": "miss_block"}, {"rank": 4}),
    "miss, padded": Same("miss", "MissConfig", {"r": 5}, {"D": "miss_block"}, {"rank": 5}),
    "bat": Same(
        "bat", "MissConfig", {"r": 4, "init_weights": "bat"}, {"D": "miss_block"}, {"rank": 4}
    ),
    "gralora": Same(
        "gralora", "GraloraConfig", {"r": 4, "alpha": 6, "gralora_k": 2},
        {"A": ("gralora_A", blocks(2)), "B": ("gralora_B", rows(2))}, {"rank": 4, "alpha": 6},
    ),
    "gralora, hybrid": Same(
        "gralora", "GraloraConfig", {"r": 8, "alpha": 6, "gralora_k": 4, "hybrid_r": 3},
        {"A": ("gralora_A", blocks(4)), "B": ("gralora_B", rows(4)),
         "A_hybrid": "gralora_A_general", "B_hybrid": "gralora_B_general"},
        {"rank": 11, "alpha": 6, "form": {"name": "gralora", "k": 4, "hybrid_r": 3}},
    ),
    "delora": Same(
        "delora", "DeloraConfig", {"r": 4, "delora_lambda": 8},
        {"A": "delora_A", "B": "delora_B", "boundary": "delora_lambda"},
        {"rank": 4, "form": {"name": "delora", "rule": "peft"}},
    ),
    "c3a": Same(
        "c3a", "C3AConfig", {"block_size": 4}, {"w": "c3a_kernel"},
        {"form": {"name": "c3a", "block_size": 4}},
    ),
    "shira": Same("shira", "ShiraConfig", {"r": 4}, {"entries": "shira_weight"}, {"rank": 4}),
}  # fmt: skip


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize("case", PEFT)
def test_equal_to_peft(case: str) -> None:
    """Output, and the gradients of input and factors, from the same factors: fp32, 1e-5."""
    peft = pytest.importorskip("peft", reason="the extra `dev` brings peft")
    same = PEFT[case]
    adapter, layer = ours(same.preset, **same.settings)
    config = getattr(peft, same.config)(**same.theirs, **TARGETS)
    their = peft.get_peft_model(One(), config)
    found = their.base_model.model.proj
    places = layer.params["places"] if same.preset == "shira" else None
    if places is not None:
        found.shira_indices["default"] = torch.stack([places // 24, places % 24]).int()
    tensors = {}
    for name in (k for k, t in layer.params.items() if t.requires_grad):
        theirs, lay = pair if isinstance(pair := same.pairs[name], tuple) else (pair, lambda t: t)
        tensor = getattr(found, theirs)["default"]
        tensors[name] = getattr(tensor, "weight", tensor), lay
        tensors[name][0].data.copy_(lay(layer.params[name].data))
    assert set(tensors) == set(same.pairs)
    x = torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(1))
    inputs = x.clone().requires_grad_(), x.clone().requires_grad_()
    out = adapter.model(inputs[0]), their(inputs[1])
    assert relative(*out) < 1e-5
    assert relative(layer.weight @ x[0].mT, (out[1][0] - layer.bias).mT) < 1e-5
    for y in out:
        (y * torch.linspace(-1, 2, y.numel()).view_as(y)).sum().backward()
    gradient: Any = inputs[1].grad
    if same.preset == "c3a":  # the one in PEFT's `BlockCircularConvolution.backward` is wrong
        up = torch.linspace(-1, 2, out[1].numel()).view_as(out[1])
        gradient = up @ (found.base_layer.weight + found.get_delta_weight("default")).detach()
    assert inputs[0].grad is not None and relative(inputs[0].grad, gradient) < 1e-5
    for name, (tensor, lay) in tensors.items():
        assert relative(lay(layer.params[name].grad), tensor.grad) < 1e-5, name


def test_pefts_input_gradient_of_c3a_is_not_that_of_its_matrix() -> None:
    """Why the comparison above takes another one; when PEFT mends it, this fails and may go."""
    utils = pytest.importorskip("peft.tuners.c3a.utils", reason="the extra `dev` brings peft")
    generator = torch.Generator().manual_seed(0)
    w, up = (torch.randn(*s, generator=generator).double() for s in ((3, 2, 4), (5, 12)))
    x = torch.randn(5, 8, generator=generator).double().requires_grad_()
    y = utils.BlockCircularConvolution.apply(x, w)
    C = utils.get_circulant_fast(w)
    assert relative(y, x @ C.mT) < 1e-12
    assert relative(torch.autograd.grad(y, x, up)[0], up @ C) > 0.1


STARTS = {  # ours under PEFT's rule, where there is one; tensors by PEFT's names
    "hira": {"rank": 8},
    "loha": {"rank": 8, "form": {"name": "loha", "rule": "peft"}},
    "lokr": {"rank": 2, "form": {"name": "lokr", "rule": "peft"}},
    "gralora": {"rank": 8},
    "delora": {"rank": 8, "form": {"name": "delora", "rule": "peft"}},
    "c3a": {},
}


@pytest.mark.parametrize("preset", STARTS)
def test_starts_as_peft_does(preset: str) -> None:
    """The size of each tensor on a 240 x 384 matrix: within 15 % of PEFT's draw, zeros the same."""
    peft = pytest.importorskip("peft", reason="the extra `dev` brings peft")
    same, settings = PEFT[preset], STARTS[preset]
    adapter = variants.attach(One(240, 384), preset, targets=["proj"], **settings)
    theirs = {"r": settings.get("rank"), "block_size": 48}
    fields = {k: v for k, v in (same.theirs | theirs).items() if k in same.theirs and v}
    torch.manual_seed(0)
    their = peft.get_peft_model(One(240, 384), getattr(peft, same.config)(**fields, **TARGETS))
    for name, pair in same.pairs.items():
        tensor = getattr(their.base_model.model.proj, pair[0] if isinstance(pair, tuple) else pair)
        a, b = adapter.layers["proj"].params[name].data, tensor["default"].data
        assert a.numel() == b.numel()
        a, b = a.square().mean().sqrt().item(), b.square().mean().sqrt().item()
        assert abs(a - b) <= 0.15 * b, (name, a, b)


# ------------------------------------------------------------------ the authors' rules


def test_split_is_the_largest_divisor_of_the_papers_equation() -> None:
    """LyCORIS' Eq. 5 where the factor does not divide the side; where it does, one part is it."""
    for side in (1, 7, 12, 64, 96, 127, 172, 250, 360, 1024, 11008):
        for factor in (-1, 1, 2, 4, 8, 16, 100):
            small, large = split(side, factor)
            assert small * large == side and small <= large
            if factor > 0 and side % factor == 0:
                assert factor in (small, large)
            else:
                bound = side if factor < 0 else factor
                fit = [k for k in range(1, side + 1) if side % k == 0 and k * k <= side]
                assert small == max(k for k in fit if k <= bound)


SETTINGS = [
    ("loha", {"rule": "peft"}),
    ("lokr", {"rule": "peft"}),
    ("lokr", {"factor": 4}),
    ("lokr", {"factor": 6, "decompose_both": True}),
    ("krona", {"factor": 3, "strength": 2.0}),
    ("sinelora", {"omega": 30.0}),
    ("gralora", {"k": 4}),
    ("gralora", {"k": 3, "hybrid_r": 1}),
    ("moslora", {"mixer": "orthogonal"}),
    ("delora", {"rule": "peft", "boundary": 3.0}),
    ("mora", {"type": "sharing"}),
    ("c3a", {"block_size": 3, "kernel": "zero"}),
    ("c3a", {"kernel": "kaiming"}),
    ("c3a", {"kernel": "gaussian"}),
    ("shira", {"mask": "magnitude"}),
    ("lora_xs", {"deviation": 0.0}),
]


class WithSettings(Case):
    """A case whose form has settings of its own."""

    def attach(self, model: nn.Module | None = None, **settings: Any) -> Adapter:
        known = find_part("form", self.axes["form"]["name"]).traits["rank_means"]
        own = {"rank": None if known is None else self.rank, "targets": ["first", "second"]}
        return variants.attach(
            Toy() if model is None else model, self.preset, **(own | settings), **self.axes
        )


SLOW = ("learns_its_own_form",)  # three hundred steps: the presets run it


@pytest.mark.parametrize(
    ("preset", "fields"), SETTINGS, ids=lambda v: v if isinstance(v, str) else ",".join(v)
)
def test_settings_pass_the_contract(preset: str, fields: dict[str, Any]) -> None:
    case = WithSettings(preset, axes={"form": {"name": preset, **fields}})
    for name, clause in CLAUSES.items():
        if name not in SLOW:
            clause(case)


COUNTED = ["hira", "loha", "lokr", "krona", "abba", "sinelora", "miss", "bat", "gralora", "lora_xs",
           "moslora", "delora", "mora", "c3a", "shira"]  # fmt: skip


@pytest.mark.parametrize("form", COUNTED)
def test_counts_of_any_matrix(form: str) -> None:
    """The formula of the file equals the shapes, for 200 matrices and ranks, settings included."""
    drawn = random.Random(0)
    for fields in [{}, *(fields for preset, fields in SETTINGS if preset == form)]:
        part = find_part("form", form).load(**fields)
        if not fields:
            assert part.parameters == find_part("form", form).traits["parameters"]
        for _ in range(200):
            m, n, r = drawn.randint(1, 700), drawn.randint(1, 700), drawn.randint(2, 40)
            total = sum(math.prod(shape) for shape in part.shapes(m, n, r).values())
            assert evaluated(part.parameters, r, m, n) == total, (fields, m, n, r)


@pytest.mark.parametrize("form", ["sharing", "rope"])
@pytest.mark.parametrize(("m", "n", "r"), [(20, 24, 4), (40, 9, 4), (7, 50, 2), (90, 4, 4)])
def test_mora_entry_by_entry(form: str, m: int, n: int, r: int) -> None:
    """Against sums over the input's places, by the official code's rules, in float64; 1e-6."""
    _, layer = ours("mora", m, n, rank=r, form={"name": "mora", "type": form})
    M, q = layer.params["M"].double(), layer.params["M"].shape[0]
    groups = math.ceil(n / q)
    change = torch.zeros(m, n, dtype=torch.float64)
    for out in range(m):
        for place in range(groups * q):
            group, at = divmod(place, q)
            if form == "sharing":
                change[out, place % n] += M[out % q, at]
            elif out % (groups * q) // q == group:
                row, half = M[out % (groups * q) % q], q // 2
                angle = group * 10000 ** (-2 * (at % half) / q)
                partner, sign = (at + half, 1) if at < half else (at - half, -1)
                change[out, place % n] += (
                    math.cos(angle) * row[at] + sign * math.sin(angle) * row[partner]
                )
    assert relative(layer.weight - layer.W0, change) < 1e-6


def test_delora_as_the_authors_write_it() -> None:
    """The weight of `get_ABCD`, and the boundary's gradient through both terms; float64, 1e-10."""
    adapter = variants.attach(One(dtype=torch.float64), "delora", rank=3, targets=["proj"])
    layer = adapter.layers["proj"]
    p, W0 = layer.params, layer.W0
    assert relative(layer.weight, W0) < 1e-14
    with torch.no_grad():
        p["A"] += 0.1
        p["B"] *= -1.5
    assert not torch.equal(p["A"], p["C"]) and not torch.equal(p["B"], p["D"])  # copies, not views
    change = torch.zeros_like(W0)
    for i in range(3):
        change += torch.outer(p["B"][:, i] / p["B"][:, i].norm(), p["A"][i] / p["A"][i].norm())
        change -= torch.outer(p["D"][:, i] / p["D"][:, i].norm(), p["C"][i] / p["C"][i].norm())
    change = change * W0.norm(dim=0) / 3
    assert relative(layer.weight - W0, 8.0 * change) < 1e-10
    layer.weight.sum().backward()
    assert relative(p["boundary"].grad, change.sum().view(1)) < 1e-10


def test_lora_xs_starts_from_the_decomposition() -> None:
    """A and B against torch's SVD in float64, a vector's sign apart: 1e-4; R of deviation 1e-5."""
    adapter = variants.attach(One(), "lora_xs", rank=6, targets=["proj"])
    p, W0 = adapter.layers["proj"].params, adapter.layers["proj"].W0
    U, S, Vh = torch.linalg.svd(W0.double())
    A = S[:6, None] * Vh[:6]
    assert relative(p["A"] * (p["A"] * A).sum(1, keepdim=True).sign(), A) < 1e-4
    assert relative(p["B"] * (p["B"] * U[:, :6]).sum(0).sign(), U[:, :6]) < 1e-4
    assert 0.6e-5 < p["R"].std().item() < 1.4e-5
    assert not p["A"].requires_grad and adapter.num_trainable == 36


def test_moslora_takes_the_factors_of_an_init() -> None:
    """With PiSSA its product is PiSSA's, and M = I; 1e-6."""
    mixed, plain = (
        variants.attach(One(), preset, rank=4, targets=["proj"], init="pissa").layers["proj"]
        for preset in ("moslora", "lora")
    )
    assert torch.equal(mixed.params["M"], torch.eye(4))
    assert relative(mixed.weight - mixed.W0, plain.weight - plain.W0) < 1e-6
    Q = variants.attach(
        One(), "moslora", rank=4, targets=["proj"], form={"name": "moslora", "mixer": "orthogonal"}
    ).layers["proj"].params["M"].detach()  # fmt: skip
    assert (Q @ Q.mT - torch.eye(4)).abs().max() < 1e-6


def test_abba_computes_by_khatri_rao_factors() -> None:
    """The r1 r2 directions give the Hadamard product; float64, 1e-12."""
    _, layer = ours("abba", rank=5)
    p = {k: t.detach().double() for k, t in layer.params.items()}
    assert p["A1"].shape[0] == 3 and p["A2"].shape[0] == 2
    A, B = layer.form.factors(p)
    assert A.shape[0] == 6
    assert relative(B @ A, (p["B1"] @ p["A1"]) * (p["B2"] @ p["A2"])) < 1e-12


@pytest.mark.parametrize("preset", ["hira", "loha", "shira", "bat"])
def test_a_small_change_survives_bf16(preset: str) -> None:
    """A change below the resolution of W0 in bf16 reaches the output, to 1 %."""
    adapter = variants.attach(One(dtype=torch.bfloat16), preset, rank=4, targets=["proj"])
    layer = adapter.layers["proj"]
    x = torch.tensor([1.0, -1.0] * 12).bfloat16()
    with torch.no_grad():
        layer.frozen.stored.set(torch.ones_like(layer.W0))  # W0 x = 0
        layer.frozen.bias.zero_()  # type: ignore[union-attr]
        for t in layer.trained:
            t += 1e-4 * torch.randn(t.shape, generator=torch.Generator().manual_seed(1))
        W = layer.weight
        assert torch.equal(W.bfloat16(), layer.W0), "the change is not small"
        assert relative(layer(x).float(), (W - 1) @ x.float()) < 1e-2


REFUSED = [
    ("abba", {"rank": 1}, "rank=1: proj"),
    ("gralora", {"rank": 3}, "rank=3: proj"),
    ("gralora", {"rank": 4, "form": {"name": "gralora", "hybrid_r": 4}}, "rank=4: proj"),
    ("shira", {"rank": 11}, "rank 10 at most"),
    ("miss", {"rank": 25}, "rank=25: proj has 24 inputs"),
    ("hira", {"rank": 21}, "rank=21"),
    ("hira", {"rank": 4, "init": "pissa"}, "pissa needs a low-rank form, not hira"),
    (
        "hira",
        {"rank": 4, "scale": "standard"},
        "scale standard needs a form with a scale in its equation",
    ),
    ("loha", {"form": {"name": "loha", "rule": "theirs"}}, "choices: authors, peft"),
    ("lokr", {"form": {"name": "lokr", "factor": 0}}, "factor=0"),
    ("c3a", {"form": {"name": "c3a", "kernel": "ones"}}, "choices: xavier, kaiming"),
    ("mora", {"form": {"name": "mora", "type": "6"}}, "choices: sharing, rope"),
    ("delora", {"form": {"name": "delora", "boundary": 0.0}}, "boundary=0.0"),
    ("moslora", {"form": {"name": "moslora", "mixer": "eye"}}, "choices: kaiming, orthogonal"),
    ("shira", {"form": {"name": "shira", "mask": "snip"}}, "choices: random, magnitude"),
]


@pytest.mark.parametrize(("preset", "settings", "words"), REFUSED)
def test_refusals_name_the_cause(preset: str, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(Incompatible, match=words.replace("(", r"\(")):
        variants.attach(One(), preset, targets=["proj"], **settings)
