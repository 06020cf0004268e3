"""What is trained on in conversations with tools, tool calls and reasoning, by published chat templates."""

import dataclasses
import json
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from jax_it.config import Data, Source
from jax_it.data import build_eval, chat, sources, templates
from jax_it.data.causal import CausalFormat
from jax_it.data.encoding import Counts
from jax_it.data.mixture import hold_out, mix
from jax_it.data.records import Record
from jax_it.data.templates import ToolCall, Turn
from jax_it.data.tokenized import tokenize
from jax_it.errors import UserError
from tests.data.chat_tokenizers import KINDS, checkpoint, made
from tests.data.test_chat import encode, refusal, trained

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "A city."}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}
CITY = {"city": 'Köln, "K"'}
CALL = {"id": "call00001", "type": "function", "function": {"name": "get_weather", "arguments": CITY}}
RESULT = {"role": "tool", "tool_call_id": "call00001", "name": "get_weather", "content": '{"sky": "grün"}'}
ASK = {"role": "user", "content": "Weather in Köln?"}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
ANSWER = {"role": "assistant", "content": "It is green."}
THANKS = {"role": "user", "content": "Thanks!"}
BYE = {"role": "assistant", "content": "Any time."}

# What each template writes for the call, with the end of the turn, and what ends its texts.
ARGUMENTS = '{"city": "Köln, \\"K\\""}'
HERMES = f'<tool_call>\n{{"name": "get_weather", "arguments": {ARGUMENTS}}}\n</tool_call><|im_end|>'
CALLS = {
    "qwen2_5": (HERMES, "<|im_end|>"),
    "qwen3": (HERMES, "<|im_end|>"),
    "smollm3": (HERMES, "<|im_end|>"),
    "llama3_1": (f'{{"name": "get_weather", "parameters": {ARGUMENTS}}}<|eot_id|>', "<|eot_id|>"),
    "mistral_v3": (
        f'[TOOL_CALLS] [{{"name": "get_weather", "arguments": {ARGUMENTS}, "id": "call00001"}}]</s>',
        "</s>",
    ),
    "gpt_oss": (f" to=functions.get_weather<|channel|>commentary json<|message|>{ARGUMENTS}<|call|>", "<|return|>"),
}


def turns(*messages: dict[str, Any], tools: Any = (WEATHER,)) -> list[Turn]:
    record = Record({"messages": list(messages), "tools": list(tools) if isinstance(tools, tuple) else tools}, "here")
    return list(templates.render(record, "messages").turns)


@pytest.mark.parametrize("name", CALLS)
def test_a_tool_call_is_trained_on_as_the_template_writes_it(name):
    it, (call, end) = checkpoint(name), CALLS[name]
    talk = turns(ASK, CALLING, RESULT, ANSWER)
    assert trained(encode(talk[:3], it), it) == [call]
    assert "get_weather" in it.text(encode(talk, it).target).split("Weather in")[0]  # the tools
    assert trained(encode(talk, it, "last"), it) == [f"It is green.{end}"]
    assert trained(encode(talk, it), it) == [call, f"It is green.{end}"]
    longer = [*talk, *turns(THANKS, BYE, tools=None)]
    if name in ("gpt_oss", "mistral_v3"):  # which write earlier turns, or what is before them, in another way
        assert "'per_turn'" in refusal(longer, it)
    else:
        found = trained(encode(longer, it), it)
        assert found == [call, f"It is green.{end}", f"Any time.{end}"]


@pytest.mark.parametrize("name", CALLS)
def test_generation_before_a_tool_call_starts_where_its_training_does(name):
    it, talk = checkpoint(name), turns(ASK, CALLING)
    found = encode(talk, it)
    prompt = it.text(found.target[: int(found.loss_mask.argmax())])
    started = chat.prompt_text(talk[:-1], it, "here")
    assert prompt.removesuffix("<think>\n\n</think>\n\n") == started.rstrip(" ")


@pytest.mark.parametrize("name", CALLS)
def test_an_answer_may_end_with_a_call(name):
    it, (call, end) = checkpoint(name), CALLS[name]
    found = {it.text([token]) for token in chat.ends(it)}
    assert found == {KINDS[name].end, end, "<|call|>" if call.endswith("<|call|>") else end}


