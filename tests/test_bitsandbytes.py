"""bitsandbytes: its numbers to the bit, its files, its functions behind the same parts."""

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import GROUPED, causal, seeded
from safetensors.torch import load_file, save_file
from test_run import QUICK, lab, only
from torch import Tensor, nn

import variants
from experiments.config import HF
from experiments.model import TINY, Source
from experiments.tasks import BadInput
from variants._bitsandbytes import BLOCKS, Kernels
from variants._contract import CLAUSES, Case
from variants._layer import Frozen
from variants._quantize import Blocks, decode, dynamic_map, encode_scales, rounded
from variants._registry import find_part

PARTS = (("nf4", {}), ("nf4_dq", {}), ("fp4", {}), ("fp4", {"double": True}))
WIDE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}


@pytest.fixture
def functional() -> Iterator[Any]:
    """bitsandbytes.functional; where it has no kernel it would compile, for seconds a shape."""
    found = pytest.importorskip("bitsandbytes", reason="extra `dev`").functional
    with torch.compiler.set_stance("force_eager"):
        yield found


def weights(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    W = 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(4))
    W[0, :5] = 0.0
    W[-1] = 0.0
    return W.to(dtype)


def theirs(functional: Any, W: Tensor, name: str, settings: dict[str, Any], block: int) -> Any:
    """(codes, state, decoded) of bitsandbytes.

    Decoded by the code that is its own fallback: its kernel for the CPU (0.50.2) takes each row to
    begin with a block, and gives other numbers where one ends within a row.
    """
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute

    double = name == "nf4_dq" or settings.get("double", False)
    kind = name.removesuffix("_dq")
    codes, state = functional.quantize_4bit(
        W, blocksize=block, compress_statistics=double, quant_type=kind
    )
    if W.shape[1] % block == 0:
        return codes, state, functional.dequantize_4bit(codes, state)
    absmax = state.absmax
    if double:
        absmax = functional.dequantize_blockwise(absmax, state.state2) + state.offset
    dense = _dequantize_4bit_compute(
        codes.view(-1), absmax, state.code, block, tuple(W.shape), W.dtype
    )
    return codes, state, dense


def same(stored: Any, codes: Tensor, state: Any, dense: Tensor) -> None:
    """Codes, scales, scales of scales and weights, to the bit."""
    assert torch.equal(stored.packed, codes.view(-1))
    assert torch.equal(torch.tensor(stored.table), state.code)
    if state.nested:
        assert torch.equal(stored.nested, state.absmax.view(-1))
        assert torch.equal(stored.absmax.view(torch.float32), state.state2.absmax)
        assert torch.equal(stored.offset.view(torch.float32), state.offset)
    else:
        assert torch.equal(stored.scales, state.absmax)
    assert stored.dense().dtype == dense.dtype and torch.equal(stored.dense(), dense)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("part", PARTS, ids=str)
def test_four_bits_are_bitsandbytes_to_the_bit(
    part: tuple[str, dict[str, Any]], dtype: torch.dtype, functional: Any
) -> None:
    name, settings = part
    for shape in ((64, 64), (96, 200), (7, 13), (33, 48), (512, 384)):
        W = weights(*shape, dtype=dtype)
        stored = find_part("base", name).load(**settings).store(W)
        same(stored, *theirs(functional, W, name, settings, 64))


@pytest.mark.parametrize("part", PARTS, ids=str)
def test_blocks_of_every_size_are_bitsandbytes_to_the_bit(
    part: tuple[str, dict[str, Any]], functional: Any
) -> None:
    name, settings = part
    for block in BLOCKS:
        for shape in ((8, 4096), (20, 100)):
            W = weights(*shape, dtype=torch.bfloat16)  # few digits: ties are common
            stored = find_part("base", name).load(block=block, **settings).store(W)
            same(stored, *theirs(functional, W, name, settings, block))


