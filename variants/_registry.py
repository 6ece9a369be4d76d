"""Finds the variants without importing torch: names, axes, defaults and help from syntax trees.

A file of this package that does not start with an underscore is a variant file. Each class in it
that derives from an axis and has a `name=` is a part; each call of `preset(...)` names a variant.
Defaults are literals, so that the command line can read them without running anything.

A variant file may lie anywhere: its path stands for its name (`variant=mine.py`, or
`mine.py:name` where it has several), the environment's LORA_VARIANTS lists files, and an installed
package offers a module by an entry point of the group `lora_variants`.
"""

import ast
import difflib
import hashlib
import importlib
import importlib.util
import os
import re
import sys
import textwrap
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import cache, cached_property
from importlib.metadata import entry_points
from pathlib import Path
from types import NoneType
from typing import Any

AXES = ("form", "init", "scale", "allocation", "update", "base")
PACKAGE = Path(__file__).parent
OUTSIDE = "LORA_VARIANTS"  # files in the environment, so that the processes of a sweep have them
FACTORS = "LORA_FACTORS"  # in the environment of a sweep's runs: its largest rank (_svd.py)
GROUP = "lora_variants"  # of entry points
_ABSTRACT = {"form": ("shapes", "weight")}  # what a part must bring itself
_KINDS = {"int": int, "float": float, "str": str}
_NUMBER, _WHOLE, _ALPHA, _TEXT = (int, float), (int, NoneType), (int, float, str, NoneType), (str,)
_ARGUMENTS = {"rank": _WHOLE, "alpha": _ALPHA, "lr": _NUMBER, "lr_origin": _TEXT, "targets": _TEXT,
              "parameters": _TEXT, "width": (int,), "width_exponent": _NUMBER}  # fmt: skip
_MEANT = {_NUMBER: "a number", _WHOLE: "a whole number, or None", _TEXT: "a text",
          _ALPHA: "a number, a multiple of the rank such as '2r', or None",
          (int,): "a whole number"}  # fmt: skip


class Incompatible(ValueError):
    """A name, rank, target or pair that cannot be built; the message names it and the choices."""


@dataclass(frozen=True)
class PartInfo:
    """A part of one axis, as its file declares it."""

    axis: str
    name: str
    module: str  # importable
    cls: str
    doc: str
    fields: dict[str, tuple[str, Any]] = field(default_factory=dict)  # name -> (type, default)
    docs: dict[str, str] = field(default_factory=dict)  # name -> its line of documentation
    traits: dict[str, Any] = field(default_factory=dict)  # the literal class attributes

    def load(self, **settings: Any) -> Any:
        """The part itself, with `settings` in place of its defaults."""
        return self._made(settings) if settings else self._default

    @cached_property
    def _default(self) -> Any:  # a part has no state: one will do
        return self._made({})

    def _made(self, settings: dict[str, Any]) -> Any:
        unknown = sorted(set(settings) - set(self.fields))
        if unknown:
            known = ", ".join(self.fields) or "none"
            raise Incompatible(
                f"{self.axis} {self.name} has no setting {unknown[0]!r}; its settings: {known}"
            )
        cls = getattr(imported(self.module), self.cls)
        lacking = [k for k in _ABSTRACT.get(self.axis, ()) if k not in _defined(cls)]
        if lacking:
            raise Incompatible(f"{self.module}: class {self.cls} has no `{lacking[0]}`")
        return cls(**settings)


@dataclass(frozen=True)
class PresetInfo:
    """A named choice on each axis, with the defaults of its paper."""

    name: str
    module: str
    doc: str  # the file's docstring
    axes: dict[str, dict[str, Any]]  # axis -> {"name": part, **settings}
    rank: int | None
    alpha: float | str | None  # a number, or a multiple of the rank such as "2r"
    lr: float
    lr_origin: str
    targets: str = "all-linear"
    parameters: str = ""  # of one matrix, where another axis leaves some of the form's untrained
    width: int = 4096  # of the model that lr is for: a 7B's, unless lr_origin names another
    width_exponent: float = 0.781  # at width d the rate is lr (width / d)^this


def _literal(node: ast.expr, where: str) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError as error:
        raise Incompatible(f"{where}: defaults and preset arguments are literals") from error


def _defined(cls: type) -> set[str]:
    """What a part has beside what the abstract classes of `_api.py` say."""
    return {name for base in cls.__mro__ if base.__module__ != f"{PACKAGE.name}._api"
            for name in vars(base)}  # fmt: skip


