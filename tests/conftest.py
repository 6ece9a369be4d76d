"""Fixtures: real data through LORA_DATA, no network, no progress bars."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # small products; a busy machine; equal bits
os.environ.pop("WANDB_API_KEY", None)
gc.disable()  # until all is collected: what imports and tests make is there to stay


def pytest_pycollect_makeitem(collector: pytest.Collector, name: str, obj: Any) -> list[Any] | None:
    """Slow tests that are not asked for are thousands: they are not made, to be thrown away."""
    slow = any(mark.name == "slow" for mark in getattr(obj, "pytestmark", ()))
    return [] if slow and "not slow" in collector.config.option.markexpr else None


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real models and data sets, or a skip that says why."""
    where = os.environ.get("LORA_DATA")
    if not where:
        pytest.skip("LORA_DATA is not set: the folder of real models and data sets")
    return Path(where)


@pytest.fixture(scope="session")
def stories(data: Path) -> Path:
    """A real pretrained Llama of 260,032 parameters."""
    return data / "models" / "stories260K"


@pytest.fixture(scope="session", autouse=True)
def forked() -> Iterator[None]:
    """Servers of isolated runs start at once, but where a test says otherwise."""
    from test_run import FORKS, Fork

    from experiments import isolate

    with pytest.MonkeyPatch.context() as patch:
        if FORKS.get_start_method() == "fork":
            patch.setattr(isolate, "Server", Fork)
        yield
        isolate.close()
