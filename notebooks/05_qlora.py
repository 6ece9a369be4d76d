# %% [markdown]
# # QLoRA: NF4, double quantization, and what is built on them
#
# **Claim.** QLoRA (Dettmers et al., NeurIPS 2023, arXiv:2305.14314) freezes W in 4 bits and trains
# LoRA on top. It holds that NormalFloat, a table of quantiles of N(0, 1), is optimal for normal
# weights and gives each code as many of them (Section 3); that it beats 4-bit floats and integers
# (Table 2); that quantizing the scales again saves 0.373 bits a number and costs nothing; and that
# training on it reaches what 16 bits reach (Table 3). QPiSSA and LoftQ then choose A and B so that
# Q + s B A is nearer to W.
#
# **Published.** Table 2, mean perplexity on Pile-CC, 125M to 13B: Int4 34.34, FP4 (E2M1) 31.07, FP4
# (E3M0) 29.48, NF4 with double quantization 27.41. Scales in blocks of 64: 32/64 = 0.5 bits a
# number, 8/64 + 32/(64 x 256) = 0.127 after, 3 GB of a 65B model. GLUE, RoBERTa-large: 88.8 LoRA in
# 16 bits, 88.6 to 88.8 QLoRA. Reduction of NF4's error in nuclear norm, Llama 2-7B, r = 128 (PiSSA,
# arXiv:2404.02948, Tables 8 and 4): one turn 10.7 % QPiSSA, 6.6 % LoftQ, five 19.4 %, 14.6 %.
#
# **Full run.** `python run.py experiment=qlora_oasst1`: Llama 7B on OASST1 with the official
# settings, 1,875 steps of 16. About 6 GPU hours by an estimate (15M tokens, base decoded at each
# product and layers recomputed: 1.4e6 GFLOPs at 60 TFLOP/s), not measured; 12 GiB of GPU memory.

# %%
import os
from statistics import NormalDist

import matplotlib.pyplot as plt
import pandas as pd
import torch

import variants
from analysis.errors import codes
from analysis.figures import COLOURS, STYLE
from analysis.opened import opened
from analysis.weights import Weights
from experiments.call import run
from experiments.config import Tiny
from experiments.evaluate import Scorer
from experiments.model import TINY, Source
from experiments.tasks.skills import MIXTURE, OLD, Skills, items
from notebooks.claims import Claims, Run
from variants._adapter import started
from variants._quantize import nearest
from variants.af4 import AF4
from variants.e2m1 import E2M1
from variants.fp4 import FP4
from variants.integers import Int4
from variants.nf4 import NF4, NF4_VALUES, NF4Double

QUICK = os.environ.get("QUICK", "1") == "1"
SEEDS = (0, 1, 2) if QUICK else (0, 1, 2, 3, 4)
plt.rcParams.update(STYLE | {"figure.dpi": 110})
claims = Claims("QLoRA (Dettmers et al., 2023), arXiv:2305.14314")
generator = torch.Generator().manual_seed(0)

# %% [markdown]
# ## The table
#
# The definition that gives the published numbers (Appendix E; bitsandbytes, `create_normal_map`):
# quantiles at even steps of probability from the middle to p = 0.9677, the mean of 1 - 1/32 and
# 1 - 1/30, 8 of them upwards and 7 downwards, an exact zero between, all over the largest. Eq. 4
# taken literally, the mean of the quantiles at i/17 and (i + 1)/17, begins with the quantile of 0,
# which is not finite; its 14 inner values are beside the table's, over their own largest.

# %%
quantile = NormalDist().inv_cdf
outermost = 1 - (1 / 32 + 1 / 30) / 2


def half(count):
    """`count` quantiles from the outermost one inwards, without the middle."""
    step = (outermost - 0.5) / count
    return [quantile(outermost - i * step) for i in range(count)]


up, down = half(8), half(7)
table = [-v / up[0] for v in down] + [0.0] + [v / up[0] for v in reversed(up)]
table_off = max(abs(a - b) for a, b in zip(table, NF4_VALUES, strict=True))
literal = [(quantile(i / 17) + quantile((i + 1) / 17)) / 2 for i in range(1, 16)]
print(f"largest difference from the code's table: {table_off:.1e}")
pd.DataFrame({"definition": table, "code": NF4_VALUES}).T.round(4)

