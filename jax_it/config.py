"""Every setting of jax_it with its type, default and unit; nothing else knows a default.

A config file's `get_config(arg="")` takes `default()`, an `ml_collections.ConfigDict`, and changes
what it needs. `resolve` turns it into the frozen dataclasses below, which the code works with: an
unknown key, a wrong type or an impossible combination is a `UserError` that names the field.
"""

import dataclasses
import importlib.util
import math
import operator
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import ml_collections

from jax_it import typed
from jax_it.errors import UserError

Unit = Literal["steps", "epochs", "examples", "tokens", "%"]


@dataclass(frozen=True)
class Duration:
    """A stretch of training, written as "200 steps", "3 epochs", "1e6 examples", "1e9 tokens" or "5%".

    Tokens are the source and target tokens of the examples, without padding; per cent are of the
    whole run. A bare number means steps; an empty text means never.
    """

    value: float
    unit: Unit

    @classmethod
    def parse(cls, text: str, where: str) -> "Duration":
        if not text:
            return cls(0, "steps")
        match = re.fullmatch(r"\s*([0-9.]+(?:e[+-]?\d+)?)\s*(steps?|epochs?|examples?|tokens?|%)?\s*", text)
        try:
            value = float(match[1]) if match else math.nan
        except ValueError:
            value = math.nan
        if match is None or not math.isfinite(value):
            raise UserError(
                f"{where}: {text!r} is not a duration; write for example '200 steps', '3 epochs', "
                "'1e6 examples', '1e9 tokens' or '5%'"
            )
        unit = match[2] or "steps"
        if not value:
            return cls(0, "steps")
        return cls(value, typing.cast(Unit, unit if unit == "%" else unit.rstrip("s") + "s"))

    def __str__(self) -> str:
        number = repr(self.value).removesuffix(".0")  # every digit: it is read back when a run is resumed
        return f"{number}{'' if self.unit == '%' else ' '}{self.unit}" if self.value else ""

    def steps(self, rates: "Rates", total_steps: int = 0) -> int:
        """The duration in optimizer steps, rounded up; 0 means never. `total_steps` is needed for per cent alone."""
        per_unit = {
            "steps": 1.0,
            "epochs": rates.epoch_steps,
            "examples": 1 / rates.step_examples,
            "tokens": 1 / rates.step_tokens,
            "%": total_steps / 100,
        }
        return math.ceil(self.value * per_unit[self.unit] - 1e-9)


@dataclass(frozen=True)
class Rates:
    """What turns durations into steps: means over the data set."""

    epoch_steps: float
    step_examples: float
    step_tokens: float


@dataclass(frozen=True)
class Lora:
    """Adapters beside the weights, which alone are trained (Hu et al. 2021)."""

    rank: int = 0  # 0: no adapters; all weights are trained
    alpha: float = 16.0  # an adapter's output is multiplied by alpha / rank
    targets: tuple[str, ...] = ("all-linear",)  # Transformers' names ("q_proj"), or regular expressions of them
    rank_stabilized: bool = False  # rsLoRA (Kalajdzievski 2023): multiplied by alpha / rank ** 0.5
    dora: bool = False  # DoRA (Liu et al. 2024): the magnitude of each output is trained too
    dropout: float = 0.0  # a rate, of an adapter's input
    path: str = ""  # a PEFT folder to start from; it sets all of the above


@dataclass(frozen=True)
class Model:
    path: str = ""  # a folder in Transformers format or a hub name
    pretrained: bool = True  # False: random weights in the architecture of `path`
    architecture: Mapping[str, Any] = field(default_factory=dict)  # config.json values, over those of `path`
    tokenizer: str = ""  # a folder, a hub name, a SentencePiece file, "bytes" or "train"; "": that of `path`
    tokenizer_size: int = 0  # pieces, for tokenizer="train"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the computation; auto: float32 on CPU
    param_dtype: Literal["float32", "bfloat16"] = "float32"  # of the master weights and optimizer state
    attention: Literal["auto", "plain"] = "auto"  # auto: on TPUs one kernel, where it can compute the model's rows
    remat: Literal["none", "layer"] = "none"  # layer: recompute each layer in the backward pass
    dropout: float | None = None  # a rate; None: the one in config.json
    chat_template: str = ""  # Jinja file; "": the checkpoint's own; "default": one for base models; "none": plain text
    prefix_lm: bool = False  # a causal model's attention looks both ways within the prompt
    lora: Lora = field(default_factory=Lora)
    quantize: Literal["none", "int8", "nf4"] = "none"  # of the weights beneath adapters (QLoRA, Dettmers et al. 2023)


