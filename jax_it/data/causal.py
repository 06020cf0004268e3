"""Examples of a causal model: turns to token ids with a loss mask, and rows of these to batches."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np

from jax_it.config import Data
from jax_it.data import chat, packing
from jax_it.data.encoded import Encoded
from jax_it.data.encoding import (
    Counts,
    check_plain,
    cut,
    encode_completions,
    for_evaluation,
    prompt_texts,
    text_prompts,
)
from jax_it.data.packing import Layout, RowCost, Rows, Shape, bucket
from jax_it.data.templates import Example, Turn
from jax_it.data.tokenizer import Tokenizer
from jax_it.errors import UserError


class CausalBatch(NamedTuple):
    """Rows of a causal model. Segment 0 is padding. Arrays are int32, weights float32.

    The target of a position is the token after it in the same segment; a segment's last token has none.
    """

    tokens_BT: np.ndarray
    targets_BT: np.ndarray
    weights_BT: np.ndarray  # 1 where the loss counts
    segments_BT: np.ndarray
    positions_BT: np.ndarray  # within the segment
    prefix_BT: np.ndarray | None = None  # of a prefix-LM: 1 in a segment's prompt, whose positions see each other


@dataclass(frozen=True)
class CausalFormat:
    """How a causal model sees examples: one sequence of tokens, some of which are trained on.

    With a chat template every example is a conversation that it renders; without one, a prompt, a completion and
    the end token. An example takes as many positions as it has tokens, the last of which has no target.
    """

    pad: int
    prefix_lm: bool = False  # batches say which positions belong to the prompt
    length_field: ClassVar[str] = "max_seq_length"

    def key(self, data: Data) -> tuple[object, ...]:
        """Return everything that decides what `encode` gives, besides the tokenizer."""
        return "causal", data.max_seq_length, data.truncate, data.train_on

    def encode(
        self,
        examples: Sequence[Example],
        locations: Sequence[str],
        data: Data,
        tokenizer: Tokenizer,
        counts: Counts,
        evaluation: bool = False,
    ) -> Iterator[Encoded | None]:
        """Yield each example's tokens, None for one that is dropped; `locations` say where each is from.

        The counts grow as it is consumed.

        For evaluation none is dropped or refused for its length. Raises InvalidRecord for an example that the chat
        template refuses.
        """
        if tokenizer.chat_template is not None:
            if evaluation:  # the last answer stays
                data = for_evaluation(data, "start")
            return _encode_conversations(examples, locations, data, tokenizer, counts, evaluation)
        if evaluation:
            data = for_evaluation(data, data.truncate)
        return _encode_texts(examples, locations, data, tokenizer, counts)

    def prompts(
        self, conversations: Sequence[Sequence[Turn]], tokenizer: Tokenizer, locations: Sequence[str]
    ) -> list[list[int]]:
        """Return the ids that an answer to each conversation, which ends with the user, is generated from."""
        if tokenizer.chat_template is not None:
            return chat.prompts(conversations, locations, tokenizer)
        return self.text_prompts(prompt_texts(conversations, tokenizer, locations), tokenizer)

    def text_prompts(self, texts: Sequence[str], tokenizer: Tokenizer) -> list[list[int]]:
        """Return the ids that are generated from for texts as they are."""
        return text_prompts(texts, tokenizer)

    def prompt_of(self, example: Encoded) -> list[int]:
        """Return the ids that an example's last answer would be generated from."""
        mask = example.loss_mask
        assert mask is not None
        begins = np.flatnonzero(mask[1:] & ~mask[:-1]) + 1
        return example.target[: begins[-1] if len(begins) else None].tolist()

    def smallest(self, data: Data) -> Shape:
        """Return the row of one example of the greatest length."""
        return Shape(0, 0, data.max_seq_length)

    def layout(
        self, sources: np.ndarray, targets: np.ndarray, longest: tuple[int, int], data: Data, batch_size: int,
        row_cost: RowCost,
    ) -> Layout:  # fmt: skip
        """Return the shape of rows, of `data.max_seq_length` tokens, and their number in a step. Ignores `longest`."""
        if data.packed_source_length:
            raise UserError(
                "config.data.packed_source_length has no effect on a causal model, whose rows hold "
                "data.max_seq_length tokens; leave it and packed_target_length out"
            )
        shape = self.smallest(data)
        if not data.packing:
            return Layout(shape, batch_size, 1.0, 0.0, float(targets.mean()) / shape.target)
        layout = packing.layout_of(self.pack(sources, targets, shape), sources, targets, batch_size, shape)
        return dataclasses.replace(layout, rows=packing.round_rows_closely(batch_size / layout.examples_per_row))

    def pack(self, sources: np.ndarray, targets: np.ndarray, shape: Shape) -> Rows:
        """Return which examples of these lengths share rows of `shape`."""
        return packing.pack_sequences(targets, shape.target)

    def fit(self, sources: np.ndarray, targets: np.ndarray, limit: Shape) -> Shape:
        """Return the shape of a batch of one example a row: its longest, rounded up to a bucket."""
        return Shape(0, 0, bucket(int(targets.max(initial=1)), limit.target))

    def batch(self, rows: Sequence[Sequence[Encoded]], shape: Shape) -> CausalBatch:
        """Return a batch of these rows, each a list of examples; an empty list makes a row of padding."""
        tokens = np.full((len(rows), shape.target), self.pad, np.int32)
        targets, segments, positions = tokens.copy(), np.zeros_like(tokens), np.zeros_like(tokens)
        weights = np.zeros(tokens.shape, np.float32)
        prefix = np.zeros_like(tokens)
        for r, row in enumerate(rows):
            at = 0
            for segment, example in enumerate(row, 1):
                assert example.loss_mask is not None
                here, last = slice(at, at + len(example.target)), at + len(example.target) - 1
                tokens[r, here] = example.target
                targets[r, at:last] = example.target[1:]
                weights[r, at:last] = example.loss_mask[1:]
                segments[r, here] = segment
                positions[r, here] = np.arange(len(example.target))
                prefix[r, at : at + int(np.argmax(example.loss_mask))] = 1
                at = here.stop
        return CausalBatch(tokens, targets, weights, segments, positions, prefix if self.prefix_lm else None)


