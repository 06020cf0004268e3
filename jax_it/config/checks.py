"""Values and combinations of settings that cannot work, each refused by the name of its field."""

import dataclasses
import operator
import re

from jax_it.config.settings import Config, Data, Lora, Model, Source, Task
from jax_it.errors import UserError

_AT_LEAST: dict[str, float] = {
    "model.tokenizer_size": 0, "model.lora.rank": 0, "model.lora.alpha": 0,
    "data.source_length": 2, "data.target_length": 2, "data.sequence_length": 2,
    "data.holdout": 0, "data.mixing_cap": 0, "data.packed_source_length": 0, "data.packed_target_length": 0,
    "train.batch_size": 1, "train.micro_batches": 1,
    "train.loss_chunk": 1, "train.clip": 0, "train.z_loss": 0, "train.balance_loss": 0,
    "train.keep": 1, "train.keep_best": 0, "train.keep_unscored": 0,
    "train.max_skipped": 0, "train.max_spike": 0, "train.hang_after": 0,
    "train.profile_steps": 1,
    "train.optimizer.learning_rate": 0, "train.optimizer.weight_decay": 0, "train.optimizer.epsilon": 0,
    "mesh.slices": 0, "eval.batch_size": 1, "eval.max_new_tokens": 0, "eval.limit": 0,
    "eval.patience": 0, "eval.min_new_tokens": 0, "eval.num_beams": 1,
}  # fmt: skip
_SHARES = ("data.max_dropped", "data.max_truncated", "data.max_unknown", "train.optimizer.final_rate")
_BELOW_ONE = ("model.lora.dropout", "train.label_smoothing", "train.optimizer.beta1", "train.optimizer.beta2")


def check(config: Config, training: bool) -> None:
    """Refuses values and combinations that cannot work, before anything is read or computed."""
    for name, least in _AT_LEAST.items():
        if (value := operator.attrgetter(name)(config)) < least:
            raise UserError(f"config.{name}: {value} must be at least {least:g}")
    for name in _SHARES:
        if not 0 <= (value := operator.attrgetter(name)(config)) <= 1:
            raise UserError(f"config.{name}: {value} must be in [0, 1]")
    for name in _BELOW_ONE:
        if not 0 <= (value := operator.attrgetter(name)(config)) < 1:
            raise UserError(f"config.{name}: {value} must be in [0, 1)")
    model, data, train, mesh = config.model, config.data, config.train, config.mesh
    if not model.path and not model.architecture:
        raise UserError(
            "config.model.path is empty; name a Transformers folder or hub model, or give model.architecture"
        )
    if not model.path and model.pretrained:
        raise UserError("config.model.pretrained needs config.model.path; set it to False for random weights")
    if not model.path and not model.tokenizer:
        raise UserError("config.model.tokenizer is empty and there is no config.model.path to take it from")
    if (model.tokenizer == "train") != bool(model.tokenizer_size):
        raise UserError("config.model.tokenizer_size goes with config.model.tokenizer='train', and only with it")
    if model.dropout is not None and not 0 <= model.dropout < 1:
        raise UserError(f"config.model.dropout: {model.dropout} must be in [0, 1)")
    _check_adapters(model)
    if model.prefix_lm and data.learn != "last":
        raise UserError("config.model.prefix_lm needs data.learn='last': no answer may be learnt that the prompt shows")
    if training and not data.train:
        raise UserError("config.data.train is empty; name at least one data set")
    named = [("train", i, s) for i, s in enumerate(data.train)] + [("eval", i, s) for i, s in enumerate(data.eval)]
    for part, i, source in named:
        _check_source(source, f"config.data.{part}.{i}")
    if data.holdout and data.eval:
        raise UserError("config.data.holdout and config.data.eval exclude each other; keep one")
    _check_mixing(data)
    for name, length, packed in (
        ("source", data.source_length, data.packed_source_length),
        ("target", data.target_length, data.packed_target_length),
    ):
        if packed and packed < length:
            raise UserError(f"config.data.packed_{name}_length: {packed} is less than data.{name}_length, {length}")
    if bool(data.packed_source_length) != bool(data.packed_target_length):
        raise UserError("config.data.packed_source_length and packed_target_length are given together or not at all")
    if data.packed_source_length % data.source_length:
        raise UserError(
            f"config.data.packed_source_length: {data.packed_source_length} must be a multiple of "
            f"data.source_length, {data.source_length}: a row is made of blocks of that length"
        )
    if train.duration.value <= 0 or train.duration.unit == "%":
        raise UserError("config.train.duration must be positive and in steps, epochs, examples or tokens")
    _check_tasks(config.eval.tasks)
    best = config.eval.best
    of_task = best in [f"{task.name}/{metric}" for task in config.eval.tasks for metric in measured(task)]
    if best != "loss" and not of_task and not (best in config.eval.metrics and config.eval.generate):
        raise UserError(f"config.eval.best: {best!r} is not measured; add it to eval.metrics, with eval.generate on")
    if config.eval.repetition_penalty <= 0:
        raise UserError(f"config.eval.repetition_penalty: {config.eval.repetition_penalty} must be positive; 1 is none")
    for name, default in (("length_penalty", 1), ("early_stopping", False)):
        if config.eval.num_beams == 1 and getattr(config.eval, name) != default:
            raise UserError(f"config.eval.{name} has no effect without beams; set eval.num_beams")
    sizes = {name: size for name, size in dataclasses.asdict(mesh).items() if name not in ("slices", "across_slices")}
    if sum(size == -1 for size in sizes.values()) > 1 or any(size == 0 or size < -1 for size in sizes.values()):
        raise UserError(f"config.mesh: sizes must be positive, and at most one of them -1; got {sizes}")


