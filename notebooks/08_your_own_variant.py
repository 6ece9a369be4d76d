# %% [markdown]
# # A variant of your own
#
# **Claim.** Of this laboratory, not of a paper: a new variant is one file, wherever it lies. With
# nothing registered and no other file touched it goes through the contract, onto the command line
# and into a fair comparison.
#
# **Published.** What adding one method costs elsewhere, in files touched: PEFT 17 to 31 (773 to
# 2,233 lines; LoRA-GA, only an init, 12), optax 4 to 5, DomainBed 4 to 5 (220 to 290 lines). Here
# it should be 1, of 30 to 100 lines.
#
# **Full run.** The file below on a model that matters: `python run.py experiment=lora_e2e
# variant=gains.py rank=4` (GPT-2 medium on E2E), or a study of it (`model=hf model.path=DIR` under
# `models`). About 1 GPU hour a run by an estimate, 22 runs in the study below.

# %%
import json
import os
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

import variants
from analysis.figures import COLOURS, STYLE
from notebooks.claims import Claims, Run
from variants._contract import check

QUICK = os.environ.get("QUICK", "1") == "1"
ROOT = Path(variants.__file__).parents[1]
plt.rcParams.update(STYLE | {"figure.dpi": 110})
claims = Claims("This laboratory")

# %% [markdown]
# ## The file
#
# LoRA with a gain for each output, W = (1 + g) (W0 + s B A): DoRA's magnitude without its norm. A
# class for the axis that the idea is on (here the form), the equation in `weight`, and a preset.
# The docstring has what `python -m variants` shows and the contract asks for: a citation, the
# equation, and a fact that plain LoRA would fail. Merging, saving, a quantized base, dropout and
# every init come from `weight` and `embed`.

# %%
# fmt: off
SOURCE = (  # IPython takes >>> out of a string that does not begin its line
'''"""Gains: LoRA with a gain for each output, an example of a variant of one's own.

    W = (1 + g) (W0 + s B A),    g = 0 at the start

The change has more than rank r, with one number a row beside the factors:

>>> import torch
>>> p = {"A": torch.zeros(2, 8), "B": torch.zeros(6, 2), "g": torch.arange(6.0)}
>>> W0 = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
>>> int(torch.linalg.matrix_rank(Gains().weight(W0, p, 1.0) - W0))
5
"""

from dataclasses import dataclass

from variants._api import LowRank
from variants._registry import preset


@dataclass(frozen=True)
class Gains(LowRank, name="gains"):
    """(1 + g) (W0 + s B A)."""

    parameters = "r*(m + n) + m"

    def shapes(self, m, n, r):
        return {"A": (r, n), "B": (m, r), "g": (m,)}

    def embed(self, W, A, B, s):
        return {"A": A, "B": B, "g": W.new_zeros(len(W))}

    def weight(self, W0, p, s):
        return (1 + p["g"])[:, None] * (W0 + s * p["B"] @ p["A"])


preset("gains", form="gains", rank=16, alpha="2r", lr=2e-4, lr_origin="LoRA's")
'''
)
# fmt: on
Path("gains.py").write_text(SOURCE)
before = set(variants.names())
known = variants.describe("gains.py")
lines = len(SOURCE.splitlines())
print(
    f"{known['name']}: {known['equation'].strip()}; trained: {known['parameters']}; {lines} lines"
)
print("new:", ", ".join(set(variants.names()) - before))

# %% [markdown]
# ## The contract
#
# All clauses, with LoRA's start and with two others, and on a quantized base. On the command line:
# `python -m variants gains.py --check`.

# %%
PAIRS = [{}, {"init": "pissa"}, {"init": "orthogonal", "base": "nf4"}]
held = {str(axes or "as it is"): check("gains", rank=4, **axes) for axes in PAIRS}
pd.Series({pair: f"{len(clauses)} clauses hold" for pair, clauses in held.items()})

# %% [markdown]
# A file that is wrong does not pass: here `embed` forgets that A and B stand under (1 + g).

# %%
Path("wrong.py").write_text(
    SOURCE.replace("gains", "wrong").replace("W.new_zeros(len(W))", "W.new_ones(len(W))")
)
try:
    check(variants.describe("wrong.py")["name"], rank=4)
    caught = "nothing"
except AssertionError as error:
    caught = str(error)
print(caught)
os.environ["LORA_VARIANTS"] = str(Path("gains.py").resolve())  # and the wrong one no longer
assert "starts_at_base" in caught

