"""A training run, read from top to bottom: mesh → data → shapes → shardings → restore → step → loop."""

import dataclasses
import shutil
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import jax

from jax_it import data, evaluation, files, hosts, metrics, pretrained, sharding
from jax_it.checkpoint import abstract
from jax_it.config import Config, Duration, check_read
from jax_it.data import chat
from jax_it.data import tokenizer as tokenizers
from jax_it.data.loader import Part
from jax_it.data.packing import Layout, Shape
from jax_it.errors import UserError
from jax_it.evaluation.run import check_room
from jax_it.models import Model
from jax_it.pretrained.folder import find_folder, fingerprint
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
from jax_it.workdir import Derived, Workdir, make_format

# What bias, mask, softmax and dropout cost for one attention score, in matmul FLOPs of the same time: they are
# bound by memory. Measured on two CPU cores at 512 positions; an H100's ratio of the two is of the same order.
FLOPS_OF_A_SCORE = 2000
MOST_STEPS = 2**31 - 1  # which the state counts in 32 bits
MOST_EPOCHS_A_STEP = 100
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
    place = Workdir(files.locate(workdir))
    mesh = sharding.make_mesh(config.mesh)
    with on_signals("train", STOPPED) as stopping, hosts.watched(), jax.set_mesh(mesh), place.locked():
        resuming = place.holds_a_run()
        if resuming:
            place.check_parts()
            place.check_same(config)
        else:
            place.check_new()
        asked = config
        config, commits = data.pin(config, place.open()[1].commits if resuming else None)
        tokenizer = place.tokenizer() if resuming else load_tokenizer(config)
        model, trained, frozen = _load_model(config, place, mesh, resuming)
        check_model(config, model, tokenizer)
        check_mesh(config, model, mesh.shape)
        built = build_data(config, model, tokenizer)
        if not resuming:
            check_steps(config, built)
        derived = _derive(asked, place, model, built, resuming, commits)
        total, intervals = derived.total_steps, _intervals(config, built, derived.total_steps)

        prepared = prepare(model, config, mesh, frozen, total, intervals["warmup"], intervals["decay"])
        evaluator = make_evaluator(config, model, tokenizer, derived.layout, mesh)
        check_disk(place, prepared)
        if not resuming:
            place.create(asked, derived, model, tokenizer)
        checkpoints = place.writing_checkpoints(config)
        state, position = _restore_or_start(checkpoints, trained, frozen, prepared)
        del trained, frozen
        phases = since_first_start(place, began, position)
        evaluate = _evaluation_of(place, model, evaluator, phases, stopping)

        first = int(state.step)
        place.rewind_metrics(first)
        parts = sharding.batch_parts(mesh) * config.train.gradient_accumulation_steps
        part = Part(sharding.local_parts(mesh), sharding.batch_parts(mesh), parts)
        batches = built.train.read(first, config.train.duration, part)
        evaluated = _evaluations(config, intervals["eval"], total)
        with (
            Log(place, first, total, weights_and_biases.start(place, config)) as log,
            Profile(place.path / "profile", intervals["profile"], config.train.profile_steps) as profile,
            watching(phases, config.train.step_timeout, place),
            checkpoints,
        ):
            log.warn(_summary(model, derived, first))
            log.shares(phases)
            if evaluated(first) and not place.is_scored(first):  # the start, or what a stop has left out
                log.say(evaluate(first, state))
            patience = Patience(place, config.eval)
            end, why = (first, over) if (over := patience.over(first)) else (total, "")
            if first < end:
                place.go_on()
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
            place.end(end, why or "its duration is over")
            if first < end:
                log.shares(phases)
                log.say(phases.text())
            if why:
                log.say(f"training ends at step {end} of {total}: {why}")
        return state


def load_tokenizer(config: Config) -> tokenizers.Tokenizer:
    """The tokenizer that the config names, or one trained on the training data."""
    model = config.model
    if model.tokenizer == "train":
        found = tokenizers.train(data.texts(config.data.train), model.tokenizer_size)
    else:
        found = tokenizers.load(model.tokenizer or str(find_folder(model.path)))
    return chat.with_chat_template(found, model.chat_template)


