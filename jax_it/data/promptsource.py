"""Templates of P3 (Bach et al. 2022) by name, from promptsource's YAML files as they are.

`promptsource:xsum` stands for all templates of a data set, `promptsource:super_glue/rte:GPT-3 style` for one. They are
those of the installed package promptsource; `promptsource:FOLDER` names a folder with a `templates.yaml` instead.
"""

import importlib.util
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from jax_it.data.jinja_text import with_answer_choices
from jax_it.data.records import listed
from jax_it.errors import UserError, first_line
from jax_it.files import read_text

PREFIX = "promptsource:"


class Template(NamedTuple):
    name: str  # in reports
    text: str  # a name of `templates.TEMPLATES`, or Jinja text


def expand(names: Sequence[str], where: str) -> list[Template]:
    """Return a source's templates, those of promptsource as Jinja text; `where` is the setting's name in messages.

    Raises UserError for a data set or template that promptsource does not have, and a file that cannot be read.
    """
    return [
        template
        for name in names
        for template in (_find(name, where) if name.startswith(PREFIX) else [Template(name, name)])
    ]


def _find(name: str, where: str) -> list[Template]:
    data_set, _, wanted = name.removeprefix(PREFIX).partition(":")
    folder = Path(data_set).expanduser()
    if not data_set or not folder.is_dir():
        folder = _installed(name, where) / data_set
    if not (folder / "templates.yaml").is_file():
        there = sorted(path.parent.name for path in folder.glob("*/templates.yaml"))
        subsets = f"; its subsets: {listed(there)}" if there else ""
        raise UserError(f"{where}: {name!r}: there is no templates.yaml in {folder}{subsets}")
    found = read(folder / "templates.yaml", where)
    if not wanted:
        return [Template(f"{name}:{template}", text) for template, text in found.items()]
    if wanted not in found:
        raise UserError(f"{where}: {data_set} has no template {wanted!r}; its templates: {listed(found)}")
    return [Template(name, found[wanted])]


def _installed(name: str, where: str) -> Path:
    spec = importlib.util.find_spec("promptsource")
    for folder in (spec and spec.submodule_search_locations) or ():
        return Path(folder) / "templates"
    raise UserError(
        f"{where}: {name!r}: there is no such folder, and the package promptsource is not installed; write "
        "'promptsource:FOLDER' with the folder of a templates.yaml"
    )


@cache
def read(file: Path, where: str = "config.data") -> dict[str, str]:
    """Return the Jinja text of each template of a YAML file, by name."""
    try:
        content = yaml.load(read_text(file), _Loader)
        templates = list(content["templates"].values())
        found = {str(item["name"]): with_answer_choices(item["jinja"], item["answer_choices"]) for item in templates}
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"{where}: {file} is not a YAML file of promptsource: {reason}") from None
    if len(found) < len(templates):
        raise UserError(f"{where}: {file} has several templates of one name; rename one")
    return found


class _Loader(yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader):  # type: ignore[misc]
    """YAML's safe loader, which reads promptsource's objects as mappings."""


def _mapping(loader: Any, node: Any) -> Any:
    return loader.construct_mapping(node, deep=True)


for tag in ("!Template", "!TemplateMetadata"):
    _Loader.add_constructor(tag, _mapping)
