"""PEFT's files, out and in, for every method that both have: the same logits, fp32, within 1e-5 of
the largest. `pytest -s` prints the error of each.
"""

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import variants

torch.set_num_threads(1)
peft = pytest.importorskip("peft", reason="the extra `dev` brings peft")
transformers = pytest.importorskip("transformers")

LAYERS = ["q_proj", "v_proj", "up_proj", "down_proj"]  # 32 x 32, 16 x 32, 48 x 32, 32 x 48
SQUARE = ["q_proj", "up_proj", "down_proj"]  # the smaller side is 32
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
         "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
FUSED = ["c_attn", "c_fc", "mlp.c_proj"]
LIMIT = 1e-5


@pytest.fixture(autouse=True)
def no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT writes a README beside each adapter, from a template that takes longer than the rest."""
    monkeypatch.setattr(peft.PeftModel, "create_or_update_model_card", lambda *_: None)


def llama() -> Any:
    return deepcopy(one_llama())


def gpt2() -> Any:
    """`Conv1D` in place of `nn.Linear`, in two layers."""
    return deepcopy(one_gpt2())


@cache
def one_llama() -> Any:
    torch.manual_seed(0)
    return louder(transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval())


@cache
def one_gpt2() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=4)
    return louder(transformers.GPT2LMHeadModel(config).eval())


def louder(model: Any) -> Any:
    """Weights of such a size that every layer counts in the logits."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and "embed" not in name and "wte" not in name:
                weight *= 6
    return model


