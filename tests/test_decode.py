"""Decoding by table, and products that keep no decoded matrix: numbers to the bit, exact bytes."""

import copy
import gc
import logging
import pickle
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import variants
from experiments.measure import measure
from variants import _decode, _kernel
from variants._api import Stored
from variants._quantize import Blocks, nearest, pack, rounded
from variants._registry import find_part
from variants.nf4 import NF4_VALUES

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
NF4 = find_part("base", "nf4_dq").load()


@pytest.fixture
def library() -> None:
    if _kernel.compiled() is None:
        pytest.skip("no C compiler here")


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def given(bits: int, numel: int, group: int) -> tuple[Tensor, tuple[float, ...], Tensor, Tensor]:
    """(codes, table, scales, shift), random."""
    generator = torch.Generator().manual_seed(numel + bits)
    codes = torch.randint(0, 2**bits, (numel,), dtype=torch.uint8, generator=generator)
    table = tuple(torch.randn(2**bits, generator=generator).tolist())
    scales, shift = torch.randn(2, -(-numel // group), generator=generator)
    return codes, table, scales, shift


def plain(codes: Tensor, table: tuple[float, ...], scales: Tensor, shift: Tensor | None,
          group: int) -> Tensor:  # fmt: skip
    """The equation, one number at a time."""
    groups = torch.arange(len(codes)) // group
    values = torch.tensor(table)[codes.int()] * scales[groups]
    return values if shift is None else values + shift[groups]


# ------------------------------------------------------------------ the numbers

SIZES = [(64 * 64, 64), (96 * 200, 32), (91, 64), (7 * 13, 13), (3 * 512, 7), (100, 100), (1, 64),
         (33 * 32, 96), (8 * 43 * 32, 43 * 32), (4096, 4096), (5 * 32, 64),
         (4096 + 96, 4096)]  # fmt: skip


@pytest.mark.parametrize("way", ["torch", "compiled"])
@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_torch_s_default_dtype_changes_no_number(
    way: str, default: torch.dtype, library: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA_DECODE", way)
    stored = nearest(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)),
                     NF4_VALUES, 64)  # fmt: skip
    wanted, found = ([torch.empty(64, 64, dtype=dtype) for dtype in DTYPES[:2]] for _ in range(2))
    for out in wanted:
        stored.decode_into(out)
    torch.set_default_dtype(default)
    try:
        for out in found:
            stored.decode_into(out)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(map(torch.equal, found, wanted))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("piece", [2**6, 2**19])
def test_decoding_is_the_equation_to_the_bit(
    bits: int, piece: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounded once, whatever the pieces, the threads, and what is short at the end."""
    monkeypatch.setattr(_decode, "PIECE", piece)
    monkeypatch.setenv("LORA_DECODE", "torch")
    for numel, group in SIZES:
        codes, table, scales, shift = given(bits, numel, group)
        for own, dtype in [(None, DTYPES[0]), *((shift, dtype) for dtype in DTYPES)]:
            out = torch.full((numel,), torch.nan, dtype=dtype)
            _decode.decode(pack(codes, bits), bits, table, scales, own, group, out)
            assert torch.equal(out, plain(codes, table, scales, own, group).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_compiled_decoding_is_the_equation_to_the_bit(
    dtype: torch.dtype, threads: int, library: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA_DECODE", "compiled")
    filled = []
    fill = _kernel._fill
    monkeypatch.setattr(_kernel, "_fill", lambda *args: filled.append(args) or fill(*args))
    for numel, group in [*SIZES, (2**20, 64), (2**16, 2**16)]:
        codes, table, scales, shift = given(4, numel, group)
        for own in (None, shift):
            out = torch.full((numel,), torch.nan, dtype=dtype)
            _decode.decode(pack(codes, 4), 4, table, scales, own, group, out)
            assert torch.equal(out, plain(codes, table, scales, own, group).to(dtype))
    assert len(filled) == (18 if dtype in DTYPES[:2] else 0)  # of whole runs of 32


def test_what_compiles_here_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that computes other numbers is not used, and so no other test would see it."""
    tried = _kernel._right
    monkeypatch.setattr(_kernel, "_right", lambda _: True)
    library = _kernel.compiled.__wrapped__()
    if library is None:
        pytest.skip("no C compiler here")
    assert tried(library)


def test_only_a_large_matrix_is_worth_compiling(
    library: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LORA_DECODE", raising=False)
    library_of, asked = _kernel.compiled(), []
    monkeypatch.setattr(_kernel, "compiled", lambda: asked.append(1) or library_of)
    for numel in (_kernel.LARGE - 64, _kernel.LARGE):
        out = torch.empty(numel, dtype=torch.bfloat16)
        packed, scales = torch.zeros(numel // 2, dtype=torch.uint8), torch.ones(numel // 64)
        _decode.decode(packed, 4, (2.0,) * 16, scales, None, 64, out)
        assert bool((out == 2).all()) and len(asked) == (numel == _kernel.LARGE)


@pytest.mark.parametrize(
    ("compiler", "source", "said"),
    [
        (None, _kernel.SOURCE, "no C compiler"),
        ("false", _kernel.SOURCE, "no compiled decoder"),
        ("cc", _kernel.SOURCE.replace("at >> 4", "at >> 3"), "it computes other numbers"),
    ],
)
def test_without_a_compiler_torch_decodes_and_one_line_says_so(
    compiler: str | None, source: str, said: str,
    monkeypatch: pytest.MonkeyPatch, library: None,
) -> None:  # fmt: skip
    if compiler is None:
        monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CC", compiler or "")
    monkeypatch.setattr(_kernel, "SOURCE", source)
    monkeypatch.setattr(_kernel, "LARGE", 1)
    monkeypatch.delenv("LORA_DECODE", raising=False)
    _kernel.compiled.cache_clear()
    codes, table, scales, _ = given(4, 4096, 64)
    lines: list[str] = []
    monkeypatch.setattr(
        logging.getLogger("variants"), "handle", lambda r: lines.append(r.getMessage())
    )
    for _ in range(2):
        out = torch.empty(4096)
        _decode.decode(pack(codes, 4), 4, table, scales, None, 64, out)
        assert torch.equal(out, plain(codes, table, scales, None, 64))
    assert len(lines) == 1 and said in lines[0]
    monkeypatch.setenv("LORA_DECODE", "compiled")
    with pytest.raises(variants.Incompatible, match="no C compiler that works"):
        _decode.decode(pack(codes, 4), 4, table, scales, None, 64, torch.empty(4096))
    _kernel.compiled.cache_clear()


def test_another_way_to_decode_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_DECODE", "triton")
    with pytest.raises(variants.Incompatible, match="LORA_DECODE=triton: one of auto, torch, comp"):
        nearest(torch.randn(8, 8), (-1.0, 1.0) * 8, 8).dense()


# ------------------------------------------------------------------ the product


def coded(m: int = 24, n: int = 40, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return NF4.store(torch.randn(m, n, generator=generator).to(dtype))


@pytest.mark.parametrize("stored", [
    coded(6, 10, torch.float64),
    rounded(torch.randn(6, 10, dtype=torch.float64), 3, 10, symmetric=False),
    find_part("base", "bf16").load().store(torch.randn(6, 10, dtype=torch.float64)),
])  # fmt: skip
def test_derivatives_of_any_order(stored: Stored) -> None:
    m, n = stored.shape
    x, b = torch.randn(2, 3, n, dtype=torch.float64), torch.randn(m, dtype=torch.float64)
    assert torch.equal(stored.product(x, b), nn.functional.linear(x, stored.dense(), b))
    given = x.requires_grad_(), b.requires_grad_()
    assert torch.autograd.gradcheck(stored.product, given)
    assert torch.autograd.gradgradcheck(stored.product, given)


@pytest.mark.parametrize("of", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_product_is_that_of_the_dense_matrix(dtype: torch.dtype, of: torch.dtype) -> None:
    """Whatever the dtypes: the matrix is rounded to that in which it was given."""
    stored = coded(dtype=of)
    x = torch.randn(5, 40).to(dtype).requires_grad_()
    W = stored.dense().to(dtype)
    y = stored.product(x)
    assert torch.equal(y, nn.functional.linear(x, W))
    y.sum().backward()
    assert x.grad is not None and torch.equal(x.grad, torch.ones_like(y) @ W)


def test_one_workspace_at_a_time_serves_all() -> None:
    """Lent out, it is not lent again; given back, by an error as well, it serves the next."""
    first, second = coded(seed=1), coded(8, 16, seed=2)
    with first.decoded(torch.float32) as W, second.decoded(torch.float32) as V:
        assert torch.equal(W, first.dense()) and torch.equal(V, second.dense())
        largest = W.data_ptr()
    with pytest.raises(ZeroDivisionError), second.decoded(torch.float32) as V:
        raise ZeroDivisionError
    with second.decoded(torch.bfloat16) as V:
        assert V.data_ptr() == largest and torch.equal(V, second.dense().bfloat16())
    with torch.inference_mode(), coded(50, 40).decoded(torch.float32) as W:
        assert torch.equal(W, coded(50, 40).dense())  # the kept one is too small
    x = torch.randn(3, 16, requires_grad=True)
    second.product(x).sum().backward()  # the workspace of inference mode serves training


def test_threads_have_workspaces_of_their_own() -> None:
    layers = [coded(seed=seed) for seed in range(4)]
    x, wrong = torch.randn(16, 40), []
    wanted = [layer.dense() for layer in layers]

    def work(i: int) -> None:
        for _ in range(50):
            y = x.clone().requires_grad_()
            out = layers[i].product(y)
            out.sum().backward()
            right = torch.equal(out, x @ wanted[i].T)
            if not right or not torch.allclose(y.grad, wanted[i].sum(0).expand(16, -1), atol=1e-5):
                wrong.append(i)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_a_product_in_the_backward_of_another() -> None:
    """Checkpointed, within a hook, and in a function's own backward."""
    first, second = coded(40, 40, seed=1), coded(40, 40, seed=2)
    W, V = first.dense(), second.dense()

    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return first.product(x)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            with torch.enable_grad():
                g = grads[0].detach().requires_grad_()
                return torch.autograd.grad(second.product(g).square().sum(), g)[0]

    x = torch.randn(3, 40, requires_grad=True)
    y = Twice.apply(first.product(x))
    y.register_hook(lambda g: second.product(g))  # type: ignore[union-attr]
    y.sum().backward()
    g = torch.ones(3, 40) @ V.T
    torch.testing.assert_close(x.grad, 2 * (g @ V.T) @ V @ W)

    def chain(x: Tensor) -> Tensor:
        return second.product(first.product(x).tanh())

    grads = []
    for run in (chain, lambda x: checkpoint(chain, x, use_reentrant=False),
                lambda x: checkpoint(chain, x, use_reentrant=True)):  # fmt: skip
        x.grad = None
        run(x).square().sum().backward()
        grads.append(x.grad)
    assert torch.equal(grads[0], grads[1]) and torch.equal(grads[0], grads[2])


def test_a_workspace_is_no_state() -> None:
    stored = coded(64, 64)
    stored.product(torch.randn(1, 64))
    names = {"packed", "nested", "absmax", "offset"}
    assert set(stored.state_dict()) == names
    for again in (copy.deepcopy(stored), pickle.loads(pickle.dumps(stored))):
        assert torch.equal(again.dense(), stored.dense())
    assert len(pickle.dumps(stored)) < 64 * 64 * 4


# ------------------------------------------------------------------ memory

SIZE, DEPTH, TOKENS = 256, 4, 2


class Net(nn.Module):
    """Square layers, and one that is twice as large."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.ModuleList(nn.Linear(SIZE, SIZE) for _ in range(DEPTH))
        self.up_proj, self.down_proj = nn.Linear(SIZE, 2 * SIZE), nn.Linear(2 * SIZE, SIZE)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.stack:
            x = layer(x).tanh()
        return self.down_proj(self.up_proj(x))


@pytest.fixture
def unfrozen() -> Iterator[None]:
    yield
    gc.unfreeze()


def live() -> int:
    """Bytes of the tensors made since `gc.freeze()`, memory that several share counted once."""
    tensors = (t for t in gc.get_objects() if issubclass(type(t), Tensor))
    storages = (t.untyped_storage() for t in tensors if t.device.type == "cpu")
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


class Peak(TorchDispatchMode):
    """The most bytes that tensors hold while a product runs."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.most = max(self.most, live())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("base", ["nf4_dq", "int8"])
def test_resident_memory_is_the_stored_bits_and_one_decoded_layer(
    base: str, unfrozen: None
) -> None:
    for part in (NF4, find_part("base", base).load()):
        part.store(torch.eye(2)).dense()  # the tables of 256 entries are there once for all
    _decode._spare.bytes = None
    gc.collect()
    gc.freeze()
    model = Net()
    adapter = variants.attach(model, "lora", rank=2, base=base, targets="all-linear")
    layers = [part for part in model.modules() if isinstance(part, Blocks)]
    stored = sum(layer.bits + (0 if layer.offset is None else 32) for layer in layers) // 8
    factors = sum(t.nbytes for t in model.parameters())  # and the biases
    assert len(layers) == DEPTH + 2 and live() == stored + factors
    assert base != "nf4_dq" or stored < 0.52 * (DEPTH + 4) * SIZE**2

    x = torch.randn(TOKENS, SIZE)
    optimizer = adapter.optimizer(lr=1e-3)
    for _ in range(2):
        with Peak() as peak:
            model(x).square().sum().backward()
        optimizer.step()
    del optimizer
    model.zero_grad()
    gc.collect()
    held, decoded = stored + factors + x.nbytes, 2 * SIZE * SIZE * 4
    assert live() == held + decoded  # of the largest layer
    # while a product runs: gradients and moments of the factors, and activations, beside that
    beside = 3 * factors + 8 * (DEPTH + 2) * TOKENS * SIZE * 4
    assert held + decoded < peak.most < held + decoded + beside
    assert beside < decoded


def test_a_coded_layer_keeps_what_a_dense_one_keeps_and_decodes_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counts: list[tuple[int, int]] = []
    decode = Blocks.decode_into
    monkeypatch.setattr(
        Blocks, "decode_into", lambda self, out: (counts.append(self.shape), decode(self, out))[1]
    )
    kept = {}
    for base in ("dense", "nf4_dq"):
        model = Net()
        variants.attach(model, "lora", rank=2, base=base, targets="all-linear")
        x = torch.randn(TOKENS, SIZE, requires_grad=True)
        counts.clear()
        kept[base] = measure(lambda m=model, x=x: m(x).sum().backward(), model)["saved_bytes"]
    assert kept["nf4_dq"] == kept["dense"] > 0
    assert len(counts) == 2 * (DEPTH + 2)
    with torch.no_grad():
        model(x)
    assert len(counts) == 3 * (DEPTH + 2)
