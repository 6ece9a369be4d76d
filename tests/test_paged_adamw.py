"""AdamW by bitsandbytes: beside torch's where its kernels run, refused where they do not."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F

import variants
from variants import paged_adamw

PARTS: list[dict[str, Any]] = [
    {"name": "adamw8bit", "smallest": 1},
    {"name": "adamw8bit", "paged": True},
    {"name": "paged_adamw"},
]


def trained(update: Any, device: str, steps: int) -> torch.Tensor:
    """B after some steps of a teacher's task at a learning rate that falls, as in a run."""
    g = torch.Generator().manual_seed(0)
    x, W = (torch.randn(64, 64, generator=g).to(device) for _ in range(2))
    model = torch.nn.Sequential(torch.nn.Linear(64, 64, bias=False))
    model[0].weight.data = torch.randn(64, 64, generator=g)
    adapter = variants.attach(model.to(device), "lora", rank=8, targets="0", update=update)
    optimizer = adapter.optimizer(1e-2, steps=steps, weight_decay=0.1, betas=(0.8, 0.95))
    for step in range(steps):
        F.mse_loss(model(x), x @ W.T).backward()
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / steps)
        optimizer.step()
        optimizer.zero_grad()
    return adapter.layers["0"].params["B"].detach()


def test_its_step_is_adamws(monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes runs its fp32 moments on the CPU too, unpaged: the same numbers as torch's."""
    monkeypatch.setattr(paged_adamw, "missing", lambda: None)
    with pytest.raises(
        variants.Incompatible, match="paged_adamw needs its tensors on cuda, not on cpu"
    ):
        trained("paged_adamw", "cpu", 1)
    monkeypatch.setattr(paged_adamw.PagedAdamW, "device", "cpu")
    with pytest.warns(UserWarning, match="not supported on CPU"):
        found = trained("paged_adamw", "cpu", 20)
    torch.testing.assert_close(found, trained("adamw", "cpu", 20), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("absent", "reason"), [
    ("bitsandbytes", "bitsandbytes is not installed here (pip install -e '.[quant]')"),
    ("CUDA", "there is no CUDA device here"),
])  # fmt: skip
@pytest.mark.parametrize("update", PARTS, ids=str)
def test_it_is_refused_in_one_line(
    update: dict[str, Any], absent: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if absent == "CUDA":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    else:
        monkeypatch.setattr(paged_adamw, "find_spec", lambda name: None)
    with pytest.raises(variants.Incompatible) as caught:
        variants.choose("lora", update=update)
    wanted = f"update {update['name']} needs CUDA and bitsandbytes: {reason}"
    assert str(caught.value) == wanted


@pytest.mark.gpu
@pytest.mark.parametrize("update", PARTS, ids=str)
def test_it_trains_on_cuda(update: dict[str, Any]) -> None:
    """Near torch's own: exact moments to fp32, 8-bit ones to a share of the way that B went."""
    found, like = (trained(u, "cuda", 50) for u in (update, "adamw"))
    allowed = 1e-4 if update["name"] == "paged_adamw" else 0.1
    assert (found - like).norm() <= allowed * like.norm()
