"""Rules of update and allocations that act while training, against transcriptions in float64.

Each `by_hand_*` is written from the paper's equations with plain matrix products, inverses and
loops, and shares nothing with the package. 30 steps agree to 1e-8 relative unless a test says more.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import variants
from variants._adapter import Adapter

torch.set_num_threads(1)
STEPS = 30
M, N, R = 6, 9, 3  # of the layer under test
X = torch.randn(16, N, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = torch.randn(16, M, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
W0 = torch.randn(M, N, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

Factors = dict[str, Tensor]


def fresh(preset: str, *, zero: bool = True, **axes: Any) -> tuple[Adapter, nn.Module]:
    """One layer in float64; its B zero as LoRA starts, or drawn."""
    model = nn.Sequential(nn.Linear(N, M, bias=False, dtype=torch.float64))
    model[0].weight.data = W0.clone()
    adapter = variants.attach(model, preset, rank=R, targets=["0"], **axes)
    if not zero:
        B = adapter.layers["0"].params["B"]
        B.data = torch.randn(M, R, generator=torch.Generator().manual_seed(4)).to(B)
    return adapter, model


def loss_of(W: Tensor) -> Tensor:
    """A loss whose gradient changes with W."""
    return (F.linear(X, W).tanh() - Y).square().mean()


def gradient(W: Tensor) -> Tensor:
    leaf = W.detach().clone().requires_grad_()
    loss_of(leaf).backward()
    assert leaf.grad is not None
    return leaf.grad


def run(adapter: Adapter, steps: int = STEPS, **settings: Any) -> dict[str, Tensor]:
    """Trains with the adapter's optimizer; the tensors of the layer afterwards."""
    optimizer = adapter.optimizer(**({"lr": 0.05, "steps": steps} | settings))
    for t in range(steps):
        loss = (adapter.model(X).tanh() - Y).square().mean()
        penalty = adapter.penalty()
        (loss if penalty is None else loss + penalty).backward()
        for group in optimizer.param_groups:  # as a run's schedule does
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * (1 - t / (2 * steps))
        optimizer.step()
        optimizer.zero_grad()
    layer = adapter.layers["0"]
    return {k: t.detach().clone() for k, t in layer.params.items()} | {"W0": layer.W0}


class Adam:
    """One tensor's AdamW direction, straight from Kingma & Ba's Algorithm 1."""

    def __init__(self, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> None:
        self.m: Any = 0.0
        self.v: Any = 0.0
        self.t, self.betas, self.eps = 0, betas, eps

    def __call__(self, g: Tensor) -> Tensor:
        b1, b2 = self.betas
        self.t += 1
        self.m = b1 * self.m + (1 - b1) * g
        self.v = b2 * self.v + (1 - b2) * g * g
        m, v = self.m / (1 - b1**self.t), self.v / (1 - b2**self.t)
        return m / (v.sqrt() + self.eps)


def rates(lr: float = 0.05, steps: int = STEPS) -> Iterator[float]:
    for t in range(steps):
        yield lr * (1 - t / (2 * steps))


def close(a: Tensor, b: Tensor, tolerance: float = 1e-8) -> None:
    assert ((a - b).abs().max() / b.abs().max()).item() <= tolerance


def start(adapter: Adapter) -> tuple[Tensor, Tensor, float]:
    layer = adapter.layers["0"]
    A, B = (layer.params[k].detach().clone() for k in "AB")
    return A, B, layer.s


def same(found: Factors, A: Tensor, B: Tensor, tolerance: float = 1e-8) -> None:
    close(found["A"], A, tolerance)
    close(found["B"], B, tolerance)


# LoRA+ and LoRA-FA


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_lora_plus_is_adamw_with_two_rates(decay: float) -> None:
    """Against Adam by hand with lr for A and 16 lr for B."""
    adapter, _ = fresh("lora_plus")
    A, B, s = start(adapter)
    found = run(adapter, lr=0.004, weight_decay=decay)
    of_A, of_B = Adam(), Adam()
    for lr in rates(0.004):
        G = gradient(W0 + s * B @ A)
        dA, dB = of_A(s * B.T @ G), of_B(s * G @ A.T)
        A = (1 - lr * decay) * A - lr * dA
        B = (1 - 16 * lr * decay) * B - 16 * lr * dB
    same(found, A, B)


def llama() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=48, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


IDS = torch.randint(48, (2, 12), generator=torch.Generator().manual_seed(0))


def beside_peft(preset: str, dtype: torch.dtype, dora: bool = False, **axes: Any) -> Any:
    """Our adapter and PEFT's with the same factors on the same tiny Llama."""
    peft = pytest.importorskip("peft")
    if dora:
        axes["form"] = "dora"
    ours = variants.attach(
        llama().to(dtype), preset, rank=4, alpha=8, targets=["q_proj", "down_proj"], **axes
    )
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], use_dora=dora
    )
    theirs = peft.get_peft_model(llama().to(dtype), config)
    modules = dict(theirs.base_model.model.named_modules())
    for name, layer in ours.layers.items():
        for k in "AB":
            getattr(modules[name], f"lora_{k}")["default"].weight.data = layer.params[
                k
            ].data.clone()
    return ours, theirs, modules


