"""`jax-it export`: writes a checkpoint as a Transformers folder, or its adapters as a PEFT folder."""

import argparse
from functools import partial

from jax_it import files
from jax_it.commands import arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workdir", type=arguments.path, required=True, metavar="DIR", help="the run directory")
    parser.add_argument(
        "--output",
        type=partial(arguments.path, locate=files.locate_local),
        required=True,
        metavar="DIR",
        help="a folder that does not exist yet",
    )
    arguments.add_checkpoint(parser)
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], default="",
        help="dtype of the exported weights (default: the model's)",
    )  # fmt: skip
    parser.add_argument("--adapter-only", action="store_true", help="write only the adapters, in PEFT format")


def run(options: argparse.Namespace) -> None:
    from jax_it import hosts
    from jax_it.export import export

    step = export(options.workdir, options.output, options.checkpoint, options.dtype, options.adapter_only)
    if hosts.is_first():
        print(f"step {step} is in {options.output}, in {'PEFT' if options.adapter_only else 'Transformers'} format")
