"""`jax-it preview`: shows what the model will see, and what happens to each data set."""

import argparse

from jax_it.commands import arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_config(parser)
    parser.add_argument(
        "--num", type=arguments.integer(0), default=3, metavar="N", help="examples to show (default: 3)"
    )
    arguments.add_print_config(parser)


def run(options: argparse.Namespace) -> None:
    from jax_it.preview import preview

    if (config := arguments.load_config(options)) is not None:
        print(preview(config, options.num))
