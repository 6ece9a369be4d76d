"""Targets, kinds of layers, names that are refused, and adapters on real architectures."""

from pathlib import Path
from typing import Any

import models
import pytest
import torch
from models import seeded
from torch import nn

import variants
from variants._adapter import fingerprint


def gpt2() -> Any:
    return seeded(models.gpt2)


def llama(**more: Any) -> Any:
    return seeded(models.llama, **more)


def bert() -> Any:
    return seeded(models.bert)


def t5() -> Any:
    return seeded(models.t5)


def names(model: nn.Module, targets: Any) -> list[str]:
    return [item.site.name for item in variants.plan(model, variants.choose("lora", 2), targets)]


def test_roles_of_llama() -> None:
    model = llama()
    assert len(names(model, "all-linear")) == 14
    assert names(model, "q,v")[:2] == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.v_proj",
    ]
    assert {n.rpartition(".")[2] for n in names(model, "attention")} == {
        "q_proj", "k_proj", "v_proj", "o_proj"
    }  # fmt: skip
    assert {n.rpartition(".")[2] for n in names(model, ["mlp"])} == {
        "gate_proj", "up_proj", "down_proj"
    }  # fmt: skip
    assert names(model, ["layers.1.mlp.up_proj", "up"]) == names(model, "up")


def test_roles_of_bert_and_t5() -> None:
    ends = {n.partition("layer.0.")[2] for n in names(bert(), "o,up,down") if "layer.0." in n}
    assert ends == {"attention.output.dense", "intermediate.dense", "output.dense"}
    assert not any("classifier" in n for n in names(bert(), "all-linear"))
    assert {n.rpartition(".")[2] for n in names(t5(), "all-linear")} == {
        "q", "k", "v", "o", "wi_0", "wi_1", "wo"
    }  # fmt: skip


def test_fused_roles_of_gpt2_are_slices() -> None:
    assert names(gpt2(), "q,v")[:2] == ["transformer.h.0.attn.c_attn.q",
                                        "transformer.h.0.attn.c_attn.v"]  # fmt: skip
    assert "transformer.h.0.attn.c_attn" in names(gpt2(), "attention")
    assert {n.rpartition(".")[2] for n in names(gpt2(), "mlp")} == {"c_fc", "c_proj"}


@pytest.mark.parametrize("preset", ["lora", "dora", "pissa", "adalora", "qlora"])
def test_slices_of_a_fused_layer(preset: str, tmp_path: Path) -> None:
    """q and v of GPT-2's c_attn learn; k stays where it was."""
    model, ids = gpt2(), torch.randint(0, 64, (2, 8))
    weight = model.transformer.h[0].attn.c_attn.weight.detach().clone()
    adapter = variants.attach(model, preset, rank=4, targets="q,v")
    optimizer = adapter.optimizer(1e-2, steps=4)
    for _ in range(4):
        penalty = adapter.penalty()
        loss = model(input_ids=ids, labels=ids).loss
        (loss if penalty is None else loss + penalty).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        after = model(input_ids=ids).logits
        adapter.save(tmp_path)
        torch.testing.assert_close(
            variants.load(gpt2(), tmp_path).model(input_ids=ids).logits, after, rtol=0, atol=0
        )
        with pytest.raises(variants.Incompatible, match="slice of a fused layer"):
            adapter.save_peft(tmp_path / "peft")
        moved = adapter.ranks()["transformer.h.0.attn.c_attn.q"] > 0  # a budget may drop it whole
        adapter.merge()
        torch.testing.assert_close(model(input_ids=ids).logits, after, rtol=1e-4, atol=1e-5)
    merged = model.transformer.h[0].attn.c_attn.weight
    assert type(model.transformer.h[0].attn.c_attn).__name__ == "Conv1D"
    if not adapter.choice.base.lossy:
        assert torch.equal(merged[:, 32:64], weight[:, 32:64])
    assert torch.equal(merged[:, :32], weight[:, :32]) != moved


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"preset": "dorra"}, "did you mean 'dora'"),
        ({"preset": "lora", "form": "dorra"}, "form=dorra: no such form"),
        ({"preset": "lora", "shape": "x"}, "axis=shape: no such axis"),
        ({"preset": "lora", "form": {"name": "dora", "x": 1}}, "no setting 'x'; its settings"),
        ({"preset": "lora", "rank": 0}, "rank=0: the rank is a whole number"),
        ({"preset": "lora", "rank": 2.5}, "rank=2.5: the rank is a whole number"),
        ({"preset": "lora", "rank": True}, "whole number"),
        ({"preset": "lora", "rank": 100000}, r"rank=100000: .* is 32 x 32, so its rank is at most"),
        ({"preset": "factorized", "rank": 100000}, "no target has a rank above 32"),
        ({"preset": "lora", "alpha": "x"}, "alpha=x: a number, or a multiple of the rank"),
        ({"preset": "lora", "alpha": {"q": 1}}, "alpha={'q': 1}: a number, or a multiple of the"),
        ({"preset": "lora", "alpha": -1}, "alpha=-1: alpha is a positive number"),
        ({"preset": "lora", "targets": "nothing"}, "targets=nothing: matches no layer"),
        ({"preset": "lora", "targets": ["q_proj", "typo"]}, "targets=typo: matches no layer"),
        ({"preset": "lora", "dropout": 1.0}, "dropout=1.0: a probability"),
        ({"preset": "full", "init": "pissa"}, "init pissa needs a low-rank form, not full"),
        ({"preset": "full", "scale": "rslora"}, "scale rslora needs a form with a scale"),
        ({"preset": "lora", "allocation": "adalora"}, "needs a form with singular values"),
        ({"preset": "lora", "modules_to_save": ["x"]}, "modules_to_save=x: matches 0 modules"),
    ],
)
def test_refusals_name_the_choice_and_change_nothing(arguments: dict, message: str) -> None:
    model = llama()
    before = [(n, type(m)) for n, m in model.named_modules()]
    arguments = dict(arguments)
    with pytest.raises(variants.Incompatible, match=message) as caught:
        variants.attach(model, arguments.pop("preset"), **arguments)
    assert isinstance(caught.value, ValueError) and "\n" not in str(caught.value)
    assert [(n, type(m)) for n, m in model.named_modules()] == before
    assert all(p.requires_grad for p in model.parameters())


