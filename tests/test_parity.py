"""Equal to PEFT from the same factors, in both directions; equal to bitsandbytes to the bit."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import variants
from variants._adapter import build

peft = pytest.importorskip("peft", reason="the extra `dev` brings peft")
transformers = pytest.importorskip("transformers")

TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip


def llama(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).to(dtype).train()


def ids() -> Tensor:
    return torch.randint(0, 64, (4, 12), generator=torch.Generator().manual_seed(1))


CONFIGS = {
    "lora": lambda: peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS),
    "rslora": lambda: peft.LoraConfig(r=4, lora_alpha=8, use_rslora=True, target_modules=TARGETS),
    "dora": lambda: peft.LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules=TARGETS),
    "pissa": lambda: peft.LoraConfig(
        r=4, lora_alpha=4, init_lora_weights="pissa", target_modules=TARGETS
    ),
    "adalora": lambda: peft.AdaLoraConfig(
        init_r=4, target_r=2, lora_alpha=8, tinit=5, tfinal=10, deltaT=5, total_step=30,
        orth_reg_weight=0.1, target_modules=TARGETS, task_type="CAUSAL_LM",
    ),
}  # fmt: skip
PAIRS = {"A": "lora_A", "B": "lora_B", "m": "lora_magnitude_vector", "P": "lora_B", "Q": "lora_A",
         "E": "lora_E"}  # fmt: skip


def theirs(model: Any, name: str, key: str) -> Tensor:
    """PEFT's tensor for our `key` of layer `name`."""
    found = getattr(model.base_model.model.get_submodule(name), PAIRS[key])["default"]
    return found if isinstance(found, Tensor) else found.weight


def ours_and_theirs(preset: str, dtype: torch.dtype) -> tuple[variants.Adapter, Any]:
    """Both on the same base with the same factors, away from the start."""
    # PEFT starts PiSSA in fp32 only
    their = peft.get_peft_model(llama(), CONFIGS[preset](), autocast_adapter_dtype=False).to(dtype)
    settings: dict[str, Any] = {"rank": 4, "alpha": 4 if preset == "pissa" else 8}
    if preset == "adalora":
        settings["allocation"] = {"name": "adalora", "target_rank": 2.0, "warmup": 5.0,
                                  "final": 10.0, "every": 5.0, "orthogonality": 0.1}  # fmt: skip
    adapter = variants.attach(llama(dtype), preset, targets=TARGETS, **settings)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, layer in adapter.layers.items():
            their.base_model.model.get_submodule(name).base_layer.weight.copy_(layer.W0)
            for key, tensor in layer.p.items():
                noise = 0.1 * torch.randn(tensor.shape, generator=generator)
                tensor += noise.to(dtype)
                their_tensor = theirs(their, name, key)
                their_tensor.copy_(tensor.view_as(their_tensor))
    return adapter, their


@pytest.mark.parametrize("preset", CONFIGS)
def test_forward_and_gradients(preset: str) -> None:
    """fp32, 1e-5 of the largest number."""
    adapter, their = ours_and_theirs(preset, torch.float32)
    logits = adapter.model(ids()).logits, their(input_ids=ids()).logits
    torch.testing.assert_close(*logits, rtol=0, atol=1e-5)
    for out in logits:
        out.square().mean().backward()
    for name, layer in adapter.layers.items():
        for key, tensor in layer.p.items():
            grad = theirs(their, name, key).grad
            assert grad is not None and tensor.grad is not None
            error = (tensor.grad - grad.view_as(tensor)).abs().max() / grad.abs().max()
            assert error < 1e-5, (name, key, error)


@pytest.mark.parametrize("preset", CONFIGS)
def test_thirty_steps(preset: str) -> None:
    """float64, 1e-8 after 30 steps of AdamW, AdaLoRA's penalty and budget included.

    The interval divides the steps before the final phase: PEFT masks at its first step in any
    case, the official code (and this one) at the next multiple.
    """
    adapter, their = ours_and_theirs(preset, torch.float64)
    own = adapter.optimizer(3e-3, steps=30, weight_decay=0.01)
    other = torch.optim.AdamW(
        [p for p in their.parameters() if p.requires_grad], lr=3e-3, weight_decay=0.01
    )
    for step in range(30):
        loss = adapter.model(ids(), labels=ids()).loss
        penalty = adapter.penalty()
        (loss if penalty is None else loss + penalty).backward()
        own.step()
        own.zero_grad()
        their(input_ids=ids(), labels=ids()).loss.backward()
        other.step()
        if preset == "adalora":
            their.base_model.update_and_allocate(step)
        other.zero_grad()
    for name, layer in adapter.layers.items():
        for key, tensor in layer.p.items():
            other_tensor = theirs(their, name, key)
            torch.testing.assert_close(
                tensor.detach(), other_tensor.detach().view_as(tensor), rtol=0, atol=1e-8
            )
    if preset == "adalora":
        assert sum(adapter.ranks().values()) == 2 * len(adapter.layers)


