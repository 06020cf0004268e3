"""`jax-it eval`: scores a run's checkpoints, or any model."""

import argparse
from typing import Any

from jax_it import files
from jax_it.commands import arguments
from jax_it.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    scored = parser.add_mutually_exclusive_group(required=True)
    scored.add_argument("--workdir", type=arguments.path, metavar="DIR", help="the run directory")
    scored.add_argument(
        "--model", type=arguments.path, metavar="DIR|NAME", help="a Transformers or PEFT folder or a hub name"
    )
    which = parser.add_mutually_exclusive_group()
    arguments.add_checkpoint(which)
    which.add_argument("--follow", action="store_true", help="score each new checkpoint until the run ends")
    which.add_argument("--summary", action="store_true", help="show the scores of all steps in one table")
    parser.add_argument(
        "--config", type=arguments.non_empty, metavar="NAME|FILE[:ARG]",
        help="a config whose eval and data.eval replace the run's",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=arguments.path, metavar="DIR", help="a folder for the scores (default: the run's)"
    )
    parser.add_argument(
        "--timeout", type=arguments.positive, metavar="S",
        help="--follow: give up after S seconds without a new checkpoint",
    )  # fmt: skip
    parser.add_argument("--json", type=arguments.path, metavar="FILE", help="--summary: also write it as JSON")
    parser.add_argument("--csv", type=arguments.path, metavar="FILE", help="--summary: also write it as CSV")
    parser.add_argument(
        "--run-metric-code", action="store_true",
        help="run the Python that the run's own config names as a metric or as tasks of lm_eval",
    )  # fmt: skip
    parser.add_argument(
        "--run-model-code", action="store_true", help="let tasks run the programs that the model writes, under limits"
    )


def run(options: argparse.Namespace) -> None:
    from jax_it.evaluation.evaluate import EvalOptions, evaluate, evaluate_model

    eval_options = EvalOptions(
        options.config or "", options.changes, options.output or "", options.run_model_code, options.run_metric_code
    )
    for name, needed in (("timeout", "follow"), ("json", "summary"), ("csv", "summary")):
        if getattr(options, name) is not None and not getattr(options, needed):
            raise UserError(f"--{name} needs --{needed}")
    if options.model:
        if options.follow or options.summary or options.checkpoint != "latest":
            raise UserError("--checkpoint, --follow and --summary are for a run: name it with --workdir")
        _print_result(f"{options.model}\n", evaluate_model(options.model, eval_options))
    elif options.summary:
        _summarize(options, eval_options)
    elif options.follow:
        _follow(options, eval_options)
    else:
        step, result = evaluate(options.workdir, options.checkpoint, eval_options)
        _print_result(f"step {step}\n", result)


def _follow(options: argparse.Namespace, eval_options: Any) -> None:
    from jax_it.evaluation.follow import follow

    failed = follow(
        options.workdir, eval_options, options.timeout or 0,
        lambda step, result: _print_result(f"step {step}\n", result, last=False),
    )  # fmt: skip
    if failed:
        steps = ", ".join(map(str, failed))
        raise UserError(f"step{'s' * (len(failed) > 1)} {steps} could not be fully scored; the reasons are above")


def _summarize(options: argparse.Namespace, eval_options: Any) -> None:
    from jax_it import hosts
    from jax_it.evaluation import summary

    outputs = arguments.locate_outputs({"--json": options.json, "--csv": options.csv})
    found = summary.summarize(options.workdir, eval_options)
    if hosts.is_first():
        for option, content in (("--json", summary.to_json), ("--csv", summary.to_csv)):
            if option in outputs:
                files.write_output(outputs[option], content(found), option)
        print(summary.text(found))


def _print_result(head: str, result: Any, last: bool = True) -> None:
    """Print the results of an evaluation. Raises UserError where a task failed, unless more results follow."""
    from jax_it import hosts
    from jax_it.evaluation import examples_text, failures, table

    if hosts.is_first():
        print(f"{head}{table(result)}", flush=True)
        if last and result.predictions:
            print(examples_text(result))
    if last and (failed := failures(result)):
        raise UserError("; ".join(f"{task}: {why}" for task, why in failed.items()))
