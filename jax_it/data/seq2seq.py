"""Examples of an encoder-decoder: turns to source and target token ids, and rows of these to batches."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np

from jax_it.config import Data
from jax_it.data import packing
from jax_it.data.encoded import Encoded
from jax_it.data.encoding import Counts, check_plain, cut, encode_completions, for_evaluation, prompt_texts
from jax_it.data.packing import Layout, RowCost, Rows, Shape, bucket
from jax_it.data.templates import Example, Turn
from jax_it.data.tokenizer import Tokenizer
from jax_it.errors import UserError

MULTIPLE = 64  # of which the lengths of rows are that are shorter than the settings allow


class Seq2SeqBatch(NamedTuple):
    """Rows of an encoder-decoder. Segment 0 is padding; the letters are those of `models/config.py`.

    A row holds one example, or several with segments 1, 2, …: G blocks of S source positions beside T
    target positions. Arrays are int32, weights float32.
    """

    source_BGS: np.ndarray
    source_segments_BGS: np.ndarray
    source_positions_BGS: np.ndarray  # within the segment
    tokens_BT: np.ndarray  # the targets, shifted right within each segment
    targets_BT: np.ndarray
    weights_BT: np.ndarray  # 1 where the loss counts
    segments_BT: np.ndarray
    positions_BT: np.ndarray


@dataclass(frozen=True)
class Seq2SeqFormat:
    """How an encoder-decoder sees examples; `CausalFormat` has the same methods."""

    start: int  # the decoder's first token
    pad: int
    length_field: ClassVar[str] = "max_source_length"  # the setting that bounds a prompt

    def key(self, data: Data) -> tuple[object, ...]:
        """Return everything that decides what `encode` gives, besides the tokenizer."""
        return "seq2seq", data.max_source_length, data.max_target_length, data.truncate

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

        A side that is cut keeps its special tokens. For evaluation none is dropped or refused for its length.
        Raises InvalidRecord for an example that the chat template refuses.
        """
        if evaluation:
            data = for_evaluation(data, data.truncate)
        if tokenizer.chat_template is None:
            check_plain(examples, locations, tokenizer)
        for item, where in zip(examples, locations, strict=True):
            if item.turns[-1].tool_calls or item.turns[-1].reasoning:
                raise UserError(
                    f"{where}: an encoder-decoder is trained on texts, and the last turn has reasoning or tool calls; "
                    "write them into its content"
                )
        sources = prompt_texts((item.turns[:-1] for item in examples), tokenizer, locations)
        prompts, completions = tokenizer.encode(sources), encode_completions(examples, tokenizer)
        counts.add_characters(tokenizer, [*sources, *(item.completion for item in examples)])
        for prompt, completion, where in zip(prompts, completions, locations, strict=True):
            counts.add_tokens(tokenizer, prompt, completion, added=1)
            if not completion:
                counts.empty_completion += 1
                yield None
                continue
            too_long = len(prompt) >= data.max_source_length, len(completion) >= data.max_target_length
            if any(too_long):
                if data.truncate == "error":
                    raise UserError(
                        f"{where}: {len(prompt) + 1} source and {len(completion) + 1} target tokens exceed the limits "
                        f"of {data.max_source_length} and {data.max_target_length}; raise "
                        "config.data.max_source_length and max_target_length, or choose another config.data.truncate"
                    )
                if data.truncate == "drop":
                    counts.too_long += 1
                    yield None
                    continue
                counts.add_cut(*too_long)
            prompt = cut(prompt, data.max_source_length - 1, data.truncate)
            yield Encoded(
                np.array(_with_special_token(prompt, tokenizer), np.int32),
                np.array([*completion[: data.max_target_length - 1], tokenizer.end], np.int32),
            )

    def prompts(
        self, conversations: Sequence[Sequence[Turn]], tokenizer: Tokenizer, locations: Sequence[str]
    ) -> list[list[int]]:
        """Return the ids that an answer to each conversation, which ends with the user, is generated from."""
        return self.text_prompts(prompt_texts(conversations, tokenizer, locations), tokenizer)

    def text_prompts(self, texts: Sequence[str], tokenizer: Tokenizer) -> list[list[int]]:
        """Return the ids that are generated from for texts as they are."""
        return [_with_special_token(tokens, tokenizer) for tokens in tokenizer.encode(texts)]

    def prompt_of(self, example: Encoded) -> list[int]:
        """Return the ids that an example's last answer would be generated from."""
        return example.source.tolist()

    def smallest(self, data: Data) -> Shape:
        """Return the row of one example of the greatest length."""
        return Shape(1, data.max_source_length, data.max_target_length)

    def layout(
        self, sources: np.ndarray, targets: np.ndarray, longest: tuple[int, int], data: Data, batch_size: int,
        row_cost: RowCost,
    ) -> Layout:  # fmt: skip
        """Return the shape of rows and their number in a step, for examples of these lengths.

        `longest` has the longest source and the longest target of all examples.
        """
        smallest = self.smallest(data)
        if not data.packing:
            fills = float(sources.mean()) / smallest.source, float(targets.mean()) / smallest.target
            return Layout(smallest, batch_size, 1.0, *fills)
        given = None
        if data.packed_source_length:
            blocks = data.packed_source_length // data.max_source_length
            given = Shape(blocks, data.max_source_length, data.packed_target_length)
        smallest = Shape(1, *map(_shortened, smallest[1:], longest))
        return packing.choose_layout(sources, targets, batch_size, row_cost, given, smallest)

    def pack(self, sources: np.ndarray, targets: np.ndarray, shape: Shape) -> Rows:
        """Return which examples of these lengths share rows of `shape`."""
        return packing.pack(sources, targets, shape)

    def fit(self, sources: np.ndarray, targets: np.ndarray, limit: Shape) -> Shape:
        """Return the shape of a batch of one example a row: its longest, rounded up to a bucket."""
        source, target = sources.max(initial=1), targets.max(initial=1)
        return Shape(1, bucket(int(source), limit.source), bucket(int(target), limit.target))

    def batch(self, rows: Sequence[Sequence[Encoded]], shape: Shape) -> Seq2SeqBatch:
        """Return a batch of these rows, each a list of examples; an empty list makes a row of padding."""
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


def _shortened(limit: int, longest: int) -> int:
    """Return a limit of lengths halved as often as `longest` allows: devices that can share the limit can share it."""
    while limit % (2 * MULTIPLE) == 0 and longest <= limit // 2:
        limit //= 2
    return limit


def _with_special_token(tokens: Sequence[int], tokenizer: Tokenizer) -> list[int]:
    """Return a source with the special token that its tokenizer adds: T5's an end, T5Gemma's a beginning."""
    if tokenizer.start is None:
        return [*tokens, tokenizer.end]
    return [tokenizer.start, *(tokens[1:] if tokens[:1] == [tokenizer.start] else tokens)]
