"""Studies: the statement, equal trials, the choice, what is frozen, and one run of each kind."""

import json
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_run import lab

from experiments import study
from experiments.study import FRESH, Arm, Spec, Study, Tuning, grid, rate
from experiments.tasks import BadInput

OPTIMA = {"first": -12, "second": -22, "third": -12}  # the second lies beyond its grid


class Job:
    """A run as a sweep gives it back: its loss falls off with the distance to the optimum."""

    path = "run"

    def __init__(self, words: list[str]) -> None:
        given = dict(word.split("=") for word in words)
        optimum = OPTIMA[given["variant"]]
        k = 4 * math.log10(float(given["optim.lr"]))
        loss = 1 + (k - optimum) ** 2 / 100 + int(given["seed"]) / 1000
        done = k < -4
        result = {"status": "done" if done else "diverged", "tokens": {"seen": 100},
                  "metrics": {"tuned": {"loss": loss if done else None}}}  # fmt: skip
        self.folder, self.given = SimpleNamespace(result=result), given


def make(tmp_path: Path, **tuning: Any) -> tuple[Study, list[list[Job]], list[Arm]]:
    spec = Spec("Which?", "smoke", list(OPTIMA), [], ranks=[4], baseline="first", confirm=3,
                tuning=Tuning(**tuning))  # fmt: skip
    asked: list[list[Job]] = []

    def finish(combinations: list[list[str]]) -> list[Job]:
        asked.append([Job(words) for words in combinations])
        return asked[-1]

    config = SimpleNamespace(out_dir=str(tmp_path), dry=False)
    work: Any = SimpleNamespace(config=config, finish=finish)
    found = Study(work, "mine", spec, ["study=mine", "device=cpu"])
    arms = [Arm((f"variant={n}", "rank=4"), f"{n} r4", -12, 10, None) for n in OPTIMA]
    return found, asked, arms


def test_every_variant_gets_equal_trials_and_the_best_rate(tmp_path: Path) -> None:
    found, asked, arms = make(tmp_path, decades=2.0)
    (tmp_path / "mine").mkdir()
    assert found._tune(arms)
    counts = Counter(job.given["variant"] for stage in asked for job in stage)
    assert len(set(counts.values())) == 1
    assert [arm.best for arm in arms] == [-12, -22, -12]
    assert [arm.extensions for arm in arms] == [0, 2, 0]
    ledger = json.loads((tmp_path / "mine" / "ledger.json").read_text())["arms"]
    assert len({(row["trials"], row["tokens"]) for row in ledger}) == 1
    assert [row["bracket"] for row in ledger] == ["inside"] * 3
    assert all(job.given["track.stage"] == "stage_1" for job in asked[0])


def test_a_best_rate_that_stays_on_the_edge_is_said(tmp_path: Path) -> None:
    found, _, arms = make(tmp_path, decades=2.0, extensions=0, refine=False)
    (tmp_path / "mine").mkdir()
    assert found._tune(arms)
    ledger = json.loads((tmp_path / "mine" / "ledger.json").read_text())["arms"]
    assert [row["bracket"] for row in ledger] == ["inside", "low edge", "inside"]


def test_only_the_confirmation_reads_the_test_split_on_fresh_seeds(tmp_path: Path) -> None:
    found, asked, arms = make(tmp_path, decades=2.0)
    (tmp_path / "mine").mkdir()
    found._tune(arms)
    tuning = len(asked)
    assert found._confirm(arms)
    assert all("eval.split" not in job.given for stage in asked[:tuning] for job in stage)
    tuned = {job.given["seed"] for stage in asked[:tuning] for job in stage}
    fresh = {job.given["seed"] for job in asked[-1]}
    assert {job.given["eval.split"] for job in asked[-1]} == {"test"}
    assert fresh == {str(FRESH + i) for i in range(3)}
    assert not tuned & fresh


