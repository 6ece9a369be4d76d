# %% [markdown]
# # AdaLoRA: a budget of ranks
#
# **Claim.** AdaLoRA (Zhang et al., ICLR 2023, arXiv:2303.10512) trains W0 + s P diag(E) Q and lets
# all triplets of all matrices compete: the budget falls by a cubic, and the least important E are
# set to zero. It holds that this puts rank where it is needed, into feed-forward matrices and upper
# layers (Figure 3), and that it beats LoRA at the same number of parameters (Table 1).
#
# **Published.** DeBERTaV3-base, 72 matrices, final budgets of 72, 144, 288 and 576 triplets, the
# initial one 1.5 times as large. GLUE, about 1.3M parameters: 89.31 AdaLoRA (MNLI 90.76, SST-2
# 96.10), 88.34 LoRA (90.65, 94.95); about 0.33M: 88.86 and 88.15. Figure 3, final ranks of 0 to 12:
# feed-forward matrices and the top layers keep most, for every budget, task and model (Section
# 4.4).
#
# **Full run.** `python run.py experiment=adalora_sst2`: DeBERTaV3-base on SST-2 with the official
# script's settings, 50,520 steps of 32. About 3 GPU hours by an estimate (0.2 s a step), not
# measured; seeds and LoRA's own rates beside it.

# %%
import os

import matplotlib.pyplot as plt
import pandas as pd
import torch

import variants
from analysis.figures import COLOURS, STYLE
from analysis.opened import opened
from analysis.params import count, meta_model
from analysis.ranks import heatmap, trajectory
from experiments.call import run
from notebooks._room import undecided
from notebooks.claims import Claims, Run
from variants.adalora import AdaLoRABudget

QUICK = os.environ.get("QUICK", "1") == "1"
SEEDS = (0, 1) if QUICK else (0, 1, 2, 3, 4)
plt.rcParams.update(STYLE | {"figure.dpi": 110})
claims = Claims("AdaLoRA (Zhang et al., 2023), arXiv:2303.10512")

# %% [markdown]
# ## The schedule
#
# b0 triplets until t_i, bT from T - t_f on, between them bT + (b0 - bT)(1 - (t - t_i) / (T - t_i -
# t_f))^3. That is the official code's. The paper's Eq. 12 (Appendix A) has t - t_i - t_f above,
# which begins above b0 and ends above bT. Both on the official MNLI script (b0 = 3 x 72, bT = 72,
# t_i = 8,000, t_f = 50,000, T = 85,900), and the code's beside what the laboratory gives at every
# step.


# %%
def cubic(t, total, start, target, warmup, final, printed=False):
    """The budget after step t; `printed`: by Eq. 12."""
    if t <= warmup:
        return start
    if t > total - final:
        return target
    done = t - warmup - (final if printed else 0)
    return int(target + (start - target) * (1 - done / (total - warmup - final)) ** 3)


MNLI = {"total": 85900, "start": 216, "target": 72, "warmup": 8000, "final": 50000}
rule = AdaLoRABudget(target_rank=1, warmup=8000, final=50000, every=100)
steps = range(0, 85900, 50)
official = [cubic(t, **MNLI) for t in steps]
as_printed = [cubic(t, **MNLI, printed=True) for t in steps]
assert official == [rule.budget(t, 85900, 216, 72)[0] for t in steps]
matrices = count(meta_model("deberta-v3-base"), "adalora", rank=3, targets="q,k,v,o,up,down")
budgets = {
    target: AdaLoRABudget(target_rank=target).budget(100, 100, 12 * 72, 72)[0]
    for target in (1, 2, 4, 8)
}
print(f"{matrices['matrices']} matrices; final budgets {list(budgets.values())}")
print(f"Eq. 12 lies between {min(as_printed)} and {max(as_printed)}, for {72} and {216}")

# %% [markdown]
# ## A run, and LoRA beside it
#
# The embedded model (a Llama of 0.3M parameters) on its own task, all 21 linear matrices, 12
# triplets a matrix at the start and 8 at the end; LoRA at r = 8. Three rates each: `python run.py
# -m variant=adalora rank=12 optim.lr=0.01,0.02,0.04 train.steps=100`.

# %%
TRAIN = 100  # steps
WORDS = [f"train.steps={TRAIN}", "train.log_every=1", "eval.limit=192", "train.eval_every=0",
         "train.checkpoint_every=0", "track.mode=disabled"]  # fmt: skip
