"""`jax-it train --dry-run`: everything that training does before it reads weights and compiles."""

from collections.abc import Sequence
from pathlib import Path

from jax_it.config import Config
from jax_it.training.opening import checkpoint_bytes, opened, prepare_run, summary

_INTERVALS = {"log": "a line in the log", "checkpoint": "a checkpoint", "eval": "an evaluation"}


def dry_run(config: Config, workdir: str | Path, allow_change: Sequence[str] = ()) -> str:
    """Do what `train` does before it reads weights and compiles; leave nothing. Return what training would do.

    Raises UserError for whatever training would refuse until then.
    """
    with opened(config, workdir, allow_change) as (run, run_dir, resuming):
        first = max(run_dir.checkpoints().steps(), default=0) if resuming else 0
        steps, _, prepared = prepare_run(run, {})
        every = ", ".join(f"{what} every {steps[name]} steps" for name, what in _INTERVALS.items() if steps[name])
        size = f"a checkpoint takes up to {checkpoint_bytes(prepared) / 1e9:.2f} GB"
        return f"{summary(run, first)}\n{every}; {size}\ndry run: nothing was trained or written"
