"""How a kind of model sees examples: the only thing of the model that data depends on.

Both formats have the same methods, which everything else in `data` works through: `key`, `encode`,
`prompts`, `smallest`, `layout`, `pack`, `fit` and `batch`. Lengths are those of an example's source, of which a causal
example has none, and its target.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np

from jax_it.config import Data
from jax_it.data import chat, encoding, packing
from jax_it.data.batches import CausalBatch, Encoded, Placed, Seq2SeqBatch, bucket
from jax_it.data.encoding import Counts, Encoding
from jax_it.data.packing import Layout, RowCost, Rows, Shape
from jax_it.data.templates import Example, Turn
from jax_it.data.tokenizer import Tokenizer
from jax_it.errors import UserError


class Lengths(Protocol):
    """How many tokens an example has."""

    @property
    def source_length(self) -> int: ...

    @property
    def target_length(self) -> int: ...


@dataclass(frozen=True)
class Seq2SeqFormat:
    """Examples of an encoder-decoder: a source and a target."""

    start: int  # the decoder's first token
    pad: int
    length_field: ClassVar[str] = "max_source_length"  # the setting that bounds a prompt

    def key(self, data: Data) -> tuple[object, ...]:
        """Everything that decides what `encode` gives, besides the tokenizer."""
        return "seq2seq", data.max_source_length, data.max_target_length, data.truncate

    def encode(
        self,
        examples: Sequence[Example],
        places: Sequence[str],
        data: Data,
        tokenizer: Tokenizer,
        counts: Counts,
        evaluation: bool = False,
    ) -> Encoding:
        """Each example's tokens, None for one that is dropped; `places` say where each is from.

        For evaluation none is dropped for its length, and a reference that is cut is no reason to refuse one.
        """
        if evaluation:
            data = _cutting(data, data.truncate)
        return encoding.encode_pairs(examples, places, data, tokenizer, counts)

    def prompts(
        self, conversations: Sequence[Sequence[Turn]], tokenizer: Tokenizer, places: Sequence[str]
    ) -> list[list[int]]:
        """What an answer to each conversation, which ends with the user, is generated from."""
        texts = [encoding.source_text(turns, tokenizer, p) for turns, p in zip(conversations, places, strict=True)]
        return self.text_prompts(texts, tokenizer)

    def text_prompts(self, texts: Sequence[str], tokenizer: Tokenizer) -> list[list[int]]:
        """What is generated from for texts as they are."""
        return [encoding.marked_source(tokens, tokenizer) for tokens in tokenizer.encode(texts)]

    def prompt_of(self, example: Encoded) -> list[int]:
        """What the last answer of an example would be generated from."""
        return example.source.tolist()

    def smallest(self, data: Data) -> Shape:
        """The row of one example of the greatest length."""
        return Shape(1, data.max_source_length, data.max_target_length)

    def layout(
        self, sources: np.ndarray, targets: np.ndarray, data: Data, batch_size: int, row_cost: RowCost
    ) -> Layout:
        """The shape of rows and their number in a step, for examples of these lengths."""
        smallest = self.smallest(data)
        if not data.packing:
            fills = float(sources.mean()) / smallest.source, float(targets.mean()) / smallest.target
            return Layout(smallest, batch_size, 1.0, *fills)
        given = None
        if data.packed_source_length:
            blocks = data.packed_source_length // data.max_source_length
            given = Shape(blocks, data.max_source_length, data.packed_target_length)
        return packing.choose_layout(sources, targets, batch_size, row_cost, given, smallest)

    def pack(self, sources: np.ndarray, targets: np.ndarray, shape: Shape) -> Rows:
        """Which examples of these lengths share rows of `shape`."""
        return packing.pack(sources, targets, shape)

    def fit(self, examples: Sequence[Lengths], limit: Shape) -> Shape:
        """The shape of a batch of one example a row: its longest, rounded up to a bucket."""
        source = max((example.source_length for example in examples), default=1)
        target = max((example.target_length for example in examples), default=1)
        return Shape(1, bucket(source, limit.source), bucket(target, limit.target))

    def batch(self, rows: Sequence[Sequence[Placed]], shape: Shape) -> Seq2SeqBatch:
        """A batch of these rows, each a list of examples; an empty list makes a row of padding."""
        number = len(rows)
        source = np.full((number, shape.blocks, shape.source), self.pad, np.int32)
        source_segments = np.zeros_like(source)
        source_positions = np.zeros_like(source)
        tokens = np.full((number, shape.target), self.pad, np.int32)
        targets, segments, positions = tokens.copy(), np.zeros_like(tokens), np.zeros_like(tokens)
        for r, row in enumerate(rows):
            used = [0] * shape.blocks
            at = 0
            for segment, example in enumerate(row, 1):
                here = (r, example.block, slice(used[example.block], used[example.block] + len(example.source)))
                source[here] = example.source
                source_segments[here] = segment
                source_positions[here] = np.arange(len(example.source))
                used[example.block] += len(example.source)
                there = slice(at, at + len(example.target))
                targets[r, there] = example.target
                tokens[r, at] = self.start
                tokens[r, at + 1 : there.stop] = example.target[:-1]
                segments[r, there] = segment
                positions[r, there] = np.arange(len(example.target))
                at = there.stop
        weights = (segments > 0).astype(np.float32)
        return Seq2SeqBatch(source, source_segments, source_positions, tokens, targets, weights, segments, positions)


@dataclass(frozen=True)
class CausalFormat:
    """Examples of a causal model: one sequence of tokens, some of which are learnt.

    With a chat template every example is a conversation that it renders; without one, a prompt, a completion and
    the end mark. An example takes as many positions as it has tokens, the last of which has no target.
    """

    pad: int
    prefix_lm: bool = False  # batches say which positions belong to the prompt
    length_field: ClassVar[str] = "max_seq_length"

    def key(self, data: Data) -> tuple[object, ...]:
        """Everything that decides what `encode` gives, besides the tokenizer."""
        return "causal", data.max_seq_length, data.truncate, data.train_on

    def encode(
        self,
        examples: Sequence[Example],
        places: Sequence[str],
        data: Data,
        tokenizer: Tokenizer,
        counts: Counts,
        evaluation: bool = False,
    ) -> Encoding:
        """Each example's tokens, None for one that is dropped; `places` say where each is from.

        For evaluation none is dropped for its length, and a reference that is cut is no reason to refuse one.
        """
        if tokenizer.chat_template is not None:
            if evaluation:  # of the last answer, which stays
                data = _cutting(data, "start")
            return encoding.encode_conversations(examples, places, data, tokenizer, counts, keep=evaluation)
        if evaluation:
            data = _cutting(data, data.truncate)
        return encoding.encode_texts(examples, places, data, tokenizer, counts)

    def prompts(
        self, conversations: Sequence[Sequence[Turn]], tokenizer: Tokenizer, places: Sequence[str]
    ) -> list[list[int]]:
        """What an answer to each conversation, which ends with the user, is generated from: as in training."""
        if tokenizer.chat_template is not None:
            return chat.prompts(conversations, places, tokenizer)
        texts = [encoding.source_text(turns, tokenizer, p) for turns, p in zip(conversations, places, strict=True)]
        return self.text_prompts(texts, tokenizer)

    def text_prompts(self, texts: Sequence[str], tokenizer: Tokenizer) -> list[list[int]]:
        """What is generated from for texts as they are."""
        return encoding.text_prompts(texts, tokenizer)

    def prompt_of(self, example: Encoded) -> list[int]:
        """What the last answer of an example would be generated from."""
        learnt = example.learnt
        assert learnt is not None
        begins = np.flatnonzero(learnt[1:] & ~learnt[:-1]) + 1
        return example.target[: begins[-1] if len(begins) else None].tolist()

    def smallest(self, data: Data) -> Shape:
        """The row of one example of the greatest length."""
        return Shape(0, 0, data.max_seq_length)

    def layout(
        self, sources: np.ndarray, targets: np.ndarray, data: Data, batch_size: int, row_cost: RowCost
    ) -> Layout:
        """The shape of rows and their number in a step, for examples of these lengths."""
        if data.packed_source_length:
            raise UserError(
                "config.data.packed_source_length has no effect on a causal model, whose rows hold "
                "data.max_seq_length tokens; leave it and packed_target_length out"
            )
        shape = self.smallest(data)
        if not data.packing:
            return Layout(shape, batch_size, 1.0, 0.0, float(targets.mean()) / shape.target)
        layout = packing.layout_of(self.pack(sources, targets, shape), sources, targets, batch_size, shape)
        return dataclasses.replace(layout, rows=packing.nearly(batch_size / layout.examples_per_row))

    def pack(self, sources: np.ndarray, targets: np.ndarray, shape: Shape) -> Rows:
        """Which examples of these lengths share rows of `shape`."""
        return packing.pack_sequences(targets, shape.target)

    def fit(self, examples: Sequence[Lengths], limit: Shape) -> Shape:
        """The shape of a batch of one example a row: its longest, rounded up to a bucket."""
        return Shape(0, 0, bucket(max((example.target_length for example in examples), default=1), limit.target))

    def batch(self, rows: Sequence[Sequence[Placed]], shape: Shape) -> CausalBatch:
        """A batch of these rows, each a list of examples; an empty list makes a row of padding."""
        tokens = np.full((len(rows), shape.target), self.pad, np.int32)
        targets, segments, positions = tokens.copy(), np.zeros_like(tokens), np.zeros_like(tokens)
        weights = np.zeros(tokens.shape, np.float32)
        prefix = np.zeros_like(tokens)
        for r, row in enumerate(rows):
            at = 0
            for segment, example in enumerate(row, 1):
                assert example.learnt is not None
                here, last = slice(at, at + len(example.target)), at + len(example.target) - 1
                tokens[r, here] = example.target
                targets[r, at:last] = example.target[1:]
                weights[r, at:last] = example.learnt[1:]
                segments[r, here] = segment
                positions[r, here] = np.arange(len(example.target))
                prefix[r, at : at + int(np.argmax(example.learnt))] = 1
                at = here.stop
        return CausalBatch(tokens, targets, weights, segments, positions, prefix if self.prefix_lm else None)


def _cutting(data: Data, side: str) -> Data:
    """The settings with truncation at one of the sides."""
    return dataclasses.replace(data, truncate="start" if side == "start" else "end")


Format = Seq2SeqFormat | CausalFormat
Batch = Seq2SeqBatch | CausalBatch


def pack_rows(format: Format, examples: Sequence[Encoded], layout: Layout, rows: int) -> list[Batch]:
    """All examples in batches of so many packed rows; the last one is filled up with empty rows.

    Examples of which nothing is learnt are left out, so there may be no batch at all.
    """
    examples = [example for example in examples if example.learnt is None or example.learnt[1:].any()]
    if not examples:
        return []
    sources = np.array([len(example.source) for example in examples])
    targets = np.array([len(example.target) for example in examples])
    packed = format.pack(sources, targets, layout.shape)
    placed: list[list[Placed]] = []
    for row in range(len(packed)):
        here = ((examples[i], block) for i, block in packed.row(row))
        placed.append([Placed(example.source, example.target, block, example.learnt) for example, block in here])
    placed += [[]] * (-len(placed) % rows)
    return [format.batch(placed[i : i + rows], layout.shape) for i in range(0, len(placed), rows)]