def test_eight_bits_are_bitsandbytes_to_the_bit(functional: Any) -> None:
    """LLM.int8()'s rows, and the dynamic type in blocks."""
    for dtype in (torch.float16, torch.float32):
        W = weights(40, 96, dtype=dtype)
        codes, absmax, _ = functional.int8_vectorwise_quant(W[:-1])
        stored = rounded(W[:-1].float(), 8, 96)
        if dtype == torch.float32:  # in fp16 it rounds the quotients to fp16 first
            assert torch.equal(stored.codes.view(39, 96).int() - 128, codes.int())
        assert torch.equal(stored.scales, absmax / 127)
        dense = functional.int8_vectorwise_dequant(codes, absmax)
        exact = {"rtol": 1e-6, "atol": 0} if dtype == torch.float32 else {"rtol": 0, "atol": 3e-4}
        torch.testing.assert_close(stored.dense(), dense, **exact)
    x = weights(3, 1000).view(-1)
    codes, state = functional.quantize_blockwise(x, blocksize=256)
    found, absmax = encode_scales(x)
    assert torch.equal(found, codes) and torch.equal(absmax, state.absmax)
    dense = functional.dequantize_blockwise(codes, state)
    assert torch.equal(decode(found, absmax, dynamic_map(), 256), dense)


@pytest.mark.parametrize("part", PARTS, ids=str)
def test_the_serialised_form_is_theirs_and_theirs_is_read(
    part: tuple[str, dict[str, Any]], functional: Any, tmp_path: Path
) -> None:
    name, settings = part
    W = weights(96, 128, dtype=torch.bfloat16)
    codes, state, dense = theirs(functional, W, name, settings, 64)
    own = find_part("base", name).load(**settings).store(W).to_bitsandbytes()
    written = {"weight": codes} | {f"weight.{k}": t for k, t in state.as_dict(packed=True).items()}
    assert own.keys() == written.keys()
    assert all(torch.equal(own[k], written[k]) and own[k].dtype == written[k].dtype for k in own)
    save_file(own, tmp_path / "w.safetensors")
    own = load_file(tmp_path / "w.safetensors")
    state_keys = {k.removeprefix("weight."): t for k, t in own.items() if k != "weight"}
    read = functional.QuantState.from_dict(state_keys, device=torch.device("cpu"))
    assert torch.equal(functional.dequantize_4bit(own["weight"], read), dense)
    same(Blocks.from_bitsandbytes(written), codes, state, dense)
    if name == "nf4":  # codes may lie in another dtype
        codes, _ = functional.quantize_4bit(W, quant_type="nf4", quant_storage=torch.bfloat16)
        again = Blocks.from_bitsandbytes(written | {"weight": codes})
        assert codes.dtype == torch.bfloat16 and torch.equal(again.dense(), dense)


def test_what_is_not_theirs_is_neither_written_nor_read() -> None:
    W = weights(8, 64)
    for name, settings in (("int4", {}), ("af4", {}), ("nf", {"bits": 3}), ("nf4", {"block": 16})):
        with pytest.raises(variants.Incompatible, match="bitsandbytes stores nf4 and fp4"):
            find_part("base", name).load(**settings).store(W).to_bitsandbytes()
    tensors = find_part("base", "nf4_dq").load().store(W).to_bitsandbytes("q.weight")
    state = "q.weight.quant_state.bitsandbytes__nf4"
    broken: dict[str, dict[str, Tensor]] = {
        "0 quant states": {k: t for k, t in tensors.items() if k != state},
        f"{state}: JSONDecodeError": tensors | {state: tensors[state][:-3]},
        f"{state}: KeyError: 'q.weight.absmax'": {
            k: t for k, t in tensors.items() if k != "q.weight.absmax"
        },
        "512 codes|256 codes": tensors | {"q.weight": tensors["q.weight"][:-1]},
        "another table than nf4 and fp4": tensors
        | {"q.weight.quant_map": tensors["q.weight.quant_map"].flip(0)},
        "of another kind": tensors
        | {"q.weight.nested_quant_map": tensors["q.weight.nested_quant_map"].flip(0)},
    }
    for message, found in broken.items():
        with pytest.raises(variants.Incompatible, match=message):
            Blocks.from_bitsandbytes(found, "q.weight")


@pytest.mark.parametrize("part", PARTS, ids=str)
def test_both_backends_have_the_same_numbers(
    part: tuple[str, dict[str, Any]], functional: Any
) -> None:
    name, settings = part
    x = torch.randn(5, 128, requires_grad=True)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for shape, block in (((48, 128), 64), ((9, 48), 64), ((8, 4096), 4096)):
            W = weights(*shape, dtype=dtype)
            own, other = (
                find_part("base", name).load(block=block, backend=backend, **settings).store(W)
                for backend in ("own", "bitsandbytes")
            )
            assert type(other) is Kernels and other.bits == own.bits
            assert other.dense().dtype == dtype and torch.equal(other.dense(), own.dense())
            out = torch.empty(shape)
            other.decode_into(out)
            assert torch.equal(out, own.dense().float())
            if shape[1] == 128 and dtype == torch.float32:
                products = [stored.product(x) for stored in (own, other)]
                grads = [torch.autograd.grad(y.square().sum(), x)[0] for y in products]
                assert torch.equal(*products) and torch.equal(*grads)


