"""analysis.quantization: its numbers against others', its memory, its files, its errors."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
import transformers
from models import GROUPED, MIXTURE, causal, gpt2, made, seeded
from test_run import module
from torch import Tensor

import variants
from analysis import figures
from analysis.activations import Activations
from analysis.errors import Plan, measured, planned, worst_groups
from analysis.quantization import analysed, drawn, tables
from analysis.weights import Place, Weights
from experiments.measure import Live
from variants._kinds import matrix_of
from variants._targets import Site, all_layers

transformers.utils.logging.disable_progress_bar()


def saved(model: Any, folder: Path, shard: str = "20KB") -> Path:
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


@pytest.mark.parametrize(
    "name", ["llama", "gpt2", "phi3", "bert", "t5", "mixtral", "qwen3_moe", "vit"]
)
def test_every_matrix_of_a_folder_is_the_model_s(name: str, tmp_path: Path) -> None:
    """From several shards, transposed or fused, experts apart in the files or in a stack."""
    model, _ = made(name)
    weights = Weights(saved(model, tmp_path))
    assert len(set(weights.files.values())) > 1
    layers = all_layers(model)
    read = {place.name: W for place, W, _ in weights}
    assert set(read) == set(variants._targets.all_linear(model))
    for path, W in read.items():
        assert torch.equal(W, matrix_of(layers[path]))


def test_names_of_another_head_and_slices_of_fused_layers(tmp_path: Path) -> None:
    """GPT-2's own files lack the prefix of the model that has a head."""
    model = seeded(gpt2)
    weights = Weights(saved(model.transformer, tmp_path / "body"), "q,v")
    config = tmp_path / "body" / "config.json"
    config.write_text(config.read_text().replace("GPT2Model", "GPT2LMHeadModel"))
    weights = Weights(tmp_path / "body", "q,v")
    layer = model.transformer.h[1].attn.c_attn
    found = {place.name: W for place, W, _ in weights}
    assert torch.equal(found["transformer.h.1.attn.c_attn.v"], layer.weight.T[64:])
    assert {(p.role, p.stack, p.layer) for p in weights.places} == {
        (role, "transformer.h", layer) for role in "qv" for layer in (0, 1)
    }


FORMATS = ("nf4", "int8")


def _peak(folder: Path, plan: Plan) -> tuple[int, int]:
    """(the most bytes of live tensors, those of the largest matrix in fp32) of an analysis."""
    weights = Weights(folder)
    largest = 4 * max(place.shape[0] * place.shape[1] for place in weights.places)
    with Live() as live:
        analysed(weights, plan, torch.float32, "cpu")
    return live.peak, largest


def test_its_memory_is_that_of_one_matrix(tmp_path: Path) -> None:
    """Six layers take what two take, and eight experts what four take, to the byte."""
    wide = GROUPED | {"hidden_size": 64, "intermediate_size": 160}
    plan = planned(FORMATS, ["pissa"], variant="lora", rank=2)
    peaks = {}
    for layers in (1, 2, 6):  # the first fills tables that are kept
        model = seeded(causal, kind="llama", **wide | {"num_hidden_layers": layers})
        peaks[layers] = _peak(saved(model, tmp_path / f"{layers}", "1MB"), plan)
    assert peaks[2] == peaks[6]
    assert peaks[2][0] < 7 * peaks[2][1]  # W, E, and what the worst groups take
    for experts in (4, 8):
        more = {"num_local_experts": experts, "num_experts": experts}
        model = seeded(causal, kind="mixtral", **GROUPED | MIXTURE | more)
        peaks[experts] = _peak(saved(model, tmp_path / f"e{experts}", "1MB"), plan)
    assert peaks[4] == peaks[8]


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model's folder, and a text of its language beside it."""
    from experiments.model import TINY

    folder = tmp_path_factory.mktemp("story")
    shutil.copytree(TINY, folder / "model")
    words = "reverse the word abcd and copy it twice. " * 40
    (folder / "text.txt").write_text(words)
    return folder


