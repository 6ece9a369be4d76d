"""Whole runs, by the commands that people type, on the embedded model."""

import contextlib
import gc
import importlib
import io
import json
import math
import multiprocessing
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hydra._internal.hydra import Hydra
from safetensors import SafetensorError
from safetensors.torch import load_file

from experiments import command, forks, isolate, record, track
from experiments.evaluate import Scorer
from experiments.saved import settings_of_run
from experiments.tasks import BadInput
from variants._registry import index

ROOT = Path(__file__).parents[1]
QUICK = ["train.steps=3", "train.batch_size=8", "eval.limit=8", "eval.limit_during=4",
         "track.mode=disabled", "task.items=200"]  # fmt: skip


@dataclass
class Said:
    """What a command printed."""

    stdout: str
    stderr: str


def called(run: Callable[[], Any], words: list[str], code: int) -> Said:
    """A command in this process: imports are paid once."""
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv, found = words, 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            run()
    except SystemExit as exit_:
        found = int(exit_.code or 0)
    finally:
        sys.argv = before
        gc.enable()
    assert found == code, out.getvalue() + err.getvalue()
    return Said(out.getvalue(), err.getvalue())


def lab(*words: str, out: Path, code: int = 0) -> Said:
    """`python run.py WORDS out_dir=OUT`."""
    argv = ["run.py", *words, f"out_dir={out}"]
    script = str(ROOT / "run.py")
    return called(lambda: runpy.run_path(script, run_name="__main__"), argv, code)


def module(name: str, *words: str, code: int = 0) -> Said:
    """`python -m NAME WORDS`."""
    run = importlib.import_module(name).main
    return called(lambda: sys.exit(run()), [name, *words], code)


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def only(out: Path) -> Path:
    (found,) = (p for p in (out / "single").iterdir() if p.is_dir())
    return found


# processes that have their imports done: forks of this one, where no CUDA forbids it
FORKS = multiprocessing.get_context("forkserver" if torch.cuda.is_available() else "fork")
FORKS.set_forkserver_preload(["experiments.attempt", "experiments.job", "experiments.track",
                              "transformers.models.auto.modeling_auto",
                              "transformers.models.llama.modeling_llama",
                              "transformers.tokenization_utils_tokenizers"])  # fmt: skip


class Fork(isolate.Server):
    """A server of isolated runs that need not import anything: a fork of this process."""

    def _started(self, answers: int) -> Any:
        asked, ours = os.pipe()
        process = FORKS.Process(target=_served, args=(asked, ours, answers))
        process.start()
        os.close(asked)
        return SimpleNamespace(stdin=os.fdopen(ours, "wb"), wait=process.join, kill=process.kill)


def _served(asked: int, ours: int, answers: int) -> None:
    os.setsid()
    os.close(ours)
    os.dup2(asked, 0)
    sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w")
    os.chdir(ROOT)
    index.cache_clear()  # a job's environment may name files that the tests before did not
    forks.serve(answers)


def _typed(words: list[str], out: Path, said: Path) -> None:
    """`python run.py`, in a fork; what it says goes to a file."""
    isolate._server = None  # that of the parent
    sys.argv = ["run.py", *words, f"out_dir={out}"]
    with said.open("w", buffering=1) as file, contextlib.redirect_stdout(file):
        with contextlib.redirect_stderr(file):
            try:
                runpy.run_path(str(ROOT / "run.py"), run_name="__main__")
            finally:
                isolate.close()  # a fork is waited for before what `atexit` would do


def typed(words: list[str], out: Path) -> tuple[Any, Path]:
    """The process of such a command, begun, and where it says what it does."""
    said = out.with_suffix(".said")
    said.touch()
    process = FORKS.Process(target=_typed, args=(words, out, said))
    process.start()
    return process, said


