"""PEFT's LoRA, with all that it holds (rsLoRA, DoRA, KaSA, the inits), and its AdaLoRA."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ._adapter import Adapter, Choice, choose
from ._kinds import Conv1DKind, Conv2dKind, EmbeddingKind, Kind, kind_of, matrix_of
from ._layer import Adapted
from ._peft_method import File, Method, Named, Read, Written, patterned
from ._registry import Incompatible
from ._svd import exact


class LoRA(Method):
    """Every form with two factors, by alpha = s r of each layer; DoRA's magnitude; KaSA read.

    An init that moved the base doubles the rank: A = [A; A0], B = [B, -B0] on the untouched base.
    """

    kind = "LORA"
    preset = "lora"
    names: ClassVar = {
        "lora_A.weight": "A", "lora_B.weight": "B", "lora_embedding_A": "A",
        "lora_embedding_B": "B", "lora_magnitude_vector": "m", "lora_diag": "d",
    }  # fmt: skip
    reads = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_dora", "use_rslora",
             "kasa_config", "init_lora_weights")  # fmt: skip
    ignores = ("eva_config", "corda_config", "lora_ga_config", "loftq_config", "megatron_core",
               "qalora_group_size", "runtime_config")  # fmt: skip
    dropout = "lora_dropout"
    kinds = (Kind, Conv1DKind, EmbeddingKind, Conv2dKind)

    def save(self, adapter: Adapter) -> Written:
        layers, ranks, alphas = {}, {}, {}
        dora = adapter.choice.form.name == "dora"
        for name, layer in adapter.layers.items():
            A, B, s = factors(layer)
            m = layer.params["m"] if dora else None
            if isinstance(layer.kind, EmbeddingKind):
                layers[name] = {"lora_embedding_A": A, "lora_embedding_B": B}
            elif isinstance(layer.kind, Conv2dKind):
                _, *kernel = layer.kind.shell.weight.shape
                layers[name] = {
                    "lora_A.weight": A.view(-1, *kernel), "lora_B.weight": B[..., None, None]
                }  # fmt: skip
                m = None if m is None else m.view(1, -1, 1, 1)
            else:
                layers[name] = {"lora_A.weight": A, "lora_B.weight": B}
            if m is not None:
                layers[name]["lora_magnitude_vector"] = m
            ranks[name], alphas[name] = A.shape[0], s * A.shape[0]
        config = {
            **patterned("r", ranks), **patterned("lora_alpha", alphas), "bias": "none",
            "init_lora_weights": True, "use_dora": dora, "use_rslora": False,
        }  # fmt: skip
        return Written(config, layers, {})

    def takes(self, shell: Any) -> bool:
        if isinstance(shell, nn.Embedding):
            return type(shell) is nn.Embedding and shell.max_norm is None
        if isinstance(shell, nn.Conv2d):  # what PEFT hands on to its own convolution
            plain = shell.groups == 1 and shell.padding_mode == "zeros"
            return plain and shell.dilation == (1, 1)
        return True

    def choose(self, file: File, ranks: Mapping[str, int], p: Named) -> Choice:
        init, kasa = initial(file), file.config.get("kasa_config")
        parts: dict[str, Any] = {"scale": "rslora" if file.get("use_rslora", False) else "standard"}
        if kasa:
            if file.get("use_dora", False):
                raise file.refuse("use_dora", "kasa_config")
            kasa = {"name": "kasa", "rule": "peft"} | kasa
            return choose("kasa", file.config["r"], file.config["lora_alpha"], allocation=kasa,
                          **parts)  # fmt: skip
        preset = "dora" if file.get("use_dora", False) else "lora"
        if init == "mica":  # its B does not train
            parts["init"] = "mica"
        return choose(preset, file.config["r"], file.config["lora_alpha"], **parts)

    def read(self, file: File, name: str, found: Named) -> tuple[int, Named]:
        p = {own: found.pop(theirs) for theirs, own in self.names.items() if theirs in found}
        needed = {"A", "B"} | ({"m"} if file.get("use_dora", False) else set())
        needed |= {"d"} if file.config.get("kasa_config") else set()
        if set(p) != needed:
            raise Incompatible(f"{file.path}: layer {name} has the tensors {sorted(p)}, not "
                               f"{sorted(needed)}")  # fmt: skip
        p["A"], p["B"] = p["A"].flatten(1), p["B"].flatten(1)
        if "m" in p:
            p["m"] = p["m"].flatten()
        return len(p["A"]), p

    def scale(self, file: File, name: str, choice: Choice, r: int) -> float:
        alpha = file.pattern("alpha_pattern", name, file.config["lora_alpha"])
        return choice.scale.value(alpha, r)

    def load(self, file: File) -> Read:
        read = super().load(file)
        for name, r in read.ranks.items():
            if kind_of(file.modules[name]) in (Kind, Conv1DKind):
                moved = taken(file, name, r, read.scales[name])
                if moved is not None:
                    read.tensors[f"{name}.subtracted.A"] = moved[0]
                    read.tensors[f"{name}.subtracted.B"] = moved[1]
        return read


def initial(file: File) -> str:
    """The init of a LoRA file; one that moved the base past repeating is refused."""
    init = str(file.get("init_lora_weights", True)).lower()
    if init.startswith(("pissa_niter_", "corda", "lora_ga", "loftq")):
        raise Incompatible(
            f"{file.path}: init_lora_weights={init} moved the base in a way that its files do not "
            f"say; save it with path_initial_model_for_weight_conversion"
        )
    if init not in ("true", "false", "none", "gaussian", "eva", "orthogonal", "mica", "pissa",
                    "olora"):  # fmt: skip
        raise file.refuse("init_lora_weights")
    return init


def taken(file: File, name: str, r: int, s: float) -> tuple[Tensor, Tensor] | None:
    """(A0, B0) that PEFT takes out of the base anew at each loading: its files leave them out."""
    W, init = matrix_of(file.modules[name]).detach().float(), initial(file)
    if file.config.get("kasa_config"):
        if init not in ("true", "false", "none", "gaussian", "eva"):
            raise file.refuse("init_lora_weights", "kasa_config")
        U, S, Vh = exact(W, min(W.shape))
        return Vh[-r:], U[:, -r:] * S[-r:]
    if init == "pissa":
        U, S, Vh = exact(W, r)
        root = (S / s).sqrt()
        return root[:, None] * Vh, s * U * root
    if init == "olora":
        if kind_of(file.modules[name]) is Conv1DKind:
            raise file.refuse("init_lora_weights")
        Q, R = torch.linalg.qr(W)
        return R[:r], s * Q[:, :r]
    return None


def factors(layer: Adapted) -> tuple[Tensor, Tensor, float]:
    """(A, B, s) of W = W_original + s B A, whatever low-rank form and init the layer has."""
    p: Any = layer.params
    found = (p["A"], p["B"]) if layer.form.name == "dora" else layer.form.factors(p)
    assert found is not None
    A, B = found
    if layer.subtracted is not None:
        A0, B0 = layer.subtracted
        A, B = _balanced(torch.cat([A, A0]), torch.cat([B, -B0 / layer.full_s], dim=1))
    return A.detach(), B.detach(), layer.full_s


def _balanced(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of the same product, as small as they can be, of the same rank or, where that is
    above the matrix's, of the latter: what was trained is the small difference of two large parts,
    which fp32 products would each round."""
    left, right = torch.linalg.qr(B.double()), torch.linalg.qr(A.double().mT)
    U, S, Vh = torch.linalg.svd(left.R @ right.R.mT, full_matrices=False)
    root = S.sqrt()
    return (root[:, None] * Vh @ right.Q.mT).to(A), (left.Q @ U * root).to(B)


