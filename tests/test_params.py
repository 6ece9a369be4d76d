"""Published counts, from shapes alone (analysis.params)."""

import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import variants
from analysis.params import SHAPES, count, main, meta_model
from variants._adapter import choose, needs, plan
from variants._contract import by_formula
from variants._registry import find_preset, overrides

LINEAR5 = "q_proj,k_proj,v_proj,up_proj,down_proj"
SIX = "q,k,v,o,up,down"
ALL = "all-linear"
model_of = cache(meta_model)  # counting leaves it as it is

# A row: model, variant, rank, targets, settings, trained numbers, what the paper prints, and a
# word where the print is not the number. Prints without one are the number, cut or rounded.
LORA = [  # arXiv:2106.09685, Tables 2 to 5
    ("roberta-base", "lora", 8, "q,v", "", 294_912, "0.3M", ""),
    ("roberta-large", "lora", 8, "q,v", "", 786_432, "0.8M", ""),
    ("gpt2-medium", "lora", 4, "q,v", "", 393_216, "0.35M", "off, microsoft/LoRA#172"),
    ("gpt2-large", "lora", 4, "q,v", "", 737_280, "0.77M", "off, likewise"),
    ("gpt3-175b", "lora", 1, "q,v", "", 4_718_592, "4.7M", ""),
    ("gpt3-175b", "lora", 2, "v", "", 4_718_592, "4.7M", ""),
    ("gpt3-175b", "lora", 8, "q,v", "", 37_748_736, "37.7M", ""),
    ("gpt3-175b", "lora", 8, "q", "", 18_874_368, "18M", ""),
    ("gpt3-175b", "lora", 2, "q,k,v,o", "", 18_874_368, "18M", ""),
]
DYLORA = [("gpt2-medium", "dylora", 4, "q,v", "", 393_216, "0.39M", "")]  # VeRA's Table 3
ADALORA = [  # arXiv:2303.10512, Table 1; its own rows depend on the final allocation
    ("deberta-v3-base", "lora", 1, SIX, "", 165_888, "0.17M", ""),
    ("deberta-v3-base", "lora", 2, SIX, "", 331_776, "0.33M", ""),
    ("deberta-v3-base", "lora", 4, SIX, "", 663_552, "0.66M", ""),
    ("deberta-v3-base", "lora", 8, SIX, "", 1_327_104, "1.33M", ""),
    ("deberta-v3-base", "adalora", 12, SIX, "", 1_991_520, "", "as stored at the initial rank"),
]
PISSA = [  # arXiv:2404.02948, Table 2
    ("llama2-7b", "lora", 128, ALL, "", 319_815_680, "320M", ""),
    ("llama2-7b", "pissa", 128, ALL, "", 319_815_680, "320M", ""),
    ("mistral-7b", "pissa", 64, ALL, "", 167_772_160, "168M", ""),
    ("gemma-7b", "pissa", 64, ALL, "", 200_015_872, "200M", ""),
]
VERA = [  # arXiv:2310.11454, Tables 2 to 4
    ("roberta-base", "vera", 1024, "q,v", "", 43_008, "0.043M", ""),
    ("roberta-large", "vera", 256, "q,v", "", 61_440, "0.061M", ""),
    ("gpt2-medium", "vera", 1024, "q,v", "", 98_304, "0.098M", ""),
    ("gpt2-large", "vera", 1024, "q,v", "", 165_888, "0.17M", ""),
    ("llama2-7b", "lora", 64, ALL, "", 159_907_840, "159.9M", ""),
    ("llama-13b", "lora", 64, ALL, "", 250_347_520, "250.3M", ""),
    ("llama2-7b", "vera", 1024, ALL, "", 1_589_248, "1.6M", ""),
    ("llama-13b", "vera", 1024, ALL, "", 2_416_640, "2.4M", ""),
]
FOURIERFT = [  # arXiv:2405.03003, Tables 1 to 4
    ("roberta-base", "fourierft", 1000, "q,v", "", 24_000, "0.024M", ""),
    ("roberta-base", "fourierft", 200, "q,v", "", 4_800, "4.8K", ""),
    ("roberta-large", "fourierft", 1000, "q,v", "", 48_000, "0.048M", ""),
    ("gpt2-medium", "fourierft", 1000, "q,v", "", 48_000, "0.048M", ""),
    ("gpt2-large", "fourierft", 1000, "q,v", "", 72_000, "0.072M", ""),
    ("llama2-7b", "fourierft", 1000, "q,v", "", 64_000, "0.064M", ""),
    ("llama-13b", "fourierft", 1000, "q,v", "", 80_000, "0.08M", ""),
    ("llama2-7b", "lora", 64, "q,v", "", 33_554_432, "33.5M", ""),
    ("llama-13b", "lora", 64, "q,v", "", 52_428_800, "52.4M", ""),
]
LORA_XS = [  # arXiv:2405.17604; Gemma in VB-LoRA's Table 4
    ("roberta-large", "lora_xs", 4, "q,v,o,up", "", 1_536, "1.5K", ""),
    ("roberta-large", "lora_xs", 25, "q,v,o,up", "", 60_000, "60K", ""),
    ("mistral-7b", "lora_xs", 64, ALL, "", 917_504, "0.92M", ""),
    ("gemma-7b", "lora_xs", 64, ALL, "", 802_816, "0.80M", ""),
]
C3A = [  # arXiv:2407.19342, Table 2, with what it prints for others
    ("roberta-base", "c3a", None, "q,v", "form.block_size=768", 18_432, "0.018M", ""),
    ("roberta-base", "c3a", None, "q,v", "form.block_size=128", 110_592, "0.111M", ""),
    ("roberta-large", "c3a", None, "q,v", "form.block_size=1024", 49_152, "0.049M", ""),
    ("roberta-large", "c3a", None, "q,v", "form.block_size=128", 393_216, "0.393M", ""),
    ("roberta-base", "bitfit", None, "norms,q,k,v,o,up,down", "", 102_144, "0.102M", ""),
    ("roberta-large", "bitfit", None, "norms,q,k,v,o,up,down", "", 271_360, "0.271M", ""),
    ("roberta-base", "boft", 8, "q,v", "", 147_456, "0.166M", "biases too: 18,432 more"),
    ("roberta-large", "boft", 8, "q,v", "", 393_216, "0.442M", "biases too: 49,152 more"),
]
BOFT = [  # arXiv:2311.06243, Table 1, and HRA's, arXiv:2405.17484, Tables 2 and 7
    ("deberta-v3-base", "boft", 8, SIX, "", 663_552, "0.75M", "biases too: 82,944 more"),
    ("deberta-v3-base", "oft", 16, SIX, "", 622_080, "0.79M", "gains and biases: 165,888 more"),
    ("deberta-v3-base", "hra", 8, SIX, "", 663_552, "0.66M", ""),
]
IA3 = [  # arXiv:2205.05638, Table 2 of its appendix, T0-3B
    ("t0-3b", "ia3", None, None, "", 540_672, "540K", ""),
    ("t0-3b", "ln_tuning", None, None, "", 249_856, "250K", ""),
    ("t0-3b", "lora", 4, ALL, "", 8_847_360, "9.1M", "gains of the norms too: 249,856 more"),
]
MISS = [  # arXiv:2409.15371, Tables 4 and 7
    ("llama2-7b", "miss", 16, ALL, "", 21_757_952, "21.7M", ""),
    ("llama2-7b", "miss", 64, ALL, "", 87_031_808, "87.0M", ""),
    ("mistral-7b", "miss", 64, ALL, "", 88_080_384, "87.0M", "off: Llama's, printed twice"),
    ("llama2-7b", "dora", 36, ALL, "", 91_308_032, "91.3M", ""),
    ("mistral-7b", "dora", 36, ALL, "", 95_748_096, "95.8M", "off by a rounding"),
]
DELORA = [  # arXiv:2503.18225, Table 5, Llama-2-7B
    ("llama2-7b", "delora", 8, "q,v", "", 4_194_368, "4.19M", ""),
    ("llama2-7b", "lora", 8, "q,v", "", 4_194_304, "4.19M", ""),
    ("llama2-7b", "dora", 8, "q,v", "", 4_456_448, "4.19M", "off: LoRA's, without magnitudes"),
]
TABLE = [*LORA, *DYLORA, *ADALORA, *PISSA, *VERA, *FOURIERFT, *LORA_XS, *C3A, *BOFT, *IA3, *MISS,
         *DELORA]  # fmt: skip
