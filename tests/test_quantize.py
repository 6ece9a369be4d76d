"""The storage formats: errors in their order, bits to the last digit, codes that come back."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import variants
from experiments.measure import Live
from variants._contract import CLAUSES, Case
from variants._quantize import PACKED, Blocks, decode, encode, nearest, pack, rounded, unpack
from variants._registry import find_part
from variants.af4 import AF4_VALUES
from variants.e2m1 import E2M1_VALUES
from variants.fp4 import FP4_VALUES
from variants.nf4 import NF4_VALUES, normal

TABLES = {"nf4": NF4_VALUES, "fp4": FP4_VALUES, "e2m1": E2M1_VALUES, "af4": AF4_VALUES,
          "nf2": normal(2), "nf3": normal(3), "nf8": normal(8)}  # fmt: skip
CODED = ("nf4", "nf4_dq", "nf", "fp4", "e2m1", "af4", "int4", "int8")


def base(name: str, **settings: Any) -> Any:
    return find_part("base", name).load(**settings)


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_mean_squared_errors_of_normal_numbers_in_their_order() -> None:
    W = normals(1024, 512)
    error = {k: (base(k).store(W).dense() - W).square().mean().item()
             for k in ("nf4", "nf4_dq", "af4", "e2m1", "int4", "fp4")}  # fmt: skip
    assert error["nf4"] < error["af4"] < error["e2m1"] < error["int4"] < error["fp4"]
    assert error["nf4_dq"] < 1.001 * error["nf4"]  # what the scales in 8 bits cost
    by_bits = [(base("nf", bits=k).store(W).dense() - W).square().mean().item() for k in PACKED]
    assert by_bits == sorted(by_bits, reverse=True) and by_bits[2] == error["nf4"]


SIZES = {
    ("nf4", 64): 4.5,
    ("nf4_dq", 64): 4 + 8 / 64 + 32 / (64 * 256),
    ("fp4", 128): 4.25,
    ("nf", 2): 2.5,
    ("nf", 3): 3.5,
    ("nf", 8): 8.5,
    ("int4", "row"): 4 + 32 / 512,
    ("int8", "tensor"): 8 + 32 / 512**2,
    ("int8", "row"): 8 + 32 / 512,
}


@pytest.mark.parametrize(("name", "setting"), SIZES)
def test_bits_to_the_last_digit(name: str, setting: Any) -> None:
    key = {"nf": "bits", "int4": "group", "int8": "group"}.get(name, "block")
    W = normals(512, 512)
    assert base(name, **{key: setting}).store(W).bits == SIZES[name, setting] * W.numel()


def test_bits_of_zero_points_and_of_the_last_bytes() -> None:
    W = normals(512, 512)
    assert rounded(W, 4, 128, symmetric=False).bits == (4 + 40 / 128) * W.numel()
    doubled = base("int4", symmetric=False, double=True).store(W)
    assert doubled.bits == (4 + 16 / 64 + 32 / (64 * 256)) * W.numel()
    assert base("nf4_dq").store(normals(4096, 4096)).bits / 4096**2 == 4.126953125
    odd = normals(7, 13)  # 91 codes of 3 bits fill 35 bytes, in words of 8 codes 36
    assert nearest(odd, normal(3), 64).bits == 8 * 36 + 2 * 32


@pytest.mark.parametrize("bits", PACKED)
def test_codes_come_out_of_their_bytes(bits: int) -> None:
    for numel in (1, 7, 8, 91):
        codes = torch.arange(numel).remainder(2**bits).to(torch.uint8)
        packed = pack(codes, bits)
        count, size = PACKED[bits]
        assert packed.numel() == -(-numel // count) * size
        assert torch.equal(unpack(packed, bits, numel), codes)


@pytest.mark.parametrize("name", TABLES)
def test_every_code_is_its_own_nearest(name: str) -> None:
    table = TABLES[name]
    assert len(set(table)) == len(table) - (name in ("fp4", "e2m1"))  # those have a second zero
    codes = torch.arange(len(table), dtype=torch.uint8)
    for scale in (1.0, 0.37, 2e-4):
        W = decode(codes, torch.tensor([scale]), table, len(table))
        found, absmax = encode(W, table, len(table))
        assert absmax.item() == pytest.approx(scale, rel=1e-6)
        same = decode(found, absmax, table, len(table))
        assert torch.equal(same, W) and torch.equal(found[W != 0], codes[W != 0])


@pytest.mark.parametrize("bits", PACKED)
def test_every_integer_is_its_own_nearest(bits: int) -> None:
    top = 2**bits - 1
    for zero in (0, 1, top // 2, top):
        W = 0.03 * (torch.arange(top + 1.0) - zero)
        stored = rounded(W[None], bits, top + 1, symmetric=False)
        assert stored.codes.tolist() == list(range(top + 1)) and stored.zero.tolist() == [zero]
        torch.testing.assert_close(stored.dense()[0], W, rtol=1e-6, atol=1e-6)
    half = top // 2
    W = 0.03 * torch.arange(-half, half + 1.0)
    stored = rounded(W[None], bits, len(W))
    assert stored.codes.tolist() == list(range(1, top + 1))  # the lowest is not used
    torch.testing.assert_close(stored.dense()[0], W, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", CODED)
@pytest.mark.parametrize("shape", [(1, 1), (7, 13), (5, 64), (96, 200)])
def test_any_shape_and_dtype_with_zeros_in_it(name: str, shape: tuple[int, int]) -> None:
    W = normals(*shape)
    W[0, : shape[1] // 2] = 0.0
    W[-1] = 0.0
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        stored = base(name).store(W.to(dtype))
        dense = stored.dense()
        assert dense.dtype == dtype and dense.shape == W.shape and torch.isfinite(dense).all()
        if name != "nf4_dq":  # there a scale of zero has an error as well
            assert not dense[-1].any() and not dense[0, : shape[1] // 2].any()
        if W.any():
            allowed = 0.15 if name != "fp4" else 0.2
            assert (dense - W).norm() < allowed * W.norm()


@pytest.mark.parametrize("group", ["20", "row", "64", "tensor"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_step_is_as_wide_as_its_group(group: str, symmetric: bool) -> None:
    W = normals(6, 40) * torch.arange(1.0, 7.0)[:, None]
    stored = base("int4", group=group, symmetric=symmetric).store(W)
    length = {"row": 40, "tensor": 240}.get(group) or int(group)
    for i, part in enumerate(W.reshape(-1).split(length)):
        reach = part.abs().max() / 7 if symmetric else (part.max() - part.min()) / 15
        torch.testing.assert_close(stored.scales[i], reach, rtol=1e-6, atol=0)
        error = (stored.dense().view(-1)[i * length :][: len(part)] - part).abs().max()
        assert error <= (0.5 if symmetric else 1.0) * reach * 1.001  # a zero point rounds, too


@pytest.mark.parametrize("name", ["nf4", "nf4_dq", "int4"])
def test_a_group_beyond_the_matrix_costs_what_the_matrix_does(name: str) -> None:
    """And gives what a group as long as the matrix gives."""
    setting, W = "group" if name == "int4" else "block", normals(6, 10)

    def kind(length: int) -> Any:
        return base(name, **{setting: str(length) if name == "int4" else length})

    with Live() as live:
        stored = kind(10**12).store(W)
    assert live.peak < 2**20
    assert torch.equal(stored.dense(), kind(60).store(W).dense())


def test_a_shift_is_added_and_nothing_is_rounded_by_a_change_of_dtype() -> None:
    W, shift = normals(6, 64), torch.arange(6.0)
    plain = nearest(W, NF4_VALUES, 64)
    shifted = Blocks(W, plain.codes, plain.scales, NF4_VALUES, 64, shift=shift)
    assert torch.equal(shifted.dense(), plain.dense() + shift[:, None])
    assert shifted.bits == plain.bits + 6 * 32
    for stored in (shifted, base("nf4_dq").store(W), base("int4", symmetric=False).store(W)):
        before = stored.dense()
        assert torch.equal(nn.Sequential(stored).to(torch.bfloat16)[0].dense(), before)


def test_what_cannot_be_is_refused() -> None:
    for name in CODED:
        for bad in (float("nan"), float("inf")):
            W = normals(8, 8)
            W[3, 3] = bad
            with pytest.raises(variants.Incompatible, match="not finite"):
                base(name).store(W)
    codes, scales = torch.zeros(64, dtype=torch.uint8), torch.ones(2)
    with pytest.raises(variants.Incompatible, match=r"group=64: a \[8, 8\] .* 1 scales, not 2"):
        Blocks(normals(8, 8), codes, scales, NF4_VALUES, 64)
    with pytest.raises(variants.Incompatible, match="64 codes, not 63"):
        Blocks(normals(8, 8), codes[1:], scales[1:], NF4_VALUES, 64)
    refused = {
        "base int4: group=column: a number of 1 or more, row or tensor": (
            "int4",
            "group",
            "column",
        ),
        "base int8: group=0": ("int8", "group", 0),
        "base nf4: block=0": ("nf4", "block", 0),
        "base e2m1: block=-1": ("e2m1", "block", -1),
        "base af4: block=1": ("af4", "block", 1),
        "base nf: block=0": ("nf", "block", 0),
        "base nf: bits=5; choices: 2, 3, 4, 8": ("nf", "bits", 5),
        "base nf: offset=0.3": ("nf", "offset", 0.3),
        "base nf4: backend=cuda; choices: own, bitsandbytes": ("nf4", "backend", "cuda"),
    }
    for message, (name, key, value) in refused.items():
        with pytest.raises(variants.Incompatible, match=message):
            base(name, **{key: value})
    assert base("int4", group=128) == base("int4", group="128")


@pytest.mark.parametrize(
    "settings",
    [{"name": "nf", "bits": 2}, {"name": "int4", "symmetric": False, "group": "row"},
     {"name": "fp4", "double": True, "block": 128}],
    ids=lambda s: s["name"],
)  # fmt: skip
def test_settings_pass_the_contract(settings: dict[str, Any]) -> None:
    """Formats at other settings than those that the generated pairs have."""
    for clause in ("starts_at_base", "forward_equals_weight", "merged_equals_unmerged",
                   "saves_and_loads", "disabled_is_the_original"):  # fmt: skip
        CLAUSES[clause](Case("lora", axes={"base": settings}))
