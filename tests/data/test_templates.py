import math
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from jax_it.data import templates
from jax_it.data.sources import Record
from jax_it.data.templates import TEMPLATES, Example, Turn, prompt, render
from jax_it.errors import UserError

WHERE = "data/train.jsonl, line 7"


def example(template: str, **fields: Any) -> Example:
    return render(Record(fields, WHERE), template)


def refusal(template: str, **fields: Any) -> str:
    with pytest.raises(UserError) as caught:
        example(template, **fields)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def pair(prompt: str, *completions: str) -> Example:
    return Example((Turn("user", prompt), Turn("assistant", completions[0])), completions)


USER = {"role": "user", "content": "Hi"}
ASSISTANT = {"role": "assistant", "content": "Hello"}
SYSTEM = {"role": "system", "content": "Be kind."}

# As the collator of github.com/yizhongw/Tk-Instruct writes it, without the blank at the end.
TK_INSTRUCT = """\
Definition: Add the numbers!

 Positive Example 1 -
Input: 1 + 1.
 Output: 2.

 Positive Example 2 -
Input: (2, 3)
 Output: Five!

Now complete the following example -
Input: 4 and 5.
Output:"""

SUPER_NI = {
    "Definition": ["Add the numbers! "],
    "Positive Examples": [
        {"input": "1 + 1", "output": "2", "explanation": "a sum"},
        {"input": "(2, 3)", "output": "Five!", "explanation": ""},
        {"input": "0", "output": "0", "explanation": ""},
    ],
    "Negative Examples": [],
    "input": " 4 and 5 ",
    "output": ["9", "nine"],
}

# By template: what goes in, and what comes out.
SHAPES: list[tuple[str, dict[str, Any], Example]] = [
    ("prompt_completion", {"prompt": "a", "completion": "b", "more": 5}, pair("a", "b")),
    ("prompt_completion", {"prompt": "a", "completion": ["b", "c"]}, pair("a", "b", "c")),
    ("prompt_completion", {"prompt": "a", "completion": []}, pair("a", "")),
    ("prompt_completion", {"prompt": " a\n", "completion": ""}, pair(" a\n", "")),
    ("alpaca", {"instruction": "a", "input": "x", "output": "b"}, pair("a\n\nx", "b")),
    ("alpaca", {"instruction": "a", "input": "", "output": "b"}, pair("a", "b")),
    ("alpaca", {"instruction": "a", "input": None, "output": "b"}, pair("a", "b")),
    ("alpaca", {"instruction": "a", "output": ["b", "c"]}, pair("a", "b", "c")),
    ("messages", {"messages": [USER, ASSISTANT]}, pair("Hi", "Hello")),
    (
        "messages",
        {"messages": [SYSTEM, USER, ASSISTANT]},
        Example((Turn("system", "Be kind."), Turn("user", "Hi"), Turn("assistant", "Hello")), ("Hello",)),
    ),
    (
        "messages",
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        pair("Hi", "Hello"),
    ),
    (
        "messages",
        {"messages": [SYSTEM, USER, ASSISTANT, {"role": "user", "content": "Bye"}, {**ASSISTANT, "content": ""}]},
        Example(
            (
                Turn("system", "Be kind."),
                Turn("user", "Hi"),
                Turn("assistant", "Hello"),
                Turn("user", "Bye"),
                Turn("assistant", ""),
            ),
            ("",),
        ),
    ),
    ("super_ni", SUPER_NI, pair(TK_INSTRUCT, "9", "nine")),
    ("messages", {"messages": [{**SYSTEM, "content": ""}, USER, ASSISTANT]}, pair("Hi", "Hello")),
    (
        "messages",
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]},
                ASSISTANT,
            ]
        },
        pair("Hi", "Hello"),
    ),
]


@pytest.mark.parametrize("template, fields, expected", SHAPES)
def test_a_template_makes_an_example_of_its_shape(template, fields, expected):
    assert example(template, **fields) == expected


@pytest.mark.parametrize("template, fields, expected", SHAPES)
def test_auto_takes_the_template_that_fits(template, fields, expected):
    assert example("auto", **fields) == expected


def test_every_template_has_its_shapes_here():
    others = {"auto", "prompt", "super_ni_1_example", "super_ni_definition"}
    assert {template for template, _, _ in SHAPES} | others == set(TEMPLATES)


