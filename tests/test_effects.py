"""Pairs and settings: each has an effect, and the right one, or is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hydra import compose, initialize_config_dir
from test_run import QUICK, lab, only
from torch import nn

import variants
from experiments import command, config
from variants._adapter import plan
from variants._calibrate import _measure
from variants._contract import Toy

ROOT = Path(__file__).parents[1]
TARGETS = ["first", "second"]
config.register()


def settings(*words: str) -> config.Settings:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return config.settings_of(compose("config", list(words)))


@pytest.mark.parametrize(
    "word", ["rank_pattern={q: 2, l.0.up: 6}", "+rank_pattern={q: 2, l.0.up: 6}"]
)
def test_a_pattern_can_be_typed(word: str) -> None:
    assert settings(command._named(word)).rank_pattern == {"q": 2, "l.0.up": 6}
    assert settings(command._named("alpha_pattern.q=3")).alpha_pattern == {"q": 3.0}


def mixture() -> Any:
    """A tiny Mixtral, whose experts' matrices are stacks."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.MixtralForCausalLM(
            transformers.MixtralConfig(
                vocab_size=64,
                hidden_size=32,
                intermediate_size=24,
                num_hidden_layers=1,
                num_attention_heads=4,
                num_key_value_heads=2,
                num_local_experts=2,
                bos_token_id=None,
                eos_token_id=None,
            )
        )


IDS = torch.arange(24).view(2, 12)


def test_training_sees_a_part_of_an_expert_s_factors_where_an_allocation_says_so() -> None:
    """DyLoRA's first directions, IncreLoRA's scores."""
    model = mixture()
    adapter = variants.attach(model, "dylora", rank=4, targets="experts")
    for layer in adapter.layers.values():
        nn.init.normal_(layer.params["B"])  # type: ignore[arg-type]
    model.train()
    adapter.choice.allocation.show(adapter.layers, 2)  # type: ignore[attr-defined]
    model(input_ids=IDS).logits.sum().backward()
    rows = [layer.params["A"].grad.any(1).tolist() for layer in adapter.layers.values()]
    assert rows == [[True, True, False, False]] * len(rows)

    model = mixture()
    adapter = variants.attach(model, "increlora", rank=4, targets="experts")
    optimizer = adapter.optimizer(1e-2, steps=20)
    model.train()
    for _ in range(2):
        (model(input_ids=IDS).logits.square().mean() + adapter.penalty()).backward()
        optimizer.step()
    assert adapter.allocation_state is not None
    assert (adapter.allocation_state["mean"] > 0).all()


@pytest.mark.parametrize("preset", ["eva", "corda"])
def test_the_inputs_of_experts_cannot_be_measured_and_that_is_said(preset: str) -> None:
    model = mixture()
    with pytest.raises(
        variants.Incompatible, match=r"init \w+ needs .*gate_up_proj.0 cannot be measured"
    ):
        variants.attach(
            model,
            preset,
            rank=4,
            targets="experts",
            calibration=[{"input_ids": IDS, "labels": IDS}],
        )


def calibration(count: int = 2) -> list[dict[str, torch.Tensor]]:
    """Batches for the contract's toy."""
    g = torch.Generator().manual_seed(5)
    return [
        {"x": torch.randn(48, 24, generator=g), "labels": torch.randn(48, 5, generator=g)}
        for _ in range(count)
    ]


def test_a_layer_s_own_alpha_outlives_the_rank_that_gora_gives_it() -> None:
    adapter = variants.attach(
        Toy(), "gora", rank=4, targets=TARGETS, calibration=calibration(),
        alpha_pattern={"first": 64.0, "second": 32.0},
    )  # fmt: skip
    own = {"first": 64.0, "second": 32.0}
    assert {layer.rank for layer in adapter.layers.values()} != {4}
    for name, layer in adapter.layers.items():
        assert layer.full_s == pytest.approx(own[name] / layer.rank**0.5)


def test_relora_refuses_a_frozen_b_that_it_would_leave_at_zero() -> None:
    with pytest.raises(variants.Incompatible, match=r"allocation relora needs .*, not mica"):
        variants.attach(Toy(), "relora", rank=4, targets=TARGETS, init="mica")