RATES = {"adalora": (1e-2, 2e-2, 4e-2), "lora": (2.5e-3, 5e-3, 1e-2)}
PAIR = {"adalora": ["variant=adalora", "rank=12"], "lora": ["variant=lora", "rank=8"]}
runs = {
    (name, lr): run(*WORDS, *words, f"optim.lr={lr}")
    for name, words in PAIR.items()
    for lr in RATES[name]
}
losses = pd.Series({key: result["metrics"]["tuned"]["loss"] for key, result in runs.items()})
best = {name: losses[name].idxmin() for name in PAIR}
at_an_edge = undecided({name: (losses[name], best[name]) for name in PAIR})
again = {
    (name, seed): runs[name, best[name]]
    if seed == 0
    else run(*WORDS, *PAIR[name], f"optim.lr={best[name]}", f"seed={seed}")
    for name in PAIR
    for seed in SEEDS
}
tuned = {name: [again[name, seed]["metrics"]["tuned"]["loss"] for seed in SEEDS] for name in PAIR}
print({name: [round(v, 3) for v in values] for name, values in tuned.items()}, "by seed, tuned")
losses.unstack().round(3)

# %% [markdown]
# What the run recorded, beside the closed form. It starts to fall after a tenth of the steps and
# stands for the last half; each step's mask keeps as many triplets as the budget says.