class Picture(nn.Module):
    """An embedding, two convolutions, a linear layer with a bias and norms."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens = nn.Embedding(64, 36)
        self.conv = nn.Conv2d(4, 8, 3, padding=1)
        self.narrow = nn.Conv2d(8, 4, 1, bias=False)
        self.before, self.after = nn.LayerNorm(36), nn.RMSNorm(36)
        self.out = nn.Linear(36, 12)
        for t in self.parameters():
            t.data += 0.2 * torch.randn(t.shape)

    def forward(self, x: Tensor) -> Tensor:
        h = self.tokens(x).unflatten(-1, (1, 6, 6)).transpose(1, 2).flatten(0, 1)
        h = self.narrow(self.conv(h.view(-1, 4, 6, 6)).tanh())
        return self.out(self.after(self.before(h.flatten(-2)).tanh()))


def ids() -> Tensor:
    return torch.randint(0, 64, (4, 12), generator=torch.Generator().manual_seed(1))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found = model.eval()(ids())
    return getattr(found, "logits", found)


def error(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


def disturb(tensors: Any, by: float = 0.1) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for t in tensors:
            t += by * torch.randn(t.shape, generator=generator)


@dataclass
class Ours:
    """A variant, to be written."""

    preset: str
    settings: dict[str, Any] = field(default_factory=dict)
    targets: Any = field(default_factory=lambda: LAYERS)
    model: Callable[[], Any] = llama


def form(name: str, **settings: Any) -> dict[str, Any]:
    return {"form": {"name": name, **settings}}


OURS = {
    "lora": Ours("lora", {"rank": 4}),
    "lora, patterns": Ours(
        "lora", {"rank": 4, "rank_pattern": {"v": 2}, "alpha_pattern": {"q": 3}}
    ),
    "lora, Conv1D": Ours("lora", {"rank": 4}, FUSED, gpt2),
    "lora, embedding and convolutions": Ours(
        "lora", {"rank": 4}, ["tokens", "conv", "narrow", "out"], Picture
    ),
    "dora, embedding and convolutions": Ours(
        "dora", {"rank": 4}, ["tokens", "conv", "narrow", "out"], Picture
    ),
    "rslora": Ours("rslora", {"rank": 4}),
    "dora": Ours("dora", {"rank": 4}),
    "dora, Conv1D": Ours("dora", {"rank": 4}, FUSED, gpt2),
    "adalora": Ours("adalora", {"rank": 4}),
    "adalora, Conv1D": Ours("adalora", {"rank": 4}, FUSED, gpt2),
    "adalora, ranks": Ours("adalora", {"rank": 4, "rank_pattern": {"v": 2}}),
    "pissa": Ours("pissa", {"rank": 4}),
    "pissa, twice the rank above the matrix's": Ours("pissa", {"rank": 12}),
    "milora": Ours("milora", {"rank": 4}),
    "olora": Ours("olora", {"rank": 4}),
    "mica": Ours("mica", {"rank": 4}),
    "orthogonal": Ours("orthogonal", {"rank": 4}),
    "eva": Ours("eva", {"rank": 4, "calibration": "batches"}),
    "corda": Ours("corda", {"rank": 4, "calibration": "batches"}),
    "lora_ga": Ours("lora_ga", {"rank": 4, "calibration": "batches"}),
    "kasa": Ours("kasa", {"rank": 4}),
    "dora on pissa": Ours("dora", {"rank": 4, "init": "pissa"}),
    "triplet on pissa": Ours("adalora", {"rank": 4, "init": "pissa"}),
    "moslora": Ours("moslora", {"rank": 4}),
    "lora_xs": Ours("lora_xs", {"rank": 4}),
    "tied_lora": Ours("tied_lora", {"rank": 4}, ["q_proj"]),
    "hira": Ours("hira", {"rank": 4}),
    "hira, Conv1D": Ours("hira", {"rank": 4}, FUSED, gpt2),
    "loha": Ours("loha", {"rank": 4, "rank_pattern": {"v": 2}, "alpha_pattern": {"q": 3}}),
    "loha, convolutions": Ours("loha", {"rank": 3}, ["conv", "narrow", "out"], Picture),
    "lokr": Ours("lokr", {"rank": 2}),
    "lokr, both": Ours("lokr", {"rank": 1, "alpha": 3} | form("lokr", decompose_both=True)),
    "lokr, full": Ours("lokr", {"rank": 8, "alpha": 3}),
    "lokr, full, PEFT's s": Ours("lokr", {"rank": 8, "alpha": 3} | form("lokr", rule="peft")),
    "lokr, factor": Ours("lokr", {"rank": 1} | form("lokr", factor=2)),
    "miss": Ours("miss", {"rank": 4}),
    "miss, padded": Ours("miss", {"rank": 5}),
    "bat": Ours("bat", {"rank": 4}),
    "delora": Ours("delora", {"rank": 4}),
    "delora, PEFT's": Ours("delora", {"rank": 4} | form("delora", rule="peft", boundary=3.0)),
    "gralora": Ours("gralora", {"rank": 4}),
    "gralora, hybrid": Ours("gralora", {"rank": 11} | form("gralora", k=4, hybrid_r=3)),
    "gralora, Conv1D": Ours("gralora", {"rank": 4}, FUSED, gpt2),
    "vera": Ours("vera", {"rank": 8}),
    "vera, one pair": Ours("vera", {"rank": 8} | form("vera", share="largest")),
    "vera, ranks": Ours("vera", {"rank": 8, "rank_pattern": {"v": 4}}),
    "vera, Conv1D": Ours("vera", {"rank": 8}, FUSED, gpt2),
    "randlora": Ours("randlora", {"rank": 5}, SQUARE),
    "randlora, PEFT's": Ours("randlora", {"rank": 6} | form("randlora", rule="peft"), SQUARE),
    "randlora, Conv1D": Ours("randlora", {"rank": 6}, FUSED, gpt2),
    "vblora": Ours("vblora", {"rank": 3} | form("vblora", vectors=11, length=8)),
    "vblora, Conv1D": Ours(
        "vblora", {"rank": 3} | form("vblora", vectors=11, length=8), FUSED, gpt2
    ),
    "fourierft": Ours("fourierft", {"rank": 50}),
    "fourierft, pattern": Ours("fourierft", {"rank": 50, "rank_pattern": {"v": 20}}),
    "fourierft, alphas": Ours("fourierft", {"rank": 50, "alpha_pattern": {"v": 99}}),
    "fourierft, Conv1D": Ours("fourierft", {"rank": 50}, FUSED, gpt2),
    "c3a": Ours("c3a", form("c3a", block_size=8)),
    "c3a, sizes": Ours("c3a"),  # 32, 16, 16 and 16
    "shira": Ours("shira", {"rank": 4}),
    "shira, largest": Ours("shira", {"rank": 4} | form("shira", mask="magnitude")),
    "oft": Ours("oft", {"rank": 8}),
    "oft, series": Ours("oft", {"rank": 8} | form("oft", neumann=5)),
    "oft, short series": Ours("oft", {"rank": 8} | form("oft", neumann=4)),
    "boft": Ours("boft", {"rank": 4} | form("boft", depth=1)),
    "boft, factors": Ours("boft", {"rank": 4} | form("boft", depth=3)),
    "hra": Ours("hra", {"rank": 4}),
    "ia3": Ours("ia3", {}, None),
    "ia3, Conv1D": Ours("ia3", form("ia3", inputs="mlp.c_proj"), FUSED, gpt2),
    "ia3, outputs": Ours("ia3", {}, ["out"], Picture),
    "ln_tuning": Ours("ln_tuning", {}, None),
    "ln_tuning, bias": Ours("ln_tuning", {}, None, Picture),
    "road": Ours("road"),
    "road, 2": Ours("road", form("road", variant=2, group=8)),
    "road, 4": Ours("road", form("road", variant=4, group=16)),
}  # fmt: skip


class Blocks:
    """In place of the CUDA extension, without which PEFT's BOFT falls to one factor."""

    @staticmethod
    def apply(R: Tensor) -> Tensor:
        return torch.stack([torch.block_diag(*blocks) for blocks in R])


