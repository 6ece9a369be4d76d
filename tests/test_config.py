"""The configuration: Hydra builds what `attach` builds; hashes; defaults; one-line errors."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

import variants
from experiments import config
from experiments.job import learning_rate, prepare
from experiments.tasks import BadInput
from experiments.train import schedule

ROOT = Path(__file__).parents[1]
config.register()


def settings(*words: str) -> config.Settings:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return config.settings_of(compose("config", list(words)))


SOME = random.Random(0).sample(variants.names(), k=16)


@pytest.mark.parametrize(
    "name", [n if n in SOME else pytest.param(n, marks=pytest.mark.slow) for n in variants.names()]
)
def test_hydra_builds_the_same_variant(name: str) -> None:
    built = settings(f"variant={name}").variant
    axes = {axis: built[axis] for axis in variants.parts()}
    choice = variants.choose(built["name"], **axes)
    assert choice == variants.choose(name)
    assert axes == variants.describe(name)["axes"]


def test_an_axis_and_a_setting_from_the_command_line() -> None:
    words = ["variant=dora", "variant/init=pissa", "variant/base=nf4"]
    built = settings(*words, "variant.form.detach_norm=false", "variant.init.method=exact").variant
    assert built["init"] == {"name": "pissa", "method": "exact", "iterations": 1}
    assert built["base"]["name"] == "nf4" and built["form"]["detach_norm"] is False


@pytest.mark.parametrize("word", ["+foo=1", "+optim.foo=1", "+variant.form.foo=1"])
def test_keys_that_nothing_reads_are_refused(word: str) -> None:
    with pytest.raises(BadInput, match="foo: no such key; choices"):
        settings(word)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("optim.lr=nan", r"optim\.lr=nan: a positive number"),
        ("optim.lr=0", r"optim\.lr=0\.0: a positive number"),
        ("optim.lr=inf", r"optim\.lr=inf: a positive number"),
        ("rank=-3", "rank=-3: a positive number"),
        ("train.steps=0", r"train\.steps=0: a positive number"),
        ("dropout=1", r"dropout=1\.0: from 0 to below 1"),
        ("optim.schedule=step", r"optim\.schedule=step: choices: cosine, linear, constant"),
        ("eval.split=train", r"eval\.split=train: choices: validation, test"),
        ("track.mode=maybe", r"track\.mode=maybe: choices: auto, online"),
        ("model.dtype=fp8", r"model\.dtype=fp8: choices: fp32, bf16, fp16"),
        ("targets={q:1}", r"targets=\{'q': 1\}: a role or a layer, or a list of them"),
        ("train.seq_len=1", r"train\.seq_len=1: two tokens or more"),
    ],
)
def test_numbers_and_words_that_cannot_be(word: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        settings(word)


def test_a_target_may_look_like_a_number() -> None:
    assert settings("targets=0").targets == "0"
    assert settings("targets=[0,q]").targets == ["0", "q"]


def run_id(*words: str) -> str:
    return prepare(settings(*words)).name


def test_the_hash_counts_what_can_change_a_result() -> None:
    base = run_id()
    for word in ("seed=1", "rank=8", "alpha=3", "dropout=0.1", "optim.lr=1e-3", "train.steps=9",
                 "targets=attention", "eval.split=test", "variant/init=pissa", "train.eval_every=3",
                 "model.dtype=bf16"):  # fmt: skip
        assert run_id(word) != base, word
    for word in ("out_dir=elsewhere", "track.mode=disabled", "device=cpu", "dry=true",
                 "train.checkpoint_every=3", "train.log_every=1"):  # fmt: skip
        assert run_id(word) == base, word


def test_the_hash_sees_through_spelling() -> None:
    lr = learning_rate(settings(), 96)[0]
    assert run_id("rank=16") == run_id()
    assert run_id("alpha=32") == run_id("alpha=32.0") == run_id("alpha=2r") == run_id()
    for words in (["+rank_pattern={q:4}"], ["variant=gora", "rank=16"]):  # layers of other ranks
        found = [run_id(*words, f"alpha={alpha}") for alpha in ("2r", "2.0r", "32", "32.0")]
        assert found[0] == found[1] != found[2] == found[3]
    assert run_id("+rank_pattern={q:4}") == run_id("+rank_pattern={q:4}", "alpha=2r")
    assert run_id("optim.clip=1") == run_id("optim.clip=1.0")
    assert lr > 0


def test_the_hash_follows_contents_not_paths(tmp_path: Path) -> None:
    rows = "\n".join(json.dumps({"prompt": f"p{i}", "response": f"r{i}"}) for i in range(40))
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(rows)
    ids = [run_id("task=jsonl", f"task.path={tmp_path}/{n}.jsonl") for n in ("a", "b")]
    assert ids[0] == ids[1]
    (tmp_path / "b.jsonl").write_text(rows.replace("r7", "x"))
    assert run_id("task=jsonl", f"task.path={tmp_path}/b.jsonl") != ids[0]
    text = tmp_path / "old.txt"
    text.write_text("abc" * 100)
    first = run_id(f"eval.forgetting={text}")
    text.write_text("abd" * 100)
    assert run_id(f"eval.forgetting={text}") != first


def test_learning_rate_is_carried_to_the_width() -> None:
    lr, origin = learning_rate(settings("variant=dora"), 4096)
    assert lr == pytest.approx(2e-4)
    assert "Table 8" in origin
    assert learning_rate(settings("variant=dora"), 1024)[0] == pytest.approx(2e-4 * 4**0.781)
    assert learning_rate(settings("optim.width_exponent=0"), 64)[0] == 2e-4
    assert learning_rate(settings("optim.lr=0.5"), 64) == (0.5, "optim.lr")
    assert learning_rate(settings("variant=fourierft"), 64)[0] == 5e-2  # not carried
    lr, origin = learning_rate(settings("variant=dylora"), 768)  # RoBERTa-base's own
    assert lr == 5e-4 and "at width 768, x1 at width 768" in origin
    carried = learning_rate(settings("variant=fourierft", "optim.width_exponent=1"), 64)[0]
    assert carried == pytest.approx(5e-2 * 64)


def test_schedules() -> None:
    """Warm-up to 1, then to 0 after the last step."""
    cosine = [schedule("cosine", 0.1, step, 20) for step in range(21)]
    assert cosine[:3] == [0.5, 1.0, 1.0] and cosine[20] == pytest.approx(0)
    linear = [schedule("linear", 0.0, step, 4) for step in range(5)]
    assert linear == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert schedule("constant", 2, 0, 10) == 0.5 and schedule("constant", 2, 9, 10) == 1.0


def test_epochs_become_steps(tmp_path: Path) -> None:
    rows = "\n".join(json.dumps({"prompt": "p", "response": "r"}) for _ in range(100))
    (tmp_path / "d.jsonl").write_text(rows)
    made = prepare(settings("task=jsonl", f"task.path={tmp_path}/d.jsonl", "train.epochs=1.5",
                            "train.batch_size=16"))  # fmt: skip
    assert made.settings.train.steps == 8  # 80 items, 1.5 times, in 16s
    with pytest.raises(BadInput, match=r"give train\.steps or train\.epochs"):
        settings("train.steps=3", "train.epochs=1")


def test_help_says_what_keys_take() -> None:
    lines = [line.split(maxsplit=1) for line in config.more_keys().splitlines() if line]
    takes = {line[0]: line[1] for line in lines if len(line) == 2}
    assert takes["sweep.time_limit"] == "seconds, or a time such as 90s, 30m, 1h30m, 2d"
    assert takes["sweep.retry"].startswith("failed, refused, stale, done, diverged")
    assert "smoke" in takes["study"]


def test_every_default_resolves_to_yaml() -> None:
    made: Any = settings()
    assert OmegaConf.create(made.variant)
