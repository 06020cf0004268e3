"""jax_it's models under lm_eval, without PyTorch: its tasks run, and its requests give what our own parts give."""

import json
import math
import sys

import jax
import numpy as np
import pytest

from jax_it.data import chat
from jax_it.data.formats import CausalBatch
from jax_it.data.templates import Turn
from jax_it.errors import UserError
from jax_it.generation import GREEDY
from jax_it.harness import __main__ as command
from tests.harness.conftest import QUESTIONS

lm_eval = pytest.importorskip("lm_eval", reason="pip install 'jax-it[harness]'")
Instance = pytest.importorskip("lm_eval.api.instance").Instance
TaskManager = pytest.importorskip("lm_eval.tasks").TaskManager
ours = pytest.importorskip("jax_it.harness.model", exc_type=ModuleNotFoundError)
HarnessModel, cut, read_settings = ours.HarnessModel, ours.cut, ours.read_settings

pytestmark = pytest.mark.filterwarnings("default")  # lm_eval's own


@pytest.fixture(scope="module")
def models(folders):
    return {name: HarnessModel(str(folder), batch_size=4) for name, folder in folders.items()}


def ask(function, *arguments):
    """What a method of a model answers to requests of these arguments."""
    kind = function.__name__
    return function([Instance(kind, {}, item, i) for i, item in enumerate(arguments)], disable_tqdm=True)


WIDTH = 96


FULL = {}  # by a model's folder


def full_pass(model, batch):
    """Logits [T, V] of a row."""

    def logits(params, batch):
        return model._model.logits(model._model.head(params), model._model.hidden_states(params, batch)[0])

    compiled = FULL.setdefault(model.path, jax.jit(logits))
    return np.asarray(compiled(model.params, batch))[0]


def by_full_pass(model, context, continuation):
    """The log-likelihood of tokens after others, from one pass over all of them, and whether each is the likeliest."""
    tokens, zeros, segments = np.zeros((3, 1, WIDTH), np.int32)
    length = len(context) + len(continuation)
    tokens[0, :length] = [*context, *continuation]
    segments[0, :length] = 1
    batch = CausalBatch(tokens, zeros, zeros.astype(np.float32), segments, np.arange(WIDTH, dtype=np.int32)[None])
    logits_TV = full_pass(model, batch).astype(np.float64)
    logits_TV = logits_TV[len(context) - 1 : length - 1]
    chosen_T = logits_TV[np.arange(len(continuation)), continuation]
    largest_T = logits_TV.max(-1)
    sums_T = largest_T + np.log(np.exp(logits_TV - largest_T[:, None]).sum(-1))
    return (chosen_T - sums_T).sum(), bool((logits_TV.argmax(-1) == continuation).all())


@pytest.mark.parametrize("name", ["smollm2", "llama3"])
def test_log_likelihoods_are_those_of_a_full_pass(models, name):
    model = models[name]
    pairs = [(question, f" {option}") for question, options in QUESTIONS for option in options]
    for (context, continuation), (found, greedy) in zip(pairs, ask(model.loglikelihood, *pairs), strict=True):
        before, after = model._encode_pair(context, continuation)
        expected = by_full_pass(model, before, after)
        assert found == pytest.approx(expected[0], rel=1e-5) and greedy == expected[1]


def test_one_token_that_is_the_likeliest_is_greedy(models):
    model = models["smollm2"]
    (text,) = ask(model.generate_until, ("Say hello", {"max_gen_toks": 1}))
    if text.strip() and len(model.tok_encode(text)) == 1:
        ((_, greedy),) = ask(model.loglikelihood, ("Say hello", text))
        assert greedy


def test_an_empty_context_is_the_mark_of_beginning(models):
    model = models["llama3"]
    ((found, _),) = ask(model.loglikelihood, ("", "Hello"))
    assert found == pytest.approx(by_full_pass(model, [model.prefix_token_id], model.tok_encode("Hello", False))[0])


def test_a_text_begins_with_one_mark_whether_it_is_written_or_not(models):
    model = models["llama3"]
    assert model.tok_encode("Hello") == model.tok_encode("<|begin_of_text|>Hello")
    assert model.tok_encode("Hello")[0] == model.prefix_token_id
    assert model.tok_encode("Hello", add_special_tokens=False)[0] != model.prefix_token_id


