"""Imports by a name in a string, which import-linter (its contracts are in pyproject.toml) does not see."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "jax_it"


def hidden_imports(source: str) -> Iterator[str]:
    """Yields the names in `import_module("name")` and `__import__("name")`."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Call(func=function, args=[ast.Constant(value=str(name)), *_]):
                if ast.unparse(function).endswith(("import_module", "__import__")):
                    yield name


def test_no_module_hides_an_import_that_the_layers_would_refuse() -> None:
    for file in PACKAGE.rglob("*.py"):
        for name in hidden_imports(file.read_text(encoding="utf-8")):
            assert name.split(".")[0] not in ("jax_it", "tensorflow", "torch"), f"{file}: import {name} openly"


def test_a_name_in_a_string_is_found() -> None:
    source = "def f():\n    importlib.import_module('jax_it.models')\n    __import__('torch')\n    import_module(name)"
    assert list(hidden_imports(source)) == ["jax_it.models", "torch"]


def test_the_stages_of_data_need_no_package_of_an_extra_before_they_run() -> None:
    """`jax-it data filter` works without what `jax-it data build` needs."""
    extras = "datasketch", "ftfy", "httpx2", "phonenumbers", "py3langid", "rapidfuzz", "stdnum"
    script = f"import sys; sys.modules |= dict.fromkeys({extras}); import jax_it.curation.recipe"
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True)


def test_data_tools_do_without_jax() -> None:
    """Each process of theirs, and each that tokenizes, would need a second to import it."""
    script = "import sys; sys.modules['jax'] = None; import jax_it.curation.recipe, jax_it.commands.data"
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True)
