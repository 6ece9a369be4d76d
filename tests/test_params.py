"""Published counts, from shapes alone (analysis.params)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import variants
from analysis.params import SHAPES, count, meta_model
from variants._adapter import choose, needs

LINEAR5 = "q_proj,k_proj,v_proj,up_proj,down_proj"
SIX = "q,k,v,o,up,down"
# model, variant, rank, targets, trained numbers (the paper's table, or its formula worked out)
TABLE = [
    ("gpt3-175b", "lora", 8, "q,v", 37_748_736),  # LoRA, Table 4: 37.7M
    ("gpt3-175b", "lora", 1, "q,v", 4_718_592),  # 4.7M
    ("gpt3-175b", "lora", 2, "v", 4_718_592),
    ("roberta-base", "lora", 8, "q,v", 294_912),  # Table 2: 0.3M
    ("roberta-large", "lora", 8, "q,v", 786_432),  # 0.8M
    ("gpt2-medium", "lora", 4, "q,v", 393_216),  # Table 3 prints 0.35M: microsoft/LoRA#172
    ("gpt2-large", "lora", 4, "q,v", 737_280),  # prints 0.77M, likewise
    ("llama-7b", "lora", 32, LINEAR5, 56_098_816),  # DoRA, Table 1: 0.83 %
    ("llama-7b", "dora", 32, LINEAR5, 56_975_360),  # 0.84 %
    ("llama2-7b", "lora", 128, "all-linear", 319_815_680),  # PiSSA, Table 2: 320M
    ("mistral-7b", "pissa", 64, "all-linear", 167_772_160),  # 168M
    ("gemma-7b", "pissa", 64, "all-linear", 200_015_872),  # 200M
    ("deberta-v3-base", "lora", 1, SIX, 165_888),  # AdaLoRA, Table 2: 0.17M ... 1.33M
    ("deberta-v3-base", "lora", 8, SIX, 1_327_104),
    ("deberta-v3-base", "adalora", 12, SIX, 1_991_520),  # as stored at the initial rank
]


@pytest.mark.parametrize(("model", "variant", "rank", "targets", "trained"), TABLE)
def test_published_counts(model: str, variant: str, rank: int, targets: str, trained: int) -> None:
    assert count(meta_model(model), variant, rank, targets)["trainable"] == trained


@pytest.mark.parametrize(
    ("model", "total"),
    [("llama-7b", 6_738_415_616), ("llama-13b", 13_015_864_320), ("llama3-8b", 8_030_261_248)],
)
def test_base_totals(model: str, total: int) -> None:
    found = count(meta_model(model), "lora", 16)
    assert found["total"] - found["trainable"] == total


def test_fraction_is_of_base_and_adapter() -> None:
    """DoRA's table: trained / (base + adapter)."""
    found = count(meta_model("llama-7b"), "dora", 32, LINEAR5)
    assert round(100 * found["fraction"], 2) == 0.84


@pytest.mark.parametrize("model", SHAPES)
def test_every_named_shape_has_linear_layers(model: str) -> None:
    if model == "gpt3-175b":
        return  # counted above
    assert count(meta_model(model), "lora", 1)["matrices"] > 0


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
            counted = count(meta_model(str(stories)), preset, rank, **axes)["trainable"]
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
    run = [sys.executable, "-m", "analysis.params", "--model", "nope", "--variant", "lora"]
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode == 1 and "no named shape; shapes: llama-7b" in done.stderr
