"""Open a run to train it: what `train` and `dry_run` do before the first step, and the checks and summary of that."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import jax

from jax_it import compilation_cache, evaluation, files, hosts, metrics, sharding
from jax_it.config import Config
from jax_it.errors import UserError
from jax_it.evaluation import Suite
from jax_it.models import Params
from jax_it.run import Run, resume_run, start_run
from jax_it.run_checks import durations_in_steps
from jax_it.run_dir import RunDir
from jax_it.training import weights_and_biases
from jax_it.training.step import PreparedStep, prepare


@contextmanager
def opened(config: Config, workdir: str | Path, allow_change: Sequence[str]) -> Iterator[tuple[Run, RunDir, bool]]:
    """Open the run in `workdir`, or a new one, on its mesh, and lock the directory.

    Yields (run, directory, whether it is resumed). Config, tokenizer, model and data are checked against each other and
    against what the directory holds.
    """
    metrics.check(config.eval.metrics)
    weights_and_biases.check(config.train.wandb)
    run_dir = RunDir(files.locate(workdir))
    mesh = sharding.make_mesh(config.mesh)
    compilation_cache.enable(config.data.cache_dir)
    with jax.set_mesh(mesh), run_dir.locked():
        resuming = run_dir.holds_a_run()
        run = resume_run(config, run_dir, mesh, allow_change) if resuming else start_run(config, mesh, run_dir)
        yield run, run_dir, resuming


def prepare_run(run: Run, frozen: Params) -> tuple[dict[str, int], Suite | None, PreparedStep]:
    """Return a run's durations in steps, its evaluation, and its step; of `frozen` only the shapes matter.

    Raises UserError for an evaluation that cannot run and for a disk without space for a checkpoint.
    """
    assert run.run_dir and run.resolved and run.data
    total = run.resolved.total_steps
    steps = durations_in_steps(run.config, run.data.train.rates, total)
    suite = evaluation.training_suite(run)
    prepared = prepare(run.model, run.config, run.mesh, frozen, total, steps["warmup"], steps["decay"])
    check_disk(run.run_dir, prepared)
    return steps, suite, prepared


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
