"""PEFT's methods, one by one: its names and settings for our tensors and parts."""

import re
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ._adapter import Adapter, Choice, choose
from ._kinds import Conv1DKind, Conv2dKind, Kind, NormKind
from ._layer import Adapted
from ._peft_lora import AdaLoRA, LoRA
from ._peft_method import (
    File,
    Method,
    Named,
    Read,
    Written,
    dotted,
    first_scale,
    patterned,
    ranks_of,
)
from ._registry import Incompatible

# ------------------------------------------------------------------------- products and blocks


class HiRA(Method):
    """PEFT 0.21 has the setting rank_pattern, and builds r everywhere."""

    kind = "HIRA"
    preset = "hira"
    names: ClassVar = {"hira_A": "A", "hira_B": "B"}
    ignores = ("rank_pattern",)
    dropout = "hira_dropout"
    kinds = (Kind, Conv1DKind)

    def read(self, file: File, name: str, found: Named) -> tuple[int, Named]:
        _, p = super().read(file, name, found)
        return len(p["A"]), p


class LoHa(Method):
    kind = "LOHA"
    preset = "loha"
    names: ClassVar = {"hada_w1_a": "B1", "hada_w1_b": "A1", "hada_w2_a": "B2", "hada_w2_b": "A2"}
    reads = ("r", "alpha", "rank_pattern", "alpha_pattern")
    kinds = (Kind, Conv2dKind)

    def config(self, adapter: Adapter) -> dict[str, Any]:
        alphas = {name: self.s(layer) * layer.rank for name, layer in adapter.layers.items()}
        return patterned("r", ranks_of(adapter)) | patterned("alpha", alphas)

    def s(self, layer: Adapted) -> float:
        """s of the equation: PEFT has alpha / r in any case."""
        return layer.full_s

    def choose(self, file: File, ranks: Mapping[str, int], p: Named) -> Choice:
        form = {"name": self.preset, "rule": "peft", **self.settings(file)}
        return choose(self.preset, file.config["r"], file.config["alpha"], form=form)

    def settings(self, file: File) -> dict[str, Any]:
        return {}

    def scale(self, file: File, name: str, choice: Choice, r: int) -> float:
        return choice.scale.value(file.pattern("alpha_pattern", name, file.config["alpha"]), r)


class LoKr(LoHa):
    """PEFT's s stands before full factors too. It gives W1 a `decompose_factor` that divides a
    side even where that is the larger part: refused."""

    kind = "LOKR"
    preset = "lokr"
    names: ClassVar = {
        "lokr_w1": "W1", "lokr_w1_a": "B1", "lokr_w1_b": "A1",
        "lokr_w2": "W2", "lokr_w2_a": "B2", "lokr_w2_b": "A2",
    }  # fmt: skip
    reads = (*LoHa.reads, "decompose_both", "decompose_factor")
    ignores = ("rank_dropout_scale",)
    kinds = (Kind,)

    def config(self, adapter: Adapter) -> dict[str, Any]:
        form: Any = adapter.choice.form
        if form.factor > 0:
            for name, layer in adapter.layers.items():
                sides = layer.out_features, layer.in_features
                if any(k % form.factor == 0 and k < form.factor**2 for k in sides):
                    raise self.refuse(adapter, f"gives {name} the larger part of "
                                               f"factor={form.factor}")  # fmt: skip
        both = {"decompose_both": form.decompose_both, "decompose_factor": form.factor}
        return super().config(adapter) | both

    def s(self, layer: Adapted) -> float:
        return layer.acting_s

    def settings(self, file: File) -> dict[str, Any]:
        factor = file.get("decompose_factor", -1)
        if factor > 0 and any(
            k % factor == 0 and k < factor**2 for name in file.layers for k in file.shape(name)
        ):
            raise file.refuse("decompose_factor")
        return {"factor": factor, "decompose_both": file.get("decompose_both", False)}


