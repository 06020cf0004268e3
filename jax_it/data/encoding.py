"""From turns to token ids, where both kinds of model do the same: an encoded example, counts of what was lost."""

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from jax_it.config import Data
from jax_it.data import chat
from jax_it.data.records import InvalidRecord
from jax_it.data.templates import Example, Turn
from jax_it.data.tokenizer import Tokenizer
from jax_it.errors import UserError, shorten

MAX_REASONS = 20  # of those why records are invalid, how many are kept


@dataclass
class Counts:
    """What became of a source's records under one template. Tokens are counted before anything is cut.

    For a causal model, target tokens are those that are trained on and source tokens all others.
    """

    examples: int = 0
    invalid: int = 0  # dropped: they cannot be read or rendered
    reasons: list[str] = field(default_factory=list)  # why, of the first of them
    empty_completion: int = 0  # dropped: nothing to train on
    skipped: int = 0  # Jinja text for other records gives them no text at all; no few-shot example fits before it
    too_long: int = 0  # dropped, with truncate="drop"; of conversations, those whose every exchange is too long
    truncated: int = 0  # on either side
    truncated_source: int = 0
    truncated_target: int = 0
    truncated_turns: int = 0  # conversations that lost whole turns
    source_tokens: int = 0
    target_tokens: int = 0
    unknown_tokens: int = 0
    unknown: dict[str, int] = field(default_factory=dict)  # the characters that became unknown tokens
    characters: int = 0
    lost: dict[str, int] = field(default_factory=dict)  # of them, those that the tokenizer drops or turns into a space

    @property
    def cut_prompts(self) -> int:
        return self.truncated_source + self.truncated_turns

    @property
    def vanished(self) -> dict[str, int]:
        """The lost characters other than white space, which leaves something behind: a space, or the end of a word."""
        return {character: number for character, number in self.lost.items() if not character.isspace()}

    @property
    def dropped(self) -> int:
        return self.invalid + self.empty_completion + self.too_long

    @property
    def kept(self) -> int:
        return self.examples - self.dropped - self.skipped

    def add(self, other: "Counts") -> None:
        """Add another part of the source to these counts."""
        for name in (item.name for item in dataclasses.fields(self)):
            mine, theirs = getattr(self, name), getattr(other, name)
            if isinstance(mine, dict):
                for key, number in theirs.items():
                    mine[key] = mine.get(key, 0) + number
            else:
                setattr(self, name, (mine + theirs)[:MAX_REASONS] if isinstance(mine, list) else mine + theirs)

    def add_invalid(self, error: InvalidRecord) -> None:
        """Count a record that cannot be read or rendered."""
        self.add(Counts(examples=1, invalid=1, reasons=[str(error)]))

    def check_invalid(self, name: str, data: Data) -> None:
        """Raise UserError if the data set has invalid records that the config does not drop."""
        if self.invalid and data.on_invalid == "error":
            raise UserError(
                f"data set {name}: {self.invalid} of {self.examples} records are invalid: "
                f"{self.shown_reasons(most=3)}; fix them, or leave them out with config.data.on_invalid=drop"
            )

    def shown_reasons(self, most: int) -> str:
        """Return why records are invalid, with their files and lines, for at most `most` of them."""
        shown = self.reasons[:most]
        more = [f"{self.invalid - len(shown)} more"] if self.invalid > len(shown) else []
        return "; ".join([shorten(reason, 350) for reason in shown] + more)

    def add_cut(self, source: bool, target: bool) -> None:
        """Count an example that is cut on these sides."""
        self.truncated += 1
        self.truncated_source += source
        self.truncated_target += target

    def add_tokens(self, tokenizer: Tokenizer, source: list[int], target: list[int], added: int) -> None:
        """Count an example of these token ids, an end token and `added` special tokens of the source."""
        self.examples += 1
        self.source_tokens += len(source) + added
        self.target_tokens += len(target) + 1
        if tokenizer.unknown is not None:
            self.unknown_tokens += source.count(tokenizer.unknown) + target.count(tokenizer.unknown)

    def add_characters(self, tokenizer: Tokenizer, texts: Sequence[str]) -> None:
        """Count the characters of texts, and those among them that the tokenizer loses or does not know."""
        text = "".join(texts)
        self.characters += len(text)
        present = set(text)
        for counted, found in ((self.lost, tokenizer.lost(present)), (self.unknown, tokenizer.unknown_of(present))):
            singles = re.escape("".join(sorted(found - {"  "})))
            numbers = Counter(re.findall(f"[{singles}]", text) if singles else ())
            if "  " in found:
                numbers["  "] = sum(len(_REPEATED.findall(item)) for item in texts)
            for character in sorted(found):
                if numbers[character]:
                    counted[character] = counted.get(character, 0) + numbers[character]


_REPEATED = re.compile("(?<= ) ")


def check_plain(examples: Iterable[Example], locations: Iterable[str], tokenizer: Tokenizer) -> None:
    """Refuse tools, tool calls and reasoning, which only a chat template can write."""
    for item, where in zip(examples, locations, strict=True):
        if not item.is_plain:
            raise UserError(
                f"{where}: a conversation with tools, tool calls or reasoning needs a chat template, which "
                f"{tokenizer.name} lacks; set config.model.chat_template"
            )


def encode_completions(examples: Sequence[Example], tokenizer: Tokenizer) -> list[list[int]]:
    """Encode each completion; one of white space alone has no token, whatever the tokenizer has for it."""
    return tokenizer.encode([item.completion.strip() and item.completion for item in examples])


def prompt_texts(conversations: Iterable[Sequence[Turn]], tokenizer: Tokenizer, locations: Sequence[str]) -> list[str]:
    """Return each conversation, which ends with the user, as one text: by the chat template, if there is one."""
    if tokenizer.chat_template is not None:
        each = zip(conversations, locations, strict=True)
        return [chat.prompt_text(turns, tokenizer, where) for turns, where in each]
    return ["\n\n".join(turn.text for turn in turns) for turns in conversations]


def text_prompts(texts: Sequence[str], tokenizer: Tokenizer) -> list[list[int]]:
    """Return the ids that a causal model without a chat template starts from."""
    start = [] if tokenizer.start is None else [tokenizer.start]
    return [[*start, *tokens] for tokens in tokenizer.encode(texts)]


def cut(tokens: list[int], length: int, side: str) -> list[int]:
    """Return at most `length` tokens; "start" cuts at the start, anything else at the end."""
    return tokens[max(len(tokens) - length, 0) :] if side == "start" else tokens[:length]


def for_evaluation(data: Data, side: str) -> Data:
    """Return the settings with truncation at one side: of an evaluation no example is dropped for its length."""
    return dataclasses.replace(data, truncate="start" if side == "start" else "end")
