"""Tasks as examples: prompts with their shots and options, and what is refused."""

import pytest

from jax_it.config import Data, Source, Task
from jax_it.data import tasks
from jax_it.data.formats import CausalFormat, Seq2SeqFormat
from jax_it.errors import UserError
from tests.data.chat_tokenizers import checkpoint
from tests.data.letters import END, Letters, ids, write

RECORDS = [
    {"id": "q1", "subject": "sums", "question": "one and one", "choices": ["one", "two"], "answer": 1},
    {"subject": "words", "question": "a word", "choices": ["cat", "7"], "answer": 0},
]
SHOTS = [
    {"subject": "sums", "question": "one and two", "choices": ["six", "three"], "answer": 1},
    {"subject": "words", "question": "a name", "choices": ["ann", "4"], "answer": 0},
    {"subject": "sums", "question": "two and two", "choices": ["four", "one"], "answer": 0},
    {"subject": "words", "question": "a place", "choices": ["rome", "x"], "answer": 0},
    {"subject": "sums", "question": "too many", "choices": ["yes", "no"], "answer": 0},
]
TEMPLATE = ("{{question}} a ||| {{choices[answer]}}",)
OPTIONS = "{{choices | join('|||')}}"


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "test.jsonl", RECORDS)
    write(tmp_path / "dev.jsonl", SHOTS)
    return tmp_path


def task(folder, **given):
    data = Source(f"{folder}/test.jsonl", template=given.pop("template", TEMPLATE))
    return Task(**{"name": "quiz", "data": data, "metrics": ("exact_match",), **given})


def with_shots(folder, **given):
    shots = Source(f"{folder}/dev.jsonl", template=TEMPLATE)
    return task(folder, **{"fewshot": shots, "num_fewshot": 2, "fewshot_by": "subject", **given})


def read(task, tokenizer=None, format=None, limit=0, **data):
    settings = Data(**{"max_source_length": 100, "max_seq_length": 100, **data})
    tokenizer, format = tokenizer or Letters(), format or Seq2SeqFormat(0, 0)
    return tasks.read(task, "config.eval.tasks.0", settings, tokenizer, format, limit)


def refusal(*given, **more):
    with pytest.raises(UserError) as caught:
        read(*given, **more)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_example_has_its_prompt_and_references_as_texts_and_tokens(folder):
    first, second = read(task(folder, group_by="subject"))
    assert (first.id, first.group, first.prompt, first.references) == ("q1", "sums", "one and one a", ("two",))
    assert first.prompt_tokens == [*ids("one and one a"), END] and first.fields == RECORDS[0]
    assert (second.id, second.group, first.options, first.truncated) == ("test/1", "words", (), False)
    assert len(read(task(folder), limit=1)) == 1


def test_shots_agree_with_the_record_and_stand_before_it_with_their_answers(folder):
    found = read(with_shots(folder, description="about {{subject}}", fewshot_delimiter=" / "))
    assert [example.prompt for example in found] == [
        "about sums / one and two a three / two and two a four / one and one a",
        "about words / a name a ann / a place a rome / a word a",
    ]
    assert found[0].prompt_tokens == [*ids(found[0].prompt), 1]
    any_subject = read(with_shots(folder, fewshot_by="", num_fewshot=1, target_delimiter=": "))
    assert [example.prompt for example in any_subject] == [
        "one and two a: three\n\none and one a",
        "one and two a: three\n\na word a",
    ]


def test_a_record_is_no_shot_of_its_own(folder):
    write(folder / "dev.jsonl", [RECORDS[0], *SHOTS])
    assert read(with_shots(folder))[0].prompt.startswith("one and two a three")


def test_an_encoder_decoder_s_option_ends_with_the_end_mark(folder):
    first, _ = read(task(folder, score="multiple_choice", options=OPTIONS))
    assert [(option.text, option.tokens) for option in first.options] == [
        ("one", [*ids("one"), END]),
        ("two", [*ids("two"), END]),
    ]
    assert all(option.prompt == first.prompt_tokens for option in first.options)


