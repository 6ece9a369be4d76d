"""A run on a base of 4 bits: bytes counted exactly, in result and tables, and its export."""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from test_run import QUICK, lab, module, only
from torch import nn

import variants
from experiments import record
from experiments.measure import most_bytes, resident_bytes
from experiments.overview import table
from experiments.plan import Job


class Finished(NamedTuple):
    """A run: its folder, its result, and what it printed."""

    path: Path
    result: dict[str, Any]
    said: str


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    out = tmp_path_factory.mktemp("memory")
    words = [*QUICK, "eval.limit=2", "train.eval_every=0", "train.checkpoint_every=0"]
    said = lab("variant=qlora", "variant/base=nf4", "rank=4", *words, out=out)
    path = only(out)
    return Finished(path, json.loads((path / "result.json").read_text()), said.stdout)


def test_the_model_at_rest_is_what_its_tensors_take(finished: Finished) -> None:
    """Stored bits, to the byte, and what is in no code: embeddings, norms, the adapter."""
    from experiments.config import Tiny
    from experiments.model import Source
    from variants._targets import all_linear

    result, memory = finished.result, finished.result["memory"]
    model = Source(Tiny()).load().model
    matrices = [model.get_submodule(path).weight for path in all_linear(model)]
    numbers = sum(W.numel() for W in matrices)
    assert memory["formats"] == {"nf4": {"numbers": numbers, "bits": numbers * 9 // 2}}
    assert memory["stored_bits"] == 4.5
    assert memory["decoded_bytes"] == 4 * max(W.numel() for W in matrices)
    others = resident_bytes(model) - 4 * numbers + 4 * result["params"]["trainable"]
    assert memory["resident_bytes"] == numbers * 9 // 16 + others
    # AdamW: two moments in fp32 and a count for each tensor, A and B of each matrix
    trained = result["params"]["trainable"]
    assert memory["optimizer_bytes"] == 8 * trained + 4 * 2 * len(matrices)
    kept = memory["resident_bytes"] + memory["saved_activation_bytes"]
    assert memory["step_peak_bytes"] > kept
    assert memory["peak_of"] == "the process" and memory["peak_bytes"] > memory["step_peak_bytes"]


def test_the_table_says_it(finished: Finished) -> None:
    memory = finished.result["memory"]
    for name, key in {"model and adapter at rest": "resident_bytes",
                      "largest decoded layer": "decoded_bytes",
                      "optimizer's state": "optimizer_bytes",
                      "most at once, one backward": "step_peak_bytes"}.items():  # fmt: skip
        (line,) = (line for line in finished.said.splitlines() if name in line)
        assert f"{memory[key] / 2**20:.2f} MiB" in line
    assert "peak memory of the process" in finished.said


def test_export_in_codes_again_prints_what_it_costs(finished: Finished, tmp_path: Path) -> None:
    """The folder holds numbers that the base's codes stand for: stored once more, the same."""
    from safetensors.torch import load_file

    run, nf4 = str(finished.path), variants.choose("qlora", base="nf4").base
    words = ["--to", "merged", "--out"]
    plain = module("experiments.export", run, *words, str(tmp_path / "plain")).stdout
    assert "merge error 0.00e+00" in plain and "as base nf4 stores them, dequantized" in plain
    said = module("experiments.export", run, *words, str(tmp_path / "codes"), "--requantize").stdout
    error = float(re.findall(r"merge error (\S+) \(.*codes of base nf4 again", said)[0])
    sums, codes = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "codes"))
    worst = 0.0
    for name in (k for k in codes if k.endswith("proj.weight")):
        again = nf4.store(sums[name]).dense()
        torch.testing.assert_close(codes[name], again)
        torch.testing.assert_close(nf4.store(codes[name]).dense(), codes[name])
        worst = max(worst, ((again - sums[name]).norm() / sums[name].norm()).item())
    assert error == pytest.approx(worst, rel=1e-2) and worst > 0.01
    failed = module("experiments.export", run, "--to", "peft", "--out", str(tmp_path / "x"),
                    "--requantize", code=1)  # fmt: skip
    assert failed.stderr == (
        "error: --requantize: means nothing with --to peft, only with --to merged\n"
    )


