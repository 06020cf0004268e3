"""Checks of settings: values and combinations that cannot work raise a UserError that names the field."""

import dataclasses
import operator
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from jax_it.config.settings import Config, Data, Duration, Eval, Kind, Lora, Mesh, Model, Optimizer, Source, Task, Train
from jax_it.errors import UserError

INT32 = 2**31 - 1
LENGTH = 2**20  # tokens
_MOST_FEWSHOT = 100
EPOCHS = 10_000  # at most: all are planned before the first step
FLOAT32 = 3e38
TINY = 1.2e-38  # the smallest normal float32


class _Range(NamedTuple):
    """The numbers from `least` to `most`.

    `above` and `below` exclude the ends; `or_zero` allows 0 as well, where it means none.
    """

    least: float = 0
    most: float = INT32
    above: bool = False
    below: bool = False
    or_zero: bool = False

    def why_not(self, value: float) -> str:
        """Return what the value must be, if it is outside the range, or else ""."""
        low = value < self.least or (self.above and value == self.least)
        high = value > self.most or (self.below and value == self.most)
        if not (low or high) or (self.or_zero and value == 0):
            return f"must be 0 or at least {TINY}" if 0 < abs(value) < TINY else ""
        zero = "0 or " if self.or_zero else ""
        if self.most <= 1:
            return f"must be {zero}in {'[('[self.above]}{self.least:g}, {self.most:g}{'])'[self.below]}"
        if low:
            return f"must be {zero}{'more than' if self.above else 'at least'} {_number(self.least)}"
        return f"must be {'less than' if self.below else 'at most'} {_number(self.most)}"


_COUNT = _Range()
_ONE_OR_MORE = _Range(1)
_AMOUNT = _Range(0, FLOAT32)
_POSITIVE = _Range(0, FLOAT32, above=True)
_TOKENS = _Range(0, LENGTH)
_SHARE = _Range(0, 1)
_BELOW_ONE = _Range(0, 1, below=True)
_DECAY_RATE = _Range(0, 0.999999)  # of a running mean; anything nearer to 1 is 1 in float32
_DROPOUT = _Range(1e-4, 0.99, or_zero=True)
_SEED = _Range(-(2**31), 2**32 - 1)  # JAX's generator takes 32 bits, and others modulo that

# The range of every numeric setting. `check` reads this table, and a test checks that it is complete.
RANGES: dict[type, dict[str, _Range]] = {
    Lora: {"rank": _Range(0, 2**16), "alpha": _POSITIVE, "dropout": _DROPOUT},
    Model: {"tokenizer_size": _Range(0, 2**22), "dropout": _DROPOUT},
    Source: {"weight": _AMOUNT, "mixing_cap": _COUNT, "limit": _COUNT, "max_per_file": _COUNT},
    Data: {
        **dict.fromkeys(("max_source_length", "max_target_length", "max_seq_length"), _Range(2, LENGTH)),
        **dict.fromkeys(("packed_source_length", "packed_target_length"), _TOKENS),
        **dict.fromkeys(("max_dropped", "max_truncated", "max_unknown"), _SHARE),
        **dict.fromkeys(("validation_size", "mixing_cap"), _COUNT), "mixing_temperature": _POSITIVE,
        "num_workers": _Range(0, 1024),
        "seed": _Range(-(2**63), 2**63 - 1),
    },
    Optimizer: {
        "learning_rate": _AMOUNT, "final_lr_ratio": _SHARE, "weight_decay": _AMOUNT, "beta1": _DECAY_RATE,
        "beta2": _DECAY_RATE, "epsilon": _POSITIVE,
    },
    Train: {
        "batch_size": _Range(1, 2**20), "gradient_accumulation_steps": _Range(1, 2**16), "label_smoothing": _BELOW_ONE,
        **dict.fromkeys(("z_loss", "router_aux_loss_coef", "max_grad_norm", "max_spike"), _AMOUNT),
        "loss_chunk": _ONE_OR_MORE, "squared_error_scale": _POSITIVE, "squared_error_target": _POSITIVE,
        "max_skipped": _COUNT, "step_timeout": _Range(1, 1e8, or_zero=True), "profile_steps": _ONE_OR_MORE,
        "max_to_keep": _ONE_OR_MORE, "keep_best": _COUNT, "keep_unscored": _COUNT, "seed": _SEED,
    },
    Mesh: {
        **dict.fromkeys(("data", "fsdp", "expert", "context", "tensor"), _Range(-1, 2**20)), "slices": _Range(0, 2**20),
    },
    Task: {
        "num_fewshot": _COUNT, "max_prompt_length": _TOKENS, "max_new_tokens": _Range(1, LENGTH),
        "samples": _Range(1, 2**16),
        "temperature": _Range(1e-4, 1000, or_zero=True), "top_p": _Range(0, 1, above=True), "seed": _SEED,
    },
    Eval: {
        "patience": _COUNT, "batch_size": _Range(1, 2**20), "max_new_tokens": _TOKENS, "min_new_tokens": _TOKENS,
        "num_beams": _Range(1, 1024), "length_penalty": _Range(-10, 10), "repetition_penalty": _Range(1e-3, 1e3),
        "prompt_lookup_num_tokens": _Range(0, 1024), "limit": _COUNT,
    },
}  # fmt: skip