class MiSS(Method):
    """Its `mini` ties what MiSS trains apart: refused."""

    kind = "MISS"
    preset = "miss"
    names: ClassVar = {"miss_block": "D"}
    reads = ("r", "init_weights")
    ignores = ("mini_r",)
    dropout = "miss_dropout"

    def config(self, adapter: Adapter) -> dict[str, Any]:
        return super().config(adapter) | {"init_weights": True, "bias": "none"}

    def choose(self, file: File, ranks: Mapping[str, int], p: Named) -> Choice:
        if file.get("init_weights", True) not in (True, False, "bat"):
            raise file.refuse("init_weights")
        return choose("bat" if self.bat(file) else "miss", file.config["r"])

    def bat(self, file: File) -> bool:
        return file.get("init_weights", True) == "bat"

    def drops(self, file: File) -> float:
        return 0.0 if self.bat(file) else super().drops(file)


class BAT(MiSS):
    preset = "bat"
    dropout = None  # PEFT has none on it

    def config(self, adapter: Adapter) -> dict[str, Any]:
        r = self.one("r", [layer.rank for layer in adapter.layers.values()])
        for name, layer in adapter.layers.items():
            if layer.in_features % r or layer.out_features % r:
                raise self.refuse(adapter, f"has no {r} x {r} block beyond the edge of {name}")
        return {"r": r, "init_weights": "bat", "bias": "none"}


class DeLoRA(Method):
    """The authors' frozen copy becomes r directions more, C and -D, and the boundary twice itself;
    directions of length 1 keep PEFT's least norm of 1e-4 out of it."""

    kind = "DELORA"
    preset = "delora"
    names: ClassVar = {
        "delora_A": "A", "delora_B": "B", "delora_lambda": "boundary", "delora_w_norm": "norms"
    }  # fmt: skip
    reads = ("r", "rank_pattern", "delora_lambda")
    ignores = ("lambda_pattern",)  # of the start
    dropout = "module_dropout"

    def config(self, adapter: Adapter) -> dict[str, Any]:
        form: Any = adapter.choice.form
        twice = 1 if form.rule == "peft" else 2
        ranks = {name: twice * r for name, r in ranks_of(adapter).items()}
        return patterned("r", ranks) | {"delora_lambda": form.boundary, "bias": "none"}

    def write(self, layer: Adapted) -> Named:
        p: Any = layer.params
        if layer.form.rule == "authors":  # type: ignore[attr-defined]
            A, B, C, D = p["A"], p["B"], p["C"], p["D"]
            A, C = (t / torch.linalg.vector_norm(t, dim=1, keepdim=True) for t in (A, C))
            B, D = (t / torch.linalg.vector_norm(t, dim=0) for t in (B, D))
            p = {"A": torch.cat([A, C]), "B": torch.cat([B, -D], dim=1),
                 "boundary": 2 * p["boundary"], "norms": p["norms"]}  # fmt: skip
        return {theirs: p[own] for theirs, own in self.names.items()}

    def choose(self, file: File, ranks: Mapping[str, int], p: Named) -> Choice:
        form = {"name": "delora", "rule": "peft", "boundary": float(file.get("delora_lambda", 15))}
        return choose("delora", file.config["r"], form=form)


class GraLoRA(Method):
    """A is [k, n/k, r] there, B [k, r, m/k]; r does not count the hybrid part."""

    kind = "GRALORA"
    preset = "gralora"
    names: ClassVar = {
        "gralora_A_general.weight": "A_hybrid", "gralora_B_general.weight": "B_hybrid",
        "gralora_A": "A", "gralora_B": "B",
    }  # fmt: skip
    reads = ("r", "hybrid_r", "alpha", "gralora_k")
    dropout = "gralora_dropout"
    kinds = (Kind, Conv1DKind)

    def config(self, adapter: Adapter) -> dict[str, Any]:
        form: Any = adapter.choice.form
        for name, layer in adapter.layers.items():
            if layer.in_features % form.k or layer.out_features % form.k:
                raise self.refuse(adapter, f"needs sides that k={form.k} divides, unlike {name}'s")
        r = self.one("r", ranks_of(adapter).values())
        alpha = self.one("alpha", [layer.full_s * r for layer in adapter.layers.values()])
        return {"r": r - form.hybrid_r, "hybrid_r": form.hybrid_r, "alpha": alpha,
                "gralora_k": form.k, "bias": "none"}  # fmt: skip

    def write(self, layer: Adapted) -> Named:
        k = layer.form.k  # type: ignore[attr-defined]
        A, B = (layer.params[key] for key in "AB")
        return super().write(layer) | {
            "gralora_A": A.mT.unflatten(0, (k, -1)),
            "gralora_B": B.unflatten(0, (k, -1)).transpose(1, 2),
        }

    def choose(self, file: File, ranks: Mapping[str, int], p: Named) -> Choice:
        h = file.get("hybrid_r", 0)
        form = {"name": "gralora", "k": file.get("gralora_k", 2), "hybrid_r": h}
        return choose("gralora", file.config["r"] + h, file.config["alpha"], form=form)

    def read(self, file: File, name: str, found: Named) -> tuple[int, Named]:
        _, p = super().read(file, name, found)
        p["A"], p["B"] = p["A"].flatten(0, 1).mT, p["B"].transpose(1, 2).flatten(0, 1)
        return file.config["r"] + file.get("hybrid_r", 0), p