def test_a_super_ni_prompt_may_have_fewer_examples_than_two():
    first, rest = TK_INSTRUCT.split(" Positive Example 2 -")
    last = rest[rest.index("Now") :]
    assert example("super_ni_1_example", **SUPER_NI).prompt == first + last
    assert example("super_ni_definition", **SUPER_NI).prompt == "Definition: Add the numbers!\n\n" + last
    one = SUPER_NI | {"Positive Examples": SUPER_NI["Positive Examples"][:1]}
    assert example("super_ni", **one).prompt == first + last
    without = {name: value for name, value in SUPER_NI.items() if name != "Positive Examples"}
    assert example("super_ni", **without).prompt == "Definition: Add the numbers!\n\n" + last


def test_a_super_ni_setting_has_the_definition_examples_and_explanations_that_it_names():
    """As `def_pos_neg_with_exp` of Tk-Instruct: the collator of github.com/yizhongw/Tk-Instruct."""
    fields = SUPER_NI | {"Negative Examples": [{"input": "1", "output": "3", "explanation": "too much"}]}
    whole = TK_INSTRUCT.replace(" Output: 2.\n", " Output: 2.\n Explanation: a sum.\n").replace(
        "Now complete", " Negative Example 1 -\nInput: 1.\n Output: 3.\n Explanation: too much.\n\nNow complete"
    )
    assert example("super_ni:def,pos=2,neg=2,expl", **fields).prompt == whole
    assert example("super_ni:def,pos=2", **fields) == example("super_ni", **fields)
    assert (
        example("super_ni:pos=1", input="a", output="b").prompt
        == "Now complete the following example -\nInput: a.\nOutput:"
    )
    assert example("super_ni:neg=1", **fields).prompt.startswith(" Negative Example 1 -\nInput: 1.\n Output: 3.\n\nNow")
    assert refusal("super_ni:def,shots=2", **fields).startswith(
        "template 'super_ni:def,shots=2': 'shots=2' is none of def, pos=K, neg=K and expl; write for example"
    )


def test_a_prompt_alone_is_taken_as_it_is_and_has_no_reference():
    assert example("prompt", prompt=" def f():\n") == pair(" def f():\n", "")


def test_texts_are_the_parts_of_jinja_text_and_bars_of_the_record_s_own_divide_none():
    record = Record({"choices": ["a|||b", " c "], "n": 3}, WHERE)
    assert templates.texts(record, "{{choices | join('|||')}}") == ["a|||b", "c"]
    assert templates.texts(record, "yes ||| no ||| {{n}}") == ["yes", "no", "3"]
    assert templates.texts(record, "{{n}} ||| {{choices | tojson | upper}}") == ["3", '["A|||B", " C "]']
    assert templates.texts(Record({"a": "x|", "b": "|y"}, WHERE), "{{a}}|||{{b}}") == ["x|", "|y"]
    assert templates.text(record, " {{n}}.\n") == "3."
    with pytest.raises(
        UserError, match=r"line 7: 'm' is missing, which template '\{\{m\}\}' needs; its fields: choices, n"
    ):
        templates.text(record, "{{m}}")


def test_a_system_message_stands_before_the_prompt():
    found = example("messages", messages=[SYSTEM, USER, ASSISTANT])
    assert (found.prompt, found.completion) == ("Be kind.\n\nHi", "Hello")