@pytest.fixture
def butterflies(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft.tuners.boft import layer

    monkeypatch.setattr(layer, "get_fbd_cuda", lambda: True)
    monkeypatch.setattr(layer, "FastBlockDiag", Blocks)


def made(case: Ours) -> variants.Adapter:
    """The variant away from its start."""
    settings: dict[str, Any] = dict(case.settings)
    if "calibration" in settings:
        settings["calibration"] = [{"input_ids": ids(), "labels": ids()}]
    adapter = variants.attach(case.model(), case.preset, targets=case.targets, **settings)
    disturb(adapter.parameters())
    return adapter


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("butterflies")
@pytest.mark.parametrize("name", OURS)
def test_out(name: str, tmp_path: Path) -> None:
    """PEFT computes the same from our file, and so do we from it."""
    case = OURS[name]
    adapter = made(case)
    wanted = logits(adapter.model)
    adapter.save_peft(tmp_path)
    their = peft.PeftModel.from_pretrained(case.model(), tmp_path)
    found = error(logits(their), wanted)
    again = variants.load_peft(case.model(), tmp_path)
    back = error(logits(again.model), wanted)
    print(f"\nout  {name:34} PEFT {found:.1e}  back {back:.1e}", end=" ")
    assert error(logits(case.model()), wanted) > 1e-2  # away from the base
    assert found < LIMIT
    assert back < LIMIT


@dataclass
class Theirs:
    """An adapter of PEFT's, to be read."""

    config: Callable[[], Any]
    model: Callable[[], Any] = llama
    by: float = 0.1


def their(name: str, targets: list[str] = LAYERS, **settings: Any) -> Callable[[], Any]:
    return lambda: getattr(peft, name)(target_modules=targets, **settings)


THEIRS = {
    "lora": Theirs(their("LoraConfig", r=4, lora_alpha=3)),
    "lora, patterns": Theirs(
        their("LoraConfig", r=4, rank_pattern={"v_proj": 2}, alpha_pattern={"0.mlp.up_proj": 3})
    ),
    "lora, Conv1D": Theirs(their("LoraConfig", FUSED, r=4, fan_in_fan_out=True), gpt2),
    "lora, embedding and convolutions": Theirs(
        their("LoraConfig", ["tokens", "conv", "narrow", "out"], r=4), Picture
    ),
    "lora, the model's embedding": Theirs(their("LoraConfig", ["embed_tokens", "q_proj"], r=4)),
    "dora": Theirs(their("LoraConfig", r=4, use_dora=True)),
    "dora, embedding and convolutions": Theirs(
        their("LoraConfig", ["tokens", "conv", "narrow", "out"], r=4, use_dora=True), Picture
    ),
    "rslora": Theirs(their("LoraConfig", r=4, use_rslora=True)),
    "dora, Conv1D": Theirs(
        their("LoraConfig", FUSED, r=4, use_dora=True, fan_in_fan_out=True), gpt2
    ),
    "pissa, Conv1D": Theirs(
        their("LoraConfig", FUSED, r=4, init_lora_weights="pissa", fan_in_fan_out=True), gpt2
    ),
    "pissa": Theirs(their("LoraConfig", r=4, init_lora_weights="pissa")),
    "olora": Theirs(their("LoraConfig", r=4, init_lora_weights="olora")),
    "mica": Theirs(their("LoraConfig", r=4, init_lora_weights="mica")),
    "orthogonal": Theirs(their("LoraConfig", r=4, init_lora_weights="orthogonal")),
    "gaussian": Theirs(their("LoraConfig", r=4, init_lora_weights="gaussian")),
    "kasa": Theirs(lambda: peft.LoraConfig(
        r=4, kasa_config=peft.KasaConfig(beta=1e-3), target_modules=LAYERS
    )),
    "adalora": Theirs(their("AdaLoraConfig", init_r=4, total_step=30)),
    "hira": Theirs(their("HiraConfig", r=4, rank_pattern={"v_proj": 2})),
    "hira, Conv1D": Theirs(their("HiraConfig", FUSED, r=4, fan_in_fan_out=True), gpt2),
    "loha": Theirs(
        their("LoHaConfig", r=4, rank_pattern={"v_proj": 2}, alpha_pattern={"q_proj": 3})
    ),
    "loha, convolutions": Theirs(their("LoHaConfig", ["conv", "narrow", "out"], r=3), Picture),
    "lokr": Theirs(their("LoKrConfig", r=2, alpha=3)),
    "lokr, both": Theirs(their("LoKrConfig", r=1, decompose_both=True, decompose_factor=4)),
    "lokr, full": Theirs(their("LoKrConfig", r=8, alpha=3)),
    "miss": Theirs(their("MissConfig", r=4)),
    "miss, padded": Theirs(their("MissConfig", r=5)),
    "bat": Theirs(their("MissConfig", r=4, init_weights="bat")),
    "delora": Theirs(their("DeloraConfig", r=4, rank_pattern={"v_proj": 2})),
    "gralora": Theirs(their("GraloraConfig", r=4, alpha=6)),
    "gralora, hybrid": Theirs(their("GraloraConfig", r=8, alpha=6, gralora_k=4, hybrid_r=3)),
    "gralora, Conv1D": Theirs(their("GraloraConfig", FUSED, r=4, fan_in_fan_out=True), gpt2),
    "vera": Theirs(their("VeraConfig", r=8)),
    "vera, drawn again": Theirs(
        their("VeraConfig", r=8, save_projection=False, projection_prng_key=3)
    ),
    "vera, Conv1D": Theirs(their("VeraConfig", FUSED, r=8, fan_in_fan_out=True), gpt2),
    "randlora": Theirs(their("RandLoraConfig", r=5, randlora_alpha=10)),
    "randlora, sparse": Theirs(their("RandLoraConfig", r=6, randlora_alpha=12, sparse=True)),
    "randlora, Conv1D": Theirs(
        their("RandLoraConfig", FUSED, r=6, randlora_alpha=12, fan_in_fan_out=True), gpt2
    ),
    "vblora": Theirs(their("VBLoRAConfig", r=3, num_vectors=11, vector_length=8)),
    "vblora, Conv1D": Theirs(
        their("VBLoRAConfig", FUSED, r=3, num_vectors=11, vector_length=8, fan_in_fan_out=True),
        gpt2,
    ),
    "fourierft": Theirs(
        their("FourierFTConfig", n_frequency=50, n_frequency_pattern={"v_proj": 20}), by=1.0
    ),
    "fourierft, Conv1D": Theirs(their("FourierFTConfig", FUSED, n_frequency=50), gpt2, by=1.0),
    "c3a": Theirs(their("C3AConfig", block_size=8), by=1.0),
    "c3a, pattern": Theirs(
        their("C3AConfig", ["q_proj", "v_proj"], block_size=32, block_size_pattern={"v_proj": 16}),
        by=1.0,
    ),
    "shira": Theirs(their("ShiraConfig", r=4)),
    "oft": Theirs(their("OFTConfig", oft_block_size=8, use_cayley_neumann=False)),
    "oft, series": Theirs(their("OFTConfig", oft_block_size=8)),
    "oft, number of blocks": Theirs(their("OFTConfig", oft_block_size=0, r=4)),
    "oft, 3 terms": Theirs(their("OFTConfig", oft_block_size=8, num_cayley_neumann_terms=3)),
    "oft, 4 terms": Theirs(their("OFTConfig", oft_block_size=8, num_cayley_neumann_terms=4)),
    "oft, 6 terms": Theirs(their("OFTConfig", oft_block_size=8, num_cayley_neumann_terms=6)),
    "boft": Theirs(their("BOFTConfig", boft_block_size=4)),
    "boft, factors": Theirs(their("BOFTConfig", boft_block_size=4, boft_n_butterfly_factor=3)),
    "boft, number of blocks": Theirs(their("BOFTConfig", boft_block_size=0, boft_block_num=8)),
    "hra": Theirs(their("HRAConfig", r=4)),
    "hra, odd": Theirs(their("HRAConfig", r=3)),
    "ia3": Theirs(their("IA3Config", feedforward_modules=["down_proj"])),
    "ia3, Conv1D": Theirs(
        their("IA3Config", FUSED, feedforward_modules=["mlp.c_proj"], fan_in_fan_out=True), gpt2
    ),
    "ln_tuning": Theirs(their("LNTuningConfig", ["input_layernorm", "norm"])),
    "ln_tuning, bias": Theirs(their("LNTuningConfig", ["before", "after"]), Picture),
    "road": Theirs(their("RoadConfig", group_size=16)),
    "road, 2": Theirs(their("RoadConfig", variant="road_2", group_size=8)),
    "road, 4": Theirs(their("RoadConfig", variant="road_4", group_size=2)),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("butterflies")
@pytest.mark.parametrize("name", THEIRS)
def test_in(name: str, tmp_path: Path) -> None:
    """We compute the same from PEFT's file, from our own of it, and PEFT from the one written."""
    case = THEIRS[name]
    torch.manual_seed(3)
    model = peft.get_peft_model(case.model(), case.config())
    disturb((t for t in model.parameters() if t.requires_grad), case.by)
    wanted = logits(model)
    model.save_pretrained(tmp_path / "peft")
    adapter = variants.load_peft(case.model(), tmp_path / "peft")
    found = error(logits(adapter.model), wanted)
    adapter.save(tmp_path / "own")
    own = error(logits(variants.load(case.model(), tmp_path / "own").model), wanted)
    adapter.save_peft(tmp_path / "back")
    back = error(logits(peft.PeftModel.from_pretrained(case.model(), tmp_path / "back")), wanted)
    print(f"\nin   {name:34} here {found:.1e}  own {own:.1e}  back {back:.1e}", end=" ")
    assert error(logits(case.model()), wanted) > 1e-2
    assert found < LIMIT
    assert own < LIMIT
    assert back < LIMIT


@pytest.mark.parametrize(
    ("preset", "settings", "targets", "match"),
    [
        ("full", {}, LAYERS, "no place for form full"),
        ("mora", {"rank": 4}, LAYERS, "no place for form mora"),
        ("dvora", {"rank": 4}, LAYERS, "no place for form dvora"),
        ("hira", {"rank": 4, "rank_pattern": {"v": 2}}, LAYERS, "one r for all layers, here are 2"),
        ("lokr", {"rank": 1} | form("lokr", factor=8), LAYERS, "the larger part of factor=8"),
        ("bat", {"rank": 5}, LAYERS, "no 5 x 5 block beyond the edge"),
        ("gralora", {"rank": 6} | form("gralora", k=3), LAYERS, "sides that k=3 divides"),
        ("gralora", {"rank": 4, "alpha_pattern": {"q": 3}}, LAYERS, "one alpha for all layers"),
        ("vblora", {"rank": 2} | form("vblora", vectors=4, length=5, topk=2), LAYERS, "length=5"),
        ("randlora", {"rank": 5}, LAYERS, "form randlora: PEFT's RANDLORA has one set of bases"),
        ("shira", {"rank": 4, "rank_pattern": {"v": 2}}, LAYERS, "one r for all layers"),
        ("oft", {"rank": 8} | form("oft", neumann=3), LAYERS, "no series of neumann=3"),
        ("oft", {"rank": 5, "rank_pattern": {"q": 8}}, LAYERS, "one block size for all layers"),
        ("road", form("road", group=32), LAYERS, "one group size for all layers"),
    ],
)  # fmt: skip
def test_what_has_no_file_is_refused(
    preset: str, settings: dict[str, Any], targets: Any, match: str, tmp_path: Path
) -> None:
    """In one line that names the form or the method, before anything is written."""
    with pytest.raises(variants.Incompatible, match=match) as refusal:
        variants.attach(llama(), preset, targets=targets, **settings).save_peft(tmp_path / "out")
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "out").exists()


def test_layers_without_the_method_are_refused(tmp_path: Path) -> None:
    for preset, target in (("vera", "conv"), ("hira", "tokens"), ("miss", "conv")):
        adapter = variants.attach(Picture(), preset, targets=[target], rank=4)
        with pytest.raises(variants.Incompatible, match=f"is not for {target}"):
            adapter.save_peft(tmp_path)
    changes: Any = ({"dilation": 2}, {"groups": 2}, {"padding_mode": "circular"})
    for change in changes:
        net = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, **change))
        adapter = variants.attach(net, "lora", rank=2, targets=["0"])
        with pytest.raises(variants.Incompatible, match="PEFT's LORA is not for 0, Conv2d"):
            adapter.save_peft(tmp_path)
    peft.get_peft_model(Picture(), peft.IA3Config(
        target_modules=["conv"], feedforward_modules=[]
    )).save_pretrained(tmp_path)  # fmt: skip
    with pytest.raises(variants.Incompatible, match=r"IA3 on conv, Conv2d.*is not read"):
        variants.load_peft(Picture(), tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_a_base_that_training_moved_is_refused(tmp_path: Path) -> None:
    """ReLoRA and Delta-LoRA write into the frozen weight; the file would leave that out."""
    for preset in ("relora", "delta_lora"):
        adapter = variants.attach(llama(), preset, rank=4, targets=LAYERS)
        next(iter(adapter.layers.values())).move(torch.ones(32, 32))
        with pytest.raises(variants.Incompatible, match="q_proj was moved in training"):
            adapter.save_peft(tmp_path)


def edited(path: Path, **settings: Any) -> Path:
    """The folder with other settings in its adapter_config.json."""
    file = path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return path


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("config", "settings", "match"),
    [
        (their("LoHaConfig", r=4, use_effective_conv2d=True), {}, "use_effective_conv2d=True"),
        (their("LoHaConfig", r=4, rank_dropout=0.1), {}, "rank_dropout=0.1 has no equal here"),
        (their("LoKrConfig", r=1, decompose_factor=8), {}, "decompose_factor=8 has no equal"),
        (their("MissConfig", r=4, mini_r=4, init_weights="mini"), {}, "init_weights=mini"),
        (their("HRAConfig", r=4, apply_GS=True), {}, "apply_GS=True has no equal here"),
        (their("OFTConfig", oft_block_size=8, coft=True), {}, "coft=True has no equal here"),
        (their("OFTConfig", oft_block_size=8, block_share=True), {}, "block_share=True"),
        (their("OFTConfig", oft_block_size=8, module_dropout=0.1), {}, "module_dropout=0.1"),
        (their("OFTConfig", oft_block_size=8), {"peft_version": "0.17.1"}, "peft_version=0.17.1"),
        (their("OFTConfig", oft_block_size=8), {"num_cayley_neumann_terms": 2}, "terms=2"),
        (their("BOFTConfig", boft_block_size=4, boft_dropout=0.1), {}, "boft_dropout=0.1"),
        (their("VBLoRAConfig", r=2, num_vectors=9, vector_length=8, save_only_topk_weights=True),
         {}, "save_only_topk_weights=True has no equal here"),
        (their("C3AConfig", block_size=8, block_size_pattern={"q_proj": 32}), {},
         "block_size=8, block_size_pattern={'q_proj': 32} has no equal here"),
        (their("RandLoraConfig", r=6, save_projection=False), {}, "save_projection=False"),
        (their("VeraConfig", r=8), {"bias": "vera_only"}, "bias=vera_only"),
        (their("HiraConfig", r=4), {"new_rule": "other"}, "new_rule=other has no equal here"),
        (their("LNTuningConfig", ["q_proj"]), {}, "LN_TUNING on model.layers.0.self_attn.q_proj"),
        (their("LoraConfig", r=4), {"init_lora_weights": "corda"}, "corda moved the base"),
        (their("LoraConfig", r=4), {"init_lora_weights": "other"}, "init_lora_weights=other"),
        (their("LoraConfig", r=4), {"peft_type": "POLY"}, "peft_type POLY is not read"),
    ],
)  # fmt: skip
def test_settings_that_are_not_here_are_refused(
    config: Callable[[], Any], settings: dict[str, Any], match: str, tmp_path: Path
) -> None:
    """By key and value."""
    peft.get_peft_model(llama(), config()).save_pretrained(tmp_path)
    with pytest.raises(variants.Incompatible, match=match):
        variants.load_peft(llama(), edited(tmp_path, **settings))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["hira", "gralora", "vera", "boft", "road"])
