"""What a model family is: how its config.json is read, where its weights are, and the module that computes it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from jax_it.models.weights import Weight

Kind = Literal["seq2seq", "causal"]


class Run(NamedTuple):
    """How a forward pass is computed: nothing of it changes what the model is."""

    dtype: Any
    remat: bool = False
    dropout: float = 0.0  # the rate where a key is given
    prefix_lm: bool = False  # the prompt's positions see each other, also in `prefill`
    fused: bool | Literal["interpret"] = False  # attention by the TPU's kernel, where it can compute the rows
    unrolled: bool = False  # decoding goes through the layers one by one, which takes longer to compile than a scan


@dataclass(frozen=True)
class Family:
    """One `model_type`. Its module, made as `module(config, rngs=…)`, is called with (batch, run, key).

    It also has `prefill` and `stepper`, for generation; see `Model` for what each of them takes and returns.
    """

    kind: Kind
    architecture: str  # Transformers' class
    read_config: Callable[[Mapping[str, Any], str], Any]
    weight_table: Callable[[Any], dict[str, Weight]]
    module: type
    head_logits: Callable[..., Any]  # (config, head_VD, hidden) -> float32 logits
    embedding: str  # Transformers' name of the embedding, which a tied head repeats
    head: str
    aliases: Mapping[str, str] | None = None  # names under which a checkpoint may repeat a weight: the same bytes
    ignored: str = ""  # a regular expression of tensors of old checkpoints that no Transformers version reads
    prefix: str = ""  # of all names but the head's, which a checkpoint may leave out
    values_to_save: Callable[[Any], dict[str, Any]] = lambda config: {}
    """The values of config.json without which Transformers would build another model."""