@pytest.mark.parametrize("name", ["qwen3", "qwen2_5"])
def test_several_calls_and_a_text_before_them_are_trained_on(name):
    it = checkpoint(name)
    other = {"function": {"name": "f", "arguments": '{"x": [1, 2.5, null], "y": {"z": true}}'}}
    talk = turns(ASK, {**CALLING, "content": "Let me see.", "tool_calls": [CALL, other]}, tools=None)
    (said,) = trained(encode(talk, it), it)
    first, second = (
        HERMES.removesuffix("<|im_end|>"),
        '{"name": "f", "arguments": {"x": [1, 2.5, null], "y": {"z": true}}}',
    )
    assert said == f"Let me see.\n{first}\n<tool_call>\n{second}\n</tool_call><|im_end|>"


THOUGHTS = {
    "qwen3": ("<think>\nIt's easy.\n</think>\n\n", "<|im_end|>"),
    "smollm3": ("<think>\nIt's easy.\n</think>\n\n", "<|im_end|>"),
    "gpt_oss": ("<|channel|>analysis<|message|>It's easy.<|end|><|start|>assistant", "<|return|>"),
}
THINKING = {**ANSWER, "reasoning_content": "It's easy."}


@pytest.mark.parametrize("name", THOUGHTS)
def test_reasoning_is_trained_on_as_the_template_writes_it(name):
    it, (thought, end) = checkpoint(name), THOUGHTS[name]
    written = f"{thought}{'<|channel|>final<|message|>' if name == 'gpt_oss' else ''}It is green.{end}"
    inside = {**ANSWER, "content": "<think>\nIt's easy.\n</think>\n\nIt is green."}
    for message in (THINKING, {**ANSWER, "reasoning": "It's easy."}, {**ANSWER, "thinking": "It's easy."}, inside):
        found = encode(turns(ASK, message, tools=None), it)
        assert trained(found, it) == [written]
        prompt = it.text(found.target[: int(found.loss_mask.argmax())])
        assert prompt == chat.prompt_text(turns(ASK, ANSWER, tools=None)[:-1], it, "here")
    calling = {**CALLING, "reasoning_content": "It's easy."}
    call = CALLS[name][0]
    talk = turns(ASK, calling, RESULT, THINKING)
    assert trained(encode(talk[:3], it), it) == [thought + call]
    if name == "gpt_oss":  # which drops the thoughts before a call once there is an answer
        assert "changes the reasoning or the tool calls" in refusal(talk, it)
    else:
        assert trained(encode(talk, it), it) == [thought + call, written]


def test_a_thought_that_the_template_strips_from_an_earlier_turn_is_not_trained_on_without_notice():
    it = checkpoint("qwen3")
    talk = turns(ASK, THINKING, THANKS, THINKING, tools=None)
    assert "try config.data.train_on='last' or 'per_turn'" in refusal(talk, it)
    assert "It's easy." not in it.text(encode(talk, it, "last").target).split("Thanks!")[0]


def encode_record(fields: dict[str, Any], it: Any, train_on: Any, length: int = 4096) -> tuple[list[list[str]], Counts]:
    data, counts = Data(train_on=train_on, max_seq_length=length), Counts()
    whole = templates.render(Record(fields, "here"), "auto")
    examples = whole.per_turn() if train_on == "per_turn" else [whole]
    found = CausalFormat(0).encode(examples, ["here"] * len(examples), data, it, counts)
    return [[] if item is None else trained(item, it) for item in found], counts


@pytest.mark.parametrize("name", THOUGHTS)
def test_with_per_turn_each_assistant_turn_is_an_example_of_its_own_with_its_thought(name):
    it, (thought, end) = checkpoint(name), THOUGHTS[name]
    final = "<|channel|>final<|message|>" if name == "gpt_oss" else ""
    talk = [ASK, {**CALLING, "reasoning_content": "It's easy."}, RESULT, THINKING, THANKS, BYE]
    found, counts = encode_record({"messages": talk, "tools": [WEATHER]}, it, "per_turn")
    last = f"Any time.{end}"
    assert found == [[thought + CALLS[name][0]], [f"{thought}{final}It is green.{end}"], [last]]
    assert counts.examples == 3


def test_weight_and_train_say_which_turns_are_trained_on():
    it = checkpoint("qwen3")

    def found(train_on: str, **first: Any) -> list[list[str]]:
        return encode_record({"messages": [ASK, {**ANSWER, **first}, THANKS, BYE]}, it, train_on)[0]

    both, last = ["It is green.<|im_end|>", "Any time.<|im_end|>"], ["Any time.<|im_end|>"]
    for kept in ({"weight": 1}, {"weight": 1.0}, {"train": True}, {"weight": None}, {}):
        assert found("all", **kept) == [both]
        assert found("per_turn", **kept) == [both[:1], last]
    for masked in ({"weight": 0}, {"weight": 0.0}, {"train": False}, {"weight": 0, "train": False}):
        assert found("all", **masked) == [last] == found("per_turn", **masked)
    nothing = {"messages": [ASK, {**ANSWER, "weight": 0}]}
    for train_on in ("all", "last", "per_turn"):
        assert encode_record(nothing, it, train_on)[0] == [[]]
        assert encode_record(nothing, it, train_on)[1].empty_completion == 1