@pytest.mark.parametrize(
    "template, fields, message",
    [
        ("prompt_completion", {"prompt": "a"}, "field 'completion' is missing or null, which template "
         "'prompt_completion' needs; its fields: prompt"),
        ("prompt_completion", {"prompt": None, "completion": "a"}, "field 'prompt' is missing or null"),
        ("prompt_completion", {"prompt": "a", "completion": math.nan}, "field 'completion' is nan, not text"),
        ("prompt_completion", {"prompt": ["a"], "completion": "b"}, "field 'prompt' is list, not text"),
        ("prompt_completion", {"prompt": "a", "completion": ["b", None]}, "field 'completion' is NoneType, not"),
        ("super_ni", {"Definition": ["a"], "output": ["b"]}, "field 'input' is missing or null"),
        ("super_ni", SUPER_NI | {"Definition": {}}, "field 'Definition' is dict, not text"),
        ("super_ni", SUPER_NI | {"Positive Examples": ["a"]}, "the field 'Positive Examples' is not a list"),
        ("super_ni", SUPER_NI | {"Positive Examples": [{"input": "a"}]}, "field 'output' is missing or null"),
        ("alpaca", {"instruction": "a"}, "field 'output' is missing or null"),
        ("alpaca", {"instruction": "a", "input": ["c"], "output": "b"}, "field 'input' is list, not text"),
        ("messages", {"text": "a"}, "field 'messages' or 'conversations' is missing or null"),
        ("messages", {"messages": "Hi"}, "the messages are not a list of objects with role and content"),
        ("messages", {"messages": ["Hi"]}, "the messages are not a list of objects with role and content"),
        ("messages", {"messages": 5}, "the messages are not a list of objects with role and content"),
        ("messages", {"messages": [{"role": "user"}]}, "field 'content' or 'value' is missing or null"),
        ("messages", {"messages": [{"content": "Hi"}]}, "field 'role' or 'from' is missing or null"),
        ("messages", {"messages": [{"role": ["user"], "content": "Hi"}]}, "field 'role' is list, not text"),
        ("messages", {"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "field 'content' is list, not"),
        ("messages", {"messages": []}, "neither the user nor the assistant has a message (roles: none)"),
        ("messages", {"messages": [SYSTEM]}, "neither the user nor the assistant has a message (roles: system)"),
        ("messages", {"messages": [ASSISTANT, USER]}, "the messages begin with the assistant, as many ShareGPT"),
        ("messages", {"messages": [SYSTEM, ASSISTANT]}, "the messages begin with the assistant, as many ShareGPT"),
        ("messages", {"messages": [USER, USER, ASSISTANT]}, "two user messages in a row, the second of which"),
        ("messages", {"messages": [USER, ASSISTANT, ASSISTANT]}, "two assistant messages in a row, the second"),
        ("messages", {"messages": [USER, ASSISTANT, USER]}, "the messages end with the user; the last one must be the"),
        ("messages", {"messages": [USER, SYSTEM, ASSISTANT]}, "message 2 is a system message, which may only come"),
        ("messages", {"messages": [SYSTEM, SYSTEM, USER, ASSISTANT]}, "message 2 is a system message, which may only"),
        ("messages", {"messages": [USER, {"role": "tool", "content": "4"}]}, "turn 2 is a tool's result, and the"),
        ("messages", {"messages": [USER, {"role": "critic", "content": "4"}]}, "message 2 has the role 'critic', not"),
        ("messages", {"conversations": [{"from": "bot", "value": "Hi"}]}, "message 1 has the role 'bot', not"),
        ("messages", {"messages": [{"role": "user", "content": " "}, ASSISTANT]}, "turn 1, the user's, is empty"),
        ("messages", {"messages": [USER, {**ASSISTANT, "content": ""}, USER, ASSISTANT]}, "turn 2, the assistant's"),
        ("messages", {"messages": [USER, {**ASSISTANT, "tool_calls": [{}]}]}, "message 2 calls a tool without a name"),
        ("messages", {"messages": [USER, {"role": "assistant", "content": None}]}, "field 'content' or 'value' is"),
        ("auto", {"question": "a", "answer": "b"}, "has none of the fields 'messages', 'conversations', "
         "'prompt', 'instruction', 'Definition', which template 'auto' needs; its fields: question, answer; "
         "try a template such as '{{question}} ||| {{answer}}'"),
        ("auto", {"messages": [USER, ASSISTANT], "prompt": "Bye", "completion": "b"}, "it has both 'messages' and "
         "'prompt', and they differ; set the template to 'messages' or 'prompt_completion'"),
        ("auto", {}, "has none of the fields 'messages', 'conversations', 'prompt', 'instruction', 'Definition', which "
         "template 'auto' needs; its fields: none"),
    ],
)  # fmt: skip
def test_a_record_of_another_shape_is_refused_with_its_place_the_field_and_those_it_has(template, fields, message):
    assert refusal(template, **fields).startswith(f"{WHERE}: {message}")


@pytest.mark.parametrize(
    "value, text", [(1, "1"), (0, "0"), (-3, "-3"), (0.5, "0.5"), (True, "True"), (False, "False")]
)
def test_a_number_is_the_text_that_python_prints(value, text):
    assert example("auto", prompt="a", completion=value).references == (text,)
    assert example("{{prompt}} ||| {{completion}}", prompt="a", completion=value) == pair("a", text)
    assert example("auto", prompt="a", completion=[value, "b"]).references == (text, "b")
    assert example("auto", instruction=value, input=value, output="b").prompt == f"{text}\n\n{text}" if value else text


def test_messages_may_repeat_the_first_question_as_the_prompt():
    for first in ([], [SYSTEM]):  # as in UltraChat 200k and No Robots
        found = example("auto", messages=[*first, USER, ASSISTANT], prompt="Hi", prompt_id="f0")
        assert found.turns[-1] == Turn("assistant", "Hello")
    assert example("auto", messages=None, prompt="a", completion="b") == pair("a", "b")


@pytest.mark.parametrize(
    "template, fields, turns",
    [
        ("auto", {"prompt": "a", "completion": ["b", "c"]}, (Turn("user", "a"),)),
        ("auto", {"prompt": "a"}, (Turn("user", "a"),)),
        ("auto", {"prompt": "a", "completion": 3}, (Turn("user", "a"),)),
        ("auto", {"instruction": "a", "input": "b"}, (Turn("user", "a\n\nb"),)),
        ("alpaca", {"instruction": "a", "output": None}, (Turn("user", "a"),)),
        ("super_ni_definition", {"Definition": "a.", "input": "b"},
         (Turn("user", "Definition: a.\n\nNow complete the following example -\nInput: b.\nOutput:"),)),
        ("auto", {"messages": [USER]}, (Turn("user", "Hi"),)),
        ("auto", {"messages": [SYSTEM, USER, ASSISTANT]}, (Turn("system", "Be kind."), Turn("user", "Hi"))),
        ("auto", {"messages": [USER, ASSISTANT, USER]},
         (Turn("user", "Hi"), Turn("assistant", "Hello"), Turn("user", "Hi"))),
        ("messages", {"conversations": [{"from": "human", "value": "Hi"}]}, (Turn("user", "Hi"),)),
        ("{{question}} ||| {{answer}}", {"question": "a"}, (Turn("user", "a"),)),
        ("{{question}} ||| {{answer}}", {"question": "a", "answer": "b"}, (Turn("user", "a"),)),
        ("{% if a %}{{ a }} ||| {{ b[0] }}{% endif %}", {"a": "x"}, (Turn("user", "x"),)),
        ("{{ output }}: ||| {{ b }}", {"output": "x", "b": 1}, (Turn("user", "x:"),)),
    ],
)  # fmt: skip
def test_the_prompt_of_a_record_does_not_need_its_completion(template, fields, turns):
    assert prompt(Record(fields, WHERE), template) == turns


@pytest.mark.parametrize(
    "template, fields, message",
    [
        ("messages", {"messages": [{"role": "user", "content": "\n"}]}, "turn 1, the user's, is empty"),
        ("messages", {"messages": [{"role": "user", "content": "\ud83d"}]}, ".* is half of a surrogate pair"),
        ("messages", {"messages": [ASSISTANT]}, "the messages begin with the assistant, as many ShareGPT threads do"),
        ("{{question}} ||| {{answer}}", {"answer": "b"}, "'question' is missing, which template"),
        ("{% for i in [1, 2] %}{{ i }}{{ x }}{% endfor %} ||| {{ b }}", {}, "'x' is missing, which template"),
    ],
)  # fmt: skip
def test_a_record_without_a_prompt_is_refused_with_its_place(template, fields, message):
    with pytest.raises(UserError, match=f"^{WHERE}: {message}"):
        prompt(Record(fields, WHERE), template)


def test_a_prompt_is_rendered_within_the_bounds_of_a_template():
    with pytest.raises(UserError, match="it takes more than"):
        prompt(Record({}, WHERE), "{% for i in range(1000) %}{% for j in range(10000) %}{% endfor %}{% endfor %} ||| b")


def test_half_a_surrogate_pair_is_refused_before_a_tokenizer_fails_on_it():
    assert example("auto", prompt="\U0001f600", completion="b").prompt == "\U0001f600"
    for fields in ({"prompt": "\ud83d", "completion": "b"}, {"prompt": "a", "completion": ["b", "\ude00"]}):
        assert "is half of a surrogate pair, which is not text" in refusal("auto", **fields)


# Jinja


@pytest.mark.parametrize(
    "template, fields, expected",
    [
        ("Q: {{q}} A: ||| {{a}}", {"q": "why", "a": "so"}, pair("Q: why A:", "so")),
        ("{{q}}|||{{a}}", {"q": " x ", "a": "\ny\n"}, pair("x", "y")),
        ("{{q}} ||| {{a}} ||| {{b}}", {"q": "x", "a": "y", "b": "z"}, pair("x", "y", "z")),
        ("{{q}} ||| {{a | join(' ||| ')}}", {"q": "x", "a": ["y", "z", ""]}, pair("x", "y", "z")),
        ("{{q}} ||| {{a | join(' ||| ')}}", {"q": "x", "a": []}, pair("x", "")),
        ("{{q}} ||| ", {"q": "x"}, pair("x", "")),
        ("{{q}} {% if a %} ||| {{a}} {% endif %}", {"q": "x", "a": ""}, pair("x", "")),
        ("{{q.text[0]}} ||| {{q['n'] + 1}}", {"q": {"text": ["x"], "n": 1}}, pair("x", "2")),
        ("{{q}} ||| {{['no', 'yes'][label]}}", {"q": "x", "label": 1}, pair("x", "yes")),
        ("{{q}} ||| {{a or 'none'}}", {"q": "x", "a": None}, pair("x", "none")),
        ("{% if c is defined %}{{c}}{% endif %}{{q}} ||| b", {"q": "x"}, pair("x", "b")),
        ("{{self_}} ||| {{loop}}", {"self_": "x", "loop": "y"}, pair("x", "y")),
        ("<b>{{q}}</b> ||| {{a}}", {"q": "x & y", "a": "<z>"}, pair("<b>x & y</b>", "<z>")),
    ],
)
def test_bars_divide_a_jinja_text_into_the_prompt_and_its_references(template, fields, expected):
    assert example(template, **fields) == expected


def test_bars_in_a_record_s_own_texts_divide_nothing():
    found = example("{{q}} ||| {{a | join(' ||| ')}}", q="x ||| y", a=["1 ||| 2", "|||"])
    assert found == pair("x ||| y", "1 ||| 2", "|||")
    found = example("{% for row in rows %}{{row.text}}{% endfor %} ||| b", rows=[{"text": "||||"}, {"text": "c"}])
    assert found == pair("||||c", "b")


@pytest.mark.parametrize(
    "template, message",
    [
        ("{{q}} ||| {{answer}}", "'answer' is missing"),
        ("{{q}} ||| {{a.text}}", "'str object' has no attribute 'text'"),
        ("{{q}} ||| {{n}}", "a value that it prints is null"),
    ],
)
def test_an_absent_field_is_refused_with_its_place_and_the_fields_there_are(template, message):
    found = refusal(template, q="x", a="y", n=None)
    assert found.startswith(f"{WHERE}: {message}")
    assert found.endswith(f", which template {template!r} needs; its fields: q, a, n")


@pytest.mark.parametrize(
    "template, message",
    [
        ("{{q}} ||| {{1 / 0}}", "ZeroDivisionError (division by zero)"),
        ("{{q + 1}} ||| {{a}}", 'TypeError (can only concatenate str (not "int") to str)'),
        ("{% for i in range(q) %}{% endfor %} ||| b", "TypeError ('str' object cannot be interpreted as an integer)"),
        ("{{q}} ||| {{q | map('upper')}}", "it prints an object, not the items in it; add '| list' or '| join'"),
        ("{{q | unique ~ '!'}} ||| {{a}}", "it prints an object, not the items in it; add '| list' or '| join'"),
        ("{{q}} ||| {{[joiner()]}}", "it prints an object, not the items in it; add '| list' or '| join'"),
        ("{{q}} ||| {{[q] | map('ran' ~ 'dom') | list}}", "TemplateRuntimeError (No filter named 'random'.)"),
    ],
)
def test_a_template_that_cannot_be_computed_is_refused_with_the_types_of_the_fields(template, message):
    found = refusal(template, q="x", a="y", n=None)
    assert found == f"{WHERE}: template {template!r} fails: {message}; its fields: q (str), a (str), n (NoneType)"


def test_an_object_s_address_in_a_record_or_a_template_is_text_like_any_other():
    text = "<f object at 0x7f00aa>"
    assert example("{{q}} ||| " + text, q=[text]) == pair(str([text]), text)


@pytest.mark.parametrize(
    "template, name",
    [
        ("{{q}} ||| {{[1, 2] | random}}", "random"), ("{{q}} ||| {% set a = q\n|\nrandom %}{{a}}", "random"),
        ("{{q}} ||| {{lipsum()}}", "lipsum"), ("{{q}} ||| {{[[1]] | map('random') | join}}", "random"),
    ],
)  # fmt: skip
def test_a_template_that_would_give_other_data_each_time_is_refused(template, name):
    assert f" uses {name!r}, whose result changes on every call; use 'choice'" in refusal(template, q="x")
    assert example("{{random}} | random ||| {{lipsum_}}", random="a", lipsum_="b") == pair("a | random", "b")


@pytest.mark.parametrize(
    "text",
    ["{{" + "(" * 3000 + "1" + ")" * 3000 + "}}", "{{" + "-" * 9999 + "1}}", "{{" + "9" * 5000 + "}}",
     "{% for i in a %}" * 30 + "{% endfor %}" * 30, "{{" + "[" * 300 + "]" * 300 + "}}", "{{" + "a." * 5000 + "b}}"],
)  # fmt: skip
def test_jinja_that_python_cannot_compile_is_refused_in_one_line(text):
    found = refusal(text + " ||| b", a="x")
    assert found.startswith("template '{") and " is not valid Jinja: " in found and len(found) < 400


def test_a_long_template_is_shortened_in_messages():
    assert "which template '" + "x" * 29 + "…" + "x" * 13 + "{{q}} ||| {{a}}' needs" in refusal(
        "x" * 100 + "{{q}} ||| {{a}}"
    )


@pytest.mark.parametrize(
    "template, message",
    [
        ("{{q} ||| {{a}}", "is not valid Jinja: unexpected '}'"),
        ("{% if q %} ||| {{a}}", "is not valid Jinja: Unexpected end of template"),
        ("{{q | shout}} ||| {{a}}", "is not valid Jinja: No filter named 'shout'"),
        ("alpacca", f"is not one of {', '.join(TEMPLATES)}, nor Jinja text with '|||' in it"),
        (
            "{{q}} || {{a}}",
            f"is not one of {', '.join(TEMPLATES)}, nor Jinja text with '|||' in it",
        ),
    ],
)
def test_a_text_that_is_no_template_is_refused(template, message):
    assert refusal(template, q="x", a="y").startswith(f"template {template!r} {message}")


@pytest.mark.parametrize(
    "expression",
    [
        "q.__class__", "q.__class__.__mro__", "''.__class__.__base__.__subclasses__()", "'%s' % q.__class__",
        "choice.__globals__", "self.__init__.__globals__", "range(10 ** 9) | list",
    ],
)  # fmt: skip
def test_a_template_does_not_reach_python(expression):
    assert refusal("{{" + expression + "}} ||| b", q=["x"]).startswith(f"{WHERE}: ")


def test_a_template_changes_its_own_copy_of_a_record_alone():
    fields = {"q": ["x"], "d": {"a": [0]}}
    template = "{% set _ = q.append('y') %}{% set _ = d.a.append(1) %}{{q | join}} ||| {{d.a | join}}"
    assert [example(template, **fields) for _ in range(2)] == [pair("xy", "01")] * 2
    assert fields == {"q": ["x"], "d": {"a": [0]}}


@pytest.mark.parametrize(
    "items, expected",
    [(["b", "a", "b"], "b"), (["b", "a"], "b,a"), (["a", "b", "b", "a", "c"], "a,b"), ([], ""), ([1, 1, 2], "1")],
)
def test_most_frequent_gives_what_occurs_most_in_the_order_of_first_occurrence(items, expected):
    assert example("q ||| {{items_ | most_frequent | join(',')}}", items_=items).completion == expected


def test_choice_depends_on_its_options_alone_and_uses_all_of_them():
    def drawn(options: list[Any]) -> str:
        return example("{{choice(options)}} ||| {{options | choice}}", options=options).prompt

    lists = [[f"{i}{letter}" for letter in "abc"] for i in range(60)]
    before = [drawn(options) for options in lists]
    random.seed(5)
    assert [drawn(options) for options in lists] == before
    counts = Counter(text[-1] for text in before)
    assert set(counts) == set("abc") and min(counts.values()) > 8
    found = example("{{choice(options)}} ||| {{options | choice}}", options=["x", "y", "z"])
    assert found.prompt == found.completion
    code = (
        "from jax_it.data.sources import Record\nfrom jax_it.data.templates import render\n"
        f"for options in {lists!r}: print(render(Record({{'o': options}}, ''), '{{{{choice(o)}}}} ||| b').prompt)"
    )
    environment = os.environ | {"PYTHONHASHSEED": "3"}
    root = Path(__file__).parents[2]
    assert subprocess.check_output([sys.executable, "-c", code], env=environment, cwd=root, text=True).split() == before


def test_choice_among_nothing_is_refused():
    assert refusal("{{choice([])}} ||| b").startswith(
        f"{WHERE}: template '{{{{choice([])}}}} ||| b' fails: IndexError ("
    )