# %% [markdown]
# How often a code stands, of normal numbers in blocks of 64 divided by the largest of each. Equal
# shares would be 1/16 each and an entropy of 4 bits. The quantiles are those of N(0, 1) though, and
# what is stored is a block over its largest number (Yoshida, 2023, arXiv:2306.06965).

# %%
W = torch.randn(1024, 1024, generator=generator)
stored = NF4().store(W)
use = codes(stored.histogram())
shares = torch.tensor(use["counts"]) / W.numel()
print(
    f"shares {shares.min().item():.3f} to {shares.max().item():.3f}, "
    f"entropy {use['entropy']:.3f} bits"
)

# %% [markdown]
# ## The order of the formats
#
# Mean squared error on the same numbers, blocks of 64; then what each costs the embedded model (a
# Llama of 0.3M parameters), as the loss on the skills that it was pretrained on, nats a response
# token. E3M0 has the magnitudes 0, 1/64, 1/32, ..., 1. `fp4` is bitsandbytes', whose smallest step
# is 1/192 where E2M1 has 1/12.


# %%
class E3M0:
    """Powers of two and zero."""

    def store(self, W):
        powers = [2.0**-k for k in range(7)]
        return nearest(W, (0.0, *powers, *(-v for v in powers), -0.0), 64)


FORMATS = {"nf4": NF4(), "nf4_dq": NF4Double(), "af4": AF4(), "e2m1": E2M1(), "int4": Int4(),
           "fp4": FP4(), "e3m0": E3M0()}  # fmt: skip
known = items(tuple(OLD), 190, 0, split="validation")
linear = [(place.site.path, M.float()) for place, M, _ in Weights(TINY)]


def scored(weights, of=known):
    """Loss and share of whole responses of the embedded model with these matrices."""
    loaded = Source(Tiny()).load()
    for path, M in weights:
        loaded.model.get_submodule(path).weight.data.copy_(M)
    scorer = Scorer(Skills(), loaded, torch.device("cpu"), 256, 64, 8)
    return scorer.quick(scorer.examples(of))


def coded(part, weights=linear):
    return [(path, part.store(M).dense()) for path, M in weights]


untouched = scored(())["loss"]
formats = pd.DataFrame(
    {
        name: {
            "error on N(0, 1)": (part.store(W).dense() - W).square().mean().item(),
            "loss": scored(coded(part))["loss"],
        }
        for name, part in FORMATS.items()
    }
).T
formats["loss, more than untouched"] = formats["loss"] - untouched
formats.round(5)

# %%
figure, (left, middle, right) = plt.subplots(1, 3, figsize=(9, 2.5))
left.bar(range(16), shares.tolist(), color=COLOURS[0], width=0.8)
left.axhline(1 / 16, color="black", linestyle="--", linewidth=0.8, label="equal shares")
left.set_xticks(range(0, 16, 3))
left.set_xlabel("NF4 code, by its value")
left.set_ylabel("share of N(0, 1) in blocks of 64")
left.legend()
for axis, column, label in (
    (middle, "error on N(0, 1)", "mean squared error on N(0, 1)"),
    (right, "loss, more than untouched", "loss more than untouched, nats a token"),
):
    line = formats[column].sort_values()
    axis.barh(line.index, line, color=COLOURS[0], height=0.7)
    axis.set_xlabel(label)
    axis.locator_params(axis="x", nbins=4)
    axis.invert_yaxis()
plt.show()

# %% [markdown]
# ## Double quantization's bits
#
# The scales, one fp32 number in 64, become 8 bits with one fp32 number in 256 of them. Counted from
# the stored tensors of a 512 x 512 matrix, beside the closed form.

