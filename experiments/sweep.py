"""One job of the command line, and the table of a multirun. Imports torch only inside a job."""

import hashlib
import json
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from variants import Incompatible
from variants._registry import AXES, from_file, unknown

from .config import register, settings_of
from .parallel import Team, complain, refuse_sweep, team, who
from .record import Terminated, interrupted
from .tasks import BadInput

SWEEP = "LORA_SWEEP"  # the file, in the environment of a sweep's jobs, where each adds its line
FULL = os.environ.get("HYDRA_FULL_ERROR") == "1"
# what the user can mend: one line; anything else is ours, and keeps its traceback
EXPECTED = (BadInput, Incompatible, OSError)
_exit_code = 0


def job(cfg: DictConfig) -> None:
    """Runs one composed configuration. In a multirun a failure is noted and the next job starts."""
    global _exit_code
    if HydraConfig.get().mode != RunMode.MULTIRUN:
        try:
            _job(cfg, "single")
        except EXPECTED as error:  # here, since Hydra would add a line of its own
            if FULL:
                raise
            print(f"{who()}error: {one_line(error)}", file=sys.stderr)
            _exit_code = 1
        return
    file = Path(os.environ[SWEEP])
    words = list(HydraConfig.get().overrides.task)
    try:
        line = _job(cfg, file.stem)
    except EXPECTED as error:
        line = {"status": "refused", "error": one_line(error)}
    except Exception as error:
        line = {"status": "failed", "error": f"{type(error).__name__}: {one_line(error)}"}
        traceback.print_exc()
    if "error" in line:
        print(f"{line['status']}: {' '.join(words)}: {line['error']}", file=sys.stderr)
    with file.open("a") as handle:
        handle.write(json.dumps({"job": words, **line}) + "\n")


def _job(cfg: DictConfig, group: str) -> dict[str, Any]:
    with team() as members:
        return _run(cfg, group, members)


def _run(cfg: DictConfig, group: str, members: Team) -> dict[str, Any]:
    settings = members.together(lambda: settings_of(cfg))
    from .job import prepare, run
    from .screen import Screen

    screen = Screen(quiet=members.rank > 0)
    prepared = members.together(lambda: prepare(settings))
    if settings.dry:
        state = prepared.folder.state
        screen.say(f"{state:<12} {prepared.folder.path}")
        return {"status": state, "run": str(prepared.folder.path)}
    try:
        result = run(prepared, screen, group, members)
    finally:
        screen.close()
    return {"status": result["status"], "run": str(prepared.folder.path)}