def _signalled(step: float, words: list[str], out: Path, signum: int) -> tuple[int | None, str]:
    """(exit code, what was said) of a run that gets a signal once that step is logged."""
    process, said = typed(words, out)
    while process.is_alive():
        rows = [p.read_text().count('"grad_norm"') for p in out.glob("single/*/metrics.jsonl")]
        if rows and rows[0] >= step:
            assert process.pid is not None
            os.kill(process.pid, signum)
            break
        time.sleep(0.02)
    process.join()
    return process.exitcode, said.read_text()


FINISHED = [w for w in QUICK if not w.startswith(("track", "eval.limit="))] + [
    "variant=dora", "variant/init=pissa", "rank=4", "track.mode=offline", "eval.limit=96"
]  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run of PiSSA on DoRA, tracked offline, in a process of its own."""
    out = tmp_path_factory.mktemp("finished") / "runs"
    code, said = _signalled(math.inf, FINISHED, out, 0)
    assert code == 0, said
    return only(out)


def test_a_run_leaves_what_the_design_names(finished: Path) -> None:
    names = {p.name for p in finished.iterdir()}
    assert names >= {"config.yaml", "env.json", "metrics.jsonl", "predictions.jsonl", "checkpoint",
                     "adapter", "run.log", "status.json", "result.json"}  # fmt: skip
    assert not [n for n in names if n.endswith(".part")]
    result = json.loads((finished / "result.json").read_text())
    assert set(result) >= {"schema", "run_id", "status", "config", "metrics", "forgetting",
                           "params", "time", "memory", "tokens", "flops", "provenance"}  # fmt: skip
    assert result["status"] == "done" and finished.name == f"dora-r4-{result['run_id']}"
    assert set(result["config"]) >= {"variant", "axes", "rank", "alpha", "model", "task", "seed",
                                     "lr", "steps"}  # fmt: skip
    assert result["config"]["variant"] == "dora"
    assert result["config"]["axes"]["init"]["name"] == "pissa"
    metrics = result["metrics"]
    assert set(metrics["base"]) == set(metrics["tuned"]) >= {"loss", metrics["primary"]}
    assert set(result["forgetting"]) == {"base", "tuned"}
    assert set(result["time"]) >= {"init_s", "train_s", "eval_s", "step_ms"}
    assert set(result["memory"]) >= {"peak_bytes", "saved_activation_bytes", "stored_bits"}
    assert result["memory"]["stored_bits"] == 32 and result["memory"]["restoring_bytes"] > 0
    assert result["flops"] > 0 and result["tokens"]["trained"] > 0
    assert result["params"]["fraction"] == pytest.approx(
        result["params"]["trainable"] / result["params"]["total"]
    )
    rows = rows_of(finished / "predictions.jsonl")
    assert len(rows) == 96 and all(set(r) == {"id", "reference", "base", "tuned"} for r in rows)
    hits = sum(r["tuned"] == r["reference"] for r in rows)
    assert metrics["tuned"]["exact_match"] == pytest.approx(hits / 96)
    steps = rows_of(finished / "metrics.jsonl")
    assert [r["step"] for r in steps if "loss" in r] == [1, 2, 3]
    assert [r["step"] for r in steps if "validation/loss" in r] == [0, 1, 2, 3]
    assert {p.name for p in (finished / "adapter").iterdir()} == {
        "adapter.safetensors", "adapter.json"
    }  # fmt: skip
    env = json.loads((finished / "env.json").read_text())
    assert "variants/dora.py" in env["sources"] and "experiments/train.py" in env["sources"]
    assert env["packages"]["torch"] == torch.__version__


@pytest.mark.parametrize(
    "file", sorted((ROOT / "conf" / "experiment").glob("*.yaml")), ids=lambda p: p.stem
)
def test_every_experiment_can_be_asked_for(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the embedded model as it stands; one of a larger model names the data that it lacks."""
    words = [f"experiment={file.stem}", "train.steps=2", "dry=true"]
    if "override /model: hf" not in file.read_text():
        assert lab(*words, out=tmp_path).stdout.startswith("missing")
    else:
        monkeypatch.setenv("LORA_DATA", "nowhere")
        said = lab(*words, out=tmp_path, code=1).stderr
        assert said.startswith("error: task.path=nowhere/") and "no such file" in said
    assert not any(tmp_path.iterdir())


