"""Settings: `default`, which a config file changes, and `resolve`, which makes of it what the code works with.

A config file's `get_config(arg="")` takes `default()`, an `ml_collections.ConfigDict`, and changes what it needs.
`resolve` turns it into the frozen dataclasses of `settings`: an unknown key, a wrong type or an impossible combination
is a `UserError` that names the field.
"""

import dataclasses
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_collections

from jax_it import files, typed
from jax_it.config.checks import check, measured
from jax_it.config.settings import (
    Config,
    Data,
    Duration,
    Eval,
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
from jax_it.errors import UserError

__all__ = [
    "Config", "Data", "Duration", "Eval", "Lora", "Mesh", "Model", "Optimizer",
    "Rates", "Source", "Task", "Train", "Unit", "default", "load", "measured", "override", "read", "resolve", "to_dict",
]  # fmt: skip


def default() -> ml_collections.ConfigDict:
    """All settings at their defaults, to be changed in a config file."""
    # Types are checked by `resolve`, which reads a duration of 100 as "100 steps" and names the field at fault.
    return ml_collections.ConfigDict(to_dict(Config()), type_safe=False)


def to_dict(value: Any) -> Any:
    """A config, or a `ConfigDict`, as plain dicts, lists, texts and numbers: what JSON holds."""
    if isinstance(value, Duration):
        return str(value)
    if dataclasses.is_dataclass(value):
        return {f.name: to_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, ml_collections.ConfigDict):
        value = value.to_dict()  # which leaves those in lists as they are
    if isinstance(value, Mapping):
        return {key: to_dict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_dict(item) for item in value]
    return value


def load(path: str, overrides: Mapping[str, str] | None = None) -> Config:
    """The config of a file, "FILE" or "FILE:ARG", with dotted overrides such as {"train.seed": "1"}."""
    return resolve(override(read(path), overrides or {}))


def override(tree: dict[str, Any], changes: Mapping[str, str]) -> dict[str, Any]:
    """The tree, with its entries at dotted names changed."""
    for name, text in changes.items():
        typed.override(tree, name, text, raw=("model", "architecture"))
    return tree


def read(path: str) -> dict[str, Any]:
    """The settings of a file, "FILE" or "FILE:ARG", as plain values that are not checked yet."""
    file, _, arg = path.partition(":")
    if arg.startswith("//"):
        files.locate_local(path, "config file")  # which refuses it
    file = str(files.locate_local(file, "config file"))
    if not Path(file).is_file():
        raise UserError(f"config file {file} does not exist")
    spec = importlib.util.spec_from_file_location("jax_it_config_file", file)
    if spec is None or spec.loader is None:
        raise UserError(f"config file {file} is not Python; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"config file {file} does not run: {type(error).__name__}: {_one_line(error)}") from error
    if not hasattr(module, "get_config"):
        raise UserError(f"config file {file} has no get_config(arg='')")
    try:
        config = module.get_config(arg)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{file}: get_config({arg!r}) failed: {type(error).__name__}: {_one_line(error)}") from error
    tree = to_dict(config)
    if not isinstance(tree, dict):
        raise UserError(f"{file}: get_config({arg!r}) returned {config!r}, not a config; end it with 'return config'")
    return tree


def _one_line(error: Exception) -> str:
    # ml_collections wraps a KeyError, whose own text is in quotes, and suggests a name on a second line.
    while len(error.args) == 1 and isinstance(error.args[0], Exception):
        error = error.args[0]
    text = error.args[0] if isinstance(error, KeyError) and error.args else error
    return " ".join(str(text).split())


def resolve(tree: Mapping[str, Any], training: bool = True) -> Config:
    """Frozen, type-checked settings from nested dicts; without `training` no training data is asked for.

    Raises UserError naming the field.
    """
    config = typed.build(Config, tree, "config")
    check(config, training)
    return config
