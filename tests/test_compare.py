"""analysis.compare: statistics against scipy, verdicts on made studies, the files, the page."""

import json
import math
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from analysis import aggregates, load, stats, verdicts
from analysis.calibration import Design, said, study
from analysis.compare import compare, main
from analysis.select import bracket, left_one_out
from analysis.verdicts import Rules

OPTIMA = {"lora": -3.5, "dora": -3.6, "pissa": -4.5, "hira": -2.6}
GAINS = {"lora": 0.0, "dora": 0.0, "pissa": 0.0, "hira": 3.0}


def table(tmp_path: Path, **more: Any) -> Path:
    """A csv of four methods with optima of their own; one is better by three points."""
    generator, lines = np.random.default_rng(0), ["variant,lr,seed,task,score" + "".join(
        f",{k}" for k in more)]  # fmt: skip
    for name, optimum in OPTIMA.items():
        for lr in np.arange(-6, -1.4, 0.5):
            for seed in range(10):
                score = 50 + GAINS[name] - 3 * (lr - optimum) ** 2 + 0.4 * generator.normal()
                lines.append(f"{name},{10**lr:.4g},{seed},math,{score:.3f}"
                             + "".join(f",{v}" for v in more.values()))  # fmt: skip
    file = tmp_path / "results.csv"
    file.write_text("\n".join(lines))
    return file


def judged(file: Path, **rules: Any) -> dict[str, verdicts.Verdict]:
    rows = verdicts.judge(verdicts.units(load.csv(file)), Rules("lora", **rules))
    return {row.variant: row for row in rows}


def test_the_sign_flip_test_is_scipy_s_permutation_test() -> None:
    from scipy.stats import permutation_test

    for n in (5, 8, 11):
        d = np.random.default_rng(n).normal(0.4, 1, n)
        theirs = permutation_test((d,), np.mean, permutation_type="samples", n_resamples=np.inf)
        assert stats.sign_flip([d]) == pytest.approx(theirs.pvalue, abs=1e-12)
        one = permutation_test((d,), np.mean, permutation_type="samples", n_resamples=np.inf,
                               alternative="greater")  # fmt: skip
        assert stats.sign_flip_above([d]) == pytest.approx(one.pvalue, abs=1e-12)
    many = np.random.default_rng(0).normal(0.3, 1, 30)  # drawn flips, near the exact p
    normal = 2 * (1 - 0.5 * (1 + math.erf(many.mean() / many.std() * math.sqrt(30) / 2**0.5)))
    assert stats.sign_flip([many]) == pytest.approx(normal, abs=0.03)


def test_intervals_and_counts_are_scipy_s() -> None:
    from scipy.stats import binomtest, friedmanchisquare, t, trim_mean

    d = np.random.default_rng(1).normal(1, 2, 9)
    low, high = t.interval(0.95, 8, d.mean(), d.std(ddof=1) / 3)
    found = stats.interval([d])
    assert found is not None
    assert (found.low, found.high) == pytest.approx((low, high))
    for a, b in ((3, 10), (0, 0), (7, 7), (0, 6)):
        theirs = binomtest(a, a + b, 0.5).pvalue if a + b else 1.0
        assert stats.mcnemar(a, b) == pytest.approx(theirs)
    values = np.random.default_rng(2).normal(size=16)
    assert aggregates.iqm(values) == pytest.approx(trim_mean(values, 0.25))
    for scores in (np.random.default_rng(3).normal(size=(7, 4)),
                   np.random.default_rng(4).integers(0, 3, (9, 4)).astype(float)):  # fmt: skip
        theirs = friedmanchisquare(*scores.T).pvalue
        assert aggregates.friedman(scores)[0] == pytest.approx(theirs)


def test_welch_s_rule_over_two_tasks() -> None:
    """scipy's Welch test of x against -y has the standard error of half their sum twice."""
    from scipy.stats import ttest_ind

    x, y = np.random.default_rng(5).normal(1, 1, 6), np.random.default_rng(6).normal(2, 3, 9)
    se, df = stats.standard_error([x, y])
    theirs = ttest_ind(x, -y, equal_var=False)
    assert (x.mean() + y.mean()) / 2 / se == pytest.approx(theirs.statistic)
    assert df == pytest.approx(theirs.df)


def test_holm_is_the_published_example() -> None:
    """Holm 1979's steps on .01 .04 .03 .005, as R's p.adjust gives them."""
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_items_widen_an_interval_that_seeds_alone_make_too_short() -> None:
    generator = np.random.default_rng(0)
    own = generator.normal(0, 1, 40)[None]  # the variant's own strength on each item
    items = 0.5 + own + 0.1 * generator.normal(size=(8, 40))
    d = items.mean(axis=1)
    alone, crossed = stats.interval([d]), stats.interval([d], [items])
    assert alone is not None and crossed is not None
    assert (crossed.high - crossed.low) > 5 * (alone.high - alone.low)
    assert crossed.se == pytest.approx(own.std(ddof=1) / math.sqrt(40), rel=0.05)


