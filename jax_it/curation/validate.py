"""`jax-it data validate`: every fault of every record, with its field and how to mend it.

A record with a fault is dropped, and its line in the list of dropped records has all of its faults; with `fix`, faulty
texts are mended first, by ftfy. With a tokenizer it is a fault what training would cut, drop or not know; white space
that the tokenizer changes is none, and is only counted.
"""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

from jax_it.curation.input import Chunk, Input
from jax_it.curation.settings import Validate
from jax_it.curation.stage import Dropped, Kept, Outcome, Plan, require
from jax_it.data import encoding, templates, tokenizer_files
from jax_it.data.encoding import Counts
from jax_it.data.records import Fields, InvalidRecord, Record
from jax_it.data.templates import Example
from jax_it.data.tokenized import shown_characters
from jax_it.data.tokenizer import Tokenizer

# Of each kind of fault in a text, what to do about it.
REMEDIES = {
    "control character": "remove it",
    "half of a surrogate pair": "restore the character, or remove it",
    "replacement character": "text was lost when the file was made: restore it, or remove the record",
    "mojibake": "decode the text as what it was encoded in",
}
UNREADABLE, NOT_RENDERED, EMPTY = "unreadable record", "record that the template refuses", "empty text"
TOO_LONG, UNKNOWN, LOST = "too many tokens", "unknown to the tokenizer", "lost by the tokenizer"

_ODD = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffd]")
_PLAIN_ASCII = bytes({9, 10, 13, *range(32, 127)})
# Mojibake has two letters or signs beyond ASCII in a row, from the alphabets of the old encodings. ftfy looks only at
# these and what is around them, which takes a tenth of the time.
_SUSPICIOUS = re.compile("[\x80-\u2e7f]{2,}")
AROUND = 4  # characters


class Fault(NamedTuple):
    field: str  # "prompt", "messages.2.content"; "" of the whole record
    kind: str  # in few words; records are counted by it
    message: str  # what is wrong, and how to mend it


def plan(settings: Validate, input: Input) -> Plan:
    require("ftfy", "finding mojibake")
    counts = None
    if settings.tokenizer:
        counts = Counts()
        for some in input.map(partial(_count, settings)):
            counts.add(some)
    return Plan(
        _Validate(settings),
        report={"tokenizer": dataclasses.asdict(counts)} if counts else {},
        text=_tokenizer_text(counts, settings) if counts else "",
        describe=_describe,
    )


class _Checked(NamedTuple):
    record: Record
    faults: list[Fault]
    changes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Validate:
    settings: Validate

    def __call__(self, chunk: Chunk) -> list[Outcome]:
        checked = [self._check(record, chunk.template) for record in chunk.records()]
        if self.settings.tokenizer:
            tokenizer = _tokenizer(self.settings.tokenizer)
            encoded = _encode([item.record for item in checked], chunk.template, tokenizer)
            for item, one in zip(checked, encoded, strict=True):
                if one is not None:
                    item.faults.extend(_of_tokens(one, tokenizer, self.settings.max_tokens))
        return [_outcome(item) for item in checked]

    def _check(self, record: Record, template: str) -> _Checked:
        found = faults(record, template)
        if not (found and self.settings.fix) or record.error:
            return _Checked(record, found)
        broken = {fault.field for fault in found if fault.kind in REMEDIES}
        record = record._replace(fields=_mended(record.fields, "", broken))
        left = faults(record, template)
        mended = {fault.kind for fault in found} - {fault.kind for fault in left}
        return _Checked(record, left, tuple(f"{kind} mended" for kind in sorted(mended)))


def _outcome(item: _Checked) -> Outcome:
    if not item.faults:
        return Kept(item.record.fields, item.changes)
    listed = [{"field": fault.field, "fault": fault.message} for fault in item.faults]
    return Dropped(item.faults[0].kind, {"faults": listed})


def faults(record: Record, template: str) -> list[Fault]:
    """Return all faults of a record."""
    if record.error:
        return [Fault("", UNREADABLE, _without(record.error, record.where))]
    found = [fault for field, text in _texts(record.fields) for fault in _of_text(field, text)]
    try:
        example = templates.render(record, template)
    except InvalidRecord as error:
        if not any(fault.kind == "half of a surrogate pair" for fault in found):  # which the template names again
            found.append(Fault("", NOT_RENDERED, _without(str(error), record.where)))
        return found
    for name, text in (("prompt", example.turns[-2].text), ("completion", example.completion)):
        if not text.strip():
            found.append(Fault("", EMPTY, f"the {name} is empty; fix or remove the record"))
    return found


def _without(message: str, where: str) -> str:
    return message.removeprefix(f"{where}: ")


def _texts(value: Any, field: str = "") -> Iterator[tuple[str, str]]:
    """Yield all texts of a record, with their fields: "messages.2.content"."""
    if isinstance(value, str):
        yield field, value
    elif isinstance(value, (dict, list)):
        items = value.items() if isinstance(value, dict) else enumerate(value, 1)
        for name, item in items:
            if isinstance(item, (str, dict, list)):
                yield from _texts(item, f"{field}.{name}" if field else str(name))