def _encode_texts(
    examples: Sequence[Example], locations: Sequence[str], data: Data, tokenizer: Tokenizer, counts: Counts
) -> Iterator[Encoded | None]:
    """Yield prompt, completion and end token in one sequence; the last two are trained on.

    Each is tokenized by itself, so that the prompt is what generation starts from. Where they are too long
    the prompt is cut first, to no less than a quarter of the length, and then the completion, without an end token.
    """
    check_plain(examples, locations, tokenizer)
    for item, where in zip(examples, locations, strict=True):
        if sum(turn.role == "assistant" for turn in item.turns) > 1:
            raise UserError(
                f"{where}: a conversation of several turns needs a chat template, which {tokenizer.name} lacks; "
                "set config.model.chat_template, for example to 'default'"
            )
    prompts = text_prompts([item.prompt for item in examples], tokenizer)
    start = [] if tokenizer.start is None else [tokenizer.start]
    completions = encode_completions(examples, tokenizer)
    counts.add_characters(tokenizer, [text for item in examples for text in (item.prompt, item.completion)])
    length = data.max_seq_length
    for prompt, completion, where in zip(prompts, completions, locations, strict=True):
        counts.add_tokens(tokenizer, prompt, completion, added=0)
        if not completion:
            counts.empty_completion += 1
            yield None
            continue
        answer = [*completion, tokenizer.end]
        if len(prompt) + len(answer) > length:
            if data.truncate == "error":
                raise _too_long(where, len(prompt) + len(answer), data)
            if data.truncate == "drop":
                counts.too_long += 1
                yield None
                continue
            kept = max(length - len(answer), min(len(prompt), max(length // 4, 1)))
            counts.add_cut(len(prompt) > kept, len(answer) > length - min(len(prompt), kept))
            prompt = [*start, *cut(prompt[len(start) :], kept - len(start), data.truncate)]
            answer = answer[: length - len(prompt)]
        tokens = np.array(prompt + answer, np.int32)
        yield _sequence(tokens, np.arange(len(tokens)) >= len(prompt))


def _encode_conversations(
    examples: Sequence[Example],
    locations: Sequence[str],
    data: Data,
    tokenizer: Tokenizer,
    counts: Counts,
    keep: bool,
) -> Iterator[Encoded | None]:
    """Yield each conversation in one sequence, by the tokenizer's chat template; the assistant's text is trained on.

    One that is too long loses whole exchanges, from the end or the start; the system turn stays. Where not
    even one exchange fits it is dropped or, with `keep`, cut within the last.
    """
    full = [i for i, item in enumerate(examples) if _is_trained_on(item.turns, data)]
    turns, where = [examples[i].turns for i in full], [locations[i] for i in full]
    encoded = dict(zip(full, chat.encode(turns, where, tokenizer, data.train_on), strict=True))
    counts.add_characters(tokenizer, [turn.text for item in examples for turn in item.turns])
    for i, item in enumerate(examples):
        counts.examples += 1
        if i not in encoded:
            counts.empty_completion += 1
            yield None
            continue
        _, tokens, _, mask = encoded[i]
        assert mask is not None
        counts.source_tokens += int((~mask).sum())
        counts.target_tokens += int(mask.sum())
        if tokenizer.unknown is not None:
            counts.unknown_tokens += int((tokens == tokenizer.unknown).sum())
        if len(tokens) <= data.max_seq_length:
            yield _sequence(tokens, mask)
            continue
        if data.truncate == "error":
            raise _too_long(locations[i], len(tokens), data)
        shorter = None
        if data.truncate != "drop":
            shorter = _shortened(item.turns, locations[i], data, tokenizer)
        if shorter is not None:
            counts.truncated += 1
            counts.truncated_turns += 1
        elif keep:
            shorter, turns_lost, prompt_cut = _clipped(item.turns, locations[i], data, tokenizer)
            counts.truncated_turns += turns_lost
            counts.add_cut(prompt_cut, not prompt_cut)
        else:
            counts.too_long += 1
        yield None if shorter is None else _sequence(shorter.target, shorter.loss_mask)


def _is_trained_on(turns: Sequence[Turn], data: Data) -> bool:
    """Return whether the conversation has a turn that is trained on, and does not end with an empty one."""
    answers = [turn for turn in turns if turn.role == "assistant"][0 if data.train_on == "all" else -1 :]
    said = turns[-1].text.strip() or turns[-1].tool_calls or turns[-1].reasoning
    return bool(said) and any(turn.train for turn in answers)


def _exchanges(turns: Sequence[Turn]) -> tuple[Sequence[Turn], list[Sequence[Turn]]]:
    """Return the system turn and the tools, and the rest split before each turn of the user."""
    begins = [i for i, turn in enumerate(turns) if turn.role == "user"]
    ends = [*begins[1:], len(turns)]
    return turns[: begins[0]], [turns[start:stop] for start, stop in zip(begins, ends, strict=True)]


def _shortened(turns: Sequence[Turn], where: str, data: Data, tokenizer: Tokenizer) -> Encoded | None:
    """Return as many exchanges as fit; None where not even one does."""
    first, exchanges = _exchanges(turns)
    for lost in range(1, len(exchanges)):
        rest = exchanges[lost:] if data.truncate == "start" else exchanges[: len(exchanges) - lost]
        shorter = (*first, *itertools.chain(*rest))
        if not _is_trained_on(shorter, data):
            continue
        (found,) = chat.encode([shorter], [where], tokenizer, data.train_on)
        if len(found.target) <= data.max_seq_length:
            return found
    return None


def _clipped(turns: Sequence[Turn], where: str, data: Data, tokenizer: Tokenizer) -> tuple[Encoded, bool, bool]:
    """Return the last exchange without the end of its answer, or without the start of its prompt where that is needed.

    Also return whether turns before it were lost, and whether its prompt was cut.
    """
    first, exchanges = _exchanges(turns)
    (found,) = chat.encode([(*first, *exchanges[-1])], [where], tokenizer, "last")
    assert found.loss_mask is not None
    start = max(int(np.argmax(found.loss_mask)) - data.max_seq_length, 0)
    span = slice(start, start + data.max_seq_length)
    clipped = _sequence(found.target[span], found.loss_mask[span])
    return clipped, len(exchanges) > 1, start > 0


def _sequence(tokens: np.ndarray, mask: np.ndarray | None) -> Encoded:
    """Return a causal example. Nothing precedes the first token, which cannot be trained on."""
    assert mask is not None
    mask = mask.copy()
    mask[:1] = False
    return Encoded(np.zeros(0, np.int32), tokens, loss_mask=mask)


def _too_long(where: str, number: int, data: Data) -> UserError:
    return UserError(
        f"{where}: {number} tokens exceed the limit of {data.max_seq_length}; raise config.data.max_seq_length, or "
        "choose another config.data.truncate"
    )
