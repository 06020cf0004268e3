"""What is trained on in a conversation, for stock chat templates on small tokenizers of their real kinds."""

import os
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest

from jax_it.data import chat
from jax_it.data import tokenizer_files as tokenizer
from jax_it.data.encoded import Encoded
from jax_it.data.templates import Turn
from jax_it.data.tokenizer import Tokenizer
from jax_it.errors import UserError
from tests.data.chat_tokenizers import KINDS, Kind, checkpoint, made, template

# By template: what ends the assistant's turn, with what stands before it; and what the template does to a text.
STOCK = {
    "smollm2": ("<|im_end|>", str),
    "chatml": ("<|im_end|>", str),
    "llama3": ("<|eot_id|>", str.strip),
    "llama3_1": ("<|eot_id|>", str.strip),
    "llama3_2": ("<|eot_id|>", str.strip),
    "qwen2_5": ("<|im_end|>", str),
    "qwen3": ("<|im_end|>", str),
    "gemma": ("<end_of_turn>", str.strip),
    "gemma3": ("<end_of_turn>", str.strip),
    "mistral_v1": ("</s>", str),
    "mistral_v3": ("</s>", str.strip),
    "phi3": ("<|end|>", str.lstrip),  # by its tokenizer, whose marks swallow the blanks after them
    "zephyr": ("</s>", str),
    "llama2": (" </s>", str.strip),
    "olmo2": ("<|endoftext|>", str),
    "phi4": ("<|im_end|>", str),
    "deepseek_v2": ("<｜end▁of▁sentence｜>", str),
    "deepseek_r1_distill": ("<｜end▁of▁sentence｜>", str),
}
# Templates that write a space before the answer, which their tokenizers make part of its first token.
SPACE_BEFORE = {"mistral_v1", "mistral_v3", "llama2", "deepseek_v2"}
NO_SYSTEM = {"gemma": "System role not supported", "mistral_v3": "leaves out or changes the system turn 'Be kind.'"}

ANSWERS = (
    "I am well. How are you?", "42", "é漢😀 ünï", "two  spaces\n\nand\tlines", "x", "def f(x):\n    return {x}",
    "Hi there", "Hello", "<b>&amp;</b> \\n {{ x }} {% if %}", "user", "…",
)  # fmt: skip
BLANKS = ("  before", "after \n", "  both\n\n ", "\nline", "\n\n \nlines\n")


def talk(*answers: str, system: str = "") -> list[Turn]:
    turns = [Turn("system", system)] if system else []
    for number, answer in enumerate(answers):
        turns += [Turn("user", f"Hi there  {number}?\n"), Turn("assistant", answer)]
    return turns


def test_a_chat_template_that_would_give_other_data_each_time_is_refused():
    it = made(KINDS["llama2"], "{{ ['a', 'b'] | random }}" + chat.DEFAULT)
    with pytest.raises(UserError, match="uses 'random', whose result changes on every call"):
        encode(talk("x"), it)


def encode(turns: list[Turn], tokenizer: Tokenizer, train_on: str = "all") -> Encoded:
    (found,) = chat.encode([turns], ["data.json, line 3"], tokenizer, train_on)
    return found


def trained(found: Encoded, tokenizer: Tokenizer) -> list[str]:
    """The text of each stretch of supervised tokens, as the tokenizer decodes it."""
    edges = np.flatnonzero(np.diff([0, *found.loss_mask.astype(int), 0])).reshape(-1, 2)
    return [tokenizer.text(found.target[start:stop]) for start, stop in edges]


def expected(name: str, answer: str) -> str:
    end, change = STOCK[name]
    of_bytes = KINDS[name].model in ("gpt2", "llama3", "qwen")  # others show no space at a text's beginning
    return (" " if name in SPACE_BEFORE and of_bytes else "") + change(answer) + end


def refusal(turns: list[Turn], tokenizer: Tokenizer, train_on: str = "all") -> str:
    with pytest.raises(UserError) as caught:
        encode(turns, tokenizer, train_on)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# What is trained on


