"""The parts of the documentation generated from code: settings from jax_it/config/settings.py, options from the parser.

`PARTS` maps a marker in a page to the function whose Markdown replaces it.
"""

import argparse
import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from jax_it import cli
from jax_it.config import settings
from jax_it.config import to_dict as plain

# The place of each class of settings.py in a config, and its heading.
SECTIONS = {
    "Model": ("model", "Model"),
    "Lora": ("model.lora", "Adapters"),
    "Data": ("data", "Data"),
    "Source": ("data.train.0", "A data set"),
    "Train": ("train", "Training"),
    "Optimizer": ("train.optimizer", "Optimizer"),
    "Mesh": ("mesh", "Mesh"),
    "Eval": ("eval", "Evaluation"),
    "Task": ("eval.tasks.0", "A task"),
}


class Setting(NamedTuple):
    name: str  # "train.optimizer.learning_rate"
    type: str
    default: str  # "" for a section of its own
    comment: str


def settings_of(class_name: str) -> Iterator[Setting]:
    """The settings of a class in their order, each with the comment beside and above it."""
    with open(settings.__file__, encoding="utf-8") as file:
        text = file.read()
    lines = text.splitlines()
    (found,) = (node for node in ast.parse(text).body if isinstance(node, ast.ClassDef) and node.name == class_name)
    defaults = plain(getattr(settings, class_name)())
    for node in found.body:
        if not isinstance(node, ast.AnnAssign) or "ClassVar" in ast.unparse(node.annotation):
            continue
        assert isinstance(node.target, ast.Name) and node.end_lineno and node.end_col_offset
        above = []
        line = node.lineno - 2
        while lines[line].strip().startswith("#"):
            above.insert(0, lines[line].strip(" #"))
            line -= 1
        beside = lines[node.end_lineno - 1][node.end_col_offset :].strip(" #")
        default = defaults[node.target.id]
        type_ = ast.unparse(node.annotation).replace("'", '"')
        yield Setting(
            f"{SECTIONS[class_name][0]}.{node.target.id}",
            type_,
            "" if isinstance(default, dict) and default else repr(default).replace("'", '"'),
            " ".join([*above, beside]).strip(),
        )


def settings_page() -> str:
    """The reference of settings, in MyST."""
    parts = []
    for class_name, (where, heading) in SECTIONS.items():
        doc = getattr(settings, class_name).__doc__ or ""
        parts.append(f"({where})=\n## {heading}: `config.{where}`\n")
        if not doc.startswith(f"{class_name}("):  # which a dataclass writes where there is none
            parts.append(re.sub("\n +", "\n", doc).strip() + "\n")
        for setting in settings_of(class_name):
            default = f":default: `{setting.default}`\n" if setting.default else ""
            comment = f"\n{_sentence(setting.comment)}\n" if setting.comment else ""
            parts.append(f"````{{confval}} {setting.name}\n:type: `{setting.type}`\n{default}{comment}````\n")
    return "\n".join(parts)


def names() -> set[str]:
    """The names of all settings, as `canonical` gives them."""
    return {setting.name for class_name in SECTIONS for setting in settings_of(class_name)}


def canonical(name: str) -> str:
    """The name that the reference has: "--config.data.eval.1.path" is the setting data.train.0.path."""
    name = re.sub(r"\.(\d+|N)(?=\.)", ".0", name.removeprefix("--").removeprefix("config."))
    return name.replace("data.eval.0.", "data.train.0.", 1)


def looks_like_a_setting(name: str) -> bool:
    """Whether a canonical name, in code font, is one of a setting, and not of a file or a section."""
    return bool(re.fullmatch(r"(model|data|train|mesh|eval)(\.\w+)*\.[a-z]\w*", name)) and not name.endswith(
        (".py", ".jsonl")
    )


def commands_page() -> str:
    """The reference of commands, in MyST."""
    parser = cli.make_parser()
    parts = [f"```{{program}} {parser.prog}\n```\n", *_options(parser)]
    for name, command in subcommands(parser).items():
        parts += _command(command, f"## {name}")
        for nested, subcommand in subcommands(command).items():
            parts += _command(subcommand, f"### {name} {nested}")
    return "\n".join(parts)


def subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    return {
        name: command
        for action in parser._actions
        if isinstance(action, argparse._SubParsersAction)
        for name, command in action.choices.items()
    }


def _command(command: argparse.ArgumentParser, heading: str) -> Iterator[str]:
    usage = re.sub(r"\s+", " ", command.format_usage()).removeprefix("usage: ").strip()
    yield f"{heading}\n\n{command.description}\n\n```text\n{_wrap(usage)}\n```\n"
    yield f"```{{program}} {command.prog}\n```\n"
    yield from _options(command)


def _options(parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        if action.help == argparse.SUPPRESS or action.dest == "help" or not action.option_strings:
            continue
        flags = ", ".join(_flag(action, flag) for flag in action.option_strings)
        help_ = parser._get_formatter()._expand_help(action) if action.help else ""
        choices = f"One of {', '.join(f'`{choice}`' for choice in action.choices)}. " if action.choices else ""
        yield f"````{{option}} {flags}\n\n{choices}{_sentence(help_)}\n````\n"


def _flag(action: argparse.Action, flag: str) -> str:
    if action.nargs == 0:
        return flag
    return f"{flag} {action.metavar or action.dest.upper()}"


def _wrap(usage: str, width: int = 88) -> str:
    """A usage line, broken between options."""
    lines = [""]
    for part in re.findall(r"\[[^][]*(?:\[[^][]*\][^][]*)*\]|\([^()]*\)|\S+", usage):
        if lines[-1] and len(lines[-1]) + len(part) + 1 > width:
            lines.append("   ")
        lines[-1] = f"{lines[-1]} {part}" if lines[-1] else part
    return "\n".join(lines)


def _sentence(comment: str) -> str:
    """A comment as a sentence: with a capital and a full stop, unless it begins with code."""
    comment = re.sub(r"(?<![\w`])--[a-z][\w.-]*\w(=[A-Z]+)?", lambda found: f"`{found[0]}`", comment)
    comment = comment.replace("*", r"\*").replace("{{", r"\{\{").replace("<", "&lt;")
    if comment and comment[0].islower() and not re.match(r"\w*[_.(A-Z\d]|\w+:", comment):
        comment = comment[0].upper() + comment[1:]
    return comment if comment.endswith((".", "?", "!", ")")) or not comment else f"{comment}."


def modules_page() -> str:
    """A table for each layer of import-linter's contract, from top to bottom: modules and what they are for."""
    root = Path(cli.__file__).parent
    with open(root.parent / "pyproject.toml", "rb") as file:
        contracts = tomllib.load(file)["tool"]["importlinter"]["contracts"]
    (layers,) = (contract["layers"] for contract in contracts if contract["type"] == "layers")
    parts = []
    for layer in layers:
        rows = []
        for name in layer.split(" | "):
            name = name.strip("()")
            paths = sorted((root / name).rglob("*.py")) if (root / name).is_dir() else [root / f"{name}.py"]
            for path in paths:
                doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
                rows.append(f"| `{path.relative_to(root)}` | {doc.splitlines()[0] if doc else ''} |\n")
        parts.append("| module | |\n|---|---|\n" + "".join(rows))
    return "\n".join(parts)


PARTS = {
    "<!-- generated: settings -->": settings_page,
    "<!-- generated: commands -->": commands_page,
    "<!-- generated: modules -->": modules_page,
}