def train_both(ours: Adapter, theirs: Any, mine: Any, other: Any, steps: int) -> None:
    for _ in range(steps):
        for model, optimizer in ((ours.model, mine), (theirs, other)):
            model(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()


def compare(ours: Adapter, modules: dict[str, Any], names: str, tolerance: float) -> None:
    for name, layer in ours.layers.items():
        for k in names:
            close(layer.params[k], getattr(modules[name], f"lora_{k}")["default"].weight, tolerance)


@pytest.mark.parametrize("dora", [False, True])
def test_lora_plus_equals_peft(dora: bool) -> None:
    """PEFT's create_loraplus_optimizer, with DoRA in its rule (`vectors`): 10 steps, 1e-8."""
    settings = {"name": "lora_plus", "ratio": 8.0, "vectors": True}
    ours, theirs, modules = beside_peft("lora_plus", torch.float64, dora, update=settings)
    from peft.optimizers import create_loraplus_optimizer

    other = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=8.0, loraplus_weight_decay=0.02
    )
    train_both(ours, theirs, ours.optimizer(lr=1e-3, weight_decay=0.02), other, 10)
    compare(ours, modules, "AB", 1e-8)
    if dora:
        for name, layer in ours.layers.items():
            theirs_m = modules[name].lora_magnitude_vector["default"].weight
            close(layer.params["m"], theirs_m, 1e-8)


def test_lora_fa_trains_b_alone() -> None:
    """Against Adam by hand on B; A keeps its bits."""
    adapter, _ = fresh("lora_fa", update={"name": "lora_fa", "projected": False})
    A, B, s = start(adapter)
    found, adam = run(adapter), Adam()
    for lr in rates():
        B = B - lr * adam(s * gradient(W0 + s * B @ A) @ A.T)
    assert torch.equal(found["A"], A)
    close(found["B"], B)
    assert adapter.num_trainable == M * R


def test_projected_lora_fa() -> None:
    """Against Adam by hand on g_B (A A^T + 1e-8 I)^-1 / s^2."""
    adapter, _ = fresh("lora_fa", update={"name": "lora_fa", "projected": True})
    A, B, s = start(adapter)
    found, adam = run(adapter, weight_decay=0.1), Adam()
    inverse = torch.inverse(A @ A.T + 1e-8 * torch.eye(R, dtype=A.dtype))
    for lr in rates():
        g = s * gradient(W0 + s * B @ A) @ A.T
        B = (1 - lr * 0.1) * B - lr * adam(g @ inverse / s**2)
    close(found["B"], B)


def test_projected_lora_fa_equals_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT's LoraFAOptimizer without its bf16 autocast, eps 0 in both (theirs stands elsewhere).

    10 steps in float64, 1e-8.
    """
    update = {"name": "lora_fa", "projected": True}
    ours, theirs, modules = beside_peft("lora_fa", torch.float64, update=update)
    from peft.optimizers import create_lorafa_optimizer, lorafa

    monkeypatch.setattr(lorafa, "is_bf16_available", lambda: False)
    other = create_lorafa_optimizer(theirs, r=4, lora_alpha=8, lr=1e-3)
    for group in other.param_groups:
        group["eps"] = 0.0
    train_both(ours, theirs, ours.optimizer(lr=1e-3, eps=0.0), other, 10)
    compare(ours, modules, "AB", 1e-8)


def kept_bytes(preset: str) -> int:
    """What backward keeps of one layer's input, beside the model's and the adapter's tensors."""
    model = nn.Sequential(nn.Linear(512, 256, bias=False))
    variants.attach(model, preset, rank=8, targets=["0"])
    own = {t.untyped_storage().data_ptr() for t in model.state_dict().values()}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model(torch.randn(1000, 512))
    y.sum().backward()
    return sum(kept.values())


def test_lora_fa_keeps_x_a_and_not_x() -> None:
    """fp32 bytes of 1,000 tokens of 512 numbers at rank 8: x for LoRA, x A^T for LoRA-FA."""
    assert kept_bytes("lora") == 4 * 1000 * 512
    assert kept_bytes("lora_fa") == 4 * 1000 * 8


# The factors' geometry


def inverse(gram: Tensor, damping: float) -> Tensor:
    return torch.inverse(gram + damping * torch.eye(len(gram), dtype=gram.dtype))


