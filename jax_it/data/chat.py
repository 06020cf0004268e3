"""Conversations as token ids with a loss mask, by the checkpoint's chat template.

A chat template is a program that may change the texts it is given, and most templates have no `{% generation %}` tags.
So the spans of the assistant's texts are proven for every conversation: it is rendered again with each of these texts
between two characters that occur nowhere else. If that rendering without them equals the plain one, the characters
have shown the spans; if not, the template changes the text, and the conversation is refused.

A turn that reasons or calls tools is more than its text, and the template decides how it is written. Its span goes from
what generation would start from to the end of the turn, and must hold all that the turn says.
"""

import functools
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from jax_it.data.chat_template import PROBE_CALL, apply, name_of, with_reasoning
from jax_it.data.encoded import Encoded
from jax_it.data.records import InvalidRecord
from jax_it.data.templates import ToolCall, Turn
from jax_it.data.tokenizer import Tokenizer
from jax_it.errors import UserError, shown
from jax_it.files import read_text

TrainOn = Literal["all", "last", "per_turn"]

_PLACEHOLDER = "Hello"  # an answer, where there is none yet
_PROBE = (Turn("user", "Hi"), Turn("assistant", _PLACEHOLDER), Turn("user", "Bye"), Turn("assistant", _PLACEHOLDER))

# For base models: words that every vocabulary has, and the end token that they already know. A line break before the
# text separates the prompt's last token from the answer's first.
DEFAULT = (
    "{% for message in messages %}{{ '' if loop.first else '\\n\\n' }}"
    "{% if message['role'] == 'system' %}{{ message['content'] | trim }}"
    "{% elif message['role'] == 'user' %}{{ 'User:\\n' + message['content'] | trim }}"
    "{% elif message['role'] == 'tool' %}{{ raise_exception('it takes no tools') }}"
    "{% else %}{{ 'Assistant:\\n' + message['content'] | trim + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n\\nAssistant:\\n' }}{% endif %}"
)


_FLAGS = re.compile(r"\s*/(no_think|think|system_override)\b\s*")  # which Qwen3 and SmolLM3 read and may leave out
_JSON = json.JSONDecoder()


class _Markup(NamedTuple):
    """What a chat template puts around every answer."""

    end: str  # the token that ends the assistant's turn
    space: bool  # a space before the answer belongs to the answer's first token
    call_end: str  # the token that ends a turn that calls a tool


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
    conversations: Sequence[Sequence[Turn]], locations: Sequence[str], tokenizer: Tokenizer, train_on: TrainOn
) -> list[Encoded]:
    """Return each conversation, which ends with the assistant, as the chat template renders it.

    `train_on` says which of the assistant's turns are trained on: "all", or the last one. Those with `train=False`
    never are. `locations` say where each conversation is from.
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
    """Return the ids that end an answer: the end token and, with a chat template, its end-of-turn tokens."""
    if tokenizer.chat_template is None:
        return (tokenizer.end,)
    markup = _markup(tokenizer)
    of_template = tokenizer.encode([end for end in (markup.end, markup.call_end) if end])
    return tuple(sorted({tokenizer.end, *itertools.chain(*of_template)}))


def generation_prompt(tokenizer: Tokenizer) -> tuple[str, str] | None:
    """Return the prompt in training and by the template's own generation prompt, where the two differ."""
    question = _PROBE[:1]
    (ours,) = prompts([question], ["a probe"], tokenizer)
    (theirs,) = tokenizer.encode([apply(question, tokenizer, "a probe", generation=True)])
    return None if ours == theirs else (tokenizer.text(ours), tokenizer.text(theirs))


def prompt_text(turns: Sequence[Turn], tokenizer: Tokenizer, where: str) -> str:
    """Render turns that end with the user by the chat template, with its generation prompt."""
    return apply(turns, tokenizer, where, generation=True)


def training_prompt_text(turns: Sequence[Turn], tokenizer: Tokenizer, where: str) -> str:
    """Return the text before an answer to turns that end with the user, in training of a causal model.

    `prompts` gives its tokens.
    """
    rendered = _render((*turns, Turn("assistant", _PLACEHOLDER)), tokenizer, where, "last")
    return rendered.text[: rendered.spans[-1][0]]


# Rendering


