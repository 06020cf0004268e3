"""Conversations as token ids with a loss mask, by the checkpoint's chat template.

A chat template is a program that may change the texts it is given, and most templates have no `{% generation %}` tags.
So the spans of the assistant's texts are proven for every conversation: it is rendered again with each of these texts
between two characters that occur nowhere else. If that rendering without them equals the plain one, the characters
have shown the spans; if not, the template changes the text, and the conversation is refused.
"""

import datetime
import functools
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import jinja2.ext
import jinja2.meta
import numpy as np

from jax_it.data.encoded import Encoded
from jax_it.data.jinja import ImmutableEnvironment
from jax_it.data.jinja_text import random_name
from jax_it.data.records import InvalidRecord
from jax_it.data.templates import Turn
from jax_it.data.tokenizer import Tokenizer
from jax_it.errors import UserError, shorten, shown
from jax_it.files import read_text

_PLACEHOLDER = "Hello"  # an answer, where there is none yet
_PROBE = (Turn("user", "Hi"), Turn("assistant", _PLACEHOLDER), Turn("user", "Bye"), Turn("assistant", _PLACEHOLDER))
_DATE = datetime.date(2024, 7, 26)  # what templates take for today: data must not change overnight

# For base models: words that every vocabulary has, and the end token that they already know. A line break before the
# text separates the prompt's last token from the answer's first.
DEFAULT = (
    "{% for message in messages %}{{ '' if loop.first else '\\n\\n' }}"
    "{% if message['role'] == 'system' %}{{ message['content'] | trim }}"
    "{% elif message['role'] == 'user' %}{{ 'User:\\n' + message['content'] | trim }}"
    "{% else %}{{ 'Assistant:\\n' + message['content'] | trim + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n\\nAssistant:\\n' }}{% endif %}"
)


class _Markup(NamedTuple):
    """What a chat template puts around every answer."""

    end: str  # the token that ends the assistant's turn
    space: bool  # a space before the answer belongs to the answer's first token


class _Rendered(NamedTuple):
    text: str
    spans: list[tuple[int, int]]  # of the assistant's turns, with what ends each of them


def with_chat_template(tokenizer: Tokenizer, setting: str) -> Tokenizer:
    """Return the tokenizer with the chat template of `config.model.chat_template`, which `save` writes with it.

    "" keeps its own, "none" removes it, "default" sets one for base models; anything else is the name of a Jinja file.
    Raises UserError for a file that cannot be read, and for a template that does not mark the end of answers.
    """
    template: str | None
    if not setting:
        return tokenizer
    if setting == "none":
        template = None
    elif setting == "default":
        template = ("{{ bos_token }}" if tokenizer.start is not None else "") + DEFAULT
    else:
        try:
            template = read_text(Path(setting).expanduser())
        except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: ~ of an unknown user
            reason = getattr(error, "strerror", None) or error
            raise UserError(
                f"config.model.chat_template: {setting!r} is neither 'default', 'none' nor a file to read: {reason}"
            ) from None
    changed = tokenizer.with_chat_template(template, setting)
    if template is not None:
        try:
            _markup(changed)
        except UserError as error:
            raise UserError(f"config.model.chat_template: {error}") from None
    return changed


def encode(
    conversations: Sequence[Sequence[Turn]], locations: Sequence[str], tokenizer: Tokenizer, train_on: str
) -> list[Encoded]:
    """Return each conversation, which ends with the assistant, as the chat template renders it.

    `train_on` is "all" or "last": which of the assistant's turns are trained on. `locations` say where each is from.
    Raises InvalidRecord, with its file and line, for a conversation that the template refuses, in which it leaves out a
    turn or changes an answer, or in which a token spans the beginning of an answer.
    """
    if not conversations:
        return []
    rendered = [
        _render(turns, tokenizer, where, train_on) for turns, where in zip(conversations, locations, strict=True)
    ]
    found = tokenizer.encode_with_offsets([item.text for item in rendered])
    made = []
    for i, (item, where) in enumerate(zip(rendered, locations, strict=True)):
        masked = _mask(item, *found[i], tokenizer) if found else None
        tokens, mask = masked or _piecewise(item, tokenizer, where)
        made.append(_started_once(tokens, mask, tokenizer))
    return made


