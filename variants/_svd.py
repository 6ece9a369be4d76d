"""Singular triplets of a matrix, any slice of them: exact, or by a seeded block Krylov method.

One engine for every start that is made of a decomposition: a source matrix M (the weight, a
gradient, weight times covariance), a slice of its triplets (`sliced`), a split into two factors
(`balanced`); whether the base gives up what they hold is the init's to say. Factors are cached.

The Krylov method (Musco & Musco 2015, arXiv:1504.05477) keeps every block of the power iteration
where `torch.svd_lowrank` keeps the last, each made orthogonal to those before it, since rounding
leaves a power little that is new: six to twelve blocks of r + 16 columns are exact to fp32 on
decaying spectra. The residual decides how many; on a flat spectrum, where no cheap method finds the
vectors, the exact one answers instead.

Slices of a known spectrum, in order; the product of `balanced` is the part divided by s, and both
factors are of one size:

>>> import torch
>>> M, g = torch.diag(torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])), torch.Generator().manual_seed(0)
>>> [sliced(M, 2, which, "exact", g)[1].tolist() for which in ("top", "middle", "last")]
[[5.0, 4.0], [4.0, 3.0], [2.0, 1.0]]
>>> A, B = balanced(*sliced(M, 2, "top", "exact", g), s=4.0)
>>> [round(v, 4) for v in (4.0 * B @ A).diag().tolist()], round((A.norm() / B.norm()).item(), 4)
([5.0, 4.0, 0.0, 0.0, 0.0], 1.0)

Krylov's triplets are the exact ones on a flat spectrum too, and do not use up the generator:

>>> flat, state = torch.randn(500, 600, generator=g), g.get_state()
>>> (U, S, Vh), (U1, S1, Vh1) = sliced(flat, 4, "top", "krylov", g), exact(flat, 4)
>>> bool(torch.dist((U * S) @ Vh, (U1 * S1) @ Vh1) < 1e-2), torch.equal(g.get_state(), state)
(True, True)

Random triplets are different ones, by the seed alone:

>>> state, _ = g.get_state(), sliced(M, 4, "random", "exact", g)
>>> torch.equal(g.get_state(), state)
True
>>> all(len(set(sliced(M, 4, "random", "exact", torch.Generator().manual_seed(i))[1].tolist())) == 4
...     for i in range(5))
True

What later stages find stands beside the first with its own signs, U^T M V = S:

>>> L, R = (torch.linalg.qr(torch.randn(400, 400, generator=g)).Q for _ in range(2))
>>> M = L * (1 - 2 * torch.randint(2, (400,), generator=g)) * torch.arange(1, 401) ** -1.0 @ R
>>> U, S, Vh = krylov(M, 33, g)
>>> torch.allclose(U.T @ M @ Vh.T, S.diag(), atol=1e-5)
True

The cache serves a rank from what was computed for a larger one, whatever the seed: 16 at first, a
power of two, or the largest of a sweep (which its driver says in the environment, `FACTORS`), so
that a sweep over ranks and seeds factorizes each matrix once. Larger files come beside smaller
ones, and which of them serves a rank does not show: the triplets are the same to the bit.

>>> [most(r, 4096, swept) for r, swept in ((4, 0), (16, 0), (17, 0), (4, 100), (5000, 0))]
[16, 16, 32, 128, 4096]
"""

import contextlib
import hashlib
import logging
import os
from pathlib import Path

import torch
from torch import Tensor

from ._registry import FACTORS, Incompatible

log = logging.getLogger("variants")

OVERSAMPLE, MIN_BLOCKS, MAX_BLOCKS = 16, 6, 12
RESIDUAL = 1e-5  # of the largest singular value
CACHED_FROM = 2**20  # entries: below, computing is cheaper than the file
AT_FIRST = 16  # triplets, of the first stage: fewer take hardly less time
METHODS = ("exact", "krylov")
SLICES = ("top", "last", "middle", "random")
NESTED = ("top", "last")  # those of which a larger one holds every smaller one
Triplets = tuple[Tensor, Tensor, Tensor]  # U [m, r], S [r] descending, Vh [r, n]


def exact(W: Tensor, r: int) -> Triplets:
    """The top r triplets by the full decomposition."""
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return U[:, :r].contiguous(), S[:r].clone(), Vh[:r].contiguous()