def test_the_backend_passes_the_contract_and_merges_after_an_evaluation(functional: Any) -> None:
    axes = {"base": {"name": "nf4_dq", "backend": "bitsandbytes"}}
    for clause in ("starts_at_base", "forward_equals_weight", "merged_equals_unmerged",
                   "saves_and_loads", "disabled_is_the_original", "keeps_dtypes"):  # fmt: skip
        CLAUSES[clause](Case("lora", axes=axes))
    model = nn.Sequential(nn.Linear(128, 64, dtype=torch.bfloat16))
    adapter = variants.attach(model, "lora", rank=2, targets="0", **axes)
    nn.init.normal_(adapter.layers["0"].params["B"], std=1e-2)
    x = torch.randn(3, 128, dtype=torch.bfloat16)
    with torch.no_grad():  # in an evaluation bitsandbytes' own layer packs its weight anew
        before, kept = model.eval()(x), adapter.layers["0"].W0
        assert torch.equal(adapter.layers["0"].W0, kept)
        torch.testing.assert_close(adapter.merge()(x), before, rtol=2e-2, atol=2e-2)


def test_a_backend_that_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(variants.Incompatible, match="block=48: bitsandbytes has 32, 64"):
        variants.choose("qlora", base={"name": "nf4_dq", "block": 48, "backend": "bitsandbytes"})
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name)
    )
    with pytest.raises(variants.Incompatible, match=r"not installed .*the extra `quant`"):
        variants.choose("lora", base={"name": "fp4", "backend": "bitsandbytes"})