def test_increlora_refuses_a_target_below_its_beginning() -> None:
    rule = {"name": "increlora", "initial": 3, "target_rank": 2.0}
    adapter = variants.attach(Toy(), "increlora", rank=4, targets=TARGETS, allocation=rule)
    with pytest.raises(variants.Incompatible, match=r"target_rank=2\.0: 4 triplets, of 6 at first"):
        adapter.optimizer(1e-2, steps=20)


def test_increlora_s_scores_are_those_of_the_whole_batch() -> None:
    """In portions, the gradient is their sum: sum |D * sum of dL/dD|."""
    x, means = torch.randn(32, 24, generator=torch.Generator().manual_seed(3)), []
    for parts in (1, 4):
        adapter = variants.attach(Toy().double(), "increlora", rank=4, targets=TARGETS)
        optimizer = adapter.optimizer(1e-2, steps=200)
        for _ in range(2):
            for part in x.double().chunk(parts):
                (adapter.model(part).square().mean() / parts).backward()
            adapter.penalty().backward()  # type: ignore[union-attr]
            optimizer.step()
            optimizer.zero_grad()
        means.append(adapter.allocation_state["mean"])  # type: ignore[index]
    assert (means[0] > 0).all()
    torch.testing.assert_close(means[1], means[0], rtol=1e-6, atol=0.0)


def test_what_is_kept_for_backward_is_that_of_a_training_step(tmp_path: Path) -> None:
    """It was measured in eval mode, in which transformers checkpoints no activations."""
    kept = []
    for word in ("false", "true"):
        out = tmp_path / word
        lab("variant=lora", "rank=2", *QUICK, f"train.activation_checkpointing={word}", out=out)
        result = json.loads((only(out) / "result.json").read_text())
        kept.append(result["memory"]["saved_activation_bytes"])
    assert kept[1] < 0.3 * kept[0]


@pytest.mark.parametrize("regression", ["false", "true"])
def test_a_classifier_can_be_measured(regression: str, tmp_path: Path) -> None:
    rows = [f"{'ab'[i % 2] * (i % 7 + 2)}\t{i % 2}" for i in range(80)]
    (tmp_path / "train.tsv").write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    words = [w for w in QUICK if not w.startswith("task")]
    lab("variant=gora", "rank=2", "task=classify", f"task.path={tmp_path}", *words,
        f"task.regression={regression}", out=tmp_path / "runs")  # fmt: skip
    result = json.loads((only(tmp_path / "runs") / "result.json").read_text())
    assert result["status"] == "done" and len(set(result["ranks"].values())) > 1


def test_delta_lora_moves_the_base_in_a_short_run_or_refuses_it() -> None:
    adapter = variants.attach(Toy(), "delta_lora", rank=4, targets=TARGETS)
    optimizer = adapter.optimizer(1e-2, steps=20)
    x, moved = torch.randn(32, 24), []
    for _ in range(5):
        adapter.model(x).square().mean().backward()
        optimizer.step()
        moved.append(adapter.layers["first"].kept is not None)
    assert moved == [False, False, False, True, True]  # K = 2, and t from 0
    with pytest.raises(variants.Incompatible, match="steps="):
        adapter.optimizer(1e-2)
    late = {"name": "delta_lora", "start": 100.0}
    adapter = variants.attach(Toy(), "delta_lora", rank=4, targets=TARGETS, update=late)
    with pytest.raises(variants.Incompatible, match=r"start=100 leaves the base at rest in .* 20"):
        adapter.optimizer(1e-2, steps=20)


def test_another_base_in_a_state_dict_renews_dora_s_norms() -> None:
    one, other = Toy(), Toy()
    for p in other.parameters():
        p.data *= 2
    for model in (one, other):
        variants.attach(model, "dora", rank=4, targets=TARGETS)
    x = torch.randn(4, 24)
    one(x)
    one.load_state_dict(other.state_dict())
    assert torch.equal(one(x), other(x))


