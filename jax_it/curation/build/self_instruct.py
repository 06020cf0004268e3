"""Self-Instruct (Wang et al. 2023): from seed tasks, new instructions, and for each of them inputs and outputs.

1. Eight tasks, six of them seeds and two made before, are shown, and the model continues the list.
2. An instruction is kept if it has 4 to 150 words, is about what a language model can do, and is unlike every seed and
   everything kept before (ROUGE-L of 0.7 at most).
3. The model says whether it is a classification: then the output is asked for first, else the input, so that all
   classes occur. Instances that are empty, cut or contradictory are dropped.
"""

import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from jax_it.curation.build.requests import Generator, Reply, Request, ask, origin
from jax_it.curation.build.similarity import Similar
from jax_it.data import templates
from jax_it.data.records import Record
from jax_it.errors import UserError
from jax_it.metrics.languages import spaced

SHOWN, MADE = 8, 2  # tasks in a prompt, and how many of them were made before
ASKED = 8  # new ones in a reply
ROUND = 16  # requests whose tasks are chosen together: what is made does not depend on how many run at a time
FRUITLESS = 10  # rounds in a row without a new instruction after which the model is given up
SIMILAR = 0.7
_WORDS = 4, 150
# What a language model cannot do, and what the paper's authors saw models repeat.
_EXCLUDED = re.compile(
    r"\b(images?|graphs?|pictures?|files?|maps?|draw|plot|go to|video|audio|music|flowchart|diagram)\b", re.I
)
_NUMBER = re.compile(r"(?:^|\n)\s*(?:\*\*)?(?:Task\s*)?\d{1,3}\s*[.:)](?:\*\*)?\s*", re.IGNORECASE)


class Task(NamedTuple):
    instruction: str
    where: str
    instances: tuple[tuple[str, str], ...] = ()  # input and output
    is_classification: bool = False


@dataclass
class Made:
    records: list[dict[str, Any]]
    rejected: Counter[str] = field(default_factory=Counter)  # instructions and instances, by the reason
    instructions: int = 0
    rounds: int = 0


def read_task(record: Record, template: str) -> Task:
    """Return a seed: {instruction, instances: [{input, output}], is_classification}, or any record with a prompt.

    Raises InvalidRecord.
    """
    fields = record.fields
    instances = fields.get("instances")
    if isinstance(fields.get("instruction"), str) and isinstance(instances, list):
        pairs = [
            (str(one.get("input") or ""), str(one.get("output") or "")) for one in instances if isinstance(one, dict)
        ]
        return Task(fields["instruction"], record.where, tuple(pairs), bool(fields.get("is_classification")))
    if isinstance(fields.get("instruction"), str) and isinstance(fields.get("output"), str):
        return Task(fields["instruction"], record.where, ((str(fields.get("input") or ""), fields["output"]),))
    example = templates.render(record, template)
    return Task(example.prompt, record.where, (("", example.completion),))


def make(
    generator: Generator, seeds: Sequence[Task], number: int, seed: int, temperature: float, max_new_tokens: int
) -> Made:
    """Return records of `number` new instructions, fewer if the model has no more to give; a record is an instance.

    Raises UserError for fewer than eight seeds.
    """
    if len(seeds) < SHOWN:
        raise UserError(f"Self-Instruct shows {SHOWN} seed tasks in each prompt, and there are {len(seeds)}; add some")
    made = Made([])
    new = _new_tasks(generator, seeds, number, seed, temperature, max_new_tokens, made)
    made.instructions = len(new)
    kinds = generator([_is_classification(task, seeds, seed) for task in new])
    new = [
        task._replace(is_classification=reply.text.strip().lower().startswith("yes"))
        for task, reply in zip(new, kinds, strict=True)
    ]
    replies = generator([_instances(task, seeds, seed, max_new_tokens) for task in new])
    for task, reply in zip(new, replies, strict=True):
        for input_text, output in _checked(task, reply, made.rejected):
            parents = task.where.split("\n")
            about = origin("self_instruct", generator.name, parents, seed, is_classification=task.is_classification)
            made.records.append(
                {"instruction": task.instruction, "input": input_text, "output": output, "origin": dict(about)}
            )
    return made