# Shares of base and adapter, in percent.
SHARES = [
    ("llama-7b", "lora", 32, LINEAR5, "", 56_098_816, "0.83", ""),  # DoRA, arXiv:2402.09353
    ("llama-7b", "dora", 32, LINEAR5, "", 56_975_360, "0.84", ""),
    ("llama2-7b", "dora", 16, LINEAR5, "", 28_925_952, "0.43", ""),
    ("llama-13b", "lora", 32, LINEAR5, "", 87_818_240, "0.67", ""),
    ("llama-13b", "dora", 32, LINEAR5, "", 89_190_400, "0.68", ""),
    ("llama3-8b", "lora", 32, LINEAR5, "", 56_623_104, "0.70", ""),
    ("llama3-8b", "dora", 32, LINEAR5, "", 57_409_536, "0.71", ""),
    ("llama3-8b", "dora", 16, LINEAR5, "", 29_097_984, "0.35", "off: 0.361"),
    ("llama-7b", "lora", 64, ALL, "", 159_907_840, "2.31", ""),
    ("llama-7b", "dora", 64, ALL, "", 161_267_712, "2.33", ""),
    ("llama-7b", "vera", 1024, ALL, "", 1_589_248, "0.02", ""),
    ("llama-7b", "dvora", 1024, ALL, "", 2_949_120, "0.04", ""),
    ("llama-7b", "road", None, ALL, "", 1_359_872, "0.02", ""),  # RoAd, arXiv:2409.00119
    ("llama-7b", "road", None, ALL, "form.variant=2", 2_719_744, "0.04", ""),
    ("llama-7b", "road", None, ALL, "form.variant=4", 5_439_488, "0.08", ""),
    ("llama-13b", "road", None, ALL, "form.variant=2", 4_259_840, "0.03", ""),
    ("llama2-7b", "hra", 32, "q,v", "", 8_388_608, "0.12", ""),  # HRA, Table 7
    ("llama2-7b", "lora", 32, "q,v", "", 16_777_216, "0.25", ""),
]