@cache
def _axis_classes() -> dict[str, tuple[str, dict[str, Any]]]:
    """The abstract classes of `_api.py`, each with its axis and the traits that it hands down."""
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for node in ast.parse((PACKAGE / "_api.py").read_text()).body:
        if isinstance(node, ast.ClassDef):
            for parent in node.bases:
                if isinstance(parent, ast.Name) and (parent.id in found or parent.id == "Part"):
                    axis, traits = found.get(parent.id, ("", {}))
                    traits = traits | _members(node, "_api")[1]
                    found[node.name] = traits.get("axis", axis), traits
    return found


def _members(
    node: ast.ClassDef, module: str
) -> tuple[dict[str, Any], dict[str, Any], dict[str, str]]:
    """(fields with type and default, literal class attributes, the fields' docs) of a part."""
    fields, traits, docs = {}, {}, {}
    last = None
    for item in node.body:
        if isinstance(item, ast.Expr) and isinstance(item.value, ast.Constant) and last is not None:
            docs[last] = str(item.value.value)
        last = None
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and item.value:
            kind, where = ast.unparse(item.annotation), f"{module}.{node.name}.{item.target.id}"
            if kind.startswith("ClassVar"):
                traits[item.target.id] = _literal(item.value, where)
            else:
                last = item.target.id
                fields[last] = (kind, _literal(item.value, where))
        elif isinstance(item, ast.Assign) and isinstance(item.targets[0], ast.Name):
            traits[item.targets[0].id] = _literal(item.value, f"{module}.{node.name}")
    return fields, traits, docs


def _part(node: ast.ClassDef, module: str, tree: ast.Module) -> PartInfo | None:
    """What the class declares, if it is a part with a name; with what its parent does, which is an
    abstract class or a part of another variant file (`from .vera import VeRA`)."""
    names = [_literal(k.value, module) for k in node.keywords if k.arg == "name"]
    parents = [p.id for p in node.bases if isinstance(p, ast.Name)] if names else []
    fields, traits, docs = _members(node, module)
    doc = ast.get_docstring(node) or ""
    for parent in parents:
        if parent in _axis_classes():
            axis, inherited = _axis_classes()[parent]
            return PartInfo(axis, names[0], module, node.name, doc, fields, docs,
                            inherited | traits)  # fmt: skip
        other = _elsewhere(parent, tree)
        if other is not None:
            return PartInfo(other.axis, names[0], module, node.name, doc, other.fields | fields,
                            other.docs | docs, other.traits | traits)  # fmt: skip
    if names:
        bases = ", ".join(ast.unparse(base) for base in node.bases) or "nothing"
        able = [name for name, (axis, _) in _axis_classes().items() if axis]
        raise Incompatible(
            f"{module}, line {node.lineno}: class {node.name} has a name, and so is a part, but "
            f"derives from {bases}: choices: {', '.join(able)}, or the class of a part "
            f"that is imported from its variant file"
        )
    return None


def _elsewhere(cls: str, tree: ast.Module) -> PartInfo | None:
    """The part of that class in the variant file that `tree` imports it from."""
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and cls in [a.name for a in node.names]:
            path = PACKAGE / f"{(node.module or '').rpartition('.')[2]}.py"
            if path.name.startswith("_") or not path.is_file():
                return None
            other = ast.parse(path.read_text())
            for own in other.body:
                if isinstance(own, ast.ClassDef) and own.name == cls:
                    return _part(own, f"{PACKAGE.name}.{path.stem}", other)
    return None


def _preset(call: ast.Call, module: str, doc: str) -> PresetInfo:
    given = {k.arg: _literal(k.value, f"{module}: preset") for k in call.keywords if k.arg}
    own = {f.name for f in fields(PresetInfo)} - {"name", "module", "doc", "axes"}
    wrong = sorted(set(given) - own - set(AXES))
    missing = [k for k in ("rank", "alpha", "lr", "lr_origin") if k not in given]
    if wrong or missing:
        what = f"has no argument {wrong[0]!r}" if wrong else f"lacks {missing[0]!r}"
        raise Incompatible(f"{module}, line {call.lineno}: preset {what}; its arguments: "
                           f"{', '.join((*AXES, *sorted(own)))}")  # fmt: skip
    for key, value in given.items():
        kind = _ARGUMENTS.get(key)
        if kind and (not isinstance(value, kind) or isinstance(value, bool)):
            raise Incompatible(
                f"{module}, line {call.lineno}: preset {key}={value!r}: {_MEANT[kind]} is needed"
            )
    axes = {}
    for axis, default in zip(
        AXES, ("lora", "default", "standard", "uniform", "adamw", "dense"), strict=True
    ):
        value = given.pop(axis, default)
        axes[axis] = {"name": value} if isinstance(value, str) else value
    name = _literal(call.args[0], module)
    return PresetInfo(name=name, module=module, doc=doc, axes=axes, **given)