def _render(turns: Sequence[Turn], tokenizer: Tokenizer, where: str, train_on: TrainOn) -> _Rendered:
    """Render a conversation and prove the spans of its answers, each with the end of its turn."""
    markup = _markup(tokenizer)
    turns = with_reasoning(turns, tokenizer)
    text = apply(turns, tokenizer, where)
    _check_context(turns, text, tokenizer, where)
    answers = [i for i, turn in enumerate(turns) if turn.role == "assistant"]
    if train_on != "all":
        answers = answers[-1:]
    answers = [i for i in answers if turns[i].train]
    if answers == [len(turns) - 1] and turns[-1].reasoning:
        text = _as_generated(turns, text, tokenizer, where)
    for i in answers:
        said = turns[i].text + turns[i].reasoning + "".join(map(_arguments, turns[i].tool_calls))
        for end in filter(None, (markup.end, markup.call_end)):
            if end in said:
                raise InvalidRecord(
                    f"{where}: the assistant's turn {shown(said, 40)} contains {end!r}, which would end it"
                )
    texts = [i for i in answers if not turns[i].reasoning and not turns[i].tool_calls]
    spans = dict(zip(texts, _text_spans(turns, texts, text, markup, tokenizer, where), strict=True))
    for i in answers:
        if i not in spans:
            spans[i] = _turn_span(turns, i, text, markup, tokenizer, where)
    return _Rendered(text, [spans[i] for i in answers])


def _check_context(turns: Sequence[Turn], text: str, tokenizer: Tokenizer, where: str) -> None:
    """Refuse a rendering that lacks something of what the assistant is told, or of its calls."""
    for turn in turns:
        if turn.role == "tools":
            names = [tool["function"]["name"] for tool in json.loads(turn.text)]
            if lacking := [name for name in names if name not in text]:
                raise InvalidRecord(
                    f"{where}: {name_of(tokenizer)} leaves out the tool {lacking[0]!r}; set a "
                    "config.model.chat_template that takes tools"
                )
        elif turn.role != "assistant":
            said = turn.text.strip()
            if said in text or json.dumps(said, ensure_ascii=False)[1:-1] in text or _FLAGS.sub("", said) in text:
                continue
            raise InvalidRecord(
                f"{where}: {name_of(tokenizer)} leaves out or changes the {turn.role} turn {shown(turn.text, 40)}"
                + ("; put its text into the first user turn" if turn.role == "system" else "")
            )
        for call in turn.tool_calls:
            if not _has_call(call, text):
                raise InvalidRecord(
                    f"{where}: {name_of(tokenizer)} leaves out or changes the call of the tool {call.name!r}; "
                    "set another config.model.chat_template"
                )


def _text_spans(
    turns: Sequence[Turn], answers: Sequence[int], text: str, markup: _Markup, tokenizer: Tokenizer, where: str
) -> Iterator[tuple[int, int]]:
    """Yield the spans of answers that are texts alone, each with the end of its turn."""
    for i, (start, stop) in zip(answers, _answer_spans(turns, answers, text, tokenizer, where), strict=True):
        blank = len(text[stop:]) - len(text[stop:].lstrip())
        if not text.startswith(markup.end, stop + blank):
            raise _endless(turns, i, markup, tokenizer, where)
        space = markup.space and text[:start].endswith(" ")
        yield start - space, stop + blank + len(markup.end)


def _endless(turns: Sequence[Turn], i: int, markup: _Markup, tokenizer: Tokenizer, where: str) -> InvalidRecord:
    return InvalidRecord(
        f"{where}: {name_of(tokenizer)} does not end the assistant's turn {shown(turns[i].text, 40)} with "
        f"{markup.end!r}: the model would not learn to stop"
        + ("; set config.data.train_on to 'per_turn' or 'last'" if i + 1 < len(turns) else "")
    )


def _turn_span(
    turns: Sequence[Turn], i: int, text: str, markup: _Markup, tokenizer: Tokenizer, where: str
) -> tuple[int, int]:
    """Return the span of an answer with reasoning or tool calls: from where generation starts to the end of its turn.

    It must hold the reasoning, the text and the calls.
    """
    turn, (opening, _) = turns[i], _unused(turns, text)
    starts = [apply(turns[:i], tokenizer, where, generation=True)]
    if not turn.reasoning:  # what the template writes before any answer, such as an empty thought, is given
        plain = apply([*turns[:i], Turn("assistant", opening)], tokenizer, where)
        starts = [plain[: plain.find(opening)], *starts]
    start = next((len(before) for before in starts if text.startswith(before)), None)
    limit = len(text)
    if i + 1 < len(turns):
        following = turns[i + 1]._replace(text=opening + turns[i + 1].text)
        marked = apply([*turns[: i + 1], following, *turns[i + 2 :]], tokenizer, where)
        limit = marked.find(opening)
        if text[:limit] != marked[:limit]:
            start = None
    span = "" if start is None else text[start:limit]
    if any(part.strip() not in span for part in (turn.reasoning, turn.text)) or not all(
        _has_call(call, span) for call in turn.tool_calls
    ):
        what = "the reasoning or the tool calls" if turn.tool_calls else "the reasoning"
        raise InvalidRecord(
            f"{where}: {name_of(tokenizer)} leaves out or changes {what} of the assistant's turn "
            f"{shown(turn.text or turn.reasoning or turn.tool_calls[0].name, 40)}; "
            + (
                "try config.data.train_on='last' or 'per_turn', which need them in the last turn alone"
                if i + 1 < len(turns)
                else "set another config.model.chat_template"
            )
        )
    assert start is not None
    allowed = [markup.end, *([markup.call_end] if turn.tool_calls and markup.call_end else [])]
    stop = max((at + len(end) for end in allowed if (at := span.rfind(end)) >= 0), default=0)
    if not stop or (i + 1 == len(turns) and span[stop:].strip()):
        raise _endless(turns, i, markup, tokenizer, where)
    return start, start + stop


