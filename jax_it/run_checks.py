"""Checks of a config that need the model, tokenizer or data."""

from collections.abc import Mapping
from typing import NoReturn

from jax_it.config import Config, Duration, Rates, check_read
from jax_it.data import Built
from jax_it.data.tokenizer import Tokenizer
from jax_it.errors import UserError
from jax_it.models import Model

MOST_STEPS = 2**31 - 1  # which the state counts in 32 bits
MOST_EPOCHS_A_STEP = 100


def check_model(config: Config, model: Model, tokenizer: Tokenizer) -> None:
    """Refuse settings that the model cannot follow, and a tokenizer with other special tokens than the model's."""
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
    if tokenizer.end not in model.config.eos_token_ids:
        ends = ", ".join(map(str, model.config.eos_token_ids))
        raise UserError(f"eos_token_id is {ends} in the model's config.json and {tokenizer.end} in the tokenizer")
    if model.config.pad_token_id != tokenizer.pad:
        raise UserError(
            f"pad_token_id is {model.config.pad_token_id} in the model's config.json and {tokenizer.pad} in the "
            "tokenizer"
        )


def check_room(model: Model, config: Config) -> None:
    """Refuse examples that would leave no position for the text that is generated."""
    positions, length = model.config.positions, config.data.max_seq_length
    new = config.max_new_tokens(model.kind)
    if (
        positions
        and config.eval.generate
        and (config.data.eval or config.data.validation_size)
        and length + new > positions
    ):
        raise UserError(
            f"config.data.max_seq_length: {length}, and {new} new tokens in evaluation, are more than the model's "
            f"{positions} positions; lower it or eval.max_new_tokens, or set eval.generate=False"
        )


def check_vocabulary(model: Model, tokenizer: Tokenizer) -> None:
    """Refuse a tokenizer with ids that the model's embedding has no row for."""
    if tokenizer.size > model.config.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.size} ids and the model's embedding {model.config.vocab_size} rows "
            "(vocab_size in its config.json): give the model its own tokenizer with config.model.tokenizer"
        )


def check_mesh(config: Config, model: Model, sizes: Mapping[str, int]) -> None:
    """Refuse a mesh, of these sizes, with an axis that the model cannot use."""
    context, expert = sizes["context"], sizes["expert"]
    field = "max_seq_length" if model.kind == "causal" else "max_source_length"
    if (length := getattr(config.data, field)) % context:
        raise UserError(f"config.mesh.context: {context} devices cannot share the {length} positions of data.{field}")
    if expert > 1 and not model.config.experts:
        raise UserError(f"config.mesh.expert: {expert}, but this model has no experts; use fsdp")
    if model.config.experts and model.config.experts.number % expert:
        raise UserError(f"config.mesh.expert: {expert} devices cannot share {model.config.experts.number} experts")


def durations_in_steps(config: Config, rates: Rates, total: int) -> dict[str, int]:
    """Return the config's durations in steps, of a run of `total` steps."""
    train = config.train
    durations = {
        "warmup": train.optimizer.warmup,
        "decay": train.optimizer.decay,
        "log": train.log_every,
        "checkpoint": train.checkpoint_every,
        "profile": train.profile,
        "eval": config.eval.every,
    }
    return {name: duration.steps(rates, total) for name, duration in durations.items()}


def check_steps(config: Config, built: Built) -> None:
    """Refuse a step or a run that is too long for its data, or durations that do not fit into the run."""
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
    steps, optimizer = durations_in_steps(config, found.rates, total), train.optimizer
    rest = total - steps["warmup"]
    if rest < 0:
        why = f"is longer than the run of {total} steps; shorten it"
        refuse("optimizer.warmup", optimizer.warmup, steps["warmup"], why)
    if optimizer.schedule == "wsd" and steps["decay"] > rest:
        why = f"is longer than what the run has after its warmup, {rest} steps; shorten it"
        refuse("optimizer.decay", optimizer.decay, steps["decay"], why)
    if steps["profile"] >= total:
        refuse("profile", train.profile, steps["profile"], f"is not before the end of the run of {total} steps")
