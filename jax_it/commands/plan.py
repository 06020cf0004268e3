"""`jax-it plan`: compiles the training step for hardware you don't have."""

import argparse

from jax_it import files
from jax_it.commands import arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_config(parser)
    parser.add_argument("--topology", required=True, help="v5e:8x8, v5p:4x4x4, v6e:16x16, or cpu:8 for fake devices")
    parser.add_argument(
        "--slices", type=arguments.positive, default=1, metavar="N", help="number of slices (default: 1)"
    )
    parser.add_argument(
        "--rows",
        type=arguments.positive,
        metavar="N",
        help="rows per step, all of them full (default: train.batch_size)",
    )
    parser.add_argument("--json", type=arguments.path, metavar="FILE", help="also write the plan as JSON")
    parser.add_argument("--hlo", type=arguments.path, metavar="FILE", help="also write the compiled program's text")


def run(options: argparse.Namespace) -> None:
    from jax_it import config, plan

    outputs = arguments.locate_outputs({"--json": options.json, "--hlo": options.hlo})
    loaded = config.load(options.config, options.changes)
    topology = plan.find(options.topology, options.slices)
    found = plan.plan(loaded, topology, options.rows or 0, outputs.get("--hlo"))
    if "--json" in outputs:
        files.write_output(outputs["--json"], plan.to_json(found), "--json")
    print(plan.text(found))