def test_the_base_knows_its_old_skills_and_no_new_one(finished: Path) -> None:
    result = json.loads((finished / "result.json").read_text())
    assert result["forgetting"]["base"]["exact_match"] > 0.97
    assert result["forgetting"]["base"]["loss"] < 0.05
    assert result["metrics"]["base"]["exact_match"] < 0.1


def test_patterns_of_rank_reach_the_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a limit holds for new and old items, of the base and of the result."""
    scored, full = [], Scorer.full

    def noted(self: Scorer, examples: Any) -> Any:
        scored.append(len(examples))
        return full(self, examples)

    monkeypatch.setattr(Scorer, "full", noted)
    lab("variant=lora", "rank=2", "rank_pattern={mlp:4,q:3}", *QUICK, out=tmp_path)
    assert scored == [8] * 4
    ranks = json.loads((only(tmp_path) / "result.json").read_text())["ranks"]
    own = {name.rpartition(".")[2]: r for name, r in ranks.items()}
    attention = {"q_proj": 3, "k_proj": 2, "v_proj": 2, "o_proj": 2}
    assert own == attention | {"gate_proj": 4, "up_proj": 4, "down_proj": 4}


def test_the_same_command_repeats_nothing(finished: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.is_file()}
    done = lab(*FINISHED, out=finished.parents[1])
    assert {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.is_file()} == before
    assert str(finished) in done.stdout.replace("\n", "")


def test_wandb_has_the_history_and_the_config(finished: Path) -> None:
    (file,) = finished.glob("wandb/offline-run-*/run-*.wandb")
    wandb = Path(sys.executable).with_name("wandb")
    done = subprocess.run([wandb, "leet", "inspect", "--json", file], capture_output=True,
                          text=True, check=True)  # fmt: skip
    text = done.stdout
    rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    assert len(rows) > 6
    for word in ("validation/exact", "grad_norm", "pissa", "seq_len", finished.name):
        assert word in text, word


def test_export_loads_in_peft_and_in_transformers(finished: Path, tmp_path: Path) -> None:
    import transformers
    from peft import PeftModel

    from experiments.model import TINY
    from experiments.saved import open_run

    for kind in ("peft", "merged", "native"):
        done = module("experiments.export", str(finished), "--to", kind, "--out",
                      str(tmp_path / kind))  # fmt: skip
        assert str(tmp_path / kind) in done.stdout
    assert "merge error" in module(
        "experiments.export", str(finished), "--to", "merged", "--out", str(tmp_path / "again")
    ).stdout  # fmt: skip
    ids = torch.arange(5, 25).view(2, 10)
    with torch.no_grad():
        wanted = open_run(finished)[0].model(ids).logits
        base = transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
        their = PeftModel.from_pretrained(base, tmp_path / "peft").eval()
        allowed = 1e-6 * wanted.abs().max().item()
        torch.testing.assert_close(their(input_ids=ids).logits, wanted, rtol=0, atol=allowed)
        merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
        torch.testing.assert_close(merged(ids).logits, wanted, rtol=0, atol=allowed)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "merged").eos_token == ";"
    done = module("experiments.export", str(finished), "--to", "peft", "--out",
                  str(tmp_path / "peft"), code=1)  # fmt: skip
    assert done.stderr.strip().endswith("not empty")


def test_evaluate_and_generate_a_saved_run(finished: Path, tmp_path: Path) -> None:
    copy = tmp_path / finished.name
    shutil.copytree(finished, copy)
    done = module("experiments.evaluate", str(copy), "--json")
    again = json.loads(done.stdout)["metrics"]
    assert again == json.loads((copy / "result.json").read_text())["metrics"]
    rows = "\n".join(json.dumps({"prompt": f"<copy>{c}bc=", "response": f"{c}bc"})
                     for c in "abcdefghijklmnopqrstuvwxyz" * 2)  # fmt: skip
    (tmp_path / "d.jsonl").write_text(rows)
    done = module("experiments.evaluate", str(copy), "task=jsonl",
                  f"task.path={tmp_path}/d.jsonl", "eval.split=test", "--json")  # fmt: skip
    found = json.loads(done.stdout)
    assert found["task"] == "jsonl" and set(found["metrics"]["base"]) == {"loss", "exact_match"}
    assert found["metrics"]["base"]["exact_match"] > 0.9  # an old skill of the base
    assert len((Path(found["folder"]) / "predictions.jsonl").read_text().splitlines()) == 5
    done = module("experiments.generate", str(copy), "--prompt", "<copy>abc=", "--base")
    assert done.stdout == "abc\n"
    assert module("experiments.generate", str(copy), "--prompt", "<copy>abc=").stdout
    done = module("experiments.generate", str(tmp_path), "--prompt", "x", code=1)
    assert "no folder of a run" in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["evaluate", "RUN", "task.foo=1"], "error: task.foo: no such key; choices: name, skills"),
        (["evaluate", "RUN", "eval.foo=1"], "error: eval.foo: no such key; choices: split,"),
        (["evaluate", "RUN", "task.items=abc"], "error: task.items=abc: Value 'abc'"),
        (["evaluate", "RUN", "eval.limit=["], "error: eval.limit=[: while parsing"),
        (["evaluate", "RUN", "optim.lr=1"], "error: optim.lr=1: only task=, task.*=, eval.*="),
        (["generate", "RUN", "--prompt", ""], "error: --prompt: empty"),
        (["export", "RUN", "--to", "peft", "--out", "RUN/run.log"], "error: --out "),
    ],
    ids=lambda v: v[-1] if isinstance(v, list) else "",
)
def test_bad_words_for_a_saved_run(words: list[str], message: str, finished: Path) -> None:
    words = [word.replace("RUN", str(finished)) for word in words]
    done = module(f"experiments.{words[0]}", *words[1:], code=1)
    assert done.stderr.startswith(message) and len(done.stderr.splitlines()) == 1, done.stderr


@pytest.mark.parametrize("key", ["kind: tiny", "name: skills"])
def test_settings_of_no_run(finished: Path, tmp_path: Path, key: str) -> None:
    settings = (finished / "config.yaml").read_text()
    assert key in settings
    (tmp_path / "config.yaml").write_text(settings.replace(key, key.partition(" ")[0] + " zzz"))
    with pytest.raises(
        BadInput, match=r"not the settings of a run \((model\.kind|task\.name) is none"
    ):
        settings_of_run(tmp_path)
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(BadInput, match=r"not the settings of a run \(model\.kind is none"):
        settings_of_run(tmp_path)


BAD = [
    (["variant=dorra"], "error: variant=dorra: no such variant (did you mean 'dora'?); choices:"),
    (["rank=0"], "error: rank=0: a positive number"),
    (["rank=100000"], "error: rank=100000: "),
    (["targets=nothing"], "error: targets=nothing: matches no layer; roles: all-linear"),
    (["task=lm", "task.path=missing"], "error: task.path=missing: no such file or folder"),
    (["optim.lr=abc"], "error: optim.lr=abc: "),
    (["optim.lr=nan"], "error: optim.lr=nan: a positive number"),
    (["variant=full", "variant/init=pissa"], "error: init pissa needs a low-rank form, not full"),
    (["varient=dora"], "error: varient: no such key (did you mean 'variant'?); choices: variant"),
    (["task=skils"], "error: task=skils: no such task (did you mean 'skills'?); choices:"),
    (["device=tpu7"], "error: device=tpu7: choices: auto, cpu"),
    (["rank_pattern=3"], "error: rank_pattern=3: a mapping, such as {mlp:16,q:4}"),
    (["rank_pattern={typo:3}"], "error: rank_pattern=typo: matches no layer"),
    (["rank_pattern={lm_head:3}"], "error: rank_pattern=lm_head: matches no layer that targets"),
    (["targets=[]"], "error: targets: empty; name a role or a layer"),
    (["study=../elsewhere"], "error: study=../elsewhere: the name of one folder inside out_dir"),
    (["seed=-1"], "error: seed=-1: zero or a positive whole number"),
    (["task=lm", f"task.path={sys.executable}"], "error: task.path="),
    (["model=config", "model.heads=3"], "error: model.hidden_size=256: a multiple of 2 x 3 heads"),
    (["model=config", "model.hidden_size=-4"], "error: model.hidden_size=-4: a positive number"),
    (
        ["model=config", "model.kv_heads=3"],
        "error: model.kv_heads=3: does not divide model.heads=4",
    ),
    (["model=config", "model.vocab_size=3"], "error: model.vocab_size=3: the tokenizer has 258"),
    (["model=hf", "model.path=./missing"], "error: model.path=./missing: no such folder"),
]


@pytest.mark.parametrize(
    ("words", "message"), BAD, ids=lambda v: v[0] if isinstance(v, list) else ""
)
def test_bad_input_is_one_line(words: list[str], message: str, tmp_path: Path) -> None:
    done = lab(*words, "track.mode=disabled", out=tmp_path / "runs", code=1)
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith(message), done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert not list(tmp_path.rglob("result.json"))
    assert not list(tmp_path.rglob("status.json"))


def test_what_is_refused_once_the_layers_are_there_says_so_in_its_folder(tmp_path: Path) -> None:
    words = [
        "variant=adalora",
        "rank=4",
        "variant.allocation.target_rank=9",
        *QUICK,
        "train.steps=6",
    ]
    said = lab(*words, out=tmp_path, code=1).stderr
    status = json.loads((only(tmp_path) / "status.json").read_text())
    assert status["status"] == "refused" and "traceback" not in status
    assert said.strip() == f"error: {status['error']}" and "target_rank=9.0" in said
    assert "Traceback" not in (only(tmp_path) / "run.log").read_text()


def test_an_out_dir_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = lab(*QUICK, out=tmp_path / "file", code=1)
    assert done.stderr == f"error: out_dir={tmp_path}/file: Not a directory\n"


def test_a_truncated_model_is_named(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "experiments" / "tiny", tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100000])
    done = lab("model=hf", f"model.path={tmp_path}/model", *QUICK, out=tmp_path / "runs", code=1)
    assert done.stderr.strip().endswith("model.safetensors is truncated, or no safetensors file")
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_config_that_is_no_object_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[1]")
    done = lab("model=hf", f"model.path={tmp_path}", *QUICK, out=tmp_path / "runs", code=1)
    assert done.stderr == f"error: model.path={tmp_path}: config.json is no json object\n"


def test_a_divergence_is_a_result(tmp_path: Path) -> None:
    words = ["variant=lora", "optim.lr=1e30", "optim.clip=0", "optim.warmup=0", *QUICK]
    lab(*words, out=tmp_path / "runs")
    folder = only(tmp_path / "runs")
    result = json.loads((folder / "result.json").read_text())
    assert result["status"] == "diverged" and "not finite" in result["diverged"]
    assert set(result["metrics"]["tuned"]) == set(result["metrics"]["base"])
    assert json.loads((folder / "status.json").read_text())["status"] == "diverged"
    assert record.load_checkpoint(folder / "checkpoint") is not None
    before = (folder / "result.json").stat().st_mtime_ns
    lab(*words, out=tmp_path / "runs")
    assert (folder / "result.json").stat().st_mtime_ns == before


def test_what_is_composed_is_composed_once_and_the_mode_obeyed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hydra composes twice to look for `hydra.mode`; here only where it can be."""
    asked, compose = [], Hydra.compose_config
    monkeypatch.setattr(Hydra, "compose_config", lambda self, *args, **more: (
        asked.append(args), compose(self, *args, **more))[1])  # fmt: skip
    assert "missing" in lab("rank=2", "dry=true", out=tmp_path).stdout and len(asked) == 1
    assert "2 runs" in lab("hydra.mode=MULTIRUN", "rank=1,2", "dry=true", out=tmp_path).stdout
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        "# @package _global_\nhydra: {mode: MULTIRUN}\n"
    )
    mine = ["--config-dir", str(tmp_path), "experiment=mine", "rank=1,2", "dry=true"]
    assert "2 runs" in lab(*mine, out=tmp_path).stdout
    asked.clear()
    monkeypatch.setattr(command, "CONF", tmp_path)  # as if conf/config.yaml had it
    (tmp_path / "config.yaml").write_text("hydra: {mode: MULTIRUN}\n")
    lab("rank=2", "dry=true", out=tmp_path)
    lab("+rank_pattern={q:1}", "rank=2", "dry=true", out=tmp_path)  # as of a group of one's own
    assert len(asked) == 4


