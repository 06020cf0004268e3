"""Strict reading of a Transformers `config.json`: what the code does not implement is an error."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from jax_it.errors import UserError, shown

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


LARGEST = 2**31 - 1  # of a config.json's integers: more than any model has of anything

LARGEST_FLOAT, SMALLEST_FLOAT = 3e38, 1e-37  # of numbers of 32 bits


class ConfigReader:
    """The values of a config.json, which must all have been read by the time of `finish`.

    `null` and an absent key both mean the default, unless the family asks `is_null`.
    """

    def __init__(self, values: Mapping[str, Any], where: str):
        self.where = where
        self._values = values
        self._read: set[str] = set()

    def get(self, key: str, kind: type[T], default: T) -> T:
        """Return the value, of the given type."""
        self._read.add(key)
        value = self._values.get(key)
        if value is None:
            return default
        if kind in (int, float) and is_int(value) and abs(value) > LARGEST:
            raise self.bad(key, f"it must be between -{LARGEST} and {LARGEST}")
        if kind is float and is_int(value):
            value = float(value)
        if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
            raise self.bad(key, f"it must be of type {kind.__name__}")
        if isinstance(value, float) and not abs(value) <= LARGEST_FLOAT:
            raise self.bad(key, "it must be a finite number of 32 bits")
        return value

    def has(self, key: str) -> bool:
        """Return whether there is a value; it counts as read."""
        self._read.add(key)
        return self._values.get(key) is not None

    def is_null(self, key: str) -> bool:
        """Return whether the key is there and null, where that does not mean the default."""
        return key in self._values and self._values[key] is None

    def need(self, key: str, kind: type[T]) -> T:
        """Return a required value."""
        if self._values.get(key) is None:
            raise UserError(f"{self.where}: {key} is missing")
        return self.get(key, kind, self._values[key])

    def size(self, key: str, default: int | None = None) -> int:
        """Return how many there are of something: at least 1. Without a default, the key must be there."""
        value = self.need(key, int) if default is None else self.get(key, int, default)
        if value < 1:
            raise self.bad(key, "it must be at least 1")
        return value

    def rate(self, key: str, default: float) -> float:
        """Return a dropout rate."""
        value = self.get(key, float, default)
        if not 0 <= value < 1:
            raise self.bad(key, "it must be at least 0 and below 1")
        return value

    def positive(self, key: str, default: float) -> float:
        value = self.get(key, float, default)
        if value < SMALLEST_FLOAT:
            raise self.bad(key, "it must be above 0")
        return value

    def get_list(self, key: str, kind: type[T]) -> list[T] | None:
        """Return a list of values of one type; None where there is none."""
        if not self.has(key):
            return None
        found = self.get(key, list, [])
        if not all(isinstance(item, kind) for item in found):
            raise self.bad(key, f"it must be a list of {kind.__name__}")
        return found

    def get_tokens(self, key: str, vocab_size: int) -> tuple[int, ...]:
        """Return one token id of the vocabulary or several; empty where there is none."""
        self._read.add(key)
        value = self._values.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(map(is_int, ids)):
            raise self.bad(key, "it must be a token id or a list of them")
        if not all(0 <= item < vocab_size for item in ids):
            raise self.bad(key, f"it must be in the vocabulary, from 0 to {vocab_size - 1}, or null")
        return tuple(ids)

    def get_token(self, key: str, vocab_size: int) -> int | None:
        """Return one token id of the vocabulary, alone or in a list; None where there is none."""
        ids = self.get_tokens(key, vocab_size)
        if len(ids) != 1 and self._values.get(key) is not None:
            raise self.bad(key, "it must be of type int")
        return ids[0] if ids else None

    def choose(self, key: str, known: Sequence[str], default: str = "") -> str:
        """Return a value that must be one of those that are implemented."""
        value = self.get(key, str, default)
        if value not in known:
            self.refuse(key, known)
        return value

    def bad(self, key: str, why: str) -> UserError:
        """Return the error of a value that cannot be read."""
        return UserError(f"{self.where}: {key} is {shown(self._values.get(key))}; {why}")

    def refuse(self, key: str, known: Sequence[str]) -> None:
        raise UserError(f"{self.where}: {key} {shown(self._values.get(key))} is not one of {', '.join(known)}")

    def expect(self, **only: Any) -> None:
        """Refuse any other value of keys of which one alone is implemented."""
        for key, value in only.items():
            if self.get(key, type(value), value) != value:
                raise UserError(f"{self.where}: {key}={shown(self._values[key])} is not supported; only {value!r} is")

    def finish(self, ignored: Sequence[str] = ()) -> None:
        """Refuse keys that were not read and are not known to be harmless."""
        unknown = sorted(set(self._values) - self._read - HARMLESS - set(ignored))
        unknown = [key for key in unknown if not key.startswith("_")]  # private notes of some version's
        if unknown:
            names = ", ".join(key if key.isprintable() else repr(key) for key in unknown)
            raise UserError(
                f"{self.where}: {names}: not known to jax_it, so the model cannot be read faithfully; "
                "remove what has no effect on the model"
            )


def is_int(value: Any) -> bool:
    """Return whether it is an integer, which True and False are not."""
    return isinstance(value, int) and not isinstance(value, bool)