def prompts(conversations: Sequence[Sequence[Turn]], locations: Sequence[str], tokenizer: Tokenizer) -> list[list[int]]:
    """Return the ids that an answer to each conversation, which ends with the user, is generated from.

    They are those that precede the answer's first token in training.
    """
    answered = [(*turns, Turn("assistant", _PLACEHOLDER)) for turns in conversations]
    encoded = encode(answered, locations, tokenizer, "last")
    return [tokens[: int(np.argmax(mask))].tolist() for _, tokens, _, mask in encoded if mask is not None]


def ends(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the ids that end an answer: the end token and, with a chat template, its end-of-turn token."""
    if tokenizer.chat_template is None:
        return (tokenizer.end,)
    return tuple(sorted({tokenizer.end, *tokenizer.encode([_markup(tokenizer).end])[0]}))


def generation_prompt(tokenizer: Tokenizer) -> tuple[str, str] | None:
    """Return the prompt in training and by the template's own generation prompt, where the two differ."""
    question = _PROBE[:1]
    (ours,) = prompts([question], ["a probe"], tokenizer)
    (theirs,) = tokenizer.encode([_apply(question, tokenizer, "a probe", generation=True)])
    return None if ours == theirs else (tokenizer.text(ours), tokenizer.text(theirs))


def prompt_text(turns: Sequence[Turn], tokenizer: Tokenizer, where: str) -> str:
    """Render turns that end with the user by the chat template, with its generation prompt."""
    return _apply(turns, tokenizer, where, generation=True)


def training_prompt_text(turns: Sequence[Turn], tokenizer: Tokenizer, where: str) -> str:
    """Return the text before an answer to turns that end with the user, in training of a causal model.

    `prompts` gives its tokens.
    """
    rendered = _render((*turns, Turn("assistant", _PLACEHOLDER)), tokenizer, where, "last")
    return rendered.text[: rendered.spans[-1][0]]


# Rendering


def _apply(turns: Sequence[Turn], tokenizer: Tokenizer, where: str, generation: bool = False) -> str:
    return render([{"role": turn.role, "content": turn.text} for turn in turns], tokenizer, where, generation)


def render(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    where: str,
    generation: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """Render messages as Transformers' `apply_chat_template` does, on a fixed day and with bounds on time and size.

    `variables` are further ones that the template reads, such as `enable_thinking`. Raises InvalidRecord for messages
    that the template refuses.
    """
    if not (tokenizer.chat_template or "").strip():
        raise UserError(f"{where}: {_of(tokenizer)} is empty; set config.model.chat_template to 'default' or a file")
    if name := random_name(tokenizer.chat_template or ""):
        raise UserError(
            f"{_of(tokenizer)} uses {name!r}, whose result changes on every call; set another "
            "config.model.chat_template"
        )
    try:
        return _compiled(tokenizer.chat_template or "").render(
            messages=[dict(message) for message in messages],
            **{**tokenizer.backend.special_tokens_map, **(variables or {})},
            **{"tools": tools, "documents": None, "add_generation_prompt": generation},
        )
    except Exception as error:  # a template may run any expression on any text
        reason = shorten(str(error), 300) or type(error).__name__
        raise InvalidRecord(f"{where}: {_of(tokenizer)} does not take this conversation: {reason}") from None


def _of(tokenizer: Tokenizer) -> str:
    return f"the chat template of {tokenizer.template_name}"


@functools.lru_cache(maxsize=8)
def variables_of(template: str) -> frozenset[str]:
    """Return the names of the variables that a chat template reads. Raises jinja2.TemplateError."""
    return frozenset(jinja2.meta.find_undeclared_variables(_environment().parse(template)))


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> jinja2.Template:
    return _environment().from_string(template)


def _environment() -> ImmutableEnvironment:
    """Make an environment like that of Transformers for chat templates."""
    environment = ImmutableEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.add_filter("tojson", _to_json)
    environment.globals |= {"raise_exception": _raise, "strftime_now": _strftime_now}
    return environment


class _Generation(jinja2.ext.Extension):
    """The tag around the assistant's text, whose body is rendered as if the tag were not there."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return [jinja2.nodes.Scope(body).set_lineno(line)]


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Return JSON without Jinja's HTML escapes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    if len(format) > 100 or re.search(r"\d{3}", format):  # a width, which could be any
        raise jinja2.TemplateError("strftime_now takes a short format without widths")
    return _DATE.strftime(format)


def _render(turns: Sequence[Turn], tokenizer: Tokenizer, where: str, train_on: str) -> _Rendered:
    """Render a conversation and prove the spans of its answers, each with the end of its turn."""
    markup = _markup(tokenizer)
    text = _apply(turns, tokenizer, where)
    for turn in turns:
        if turn.role != "assistant" and turn.text.strip() not in text:
            raise InvalidRecord(
                f"{where}: {_of(tokenizer)} leaves out or changes the {turn.role} turn {shown(turn.text, 40)}"
                + ("; put its text into the first user turn" if turn.role == "system" else "")
            )
    answers = [i for i, turn in enumerate(turns) if turn.role == "assistant"]
    if train_on == "last":
        answers = answers[-1:]
    for i in answers:
        if markup.end in turns[i].text:
            raise InvalidRecord(
                f"{where}: the assistant's turn {shown(turns[i].text, 40)} contains {markup.end!r}, which would end it"
            )
    found_spans = _answer_spans(turns, answers, text, tokenizer, where)
    spans = []
    for i, (start, stop) in zip(answers, found_spans, strict=True):
        blank = len(text[stop:]) - len(text[stop:].lstrip())
        if not text.startswith(markup.end, stop + blank):
            raise InvalidRecord(
                f"{where}: {_of(tokenizer)} does not end the assistant's turn {shown(turns[i].text, 40)} with "
                f"{markup.end!r}: the model would not learn to stop"
            )
        space = markup.space and text[:start].endswith(" ")
        spans.append((start - space, stop + blank + len(markup.end)))
    return _Rendered(text, spans)


def _answer_spans(
    turns: Sequence[Turn], answers: Sequence[int], text: str, tokenizer: Tokenizer, where: str
) -> list[tuple[int, int]]:
    """Return the span of each answer in the rendering `text`, with as much of its white space as the template keeps.

    The two characters are put inside an answer's own white space, so that a template that strips it does so here too.
    """
    opening, closing = _unused(turns, text)
    marked, bare = list(turns), list(turns)
    blanks = {}
    for i in answers:
        said, core = turns[i].text, turns[i].text.strip()
        blanks[i] = said[: len(said) - len(said.lstrip())], said[len(said.rstrip()) :]
        bare[i] = Turn("assistant", f"{opening}{core}{closing}")
        marked[i] = Turn("assistant", f"{blanks[i][0]}{bare[i].text}{blanks[i][1]}")
    rendered = _apply(marked, tokenizer, where)
    if rendered.replace(opening, "").replace(closing, "") == text:
        pattern = re.compile(f"(\\s*){opening}([^{opening}{closing}]*){closing}(\\s*)")
        found = list(pattern.finditer(rendered))
        # White space that is there when the answers have none is the template's.
        of_template = found if marked == bare else list(pattern.finditer(_apply(bare, tokenizer, where)))
        found_spans = []
        for number, (i, match, other) in enumerate(zip(answers, found, of_template, strict=False)):
            start = match.start(2) - 1 - 2 * number
            stop = start + len(match[2])
            before, after = len(match[1]) - len(other[1]), len(match[3]) - len(other[3])
            kept = text[start - before : start], text[stop : stop + after]
            if (
                match[2] == turns[i].text.strip()
                and (before >= 0 and blanks[i][0].endswith(kept[0]))
                and (after >= 0 and blanks[i][1].startswith(kept[1]))
            ):
                found_spans.append((start - before, stop + after))
        if len(found_spans) == len(found) == len(of_template) == len(answers):
            return found_spans
    # A template may split the last answer and join it again (to find reasoning, say). The answer is whole if it
    # follows what generation starts from, which does not depend on it.
    if list(answers) == [len(turns) - 1]:
        before_answer, said = _apply(turns[:-1], tokenizer, where, generation=True), turns[-1].text
        for whole in (said, said.strip(), said.lstrip(), said.rstrip()):
            if text.startswith(before_answer + whole):
                return [(len(before_answer), len(before_answer + whole))]
    raise InvalidRecord(
        f"{where}: {_of(tokenizer)} changes the assistant's text, so it cannot be found for the loss mask; "
        + ("try config.data.train_on='last', or " if len(answers) > 1 else "")
        + "set another config.model.chat_template"
    )


def _unused(turns: Sequence[Turn], text: str) -> tuple[str, str]:
    """Return two characters of the private use area that occur in none of the texts."""
    seen = set(text).union(*(turn.text for turn in turns))
    free = (chr(code) for code in range(0xE000, 0xF8FF) if chr(code) not in seen)
    return next(free), next(free)


@functools.lru_cache(maxsize=8)
def _markup(tokenizer: Tokenizer) -> _Markup:
    """Return what the template puts around answers, from a short conversation. Raises UserError if it marks no end."""
    try:
        text = _apply(_PROBE, tokenizer, "a short conversation")
        found_spans = _answer_spans(_PROBE, (1, 3), text, tokenizer, "a short conversation")
    except InvalidRecord as error:  # any other record would be invalid too
        raise UserError(str(error)) from None
    found = {_leading_token(text[stop:].lstrip(), tokenizer) for _, stop in found_spans}
    end = found.pop()
    if found or not end:
        raise UserError(
            f"{_of(tokenizer)} does not end each of the assistant's turns with one and the same special token: the "
            "model would never learn to stop; set another config.model.chat_template"
        )
    start = found_spans[-1][0]
    joined = False
    if encoded := tokenizer.encode_with_offsets([text]):
        joined = any(begin == start - 1 and start < stop for begin, stop in encoded[0][1].tolist())
    return _Markup(end, joined and text[start - 1] == " ")


def _leading_token(text: str, tokenizer: Tokenizer) -> str:
    """Return the special or added token that a text begins with, or ""."""
    return max((token for token in tokenizer.added_texts if text.startswith(token)), key=len, default="")


# Tokens


def _mask(
    item: _Rendered, tokens: np.ndarray, offsets: np.ndarray, tokenizer: Tokenizer
) -> tuple[np.ndarray, np.ndarray] | None:
    """Return the tokens of the whole rendering and their loss mask; None where a token spans an answer's beginning."""
    mask = np.zeros(len(tokens), bool)
    begins, stops = offsets[:, 0], offsets[:, 1]
    for start, stop in item.spans:
        mask |= (begins >= start) & (begins < stop)
        for i in np.flatnonzero((begins < start) & (stops > start)):
            # Special tokens of some tokenizers include the white space after them, the answer's as well.
            swallowed = item.text[start : stops[i]].isspace() and int(tokens[i]) in tokenizer.special
            if not swallowed:
                return None
    return tokens, mask


def _piecewise(item: _Rendered, tokenizer: Tokenizer, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens and loss mask of the parts encoded one by one, if together they are the same text."""
    cuts = [0, *(edge for span in item.spans for edge in span), len(item.text)]
    pieces = tokenizer.encode([item.text[a:b] for a, b in itertools.pairwise(cuts)])
    tokens = [token for piece in pieces for token in piece]
    if tokenizer.text(tokens) != tokenizer.text(tokenizer.encode([item.text])[0]):
        raise InvalidRecord(
            f"{where}: a token of {tokenizer.name} spans the beginning of an answer, so the loss mask cannot separate "
            "the answer from its prompt; strip the answers, or set another config.model.chat_template"
        )
    mask = [i % 2 == 1 for i, piece in enumerate(pieces) for _ in piece]
    return np.array(tokens, np.int32), np.array(mask, bool)


def _started_once(tokens: np.ndarray, mask: np.ndarray, tokenizer: Tokenizer) -> Encoded:
    """Return the conversation with exactly one beginning token, where the tokenizer adds one."""
    start = tokenizer.start
    if start is not None:
        written = 0
        while written < len(tokens) and tokens[written] == start:
            written += 1
        tokens = np.concatenate([[start], tokens[written:]]).astype(np.int32)
        mask = np.concatenate([[False], mask[written:]])
    return Encoded(np.zeros(0, np.int32), tokens, loss_mask=mask)
