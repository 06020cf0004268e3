"""What is known of a run before its first step: `jax-it train --dry-run`, and the checks and summary of every run."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import jax

from jax_it import evaluation, files, hosts, metrics, sharding
from jax_it.config import Config
from jax_it.errors import UserError
from jax_it.run import Run, resume_run, start_run
from jax_it.run_checks import durations_in_steps
from jax_it.run_dir import RunDir
from jax_it.training import weights_and_biases
from jax_it.training.step import PreparedStep, prepare


def dry_run(config: Config, workdir: str | Path, allow_change: Sequence[str] = ()) -> str:
    """Do what `train` does before it reads weights and compiles; leave nothing. Return what training would do.

    Raises UserError for whatever training would refuse until then.
    """
    metrics.check(config.eval.metrics)
    weights_and_biases.check(config.train.wandb)
    run_dir = RunDir(files.locate(workdir))
    mesh = sharding.make_mesh(config.mesh)
    with jax.set_mesh(mesh), run_dir.locked():
        first = 0
        if run_dir.holds_a_run():
            run = resume_run(config, run_dir, mesh, allow_change)
            first = max(run_dir.checkpoints().steps(), default=0)
        else:
            run = start_run(config, mesh, run_dir)
        assert run.resolved and run.data
        total = run.resolved.total_steps
        steps = durations_in_steps(run.config, run.data.train.rates, total)
        prepared = prepare(run.model, run.config, mesh, {}, total, steps["warmup"], steps["decay"])
        evaluation.training_suite(run)
        check_disk(run_dir, prepared)
        every = ", ".join(f"{what} every {steps[name]} steps" for name, what in _EVERY.items() if steps[name])
        size = f"a checkpoint takes up to {checkpoint_bytes(prepared) / 1e9:.2f} GB"
        return f"{summary(run, first)}\n{every}; {size}\ndry run: nothing was trained or written"


_EVERY = {"log": "a line in the log", "checkpoint": "a checkpoint", "eval": "an evaluation"}


def checkpoint_bytes(prepared: PreparedStep) -> int:
    """Return the size of a checkpoint's arrays."""
    saved = [prepared.shapes.params, prepared.shapes.optimizer]
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(saved))


def check_disk(run_dir: RunDir, prepared: PreparedStep) -> None:
    """Refuse a disk that has no space for even one checkpoint."""
    path = files.local(run_dir.path)
    if not hosts.is_first() or path is None:
        return
    free, need = shutil.disk_usage(path).free, checkpoint_bytes(prepared)
    if free < need:
        raise UserError(
            f"{run_dir.path} has {free / 1e9:.1f} GB free and a checkpoint takes up to {need / 1e9:.1f} GB; free space "
            "or name another --workdir"
        )


def summary(run: Run, first: int) -> str:
    """Return a line about the model, the devices and the steps that are to come after step `first`."""
    model, resolved = run.model, run.resolved
    assert resolved
    layout, shape = resolved.layout, resolved.layout.shape
    if model.kind == "causal":
        rows, fill = f"{layout.rows} rows of {shape.target} tokens", f"{layout.target_fill:.0%}"
    else:
        rows = f"{layout.rows} rows of {shape.blocks} x {shape.source} + {shape.target} tokens"
        fill = f"{layout.source_fill:.0%} and {layout.target_fill:.0%}"
    fill = f", {fill} full" if resolved.packed else " at most"
    examples = round(layout.rows * layout.examples_per_row)
    adapters = f" and {model.trained_count / 1e6:.2f}M in adapters, which are trained" if model.adapter else ""
    total = resolved.total_steps
    steps = f"steps {first + 1} to {total}" if first < total else f"all {total} steps are done,"
    return (
        f"{model.parameter_count / 1e6:.1f}M parameters{adapters}, "
        f"{jax.device_count()} {jax.default_backend()} device(s), "
        f"{steps} of about {examples} examples: {rows}{fill}"
    )