class _Read(NamedTuple):
    """Settings that have an effect only with some values of other settings."""

    section: str
    names: str
    by: Callable[[Config], bool]  # whether they have an effect
    otherwise: str  # the end of the message: why not, and what to do; {c} is the config

    def unread(self, config: Config) -> Iterator[str]:
        """Yield the names of those that are set but have no effect."""
        if not self.by(config):
            section = operator.attrgetter(self.section)(config)
            default = type(section)()
            yield from (
                f"{self.section}.{name}"
                for name in self.names.split()
                if getattr(section, name) != getattr(default, name)
            )


_GENERATED = (
    "max_new_tokens min_new_tokens num_beams length_penalty early_stopping repetition_penalty forced_bos_token "
    "prompt_lookup_num_tokens"
)
_FRESH = "alpha targets rank_stabilized dora dropout"

# A setting that has no effect is refused, so that nobody believes it was used.
_READ = (
    _Read(
        "model.lora", f"rank {_FRESH}", lambda c: not c.model.lora.path,
        "because lora.path is set and its folder defines it",
    ),
    _Read(
        "model.lora", _FRESH, lambda c: bool(c.model.lora.rank or c.model.lora.path),
        "without adapters; set model.lora.rank",
    ),
    _Read(
        "data", "packed_source_length packed_target_length", lambda c: c.data.packing,
        "with data.packing=False; leave it out, or set that to True",
    ),
    _Read(
        "data", "mixing_cap mixing_temperature", lambda c: c.data.mixing == "proportional",
        "with data.mixing={c.data.mixing!r}; set that to 'proportional'",
    ),
    _Read(
        "train", "label_smoothing z_loss", lambda c: c.train.loss == "cross_entropy",
        "with train.loss={c.train.loss!r}; leave it out, or set that to 'cross_entropy'",
    ),
    _Read(
        "train", "squared_error_scale squared_error_target", lambda c: c.train.loss == "squared_error",
        "with train.loss={c.train.loss!r}; leave it out, or set that to 'squared_error'",
    ),
    _Read(
        "train", "profile_steps", lambda c: bool(c.train.profile.value),
        "without a profile; set train.profile to the step at which it begins",
    ),
    _Read(
        "train.optimizer", "beta1", lambda c: c.train.optimizer.name != "adafactor",
        "with optimizer.name={c.train.optimizer.name!r}; leave it out",
    ),
    _Read(
        "train.optimizer", "beta2", lambda c: c.train.optimizer.name in ("adamw", "lion"),
        "with optimizer.name={c.train.optimizer.name!r}; leave it out, or choose 'adamw' or 'lion'",
    ),
    _Read(
        "train.optimizer", "epsilon", lambda c: c.train.optimizer.name == "adamw",
        "with optimizer.name={c.train.optimizer.name!r}; leave it out, or choose 'adamw'",
    ),
    _Read(
        "train.optimizer", "decay", lambda c: c.train.optimizer.schedule == "wsd",
        "with optimizer.schedule={c.train.optimizer.schedule!r}; leave it out, or set that to 'wsd'",
    ),
    _Read(
        "train.optimizer", "final_lr_ratio", lambda c: c.train.optimizer.schedule in ("linear", "cosine", "wsd"),
        "with optimizer.schedule={c.train.optimizer.schedule!r}; leave it out, or choose 'linear', 'cosine' or 'wsd'",
    ),
    _Read(
        "eval", "best patience", lambda c: bool(c.data.eval or c.data.validation_size) or _is_of_task(c),
        "without examples to evaluate on; set data.eval or data.validation_size",
    ),
    _Read(
        "eval", _GENERATED, lambda c: c.eval.generate,
        "with eval.generate=False; leave it out, or set that to True",
    ),
    _Read(
        "eval", "length_penalty early_stopping", lambda c: c.eval.num_beams > 1,
        "without beams; set eval.num_beams",
    ),
)  # fmt: skip