def fits(printed: str, value: float) -> bool:
    """The print is the number, rounded or cut to its digits.

    >>> fits("0.02", 0.0236), fits("18M", 18.9e6), fits("0.35M", 393_216), fits("4.8K", 4_800)
    (True, True, False, True)
    """
    unit = {"M": 1e6, "K": 1e3}.get(printed[-1], 1.0)
    digits = len(printed.rstrip("MK").partition(".")[2])
    off = float(printed.rstrip("MK")) - value / unit
    return -(10**-digits) < off <= 0.5 * 10**-digits + 1e-9


@pytest.mark.parametrize("row", TABLE + SHARES, ids=lambda r: "-".join(map(str, r[:3])))
def test_published_counts(row: tuple[str, str, int | None, Any, str, int, str, str]) -> None:
    model, variant, rank, targets, words, trained, printed, off = row
    found = count(model_of(model), variant, rank, targets, **overrides(variant, words.split()))
    assert found["trainable"] == trained
    if printed:
        value = 100 * found["fraction"] if row in SHARES else trained
        assert fits(printed, value) == (not off), value


@pytest.mark.parametrize(
    ("model", "share", "printed"), [("llama2-7b", 0.3514, 0.35), ("llama3-8b", 0.2598, 0.26)]
)
def test_c3a_of_a_llama_has_two_sizes_of_blocks(model: str, share: float, printed: float) -> None:
    """Its Table 3 prints b = 4096/32 for q, k, v, up, down; the MLP's share is that of b = 256."""
    axes = overrides("c3a", ["form.block_size=128"])
    attention = count(model_of(model), "c3a", None, "q,k,v", **axes)
    mlp = count(model_of(model), "c3a", None, "up,down")
    trained = attention["trainable"] + mlp["trainable"]
    base = mlp["total"] - mlp["trainable"]
    assert 100 * trained / (base + trained) == pytest.approx(share, abs=2e-3)
    assert round(share, 2) == printed


BANKS = [
    ("mistral-7b", 2048, ALL, 1.0, 647_168, "0.65M", True),
    ("gemma-7b", 2048, ALL, 1.0, 670_784, "0.67M", True),
    ("roberta-base", 90, "q,v", 0.25, 23_904, "0.023M", True),
    ("roberta-base", 90, SIX, 0.25, 26_928, "0.027M", True),
    ("roberta-large", 90, "q,v", 0.25, 25_344, "0.024M", False),
    ("roberta-large", 90, SIX, 0.25, 33_408, "0.033M", True),
]