@pytest.mark.parametrize(
    "messages, tools, message",
    [
        ([ASK, {**ANSWER, "weight": 0.5}], None, "message 2 has the weight '0.5', not 0 or 1"),
        ([ASK, {**ANSWER, "train": "no"}], None, "message 2 has the train 'no', not true or false"),
        ([ASK, {**ANSWER, "train": True, "weight": 0}], None, "message 2 has a weight and a train that contradict"),
        ([{**ASK, "weight": 1}, ANSWER], None, "message 1 is the user's and has weight=1; only assistants are"),
        ([ASK, {**CALLING, "tool_calls": "f"}], None, "message 2: tool_calls is not a list of objects"),
        ([ASK, {**CALLING, "tool_calls": [{"name": "f", "arguments": "{"}]}], None,
         "message 2: arguments is not valid JSON (Expecting property name"),
        ([ASK, {**CALLING, "tool_calls": [{"name": "f", "arguments": "[1]"}]}], None,
         "message 2: the arguments of 'f' are not an object, nor JSON text of one"),
        ([ASK, {**CALLING, "function_call": {"name": "f"}}], None, "message 2 has a function_call, OpenAI's older"),
        ([ASK, ANSWER, RESULT, ANSWER], None, "turn 3 is a tool's result, and the assistant has called no tool that"),
        ([ASK, CALLING, RESULT, RESULT, ANSWER], None, "turn 4 is a tool's result, and the assistant has called no"),
        ([ASK, CALLING, RESULT, ASK, ANSWER], None, "turn 4 is the user's and follows a tool's result"),
        ([ASK, CALLING, RESULT], None, "the messages end with a tool's result; the last one must be the assistant's"),
        ([RESULT, ANSWER], None, "the messages begin with a tool's result; the user must speak first"),
        ([ASK, ANSWER], "{", "field 'tools' is not valid JSON"),
        ([ASK, ANSWER], {"name": "f"}, "the field 'tools' is not a list of objects, nor JSON text of one"),
        ([ASK, ANSWER], [{"type": "function", "function": {}}], "tool 1 has no name; a tool is {type"),
    ],
)  # fmt: skip
def test_tools_and_calls_of_another_shape_are_refused_with_the_message_at_fault(messages, tools, message):
    with pytest.raises(UserError) as caught:
        turns(*messages, tools=tools)
    assert str(caught.value).startswith(f"here: {message}") and "\n" not in str(caught.value)


def test_tools_and_arguments_may_be_json_text_and_bare_functions():
    as_text = {**CALL, "function": {**CALL["function"], "arguments": json.dumps(CALL["function"]["arguments"])}}
    expected = turns(ASK, CALLING)
    for tools in (json.dumps([WEATHER]), json.dumps([WEATHER["function"]]), [WEATHER["function"]]):
        assert turns(ASK, {**CALLING, "tool_calls": [as_text], "content": None}, tools=tools) == expected
    assert expected[-1].tool_calls == (ToolCall("get_weather", CALL["function"]["arguments"], "call00001"),)
    assert turns(ASK, CALLING, {**RESULT, "content": {"sky": "grün"}}, ANSWER)[3].text == '{"sky": "grün"}'
    assert turns(ASK, ANSWER, tools="")[0].role == turns(ASK, ANSWER, tools=[])[0].role == "user"


def test_a_template_without_tools_refuses_them_by_name():
    assert "leaves out the tool 'get_weather'" in refusal(turns(ASK, ANSWER), checkpoint("smollm2"))
    assert "leaves out or changes the call of the tool 'get_weather'" in refusal(
        turns(ASK, CALLING, tools=None), checkpoint("smollm2")
    )
    default = made(KINDS["qwen2_5"], chat.DEFAULT)
    assert "it takes no tools" in refusal(turns(ASK, CALLING, RESULT, ANSWER, tools=None), default)
    short = {**CALLING, "tool_calls": [{**CALL, "id": "1"}]}
    assert "Tool call IDs should be" in refusal(turns(ASK, short), checkpoint("mistral_v3"))