def test_errors_are_those_of_their_definitions(story: Path) -> None:
    """Norms by singular values in fp64; the activation error from the inputs themselves."""
    plan = planned(FORMATS, variant="lora")
    source = Activations(story / "model", story / "text.txt", batches=2, length=32)
    inputs: dict[str, list[Tensor]] = {}
    for path, layer in source.layers.items():
        layer.register_forward_pre_hook(
            lambda _, args, path=path: inputs.setdefault(path, []).append(args[0].flatten(0, -2))
        )
    assert source.tokens == 64
    for place, W, found in source:
        row = measured(place, W, plan, found)
        x = torch.cat(inputs[place.name]).double()
        assert len(x) == 64
        for text, base in plan.formats.items():
            E = (W - base.store(W).dense()).double()
            for key, error in {"frobenius": E.norm(), "nuclear": torch.linalg.svdvals(E).sum(),
                               "activation": (x @ E.T).norm() / 8}.items():  # fmt: skip
                assert row["formats"][text][key] == pytest.approx(error.item(), rel=1e-5)
        own = {"frobenius": W.double().norm(), "nuclear": torch.linalg.svdvals(W.double()).sum(),
               "activation": (x @ W.double().T).norm() / 8}  # fmt: skip
        for key, norm in own.items():
            assert row["norms"][key] == pytest.approx(norm.item(), rel=1e-5)
            f = row["formats"]["nf4"]
            assert f[f"{key}_relative"] == pytest.approx(f[key] / norm.item(), rel=1e-5)


def test_inits_start_as_attach_starts_them(story: Path) -> None:
    """The error after an init is that of the attached model's weights, calibration included."""
    inits = ["pissa", "loftq", "qera"]
    plan = planned(["nf4"], inits, variant="lora", rank=4)
    source = Activations(story / "model", story / "text.txt", batches=2, length=32,
                         wanted=("covariance", *plan.needs), targets="q,down")  # fmt: skip
    rows = {place.name: measured(place, W, plan, found) for place, W, found in source}
    before = {place.name: W.clone() for place, W, _ in source}
    calls = [{"input_ids": torch.tensor([w]), "labels": torch.tensor([w])} for w in source.windows]
    for init in inits:
        adapter = variants.attach(
            source.model, "lora", rank=4, init=init, base="nf4", targets="q,down",
            calibration=calls if init == "qera" else None,
        )  # fmt: skip
        for name, layer in adapter.layers.items():
            error = (before[name] - layer.weight.detach()).norm().item()
            f = rows[name]["inits"][init]["nf4"]
            assert f["frobenius"] == pytest.approx(error, rel=1e-5)
            plain = rows[name]["formats"]["nf4"]["frobenius"]
            assert f["frobenius_reduction"] == pytest.approx(100 * (1 - error / plain), rel=1e-4)
            assert f["rank"] == 4
        source.model = Activations(story / "model", story / "text.txt").model


def test_bits_to_the_last_digit_and_worst_groups_where_they_are() -> None:
    generator = torch.Generator().manual_seed(0)
    W = 0.02 * torch.randn(1024, 2048, generator=generator)
    W[1000, 64:128] *= 50
    plan = planned(["nf4_dq", "nf4.block=128"], variant="lora", nuclear=False)
    row = measured(Place(Site("w"), (1024, 2048), "w", "", None), W, plan, {})
    first, second = row["formats"].values()
    assert (first["bits"], first["bits_per_number"]) == (8654848, 4.126953125)
    assert second["bits_per_number"] == 4.25
    assert [(f["worst"][0]["row"], f["worst"][0]["column"], f["worst"][0]["numbers"])
            for f in (first, second)] == [(1000, 64, 64), (1000, 0, 128)]  # fmt: skip
    assert first["worst"][0]["largest"] == pytest.approx(W[1000].abs().max().item())
    codes = first["codes"]
    assert sum(codes["counts"]) == W.numel() and codes["used"] == codes["possible"] == 16
    assert 3.5 < codes["entropy"] < 4


def test_a_group_at_the_end_is_short_and_one_scale_for_all_goes_by_rows() -> None:
    W = torch.arange(30.0).view(3, 10) / 100
    E = torch.zeros(3, 10)
    E[2, 8:] = torch.tensor([3.0, 4.0])  # the last 2 of groups of 7
    part = variants.choose("lora", 1, base={"name": "nf4", "block": 7}).base
    (worst, second) = worst_groups(E, W, part.store(W), 2)
    assert worst == {"row": 2, "column": 8, "numbers": 2, "rms": pytest.approx((25 / 2) ** 0.5),
                     "largest": pytest.approx(0.29)}  # fmt: skip
    assert second["rms"] == 0
    whole = variants.choose("lora", 1, base={"name": "nf4", "block": 30}).base
    assert worst_groups(E, W, whole.store(W), 1)[0]["numbers"] == 10


