"""Few-shot variants of templates: which examples stand before a prompt, and what becomes of those that do not fit."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from jax_it import config
from jax_it.config import Data, Source
from jax_it.data import fewshot, templates
from jax_it.data import tokenizer_files as tokenizers
from jax_it.data.fewshot import FewShot, read_pool
from jax_it.data.formats import Seq2SeqFormat
from jax_it.data.records import Record
from jax_it.data.tokenized import tokenize
from jax_it.errors import UserError

TEMPLATE = "Q: {{q}} ||| {{a}}"
BYTES = tokenizers.load("bytes")


def records(number: int = 12, tasks: int = 2) -> list[Record]:
    return [Record({"q": f"q{i}", "a": f"a{i}", "task": f"t{i % tasks}"}, f"line {i}") for i in range(number)]


def made(given: list[Record], number: int, max_length: int = 1000) -> FewShot:
    return FewShot(number, TEMPLATE, read_pool(given, TEMPLATE), BYTES, max_length, with_answer=False)


def prompts(shots: FewShot, given: list[Record]) -> list[str]:
    found = [shots.before(record, templates.render(record, TEMPLATE)) for record in given]
    return [example.prompt if example else "" for example in found]


def test_a_prompt_has_other_examples_of_its_task_before_it_with_flans_separators():
    given = records()
    for record, prompt in zip(given, prompts(made(given, 3), given), strict=True):
        *before, asked = prompt.split("\n\n\n")
        assert asked == f"Q: {record.fields['q']}" and len(set(before)) == 3
        shown = [text.removeprefix("Q: q").split("\n\na") for text in before]
        own = int(record.where.removeprefix("line "))
        assert all(q == a and int(q) != own and int(q) % 2 == own % 2 for q, a in shown)


def test_the_choice_depends_on_the_record_alone():
    given = records()
    first = prompts(made(given, 3), given)
    assert prompts(made(given[::-1], 3), given[::-1])[::-1] == first
    chosen = {prompt.rpartition("\n\n\n")[0] for prompt in first}
    assert len(chosen) > 6, "records of a task do not all get the same examples"


def test_examples_that_do_not_fit_are_left_out_and_a_record_without_any_is_skipped():
    given = records(tasks=1)
    each = len("Q: q1\n\na1")  # a byte is a token
    asked = len("Q: q1") + 16
    numbers = {}
    for room in (each - 1, each, 2 * each, 9 * each):
        found = prompts(made(given[:10], 3, asked + room), given[:10])
        numbers[room // each] = {prompt.count("\n\n\n") if prompt else 0 for prompt in found}
    assert numbers == {0: {0}, 1: {1}, 2: {2}, 9: {3}}
    empty = [Record({"q": "q", "a": "", "task": "t0"}, "an answer that is dropped")]
    assert prompts(made(given[:10], 3), empty) == ["Q: q"]
    alone = records(1)
    assert prompts(made(alone, 3), alone) == [""], "nothing but itself"


def test_the_pool_of_a_task_is_bounded_and_does_not_depend_on_the_order(monkeypatch):
    monkeypatch.setattr(fewshot, "POOL", 5)
    given = records(100)
    found = read_pool(given, TEMPLATE)
    assert {task: len(each) for task, each in found.items()} == {"t0": 5, "t1": 5}
    assert read_pool(given[::-1], TEMPLATE) == found
    bad = [{"q": "x", "task": "t0"}, {"q": "y", "a": " ", "task": "t1"}]  # no answer, and an empty one
    assert read_pool([*(Record(fields, "bad") for fields in bad), *given], TEMPLATE) == found


def test_a_data_set_has_a_variant_for_each_number_whatever_the_number_of_processes(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(record.fields) + "\n" for record in [*records(40), *records(1, 3)]))
    source = Source(str(file), template=(TEMPLATE,), num_fewshot=(0, 2))
    found = []
    for workers in (0, 2):
        data = Data(train=(source,), cache_dir=str(tmp_path / str(workers)), num_workers=workers)
        found.append(tokenize(source, "config.data.train.0", data, BYTES, Seq2SeqFormat(0, 0)))
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one.source_tokens, other.source_tokens)
    zero, two = found[0]
    assert [item.template for item in found[0]] == [TEMPLATE, f"{TEMPLATE}, 2-shot"]
    for i in range(40):
        asked, prompt = (BYTES.decode(item.example(i).source) for item in (zero, two))
        assert prompt.endswith(f"\n\n\n{asked}") and prompt.count("\n\n\n") == 2
        assert asked not in prompt.split("\n\n\n")[:2] and (zero.example(i).target == two.example(i).target).all()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_fewshot": ()}, "config.data.train.0.num_fewshot: name one number of examples or more, each once"),
        ({"num_fewshot": (2, 2)}, "config.data.train.0.num_fewshot: name one number of examples or more, each once"),
        ({"num_fewshot": (-1,)}, "config.data.train.0.num_fewshot: numbers must be from 0 to 100"),
        ({"validation_size": 5}, "among the few-shot examples of data.train.0; name data.eval instead"),
        ({"eval": True}, "config.data.eval.0.num_fewshot is for training; in a task"),
    ],
)
def test_what_cannot_be_is_refused(change, message):
    tree = config.to_dict(config.Config())
    tree["model"] |= {"path": "some/model"}
    source = dataclasses.asdict(Source("a.jsonl", num_fewshot=change.get("num_fewshot", (0, 2))))
    tree["data"]["train"] = [source]
    tree["data"]["validation_size"] = change.get("validation_size", 0)
    if "eval" in change:
        tree["data"]["eval"] = [source]
    with pytest.raises(UserError, match=r"config\.data") as caught:
        config.resolve(tree)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_conversation_is_refused_by_name(tmp_path):
    file = tmp_path / "a.jsonl"
    turns = [{"role": role, "content": "x"} for role in ("user", "assistant", "user", "assistant")]
    file.write_text(json.dumps({"messages": turns}) + "\n")
    source = Source(str(file), num_fewshot=(1,))
    data = Data(train=(source,), cache_dir=str(Path(tmp_path) / "cache"))
    with pytest.raises(UserError, match="few-shot examples need a prompt and an answer, each a text"):
        tokenize(source, "config.data.train.0", data, BYTES, Seq2SeqFormat(0, 0))