@pytest.mark.parametrize("system", ["", "Be kind."])
@pytest.mark.parametrize("name", STOCK)
def test_the_supervised_tokens_are_the_assistant_s_texts_and_their_ends_of_turn(name, system):
    it = checkpoint(name)
    if system and name in NO_SYSTEM:
        assert NO_SYSTEM[name] in refusal(talk("a", system=system), it)
        return
    for answer in ANSWERS:
        assert trained(encode(talk(answer, system=system), it), it) == [expected(name, answer)]
    found = encode(talk(*ANSWERS, system=system), it)
    assert trained(found, it) == [expected(name, answer) for answer in ANSWERS]
    found = encode(talk(*ANSWERS, system=system), it, "last")
    assert trained(found, it) == [expected(name, ANSWERS[-1])]


@pytest.mark.parametrize("name", STOCK)
def test_blanks_around_an_answer_are_trained_on_where_the_template_keeps_them(name):
    it = checkpoint(name)
    for answer in BLANKS:
        earlier, last = expected(name, answer), expected(name, answer)
        if name == "qwen3":  # strips line ends before the last answer alone
            last = answer.lstrip("\n") + "<|im_end|>"
        if KINDS[name].model == "llama2" and name not in SPACE_BEFORE:  # whose decoder takes a space off every text
            earlier, last = earlier.removeprefix(" "), last.removeprefix(" ")
        assert trained(encode(talk(answer, answer), it), it) == [earlier, last]
        assert trained(encode(talk(answer, "Hello"), it), it) == [earlier, expected(name, "Hello")]


@pytest.mark.parametrize("name", STOCK)
def test_the_tokens_are_those_of_the_rendering_with_one_mark_of_beginning(name):
    """As Transformers tokenizes it."""
    it = checkpoint(name)
    messages = [{"role": turn.role, "content": turn.text} for turn in talk(*ANSWERS)]
    text = it.backend.apply_chat_template(messages, tokenize=False, date_string="26 Jul 2024")
    theirs = it.backend(text, add_special_tokens=False)["input_ids"]
    found = encode(talk(*ANSWERS), it).target.tolist()
    if it.start is not None and theirs[0] != it.start:
        theirs = [it.start, *theirs]
    assert found == theirs
    assert it.start is None or found[:2].count(it.start) == 1


@pytest.mark.parametrize("name", STOCK)
def test_generation_starts_from_what_stands_before_the_answer_in_training(name):
    it = checkpoint(name)
    for answer in (*ANSWERS, *BLANKS):
        turns = talk("I am well.", answer)
        found = encode(turns, it, "last")
        (prompt,) = chat.prompts([turns[:-1]], ["here"], it)
        assert found.target[: int(np.argmax(found.loss_mask))].tolist() == prompt


@pytest.mark.parametrize("name", STOCK)
def test_an_answer_ends_at_its_end_of_turn_or_the_end_of_text(name):
    it = checkpoint(name)
    ends = chat.ends(it)
    assert {it.text([token]) for token in ends} == {STOCK[name][0].strip(), KINDS[name].end}
    found = encode(talk("a", "b"), it)
    assert sum(int(token) in ends for token in found.target[found.loss_mask]) == 2


def test_marks_of_generation_in_a_template_agree_with_transformers_mask():
    marked = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}"
        "{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    )
    it = made(KINDS["qwen2_5"], marked)
    turns = talk(*ANSWERS, system="Be kind.")
    theirs = it.backend.apply_chat_template(
        [{"role": turn.role, "content": turn.text} for turn in turns],
        tokenize=True, return_dict=True, return_assistant_tokens_mask=True,
    )  # fmt: skip
    found = encode(turns, it)
    assert found.target.tolist() == theirs["input_ids"]
    assert found.loss_mask.astype(int).tolist() == theirs["assistant_masks"]


def test_qwen3_s_empty_thought_is_given_and_a_thought_in_the_data_is_trained_on():
    it = checkpoint("qwen3")
    found = encode(talk("a", "b"), it)
    assert it.text(found.target).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\nb<|im_end|>\n")
    assert trained(found, it) == ["a<|im_end|>", "b<|im_end|>"]
    thought = "<think>\nhm\n</think>\n\nb"
    assert trained(encode(talk(thought), it), it) == [f"{thought}<|im_end|>"]
    # It leaves thoughts out of earlier turns, which can then not be trained on as they are.
    assert trained(encode(talk(thought, thought), it, "last"), it) == [f"{thought}<|im_end|>"]
    assert "try config.data.train_on='last'" in refusal(talk(thought, thought), it)