def _new_tasks(
    generator: Generator,
    seeds: Sequence[Task],
    number: int,
    seed: int,
    temperature: float,
    max_new_tokens: int,
    made: Made,
) -> list[Task]:
    similar = Similar(SIMILAR)
    for task in seeds:
        similar.add(task.instruction)
    new: list[Task] = []
    fruitless = 0
    while len(new) < number and fruitless < FRUITLESS:
        shown = [_shown(seeds, new, random.Random(f"{seed}:{made.rounds}:{i}")) for i in range(ROUND)]
        requests = [
            _propose(tasks, temperature, max_new_tokens, seed=seed * 1_000_003 + made.rounds * ROUND + i)
            for i, tasks in enumerate(shown)
        ]
        before = len(new)
        for tasks, reply in zip(shown, generator(requests), strict=True):
            for instruction in proposed(reply):
                reason = fault(instruction) or ("like another" if similar.find(instruction) else "")
                if reason:
                    made.rejected[f"instruction: {reason}"] += 1
                elif len(new) < number:
                    similar.add(instruction)
                    new.append(Task(instruction, "\n".join(task.where for task in tasks)))
        fruitless = fruitless + 1 if len(new) == before else 0
        made.rounds += 1
    # A made task is its instruction's number in later prompts; in records it is the same.
    return new


def _shown(seeds: Sequence[Task], made: Sequence[Task], rng: random.Random) -> list[Task]:
    chosen = [
        task._replace(where=f"instruction {number + 1}")
        for number, task in rng.sample(list(enumerate(made)), min(MADE, len(made)))
    ]
    tasks = rng.sample(list(seeds), SHOWN - len(chosen)) + chosen
    rng.shuffle(tasks)
    return tasks


def _propose(tasks: Sequence[Task], temperature: float, max_new_tokens: int, seed: int) -> Request:
    lines = [f"{number}. {_one_line(task.instruction)}" for number, task in enumerate(tasks, 1)]
    text = (
        f"Come up with a series of tasks. Below are the first {len(tasks)}. Continue the list with tasks "
        f"{len(tasks) + 1} to {len(tasks) + ASKED}, each on one line behind its number and each of another kind. Write "
        "nothing else.\n\n" + "\n".join(lines)
    )
    return ask(text, max_new_tokens=max_new_tokens, temperature=temperature, top_p=0.95, seed=seed)