def krylov(W: Tensor, r: int, generator: torch.Generator) -> Triplets:
    """The top r triplets by block Krylov iteration, or by `exact` where that would not pay.

    By stages that r does not change: `AT_FIRST`, as many again of what those leave of W, twice as
    many of what all those leave. So what is found for a rank begins, to the bit, with what is found
    for a smaller one.
    """
    if W.shape[0] < W.shape[1]:
        V, S, Uh = krylov(W.mT, r, generator)
        return Uh.mT.contiguous(), S, V.mT.contiguous()
    U, S, V = W.new_zeros(W.shape[0], 0), W.new_zeros(0), W.new_zeros(W.shape[1], 0)
    most, least = 0.0, MIN_BLOCKS
    while len(S) < r:
        stage = _stage(W, V, max(len(S), AT_FIRST), most, least, generator)
        last = stage is None
        if stage is None:
            U1, S1, Vh1 = exact(W - (W @ V) @ V.mT, W.shape[1] - len(S))
        else:
            (U1, S1, Vh1), least = stage  # what follows lies closer together
        U, V, S = _beside(U, U1), _beside(V, Vh1.mT), torch.cat((S, S1))
        most = most or S1[0].item()
        if last:
            break
    S = torch.cummin(S, dim=0).values  # of equal ones a later stage's may be larger by rounding
    return U[:, :r].contiguous(), S[:r].clone(), V[:, :r].mT.contiguous()


def _beside(basis: Tensor, more: Tensor) -> Tensor:
    """Both side by side, `more` made orthogonal to the basis: where little is left of W but
    rounding, its directions are any."""
    if not basis.shape[1]:
        return more
    Q, R = torch.linalg.qr(torch.cat((basis, more), dim=1))
    new = slice(basis.shape[1], None)
    sign = torch.where(R.diagonal()[new] < 0, -1.0, 1.0).to(Q.dtype)
    return torch.cat((basis, Q[:, new] * sign), dim=1)


