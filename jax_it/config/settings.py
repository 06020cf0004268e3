"""Every setting of jax_it with its type, default and unit; no default is defined anywhere else.

The settings reference is generated from the comments beside and above the fields. `RENAMED` maps a setting's former
name to its current one, for the message that refuses the former.
"""

import math
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from jax_it.errors import UserError, shown
from jax_it.typed import Name

Kind = Literal["causal", "seq2seq"]  # the two kinds of model
CAUSAL_NEW_TOKENS = 128
Unit = Literal["steps", "epochs", "examples", "tokens", "%"]
MOST = 1e18  # the largest value of a duration, in any unit


@dataclass(frozen=True)
class Duration:
    """A stretch of training, written as "200 steps", "3 epochs", "1e6 examples", "1e9 tokens" or "5%".

    Tokens are the examples' source and target tokens, without padding; "%" is of the whole run. A bare number means
    steps; an empty text means never.
    """

    value: float
    unit: Unit

    @classmethod
    def parse(cls, text: str, where: str) -> "Duration":
        """Read a duration; `where` is the setting's name. Raises UserError."""
        if not text:
            return cls(0, "steps")
        match = re.fullmatch(r"\s*([0-9.]+(?:e[+-]?\d+)?)\s*(steps?|epochs?|examples?|tokens?|%)?\s*", text)
        try:
            value = float(match[1]) if match else math.nan
        except ValueError:
            value = math.nan
        if match is None or not math.isfinite(value):
            raise UserError(
                f"{where}: {shown(text)} is not a duration; write for example '200 steps', '3 epochs', "
                "'1e6 examples', '1e9 tokens' or '5%'"
            )
        if value > MOST:
            raise UserError(f"{where}: {shown(text)} is too large; the maximum is {MOST:g}")
        unit = match[2] or "steps"
        if not value:
            return cls(0, "steps")
        return cls(value, typing.cast(Unit, unit if unit == "%" else unit.rstrip("s") + "s"))

    def __str__(self) -> str:
        number = repr(self.value).removesuffix(".0")  # every digit: it is read back when a run is resumed
        return f"{number}{'' if self.unit == '%' else ' '}{self.unit}" if self.value else ""

    def steps(self, rates: "Rates", total_steps: int = 0) -> int:
        """Return the duration in optimizer steps, rounded up to 1 at least; 0 means never.

        `total_steps` is needed only for "%".
        """
        if not self.value:
            return 0
        per_unit = {
            "steps": 1.0,
            "epochs": rates.epoch_steps,
            "examples": 1 / rates.step_examples,
            "tokens": 1 / rates.step_tokens,
            "%": total_steps / 100,
        }
        return max(math.ceil(self.value * per_unit[self.unit] - 1e-9), 1)


@dataclass(frozen=True)
class Rates:
    """What converts durations to steps: means over the data set."""

    epoch_steps: float
    step_examples: float
    step_tokens: float


@dataclass(frozen=True)
class Lora:
    """Adapters beside the weights (Hu et al. 2021). Only the adapters are trained."""

    rank: int = 0  # the adapters' inner dimension; 0: no adapters, all weights are trained
    alpha: float = 16.0  # an adapter's output is multiplied by alpha / rank
    targets: tuple[str, ...] = ("all-linear",)  # modules by Transformers' names ("q_proj") or regular expressions
    rank_stabilized: bool = False  # rsLoRA (Kalajdzievski 2023): multiply by alpha / rank ** 0.5 instead
    dora: bool = False  # DoRA (Liu et al. 2024): also train the magnitude of each output
    dropout: float = 0.0  # dropout rate of the adapters' inputs
    path: str = ""  # a PEFT folder with adapters to start from; it defines all settings above


@dataclass(frozen=True)
class Model:
    path: str = ""  # a folder in Transformers format or a hub name
    pretrained: bool = True  # False: random weights in the architecture of `path`
    architecture: Mapping[str, Any] = field(default_factory=dict)  # config.json values that override those of `path`
    tokenizer: str = ""  # a folder, a hub name, a SentencePiece file, "bytes" or "train"; "": the one of `path`
    tokenizer_size: int = 0  # vocabulary size of a tokenizer that is trained (tokenizer="train")
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the computation; auto: float32 on CPU, else bfloat16
    param_dtype: Literal["float32", "bfloat16"] = "float32"  # of the master weights and the optimizer state
    # plain: attention in plain JAX; auto: on TPUs a fused kernel, where one supports the model and its row lengths; on
    # a CPU row by row, with scores and activations that the backward pass computes again
    attention: Literal["auto", "plain"] = "auto"
    remat: Literal["none", "layer"] = "none"  # layer: recompute each layer in the backward pass, to save memory
    dropout: float | None = None  # dropout rate; None: the one in config.json
    # A Jinja file with a chat template; "": the checkpoint's own; "default": one that suits base models; "none": no
    # template, so prompts are plain text.
    chat_template: str = ""
    # Tokens that the vocabulary lacks, to be added to tokenizer, embedding and head. Their rows are trained beside
    # adapters too.
    new_tokens: tuple[str, ...] = ()
    prefix_lm: bool = False  # True: in a causal model, the prompt's tokens attend to the whole prompt
    lora: Lora = field(default_factory=Lora)
    quantize: Literal["none", "int8", "nf4"] = "none"  # of the frozen linear layers (QLoRA, Dettmers et al. 2023)