# %%
closed = 8 / 64 + 32 / (64 * 256)
sample = W[:512, :512].contiguous()
bits = {part.name: part.store(sample).bits / sample.numel() for part in (NF4(), NF4Double())}
saved = bits["nf4"] - bits["nf4_dq"]
error = {name: formats["error on N(0, 1)"][name] for name in FORMATS}
dearer = error["nf4_dq"] / error["nf4"] - 1
print(f"{bits['nf4']} and {bits['nf4_dq']:.6f} bits a number; closed form {4 + closed:.6f}")
print(f"{saved:.4f} saved, {saved * 65e9 / 8 / 1e9:.2f} GB of 65B; error {dearer:.3%} larger")

# %% [markdown]
# ## QPiSSA and LoftQ, by spectrum
#
# W = U diag(k^-p) V^T, 256 x 256, U and V random, r = 32. Both leave W - Q - s B A; the reduction
# is (1 - its nuclear norm / NF4's own) 100 %. LoftQ takes the best rank-32 part of the error, which
# is nearly flat whatever W is. QPiSSA takes W's own principal part out of what is quantized, which
# is worth the more the faster W's spectrum falls. `normal` is a matrix of independent numbers.

# %%
SIZE, R = 256, 32
INITS = {f"{init}, T = {T}": {"name": init, "iterations": T}
         for init in ("pissa", "loftq") for T in (1, 5)}  # fmt: skip


def nuclear(E):
    return torch.linalg.svdvals(E.double()).sum().item()


def reduction(M, init, r):
    choice = variants.choose("lora", r, init=init, base="nf4")
    left_over = M - started(M, "0", choice).weight.detach()
    return 100 * (1 - nuclear(left_over) / nuclear(M - NF4().store(M).dense()))


def decaying(p):
    sides = (torch.linalg.qr(torch.randn(SIZE, SIZE, generator=generator)).Q for _ in range(2))
    left_side, right_side = sides
    return left_side * torch.arange(1, SIZE + 1) ** -p @ right_side.mT


matrices = {"normal": torch.randn(SIZE, SIZE, generator=generator)}
matrices |= {p: decaying(p) for p in (0.25, 0.5, 0.75, 1.0, 1.5)}
spectra = pd.DataFrame(
    {p: {name: reduction(M, init, R) for name, init in INITS.items()}
     for p, M in matrices.items()}
)  # fmt: skip
spectra.rename_axis(columns="p").round(1)

# %% [markdown]
# Where the embedded model lies: the slope of log sigma_k over log k, k = 1..48 of 96, and the
# reductions at r = 12, an eighth as above, over all its matrices.

# %%
k = torch.arange(1, 49).log()
slopes = []
for _, M in linear:
    values = torch.linalg.svdvals(M)[:48].log()
    slopes.append(
        ((k - k.mean()) @ (values - values.mean()) / (k - k.mean()).square().sum()).item()
    )
plain = sum(nuclear(M - Q) for (_, M), (_, Q) in zip(linear, coded(NF4())))
own = {}
for name, init in INITS.items():
    choice = variants.choose("lora", 12, init=init, base="nf4")
    own[name] = 100 * (1 - sum(nuclear(M - started(M, path, choice).weight.detach())
                               for path, M in linear) / plain)  # fmt: skip
print(f"slopes {min(slopes):.2f} to {max(slopes):.2f}, mean {sum(slopes) / len(slopes):.2f}")
pd.Series(own).round(1)

# %%
figure, axis = plt.subplots(figsize=(4.5, 2.6))
for (name, line), colour in zip(spectra.iterrows(), COLOURS):
    points = line.drop("normal")
    axis.plot(points.index, points, "o--" if "loftq" in name else "o-", color=colour, label=name)
axis.set_xlabel("p, singular values k^-p")
axis.set_ylabel("nuclear error, percent less than NF4's")
axis.legend()
plt.show()

# %% [markdown]
# ## Training on it, and the adapter on the wrong base
#
# LoRA in fp32 and QLoRA on the embedded model's own task, rank 8, s = 2, one learning rate: `python
# run.py variant=qlora rank=8 alpha=16 optim.lr=0.003 train.steps=100`. The adapter of QLoRA has
# learned beside Q, not W0; merged and quantized again it may be rounded away in part. What that
# costs here, and the other way round, an adapter trained on W0 put on Q.