def test_a_setting_without_meaning_is_said() -> None:
    with pytest.warns(UserWarning, match="rank=8 has no meaning for form full"):
        adapter = variants.attach(llama(), "full", rank=8)
    assert adapter.notes == ["rank=8 has no meaning for form full: there is none"]
    with pytest.warns(UserWarning, match="alpha=8 has no meaning with scale none"):
        variants.attach(llama(), "factorized", alpha=8)
    with pytest.warns(UserWarning, match="calibration batches have no use"):
        variants.attach(llama(), "lora", calibration=[1])


def test_a_tied_head_is_refused_and_an_untied_one_adapted() -> None:
    with pytest.raises(variants.Incompatible, match=r"tied to model\.embed_tokens"):
        variants.attach(llama(tie_word_embeddings=True), "pissa", rank=4, targets="lm_head")
    adapter = variants.attach(llama(tie_word_embeddings=False), "lora", rank=4, targets="lm_head")
    assert list(adapter.layers) == ["lm_head"]


def test_a_base_stores_every_linear_layer_but_the_head() -> None:
    model = llama()
    adapter = variants.attach(model, "qlora", rank=4, targets="q,v")
    kinds = {n.rpartition(".")[2]: type(m).__name__ for n, m in model.named_modules()}
    assert kinds["up_proj"] == "Frozen" and kinds["q_proj"] == "Adapted"
    assert kinds["lm_head"] == "Linear"
    assert len(adapter.layers) == 4
    adapter.detach()
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear


def test_one_adapter_a_model() -> None:
    model = llama()
    adapter = variants.attach(model, "lora", rank=2)
    with pytest.raises(variants.Incompatible, match="has an adapter already"):
        variants.attach(model, "dora", rank=2)
    adapter.detach()
    with pytest.raises(variants.Incompatible, match="has left its model"):
        adapter.merge()
    variants.attach(model, "dora", rank=2)


def test_damaged_and_foreign_files_are_named(tmp_path: Path) -> None:
    variants.attach(llama(), "lora", rank=2).save(tmp_path)
    assert len({file.stat().st_mode for file in tmp_path.iterdir()}) == 1, "readable for the same"
    file = tmp_path / "adapter.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(variants.Incompatible, match="truncated, or not a safetensors"):
        variants.load(llama(), tmp_path)
    file.unlink()
    with pytest.raises(variants.Incompatible, match="no such file"):
        variants.load(llama(), tmp_path)
    file.write_bytes(whole)
    settings = tmp_path / "adapter.json"
    text = settings.read_text()
    settings.write_text(text[:100])
    with pytest.raises(variants.Incompatible, match="truncated, or not json"):
        variants.load(llama(), tmp_path)
    settings.write_text(text)
    with pytest.raises(
        variants.Incompatible, match="made for another model: this one has no layer"
    ):
        variants.load(gpt2(), tmp_path)


def test_another_base_is_said(tmp_path: Path) -> None:
    variants.attach(llama(), "lora", rank=2).save(tmp_path)
    other = llama()
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight += 0.01
    with pytest.warns(UserWarning, match="1 of 14 matrices differ"):
        variants.load(other, tmp_path)