def test_the_texts_of_others_that_repeat_the_answer_are_not_trained_on():
    it = checkpoint("smollm2")
    turns = [Turn("user", "Hello"), Turn("assistant", "Hello"), Turn("user", "Hello"), Turn("assistant", "Hello")]
    found = encode(turns, it)
    assert trained(found, it) == ["Hello<|im_end|>"] * 2
    before = it.text(found.target[: int(np.argmax(found.loss_mask))])
    assert before.endswith("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n")


def test_characters_of_the_private_use_area_may_stand_in_a_text():
    it = checkpoint("smollm2")
    answer = "\ue000 and \ue001"
    assert trained(encode(talk(answer), it), it) == [f"{answer}<|im_end|>"]


def test_a_token_across_the_border_of_an_answer_is_cut_there():
    """The line end of the header and that of the answer are one token to Qwen and Llama 3."""
    it = checkpoint("qwen2_5")
    assert len(it.encode(["\n\n"])[0]) == 1
    found = encode(talk("\nline"), it)
    assert trained(found, it) == ["\nline<|im_end|>"]
    plain = encode(talk("line"), it)
    assert (
        found.target[: int(np.argmax(found.loss_mask))].tolist()
        == plain.target[: int(np.argmax(plain.loss_mask))].tolist()
    )


def test_a_slow_tokenizer_is_cut_at_every_border():
    import transformers

    backend = transformers.ByT5Tokenizer(extra_ids=0, additional_special_tokens=["<|im_start|>", "<|im_end|>"])
    backend.chat_template = template("chatml")
    assert not backend.is_fast
    it = Tokenizer(backend, "bytes")
    found = encode(talk("é漢", "b\n"), it)
    assert trained(found, it) == ["é漢<|im_end|>", "b\n<|im_end|>"]


@pytest.mark.parametrize("name", ["smollm2", "llama3", "llama2", "mistral_v3", "gemma"])
def test_offsets_say_where_each_token_stands_with_the_space_before_it(name):
    it, text = checkpoint(name), "Hi  there, how are you?\n I am\twell ."
    ((tokens, offsets),) = it.encode_with_offsets([text])
    assert tokens.tolist() == it.encode([text])[0]
    if it.show(tokens[:1]) == ["▁"]:  # which these tokenizers put before every text
        offsets = offsets[1:]
    assert offsets[0, 0] == 0 and offsets[-1, 1] == len(text)
    assert offsets[1:, 0].tolist() == offsets[:-1, 1].tolist()  # one after another, with nothing between them


# What the tokenizer and the template disagree on


def test_the_mark_of_beginning_is_there_once_whether_the_template_writes_it_or_not():
    kind = Kind("llama3", "<e>", ("<|im_start|>", "<|im_end|>"), "<b>", True)
    for text in (
        template("chatml"),
        "{{ bos_token }}" + template("chatml"),
        "{{ bos_token * 2 }}" + template("chatml"),
    ):
        it = made(kind, text)
        assert it.text(encode(talk("a"), it).target).startswith("<b><|im_start|>user")
    never = made(kind._replace(adds_start=False), template("chatml"))
    assert it.text(encode(talk("a"), never).target).startswith("<|im_start|>user")


def test_a_prompt_that_the_template_s_own_generation_prompt_differs_from_is_shown():
    assert chat.generation_prompt(checkpoint("llama3")) is None
    assert chat.generation_prompt(checkpoint("llama2")) is None  # "[/INST]" in ids, though texts differ by a space
    ours, theirs = chat.generation_prompt(checkpoint("qwen3"))
    assert ours == theirs + "<think>\n\n</think>\n\n"
    ours, theirs = chat.generation_prompt(checkpoint("deepseek_r1_distill"))
    assert theirs == ours + "<think>\n"


def test_what_a_template_says_of_today_never_changes():
    dated = "{{ strftime_now('%d %B %Y') }}|{{ strftime_now(\"%Y\") }}" + template("chatml")
    it = made(KINDS["qwen2_5"], dated)
    assert it.text(encode(talk("a"), it).target).startswith("26 July 2024|2024<|im_start|>")
    assert it.backend.apply_chat_template([{"role": "user", "content": ""}], tokenize=False).startswith(
        f"{datetime.now():%d %B %Y}"
    )


# What is refused