def _of_text(field: str, text: str) -> Iterator[Fault]:
    if text.isascii():
        if not text.encode().translate(None, _PLAIN_ASCII):
            return
    elif (piece := _broken_piece(text)) is not None:
        yield Fault(field, "mojibake", f"{piece!r} looks like text decoded wrongly; {REMEDIES['mojibake']}")
    seen = set()
    for match in _ODD.finditer(text):
        character = match[0]
        kind = "control character"
        if "\ud800" <= character <= "\udfff":
            kind = "half of a surrogate pair"
        elif character == "\ufffd":
            kind = "replacement character"
        if kind not in seen:
            seen.add(kind)
            place = f"U+{ord(character):04X} at character {match.start() + 1}"
            yield Fault(field, kind, f"{kind} {place}; {REMEDIES[kind]}")


def _broken_piece(text: str) -> str | None:
    for match in _SUSPICIOUS.finditer(text):
        piece = text[max(match.start() - AROUND, 0) : match.end() + AROUND]
        if _is_bad(piece):
            return piece
    return None


@lru_cache(maxsize=1 << 16)  # the same dashes and quotation marks come again and again
def _is_bad(piece: str) -> bool:
    from ftfy import badness

    return bool(badness.is_bad(piece))


def _mended(value: Any, field: str, broken: set[str]) -> Any:
    """Return a value whose broken fields are mended; others stay as they are."""
    if isinstance(value, str):
        return _fixed(value) if field in broken else value
    if isinstance(value, dict):
        return {name: _mended(item, f"{field}.{name}" if field else str(name), broken) for name, item in value.items()}
    if isinstance(value, list):
        return [_mended(item, f"{field}.{i}", broken) for i, item in enumerate(value, 1)]
    return value


def _fixed(text: str) -> str:
    """Return a text as ftfy mends it, without the changes of taste: quotation marks, full-width forms, ligatures."""
    import ftfy

    config = ftfy.TextFixerConfig(
        unescape_html=False, fix_latin_ligatures=False, fix_character_width=False, uncurl_quotes=False,
        fix_line_breaks=False, normalization=None, explain=False,
    )  # fmt: skip
    return _ODD.sub(lambda match: match[0] if match[0] == "\ufffd" else "", str(ftfy.fix_text(text, config)))


def _describe(dropped: Fields) -> list[str]:
    place = ", ".join(str(dropped[key]) if key == "file" else f"{key} {dropped[key]}" for key in list(dropped)[:2])
    found = dropped.get("faults") or [{"field": "", "fault": dropped.get("error", dropped["reason"])}]
    return [f"{place}: {fault['field']}{': ' if fault['field'] else ''}{fault['fault']}" for fault in found]


# What a tokenizer makes of the records.


@lru_cache(maxsize=1)
def _tokenizer(path: str) -> Tokenizer:
    return tokenizer_files.load(path)


class _Encoded(NamedTuple):
    example: Example
    prompt: list[int]
    completion: list[int]

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.completion) + 2  # special tokens


def _encode(found: Sequence[Record], template: str, tokenizer: Tokenizer) -> list[_Encoded | None]:
    """Return what the tokenizer makes of each record; None of one that cannot be rendered."""
    examples: list[Example | None] = []
    for record in found:
        try:
            examples.append(templates.render(record, template))
        except InvalidRecord:
            examples.append(None)
    rendered = [example for example in examples if example is not None]
    prompts = tokenizer.encode([example.prompt for example in rendered])
    encoded = map(_Encoded, rendered, prompts, encoding.encode_completions(rendered, tokenizer))
    return [None if example is None else next(encoded) for example in examples]


def _of_tokens(item: _Encoded, tokenizer: Tokenizer, max_tokens: int) -> Iterator[Fault]:
    """Yield what training would cut, drop or not know of an example."""
    for name, text, tokens in (
        ("prompt", item.example.prompt, item.prompt),
        ("completion", item.example.completion, item.completion),
    ):
        counts = Counts()
        counts.add_characters(tokenizer, [text])
        if tokenizer.unknown in tokens:
            which = shown_characters(counts.unknown) or "some of the words"
            yield Fault(name, UNKNOWN, f"the tokenizer does not know {which}; replace these, or use another tokenizer")
        if counts.vanished:
            yield Fault(name, LOST, f"the tokenizer drops {shown_characters(counts.vanished)}; replace or remove these")
    if item.example.completion.strip() and not item.completion:
        yield Fault("completion", EMPTY, "the tokenizer makes no token of it; fix or remove the record")
    if item.length > max_tokens:
        yield Fault("", TOO_LONG, f"{item.length} tokens are more than --max-tokens {max_tokens}; shorten the record")


def _count(settings: Validate, chunk: Chunk) -> Counts:
    counts, tokenizer = Counts(), _tokenizer(settings.tokenizer)
    for item in _encode(list(chunk.records()), chunk.template, tokenizer):
        if item is not None:
            counts.add_characters(tokenizer, [item.example.prompt, item.example.completion])
            counts.add_tokens(tokenizer, item.prompt, item.completion, added=1)
            counts.empty_completion += not item.completion
            counts.too_long += item.length > settings.max_tokens
    return counts


def _tokenizer_text(counts: Counts, settings: Validate) -> str:
    tokens = max(counts.source_tokens + counts.target_tokens, 1)
    unknown = f": {shown_characters(counts.unknown)}" if counts.unknown else ""
    return "\n".join(
        [
            f"tokenizer {settings.tokenizer}: {tokens} tokens, {counts.target_tokens / tokens:.1%} of completions",
            f"  too long {counts.too_long} records of more than {settings.max_tokens} tokens",
            f"  empty    {counts.empty_completion} completions without a token",
            f"  unknown  {counts.unknown_tokens} tokens{unknown}",
            f"  lost     {shown_characters(counts.lost) or 'no character'}",
        ]
    )