def test_pissa_starts_where_peft_does() -> None:
    """Residual and product (a singular vector's sign is free), fp32, 1e-6."""
    their = peft.get_peft_model(llama(), CONFIGS["pissa"]())
    adapter = variants.attach(llama(), "pissa", rank=4, targets=TARGETS)
    for name, layer in adapter.layers.items():
        other = their.base_model.model.get_submodule(name)
        torch.testing.assert_close(layer.W0, other.base_layer.weight, rtol=0, atol=1e-6)
        product = theirs(their, name, "B") @ theirs(their, name, "A")
        torch.testing.assert_close(layer.p["B"] @ layer.p["A"], product, rtol=0, atol=1e-6)


@pytest.mark.parametrize("preset", [*CONFIGS, "dora+pissa"])
def test_export_to_peft(preset: str, tmp_path: Path) -> None:
    """A trained adapter of ours gives the same logits in PEFT, and back here."""
    name, _, init = preset.partition("+")
    adapter = variants.attach(
        llama(), name, rank=4, targets=TARGETS, **({"init": init} if init else {})
    )
    optimizer = adapter.optimizer(1e-2, steps=5)
    for _ in range(5):
        loss = adapter.model(ids(), labels=ids()).loss
        penalty = adapter.penalty()
        (loss if penalty is None else loss + penalty).backward()
        optimizer.step()
        optimizer.zero_grad()
    wanted = adapter.model.eval()(ids()).logits
    adapter.save_peft(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    their = peft.PeftModel.from_pretrained(llama(), tmp_path).eval()
    torch.testing.assert_close(their(input_ids=ids()).logits, wanted, rtol=0, atol=1e-5)
    again = variants.load_peft(llama(), tmp_path)
    torch.testing.assert_close(again.model.eval()(ids()).logits, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("preset", CONFIGS)
def test_import_from_peft(preset: str, tmp_path: Path) -> None:
    """An adapter that PEFT made and trained gives the same logits here."""
    their = peft.get_peft_model(llama(), CONFIGS[preset]())
    optimizer = torch.optim.AdamW([p for p in their.parameters() if p.requires_grad], lr=1e-2)
    for step in range(5):
        their(input_ids=ids(), labels=ids()).loss.backward()
        optimizer.step()
        if preset == "adalora":
            their.base_model.update_and_allocate(step + 1)
        optimizer.zero_grad()
    wanted = their.eval()(input_ids=ids()).logits
    their.save_pretrained(tmp_path)
    adapter = variants.load_peft(llama(), tmp_path)
    torch.testing.assert_close(adapter.model.eval()(ids()).logits, wanted, rtol=0, atol=1e-5)


def test_import_patterns(tmp_path: Path) -> None:
    """Rank and alpha patterns, with alpha / sqrt(r)."""
    config = peft.LoraConfig(
        r=4, lora_alpha=8, use_rslora=True, target_modules=TARGETS, init_lora_weights=False,
        rank_pattern={"q_proj": 2}, alpha_pattern={"layers.1.mlp.up_proj": 3},
    )  # fmt: skip
    their = peft.get_peft_model(llama(), config).eval()
    their.save_pretrained(tmp_path)
    adapter = variants.load_peft(llama(), tmp_path)
    wanted = their(input_ids=ids()).logits
    torch.testing.assert_close(adapter.model.eval()(ids()).logits, wanted, rtol=0, atol=1e-5)
    layer = adapter.layers["model.layers.1.mlp.up_proj"]
    assert (layer.rank, layer.s) == (4, 3 / math.sqrt(4))


def test_modules_to_save_both_ways(tmp_path: Path) -> None:
    """A head that was trained in full travels with the adapter."""

    def classifier() -> Any:
        torch.manual_seed(0)
        config = transformers.LlamaConfig(**SIZES, num_labels=3, pad_token_id=0)
        return transformers.LlamaForSequenceClassification(config).eval()

    adapter = variants.attach(
        classifier(), "dora", rank=4, targets=TARGETS, modules_to_save=["score"], init="pissa"
    )
    with torch.no_grad():
        for tensor in adapter.parameters():
            tensor += 0.05
    wanted = adapter.model.eval()(ids() + 1 - (ids() == 63).long()).logits
    adapter.save_peft(tmp_path / "ours")
    their = peft.PeftModel.from_pretrained(classifier(), tmp_path / "ours").eval()
    x = ids() + 1 - (ids() == 63).long()
    torch.testing.assert_close(their(input_ids=x).logits, wanted, rtol=0, atol=1e-5)
    their.save_pretrained(tmp_path / "theirs")
    back = variants.load_peft(classifier(), tmp_path / "theirs")
    torch.testing.assert_close(back.model.eval()(x).logits, wanted, rtol=0, atol=1e-5)


def test_a_head_of_several_layers_both_ways(tmp_path: Path) -> None:
    """RoBERTa's head is a module of two layers."""

    def roberta() -> Any:
        torch.manual_seed(0)
        sizes = SIZES | {"max_position_embeddings": 40}
        config = transformers.RobertaConfig(**sizes, num_labels=3, pad_token_id=0)
        return transformers.RobertaForSequenceClassification(config).eval()

    x = ids() % 60 + 2
    adapter = variants.attach(
        roberta(), "lora", rank=4, targets="q,v", modules_to_save=["classifier"]
    )
    with torch.no_grad():
        for tensor in adapter.parameters():
            tensor += 0.05
    wanted = adapter.model.eval()(x).logits
    adapter.save_peft(tmp_path / "ours")
    their = peft.PeftModel.from_pretrained(roberta(), tmp_path / "ours").eval()
    torch.testing.assert_close(their(input_ids=x).logits, wanted, rtol=0, atol=1e-5)
    their.save_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        back = variants.load_peft(roberta(), tmp_path / folder)
        assert list(back.saved_modules) == ["classifier"]
        torch.testing.assert_close(back.model.eval()(x).logits, wanted, rtol=0, atol=1e-5)


class Nested(nn.Module):
    """Two layers, the path of one the end of the other's."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blk = nn.ModuleDict({"fc": nn.Linear(16, 16)})
        self.fc = nn.Linear(16, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blk["fc"](x).tanh())


def test_patterns_are_whole_paths(tmp_path: Path) -> None:
    """Two scales: each layer reads its own, here and in PEFT."""
    adapter = variants.attach(Nested(), "lora", rank=4, alpha=8, targets=["fc"])
    assert list(adapter.layers) == ["blk.fc", "fc"]
    adapter.layers["fc"].full_s = 6.0
    with torch.no_grad():
        for tensor in adapter.parameters():
            tensor += 0.05
    x = torch.randn(3, 16)
    wanted = adapter.model(x)
    adapter.save_peft(tmp_path)
    assert {n: la.s for n, la in variants.load_peft(Nested(), tmp_path).layers.items()} == {
        "blk.fc": 2.0, "fc": 6.0
    }  # fmt: skip
    their = peft.PeftModel.from_pretrained(Nested(), tmp_path).eval()
    torch.testing.assert_close(their(x), wanted, rtol=0, atol=1e-5)


def test_targets_are_whole_paths(tmp_path: Path) -> None:
    """PEFT adapts no layer that was left out here."""
    model = Nested()
    sites = [item for item in variants.plan(model, variants.choose("lora", 4), ["fc"])
             if item.site.path == "fc"]  # fmt: skip
    adapter = build(model, variants.choose("lora", 4), sites, targets=["fc"], dropout=0.0, seed=0)
    adapter.save_peft(tmp_path)
    their = peft.PeftModel.from_pretrained(Nested(), tmp_path)
    adapted = {n for n, m in their.named_modules() if hasattr(m, "lora_A")}
    assert adapted == {"base_model.model.fc"}


def test_tensors_that_are_not_read_are_refused(tmp_path: Path) -> None:
    """A changed lm_head beside the adapter. The base's own is no matter."""
    their = peft.get_peft_model(llama(), peft.LoraConfig(r=4, target_modules=["q_proj"]))
    their.save_pretrained(tmp_path / "same", save_embedding_layers=True)
    assert variants.load_peft(llama(), tmp_path / "same").layers
    with torch.no_grad():
        their.base_model.model.lm_head.weight += 1
    their.save_pretrained(tmp_path / "moved", save_embedding_layers=True)
    with pytest.raises(variants.Incompatible, match=r"lm_head\.weight has no equal here"):
        variants.load_peft(llama(), tmp_path / "moved")


def test_what_peft_cannot_say_is_refused(tmp_path: Path) -> None:
    adapter = variants.attach(llama(), "full", targets=TARGETS)
    with pytest.raises(variants.Incompatible, match="no place for form full"):
        adapter.save_peft(tmp_path)
    config = peft.LoraConfig(r=4, target_modules=TARGETS)
    peft.get_peft_model(llama(), config).save_pretrained(tmp_path / "lora")
    settings = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    for init in ("pissa_niter_4", "corda", "lora_ga", "loftq"):
        settings["init_lora_weights"] = init
        (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(settings))
        with pytest.raises(variants.Incompatible, match=f"{init} moved the base"):
            variants.load_peft(llama(), tmp_path / "lora")


def test_a_moved_and_coded_base_has_no_peft_file(tmp_path: Path) -> None:
    """nf4(W - B0 A0) is not nf4(W) - B0 A0: refused; a coded base alone is warned of."""
    with pytest.raises(variants.Incompatible, match="init pissa moved the weight before base nf4"):
        variants.attach(Nested(), "lora", rank=2, init="pissa", base="nf4").save_peft(tmp_path)
    with pytest.warns(UserWarning, match="trained on base nf4"):
        variants.attach(Nested(), "lora", rank=2, base="nf4").save_peft(tmp_path)