@pytest.mark.parametrize("seeds", [2, 3, 5, 20])
def test_no_interval_is_narrower_than_that_of_seeds(tmp_path: Path, seeds: int) -> None:
    """Student's (scipy) over the seeds, with items that all runs share; also after twenty seeds."""
    from scipy.stats import t

    generator, lines, runs = np.random.default_rng(7), ["variant,lr,seed,task,score,items"], {}
    can = generator.random(500) < 0.6
    for name, own in (("lora", can), ("x", can ^ (generator.random(500) < 0.05))):
        for seed in range(seeds):
            hits = own ^ (generator.random(500) < 0.05)
            file = tmp_path / f"{name}-{seed}.jsonl"
            file.write_text("\n".join(str(int(hit)) for hit in hits))
            runs[name, seed] = hits.mean()
            lines.append(f"{name},1e-4,{seed},t,{hits.mean()},{file}")
    (tmp_path / "items.csv").write_text("\n".join(lines))
    row = judged(tmp_path / "items.csv", margin=1.0)["x"]
    d = np.array([runs["x", s] - runs["lora", s] for s in range(seeds)])
    low, high = t.interval(0.95, seeds - 1, d.mean(), d.std(ddof=1) / math.sqrt(seeds))
    assert row.low is not None and row.high is not None
    assert row.low <= low + 1e-9
    assert row.high >= high - 1e-9


@pytest.mark.parametrize("tasks", [1, 6])
def test_differences_that_agree_have_no_known_spread(tmp_path: Path, tasks: int) -> None:
    lines = ["variant,lr,seed,task,score"]
    lines += [f"{v},1e-4,{s},t{k},{0.5 + 0.031 * (v == 'x') * (-1) ** k + s / 7}"
              for v in ("lora", "x") for s in range(2) for k in range(tasks)]  # fmt: skip
    (tmp_path / "same.csv").write_text("\n".join(lines))
    found = verdicts.judge(verdicts.units(load.csv(tmp_path / "same.csv")), Rules("lora"))
    for row in found:
        assert (row.low, row.high, row.sd, row.detectable) == (None, None, None, None)
        assert row.verdict in ("inconclusive", "equivalent")
        assert "the spread over seeds is unknown: the differences of 2 agree" in row.notes
    assert "the differences of 2 agree" in found[-1].reason
    four = [line.replace(",0,t", ",2,t") for line in lines[1:] if ",0,t" in line]
    four += [line.replace(",0,t", ",3,t") for line in lines[1:] if ",0,t" in line]
    (tmp_path / "same.csv").write_text("\n".join([*lines, *four]))
    rows = verdicts.judge(verdicts.units(load.csv(tmp_path / "same.csv")), Rules("lora"))
    assert all(row.low is not None and row.sd is not None for row in rows)


def test_one_seed_of_many_tasks_is_told_apart_or_not(tmp_path: Path) -> None:
    lines = ["variant,lr,seed,task,score"]
    lines += [f"{v},1e-4,0,t{k},{50 + 9 * (v == 'x') * (-1) ** k}" for v in ("lora", "x")
              for k in range(7)]  # fmt: skip
    (tmp_path / "one.csv").write_text("\n".join(lines))
    found = verdicts.judge(verdicts.units(load.csv(tmp_path / "one.csv")), Rules("lora"))
    row = next(row for row in found if row.task == verdicts.ALL)
    assert (row.verdict, row.low) == ("inconclusive", None)
    assert "one a task" in row.reason


def test_choosing_on_what_is_reported_is_corrected() -> None:
    draws = [np.random.default_rng(i).normal(size=(6, 7)) for i in range(300)]
    naive = np.mean([d.mean(axis=0).max() for d in draws])
    corrected = np.mean([left_one_out(-d, d).mean() for d in draws])
    assert naive > 0.45
    assert abs(corrected) < 0.08


def test_verdicts_of_tuned_methods(tmp_path: Path) -> None:
    found = judged(table(tmp_path))
    assert {k: v.verdict for k, v in found.items()} == {
        "dora": "equivalent", "hira": "better", "pissa": "equivalent"
    }  # fmt: skip
    assert found["hira"].effect == pytest.approx(3, abs=0.6)
    assert (found["hira"].p or 1) <= 0.05
    assert found["pissa"].lr == pytest.approx(10**-4.5, rel=0.01)
    assert found["pissa"].n == 10


def test_five_seeds_are_said_to_reach_nothing(tmp_path: Path) -> None:
    lines = ["variant,lr,seed,task,score"]
    lines += [f"{v},1e-4,{s},t,{50 + 9 * (v == 'x') + s / 10}" for v in ("lora", "x")
              for s in range(5)]  # fmt: skip
    file = tmp_path / "five.csv"
    file.write_text("\n".join(lines))
    row = judged(file)["x"]
    assert row.verdict == "inconclusive"
    assert row.unreachable
    assert row.seeds_needed == 6
    assert "0.0625" in row.reason
    assert "6 seeds a task would find" in row.reason


@pytest.mark.slow
def test_no_number_of_seeds_that_one_plans_may_be_enough(tmp_path: Path) -> None:
    file = tmp_path / "five.csv"
    lines = ["variant,lr,seed,task,score"]
    lines += [f"x,1e-4,{s},t,{59 + s / 10}" for s in range(5)]
    noisy = [f"lora,1e-4,{s},t,{50 + 40 * (s % 2)}" for s in range(5)]
    file.write_text("\n".join([lines[0], *noisy, *lines[1:]]))
    row = judged(file)["x"]
    assert row.seeds_needed is None
    assert "not even 200 seeds" in row.reason


@pytest.mark.parametrize(("scale", "margin"), [(1, 0.01), (100, 1.0)])
def test_a_point_is_known_where_nothing_is_left_to_score(
    tmp_path: Path, scale: int, margin: float
) -> None:
    """One seed, three rates: the only scores are those that the rate was chosen on."""
    lines = ["variant,lr,seed,task,score"]
    lines += [f"{v},{lr},0,t,{scale * score}" for v in ("lora", "x")
              for lr, score in (("1e-5", 0.5), ("1e-4", 0.7), ("1e-3", 0.6))]  # fmt: skip
    (tmp_path / "one.csv").write_text("\n".join(lines))
    report, _ = compare(load.csv(tmp_path / "one.csv"), Rules("lora"))
    assert report["verdicts"][0]["margin"] == margin
    assert all(0.1 < row["width"] < 0.5 for row in report["learning_rates"])