@dataclass(frozen=True)
class Source:
    """One data set: where its records are and how each becomes a prompt and a completion."""

    path: str = ""  # a file, glob or folder; a hub name; "builtin:instructions"
    name: str = ""  # in reports; "": from `path`
    format: Literal["auto", "json", "csv", "parquet", "datasets", "builtin"] = "auto"
    subset: str = ""  # the hub data set's configuration
    split: str = "train"  # of hub and built-in data sets
    template: tuple[str, ...] = ("auto",)  # names of data/templates.py, or Jinja text "prompt ||| completion"
    weight: float = 1.0  # for mixing="weights"
    limit: int = 0  # examples, from the start; 0: all
    records: str = ""  # of JSON files that hold one object: its field with the records, which get its others too
    listed: str = ""  # a text file with a line for each file of the folder that is read, its ending left out
    limit_each: int = 0  # examples of each file, from its start; 0: all


@dataclass(frozen=True)
class Data:
    train: tuple[Source, ...] = ()
    eval: tuple[Source, ...] = ()
    holdout: int = 0  # examples kept out of each training source, and evaluated, where `eval` is empty
    source_length: int = 512  # tokens, the end mark included; of encoder-decoders
    target_length: int = 128
    sequence_length: int = 2048  # tokens of a causal model's longest example, prompt included, and of its packed rows
    learn: Literal["all", "last"] = "all"  # which of a conversation's assistant turns a causal model learns
    truncate: Literal["end", "start", "drop", "refuse"] = "end"  # the side that is cut of a prompt, or conversation
    packing: bool = True
    packed_source_length: int = 0  # tokens in a packed row; 0: chosen by the step's cost on this data
    packed_target_length: int = 0
    mixing: Literal["all", "weights", "size"] = "all"  # all: each example once an epoch
    mixing_cap: int = 0  # for "size": a source counts for at most so many examples; 0: no cap
    mixing_temperature: float = 1.0  # for "size": rates are proportional to size ** (1 / temperature)
    seed: int = 0  # of the order, the mixture and the choice of templates
    cache_dir: str = "~/.cache/jax_it"
    max_dropped: float = 0.1  # shares of a source's examples (of tokens for max_unknown), refused above
    max_truncated: float = 0.5
    max_unknown: float = 0.05


@dataclass(frozen=True)
class Optimizer:
    name: Literal["adamw", "adafactor", "lion", "sgd"] = "adamw"
    learning_rate: float = 3e-4  # the peak
    schedule: Literal["constant", "linear", "cosine", "rsqrt", "wsd"] = "linear"
    warmup: Duration = Duration(5, "%")  # linear, from 0
    decay: Duration = Duration(10, "%")  # for "wsd": the final linear decay
    final_rate: float = 0.0  # a share of the peak, where linear, cosine and wsd end
    weight_decay: float = 0.0
    beta1: float = 0.9  # also the momentum of sgd
    beta2: float = 0.999
    epsilon: float = 1e-8


