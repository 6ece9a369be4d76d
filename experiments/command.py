"""The command line around Hydra: what a user got wrong is one line, and the exit code says it."""

import contextlib
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from hydra._internal.hydra import Hydra
from hydra.errors import HydraException, MissingConfigException
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from variants._registry import Incompatible, from_file, unknown

from . import attempt
from .attempt import FULL, terminate
from .config import register
from .parallel import complain, refuse_sweep
from .record import EXPECTED, Terminated, interrupted, one_line

CONF = Path(__file__).parents[1] / "conf"


def guarded(main: Callable[[], Any]) -> int:
    """Runs Hydra's main. What a user got wrong is one line and exit code 1; the rest a traceback.

    With HYDRA_FULL_ERROR=1 every error keeps its traceback.
    """
    attempt.exit_code = 0
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra's own report hides the line that matters
    signal.signal(signal.SIGTERM, terminate)
    try:
        refuse_sweep(sys.argv)
        sys.argv[1:] = [_named(word) for word in sys.argv[1:]]
        register()
        with _composed_once(sys.argv[1:]):
            main()
        sys.stdout.flush()
    except (HydraException, OmegaConfBaseException) as error:
        if FULL:
            raise
        return complain(f"error: {explain(error)}")
    except BrokenPipeError:  # the reader of our output has left
        sys.stdout = None
        return 1
    except EXPECTED as error:  # a run's, or a file of variants/ that cannot be read
        if FULL:
            raise
        return complain(f"error: {one_line(error)}")
    except KeyboardInterrupt as error:
        complain(interrupted(error))
        return 143 if isinstance(error, Terminated) else 130
    return attempt.exit_code


@contextlib.contextmanager
def _composed_once(words: list[str]) -> Iterator[None]:
    """Hydra composes everything twice, the first time to look for `hydra.mode`, which -m says too.
    Where no word can set it, and no file of conf/ that is read unasked, it is not looked for.
    """
    looks = Hydra.get_mode
    files = (f for f in CONF.rglob("*.yaml") if f.parent.name != "experiment")
    may = any(re.search(r"^-+c|^\+|hydra\b(?!/)|experiment", word) for word in words)
    if not may and not any("mode:" in file.read_text() for file in files):
        Hydra.get_mode = lambda *_, **__: None  # type: ignore[method-assign]  # as where it fails
    try:
        yield
    finally:
        Hydra.get_mode = looks  # type: ignore[method-assign]


def _named(word: str) -> str:
    """The word as Hydra wants it: `variant=mine.py` by the name of the variant in that file,
    `rank_pattern={q: 2}` with the `+` of keys that are new."""
    key, _, value = word.partition("=")
    if key.partition(".")[0] in ("rank_pattern", "alpha_pattern"):
        return f"+{word}"
    if re.fullmatch(r"variant(/\w+)?", key) and "/" in value and ".py" not in value:
        raise Incompatible(
            f"{word}: the name of a variant, or the path of its file, which ends in .py"
        )
    if re.fullmatch(r"variant(/\w+)?", key) and ".py" in value:
        return f"{key}={','.join(from_file(name) for name in value.split(','))}"
    return word


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