class Table(Callback):
    """Prints what every job of a multirun came to, and makes the exit code of it."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        words = sorted(config.hydra.overrides.task)
        name = hashlib.sha256(" ".join(words).encode()).hexdigest()[:10]
        file = Path(config.hydra.sweep.dir) / f"sweep-{name}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("")
        os.environ[SWEEP] = str(file)

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        global _exit_code
        lines = [json.loads(line) for line in Path(os.environ[SWEEP]).read_text().splitlines()]
        if not config.dry:
            _print(lines)
        _exit_code = int(any(line["status"] not in ("done", "diverged") for line in lines))
        if config.dry:
            _exit_code = 0


def _print(lines: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table as RichTable

    from .record import read_json

    results = [read_json(Path(line.get("run", "")) / "result.json") for line in lines]
    more = _varying([result for result in results if result is not None])
    table = RichTable(title=f"{len(lines)} runs")
    for name in ("variant", "rank", "seed", "lr", *more, "status", "metric", "base", "tuned",
                 "trained", "seconds", "folder"):  # fmt: skip
        table.add_column(name, overflow="fold")
    for line, result in zip(lines, results, strict=True):
        if result is None:
            words = " ".join(line["job"])
            table.add_row("", "", "", "", *("" for _ in more), line["status"],
                          line.get("error", ""), "", "", "", "", words)  # fmt: skip
            continue
        config, metrics = result["config"], result["metrics"]
        primary = metrics["primary"]
        numbers = [metrics[when][primary] for when in ("base", "tuned")]
        table.add_row(
            config["variant"],
            str(config["rank"] or "-"),
            str(config["seed"]),
            f"{config['lr']:.2g}",
            *(show(result) for show in more.values()),
            line["status"],
            primary,
            *("-" if n is None else f"{n:.4f}" for n in numbers),
            f"{result['params']['trainable']:,}",
            f"{result['time']['train_s']:.1f}",
            Path(line["run"]).name,
        )
    width = None if sys.stdout.isatty() else 160
    Console(width=width).print(table)


def _varying(results: list[dict[str, Any]]) -> dict[str, Callable[[dict[str, Any]], str]]:
    """Columns for what differs: parts of an axis where runs of one variant have several (with
    their settings where the names are equal), bits of a base number, and the most memory."""

    def part(axis: str, settings: bool) -> Callable[[dict[str, Any]], str]:
        def show(result: dict[str, Any]) -> str:
            chosen = dict(result["config"]["axes"][axis])
            name = chosen.pop("name")
            return " ".join([name, *(f"{k}={v}" for k, v in chosen.items() if settings)])

        return show

    def count(show: Callable[[dict[str, Any]], str]) -> int:
        return len({(result["config"]["variant"], show(result)) for result in results})

    found = {}
    for axis in AXES:
        names, full = part(axis, False), part(axis, True)
        if count(full) > count(lambda result: ""):
            found[f"variant/{axis}"] = full if count(full) > count(names) else names
    for name, show in {"bits": _bits, "peak MiB": _peak}.items():
        if len({show(result) for result in results}) > 1:
            found[name] = show
    return found


def _bits(result: dict[str, Any]) -> str:
    return f"{result['memory']['stored_bits']:.7g}"


def _peak(result: dict[str, Any]) -> str:
    """GPU: what all tensors took at most. CPU: what they took in one backward, by exact count, as
    the peak of the process has the runs before it in it."""
    memory = result["memory"]
    on_cpu = memory.get("peak_of", "the process") == "the process"
    most = memory.get("step_peak_bytes") if on_cpu else memory["peak_bytes"]
    return "-" if most is None else f"{most / 2**20:,.2f}"


def one_line(error: BaseException) -> str:
    """The message without line breaks."""
    return " ".join(str(error).split())


def guarded(main: Callable[[], Any]) -> int:
    """Runs Hydra's main. What a user got wrong is one line and exit code 1; the rest a traceback.

    With HYDRA_FULL_ERROR=1 every error keeps its traceback.
    """
    global _exit_code
    _exit_code = 0
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra's own report hides the line that matters
    signal.signal(signal.SIGTERM, _terminate)
    try:
        refuse_sweep(sys.argv)
        sys.argv[1:] = [_named(word) for word in sys.argv[1:]]
        register()
        main()
        sys.stdout.flush()
    except (HydraException, OmegaConfBaseException) as error:
        if FULL:
            raise
        return complain(f"error: {explain(error)}")
    except (Incompatible, BadInput) as error:  # a file of variants/ that cannot be read
        if FULL:
            raise
        return complain(f"error: {one_line(error)}")
    except KeyboardInterrupt as error:
        complain(interrupted(error))
        return 143 if isinstance(error, Terminated) else 130
    except BrokenPipeError:  # the reader of our output has left
        sys.stdout = None
        return 1
    return _exit_code


def _named(word: str) -> str:
    """The word as Hydra wants it: `variant=mine.py` by the name of the variant in that file,
    `rank_pattern={q: 2}` with the `+` of keys that are new."""
    key, _, value = word.partition("=")
    if key.partition(".")[0] in ("rank_pattern", "alpha_pattern"):
        return f"+{word}"
    if re.fullmatch(r"variant(/\w+)?", key) and ".py" in value:
        return f"{key}={','.join(from_file(name) for name in value.split(','))}"
    return word


def _terminate(*_: Any) -> None:
    raise Terminated


def explain(error: BaseException) -> str:
    """Hydra's message in one line: the key, what is wrong, the choices."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, name = error.missing_cfg_file.rpartition("/")
        return str(unknown(group, name, list(error.options or [])))
    cause: Any = error.__cause__
    given = re.search(r"(?:override|merging override) '?([\w./@+~-]+)'?(=\S*)?", one_line(error))
    if isinstance(cause, ConfigAttributeError | ConfigKeyError) and given:
        known = (
            [f.name for f in fields(cause.object_type)] if is_dataclass(cause.object_type) else []
        )
        return str(unknown("key", given[1], known)).partition("=")[2]
    if isinstance(cause, OmegaConfBaseException) and given:
        return f"{given[1]}{given[2] or ''}: {one_line(cause).partition(' full_key:')[0]}"
    return one_line(error)
