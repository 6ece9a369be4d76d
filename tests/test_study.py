"""Studies: the statement, equal trials, the choice, what is frozen, and one run of each kind."""

import json
import math
from collections import Counter
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_run import lab

from experiments import study
from experiments.statement import FRESH, Spec, Tuning
from experiments.study import Arm, Study, grid, rate
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
    found.words.append("train.steps=3")
    with pytest.raises(BadInput, match=r"with another words \(train.steps=3\)"):
        found._freeze()


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


WHOLE = "question: x?\ntier: smoke\nvariants: [lora, dora]\nanchors: []\nranks: [2]\nconfirm: 1\n"
WRONG = [
    ("level: 3", r"level=3.0: between 0 and 1"),
    ("level: abc", r"level: Value 'abc' of type 'str' could not be converted to Float$"),
    ("confirm: 0", r"confirm=0: a whole number of 1 or more"),
    ("confirm: -1", r"confirm=-1: a whole number of 1 or more"),
    ("tuning: {seeds: 0}", r"tuning\.seeds=0: a whole number of 1 or more"),
    ("tuning: {refine_seeds: 0}", r"tuning\.refine_seeds=0: a whole number of 1 or more"),
    ("tuning: {extensions: -1}", r"tuning\.extensions=-1: a whole number of 0 or more"),
    ("tuning: {decades: -1}", r"tuning\.decades=-1.0: zero or a positive number"),
    ("tuning: {decades: 1.5}", r"tuning\.decades=1.5: .* with per_decade=2 it is a multiple of 1"),
    ("tuning: {per_decade: 3}", r"tuning\.per_decade=3: 1, 2 or 4"),
    ("tuning: {seed: 1}", r"tuning\.seed: no such key \(did you mean 'seeds'\?\); choices: dec"),
    ("tuning: 3", r"tuning=3: a mapping; its keys: decades, per_decade"),
    ("margin: -1", r"margin=-1.0: a positive number"),
    ("tier: smokey", r"tier=smokey: no such tier \(did you mean 'smoke'\?\); choices: smoke, stan"),
    ("variants: [lora, lora]", r"variants: lora is there twice"),
    ("variants: [lora, variant=lora]", r"variants: lora is there twice"),
    ("variants: []", r"variants: empty"),
    ("variants: [lora seed=3]", r"variants: seed=3: a study chooses that"),
    ("settings: [optim.lr=1]", r"settings: optim\.lr=1: a study chooses that"),
    ("models: [tiny]", r"models: tiny: words are KEY=VALUE"),
    ("ranks: [2, 2]", r"ranks: 2 is there twice"),
    ("ranks: [0]", r"ranks=0: a whole number of 1 or more"),
    ("marign: 1", r"marign: no such key \(did you mean 'margin'\?\); choices: question, tier"),
    ("question: [", r"odd\.yaml, line \d+: no YAML: "),
    ("question: ' '", r"question: empty"),
    ("- a", "odd.yaml"),
]


@pytest.mark.parametrize(("line", "message"), WRONG, ids=[line for line, _ in WRONG])
def test_what_cannot_be_stated_is_one_line(
    line: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "FOLDER", tmp_path)
    key = line.partition(":")[0]
    kept = [old for old in WHOLE.splitlines() if not old.startswith(f"{key}:")]
    (tmp_path / "odd.yaml").write_text("\n".join([*kept, line]))
    with pytest.raises(BadInput, match=f"^study=odd: {message}") as found:
        study.find("odd")
    assert "\n" not in str(found.value)
    (tmp_path / "odd.yaml").write_text(WHOLE)
    assert study.find("odd") is not None


def test_a_statement_lacks_what_it_has_to_say(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("variants: [lora]\nranks: [1]\n")
    with pytest.raises(BadInput, match=r"^study=mine: lacks question, tier, anchors, confirm$"):
        study.find(str(tmp_path / "mine.yaml"))


def test_the_docs_name_every_key_and_their_example_can_be_read(tmp_path: Path) -> None:
    page = (study.ROOT / "docs" / "sweeps.md").read_text()
    keys = [f.name for f in fields(Spec) if f.name != "tuning"]
    keys += [f"tuning.{f.name}" for f in fields(Tuning)]
    assert [key for key in keys if f"\n| `{key}` |" not in page] == []
    (tmp_path / "starts.yaml").write_text(page.partition("```yaml\n")[2].partition("```")[0])
    spec = study.find(str(tmp_path / "starts.yaml"))
    assert spec is not None and spec.ranks == [4, 8] and not spec.tuning.refine


def test_a_study_may_lie_in_any_file(tmp_path: Path) -> None:
    out, file = tmp_path / "runs", tmp_path / "mine.yaml"
    file.write_text(WHOLE)
    done = lab("-m", f"study={file}", "dry=true", out=out)
    assert "mine (smoke): x?" in done.stdout and str(out / "mine" / "lora-r2-") in done.stdout
    done = lab("-m", f"study={tmp_path / 'none.yaml'}", out=out, code=1)
    assert done.stderr == f"error: study={tmp_path / 'none.yaml'}: no such file\n"
    file.write_text(WHOLE + "level: 3\n")
    done = lab("-m", f"study={file}", out=out, code=1)
    assert done.stderr == "error: study=mine: level=3.0: between 0 and 1, such as 0.05\n"


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