def test_a_tensor_too_many_or_too_few_is_refused(name: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    peft.get_peft_model(llama(), THEIRS[name].config()).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    key = next(key for key in tensors if "q_proj" in key)
    for changed, match in (
        (tensors | {f"{key}_more": tensors[key].clone()}, f"{key}_more has no equal here"),
        ({k: t for k, t in tensors.items() if k != key}, "missing|has no tensor"),
    ):
        save_file(changed, tmp_path / "adapter_model.safetensors")
        with pytest.raises(variants.Incompatible, match=match):
            variants.load_peft(llama(), tmp_path)


def test_bases_from_a_file_are_kept(tmp_path: Path) -> None:
    """VeRA's own bases are drawn from the seed and not saved; PEFT's are in our file."""
    peft.get_peft_model(llama(), THEIRS["vera"].config()).save_pretrained(tmp_path)
    adapter = variants.load_peft(llama(), tmp_path)
    assert {"shared.r8.A", "shared.r8.B"} <= set(adapter.tensors())
    again = variants.load(llama(), adapter.save(tmp_path / "own"))
    assert {"shared.r8.A", "shared.r8.B"} <= set(again.tensors())
    own = variants.attach(llama(), "vera", rank=8, targets=LAYERS)
    assert not any(key.startswith("shared.") for key in own.tensors())


@pytest.mark.parametrize("preset", ["vera", "road", "ln_tuning"])
def test_modules_trained_in_full_travel_with_any_method(preset: str, tmp_path: Path) -> None:
    settings: Any = {"rank": 8} if preset == "vera" else {}
    targets = ["before"] if preset == "ln_tuning" else ["middle"]
    if preset == "road":
        settings["form"] = {"name": "road", "group": 4}

    class Headed(Picture):
        def __init__(self) -> None:
            super().__init__()
            self.middle = nn.Linear(12, 12)
            self.head = nn.Linear(12, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.middle(super().forward(x)))

    def headed() -> nn.Module:
        return Headed()

    adapter = variants.attach(
        headed(), preset, targets=targets, modules_to_save=["head"], **settings
    )
    disturb(adapter.parameters())
    wanted = logits(adapter.model)
    adapter.save_peft(tmp_path / "ours")
    their = peft.PeftModel.from_pretrained(headed(), tmp_path / "ours")
    assert error(logits(their), wanted) < LIMIT
    their.save_pretrained(tmp_path / "theirs")
    again = variants.load_peft(headed(), tmp_path / "theirs")
    assert list(again.saved_modules) == ["head"]
    assert error(logits(again.model), wanted) < LIMIT


def test_patterns_of_ends_are_refused_where_they_would_reach_too_far(tmp_path: Path) -> None:
    """FourierFT and C3A look for the end of a path: `fc` is that of `blk.fc` too."""
    net = nn.ModuleDict({"blk": nn.ModuleDict({"fc": nn.Linear(8, 8)}), "fc": nn.Linear(8, 4)})
    adapter = variants.attach(net, "c3a", targets=["fc"])  # blocks of 8 and of 4
    with pytest.raises(variants.Incompatible, match=r"takes the block_size of fc for that of blk"):
        adapter.save_peft(tmp_path)


def test_micas_b_stays_frozen(tmp_path: Path) -> None:
    peft.get_peft_model(llama(), THEIRS["mica"].config()).save_pretrained(tmp_path)
    layer = next(iter(variants.load_peft(llama(), tmp_path).layers.values()))
    assert (layer.params["A"].requires_grad, layer.params["B"].requires_grad) == (True, False)


@pytest.mark.filterwarnings("ignore")
def test_a_tied_embedding_is_refused(tmp_path: Path) -> None:
    def tied() -> Any:
        torch.manual_seed(0)
        config = transformers.LlamaConfig(**SIZES, tie_word_embeddings=True)
        return transformers.LlamaForCausalLM(config)

    config = peft.LoraConfig(r=4, target_modules=["embed_tokens"])
    peft.get_peft_model(tied(), config).save_pretrained(tmp_path)
    with pytest.raises(variants.Incompatible, match="tied to lm_head"):
        variants.load_peft(tied(), tmp_path)


def test_dropout_and_a_classifier_without_its_head(tmp_path: Path) -> None:
    """PEFT asks a file of SEQ_CLS for the head; a dropout that it has not is said."""

    def classifier() -> Any:
        torch.manual_seed(0)
        config = transformers.LlamaConfig(**SIZES, num_labels=3, pad_token_id=0)
        return louder(transformers.LlamaForSequenceClassification(config).eval())

    adapter = variants.attach(classifier(), "hira", rank=4, targets=LAYERS, dropout=0.25)
    disturb(adapter.parameters())
    adapter.save_peft(tmp_path / "hira")
    again = peft.PeftModel.from_pretrained(classifier(), tmp_path / "hira")
    assert error(logits(again), logits(adapter.model)) < LIMIT
    layer = next(iter(variants.load_peft(classifier(), tmp_path / "hira").layers.values()))
    assert layer.p_drop == 0.25
    adapter = variants.attach(llama(), "loha", rank=4, targets=LAYERS, dropout=0.25)
    with pytest.warns(UserWarning, match=r"LOHA has no dropout of this kind: dropout=0\.25"):
        adapter.save_peft(tmp_path / "loha")
