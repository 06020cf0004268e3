"""Settings: config files change the `default` ones, and `resolve` checks and freezes them.

A config file's `get_config(arg="")` takes `default()`, an `ml_collections.ConfigDict`, and changes what it needs.
`resolve` turns it into the frozen dataclasses of `settings`: an unknown key, a wrong type or an impossible combination
is a `UserError` that names the field.
"""

import dataclasses
import inspect
import os
import stat
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_collections

from jax_it import files, typed
from jax_it.config.checks import check, check_read, measured, without_unread
from jax_it.config.settings import (
    Config,
    Data,
    Duration,
    Eval,
    Kind,
    Lora,
    Mesh,
    Model,
    Optimizer,
    Rates,
    Source,
    Task,
    Train,
    Unit,
)
from jax_it.errors import UserError, shorten, shown

__all__ = [
    "Config", "Data", "Duration", "Eval", "Kind", "Lora", "Mesh", "Model", "Optimizer", "Rates", "Source", "Task",
    "Train", "Unit", "check_read", "default", "load", "measured", "override", "read", "reopen", "resolve", "to_dict",
    "without_unread",
]  # fmt: skip


def default() -> ml_collections.ConfigDict:
    """Return all settings at their defaults, to be changed in a config file."""
    # Types are checked by `resolve`, which reads a duration of 100 as "100 steps" and names the field at fault.
    return ml_collections.ConfigDict(to_dict(Config()), type_safe=False)


def to_dict(value: Any, where: str = "config", outer: tuple[int, ...] = ()) -> Any:
    """Convert a config or `ConfigDict` to plain dicts, lists, strings and numbers, which JSON can hold.

    `outer` holds the ids of the values that contain this one. Raises UserError for a value that contains itself or is
    nested too deeply to be read back.
    """
    if isinstance(value, Duration):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        items: Iterable[tuple[Any, Any]] = [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value)]
    elif isinstance(value, (Mapping, ml_collections.ConfigDict)):
        items = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    else:
        return value
    if id(value) in outer:
        raise UserError(f"{where} contains itself, which no setting can")
    if len(outer) > typed.MAX_DEPTH:
        raise UserError(f"{where} is nested more than {typed.MAX_DEPTH} levels deep")
    outer = (*outer, id(value))
    made = {key: to_dict(item, f"{where}.{typed.shown_name(key)}", outer) for key, item in items}
    return list(made.values()) if isinstance(value, (list, tuple)) else made


def load(path: str, overrides: Mapping[str, str] | None = None) -> Config:
    """Return the config of a file, `FILE` or `FILE:ARG`, with dotted overrides such as {"train.seed": "1"}."""
    return resolve(override(read(path), overrides or {}))


def override(tree: dict[str, Any], changes: Mapping[str, str]) -> dict[str, Any]:
    """Change the tree's entries at dotted names, and return the tree."""
    for name, text in changes.items():
        typed.override(tree, name, text, raw=("model", "architecture"))
    return tree


def read(path: str) -> dict[str, Any]:
    """Read the settings of a file or recipe, "FILE", "FILE:ARG", "NAME" or "NAME:ARG", as unchecked plain values."""
    file, _, arg = path.partition(":")
    if arg.startswith("//"):
        files.locate_local(path, "config file")  # refuses it
    is_name = bool(file) and os.sep not in file and not file.endswith(".py")
    file = recipe(file) if is_name else str(files.locate_local(file, "config file"))
    get_config = _get_config(file)
    try:
        # What it returns may be of any type, whose methods raise anything.
        config = get_config(arg)
        tree = to_dict(config)
        if inspect.iscoroutine(config):
            config.close()  # or Python warns that nobody awaited it
        if not isinstance(tree, dict):
            raise UserError(
                f"{file}: get_config({arg!r}) returned {_what(config)}, not a config; end it with 'return config'"
            )
        return tree
    except (UserError, KeyboardInterrupt):
        raise
    except BaseException as error:  # SystemExit among them: a config does not end the command
        raise UserError(f"{file}: get_config({arg!r}) failed: {_reason(error)}") from error


def recipe(name: str) -> str:
    """Return the file of one of jax_it's recipes. Raises UserError, which lists them, for an unknown name."""
    package = Path(__file__).parents[1]  # the recipes are inside it where a wheel is installed, else beside it
    folder = next(found for found in (package / "configs", package.parent / "configs") if found.is_dir())
    found = {file.stem: str(file) for file in [*sorted(folder.glob("*.py")), *sorted(folder.glob("*/*.py"))]}
    if name not in found:
        raise UserError(
            f"{shown(name)} is not a recipe; choose {', '.join(found)}, or name a config file, ending in .py"
        )
    return found[name]


def _get_config(file: str) -> Any:
    """Run a config file and return its function get_config."""
    try:
        kind = os.stat(file).st_mode
    except (OSError, ValueError) as error:  # ValueError: of NUL in the name
        missing = isinstance(error, (FileNotFoundError, NotADirectoryError))
        reason = "does not exist" if missing else f"cannot be read: {getattr(error, 'strerror', error)}"
        name = file if file.isprintable() and len(file) <= 300 else shown(file)
        raise UserError(f"config file {name} {reason}") from None
    if not stat.S_ISREG(kind):
        raise UserError(
            f"config file {file} is not a file, but a {'folder' if stat.S_ISDIR(kind) else 'device or pipe'}"
        )
    if not file.endswith(".py"):
        raise UserError(f"config file {file} is not Python; its name must end in .py")
    module = types.ModuleType("jax_it_config_file")
    module.__file__ = file
    try:
        # Not by the import system, which may take bytecode that it cached within the second before a change.
        exec(compile(Path(file).read_bytes(), file, "exec"), module.__dict__)
    except (UserError, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise UserError(f"config file {file} does not run: {_reason(error)}") from error
    if not hasattr(module, "get_config"):
        raise UserError(f"config file {file} has no get_config(arg='')")
    return module.get_config


def _what(value: Any) -> str:
    return "None" if value is None else f"a value of type {type(value).__name__}"


def _reason(error: BaseException) -> str:
    """Return an error's type and text, on one line."""
    kind = type(error).__name__
    # ml_collections wraps a KeyError, whose own text is in quotes, and suggests a name on a second line.
    while len(error.args) == 1 and isinstance(error.args[0], Exception):
        error = error.args[0]
    try:
        text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    except Exception:
        text = ""
    return f"{kind}: {shorten(text, 500)}"


def resolve(tree: Mapping[str, Any], training: bool = True) -> Config:
    """Return frozen, type-checked settings from nested dicts; without `training`, training data is not required.

    Raises UserError that names the field.
    """
    config = typed.build(Config, tree, "config")
    check(config, training)
    check_read(config, within="" if training else "eval.")
    return config


def reopen(tree: Mapping[str, Any]) -> Config:
    """Return the settings that a run was saved with, perhaps by an older version.

    Settings that are missing, or that have no effect, get their defaults.
    """
    config = without_unread(typed.build(Config, tree, "config"))
    check(config, training=True, saved=True)
    return config