def imported(module: str) -> Any:
    """A module of this package by its name, another by its file."""
    if not module.endswith(".py"):
        return importlib.import_module(module)
    name, stamp = f"{GROUP}.{module}", _stamp(Path(module))
    if name not in sys.modules or sys.modules[name].__dict__.get("__stamp__") != stamp:
        spec = importlib.util.spec_from_file_location(name, module)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look there
        try:
            spec.loader.exec_module(sys.modules[name])
        except Exception as error:
            del sys.modules[name]
            frames = traceback.extract_tb(error.__traceback__)
            lines = [frame.lineno for frame in frames if frame.filename == module]
            where = f"{module}, line {lines[-1]}" if lines else module
            raise Incompatible(f"{where}: {type(error).__name__}: {error}") from error
        except BaseException:
            del sys.modules[name]
            raise
        sys.modules[name].__stamp__ = stamp  # type: ignore[attr-defined]
    return sys.modules[name]


def _stamp(path: Path) -> tuple[int, int] | None:
    """Changes when the file does."""
    found = path.stat() if path.is_file() else None
    return found and (found.st_mtime_ns, found.st_size)


def _files() -> list[tuple[Path, str]]:
    """(file, module) of every variant file: this package's, then those from outside."""
    found = [(path, f"{PACKAGE.name}.{path.stem}") for path in sorted(PACKAGE.glob("[!_]*.py"))]
    return found + [(path, str(path)) for path in outside()]


def outside() -> list[Path]:
    """The variant files that lie outside this package."""
    found = [Path(name) for name in os.environ.get(OUTSIDE, "").split(os.pathsep) if name]
    for point in sorted(entry_points(group=GROUP)):
        spec = importlib.util.find_spec(point.value)
        if spec is None or spec.origin is None:
            raise Incompatible(f"entry point {point.name} = {point.value}: no such module")
        found.append(Path(spec.origin))
    return list(dict.fromkeys(found))


def outside_of(preset: str, parts: Mapping[str, Any]) -> list[Path]:
    """The files from outside that a preset and its parts ({axis: part}) come from."""
    modules = {find_part(axis, part.name).module for axis, part in parts.items()}
    modules.add(find_preset(preset).module)
    if all(module.startswith(f"{PACKAGE.name}.") for module in modules):
        return []
    return [path for path in outside() if str(path) in modules]


def said_by(file: Path) -> str:
    """The hash of what a variant file says: comments and layout do not count."""
    return hashlib.sha256(ast.dump(ast.parse(file.read_text())).encode()).hexdigest()


def from_file(name: str) -> str:
    """The name of a variant or a part; for a path, `mine.py` or `mine.py:name`, that in it."""
    given, _, wanted = name.partition(".py:") if ".py:" in name else (name, "", "")
    if not wanted and not name.endswith(".py"):
        return name
    path = Path(f"{given}.py" if wanted else given).expanduser().resolve()
    if not path.is_file():
        raise Incompatible(f"variant={name}: no such file")
    before = os.environ.get(OUTSIDE, "")
    known = before.split(os.pathsep)
    if path.parent != PACKAGE and (str(path) not in known or _seen.get(path) != _stamp(path)):
        if str(path) not in known:
            os.environ[OUTSIDE] = os.pathsep.join([*filter(None, known), str(path)])
        index.cache_clear()
        try:
            index()
        except Incompatible:  # what cannot be read is not left behind, in the way of all others
            os.environ[OUTSIDE] = before
            index.cache_clear()
            raise
        _seen[path] = _stamp(path)
    if wanted:
        return wanted
    inside = [n for n, info in index()[1].items() if _file_of(info.module) == path]
    if len(inside) != 1:
        raise Incompatible(
            f"variant={name}: {len(inside)} variants in this file; name one of them: "
            f"{name}:{inside[0] if inside else 'NAME'}"
        )
    return inside[0]