def test_activation_checkpointing_with_dropout() -> None:
    """The recomputed forward draws the same masks: gradients equal those without it."""
    grads = []
    for checkpointing in (False, True):
        model = llama().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        adapter = variants.attach(model, "dora", rank=4, dropout=0.3)
        with torch.no_grad():
            for t in adapter.parameters():
                t += 0.05
        torch.manual_seed(1)
        ids = torch.arange(16).view(2, 8)
        model(input_ids=ids, labels=ids).loss.backward()
        grads.append([t.grad for t in adapter.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_autocast_runs_the_adapter_in_bf16() -> None:
    model, ids = llama(), torch.arange(16).view(2, 8)
    for preset in ("lora", "dora", "qlora"):
        adapter = variants.attach(model, preset, rank=4)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=ids).logits
            logits.float().mean().backward()
        assert logits.dtype == torch.bfloat16
        assert all(t.grad.dtype == torch.float32 for t in adapter.parameters())
        adapter.detach()


class Head(nn.Module):
    """A head of two layers, as RoBERTa's."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.out_proj = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out_proj(self.dense(x).tanh())


class Net(nn.Module):
    """An embedding, a layer, a recurrent module with two outputs, a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.fc = nn.Embedding(10, 8), nn.Linear(8, 8)
        self.gru, self.classifier = nn.GRU(8, 8, batch_first=True), Head()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x, _ = self.gru(self.fc(self.embed(ids)))
        return self.classifier(x)


IDS = torch.arange(10).view(2, 5)


def test_modules_trained_in_full_of_every_shape() -> None:
    """Integers in, tuples out; merged they have the model's dtype again."""
    model = Net().to(torch.bfloat16)
    adapter = variants.attach(
        model, "lora", rank=2, targets="fc", modules_to_save=["embed", "gru", "classifier"]
    )
    optimizer = adapter.optimizer(1e-2)
    for _ in range(3):
        model(IDS).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    after = model(IDS)
    assert adapter.saved_modules["embed"].copy.weight.dtype == torch.float32  # type: ignore[union-attr]
    adapter.merge()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(model(IDS), after, rtol=0.05, atol=0.02)
    assert 0 < adapter.merge_error < 2**-8


def test_a_module_trained_in_full_is_not_stored_by_the_base() -> None:
    adapter = variants.attach(
        Net(), "qlora", rank=2, targets="fc", modules_to_save=["classifier.dense"]
    )
    assert type(adapter.saved_modules["classifier.dense"].copy) is nn.Linear


def test_a_module_trained_in_full_holds_no_target() -> None:
    model = Net()
    with pytest.raises(variants.Incompatible, match=r"classifier: the target classifier\.dense"):
        variants.attach(model, "lora", rank=2, modules_to_save=["classifier"], targets="dense")
    assert type(model.classifier.dense) is nn.Linear


def test_a_saved_head_of_another_shape_changes_nothing(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"rank": 2, "targets": "fc", "modules_to_save": ["classifier"]}
    variants.attach(Net(), "lora", **settings).save(tmp_path)
    other = Net()
    other.classifier.out_proj = nn.Linear(8, 4)
    with pytest.raises(variants.Incompatible, match=r"classifier\.out_proj\.weight is \(3, 8\)"):
        variants.load(other, tmp_path)
    assert type(other.fc) is nn.Linear and other.fc.weight.requires_grad


def test_a_layer_that_stands_twice_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    model.append(model[0])
    with pytest.raises(variants.Incompatible, match="targets=0: the same layer stands at 2 too"):
        variants.attach(model, "lora", rank=2)


@pytest.mark.parametrize("preset", ["lora", "dora", "adalora", "full", "factorized", "qlora"])
@pytest.mark.parametrize("init", ["default", "pissa"])
def test_autocast_is_the_low_precision_of_products_alone(preset: str, init: str) -> None:
    """Against the same layer given bf16 input outside autocast, where nothing else is rounded."""
    if init == "pissa" and preset in ("full", "factorized"):
        with pytest.raises(variants.Incompatible, match="needs a low-rank form"):
            variants.choose(preset, init=init)
        return
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48))
    rank = None if preset == "full" else 8
    variants.attach(model, preset, rank=rank, init=init)
    x = torch.randn(5, 64)
    with torch.autocast("cpu", torch.bfloat16):
        inside = model(x)
    assert torch.equal(inside, model(x.bfloat16()))
    double = model[0](x.double())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model[0](x.double()), double)


@pytest.mark.parametrize("base", ["dense", "bf16", "nf4"])
def test_a_bias_may_learn_on_every_base(base: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 8))
    variants.attach(model, "lora", rank=2, base=base)
    bias = model[0].bias.requires_grad_()
    model(torch.randn(5, 64)).sum().backward()
    torch.testing.assert_close(bias.grad, torch.full((8,), 5.0))


