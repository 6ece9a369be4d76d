"""Merging into codes again when asked, and adapters that meet another base than their own."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from models import GROUPED, IDS, causal, gpt2, logits, made, seeded
from torch import Tensor, nn

import variants
from variants._contract import Toy, _disturb, _inputs
from variants._experts import Unstacked
from variants._io import say_other_base
from variants._layer import Frozen
from variants._quantize import decode, encode
from variants.dense import Dense
from variants.lora import LoRA
from variants.nf4 import NF4, NF4_VALUES

MODELS = {
    "fused, transposed": (lambda: seeded(gpt2), {"targets": "q,v,up"}),
    "experts": (lambda: made("mixtral")[0], {"targets": ["q", "down_proj.1"]}),
    "a head in few bits": (lambda: seeded(causal, kind="llama", **GROUPED),
                           {"targets": ["q", "lm_head"]}),
}  # fmt: skip


def rounded(W: Tensor) -> Tensor:
    """NF4 and back, by the functions of the engine."""
    return decode(*encode(W, NF4_VALUES, 64), NF4_VALUES, 64).view(W.shape)


@pytest.mark.parametrize("which", MODELS)
def test_requantized_is_the_rounded_sum(which: str) -> None:
    make, settings = MODELS[which]
    plain, model = make(), make()
    kinds = [type(module) for module in plain.modules()]
    adapter = variants.attach(model, "qlora", base="nf4", rank=2, alpha=4, **settings)
    _disturb(adapter)
    exact = {name: layer.weight.detach() for name, layer in adapter.layers.items()}
    in_codes = {name for name, layer in adapter.layers.items() if layer.frozen.base.lossy}
    assert ("lm_head" in exact) == (which == "a head in few bits") and "lm_head" not in in_codes
    errors = [((rounded(W) - W).norm() / W.norm()).item()
              for name, W in exact.items() if name in in_codes]  # fmt: skip
    frozen = {path: m.weight for path, m in model.named_modules()
              if isinstance(m, Frozen) and path.endswith(("k_proj", "gate_proj"))}  # fmt: skip
    layers = dict(adapter.layers)
    adapter.merge(requantize=True)
    assert adapter.merge_error == pytest.approx(max(errors), rel=1e-5)
    for name, W in exact.items():
        wanted = rounded(W) if name in in_codes else W
        torch.testing.assert_close(_weight_of(model, name, adapter), wanted, atol=1e-6, rtol=1e-5)
    for path, W in frozen.items():  # a layer that was not adapted is not rounded again
        assert torch.equal(model.get_submodule(path).weight, W)
    with torch.no_grad():  # whose codes another adapter takes for its base
        before = logits(model, IDS)
        again = _disturb(variants.attach(model, "lora", rank=2, targets="o"))
        assert not torch.equal(logits(model, IDS), before)
        again.detach()
        torch.testing.assert_close(logits(model, IDS), before)
    with pytest.raises(variants.Incompatible, match="merged or detached"):
        adapter.merge()
    with torch.no_grad():
        before = logits(model, IDS)
        variants.dequantize(model)
        torch.testing.assert_close(logits(model, IDS), before, atol=1e-5, rtol=1e-5)
    assert [type(module) for module in model.modules()] == kinds
    assert not any(isinstance(module, Unstacked) for module in model.modules())
    assert layers and variants.attach(model, "lora", rank=2, targets="q").layers


def _weight_of(model: nn.Module, name: str, adapter: variants.Adapter) -> Tensor:
    site = adapter.sites[name]
    module: Any = model.get_submodule(site.path)
    if site.role is not None:
        module = module.slices[site.role]
    return module.weight.detach()


def test_bits_stay_few_and_forms_that_leave_w_alone_leave_its_codes() -> None:
    model = Toy()
    adapter = _disturb(variants.attach(model, "bitfit", base="nf4_dq", targets=["first"]))
    codes = {k: t.clone() for k, t in adapter.layers["first"].frozen.stored.state_dict().items()}
    y = model(_inputs())
    adapter.merge(requantize=True)
    first: Any = model.first
    assert all(torch.equal(t, codes[k]) for k, t in first.stored.state_dict().items())
    assert adapter.merge_error == 0 and torch.equal(model(_inputs()), y)


def test_what_stores_every_number_is_not_requantized() -> None:
    with pytest.raises(variants.Incompatible, match="requantize: base dense stores every number"):
        variants.attach(Toy(), "lora", rank=2, targets="first").merge(requantize=True)
    model = Toy()
    adapter = variants.attach(model, "lora", rank=2, targets="first")
    with pytest.raises(variants.Incompatible, match="an adapter sits at first"):
        variants.dequantize(model)
    assert adapter.layers


def test_a_form_may_say_its_change_in_the_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hook that an exact merge takes: what it returns is what the layer stores."""
    seen = []

    def absorbed(self: LoRA, stored: Any, p: Any, s: float) -> Any:
        seen.append((stored, s))
        return Dense(self.weight(stored.dense(), p, s).detach(), torch.float32)

    monkeypatch.setattr(LoRA, "absorbed", absorbed)
    model, x = Toy(), _inputs()
    adapter = _disturb(variants.attach(model, "lora", base="nf4", rank=2, alpha=6, targets="first"))
    stored, y = adapter.layers["first"].frozen.stored, model(x)
    adapter.merge(requantize=True)
    assert seen == [(stored, 3.0)] and adapter.merge_error < 1e-7
    torch.testing.assert_close(model(x), y)