def test_multirun_one_table_one_group_and_nothing_twice(tmp_path: Path) -> None:
    out = tmp_path / "runs"
    words = ["-m", "variant=lora,pissa", "rank=2,4", *QUICK, "sweep.isolate=false"]
    done = lab(*words, out=out)
    results = sorted(out.rglob("result.json"))
    assert len(results) == 4 and "4 runs" in done.stdout
    stamps = [p.stat().st_mtime_ns for p in results]
    words[2] = "rank=2,4,100000"
    done = lab(*words, out=out, code=1)
    assert "refused: variant=lora rank=100000" in done.stderr
    assert [p.stat().st_mtime_ns for p in results] == stamps
    assert "6 runs" in done.stdout
    done = lab(*words, "dry=true", out=out, code=0)
    assert done.stdout.count("done ") == 4


def test_a_finished_run_joins_the_group_of_a_later_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(track, "_server", None)
    out, words = tmp_path / "runs", ["variant=lora", "rank=2", *QUICK, "track.mode=offline"]
    lab(*words, out=out)
    done = lab("-m", *words, "sweep.isolate=false", out=out)
    assert "1 done; nothing to run; 1 finished before, to join this sweep" in done.stdout
    assert not any(line.startswith("done ") for line in done.stdout.splitlines())
    (folder,) = (p.parent for p in out.rglob("result.json"))
    group = json.loads((folder / "status.json").read_text())["group"]
    assert group.startswith("sweep-")
    files = sorted(folder.rglob("*.wandb"), key=lambda p: p.stat().st_mtime_ns)
    inspect = ["wandb", "leet", "inspect", "--json", str(files[-1])]
    shown = subprocess.run(inspect, capture_output=True, text=True, check=True).stdout
    assert len(files) == 2 and group in shown
    for again in ([], ["sweep.retry=failed"]):  # the same sweep
        assert "1 done; nothing to run\n" in lab("-m", *words, *again, out=out).stdout
    assert len(list(folder.rglob("*.wandb"))) == 2
    assert track._server is not None
    track._server.communicate()