def test_each_part_sees_the_batches_that_it_asks_for() -> None:
    """The init's 1 batch beside the allocation's 3: what the init finds in 1 alone."""

    def started(allocation: Any) -> torch.Tensor:
        adapter = variants.attach(
            Toy(), "lora", rank=4, targets=TARGETS, calibration=calibration(3),
            init={"name": "eva", "batches": 1}, allocation=allocation,
        )  # fmt: skip
        return adapter.layers["first"].params["A"].detach()[:2]  # type: ignore[return-value]

    both = started({"name": "gora", "batches": 3})
    assert torch.equal(both, started("uniform"))


def test_an_alpha_that_lokr_leaves_aside_is_said_and_the_s_that_acts_recorded(
    tmp_path: Path,
) -> None:
    """Full factors have s = 1."""
    with pytest.warns(UserWarning, match="alpha has no effect in 2 of 2 matrices"):
        variants.attach(Toy(), "lokr", rank=4, alpha=8, targets=TARGETS)
    assert not variants.attach(Toy(), "lokr", rank=1, alpha=8, targets=TARGETS).notes
    lab("variant=lokr", "rank=8", "alpha=64", *QUICK, out=tmp_path)
    result = json.loads((only(tmp_path) / "result.json").read_text())
    assert result["config"]["scale"] == [1.0] and "alpha has no effect" in result["notes"][0]


def test_the_s_of_increlora_is_that_of_the_triplets_in_use() -> None:
    adapter = variants.attach(Toy(), "increlora", rank=4, alpha=16, targets=TARGETS)
    adapter.optimizer(1e-2, steps=20)
    assert [layer.acting_s for layer in adapter.layers.values()] == [16.0, 16.0]


@pytest.mark.parametrize("key", ["beta1", "beta2"])
def test_increlora_refuses_an_average_that_is_none(key: str) -> None:
    rule = {"name": "increlora", key: 1.5}
    with pytest.raises(variants.Incompatible, match="beta1 or beta2 not between 0 and 1"):
        variants.attach(Toy(), "increlora", rank=4, targets=TARGETS, allocation=rule)


def test_ia3_s_inputs_name_layers_that_there_are() -> None:
    form = {"name": "ia3", "inputs": "first, nothing"}
    with pytest.raises(variants.Incompatible, match="inputs=nothing: matches no layer"):
        variants.attach(Toy(), "ia3", targets=TARGETS, form=form)
    form["inputs"] = "first"
    layers = variants.attach(Toy(), "ia3", targets=TARGETS, form=form).layers
    assert [list(layer.params) for layer in layers.values()] == [["columns"], ["rows"]]


def test_dropout_is_refused_where_no_matrix_changes() -> None:
    with pytest.raises(variants.Incompatible, match=r"dropout=0\.1: form bitfit"):
        variants.attach(Toy(), "bitfit", targets=["first"], dropout=0.1)


@pytest.mark.parametrize("init", ["default", "pissa"])
def test_an_adapter_goes_back_to_a_time_before_its_base_moved(init: str) -> None:
    adapter = variants.attach(
        Toy(), "relora", rank=4, targets=TARGETS, init=init,
        allocation={"name": "relora", "every": 2.0},
    )  # fmt: skip
    x = torch.randn(32, 24)
    y = adapter.model(x).detach()
    before = {k: t.clone() for k, t in adapter.tensors().items()}
    optimizer = adapter.optimizer(1e-2, steps=6)
    for _ in range(6):
        adapter.model(x).square().mean().backward()
        optimizer.step()
    assert "first.moved.W0" in adapter.tensors()
    adapter.restore(before)
    assert adapter.tensors().keys() == before.keys()
    torch.testing.assert_close(adapter.model(x), y, rtol=1e-5, atol=1e-6)