@pytest.mark.parametrize(("model", "vectors", "targets", "index", "stored", "printed", "ok"), BANKS)
def test_vblora_prints_what_it_stores(
    model: str, vectors: int, targets: str, index: float, stored: int, printed: str, ok: bool
) -> None:
    """arXiv:2405.15179, Tables 1 and 4: of each stretch two indices and one weight, and the bank.

    An index counts as a quarter of a number where it fits a byte (Section 3.5). In Table 4 it does
    not, and counts as one. What is trained is far more: a logit for each vector and stretch.
    """
    axes = overrides("vblora", [f"form.vectors={vectors}"])
    trained = count(model_of(model), "vblora", 4, targets, **axes)["trainable"]
    stretches, rest = divmod(trained - vectors * 256, vectors)
    assert rest == 0
    assert vectors * 256 + stretches * (1 + 2 * index) == stored
    assert fits(printed, stored) == ok


@pytest.mark.parametrize("target", [1, 2, 4, 8])
def test_budgets_of_adalora(target: int) -> None:
    """Its Table 8: b(T) = 72, 144, 288, 576 triplets of DeBERTaV3-base."""
    axes = overrides("adalora", [f"allocation.target_rank={target}"])
    choice = choose("adalora", 12, **axes)
    planned = plan(model_of("deberta-v3-base"), choice, SIX)
    rule: Any = choice.allocation
    start = sum(item.rank for item in planned)
    assert rule.budget(10_000, 10_000, start, len(planned))[0] == 72 * target


@pytest.mark.parametrize(
    ("model", "total"),
    [("llama-7b", 6_738_415_616), ("llama-13b", 13_015_864_320), ("llama3-8b", 8_030_261_248)],
)
def test_base_totals(model: str, total: int) -> None:
    found = count(model_of(model), "lora", 16)
    assert found["total"] - found["trainable"] == total


def test_fraction_is_of_base_and_adapter() -> None:
    """DoRA's table: trained / (base + adapter)."""
    found = count(model_of("llama-7b"), "dora", 32, LINEAR5)
    assert round(100 * found["fraction"], 2) == 0.84


# Settings that move the count, beside the defaults.
SETTINGS = {
    "boft": ["form.depth=1", "form.depth=3"],
    "c3a": ["form.block_size=96"],
    "gralora": ["form.hybrid_r=2"],
    "krona": ["form.factor=16"],
    "lokr": ["form.factor=16", "form.decompose_both=true"],
    "mora": ["form.type=sharing"],
    "road": ["form.variant=2", "form.variant=4"],
    "vblora": ["form.vectors=90", "form.length=100"],
    "vera": ["form.share=largest"],
    "randlora": ["form.share=shape"],
    "delora": ["form.rule=peft"],
    "factorized": ["form.standardize=true"],
    "lora": ["update=lora_fa", "init=mica", "form=dora update=lora_fa"],
}


ODD = {"hidden_size": 72, "intermediate_size": 184, "num_attention_heads": 6, "head_dim": 20,
       "num_key_value_heads": 2}  # fmt: skip


def two_blocks(name: str) -> Any:
    """A named shape, two blocks deep: the same matrices, quicker to plan."""
    kind, sizes = ("llama", ODD) if name == "odd" else SHAPES[name]
    settings = transformers.AutoConfig.for_model(kind, **sizes | {"num_hidden_layers": 2})
    with torch.device("meta"):
        return transformers.AutoModel.from_config(settings)


@pytest.mark.parametrize("model", ["llama-7b", "gpt2", "roberta-base", "mistral-7b", "odd"])
def test_counts_equal_the_formulas(model: str) -> None:
    """Of each variant and setting at ranks 1, 8 and 64, whatever the shapes: or a refusal."""
    shape, done = two_blocks(model), 0
    ranks = (1, 4, 8) if model == "odd" else (1, 8, 64)
    for variant in variants.names():
        for words in ["", *SETTINGS.get(variant, [])]:
            for rank in ranks if variants.describe(variant)["rank"] else (None,):
                axes = overrides(variant, words.split())
                try:
                    choice = choose(variant, rank, **axes)
                    planned = plan(shape, choice)
                except variants.Incompatible as refusal:
                    assert rank in (1, None), refusal  # pairs of reflections, no biases, ...
                    assert str(refusal).startswith(("rank=1: ", "form bitfit: "))
                    continue
                own = "" if axes else find_preset(variant).parameters
                found = count(shape, variant, rank, **axes)["trainable"]
                assert found == by_formula(choice, planned, own), (variant, words, rank)
                done += 1
    assert done > 200