@pytest.fixture(scope="module")
def analysis(story: Path) -> tuple[Path, str]:
    """What the command wrote and printed."""
    out = story / "out"
    words = ["--formats", "nf4,nf4_dq.block=128", "--init", "pissa", "--rank", "4"]
    said = module("analysis.quantization", "--model", str(story / "model"), *words, "--out",
                  str(out))  # fmt: skip
    return out, said.stdout


def test_the_command_writes_what_it_says(analysis: tuple[Path, str], tmp_path: Path) -> None:
    out, said = analysis
    found = json.loads((out / "quantization.json").read_text())
    assert set(found) == {"schema", "model", "targets", "dtype", "text", "parts", "formats",
                          "inits", "matrices"}  # fmt: skip
    assert found["schema"] == 1 and found["text"] is None and found["model"] == "model"
    nf4, double = found["formats"].values()
    assert nf4["bits_per_number"] == 4.5 and 4 < double["bits_per_number"] < 4.25
    assert nf4["numbers"] == sum(row["rows"] * row["columns"] for row in found["matrices"])
    assert nf4["codes"]["possible"] == 16
    assert found["parts"]["formats"]["nf4_dq.block=128"]["block"] == 128
    squares = sum(row["formats"]["nf4"]["frobenius"] ** 2 for row in found["matrices"])
    assert nf4["frobenius"] == pytest.approx(squares**0.5)
    total = sum(row["formats"]["nf4"]["nuclear"] for row in found["matrices"])
    assert nf4["nuclear"] == pytest.approx(total)
    q = [row for row in found["matrices"] if row["role"] == "q"]
    joint = sum(row["inits"]["pissa"]["nf4"]["nuclear"] for row in q)
    plain = sum(row["formats"]["nf4"]["nuclear"] for row in q)
    reduction = found["inits"]["pissa"]["nf4"]["roles"]["q"]["nuclear_reduction"]
    assert reduction == pytest.approx(100 * (1 - joint / plain)) and reduction > 0
    for text in ("nf4_dq.block=128", "worst groups", "percent less", "16 of 16",
                 f"{double['bits_per_number']:.12g}"):  # fmt: skip
        assert text in said
    assert (out / "quantization.csv").read_text().count("\n") == 1 + 4 * len(found["matrices"])
    markdown, tex = ((out / f"quantization.{k}").read_text() for k in ("md", "tex"))
    assert "| nf4 | 4.5 |" in markdown and r"nf4\_dq.block=128 &" in tex


