"""`jax-it plan`: compiles the training step, or a server's programs, for hardware you don't have."""

import argparse

from jax_it import files
from jax_it.commands import arguments
from jax_it.errors import UserError

OF_SERVE = {"--batch-size": 32, "--max-prompt-tokens": 1024, "--max-new-tokens": 512}  # and their defaults, serve's


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
    parser.add_argument(
        "--serve", action="store_true", help="plan `jax-it serve` of the config's model, instead of its training"
    )
    for name, of_serve in OF_SERVE.items():
        what = name[2:].replace("-", " ")
        parser.add_argument(
            name, type=arguments.positive, metavar="N", help=f"of --serve: {what} (default: {of_serve})"
        )
    parser.add_argument("--json", type=arguments.path, metavar="FILE", help="also write the plan as JSON")
    parser.add_argument("--hlo", type=arguments.path, metavar="FILE", help="also write the compiled program's text")


def run(options: argparse.Namespace) -> None:
    given = {name: getattr(options, name[2:].replace("-", "_")) for name in OF_SERVE}
    if not options.serve and (name := next((name for name, value in given.items() if value), "")):
        raise UserError(f"{name} is for a plan of a server; add --serve, or leave it out")
    if options.serve and (name := "--rows" if options.rows else "--hlo" if options.hlo else ""):
        raise UserError(f"{name} is for a plan of training; leave it or --serve out")
    from jax_it import config, plan

    outputs = arguments.locate_outputs({"--json": options.json, "--hlo": options.hlo})
    loaded = config.load(options.config, options.changes)
    topology = plan.find(options.topology, options.slices)
    if options.serve:
        sizes = [value or OF_SERVE[name] for name, value in given.items()]
        served = plan.serve.plan_serving(loaded, topology, *sizes)
        if "--json" in outputs:
            files.write_output(outputs["--json"], plan.serve.to_json(served), "--json")
        print(plan.serve.text(served))
        return
    found = plan.plan(loaded, topology, options.rows or 0, outputs.get("--hlo"))
    if "--json" in outputs:
        files.write_output(outputs["--json"], plan.to_json(found), "--json")
    print(plan.text(found))
