"""A training run, read from top to bottom: mesh → data → shapes → shardings → restore → step → loop."""

import dataclasses
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax

from jax_it import evaluation, files, hosts, metrics, sharding
from jax_it.checkpointing import abstract
from jax_it.config import Config
from jax_it.data.loader import Part
from jax_it.errors import UserError
from jax_it.models import Model
from jax_it.resolved_run import ResolvedRun
from jax_it.run import resume_run, start_run, with_weights
from jax_it.run_checks import durations_in_steps
from jax_it.run_dir import RunDir
from jax_it.stopping import Stopping, on_signals
from jax_it.training import weights_and_biases
from jax_it.training.log import Log
from jax_it.training.patience import Patience
from jax_it.training.phases import Phases, since_first_start
from jax_it.training.profiling import Profile
from jax_it.training.progress import Progress
from jax_it.training.skips import Skips
from jax_it.training.state import TrainState, start
from jax_it.training.step import PreparedStep, prepare
from jax_it.training.throughput import Throughput, peak_flops, step_flops
from jax_it.training.watchdog import watching

STOPPED = " before there was a new step to save; run the same command to continue from where the run stood"


def train(config: Config, workdir: str | Path) -> TrainState:
    """Train to the end of the config's duration, continuing the run in `workdir` if there is one.

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
        resuming = run_dir.holds_a_run()
        if not resuming:
            run_dir.check_new()
        run = resume_run(config, run_dir, mesh) if resuming else start_run(config, mesh)
        if resuming and run_dir.checkpoints().steps():
            trained, frozen = None, run.load_frozen()
        else:
            run, trained, frozen = with_weights(run)
        asked, config, model, built, resolved = config, run.config, run.model, run.data, run.resolved
        assert built and resolved
        total, intervals = resolved.total_steps, durations_in_steps(config, built.train.rates, resolved.total_steps)

        prepared = prepare(model, config, mesh, frozen, total, intervals["warmup"], intervals["decay"])
        suite = evaluation.within_training(run)
        check_disk(run_dir, prepared)
        if not resuming:
            run_dir.create(asked, resolved, model, run.tokenizer)
        checkpoints = run_dir.writing_checkpoints(config)
        state, position = _restore_or_start(checkpoints, trained, frozen, prepared)
        del trained, frozen
        phases = since_first_start(run_dir, began, position)
        evaluate = _evaluation_of(run_dir, model, suite, phases, stopping)

        first = int(state.step)
        run_dir.rewind_metrics(first)
        parts = sharding.batch_parts(mesh) * config.train.gradient_accumulation_steps
        part = Part(sharding.local_parts(mesh), sharding.batch_parts(mesh), parts)
        batches = built.train.read(first, config.train.duration, part)
        evaluated = _evaluations(config, intervals["eval"], total)
        with (
            Log(run_dir, first, total, weights_and_biases.start(run_dir, config)) as log,
            Profile(run_dir.path / "profile", intervals["profile"], config.train.profile_steps) as profile,
            watching(phases, config.train.step_timeout, run_dir),
            checkpoints,
        ):
            log.warn(_summary(model, resolved, first))
            log.shares(phases)
            if evaluated(first) and not run_dir.is_scored(first):  # the start, or what a stop has left out
                log.say(evaluate(first, state))
            patience = Patience(run_dir, config.eval)
            end, why = (first, over) if (over := patience.over(first)) else (total, "")
            if first < end:
                run_dir.clear_end()
            throughput = Throughput(peak_flops(mesh.size), phases, position.get("throughput"))
            progress = Progress(
                log, Skips(config.train, log, built.train), throughput, phases, position.get("loss", (0.0, 0.0))
            )
            for number in range(first + 1, end + 1):
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
                last, stop = number == total, stopping()
                progress.add(number, measured, last or _due(number, intervals["log"]))
                saving, scoring = last or stop or _due(number, intervals["checkpoint"]), evaluated(number)
                if saving:
                    _save(checkpoints, number, state, progress, phases)
                if scoring and not stop:
                    progress.settle()
                    found = evaluate(number, state)
                    log.say(found)
                    stop = not found
                    if stop and not saving:
                        _save(checkpoints, number, state, progress, phases)
                if stop and (scoring or not last):
                    checkpoints.wait()
                    raise stopping.interrupted(
                        f" after step {number}, which is saved; run the same command to continue from there"
                    )
                if (saving or scoring) and not last and (why := patience.over(number)):
                    if not saving:
                        _save(checkpoints, number, state, progress, phases)
                    end = number
                    break
            phases.enter("saving", end)
            checkpoints.wait()
            run_dir.end(end, why or "its duration is over")
            if first < end:
                log.shares(phases)
                log.say(phases.text())
            if why:
                log.say(f"training ends at step {end} of {total}: {why}")
        return state


def _due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


def _evaluations(config: Config, interval: int, total: int) -> Callable[[int], bool]:
    """Whether the model is evaluated after a step."""

    def evaluated(step: int) -> bool:
        if step == 0:
            return config.eval.at_start
        return _due(step, interval) or (step == total and interval > 0)

    return evaluated


def _without_params(state: TrainState) -> dict[str, Any]:
    names = (field.name for field in dataclasses.fields(state))
    return {name: getattr(state, name) for name in names if name not in ("params", "frozen")}


def _save(checkpoints: Any, step: int, state: TrainState, progress: Progress, phases: Phases) -> None:
    progress.settle()  # the log has all steps that a checkpoint has
    phases.enter("saving", step)
    position = {"phases": phases.position(), **progress.position()}
    checkpoints.save(step, state.params, _without_params(state), position)


def _restore_or_start(
    checkpoints: Any, trained: Any, frozen: Any, prepared: PreparedStep
) -> tuple[TrainState, dict[str, Any]]:
    """The state of the newest whole checkpoint and its position, or the first one."""
    shapes, shardings = prepared.shapes, prepared.shardings
    found = checkpoints.restore_newest(
        abstract(shapes.params, shardings.params), abstract(_without_params(shapes), _without_params(shardings))
    )
    if found is None:
        begin = jax.jit(partial(start, optimizer=prepared.optimizer), out_shardings=shardings, donate_argnums=(0, 1))
        return begin(trained, frozen), {}
    _, params, rest, position = found
    return TrainState(params=params, frozen=frozen, **rest), position


def check_disk(run_dir: RunDir, prepared: PreparedStep) -> None:
    """Refuses a disk on which not even one checkpoint has room."""
    path = files.local(run_dir.path)
    if not hosts.is_first() or path is None:
        return
    saved = [prepared.shapes.params, prepared.shapes.optimizer]
    need = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(saved))
    free = shutil.disk_usage(path).free
    if free < need:
        raise UserError(
            f"{run_dir.path} has {free / 1e9:.1f} GB free and a checkpoint takes up to {need / 1e9:.1f} GB; free space "
            "or name another --workdir"
        )


def _evaluation_of(
    run_dir: RunDir, model: Model, suite: evaluation.Suite | None, phases: Phases, stopping: Stopping
) -> Any:
    """`evaluate(step, state) -> text` for evaluation within the loop; "" where it was stopped between two batches."""
    if suite is None:
        return None
    tensorboard_dir = run_dir.tensorboard / "eval"
    evaluation.write_missing_events(tensorboard_dir, {step: run_dir.eval(step) for step in run_dir.scored_steps()})

    def evaluate(step: int, state: TrainState) -> str:
        def should_stop() -> bool:
            phases.enter("evaluating", step)
            return stopping()

        try:
            result = suite(model.join(state.params, state.frozen), should_stop)
        except evaluation.Stopped:
            return ""
        evaluation.write(run_dir.eval(step), result, tensorboard_dir, step)
        shown = evaluation.examples_text(result)
        return f"evaluation at step {step}\n{evaluation.table(result)}" + (f"\n{shown}" if shown else "")

    return evaluate


def _summary(model: Model, resolved: ResolvedRun, first: int) -> str:
    layout = resolved.layout
    shape = layout.shape
    if model.kind == "causal":
        rows, fill = f"{layout.rows} rows of {shape.target} tokens", f"{layout.target_fill:.0%}"
    else:
        rows = f"{layout.rows} rows of {shape.blocks} x {shape.source} + {shape.target} tokens"
        fill = f"{layout.source_fill:.0%} and {layout.target_fill:.0%}"
    fill = f", {fill} full" if resolved.packed else " at most"
    examples = round(layout.rows * layout.examples_per_row)
    adapters = f" and {model.trained_count / 1e6:.2f}M in adapters, which are trained" if model.adapter else ""
    return (
        f"{model.parameter_count / 1e6:.1f}M parameters{adapters}, "
        f"{jax.device_count()} {jax.default_backend()} device(s), "
        f"steps {first + 1} to {resolved.total_steps} of about {examples} examples: {rows}{fill}"
    )