def _as_generated(turns: Sequence[Turn], text: str, tokenizer: Tokenizer, where: str) -> str:
    """Return the rendering with what generation starts from before the last turn, where the template has two forms.

    gpt-oss leaves out the thought before a tool call once the conversation has an answer, but generates the answer with
    it.
    """
    begun = apply(turns[:-1], tokenizer, where, generation=True)
    before = apply(turns[:-1], tokenizer, where)
    if text.startswith(begun) or not begun.startswith(before):
        return text
    opening, _ = _unused(turns, text)
    marked = apply([*turns[:-1], turns[-1]._replace(reasoning=opening + turns[-1].reasoning)], tokenizer, where)
    at, header = marked.find(opening), begun[len(before) :]
    start = text.rfind(header, 0, max(at, 0)) if header and text[:at] == marked[:at] else -1
    return text if start < 0 else begun + text[start + len(header) :]


def _arguments(call: ToolCall) -> str:
    return json.dumps(call.arguments, ensure_ascii=False)


def _has_call(call: ToolCall, text: str) -> bool:
    """Return whether a call is in the text: its name, and its arguments as JSON or one by one as they are."""
    if call.name not in text:
        return False
    values = [value if isinstance(value, str) else json.dumps(value) for value in call.arguments.values()]
    if not values or _arguments(call) in text or all(part in text for part in (*call.arguments, *values)):
        return True
    for match in re.finditer(r"\{", text):
        try:
            if _JSON.raw_decode(text, match.start())[0] == call.arguments:
                return True
        except ValueError:
            continue
    return False


def _answer_spans(
    turns: Sequence[Turn], answers: Sequence[int], text: str, tokenizer: Tokenizer, where: str
) -> list[tuple[int, int]]:
    """Return the span of each answer in the rendering `text`, with as much of its white space as the template keeps.

    The two characters are put inside an answer's own white space, so that a template that strips it does so here too.
    """
    if not answers:
        return []
    opening, closing = _unused(turns, text)
    marked, bare = list(turns), list(turns)
    blanks = {}
    for i in answers:
        said, core = turns[i].text, turns[i].text.strip()
        blanks[i] = said[: len(said) - len(said.lstrip())], said[len(said.rstrip()) :]
        bare[i] = turns[i]._replace(text=f"{opening}{core}{closing}")
        marked[i] = turns[i]._replace(text=f"{blanks[i][0]}{bare[i].text}{blanks[i][1]}")
    rendered = apply(marked, tokenizer, where)
    if rendered.replace(opening, "").replace(closing, "") == text:
        pattern = re.compile(f"(\\s*){opening}([^{opening}{closing}]*){closing}(\\s*)")
        found = list(pattern.finditer(rendered))
        # White space that is there when the answers have none is the template's.
        of_template = found if marked == bare else list(pattern.finditer(apply(bare, tokenizer, where)))
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
        before_answer, said = apply(turns[:-1], tokenizer, where, generation=True), turns[-1].text
        for whole in (said, said.strip(), said.lstrip(), said.rstrip()):
            if text.startswith(before_answer + whole):
                return [(len(before_answer), len(before_answer + whole))]
    raise InvalidRecord(
        f"{where}: {name_of(tokenizer)} changes the assistant's text, so it cannot be found for the loss mask; "
        + ("try config.data.train_on='last' or 'per_turn', or " if len(answers) > 1 else "")
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
        text = apply(_PROBE, tokenizer, "a short conversation")
        found_spans = _answer_spans(_PROBE, (1, 3), text, tokenizer, "a short conversation")
    except InvalidRecord as error:  # any other record would be invalid too
        raise UserError(str(error)) from None
    found = [_leading_token(text[stop:].lstrip(), tokenizer) for _, stop in found_spans]
    if not all(found):
        raise UserError(
            f"{name_of(tokenizer)} does not end each of the assistant's turns with one of its special tokens: the "
            "model would never learn to stop; set another config.model.chat_template"
        )
    call_end = ""
    try:
        called = apply(PROBE_CALL, tokenizer, "a tool call").rstrip()
    except InvalidRecord:
        called = ""
    if PROBE_CALL[-1].tool_calls[0].name in called:
        call_end = max((token for token in tokenizer.added_texts if called.endswith(token)), key=len, default="")
    start = found_spans[-1][0]
    joined = False
    if encoded := tokenizer.encode_with_offsets([text]):
        joined = any(begin == start - 1 and start < stop for begin, stop in encoded[0][1].tolist())
    return _Markup(found[-1], joined and text[start - 1] == " ", call_end)


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
