"""Frozen dataclasses from plain values, strictly: an unknown name or a wrong type is an error that names the field."""

import ast
import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from jax_it.errors import UserError


def override(tree: dict[str, Any], name: str, text: str, raw: tuple[str, ...]) -> None:
    """Sets `tree`'s entry at a dotted name; numbers index lists (data.train.0.path).

    Texts stay texts, which `build` reads as the types ask; those below `raw`, which has no types, are read now.
    """
    *parents, last = re.sub(r"\[(\d+)\]", r".\1", name).split(".")
    node: Any = tree
    where = "config"
    for key in parents:
        node = _entry(node, key, where)
        where += f".{key}"
    if isinstance(node, list):
        _entry(node, last, where)
        node[int(last)] = text
    elif isinstance(node, dict):
        node[last] = _literal(text) if tuple(parents[: len(raw)]) == raw else text  # `build` refuses unknown names
    else:
        raise UserError(f"{where} has no field {last!r}: it is a single value")


def _entry(node: Any, key: str, where: str) -> Any:
    if not isinstance(node, (dict, list)):
        raise UserError(f"{where} has no field {key!r}: it is a single value")
    try:
        return node[int(key)] if isinstance(node, list) else node[key]
    except (KeyError, ValueError, IndexError):
        names = [str(i) for i in range(len(node))] if isinstance(node, list) else list(node)
        raise UserError(f"{where} has no entry {key!r}{_suggest(key, names)}") from None


def _suggest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; it has: {', '.join(known)}" if known else "; it is empty"


def build(kind: Any, value: Any, where: str) -> Any:
    """`value` as the declared type `kind`. Texts, which the command line gives, are read as the type asks.

    A type with a `parse(text, where)` reads its own text. Raises UserError that names the field.
    """
    if hasattr(kind, "parse"):
        return value if isinstance(value, kind) else kind.parse(str(value), where)
    if dataclasses.is_dataclass(kind):
        return _build_dataclass(typing.cast(type, kind), value, where)
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        if value not in args:
            raise UserError(f"{where}: {value!r} is not one of {', '.join(map(repr, args))}")
        return value
    if origin is types.UnionType:
        if value is None or (isinstance(value, str) and value.lower() == "none"):
            return None
        return build(args[0], value, where)
    if origin is tuple:
        if isinstance(value, str):
            listed = _literal(value)
            # One text is a list of one; a Jinja template too may begin with a bracket.
            value = listed if isinstance(listed, (list, tuple)) else [value] if args[0] is str else value
        if not isinstance(value, (list, tuple)):
            raise UserError(f"{where}: expected a list, got {value!r}")
        return tuple(build(args[0], item, f"{where}.{i}") for i, item in enumerate(value))
    if origin is Mapping:
        value = _literal(value) if isinstance(value, str) else value
        if not isinstance(value, Mapping):
            raise UserError(f"{where}: expected a mapping, got {value!r}")
        return dict(value)
    return _build_scalar(kind, value, where)


def _build_scalar(kind: type, value: Any, where: str) -> Any:
    if kind is not str and isinstance(value, str):
        value = _literal(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        raise UserError(f"{where}: expected {kind.__name__}, got {value!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{where}: {value} is not a finite number")
    return value


def _literal(text: str) -> Any:
    """The value that a text from the command line stands for; the text itself where it is no literal."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError):  # a TypeError for a list as a key
        return text


def _build_dataclass(kind: type, value: Any, where: str) -> Any:
    if isinstance(value, kind):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(kind)}
    if not isinstance(value, Mapping):
        raise UserError(f"{where}: expected a section with fields, got {value!r}")
    hints = typing.get_type_hints(kind)
    for key in value:
        if key not in hints:
            raise UserError(f"{where}.{key} is not a setting{_suggest(str(key), list(hints))}")
    return kind(**{key: build(hints[key], item, f"{where}.{key}") for key, item in value.items()})