def test_a_merge_into_zero_points_costs_a_rounding_and_no_code() -> None:
    errors = {}
    for preset, form in (("qa_lora", None), ("lora", "lora")):
        base = {"name": "int4", "group": 4, "symmetric": False}
        own = {} if form else {"form": {"name": "qa_lora", "group": 4}}
        adapter = _disturb(
            variants.attach(Toy(), preset, base=base, rank=2, targets="first", **own)
        )
        adapter.merge(requantize=True)
        errors[preset] = adapter.merge_error
    assert errors["qa_lora"] < 1e-6 and errors["lora"] > 1e-3


def test_an_adapter_remembers_the_base_that_it_learned_on(tmp_path: Path) -> None:
    x, words = _inputs(), "base nf4 and stands on base dense"
    adapter = _disturb(variants.attach(Toy(), "lora", base="nf4", rank=2, targets="first"))
    adapter.save(tmp_path / "a")
    p = adapter.layers["first"].params
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        own = variants.load(Toy(), tmp_path / "a")
        same = variants.load(Toy(), tmp_path / "a", base={"name": "nf4", "block": 64})
        kernel = {"name": "nf4", "backend": "bitsandbytes"}  # which changes no number
        say_other_base(same, tmp_path, kernel)
    assert torch.equal(own.model(x), adapter.model(x)) and torch.equal(same.model(x), own.model(x))
    with pytest.warns(UserWarning, match=f"was trained on {words}"):
        other = variants.load(Toy(), tmp_path / "a", base="dense")
    toy = Toy()
    toy.first.weight.data += other.layers["first"].s * (p["B"] @ p["A"]).detach()
    torch.testing.assert_close(other.model(x), toy(x))
    other.save(tmp_path / "b")
    with pytest.warns(UserWarning, match=words):  # still: saving has taught it nothing
        again = variants.load(Toy(), tmp_path / "b")
    again.optimizer(1e-3)  # from here on it learns on this base
    again.save(tmp_path / "c")
    variants.load(Toy(), tmp_path / "c")
    with pytest.warns(UserWarning, match="base nf4 and stands on base nf4 block=128"):
        variants.load(Toy(), tmp_path / "a", base=NF4(block=128))
    with pytest.raises(variants.Incompatible, match="no such base"):
        variants.load(Toy(), tmp_path / "a", base="nf5")


def test_files_from_before_say_their_base_by_their_axes(tmp_path: Path) -> None:
    variants.attach(Toy(), "lora", base="nf4", rank=2, targets="first").save(tmp_path)
    file = tmp_path / "adapter.json"
    settings = json.loads(file.read_text())
    del settings["trained_on"], settings["axes"]["base"]["block"]
    file.write_text(json.dumps(settings))
    variants.load(Toy(), tmp_path)
    with pytest.warns(UserWarning, match="trained on base nf4 and stands on base bf16"):
        variants.load(Toy(), tmp_path, base="bf16")


def test_peft_s_format_says_the_base_where_it_can(tmp_path: Path) -> None:
    model = seeded(causal, kind="llama", **GROUPED)
    adapter = _disturb(variants.attach(model, "qlora", base="nf4", rank=2, targets="q"))
    with pytest.warns(UserWarning, match="trained on base nf4"):
        adapter.save_peft(tmp_path)
    fresh = lambda: seeded(causal, kind="llama", **GROUPED)  # noqa: E731
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        own = variants.load_peft(fresh(), tmp_path, base="nf4")
    with torch.no_grad():
        torch.testing.assert_close(logits(own.model, IDS), logits(model, IDS))
    with pytest.warns(UserWarning, match="base nf4 and stands on base dense"):
        variants.load_peft(fresh(), tmp_path)
    import peft
    from safetensors.torch import load_file, save_file

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Unexpected keyword")  # of a key in its settings
        there = peft.PeftModel.from_pretrained(fresh(), str(tmp_path))
        there.save_pretrained(str(tmp_path / "theirs"))
        here = variants.load_peft(fresh(), tmp_path / "theirs")
    assert here.notes == ["the file does not say how the base was stored in training"]
    with torch.no_grad():
        torch.testing.assert_close(
            logits(here.model, IDS), logits(there, IDS), atol=1e-5, rtol=1e-5
        )
    file = tmp_path / "adapter_model.safetensors"
    save_file(load_file(file), file)  # without any metadata
    assert variants.load_peft(fresh(), tmp_path).notes == here.notes
