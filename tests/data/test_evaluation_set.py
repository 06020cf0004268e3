from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jax_it.config import Data, Source
from jax_it.data import evaluation_set
from jax_it.data.evaluation_set import EvalSet
from jax_it.data.formats import CausalFormat, Seq2SeqFormat
from jax_it.errors import UserError
from tests.data.chat_tokenizers import checkpoint
from tests.data.letters import END, Letters, ids, pairs, write

RECORDS = [
    {"id": 17, "task": "maths", "prompt": "one", "completion": "1"},
    {"id": "x", "prompt": "two", "completion": ["2", "ii", " "]},
    {"id": None, "task": 5, "prompt": "three", "completion": "3"},
]


def read(
    *items: Source,
    limit: int = 0,
    only: Any = None,
    format: Any = Seq2SeqFormat(0, 0),  # noqa: B008 (it is frozen)
    tokenizer: Any = None,
    **given: Any,
) -> EvalSet:
    data = Data(**{"max_source_length": 8, "max_target_length": 4, **given})
    return evaluation_set.read(items, "config.data.eval", data, tokenizer or Letters(), format, limit, only)


def truncated(found: EvalSet) -> int:
    return sum(example.truncated for example in found.examples)


@pytest.fixture
def path(tmp_path: Path) -> str:
    return write(tmp_path / "quiz.jsonl", RECORDS)


def test_an_example_has_its_texts_and_its_tokens_with_end_marks(path):
    found = read(Source(path))
    assert [example.prompt for example in found.examples] == ["one", "two", "three"]
    assert [example.references for example in found.examples] == [("1",), ("2", "ii"), ("3",)]
    assert [example.prompt_tokens for example in found.examples] == [
        [*ids(text), END] for text in ("one", "two", "three")
    ]
    assert [example.encoded.target.tolist() for example in found.examples] == [
        [*ids(text), END] for text in ("1", "2", "3")
    ]
    assert (found.skipped, truncated(found)) == (0, 0)


def test_a_task_and_an_id_are_the_record_s_or_else_the_source_s_and_the_number(path):
    found = read(Source(path), Source(path, name="other"))
    assert [example.group for example in found.examples] == ["maths", "quiz", "quiz", "maths", "other", "other"]
    assert [example.id for example in found.examples] == ["17", "x", "quiz/2", "17", "x", "other/2"]


@pytest.mark.parametrize("truncate, sources", [("end", ["abcdefg", "abcdefg"]), ("start", ["abcdefg", "bcdefgh"])])
def test_long_prompts_and_completions_are_cut_as_in_training_and_counted_but_references_stay_whole(
    tmp_path, truncate, sources
):
    found = read(Source(write(tmp_path / "a.jsonl", pairs("abcdefg>xyz", "abcdefgh>xyzw"))), truncate=truncate)
    assert [example.prompt_tokens for example in found.examples] == [[*ids(text), END] for text in sources]
    assert [example.encoded.target.tolist() for example in found.examples] == [[*ids("xyz"), END]] * 2
    assert found.examples[1].references == ("xyzw",) and truncated(found) == 1
    assert found.examples[1].prompt == "abcdefgh"


def test_drop_cuts_here_and_refuse_names_the_line(tmp_path):
    path = write(tmp_path / "a.jsonl", pairs("abc>x", "abcdefgh>x"))
    assert len(read(Source(path), truncate="drop").examples) == 2
    with pytest.raises(
        UserError, match=rf"^{path}, line 2: 9 source tokens exceed the limit of 8; raise config\.data\.max_source_len"
    ):
        read(Source(path), truncate="error")


def test_examples_without_a_reference_are_skipped_and_counted(tmp_path):
    records = [
        *pairs("a>", "b> ", "c>x"),
        {"prompt": "d", "completion": ["", "y"]},
        {"prompt": "e", "completion": []},
    ]
    found = read(Source(write(tmp_path / "a.jsonl", records)))
    assert [(example.prompt, example.references) for example in found.examples] == [("c", ("x",)), ("d", ("y",))]
    # What the loss is measured on is never the end mark alone.
    assert found.examples[1].encoded.target.tolist() == [*ids("y"), END]
    assert found.skipped == 3
    with pytest.raises(UserError, match=r"config\.data\.eval: none of 2 examples has a reference to compare with"):
        read(Source(write(tmp_path / "b.jsonl", records[:2])))


def test_templates_take_turns_by_the_record_s_number(tmp_path):
    path = write(tmp_path / "a.jsonl", pairs("a>1", "b>2", "c>3", "d>4"))
    source = Source(path, template=("auto", "{{prompt}}? ||| {{completion}}"))
    assert [example.prompt for example in read(source).examples] == ["a", "b?", "c", "d?"]
    only = [np.array([1, 2])]
    assert [example.prompt for example in read(source, only=only).examples] == ["b?", "c"]