# %% [markdown]
# ## A comparison
#
# A study: learning rates of both on a grid, by validation loss, then eight fresh seeds of each at
# its rate on the test images. Digits and the small network, so that it takes a minute.

# %%
Path("gains_study.yaml").write_text(f"""
question: "Does a gain for each output help LoRA on even digits?"
tier: smoke
variants: [lora, gains]
anchors: []
models: [model=mlp]
tasks: [task=digits]
ranks: [2]
settings: [train.steps=60, train.eval_every=0, train.checkpoint_every=0]
tuning: {{decades: 2, refine: false}}
confirm: {8 if QUICK else 20}
""")
command = [
    sys.executable,
    str(ROOT / "run.py"),
    "-m",
    "study=gains_study.yaml",
    "track.mode=disabled",
    "sweep.isolate=false",
]
done = subprocess.run(command, capture_output=True, text=True)
assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
found = json.loads(Path("runs/gains_study/report/report.json").read_text())
(verdict,) = [row for row in found["verdicts"] if row["variant"] == "gains"]
KEYS = (
    "verdict",
    "reason",
    "effect",
    "low",
    "high",
    "p",
    "n",
    "baseline_corrected",
    "score_corrected",
    "baseline_lr",
    "lr",
    "detectable",
    "margin",
)
pd.Series(
    {k: f"{v:.3g}" if isinstance(v, float) else v for k, v in verdict.items() if k in KEYS},
    name="gains against tuned LoRA, accuracy on test",
).to_frame()

# %% [markdown]
# The whole page is in `runs/gains_study/report/index.html`. Its learning rates (mean accuracy on
# validation, one seed a rate; a ring: the one that was chosen):

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(7, 2.5), width_ratios=(3, 2))
for row, colour in zip(found["learning_rates"], COLOURS):
    left.plot(row["lr"], row["mean"], "o-", color=colour, label=row["variant"])
    left.plot(
        [row["chosen"]],
        [row["mean"][row["lr"].index(row["chosen"])]],
        "o",
        color=colour,
        markersize=9,
        fillstyle="none",
    )
left.set_xscale("log")
left.set_xlabel("learning rate")
left.set_ylabel("accuracy, validation")
left.legend()
right.errorbar(
    [verdict["effect"]],
    [0],
    xerr=[[verdict["effect"] - verdict["low"]], [verdict["high"] - verdict["effect"]]],
    fmt="o",
    color=COLOURS[1],
    capsize=3,
)
right.axvline(0, color="black", linewidth=0.8)
right.axvspan(-verdict["margin"], verdict["margin"], color="grey", alpha=0.2)
right.locator_params(axis="x", nbins=4)
right.set_yticks([])
right.set_xlabel("gains - LoRA, accuracy on test (grey: one point)")
plt.show()

# %% [markdown]
# ## What must hold, and what was found
#
# The file joined, broke no clause and was compared by the same rules as the others. The verdict on
# the idea itself carries little weight: one small network, one task.

# %%
touched = {file.name for file in Path().glob("*.py")} - {"wrong.py"}
assert touched == {"gains.py"} and lines <= 100
assert all(len(clauses) == len(held["as it is"]) for clauses in held.values())
assert verdict["verdict"] in ("better", "worse", "equivalent", "inconclusive")
assert verdict["n"] == (8 if QUICK else 20)

claims.add(
    "A new variant is one file",
    published="1 file, 30 to 100 lines (PEFT: 17 to 31 files)",
    found=f"1 file, {lines} lines",
    holds=lines <= 100,
    how="counted: notebook 08",
)
claims.add(
    "It goes through the contract as built-in ones do",
    published="every clause",
    found=f"{len(held['as it is'])} clauses, with {len(PAIRS) - 1} other choices of parts too; "
    "a wrong `embed` is caught",
    holds=True,
    how="checked: variants' contract in notebook 08",
)
kept = pd.read_csv("runs/gains_study/report/tables/runs.csv")
effect = f"{verdict['effect']:+.3f} [{verdict['low']:+.3f}, {verdict['high']:+.3f}]"
claims.add(
    "It is compared by the rules of every study",
    published="a verdict against tuned LoRA",
    found=f"{verdict['verdict']}: {effect} accuracy, {verdict['n']} seeds",
    holds=True,
    how=Run(
        "model=mlp, r = 2",
        "even digits, test",
        60,
        sorted(int(seed) for seed in kept["seed"][kept["split"] == "test"].unique()),
        "python run.py -m study=gains_study.yaml",
    ),
)
claims.keep("08_your_own_variant")