# The same, once the kind of model is known.
_READ_BY_KIND: dict[Kind, tuple[_Read, ...]] = {
    "causal": (
        _Read(
            "data", "max_source_length packed_source_length packed_target_length", lambda c: False,
            "on a causal model, whose rows hold data.max_seq_length tokens; leave it out",
        ),
        _Read(
            "data", "max_target_length", lambda c: False,
            "on a causal model; set data.max_seq_length, or eval.max_new_tokens for generated texts",
        ),
    ),
    "seq2seq": (
        _Read(
            "data", "max_seq_length", lambda c: False,
            "on an encoder-decoder; set data.max_source_length and data.max_target_length",
        ),
        _Read(
            "data", "train_on", lambda c: False,
            "on an encoder-decoder, which is trained on the last answer; leave it out",
        ),
    ),
}  # fmt: skip


def check_read(config: Config, kind: Kind | None = None, within: str = "") -> None:
    """Refuse settings that have no effect; with a model's `kind`, those that affect only the other kind.

    `within` limits the check to names that begin with it, such as "eval.".
    """
    for read in _READ if kind is None else _READ_BY_KIND[kind]:
        for name in read.unread(config):
            if name.startswith(within):
                raise UserError(f"config.{name} has no effect {read.otherwise.format(c=config)}")


def without_unread(config: Config, kind: Kind | None = None) -> Config:
    """Return the config with settings that have no effect reset to their defaults, for runs saved with such."""
    for read in (*_READ, *(_READ_BY_KIND[kind] if kind else ())):
        for name in read.unread(config):
            config = _at_default(config, name.split("."))
    return config


def _at_default(section: Any, names: list[str]) -> Any:
    first, *rest = names
    value = _at_default(getattr(section, first), rest) if rest else getattr(type(section)(), first)
    return dataclasses.replace(section, **{first: value})


def sections(value: Any, where: str = "config") -> Iterator[tuple[str, Any]]:
    """Yield the name and value of every dataclass in a config except durations."""
    if isinstance(value, tuple):
        for i, item in enumerate(value):
            yield from sections(item, f"{where}.{i}")
    elif dataclasses.is_dataclass(value) and not isinstance(value, Duration):
        yield where, value
        for field in dataclasses.fields(value):
            yield from sections(getattr(value, field.name), f"{where}.{field.name}")


def _check_numbers(config: Config) -> None:
    for where, section in sections(config):
        for name, allowed in RANGES.get(type(section), {}).items():
            value = getattr(section, name)
            if value is not None and (why := allowed.why_not(value)):
                raise UserError(f"{where}.{name}: {_number(value)} {why}")