@pytest.mark.parametrize(("seeds", "said"), [(3, "inconclusive"), (4, "better")])
def test_few_seeds_do_not_choose_a_rate_for_one_another(
    tmp_path: Path, seeds: int, said: str
) -> None:
    """Six tasks, so that the test of signs alone could say it of either."""
    lines = ["variant,lr,seed,task,score"]
    lines += [
        f"{v},{lr},{s},t{t},{50 + 9 * (v == 'x') - 5 * (lr != '1e-4') + (s + t) % 3 / 10}"
        for v in ("lora", "x") for lr in ("1e-5", "1e-4", "1e-3") for s in range(seeds)
        for t in range(6)
    ]  # fmt: skip
    file = tmp_path / "few.csv"
    file.write_text("\n".join(lines))
    rows = verdicts.judge(verdicts.units(load.csv(file)), Rules("lora"))
    row = next(row for row in rows if row.task == verdicts.ALL)
    assert row.verdict == said
    assert (row.seeds_needed == 4 and "4 are the least" in row.reason) == (said == "inconclusive")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda rows: [r for r in rows if not (r[0] == "dora" and float(r[1]) > 1e-4)], "edge"),
        (lambda rows: [r for r in rows if not (r[0] == "dora" and float(r[1]) < 2e-6)], "unequal"),
        (lambda rows: [[*r[:2], str(int(r[2]) + 50 * (r[0] == "dora")), *r[3:]] for r in rows],
         "no seed in common"),
        (lambda rows: [[*r[:4], "nan"] if r[0] == "dora" else r for r in rows], "diverged"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_not(tmp_path: Path, change: Any, reason: str) -> None:
    head, *lines = table(tmp_path).read_text().splitlines()
    rows = change([line.split(",") for line in lines])
    (tmp_path / "results.csv").write_text("\n".join([head, *map(",".join, rows)]))
    row = judged(tmp_path / "results.csv")["dora"]
    assert row.verdict == "not comparable"
    assert reason in row.reason
    assert not row.unreachable  # ten blocks


def test_what_cannot_be_compared_says_that_its_blocks_are_few(tmp_path: Path) -> None:
    head, *lines = table(tmp_path).read_text().splitlines()
    rows = [row for row in (line.split(",") for line in lines) if int(row[2]) < 3]
    rows = [row for row in rows if not (row[0] == "dora" and float(row[1]) < 2e-6)]
    (tmp_path / "results.csv").write_text("\n".join([head, *map(",".join, rows)]))
    row = judged(tmp_path / "results.csv")["dora"]
    assert (row.verdict, row.n, row.unreachable) == ("not comparable", 3, True)


def test_own_rates_lose_nothing_and_ties_are_ties(tmp_path: Path) -> None:
    lines = []
    for name in ("lora", "pissa", "dora"):
        for lr, score in ((1e-3, 1.0), (1e-2, 2.0 + (name == "dora"))):
            lines += [f"{name},{lr},{seed},math,{score}" for seed in range(6)]
    (tmp_path / "ties.csv").write_text("\n".join(["variant,lr,seed,task,score", *lines]))
    found = compare(load.csv(tmp_path / "ties.csv"), Rules("lora", margin=1.0))[0]
    assert [(r["first"], r["ahead"]) for r in found["winners"]] == [
        ("dora, lora, pissa", 0.0), ("dora", 1.0)
    ]  # fmt: skip
    assert {r["variant"]: r["at_baseline_lr"] for r in found["regret"]} == {
        "lora": 0.0, "pissa": 0.0, "dora": 0.0
    }  # fmt: skip


def test_a_rate_at_which_runs_diverged_has_no_regret(tmp_path: Path) -> None:
    """Neither the score of the seed that had luck, nor one between those of its neighbours."""
    lines = []
    for lr, score in ((1e-4, 0.1), (1e-3, 0.5), (1e-2, 0.4)):
        lines += [f"lora,{lr},{seed},math,{score}" for seed in range(6)]
        lost = lr == 1e-3
        lines += [f"dora,{lr},{seed},math,{'diverged' if lost and seed else score}"
                  for seed in range(6)]  # fmt: skip
    (tmp_path / "lost.csv").write_text("\n".join(["variant,lr,seed,task,score", *lines]))
    found = compare(load.csv(tmp_path / "lost.csv"), Rules("lora", margin=1.0))[0]["regret"]
    assert {r["variant"]: r["at_baseline_lr"] for r in found} == {"lora": 0.0, "dora": None}


def test_scores_that_are_all_zero_have_no_profile(tmp_path: Path) -> None:
    file = tmp_path / "zeros.csv"
    for score, count in (("0.0", 0), ("1.0", 1), ("-1.0", 1)):
        lines = [f"{name},1e-3,{seed},math,{score}" for name in OPTIMA for seed in range(6)]
        file.write_text("\n".join(["variant,lr,seed,task,score", *lines]))
        assert len(compare(load.csv(file), Rules("lora", margin=1.0))[0]["profiles"]) == count


def test_a_flat_curve_has_no_edge() -> None:
    generator = np.random.default_rng(0)
    flat = np.where(np.arange(5) == 4, -0.01, 0.0) + 0.2 * generator.normal(size=(6, 5))
    rising = -np.arange(5.0) + 0.05 * generator.normal(size=(6, 5))
    assert bracket(flat) == "inside"
    level = flat - flat.mean(axis=0) - 0.01 * (np.arange(5) == 4)
    assert bracket(level) == "high edge, within noise"
    assert bracket(level[:, ::-1]) == "low edge, within noise"
    assert bracket(rising) == "high edge"
    assert bracket(-rising) == "low edge"


def test_an_edge_within_noise_is_said_and_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generator, lines = np.random.default_rng(1), ["variant,lr,seed,task,score"]
    for name in ("lora", "dora"):
        lines += [f"{name},{lr},{seed},math,{50 + (lr == '1e-3') * 0.05 + generator.normal()}"
                  for seed in range(8) for lr in ("1e-5", "1e-4", "1e-3")]  # fmt: skip
    (tmp_path / "flat.csv").write_text("\n".join(lines))
    assert main(["--csv", str(tmp_path / "flat.csv"), "--margin", "5",
                 "--out", str(tmp_path / "out")]) == 0  # fmt: skip
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    (row,) = report["verdicts"]
    brackets = [row["bracket"], row["baseline_bracket"]]
    assert any(text.endswith("edge, within noise") for text in brackets)
    assert row["verdict"] != "not comparable"
    told = "by no more than noise"
    assert told in capsys.readouterr().out
    assert told in (tmp_path / "out" / "index.html").read_text()


def test_models_and_budgets_are_compared_apart(tmp_path: Path) -> None:
    one = table(tmp_path, model="a").read_text()
    two = table(tmp_path, model="b").read_text().splitlines()[1:]
    (tmp_path / "results.csv").write_text("\n".join([one, *two]))
    rows = verdicts.judge(verdicts.units(load.csv(tmp_path / "results.csv")), Rules("lora"))
    assert {row.scope for row in rows} == {"model a", "model b"}
    assert len(rows) == 6
    budgets = table(tmp_path, batch_size=8).read_text()
    more = table(tmp_path, batch_size=16).read_text().splitlines()[1:]
    (tmp_path / "results.csv").write_text("\n".join([budgets, *more]))
    rows = verdicts.judge(verdicts.units(load.csv(tmp_path / "results.csv")), Rules("lora"))
    head = [row for row in rows if row.task == verdicts.ALL]
    assert {row.verdict for row in head} == {"not comparable"}
    means = ("effect", "low", "high", "effect_naive", "score_naive", "score_corrected",
             "baseline_naive", "baseline_corrected", "improvement", "margin")  # fmt: skip
    assert {getattr(row, name) for row in head for name in means} == {None}
    assert {row.task for row in rows} > {"math (batch 8)", "math (batch 16)"}


def test_a_cell_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    file = table(tmp_path)
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines, lines[1]]))
    with pytest.raises(load.Unreadable, match="is there twice"):
        judged(file)


