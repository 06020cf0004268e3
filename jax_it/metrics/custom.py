"""A user's own metric: a Python function that a config names as FILE.py:FUNCTION or MODULE:FUNCTION."""

import importlib
import importlib.util
import inspect
import math
import sys
import traceback
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from jax_it import files
from jax_it.errors import UserError, shorten, shown
from jax_it.metrics.metric import Array, Predictions, References

LARGEST = 3e38  # TensorBoard's numbers are float32, and sums of larger ones may be infinite
Function = Callable[[list[str], list[list[str]]], Any]


def is_custom(name: str) -> bool:
    return ":" in name


@cache  # once in a process: a file that is edited during a run would change what its scores mean
def load(name: str) -> Function:
    """Return the function that a metric's name refers to. A relative FILE is looked for in the current folder.

    Raises UserError where there is none, or where it does not take (predictions, references).
    """
    place, _, attribute = name.rpartition(":")
    try:
        module = (
            _from_file(name, files.locate_local(place, f"metric {name!r}:"))
            if place.endswith(".py")
            else importlib.import_module(place)
        )
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        hint = ""
        if isinstance(error, ModuleNotFoundError) and Path(f"{place}.py").is_file():
            hint = f"; to take the file, write '{place}.py:{attribute}'"
        raise UserError(
            f"metric {name!r}: {place or 'an empty name'} cannot be imported: {_reason(error)}{hint}"
        ) from error
    function = getattr(module, attribute, None)
    if not callable(function):
        own = [value for value in vars(module).values() if getattr(value, "__module__", None) == module.__name__]
        functions = [value.__name__ for value in own if inspect.isfunction(value)]
        there = ", ".join(functions) or "none"
        raise UserError(f"metric {name!r}: {place} has no function {attribute!r}; it has: {there}")
    try:
        inspect.signature(function).bind([], [])
    except TypeError as error:
        raise UserError(f"metric {name!r} must take (predictions, references): {error}") from error
    except ValueError:  # one written in C, which does not tell
        pass
    return function


def call(name: str, predictions: Predictions, references: References) -> dict[str, float | Array]:
    """Return what the metric says of the examples: a number, or one for each example as an array [examples, 1].

    Under the metric's own name, or of a function that returns a dict under NAME.KEY. Raises UserError
    where the function raises, or returns something else, NaN or infinity.
    """
    function = load(name)
    try:
        result = function(list(predictions), [list(several) for several in references])
    except (Exception, SystemExit) as error:
        raise UserError(f"metric {name!r} raised {_reason(error)}") from error
    if not isinstance(result, dict):
        return {name: _numbers(name, result, len(predictions))}
    if not result or not all(isinstance(key, str) and key for key in result):
        raise UserError(f"metric {name!r} returned {shown(result)}; a dict needs names as keys, and one at least")
    return {f"{name}.{key}": _numbers(f"{name}.{key}", value, len(predictions)) for key, value in result.items()}


def _numbers(name: str, value: Any, examples: int) -> float | Array:
    try:
        if isinstance(value, str | bytes | dict | set | frozenset) or value is None:
            raise TypeError
        array = np.asarray(value)
        if array.dtype.kind not in "biuf":
            raise TypeError
        array = array.astype(float)
    except Exception:  # an object of the user's may raise anything
        expected = "expected a number, a number for each example, or a dict of such"
        raise UserError(f"metric {name!r} returned {shown(value)}; {expected}") from None
    too_large = np.isfinite(array) & (np.abs(array) > LARGEST)
    if too_large.any():
        raise UserError(f"metric {name!r} returned {array[too_large].flat[0]}; expected {LARGEST} at most")
    if array.shape == ():
        if not math.isfinite(array):
            raise UserError(f"metric {name!r} returned {array}; where there is nothing to measure, return 0 or raise")
        return float(array)
    if array.shape != (examples,):
        got = f"an array of shape {list(array.shape)}" if array.ndim > 1 else f"{array.size} numbers"
        raise UserError(f"metric {name!r} returned {got} for {examples} examples; expected one number for each")
    if not np.isfinite(array).all():
        first = int(np.flatnonzero(~np.isfinite(array))[0])
        raise UserError(f"metric {name!r} returned {array[first]} for example {first}, counted from 0")
    return array[:, None]


def _from_file(name: str, file: Path) -> ModuleType:
    if not file.is_file():
        here = "" if file.is_absolute() else f" in {Path.cwd()}"
        raise UserError(f"metric {name!r}: there is no file {file}{here}")
    module_name = f"jax_it_metric:{file.resolve()}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    spec = importlib.util.spec_from_file_location(module_name, file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses look their own module up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[module_name]
        raise
    return module


def _reason(error: BaseException) -> str:
    """Return the error in one line, with where it was raised."""
    if isinstance(error, SyntaxError):
        return f"SyntaxError: {error.msg} (line {error.lineno})"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "importlib" not in frame.filename]
    file, line = (Path(frames[-1].filename), frames[-1].lineno) if frames else (Path(__file__), None)
    where = "" if file == Path(__file__) else f" ({file.name}, line {line})"
    text = shorten(str(error), 300)
    return f"{type(error).__name__}{': ' if text else ''}{text}{where}"
