"""A training run, read from top to bottom: mesh → data → shapes → shardings → restore → step → loop."""

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax

from jax_it import data, evaluation, metrics, sharding
from jax_it.checkpoint import abstract
from jax_it.config import Config
from jax_it.data import chat
from jax_it.data import tokenizer as tokenizers
from jax_it.data.loader import Part
from jax_it.data.packing import Shape
from jax_it.errors import UserError
from jax_it.models import Model, hf
from jax_it.models.tensors import find_folder, fingerprint
from jax_it.training.log import Log
from jax_it.training.optimizer import make_optimizer, make_schedule
from jax_it.training.state import TrainState, start, state_shardings
from jax_it.training.step import make_train_step
from jax_it.training.throughput import Throughput, peak_flops
from jax_it.workdir import Derived, Workdir, make_format

# What bias, mask, softmax and dropout cost for one attention score, in matmul FLOPs of the same time: they are
# bound by memory. Measured on two CPU cores at 512 positions; an H100's ratio of the two is of the same order.
FLOPS_OF_A_SCORE = 2000


def train(config: Config, workdir: str | Path) -> TrainState:
    """Trains to the end of the config's duration, from where the run in `workdir` stands, if there is one.

    Raises UserError for whatever the user can mend; what was saved before stays usable.
    """
    metrics.check(config.eval.metrics)
    place = Workdir(Path(workdir))
    mesh = sharding.make_mesh(config.mesh)
    with jax.set_mesh(mesh), place.locked():
        resuming = place.holds_a_run()
        if resuming:
            place.check_same(config)
        tokenizer = place.tokenizer() if resuming else load_tokenizer(config)
        model, trained, frozen = _load_model(config, place, mesh, resuming)
        check_model(config, model, tokenizer)
        built = build_data(config, model, tokenizer)
        derived = _derive(config, place, model, built, tokenizer, resuming)
        total, intervals = derived.total_steps, _intervals(config, built, derived.total_steps)

        schedule = make_schedule(config.train.optimizer, total, intervals["warmup"], intervals["decay"])
        optimizer = make_optimizer(config.train.optimizer, schedule, model.trained_letters)
        shapes = jax.eval_shape(partial(start, optimizer=optimizer), _shapes_of(model, config), frozen)
        shardings = state_shardings(model, shapes, mesh)
        checkpoints = place.writing_checkpoints(config)
        state = _restore_or_start(checkpoints, trained, frozen, optimizer, shapes, shardings)
        del trained, frozen
        step = make_train_step(model, config.train, optimizer, schedule, mesh, shardings)
        evaluate = _make_evaluator(config, place, model, tokenizer, derived, mesh)

        first = int(state.step)
        place.rewind_metrics(first)
        parts = sharding.batch_parts(mesh) * config.train.micro_batches
        part = Part(jax.process_index(), jax.process_count(), parts)
        batches = built.train.read(first, config.train.duration, part)
        with Log(place, first, total) as log, _stop_on_sigterm() as stopping, checkpoints:
            print(_summary(model, derived, first), file=sys.stderr)
            if first == 0 and config.eval.at_start and evaluate:
                log.say(evaluate(0, model.join(state.params, state.frozen)))
            throughput = Throughput(peak_flops(mesh.size))  # from now on: what came before was no training
            for number in range(first + 1, total + 1):
                begin = time.perf_counter()
                drawn = next(batches)
                batch = _place(drawn.batch, mesh)
                waited = time.perf_counter() - begin
                state, measured = step(state, batch)
                throughput.add(drawn.sizes, _step_flops(model, drawn.sizes, drawn.shape), waited)
                log.advance()
                last, stop = number == total, stopping()
                if _due(number, intervals["log"]) or last:
                    values = {name: float(value) for name, value in measured.items()}
                    log.write(number, values | throughput.report() | {"skipped": int(state.skipped)})
                    _check_finite(config, state)
                if _due(number, intervals["checkpoint"]) or last or stop:
                    checkpoints.save(number, state.params, _without_params(state), {"step": number})
                if evaluate and (_due(number, intervals["eval"]) or (last and intervals["eval"])):
                    begin = time.perf_counter()
                    log.say(evaluate(number, model.join(state.params, state.frozen)))
                    throughput.pause(time.perf_counter() - begin)
                if stop and not last:
                    checkpoints.wait()
                    log.say(
                        f"stopped by SIGTERM after step {number}, which is saved; the same command goes on from there"
                    )
                    break
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
    """Refuses settings that the model cannot follow, and a tokenizer that is not its own."""
    positions, length = model.config.positions, config.data.sequence_length
    if positions and length > positions:
        raise UserError(f"config.data.sequence_length: {length} is more than the model's {positions} positions")
    new = config.eval.max_new_tokens or config.data.target_length
    if positions and config.eval.generate and (config.data.eval or config.data.holdout) and length + new > positions:
        raise UserError(
            f"config.data.sequence_length: {length}, and {new} new tokens in evaluation, are more than the model's "
            f"{positions} positions; lower it or eval.max_new_tokens, or set eval.generate=False"
        )
    if config.train.balance_loss and not model.config.experts:
        raise UserError("config.train.balance_loss is for mixtures of experts, which this model is not; leave it at 0")
    if tokenizer.size > model.config.vocabulary:
        raise UserError(
            f"the tokenizer has {tokenizer.size} ids and the model's embedding {model.config.vocabulary} rows "
            "(vocab_size in its config.json): give the model its own tokenizer with config.model.tokenizer"
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


def build_data(config: Config, model: Model, tokenizer: tokenizers.Tokenizer) -> data.Built:
    """The training data, its row lengths chosen by what a row costs this model."""

    def row_cost(shape: Shape) -> float:
        sizes = (shape.source, shape.target, shape.blocks)
        return model.config.flops(*sizes) + FLOPS_OF_A_SCORE * model.config.scores(*sizes)

    return data.build(config.data, tokenizer, make_format(model, tokenizer), config.train.batch_size, row_cost)


def _load_model(config: Config, place: Workdir, mesh: jax.sharding.Mesh, resuming: bool) -> tuple[Model, Any, Any]:
    """The model, what is trained as it is at first, unless a checkpoint holds it as it is now, and the rest."""
    if resuming and place.checkpoints().steps():
        model = place.model(config, place.open()[1])
        return model, None, place.frozen(model, config, mesh)
    model, params = hf.load(config.model, mesh, config.train.seed)
    return model, *model.split(params)


def _derive(
    config: Config, place: Workdir, model: Model, built: data.Built, tokenizer: tokenizers.Tokenizer, resuming: bool
) -> Derived:
    """What the run worked out at its start: read back where it is resumed, and refused if the data has changed."""
    if not resuming:
        steps = built.train.steps(config.train.duration)
        derived = Derived(
            layout=built.train.layout,
            packed=built.train.packed,
            total_steps=steps,
            data_digest=built.digest,
            tied=model.config.tied,
            adapter=model.adapter,
            base_digest=fingerprint(find_folder(config.model.path)) if model.adapter and config.model.path else "",
        )
        place.create(config, derived, model, tokenizer)
        return derived
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
        "eval": config.eval.every,
    }
    return {name: duration.steps(rates, total) for name, duration in durations.items()}


