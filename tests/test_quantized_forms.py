"""IR-QLoRA and QA-LoRA: a base and two forms, by the authors' formulas."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import variants
from variants._contract import Toy
from variants._quantize import dynamic_map
from variants.ir_qlora import ICQ, SIGMA
from variants.qa_lora import QALoRA


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def entropy(codes: Tensor) -> Tensor:
    """In bits, of each block of 64 codes."""
    shares = F.one_hot(codes.view(-1, 64).long(), 16).double().mean(1)
    return torch.special.entr(shares).sum(1) / torch.log(torch.tensor(2.0))


def test_icq_finds_what_the_authors_search_finds() -> None:
    """Against htqin/IR-QLoRA's `search` with bitsandbytes' codes, 256 blocks: the entropies of all
    blocks to 1e-9, the shifts of all but ties, the stored shifts to the code.

    Mean entropy of a normal matrix, 256 blocks: 3.768 bits, 3.691 without the shifts.
    """
    functional = pytest.importorskip("bitsandbytes", reason="extra `dev`").functional
    W = 0.02 * drawn(128, 128) + 0.003
    blocks = W.reshape(-1, 256, 64)
    tau0 = blocks.median(2, keepdim=True)[0]
    absmax = (blocks - tau0).abs().max(2, keepdim=True)[0]
    best, chosen = torch.full((256,), -1.0).double(), torch.zeros(256)
    for factor in torch.linspace(-0.1 * SIGMA, 0.1 * SIGMA, 201).tolist():
        tau = factor * absmax + tau0
        packed, _ = functional.quantize_4bit((blocks - tau).reshape(W.shape), quant_type="nf4")
        found = entropy(torch.stack((packed.view(-1) >> 4, packed.view(-1) & 15), dim=1))
        chosen = torch.where(found > best + 1e-12, tau.view(-1), chosen)
        best = torch.maximum(found, best)
    stored = ICQ().store(W)
    own = entropy(stored.codes)
    torch.testing.assert_close(own, best, rtol=0, atol=1e-9)
    assert 3.76 < own.mean() < 3.78
    tau = ICQ().shift(W.view(-1, 64))
    assert (tau - chosen).abs().le(1e-6).float().mean() > 0.95
    table = torch.tensor(dynamic_map())
    theirs = table[(tau[:, None] / tau.abs().max() - table).abs().argmin(1)] * tau.abs().max()
    torch.testing.assert_close(stored.shift, theirs, rtol=0, atol=1e-8)


def test_icq_takes_any_matrix() -> None:
    """A block of zeros, a constant one, one with an outlier, a short one; and none of such."""
    W = 0.1 * drawn(7, 32) + 0.5
    W[:2], W[2:4], W[4, 0] = 0.0, 3.0, -3.0
    dense = ICQ().store(W).dense()
    assert (dense[:2] == 0).all()
    torch.testing.assert_close(dense[2:4], W[2:4], rtol=0.01, atol=0)
    assert (dense[6] - W[6]).norm() < 0.2 * (W[6] - W[6].mean()).norm()
    for bad in (float("nan"), float("inf")):
        W[5, 5] = bad
        with pytest.raises(variants.Incompatible, match="not finite"):
            ICQ().store(W)
    for settings in ({"block": 1}, {"n": 0}, {"reach": 0.0}):
        with pytest.raises(variants.Incompatible, match="base icq"):
            ICQ(**settings)


def test_icq_survives_a_change_of_dtype() -> None:
    stored = ICQ().store(drawn(64, 64) + 1.0)
    before = stored.dense()
    assert torch.equal(nn.Sequential(stored).to(torch.bfloat16)[0].dense(), before)


def test_ir_qlora_is_lora_to_peft(tmp_path: Path) -> None:
    """The two numbers fold into A and B: PEFT's outputs on the decoded base, fp32."""
    peft = pytest.importorskip("peft", reason="the extra `dev` brings peft")
    adapter = variants.attach(Toy(), "ir_qlora", rank=4, targets=["first", "second"])
    for t in adapter.parameters():
        t.data += 0.1
    with pytest.warns(UserWarning, match="trained on base icq"):
        adapter.save_peft(tmp_path)
    stored, x = Toy(), drawn(5, 24)
    for name in ("first", "second", "third"):
        W = getattr(stored, name).weight
        W.data = ICQ().store(W.data).dense()
    theirs = peft.PeftModel.from_pretrained(stored, tmp_path)
    torch.testing.assert_close(theirs(x), adapter.model(x))


