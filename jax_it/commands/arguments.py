"""Options that several commands share, and the types of their values: each raises an error that argparse prints."""

import argparse
import math
import os
from collections.abc import Callable
from typing import Any

from etils import epath

from jax_it import files
from jax_it.errors import UserError, shorten


def add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", type=non_empty, required=True, metavar="NAME|FILE[:ARG]",
        help="a recipe's name or a config file; --config.a.b=VALUE changes a setting",
    )  # fmt: skip


def add_print_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--print-config", action="store_true", help="print all settings as JSON, and do nothing else")


def add_checkpoint(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--checkpoint", default="latest", metavar="latest|best|STEP", help="which checkpoint (default: latest)"
    )


def load_config(options: argparse.Namespace) -> Any:
    """Return the `Config` that --config and --config.a.b=VALUE name; with --print-config, print it and return None."""
    from jax_it import config, hosts

    loaded = config.load(options.config, options.changes)
    if not options.print_config:
        return loaded
    if hosts.is_first():
        print(files.to_json(config.to_dict(loaded), indent=2))
    return None


def locate_outputs(paths: dict[str, str | None]) -> dict[str, epath.Path]:
    """Return the files that options name, by option. Raises UserError if one cannot be written, or two are the same."""
    found: dict[str, epath.Path] = {}
    for option, name in paths.items():
        if name is None:
            continue
        file = files.locate_output(name, option)
        for other, taken in found.items():
            if not files.is_stream(file) and os.path.realpath(file) == os.path.realpath(taken):
                raise UserError(f"{other} and {option} both name {name}; give each a file of its own")
        found[option] = file
    return found


def integer(least: int, most: int = (1 << 31) - 1) -> Callable[[str], int]:
    """Return the type of a whole number from `least` to `most`."""

    def read(value: str) -> int:
        digits = value.removeprefix("-")
        if not (digits.isascii() and digits.isdigit()):
            raise argparse.ArgumentTypeError(f"{shorten(value)!r} is not a whole number")
        if len(digits) > 20 or not least <= int(value) <= most:
            raise argparse.ArgumentTypeError(f"{shorten(value)} is not from {least} to {most}")
        return int(value)

    return read


positive = integer(1)


def number(value: str) -> float:
    try:
        found = float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{shorten(value)!r} is not a number") from None
    if not math.isfinite(found):
        raise argparse.ArgumentTypeError(f"{shorten(value)} is not a finite number")
    return found


def text(value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:  # bytes that are not UTF-8 arrive as halves of surrogate pairs
        raise argparse.ArgumentTypeError(f"{shorten(value)!r} is not UTF-8") from None
    return value


def non_empty(value: str) -> str:
    if not value:
        raise argparse.ArgumentTypeError("it is empty")
    return value


def path(value: str, locate: Callable[[str, str], object] = files.locate) -> str:
    """Refuse what cannot be a path, before anything is imported or read."""
    try:
        locate(value, "")
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return value