# ------------------------------------------------------------------------ shared, random, sparse


class VeRA(Method):
    """PEFT has one pair, as large as the largest layer, of which each takes a corner: a pair for
    each shape becomes one of as many ranks together, with d = 0 where another shape's are."""

    kind = "VERA"
    preset = "vera"
    names: ClassVar = {"vera_lambda_d": "d", "vera_lambda_b": "b"}
    shared = ("vera_A", "vera_B")
    reads = ("r", "d_initial", "save_projection", "projection_prng_key")
    dropout = "vera_dropout"
    kinds = (Kind, Conv1DKind)

    def save(self, adapter: Adapter) -> Written:
        pairs = [(pair["A"], pair["B"]) for pair in adapter.shared.values()]
        total = sum(len(A) for A, _ in pairs)
        A = pairs[0][0].new_zeros(total, max(A.shape[1] for A, _ in pairs))
        B = A.new_zeros(max(len(B) for _, B in pairs), total)
        places, begin = {}, 0
        for own_A, own_B in pairs:
            place = places[id(own_A)] = slice(begin, begin := begin + len(own_A))
            A[place, : own_A.shape[1]], B[: len(own_B), place] = own_A, own_B
        layers = {}
        for name, layer in adapter.layers.items():
            d = A.new_zeros(total)
            d[places[id(layer.params["A"])]] = layer.params["d"]
            layers[name] = {"vera_lambda_d": d, "vera_lambda_b": layer.params["b"]}
        form: Any = adapter.choice.form
        config = {"r": total, "d_initial": form.d_init, "save_projection": True,
                  "projection_prng_key": 0, "bias": "none"}  # fmt: skip
        return Written(config, layers, {"vera_A": A, "vera_B": B})

    def load(self, file: File) -> Read:
        read, r = super().load(file), file.config["r"]
        m, n = (max(sides) for sides in zip(*map(file.shape, read.ranks), strict=True))
        if file.get("save_projection", True):
            A, B = file.shared.pop("vera_A"), file.shared.pop("vera_B")
        else:  # as PEFT draws them, on the CPU
            g = torch.Generator().manual_seed(file.get("projection_prng_key", 0))
            A, B = (drawn(*shape, g) for shape in ((r, n), (m, r)))
        key = f"shared.{read.choice.form.key(m, n, r)}"
        read.tensors |= {f"{key}.A": A[:, :n], f"{key}.B": B[:m]}
        return read

    def choose(self, file: File, ranks: Mapping[str, int], p: Named) -> Choice:
        form = {"name": "vera", "share": "largest", "d_init": float(file.get("d_initial", 0.1))}
        return choose("vera", file.config["r"], form=form)


def drawn(m: int, n: int, generator: torch.Generator) -> Tensor:
    """[m, n] from U(-sqrt(6 / n), sqrt(6 / n)), the very numbers that PEFT draws."""
    bound = (6 / n) ** 0.5
    return torch.empty(m, n).uniform_(-bound, bound, generator=generator)