@dataclass(frozen=True)
class Source:
    """One data set: where its records are and how each becomes a prompt and a completion."""

    path: str = ""  # a file, glob or folder; a hub name; or "builtin:instructions"
    name: str = ""  # the name in reports; "": taken from `path`
    format: Literal["auto", "json", "csv", "parquet", "datasets", "builtin"] = "auto"  # auto: decided by `path`
    subset: str = ""  # the configuration of a hub data set
    split: str = "train"  # the split of a hub or built-in data set
    revision: str = ""  # a branch, tag or commit of a hub data set; "": the newest when the run starts
    # Names of data/templates.py, Jinja text "prompt ||| completion", or P3's by name: "promptsource:xsum" for all of a
    # data set, "promptsource:super_glue/rte:GPT-3 style" for one.
    template: tuple[str, ...] = ("auto",)
    # For training: how many examples of the same task, with their answers, come before the prompt. Each template has a
    # variant for each number: (0, 5) gives one without examples and one with five.
    num_fewshot: tuple[int, ...] = (0,)
    weight: float = 1.0  # this data set's share of the mixture, with mixing="weights"
    mixing_cap: int = 0  # this data set's own cap, with mixing="proportional"; 0: data.mixing_cap
    limit: int = 0  # examples to use, from the start; 0: all
    # For JSON files that hold one object: the field with the list of records. Each record also gets the other fields.
    records: str = ""
    file_list: str = ""  # a text file that lists the files of the folder to read: one per line, without extension
    max_per_file: int = 0  # examples to use of each file, from its start; 0: all

    RENAMED = {"listed": "file_list", "limit_each": "max_per_file"}


@dataclass(frozen=True)
class Data:
    train: tuple[Source, ...] = ()  # data sets to train on
    eval: tuple[Source, ...] = ()  # data sets to evaluate on
    validation_size: int = 0  # examples of each training data set to hold out and evaluate on, instead of `eval`
    max_source_length: int = 512  # tokens of an encoder-decoder's input, including the end token
    max_target_length: int = 128  # tokens of an encoder-decoder's output, including the end token
    max_seq_length: int = 2048  # tokens of a causal model's example, including the prompt, and of a packed row
    # Which assistant turns of a conversation a causal model is trained on. all: all of them, in one example; last: the
    # last; per_turn: all of them, each in an example that ends with it, for templates that strip earlier thoughts.
    train_on: Literal["all", "last", "per_turn"] = "all"
    # What to do with a prompt or conversation that is too long: cut it at its end or start, drop it, or stop.
    truncate: Literal["end", "start", "drop", "error"] = "end"
    packing: bool = True  # several short examples share a row
    packed_source_length: int = 0  # source tokens of a packed row; 0: the length that trains an example fastest
    packed_target_length: int = 0  # target tokens of a packed row; set both of these or neither
    # How often each data set is used. all: each example once per epoch; weights: by `weight`; proportional: by size.
    mixing: Literal["all", "weights", "proportional"] = "all"
    mixing_cap: int = 0  # for "proportional": a larger data set counts as having this many examples; 0: no cap
    mixing_temperature: float = 1.0  # for "proportional": rates are proportional to size ** (1 / temperature)
    seed: int = 0  # of the order, the mixture and the choice of templates
    cache_dir: str = "~/.cache/jax_it"  # a local folder for tokenized data and compiled programs
    tokenized: str = ""  # a local folder with the training data that `jax-it data tokenize` has tokenized; "": none
    num_workers: int = 0  # processes that tokenize; 0 or 1: this one alone
    on_invalid: Literal["error", "drop"] = "error"  # for records that cannot be read or rendered; drop: skip and count
    max_dropped: float = 0.1  # the run is refused if a larger share of a data set's examples is dropped
    max_truncated: float = 0.5  # the run is refused if a larger share of a data set's examples is truncated
    max_unknown: float = 0.05  # the run is refused if a larger share of tokens is unknown, or of characters is lost

    RENAMED = {
        "holdout": "validation_size",
        "source_length": "max_source_length",
        "target_length": "max_target_length",
        "sequence_length": "max_seq_length",
        "learn": "train_on",
    }


