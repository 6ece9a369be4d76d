"""analysis.inspect on a run of DoRA, one of AdaLoRA, and a PEFT adapter; its files, its errors."""

import csv
import io
import json
import math
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from models import logits, made
from safetensors.torch import load_file, save_file
from test_run import QUICK, lab, module, only

import variants
from analysis import drawings, views
from analysis.by_model import DATA, merged
from analysis.inspect import inspected
from analysis.measures import DEFAULT, NAMES
from analysis.opened import Opened, opened
from analysis.ranks import trajectory
from analysis.weights import place_of
from experiments.config import HF
from experiments.model import TINY, Loaded, Source
from variants import Incompatible
from variants._targets import all_layers

Q = "model.layers.{}.self_attn.q_proj"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """DoRA that starts as PiSSA on codes, and AdaLoRA whose budget falls to a third."""
    out, found = tmp_path_factory.mktemp("runs"), {}
    words = [w for w in QUICK if not w.startswith("train.steps")]
    for name, more in {
        "dora": [
            "rank=4",
            "train.steps=3",
            "variant/init=pissa",
            "variant/base=nf4",
            "targets=[q,v]",
            "eval.limit=400",  # all old items, as the analysis
        ],
        "adalora": ["rank=3", "train.steps=10", "variant.allocation.target_rank=1"],
    }.items():
        lab(f"variant={name}", *words, *more, out=out / name)
        found[name] = only(out / name)
    return found


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LoRA on the q of every layer as PEFT writes it, with factors of known singular values."""
    folder = tmp_path_factory.mktemp("imported") / "adapter"
    folder.mkdir()
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(TINY),
              "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "bias": "none"}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    layers = Source(HF(path=str(TINY))).meta().config.num_hidden_layers
    tensors = {}
    for i in range(layers):
        key = f"base_model.model.{Q.format(i)}"
        tensors[f"{key}.lora_A.weight"] = torch.eye(96)[:2].contiguous()
        tensors[f"{key}.lora_B.weight"] = torch.eye(96)[:, 2:4] * torch.tensor([4.0, 3.0])
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize("name", ["dora", "adalora"])
def test_a_run_is_inspected(name: str, runs: dict[str, Path], tmp_path: Path) -> None:
    """Every default analysis of every matrix, in json, csv and tables; norms of dW by layers."""
    said = module("analysis.inspect", str(runs[name]), "--out", str(tmp_path), "--no-figures")
    found = json.loads((tmp_path / "inspect.json").read_text())
    missing = {} if name == "dora" else {
        "quantization": "base dense stores every number as it is"}  # fmt: skip
    assert list(found["analyses"]) == [k for k in DEFAULT if k not in missing]
    assert found["missing"] == missing and not list(tmp_path.glob("*.png"))
    assert all(f"{k}: {why}" in said.stdout for k, why in missing.items())
    names = [row["name"] for row in found["matrices"]]
    o = opened(runs[name])
    assert names == list(o.places) and len(names) == (6 if name == "dora" else 21)
    for key in ("spectrum", "amplification", "similarity", "alignment", "intruders"):
        assert list(found["analyses"][key]) == list(o.adapter.layers)
    for layer, row in found["analyses"]["spectrum"].items():
        own = o.adapter.layers[layer]
        size = torch.linalg.matrix_norm(own.weight - own.original).item()
        assert math.isclose(row["frobenius"], size, rel_tol=1e-4, abs_tol=1e-6)
    rows = list(csv.DictReader(io.StringIO((tmp_path / "inspect.csv").read_text())))
    assert [row["name"] for row in rows] == names
    for word in ("spectrum", "intruder", "dM", "ranks", "q", "v"):
        assert word in said.stdout and word in (tmp_path / "inspect.md").read_text()


def test_figures_are_drawn_and_not_empty(runs: dict[str, Path], tmp_path: Path) -> None:
    """Each as svg and png, with lines, points or cells of all seven roles."""
    words = ["--what", "spectrum,magnitude,intruders,ranks", "--out", str(tmp_path)]
    module("analysis.inspect", str(runs["adalora"]), *words)
    drawn = sorted(p.stem for p in tmp_path.glob("*.png"))
    assert drawn == ["intruders_eps", "magnitude_direction", "ranks_budget", "ranks_heatmap",
                     "spectrum_ranks", "spectrum_values"]  # fmt: skip
    for stem in drawn:
        tree = ElementTree.parse(tmp_path / f"{stem}.svg")
        marks = [e for e in tree.iter() if e.tag.endswith(("use", "image"))]
        assert len(marks) > 15, stem


def test_the_budget_s_way_is_in_the_run(runs: dict[str, Path]) -> None:
    """It falls from 3 a matrix to 1, the ranks with it; the end is what the adapter has."""
    found = trajectory(runs["adalora"])
    assert found is not None and trajectory(runs["dora"]) is None  # uniform
    assert found.steps[-1] == 10 and found.budget[0] == 63 and found.budget[-1] == 21
    assert list(found.budget) == sorted(found.budget, reverse=True)
    assert all(sum(ranks) == b for ranks, b in zip(found.ranks, found.budget, strict=True))
    assert found.final == opened(runs["adalora"]).adapter.ranks()
    shown = inspected(runs["adalora"], ["ranks"])["analyses"]["ranks"]
    assert shown["final"] == found.final
    row = dict(zip(shown["roles"], shown["heatmap"], strict=True))["q"]
    assert row == [found.final[Q.format(i)] for i in shown["layers"]]
    with pytest.raises(Incompatible, match="not finished"):
        trajectory(runs["adalora"] / "adapter")


def test_an_imported_adapter_is_inspected(imported: Path, tmp_path: Path) -> None:
    """s = 2 and known factors: its singular values are 8 and 6; what PEFT cannot say is said."""
    text = tmp_path / "text.txt"
    text.write_text("reverse the word and copy it twice. " * 60)
    words = ["--what", "spectrum,magnitude,ranks,init,forgetting,hessian", "--text", str(text)]
    found = json.loads(module("analysis.inspect", str(imported), *words, "--json").stdout)
    for row in found["analyses"]["spectrum"].values():
        assert [round(v, 4) for v in row["values"]] == [8, 6] and row["rank_90"] == 2
    assert set(found["analyses"]["ranks"]["final"].values()) == {2}
    assert found["missing"] == {"init": "an adapter's files do not say how it started"}
    assert found["analyses"]["forgetting"]["kl"] > 0
    assert found["analyses"]["hessian"]["trained"]["value"] > 0
    torn = tmp_path / "torn"
    shutil.copytree(imported, torn)
    config = json.loads((torn / "adapter_config.json").read_text())
    (torn / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": "nobody/nothing"})
    )
    said = module("analysis.inspect", str(torn), "--what", "spectrum", code=1)
    assert said.stderr.startswith("error: ") and "give --model DIR" in said.stderr
    module("analysis.inspect", str(torn), "--what", "spectrum", "--model", str(TINY))


def test_with_the_model_and_its_data(runs: dict[str, Path]) -> None:
    """PiSSA starts at its base, with gradients in A, steeper than the default variant; forgetting
    is what the run reports; intruders scaled by one leave the model; the base's errors."""
    found = inspected(runs["dora"], [*DATA, "quantization"])
    own, result = found["analyses"], json.loads((runs["dora"] / "result.json").read_text())
    assert not found["missing"]
    init = own["init"]
    assert math.isclose(init["loss"], init["base"], rel_tol=1e-4)
    for row in init["layers"].values():
        assert row["norms"]["A"] > 0 < row["norms"]["B"] and 0 < row["gradient"] <= 1
    tuned = result["forgetting"]["tuned"]["loss"]  # the run's base is the untouched model, dense
    assert math.isclose(own["forgetting"]["tuned"], tuned, rel_tol=1e-3)
    rows = own["causal"]["rows"]
    assert [row["factor"] for row in rows] == [0, 0.25, 0.5, 0.75, 1]
    assert math.isclose(rows[-1]["held out"], tuned, rel_tol=1e-2)  # merged onto decoded codes
    ratio = own["hessian"]["reference"]["value"] / own["hessian"]["start"]["value"]
    assert own["hessian"]["learning_rate_ratio"] == ratio and ratio < 1
    o = opened(runs["dora"])
    for name, row in own["quantization"].items():
        W, layer = o.file_matrix(name), o.adapter.layers[name]
        E = W - layer.frozen.base.store(W).dense()
        assert math.isclose(row["frobenius"], torch.linalg.matrix_norm(E).item(), rel_tol=1e-5)
        left = torch.linalg.matrix_norm(W - layer.original).item()
        assert math.isclose(row["frobenius_start"], left, rel_tol=1e-5) and left < row["frobenius"]
    assert len(views.tables(found)) == 5
    assert set(drawings.drawn(found)) == {"causal_loss", "init_cosine", "quantization_reduction"}