@pytest.mark.parametrize("rule", ["adamw", "sgd"])
@pytest.mark.parametrize("damping", [1e-6, 0.1])
def test_riemannian(rule: str, damping: float) -> None:
    """Scaled AdamW and scaled GD by hand, B zero at the start as in LoRA."""
    update = {"name": "riemannian", "rule": rule, "damping": damping}
    adapter, _ = fresh("riemannian", update=update)
    A, B, s = start(adapter)
    found = run(adapter, weight_decay=0.1)
    of_A, of_B = (Adam(), Adam()) if rule == "adamw" else (lambda g: g, lambda g: g)
    for lr in rates():
        G = gradient(W0 + s * B @ A)
        dA = of_A(inverse(B.T @ B, damping) @ (s * B.T @ G))
        dB = of_B((s * G @ A.T) @ inverse(A @ A.T, damping))
        A, B = (1 - lr * 0.1) * A - lr * dA, (1 - lr * 0.1) * B - lr * dB
    same(found, A, B)


def test_riemannian_equals_peft() -> None:
    """PEFT's create_riemannian_optimizer with its damping, after AdamW: 10 steps, 1e-8."""
    update = {"name": "riemannian", "damping": 1e-2}
    ours, theirs, modules = beside_peft("riemannian", torch.float64, update=update)
    peft_optimizers = pytest.importorskip("peft.optimizers")
    if not hasattr(peft_optimizers, "create_riemannian_optimizer"):
        pytest.skip("this PEFT has no Riemannian optimizer")
    other = peft_optimizers.create_riemannian_optimizer(
        theirs, torch.optim.AdamW, lr=1e-3, reg=1e-2, weight_decay=0.02
    )
    train_both(ours, theirs, ours.optimizer(lr=1e-3, weight_decay=0.02), other, 10)
    compare(ours, modules, "AB", 1e-8)