def _number(value: float) -> str:
    """Format a number for a message, briefly."""
    if isinstance(value, int) and abs(value) >= 10**20:
        return f"a number of {len(str(abs(value))) if abs(value) < 10**4000 else 'thousands of'} digits"
    return f"{value:g}" if isinstance(value, float) and value.is_integer() and abs(value) >= 1e6 else str(value)


def check(config: Config, training: bool, saved: bool = False) -> None:
    """Refuse values and combinations that cannot work, before anything is read or computed.

    A `saved` run's config may have values that this version refuses only for new runs.
    """
    _check_numbers(config)
    if not saved:
        _check_sense(config, training)
    model, data, train, mesh = config.model, config.data, config.train, config.mesh
    if not model.path and not model.architecture:
        raise UserError(
            "config.model.path is empty; name a Transformers folder or hub model, or give model.architecture"
        )
    if not model.path and model.pretrained:
        raise UserError("config.model.pretrained needs config.model.path; set it to False for random weights")
    if not model.path and not model.tokenizer:
        raise UserError("config.model.tokenizer is empty and there is no config.model.path to take it from")
    if model.tokenizer == "train" and not model.tokenizer_size:
        raise UserError(
            "config.model.tokenizer='train' needs config.model.tokenizer_size, the number of its tokens, such as 8000"
        )
    if model.tokenizer_size and model.tokenizer != "train":
        raise UserError(
            "config.model.tokenizer_size is of tokenizers that are trained; leave it out, or set "
            "config.model.tokenizer='train'"
        )
    _check_adapters(model)
    if model.prefix_lm and data.train_on == "all":
        raise UserError(
            "config.model.prefix_lm needs data.train_on='last' or 'per_turn': earlier answers are part of "
            "the prompt, which sees all of itself"
        )
    if training and not data.train:
        raise UserError("config.data.train is empty; name at least one data set")
    named = [("train", i, s) for i, s in enumerate(data.train)] + [("eval", i, s) for i, s in enumerate(data.eval)]
    for part, i, source in named:
        _check_source(source, f"config.data.{part}.{i}")
    with_fewshot = [i for i, source in enumerate(data.train) if any(source.num_fewshot)]
    if data.validation_size and with_fewshot:
        raise UserError(
            f"config.data.validation_size: what it holds out would be among the few-shot examples of data.train."
            f"{with_fewshot[0]}; name data.eval instead"
        )
    if data.validation_size and data.eval:
        raise UserError("config.data.validation_size and config.data.eval exclude each other; keep one")
    _check_mixing(data)
    for name, length, packed in (
        ("source", data.max_source_length, data.packed_source_length),
        ("target", data.max_target_length, data.packed_target_length),
    ):
        if packed and packed < length:
            raise UserError(f"config.data.packed_{name}_length: {packed} is less than data.max_{name}_length, {length}")
    if bool(data.packed_source_length) != bool(data.packed_target_length):
        raise UserError("config.data.packed_source_length and packed_target_length are given together or not at all")
    if data.packed_source_length % data.max_source_length:
        raise UserError(
            f"config.data.packed_source_length: {data.packed_source_length} must be a multiple of "
            f"data.max_source_length, {data.max_source_length}: a row is made of blocks of that length"
        )
    if train.duration.value <= 0 or train.duration.unit == "%":
        raise UserError("config.train.duration must be positive and in steps, epochs, examples or tokens")
    _check_tasks(config.eval.tasks)
    best = config.eval.best
    if best != "loss" and not _is_of_task(config) and not (best in config.eval.metrics and config.eval.generate):
        raise UserError(f"config.eval.best: {best!r} is not measured; add it to eval.metrics, with eval.generate on")
    sizes = {name: size for name, size in dataclasses.asdict(mesh).items() if name not in ("slices", "across_slices")}
    if sum(size == -1 for size in sizes.values()) > 1 or any(size == 0 for size in sizes.values()):
        raise UserError(f"config.mesh: sizes must be positive, and at most one of them -1; got {sizes}")