def _same(a: Path, b: Path) -> None:
    """The adapters to the bit, the metrics in every field but times."""
    one, other = (load_file(p / "adapter" / "adapter.safetensors") for p in (a, b))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[k], other[k]) for k in one)
    rows: list[list[dict[str, Any]]] = [
        [{k: v for k, v in row.items() if k != "seconds"} for row in rows_of(p / "metrics.jsonl")]
        for p in (a, b)
    ]  # fmt: skip
    assert rows[0] == rows[1]
    results = [json.loads((p / "result.json").read_text()) for p in (a, b)]
    for key in ("metrics", "forgetting", "learning", "tokens", "config", "ranks", "flops"):
        assert results[0][key] == results[1][key], key


KILLED = ["variant=adalora", "rank=4", "dropout=0.1", "train.steps=24", "train.batch_size=8",
          "eval.limit=8", "eval.limit_during=8", "task.items=200", "track.mode=disabled",
          "train.checkpoint_every=7", "train.log_every=1"]  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing interrupts."""
    out = tmp_path_factory.mktemp("whole") / "runs"
    lab(*KILLED, out=out)
    return only(out)


def test_a_killed_run_resumes_to_the_same_bits(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    _signalled(10, KILLED, out, signal.SIGKILL)
    assert not list(out.rglob("result.json"))
    done = lab(*KILLED, out=out)
    assert "resumed after step" in done.stdout
    _same(whole, only(out))


@pytest.mark.parametrize(
    "signum", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_an_interrupted_run_keeps_the_step_it_ended_with(
    whole: Path, tmp_path: Path, signum: int
) -> None:
    """One signal ends the run between two steps, with a checkpoint; the rest is bit for bit."""
    out = tmp_path / "stopped"
    code, said = _signalled(10, [*KILLED, "train.checkpoint_every=23"], out, signum)
    assert code == (130 if signum == signal.SIGINT else 143)
    step = re.search(r"interrupted after step (\d+) of 24: the same command goes on", said)
    assert step and 10 <= int(step[1]) < 24
    status = json.loads((next(out.rglob("status.json"))).read_text())
    assert f"after step {step[1]}" in status["error"]
    env = json.loads((only(out) / "env.json").read_text())
    env["sources"]["variants/adalora.py"] = "0" * 64
    record.write_json(only(out) / "env.json", env)
    done = lab(*KILLED, out=out)
    assert f"resumed after step {step[1]} of 24" in done.stdout
    (note,) = json.loads((only(out) / "result.json").read_text())["notes"]
    assert note in done.stdout and "other code than began it: variants/adalora.py changed" in note
    env = json.loads((only(out) / "env.json").read_text())
    assert env["changed"] == ["variants/adalora.py"], "a third attempt says it as well"
    _same(whole, only(out))


def test_a_death_before_the_first_checkpoint_leaves_no_double_rows(tmp_path: Path) -> None:
    words = [*KILLED, "train.steps=12", "train.checkpoint_every=11"]
    _signalled(3, words, tmp_path, signal.SIGKILL)
    lab(*words, out=tmp_path)
    steps = [(row["step"], len(row)) for row in rows_of(only(tmp_path) / "metrics.jsonl")]
    assert len(steps) == len(set(steps))


def test_damaged_files_of_a_run_cost_nothing_but_work(whole: Path, tmp_path: Path) -> None:
    """result.json without content, metrics that are no text: made again from the checkpoint. The
    base's scores of other old items than the result's are not kept."""
    shutil.copytree(whole.parents[1], tmp_path, dirs_exist_ok=True)
    folder = only(tmp_path)
    before = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text("{}")
    base = folder / "checkpoint" / "base.json"
    kept = json.loads(base.read_text())
    base.write_text(json.dumps(kept | {"old": 380, "forgetting": {"loss": 9.0, "exact_match": 0}}))
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b"\xff\xfe no json\n")
    lab(*KILLED, out=tmp_path)
    after = json.loads((folder / "result.json").read_text())
    for key in ("metrics", "forgetting", "learning", "tokens"):
        assert after[key] == before[key]
    assert json.loads(base.read_text()) == kept
    assert after["time"]["step_ms"] > 0
    (folder / "config.yaml").write_text("junk: 1\n")
    assert (
        "config.yaml: not the settings of a run"
        in module("experiments.evaluate", str(folder), code=1).stderr
    )


@pytest.mark.slow
def test_ten_kills_in_a_row(tmp_path: Path) -> None:
    """At random steps, of every variant that has state of its own."""
    import random

    for preset in ("adalora", "dora"):
        words = [f"variant={preset}", *KILLED[1:]]
        lab(*words, out=tmp_path / f"whole-{preset}")
        for kill in range(10):
            out = tmp_path / f"{preset}-{kill}"
            _signalled(random.Random(kill).randrange(1, 23), words, out, signal.SIGKILL)
            lab(*words, out=out)
            _same(only(tmp_path / f"whole-{preset}"), only(out))


def test_a_run_that_is_held_is_not_run_twice(tmp_path: Path) -> None:
    lab("variant=lora", "rank=2", *QUICK, out=tmp_path / "runs")
    folder = only(tmp_path / "runs")
    (folder / "result.json").unlink()
    with record.Folder(folder).locked() as held:
        assert held
        done = lab("variant=lora", "rank=2", *QUICK, out=tmp_path / "runs", code=1)
        assert "another process is running this very run" in done.stderr


def test_a_checkpoint_survives_a_full_disk_and_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {"x": torch.ones(3)}
    record.save_checkpoint(tmp_path, 1, tensors, {"a": 1})
    record.save_checkpoint(tmp_path, 2, tensors, {"a": 2})

    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    def full_too(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", full)
        with pytest.raises(OSError, match=r"tensors\.safetensors: .*No space left"):
            record.save_checkpoint(tmp_path, 3, tensors, {"a": 3})
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full_too)
        with pytest.raises(OSError, match="No space left"):
            record.write_json(tmp_path / "status.json", {})
    assert not list(tmp_path.rglob("*.part"))
    found = record.load_checkpoint(tmp_path)
    assert found is not None and found[0] == 2
    assert not list(tmp_path.glob("new.*"))
    file = tmp_path / "last" / "tensors.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    found = record.load_checkpoint(tmp_path)
    assert found is not None and found[0] == 1 and found[2] == {"a": 1}
    (tmp_path / "previous" / "state.json").write_text("{")
    assert record.load_checkpoint(tmp_path) is None


def test_code_that_changed_makes_a_finished_run_stale(finished: Path, tmp_path: Path) -> None:
    copy = tmp_path / finished.name
    shutil.copytree(finished, copy)
    folder = record.Folder(copy)
    assert folder.state == "done"
    env = json.loads((copy / "env.json").read_text())
    env["sources"]["variants/dora.py"] = "0" * 64
    record.write_json(copy / "env.json", env)
    assert folder.state == "stale" and folder.changed_sources() == ["variants/dora.py"]


def test_generation_does_not_change_with_the_batch_size() -> None:
    from experiments.config import Tiny
    from experiments.generate import generate
    from experiments.model import Source

    loaded = Source(Tiny()).load()
    words = ["<copy>abcd=", "<reverse>abcdef=", "<sort>zyx=", "<last>qwer=", "<upper>abc="]
    prompts = [loaded.tokenizer(word).input_ids for word in words]
    texts = [generate(loaded, prompts, max_new_tokens=8, batch_size=size) for size in (1, 2, 5)]
    assert texts[0] == texts[1] == texts[2] == ["abcd", "fedcba", "xyz", "r", "ABC"]


def test_accumulation_gives_the_same_step(tmp_path: Path) -> None:
    """Four portions of a batch are the batch, to rounding."""
    losses = []
    for parts in ("1", "4"):
        lab("variant=lora", "rank=2", *QUICK, f"train.accumulate={parts}",
            out=tmp_path / f"runs{parts}")  # fmt: skip
        rows = rows_of(only(tmp_path / f"runs{parts}") / "metrics.jsonl")
        losses.append([row["loss"] for row in rows if "loss" in row])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