def _check_source(source: Source, where: str) -> None:
    if not source.path:
        raise UserError(f"{where}.path is empty; give a file, a glob or a data set's name")
    if not source.template:
        raise UserError(f"{where}.template is empty; name a template or leave it out")
    if source.weight < 0 or source.limit < 0 or source.limit_each < 0:
        raise UserError(f"{where}: weight and limit must not be negative")


def measured(task: Task) -> tuple[str, ...]:
    """The names of what a task measures over all its examples, but for a metric of one's own that gives several."""
    names = {
        "generate": task.metrics, "rank": ("accuracy",), "perplexity": ("loss", "perplexity"),
        "run": task.metrics or ("pass@1",),
    }[task.score]  # fmt: skip
    return (*names, *(f"{name}_macro" for name in names)) if task.group_by else names


def _check_tasks(tasks: tuple[Task, ...]) -> None:
    """Refuses tasks that cannot be scored, and settings of theirs that nothing would read."""
    for i, task in enumerate(tasks):
        where = f"config.eval.tasks.{i}"
        if not task.name or "/" in task.name or task.name == "all":
            raise UserError(f"{where}.name: {task.name!r} does not do; give one without '/' that is not 'all'")
        if task.name in [other.name for other in tasks[:i]]:
            raise UserError(f"{where}.name: there are two tasks {task.name!r}; give each its own name")
        _check_source(task.data, f"{where}.data")
        if task.score == "rank" and not task.options:
            raise UserError(f"{where}.options is empty; score='rank' needs the texts to choose from, as 'yes ||| no'")
        if task.score == "generate" and not task.metrics:
            raise UserError(f"{where}.metrics is empty; name what score='generate' measures, as 'exact_match'")
        for name, kinds in _ONLY_OF.items():
            if task.score not in kinds and getattr(task, name) != getattr(Task(), name):
                raise UserError(f"{where}.{name} has no effect with score={task.score!r}; leave it out")
        if task.num_shots < 0 or task.length < 0 or task.max_new_tokens < 1 or task.samples < 1:
            raise UserError(f"{where}: num_shots and length must be at least 0, max_new_tokens and samples at least 1")
        if not all(task.stop):
            raise UserError(f"{where}.stop: an empty text would end every text where it begins; leave it out")
        if not 0 <= task.seed < 1 << 32:  # JAX draws from the lowest 32 bits alone
            raise UserError(f"{where}.seed: {task.seed} must be from 0 to {(1 << 32) - 1}")
        if bool(task.num_shots) != bool(task.shots.path):
            raise UserError(f"{where}: shots and num_shots are given together or not at all")
        if task.shots.path:
            _check_source(task.shots, f"{where}.shots")
        elif task.truncate == "shots":
            raise UserError(f"{where}.truncate='shots' needs shots; give some, or choose another")
        elif task.shots_by:
            raise UserError(f"{where}.shots_by has no effect without shots; leave it out")
        if task.preamble and task.preamble_file:
            raise UserError(f"{where}: preamble and preamble_file exclude each other; keep one")
        if task.temperature < 0 or not 0 < task.top_p <= 1:
            raise UserError(f"{where}: temperature must be at least 0, and top_p in (0, 1]")
        if not task.temperature and (task.samples > 1 or task.top_p < 1):
            raise UserError(f"{where}: samples and top_p need a temperature above 0: nothing is drawn without one")
        _check_answer(task.answer, f"{where}.answer")


