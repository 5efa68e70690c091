"""Read from their source what methods and TrainingArguments take: a typo must not wait for torch to be imported."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator, Mapping
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import fastadv
from fastadv.jobs.errors import UserError

Classes = Mapping[str, ast.ClassDef]
BASES = ("Method", "EmbeddingMethod")


class Signature(NamedTuple):
    """Hold the name of a method's class, and its options with their defaults."""

    name: str
    options: dict[str, Any]


@functools.cache
def methods() -> dict[str, Signature]:
    """List every method that fastadv exports, by its lower-case name."""
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in _sources()]
    classes = {node.name: node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)}
    (shared,) = (_value(node) for tree in trees for node in tree.body if _assigned(node) == "SHARED")
    exported = [name for name in fastadv.__all__ if name in classes and name not in BASES]
    return {
        name.lower(): Signature(name, _options(name, classes, shared))
        for name in exported
        if any(one.name == BASES[0] for one in _chain(name, classes))
    }


def training_fields() -> list[str]:
    """List the names of the TrainingArguments that a command line can give.

    Raises:
        UserError: transformers is not installed.
    """
    spec = find_spec("transformers")
    if spec is None or spec.origin is None:
        raise UserError("transformers is not installed: pip install 'fastadv[train]'")
    tree = ast.parse((Path(spec.origin).parent / "training_args.py").read_text(encoding="utf-8"))
    (arguments,) = (n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "TrainingArguments")
    return [name for node in arguments.body if isinstance(node, ast.AnnAssign) and (name := _field(node))]


def _field(node: ast.AnnAssign) -> str | None:
    """Name a field that `__init__` takes."""
    keywords = node.value.keywords if isinstance(node.value, ast.Call) else []
    hidden = any(one.arg == "init" and ast.unparse(one.value) == "False" for one in keywords)
    return None if hidden or "ClassVar" in ast.unparse(node.annotation) else _assigned(node)


def _sources() -> Iterator[Any]:
    package = files("fastadv")
    return (file for file in (*(package / "methods").iterdir(), package / "classic.py") if file.name.endswith(".py"))


def _assigned(node: ast.stmt) -> str | None:
    """Name what a statement assigns to."""
    target = (
        node.target if isinstance(node, ast.AnnAssign) else node.targets[0] if isinstance(node, ast.Assign) else None
    )
    return target.id if isinstance(target, ast.Name) else None


def _value(node: ast.stmt) -> Any:
    value = getattr(node, "value", None)
    return None if value is None else ast.literal_eval(value)


def _chain(name: str, classes: Classes) -> Iterator[ast.ClassDef]:
    """List a class and its bases in these files, nearest first."""
    if name in classes:
        yield classes[name]
        for base in classes[name].bases:
            yield from _chain(ast.unparse(base), classes)


def _options(name: str, classes: Classes, shared: Mapping[str, Any]) -> dict[str, Any]:
    """List the options of a constructor as `fastadv.methods.options.options_of` does; a test compares the two."""
    found: dict[str, Any] = {}
    chain = list(_chain(name, classes))
    for cls in chain:
        init = next((one for one in cls.body if isinstance(one, ast.FunctionDef) and one.name == "__init__"), None)
        if init is not None:
            found = {**_named(init.args), **found}
            table = init.args.kwarg and init.args.kwarg.annotation
            if isinstance(table, ast.Subscript):  # Unpack[a TypedDict]
                found |= {key: shared[key] for key in _keys(ast.unparse(table.slice), classes)}
            if init.args.kwarg is None or isinstance(table, ast.Subscript):
                break
    if "dropout" in found:
        own = (_value(node) for cls in chain for node in cls.body if _assigned(node) == "_dropout")
        found["dropout"] = next(own)
    scripts = [_value(node) for cls in chain for node in cls.body if _assigned(node) == "_classic"]
    return {key: default for key, default in found.items() if key not in (scripts or [()])[0]}


def _named(arguments: ast.arguments) -> dict[str, Any]:
    """List the parameters after `self` and `model`, with their defaults."""
    positional = arguments.args[-len(arguments.defaults) :] if arguments.defaults else []
    pairs = [
        *zip(positional, arguments.defaults, strict=True),
        *zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True),
    ]
    return {parameter.arg: default and ast.literal_eval(default) for parameter, default in pairs}


def _keys(name: str, classes: Classes) -> list[str]:
    """List the keys of a TypedDict, those of its bases first."""
    nodes = [node for cls in reversed(list(_chain(name, classes))) for node in cls.body]
    return [key for node in nodes if (key := _assigned(node))]
