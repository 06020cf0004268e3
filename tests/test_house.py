"""Each module of jax_it imports only from the floors below its own, and none imports TensorFlow or PyTorch."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "jax_it"

# Of each module and package of jax_it. "__init__" is the API of the package itself.
FLOORS = {
    "errors": -3,  # the ground, which all else stands on
    "typed": -2, "hosts": -2, "files": -2, "tensorboard": -2,
    "config": -1, "following": -1, "stopping": -1,
    "sharding": 0, "chips": 0,
    "data": 1, "losses": 1, "metrics": 1,
    "models": 2,
    "checkpoint": 3, "generation": 3,
    "workdir": 4,
    "evaluation": 5,
    "training": 6,
    "export": 7, "harness": 7, "predict": 7, "preview": 7, "plan": 7, "serving": 7, "report": 7,
    "cli": 8, "__init__": 8,
    "__main__": 9,
}  # fmt: skip

FORBIDDEN = {"tensorflow", "torch"}


def imported(source: str, module: str) -> Iterator[tuple[int, str]]:
    """Line and dotted name of all that a module's source imports, inside functions too, relative names made absolute.

    `module` is its dotted name, with ".__init__" for a package. `from a import b` gives "a.b".
    """
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, alias.name) for alias in names)
            case ast.ImportFrom(module=base, names=names, level=level):
                parents = module.split(".")[:-level] if level else []
                base = ".".join([*parents, base] if base else parents)
                yield from ((node.lineno, f"{base}.{alias.name}") for alias in names)
            case ast.Call(func=function, args=[ast.Constant(value=str(name)), *_]):
                if ast.unparse(function).endswith(("import_module", "__import__")):
                    yield node.lineno, name


def room(name: str, rooms: set[str]) -> str:
    """The module or package of jax_it that a dotted name lies in: "data" for "jax_it.data.packing"."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in rooms else "__init__"


def violations(source: str, module: str, rooms: set[str]) -> list[str]:
    """What a module's source imports against the rules, a line each."""
    own = room(module, rooms)
    found = []
    for line, name in imported(source, module):
        root = name.split(".")[0]
        if root in FORBIDDEN:
            found.append(f"{module}:{line} imports {root}, which jax_it must not need")
        elif root == "jax_it":
            other = room(name, rooms)
            if other != own and FLOORS[other] >= FLOORS[own]:
                found.append(
                    f"{module}:{line} (floor {FLOORS[own]}) imports {name} (floor {FLOORS[other]}): "
                    "import from lower floors only; move what both need below them"
                )
    return found


def modules() -> dict[str, Path]:
    """Dotted names, with ".__init__" for packages, of all files of jax_it."""
    return {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}


def rooms() -> set[str]:
    return {name.split(".")[1] for name in modules()}


def test_every_module_has_a_floor():
    homeless = sorted(rooms() - set(FLOORS))
    assert not homeless, f"give jax_it's {', '.join(homeless)} a floor in FLOORS, above all that it imports"


@pytest.mark.parametrize("module", sorted(modules()))
def test_a_module_imports_from_the_floors_below_it_alone(module):
    assert rooms() <= set(FLOORS), "see test_every_module_has_a_floor"
    found = violations(modules()[module].read_text(encoding="utf-8"), module, rooms())
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "module, source",
    [
        ("jax_it.data.loader", "import jax_it.config, numpy\nfrom jax_it.errors import UserError"),
        ("jax_it.data.loader", "from . import packing\nfrom .packing import pack\nfrom jax_it.data import tokenizer"),
        ("jax_it.data.__init__", "from . import packing\nfrom .packing import pack\nfrom ..config import Data"),
        ("jax_it.config", "from jax_it.errors import UserError"),
        ("jax_it.__init__", "from jax_it.training.loop import train"),
        ("jax_it.__main__", "from jax_it.cli import main"),
        ("jax_it.cli", "def f(name):\n    importlib.import_module(name)"),
        ("jax_it.metrics", "import torchvision"),
    ],
)
def test_imports_from_below_and_from_the_same_package_are_allowed(module, source):
    assert violations(source, module, set(FLOORS)) == []


@pytest.mark.parametrize(
    "module, source, name",
    [
        ("jax_it.data.loader", "from jax_it.models import t5", "jax_it.models.t5"),
        ("jax_it.data.loader", "from jax_it import models", "jax_it.models"),
        ("jax_it.data.loader", "import jax_it.models.t5 as t5", "jax_it.models.t5"),
        ("jax_it.data.loader", "from jax_it import losses", "jax_it.losses"),
        ("jax_it.data.loader", "from .. import metrics", "jax_it.metrics"),
        ("jax_it.data.loader", "from ..training.loop import train", "jax_it.training.loop.train"),
        ("jax_it.data.__init__", "from ..models import t5", "jax_it.models.t5"),
        ("jax_it.losses", "def f():\n    if True:\n        from .models import t5", "jax_it.models.t5"),
        ("jax_it.losses", "importlib.import_module('jax_it.models')", "jax_it.models"),
        ("jax_it.config", "import jax_it", "jax_it"),
        ("jax_it.training.step", "from jax_it import train", "jax_it.train"),
        ("jax_it.models.hf", "import torch.nn as nn", "torch"),
        ("jax_it.models.hf", "def f():\n    from tensorflow.io import gfile", "tensorflow"),
        ("jax_it.models.hf", "__import__('torch')", "torch"),
    ],
)
def test_an_import_from_above_or_beside_or_of_torch_is_found(module, source, name):
    (found,) = violations(source, module, set(FLOORS))
    assert f" imports {name}" in found