def made_run(folder: Path, **over: Any) -> None:
    """A run folder such as experiments/record.py leaves."""
    values = {"variant": "lora", "lr": 1e-3, "seed": 0, "split": "validation", "score": 0.5,
              "loss": 1.0, "status": "done"} | over  # fmt: skip
    parts = {"form": values["variant"], "init": "default", "scale": "standard",
             "allocation": "uniform", "update": "adamw", "base": "dense"}  # fmt: skip
    axes = {axis: {"name": name} for axis, name in parts.items()}
    result = {
        "schema": 1, "run_id": folder.name, "status": values["status"],
        "config": {"variant": values["variant"], "axes": axes, "rank": 8, "lr": values["lr"],
                   "seed": values["seed"], "task": "skills", "model": "tiny", "steps": 10,
                   "split": values["split"], "targets": "all-linear", "batch_size": 4},
        "metrics": {"primary": "exact_match", "base": {"loss": 3.0, "exact_match": 0.0},
                    "tuned": {"loss": values["loss"], "exact_match": values["score"]}},
        "forgetting": {"base": {"loss": 0.1}, "tuned": {"loss": 0.3}},
        "params": {"trainable": 100, "total": 1000},
        "time": {"init_s": 1.0, "train_s": 2.0, "eval_s": 0.5, "step_ms": 3.0},
        "memory": {"peak_bytes": 10, "saved_activation_bytes": 5, "stored_bits": 32.0},
        "tokens": {"seen": 100}, "flops": 1e6,
        "provenance": {"model": "m", "data": "d", "git": {"commit": "c", "dirty": False},
                       "packages": {"torch": "2"}, "device": "cpu"},
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "status.json").write_text(json.dumps({"status": values["status"]}))
    (folder / "env.json").write_text(json.dumps({"sources": {"experiments/train.py": "1"}}))
    rows = [{"step": s, "loss": 1.0, "grad_norm": 1.0, "seconds": s / 10,
             "validation/loss": 3.0 - s / 5} for s in range(0, 11, 5)]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    hits = [i < 200 * values["score"] for i in range(200)] if values["score"] else [False] * 200
    (folder / "predictions.jsonl").write_text("".join(
        json.dumps({"id": str(i), "reference": "a", "base": "b", "tuned": "a" if h else "b"}) + "\n"
        for i, h in enumerate(hits)))  # fmt: skip


