"""What a sweep costs beside its runs: python -m benchmarks.sweep [--jobs 1000] [--runs 8]

Three figures, with the processor's seconds beside the clock's, which a busy machine stretches:
planning JOBS new combinations and handing them to a launcher, whose runs take no time here;
deciding, in a process of its own, that they are all finished; and what a tiny run takes in a sweep
beside its training and scoring, for the first run of a worker and for the others.
"""

import contextlib
import io
import itertools
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .sheet import Sheet

ROOT = Path(__file__).parents[1]
# a tiny model without old skills to score: what is left of a run is its overhead
TINY = ["model=config", "model.hidden_size=32", "model.layers=1", "model.heads=2", "task=lm",
        "train.steps=2", "train.batch_size=4", "train.seq_len=32", "eval.limit=4",
        "eval.limit_during=4", "track.mode=disabled"]  # fmt: skip


def text(folder: Path) -> str:
    """The word that names a small text to learn."""
    file = folder / "text.txt"
    if not file.exists():
        file.write_text("".join(f"line {i} of a small text, as good as any.\n" for i in range(200)))
    return f"task.path={file}"


@contextlib.contextmanager
def timed(found: dict[str, float]) -> Iterator[None]:
    """The clock's and the processor's seconds, children's included."""
    who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    began, before = time.perf_counter(), [resource.getrusage(w) for w in who]
    yield
    after = [resource.getrusage(w) for w in who]
    found["clock"] = time.perf_counter() - began
    found["processor"] = sum(a.ru_utime + a.ru_stime - b.ru_utime - b.ru_stime
                             for a, b in zip(after, before, strict=True))  # fmt: skip


def words_of(out: Path, seeds: int) -> list[str]:
    """A sweep of 20 x `seeds` combinations."""
    swept = ["variant=lora,pissa,dora,rslora", "rank=1,2,4,8,16", f"seed=range({seeds})"]
    return ["-m", *swept, *TINY, text(out), f"out_dir={out / 'runs'}"]


def plan_and_launch(words: list[str]) -> dict[str, float]:
    """The driver's whole work, in this process; a run is replaced by nothing."""
    from hydra import main

    from experiments import attempt, command, isolate

    def nothing(about: dict[str, Any], **_: Any) -> dict[str, Any]:
        return {"status": "done"}

    isolate.run, sys.argv = nothing, ["run.py", *words]  # type: ignore[assignment]
    hydra = main(version_base="1.3", config_path=str(ROOT / "conf"), config_name="config")
    found: dict[str, float] = {}
    with timed(found), contextlib.redirect_stdout(io.StringIO()):
        command.guarded(hydra(attempt.job))
    return found


def finish_all(out: Path) -> None:
    """Every planned run gets the files of one that was really run."""
    words = ["variant=lora", "rank=1", *TINY, text(out), f"out_dir={out / 'one'}"]
    subprocess.run([sys.executable, "run.py", *words], cwd=ROOT, check=True, capture_output=True)
    (one,) = (out / "one" / "single").glob("lora-*")
    jobs = json.loads((out / "runs" / ".sweeps" / "manifest.json").read_text())["jobs"]
    for job in jobs.values():
        folder = Path(job["path"])
        folder.mkdir(parents=True)
        for name in ("result.json", "env.json", "status.json"):
            shutil.copy(one / name, folder)


def run(words: list[str]) -> tuple[dict[str, float], str]:
    found: dict[str, float] = {}
    with timed(found):
        done = subprocess.run([sys.executable, "run.py", *words], cwd=ROOT, capture_output=True,
                              text=True)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return found, done.stdout


def overheads(out: Path, runs: int) -> list[float]:
    """Seconds between one run's end and the next one's, less training and scoring."""
    words = [
        "-m",
        "variant=lora",
        f"seed=range({runs})",
        *TINY,
        text(out),
        f"out_dir={out / 'few'}",
    ]
    began = time.time()
    run(words)
    results = sorted(
        (out / "few" / "single").glob("*/result.json"), key=lambda p: p.stat().st_mtime
    )
    ends = [began, *(p.stat().st_mtime for p in results)]
    spent = [json.loads(p.read_text())["time"] for p in results]
    return [b - a - t["train_s"] - t["eval_s"]
            for (a, b), t in zip(itertools.pairwise(ends), spent, strict=True)]  # fmt: skip


def main() -> None:
    """The command."""
    sheet = Sheet("sweep", __doc__)
    sheet.flag("--jobs", type=int, default=1000, help="a multiple of 20")
    sheet.flag("--runs", type=int, default=8)
    given = sheet.begin()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        words = words_of(out, given.jobs // 20)
        new = plan_and_launch(words)
        each = {name: f"{seconds / given.jobs:.3f} s" for name, seconds in new.items()}
        sheet.say(f"{given.jobs} new jobs, planned and launched: {_said(new)}")
        sheet.say(f"  a job: {each['clock']} ({each['processor']} of the processor)")
        finish_all(out)
        known, said = run(words)
        assert f"{given.jobs} runs: {given.jobs} done; nothing to run" in said, said[:500]
        sheet.say(f"{given.jobs} known jobs, found finished: {_said(known)}")
        spent = overheads(out, given.runs)
        rest = sorted(spent[1:])
        sheet.say(
            f"a run beside its training and scoring: {spent[0]:.2f} s for the first, then "
            f"{statistics.median(rest):.2f} s (of {len(rest)}; at most {rest[-1]:.2f} s)"
        )
    sheet.write({"jobs": given.jobs, "new": new, "known": known, "overheads_s": spent})


def _said(found: dict[str, float]) -> str:
    return f"{found['clock']:.1f} s ({found['processor']:.1f} s of the processor)"


if __name__ == "__main__":
    main()
