"""A job, as Hydra and its launchers call it: the single run, or one of a sweep's."""

import contextlib
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from variants import Incompatible

from . import isolate
from .config import restored, settings_of
from .parallel import Team, team, who
from .provenance import sources
from .record import EXPECTED, NOT_AGAIN, NotHere, Terminated, one_line
from .tasks import BadInput

STOP = "LORA_STOP"  # the file, in a job's environment, whose being there asks it to stop
FULL = os.environ.get("HYDRA_FULL_ERROR") == "1"
exit_code = 0  # of the command


def job(cfg: DictConfig) -> dict[str, Any] | None:
    """One composed configuration, as Hydra and its launchers call it; of a sweep's, its line."""
    hydra = HydraConfig.get()
    if hydra.mode != RunMode.MULTIRUN:
        return _single(cfg)
    about = about_job(cfg, hydra)
    if asked():
        return {"status": "interrupted", "error": "stopped"}
    if cfg.sweep.isolate:
        settings = settings_of(cfg).sweep
        with deaf():
            line = isolate.run(about, limit=settings.time_limit, grace=settings.grace, stop=asked)
    else:
        line = attempt(about)
        if line["status"] == "interrupted":
            raise KeyboardInterrupt(line["error"])
    return complained(line, hydra.job.override_dirname)


def about_job(cfg: DictConfig, hydra: Any) -> dict[str, Any]:
    """What the process of a job has to know; `hydra`: Hydra's part of the configuration."""
    return {"config": OmegaConf.to_container(cfg, resolve=True), "group": hydra.job.name,
            "cwd": hydra.runtime.cwd,
            "alone": hydra.runtime.choices["hydra/launcher"] == "basic"}  # fmt: skip


def complained(line: dict[str, Any], name: str) -> dict[str, Any]:
    """The line of a job of that name; what it failed of is said."""
    if line["status"] in NOT_AGAIN:
        line["error"] = line["error"][:1000]
        print(f"{line['status']}: {name}: {line['error']}", file=sys.stderr)
    return line


def _single(cfg: DictConfig) -> None:
    """The run of a command without -m."""
    global exit_code
    try:
        with team() as members:
            alone(cfg, members)
    except EXPECTED as error:  # here, since Hydra would add a line of its own
        if FULL:
            raise
        print(f"{who()}error: {one_line(error)}", file=sys.stderr)
        exit_code = 1


def alone(cfg: DictConfig, members: Team) -> None:
    """One run that is no part of a sweep, by the processes that it has."""
    settings = members.together(lambda: settings_of(cfg))
    from .job import prepare, run
    from .screen import Screen
    from .study import names

    if settings.study in names():
        raise BadInput(
            f"study={settings.study}: a study is started with -m; the folder of a single run takes "
            f"another name"
        )

    screen = Screen(quiet=members.rank > 0)
    prepared = members.together(lambda: prepare(settings))
    if settings.dry:
        screen.say(f"{prepared.folder.state:<12} {prepared.folder.path}")
        return
    if settings.sweep.time_limit or settings.sweep.retry:
        screen.say("sweep.time_limit and sweep.retry are for multiruns (-m): not used")
    try:
        run(prepared, screen, team=members)
    finally:
        screen.close()


def attempt(about: dict[str, Any], tell: Callable[[Path], Any] = lambda _: None) -> dict[str, Any]:
    """Runs one job of a sweep in this process, or the jobs of a pack; its line. `tell` hears of its
    folder at once."""
    if "pack" in about:
        from .packed import attempt_all

        return attempt_all(**about["pack"])
    from .job import alone

    return alone(attempting(about, tell))


def attempting(
    about: dict[str, Any], tell: Callable[[Path], Any] = lambda _: None, ground: Any = None
) -> Generator[Any, None, dict[str, Any]]:
    """The attempt, which gives its trainer out where the training belongs (job.py); its line."""
    from .job import Held, prepare, work
    from .screen import Screen

    screen, folder, found = Screen(brief=True, bar=about["alone"]), None, {}
    try:
        prepared = prepare(settings_of(restored(about["config"])))
        folder = prepared.folder
        found["run"] = str(folder.path)
        tell(folder.path)
        result = yield from work(prepared, screen, about["group"], ground=ground)
        return {"status": result["status"], **found}
    except Held as error:
        return {"status": "running", "error": one_line(error), **found}
    except KeyboardInterrupt as error:
        return {"status": "interrupted", "error": one_line(error) or "interrupted", **found}
    except Exception as error:
        known = isinstance(error, BadInput | Incompatible)
        line = {"status": "refused" if known else "failed", **found}
        line["error"] = one_line(error) if known else f"{type(error).__name__}: {one_line(error)}"
        if folder is None and not isinstance(error, EXPECTED):
            traceback.print_exc()  # else it is in run.log
        lacking = isinstance(error, NotHere)
        if (
            folder is not None
            and not lacking
            and (known or folder.status.get("status") != "failed")
        ):
            with contextlib.suppress(OSError):  # a full disk, which may be what it failed of
                folder.ended(line["status"], line["error"], sources())
        return line
    finally:
        screen.close()


def asked() -> int:
    """The signal by which the user asked this job's sweep to stop, or 0."""
    file = Path(os.environ.get(STOP, os.devnull))
    try:
        return int(file.read_text() or 0)
    except FileNotFoundError:
        return 0


@contextlib.contextmanager
def deaf() -> Iterator[None]:
    """A worker leaves a terminal's interrupt to the driver, which asks all jobs to stop."""
    driver = os.environ.get(STOP, "").endswith(f"-{socket.gethostname()}-{os.getpid()}.stop")
    if driver or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class SmallReturn(Callback):
    """A worker's answer is its job's line and no more.

    joblib's workers write to one pipe. One that is killed within a long message leaves half of it
    there, and the driver waits for the rest for ever; a write of less than 4 kB is all or nothing.
    """

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        job_return.cfg = job_return.hydra_cfg = None
        job_return.overrides = []


def terminate(*_: Any) -> None:
    """What SIGTERM does to a run: it leaves, with a checkpoint where it can."""
    raise Terminated