class AdaLoRA(Method):
    """All triplets, the pruned ones with E = 0. PEFT divides alpha by (init_r + 1e-5).

    It has one initial rank and one alpha: other triplets are written as LoRA.
    """

    kind = "ADALORA"
    preset = "adalora"
    names: ClassVar = {"lora_A": "Q", "lora_B": "P", "lora_E": "E"}
    reads = ("init_r", "lora_alpha")
    ignores = (*LoRA.ignores, "r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2",
               "orth_reg_weight", "total_step", "rank_pattern", "use_rslora",
               "init_lora_weights")  # fmt: skip
    dropout = "lora_dropout"
    kinds = (Kind, Conv1DKind)

    def config(self, adapter: Adapter) -> dict[str, Any]:
        layer = next(iter(adapter.layers.values()))
        rank, s = layer.rank, layer.full_s
        return {
            "r": rank, "init_r": rank, "target_r": rank, "lora_alpha": s * (rank + 1e-5),
            "rank_pattern": None, "total_step": max(1, adapter.step), "bias": "none",
            "init_lora_weights": True,
        }  # fmt: skip

    def write(self, layer: Adapted) -> Named:
        return super().write(layer) | {"lora_E": layer.params["E"][:, None]}

    def choose(self, file: File, ranks: Mapping[str, int], p: Named) -> Choice:
        rank, alpha = file.get("init_r", 12), file.get("lora_alpha", 8)
        return choose("adalora", rank=rank, alpha=alpha if alpha > 0 else rank)

    def read(self, file: File, name: str, found: Named) -> tuple[int, Named]:
        _, p = super().read(file, name, found)
        return len(p["Q"]), p | {"E": p["E"].view(-1)}

    def scale(self, file: File, name: str, choice: Choice, r: int) -> float:
        return choice.s(file.get("init_r", 12))
