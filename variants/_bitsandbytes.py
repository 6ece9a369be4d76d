"""bitsandbytes' 4 bits: its serialised form, read and written without it, and its own functions.

Beside `weight`, the codes, lie `weight.absmax`, `weight.quant_map` (the table), with double
quantization `weight.nested_absmax` and `weight.nested_quant_map`, and in
`weight.quant_state.bitsandbytes__nf4` the bytes of a JSON object with sizes, dtypes and the offset.

What is written is read back as it was, scales in 8 bits included:

>>> from variants.nf4 import NF4Double
>>> stored = NF4Double().store(torch.randn(6, 64))
>>> tensors = stored.to_bitsandbytes("q.weight")
>>> sorted(key.removeprefix("q.weight") for key in tensors)  # doctest: +NORMALIZE_WHITESPACE
['', '.absmax', '.nested_absmax', '.nested_quant_map', '.quant_map',
 '.quant_state.bitsandbytes__nf4']
>>> again = Blocks.from_bitsandbytes(tensors, "q.weight")
>>> torch.equal(again.dense(), stored.dense()), torch.equal(again.nested, stored.nested)
(True, True)
>>> from variants.fp4 import FP4  # whose table is not in order
>>> stored = FP4().store(torch.randn(6, 64))
>>> torch.equal(Blocks.from_bitsandbytes(stored.to_bitsandbytes()).dense(), stored.dense())
True
"""

import importlib.util
import json
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from ._api import Stored
from ._quantize import NESTED, Blocks, check_group, dynamic_map, nearest
from ._registry import Incompatible, find_part

BACKENDS = ("own", "bitsandbytes")
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
STATE = ".quant_state.bitsandbytes__"
AnyBlocks = TypeVar("AnyBlocks", bound=Blocks)


def table_names() -> dict[tuple[float, ...], str]:
    """{table: bitsandbytes' name of it}."""
    from .fp4 import FP4_VALUES
    from .nf4 import NF4_VALUES

    return {NF4_VALUES: "nf4", FP4_VALUES: "fp4"}


def base_of(stored: Blocks) -> Any:
    """The part of the base axis that stores as these codes are."""
    name = table_names()[stored.table] + ("_dq" if stored.nested is not None else "")
    settings: dict[str, Any] = {"block": stored.group}
    if name == "fp4_dq":  # double quantization is a setting there
        name, settings = "fp4", settings | {"double": True}
    return find_part("base", name).load(**settings)


def check_backend(part: Any) -> None:
    """Refuses a backend that is unknown or not installed, and block sizes that it lacks."""
    check_group(part, "block")
    if part.backend not in BACKENDS:
        raise Incompatible(f"{part}: backend={part.backend}; choices: {', '.join(BACKENDS)}")
    if part.backend == "own":
        return
    if importlib.util.find_spec("bitsandbytes") is None:
        raise Incompatible(
            f"{part}: backend=bitsandbytes: it is not installed (pip install 'bitsandbytes', the "
            f"extra `quant`); backend=own has the same numbers"
        )
    if part.block not in BLOCKS:
        raise Incompatible(
            f"{part}: block={part.block}: bitsandbytes has {', '.join(map(str, BLOCKS))}"
        )


def store(W: Tensor, table: tuple[float, ...], block: int, double: bool, backend: str) -> Stored:
    """W as codes of a table that bitsandbytes has, by this project's code or by its functions."""
    if backend == "own":
        return nearest(W, table, block, double)
    return Kernels.quantized(W, table, block, double)


class Kernels(Blocks):
    """Blocks that bitsandbytes quantized, and decodes: by its kernels of the CPU or of CUDA.

    Its functions alone, none of its layers: on a CPU those pack their weights anew in the first
    forward without gradients, and what is merged into them then is lost. Its decoding on the CPU
    (0.50.2) is wrong where a row ends within a block, and from 2048 on it is no kernel: this
    project's own code then takes its place.
    """

    @classmethod
    def quantized(cls, W: Tensor, table: tuple[float, ...], block: int, double: bool) -> "Kernels":
        """W [m, n] as bitsandbytes stores it."""
        from bitsandbytes import functional

        if not torch.isfinite(W).all():
            raise Incompatible("a weight with numbers that are not finite cannot be quantized")
        given = W.detach() if W.dtype in DTYPES.values() else W.detach().float()
        codes, state = functional.quantize_4bit(
            given.contiguous(), None, None, block, double, table_names()[table]
        )
        tensors = {f"weight.{k}": t for k, t in state.as_dict(packed=True).items()}
        stored = cls.from_bitsandbytes(tensors | {"weight": codes})
        stored.dtype = W.dtype
        return stored

    def dense(self) -> Tensor:
        import bitsandbytes  # noqa: F401  (its functions are torch's from here on)

        whole = self.shape[1] % self.group == 0 and self.group < 2048
        if self.packed.device.type == "cpu" and not whole:
            out = torch.empty(self.shape, dtype=self.dtype)
            super().decode_into(out)
            return out
        dtype = self.dtype if self.dtype in DTYPES.values() else torch.float32
        codes, kind, shape = self.packed[:, None], table_names()[self.table], list(self.shape)
        W = torch.ops.bitsandbytes.dequantize_4bit(
            codes, self.scales, self.group, kind, shape, dtype
        )
        return W.to(self.dtype)

    decoded = Stored.decoded  # on a CPU bitsandbytes writes to memory of its own alone

    def decode_into(self, out: Tensor) -> None:
        out.copy_(self.dense())


