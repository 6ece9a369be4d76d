"""Planted bugs are caught by facts and contract: a fixed sample, and all of them where slow."""

import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor

import pytest
from test_run import FORKS

from benchmarks import planted as bench
from benchmarks.bugs import BUGS, Bug
from benchmarks.planted import BROKEN, ENOUGH, MISSED, PACKAGE, controls, planted

# of a form, an init, an allocation, an optimizer and the core, each spread over the file's list
SAMPLE = ["cross term of the squared norm counted once",
          "the factors' s forgotten, so the base loses s times the part",
          "the moving average's betas swapped",
          "the sign of X",
          "s forgotten in backward"]  # fmt: skip


def trial(bugs: Sequence[Bug], jobs: int) -> list[str]:
    """From a process of its own: this one's server of forks has the project imported."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(bench.trial, bugs, jobs).result()


def test_a_sample_is_caught_and_what_is_right_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_context", lambda: FORKS)  # torch is there already
    found = {bug.mistake: bug for bug in reversed(BUGS)}
    (control,) = controls([bug for bug in BUGS if bug.file == "dora"])[:1]
    bugs = [*(found[mistake] for mistake in SAMPLE), control]
    *answers, right = [bench.caught_by(bug) for bug in bugs]
    assert not [answer for answer in answers if answer == MISSED or answer.startswith(BROKEN)]
    assert right == MISSED


def test_every_mistake_has_its_place() -> None:
    texts = {bug.file: (PACKAGE / f"{bug.file}.py").read_text() for bug in BUGS}
    assert not [bug.mistake for bug in BUGS if texts[bug.file].count(bug.old) != 1]


def test_a_text_that_has_moved_is_loud(tmp_path) -> None:
    with pytest.raises(SystemExit, match="has 0 times, not once"):
        planted(tmp_path, BUGS[0]._replace(old="no such text"))


@pytest.mark.slow
def test_all_are_caught() -> None:
    answers = trial(BUGS, jobs=2)
    assert not [answer for answer in answers if answer.startswith(BROKEN)]
    assert sum(answer != MISSED for answer in answers) >= ENOUGH * len(BUGS)
