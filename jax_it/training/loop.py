"""A training run, read from top to bottom: mesh and data (`opening.py`) → weights → step → restore → loop."""

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax

from jax_it import compilation_cache, hosts, sharding
from jax_it.checkpointing import Checkpoints, abstract
from jax_it.config import Config
from jax_it.data.loader import Part
from jax_it.models import Params
from jax_it.run import with_weights
from jax_it.status import activity
from jax_it.stopping import on_signals
from jax_it.training import weights_and_biases
from jax_it.training.hooks import SIGNAL, Checkpointing, Evaluation, Patience, Profile, is_due, without_params
from jax_it.training.log import Log
from jax_it.training.opening import opened, prepare_run, summary
from jax_it.training.phases import since_first_start
from jax_it.training.progress import Progress
from jax_it.training.skips import Skips
from jax_it.training.state import TrainState, start
from jax_it.training.step import PreparedStep
from jax_it.training.throughput import Throughput, peak_flops, step_flops
from jax_it.training.watchdog import watching

STOPPED = " before there was a new step to save; run the same command to continue from where the run stood"


def train(config: Config, workdir: str | Path, allow_change: Sequence[str] = ()) -> TrainState:
    """Train to the end of the config's duration, continuing the run in `workdir` if there is one.

    Settings named in `allow_change`, such as "train.duration", may differ from those that the run was started with.
    Raises UserError for whatever the user can fix, and Interrupted if the run was stopped: the same call continues it.
    What was saved before stays usable.
    """
    began = time.time()
    hosts.start()
    with (
        on_signals("train", STOPPED) as stopping,
        hosts.watched(),
        opened(config, workdir, allow_change) as (run, run_dir, resuming),
    ):
        trained: Params | None = None
        if resuming and run_dir.checkpoints().steps():
            frozen = run.load_frozen()
        else:
            run, trained, frozen = with_weights(run)
        assert run.resolved and run.data
        train_config, model, data, total = run.config.train, run.model, run.data.train, run.resolved.total_steps

        # Shapes and shardings, the directory, and the state: that of the newest checkpoint, or the first one.
        steps, suite, prepared = prepare_run(run, frozen)
        if not resuming:
            run_dir.create(config, run.resolved, model, run.tokenizer)
        checkpoints = run_dir.writing_checkpoints(run.config)
        state, saved_position = _restore_or_start(checkpoints, trained, frozen, prepared)
        del trained, frozen
        first = int(state.step)
        run_dir.rewind_metrics(first)
        if run.changes:
            run_dir.change(run.changes, first, total)

        parts = sharding.batch_parts(run.mesh)
        own_part = Part(sharding.local_parts(run.mesh), parts, parts * train_config.gradient_accumulation_steps)
        batches = data.read(first, train_config.duration, own_part)
        phases = since_first_start(run_dir, began, saved_position)
        with (
            Log(run_dir, first, total, weights_and_biases.start(run_dir, run.config)) as log,
            Profile(run_dir.path / "profile", steps["profile"], train_config.profile_steps) as profile,
            watching(phases, train_config.step_timeout, run_dir),
            activity(lambda: f"{phases.phase}, step {phases.step} of {total}"),
            checkpoints,
        ):
            log.warn(summary(run, first))
            if folder := compilation_cache.folder():
                log.warn(f"compiled programs are kept in {folder}")
            for name, (before, after) in run.changes.items():
                log.warn(f"config.{name} is {after!r} after step {first}; it was {before!r}")
            log.shares(phases)
            throughput = Throughput(peak_flops(run.mesh.size), phases, saved_position.get("throughput"))
            skips = Skips(train_config, log, data)
            progress = Progress(log, skips, throughput, phases, saved_position.get("loss", (0.0, 0.0)))
            save = Checkpointing(checkpoints, steps["checkpoint"], total, progress, phases)
            evaluate = Evaluation(run, suite, steps["eval"], total, progress, log, phases, stopping)
            patience = Patience(run_dir, run.config.eval)
            # save runs again so that the final step is saved when another hook ends training
            hooks = save, evaluate, patience.after(save, evaluate, total=total), save

            if not run_dir.is_scored(first):
                evaluate(first, state, "")  # the start, or what a stop has left out
            number, ending = first, patience.over(first)
            if first < total and not ending:
                run_dir.clear_end()
            while number < total and not ending:
                number += 1
                profile(number, state)
                phases.enter("waiting", number)
                drawn = next(batches)
                batch = sharding.place(drawn.batch, run.mesh, own_part.numbers)
                phases.enter("stepping" if throughput.knows(drawn.shape) else "compiling", number)
                with jax.profiler.StepTraceAnnotation("train", step_num=number):
                    state, measured = prepared.step(state, batch)
                stopping.hold()
                phases.enter("stepping", number)
                progress.settle()  # looks at the step before, while this one runs
                rows = drawn.sizes.target_positions / drawn.shape.target
                throughput.add(drawn.sizes, drawn.shape, step_flops(model, rows, drawn.shape))
                progress.add(number, measured, number == total or is_due(number, steps["log"]))
                if stopping() and (number < total or evaluate.is_due(number)):
                    ending = SIGNAL
                for hook in hooks:
                    ending = hook(number, state, ending)
            phases.enter("saving", number)
            checkpoints.wait()
            if ending == SIGNAL:
                raise stopping.interrupted(
                    f" after step {number}, which is saved; run the same command to continue from there"
                )
            run_dir.end(number, ending or "its duration is over")
            if first < number:
                log.shares(phases)
                log.say(phases.text())
            if ending:
                log.say(f"training ends at step {number} of {total}: {ending}")
        return state


def _restore_or_start(
    checkpoints: Checkpoints, trained: Params | None, frozen: Params, prepared: PreparedStep
) -> tuple[TrainState, dict[str, Any]]:
    """Return the state of the newest complete checkpoint and its position, or the first state and no position."""
    shapes, shardings = prepared.shapes, prepared.shardings
    found = checkpoints.restore_newest(
        abstract(shapes.params, shardings.params), abstract(without_params(shapes), without_params(shardings))
    )
    if found is None:
        begin = jax.jit(partial(start, optimizer=prepared.optimizer), out_shardings=shardings, donate_argnums=(0, 1))
        return begin(trained, frozen), {}
    _, params, rest, position = found
    return TrainState(params=params, frozen=frozen, **rest), position
