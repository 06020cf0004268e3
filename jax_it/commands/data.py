"""`jax-it data`: checks, cleans and converts instruction data."""

import argparse
import dataclasses
import sys
import tempfile
import typing
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

from jax_it import files, typed
from jax_it.commands import arguments
from jax_it.curation.settings import SETTINGS, Stats
from jax_it.errors import UserError

_RUN = "Run the stages of a recipe, those of them that are not done yet."
_TOKENIZE = "Tokenize a config's training data into a folder, to train from it on any machine."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="stage", required=True, metavar="COMMAND")
    for name, settings in SETTINGS.items():
        stage = _add_command(commands, name, settings)
        stage.add_argument(
            "--output", type=arguments.path, metavar="FILE",
            help="where the records go: .jsonl, .jsonl.gz, .jsonl.zst or .parquet (default: only report)",
        )  # fmt: skip
        stage.add_argument(
            "--on-invalid", choices=("error", "drop"), default="error",
            help="what to do with records that cannot be read or rendered (default: error)",
        )  # fmt: skip
    _add_command(commands, "stats", Stats)
    recipe = commands.add_parser("run", help=_RUN, description=_RUN, allow_abbrev=False)
    recipe.add_argument("recipe", type=arguments.non_empty, metavar="RECIPE.py", help="a config file")
    _add_workers(recipe)
    tokenize = commands.add_parser("tokenize", help=_TOKENIZE, description=_TOKENIZE, allow_abbrev=False)
    arguments.add_config(tokenize)
    tokenize.add_argument(
        "--output", type=arguments.path, required=True, metavar="FOLDER",
        help="a new folder, for --config.data.tokenized",
    )  # fmt: skip
    arguments.add_print_config(tokenize)


def _add_command(commands: Any, name: str, settings: type) -> argparse.ArgumentParser:
    """Add a command that reads data sets, with an option for each of its settings."""
    description = (settings.__doc__ or "").partition("\n")[0]
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=description, description=description, allow_abbrev=False
    )
    parser.add_argument(
        "files", nargs="+", type=arguments.non_empty, metavar="FILE", help="files, globs, folders or hub names"
    )
    parser.add_argument(
        "--template", type=arguments.text, default="auto",
        help="how a record becomes a prompt and a completion (default: auto)",
    )  # fmt: skip
    _add_settings(parser, settings)
    _add_workers(parser)
    return parser


def _add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--num-workers", type=arguments.positive, metavar="N", help="processes (default: one for each CPU)"
    )
    parser.add_argument("--ray", type=arguments.text, default="", metavar="ADDRESS", help="the Ray cluster to run on")


def _add_settings(parser: argparse.ArgumentParser, settings: type) -> None:
    """Add an option for each of a stage's settings."""
    hints = typing.get_type_hints(settings)
    for field in dataclasses.fields(settings):
        flag, hint = _flag(field.name), hints[field.name]
        help = field.metadata["help"]
        if hint is bool:
            parser.add_argument(flag, dest=field.name, action="store_true", default=None, help=help)
            continue
        if hint == tuple[str, ...]:
            parser.add_argument(flag, dest=field.name, nargs="+", type=arguments.text, metavar="TEXT", help=help)
            continue
        metavar = "|".join(typing.get_args(hint)) if typing.get_origin(hint) is Literal else None
        default = "" if field.default in ("", ()) else f" (default: {field.default})"
        parser.add_argument(
            flag, dest=field.name, type=arguments.text, metavar=metavar, help=f"{help}{default}".replace("%", "%%")
        )


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _settings(options: argparse.Namespace, kind: type) -> Any:
    hints = typing.get_type_hints(kind)
    given = {name: value for name in hints if (value := getattr(options, name)) is not None}
    return kind(**{name: typed.build(hints[name], value, _flag(name)) for name, value in given.items()})


def run(options: argparse.Namespace) -> None:
    if options.stage == "tokenize":
        from jax_it.preview import tokenize

        if (config := arguments.load_config(options)) is not None:
            print(tokenize(config, options.output))
        return
    settings: Any = None
    if options.stage != "run":
        settings = _settings(options, Stats if options.stage == "stats" else SETTINGS[options.stage])
    names = {f"--{name}": getattr(options, name, None) for name in ("output", "json", "html")}
    outputs = arguments.locate_outputs(names)
    output = outputs.get("--output")

    from jax_it import workers
    from jax_it.curation import input, recipe, run, stats

    command = ["jax-it", *sys.argv[1:]]
    with (
        tempfile.TemporaryDirectory(prefix="jax_it-") as folder,
        workers.Workers(options.num_workers or workers.available_cpus(), options.ray) as several,
    ):
        if options.stage == "run":
            recipe.run(recipe.read(options.recipe), several, command)
            return
        data = input.Input(input.sources_of(options.files, options.template), "FILE", several, Path(folder))
        if options.stage == "stats":
            figures = stats.figures(settings, data)
            for option, content in (("--json", figures), ("--html", stats.page(figures))):
                if option in outputs:
                    files.write_output(outputs[option], content, option)
            print(stats.text(figures))
            return
        with files.locked_output(output, "--output") if output is not None else nullcontext():
            manifest = run.run(options.stage, settings, data, output, options.on_invalid, command)
    if options.stage == "validate" and output is None and (number := manifest["counts"]["dropped"]):
        raise UserError(
            f"{number} of {manifest['counts']['read']} records have faults; fix them, or write the others with --output"
        )