def test_a_long_text_is_read_in_windows_and_each_of_its_tokens_once(models, folders):
    text = " ".join(question for question, _ in QUESTIONS) * 3
    whole = models["smollm2"]
    short = HarnessModel(str(folders["smollm2"]), max_length=20, batch_size=4)
    tokens = short.tok_encode(text)
    assert len(tokens) > 60
    expected = 0.0
    for start in range(0, len(tokens), 20):
        stop = min(start + 20, len(tokens))
        context = [short.prefix_token_id] if not start else tokens[max(0, stop - 21) : start]
        expected += by_full_pass(short, context, tokens[start:stop])[0]
    assert ask(short.loglikelihood_rolling, (text,)) == [pytest.approx(expected, rel=1e-5)]
    assert ask(whole.loglikelihood_rolling, ("",)) == [0.0]


def test_too_long_a_context_loses_its_left(folders):
    model = HarnessModel(str(folders["smollm2"]), max_length=12)
    context = "What is the colour of the sky, and why is it so? Say hello"
    before, after = model._encode_pair(context, " Hello")
    assert len(before) > 12
    ((found, _),) = ask(model.loglikelihood, (context, " Hello"))
    assert found == pytest.approx(by_full_pass(model, before[-(13 - len(after)) :], after)[0], rel=1e-5)
    with pytest.raises(UserError, match="more than the model's 12"):
        ask(model.loglikelihood, ("a", context))


def test_texts_end_before_their_first_stop_string(models):
    model = models["smollm2"]
    contexts = [question for question, _ in QUESTIONS[:2]]
    whole = ask(model.generate_until, *((context, {"max_gen_toks": 16}) for context in contexts))
    for context, text in zip(contexts, whole, strict=True):
        assert len(text) > 4
        stop = text[3:5]
        (stopped,) = ask(model.generate_until, (context, {"max_gen_toks": 16, "until": ["never", "", stop]}))
        assert stopped == text.split(stop)[0] and stop not in stopped


def test_answers_come_in_the_order_of_the_requests_whatever_their_settings(models):
    model = models["t5"]
    settings = [{"max_gen_toks": 3 + i % 2} for i in range(len(QUESTIONS))]
    together = ask(model.generate_until, *((q, s) for (q, _), s in zip(QUESTIONS, settings, strict=True)))
    alone = [ask(model.generate_until, (q, s))[0] for (q, _), s in zip(QUESTIONS, settings, strict=True)]
    assert together == alone and len(set(alone)) > 1


def test_a_chat_template_makes_a_prompt_of_messages(models):
    model = models["smollm2"]
    messages = [{"role": "user", "content": "Say hello"}]
    prompt = model.apply_chat_template(messages)
    assert prompt.endswith("<|im_start|>user\nSay hello<|im_end|>\n<|im_start|>assistant\n")
    assert model.tok_encode(prompt).count(model.prefix_token_id) == prompt.count("<|im_start|>")
    begun = model.apply_chat_template([*messages, {"role": "assistant", "content": "Hel"}], add_generation_prompt=False)
    assert begun.endswith("assistant\nHel")
    assert model.chat_template(True) == model.tokenizer.chat_template
    assert "/" not in model.tokenizer_name
    with pytest.raises(UserError, match="has no chat template; leave --apply_chat_template out"):
        models["t5"].apply_chat_template(messages)


@pytest.mark.parametrize("name", ["smollm2", "llama3"])
def test_the_prompt_of_a_conversation_has_the_tokens_that_training_gives_it(models, name):
    model = models[name]
    turns = (Turn("user", "Hi"), Turn("assistant", "Hello"), Turn("user", "Who are you?"))
    text = model.apply_chat_template([{"role": turn.role, "content": turn.text} for turn in turns])
    (expected,) = chat.prompts([turns], ["here"], model._tokenizer)
    assert model.tok_encode(text) == expected


def test_a_chat_template_that_asks_for_the_date_gets_that_of_training(models, monkeypatch):
    model = models["smollm2"]
    template = "{{ strftime_now('%d %b %Y') }}" + model._tokenizer.chat_template
    monkeypatch.setattr(model, "_tokenizer", model._tokenizer.with_chat_template(template, "dated"))
    assert model.apply_chat_template([{"role": "user", "content": "Hi"}]).startswith("26 Jul 2024")


