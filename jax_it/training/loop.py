"""A training run, read from top to bottom: mesh → data → shapes → shardings → restore → step → loop."""

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax

from jax_it import evaluation, files, hosts, metrics, sharding
from jax_it.checkpointing import Checkpoints, abstract
from jax_it.config import Config
from jax_it.data.loader import Part
from jax_it.models import Params
from jax_it.run import resume_run, start_run, with_weights
from jax_it.run_checks import durations_in_steps
from jax_it.run_dir import RunDir
from jax_it.status import activity
from jax_it.stopping import on_signals
from jax_it.training import weights_and_biases
from jax_it.training.dry_run import check_disk, summary
from jax_it.training.hooks import SIGNAL, Checkpointing, Evaluation, Patience, Profile, is_due, without_params
from jax_it.training.log import Log
from jax_it.training.phases import since_first_start
from jax_it.training.progress import Progress
from jax_it.training.skips import Skips
from jax_it.training.state import TrainState, start
from jax_it.training.step import PreparedStep, prepare
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
    metrics.check(config.eval.metrics)
    weights_and_biases.check(config.train.wandb)
    run_dir = RunDir(files.locate(workdir))
    mesh = sharding.make_mesh(config.mesh)
    with on_signals("train", STOPPED) as stopping, hosts.watched(), jax.set_mesh(mesh), run_dir.locked():
        # Config, tokenizer, model and data, checked against each other and against what the directory holds.
        resuming = run_dir.holds_a_run()
        run = resume_run(config, run_dir, mesh, allow_change) if resuming else start_run(config, mesh, run_dir)
        trained: Params | None = None
        if resuming and run_dir.checkpoints().steps():
            frozen = run.load_frozen()
        else:
            run, trained, frozen = with_weights(run)
        assert run.resolved and run.data
        settings, model, data, total = run.config.train, run.model, run.data.train, run.resolved.total_steps
        steps = durations_in_steps(run.config, data.rates, total)
        suite = evaluation.training_suite(run)

        # Shapes and shardings, the directory, and the state: that of the newest checkpoint, or the first one.
        prepared = prepare(model, run.config, mesh, frozen, total, steps["warmup"], steps["decay"])
        check_disk(run_dir, prepared)
        if not resuming:
            run_dir.create(config, run.resolved, model, run.tokenizer)
        checkpoints = run_dir.writing_checkpoints(run.config)
        state, position = _restore_or_start(checkpoints, trained, frozen, prepared)
        del trained, frozen
        first = int(state.step)
        run_dir.rewind_metrics(first)
        if run.changes:
            run_dir.change(run.changes, first, total)

        groups = sharding.batch_parts(mesh)
        part = Part(sharding.local_parts(mesh), groups, groups * settings.gradient_accumulation_steps)
        batches = data.read(first, settings.duration, part)
        phases = since_first_start(run_dir, began, position)
        with (
            Log(run_dir, first, total, weights_and_biases.start(run_dir, run.config)) as log,
            Profile(run_dir.path / "profile", steps["profile"], settings.profile_steps) as profile,
            watching(phases, settings.step_timeout, run_dir),
            activity(lambda: f"{phases.phase}, step {phases.step} of {total}"),
            checkpoints,
        ):
            log.warn(summary(run, first))
            for name, (before, after) in run.changes.items():
                log.warn(f"config.{name} is {after!r} after step {first}; it was {before!r}")
            log.shares(phases)
            throughput = Throughput(peak_flops(mesh.size), phases, position.get("throughput"))
            skips = Skips(settings, log, data)
            progress = Progress(log, skips, throughput, phases, position.get("loss", (0.0, 0.0)))
            save = Checkpointing(checkpoints, steps["checkpoint"], total, progress, phases)
            evaluate = Evaluation(run, suite, steps["eval"], total, progress, log, phases, stopping)
            patience = Patience(run_dir, run.config.eval)
            hooks = save, evaluate, patience.after(save, evaluate, total=total), save  # the last one if others end it

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
                batch = sharding.place(drawn.batch, mesh, part.numbers)
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
