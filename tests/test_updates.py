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
    adapter, _ = fresh("lora_fa")
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

    10 steps in float64, 1e-6: the first step divides by gradients near zero.
    """
    update = {"name": "lora_fa", "projected": True}
    ours, theirs, modules = beside_peft("lora_fa", torch.float64, update=update)
    from peft.optimizers import create_lorafa_optimizer, lorafa

    monkeypatch.setattr(lorafa, "is_bf16_available", lambda: False)
    other = create_lorafa_optimizer(theirs, r=4, lora_alpha=8, lr=1e-3)
    for group in other.param_groups:
        group["eps"] = 0.0
    train_both(ours, theirs, ours.optimizer(lr=1e-3, eps=0.0), other, 10)
    compare(ours, modules, "AB", 1e-6)


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