def test_lm_eval_scores_tasks_of_files(models, tasks):
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    found = lm_eval.simple_evaluate(
        models["smollm2"], tasks=["choose", "write", "read"], task_manager=manager, bootstrap_iters=0, log_samples=True
    )
    samples = found["samples"]["choose"]
    assert len(samples) == len(QUESTIONS)
    model = models["smollm2"]
    best = [
        int(np.argmax([value for value, _ in ask(model.loglikelihood, *((q, f" {o}") for o in options))]))
        for q, options in QUESTIONS
    ]
    assert found["results"]["choose"]["acc,none"] == np.mean([best[i] == i % 3 for i in range(4)])
    texts = {s["doc"]["question"]: s["filtered_resps"][0] for s in found["samples"]["write"]}
    assert (
        texts["Say hello"]
        == ask(model.generate_until, ("Say hello\n", {"until": ["\n\n", "e"], "max_gen_toks": 12}))[0]
    )
    assert 0 < found["results"]["read"]["bits_per_byte,none"] < 100


@pytest.mark.slow  # lm_eval reads all of its tasks
def test_the_command_scores_a_model_of_a_folder(folders, tasks, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [])
    with pytest.raises(SystemExit) as exit:
        command.main([
            "--model_args", f"path={folders['smollm2']},max_length=64", "--tasks", "choose",
            "--include_path", str(tasks), "--output_path", str(tmp_path / "out"), "--batch_size", "4",
        ])  # fmt: skip
    assert exit.value.code == 0
    assert "choose" in capsys.readouterr().out
    (file,) = tmp_path.rglob("results*.json")
    assert json.loads(file.read_text())["results"]["choose"]["acc,none"] in (0, 0.25, 0.5, 0.75, 1)


@pytest.mark.parametrize(
    "given, completed",
    [
        (["--tasks", "a"], ["run", "--tasks", "a", "--model", "jax_it", "--batch_size", "32"]),
        (["run", "--tasks=a", "--batch_size=8"], ["run", "--tasks=a", "--batch_size=8", "--model", "jax_it"]),
        (["--model=jax_it", "-b", "4"], ["run", "--model=jax_it", "-b", "4"]),
        (["ls", "tasks"], ["ls", "tasks"]),
        (["--help"], ["--help"]),
        ([], []),
    ],
)
def test_the_commands_model_and_batch_size_are_ours_where_none_is_named(given, completed):
    assert command.completed(given) == completed


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({}, "needs path=DIR"),
        ({"path": "x", "pretrained": "y"}, "does not know pretrained; it takes path, max_length and seed"),
        ({"path": "./nowhere"}, "./nowhere"),
    ],
)
def test_wrong_arguments_are_said_in_one_line(arguments, message):
    with pytest.raises(UserError) as error:
        HarnessModel(**arguments)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["batch_size", "max_length"])
def test_a_size_that_is_no_number_is_said_in_one_line(folders, name):
    with pytest.raises(UserError, match=f"{name} big: expected a positive number"):
        HarnessModel(str(folders["smollm2"]), **{name: "big"})


def test_the_command_says_a_users_error_in_one_line(capsys, monkeypatch):
    def fails():
        raise UserError("what is wrong,\nand how to fix it")

    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setattr(command, "run", fails)
    with pytest.raises(SystemExit) as exit:
        command.main(["--tasks", "choose"])
    assert exit.value.code == 2
    assert capsys.readouterr().err == "jax_it.harness: what is wrong, and how to fix it\n"


def test_a_tasks_settings_are_read_strictly():
    assert read_settings({}) == (GREEDY, 256, ())
    assert read_settings({"until": "\n", "max_new_tokens": 5, "temperature": 0.0}) == (GREEDY, 5, ("\n",))
    assert read_settings({"do_sample": False, "temperature": 0.7, "top_p": 0.9})[0] == GREEDY
    drawn, length, _ = read_settings({"do_sample": True, "top_p": 0.9, "max_gen_toks": 7, "max_tokens": 9}, seed=3)
    assert (drawn.temperature, drawn.top_p, drawn.seed, length) == (1.0, 0.9, 3, 7)
    assert read_settings({"temperature": 0.7, "top_k": 5})[0].top_k == 5
    assert read_settings({"num_beams": 4})[0].num_beams == 4
    with pytest.raises(UserError, match="generation setting 'typo' is not known; there are: until, "):
        read_settings({"typo": 1})


def test_too_many_new_tokens_are_refused(models):
    with pytest.raises(UserError, match="asks for 96 new tokens, which leaves nothing of the model's 96"):
        ask(models["smollm2"].generate_until, ("a", {"max_gen_toks": 96}))


def test_a_text_is_cut_at_each_of_its_stop_strings():
    assert cut("one two three", ["three", "two"]) == "one "
    assert cut("one", []) == "one"
    assert math.isclose(len(cut("x" * 9, ["y"])), 9)