# %%
WORDS = ["rank=8", "alpha=16", "optim.lr=0.003", "train.steps=100", "eval.limit=192",
         "train.eval_every=0", "train.checkpoint_every=0", "track.mode=disabled"]  # fmt: skip
runs = {(v, seed): run(f"variant={v}", *WORDS, f"seed={seed}")
        for v in ("lora", "qlora") for seed in SEEDS}  # fmt: skip
reached = {v: sum(runs[v, s]["metrics"]["tuned"]["exact_match"] for s in SEEDS) / len(SEEDS)
           for v in ("lora", "qlora")}  # fmt: skip
new = items(MIXTURE, 192, 0, split="validation")


def changes(variant):
    """(matrix, s B A) of a run"""
    layers = opened(runs[variant, 0]["folder"]).adapter.layers
    return [(name, (layer.weight - layer.W0).detach()) for name, layer in layers.items()]


def moved(base, change):
    assert [path for path, _ in base] == [path for path, _ in change]
    return [(path, M + dW) for (path, M), (_, dW) in zip(base, change)]


dq = coded(NF4Double())
places = {
    "qlora": {
        "Q (its own)": moved(dq, changes("qlora")),
        "Q, merged, in bf16": [(n, M.bfloat16()) for n, M in moved(dq, changes("qlora"))],
        "Q, merged, quantized again": coded(NF4Double(), moved(dq, changes("qlora"))),
        "W0": moved(linear, changes("qlora")),
    },
    "lora": {
        "W0 (its own)": moved(linear, changes("lora")),
        "W0, merged, quantized": coded(NF4Double(), moved(linear, changes("lora"))),
        "Q": moved(dq, changes("lora")),
    },
}
bases = pd.DataFrame(
    {
        (v, place): scored(weights, new)
        for v, own_ in places.items()
        for place, weights in own_.items()
    }
).T
print("exact match of the runs:", {v: round(share, 3) for v, share in reached.items()})
bases.round(4)

# %% [markdown]
# ## What must hold, and what was found
#
# NF4 has the least error on normal numbers, though its codes are not used equally. E3M0 has by far
# the largest, in the error and in the embedded model's loss, where Table 2 has it second; the
# losses of the others lie within 2e-4 of each other and their order says little. QPiSSA is ahead of
# LoftQ where the spectrum falls as k^-1/2 or faster, the embedded model's included; on independent
# numbers, or k^-1/4, and with one turn LoftQ is. Quantizing a merged model again costs more than
# the base itself did; an adapter from Q does well on W0, one from W0 less well on Q.

# %%
loss = bases["loss"]
assert table_off < 3e-7  # the code took its probabilities in fp32
assert not all(abs(a - b) < 1e-2 for a, b in zip(literal, table[1:]))
order = ["nf4", "af4", "e2m1", "int4", "fp4"]
assert sorted(order, key=error.get) == order
assert abs(bits["nf4_dq"] - (4 + closed)) < 1e-6 and bits["nf4"] == 4.5
assert 0 < dearer < 1e-3
assert spectra.loc["pissa, T = 1", 1.5] > spectra.loc["loftq, T = 1", 1.5]
assert spectra.loc["pissa, T = 1", "normal"] < spectra.loc["loftq, T = 1", "normal"]
assert (spectra.loc["loftq, T = 5"] > spectra.loc["loftq, T = 1"]).all()
# the same weights as the run's, but for the order of additions
assert abs(loss["qlora", "Q (its own)"] - loss["qlora", "Q, merged, in bf16"]) < 0.02
assert loss["qlora", "Q (its own)"] < loss["qlora", "Q, merged, quantized again"]

