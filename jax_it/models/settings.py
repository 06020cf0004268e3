"""Strict reading of a Transformers `config.json`: what the code does not implement is an error."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from jax_it.errors import UserError

T = TypeVar("T")

# Keys that say nothing of the computation of logits, or that generation settings hold.
HARMLESS = frozenset(
    """
    _name_or_path architectures bos_token_id transformers_version torch_dtype dtype model_type use_cache
    return_dict output_hidden_states output_attentions torchscript tf_legacy_loss use_bfloat16 problem_type
    tokenizer_class prefix task_specific_params n_positions output_past finetuning_task
    id2label label2id num_labels sep_token_id gradient_checkpointing pruned_heads _commit_hash name_or_path
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k
    top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size
    bad_words_ids num_return_sequences output_scores return_dict_in_generate forced_bos_token_id
    forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens
    begin_suppress_tokens tie_encoder_decoder initializer_range cross_attention_hidden_size
    output_router_logits router_aux_loss_coef unk_token_id pretraining_tp
    """.split()
)


class Settings:
    """The values of a config.json, which must all have been asked for by the time of `finish`.

    `null` and an absent key both mean the default.
    """

    def __init__(self, values: Mapping[str, Any], where: str):
        self.where = where
        self._values = values
        self._asked: set[str] = set()

    def get(self, key: str, kind: type[T], default: T) -> T:
        """The value, of the given type (a list of one stands for its item)."""
        self._asked.add(key)
        value = self._values.get(key)
        if value is None:
            return default
        if isinstance(value, list) and len(value) == 1 and kind is int:
            value = value[0]
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
            raise UserError(f"{self.where}: {key} is {value!r}; it must be of type {kind.__name__}")
        return value

    def has(self, key: str) -> bool:
        """Whether there is a value; it counts as asked for."""
        self._asked.add(key)
        return self._values.get(key) is not None

    def need(self, key: str, kind: type[T]) -> T:
        """A value without which there is no model."""
        if self._values.get(key) is None:
            raise UserError(f"{self.where}: {key} is missing")
        return self.get(key, kind, self._values[key])

    def get_list(self, key: str, kind: type[T]) -> list[T]:
        """A list of values of one type; empty where there is none."""
        found = self.get(key, list, [])
        if not all(isinstance(item, kind) for item in found):
            raise UserError(f"{self.where}: {key} is {found!r}; it must be a list of {kind.__name__}")
        return found

    def get_tokens(self, key: str) -> tuple[int, ...]:
        """One token id or several; empty where there is none."""
        value = self._values.get(key)
        self._asked.add(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(item, int) and not isinstance(item, bool) for item in ids):
            raise UserError(f"{self.where}: {key} is {value!r}; it must be a token id or a list of them")
        return tuple(ids)

    def choose(self, key: str, known: Sequence[str], default: str = "") -> str:
        value = self.get(key, str, default)
        if value not in known:
            self.refuse(key, known)
        return value

    def refuse(self, key: str, known: Sequence[str]) -> None:
        raise UserError(f"{self.where}: {key} {self._values.get(key)!r} is not one of {', '.join(known)}")

    def expect(self, **only: Any) -> None:
        """Keys of which one value alone is implemented."""
        for key, value in only.items():
            if self.get(key, type(value), value) != value:
                raise UserError(f"{self.where}: {key}={self._values[key]!r} is not supported; only {value!r} is")

    def finish(self, ignored: Sequence[str] = ()) -> None:
        """Refuses keys that nobody asked for and that are not known to be harmless."""
        unknown = sorted(set(self._values) - self._asked - HARMLESS - set(ignored))
        unknown = [key for key in unknown if not key.startswith("_")]  # private notes of some version's
        if unknown:
            raise UserError(
                f"{self.where}: {', '.join(unknown)}: not known to jax_it, so the model cannot be read faithfully; "
                "remove what has no effect on the model"
            )