def test_a_template_that_takes_arguments_as_text_gets_them_so_and_one_that_changes_them_is_refused():
    def calling(arguments: str) -> Any:
        text = (
            "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content }}{% for c in m.tool_calls or [] %}"
            f"{{{{ c.function.name ~ ': ' ~ {arguments} }}}}{{% endfor %}}{{{{ '<|im_end|>\\n' }}}}{{% endfor %}}"
            "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
        )
        return made(KINDS["qwen2_5"], text, "mine")

    talk = turns(ASK, CALLING, tools=None)
    for taken in ("c.function.arguments", "(c.function.arguments | tojson)"):
        it = calling(taken)
        assert trained(encode(talk, it), it) == [f"get_weather: {ARGUMENTS}<|im_end|>"]
    assert "changes the call of the tool 'get_weather'" in refusal(talk, calling("(c.function.arguments | upper)"))


def test_a_conversation_with_tools_needs_a_chat_template():
    it = made(KINDS["qwen2_5"], None)
    with pytest.raises(
        UserError, match="here: a conversation with tools, tool calls or reasoning needs a chat template"
    ):
        encode_record({"messages": [ASK, THINKING]}, it, "all")


def test_an_exchange_with_its_tool_calls_is_left_out_whole_where_a_conversation_is_too_long():
    it = checkpoint("qwen2_5")
    fields = {"messages": [ASK, BYE, ASK, CALLING, RESULT, ANSWER], "tools": None}
    whole = len(encode(turns(*fields["messages"], tools=None), it).target)
    found, counts = encode_record(fields, it, "all", length=whole - 1)
    assert found == [["Any time.<|im_end|>"]] and counts.truncated_turns == 1


def test_tools_and_calls_from_parquet_have_no_nulls_that_arrow_put_in(tmp_path):
    """In an Arrow column of objects each has the keys of all."""
    clock = {
        "type": "function",
        "function": {
            "name": "get_time",
            "parameters": {
                "type": "object",
                "properties": {"zone": {"type": "string"}, "at": {"type": "string"}},
                "required": ["zone"],
            },
        },
    }
    asked = {"type": "function", "function": {"name": "get_time", "arguments": {"zone": None}}}
    record = {
        "messages": [ASK, {**CALLING, "tool_calls": [CALL, asked]}, RESULT, {**RESULT, "content": "9:00"}, ANSWER],
        "tools": [WEATHER, clock, {"type": "function", "function": {"name": "noop", "parameters": {"properties": {}}}}],
        "other": [{"a": None}],
    }
    file = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([record]), file)
    filled = pyarrow.parquet.read_table(file).to_pylist()[0]
    assert filled["messages"][0]["tool_calls"] is None  # which is what this test is about
    assert filled["messages"][1]["tool_calls"][0]["function"]["arguments"] == CITY | {"zone": None}
    (found,) = sources.read(Source(str(file)))
    assert found.fields == record  # with the null that the tool requires
    assert templates.render(found, "auto") == templates.render(Record(record, ""), "auto")
    del record["other"]
    nulls = tmp_path / "a.jsonl"
    nulls.write_text(json.dumps({**record, "tools": [{**clock, "strict": None}]}))
    (kept,) = sources.read(Source(str(nulls)))
    assert kept.fields["tools"] == [{**clock, "strict": None}]  # JSON has only what its author wrote


def test_with_per_turn_a_record_is_held_out_with_all_of_its_turns(tmp_path):
    file = tmp_path / "a.jsonl"
    talks = [{"messages": [ASK, ANSWER, THANKS, BYE] * (1 + number % 3)} for number in range(8)]
    file.write_text("".join(json.dumps(talk) + "\n" for talk in [*talks, {"messages": []}]))
    data = Data(
        (Source(str(file)),), train_on="per_turn", cache_dir=str(tmp_path), on_invalid="drop", max_dropped=1.0,
        validation_size=3,
    )  # fmt: skip
    it, format = checkpoint("qwen2_5"), CausalFormat(0)
    (item,) = tokenize(data.train[0], "config.data.train.0", data, it, format)
    assert item.records.tolist() == [i for i in range(8) for _ in range(2 + 2 * (i % 3))] + [8]
    assert (item.counts.examples, item.counts.invalid) == (len(item.records), 1)
    assert trained(item.example(1), it) == ["Any time.<|im_end|>"]
    held = hold_out([item], 3, seed=0)
    mixed = mix(data.train, [[item]], data, [held])
    assert sorted(mixed.epoch(0).example) == [i for i, n in enumerate(item.records) if n not in (*held, 8)]
    evaluated = build_eval(data, it, format, 0)
    assert [example.id for example in evaluated.examples] == [f"a/{number}" for number in held]
    with pytest.raises(UserError, match=r"train.0.template: data.train_on='per_turn' needs data sets of one template"):
        tokenize(dataclasses.replace(data.train[0], template=("auto", "messages")), "train.0", data, it, format)