def trained(dtype: torch.dtype = torch.float32) -> variants.Adapter:
    """QA-LoRA on two layers of 64 and 96 inputs, with numbers in B."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64)).to(dtype)
    adapter = variants.attach(model, "qa_lora", rank=8, alpha=2, targets=["0", "2"])
    for layer in adapter.layers.values():
        nn.init.normal_(layer.params["B"], std=0.1)
    return adapter


def test_qa_lora_s_product_is_the_authors() -> None:
    """Against `GPTQLoraLinear.forward`: AvgPool1d(32), lora_A, lora_B, s = 1/4."""
    adapter, x = trained(), drawn(3, 5, 64)
    layer = adapter.layers["0"]
    A, B = layer.params["A"], layer.params["B"]
    assert A.shape == (8, 2)
    y = layer.frozen(x) + F.linear(F.linear(nn.AvgPool1d(32)(x), A), B) * 0.25
    torch.testing.assert_close(layer(x), y)


def test_qa_lora_is_absorbed_by_zero_points_as_the_authors_merge() -> None:
    """Against merge.py: qzeros -= (B A)^T s / group / scales; codes and scales bit for bit."""
    for layer in trained().layers.values():
        stored, (m, n) = layer.frozen.stored, layer.frozen.stored.shape
        merged = layer.form.absorbed(stored, layer.params, layer.s)
        assert torch.equal(merged.packed, stored.packed)  # type: ignore[union-attr]
        assert torch.equal(merged.scales, stored.scales)  # type: ignore[union-attr]
        A, B = layer.params["A"], layer.params["B"]
        scales = stored.scales.view(m, n // 32)
        zeros = stored.zero.view(m, n // 32) - (B @ A) * layer.s / 32 / scales
        codes = stored.codes.view(m, n // 32, 32)
        W = ((codes - zeros[..., None]) * scales[..., None]).view(m, n)
        torch.testing.assert_close(merged.dense(), W)  # type: ignore[union-attr]
        torch.testing.assert_close(merged.dense(), layer.weight)  # type: ignore[union-attr]
        assert not torch.allclose(layer.weight, layer.W0, atol=1e-3)


def test_qa_lora_is_absorbed_by_finer_groups_and_by_scales_in_8_bits_too() -> None:
    W, p = drawn(20, 64), {"A": drawn(4, 2), "B": drawn(20, 4)}
    form = QALoRA()
    for axis in ({"name": "int4", "group": "16", "symmetric": False, "double": True},
                 {"name": "int8", "group": "32"}, {"name": "nf4", "block": 32},
                 {"name": "nf4_dq", "block": 16}):  # fmt: skip
        stored = variants.choose("lora", 4, base=axis).base.store(W)
        merged = form.absorbed(stored, p, 0.5)
        torch.testing.assert_close(merged.dense(), form.weight(stored.dense(), p, 0.5))  # type: ignore[union-attr]
        assert merged.bits >= stored.bits  # type: ignore[union-attr]
    for base in ({"name": "nf4"}, {"name": "int4", "group": "row"}, "dense", "icq"):
        stored = variants.choose("lora", 4, base=base).base.store(W)
        assert form.absorbed(stored, p, 0.5) is None
    assert variants.choose("lora", 4).form.absorbed(stored, p, 0.5) is None