def _one_line(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip().rstrip(":")


def proposed(reply: Reply) -> list[str]:
    """Return the instructions in a numbered list; the last one is left out if the reply was cut."""
    parts = _NUMBER.split("\n" + reply.text)
    # Without a number before it, the first is the one that the prompt's list ends before, or a remark.
    first, rest = parts[0], parts[1:]
    found = rest or [first]
    if not reply.finished:
        found = found[:-1]
    return [" ".join(text.split()) for text in found if text.strip()]


def fault(instruction: str) -> str:
    """Return why an instruction is not kept, in the paper's terms; "" if it is."""
    words = len(spaced(instruction).split())
    if not _WORDS[0] <= words <= _WORDS[1]:
        return "too short" if words < _WORDS[0] else "too long"
    if _EXCLUDED.search(instruction):
        return "about what a language model cannot do"
    if instruction.startswith("Write a program"):
        return "begins with 'Write a program'"
    if not instruction[0].isalnum():
        return "begins with a punctuation mark"
    return ""


def _is_classification(task: Task, seeds: Sequence[Task], seed: int) -> Request:
    rng = random.Random(f"{seed}:classification")  # the same demonstrations for every task
    yes = [one for one in seeds if one.is_classification]
    no = [one for one in seeds if not one.is_classification]
    tasks = rng.sample(yes, min(12, len(yes))) + rng.sample(no, min(19, len(no)))
    rng.shuffle(tasks)
    shown = "".join(
        f"Task: {_one_line(one.instruction)}\nIs it classification? {'Yes' if one.is_classification else 'No'}\n\n"
        for one in tasks
    )
    return ask(
        "Can the following task be regarded as a classification task with finite output labels? Answer Yes or No.\n\n"
        f"{shown}Task: {_one_line(task.instruction)}\nIs it classification?",
        max_new_tokens=8,
    )


def _instances(task: Task, seeds: Sequence[Task], seed: int, max_new_tokens: int) -> Request:
    rng = random.Random(f"{seed}:{task.instruction}")
    alike = [one for one in seeds if one.is_classification == task.is_classification and one.instances]
    shown = rng.sample(alike, min(5, len(alike)))
    if task.is_classification:
        text = (
            "Given a classification task, write an input for each of its class labels. If the task needs no input, "
            "write only the correct class label.\n\n"
        )
        parts = [
            "".join(
                f"Class label: {output}\n{f'Input: {given}' + chr(10) if given else ''}"
                for given, output in one.instances
            )
            for one in shown
        ]
    else:
        text = (
            "Write examples for the task. Write several if you can. If the task needs no input, write only the "
            "output.\n\n"
        )
        parts = [
            "".join(
                f"Example {number}\n{f'Input: {given}' + chr(10) if given else ''}Output: {output}\n"
                for number, (given, output) in enumerate(one.instances, 1)
            )
            for one in shown
        ]
    text += "".join(f"Task: {one.instruction}\n{part}\n" for one, part in zip(shown, parts, strict=True))
    return ask(f"{text}Task: {task.instruction}\n", max_new_tokens=max_new_tokens)


def _checked(task: Task, reply: Reply, rejected: Counter[str]) -> list[tuple[str, str]]:
    """Return the instances in a reply that can be trained on, and count why the others can't."""
    if reply.error:
        rejected["instance: the endpoint refused the request"] += 1
        return []
    pairs = list(instances(reply.text, task.is_classification))
    if pairs and not reply.finished:
        pairs = pairs[:-1]
        rejected["instance: cut at the most new tokens"] += 1
    kept: dict[str, str] = {}
    contradictory: set[str] = set()
    for given, output in pairs:
        reason = _instance_fault(task.instruction, given, output)
        if not reason and given in kept:
            reason = "repeated" if kept[given] == output else "one input with several outputs"
            contradictory.update([given] if kept[given] != output else [])
        if reason:
            rejected[f"instance: {reason}"] += 1
        else:
            kept[given] = output
    for given in contradictory:
        rejected["instance: one input with several outputs"] += 1
        del kept[given]
    return list(kept.items())


def _instance_fault(instruction: str, given: str, output: str) -> str:
    if not output:
        return "no output"
    if output in (given, instruction) or given == instruction:
        return "a copy of the input or instruction"
    if given.endswith(":") or output.endswith(":"):
        return "ends with a colon"
    return ""


def instances(text: str, is_classification: bool) -> Iterable[tuple[str, str]]:
    """Yield the inputs and outputs in a reply, in either order of the two."""
    text = re.split(r"\n\s*Task\s*\d*\s*:", "\n" + text)[0].strip()
    if is_classification:
        for part in re.split(r"Class label\s*\d*\s*:", text)[1:]:
            label, _, rest = part.strip().partition("\n")
            yield re.sub(r"^\s*Input\s*\d*\s*:", "", rest).strip(), label.strip()
        return
    for part in re.split(r"(?:^|\n)\s*(?:\*\*)?Example\s*\d+\s*[.:]?(?:\*\*)?\s*(?:\n|$)", text):
        if not part.strip():
            continue
        given, found, output = re.sub(r"\n?Output\s*\d*\s*:", "\nOutput:", part, count=1).partition("Output:")
        if not found:
            given, output = "", part
        given = re.sub(r"^\s*Input\s*\d*\s*:", "", given).strip()
        yield "" if given.lower() in ("none", "n/a", "(none)", "<noinput>", "no input") else given, output.strip()