def check_model(config: Config, model: Model, tokenizer: tokenizers.Tokenizer) -> None:
    """Refuses settings that the model cannot follow, and a tokenizer with other marks than the model's."""
    check_read(config, model.kind)
    positions, length = model.config.positions, config.data.max_seq_length
    if positions and length > positions:
        raise UserError(f"config.data.max_seq_length: {length} is more than the model's {positions} positions")
    check_room(model, config)
    if config.train.router_aux_loss_coef and not model.config.experts:
        raise UserError(
            "config.train.router_aux_loss_coef is for mixtures of experts, which this model is not; leave it at 0"
        )
    if model.kind == "causal":  # segments mark its padding, and texts end where the tokenizer says
        return
    if tokenizer.end not in model.config.end_tokens:
        ends = ", ".join(map(str, model.config.end_tokens))
        raise UserError(f"eos_token_id is {ends} in the model's config.json and {tokenizer.end} in the tokenizer")
    if model.config.pad_token != tokenizer.pad:
        raise UserError(
            f"pad_token_id is {model.config.pad_token} in the model's config.json and {tokenizer.pad} in the tokenizer"
        )


def check_mesh(config: Config, model: Model, sizes: Mapping[str, int]) -> None:
    """Refuses a mesh, of these sizes, of which the model cannot use an axis."""
    context, expert = sizes["context"], sizes["expert"]
    field = "max_seq_length" if model.kind == "causal" else "max_source_length"
    if (length := getattr(config.data, field)) % context:
        raise UserError(f"config.mesh.context: {context} devices cannot share the {length} positions of data.{field}")
    if expert > 1 and not model.config.experts:
        raise UserError(f"config.mesh.expert: {expert}, but this model has no experts; use fsdp")
    if model.config.experts and model.config.experts.number % expert:
        raise UserError(f"config.mesh.expert: {expert} devices cannot share {model.config.experts.number} experts")


def check_steps(config: Config, built: data.Built) -> None:
    """Refuses a step or a run that is too long for its data, or durations that do not fit into the run."""
    train, found = config.train, built.train
    examples = found.mixture.epoch_examples
    if train.batch_size > MOST_EPOCHS_A_STEP * examples:
        raise UserError(
            f"config.train.batch_size: {train.batch_size} is more than {MOST_EPOCHS_A_STEP} times the {examples} "
            "training examples; lower it"
        )
    if train.gradient_accumulation_steps > found.layout.rows:
        raise UserError(
            f"config.train.gradient_accumulation_steps: a step has {found.layout.rows} rows, which cannot be cut into "
            f"{train.gradient_accumulation_steps} parts; lower it, or raise train.batch_size"
        )

    def refuse(name: str, duration: Duration, steps: int, why: str) -> NoReturn:
        raise UserError(f"config.train.{name}: {duration}{f' ({steps} steps)' * (duration.unit != 'steps')} {why}")

    total = found.steps(train.duration)
    if total > MOST_STEPS:
        refuse("duration", train.duration, total, f"is too long; a run has at most {MOST_STEPS} steps")
    steps, optimizer = _intervals(config, built, total), train.optimizer
    rest = total - steps["warmup"]
    if rest < 0:
        why = f"is longer than the run of {total} steps; shorten it"
        refuse("optimizer.warmup", optimizer.warmup, steps["warmup"], why)
    if optimizer.schedule == "wsd" and steps["decay"] > rest:
        why = f"is longer than what the run has after its warmup, {rest} steps; shorten it"
        refuse("optimizer.decay", optimizer.decay, steps["decay"], why)
    if steps["profile"] >= total:
        refuse("profile", train.profile, steps["profile"], f"is not before the end of the run of {total} steps")


def build_data(config: Config, model: Model, tokenizer: tokenizers.Tokenizer) -> data.Built:
    """The training data, its row lengths chosen by what a row costs this model."""

    def row_cost(shape: Shape) -> float:
        sizes = (shape.source, shape.target, shape.blocks)
        return model.config.flops(*sizes) + FLOPS_OF_A_SCORE * model.config.score_count(*sizes)

    return data.build(config.data, tokenizer, make_format(model, tokenizer), config.train.batch_size, row_cost)


def _load_model(config: Config, place: Workdir, mesh: jax.sharding.Mesh, resuming: bool) -> tuple[Model, Any, Any]:
    """The model, what is trained as it is at first, unless a checkpoint holds it as it is now, and the rest."""
    if resuming and place.checkpoints().steps():
        model = place.model(config, place.open()[1])
        return model, None, place.frozen(model, config, mesh)
    model, params = pretrained.load(config.model, mesh, config.train.seed)
    return model, *model.split(params)


