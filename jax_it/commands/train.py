"""`jax-it train`: trains a model, or continues the run in --workdir."""

import argparse
import shlex

from jax_it.commands import arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_config(parser)
    parser.add_argument("--workdir", type=arguments.path, required=True, metavar="DIR", help="the run directory")
    parser.add_argument(
        "--allow-change", action="append", default=[], metavar="SETTING",
        help="continue with another value of this setting, such as train.duration; may be repeated",
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="run every check before the first step; write nothing")
    arguments.add_print_config(parser)


def run(options: argparse.Namespace) -> None:
    from jax_it import allocator, hosts
    from jax_it.training import dry_run, train

    if (config := arguments.load_config(options)) is None:
        return
    if options.dry_run:
        report = dry_run(config, options.workdir, options.allow_change)
        if hosts.is_first():
            print(report)
        return
    allocator.keep_memory()
    state = train(config, options.workdir, options.allow_change)
    if hosts.is_first():
        workdir = shlex.quote(options.workdir)
        print(
            f"step {int(state.step)} is saved in {options.workdir}; next: jax-it eval --workdir {workdir}, "
            f"jax-it generate --model {workdir} --prompt TEXT, or jax-it export --workdir {workdir} --output DIR"
        )