def test_only_the_named_records_are_taken_and_a_limit_counts_for_each_source(tmp_path):
    one = Source(write(tmp_path / "a.jsonl", pairs("a>1", "b>2", "c>3", "d>4")))
    two = Source(write(tmp_path / "b.jsonl", pairs("e>1", "f>2", "g>3", "h>4")))

    def prompts(**given: Any) -> str:
        return "".join(example.prompt for example in read(one, two, **given).examples)

    assert prompts() == "abcdefgh" and prompts(limit=1) == "ae" and prompts(limit=3) == "abcefg"
    only = [np.array([3, 1]), np.array([0])]
    assert prompts(only=only) == "bde" and prompts(only=only, limit=1) == "be"


def test_a_fault_names_its_line(tmp_path):
    path = write(tmp_path / "a.jsonl", [*pairs("a>1"), {"prompt": "b"}])
    with pytest.raises(UserError, match=rf": {path}, line 2: field 'completion' is missing or null"):
        read(Source(path))


# Causal models


def test_a_causal_example_has_its_prompt_and_the_first_reference_after_it(path):
    found = read(Source(path), format=CausalFormat(0), max_seq_length=20)
    assert [example.prompt_tokens for example in found.examples] == [ids(text) for text in ("one", "two", "three")]
    for example, text in zip(found.examples, ("one1", "two2", "three3"), strict=True):
        assert example.encoded.target.tolist() == [*ids(text), END]
        assert example.encoded.loss_mask.tolist() == [False] * (len(text) - 1) + [True] * 2
    assert found.examples[1].references == ("2", "ii") and truncated(found) == 0


@pytest.mark.parametrize("truncate, prompt", [("end", "abcdef"), ("start", "cdefgh"), ("drop", "abcdef")])
def test_a_causal_prompt_is_cut_as_in_training_and_counted(tmp_path, truncate, prompt):
    source = Source(write(tmp_path / "a.jsonl", pairs("abcdefgh>x", "abc>x")))
    found = read(source, format=CausalFormat(0), max_seq_length=8, truncate=truncate)
    assert [example.prompt_tokens for example in found.examples] == [ids(prompt), ids("abc")]
    assert truncated(found) == 1 and found.examples[0].prompt == "abcdefgh"
    with pytest.raises(UserError, match=r"line 1: 10 tokens exceed the limit of 8; raise config\.data\.max_seq_length"):
        read(source, format=CausalFormat(0), max_seq_length=8, truncate="error")


def test_a_conversation_s_last_answer_is_the_reference_and_what_stands_before_it_the_prompt(tmp_path):
    it, format = checkpoint("llama3"), CausalFormat(0)
    says = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
    records = [{"messages": [*says, {**says[0], "content": "Bye"}, {**says[1], "content": "See you"}]}]
    source = Source(write(tmp_path / "a.jsonl", records))
    (example,) = read(source, format=format, tokenizer=it, max_seq_length=200).examples
    assert example.references == ("See you",)
    assert it.text(example.prompt_tokens).endswith(
        "Hello<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert it.text(example.encoded.target[example.encoded.loss_mask]) == "Hello<|eot_id|>See you<|eot_id|>"
    room = len(example.encoded.target) - 1
    found = read(source, format=format, tokenizer=it, max_seq_length=room, truncate="end")
    assert truncated(found) == 1
    assert it.text(found.examples[0].encoded.target[found.examples[0].encoded.loss_mask]) == "See you<|eot_id|>"
    assert "Hello" not in it.text(found.examples[0].prompt_tokens)


def test_what_comes_after_the_limit_is_not_read(tmp_path):
    path = write(tmp_path / "a.jsonl", pairs("a>x", "b>y"))
    Path(path).write_text(Path(path).read_text() + "{broken")
    assert len(read(Source(path), limit=2).examples) == 2
    assert [e.prompt for e in read(Source(path), only=[np.array([1])]).examples] == ["b"]
    with pytest.raises(UserError, match="line 3: not valid JSON"):
        read(Source(path))


@pytest.mark.parametrize("name", ["id", "task"])
def test_a_name_that_cannot_be_written_is_refused(tmp_path, name):
    path = write(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b", name: "\ud800"}])
    with pytest.raises(UserError, match=f"line 1: the field '{name}' cannot be written as text"):
        read(Source(path))


def test_invalid_records_are_refused_together_or_skipped(tmp_path):
    path = write(tmp_path / "a.jsonl", [*pairs("one>1"), {"prompt": "two"}, *pairs("three>3"), {"x": 1}])
    with pytest.raises(
        UserError, match=r"^data set a: 2 of 4 records are invalid: .*line 2: .*; .*line 4: .*; fix them"
    ):
        read(Source(path))
    found = read(Source(path), on_invalid="drop")
    assert [example.id for example in found.examples] == ["a/0", "a/2"] and found.skipped == 2
    it = checkpoint("llama3")
    path = write(
        tmp_path / "b.jsonl", [*pairs("one>1"), {"prompt": "two", "completion": "<|eot_id|>"}, *pairs("three>3")]
    )
    given = {"format": CausalFormat(0), "tokenizer": it, "max_seq_length": 100}
    found = read(Source(path), on_invalid="drop", **given)
    assert [example.id for example in found.examples] == ["b/0", "b/2"] and found.skipped == 1
    with pytest.raises(UserError, match="line 2: the assistant's turn"):
        read(Source(path), **given)
