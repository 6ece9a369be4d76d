"""Layers that are no `nn.Linear`: embeddings, convolutions, fused projections, experts."""

from typing import Any

import pytest
import torch
import transformers
from models import GROUPED, IDS, labelled, logits, made
from torch.nn import functional as F

import variants
from variants._adapter import choose
from variants._calibrate import calibrate
from variants._contract import _disturb


def test_the_slices_of_phi3_have_the_widths_of_their_heads() -> None:
    model, _ = made("phi3")
    plan = variants.plan(model, variants.choose("lora", 2), "attention,mlp")
    assert "model.layers.0.self_attn.qkv_proj" in {item.site.name for item in plan}
    assert not any(item.site.role for item in plan)
    plan = variants.plan(model, variants.choose("lora", 2), "q,v,up")
    shapes = {item.site.role: item.shape for item in plan if item.site.role}
    assert shapes == {"q": (32, 32), "v": (16, 32), "up": (48, 32)}


def test_a_slice_is_the_row_block_that_the_model_splits() -> None:
    """Training `up` of Phi-3 changes the second half of gate_up_proj, and only that."""
    model, _ = made("phi3")
    before = model.model.layers[0].mlp.gate_up_proj.weight.clone()
    adapter = _disturb(variants.attach(model, "lora", rank=2, targets="up"))
    adapter.merge()
    changed = (model.model.layers[0].mlp.gate_up_proj.weight != before).any(1)
    assert not changed[:48].any() and changed[48:].all()


def test_a_convolution_s_change_is_loralib_s() -> None:
    """y = conv(x, W0 + s (B A) viewed as the kernel): loralib's ConvLoRA, float64, 1e-12."""
    model, inputs = made("picture")
    model, x = model.double(), inputs["x"].double()
    adapter = _disturb(variants.attach(model, "lora", rank=2, alpha=3, targets="first"))
    p, layer = adapter.layers["first"].p, adapter.layers["first"]
    kernel = layer.W0.view(8, 3, 3, 3) + 1.5 * (p["B"] @ p["A"]).view(8, 3, 3, 3)
    wanted = F.conv2d(x, kernel, layer.bias, stride=2, padding=1)
    torch.testing.assert_close(model.first(x), wanted, rtol=0, atol=1e-12)


def test_an_embedding_s_change_is_loralib_s() -> None:
    """y = E[ids] + s (A^T)[ids] B^T: loralib's Embedding, 1e-6; by way of rank r alone."""
    model, _ = made("llama")
    adapter = _disturb(variants.attach(model, "lora", rank=2, alpha=3, targets="embed_tokens"))
    (layer,) = adapter.layers.values()
    p, ids = layer.p, IDS["input_ids"]
    wanted = F.embedding(ids, layer.W0.t()) + 1.5 * F.embedding(ids, p["A"].t()) @ p["B"].t()
    torch.testing.assert_close(model.model.embed_tokens(ids), wanted, rtol=0, atol=1e-6)


def test_what_cannot_be_dropped_or_tied_is_refused() -> None:
    with pytest.raises(variants.Incompatible, match=r"dropout=0.1: .*embed_tokens"):
        variants.attach(made("llama")[0], "lora", rank=2, targets="embeddings", dropout=0.1)
    with pytest.raises(variants.Incompatible, match="tied to"):
        tied = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**GROUPED | {"tie_word_embeddings": True})
        )
        variants.attach(tied, "lora", rank=2, targets="embeddings")


def test_patterns_of_rank_and_alpha() -> None:
    model, _ = made("llama")
    adapter = variants.attach(
        model, "lora", rank=4, alpha=8, rank_pattern={"mlp": 2, "layers.0.mlp.down_proj": 6},
        alpha_pattern={"q": 16},
    )  # fmt: skip
    ranks = {n: la.rank for n, la in adapter.layers.items()}
    assert ranks["model.layers.0.self_attn.q_proj"] == 4
    assert (ranks["model.layers.0.mlp.down_proj"], ranks["model.layers.1.mlp.down_proj"]) == (6, 2)
    assert adapter.layers["model.layers.0.self_attn.q_proj"].s == 4
    assert adapter.layers["model.layers.1.mlp.down_proj"].s == 4
    tied = variants.attach(made("llama")[0], "lora", rank=4, rank_pattern={"mlp": 2})
    assert {la.s for la in tied.layers.values()} == {2.0}  # alpha = 2r is of each layer's own rank
    for pattern in ({"rank_pattern": {"typo": 2}}, {"alpha_pattern": {"lm_head": 2}}):
        with pytest.raises(variants.Incompatible, match=r"typo|lm_head"):
            variants.attach(made("llama")[0], "lora", rank=4, **pattern)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_the_gradient_of_an_expert_is_that_of_its_place_in_the_stack(name: str) -> None:
    """Against autograd on the stacked parameters, fp32, 1e-6; which stay the model's own."""
    model, inputs = made(name)
    with torch.no_grad():
        batch: dict[str, Any] = labelled(inputs, logits(model, inputs))
    experts = model.model.layers[1].mlp.experts
    stacks, keys = dict(experts.named_parameters()), list(model.state_dict())
    choice = choose("lora_one", 2, init="lora_ga")
    planned = [item for item in variants.plan(model, choice, "experts")
               if ".layers.1." in item.site.path]  # fmt: skip
    assert len(planned) == 8
    found = {}

    class Kept(type(choice.init)):  # type: ignore[misc]
        """Keeps the gradient as it is."""

        def reduce(self, W0: Any, found: Any, r: int) -> Any:
            return dict(found)

    bases = {item.site.path: choice.base for item in planned}
    found, _ = calibrate(model, choose("lora", 2, init=Kept()), planned, [batch], bases)
    assert dict(experts.named_parameters()) == stacks and list(model.state_dict()) == keys
    model(**batch).loss.backward()
    for path, own in found.items():
        _, stack, index = path.rsplit(".", 2)
        torch.testing.assert_close(own["gradient"], stacks[stack].grad[int(index)],
                                   rtol=1e-5, atol=1e-6)  # fmt: skip