def test_runs_are_tuned_on_validation_and_confirmed_on_test(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for name, gain in (("lora", 0.0), ("dora", 0.2)):
        for seed in range(2):
            for lr, loss in ((1e-4, 1.2), (1e-3, 1.0), (1e-2, 1.5)):
                made_run(tmp_path / f"{name}-{lr}-{seed}", variant=name, seed=seed, lr=lr,
                         loss=loss + 0.01 * generator.normal(), score=0.9)  # fmt: skip
        for seed in range(10, 18):
            made_run(tmp_path / f"{name}-test-{seed}", variant=name, seed=seed, split="test",
                     score=0.5 + gain + 0.02 * generator.normal())  # fmt: skip
    made_run(tmp_path / "dora-diverged", variant="dora", seed=9, lr=1e-1, status="diverged",
             score=None, loss=None)  # fmt: skip
    made_run(tmp_path / "lora-tried", variant="lora", seed=9, lr=1e-1, loss=9.0)
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "status.json").write_text(
        json.dumps({"status": "failed", "error": "OSError: full\nmore"})
    )
    runs, unfinished = load.runs([tmp_path])
    report, _ = compare(runs, Rules("lora"), unfinished)
    (row,) = report["verdicts"]
    assert (row["verdict"], row["n"], row["selection"]) == ("better", 8, "confirmed")
    assert row["lr"] == 1e-3
    assert row["score_naive"] == pytest.approx(0.9)
    assert row["score_corrected"] == pytest.approx(0.7, abs=0.03)
    assert row["margin"] == 0.01  # a point of a share
    assert row["item_wins"] is not None
    assert report["runs"]["diverged"] == 1
    assert "runs that are not finished and count nowhere: 1" in report["notes"]
    assert report["runs"]["unfinished"] == [
        {"run": "half", "status": "failed", "error": "OSError: full"}
    ]
    assert {r["variant"]: r["diverged"] for r in report["stability"]} == {"dora": 1, "lora": 0}
    reached = {r["variant"]: r for r in report["time_to_target"]}
    assert reached["dora"]["seconds"] == pytest.approx(2.0)  # a second of it the start
    assert all(not r["unlike"] for r in report["fairness"] if r["variant"] == "lora")


def test_one_variant_in_two_settings_is_two_methods(tmp_path: Path) -> None:
    """The preset's own alpha has its plain name; what is one for all runs is not said."""
    for alpha, dropout in ((16.0, 0.0), (64.0, 0.1)):
        for lr in (1e-4, 1e-3):
            folder = tmp_path / f"lora-{alpha}-{lr}"
            made_run(folder, lr=lr)
            (folder / "config.yaml").write_text(
                f"alpha: {alpha}\ndropout: {dropout}\ntargets: q\noptim: {{schedule: linear}}\n"
            )
    runs, _ = load.runs([tmp_path])
    assert sorted(set(runs["variant"])) == ["lora", "lora +alpha=64 +dropout=0.1"]


def test_trained_numbers_may_differ_within_a_variant(tmp_path: Path) -> None:
    for name, lr, trained in (("lora", 1e-3, 100), ("lora", 1e-2, 300), ("dora", 1e-3, 100)):
        made_run(tmp_path / f"{name}-{lr}", variant=name, lr=lr)
        result = json.loads((tmp_path / f"{name}-{lr}" / "result.json").read_text())
        result["params"]["trainable"] = trained
        (tmp_path / f"{name}-{lr}" / "result.json").write_text(json.dumps(result))
    report, _ = compare(load.runs([tmp_path])[0], Rules("lora"), [])
    assert {r["variant"]: "trained" in r["unlike"] for r in report["fairness"]} == {
        "lora": False, "dora": True
    }  # fmt: skip


def test_the_runs_of_a_report_are_a_csv_that_says_the_same(tmp_path: Path) -> None:
    """But for what predictions tell; a split that is none is refused."""
    for k, name in enumerate(("lora", "dora")):
        for lr, loss in ((1e-4, 1.2), (1e-3, 1.0), (1e-2, 1.5)):
            made_run(tmp_path / f"{name}-{lr}", variant=name, lr=lr, loss=loss)
        for seed in range(10, 18):
            made_run(tmp_path / f"{name}-{seed}", variant=name, seed=seed, split="test",
                     score=0.5 + 0.2 * k + seed / 1000)  # fmt: skip
        made_run(tmp_path / f"{name}-far", variant=name, lr=1e-1, status="diverged",
                 score=None, loss=None)  # fmt: skip
    runs, file = load.runs([tmp_path])[0], tmp_path / "runs.csv"
    load.saved(runs, file)
    one, two = (compare(t, Rules("lora"))[0] for t in (runs, load.csv(file)))
    (row,), (again,) = one["verdicts"], two["verdicts"]
    items = ("item_wins", "mcnemar", "low", "high", "bootstrap_low", "bootstrap_high")
    assert {k: v for k, v in row.items() if k not in items and again[k] != v} == {}
    assert (row["verdict"], row["selection"], row["n"]) == ("better", "confirmed", 8)
    assert one["winners"] == two["winners"] and one["regret"] == two["regret"]
    assert set(load.csv(file)["run"]) == set(runs["run"]), "each row is traced to its folder"
    file.write_text(file.read_text().replace(",test,", ",dev,"))
    with pytest.raises(load.Unreadable, match="split=dev: validation or test"):
        load.csv(file)