@dataclass(frozen=True)
class Train:
    duration: Duration = Duration(3, "epochs")
    batch_size: int = 128  # examples a step, over all devices; the mean where rows are packed
    micro_batches: int = 1  # parts that a step computes one after another
    loss: Literal["cross_entropy", "squared_error"] = "cross_entropy"
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    balance_loss: float = 0.0  # the weight of the router's balancing loss, of mixtures of experts
    loss_chunk: int = 1024  # target positions, of all rows on a device, whose logits exist at a time
    squared_error_scale: float = 15.0  # k and M of Hui & Belkin 2020, their values for many classes
    squared_error_target: float = 30.0
    optimizer: Optimizer = field(default_factory=Optimizer)
    clip: float = 1.0  # the gradient's global norm; 0: no clipping
    # A gradient is skipped whose norm is so many times the mean and over `clip`; 0: none is. Batches of sound data
    # differ by a few times; those of a broken record, or of a bit that flipped, by orders of magnitude.
    max_spike: float = 30.0
    max_skipped: int = 20  # steps in a row that are skipped, for a spike or what is not finite, before the run ends
    hang_after: float = 1800.0  # seconds, of a compile or save ten times that, after which a step that hangs is given
    # up: the run says where it hangs and ends with exit code 75, to be started again; 0: never
    log_every: Duration = Duration(10, "steps")
    wandb: str = ""  # the project of Weights & Biases that the log goes to as well; "": none
    profile: Duration = Duration(0, "steps")  # after which a trace of the next steps is recorded; "": never
    profile_steps: int = 5
    checkpoint_every: Duration = Duration(500, "steps")
    keep: int = 2  # the newest checkpoints
    keep_best: int = 1  # and so many with the best score (eval.best)
    keep_unscored: int = 2  # and the first so many that a running `jax-it eval --follow` has not scored yet
    seed: int = 0  # of random weights and dropout


@dataclass(frozen=True)
class Mesh:
    """Devices along each axis, over all slices; one axis may be -1, what is left."""

    data: int = -1  # whole copies of the model, each with its rows
    fsdp: int = 1  # rows, and the weights split, and gathered where they are used
    expert: int = 1  # rows, and the experts of a mixture split; weights of other kinds as over fsdp
    context: int = 1  # the positions of a row
    tensor: int = 1  # heads, feed-forward and vocabulary
    slices: int = 0  # pods whose devices reach each other over the data-centre network; 0: as many as there are
    across_slices: Literal["data", "fsdp"] = "data"  # the axis that goes from slice to slice


@dataclass(frozen=True)
class Task:
    """What a model is scored on beside data.eval's examples: a benchmark, or a test of your own.

    A prompt is the preamble, the shots with their answers, and the record's prompt, with the separator between them.
    """

    name: str = ""
    data: Source = field(default_factory=Source)  # of several templates, the first whose prompt is not too long
    # generate: metrics of generated text; rank: is the likeliest option the reference; run: do programs pass their test
    score: Literal["generate", "rank", "run"] = "generate"
    options: str = ""  # of rank: Jinja text "A ||| B", or "{{ choices | join('|||') }}" of a field that is a list
    normalize: Literal["none", "tokens", "characters"] = "none"  # what an option's log-likelihood is divided by
    shots: Source = field(default_factory=Source)  # where examples before the question come from
    num_shots: int = 0
    shots_by: str = ""  # a field in which shots agree with the record, as "subject"
    preamble: str = ""  # Jinja text
    preamble_file: str = ""  # or the text of this file, whose path is Jinja: "prompts/{{task}}.txt"
    separator: str = "\n\n"
    delimiter: str = " "  # between a prompt and its answer, in shots and where a causal model goes on from plain text
    chat: bool = True  # by the model's chat template, if it has one: all of the prompt is one turn of the user
    length: int = 0  # tokens of the longest prompt (and answer, of causal models); 0: that of `data`
    truncate: Literal["refuse", "shots", "end", "start"] = "refuse"  # longer ones lose shots, or tokens at an end
    metrics: tuple[str, ...] = ()  # of generate: as eval.metrics
    answer: str = ""  # of generate: a regular expression; its last match, or its group, is scored; "": the whole text
    max_new_tokens: int = 128
    stop: tuple[str, ...] = ()  # a text ends before the first of these
    samples: int = 1  # texts of each prompt
    temperature: float = 0.0  # 0: the likeliest tokens
    top_p: float = 1.0
    seed: int = 0
    group_by: str = ""  # a field; there are scores for each value of it, and their mean
    published: str = ""  # the score to compare with: for people