TURN = torch.tensor([[3.0, 1.0, 0.0], [0.0, -0.2, 0.5], [0.3, 0.0, 1.0]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("update", "moves_alike"),
    [
        ({"name": "riemannian", "rule": "sgd", "damping": 0.0}, True),
        ({"name": "lora_rite"}, True),
        ({"name": "lora_rite", "escape": False, "clip": 0.0, "skip": 0.0}, True),
        ({"name": "adamw"}, False),
        ({"name": "riemannian"}, False),  # moments of single numbers are no invariants
    ],
    ids=str,
)
def test_steps_do_not_depend_on_the_basis(update: dict[str, Any], moves_alike: bool) -> None:
    """s B A after 30 steps from (A, B) and from (R^-1 A, B R): 1e-6, as eps is no invariant."""
    ends = []
    for turn in (torch.eye(R, dtype=torch.float64), TURN):
        adapter, _ = fresh("lora", zero=False, update=update)
        p = adapter.layers["0"].params
        p["A"].data, p["B"].data = torch.inverse(turn) @ p["A"].data, p["B"].data @ turn
        found = run(adapter, weight_decay=0.01)
        ends.append(found["B"] @ found["A"])
    error = ((ends[0] - ends[1]).norm() / ends[0].norm()).item()
    assert (error < 1e-6) == moves_alike, error


def pro_by_hand(A: Tensor, B: Tensor, gA: Tensor, gB: Tensor, s: float, X: Any) -> Any:
    """Theorem 2.1; X given, or of Theorem 2.3 by the Kronecker form of its Sylvester equation."""
    d, eye = 1e-8, torch.eye(len(A), dtype=A.dtype)
    BB, AA = B.T @ B, A @ A.T
    if X is None:
        C = -(1 / s**2) * inverse(BB, d) @ gA @ A.T
        system = torch.kron(BB.contiguous(), eye) + torch.kron(eye, AA.T.contiguous())
        X = torch.linalg.solve(system, C.reshape(-1)).reshape(len(A), len(A))
    new_A = (1 / s**2) * inverse(BB, d) @ gA + X @ A
    project = torch.eye(len(B), dtype=A.dtype) - B @ inverse(BB, d) @ B.T
    new_B = (1 / s**2) * project @ gB @ inverse(AA, d) - B @ X
    return new_A, new_B


@pytest.mark.parametrize("zero", [True, False])
@pytest.mark.parametrize("mode", ["full", "efficient"])
def test_lora_pro(mode: str, zero: bool) -> None:
    """Algorithm 2 by hand (and its efficient form); from B = 0 a step divides by B's size."""
    adapter, _ = fresh("lora_pro", zero=zero, update={"name": "lora_pro", "mode": mode})
    A, B, s = start(adapter)
    found = run(adapter, weight_decay=0.1, lr=0.01)
    of_W, of_A, of_B = Adam(), Adam(), Adam()
    for lr in rates(0.01):
        G = gradient(W0 + s * B @ A)
        gA, gB = pro_by_hand(A, B, s * B.T @ G, s * G @ A.T, s, None)
        if mode == "full":
            g = of_W(s * (B @ gA + gB @ A))
            dA, dB = pro_by_hand(A, B, s * B.T @ g, s * g @ A.T, s, None)
        else:
            dA, dB = of_A(gA), of_B(gB)
        A, B = (1 - lr * 0.1) * A - lr * dA, (1 - lr * 0.1) * B - lr * dB
    same(found, A, B)


def test_lora_pro_s_gradient_of_w_does_not_depend_on_x() -> None:
    """s (B g_A' + g_B' A) of any X is that of the file's X, and the nearest there is to G."""
    from variants.lora_pro import adjusted

    g = torch.Generator().manual_seed(0)
    A, B, G = (torch.randn(*n, generator=g).double() for n in ((R, N), (M, R), (M, N)))
    s = 2.5
    gA, gB = adjusted(A, B, s * B.T @ G, s * G @ A.T, s, 1e-8)
    for X in (torch.zeros(R, R).double(), torch.randn(R, R, generator=g).double()):
        other = pro_by_hand(A, B, s * B.T @ G, s * G @ A.T, s, X)
        close(s * (B @ gA + gB @ A), s * (B @ other[0] + other[1] @ A))
    leaves = [t.clone().requires_grad_() for t in (gA, gB)]
    (s * (B @ leaves[0] + leaves[1] @ A) - G).square().sum().backward()
    for leaf in leaves:  # the distance to the full gradient is at its least
        assert leaf.grad is not None and leaf.grad.abs().max() < 1e-6


class RiteByHand:
    """Algorithm 1 of the paper for one column factor a [k, r] with partner b [l, r]."""

    def __init__(self, k: int, ell: int, escape: bool) -> None:
        self.V, self.M = torch.zeros(R, R).double(), torch.zeros(k, R).double()
        self.U, self.rho, self.t, self.escape = torch.zeros(ell, R).double(), 0.0, 0, escape

    def unmagnified(self, g: Tensor, b: Tensor) -> Tensor:
        """By a polar decomposition, the paper's, where the package takes QR."""
        left, S, right = torch.linalg.svd(b, full_matrices=False)
        self.new, self.root = left @ right, right.T @ torch.diag(S) @ right
        return g @ torch.linalg.pinv(self.root)

    def direction(self, u: Tensor) -> Tensor:
        self.t += 1
        b1, b2 = ((1 - b ** (self.t - 1)) / (1 - b**self.t) * b for b in (0.9, 0.999))
        P = self.new.T @ self.U
        V = P @ self.V @ P.T
        if self.escape:
            lost = (torch.linalg.eigvalsh(self.V) - torch.linalg.eigvalsh(V)).max()
            lost = min(lost.item(), (self.V.trace() - V.trace()).item())
            self.rho = b2 * (self.rho + max(lost, 0.0))
        self.V, self.U = b2 * V + (1 - b2) * u.T @ u / len(u), self.new
        values, vectors = torch.linalg.eigh(self.V)
        values = 1 / ((values.clamp_min(0) + self.rho).sqrt() + 1e-6)
        self.M = b1 * self.M @ P.T + (1 - b1) * u @ vectors @ torch.diag(values) @ vectors.T
        return self.M @ torch.linalg.pinv(self.root).T


@pytest.mark.parametrize("escape", [True, False])
@pytest.mark.parametrize("clip", [1.0, 0.05])
def test_lora_rite(escape: bool, clip: float) -> None:
    """Algorithm 1 by hand with polar decompositions, in the place of QR: 30 steps, 1e-8."""
    update = {"name": "lora_rite", "escape": escape, "clip": clip}
    adapter, _ = fresh("lora_rite", zero=False, update=update)
    A, B, s = start(adapter)
    found = run(adapter, weight_decay=0.1)
    of_A, of_B = RiteByHand(N, M, escape), RiteByHand(M, N, escape)
    for lr in rates():
        G = gradient(W0 + s * B @ A)
        uA = of_A.unmagnified((s * B.T @ G).T, B)
        uB = of_B.unmagnified(s * G @ A.T, A.T)
        norm = (uA.square().sum() + uB.square().sum()).sqrt().item()
        cut = min(1.0, clip / norm)
        dA, dB = of_A.direction(cut * uA).T, of_B.direction(cut * uB)
        A, B = (1 - lr * 0.1) * A - lr * dA, (1 - lr * 0.1) * B - lr * dB
    same(found, A, B)


def test_lora_rite_leaves_out_a_large_gradient() -> None:
    """A factor whose unmagnified gradient has a root mean square above `skip` has none."""
    adapter, _ = fresh("lora_rite", update={"name": "lora_rite", "skip": 1e-6})
    A, B, _ = start(adapter)
    found = run(adapter, steps=1)
    assert torch.equal(found["A"], A) and torch.equal(found["B"], B)


# What moves the base, or trains it


@pytest.mark.parametrize("begin", [-1, 4])
def test_delta_lora(begin: int) -> None:
    """Algorithm 1 by hand, t from 0, the base moving while t > K; its original comes back."""
    adapter, model = fresh("delta_lora", update={"name": "delta_lora", "start": begin})
    A, B, s = start(adapter)
    base, of_A, of_B = W0.clone(), Adam(), Adam()
    found = run(adapter, weight_decay=0.1)
    for t, lr in enumerate(rates()):
        G = gradient(base + s * B @ A)
        new_A = A - lr * of_A(s * B.T @ G) - lr * 0.1 * A
        new_B = B - lr * of_B(s * G @ A.T) - lr * 0.1 * B
        if t > begin:
            base = base + 2.0 * s * (new_B @ new_A - B @ A)
        A, B = new_A, new_B
    same(found, A, B)
    close(found["W0"], base)
    with adapter.disabled():
        assert torch.equal(model(X), F.linear(X, W0))
    close(adapter.layers["0"].weight, base + s * B @ A)


@pytest.mark.parametrize("shape", [(M, N), (N, M)])
def test_galore(shape: tuple[int, int]) -> None:
    """Algorithm 2 by hand on a wide and on a tall matrix; new directions every 7 steps, 1e-8."""
    m, n = shape
    model = nn.Sequential(nn.Linear(n, m, bias=True, dtype=torch.float64))
    update = {"name": "galore", "rank": 2, "every": 7, "factor": 0.5}
    adapter = variants.attach(model, "galore", targets=["0"], update=update)
    W, bias = adapter.layers["0"].params["W"].detach().clone(), adapter.layers["0"].bias
    x, y = (X, Y) if m == M else (Y, X)
    optimizer, adam = adapter.optimizer(lr=0.05, weight_decay=0.1), Adam()
    for t in range(STEPS):
        (model(x).tanh() - y).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        leaf = W.clone().requires_grad_()
        (F.linear(x, leaf, bias).tanh() - y).square().mean().backward()
        G = leaf.grad
        assert G is not None
        if t % 7 == 0:
            U, _, Vh = torch.linalg.svd(G)
            P = Vh[:2].T if m >= n else U[:, :2]
        step = adam(G @ P) @ P.T if m >= n else P @ adam(P.T @ G)
        W = (1 - 0.05 * 0.1) * W - 0.05 * 0.5 * step
    close(adapter.layers["0"].params["W"], W)
    moments = optimizer.state[adapter.layers["0"].params["W"]]["exp_avg"]
    assert moments.numel() == 2 * max(m, n)


@pytest.mark.parametrize("rule", ["rms", "spectral"])
def test_muon(rule: str) -> None:
    """muon.py's update by hand, its iteration in float64, on DoRA's A and B; m by AdamW."""
    update = {"name": "muon", "rule": rule, "rest": 0.3}
    adapter, _ = fresh("dora", zero=False, update=update)
    A, B, s = start(adapter)
    mag = adapter.layers["0"].params["m"].detach().clone()
    found = run(adapter, weight_decay=0.1)

    def orthogonal(G: Tensor) -> Tensor:
        U, S, Vh = torch.linalg.svd(G / (G.norm() + 1e-7), full_matrices=False)
        for _ in range(5):
            S = 3.4445 * S - 4.7750 * S**3 + 2.0315 * S**5
        size = max(1, G.shape[0] / G.shape[1]) if rule == "spectral" else 0.04 * max(G.shape)
        return size**0.5 * U @ torch.diag(S) @ Vh

    momentum: list[Any] = [0.0, 0.0]
    of_m = Adam()
    for lr in rates():
        leaves = [t.clone().requires_grad_() for t in (A, B, mag)]
        V = W0 + s * leaves[1] @ leaves[0]
        loss_of((leaves[2] / V.detach().norm(dim=1))[:, None] * V).backward()
        for i, t in enumerate((A, B)):
            g: Any = leaves[i].grad
            momentum[i] = 0.95 * momentum[i] + 0.05 * g
            t.mul_(1 - lr * 0.1).sub_(lr * orthogonal(0.05 * g + 0.95 * momentum[i]))
        assert leaves[2].grad is not None
        mag = (1 - 0.3 * lr * 0.1) * mag - 0.3 * lr * of_m(leaves[2].grad)
    same(found, A, B)
    close(found["m"], mag)


UPDATES = (
    "lora_plus", "lora_fa", "riemannian", "lora_pro", "lora_rite", "delta_lora", "muon"
)  # fmt: skip


@pytest.mark.parametrize("update", UPDATES)
def test_a_new_head_goes_by_adamw(update: str) -> None:
    """`others` in the same optimizer, beside any rule, with AdamW's settings: 1e-6 in fp32."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(8, 24, generator=g), torch.randn(8, 5, generator=g)
    from variants._contract import Toy

    adapter = variants.attach(
        Toy(), "lora", rank=2, targets=["first"], update=update, modules_to_save=["lm_head"]
    )
    head = adapter.saved_modules["lm_head"].copy
    twin = [p.detach().clone().requires_grad_() for p in head.parameters()]
    own = adapter.optimizer(lr=1e-2, steps=10, weight_decay=0.1, betas=(0.8, 0.9), foreach=True)
    other = torch.optim.AdamW(twin, lr=1e-2, weight_decay=0.1, betas=(0.8, 0.9))
    for _ in range(5):
        F.mse_loss(adapter.model(x), y).backward()
        for t, p in zip(twin, head.parameters(), strict=True):
            t.grad = None if p.grad is None else p.grad.clone()
        own.step()
        other.step()
        own.zero_grad()
    for t, p in zip(twin, head.parameters(), strict=True):
        close(p, t, 1e-6)


@pytest.mark.parametrize("update", [u for u in UPDATES if u not in ("lora_plus", "muon")])
@pytest.mark.parametrize("form", ["triplet", "full"])
def test_forms_without_a_and_b_are_refused(update: str, form: str) -> None:
    scale = "none" if form == "full" else "standard"
    with pytest.raises(variants.Incompatible, match=rf"{update}.*{form}"):
        fresh("lora", form=form, scale=scale, update=update)


# Allocations that act while training


def each_step(adapter: Adapter, steps: int = STEPS, **settings: Any) -> Iterator[dict[str, Any]]:
    """Trains; gives the allocation's state as each step found it."""
    optimizer = adapter.optimizer(**({"lr": 0.05, "steps": steps} | settings))
    for _ in range(steps):
        assert adapter.allocation_state is not None
        yield dict(adapter.allocation_state)
        (adapter.model(X).tanh() - Y).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("frozen", [False, True])
def test_dylora(frozen: bool) -> None:
    """Algorithm 1 by hand for the b drawn: past b, and if frozen before it, no gradient."""
    adapter, _ = fresh(
        "dylora", zero=False, alpha=5, allocation={"name": "dylora", "frozen": frozen}
    )
    A, B, _ = start(adapter)
    of_A, of_B, drawn = Adam(), Adam(), []
    for state in each_step(adapter):
        b = state["b"]
        drawn.append(b)
        assert adapter.layers["0"].s == pytest.approx(5 / b)
        G = gradient(W0 + 5 / b * B[:, :b] @ A[:b])
        gA, gB = torch.zeros_like(A), torch.zeros_like(B)
        first = b - 1 if frozen else 0
        gA[first:b] = (5 / b * B[:, :b].T @ G)[first:]
        gB[:, first:b] = (5 / b * G @ A[:b].T)[:, first:]
        A, B = A - 0.05 * of_A(gA), B - 0.05 * of_B(gB)
    layer = adapter.layers["0"]
    same({k: layer.params[k] for k in "AB"}, A, B)
    assert set(drawn) == {1, 2, 3}
    assert layer.train().seen is None  # after the last step, training mode sees all of it as well


def test_dylora_draws_uniformly_from_the_seed_and_evaluates_whole() -> None:
    def draws(seed: int) -> list[int]:
        adapter, _ = fresh("dylora", seed=seed)
        rule, layers = adapter.choice.allocation, adapter.layers
        state, found = rule.begin(layers, 600), []
        for step in range(1, 601):
            found.append(state["b"])
            rule.after_step(layers, state, step)
        return found

    drawn = draws(0), draws(1)
    assert drawn[0] == draws(0)
    assert drawn[0] != drawn[1]
    for b in (1, 2, 3):
        assert 150 < drawn[0].count(b) < 250  # 200 expected, deviation 11.5
    adapter, model = fresh("dylora", zero=False)
    adapter.optimizer(lr=0.1, steps=50)
    layer = adapter.layers["0"]
    whole = W0 + layer.full_s * layer.params["B"] @ layer.params["A"]
    close(model.eval()(X), F.linear(X, whole))
    model.train()
    assert not torch.allclose(model(X), F.linear(X, whole))  # seed 0 begins with a part
    adapter.merge()  # in training mode, and yet the whole
    close(model(X), F.linear(X, whole))


def test_relora() -> None:
    """By hand: restarts after steps 8, 16 and 24 of 30, Adam anew with each, A as it was drawn.

    The rate of the steps after a restart is 1/4, 2/4, 3/4 and then all of it.
    """
    adapter, model = fresh("relora", allocation={"name": "relora", "every": 8.0, "warmup": 4.0})
    A, B, s = start(adapter)
    base, of_A, of_B, bound = W0.clone(), Adam(), Adam(), N**-0.5
    layer = adapter.layers["0"]
    for t, _ in enumerate(each_step(adapter)):
        if t in (8, 16, 24):
            base, old = base + s * B @ A, A
            A, B = layer.params["A"].detach().clone(), torch.zeros_like(B)
            of_A, of_B = Adam(), Adam()
            assert not torch.isin(A, old).any() and A.abs().max() <= bound and A.std() > bound / 3
        close(layer.W0, base)
        G, lr = gradient(base + s * B @ A), 0.05 * (min(1, (t % 8 + 1) / 4) if t >= 8 else 1)
        A, B = A - lr * of_A(s * B.T @ G), B - lr * of_B(s * G @ A.T)
    same({k: layer.params[k] for k in "AB"}, A, B)
    assert torch.linalg.matrix_rank(layer.weight - W0) > R
    with adapter.disabled():
        assert torch.equal(model(X), F.linear(X, W0))


def test_relora_keeps_what_dora_s_weight_was() -> None:
    """A restart changes no weight of DoRA: its magnitude stays and its base takes s B A."""
    adapter, _ = fresh("relora", zero=False, form="dora")
    layer, rule = adapter.layers["0"], adapter.choice.allocation
    before = layer.weight.detach()
    stale = rule.after_step({"0": layer}, rule.begin({"0": layer}, 20), 5)
    assert len(stale) == 2 and not layer.params["B"].any()
    close(layer.weight, before, 1e-12)
    with pytest.raises(variants.Incompatible, match="leaves no restart"):
        rule.begin({"0": layer}, 1)


def test_sora() -> None:
    """Adam by hand on A, B and g, then the proximal step of xi |g|_1 on g, found by bisection."""
    xi = 0.02
    adapter, _ = fresh("sora", allocation={"name": "sora", "threshold": xi})
    A, B, s = start(adapter)
    g = adapter.layers["0"].params["g"].detach().clone()
    found = run(adapter)
    adams = [Adam(), Adam(), Adam()]

    def proximal(v: float) -> float:
        """argmin of xi |z| + (z - v)^2 / 2: where the subgradient xi sign(z) + z - v crosses 0."""
        low, high = -10.0, 10.0
        for _ in range(100):
            z = (low + high) / 2
            low, high = (low, z) if xi * ((z > 0) - (z < 0)) + z - v > 0 else (z, high)
        return high

    for lr in rates():
        leaves = [t.clone().requires_grad_() for t in (A, B, g)]
        loss_of(W0 + s * leaves[1] @ torch.diag(leaves[2]) @ leaves[0]).backward()
        steps = [adam(t.grad) for adam, t in zip(adams, leaves, strict=True) if t.grad is not None]
        A, B, g = (t - lr * d for t, d in zip((A, B, g), steps, strict=True))
        g = torch.tensor([proximal(v) for v in g.tolist()], dtype=g.dtype)
    same(found, A, B)
    close(found["g"], g)


def test_sora_closes_gates_and_counts_those_left() -> None:
    adapter, _ = fresh("sora", allocation={"name": "sora", "threshold": 0.06})
    for _ in each_step(adapter, 60, lr=0.01):
        pass
    gates = adapter.layers["0"].params["g"]
    assert adapter.ranks() == {"0": int((gates != 0).sum())} and adapter.ranks()["0"] < R
    assert adapter.allocation_state == {"budget": adapter.ranks()["0"]}


@pytest.mark.parametrize(
    "preset", ["delta_lora", "relora", "dylora", "sora", "lora_rite", "increlora"]
)
def test_checkpoints_of_a_run_hold_all_of_it(preset: str, tmp_path: Any) -> None:
    """Through the run's own files: 20 steps equal 9 and, in another process's stead, 11. Bits."""
    from experiments.record import load_checkpoint, pack, save_checkpoint, unpack

    update: dict[str, Any] = {}
    if preset == "delta_lora":
        update["update"] = {"name": preset, "start": 3}

    def steps(adapter: Adapter, optimizer: torch.optim.Optimizer, count: int) -> None:
        for _ in range(count):
            penalty = adapter.penalty()
            loss = (adapter.model(X).tanh() - Y).square().mean()
            (loss if penalty is None else loss + penalty).backward()
            optimizer.step()
            optimizer.zero_grad()

    whole, _ = fresh(preset, **update)
    optimizer = whole.optimizer(lr=0.01, steps=20)
    steps(whole, optimizer, 9)
    tensors = {f"adapter.{k}": t for k, t in whole.tensors().items()}
    plain = pack({"optimizer": optimizer.state_dict(), "adapter": whole.state()}, "state", tensors)
    cpu = {k: t.detach().clone().contiguous() for k, t in tensors.items()}
    save_checkpoint(tmp_path, 9, cpu, plain)
    steps(whole, optimizer, 11)

    resumed, model = fresh(preset, seed=0, **update)
    optimizer = resumed.optimizer(lr=0.01, steps=20)
    found = load_checkpoint(tmp_path)
    assert found is not None
    state = unpack(found[2], found[1])
    resumed.restore({k.removeprefix("adapter."): t for k, t in found[1].items()
                     if k.startswith("adapter.")})  # fmt: skip
    optimizer.load_state_dict(state["optimizer"])
    resumed.set_state(state["adapter"])
    steps(resumed, optimizer, 11)
    ends = whole.tensors(), resumed.tensors()
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][k], ends[1][k]) for k in ends[0])
    with resumed.disabled():
        assert torch.equal(model(X), F.linear(X, W0))