def test_a_diverged_rate_is_never_the_best(tmp_path: Path) -> None:
    arm = Arm((), "x", -4, 1, None, tried={-4: {0: math.inf}, -6: {0: 2.0}, -8: {0: 3.0}})
    assert arm.best == -6
    arm.tried[-8][1] = 3.0  # more seeds than the others
    assert arm.best == -8


def test_what_was_frozen_stays(tmp_path: Path) -> None:
    found, _, arms = make(tmp_path)
    found._freeze()
    found._freeze()
    stated = json.loads((tmp_path / "mine" / "study.json").read_text())["hash"]
    assert stated and f"track.frozen='{stated}'" in found._run_words(arms[0], -12, 0, "stage 1")
    other, _, _ = make(tmp_path, decades=4.0)
    with pytest.raises(BadInput, match=r"frozen as .* with another tuning"):
        other._freeze()


def test_missing_runs_end_the_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found, _, arms = make(tmp_path)
    whole = found.work.finish

    def lossy(combinations: Any) -> Any:
        jobs = whole(combinations)
        jobs[3].folder.result = None
        return jobs

    found.work.finish = lossy  # type: ignore[method-assign]
    assert not found._tune(arms)
    assert "1 of 21 runs are not finished" in capsys.readouterr().err


def test_rates_lie_on_one_grid() -> None:
    rates = [rate(k) for k in grid(-14, 3, 2)]
    assert len(rates) == 7
    assert rates[0] == pytest.approx(rates[-1] / 1000, rel=1e-3)


@pytest.mark.parametrize("name", study.names())
def test_the_studies_that_ship_can_be_read(name: str) -> None:
    spec = study.find(name)
    assert spec is not None
    assert spec.question.endswith("?")
    assert spec.tier in ("smoke", "standard", "paper")
    assert len(spec.variants) >= 3


def test_a_statement_that_is_wrong_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "FOLDER", tmp_path)
    (tmp_path / "odd.yaml").write_text("question: x?\ntier: smoke\nvariant: [a]\n")
    with pytest.raises(BadInput, match=r"study=odd: .*variant"):
        study.find("odd")
    (tmp_path / "both.yaml").write_text(
        "question: x?\ntier: smoke\nvariants: [a]\nanchors: []\nconfirm: 1\nranks: [1]\nbudget: 2\n"
    )
    with pytest.raises(BadInput, match="ranks or budget"):
        study.find("both")
    assert study.find("none") is None


def test_what_a_study_chooses_is_no_setting(tmp_path: Path) -> None:
    work: Any = SimpleNamespace(config=SimpleNamespace(out_dir=str(tmp_path), dry=False))
    spec = Spec("Which?", "smoke", list(OPTIMA), [], ranks=[4], confirm=3)
    for word in ("seed=3", "variant=first", "variant/init=second", "optim.lr=1"):
        with pytest.raises(BadInput, match=f"{word}: a study chooses that"):
            Study(work, "mine", spec, ["study=mine", word]).run()


def test_a_ledger_says_where_it_falls_short(tmp_path: Path) -> None:
    found, _, arms = make(tmp_path, decades=2.0, refine=False)
    (tmp_path / "mine").mkdir()
    found._tune(arms)
    said = json.loads((tmp_path / "mine" / "ledger.json").read_text())["departures"]
    for start in (
        "no anchor ",
        "stage 1 has 2 points a decade over 2",
        "no stage 2",
        "unreachable: 3 paired",
        "unequal steps around the rates chosen: first r4 x1.78, second r4 x3.16, third r4 x1.78",
    ):
        assert any(line.startswith(start) for line in said), (start, said)
    anchors = list(study._defaults().anchors)
    whole = Spec("Which?", "paper", list(OPTIMA), anchors, ranks=[4], confirm=9)
    assert Study(found.work, "mine", whole, [])._departures(arms[:1]) == []


def test_a_study_without_m_is_no_single_run_in_its_folder(tmp_path: Path) -> None:
    said = lab("study=smoke", out=tmp_path / "runs", code=1)
    assert "study=smoke: a study is started with -m" in said.stderr
    assert not (tmp_path / "runs").exists()