@pytest.mark.parametrize("name", ["smollm2", "qwen2_5", "llama2", "mistral_v3", "gemma", "llama3"])
def test_a_causal_model_s_option_is_tokenized_together_with_the_prompt_and_has_no_end_mark(folder, name):
    tokenizer = checkpoint(name)
    for example in read(task(folder, score="multiple_choice", options=OPTIONS, chat=False), tokenizer, CausalFormat(0)):
        start = [] if tokenizer.start is None else [tokenizer.start]
        assert example.prompt_tokens == [*start, *tokenizer.encode([example.prompt])[0]]
        for option in example.options:
            whole = [*start, *tokenizer.encode([f"{example.prompt} {option.text}"])[0]]
            assert [*option.prompt, *option.tokens] == whole and option.tokens
            assert tokenizer.end not in option.tokens


@pytest.mark.parametrize("name", ["smollm2", "qwen2_5", "gemma3", "mistral_v1", "llama3_1"])
def test_with_a_chat_template_the_option_is_the_answer_without_the_end_of_its_turn(folder, name):
    tokenizer = checkpoint(name)
    for example in read(
        task(folder, score="multiple_choice", options=OPTIONS), tokenizer, CausalFormat(0), max_seq_length=300
    ):
        for option in example.options:
            messages = [{"role": "user", "content": example.prompt}, {"role": "assistant", "content": option.text}]
            whole = tokenizer.backend.apply_chat_template(messages, tokenize=False)
            together = tokenizer.text([*option.prompt, *option.tokens])
            assert whole.replace(" ", "").startswith(together.replace(" ", ""))
            assert tokenizer.decode(option.tokens).strip() == option.text
            assert option.prompt == example.prompt_tokens


def test_of_several_templates_the_first_is_taken_whose_prompt_is_not_too_long(folder):
    templates = (TEMPLATE[0], "{{question}} ||| {{choices[answer]}}", "q ||| {{choices[answer]}}")
    found = read(task(folder, template=templates), max_source_length=9)
    assert [example.prompt for example in found] == ["q", "a word a"]
    assert read(task(folder, template=templates, max_prompt_length=12))[0].prompt == "one and one"


def test_shots_are_left_out_where_the_task_lets_them_be(folder):
    found = read(with_shots(folder, truncate="fewshot", max_prompt_length=60, fewshot_delimiter=" "))
    assert [example.prompt for example in found] == [
        "one and two a three two and two a four one and one a",
        "a name a ann a place a rome a word a",
    ]
    assert [example.truncated for example in found] == [False, False]
    found = read(with_shots(folder, truncate="fewshot", max_prompt_length=38, fewshot_delimiter=" "))
    assert [(example.prompt, example.truncated) for example in found] == [
        ("one and two a three one and one a", True),
        ("a name a ann a place a rome a word a", False),
    ]
    assert read(with_shots(folder, truncate="fewshot", max_prompt_length=15))[0].prompt == "one and one a"
    assert "the prompt has 14 tokens, more than 13" in refusal(
        with_shots(folder, truncate="fewshot", max_prompt_length=13)
    )


@pytest.mark.parametrize("side, kept", [("end", "one an"), ("start", " one a")])
def test_a_prompt_is_cut_only_where_the_task_says_so(folder, side, kept):
    first, _ = read(task(folder, truncate=side, max_prompt_length=7))
    assert first.truncated and first.prompt == "one and one a"  # the text tells what it was
    assert first.prompt_tokens == [*ids(kept), END]
    ranked = read(task(folder, truncate=side, max_prompt_length=7, score="multiple_choice", options=OPTIONS))[0]
    assert all(option.prompt == first.prompt_tokens for option in ranked.options)


def test_a_prompt_that_is_too_long_is_refused_with_what_to_do(folder):
    where = f"{folder}/test.jsonl, line 1: the prompt has"
    assert refusal(task(folder), max_source_length=13) == (
        f"{where} 14 tokens, more than 13; raise config.data.max_source_length or "
        "config.eval.tasks.0.max_prompt_length, or let prompts be cut with config.eval.tasks.0.truncate"
    )
    assert refusal(with_shots(folder, max_prompt_length=20)) == (
        f"{where} 55 tokens, more than 20; lower config.eval.tasks.0.num_fewshot, raise "
        "config.eval.tasks.0.max_prompt_length, or let prompts be cut with config.eval.tasks.0.truncate"
    )
    causal = CausalFormat(0)
    message = refusal(task(folder, max_new_tokens=90), format=causal)
    assert f"{where} 13 tokens and its answer up to 90, more than 100; raise config.data.max_seq_length or" in message
    assert len(read(task(folder, max_new_tokens=87), format=causal)) == 2
    # Of options the longest counts, not what might be generated.
    assert len(read(task(folder, max_new_tokens=90, score="multiple_choice", options=OPTIONS), format=causal)) == 2