_seen: dict[Path, tuple[int, int] | None] = {}  # files from outside, as the index has them


def _file_of(module: str) -> Path:
    return Path(module) if module.endswith(".py") else PACKAGE / f"{module.rpartition('.')[2]}.py"


@cache
def index() -> tuple[dict[str, dict[str, PartInfo]], dict[str, PresetInfo]]:
    """All parts, by axis and name, and all presets, by name."""
    all_parts: dict[str, dict[str, PartInfo]] = {axis: {} for axis in AXES}
    presets: dict[str, PresetInfo] = {}
    for path, module in _files():
        try:
            tree = ast.parse(path.read_text())
        except SyntaxError as error:
            raise Incompatible(f"{_shown(path)}, line {error.lineno}: {error.msg}") from error
        except OSError as error:
            raise Incompatible(f"{OUTSIDE}: {path}: {error.strerror}") from error
        for node in tree.body:
            if isinstance(node, ast.ClassDef):
                part = _part(node, module, tree)
                if part is not None:
                    _add(all_parts[part.axis], part.name, part)
            elif (
                isinstance(node, ast.Expr)
                and isinstance(node.value, ast.Call)
                and isinstance(node.value.func, ast.Name)
                and node.value.func.id == "preset"
            ):
                found = _preset(node.value, module, ast.get_docstring(tree) or "")
                _add(presets, found.name, found)
    return all_parts, presets


def _shown(path: Path) -> str:
    return f"{PACKAGE.name}/{path.name}" if path.parent == PACKAGE else str(path)


def _add(table: dict[str, Any], name: str, info: Any) -> None:
    if name in table:
        raise Incompatible(f"{name!r} is named twice: in {table[name].module} and in {info.module}")
    table[name] = info


def preset(name: str, **choices: Any) -> None:
    """Names a variant: one part (or {"name": part, setting: value}) on each axis, and defaults.

    The call is read from the syntax tree; running it does nothing. Arguments, all literals: the
    six axes (default: LoRA's), `rank`, `alpha` (a number, or "2r"), `lr`, `lr_origin`, and where
    they are not the usual ones `targets`, `parameters` (the formula of the trained numbers),
    `width` (of the model that lr is for) and `width_exponent` (how lr is carried from that to
    another; 0: it is not).
    """


def names() -> list[str]:
    """Every preset.

    >>> {"lora", "pissa", "dora", "adalora", "qlora", "full", "factorized"} <= set(names())
    True
    """
    return sorted(index()[1])


def parts() -> dict[str, list[str]]:
    """Every part by axis; each name is accepted by `attach`.

    >>> {"none", "rslora", "standard"} <= set(parts()["scale"])
    True
    """
    return {axis: sorted(found) for axis, found in index()[0].items()}


