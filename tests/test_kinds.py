"""Layers that are no `nn.Linear`: embeddings, convolutions, fused projections, experts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import variants
from variants._contract import _disturb

transformers = pytest.importorskip("transformers")

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0,
         "tie_word_embeddings": False}  # fmt: skip


class Picture(nn.Module):
    """Two convolutions, one of them in groups, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.second = nn.Conv2d(8, 12, (1, 3), groups=2, bias=False)
        self.norm = nn.LayerNorm(12)

    def forward(self, x: Tensor) -> Tensor:
        h = self.second(F.silu(self.first(x)))
        return self.norm(h.mean((2, 3)))


def causal(kind: str, **more: Any) -> Any:
    config = transformers.AutoConfig.for_model(kind, **SMALL | more)
    return transformers.AutoModelForCausalLM.from_config(config)


MIXTURE = {"num_local_experts": 4, "num_experts": 4, "moe_intermediate_size": 24,
           "num_experts_per_tok": 2}  # fmt: skip
IDS = torch.arange(24).view(2, 12) % 64
MODELS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "picture": (
        Picture,
        {"x": torch.randn(2, 3, 9, 11, generator=torch.Generator().manual_seed(1))},
    ),
    "llama": (lambda: causal("llama"), {"input_ids": IDS}),
    "qwen3": (lambda: causal("qwen3"), {"input_ids": IDS}),
    "gemma": (lambda: causal("gemma"), {"input_ids": IDS}),
    "phi3": (lambda: causal("phi3"), {"input_ids": IDS}),
    "mixtral": (lambda: causal("mixtral", **MIXTURE), {"input_ids": IDS}),
    "qwen3_moe": (lambda: causal("qwen3_moe", **MIXTURE), {"input_ids": IDS}),
    "gpt2": (
        lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=64,
                n_embd=32,
                n_layer=2,
                n_head=4,
                n_positions=64,
                tie_word_embeddings=False,
            )
        ),
        {"input_ids": IDS},
    ),
    "vit": (
        lambda: transformers.ViTForImageClassification(
            transformers.ViTConfig(
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=48,
                image_size=16,
                patch_size=8,
            )
        ),
        {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))},
    ),
}


def made(name: str) -> tuple[Any, dict[str, Any]]:
    make, inputs = MODELS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().eval(), inputs


def logits(model: Any, inputs: dict[str, Any]) -> Tensor:
    out = model(**inputs)
    return out if isinstance(out, Tensor) else out.logits


CASES = [
    ("picture", "convolutions"),
    ("llama", "embeddings"),
    ("gpt2", "wte"),
    ("gemma", "embeddings"),
    ("vit", "convolutions"),
    ("vit", "all-linear"),
    ("phi3", "q,v"),
    ("phi3", "all-linear"),
    ("phi3", "up"),
    ("qwen3", "k"),
    ("mixtral", "all-linear"),
    ("mixtral", "experts"),
    ("qwen3_moe", "mlp"),
]


@pytest.mark.parametrize("variant", ["lora", "dora", "pissa", "full"])
@pytest.mark.parametrize(("name", "targets"), CASES)
def test_every_kind_keeps_the_promises(
    name: str, targets: str, variant: str, tmp_path: Path
) -> None:
    """Starts at the base, trains alone, disables, saves, loads, merges: fp32, 1e-5."""
    model, inputs = made(name)
    with torch.no_grad():
        before = logits(model, inputs)
    rank = None if variant == "full" else 2
    adapter = variants.attach(model, variant, rank=rank, targets=targets)
    with torch.no_grad():
        torch.testing.assert_close(logits(model, inputs), before, rtol=1e-5, atol=1e-5)
    _disturb(adapter, 0.02)
    model.train()
    logits(model, inputs).square().mean().backward()
    own = {id(t) for t in adapter.parameters()}
    for path, p in model.named_parameters():
        assert (id(p) in own) == p.requires_grad, path
    got = [t.grad for t in adapter.parameters()]
    assert all(g is not None and torch.isfinite(g).all() for g in got)
    model.eval()
    with torch.no_grad():
        tuned = logits(model, inputs)
        assert (tuned - before).abs().max() > 1e-5
        with adapter.disabled():
            torch.testing.assert_close(logits(model, inputs), before, rtol=1e-5, atol=1e-5)
        adapter.save(tmp_path)
        other, _ = made(name)
        variants.load(other, tmp_path)
        assert torch.equal(logits(other, inputs), tuned)
        adapter.merge()
        torch.testing.assert_close(logits(model, inputs), tuned, rtol=1e-4, atol=1e-5)
    assert [(n, type(m)) for n, m in model.named_modules()] == [
        (n, type(m)) for n, m in made(name)[0].named_modules()
    ]
    assert model.state_dict().keys() == made(name)[0].state_dict().keys()


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
    p = layer.p
    wanted = F.embedding(IDS, layer.W0.t()) + 1.5 * F.embedding(IDS, p["A"].t()) @ p["B"].t()
    torch.testing.assert_close(model.model.embed_tokens(IDS), wanted, rtol=0, atol=1e-6)


def test_what_cannot_be_dropped_or_tied_is_refused() -> None:
    with pytest.raises(variants.Incompatible, match=r"dropout=0.1: .*embed_tokens"):
        variants.attach(made("llama")[0], "lora", rank=2, targets="embeddings", dropout=0.1)
    with pytest.raises(variants.Incompatible, match="tied to"):
        tied = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**SMALL | {"tie_word_embeddings": True})
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
    for pattern in ({"rank_pattern": {"typo": 2}}, {"alpha_pattern": {"lm_head": 2}}):
        with pytest.raises(variants.Incompatible, match=r"typo|lm_head"):
            variants.attach(made("llama")[0], "lora", rank=4, **pattern)  # type: ignore[arg-type]