FIELD = "{{options | join('|||')}}"


@pytest.mark.parametrize(
    "changes, given, message",
    [
        ({"question": " "}, {"template": ("{{question}} ||| x",)}, "the prompt is empty; fix or remove the record"),
        ({"choices": ["one", " "]}, {}, "there is no reference to compare with; fix or remove the record"),
        ({"answer": 2}, {}, "has no element 2"),
        ({"choices": None}, {"score": "multiple_choice"}, "None has no element 1"),
        ({"answer": None}, {"template": ("{{question}} ||| {{answer}}",)}, "a value that it prints is null"),
        (
            {"choices": ["", "two"]},
            {"score": "multiple_choice"},
            "two options or more are needed, none of them empty; it has ''",
        ),
        ({"options": ["two"]}, {"score": "multiple_choice", "options": FIELD}, "it has 'two'"),
        ({"options": []}, {"score": "multiple_choice", "options": FIELD}, "it has ''"),
        (
            {"options": "gone"},
            {"score": "multiple_choice", "options": FIELD},
            "'options' is missing, which template",
        ),
        (
            {"options": ["3", "4"]},
            {"score": "multiple_choice", "options": FIELD},
            "the reference 'two' is not among the options: '3', '4'",
        ),
        ({"subject": None}, {"group_by": "subject"}, "no field 'subject', which config.eval.tasks.0.group_by names"),
        ({"subject": ""}, {"group_by": "subject"}, "no field 'subject', which config.eval.tasks.0.group_by names"),
    ],
)
def test_a_record_that_cannot_be_scored_is_named_with_what_is_wrong(folder, changes, given, message):
    bad = {name: value for name, value in (RECORDS[0] | changes).items() if value != "gone"}
    write(folder / "test.jsonl", [RECORDS[1] | {"options": ["cat", "7"]}, bad])
    options = {"options": OPTIONS} if given.get("score") == "multiple_choice" else {}
    found = refusal(task(folder, **{**options, **given}))
    assert found.startswith(f"{folder}/test.jsonl, line 2: ") and message in found


def test_a_task_whose_programs_are_run_needs_no_reference(folder):
    write(folder / "test.jsonl", [{"prompt": " def f():\n"}])
    (found,) = read(
        Task(name="code", data=Source(f"{folder}/test.jsonl", template=("prompt",)), score="code_execution")
    )
    assert (found.prompt, found.references) == (" def f():\n", ())


def test_too_few_shots_of_a_subject_are_refused(folder):
    assert refusal(with_shots(folder, num_fewshot=3)) == (
        f"config.eval.tasks.0.fewshot: {folder}/dev.jsonl has 2 examples for {folder}/test.jsonl, line 2 where subject "
        "is 'words', fewer than num_fewshot=3; lower that, or add some"
    )
    write(folder / "dev.jsonl", [{**SHOTS[0], "choices": ["six", ""]}])
    assert "dev.jsonl, line 1: a few-shot example needs a prompt and an answer" in refusal(with_shots(folder))
    write(folder / "dev.jsonl", [{**SHOTS[0], "subject": None}])
    message = "no field 'subject', which config.eval.tasks.0.fewshot_by names"
    assert message in refusal(with_shots(folder))


def test_a_source_that_is_not_there_is_named_by_its_setting(folder):
    (folder / "dev.jsonl").unlink()
    assert refusal(with_shots(folder)).startswith("config.eval.tasks.0.fewshot: data file")
    (folder / "test.jsonl").unlink()
    assert refusal(task(folder)).startswith("config.eval.tasks.0.data: data file")


def test_a_group_is_the_first_of_a_list(folder):
    write(folder / "test.jsonl", [RECORDS[0] | {"subject": ["sums", "other"]}])
    assert [example.group for example in read(task(folder, group_by="subject"))] == ["sums"]