# %%
adalora = {seed: trajectory(again["adalora", seed]["folder"]) for seed in SEEDS}
path = adalora[0]
planned = [cubic(t - 1, TRAIN, 21 * 12, 21 * 8, TRAIN // 10, TRAIN // 2) for t in path.steps]
kept = [sum(ranks) for ranks in path.ranks]
figure, (left, middle, right) = plt.subplots(1, 3, figsize=(9, 2.6))
left.plot(steps, official, color=COLOURS[0], label="official code")
left.plot(steps, as_printed, "--", color=COLOURS[1], label="Eq. 12 as printed")
left.set_title("MNLI, 72 matrices")
middle.plot(path.steps, planned, color=COLOURS[0], label="closed form")
middle.plot(path.steps, path.budget, "o", mfc="none", color=COLOURS[1], ms=4, label="recorded")
middle.plot(path.steps, kept, ".", color=COLOURS[2], markersize=2, label="kept")
middle.set_title("embedded model, 21 matrices")
for line in torch.tensor(path.ranks).T.tolist():
    right.plot(path.steps, line, color=COLOURS[0], alpha=0.4, linewidth=0.8)
right.set_title("rank of each matrix")
for axis in (left, middle, right):
    axis.set_xlabel("step")
for axis in (left, middle):
    axis.set_ylabel("triplets in all")
right.set_ylabel("triplets of a matrix")
left.legend()
middle.legend()
plt.show()

# %% [markdown]
# ## Figure 3: where the rank goes
#
# Kept rank by layer and module, under each seed, and how far two seeds agree.

# %%
places = list(opened(again["adalora", 0]["folder"]).places.values())
grids = {seed: heatmap(places, adalora[seed].final) for seed in SEEDS}
figure, axes = plt.subplots(1, len(SEEDS), figsize=(3.2 * len(SEEDS), 2.6), squeeze=False)
for axis, (seed, (roles, numbers, table)) in zip(axes[0], grids.items()):
    image = axis.imshow(table, vmin=0, vmax=12, cmap="viridis", aspect="auto")
    for i, row in enumerate(table):
        for j, value in enumerate(row):
            ink = "black" if value > 6 else "white"
            axis.text(j, i, f"{value:.0f}", ha="center", va="center", color=ink, fontsize=7)
    axis.set_xticks(range(len(numbers)), numbers)
    axis.set_yticks(range(len(roles)), roles)
    axis.set_xlabel("layer")
    axis.set_title(f"kept rank, seed {seed}")
figure.colorbar(image, ax=axes, label="rank, of 12")
plt.show()
final = pd.DataFrame({seed: adalora[seed].final for seed in SEEDS})
of = {place.name: place for place in places}
by_role = final.groupby(lambda name: of[name].role).mean()
by_layer = final.groupby(lambda name: of[name].layer).mean()
in_mlp = final.groupby(lambda name: of[name].role in ("gate", "up", "down")).mean()
agreement = final[SEEDS[0]].corr(final[SEEDS[1]])
print("feed-forward", in_mlp.loc[True].round(2).tolist(), "by seed")
print("attention   ", in_mlp.loc[False].round(2).tolist())
print(f"correlation of two seeds {agreement:.2f}")
pd.concat({"role": by_role, "layer": by_layer}).round(2)

# %% [markdown]
# ## A teacher whose ranks are known
#
# Six matrices W0 + dW [32, 32], dW of rank 0, 1, 2, 4, 6, 8, all its singular values 1 and its
# directions random; the student starts at W0, with 8 triplets a matrix and a budget that ends at
# the teacher's 21. `side by side`: each matrix has an output of its own, so that the ranks are
# there to be found. `in a row`: x -> tanh(W1 x) -> ... -> W6, where another set of ranks may do.
# The same ranks in another order under each seed. A triplet is misplaced that a matrix has beyond
# the teacher's rank; spread evenly, at 3.5 a matrix, it would be 7.5 of 21. Two learning rates: the
# budget is spent by the middle of the run, so what is not learned by then is not seen.

# %%
WIDTH, RANKS = 32, (0, 1, 2, 4, 6, 8)
TRIALS = range(3) if QUICK else range(10)


class Row(torch.nn.Sequential):
    """Matrices one after the other."""

    def forward(self, x):
        for matrix in self[:-1]:
            x = torch.tanh(matrix(x))
        return self[-1](x)


class Side(torch.nn.Sequential):
    """Matrices side by side."""

    def forward(self, x):
        return torch.cat([matrix(x) for matrix in self], -1)


def pair(kind, ranks, generator):
    """(student, teacher)"""
    nets = [kind(*(torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in ranks)) for _ in range(2)]
    with torch.no_grad():
        for mine, theirs, rank in zip(*nets, ranks):
            W0, U, V = (torch.randn(WIDTH, WIDTH, generator=generator) for _ in range(3))
            mine.weight.copy_(W0 * WIDTH**-0.5)
            U, V = (torch.linalg.qr(M).Q[:, :rank] for M in (U, V))
            theirs.weight.copy_(mine.weight + U @ V.mT)
    return nets


def found_ranks(kind, lr, seed, steps=400):
    """(the teacher's ranks, AdaLoRA's, loss at the start and at the end)"""
    generator = torch.Generator().manual_seed(seed)
    ranks = [RANKS[i] for i in torch.randperm(len(RANKS), generator=generator)]
    student, teacher = pair(kind, ranks, generator)
    rule = {"name": "adalora", "target_rank": sum(RANKS) / len(RANKS)}
    adapter = variants.attach(student, "adalora", rank=8, alpha=8, allocation=rule, seed=seed,
                              targets=",".join(map(str, range(len(ranks)))))  # fmt: skip
    optimizer = adapter.optimizer(lr, steps=steps)
    curve = []
    for _ in range(steps):
        x = torch.randn(64, WIDTH, generator=generator)
        with torch.no_grad():
            y = teacher(x)
        loss = (student(x) - y).square().mean()
        curve.append(loss.item())
        (loss + adapter.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return ranks, list(adapter.ranks().values()), curve


def misplaced(true, given):
    return sum(max(0, g - t) for t, g in zip(true, given))


KINDS = {"side by side": Side, "in a row": Row}
TEACHER_RATES = (1e-2, 1e-1)
trials = {
    (name, lr, seed): found_ranks(kind, lr, seed)
    for name, kind in KINDS.items()
    for lr in TEACHER_RATES
    for seed in TRIALS
}
evenly = misplaced(RANKS, [sum(RANKS) / len(RANKS)] * len(RANKS))
recovered = pd.DataFrame(
    {
        key: {
            "teacher": true,
            "AdaLoRA": given,
            "misplaced": misplaced(true, given),
            "loss": f"{curve[0]:.3f} -> {sum(curve[-20:]) / 20:.4f}",
        }
        for key, (true, given, curve) in trials.items()
    }
).T
recovered.rename_axis(("teacher", "lr", "seed"))

# %%
figure, axes = plt.subplots(1, 2, figsize=(6.5, 2.6), sharey=True)
for axis, name in zip(axes, KINDS):
    for i, (lr, colour) in enumerate(zip(TEACHER_RATES, COLOURS)):
        true, given = ([r for seed in TRIALS for r in trials[name, lr, seed][j]] for j in (0, 1))
        beside = [r + 0.25 * i for r in true]  # so that points do not hide each other
        axis.plot(beside, given, "os"[i], color=colour, alpha=0.6, label=f"lr {lr:g}")
    axis.plot((0, 8), (0, 8), color="grey", linewidth=0.8, linestyle=":")
    axis.set_xlabel("rank of the teacher's change")
    axis.set_title(name)
axes[0].set_ylabel("kept rank")
axes[0].legend()
plt.show()

# %% [markdown]
# ## What must hold, and what was found
#
# The schedule is the official code's to the triplet. Where rank goes on the embedded model, 100
# steps over three layers, says little of where it goes in DeBERTa. Side by side the teacher's ranks
# are found where the rate is high enough for the change to be learned before the budget is spent,
# and not where it is lower. In a row its ranks are not the only ones that do, and those that are
# kept lie not much nearer to them than an even spread.

# %%
assert matrices["matrices"] == 72 and list(budgets.values()) == [72, 144, 288, 576]
assert path.budget == tuple(planned)
assert kept == planned  # distinct scores: a mask keeps as many as the budget
assert sum(path.final.values()) == 21 * 8
assert max(as_printed) > 216 and as_printed[steps.index(35_900)] > 72
for true, given, curve in trials.values():
    assert sum(given) == sum(true) == sum(RANKS) and curve[-1] < curve[0] / 2

claims.add(
    "Final budgets, DeBERTaV3-base (Sections 4.1, 4.2)",
    published="72, 144, 288, 576",
    found=", ".join(map(str, budgets.values())),
    holds=True,
    how="closed form",
)
claims.add(
    "The schedule of Eq. 12 goes from b0 to bT",
    published="216 to 72 (MNLI)",
    found=f"as printed from {max(as_printed)} to {as_printed[steps.index(35_900)]}, then 72; the "
    "official code from 216 to 72",
    holds=False,
    how="closed form",
)
claims.add(
    "Learning rates (Section 4.1) are those of the experiments",
    published="5e-5, 8e-5, 1e-4, 2e-4",
    found="5e-4 (MNLI) to 2.2e-3 (STS-B) in the paper's own Table 8 and in NLU/scripts",
    holds=False,
    how="closed form: table and scripts read",
)
claims.add(
    "The initial budget is 1.5 times the final one (Section 4.1)",
    published="1.5; r from 2 to 1 at 72 triplets (Table 9)",
    found="3 in the official MNLI script, 2 in SST-2's",
    holds=False,
    how="closed form: lora_r over target_rank, scripts read",
)
ON = "embedded model, all linear layers, 12 triplets a matrix to 8"
SIX = "six new skills"
SMALL = "three layers and 100 steps; the paper's model has twelve and thousands of steps"
claims.add(
    "Feed-forward matrices keep more rank than attention's (Figure 3)",
    published="most in intermediate and output",
    found=", ".join(
        f"seed {s}: {in_mlp.loc[True, s]:.1f} and {in_mlp.loc[False, s]:.1f}" for s in SEEDS
    ),
    holds=bool((in_mlp.loc[True] > in_mlp.loc[False]).all()),
    how=Run(ON, SIX, TRAIN, SEEDS),
    rule="in each seed",
    unlike=SMALL,
)
claims.add(
    "The distribution of ranks is consistent (Section 4.4)",
    published="across budgets, tasks and models; no number",
    found=f"correlation of kept ranks {agreement:.2f} between two seeds, {len(final)} matrices",
    holds=bool(agreement > 0.5),
    how=Run(ON, SIX, TRAIN, SEEDS[:2]),
    rule="above 0.5",
    unlike="one budget, one task and one model; seeds alone differ",
)
claims.add(
    "Upper layers keep more (Figure 3)",
    published="more",
    found=", ".join(f"layer {i}: {row.mean():.1f}" for i, row in by_layer.iterrows()),
    holds=bool((by_layer.iloc[-1] > by_layer.iloc[0]).all()),
    how=Run(ON, SIX, TRAIN, SEEDS),
    rule="in each seed",
    unlike=SMALL,
)
MANY = "the teacher's ranks are not the only ones that give its map"
for name, unlike in zip(KINDS, (None, MANY)):
    wrong = {
        lr: [misplaced(*trials[name, lr, seed][:2]) for seed in TRIALS] for lr in TEACHER_RATES
    }
    claims.add(
        f"Rank goes where it is needed: a teacher of known ranks, {name}",
        published="no number",
        found="; ".join(f"lr {lr:g}: {', '.join(map(str, w))}" for lr, w in wrong.items())
        + f" of 21 triplets misplaced; evenly spread {evenly:.1f}",
        holds=min(max(w) for w in wrong.values()) <= 2,
        how=Run("six 32 x 32 matrices", "regression, the right budget given", 400, TRIALS),
        rule="2 at most under each seed, at the better of two rates",
        unlike=unlike,
    )
worse = sum(tuned["adalora"]) / len(SEEDS) - sum(tuned["lora"]) / len(SEEDS)
tried = f"three rates each, the best {best['adalora']:g} and {best['lora']:g}"
claims.add(
    "AdaLoRA beats LoRA at the same number of parameters (Table 1), both tuned",
    published="89.31 and 88.34 (GLUE)",
    found=f"loss {sum(tuned['adalora']) / len(SEEDS):.3f} and "
    f"{sum(tuned['lora']) / len(SEEDS):.3f}",
    holds=bool(worse < 0),
    how=Run("embedded model, all linear layers, r = 12 to 8 and 8", SIX, TRAIN, SEEDS, tried),
    unlike=at_an_edge or "at 100 steps neither has converged, and the budget falls until the 50th",
)
claims.keep("03_adalora")