def _due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


def _shapes_of(model: Model, config: Config) -> Any:
    dtype = config.model.param_dtype
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), model.trained_shapes)


def _without_params(state: TrainState) -> dict[str, Any]:
    return {
        "step": state.step,
        "optimizer": state.optimizer,
        "skipped": state.skipped,
        "skipped_in_a_row": state.skipped_in_a_row,
    }


def _restore_or_start(
    checkpoints: Any, trained: Any, frozen: Any, optimizer: Any, shapes: TrainState, shardings: TrainState
) -> TrainState:
    """The state of the newest whole checkpoint, or the first one."""
    found = checkpoints.restore_newest(
        abstract(shapes.params, shardings.params), abstract(_without_params(shapes), _without_params(shardings))
    )
    if found is None:
        begin = jax.jit(partial(start, optimizer=optimizer), out_shardings=shardings, donate_argnums=(0, 1))
        return begin(trained, frozen)
    _, params, rest, _ = found
    return TrainState(params=params, frozen=frozen, **rest)


def _make_evaluator(
    config: Config,
    place: Workdir,
    model: Model,
    tokenizer: tokenizers.Tokenizer,
    derived: Derived,
    mesh: jax.sharding.Mesh,
) -> Any:
    """`evaluate(step, params) -> text` for evaluation within the loop; None where none is asked for."""
    if not (config.eval.every.value or config.eval.at_start):
        return None
    examples = data.build_eval(config.data, tokenizer, make_format(model, tokenizer), config.eval.limit)
    if examples is None:
        raise UserError("config.eval.every needs examples: set config.data.eval or config.data.holdout")
    evaluator = evaluation.Evaluator(model, tokenizer, examples, config, derived.layout, mesh)

    def evaluate(step: int, params: Any) -> str:
        scored = evaluator(params)
        evaluation.write(place.eval(step), scored)
        shown = evaluation.examples_text(scored)
        return f"evaluation at step {step}\n{evaluation.table(scored)}" + (f"\n{shown}" if shown else "")

    return evaluate


def _place(batch: Any, mesh: jax.sharding.Mesh) -> Any:
    """This host's rows as part of the global batch."""
    placement = sharding.batch_sharding(mesh)
    return jax.tree.map(lambda array: jax.make_array_from_process_local_data(placement, array), batch)


def _step_flops(model: Model, sizes: Any, shape: Any) -> float:
    """FLOPs of the forward pass, and twice that of the backward; as many again where weights are frozen."""
    rows = sizes.target_positions / shape.target
    return (2 if model.adapter else 3) * rows * model.config.flops(shape.source, shape.target, shape.blocks)


def _check_finite(config: Config, state: TrainState) -> None:
    skipped = int(state.skipped_in_a_row)
    if skipped > config.train.max_skipped:
        raise UserError(
            f"the gradient was not finite for {skipped} steps in a row, up to step {int(state.step)}; "
            "lower config.train.optimizer.learning_rate, or look at the data of those steps"
        )


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


@contextmanager
def _stop_on_sigterm() -> Iterator[Any]:
    """`stopping()` is true once SIGTERM has come: the step at hand is finished and saved first."""
    received: list[int] = []
    try:
        before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    except ValueError:  # not in the main thread: signals are the caller's affair
        yield lambda: False
        return
    try:
        yield lambda: bool(received)
    finally:
        signal.signal(signal.SIGTERM, before)