def _derive(
    config: Config, place: Workdir, model: Model, built: data.Built, resuming: bool, commits: Mapping[str, str]
) -> Derived:
    """What the run worked out at its start: read back where it is resumed, and refused if the data has changed."""
    if not resuming:
        steps = built.train.steps(config.train.duration)
        return Derived(
            layout=built.train.layout,
            packed=built.train.packed,
            total_steps=steps,
            data_digest=built.digest,
            tied=model.config.tied,
            commits=commits,
            adapter=model.adapter,
            base_digest=fingerprint(find_folder(config.model.path)) if model.adapter and config.model.path else "",
        )
    derived = place.open()[1]
    if derived.data_digest != built.digest:
        raise UserError(
            f"the training data has changed since the run in {place.path} was started; "
            "restore it, or start over in another --workdir"
        )
    built.train.layout = derived.layout
    return derived


def _intervals(config: Config, built: data.Built, total: int) -> dict[str, int]:
    """The config's durations in steps."""
    train, rates = config.train, built.train.rates
    durations = {
        "warmup": train.optimizer.warmup,
        "decay": train.optimizer.decay,
        "log": train.log_every,
        "checkpoint": train.checkpoint_every,
        "profile": train.profile,
        "eval": config.eval.every,
    }
    return {name: duration.steps(rates, total) for name, duration in durations.items()}


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


def make_evaluator(
    config: Config, model: Model, tokenizer: tokenizers.Tokenizer, layout: Layout, mesh: jax.sharding.Mesh
) -> evaluation.Evaluator | None:
    """The evaluator for evaluation within the loop; None where it is not asked for.

    Everything that the config evaluates on is read either way, so that what `jax-it eval` would not find after
    training is refused before it.
    """
    needed = evaluation.read(config, tokenizer, make_format(model, tokenizer))
    if not (config.eval.every.value or config.eval.at_start):
        return None
    return evaluation.Evaluator(model, tokenizer, needed.examples, config, layout, mesh, needed.tasks)


def check_disk(place: Workdir, prepared: PreparedStep) -> None:
    """Refuses a disk on which not even one checkpoint has room."""
    path = files.local(place.path)
    if not hosts.is_first() or path is None:
        return
    saved = [prepared.shapes.params, prepared.shapes.optimizer]
    need = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(saved))
    free = shutil.disk_usage(path).free
    if free < need:
        raise UserError(
            f"{place.path} has {free / 1e9:.1f} GB free and a checkpoint takes up to {need / 1e9:.1f} GB; free space "
            "or name another --workdir"
        )


def _evaluation_of(
    place: Workdir, model: Model, evaluator: evaluation.Evaluator | None, phases: Phases, stopping: Stopping
) -> Any:
    """`evaluate(step, state) -> text` for evaluation within the loop; "" where it was stopped between two batches."""
    if evaluator is None:
        return None
    board = place.tensorboard / "eval"
    evaluation.complete(board, {step: place.eval(step) for step in place.scored_steps()})

    def evaluate(step: int, state: TrainState) -> str:
        def go_on() -> bool:
            phases.enter("evaluating", step)
            return not stopping()

        try:
            scored = evaluator(model.join(state.params, state.frozen), go_on)
        except evaluation.Stopped:
            return ""
        evaluation.write(place.eval(step), scored, board, step)
        shown = evaluation.examples_text(scored)
        return f"evaluation at step {step}\n{evaluation.table(scored)}" + (f"\n{shown}" if shown else "")

    return evaluate


def _summary(model: Model, derived: Derived, first: int) -> str:
    layout = derived.layout
    shape = layout.shape
    if model.kind == "causal":
        rows, fill = f"{layout.rows} rows of {shape.target} tokens", f"{layout.target_fill:.0%}"
    else:
        rows = f"{layout.rows} rows of {shape.blocks} x {shape.source} + {shape.target} tokens"
        fill = f"{layout.source_fill:.0%} and {layout.target_fill:.0%}"
    fill = f", {fill} full" if derived.packed else " at most"
    examples = round(layout.rows * layout.examples_per_row)
    adapters = f" and {model.trained_count / 1e6:.2f}M in adapters, which are trained" if model.adapter else ""
    return (
        f"{model.parameter_count / 1e6:.1f}M parameters{adapters}, "
        f"{jax.device_count()} {jax.default_backend()} device(s), "
        f"steps {first + 1} to {derived.total_steps} of about {examples} examples: {rows}{fill}"
    )
