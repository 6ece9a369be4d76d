"""RandLoRA: Full-Rank Parameter-Efficient Fine-Tuning of Large Models (Albert et al., ICLR 2025),
arXiv:2502.00987.

    W = W0 + s / sqrt(N) sum_j B_j diag(l_j) A diag(g_j),    N = ceil(min(m, n) / r)

A [r, k] and the N bases B_j [K, r] are random, frozen and shared by all layers; l_j [r] and g_j [k]
are trained, k = min(m, n), K = max(m, n); where m < n the sum is transposed. l = 0 and g = 1 / k,
which is what the code does whatever it says before. A smaller r has more bases and more parameters.
Official code: PaulAlbert31/RandLoRA, peft/src/peft/tuners/randlora: s = alpha / r with alpha = 2r,
and the 1 / sqrt(N) of Appendix C.4. PEFT, by the same author, has no sqrt(N) and alpha = 20r
(`rule=peft`). Both pair B and the scaled A in another order of the columns, which for random bases
is another draw; the order here is the paper's. The bases have unit deviation; `basis` makes them
ternary, with 1 entry in 3 (`sparse`) or 1 in sqrt(k) (`very_sparse`) not zero.

The change has full rank, whatever r; and one basis is B_j diag(l_j) A diag(g_j):

>>> import torch
>>> form, g = RandLoRA(), torch.Generator().manual_seed(0)
>>> p = form.start_shared(9, 6, 2, g, torch.empty(0))
>>> p |= {"l": torch.ones(3, 2), "g": torch.rand(3, 6, generator=g)}
>>> int(torch.linalg.matrix_rank(form.weight(torch.zeros(9, 6), p, 1.0)))
6
>>> p["l"] = torch.tensor([[0.0, 0.0], [2.0, 3.0], [0.0, 0.0]])
>>> one = p["B"][:, 1] @ p["l"][1].diag() @ p["A"] @ p["g"][1].diag() / 3**0.5
>>> torch.allclose(form.weight(torch.zeros(9, 6), p, 1.0), one, atol=1e-5)
True
>>> torch.allclose(form.weight(torch.zeros(6, 9), p, 1.0), one.T, atol=1e-5)
True
>>> torch.allclose(form.weight(torch.zeros(6, 6), p, 1.0), one[:6], atol=1e-5)
True
>>> start = form.start(torch.zeros(9, 4), 3, 1.0, g)
>>> start["l"].tolist(), start["g"].tolist()
([[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]], [[0.25, 0.25, 0.25, 0.25], [0.25, 0.25, 0.25, 0.25]])
>>> [round(p[k].std().item(), 4) for k in "AB"]
[1.0, 1.0]
>>> for basis in ("sparse", "very_sparse"):
...     B = RandLoRA(basis=basis).start_shared(100, 100, 50, g, torch.empty(0))["B"]
...     print(len(B.unique()), round((B != 0).float().mean().item(), 1))
3 0.3
3 0.1
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ._api import Form, Tensors
from ._layer import Adapted
from ._registry import Incompatible, preset


@dataclass(frozen=True)
class RandLoRA(Form, name="randlora"):
    """Frozen random bases of full rank together, trained diagonals between them."""

    rule: str = "authors"
    """`authors`: divided by sqrt(N); `peft`: not"""
    basis: str = "uniform"
    """`uniform`, `sparse` or `very_sparse`"""
    share: str = "largest"
    """`largest`: one set of bases, cut to size; `shape`: a set for each shape"""

    rank_means = "r, the rank of one basis; ceil(min(m, n) / r) of them make up the full rank"
    parameters = "-(-min(m, n)//r)*(r + min(m, n))"
    parameters_in_words = "N*(r + k), k = min(m, n), N = k/r rounded up"
    constants = ("A", "B")
    shared = ("A", "B")
    redrawn = ("A", "B")

    def __post_init__(self) -> None:
        for key, choices in (
            ("rule", ("authors", "peft")),
            ("basis", ("uniform", "sparse", "very_sparse")),
            ("share", ("largest", "shape")),
        ):
            if getattr(self, key) not in choices:
                given = f"{key}={getattr(self, key)}"
                raise Incompatible(f"form randlora: {given}; choices: {', '.join(choices)}")

    def shapes(self, m: int, n: int, r: int) -> dict[str, tuple[int, ...]]:
        k = min(m, n)
        bases = -(-k // r)
        return {"l": (bases, r), "g": (bases, k)}

    def start(self, W0: Tensor, r: int, s: float, generator: torch.Generator) -> Tensors:
        m, n = W0.shape
        shapes = self.shapes(m, n, r)
        return {"l": W0.new_zeros(shapes["l"]), "g": W0.new_full(shapes["g"], 1 / min(m, n))}

    def start_shared(
        self, m: int, n: int, r: int, generator: torch.Generator, like: Tensor
    ) -> Tensors:
        k = min(m, n)
        nonzero = {"uniform": 0.0, "sparse": 1 / 3, "very_sparse": k**-0.5}[self.basis]

        def draw(*shape: int) -> Tensor:
            u = 2 * torch.rand(*shape, generator=generator) - 1  # |u| is uniform too
            t = torch.where(u.abs() < nonzero, u.sign(), 0.0) if nonzero else u
            return (t / t.std()).to(like)

        return {"A": draw(r, k), "B": draw(max(m, n), -(-k // r), r)}

    def key(self, m: int, n: int, r: int) -> str:
        return f"r{r}" if self.share == "largest" else f"{m}x{n}-r{r}"

    def _factors(self, p: Tensors, m: int, n: int) -> tuple[Tensor, Tensor]:
        """(A [N r, n], B [m, N r]), the trained diagonals in the one on the smaller side."""
        bases, k = p["g"].shape
        small = (p["l"][:, :, None] * p["A"][:, :k] * p["g"][:, None]).flatten(0, 1)
        large = p["B"][: max(m, n), :bases].flatten(1)
        if self.rule == "authors":
            small = small / bases**0.5
        return (small, large) if m >= n else (large.mT, small.mT)

    def weight(self, W0: Tensor, p: Tensors, s: float) -> Tensor:
        A, B = self._factors(p, *W0.shape)
        return W0 + s * B @ A

    def forward(self, x: Tensor, layer: Adapted) -> Tensor:
        m, n, s = layer.out_features, layer.in_features, layer.s

        def factors(p: Tensors) -> tuple[Tensor, Tensor]:
            A, B = self._factors(p, m, n)
            return s * A, B

        return layer.frozen(x) + layer.made_product(x, layer.p, factors)


preset(
    "randlora",
    form="randlora",
    rank=15,
    alpha="2r",
    lr=1e-4,
    lr_origin="the paper's Appendix C.4 (Llama-3-8B at r = 15) and commonsense_reasoning/*.sh",
)
