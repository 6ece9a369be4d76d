"""LoRA variants: a registry of parts on six axes, and one call that puts them into a model.

    import variants
    adapter = variants.attach(model, "dora", rank=16, init="pissa", base="nf4")

Names and descriptions come from the files' syntax trees; torch is imported by the first `attach`.
"""

from typing import TYPE_CHECKING, Any

from ._registry import Incompatible, describe, names, parts

if TYPE_CHECKING:
    from ._adapter import Adapter, attach, choose, plan
    from ._io import load
    from ._merge import dequantize
    from ._peft import load_peft

_LATE = {
    "Adapter": "_adapter",
    "attach": "_adapter",
    "choose": "_adapter",
    "dequantize": "_merge",
    "plan": "_adapter",
    "load": "_io",
    "load_peft": "_peft",
}

__all__ = [
    "Adapter",
    "Incompatible",
    "attach",
    "choose",
    "dequantize",
    "describe",
    "load",
    "load_peft",
    "names",
    "parts",
    "plan",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    if name in _LATE:
        from importlib import import_module

        return getattr(import_module(f"{__name__}.{_LATE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