def test_an_encoder_s_padding_is_no_decoder_s() -> None:
    """T5, both of 6 tokens: 8 of the encoder's are real, and of the decoder's all 12, or 10."""
    config = transformers.T5Config(
        vocab_size=32, d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=4,
        decoder_start_token_id=0,
    )  # fmt: skip
    model = transformers.T5ForConditionalGeneration(config).eval()
    mask, ids = torch.ones(2, 6, dtype=torch.long), torch.arange(1, 13).view(2, 6)
    mask[1, 2:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids}
    inner = torch.ones_like(mask)
    inner[0, 4:] = 0
    for extra, count in (({}, 12), ({"decoder_attention_mask": inner}, 10)):
        seen: dict[str, torch.Tensor] = {}
        for side in ("encoder", "decoder"):
            path = f"{side}.block.0.layer.0.SelfAttention.q"
            hook = model.get_submodule(path).register_forward_pre_hook(
                lambda m, args, side=side, seen=seen: seen.update({side: args[0].detach()})
            )
            model(**batch, **extra)
            hook.remove()
        paths = ["encoder.block.0.layer.0.SelfAttention.q",
                 "decoder.block.0.layer.0.SelfAttention.q",
                 "decoder.block.0.layer.1.EncDecAttention.k"]  # fmt: skip
        choice = variants.choose("lora", 2, init={"name": "corda", "batches": 1})
        planned = plan(model, choice, paths)
        sums = {
            item.site.path: found["mean"]
            for item, found in _measure(model, planned, [batch | extra], ("mean",))
        }
        torch.testing.assert_close(sums[paths[0]], seen["encoder"][mask.bool()].mean(0))
        real = inner.bool() if extra else torch.ones(2, 6, dtype=torch.bool)
        assert real.sum() == count
        torch.testing.assert_close(sums[paths[1]], seen["decoder"][real].mean(0))
        memory = model.encoder(input_ids=ids, attention_mask=mask)[0]
        torch.testing.assert_close(sums[paths[2]], memory[mask.bool()].mean(0))


def test_loading_into_an_adapted_model_says_so(tmp_path: Path) -> None:
    model = Toy()
    variants.attach(model, "lora", rank=4, targets=TARGETS).save(tmp_path)
    with pytest.raises(variants.Incompatible, match="has an adapter already"):
        variants.load(model, tmp_path)


def test_a_preset_s_own_settings_do_not_go_to_another_part() -> None:
    """LoRA-GA's gamma of 64 went to GoRA's, and GaLore's rank to updates that have none."""
    ga = settings("variant=lora_ga").variant["init"]
    other = settings("variant=lora_ga", "variant/init=gora").variant["init"]
    assert ga["gamma"] == 64.0
    assert other == {"name": "gora", "batches": 32, "gamma": 0.05, "sign": "descent"}
    assert settings("variant=lora", "variant/init=lora_ga").variant["init"]["gamma"] == 16.0
    assert settings("variant=galore", "variant/update=adamw").variant["update"]["name"] == "adamw"
    assert settings("variant=galore", "variant.update.rank=4").variant["update"]["rank"] == 4


def test_an_adapter_that_has_left_says_so() -> None:
    adapter = variants.attach(Toy(), "lora", rank=2, targets=["first"])
    adapter.merge()
    with pytest.raises(variants.Incompatible, match="has left its model"), adapter.disabled():
        pass
    with pytest.raises(variants.Incompatible, match="has left its model"):
        adapter.optimizer(1e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank_pattern": ["first"]}, "rank_pattern=.*: a mapping from roles or layers"),
        ({"rank_pattern": {"first": 0}}, "rank_pattern of first: rank=0: the rank is a whole"),
        ({"alpha_pattern": {"first": 0}}, "alpha_pattern of first: alpha=0: alpha is a positive"),
        ({"init": {"name": "pissa", "method": "fast"}}, "init pissa: method=fast; choices: exact"),
        ({"init": "eva", "calibration": ["abc"]}, "a batch is a mapping, passed as model"),
    ],
)
def test_wrong_settings_name_their_key(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(variants.Incompatible, match=message):
        variants.attach(Toy(), "lora", rank=2, targets=["first"], **settings)


def test_an_adapter_of_another_model_is_named(tmp_path: Path) -> None:
    variants.attach(Toy(), "lora", rank=2, targets=["first"]).save(tmp_path)
    with pytest.raises(variants.Incompatible, match="was made for another model: this one has no"):
        variants.load(torch.nn.Sequential(torch.nn.Linear(4, 4)), tmp_path)