def test_a_change_of_zero_has_no_share(imported: Path, tmp_path: Path) -> None:
    """Nor a part in means and curves, which end at one; roles stand in the model's order, not the
    file's."""
    folder = tmp_path / "zero"
    shutil.copytree(imported, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    names = [key.format(i) for key in (Q.replace("q_proj", "v_proj"), Q) for i in range(3)]
    (folder / "adapter_config.json").write_text(json.dumps(config | {"target_modules": names}))
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors |= {k.replace("q_proj", "v_proj"): t.clone() for k, t in tensors.items()}
    tensors[f"base_model.model.{Q.format(0)}.lora_B.weight"] *= 0
    save_file(tensors, folder / "adapter_model.safetensors")
    found = inspected(folder, ["alignment", "magnitude"])
    assert list(views.roles_of(found)) == ["q", "v"]
    assert [row["name"] for row in found["matrices"]] == list(opened(folder).adapter.layers)
    zero, *others = (found["analyses"]["alignment"][Q.format(i)] for i in range(3))
    assert zero["left_top"] is None and zero["cumulative"] == []
    mean = sum(row["left_top"] for row in others) / 2
    assert views.tables(found)[0].rows[0][2] == f"{mean:.4g}"
    lines = drawings.drawn(found)["alignment_energy"].axes[0].lines
    assert [line.get_label() for line in lines] == ["q", "v", "chance"]
    assert all(math.isclose(line.get_ydata()[-1], 1, rel_tol=1e-5) for line in lines)


def test_one_adapter_against_another(runs: dict[str, Path], imported: Path) -> None:
    """Against itself phi(k, k) is 1; a matrix that the other lacks is named."""
    same = inspected(imported, ["similarity"], against=imported)["analyses"]["similarity"]
    assert all(math.isclose(row["all"], 1, rel_tol=1e-6) for row in same.values())
    with pytest.raises(Incompatible, match=r"--against: no layer .*k_proj there"):
        inspected(runs["adalora"], ["similarity"], against=imported)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--what", "spectra"], f"choices: {', '.join(NAMES)}"),
        (["--what", "quantization"], "quantization: base dense stores every number as it is"),
        (["--what", ","], "--what: no name in it"),
        (["--eps", "0"], "--eps 0.0: a cosine, above 0 and at most 1"),
        (["--device", "tpu"], "--device tpu: no such device here"),
        (["--what", "forgetting", "--text", "nowhere.txt"], "--text nowhere.txt: no such file"),
        (["--against", "nowhere"], "nowhere: no folder of a run"),
    ],
)
def test_bad_input_is_named(words: list[str], message: str, runs: dict[str, Path]) -> None:
    said = module("analysis.inspect", str(runs["adalora"]), *words, code=1)
    assert said.stderr.startswith("error: ") and message in said.stderr
    assert len(said.stderr.splitlines()) == 1