def _is_of_task(config: Config) -> bool:
    """Return whether checkpoints are ranked by a task's score (eval.best)."""
    best, tasks = config.eval.best, config.eval.tasks
    if any(task.score == "lm_eval" and best.startswith(f"{task.name}/") for task in tasks):
        return True  # only lm_eval knows which metrics the task has
    return best in [f"{task.name}/{metric}" for task in tasks for metric in measured(task)]


def _check_sense(config: Config, training: bool) -> None:
    """Refuse numbers that contradict each other, even if training could run with them."""
    train, scored = config.train, config.eval
    if training and train.gradient_accumulation_steps > (most := train.batch_size):
        raise UserError(
            f"config.train.gradient_accumulation_steps: {train.gradient_accumulation_steps} is more than "
            f"train.batch_size, {most}"
        )
    if training and train.duration.unit == "epochs" and train.duration.value > EPOCHS:
        raise UserError(
            f"config.train.duration: {train.duration}; at most {EPOCHS} epochs are allowed; use steps instead"
        )
    if scored.generate and scored.min_new_tokens > (most := scored.max_new_tokens or config.data.max_target_length):
        name = "eval.max_new_tokens" if scored.max_new_tokens else "data.max_target_length"
        raise UserError(f"config.eval.min_new_tokens: {scored.min_new_tokens} is more than {name}, {most}")
    for i, task in enumerate(scored.tasks):
        if task.seed and not task.temperature:
            raise UserError(f"config.eval.tasks.{i}.seed has no effect without a temperature above 0; leave it out")


def _check_source(source: Source, where: str) -> None:
    if not source.path:
        raise UserError(f"{where}.path is empty; give a file, a glob or a data set's name")
    if not source.template:
        raise UserError(f"{where}.template is empty; name a template or leave it out")
    if not source.num_fewshot or len({*source.num_fewshot}) < len(source.num_fewshot):
        raise UserError(f"{where}.num_fewshot: name one number of examples or more, each once, such as (0, 5)")
    if not all(0 <= number <= _MOST_FEWSHOT for number in source.num_fewshot):
        raise UserError(f"{where}.num_fewshot: numbers must be from 0 to {_MOST_FEWSHOT}")
    if any(source.num_fewshot) and not where.startswith("config.data.train."):
        raise UserError(f"{where}.num_fewshot is for training; in a task of config.eval.tasks, set fewshot instead")


def measured(task: Task) -> tuple[str, ...]:
    """Return the names of a task's metrics over all examples, except those of a custom metric that returns a dict."""
    names = {
        "generate": task.metrics, "multiple_choice": ("accuracy",), "perplexity": ("loss", "perplexity"),
        "code_execution": task.metrics or ("pass@1",), "lm_eval": (),
    }[task.score]  # fmt: skip
    return (*names, *(f"{name}_macro" for name in names)) if task.group_by else names