@dataclass(frozen=True)
class Optimizer:
    name: Literal["adamw", "adafactor", "lion", "sgd"] = "adamw"
    learning_rate: float = 3e-4  # the peak of the schedule
    schedule: Literal["constant", "linear", "cosine", "rsqrt", "wsd"] = "linear"  # wsd: warmup, stable, decay
    warmup: Duration = Duration(5, "%")  # linear increase of the learning rate from 0
    decay: Duration = Duration(10, "%")  # for "wsd": the final linear decrease
    final_lr_ratio: float = 0.0  # where linear, cosine and wsd end, as a share of the peak
    weight_decay: float = 0.0  # decoupled: each step subtracts learning rate * weight_decay of each matrix
    beta1: float = 0.9  # the momentum, for sgd too
    beta2: float = 0.999  # decay rate of the squared gradients' mean; for lion, of the momentum
    epsilon: float = 1e-8  # added to adamw's denominator

    RENAMED = {"final_rate": "final_lr_ratio"}


@dataclass(frozen=True)
class Train:
    duration: Duration = Duration(3, "epochs")
    batch_size: int = 128  # examples per step, over all devices; the mean where rows are packed
    gradient_accumulation_steps: int = 1  # parts of a batch that are computed one after another, to save memory
    loss: Literal["cross_entropy", "squared_error"] = "cross_entropy"
    label_smoothing: float = 0.0  # the share of probability spread over the whole vocabulary
    z_loss: float = 0.0  # coefficient of the squared log-normalizer of the softmax
    router_aux_loss_coef: float = 0.0  # coefficient of the loss that balances a mixture of experts
    loss_chunk: int = 1024  # target positions per device whose logits are in memory at a time
    squared_error_scale: float = 15.0  # k of Hui & Belkin 2020, their value for many classes
    squared_error_target: float = 30.0  # M of Hui & Belkin 2020, their value for many classes
    optimizer: Optimizer = field(default_factory=Optimizer)
    max_grad_norm: float = 1.0  # gradients with a larger global norm are scaled down to it; 0: no clipping
    # A step is skipped if its gradient's norm exceeds `max_grad_norm` and this many times the mean; 0: never. Normal
    # batches differ by a factor of a few; those with a broken record or a flipped bit, by orders of magnitude.
    max_spike: float = 30.0
    max_skipped: int = 20  # consecutive skipped steps (for a spike, NaN or infinity) after which the run ends
    # Seconds after which a hanging step ends the run with exit code 75, to be started again; it says where it hangs.
    # Compiling and saving may take ten times as long. 0: never.
    step_timeout: float = 1800.0
    log_every: Duration = Duration(10, "steps")
    wandb: str = ""  # a Weights & Biases project to log to as well; "": none
    profile: Duration = Duration(0, "steps")  # when to record a trace of the next steps; "": never
    profile_steps: int = 5  # the number of steps in the trace
    checkpoint_every: Duration = Duration(500, "steps")
    max_to_keep: int = 2  # newest checkpoints to keep
    keep_best: int = 1  # checkpoints with the best scores (eval.best) to keep as well
    keep_unscored: int = 2  # oldest checkpoints not yet scored by a running `jax-it eval --follow` to keep as well
    seed: int = 0  # of random weights and dropout

    RENAMED = {
        "micro_batches": "gradient_accumulation_steps",
        "balance_loss": "router_aux_loss_coef",
        "clip": "max_grad_norm",
        "hang_after": "step_timeout",
        "keep": "max_to_keep",
    }


@dataclass(frozen=True)
class Mesh:
    """The number of devices along each axis, over all slices. One axis may be -1: all devices that are left."""

    data: int = -1  # splits the batch; each part has a copy of the model
    fsdp: int = 1  # splits the batch and the weights, which are gathered where they are used
    expert: int = 1  # splits the batch and the experts of a mixture; other weights are split as over fsdp
    context: int = 1  # splits the positions of a row
    tensor: int = 1  # splits attention heads, feed-forward layers and the vocabulary
    slices: int = 0  # TPU slices, connected by the data-center network; 0: as many as there are
    across_slices: Literal["data", "fsdp"] = "data"  # the axis that spans the slices