def unknown(what: str, name: Any, choices: list[str]) -> Incompatible:
    """The error for a name that does not exist: says what was meant, and what there is."""
    near = difflib.get_close_matches(str(name), choices, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return Incompatible(f"{what}={name}: no such {what}{hint}; choices: {', '.join(choices)}")


def find_preset(name: str) -> PresetInfo:
    """The preset of that name or file, or `Incompatible` with the choices."""
    name = from_file(name)
    if name not in index()[1]:
        error = unknown("variant", name, names())
        raise Incompatible(f"{error}; or a file of your own: its path, or {OUTSIDE}=PATH in the "
                           f"environment, which also finds it for what it has trained")  # fmt: skip
    return index()[1][name]


def find_part(axis: str, name: str) -> PartInfo:
    """The part of that axis and name, or `Incompatible` with the choices."""
    if axis not in AXES:
        raise unknown("axis", axis, list(AXES))
    name = from_file(name) if isinstance(name, str) else name
    if name not in index()[0][axis]:
        raise unknown(axis, name, parts()[axis])
    return index()[0][axis][name]


def overrides(preset: str, words: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The axes of a preset that `words` change: AXIS=PART, or AXIS.SETTING=VALUE.

    A run's keys are such words too. The result is what `attach` takes.

    >>> overrides("gralora", ["init=default", "variant.form.k=4"])
    {'init': {'name': 'default'}, 'form': {'name': 'gralora', 'k': 4}}
    """
    own = find_preset(preset).axes
    found: dict[str, dict[str, Any]] = {}
    settings = []
    for word in words:
        key, equals, value = word.removeprefix("variant/").removeprefix("variant.").partition("=")
        axis, _, setting = key.partition(".")
        if axis not in AXES or not equals or not value:
            raise Incompatible(
                f"{word}: AXIS=PART or AXIS.SETTING=VALUE, an axis being one of {', '.join(AXES)}"
            )
        if setting:
            settings.append((axis, setting, value))
        else:
            found[axis] = {"name": find_part(axis, value).name}
    for axis, setting, value in settings:
        _set(axis, found.setdefault(axis, dict(own[axis])), setting, value)
    return found


def typed(axis: str, text: str) -> dict[str, Any]:
    """The part that NAME, or NAME.SETTING=VALUE.SETTING=VALUE, means, as `attach` takes it.

    >>> typed("base", "nf4.block=128")
    {'name': 'nf4', 'block': 128}
    >>> typed("update", "galore.factor=0.5.every=20")
    {'name': 'galore', 'factor': 0.5, 'every': 20}
    """
    name, *settings = re.split(r"\.(?=[A-Za-z_]\w*=)", text)
    part = {"name": find_part(axis, name).name}
    for word in settings:
        setting, _, value = word.partition("=")
        _set(axis, part, setting, value)
    return part


def _set(axis: str, part: dict[str, Any], setting: str, text: str) -> None:
    """Puts a setting that was typed into a part, or says which there are."""
    fields = find_part(axis, part["name"]).fields
    if setting not in fields:
        raise Incompatible(
            f"{axis} {part['name']} has no setting {setting!r}; its settings: "
            f"{', '.join(fields) or 'none'}"
        )
    part[setting] = _value(f"{axis}.{setting}", fields[setting][0], text)


def _value(key: str, kind: str, text: str) -> Any:
    try:
        return (
            {"true": True, "false": False}[text.lower()] if kind == "bool" else _KINDS[kind](text)
        )
    except (KeyError, ValueError):
        raise Incompatible(f"{key}={text}: this setting is of type {kind}") from None


def _blocks(doc: str) -> tuple[str, str, str]:
    """(citation: the first paragraph, equation: the first indented block, the remaining text)."""
    paragraphs = [block for block in doc.split("\n\n") if block.strip()] or [""]
    equations = [b for b in paragraphs if b.startswith("    ") and ">>>" not in b]
    rest = [b for b in paragraphs[1:] if b not in equations[:1]]
    equation = textwrap.dedent(equations[0]) if equations else ""
    return " ".join(paragraphs[0].split()), equation, "\n\n".join(rest)


def describe(name: str) -> dict[str, Any]:
    """What there is to know of a preset: paper, equation, axes, defaults, rank, parameters, notes.

    `parameters` is Python of r, m, n at the default settings, `parameters_in_words` says the same
    where that is hard to read, `settings` has a line on each setting, `needs` what it calibrates.

    >>> describe("dora")["parameters"]
    'r*(m + n) + m'
    """
    info = find_preset(name)
    paper, equation, notes = _blocks(info.doc)
    form = find_part("form", info.axes["form"]["name"])
    axes = {}
    for axis, chosen in info.axes.items():
        part = find_part(axis, chosen["name"])
        axes[axis] = {k: default for k, (_, default) in part.fields.items()} | chosen
    return {
        "name": info.name,
        "paper": paper,
        "equation": equation,
        "axes": axes,
        "defaults": {
            "rank": info.rank,
            "alpha": info.alpha,
            "lr": info.lr,
            "lr_origin": info.lr_origin,
            "width": info.width,
            "width_exponent": info.width_exponent,
            "targets": info.targets,
        },
        "rank": form.traits["rank_means"],
        "parameters": info.parameters or form.traits["parameters"],
        "parameters_in_words": "" if info.parameters else form.traits["parameters_in_words"],
        "shared_parameters": form.traits["shared_parameters"],
        "settings": {
            axis: dict(find_part(axis, chosen["name"]).docs) for axis, chosen in info.axes.items()
        },
        "needs": list(
            dict.fromkeys(
                k
                for axis in ("init", "allocation")
                for k in find_part(axis, info.axes[axis]["name"]).traits["needs"]
            )
        ),
        "notes": notes,
        "file": info.module
        if info.module.endswith(".py")
        else f"{info.module.replace('.', '/')}.py",
    }