def _stage(
    W: Tensor, known: Tensor, r: int, most: float, least: int, generator: torch.Generator
) -> tuple[Triplets, int] | None:
    """The top r triplets of W [m, n], m >= n, beside those known, and the blocks that they took;
    None where the iteration does not get there.

    Args:
        known: the right vectors found before [n, k]; what is orthogonal to them sees the rest of W.
        most: the largest singular value, where k > 0.
        least: how many blocks there are before it is asked whether they do.
    """
    (n, k), q = known.shape, r + OVERSAMPLE
    columns = min(q * MAX_BLOCKS, n // 2)  # more would be nearly all there is
    V, WV = W.new_empty(n, k + columns), W.new_empty(W.shape[0], columns)  # V: orthonormal
    V[:, :k] = known
    block = _apart(torch.randn(n, q, generator=generator).to(W), known, generator)
    ahead = W @ block
    for count in range(1, columns // q + 1):
        have = q * count
        block = V[:, k + have - q : k + have] = _apart(
            W.mT @ ahead, V[:, : k + have - q], generator
        )
        ahead = WV[:, have - q : have] = W @ block
        if count >= least and count % 2 == 0:
            U, S, Yh = torch.linalg.svd(WV[:, :have], full_matrices=False)
            U, S, Vh = U[:, :r], S[:r], Yh[:r] @ V[:, k : k + have].mT
            # W V = U S holds by construction; W^T U = V S is what convergence adds
            off = W.mT @ U - Vh.mT * S
            off -= known @ (known.mT @ off)
            residual = torch.linalg.vector_norm(off, dim=0).max()
            if residual <= RESIDUAL * (most or S[0]):
                return (U, S, Vh), count
    return None


def _apart(block: Tensor, basis: Tensor, generator: torch.Generator) -> Tensor:
    """An orthonormal block beside the basis. Columns of which the basis leaves but rounding, as
    where W has no more directions, are drawn anew."""
    before = torch.linalg.vector_norm(block, dim=0)
    block = block - basis @ (basis.mT @ block)
    lost = torch.linalg.vector_norm(block, dim=0) <= 100 * torch.finfo(block.dtype).eps * before
    if lost.any():
        block = torch.where(lost, torch.randn(block.shape, generator=generator).to(block), block)
    for _ in range(2):  # once more than exact arithmetic asks for
        block = torch.linalg.qr(block - basis @ (basis.mT @ block)).Q
    return block


def top(W: Tensor, r: int, method: str, generator: torch.Generator) -> Triplets:
    """The top r triplets of W (fp32 or fp64), from the cache where W is large and known."""
    return sliced(W, r, "top", method, generator)


def sliced(
    M: Tensor, r: int, which: str, method: str, generator: torch.Generator, cached: bool = True
) -> Triplets:
    """r triplets of M, S descending: the `top` ones, the `last`, the `middle`, or `random` ones.

    `method` is of the top ones, `exact` or `krylov`; all others need the full decomposition.
    """
    if which not in SLICES:
        raise ValueError(f"which={which}: no such slice; choices: {', '.join(SLICES)}")
    if method not in METHODS:
        raise Incompatible(f"method={method}: no such decomposition; choices: exact, krylov")
    if M.numel() < CACHED_FROM or not cached:
        return _compute(M, r, which, method, generator)
    nested = which in NESTED
    rank = most(r, min(M.shape), int(os.environ.get(FACTORS, 0))) if nested else r
    stem = _stem(M, which, method, 0 if nested else r, generator)
    found = _read(stem, r, M.device)
    if found is None:
        found = _compute(M, rank, which, method, generator)
        _write(stem.with_name(f"{stem.name}-{rank}.safetensors"), found)
    U, S, Vh = found
    part = slice(len(S) - r, None) if which == "last" else slice(r)
    return U[:, part].contiguous(), S[part].clone(), Vh[part].contiguous()


def most(r: int, limit: int, swept: int) -> int:
    """How many triplets are computed where r are asked for first, of a matrix that has `limit` and
    in a sweep whose largest rank is `swept`."""
    return min(limit, 1 << (max(r, swept, AT_FIRST) - 1).bit_length())


def leading(M: Tensor, r: int) -> Triplets:
    """The top r triplets of a statistic, which is met once: no cache, and a seed of its own."""
    return sliced(M, r, "top", "krylov", torch.Generator().manual_seed(0), cached=False)


def balanced(U: Tensor, S: Tensor, Vh: Tensor, s: float = 1.0) -> tuple[Tensor, Tensor]:
    """(A, B) with s B A = U S V^T, each with the root of S / s."""
    root = (S / s).sqrt()
    return root[:, None] * Vh, U * root


def _compute(M: Tensor, r: int, which: str, method: str, generator: torch.Generator) -> Triplets:
    if which == "top":  # of one seed, so that the seeds of a sweep share what is found
        own = torch.Generator().manual_seed(0)
        return exact(M, r) if method == "exact" else krylov(M, r, own)
    U, S, Vh = torch.linalg.svd(M, full_matrices=False)
    count = len(S)
    if which == "random":
        # from the seed, not from where the generator is: what is drawn after does not hang on the
        # cache
        own = torch.Generator().manual_seed(generator.initial_seed())
        chosen = torch.randperm(count, generator=own)[:r].sort().values.to(M.device)
        return U[:, chosen], S[chosen], Vh[chosen]
    first = count - r if which == "last" else (count - r) // 2
    cut = slice(first, first + r)
    return U[:, cut].contiguous(), S[cut].clone(), Vh[cut].contiguous()


def _stem(M: Tensor, which: str, method: str, r: int, generator: torch.Generator) -> Path:
    """Where factors lie, less how many: named by all else that they depend on, the content of M,
    slice, method, and where it matters rank and seed."""
    seed = generator.initial_seed() if which == "random" else 0
    rule = f"{which} {method if which == 'top' else 'exact'} {r} "
    rule += f"{OVERSAMPLE} {MIN_BLOCKS} {MAX_BLOCKS} {RESIDUAL} {AT_FIRST} apart"  # Krylov's
    digest = hashlib.sha256(f"{tuple(M.shape)} {M.dtype} {rule} {seed}".encode())
    digest.update(M.detach().contiguous().cpu().view(torch.uint8).numpy().data)
    root = os.environ.get("LORA_CACHE") or Path.home() / ".cache" / "lora-variants-lab"
    return Path(root) / "factors" / digest.hexdigest()


def _read(stem: Path, r: int, device: torch.device) -> Triplets | None:
    """From the smallest file there that has r triplets."""
    from safetensors.torch import load_file

    files = {int(file.stem.rpartition("-")[2]): file
             for file in stem.parent.glob(f"{stem.name}-*.safetensors")}  # fmt: skip
    for count in sorted(count for count in files if count >= r):
        if not os.access(files[count], os.R_OK):  # another user's
            continue
        try:
            found = load_file(files[count], device=str(device))
            return found["U"], found["S"], found["Vh"]
        except Exception:  # cut short or not ours: computed again, and replaced
            with contextlib.suppress(OSError):
                files[count].unlink(missing_ok=True)
    return None


def _write(path: Path, found: Triplets) -> None:
    from ._io import write_tensors

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(path, dict(zip(("U", "S", "Vh"), found, strict=True)))
    except OSError as error:
        log.warning("factors are not kept, and will be computed again: %s", error)