def test_figures_are_drawn_and_repeat_to_the_byte(
    analysis: tuple[Path, str], tmp_path: Path
) -> None:
    found = json.loads((analysis[0] / "quantization.json").read_text())
    made = drawn(found)
    assert set(made) == {"errors", "codes", "inits"}
    panels = [axis.get_title() for axis in made["errors"].axes]
    assert panels == list(dict.fromkeys(row["role"] for row in found["matrices"]))
    row = next(row for row in found["matrices"] if row["role"] == panels[0])
    line = made["errors"].axes[0].lines[0]
    assert line.get_label() == "nf4"
    assert line.get_ydata()[0] == pytest.approx(row["formats"]["nf4"]["frobenius_relative"])
    for path in figures.save(made["errors"], tmp_path / "errors"):
        assert path.read_bytes() == (analysis[0] / path.name).read_bytes()
    for name in made:
        assert ElementTree.parse(analysis[0] / f"{name}.svg").getroot().tag.endswith("svg")
        assert (analysis[0] / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def _broken(folder: Path, how: str) -> None:
    if how == "truncated":
        file = next(folder.glob("*.safetensors"))
        file.write_bytes(file.read_bytes()[:-1000])
    elif how == "no weights":
        next(folder.glob("*.safetensors")).unlink()
    elif how == "no config":
        (folder / "config.json").unlink()
    elif how == "lost shard":
        index = {"weight_map": {"model.embed_tokens.weight": "gone.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    elif how == "another":
        text = (folder / "config.json").read_text()
        config = json.loads(text) | {"num_hidden_layers": 99}
        (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(("how", "words", "message"), [
    ("gone", [], "no such folder"),
    ("truncated", [], "model.safetensors: truncated, or no safetensors file"),
    ("no weights", [], "no safetensors file there"),
    ("no config", [], "no config.json there"),
    ("lost shard", [], "gone.safetensors: no such file, which model.safetensors.index.json names"),
    ("another", [], "the files lack"),
    ("", ["--formats", "nf5"], "base=nf5: no such base (did you mean 'nf'?)"),
    ("", ["--formats", "nf4.blocks=3"], "base nf4 has no setting 'blocks'; its settings: block"),
    ("", ["--formats", "nf4.block=many"], "base.block=many: this setting is of type int"),
    ("", ["--targets", "qq"], "targets=qq: matches no layer"),
    ("", ["--init", "qera"], "--init qera: needs the covariance of each layer: give --text FILE"),
    ("", ["--init", "loft"], "init=loft: no such init (did you mean 'loftq'?)"),
    ("", ["--init", "pissa", "--rank", "4000"], "rank=4000"),
    ("", ["--text", "nowhere.txt"], "--text nowhere.txt: no such file"),
    ("", ["--device", "tpu"], "--device tpu: no such device here"),
])  # fmt: skip
def test_what_cannot_be_is_one_line(
    how: str, words: list[str], message: str, story: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    if how != "gone":
        shutil.copytree(story / "model", folder)
    _broken(folder, how)
    given = ["--model", str(folder), "--out", str(tmp_path / "out")]
    given += [] if "--formats" in words else ["--formats", "nf4"]
    said = module("analysis.quantization", *given, *words, code=1)
    assert said.stderr.startswith("error: ") and said.stderr.count("\n") == 1
    assert message in said.stderr and not (tmp_path / "out").exists()


def test_codes_are_not_quantized_again(tmp_path: Path) -> None:
    """Files whose weights are codes already have other shapes than the model."""
    from safetensors.torch import load_file, save_file

    saved(seeded(causal, kind="llama", **GROUPED), tmp_path, "1GB")
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = torch.zeros(512, 1, dtype=torch.uint8)
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(variants.Incompatible, match=r"q_proj is torch\.uint8 .* quantized already"):
        list(Weights(tmp_path))


def test_figures_without_matplotlib_are_refused_before_the_work(
    story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    given = ["--model", str(story / "model"), "--formats", "bf16", "--out", str(tmp_path / "out")]
    said = module("analysis.quantization", *given, code=1)
    assert "figures need matplotlib" in said.stderr and "--no-figures" in said.stderr
    module("analysis.quantization", *given, "--no-figures", "--no-nuclear")
    assert {p.suffix for p in (tmp_path / "out").iterdir()} == {".json", ".csv", ".md", ".tex"}
    (found,) = json.loads((tmp_path / "out/quantization.json").read_text())["formats"].values()
    assert found["bits_per_number"] == 16 and found["codes"] is found["nuclear"] is None


def test_inputs_of_experts_are_left_open(story: Path, tmp_path: Path) -> None:
    """The model multiplies by them in a way of its own: no activation error, all the rest."""
    vocabulary = json.loads((story / "model" / "config.json").read_text())["vocab_size"]
    model = seeded(causal, kind="mixtral", **GROUPED | MIXTURE | {"vocab_size": vocabulary})
    saved(model, tmp_path)
    for file in (story / "model").glob("token*"):
        shutil.copy(file, tmp_path)
    source = Activations(tmp_path, story / "text.txt", batches=1, length=32)
    found = analysed(source, planned(["nf4"], variant="lora", nuclear=False), torch.float32, "cpu")
    for row in found["matrices"]:
        error = row["formats"]["nf4"]["activation"]
        assert (error is None) == ("experts" in row["name"]) and row["norms"]["frobenius"] > 0
    roles = found["formats"]["nf4"]["roles"]
    assert roles["down"]["activation"] is None and roles["q"]["activation"] > 0
    (table, by_role, *_) = tables(found | {"model": "mixtral"})
    assert table.rows[0][0] == "nf4" and by_role.rows[0][-2:] != ("-", "-")
    errors = drawn(found | {"text": {}})["errors"]
    assert {axis.get_title() for axis in errors.axes} == {"q", "k", "v", "o"}


def test_a_real_model(stories: Path, data: Path, tmp_path: Path) -> None:
    """The issue's own command; the order of the formats on weights that were trained."""
    text = data / "tinyshakespeare" / "input.txt"
    module("analysis.quantization", "--model", str(stories), "--formats", "nf4,fp4,int4,int8",
           "--text", str(text), "--batches", "1", "--seq-len", "64", "--no-figures",
           "--out", str(tmp_path))  # fmt: skip
    found = json.loads((tmp_path / "quantization.json").read_text())["formats"]
    for key in ("frobenius", "nuclear"):
        nf4, fp4, int4, int8 = (found[f][key] for f in ("nf4", "fp4", "int4", "int8"))
        assert int8 < nf4 < int4 < fp4
    assert len(json.loads((tmp_path / "quantization.json").read_text())["matrices"]) == 35