def write(stored: Blocks, name: str) -> dict[str, Tensor]:
    """The tensors of bitsandbytes' serialised form, by key; `name` is the weight's own."""
    kind = table_names().get(stored.table)
    if kind is None or stored.shift is not None or stored.group not in BLOCKS:
        raise Incompatible(
            f"{name}: bitsandbytes stores {' and '.join(table_names().values())} without shifts "
            f"in blocks of {', '.join(map(str, BLOCKS))}, not this"
        )
    device = stored.packed.device
    absmax = stored.absmax.view(torch.float32)
    settings: dict[str, Any] = {
        "quant_type": kind,
        "blocksize": stored.group,
        "dtype": next((k for k, dtype in DTYPES.items() if dtype == stored.dtype), "float32"),
        "shape": list(stored.shape),
    }
    tensors = {
        "": stored.packed[:, None],
        ".absmax": absmax,
        ".quant_map": torch.tensor(stored.table, device=device),
    }
    if stored.nested is not None and stored.offset is not None:
        tensors[".absmax"], tensors[".nested_absmax"] = stored.nested, absmax
        tensors[".nested_quant_map"] = torch.tensor(dynamic_map(), device=device)
        settings |= {
            "nested_blocksize": NESTED,
            "nested_dtype": "float32",
            "nested_offset": stored.offset.view(torch.float32).item(),
        }
    state = torch.tensor(list(json.dumps(settings).encode()), dtype=torch.uint8, device=device)
    return {name + key: t for key, t in (tensors | {STATE + kind: state}).items()}


def read(cls: type[AnyBlocks], tensors: Mapping[str, Tensor], name: str) -> AnyBlocks:
    """The matrix of that name among tensors of bitsandbytes' serialised form."""
    states = [key for key in tensors if key.startswith(name + STATE)]
    if len(states) != 1 or name not in tensors:
        raise Incompatible(f"{name}: {len(states)} quant states beside it: no 4 bits of "
                           f"bitsandbytes")  # fmt: skip
    try:
        settings = json.loads(bytes(tensors[states[0]].tolist()))
        shape, dtype = settings["shape"], DTYPES[settings["dtype"]]
        own = {k: tensors[f"{name}.{k}"] for k in ("absmax", "quant_map")}
        nested = {}
        if f"{name}.nested_absmax" in tensors:
            nested = {k: tensors[f"{name}.nested_{k}"].float() for k in ("absmax", "quant_map")}
            nested["offset"] = torch.tensor(settings["nested_offset"]).to(own["absmax"].device)
        group, scaled = settings["blocksize"], settings.get("nested_blocksize", NESTED)
    except (KeyError, ValueError, TypeError) as error:
        raise Incompatible(f"{states[0]}: {type(error).__name__}: {error}") from None
    if nested and (scaled, tuple(nested["quant_map"].tolist())) != (NESTED, dynamic_map()):
        raise Incompatible(f"{name}: scales in 8 bits of another kind than the dynamic type in "
                           f"blocks of {NESTED}")  # fmt: skip
    table = tuple(own["quant_map"].float().tolist())
    if table not in table_names() or group not in BLOCKS:
        known = " and ".join(table_names().values())
        raise Incompatible(f"{name}: another table than {known} have, or blocks of {group}")
    like = torch.empty(shape, dtype=dtype, device="meta")
    codes = tensors[name].contiguous().view(torch.uint8).view(-1)  # may lie in another dtype
    if not nested:
        return cls(like, codes, own["absmax"].float(), table, group, packed=True)
    return cls(like, codes, nested["absmax"], table, group, packed=True,
               nested=own["absmax"], offset=nested["offset"])  # fmt: skip