def test_naive_is_the_best_mean_score_of_all_rates(tmp_path: Path) -> None:
    """At a rate that the loss does not choose; a rate with a diverged run is none."""
    tried = {1e-4: (1.2, 0.95), 1e-3: (1.0, 0.9), 1e-2: (1.5, 0.2)}
    for name in ("lora", "dora"):
        for lr, (loss, score) in tried.items():
            for seed in range(2):
                made_run(tmp_path / f"{name}-{lr}-{seed}", variant=name, lr=lr, seed=seed,
                         loss=loss, score=score - 0.1 * seed)  # fmt: skip
        for seed, status in enumerate(("done", "diverged")):
            made_run(tmp_path / f"{name}-far-{seed}", variant=name, lr=1e-1, seed=seed, loss=3.0,
                     score=1.0, status=status)  # fmt: skip
        made_run(tmp_path / f"{name}-test", variant=name, seed=9, split="test", score=0.5)
    (row,) = verdicts.judge(verdicts.units(load.runs([tmp_path])[0]), Rules("lora"))
    assert row.lr == 1e-3
    assert (row.score_naive, row.baseline_naive) == (pytest.approx(0.9), pytest.approx(0.9))
    assert row.score_corrected == 0.5


def test_less_is_better_also_when_a_rate_is_chosen(tmp_path: Path) -> None:
    head, *lines = table(tmp_path).read_text().splitlines()
    rows = [line.split(",") for line in lines]
    rows = [[*row[:4], f"{100 - float(row[4]):.3f}"] for row in rows]
    (tmp_path / "errors.csv").write_text("\n".join([head, *map(",".join, rows)]))
    more, less = (load.csv(tmp_path / f"{name}.csv") for name in ("results", "errors"))
    one = compare(more, Rules("lora", margin=1.0))[0]["verdicts"]
    two = compare(less, Rules("lora", margin=1.0, lower_is_better=True))[0]["verdicts"]
    for a, b in zip(one, two, strict=True):
        assert (a["verdict"], a["lr"]) == (b["verdict"], b["lr"])
        assert a["effect"] == pytest.approx(b["effect"])
        assert a["score_naive"] == pytest.approx(100 - b["score_naive"])


def test_what_lies_inside_a_run_is_no_run(tmp_path: Path) -> None:
    """`python -m experiments.evaluate RUN` leaves a result of its own kind there."""
    for name in ("lora", "dora"):
        made_run(tmp_path / "study" / name, variant=name)
        inside = tmp_path / "study" / name / "evaluations" / "skills-test"
        inside.mkdir(parents=True)
        (inside / "result.json").write_text(json.dumps({"tuned": {"loss": 1.0}}))
    found, unfinished = load.runs([tmp_path])
    assert sorted(found["run"]) == ["dora", "lora"]
    assert unfinished == []


def test_memory_on_a_cpu_is_that_of_a_step_where_it_was_counted(tmp_path: Path) -> None:
    """Else that of the process, and the two are not put into one front."""

    def costs(**memory: dict[str, Any]) -> tuple[dict[str, tuple[Any, str]], list[str]]:
        for name, more in memory.items():
            file = tmp_path / name / "result.json"
            if not file.exists():
                made_run(file.parent, variant=name)
            result = json.loads(file.read_text())
            result["memory"] = {"peak_bytes": 900, "saved_activation_bytes": 5,
                                "stored_bits": 32.0} | more  # fmt: skip
            file.write_text(json.dumps(result))
        report, _ = compare(load.runs([tmp_path])[0], Rules("lora"))
        fronts = [r["cost"] for r in report["fronts"]]
        return {r["variant"]: (r["peak_bytes"], r["peak_of"]) for r in report["costs"]}, fronts

    cpu = {"peak_of": "the process", "step_peak_bytes": 20}
    gpu = {"peak_of": "tensors on the GPU", "step_peak_bytes": 20}
    found, fronts = costs(lora=cpu, dora=cpu | {"step_peak_bytes": 30})
    one = "tensors of one backward"
    assert found == {"lora": (20, one), "dora": (30, one)}
    assert "peak_bytes" in fronts
    found, fronts = costs(lora=gpu, dora={"step_peak_bytes": None})
    assert found == {"lora": (900, "tensors on the GPU"), "dora": (900, "the process")}
    assert "peak_bytes" not in fronts