@pytest.mark.parametrize(
    "changed",
    ["said | upper", "said.replace(' ', '_')", "said.split(' ')[-1]", "said + said", "said[:3]", "said | urlencode"],
)
def test_a_template_that_changes_the_answers_is_refused_by_name(changed):
    message = refusal(talk("öne two three"), with_answers(f"({changed})"))
    assert "the chat template of my-checkpoint changes the assistant's text" in message


def with_answers(said: str, end: str = "'<|im_end|>'") -> Tokenizer:
    """A checkpoint whose template writes the assistant's text `said` as that expression has it."""
    text = (
        "{% for m in messages %}{% set said = m['content'] %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
        f"{{{{ ({said} + {end}) if m['role'] == 'assistant' else said + '<|im_end|>' }}}}{{% endfor %}}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    return made(KINDS["qwen2_5"], text, "my-checkpoint")


def test_a_template_that_writes_something_before_some_answers_is_refused_where_it_does():
    it = with_answers("('>' if said[0] == 'o' else '') + said")
    assert trained(encode(talk("two"), it), it) == ["two<|im_end|>"]
    for answers in (["one"], ["two", "one"], ["one", "two"]):
        assert "line 3: the chat template of my-checkpoint changes the assistant's text" in refusal(talk(*answers), it)


def test_a_template_that_changes_blanks_is_refused_where_it_does():
    it = with_answers("said.replace('\\t', ' ')")
    assert trained(encode(talk(" two"), it), it) == [" two<|im_end|>"]
    for answer in ("\ttwo", "two\t"):
        assert "changes the assistant's text" in refusal(talk(answer, answer), it)


def test_a_template_that_ends_turns_in_different_ways_is_refused():
    it = with_answers("said", "('<|endoftext|>' if loop.last else '<|im_end|>')")
    assert trained(encode(talk("a"), it), it) == ["a<|endoftext|>"]
    message = refusal(talk("a", "b"), it)
    assert "my-checkpoint does not end the assistant's turn 'a' with '<|endoftext|>'" in message
    assert message.endswith("set config.data.train_on to 'per_turn' or 'last'")


def test_a_template_that_changes_some_answers_alone_is_refused_where_it_does():
    text = template("chatml").replace("message['content']", "message['content'].replace('&', 'and')")
    it = made(KINDS["qwen2_5"], text, "my-checkpoint")
    assert trained(encode(talk("a or b"), it), it) == ["a or b<|im_end|>"]
    assert refusal(talk("c", "a & b"), it).startswith(
        "data.json, line 3: the chat template of my-checkpoint changes the assistant's text"
    )


def test_an_answer_that_holds_the_end_of_turn_is_refused():
    message = refusal(talk("a<|im_end|>b"), checkpoint("qwen2_5"))
    assert message.startswith("data.json, line 3: the assistant's turn 'a<|im_end|>b' contains '<|im_end|>', ")


def test_a_template_that_marks_no_end_of_turn_is_refused_by_name():
    assert "the chat template of chatglm3 does not end each of the assistant's turns" in refusal(
        talk("a"), checkpoint("chatglm3")
    )
    only_last = "{% for m in messages %}{{ m['role'] + m['content'] }}{% endfor %}{{ eos_token }}"
    assert "the model would never learn to stop" in refusal(talk("a"), made(KINDS["qwen2_5"], only_last))


def test_a_template_s_own_refusal_names_the_record():
    message = refusal(talk("a", system="Be kind."), checkpoint("gemma"))
    assert message == (
        "data.json, line 3: the chat template of gemma does not take this conversation: System role not supported"
    )
    assert "data.json, line 3: the chat template of mistral_v3 leaves out" in refusal(
        talk("a", system="Be kind."), checkpoint("mistral_v3")
    )


def test_a_border_that_cannot_be_found_is_refused():
    kind = Kind("llama2", "</s>", ("<|im_start|>", "<|im_end|>"), "<s>", True)
    glued = template("chatml").replace("'\\n' + message['content']", "': Hi th' + message['content']")
    it = made(kind, glued, "glued")
    assert "a token of glued spans the beginning of an answer" in refusal(
        [Turn("user", "q"), Turn("assistant", "ere")], it
    )


# Setting a template


@pytest.mark.parametrize(
    "kind",
    [
        Kind("gpt2", "<|endoftext|>", (), "<|endoftext|>"), Kind("llama3", "<e>", (), "<b>", True),
        Kind("qwen", "<|endoftext|>"), Kind("llama2", "</s>", (), "<s>", True),
        Kind("gemma", "<eos>", (), "<bos>", True),
    ],
)  # fmt: skip
def test_the_default_template_serves_base_models_without_new_tokens(kind):
    base = made(kind, None)
    it = chat.with_chat_template(base, "default")
    assert it.size == base.size and base.chat_template is None
    for answer in (*ANSWERS, *BLANKS):
        found = encode(talk("I am well.", answer, system="Be kind."), it)
        assert trained(found, it) == [f"I am well.{kind.end}", answer.strip() + kind.end]
        (prompt,) = chat.prompts([talk("I am well.", answer, system="Be kind.")[:-1]], ["here"], it)
        last = found.target[found.loss_mask].tolist().index(it.end) + 1  # of the first answer's tokens
        start = np.flatnonzero(found.loss_mask)[last]
        assert found.target[:start].tolist() == prompt
    assert chat.generation_prompt(it) is None and chat.ends(it) == (it.end,)
    text = it.text(encode(talk("a", "b", system="Be kind."), it).target)
    begin = kind.start if kind.adds_start else ""
    wanted = (
        f"{begin}Be kind.\n\nUser:\nHi there  0?\n\nAssistant:\na{kind.end}\n\nUser:\nHi there  1?\n\n"
        f"Assistant:\nb{kind.end}"
    )
    assert text.replace("> ", ">") == wanted


def test_a_template_is_saved_with_the_tokenizer_and_part_of_its_digest(tmp_path):
    base = made(KINDS["qwen2_5"], template("qwen2_5"))
    file = tmp_path / "mine.jinja"
    file.write_text(template("chatml"))
    assert chat.with_chat_template(base, "") is base
    found = {setting: chat.with_chat_template(base, setting) for setting in ("none", "default", str(file))}
    assert len({base.digest(), *(it.digest() for it in found.values())}) == 4
    assert found[str(file)].chat_template == template("chatml")
    for number, it in enumerate(found.values()):
        it.save(tmp_path / str(number))
        loaded = tokenizer.load(str(tmp_path / str(number)))
        assert loaded.chat_template == it.chat_template and loaded.digest() == it.digest()
    assert base.chat_template == template("qwen2_5")


FIFO = object()


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "'{file}' is neither 'default', 'none' nor a file to read: No such file or directory"),
        (FIFO, "'{file}' is neither 'default', 'none' nor a file to read: Not a regular file"),
        (b"\xff\xfe", "'{file}' is neither 'default', 'none' nor a file to read: 'utf-8' codec"),
        (b"{% if %}", "the chat template of {file} does not take this conversation: Expected an expression"),
        (
            b"{% for m in messages %}{{ m['content'] }}{% endfor %}",
            "the chat template of {file} does not end each of the assistant's turns with one",
        ),
        (b" \n", "the chat template of {file} is empty; set config.model.chat_template"),
        (b"{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "takes more than"),
        (b"a fixed text", "the chat template of {file} changes the assistant's text"),
    ],
)
def test_a_template_file_that_cannot_serve_is_refused_with_the_setting(tmp_path, content, message):
    file = tmp_path / "mine.jinja"
    if content is FIFO:
        os.mkfifo(file)
    elif content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError) as caught:
        chat.with_chat_template(made(KINDS["qwen2_5"], None), str(file))
    assert str(caught.value).startswith("config.model.chat_template: ") and "\n" not in str(caught.value)
    assert message.format(file=file) in str(caught.value)


def test_a_checkpoint_with_several_templates_uses_its_default():
    it = made(KINDS["qwen2_5"], None)
    it.backend.chat_template = {"default": template("chatml"), "tool_use": "other"}
    assert it.chat_template == template("chatml")
    assert trained(encode(talk("a"), it), it) == ["a<|im_end|>"]


def test_every_stock_template_is_tested_and_named():
    names = {path.stem for path in (Path(__file__).parent / "chat_templates").glob("*.jinja")}
    assert names == set(STOCK) | {"chatglm3", "gpt_oss", "smollm3"} == set(KINDS)  # the last two: test_tool_chat.py
    readme = (Path(__file__).parent / "chat_templates" / "README.md").read_text()
    assert all(f"`{name}`" in readme for name in names)