def test_dora_keeps_a_small_change_of_magnitude_in_bf16() -> None:
    """bf16 steps are .0078 above 1; a gain of 1.003 must arrive, on average over many outputs."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512, bias=False)).bfloat16()
    adapter = variants.attach(model, "dora", rank=4)
    x = torch.randn(64, 256).bfloat16()
    before = model(x).float()
    with torch.no_grad():
        adapter.layers["0"].p["m"].mul_(1.003)
    after = model(x).float()
    gain = (after * before).sum() / before.square().sum()
    assert gain.item() == pytest.approx(1.003, abs=3e-4)


def test_dora_with_dropout_keeps_its_input_once() -> None:
    """q, k and v of one x: x itself, and three results to be scaled; no dropped copies."""
    torch.manual_seed(0)
    model = nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(3)).train()
    adapter = variants.attach(model, "dora", rank=2, dropout=0.5)
    x = torch.randn(256, 64, requires_grad=True)
    kept: dict[int, int] = {}
    own = {t.untyped_storage().data_ptr() for t in model.state_dict().values()}

    def pack(t: torch.Tensor) -> torch.Tensor:
        if t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        outputs = [layer(x) for layer in model]
    assert len(outputs) == len(adapter.layers) == 3
    assert sum(kept.values()) < 4.1 * x.nbytes


def test_dora_may_drop_on_the_low_rank_path_alone() -> None:
    """y = c (W0 x + s B A D x) + b, and gradients, against the same written out, 1e-10."""
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(16, 12)).double().train()
    form = {"name": "dora", "dropout_on": "low_rank"}
    adapter = variants.attach(model, "lora", rank=2, form=form, targets="0", dropout=0.4)
    assert adapter.choice.axes()["form"]["dropout_on"] == "low_rank"
    layer, x = adapter.layers["0"], torch.randn(5, 16, dtype=torch.float64, requires_grad=True)
    p = [nn.init.normal_(layer.params[k]) for k in "ABm"]
    torch.manual_seed(1)
    y = model(x)
    torch.manual_seed(1)
    dropped, W = layer.dropout(x), layer.W0 + layer.s * p[1] @ p[0]
    t = x @ layer.W0.mT + layer.s * dropped @ p[0].mT @ p[1].mT
    wanted = t * (p[2] / W.detach().norm(dim=1)) + model[0].bias
    torch.testing.assert_close(y, wanted, rtol=1e-10, atol=1e-10)
    up = torch.randn_like(y)
    grads = [torch.autograd.grad(out, [x, *p], up) for out in (y, wanted)]
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-10)
    with pytest.raises(variants.Incompatible, match="dropout_on=x; choices: change, low_rank"):
        variants.choose("lora", form={"name": "dora", "dropout_on": "x"})


def test_the_fingerprint_sees_every_column() -> None:
    W = torch.zeros(512, 512)
    other = W.clone()
    other[:, 7] = 1.0
    assert fingerprint(W) != fingerprint(other)


WHOLE: dict[str, Any] = {"form": {"name": "dora", "detach_norm": False}}


@pytest.mark.parametrize(
    ("preset", "more"),
    [
        ("lora", {}),
        ("lora", {"dropout": 0.4}),
        ("lora_fa", {}),
        ("lora_fa", {"dropout": 0.4}),
        ("dora", WHOLE),
        ("dora", WHOLE | {"dropout": 0.4}),
        ("ia3", {}),
        ("lora", {"base": "nf4"}),
        ("dora", WHOLE | {"base": "nf4", "dropout": 0.4}),
        ("loha", {}),
        ("hira", {"dropout": 0.4}),
        ("sinelora", {"base": "nf4"}),
        ("randlora", {}),
    ],
)
def test_second_derivatives_are_whole(preset: str, more: dict[str, Any]) -> None:
    """Of inputs and trained tensors, in float64, by finite differences."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 5)).double()
    settings = {} if preset == "ia3" else {"rank": 2}
    adapter = variants.attach(model, preset, targets=["0"], **settings, **more)
    layer, g = adapter.layers["0"].train(), torch.Generator().manual_seed(0)
    trained = {k: t for k, t in layer.named_parameters() if t.requires_grad}
    for t in trained.values():
        t.data = t.data.double() + 0.3 * torch.randn(t.shape, generator=g, dtype=torch.float64)
    x = torch.randn(3, 4, generator=g, dtype=torch.float64, requires_grad=True)

    def outputs(x: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        torch.default_generator.manual_seed(1)
        return torch.func.functional_call(layer, dict(zip(trained, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(outputs, (x, *trained.values()))
    assert torch.autograd.gradgradcheck(outputs, (x, *trained.values()))