def _check_tasks(tasks: tuple[Task, ...]) -> None:
    """Refuse tasks that cannot be scored, and task settings that have no effect."""
    for i, task in enumerate(tasks):
        where = f"config.eval.tasks.{i}"
        if not task.name or "/" in task.name or task.name == "all":
            raise UserError(f"{where}.name: {task.name!r} is not allowed; choose a name without '/' other than 'all'")
        if task.name in [other.name for other in tasks[:i]]:
            raise UserError(f"{where}.name: there are two tasks {task.name!r}; give each its own name")
        if task.score == "lm_eval":
            _check_lm_eval(task, where)
            continue
        _check_source(task.data, f"{where}.data")
        named = all(template.startswith("promptsource:") for template in task.data.template)  # with its own choices
        if task.score == "multiple_choice" and not task.options and not named:
            raise UserError(
                f"{where}.options is empty; score='multiple_choice' needs the texts to choose from, for example "
                "'yes ||| no'"
            )
        if task.score == "generate" and not task.metrics:
            raise UserError(f"{where}.metrics is empty; name what score='generate' measures, for example 'exact_match'")
        for name, kinds in _ONLY_OF.items():
            if task.score not in kinds and getattr(task, name) != getattr(Task(), name):
                raise UserError(f"{where}.{name} has no effect with score={task.score!r}; leave it out")
        if not all(task.stop):
            raise UserError(f"{where}.stop: an empty text would end every text where it begins; leave it out")
        if bool(task.num_fewshot) != bool(task.fewshot.path):
            raise UserError(f"{where}: fewshot and num_fewshot are given together or not at all")
        if task.fewshot.path:
            _check_source(task.fewshot, f"{where}.fewshot")
        elif task.truncate == "fewshot":
            raise UserError(
                f"{where}.truncate='fewshot' needs few-shot examples; set fewshot and num_fewshot, or choose another"
            )
        elif task.fewshot_by:
            raise UserError(f"{where}.fewshot_by has no effect without few-shot examples; leave it out")
        if not task.temperature and (task.samples > 1 or task.top_p < 1):
            raise UserError(f"{where}: samples and top_p need a temperature above 0: nothing is drawn without one")
        _check_answer(task.answer, f"{where}.answer")


_OF_LM_EVAL = ("name", "score", "data", "num_fewshot", "chat", "max_prompt_length", "published")
_GENERATING = ("generate", "code_execution")
_ONLY_OF = {
    "options": ("multiple_choice",), "normalize": ("multiple_choice",), "metrics": _GENERATING, "answer": ("generate",),
    **dict.fromkeys(("max_new_tokens", "stop", "samples", "temperature", "top_p", "seed"), _GENERATING),
}  # fmt: skip


def _check_lm_eval(task: Task, where: str) -> None:
    for field in dataclasses.fields(Task):
        if field.name not in _OF_LM_EVAL and getattr(task, field.name) != getattr(Task(), field.name):
            raise UserError(f"{where}.{field.name} has no effect with score='lm_eval'; leave it out")
    if task.data != Source(path=task.data.path):
        raise UserError(
            f"{where}.data: score='lm_eval' reads only its path, a folder of task files; leave the rest out"
        )


def _check_answer(pattern: str, where: str) -> None:
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        raise UserError(f"{where}: {pattern!r} is not a regular expression: {error}") from None
    if groups > 1:
        raise UserError(f"{where}: {pattern!r} has {groups} groups; keep the one that is the answer, others as (?:…)")


def _check_adapters(model: Model) -> None:
    """Refuse adapters without targets, and frozen weights without adapters."""
    adapted = bool(model.lora.rank or model.lora.path)
    if model.quantize != "none" and not adapted:
        raise UserError(
            "config.model.quantize is for frozen weights, and without adapters all are trained; set model.lora.rank"
        )
    if adapted and not model.lora.path and not model.lora.targets:
        raise UserError("config.model.lora.targets is empty; name modules, or leave it out for all linear layers")
    if model.lora.path and model.new_tokens:
        raise UserError(
            "config.model.new_tokens: adapters of model.lora.path are trained on with the tokens that they have; merge "
            "them into their base model, and name that as model.path"
        )


def _check_mixing(data: Data) -> None:
    """Refuse weights and caps that have no effect, and a mixture in which all weights are 0."""
    weighted = [i for i, source in enumerate(data.train) if source.weight != 1]
    if data.mixing != "weights" and weighted:
        where = f"config.data.train.{weighted[0]}.weight"
        raise UserError(f"{where} has no effect with data.mixing={data.mixing!r}; set that to 'weights'")
    capped = [i for i, source in enumerate(data.train) if source.mixing_cap]
    if data.mixing != "proportional" and capped:
        where = f"config.data.train.{capped[0]}.mixing_cap"
        raise UserError(f"{where} has no effect with data.mixing={data.mixing!r}; set that to 'proportional'")
    if data.mixing == "weights" and not any(source.weight > 0 for source in data.train):
        raise UserError("config.data.mixing='weights' needs a source with a positive weight")
