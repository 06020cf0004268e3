"""From rendered examples to token ids, cut to their lengths as the config says, and counted."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from jax_it.config import Data
from jax_it.data import chat
from jax_it.data.batches import Encoded
from jax_it.data.templates import Example, Turn
from jax_it.data.tokenizer import Tokenizer
from jax_it.errors import UserError


@dataclass
class Counts:
    """What became of a source's examples under one template. Tokens are counted before anything is cut.

    Of a causal model, source tokens are those that are given and target tokens those that are learnt.
    """

    examples: int = 0
    empty_completion: int = 0  # dropped: nothing to learn
    too_long: int = 0  # dropped, with truncate="drop"; of conversations, those whose every exchange is too long
    truncated: int = 0  # on either side
    truncated_source: int = 0
    truncated_target: int = 0
    truncated_turns: int = 0  # conversations that lost whole turns
    source_tokens: int = 0
    target_tokens: int = 0
    unknown_tokens: int = 0
    characters: int = 0
    lost: dict[str, int] = field(default_factory=dict)  # of them, what the tokenizer drops or makes a space of

    @property
    def cut_prompts(self) -> int:
        return self.truncated_source + self.truncated_turns

    @property
    def vanished(self) -> dict[str, int]:
        """The lost characters that are no blanks, which leave something behind: a space, or the end of a word."""
        return {character: number for character, number in self.lost.items() if not character.isspace()}

    @property
    def dropped(self) -> int:
        return self.empty_completion + self.too_long

    @property
    def kept(self) -> int:
        return self.examples - self.dropped


Encoding = Iterator[Encoded | None]
"""Of every example in turn, None for one that is dropped; the counts grow as it goes."""


def encode_pairs(
    examples: Sequence[Example], places: Sequence[str], data: Data, tokenizer: Tokenizer, counts: Counts
) -> Encoding:
    """Source and target of an encoder-decoder, both with their marks, which a cut side keeps."""
    sources = [source_text(item.turns[:-1], tokenizer, where) for item, where in _zip(examples, places)]
    prompts, completions = tokenizer.encode(sources), _completions(examples, tokenizer)
    _count_lost(counts, tokenizer, [*sources, *(item.completion for item in examples)])
    for prompt, completion, where in zip(prompts, completions, places, strict=True):
        counts.examples += 1
        counts.source_tokens += len(prompt) + 1
        counts.target_tokens += len(completion) + 1
        _count_unknown(counts, tokenizer, prompt, completion)
        if not completion:
            counts.empty_completion += 1
            yield None
            continue
        too_long = len(prompt) >= data.max_source_length, len(completion) >= data.max_target_length
        if any(too_long):
            if data.truncate == "error":
                raise UserError(
                    f"{where}: {len(prompt) + 1} source and {len(completion) + 1} target tokens do not fit into "
                    f"{data.max_source_length} and {data.max_target_length}; raise these, or choose another "
                    "config.data.truncate"
                )
            if data.truncate == "drop":
                counts.too_long += 1
                yield None
                continue
            _count_cut(counts, *too_long)
        prompt = _cut(prompt, data.max_source_length - 1, data.truncate)
        yield Encoded(
            np.array(marked_source(prompt, tokenizer), np.int32),
            np.array([*completion[: data.max_target_length - 1], tokenizer.end], np.int32),
        )


def encode_texts(
    examples: Sequence[Example], places: Sequence[str], data: Data, tokenizer: Tokenizer, counts: Counts
) -> Encoding:
    """Prompt, completion and end mark in one sequence; the last two are learnt.

    Each is tokenized by itself, so that the prompt is what generation starts from. Where they are too long
    the prompt is cut first, to a quarter of the length at the least, and then the completion, without an end mark.
    """
    for item, where in _zip(examples, places):
        if sum(turn.role == "assistant" for turn in item.turns) > 1:
            raise UserError(
                f"{where}: a conversation of several turns needs a chat template, which {tokenizer.name} lacks; "
                "set config.model.chat_template, for example to 'default'"
            )
    prompts = text_prompts([item.prompt for item in examples], tokenizer)
    completions = _completions(examples, tokenizer)
    _count_lost(counts, tokenizer, [text for item in examples for text in (item.prompt, item.completion)])
    length = data.max_seq_length
    for prompt, completion, where in zip(prompts, completions, places, strict=True):
        counts.examples += 1
        counts.source_tokens += len(prompt)
        counts.target_tokens += len(completion) + 1
        _count_unknown(counts, tokenizer, prompt, completion)
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
            room = max(length - len(answer), min(len(prompt), max(length // 4, 1)))
            _count_cut(counts, len(prompt) > room, len(answer) > length - min(len(prompt), room))
            marks = prompt[:1] if prompt[0:1] == [tokenizer.start] else []
            prompt = [*marks, *_cut(prompt[len(marks) :], room - len(marks), data.truncate)]
            answer = answer[: length - len(prompt)]
        yield _sequence(np.array(prompt + answer, np.int32), np.arange(len(prompt + answer)) >= len(prompt))


def encode_conversations(
    examples: Sequence[Example],
    places: Sequence[str],
    data: Data,
    tokenizer: Tokenizer,
    counts: Counts,
    keep: bool = False,
) -> Encoding:
    """Each conversation in one sequence, by the tokenizer's chat template; what the assistant says is learnt.

    One that is too long loses whole exchanges, from the end or the start; the system turn stays. Where not
    even one exchange fits it is dropped or, with `keep`, cut within the last.
    """
    full = [i for i, item in enumerate(examples) if item.completion.strip()]
    turns, where = [examples[i].turns for i in full], [places[i] for i in full]
    encoded = dict(zip(full, chat.encode(turns, where, tokenizer, data.train_on), strict=True))
    _count_lost(counts, tokenizer, [turn.text for item in examples for turn in item.turns])
    for i, item in enumerate(examples):
        counts.examples += 1
        if i not in encoded:
            counts.empty_completion += 1
            yield None
            continue
        tokens, learnt = encoded[i]
        counts.source_tokens += int((~learnt).sum())
        counts.target_tokens += int(learnt.sum())
        _count_unknown(counts, tokenizer, tokens.tolist())
        if len(tokens) <= data.max_seq_length:
            yield _sequence(tokens, learnt)
            continue
        if data.truncate == "error":
            raise _too_long(places[i], len(tokens), data)
        shorter = None
        if data.truncate != "drop":
            shorter = _shortened(item.turns, places[i], data, tokenizer)
        if shorter is not None:
            counts.truncated += 1
            counts.truncated_turns += 1
        elif keep:
            shorter, turns_lost, prompt_cut = _clipped(item.turns, places[i], data, tokenizer)
            counts.truncated_turns += turns_lost
            _count_cut(counts, prompt_cut, not prompt_cut)
        else:
            counts.too_long += 1
        yield None if shorter is None else _sequence(*shorter)


def marked_source(tokens: Sequence[int], tokenizer: Tokenizer) -> list[int]:
    """A source as its tokenizer marks a text: T5's has an end, T5Gemma's a beginning."""
    if tokenizer.start is None:
        return [*tokens, tokenizer.end]
    return [tokenizer.start, *(tokens[1:] if tokens[:1] == [tokenizer.start] else tokens)]


def source_text(turns: Sequence[Turn], tokenizer: Tokenizer, where: str) -> str:
    """The prompt of an encoder-decoder: by its chat template, if it has one."""
    if tokenizer.chat_template is not None:
        return chat.prompt_text(turns, tokenizer, where)
    return "\n\n".join(turn.text for turn in turns)


def text_prompts(texts: Sequence[str], tokenizer: Tokenizer) -> list[list[int]]:
    """What a causal model without a chat template starts from."""
    marks = [] if tokenizer.start is None else [tokenizer.start]
    return [[*marks, *tokens] for tokens in tokenizer.encode(texts)]


def _shortened(turns: Sequence[Turn], where: str, data: Data, tokenizer: Tokenizer) -> chat.Conversation | None:
    """The conversation with as many exchanges as fit; None where not even one does."""
    first = 1 if turns[0].role == "system" else 0
    for lost in range(2, len(turns) - first, 2):
        rest = turns[first + lost :] if data.truncate == "start" else turns[first : len(turns) - lost]
        (found,) = chat.encode([(*turns[:first], *rest)], [where], tokenizer, data.train_on)
        if len(found.tokens) <= data.max_seq_length:
            return found
    return None


def _clipped(
    turns: Sequence[Turn], where: str, data: Data, tokenizer: Tokenizer
) -> tuple[chat.Conversation, bool, bool]:
    """The last exchange, without what is too much of the answer, or the end of its prompt alone.

    Also whether turns before it were lost, and whether its prompt was cut.
    """
    first = 1 if turns[0].role == "system" else 0
    (found,) = chat.encode([(*turns[:first], *turns[-2:])], [where], tokenizer, "last")
    start = max(int(np.argmax(found.learnt)) - data.max_seq_length, 0)
    span = slice(start, start + data.max_seq_length)
    return chat.Conversation(found.tokens[span], found.learnt[span]), len(turns) > first + 2, start > 0


def _sequence(tokens: np.ndarray, learnt: np.ndarray) -> Encoded:
    """A causal example. Nothing comes before the first token, which cannot be learnt."""
    learnt = learnt.copy()
    learnt[:1] = False
    return Encoded(np.zeros(0, np.int32), tokens, learnt)


def _completions(examples: Sequence[Example], tokenizer: Tokenizer) -> list[list[int]]:
    # Blanks alone are no completion, also where the tokenizer has tokens for them.
    return tokenizer.encode([item.completion.strip() and item.completion for item in examples])


def _zip(examples: Sequence[Example], places: Sequence[str]) -> Iterator[tuple[Example, str]]:
    return zip(examples, places, strict=True)


def _cut(tokens: list[int], room: int, side: str) -> list[int]:
    """The tokens without what is too much at the config's side."""
    return tokens[max(len(tokens) - room, 0) :] if side == "start" else tokens[:room]


def _count_cut(counts: Counts, source: bool, target: bool) -> None:
    counts.truncated += 1
    counts.truncated_source += source
    counts.truncated_target += target


def _count_unknown(counts: Counts, tokenizer: Tokenizer, *parts: list[int]) -> None:
    if tokenizer.unknown is not None:
        counts.unknown_tokens += sum(part.count(tokenizer.unknown) for part in parts)


_REPEATED = re.compile("(?<= ) ")


def _count_lost(counts: Counts, tokenizer: Tokenizer, texts: Sequence[str]) -> None:
    text = "".join(texts)
    counts.characters += len(text)
    for character in sorted(tokenizer.lost(set(text))):
        number = text.count(character) if character != "  " else sum(len(_REPEATED.findall(item)) for item in texts)
        if number:
            counts.lost[character] = counts.lost.get(character, 0) + number


def _too_long(where: str, number: int, data: Data) -> UserError:
    return UserError(
        f"{where}: {number} tokens do not fit {data.max_seq_length}; raise config.data.max_seq_length, or choose "
        "another config.data.truncate"
    )