def test_settings_that_move_the_count_do() -> None:
    for variant, settings in SETTINGS.items():
        if variant in ("vera", "randlora", "delora", "factorized", "gralora"):
            continue  # theirs must not
        rank = 8 if variants.describe(variant)["rank"] else None
        plain = count(model_of("gpt2"), variant, rank)["trainable"]
        for words in settings:
            axes = overrides(variant, words.split())
            assert count(model_of("gpt2"), variant, rank, **axes)["trainable"] != plain, words


@pytest.mark.parametrize("model", SHAPES)
def test_every_named_shape_has_linear_layers(model: str) -> None:
    if model == "gpt3-175b":
        return  # counted above
    assert count(model_of(model), "lora", 1)["matrices"] > 0


def test_the_count_is_what_attach_trains(stories: Path) -> None:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(stories)
    ids = torch.arange(1, 65).view(2, 32)
    for preset in variants.names():
        rank = 8 if variants.describe(preset)["rank"] else None
        # ranks that calibration gives are not known from shapes: those asked for are counted
        axes = {"allocation": "uniform"} if choose(preset).allocation.needs else {}
        batches = [{"input_ids": ids, "labels": ids}] if needs(choose(preset)) else None
        try:
            counted = count(model_of(str(stories)), preset, rank, **axes)["trainable"]
        except variants.Incompatible as refusal:  # such as biases to train, and none in the model
            assert f"form {preset}: no layer of targets=" in str(refusal)
            continue
        adapter = variants.attach(model, preset, rank=rank, calibration=batches, **axes)
        assert adapter.num_trainable == counted
        adapter.detach()


def test_command() -> None:
    words = ["--model", "llama-7b", "--variant", "dora", "--rank", "32", "--targets", LINEAR5]
    run = [sys.executable, "-m", "analysis.params", *words, "--json"]
    found = json.loads(subprocess.run(run, capture_output=True, text=True, check=True).stdout)
    assert found["trainable"] == 56_975_360 and found["total"] == 6_795_390_976
    assert found["fraction"] == pytest.approx(0.00838441)
    assert found["notes"] == []


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """The command in this process: (exit code, output, errors)."""

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["params", *words])
        return main(), *capsys.readouterr()

    return run


def test_command_takes_the_keys_of_a_run(said: Any) -> None:
    words = ["--model", "gpt2", "--variant", "vblora", "--json", "--rank", "4", "--targets", "q,v"]
    _, out, _ = said(*words, "--with", "variant.form.vectors=90", "form.length=100")
    assert json.loads(out)["trainable"] == 24 * 4 * 16 * 90 + 90 * 100
    for word, message in [
        ("form.vectors=many", "form.vectors=many: this setting is of type int"),
        ("form.bank=1", "form vblora has no setting 'bank'; its settings: vectors, length, topk"),
        ("shape.x=1", "shape.x=1: AXIS=PART or AXIS.SETTING=VALUE, an axis being one of form"),
        ("init=pissa", "init pissa needs a low-rank form, not vblora"),
        ("init=pisa", "init=pisa: no such init (did you mean 'pissa'?)"),
    ]:
        code, out, errors = said(*words, "--with", word)
        assert code == 1 and not out and errors.startswith(f"error: {message}")


def test_command_compares_variants(said: Any) -> None:
    words = ["--model", "gpt2", "--rank", "8", "--variant"]
    _, out, _ = said(*words, "dora,lora,full,ia3,lora_xs,hra", "--json")
    ranked = ["lora_xs", "ia3", "hra", "lora", "dora", "full"]
    assert [row["variant"] for row in json.loads(out)] == ranked
    _, out, _ = said("--model", "llama-7b", "--rank", "8", "--variant", "eva,adalora,bitfit,lora")
    lines = out.splitlines()
    assert [line.split()[0] for line in lines] == ["variant", "eva", "lora", "adalora", "bitfit"]
    assert "allocation eva gives each matrix its rank after calibration" in lines[1]
    assert "counted as stored" in lines[3] and "refused" in lines[4]
    assert len(said("--model", "gpt2", "--variant", "all")[1].splitlines()) > 50
    for found in (said(*words, "lora,dorra"), said(*words, "dorra")):
        assert found[0] == 1 and "did you mean 'dora'" in found[2]
    code, _, errors = said("--model", "nope", "--variant", "lora")
    assert code == 1 and "no named shape; shapes: llama-7b" in errors