@pytest.mark.parametrize("angles", [True, False])
def test_increlora(angles: bool) -> None:
    """The official RankAllocator's rules by hand on two layers, with an Adam for each tensor.

    Scores, rounds, the reserve at 1e-5, the scale alpha / k, the penalty, the warm-up of what is
    new, and the end of growth; 45 steps, 1e-8.
    """
    room, alpha, add, target = 4, 7.0, 2, 7
    model = nn.Sequential(nn.Linear(N, M, bias=False), nn.Tanh(), nn.Linear(M, 4, bias=False))
    allocation = {
        "name": "increlora", "target_rank": target / 2, "add": add, "top": 1, "warmup": 5.0,
        "every": 4.0, "restart": 3.0, "orthogonality": 0.2, "angles": angles,
    }  # fmt: skip
    adapter = variants.attach(
        model.double(), "increlora", rank=4, alpha=alpha, targets=["0", "2"],
        allocation=allocation,
    )  # fmt: skip
    layers = list(adapter.layers.values())
    optimizer = adapter.optimizer(lr=0.02, steps=45)
    base = [layer.W0.clone() for layer in layers]
    own = [{k: t.detach().clone() for k, t in layer.params.items()} for layer in layers]
    adams: list[dict[str, Adam]] = [{}, {}]
    since: list[dict[str, int]] = [{}, {}]
    used, mean, spread, sizes = [1, 1], [0.0, 0.0], [0.0, 0.0], []
    for t in range(45):
        loss = F.mse_loss(model(X), Y[:, :4]) + adapter.penalty()  # type: ignore[operator]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

        grows = sum(used) < target
        leaves, changes, penalties = [], [], []
        for i in (0, 1):
            count = min(used[i] + add, room) if grows else used[i]
            names = [f"{k}{j}" for j in range(count) for k in "PQ"]
            names += [f"E{j}" for j in range(used[i])]
            leaf = {k: own[i][k].clone().requires_grad_() for k in names}
            E = [leaf.get(f"E{j}", torch.full((1,), 1e-5).double()) for j in range(count)]
            D = sum((alpha / used[i]) * E[j] * leaf[f"P{j}"] @ leaf[f"Q{j}"] for j in range(count))
            assert isinstance(D, Tensor)
            D.retain_grad()
            leaves.append(leaf)
            changes.append(D)
            for side in ("P", "Q"):
                columns = torch.cat([leaf[f"{side}{j}"].reshape(-1, 1) for j in range(count)], 1)
                gram = columns.T @ columns - torch.eye(count).double()
                penalties += [(gram**2).sum().sqrt()] if angles else list(gram.diag().abs())
        h = F.linear(X, base[0] + changes[0]).tanh()
        by_hand = F.mse_loss(F.linear(h, base[1] + changes[1]), Y[:, :4])
        by_hand = by_hand + 0.2 * sum(penalties) / len(penalties)
        assert loss.item() == pytest.approx(by_hand.item(), rel=1e-8)
        by_hand.backward()
        for i in (0, 1):
            for k, leaf in leaves[i].items():
                assert leaf.grad is not None
                share = min(1.0, (t + 1 - since[i].get(k, -99)) / 3)
                step = adams[i].setdefault(k, Adam())(leaf.grad)
                own[i][k] = own[i][k] - 0.02 * share * step
            gradient_of_D = changes[i].grad
            assert gradient_of_D is not None
            score = (changes[i] * gradient_of_D).abs().sum().item() / changes[i].numel() ** 0.5
            mean[i] = 0.85 * mean[i] + 0.15 * score
            spread[i] = 0.85 * spread[i] + 0.15 * abs(score - mean[i])
        if grows and t > 5 and t % 4 == 0:
            best = max((i for i in (0, 1) if used[i] < room), key=lambda i: mean[i] * spread[i])
            before = used[best]
            used[best] = min(before + add, room, before + target - sum(used))
            for j in range(before, used[best]):
                own[best][f"E{j}"] = torch.full((1,), 1e-5).double()
                since[best][f"E{j}"] = t + 1
            for j in range(before + add, used[best] + add):
                since[best] |= {f"P{j}": t + 1, f"Q{j}": t + 1}
        sizes.append(tuple(used))
        assert list(adapter.ranks().values()) == used
    assert sizes[0] == (1, 1) and sum(sizes[-1]) == target and len(set(sizes)) == 4
    for i, layer in enumerate(layers):
        for j in range(used[i]):
            for k in "PEQ":
                close(layer.params[f"{k}{j}"], own[i][f"{k}{j}"])
        assert not any(layer.params[f"E{j}"].any() for j in range(used[i], room))
    whole = model.train()(X)
    close(model.eval()(X), whole, 1e-12)  # the reserve is gone, so both see the same