@dataclass(frozen=True)
class Task:
    """A benchmark, or a test of your own, that the model is scored on in addition to the examples of data.eval.

    A prompt is the description, the few-shot examples with their answers and the record's prompt, joined by
    `fewshot_delimiter`.
    """

    name: str = ""  # the name in scores and reports
    data: Source = field(default_factory=Source)  # with several templates, the first whose prompt is short enough
    # generate: metrics of generated text; multiple_choice: is the likeliest option the reference; perplexity: of the
    # first reference; code_execution: do generated programs pass their tests; lm_eval: the task of this name of the
    # Language Model Evaluation Harness, or of the YAML files in the folder `data.path`, with its own prompts and
    # metrics
    score: Literal["generate", "multiple_choice", "perplexity", "code_execution", "lm_eval"] = "generate"
    # For multiple_choice: Jinja text "A ||| B", or "{{ choices | join('|||') }}" for a field that is a list; "": the
    # answer choices of promptsource's template.
    options: str = ""
    normalize: Literal["none", "tokens", "characters"] = "none"  # what an option's log-likelihood is divided by
    fewshot: Source = field(default_factory=Source)  # the few-shot examples
    num_fewshot: int = 0  # few-shot examples per prompt
    fewshot_by: str = ""  # a field, such as "subject", whose value few-shot examples must share with the record
    description: str = ""  # Jinja text at the start of the prompt
    fewshot_delimiter: str = "\n\n"  # between the description, the few-shot examples and the prompt
    target_delimiter: str = " "  # between a prompt and its answer, where both are plain text
    chat: bool = True  # use the model's chat template, if it has one; the whole prompt is one user turn
    # Tokens of a prompt (for causal models, with its answer). 0: the limit in `data`; for lm_eval, the model's own.
    max_prompt_length: int = 0
    # What to do with a prompt that is too long: stop, leave out few-shot examples, or cut it at its end or start.
    truncate: Literal["error", "fewshot", "end", "start"] = "error"
    metrics: tuple[Name, ...] = ()  # for generate: as in eval.metrics; for code_execution: "pass@1", "pass@10", …
    # For generate: a regular expression. The text of its last match, or of the group in it, is scored; "": all text.
    answer: str = ""
    max_new_tokens: int = 128  # tokens to generate at most
    stop: tuple[str, ...] = ()  # generated text is cut before the first of these
    samples: int = 1  # texts to generate per prompt
    temperature: float = 0.0  # of sampling; 0: greedy
    top_p: float = 1.0  # sample from the likeliest tokens whose probabilities add up to this
    seed: int = 0  # of sampling
    group_by: str = ""  # a field; each of its values gets scores of its own, and their mean is reported too
    published: str = ""  # a note for readers: the published score to compare with

    RENAMED = {
        "shots": "fewshot",
        "num_shots": "num_fewshot",
        "shots_by": "fewshot_by",
        "preamble": "description",
        "separator": "fewshot_delimiter",
        "delimiter": "target_delimiter",
        "length": "max_prompt_length",
    }


@dataclass(frozen=True)
class Eval:
    # names of jax_it.metrics.METRICS, or your own as "FILE.py:FUNCTION", which gets (predictions, references)
    metrics: tuple[Name, ...] = ("rouge1", "rouge2", "rougeL", "rougeLsum", "bleu", "chrf", "exact_match", "token_f1")
    every: Duration = Duration(0, "steps")  # evaluate during training, and at its end; 0: only with `jax-it eval`
    at_start: bool = False  # evaluate before the first step too
    best: str = "loss"  # the metric of data.eval that ranks checkpoints, or "TASK/METRIC" for one of `tasks`
    patience: int = 0  # evaluations without a better `best` after which training ends; 0: never
    batch_size: int = 64  # examples per batch
    generate: bool = True  # generate text for the examples of data.eval; False: compute only their loss
    max_new_tokens: int = 0  # tokens to generate at most; 0: data.max_target_length, or 128 for a causal model
    min_new_tokens: int = 0  # tokens to generate at least
    num_beams: int = 1  # beams of beam search; 1: greedy
    length_penalty: float = 1.0  # for beam search: larger values favor longer texts
    early_stopping: bool = False  # for beam search: an example is done once `num_beams` texts have ended
    repetition_penalty: float = 1.0  # above 1: tokens that have occurred become less likely
    # speculative decoding of greedy texts that repeat parts of their prompts, by causal models: how many tokens more a
    # step computes at most; 0: none
    prompt_lookup_num_tokens: int = 0
    forced_bos_token: str = ""  # a token that every generated text begins with, such as a language token
    limit: int = 0  # examples to use of each data set and task; 0: all
    run_model_code: bool = False  # allow tasks to run the programs that the model writes
    tasks: tuple[Task, ...] = ()  # benchmarks, and tests of your own


@dataclass(frozen=True)
class Config:
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    train: Train = field(default_factory=Train)
    mesh: Mesh = field(default_factory=Mesh)
    eval: Eval = field(default_factory=Eval)

    def max_new_tokens(self, kind: Kind) -> int:
        """Return the most tokens of a generated text, for a model of that kind."""
        return self.eval.max_new_tokens or (self.data.max_target_length if kind == "seq2seq" else CAUSAL_NEW_TOKENS)