def test_folders_that_are_none(runs: dict[str, Path], imported: Path, tmp_path: Path) -> None:
    said = module("analysis.inspect", str(tmp_path), code=1)
    assert "no folder of a run (config.yaml) nor of an adapter" in said.stderr
    said = module("analysis.inspect", str(runs["dora"] / "adapter"), code=1)
    assert "an adapter does not name its base: give --model DIR" in said.stderr
    words = ["--model", str(TINY), "--what", "ranks"]
    module("analysis.inspect", str(runs["dora"] / "adapter"), *words)
    shutil.copytree(imported, tmp_path / "diverged")
    tensors = load_file(imported / "adapter_model.safetensors")
    save_file({k: t * math.nan for k, t in tensors.items()},
              tmp_path / "diverged" / "adapter_model.safetensors")  # fmt: skip
    said = module("analysis.inspect", str(tmp_path / "diverged"), code=1)
    assert "numbers that are not finite: the run diverged" in said.stderr


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "picture"])
def test_matrices_of_every_kind_are_written_to(name: str) -> None:
    """After the merge for the causal test: slices of a transposed fused layer, experts of a stack,
    convolutions. Each is the adapted matrix, and the model computes with what is written."""
    model, inputs = made(name)
    modules = dict(all_layers(model))
    targets = {"gpt2": "q,v", "mixtral": "mlp", "picture": "convolutions"}[name]
    adapter = variants.attach(model, "lora", rank=2, targets=targets)
    for i, t in enumerate(adapter.parameters()):
        t.data += 0.1 * torch.randn(t.shape, generator=torch.Generator().manual_seed(i))
    places = {k: place_of(modules, site) for k, site in adapter.sites.items()}
    o = Opened(Path("nowhere"), None, Loaded(model, None, False), adapter, places, modules)
    before = {k: layer.weight.detach().clone() for k, layer in adapter.layers.items()}
    as_tuned = logits(model, inputs).detach()
    matrices = merged(o)
    for k, W in matrices.items():
        torch.testing.assert_close(W, before[k], rtol=0, atol=1e-6)
    torch.testing.assert_close(logits(model, inputs), as_tuned, rtol=0, atol=1e-5)
    for W in matrices.values():
        W.mul_(0.5)
    assert (logits(model, inputs) - as_tuned).abs().max() > 1e-3