_ONLY_OF = {
    "options": ("rank",), "normalize": ("rank",), "metrics": ("generate", "run"), "answer": ("generate",),
    **dict.fromkeys(("max_new_tokens", "stop", "samples", "temperature", "top_p", "seed"), ("generate", "run")),
}  # fmt: skip


def _check_answer(pattern: str, where: str) -> None:
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        raise UserError(f"{where}: {pattern!r} is no regular expression: {error}") from None
    if groups > 1:
        raise UserError(f"{where}: {pattern!r} has {groups} groups; keep the one that is the answer, others as (?:…)")


def _check_adapters(model: Model) -> None:
    """Refuses settings of adapters and frozen weights that nothing would read."""
    adapted = bool(model.lora.rank or model.lora.path)
    for name, default in dataclasses.asdict(Lora()).items():
        if name == "path" or getattr(model.lora, name) == default:
            continue
        if model.lora.path:
            raise UserError(f"config.model.lora.{name} has no effect with lora.path, whose folder says it")
        if not model.lora.rank:
            raise UserError(f"config.model.lora.{name} has no effect without adapters; set model.lora.rank")
    if model.quantize != "none" and not adapted:
        raise UserError(
            "config.model.quantize is for frozen weights, and without adapters all are trained; set model.lora.rank"
        )
    if adapted and not model.lora.path and not model.lora.targets:
        raise UserError("config.model.lora.targets is empty; name modules, or leave it out for all linear layers")
    if adapted and not model.lora.path and not model.lora.alpha:
        raise UserError("config.model.lora.alpha: 0 would multiply all that adapters add by nothing")


def _check_mixing(data: Data) -> None:
    """Refuses settings of the mixture that `data.mixing` does not read."""
    weighted = [i for i, source in enumerate(data.train) if source.weight != 1]
    if data.mixing != "weights" and weighted:
        where = f"config.data.train.{weighted[0]}.weight"
        raise UserError(f"{where} has no effect with data.mixing={data.mixing!r}; set that to 'weights'")
    if data.mixing == "weights" and not any(source.weight > 0 for source in data.train):
        raise UserError("config.data.mixing='weights' needs a source with a positive weight")
    if data.mixing_temperature <= 0:
        raise UserError(f"config.data.mixing_temperature: {data.mixing_temperature} must be positive")
    for name, default in (("mixing_cap", 0), ("mixing_temperature", 1)):
        if data.mixing != "size" and getattr(data, name) != default:
            raise UserError(f"config.data.{name} has no effect with data.mixing={data.mixing!r}; set that to 'size'")