def in_four_bits(
    source: Path, folder: Path, base: Any, heads: tuple[str, ...] = ("lm_head",)
) -> Any:
    """A copy of a model's folder with its linear layers in codes, as transformers writes it."""
    folder.mkdir()
    for file in source.iterdir():
        if file.suffix == ".json":
            (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(source / "model.safetensors")
    for name in [k for k in tensors if k.endswith("proj.weight")]:
        tensors |= base.store(tensors[name]).to_bitsandbytes(name)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def coded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model, in nf4_dq."""
    base = find_part("base", "nf4_dq").load(block=32)
    return in_four_bits(TINY, tmp_path_factory.mktemp("coded") / "model", base)


def load(folder: Path, dtype: str = "fp32") -> Any:
    return Source(HF(path=str(folder), dtype=dtype)).load().model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=1 + torch.arange(24).view(2, 12)).logits


def steps(model: Any, adapter: Any, count: int = 3) -> list[float]:
    optimizer, losses = adapter.optimizer(lr=1e-2), []
    ids = 1 + torch.arange(24).view(2, 12)
    for _ in range(count):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_a_model_in_codes_is_loaded_as_it_is_and_adapted(coded: Path, tmp_path: Path) -> None:
    model, whole = load(coded), Source(HF(path=str(TINY))).load().model
    file = load_file(coded / "model.safetensors")
    held = {k: m for k, m in model.named_modules() if isinstance(m, Frozen)}
    assert len(held) == 3 * 7 and type(model) is type(whole)
    for path, layer in held.items():
        assert torch.equal(layer.stored.packed, file[f"{path}.weight"].view(-1))
        whole.get_submodule(path).weight.data = layer.stored.dense()
    before = logits(model)
    torch.testing.assert_close(before, logits(whole), rtol=0, atol=1e-5)
    adapter = variants.attach(model, "lora", rank=4, targets="attention")
    first = next(iter(adapter.layers))
    assert adapter.layers[first].frozen.stored is held[first].stored
    assert torch.equal(logits(model), before)
    losses = steps(model, adapter)
    assert losses[-1] < losses[0] and not adapter.notes
    adapter.save(tmp_path / "adapter")
    tuned = logits(model)
    again = load(coded)
    variants.load(again, tmp_path / "adapter")
    assert torch.equal(logits(again), tuned)
    with pytest.warns(UserWarning, match="made for another base: 12 of 12"):
        variants.load(Source(HF(path=str(TINY))).load().model, tmp_path / "adapter")
    with adapter.disabled():
        torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-5)
    adapter.merge()
    assert not any(isinstance(m, Frozen) for m in model.modules())
    torch.testing.assert_close(logits(model), tuned, rtol=0, atol=1e-4)
    adapter = variants.attach(again := load(coded, "bf16"), "dora", rank=2)
    adapter.detach()
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}


def test_what_codes_cannot_take_is_refused_and_another_base_is_said(coded: Path) -> None:
    for axes in ({"init": "pissa"}, {"allocation": "relora"}):
        with pytest.raises(variants.Incompatible, match=r"q_proj was loaded in codes, which take"):
            variants.attach(load(coded), "lora", rank=2, **axes)
    ids = 1 + torch.arange(24).view(2, 12)
    with (
        pytest.warns(UserWarning, match="stores their decoded weights anew"),
        pytest.raises(variants.Incompatible, match="loaded in codes, which have none"),
    ):
        variants.attach(load(coded), "lora_ga", rank=2, base="nf4",
                        calibration=[{"input_ids": ids, "labels": ids}])  # fmt: skip
    model = load(coded)
    with pytest.warns(UserWarning, match="21 layers were loaded in codes: base nf4"):
        adapter = variants.attach(model, "pissa", rank=2, base="nf4", targets="q,v")
    assert len(adapter.notes) == 1
    assert sum(isinstance(m, Frozen) for m in model.modules()) == 21
    with pytest.raises(variants.Incompatible, match="has an adapter already"):
        variants.attach(model, "lora", rank=2)


def test_a_run_on_a_model_in_codes(coded: Path, tmp_path: Path) -> None:
    lab("model=hf", f"model.path={coded}", "variant=lora", "rank=2", "targets=attention", *QUICK,
        out=tmp_path)  # fmt: skip
    result = json.loads((only(tmp_path) / "result.json").read_text())
    assert result["config"]["axes"]["base"]["name"] == "dense"
    assert result["memory"]["stored_bits"] == pytest.approx(4 + 8 / 32 + 32 / (32 * 256), abs=0.1)
    whole = Source(HF(path=str(TINY))).load().model
    numbers = sum(p.numel() for p in whole.parameters())
    assert result["params"]["total"] == numbers + result["params"]["trainable"]


def test_folders_in_other_codes_are_refused(coded: Path, tmp_path: Path) -> None:
    refused = {
        "stored by gptq; what is read": {"quant_method": "gptq", "bits": 4},
        "stored by bitsandbytes in 8 bits": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    }
    for file in coded.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((coded / "config.json").read_text())
    for message, settings in refused.items():
        (tmp_path / "config.json").write_text(
            json.dumps(config | {"quantization_config": settings})
        )
        with pytest.raises(BadInput, match=message):
            load(tmp_path)
    config["num_hidden_layers"] = 2
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        BadInput, match=r"model.layers.2.\S+ is in codes, and a LlamaForCausalLM has"
    ):
        load(tmp_path)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_transformers_own_folder_gives_transformers_own_logits(
    name: str, functional: Any, tmp_path: Path
) -> None:
    """Against `from_pretrained` with bitsandbytes' layers, fp32, 1e-5; GPT-2's are transposed."""
    sizes = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "tie_word_embeddings": False}
    made = (seeded(causal, kind="llama", **GROUPED | WIDE) if name == "llama"
            else seeded(causal, kind="gpt2", vocab_size=64, n_embd=64, n_layer=2, n_head=4,
                        n_positions=64, **sizes))  # fmt: skip
    made.save_pretrained(tmp_path / "dense")
    settings: dict[str, Any] = {"dtype": torch.float32, "device_map": "cpu"}
    cls = transformers.AutoModelForCausalLM
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=True,
                                             bnb_4bit_quant_type="nf4",
                                             bnb_4bit_compute_dtype=torch.float32)  # fmt: skip
    quantized = cls.from_pretrained(tmp_path / "dense", quantization_config=config, **settings)
    quantized.save_pretrained(tmp_path / "coded")
    their = cls.from_pretrained(tmp_path / "coded", **settings)
    for file in TINY.glob("tokenizer*"):
        (tmp_path / "coded" / file.name).write_bytes(file.read_bytes())
    model = load(tmp_path / "coded")
    their.train()  # in an evaluation its layers multiply in bf16
    torch.testing.assert_close(logits(model), logits(their), rtol=0, atol=1e-5)
    if name == "gpt2":
        with pytest.raises(variants.Incompatible, match="c_attn was loaded in codes and is not"):
            variants.attach(model, "lora", rank=2, targets="q")
    losses = steps(model, variants.attach(model, "lora", rank=2))
    assert losses[-1] < losses[0]
