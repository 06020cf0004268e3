"""Builds frozen dataclasses from plain values, strictly: an unknown name or a wrong type raises an error."""

import ast
import dataclasses
import difflib
import math
import re
import types
import typing
import warnings
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from jax_it.errors import UserError, shown

Name = Annotated[str, "name"]  # where a list of names is expected, "a,b" is split at the commas
MAX_DEPTH = 50  # of nested lists and mappings


def parts(name: str) -> list[str]:
    """Return the parts of a dotted name: "data.train[0].path" and "data.train.0.path" are the same."""
    return re.sub(r"\[(\d+)\]", r".\1", name).split(".")


def shown_name(name: Any) -> str:
    """Show a setting's name, or a value given in its place, in a message."""
    return name if isinstance(name, str) and name.isprintable() and len(name) <= 60 else shown(name)


def override(tree: dict[str, Any], name: str, text: str, raw: tuple[str, ...]) -> None:
    """Set `tree`'s entry at a dotted name. Numbers index lists (data.train.0.path); the next one appends to a list.

    Text stays text, which `build` converts to the declared type; below `raw`, which has no types, it is converted now.
    """
    *parents, last = parts(name)
    node: Any = tree
    where = "config"
    for key in parents:
        node = _entry(node, key, where)
        where += f".{shown_name(key)}"
    if isinstance(node, list):
        _entry(node, last, where)
        node[int(last)] = text
    elif isinstance(node, dict):
        node[last] = _literal(text) if tuple(parents[: len(raw)]) == raw else text  # `build` refuses unknown names
    else:
        raise UserError(f"{where} has no field {shown(last)}: it is a single value")


def _entry(node: Any, key: str, where: str) -> Any:
    if not isinstance(node, (dict, list)):
        raise UserError(f"{where} has no field {shown(key)}: it is a single value")
    if isinstance(node, dict) and key in node:
        return node[key]
    if isinstance(node, list) and key == str(len(node)):
        node.append({})
    if isinstance(node, list) and key.isascii() and key.isdigit() and len(key) < 10 and int(key) < len(node):
        return node[int(key)]
    names = [str(i) for i in range(len(node))] if isinstance(node, list) else list(map(str, node))
    raise UserError(f"{where} has no entry {shown(key)}{_suggest(key, names)}")


def _suggest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1) if len(name) <= 60 else []
    if close:
        return f"; did you mean {close[0]!r}?"
    if not known:
        return "; it is empty"
    return f"; it has: {', '.join(map(shown_name, known[:40]))}{', …' if len(known) > 40 else ''}"


def build(kind: Any, value: Any, where: str) -> Any:
    """Return `value` as the declared type `kind`. Text from the command line is converted to that type.

    A type with a `parse(text, where)` reads its own text. Raises UserError that names the field.
    """
    if hasattr(kind, "parse"):
        if isinstance(value, kind):
            return value
        if not isinstance(value, (str, int, float)):
            raise UserError(f"{where}: expected a {kind.__name__.lower()} as text or a number, got {shown(value)}")
        return kind.parse(value if isinstance(value, str) else shown(value), where)
    if dataclasses.is_dataclass(kind):
        return _build_dataclass(typing.cast(type, kind), value, where)
    if kind == Name:
        kind = str
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        if not isinstance(value, str) or value not in args:
            raise UserError(f"{where}: {shown(value)} is not one of {', '.join(map(repr, args))}")
        return value
    if origin is types.UnionType:
        if value is None or (isinstance(value, str) and value.lower() == "none"):
            return None
        return build(args[0], value, where)
    if origin is tuple:
        if isinstance(value, str):
            listed = _literal(value)
            if isinstance(listed, (list, tuple)):
                value = listed
            elif args[0] == Name:
                value = [name.strip() for name in value.split(",")]
            elif args[0] is str:  # one text is a list of one, also if it begins with a bracket, as a Jinja template may
                value = [value]
        if not isinstance(value, (list, tuple)):
            raise UserError(f"{where}: expected a list, got {shown(value)}")
        return tuple(build(args[0], item, f"{where}.{i}") for i, item in enumerate(value))
    if origin is Mapping:
        value = _literal(value) if isinstance(value, str) else value
        if not isinstance(value, Mapping):
            raise UserError(f"{where}: expected a mapping, got {shown(value)}")
        return _json_value(value, where, 0)
    return _build_scalar(kind, value, where)


_NAMES = {bool: "True or False", int: "a whole number", float: "a number", str: "text"}


def _build_scalar(kind: type, value: Any, where: str) -> Any:
    if kind is not str and isinstance(value, str):
        value = _literal(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = _float(value)
    if kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        raise UserError(f"{where}: expected {_NAMES[kind]}, got {shown(value)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{where}: {value} is not a finite number")
    if isinstance(value, str):
        _check_text(value, where)
    return value


def _float(value: int) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _check_text(text: str, where: str) -> None:
    """Refuse what no file, name or tokenizer takes: NUL, and lone surrogates, which bytes that are not UTF-8 become."""
    if "\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
        raise UserError(f"{where}: {shown(text)} has a character that is not text (NUL, or bytes that are not UTF-8)")


def _json_value(value: Any, where: str, depth: int) -> Any:
    """Return a value without a declared type, which must be one that JSON can represent."""
    if depth > MAX_DEPTH:
        raise UserError(f"{where} is nested more than {MAX_DEPTH} levels deep")
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise UserError(f"{where}: expected names to be text, got {shown(key)}")
            _check_text(key, where)
        return {key: _json_value(item, f"{where}.{shown_name(key)}", depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_value(item, f"{where}.{i}", depth + 1) for i, item in enumerate(value)]
    if isinstance(value, str):
        _check_text(value, where)
    elif isinstance(value, int) and abs(value) >= 2**63:
        raise UserError(f"{where}: {shown(value)} does not fit into 64 bits")
    elif isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{where}: {value} is not a finite number")
    elif value is not None and not isinstance(value, (bool, int, float)):
        raise UserError(f"{where}: {shown(value)} is of type {type(value).__name__}, which JSON cannot represent")
    return value


def _literal(text: str) -> Any:
    """Parse a value from the command line; return the text itself if it is not a literal."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        with warnings.catch_warnings(action="ignore"):  # about "\\d" in a text
            return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # a list as a key; deep nesting
        return text


def _build_dataclass(kind: type, value: Any, where: str) -> Any:
    if isinstance(value, kind):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(kind)}
    if not isinstance(value, Mapping):
        raise UserError(f"{where}: expected a section with fields, got {shown(value)}")
    hints = typing.get_type_hints(kind, include_extras=True)
    for key in value:
        if key not in hints:
            new = getattr(kind, "RENAMED", {}).get(key)
            suggestion = f"; did you mean {new!r}?" if new else _suggest(str(key), list(hints))
            raise UserError(f"{where}.{shown_name(key)} is not a setting{suggestion}")
    return kind(**{key: build(hints[key], item, f"{where}.{key}") for key, item in value.items()})