def test_a_truncated_result_is_left_out_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("lora", "dora", "cut"):
        made_run(tmp_path / "runs" / name, variant="lora" if name == "cut" else name)
    file = tmp_path / "runs" / "cut" / "result.json"
    file.write_text(file.read_text()[:100])
    assert main([str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["runs"]["finished"] == 2
    assert [(r["run"], r["status"]) for r in report["runs"]["unfinished"]] == [("cut", "truncated")]
    told = f"left out: {file}: truncated, or not json"
    assert told in "".join(report["notes"])
    assert told.replace(" ", "") in "".join(capsys.readouterr().out.split())


def test_a_result_of_another_schema_is_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made_run(tmp_path / "runs" / "lora")
    file = tmp_path / "runs" / "lora" / "result.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"schema": 2}))
    assert main([str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 1
    assert f"error: {file}: schema 2; this code reads schema 1" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["predictions.jsonl", "metrics.jsonl"])
def test_a_truncated_line_is_refused_by_file_and_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    for variant in ("lora", "dora"):
        made_run(tmp_path / "runs" / variant, variant=variant)
    file = tmp_path / "runs" / "dora" / name
    whole = '{"id": "a", "reference": "b", "tuned": "b", "step": 1, "loss": 1.0}\n'
    (tmp_path / "runs" / "lora" / name).write_text(whole)
    file.write_text(whole + whole[:20])
    assert main([str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 1
    assert f"error: {file}, line 2: truncated, or not json" in capsys.readouterr().err


def test_departures_of_a_study_stand_above_its_fairness(tmp_path: Path) -> None:
    for name in ("lora", "dora"):
        made_run(tmp_path / "mine" / name, variant=name)
    (tmp_path / "mine" / "study.json").write_text(json.dumps({"name": "mine", "hash": "1"}))
    folder, page = str(tmp_path / "mine"), tmp_path / "out" / "index.html"
    assert main([folder, "--out", str(tmp_path / "out")]) == 0
    assert "protocol" not in page.read_text()
    for lines in (["no anchor full, <b>", "no stage 2"], []):
        (tmp_path / "mine" / "ledger.json").write_text(json.dumps({"departures": lines}))
        assert main([folder, "--out", str(tmp_path / "out")]) == 0
        text = page.read_text()
        above = text[text.index("<h2>Fairness") : text.index("In red: what is unlike")]
        if lines:
            assert "Less than the protocol: no anchor full, &lt;b&gt;." in above
            assert "Less than the protocol: no stage 2." in above
        else:
            assert "names no departure" in above
        report = json.loads((tmp_path / "out" / "report.json").read_text())
        assert report["study"]["departures"] == lines


def test_other_code_is_another_scope(tmp_path: Path) -> None:
    for i, name in enumerate(("lora", "dora")):
        made_run(tmp_path / name, variant=name)
        (tmp_path / name / "env.json").write_text(
            json.dumps({"sources": {"experiments/train.py": str(i), f"variants/{name}.py": "0"}})
        )
    rows = verdicts.judge(verdicts.units(load.runs([tmp_path])[0]), Rules("lora"))
    assert [row.verdict for row in rows] == ["not comparable"]
    assert rows[0].scope.startswith("code ")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere"], "nowhere: no such folder"),
        (["."], "no run folders"),
        ([], "give run folders, or --csv FILE"),
        (["--csv", "none.csv"], "No such file"),
        (["--csv", "bad.csv"], "no column 'lr'"),
        (["--csv", "odd.csv"], "odd.csv, line 2: score=high: not a number"),
        (["--csv", "text.csv"], "text.csv, line 2: seed=mean of 3: not a whole number"),
        (["--csv", "zero.csv"], "zero.csv, line 4: lr=0: a positive number is needed"),
        (["--csv", "less.csv"], "less.csv, line 2: lr=-1e-3: a positive number is needed"),
        (["--csv", "no_lr.csv"], "no_lr.csv, line 2: lr=: a positive number is needed"),
        (["--csv", "name.csv"], "name.csv, line 2: variant=: a name is needed"),
        (["--csv", "task.csv"], "task.csv, line 2: task=: a name is needed"),
        (["--csv", "rank.csv"], "rank.csv, line 2: rank=r8: not a whole number"),
        (["--csv", "results.csv", "--baseline", "loraa"], "--baseline loraa: no run of it here"),
        (["--csv", "results.csv", "--margin", "-1"], "--margin -1.0: a positive number"),
        (["--csv", "results.csv", "--level", "0"], "--level 0.0: between 0 and 1"),
        (["--wandb", "project"], "ENTITY/PROJECT"),
    ],
)
def test_bad_input_is_one_line(
    words: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    table(tmp_path)
    Path("bad.csv").write_text("variant,seed\nlora,1\n")
    Path("odd.csv").write_text("variant,lr,seed,task,score\nlora,1e-3,0,t,high\n")
    head, good = "variant,lr,seed,task,score\n", "lora,1e-3,0,t,1\n"
    Path("zero.csv").write_text(f"{head}{good}\nlora,0,0,t,1\n")
    Path("less.csv").write_text(f"{head}lora,-1e-3,0,t,1\n{good}")
    Path("no_lr.csv").write_text(f"{head}lora,,0,t,1\n{good}")
    Path("name.csv").write_text(f"{head} ,1e-3,0,t,1\n{good}")
    Path("task.csv").write_text(f"{head}lora,1e-3,0,,1\n{good}")
    Path("rank.csv").write_text("rank,variant,lr,seed,task,score\nr8,lora,1e-3,0,t,1\n")
    Path("text.csv").write_text("variant,lr,seed,task,score\nlora,1e-3,mean of 3,t,1\n")
    assert main([*words, "--out", "report"]) == 1
    told = capsys.readouterr().err
    assert said in told
    assert told.count("\n") == 1
    assert not Path("report").exists()


def test_a_score_that_is_no_number_counts_as_diverged_and_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = table(tmp_path).read_text().splitlines()
    lines.insert(1, "")  # a blank line counts as one
    for place, text in ((2, ""), (3, "n/a"), (5, "inf"), (6, "nan"), (7, "diverged")):
        lines[place] = f"{lines[place].rpartition(',')[0]},{text}"
    file = tmp_path / "lost.csv"
    file.write_text("\n".join(lines))
    words = ["--csv", str(file), "--margin", "5", "--out", str(tmp_path / "out")]
    assert main(words) == 0
    told = "lines 3, 4, 6, 7: no finite number as score, counted as a diverged run"
    assert told in " ".join(capsys.readouterr().out.split())
    assert told in (tmp_path / "out" / "index.html").read_text()
    assert json.loads((tmp_path / "out" / "report.json").read_text())["runs"]["diverged"] == 5


def test_a_wandb_project_is_read_as_the_tracker_wrote_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against W&B's API with its answers put in; `job.summary` is what a finished run sends."""
    from types import SimpleNamespace

    import wandb
    from test_run import lab

    from experiments.job import summary

    lab("variant=lora", "rank=2", "train.steps=2", "eval.limit=4", "track.mode=disabled",
        out=tmp_path)  # fmt: skip
    (folder,) = (tmp_path / "single").glob("*")
    result = json.loads((folder / "result.json").read_text())
    runs = [SimpleNamespace(name="one", summary=summary(result)),
            SimpleNamespace(name="two", summary={"loss": 1.0})]  # fmt: skip
    monkeypatch.setattr(wandb, "Api", lambda **_: SimpleNamespace(runs=lambda project: runs))
    (row,) = load.wandb("who/what").to_dict("records")
    (own,) = load.runs([tmp_path])[0].to_dict("records")
    for key in ("variant", "rank", "lr", "seed", "score", "loss", "model_hash", "data_hash"):
        assert row[key] == own[key], key


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report over a csv."""
    folder = tmp_path_factory.mktemp("compare")
    assert main(["--csv", str(table(folder)), "--out", str(folder / "report")]) == 0
    return folder / "report"


def test_tuned_is_said_where_rates_were_tried(report: Path, tmp_path: Path) -> None:
    assert "<h1>Against tuned lora: 400 runs</h1>" in (report / "index.html").read_text()
    lines = ["variant,lr,seed,task,score"]
    lines += [f"{v},1e-4,{s},t,{50 + s / 10}" for v in ("lora", "x") for s in range(3)]
    (tmp_path / "one.csv").write_text("\n".join(lines))
    assert main(["--csv", str(tmp_path / "one.csv"), "--out", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "index.html").read_text()
    assert "<h1>Against lora: 6 runs</h1>" in page
    assert "nothing here shows that any was tuned" in page


def test_every_file_is_there(report: Path) -> None:
    found = json.loads((report / "report.json").read_text())
    assert found["schema"] == 1
    keys = {"variant", "task", "verdict", "effect", "low", "high", "p", "n", "lr", "score_naive",
            "score_corrected"}  # fmt: skip
    assert all(keys <= set(row) for row in found["verdicts"])
    for suffix in ("tex", "csv", "md"):
        assert "hira" in (report / "tables" / f"verdicts.{suffix}").read_text()
    assert {p.suffix for p in (report / "figures").iterdir()} == {".svg", ".png"}
    assert all(p.stat().st_size > 5000 for p in (report / "figures").glob("*.png"))


def test_the_page_asks_the_network_for_nothing(report: Path) -> None:
    text = (report / "index.html").read_text()
    links = re.findall(r'(?:src|href)="([^"#]*)', text) + re.findall(r"url\(([^#)]*)\)", text)
    assert {link for link in links if link} <= {"data:,"}
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))


CHECK = """<script>
const table = document.querySelector('table'), say = {};
const names = () => [...table.tBodies[0].rows].map(row => row.cells[0].textContent);
const column = [...table.tHead.rows[0].cells].findIndex(c => c.textContent === 'effect');
const press = () => table.tHead.rows[0].cells[column].querySelector('button').click();
press(); say.up = names(); press(); say.down = names();
say.figures = [...document.querySelectorAll('figure svg')].map(
  svg => svg.getBoundingClientRect().height);
say.loaded = performance.getEntriesByType('resource').map(entry => entry.name);
say.wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
document.title = 'said ' + JSON.stringify(say);
</script></body>"""


@pytest.mark.parametrize("width", [390, 1200])
def test_the_page_in_a_browser(report: Path, tmp_path: Path, width: int) -> None:
    """Headless Chromium: tables sort, figures show, a phone needs no scrolling sideways."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium here: the page is not looked at by a browser")
    page = tmp_path / "page.html"
    page.write_text((report / "index.html").read_text().replace("</body>", CHECK))
    done = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={tmp_path / 'profile'}",
         f"--window-size={width},900", "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    said = re.search(r"<title>said (.*?)</title>", done.stdout)
    assert said is not None, done.stderr[-500:]
    told = json.loads(said[1].replace("&amp;", "&"))
    assert told["up"] == ["dora", "pissa", "hira"] or told["up"] == ["pissa", "dora", "hira"]
    assert told["down"] == told["up"][::-1]
    assert len(told["figures"]) >= 4
    assert min(told["figures"]) > 60
    assert told["loaded"] == []
    assert told["wide"] <= 1


def test_one_method_under_two_names_is_seldom_told_apart() -> None:
    """A corner of the table that `python -m analysis.calibration` makes: two errors above 5 %."""
    generator = np.random.default_rng(0)
    for design, count in (
        (Design(6, 1, margin=0.5), 200),
        (Design(6, 1, rates=7, margin=0.5), 100),
    ):
        wrong = [said(study(design, generator), "better", "worse") for _ in range(count)]
        assert np.mean(wrong) <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / count)


@pytest.mark.parametrize(
    ("n", "level"), [(8, 0.05), (13, 0.0025), (14, 0.005), (16, 0.05 / 65), (17, 0.05 / 101)]
)
def test_the_detectable_effect_is_found_four_times_of_five(n: int, level: float) -> None:
    """By the test itself, on other noise, at levels of families too; and less effect is found less
    often."""
    noise = np.random.default_rng(5).standard_normal((400, n))
    for share, low, high in ((1.0, 0.74, 0.86), (0.7, 0.0, 0.6)):
        size = share * stats.detectable(n, level)
        found = np.mean([stats.sign_flip([row + size]) <= level for row in noise])
        assert low <= found <= high, (size, found)


def test_what_no_test_reaches_is_not_planned() -> None:
    assert stats.detectable(17, 1e-6) == math.inf, "fewer than one of the drawn flips"


def test_power_at_the_detectable_effect() -> None:
    generator = np.random.default_rng(0)
    size = stats.detectable(8, 0.05) * math.sqrt(2)
    design = Design(8, 1, effect=size, margin=size)
    found = [study(design, generator)[0].verdict == "better" for _ in range(200)]
    assert 0.7 <= np.mean(found) <= 0.9
