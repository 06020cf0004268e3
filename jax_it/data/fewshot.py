"""Few-shot examples before a prompt, as in the FLAN collection (Longpre et al. 2023): others of the same task.

Which ones a record gets depends on the record alone: never on its place, the machine or the number of processes.
"""

import hashlib
import heapq
import random
from collections.abc import Iterable
from dataclasses import dataclass, field

from jax_it.data import templates
from jax_it.data.encoding import text_prompts
from jax_it.data.records import Fields, InvalidRecord, Record
from jax_it.data.templates import Example
from jax_it.data.tokenizer import Tokenizer

POOL = 500  # records of a task that its few-shot examples are chosen from
TARGET_DELIMITER, DELIMITER = "\n\n", "\n\n\n"  # FLAN's: before an answer, and after it
_MARGIN = 16  # tokens, of the delimiters and of what surrounds a prompt

Pool = dict[str, list[Fields]]  # of each task


def read_pool(records: Iterable[Record], template: str) -> Pool:
    """Choose up to `POOL` records of each task by their hashes, of those that the template gives a prompt and answer.

    A record's task is its field "task"; without one, all of a data set are one task.
    """
    chosen: dict[str, dict[int, Fields]] = {}
    largest: dict[str, list[int]] = {}  # heaps of the negated hashes
    for record in records:
        if record.error:
            continue
        task, key = _task(record.fields), _hash(record.fields)
        found, heap = chosen.setdefault(task, {}), largest.setdefault(task, [])
        if key in found or (len(heap) == POOL and key > -heap[0]):
            continue
        try:
            example = templates.render(record, template)
        except InvalidRecord:  # which is counted and reported where the record is tokenized
            continue
        if not (_is_exchange(example) and example.prompt.strip() and example.completion.strip()):
            continue
        found[key] = record.fields
        heapq.heappush(heap, -key)
        if len(heap) > POOL:
            del found[-heapq.heappop(heap)]
    return {task: [found[key] for key in sorted(found)] for task, found in chosen.items()}


@dataclass
class FewShot:
    """Puts examples of the pool before prompts, and leaves out the last of those that would be too long."""

    number: int
    template: str
    pool: Pool
    tokenizer: Tokenizer
    max_length: int  # tokens of the prompt,
    with_answer: bool  # and of the answer
    _known: dict[tuple[str, int], tuple[str, int]] = field(default_factory=dict)  # an example's text and tokens

    def before(self, record: Record, example: Example) -> Example | None:
        """Return the example with few-shot examples before its prompt; None where there is none that fits."""
        if not _is_exchange(example):
            raise InvalidRecord(
                f"{record.where}: few-shot examples need a prompt and an answer, each a text; leave num_fewshot out"
            )
        if not example.completion.strip():  # it is dropped and counted as such
            return example
        task, key = _task(record.fields), _hash(record.fields)
        pool, left = self.pool.get(task, []), self.max_length - _MARGIN - self._length(example.prompt)
        left -= self._length(example.completion) if self.with_answer else 0
        # One more than needed: the record itself may be among them.
        order = random.Random(key).sample(range(len(pool)), min(self.number + 1, len(pool)))
        before = []
        for i in [i for i in order if pool[i] != record.fields][: self.number]:
            text, length = self._shown(task, i)
            left -= length
            if left < 0:
                break
            before.append(text)
        if not before:
            return None
        asked = example.turns[-2]
        turn = asked._replace(text=DELIMITER.join([*before, asked.text]))
        return example._replace(turns=(*example.turns[:-2], turn, example.turns[-1]))

    def _shown(self, task: str, i: int) -> tuple[str, int]:
        if (task, i) not in self._known:
            example = templates.render(Record(self.pool[task][i], "a few-shot example"), self.template)
            text = f"{example.prompt}{TARGET_DELIMITER}{example.completion.strip()}"
            self._known[task, i] = text, self._length(text)
        return self._known[task, i]

    def _length(self, text: str) -> int:
        return len(text_prompts([text], self.tokenizer)[0])


def _is_exchange(example: Example) -> bool:
    return example.is_plain and [turn.role for turn in example.turns] == ["user", "assistant"]


def _task(fields: Fields) -> str:
    return str(fields.get("task") or "")


def _hash(fields: Fields) -> int:
    return int.from_bytes(hashlib.blake2b(repr(fields).encode("utf-8", "replace"), digest_size=8).digest(), "big")