def test_a_step_holds_one_decoded_layer_at_a_time() -> None:
    """Eight layers of 4 bits or two: beyond what lies there, equally much."""

    def beyond(count: int) -> int:
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(count)))
        targets = [str(i) for i in range(count)]
        variants.attach(model, "qlora", rank=1, targets=targets)
        x = torch.ones(1, 256)
        kept = count * (x.nbytes + 2 * 256 * 4)  # each layer's input, and the gradients of A and B
        most = most_bytes(lambda: model(x).sum().backward(), model)
        return most - resident_bytes(model) - kept

    decoded = 4 * 256 * 256
    assert abs(beyond(8) - beyond(2)) < decoded // 8
    assert decoded < beyond(2)


@pytest.mark.parametrize("base", ["nf4_dq", "int8", "icq"])
def test_a_code_keeps_no_memory_but_its_own(base: str) -> None:
    """Scales come in blocks of 256 and codes in groups, filled up; what is kept is not."""
    model = nn.Sequential(nn.Linear(172, 64, bias=False))
    settings = {"group": 48} if base == "int8" else {}
    adapter = variants.attach(model, "lora", rank=1, targets="0", base={"name": base, **settings})
    stored = adapter.layers["0"].frozen.stored
    assert resident_bytes(stored) == sum(t.nbytes for t in stored.buffers())
    extra = 0 if base == "int8" else 4  # of one mean of the scales, which `bits` leaves out
    assert 8 * (resident_bytes(stored) - extra) == stored.bits


def _job(folder: Path, name: str, base: dict[str, Any], **memory: Any) -> Job:
    """A finished run of a sweep."""
    axes = variants.choose("qlora").axes() | {"base": base}
    result = {
        "schema": record.SCHEMA, "status": "done", "memory": {"stored_bits": 4.5} | memory,
        "config": {"variant": "qlora", "axes": axes, "rank": 4, "seed": 0, "lr": 1e-3},
        "metrics": {"primary": "loss", "base": {"loss": 2.0}, "tuned": {"loss": 1.0}},
        "params": {"trainable": 10}, "time": {"train_s": 1.0},
    }  # fmt: skip
    (folder / name).mkdir()
    record.write_json(folder / name / "result.json", result)
    return Job([], {}, str(folder / name))


def test_a_sweep_shows_what_varies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nf4 = {"name": "nf4", "block": 64}
    one = _job(tmp_path, "a", nf4, step_peak_bytes=2**20)
    same = _job(tmp_path, "b", nf4, step_peak_bytes=2**20)
    table([one, same], ["done"] * 2)
    alone = capsys.readouterr().out
    assert "variant/base" not in alone and "bits" not in alone and "peak MiB" not in alone
    block = _job(tmp_path, "c", nf4 | {"block": 128}, stored_bits=4.25, step_peak_bytes=3 * 2**19)
    config = {"variant": {"name": "lora"}, "rank": 3, "optim": {"lr": None}, "seed": 0}
    refused = Job(["x=1"], config, None, error="no", name="x=1")
    table([one, block, refused], ["done", "done", "refused"])
    several = capsys.readouterr().out
    for word in (
        "variant/base",
        "nf4 block=64",
        "nf4 block=128",
        "bits",
        "4.25",
        "1.50",
        "x=1: no",
    ):
        assert word in several
    dense = _job(tmp_path, "d", {"name": "dense"}, stored_bits=32)  # a run of older code
    table([one, dense], ["done"] * 2)
    assert "nf4 block" not in (two := capsys.readouterr().out) and "dense" in two and "32" in two
    gpu = _job(tmp_path, "e", nf4, peak_of="tensors on the GPU", peak_bytes=5 * 2**20)
    table([one, gpu], ["done"] * 2)
    assert "5.00" in capsys.readouterr().out
