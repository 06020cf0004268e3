"""Every setting of jax_it with its type, default and unit; nothing else knows a default.

`RENAMED` maps a setting's former name to today's, for the message that refuses the former.
"""

import math
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from jax_it.errors import UserError
from jax_it.typed import Name, shown

Kind = Literal["causal", "seq2seq"]  # of model
CAUSAL_NEW_TOKENS = 128
Unit = Literal["steps", "epochs", "examples", "tokens", "%"]
MOST = 1e18  # of a duration, in whatever unit


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
                f"{where}: {shown(text)} is not a duration; write for example '200 steps', '3 epochs', "
                "'1e6 examples', '1e9 tokens' or '5%'"
            )
        if value > MOST:
            raise UserError(f"{where}: {shown(text)} is more than any run has; the most is {MOST:g}")
        unit = match[2] or "steps"
        if not value:
            return cls(0, "steps")
        return cls(value, typing.cast(Unit, unit if unit == "%" else unit.rstrip("s") + "s"))

    def __str__(self) -> str:
        number = repr(self.value).removesuffix(".0")  # every digit: it is read back when a run is resumed
        return f"{number}{'' if self.unit == '%' else ' '}{self.unit}" if self.value else ""

    def steps(self, rates: "Rates", total_steps: int = 0) -> int:
        """Return the duration in optimizer steps, rounded up to 1 at least; 0 means never.

        `total_steps` is needed for per cent alone.
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
    quantize: Literal["none", "int8", "nf4"] = "none"  # of linear layers beneath adapters (QLoRA, Dettmers et al. 2023)


@dataclass(frozen=True)
class Source:
    """One data set: where its records are and how each becomes a prompt and a completion."""

    path: str = ""  # a file, glob or folder; a hub name; "builtin:instructions"
    name: str = ""  # in reports; "": from `path`
    format: Literal["auto", "json", "csv", "parquet", "datasets", "builtin"] = "auto"
    subset: str = ""  # the hub data set's configuration
    split: str = "train"  # of hub and built-in data sets
    revision: str = ""  # of hub data sets: a branch, tag or commit; "": the newest, which a run keeps reading
    template: tuple[str, ...] = ("auto",)  # names of data/templates.py, or Jinja text "prompt ||| completion"
    weight: float = 1.0  # for mixing="weights"
    limit: int = 0  # examples, from the start; 0: all
    records: str = ""  # of JSON files that hold one object: its field with the records, which get its others too
    file_list: str = ""  # a text file with a line for each file of the folder that is read, its ending left out
    max_per_file: int = 0  # examples of each file, from its start; 0: all

    RENAMED = {"listed": "file_list", "limit_each": "max_per_file"}


@dataclass(frozen=True)
class Data:
    train: tuple[Source, ...] = ()
    eval: tuple[Source, ...] = ()
    validation_size: int = 0  # examples kept out of each training source, and evaluated, where `eval` is empty
    max_source_length: int = 512  # tokens, the end mark included; of encoder-decoders
    max_target_length: int = 128
    max_seq_length: int = 2048  # tokens of a causal model's longest example, prompt included, and of its packed rows
    train_on: Literal["all", "last"] = "all"  # the assistant turns of a conversation that a causal model is trained on
    truncate: Literal["end", "start", "drop", "error"] = "end"  # the side that is cut of a prompt, or conversation
    packing: bool = True
    packed_source_length: int = 0  # tokens in a packed row; 0: chosen by the step's cost on this data
    packed_target_length: int = 0
    mixing: Literal["all", "weights", "proportional"] = "all"  # all: each example once an epoch
    mixing_cap: int = 0  # for "proportional": a source counts for at most so many examples; 0: no cap
    mixing_temperature: float = 1.0  # for "proportional": rates are proportional to size ** (1 / temperature)
    seed: int = 0  # of the order, the mixture and the choice of templates
    cache_dir: str = "~/.cache/jax_it"
    on_invalid: Literal["error", "drop"] = "error"  # of records that cannot be read or rendered; drop: they are counted
    max_dropped: float = 0.1  # shares of a source's examples (of tokens for max_unknown), refused above
    max_truncated: float = 0.5
    max_unknown: float = 0.05

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
    learning_rate: float = 3e-4  # the peak
    schedule: Literal["constant", "linear", "cosine", "rsqrt", "wsd"] = "linear"
    warmup: Duration = Duration(5, "%")  # linear, from 0
    decay: Duration = Duration(10, "%")  # for "wsd": the final linear decay
    final_lr_ratio: float = 0.0  # a share of the peak, where linear, cosine and wsd end
    weight_decay: float = 0.0  # a step takes learning rate * weight_decay of each matrix away, in every optimizer
    beta1: float = 0.9  # also the momentum of sgd
    beta2: float = 0.999
    epsilon: float = 1e-8

    RENAMED = {"final_rate": "final_lr_ratio"}


@dataclass(frozen=True)
class Train:
    duration: Duration = Duration(3, "epochs")
    batch_size: int = 128  # examples a step, over all devices; the mean where rows are packed
    gradient_accumulation_steps: int = 1  # parts that a step computes one after another
    loss: Literal["cross_entropy", "squared_error"] = "cross_entropy"
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    router_aux_loss_coef: float = 0.0  # the weight of the router's balancing loss, of mixtures of experts
    loss_chunk: int = 1024  # target positions, of all rows on a device, whose logits exist at a time
    squared_error_scale: float = 15.0  # k and M of Hui & Belkin 2020, their values for many classes
    squared_error_target: float = 30.0
    optimizer: Optimizer = field(default_factory=Optimizer)
    max_grad_norm: float = 1.0  # the gradient's global norm; 0: no clipping
    # A step is skipped if its gradient's norm exceeds `max_grad_norm` and this many times the mean; 0: none is. Batches
    # of sound data differ by a few times; those of a broken record, or of a flipped bit, by orders of magnitude.
    max_spike: float = 30.0
    max_skipped: int = 20  # steps in a row that are skipped, for a spike or what is not finite, before the run ends
    # Seconds (ten times as many for a compilation or a save) after which a step that hangs is given up: the run says
    # where it hangs and ends with exit code 75, to be started again; 0: never.
    step_timeout: float = 1800.0
    log_every: Duration = Duration(10, "steps")
    wandb: str = ""  # the project of Weights & Biases that the log goes to as well; "": none
    profile: Duration = Duration(0, "steps")  # after which a trace of the next steps is recorded; "": never
    profile_steps: int = 5
    checkpoint_every: Duration = Duration(500, "steps")
    max_to_keep: int = 2  # the newest checkpoints
    keep_best: int = 1  # and so many with the best score (eval.best)
    keep_unscored: int = 2  # and the first so many that a running `jax-it eval --follow` has not scored yet
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

    A prompt is the description, the few-shot examples with their answers and the record's prompt, joined by
    `fewshot_delimiter`.
    """

    name: str = ""
    data: Source = field(default_factory=Source)  # of several templates, the first whose prompt is not too long
    # generate: metrics of generated text; rank: is the likeliest option the reference; perplexity: how likely is the
    # (first) reference; code_execution: do programs pass their test; lm_eval: the task of this name of the Language
    # Model Evaluation Harness, or of the YAML files in the folder `data.path`, with its own prompts and metrics
    score: Literal["generate", "multiple_choice", "perplexity", "code_execution", "lm_eval"] = "generate"
    options: str = ""  # of rank: Jinja text "A ||| B", or "{{ choices | join('|||') }}" of a field that is a list
    normalize: Literal["none", "tokens", "characters"] = "none"  # what an option's log-likelihood is divided by
    fewshot: Source = field(default_factory=Source)  # the examples before the question
    num_fewshot: int = 0
    fewshot_by: str = ""  # a field in which examples must agree with the record, for example "subject"
    description: str = ""  # Jinja text
    fewshot_delimiter: str = "\n\n"
    target_delimiter: str = " "  # between a prompt and its answer, where both are plain text
    chat: bool = True  # by the model's chat template, if it has one: all of the prompt is one turn of the user
    max_prompt_length: int = 0  # tokens of a prompt (and answer, of causal models); 0: that of `data`; lm_eval: its own
    truncate: Literal["error", "fewshot", "end", "start"] = "error"  # longer ones lose few-shot examples, or tokens
    metrics: tuple[Name, ...] = ()  # of generate: as eval.metrics
    answer: str = ""  # of generate: a regular expression; its last match, or its group, is scored; "": the whole text
    max_new_tokens: int = 128
    stop: tuple[str, ...] = ()  # a text ends before the first of these
    samples: int = 1  # texts of each prompt
    temperature: float = 0.0  # 0: the likeliest tokens
    top_p: float = 1.0
    seed: int = 0
    group_by: str = ""  # a field; there are scores for each value of it, and their mean
    published: str = ""  # the score to compare with: for people

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
    # of jax_it.metrics.METRICS, and your own as "FILE.py:FUNCTION", called with (predictions, references)
    metrics: tuple[Name, ...] = ("rouge1", "rouge2", "rougeL", "rougeLsum", "bleu", "chrf", "exact_match", "token_f1")
    every: Duration = Duration(0, "steps")  # within training; the end of the run too where it is not 0
    at_start: bool = False  # also before the first step
    best: str = "loss"  # the metric that ranks checkpoints, of data.eval; or "TASK/METRIC" of one of `tasks`
    patience: int = 0  # evaluations without a better `best` after which training ends; 0: never
    batch_size: int = 64  # examples
    generate: bool = True  # text for data.eval's examples; False: the loss alone
    max_new_tokens: int = 0  # 0: data.max_target_length of an encoder-decoder, 128 of a causal model
    min_new_tokens: int = 0
    num_beams: int = 1  # 1: greedy
    length_penalty: float = 1.0  # of beams: above 0 favours longer texts
    early_stopping: bool = False  # of beams: an example is done once `num_beams` texts have ended
    repetition_penalty: float = 1.0
    forced_bos_token: str = ""  # a token of the tokenizer that every text begins with, such as a language's
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

    def max_new_tokens(self, kind: Kind) -> int:
        """Return the most tokens of a generated text, for a model of that kind."""
        return self.eval.max_new_tokens or (self.data.max_target_length if kind == "seq2seq" else CAUSAL_NEW_TOKENS)