claims.add(
    "NF4's values are the quantiles of Section 3 and Appendix E",
    published="16 numbers",
    found=f"equal to {table_off:.0e} by Appendix E; Eq. 4 as printed has an infinite first value",
    holds=True,
    how="closed form",
)
claims.add(
    "Each code of NF4 gets as many normal weights (Section 3)",
    published="1/16 each",
    found=f"{shares.min().item():.3f} to {shares.max().item():.3f}, {use['entropy']:.2f} of 4 bits",
    holds=bool(use["entropy"] > 3.99),
    how="closed form: 1M numbers of N(0, 1), blocks of 64",
)
claims.add(
    "NF4 has the least error of 4-bit formats on normal weights",
    published="optimal",
    found=", ".join(f"{name} {error[name]:.5f}" for name in (*order, "e3m0")),
    holds=min(error, key=error.get) == "nf4",
    how="closed form: mean squared error, N(0, 1), blocks of 64",
)
by_loss = formats["loss"].sort_values()
claims.add(
    "Order of Table 2",
    published="Int4 34.34, E2M1 31.07, E3M0 29.48, NF4 + DQ 27.41 (perplexity)",
    found=", ".join(f"{name} {by_loss[name]:.4f}" for name in reversed(by_loss.index))
    + f" (loss; untouched {untouched:.4f})",
    holds=[name for name in reversed(by_loss.index) if name in ("int4", "e2m1", "e3m0", "nf4_dq")]
    == ["int4", "e2m1", "e3m0", "nf4_dq"],
    how=Run("embedded model, all linear layers", "190 items of skills it knows", 0, ()),
    unlike="the model knows these skills by heart, so that all but E3M0 cost under 0.0003 nats",
)
claims.add(
    "Double quantization: bits a number for scales",
    published="0.5 -> 0.127, 0.373 saved, 3 GB of 65B",
    found=f"0.5 -> {bits['nf4_dq'] - 4:.4f}, {saved:.4f}, {saved * 65 / 8:.2f} GB; "
    f"error {dearer:.3%} larger",
    holds=True,
    how="closed form, and counted",
)
claims.add(
    "QLoRA reaches what 16 bits reach (Table 3)",
    published="88.8 LoRA, 88.6 to 88.8 QLoRA",
    found=f"exact match {reached['lora']:.3f} and {reached['qlora']:.3f}",
    holds=bool(reached["qlora"] > reached["lora"] - 0.05),
    how=Run("embedded model, r = 8", "six new skills", 100, SEEDS, "one rate, 0.003"),
    rule="QLoRA 0.05 below at most, in the mean",
)
for T, published in ((1, "10.7 % and 6.6 %"), (5, "19.4 % and 14.6 %")):
    both = [f"{name}, T = {T}" for name in ("pissa", "loftq")]
    wins = [str(p) for p in spectra if spectra.loc[both[0], p] > spectra.loc[both[1], p]]
    shown = "; ".join(
        f"p = {p}: {spectra.loc[both[0], p]:.1f} and {spectra.loc[both[1], p]:.1f}"
        for p in (0.5, 1.0)
    )
    claims.add(
        f"QPiSSA takes more off NF4's error than LoftQ, T = {T}",
        published=published,
        found=f"{shown}; for p in {', '.join(wins) or 'none'}; embedded model "
        f"{own[both[0]]:.1f} and {own[both[1]]:.1f}",
        holds=bool(own[both[0]] > own[both[1]]),
        how="closed form on spectra k^-p, r an eighth of the width, and on the embedded model's",
        rule="on the embedded model's matrices",
        paper="PiSSA (Meng et al., 2024), arXiv:2404.02948",
    )
own_loss = {"qlora": loss["qlora", "Q (its own)"], "lora": loss["lora", "W0 (its own)"]}
WRONG = {
    "An adapter learned on Q may be put on W0": ("qlora", "W0"),
    "An adapter learned on Q may be merged and quantized again": (
        "qlora",
        "Q, merged, quantized again",
    ),
    "An adapter learned on W0 may be put on Q": ("lora", "Q"),
}
for claim, (v, place) in WRONG.items():
    claims.add(
        claim,
        published="common practice; no number",
        found=f"loss {own_loss[v]:.3f} on its own base, {loss[v, place]:.3f} there",
        holds=bool(loss[v, place] < own_loss[v] + 0.01),
        how=Run("embedded model, r = 8", "six new skills, 192 items", 100, (0,), "one rate, 0.003"),
        rule="within 0.01 nats a token",
    )
claims.keep("05_qlora")