class RandLoRA(Method):
    """PEFT pairs column (k, j) of the scaled A with column (j, k) of B, which depends on the number
    N of bases of the layer: so the bases are put in order for each shape, and there is a file only
    where all layers agree on it. The authors' 1 / sqrt(N) goes into g."""

    kind = "RANDLORA"
    preset = "randlora"
    also = ("randlora_lambda", "randlora_gamma", "randlora_A", "randlora_B")
    shared = ("randlora_A", "randlora_B")
    reads = ("r", "randlora_alpha", "save_projection")
    ignores = ("projection_prng_key", "sparse", "very_sparse")  # of the draw
    dropout = "randlora_dropout"
    kinds = (Kind, Conv1DKind)

    def save(self, adapter: Adapter) -> Written:
        form: Any = adapter.choice.form
        r, s = self.one("r", ranks_of(adapter).values()), first_scale(adapter)
        shapes = [(layer.out_features, layer.in_features) for layer in adapter.layers.values()]
        m, n = (max(sides) for sides in zip(*shapes, strict=True))
        k, K = min(m, n), max(m, n)
        like = next(iter(adapter.layers.values())).params["A"]
        A, B = like.new_full((r, 1, k), torch.nan), like.new_full((K, -(-k // r), r), torch.nan)
        layers, done = {}, set()
        for name, layer in adapter.layers.items():
            p, large = layer.params, max(layer.out_features, layer.in_features)
            N, small = p["g"].shape
            g = p["g"] * layer.full_s / s / (N**0.5 if form.rule == "authors" else 1)
            layers[name] = {"randlora_lambda": p["l"].mT, "randlora_gamma": g}
            if (id(p["B"]), small, large) in done:
                continue
            done.add((id(p["B"]), small, large))
            columns = p["B"][:large, :N].transpose(1, 2).flatten(1)
            for whole, part in (
                (A[:, 0, :small], p["A"][:, :small]), (B[:large, :N], columns.view(large, N, r))
            ):  # fmt: skip
                if (whole.isfinite() & (whole != part)).any():
                    raise self.refuse(adapter, f"has one set of bases, paired otherwise for the "
                                               f"{N} bases of {name}")  # fmt: skip
                whole.copy_(part)
        config = {"r": r, "randlora_alpha": s * r, "save_projection": True, "bias": "none",
                  "projection_prng_key": 0, "sparse": False, "very_sparse": False}  # fmt: skip
        shared = {"randlora_A": A.nan_to_num(), "randlora_B": B.nan_to_num()}
        return Written(config, layers, shared)

    def load(self, file: File) -> Read:
        if not file.get("save_projection", True):  # drawn in bf16 or fp16, as the machine has it
            raise file.refuse("save_projection")
        whole = {key: file.shared.pop(key) for key in self.shared}
        for name, found in file.layers.items():  # PEFT writes them with each layer again
            for key in self.shared:
                if key in found and not torch.equal(found.pop(key), whole[key]):
                    raise Incompatible(f"{file.path}: {name} has a {key} of its own")
        read, r = super().load(file), file.config["r"]
        for m, n in set(map(file.shape, read.ranks)):
            small, N = min(m, n), -(-min(m, n) // r)
            columns = whole["randlora_B"][: max(m, n), :N].flatten(1)
            key = f"shared.{read.choice.form.key(m, n, r)}"
            read.tensors[f"{key}.A"] = whole["randlora_A"][:, 0, :small]
            read.tensors[f"{key}.B"] = columns.unflatten(1, (r, N)).transpose(1, 2)
        return read

    def choose(self, file: File, ranks: Mapping[str, int], p: Named) -> Choice:
        form = {"name": "randlora", "rule": "peft", "share": "shape"}
        return choose("randlora", file.config["r"], file.config["randlora_alpha"], form=form)

    def read(self, file: File, name: str, found: Named) -> tuple[int, Named]:
        p = {"l": found.pop("randlora_lambda").mT, "g": found.pop("randlora_gamma")}
        return file.config["r"], p


class VBLoRA(Method):
    kind = "VBLORA"
    preset = "vblora"
    names: ClassVar = {"vblora_logits_A": "logits_A", "vblora_logits_B": "logits_B"}
    shared = ("vblora_vector_bank",)
    reads = ("r", "num_vectors", "vector_length", "topk")
    ignores = ("init_vector_bank_bound", "init_logits_std")
    dropout = "vblora_dropout"
    kinds = (Kind, Conv1DKind)

    def save(self, adapter: Adapter) -> Written:
        form: Any = adapter.choice.form
        for name, layer in adapter.layers.items():
            if layer.in_features % form.length or layer.out_features % form.length:
                raise self.refuse(adapter, f"needs sides that length={form.length} divides, unlike "
                                           f"{name}'s")  # fmt: skip
        written = super().save(adapter)
        written.config |= {"num_vectors": form.vectors, "vector_length": form.length,
                           "topk": form.topk, "bias": "none"}  # fmt: skip
        written.shared["vblora_vector_bank"] = adapter.shared["all"]["bank"]
        return written

    def load(self, file: File) -> Read:
        read = super().load(file)
        read.tensors["shared.all.bank"] = file.shared.pop("vblora_vector_bank")
        return read

    def choose(self, file: File, ranks: Mapping[str, int], p: Named) -> Choice:
        form = {"name": "vblora", "vectors": file.get("num_vectors", 256),
                "length": file.get("vector_length", 256), "topk": file.get("topk", 2)}  # fmt: skip
        return choose("vblora", file.config["r"], form=form)


class FourierFT(Method):
    """The same places from the same seed; one scale, others go into c."""

    kind = "FOURIERFT"
    preset = "fourierft"
    names: ClassVar = {"fourierft_spectrum": "c"}
    reads = ("n_frequency", "n_frequency_pattern", "scaling", "random_loc_seed")
    kinds = (Kind, Conv1DKind)

    def config(self, adapter: Adapter) -> dict[str, Any]:
        form: Any = adapter.choice.form
        return {**dotted(self, "n_frequency", ranks_of(adapter)), "scaling": first_scale(adapter),
                "random_loc_seed": form.entries, "bias": "none"}  # fmt: skip

    def save(self, adapter: Adapter) -> Written:
        written, s = super().save(adapter), first_scale(adapter)
        for name, layer in adapter.layers.items():
            written.layers[name]["fourierft_spectrum"] = layer.params["c"] * (layer.full_s / s)
        return written

    def choose(self, file: File, ranks: Mapping[str, int], p: Named) -> Choice:
        n = file.get("n_frequency", 1000)
        form = {"name": "fourierft", "zero": True, "entries": file.get("random_loc_seed", 777)}
        return choose("fourierft", n, alpha=file.get("scaling", 150.0) * n, form=form)

    def read(self, file: File, name: str, found: Named) -> tuple[int, Named]:
        _, p = super().read(file, name, found)
        return len(p["c"]), p

    def scale(self, file: File, name: str, choice: Choice, r: int) -> float:
        return file.get("scaling", 150.0)


class C3A(Method):
    kind = "C3A"
    preset = "c3a"
    names: ClassVar = {"c3a_kernel": "w"}
    reads = ("block_size", "block_size_pattern")

    def config(self, adapter: Adapter) -> dict[str, Any]:
        sizes = {name: layer.params["w"].shape[-1] for name, layer in adapter.layers.items()}
        return dotted(self, "block_size", sizes) | {"bias": "none"}

    def choose(self, file: File, ranks: Mapping[str, int], p: Named) -> Choice:
        size = max(w.shape[-1] for w in p.values())
        choice = choose("c3a", form={"name": "c3a", "block_size": size})
        for name in ranks:  # of a pattern, what the largest divisors say is read
            if choice.form.shapes(*file.shape(name), 1)["w"] != tuple(p[f"{name}.w"].shape):
                raise file.refuse("block_size", "block_size_pattern")
        return choice

    def read(self, file: File, name: str, found: Named) -> tuple[int, Named]:
        _, p = super().read(file, name, found)
        return 1, p


class SHiRA(Method):
    kind = "SHIRA"
    preset = "shira"
    names: ClassVar = {"shira_weight": "entries", "shira_indices": "places"}
    ignores = ("mask_type", "random_seed")  # the indices are in the file

    def config(self, adapter: Adapter) -> dict[str, Any]:
        return super().config(adapter) | {"mask_type": "random"}

    def write(self, layer: Adapted) -> Named:
        places, n = layer.params["places"], layer.in_features
        indices = torch.stack([places // n, places % n]).int()
        return {"shira_weight": layer.params["entries"], "shira_indices": indices}

    def read(self, file: File, name: str, found: Named) -> tuple[int, Named]:
        r, p = super().read(file, name, found)
        rows, columns = p["places"].long()
        return r, p | {"places": rows * file.shape(name)[1] + columns}


# ----------------------------------------------------------------------------------- rotations


def blocks(method: Method, adapter: Adapter) -> tuple[int, int]:
    """(size of the blocks, 0) where all layers have one size, else (0, their number)."""
    numbers = {layer.in_features // layer.rank for layer in adapter.layers.values()}
    if len(set(ranks_of(adapter).values())) > 1 and len(numbers) == 1:
        return 0, numbers.pop()
    return method.one("block size", ranks_of(adapter).values()), 0


class OFT(Method):
    """PEFT's exact transform turns the other way, so Q is -Q there; its series of 3 and of 4 terms
    are the one that has 4 here. Before 0.18 the series was another one."""

    kind = "OFT"
    preset = "oft"
    also = ("oft_R.weight",)
    reads = ("r", "oft_block_size", "use_cayley_neumann", "num_cayley_neumann_terms")
    ignores = ("eps",)

    def config(self, adapter: Adapter) -> dict[str, Any]:
        form: Any = adapter.choice.form
        if form.neumann == 3:
            raise self.refuse(adapter, "has no series of neumann=3 terms")
        size, number = blocks(self, adapter)
        return {"oft_block_size": size, "r": number, "use_cayley_neumann": form.neumann > 0,
                "num_cayley_neumann_terms": form.neumann or 5, "bias": "none",
                "peft_version": "0.18.0"}  # fmt: skip

    def write(self, layer: Adapted) -> Named:
        turned = layer.form.neumann > 0  # type: ignore[attr-defined]
        return {"oft_R.weight": layer.params["Q"] if turned else -layer.params["Q"]}

    def choose(self, file: File, ranks: Mapping[str, int], p: Named) -> Choice:
        form = {"name": "oft", "neumann": self.terms(file)}
        return choose("oft", max(ranks.values()), form=form)

    def terms(self, file: File) -> int:
        if not file.get("use_cayley_neumann", True):
            return 0
        numbers = re.match(r"(\d+)\.(\d+)", str(file.config.get("peft_version")))
        if numbers is None or tuple(map(int, numbers.groups())) < (0, 18):
            raise file.refuse("use_cayley_neumann", "peft_version")
        terms = file.get("num_cayley_neumann_terms", 5)
        if terms < 3:
            raise file.refuse("num_cayley_neumann_terms")
        return max(terms, 4)

    def read(self, file: File, name: str, found: Named) -> tuple[int, Named]:
        Q = found.pop("oft_R.weight")
        return file.shape(name)[1] // len(Q), {"Q": Q if self.terms(file) else -Q}


class BOFT(Method):
    """PEFT trains all of Q, uses its skew half, and turns the other way. Without its CUDA extension
    it builds one factor, whatever its settings say: the tensor has the number."""

    kind = "BOFT"
    preset = "boft"
    also = ("boft_R", "boft_s")
    reads = ("boft_block_size", "boft_block_num", "boft_n_butterfly_factor")

    def config(self, adapter: Adapter) -> dict[str, Any]:
        form: Any = adapter.choice.form
        size, number = blocks(self, adapter)
        return {"boft_block_size": size, "boft_block_num": number,
                "boft_n_butterfly_factor": form.depth, "bias": "none"}  # fmt: skip

    def write(self, layer: Adapted) -> Named:
        from .oft import skew

        return {
            "boft_R": -skew(layer.params["Q"], layer.rank),
            "boft_s": layer.params["g"][:, None],
        }

    def choose(self, file: File, ranks: Mapping[str, int], p: Named) -> Choice:
        depth = len(next(Q for key, Q in p.items() if key.endswith(".Q")))
        return choose("boft", max(ranks.values()), form={"name": "boft", "depth": depth})

    def read(self, file: File, name: str, found: Named) -> tuple[int, Named]:
        R = found.pop("boft_R")
        b = R.shape[-1]
        row, column = torch.triu_indices(b, b, 1)
        Q = 0.5 * (R.mT - R)[..., row, column]
        return b, {"Q": Q, "g": found.pop("boft_s").flatten()}


class HRA(Method):
    kind = "HRA"
    preset = "hra"
    names: ClassVar = {"hra_u": "u"}

    def config(self, adapter: Adapter) -> dict[str, Any]:
        return super().config(adapter) | {"apply_GS": False, "bias": "none"}


# --------------------------------------------------------------------------------------- gains


class IA3(Method):
    kind = "IA3"
    preset = "ia3"
    also = ("ia3_l",)
    reads = ()
    ignores = ("feedforward_modules", "init_ia3_weights")  # the tensor's shape says which
    kinds = (Kind, Conv1DKind)

    def config(self, adapter: Adapter) -> dict[str, Any]:
        inner = [name for name, layer in adapter.layers.items() if "columns" in layer.params]
        return {"feedforward_modules": "|".join(map(re.escape, inner)) if inner else []}

    def write(self, layer: Adapted) -> Named:
        p = layer.params
        return {"ia3_l": p["rows"][:, None] if "rows" in p else p["columns"][None]}

    def choose(self, file: File, ranks: Mapping[str, int], p: Named) -> Choice:
        inputs = ",".join(name for name, r in ranks.items() if r == 2)
        return choose("ia3", form={"name": "ia3", "inputs": inputs})

    def read(self, file: File, name: str, found: Named) -> tuple[int, Named]:
        gain = found.pop("ia3_l")
        rows = tuple(gain.shape) == (file.shape(name)[0], 1)
        return (1, {"rows": gain[:, 0]}) if rows else (2, {"columns": gain[0]})


class LNTuning(Method):
    """PEFT has the whole bias, the form its change."""

    kind = "LN_TUNING"
    preset = "ln_tuning"
    also = ("ln_tuning_layers.weight", "ln_tuning_layers.bias")
    reads = ()
    kinds = (NormKind,)

    def config(self, adapter: Adapter) -> dict[str, Any]:
        return {}

    def write(self, layer: Adapted) -> Named:
        written = {"ln_tuning_layers.weight": layer.params["gain"][:, 0]}
        return written if layer.bias is None else written | {"ln_tuning_layers.bias": layer.bias}

    def choose(self, file: File, ranks: Mapping[str, int], p: Named) -> Choice:
        return choose("ln_tuning")

    def read(self, file: File, name: str, found: Named) -> tuple[int, Named]:
        p = {"gain": found.pop("ln_tuning_layers.weight")[:, None]}
        bias: Tensor | None = getattr(file.modules[name], "bias", None)
        if bias is None:
            return 0, p
        own = found.pop("ln_tuning_layers.bias")
        return 1, p | {"b": own - bias.detach().to(own)}


class RoAd(Method):
    kind = "ROAD"
    preset = "road"
    names: ClassVar = {"road_alpha": "a", "road_theta": "t"}
    reads = ("variant", "group_size")

    def config(self, adapter: Adapter) -> dict[str, Any]:
        form: Any = adapter.choice.form
        group = self.one("group size", ranks_of(adapter).values())
        return {"variant": f"road_{form.variant}", "group_size": group}

    def write(self, layer: Adapted) -> Named:
        return {theirs: t.flatten() for theirs, t in super().write(layer).items()}

    def choose(self, file: File, ranks: Mapping[str, int], p: Named) -> Choice:
        form = {"name": "road", "variant": self.variant(file), "group": file.get("group_size", 64)}
        return choose("road", form=form)

    def variant(self, file: File) -> int:
        return int(str(file.get("variant", "road_1")).removeprefix("road_"))

    def read(self, file: File, name: str, found: Named) -> tuple[int, Named]:
        _, p = super().read(file, name, found)
        group = file.get("group_size", 64)
        shape = (-1, self.variant(file), group // 2)
        return group, {k: t.view(shape) for k, t in p.items()}


METHODS: tuple[Method, ...] = (
    LoRA(), AdaLoRA(), HiRA(), LoHa(), LoKr(), MiSS(), BAT(), DeLoRA(), GraLoRA(), VeRA(),
    RandLoRA(), VBLoRA(), FourierFT(), C3A(), SHiRA(), OFT(), BOFT(), HRA(), IA3(), LNTuning(),
    RoAd(),
)  # fmt: skip


def method_of(adapter: Adapter) -> Method:
    """The method that says the adapter's form: its own, else LoRA where it has two factors."""
    form, layers = adapter.choice.form, adapter.layers.values()
    own = form.name
    if own == "triplet" and not any(layer.subtracted is not None for layer in layers):
        own = "adalora" if len({(layer.rank, layer.full_s) for layer in layers}) == 1 else own
    for method in METHODS[1:]:
        if method.preset == own:
            return method
    if form.name == "dora" or all(form.factors(la.params) is not None for la in layers):  # type: ignore[arg-type]
        return METHODS[0]
    raise Incompatible(
        f"PEFT's format has no place for form {form.name}: it takes LoRA, DoRA, other forms that "
        f"say two factors (a method `factors`), and "
        f"{', '.join(method.preset for method in METHODS[1:])}; export it merged instead"
    )
