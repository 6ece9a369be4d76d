"""Published counts, from shapes alone (analysis.params)."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from test_run import module

import variants
from analysis.counts import Published, counted, fits, model_of, published
from analysis.params import SHAPES, count, main
from variants._adapter import choose, needs, plan
from variants._contract import by_formula
from variants._registry import find_preset, overrides

LINEAR5 = "q_proj,k_proj,v_proj,up_proj,down_proj"
SIX = "q,k,v,o,up,down"
ALL = "all-linear"

TABLE = published()


@pytest.mark.parametrize("row", TABLE, ids=lambda r: f"{r.model}-{r.variant}-{r.rank}")
def test_published_counts(row: Published) -> None:
    trained, value = counted(row)
    assert trained == row.trained
    if row.printed:
        assert fits(row.printed, value) == (not row.off), value
    if row.beside:
        assert fits(row.printed, value + row.beside), value


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
    found = json.loads(module("analysis.params", *words, "--json").stdout)
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
