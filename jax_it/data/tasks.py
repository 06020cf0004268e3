"""The examples of `eval.tasks`: prompts with few-shot examples and options, as texts and as token ids.

Without a chat template a causal model continues plain text, and an option is tokenized together with the prompt:
its tokens are those beyond as many as the prompt has by itself, as the Language Model Evaluation Harness splits them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from jax_it.config import Data, Task
from jax_it.data import chat, encoding, promptsource, records, sources, templates
from jax_it.data.evaluation_set import EvalExample, Option
from jax_it.data.formats import CausalFormat, Format
from jax_it.data.jinja_text import answer_choices
from jax_it.data.records import Record
from jax_it.data.templates import Turn
from jax_it.data.tokenizer import Tokenizer
from jax_it.errors import UserError


@dataclass(frozen=True)
class _Question:
    """A record under one of its templates."""

    number: int
    record: Record
    turns: tuple[Turn, ...]  # the last one is the user's, with the description and the few-shot examples
    references: tuple[str, ...]
    options: tuple[str, ...]
    num_fewshot: int


def read(task: Task, where: str, data: Data, tokenizer: Tokenizer, format: Format, limit: int = 0) -> list[EvalExample]:
    """Read the examples of a task, at most `limit` unless that is 0; `where` is its name in messages.

    Raises UserError that names the record: for what it lacks, an empty prompt, no reference, fewer than two options
    or none that is the reference, too few few-shot examples, and a prompt that is too long under every template.
    """
    fewshot = _FewShot(task, where) if task.num_fewshot else None
    waiting: list[tuple[int, Record]] = []
    for number, record in enumerate(sources.read(task.data, f"{where}.data")):
        if limit and number == limit:
            break
        waiting.append((number, record))
    found: dict[int, EvalExample] = {}
    every_template = [template.text for template in promptsource.expand(task.data.template, f"{where}.data.template")]
    choices = [(template, task.num_fewshot) for template in every_template]
    if task.truncate == "fewshot":
        choices += [(every_template[-1], fewer) for fewer in range(task.num_fewshot - 1, -1, -1)]
    for choice, (template, num_fewshot) in enumerate(choices):
        questions = [_question(task, number, record, template, fewshot, num_fewshot) for number, record in waiting]
        waiting = []
        for question, made in zip(questions, _tokenize(task, questions, tokenizer, format), strict=True):
            shorter = _fitted(task, where, question, made, data, tokenizer, format, whole=choice + 1 < len(choices))
            if shorter is None:
                waiting.append((question.number, question.record))
            else:
                found[question.number] = shorter
    return [found[number] for number in sorted(found)]


def _question(
    task: Task, number: int, record: Record, template: str, fewshot: "_FewShot | None", num_fewshot: int
) -> _Question:
    example = templates.render(record, template)
    asked = example.turns[-2]
    if not asked.text.strip():
        raise UserError(f"{record.where}: the prompt is empty; fix or remove the record")
    references = tuple(text.strip() for text in example.references if text.strip())
    if not references and task.score != "code_execution":
        raise UserError(f"{record.where}: there is no reference to compare with; fix or remove the record")
    options: tuple[str, ...] = ()
    if task.score == "multiple_choice":
        options = tuple(templates.texts(record, task.options or answer_choices(template)))
        listed = records.listed(map(repr, options))
        if len(options) < 2 or not all(options):
            raise UserError(f"{record.where}: two options or more are needed, none of them empty; it has {listed}")
        if references[0] not in options:
            raise UserError(f"{record.where}: the reference {references[0]!r} is not among the options: {listed}")
    if task.score == "perplexity":
        options = references[:1]
    before = [templates.text(record, task.description)] if task.description else []
    before += fewshot.of(record)[:num_fewshot] if fewshot else []
    text = task.fewshot_delimiter.join([*before, asked.text])
    return _Question(number, record, (*example.turns[:-2], asked._replace(text=text)), references, options, num_fewshot)


class _FewShot:
    """The few-shot examples with their answers, in the order of their source."""

    def __init__(self, task: Task, where: str):
        self._task, self._where = task, where
        self._by_value: dict[str, list[tuple[Record, str]]] = {}
        template = promptsource.expand(task.fewshot.template, f"{where}.fewshot.template")[0].text
        for record in sources.read(task.fewshot, f"{where}.fewshot"):
            example = templates.render(record, template)
            if not example.prompt.strip() or not example.completion.strip():
                raise UserError(
                    f"{record.where}: a few-shot example needs a prompt and an answer; fix or remove the record"
                )
            text = f"{example.prompt}{task.target_delimiter}{example.completion.strip()}"
            self._by_value.setdefault(self._value(record), []).append((record, text))

    def of(self, record: Record) -> list[str]:
        """Return the first few-shot examples that agree with the record, without the record itself."""
        number, value = self._task.num_fewshot, self._value(record)
        found = [text for other, text in self._by_value.get(value, ()) if other.fields != record.fields][:number]
        if len(found) < number:
            where = f" where {self._task.fewshot_by} is {value!r}" if self._task.fewshot_by else ""
            raise UserError(
                f"{self._where}.fewshot: {self._task.fewshot.path} has {len(found)} examples for {record.where}{where}"
                f", fewer than num_fewshot={number}; lower that, or add some"
            )
        return found

    def _value(self, record: Record) -> str:
        return _value(record, self._task.fewshot_by, f"{self._where}.fewshot_by") if self._task.fewshot_by else ""


def _value(record: Record, field: str, setting: str) -> str:
    """Return a field as text, or the first item of a list."""
    value = record.fields.get(field)
    if isinstance(value, (list, tuple)):
        value = value[0] if value else None
    if value is None or not str(value).strip():
        fields = records.listed(record.fields)
        raise UserError(f"{record.where}: no field {field!r}, which {setting} names; its fields: {fields}")
    return str(value).strip()


class _Tokens(NamedTuple):
    prompt: list[int]
    options: list[Option]


def _tokenize(task: Task, questions: Sequence[_Question], tokenizer: Tokenizer, format: Format) -> Iterator[_Tokens]:
    """Yield the tokens of each question and of its options."""
    causal = isinstance(format, CausalFormat)
    in_chat = task.chat and tokenizer.chat_template is not None
    places = [question.record.where for question in questions]
    options = [(question, text) for question in questions for text in question.options]
    if in_chat:
        prompts = format.prompts([question.turns for question in questions], tokenizer, places)
    else:
        prompts = format.text_prompts([_plain(question) for question in questions], tokenizer)
    if not causal:
        targets = [[*tokens, tokenizer.end] for tokens in tokenizer.encode([text for _, text in options])]
        pairs: list[tuple[list[int], list[int]]] = [([], target) for target in targets]
    elif in_chat:
        pairs = list(_answers(options, tokenizer))
    else:
        pairs = list(_continuations(options, task.target_delimiter, tokenizer))
    rest = iter(pairs)
    for question, prompt in zip(questions, prompts, strict=True):
        made = [Option(text, *next(rest)) for text in question.options]
        yield _Tokens(prompt, made if causal else [option._replace(prompt=prompt) for option in made])


def _plain(question: _Question) -> str:
    return "\n\n".join(turn.text for turn in question.turns)


def _answers(options: Sequence[tuple[_Question, str]], tokenizer: Tokenizer) -> Iterator[tuple[list[int], list[int]]]:
    """Yield prompts and answers in the chat template, without the end of the turn."""
    talks = [(*question.turns, Turn("assistant", text)) for question, text in options]
    ends = chat.ends(tokenizer)
    for _, tokens, _, mask in chat.encode(talks, [question.record.where for question, _ in options], tokenizer, "last"):
        assert mask is not None
        begin = int(mask.argmax())
        answer = tokens[begin:][mask[begin:]].tolist()
        while len(answer) > 1 and answer[-1] in ends:
            answer.pop()
        yield tokens[:begin].tolist(), answer


def _continuations(
    options: Sequence[tuple[_Question, str]], delimiter: str, tokenizer: Tokenizer
) -> Iterator[tuple[list[int], list[int]]]:
    """Yield prompts and options of plain text, tokenized together."""
    prompts = [_plain(question).rstrip() for question, _ in options]
    alone = dict(zip(prompts, encoding.text_prompts(prompts, tokenizer), strict=True))
    whole = encoding.text_prompts(
        [f"{prompt}{delimiter}{text}" for prompt, (_, text) in zip(prompts, options, strict=True)], tokenizer
    )
    for prompt, tokens in zip(prompts, whole, strict=True):
        at = min(len(alone[prompt]), len(tokens) - 1)
        yield tokens[:at], tokens[at:]


def _fitted(
    task: Task,
    where: str,
    question: _Question,
    made: _Tokens,
    data: Data,
    tokenizer: Tokenizer,
    format: Format,
    whole: bool,
) -> EvalExample | None:
    """Return the example, its prompt truncated if the task says so; None if it is too long and must stay whole."""
    causal = isinstance(format, CausalFormat)
    new = max((len(option.tokens) for option in made.options), default=task.max_new_tokens) if causal else 0
    room = (task.max_prompt_length or getattr(data, format.length_field)) - new
    prompt, options = made
    cut = len(prompt) > room
    if cut and whole:
        return None
    if cut:
        if task.truncate in ("error", "fewshot") or room < 2 or (task.chat and tokenizer.chat_template is not None):
            raise UserError(_too_long(task, where, question, len(prompt), new, room + new, format))
        prompt = _shortened(prompt, room, task.truncate, tokenizer, causal)
        options = [
            option._replace(prompt=_shortened(option.prompt, room, task.truncate, tokenizer, causal))
            for option in options
        ]
    record = question.record
    id = record.fields.get("id")
    return EvalExample(
        id=f"{sources.name_of(task.data)}/{question.number}" if id is None else str(id),
        group=_value(record, task.group_by, f"{where}.group_by") if task.group_by else "",
        prompt=_plain(question),
        prompt_tokens=prompt,
        references=question.references,
        truncated=cut or question.num_fewshot < task.num_fewshot,
        options=tuple(options),
        fields=record.fields,
    )


def _too_long(task: Task, where: str, question: _Question, length: int, new: int, limit: int, format: Format) -> str:
    answer = f" and its answer up to {new}" if new else ""
    setting = f"{where}.max_prompt_length"
    if not task.max_prompt_length:
        setting = f"config.data.{format.length_field} or {setting}"
    fewer = f"lower {where}.num_fewshot, " if question.num_fewshot else ""
    return (
        f"{question.record.where}: the prompt has {length} tokens{answer}, more than {limit}; {fewer}raise {setting}, "
        f"or let prompts be cut with {where}.truncate"
    )


def _shortened(prompt: list[int], room: int, side: str, tokenizer: Tokenizer, causal: bool) -> list[int]:
    """Truncate a prompt at one end; special tokens are kept."""
    if len(prompt) <= room:
        return prompt
    begins = 1 if tokenizer.start is not None and prompt[0] == tokenizer.start else 0
    ends = 1 if not causal and prompt[-1] == tokenizer.end else 0
    inner, rest = prompt[begins : len(prompt) - ends], room - begins - ends
    inner = inner[len(inner) - rest :] if side == "start" else inner[:rest]
    return [*prompt[:begins], *inner, *prompt[len(prompt) - ends :]]