@dataclass(frozen=True)
class Eval:
    # of jax_it.metrics.METRICS, and your own as "FILE.py:FUNCTION", called with (predictions, references)
    metrics: tuple[str, ...] = ("rouge1", "rouge2", "rougeL", "rougeLsum", "bleu", "chrf", "exact_match", "token_f1")
    every: Duration = Duration(0, "steps")  # within training; the end of the run too where it is not 0
    at_start: bool = False  # also before the first step
    best: str = "loss"  # the metric that ranks checkpoints, of data.eval; or "TASK/METRIC" of one of `tasks`
    patience: int = 0  # evaluations without a better `best` after which training ends; 0: it goes on to its end
    batch_size: int = 64  # examples
    generate: bool = True  # text for data.eval's examples; False: the loss alone
    max_new_tokens: int = 0  # 0: data.target_length
    min_new_tokens: int = 0
    num_beams: int = 1  # 1: greedy
    length_penalty: float = 1.0  # of beams: above 0 favours longer texts
    early_stopping: bool = False  # of beams: an example is done once `num_beams` texts have ended
    repetition_penalty: float = 1.0
    first_token: str = ""  # a piece of the tokenizer's that every text begins with, such as a language's mark
    limit: int = 0  # examples of each source; 0: all
    run_model_code: bool = False  # True: tasks may run the programs that the model writes
    tasks: tuple[Task, ...] = ()


@dataclass(frozen=True)
class Config:
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    train: Train = field(default_factory=Train)
    mesh: Mesh = field(default_factory=Mesh)
    eval: Eval = field(default_factory=Eval)


def default() -> ml_collections.ConfigDict:
    """All settings at their defaults, to be changed in a config file."""
    # Types are checked by `resolve`, which reads a duration of 100 as "100 steps" and names the field at fault.
    return ml_collections.ConfigDict(to_dict(Config()), type_safe=False)


def to_dict(value: Any) -> Any:
    """A config, or a `ConfigDict`, as plain dicts, lists, texts and numbers: what JSON holds."""
    if isinstance(value, Duration):
        return str(value)
    if dataclasses.is_dataclass(value):
        return {f.name: to_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, ml_collections.ConfigDict):
        value = value.to_dict()  # which leaves those in lists as they are
    if isinstance(value, Mapping):
        return {key: to_dict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_dict(item) for item in value]
    return value


def load(path: str, overrides: Mapping[str, str] | None = None) -> Config:
    """The config of a file, "FILE" or "FILE:ARG", with dotted overrides such as {"train.seed": "1"}."""
    return resolve(override(read(path), overrides or {}))


def override(tree: dict[str, Any], changes: Mapping[str, str]) -> dict[str, Any]:
    """The tree, with its entries at dotted names changed."""
    for name, text in changes.items():
        typed.override(tree, name, text, raw=("model", "architecture"))
    return tree


def read(path: str) -> dict[str, Any]:
    """The settings of a file, "FILE" or "FILE:ARG", as plain values that are not checked yet."""
    file, _, arg = path.partition(":")
    if not Path(file).is_file():
        raise UserError(f"config file {file} does not exist")
    spec = importlib.util.spec_from_file_location("jax_it_config_file", file)
    if spec is None or spec.loader is None:
        raise UserError(f"config file {file} is not Python; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"config file {file} does not run: {type(error).__name__}: {_one_line(error)}") from error
    if not hasattr(module, "get_config"):
        raise UserError(f"config file {file} has no get_config(arg='')")
    try:
        config = module.get_config(arg)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{file}: get_config({arg!r}) failed: {type(error).__name__}: {_one_line(error)}") from error
    tree = to_dict(config)
    if not isinstance(tree, dict):
        raise UserError(f"{file}: get_config({arg!r}) returned {config!r}, not a config; end it with 'return config'")
    return tree


def _one_line(error: Exception) -> str:
    # ml_collections wraps a KeyError, whose own text is in quotes, and suggests a name on a second line.
    while len(error.args) == 1 and isinstance(error.args[0], Exception):
        error = error.args[0]
    text = error.args[0] if isinstance(error, KeyError) and error.args else error
    return " ".join(str(text).split())


def resolve(tree: Mapping[str, Any], training: bool = True) -> Config:
    """Frozen, type-checked settings from nested dicts; without `training` no training data is asked for.

    Raises UserError naming the field.
    """
    config = typed.build(Config, tree, "config")
    _check(config, training)
    return config


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


def _check(config: Config, training: bool) -> None:
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
    names = {"generate": task.metrics, "rank": ("accuracy",), "run": task.metrics or ("pass@1",)}[task.score]
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
