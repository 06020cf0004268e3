"""Tasks beside data.eval's examples: options ranked, texts generated, and what fails left alone."""

import dataclasses
import math
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jax_it import data, metrics
from jax_it.config import Source, Task
from jax_it.data.evaluation_set import EvalExample, Option
from jax_it.errors import Interrupted, UserError
from jax_it.evaluation import Stopped, evaluators
from jax_it.evaluation.evaluators import TASK
from jax_it.run import make_format
from tests.data.chat_tokenizers import checkpoint
from tests.evaluation.suites import make_suite
from tests.tiny_run import write_rows

WORDS = ["red", "green", "blue", "pink", "grey", "teal"]
RECORDS = [
    {"id": f"w{i}", "prompt": f"say {WORDS[i]} {i + 40}", "completion": " ".join(WORDS[i : i + 2]), "kind": "ab"[i % 2]}
    for i in range(5)
]
SAY = ("{{prompt}} ||| {{completion}}",)


@pytest.fixture(scope="module")
def parts(opened):
    """(evaluator of a config, params, tokenizer) of the tiny run on one device."""
    config, layout, model, params, tokenizer, mesh = opened

    def evaluator(*tasks, with_examples=False, **given):
        changed = dataclasses.replace(config.eval, tasks=tasks, **given)
        whole = dataclasses.replace(config, eval=changed)
        examples = data.build_eval(config.data, tokenizer, make_format(model, tokenizer), 0) if with_examples else None
        return make_suite(model, tokenizer, examples, whole, layout, mesh)

    return evaluator, params, tokenizer


@pytest.fixture
def folder(tmp_path):
    write_rows(tmp_path / "words.jsonl", RECORDS)
    return tmp_path


def say(folder, name="words", **given):
    source = Source(f"{folder}/words.jsonl", template=SAY)
    return Task(**{"name": name, "data": source, "metrics": ("rougeL", "exact_match"), "max_new_tokens": 8, **given})


def rank(folder, name="ranked", **given):
    options = "{{completion}} ||| red red ||| who"
    return say(
        folder, name, **{"score": "multiple_choice", "options": options, "metrics": (), "max_new_tokens": 128, **given}
    )


def test_tasks_are_scored_without_other_examples(parts, folder):
    evaluator, params, _ = parts
    scored = evaluator(say(folder), rank(folder, group_by="kind"))(params)
    assert list(scored.metrics) == ["words", "ranked", "ranked/a", "ranked/b"]
    assert scored.errors == {} and scored.advice == ""
    texts = [row for row in scored.predictions if row["task"] == "words"]
    assert [(row["id"], row["prompt"], row["references"]) for row in texts] == [
        (record["id"], record["prompt"], [record["completion"]]) for record in RECORDS
    ]
    expected = metrics.score(
        ["rougeL", "exact_match"], [row["prediction"] for row in texts], [row["references"] for row in texts]
    )
    assert scored.metrics["words"] == expected | {"n": 5.0, "unfinished": 0.0} and expected["rougeL"] > 0
    low, high = scored.intervals["words"]["rougeL"]
    assert low <= expected["rougeL"] <= high


def test_the_option_is_chosen_whose_log_likelihood_is_the_greatest(parts, folder):
    evaluator, params, _ = parts
    scored = evaluator(rank(folder, group_by="kind"))(params)
    right = {}
    for row, record in zip(scored.predictions, RECORDS, strict=True):
        assert row["options"] == [record["completion"], "red red", "who"]
        best = max(range(3), key=lambda i: row["log_likelihoods"][i])
        assert row["prediction"] == row["options"][best]
        assert row["group"] == record["kind"]
        right.setdefault(record["kind"], []).append(100.0 * (row["prediction"] == record["completion"]))
    means = {kind: float(np.mean(each)) for kind, each in right.items()}
    assert scored.metrics["ranked"] == {
        "accuracy": pytest.approx(np.mean([*right["a"], *right["b"]])),
        "n": 5.0,
        "accuracy_macro": pytest.approx((means["a"] + means["b"]) / 2),
    }
    assert scored.metrics["ranked/a"] == {"accuracy": means["a"], "n": 3.0}
    assert list(scored.intervals["ranked"]) == ["accuracy"]


def test_a_log_likelihood_is_the_loss_of_the_option_times_its_tokens(parts, folder):
    """The end mark counts, as in training."""
    evaluator, params, tokenizer = parts
    row = evaluator(rank(folder))(params).predictions[1]
    for option, log_likelihood in zip(row["options"], row["log_likelihoods"], strict=True):
        write_rows(folder / "one.jsonl", [{"prompt": row["prompt"], "completion": option}])
        run = evaluator(rank(folder)).run
        config, model, mesh, format = run.config, run.model, run.mesh, run.format
        sources = dataclasses.replace(config.data, eval=(Source(f"{folder}/one.jsonl"),))
        examples = data.build_eval(sources, tokenizer, format, 0)
        alone = make_suite(model, tokenizer, examples, dataclasses.replace(
            config, eval=dataclasses.replace(config.eval, tasks=(), generate=False)
        ), format.layout(np.array([8]), np.array([4]), (8, 4), sources, 1, lambda shape: 1.0), mesh)  # fmt: skip
        overall = alone(params).metrics["all"]
        tokens = len(tokenizer.encode([option])[0]) + 1
        assert log_likelihood == pytest.approx(-overall["loss"] * tokens, rel=1e-4)
        assert overall["perplexity"] == pytest.approx(math.exp(overall["loss"]), rel=1e-6)


def test_a_perplexity_is_that_of_the_references_by_task_and_group(parts, folder):
    evaluator, params, tokenizer = parts
    perplexity = rank(folder, "likely", score="perplexity", options="", group_by="kind")
    scored = evaluator(perplexity, rank(folder))(params)
    likely = [row for row in scored.predictions if row["task"] == "likely"]
    ranked = [row for row in scored.predictions if row["task"] == "ranked"]
    nats, tokens = {}, {}
    for one, other, record in zip(likely, ranked, RECORDS, strict=True):
        assert "prediction" not in one and one["references"] == [record["completion"]]
        assert one["log_likelihood"] == pytest.approx(other["log_likelihoods"][0], rel=1e-4)
        assert one["tokens"] == len(tokenizer.encode([record["completion"]])[0]) + 1  # the end mark
        for group in ("likely", f"likely/{record['kind']}"):
            nats[group] = nats.get(group, 0) - other["log_likelihoods"][0]
            tokens[group] = tokens.get(group, 0) + one["tokens"]
    for group, total in nats.items():
        loss = total / tokens[group]
        found = scored.metrics[group]
        assert found["loss"] == pytest.approx(loss, rel=1e-4)
        assert found["perplexity"] == pytest.approx(math.exp(loss), rel=1e-3)
        low, high = scored.intervals[group]["perplexity"]
        assert low < found["perplexity"] < high
    macro = (scored.metrics["likely/a"]["perplexity"] + scored.metrics["likely/b"]["perplexity"]) / 2
    assert scored.metrics["likely"]["perplexity_macro"] == pytest.approx(macro)


@pytest.mark.parametrize("normalize, chosen", [("none", "ab"), ("tokens", "abcdef"), ("characters", "longer than all")])
def test_log_likelihoods_are_compared_as_they_are_or_by_the_options_lengths(parts, folder, normalize, chosen):
    evaluator, params, _ = parts
    task = rank(folder, normalize=normalize)
    options = (
        Option("ab", [1], [5]), Option("abcdef", [1], [5] * 4), Option("longer than all", [1], [5, 5]),
    )  # fmt: skip
    example = EvalExample("x", "", "?", [1], ("ab",), options=options)
    ranked = evaluators.MultipleChoice(task, [example], evaluator(task).run)
    ranked._log_probs = lambda params, should_stop: [[-3.0, -8.0, -5.0]]
    found = ranked(params, lambda: False)
    assert found.predictions[0]["prediction"] == chosen
    assert found.metrics["ranked"]["accuracy"] == (100.0 if chosen == "ab" else 0.0)


def test_several_texts_of_a_prompt_are_drawn_and_each_counts(parts, folder):
    evaluator, params, _ = parts
    task = say(folder, samples=3, temperature=1.5, top_p=0.9, seed=3, group_by="kind")
    scored = evaluator(task)(params)
    texts = [row["prediction"] for row in scored.predictions]
    assert all(len(each) == 3 for each in texts) and any(len(set(each)) > 1 for each in texts)
    flat = [(text, row["references"]) for row in scored.predictions for text in row["prediction"]]
    expected = metrics.score(["rougeL"], *map(list, zip(*flat, strict=True)))
    assert scored.metrics["words"]["rougeL"] == pytest.approx(expected["rougeL"]) and scored.metrics["words"]["n"] == 5
    assert scored.intervals == {}  # texts of one prompt are no independent examples
    assert evaluator(task)(params).predictions == scored.predictions
    assert evaluator(dataclasses.replace(task, seed=4))(params).predictions != scored.predictions


def test_a_text_is_cut_at_a_stop_string_and_its_answer_is_what_a_pattern_finds(parts, folder):
    evaluator, params, _ = parts
    whole = [row["prediction"] for row in evaluator(say(folder))(params).predictions]
    assert any(" " in text for text in whole)
    task = say(folder, stop=(" ",), answer=r"[a-z](\w+)", metrics=("exact_match",))
    rows = evaluator(task)(params).predictions
    assert [row["prediction"] for row in rows] == [text.split(" ")[0] for text in whole]
    assert [row["answer"] for row in rows] == [text.split(" ")[0][1:] for text in whole]


@pytest.mark.parametrize(
    "text, pattern, answer",
    [
        ("so the answer is (B).", r"answer is (.*?)\.?(?:\n|$)", "(B)"),
        ("The answer is 3.\nNo, the answer is -219.", r"answer is (.*?)\.?(?:\n|$)", "-219"),
        ("the answer is } ] >.", r"answer is (.*?)\.?(?:\n|$)", "} ] >"),
        ("I do not know", r"answer is (.*)", ""),
        ("a1 b2", r"\w\d", "b2"),
        ("anything", "", "anything"),
        ("x", r"x(y)?", ""),
    ],
)
def test_the_answer_is_the_last_match_of_the_pattern(text, pattern, answer):
    assert evaluators._answer(text, pattern) == answer


OWN = """
def raises(predictions, references):
    raise LookupError("not there")
"""


def test_a_task_that_fails_costs_no_other_its_scores(parts, folder, monkeypatch):
    evaluator, params, _ = parts
    (folder / "own.py").write_text(OWN)
    write_rows(folder / "broken.jsonl", [RECORDS[0] | {"completion": " "}])
    tasks = (
        say(folder, "absent", data=Source(f"{folder}/absent.jsonl")),
        say(folder, "broken", data=Source(f"{folder}/broken.jsonl", template=SAY)),
        say(folder, "long", description="say " * 40),
        say(folder, "unknown", metrics=("rougel",)),
        say(folder, "own", metrics=(f"{folder}/own.py:raises", "rougeL")),
        rank(folder, "fault"),
        rank(folder),
    )
    real = evaluators.Likelihoods

    class Faulty:
        """Raises for the first task that makes one, as a fault of the model's code would."""

        made = 0

        def __new__(cls, *given):
            cls.made += 1
            return cls.fails if cls.made == 1 else real(*given)

        @staticmethod
        def fails(params, requests):
            raise RuntimeError("\nout of memory\nmore")

    monkeypatch.setattr(evaluators, "Likelihoods", Faulty)
    scored = evaluator(*tasks, with_examples=True)(params)
    assert list(scored.metrics) == ["first", "last", "all", "own", "ranked"]
    assert {task for task, reasons in scored.errors.items() if TASK in reasons} == {
        "absent", "broken", "long", "unknown", "fault",
    }  # fmt: skip
    reasons = {task: reasons[TASK] for task, reasons in scored.errors.items() if TASK in reasons}
    assert reasons["absent"].startswith("config.eval.tasks.0.data: data file")
    assert "broken.jsonl, line 1: there is no reference to compare with" in reasons["broken"]
    assert (
        "more than 32; raise config.data.max_source_length or config.eval.tasks.2.max_prompt_length" in reasons["long"]
    )
    assert reasons["unknown"].startswith("the metrics of task unknown: metric 'rougel' is not known; did you mean")
    assert reasons["fault"] == "RuntimeError: out of memory"
    assert "LookupError" in scored.errors["own"][f"{folder}/own.py:raises"]
    assert list(scored.metrics["own"]) == ["rougeL", "n", "unfinished"]
    assert all("\n" not in reason for reason in reasons.values())


def test_examples_that_fail_cost_the_tasks_nothing(parts, folder, monkeypatch):
    evaluator, params, _ = parts
    one = evaluator(rank(folder), with_examples=True)

    def fails(params, should_stop):
        raise RuntimeError("out of memory")

    monkeypatch.setitem(one._evaluators, "all", lambda: fails)
    scored = one(params)
    assert list(scored.metrics) == ["ranked"] and scored.errors == {"all": {TASK: "RuntimeError: out of memory"}}
    alone = evaluator(with_examples=True)
    monkeypatch.setitem(alone._evaluators, "all", lambda: fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        alone(params)


@pytest.mark.parametrize("make", [say, rank])
def test_an_evaluation_stops_between_two_batches(parts, folder, make):
    evaluator, params, _ = parts
    one = evaluator(make(folder), batch_size=1)
    answers = iter([False, False, True])
    with pytest.raises(Stopped):
        one(params, lambda: next(answers))
    assert list(one(params).metrics) == [make(folder).name]  # and may begin anew


def test_an_interruption_is_no_fault_of_a_task(parts, folder):
    evaluator, params, _ = parts

    def interrupted():
        raise Interrupted("now")

    with pytest.raises(Interrupted):
        evaluator(say(folder))(params, interrupted)


def test_examples_are_read_and_compiled_once_for_all_params(parts, folder):
    evaluator, params, _ = parts
    one = evaluator(rank(folder))
    first = one(params)
    (folder / "words.jsonl").unlink()
    assert one(params) == first
    assert one(jax.tree.map(lambda leaf: leaf * 0.5, params)).predictions != first.predictions


def test_prompts_that_were_cut_are_counted(parts, folder):
    evaluator, params, _ = parts
    scored = evaluator(say(folder, description="say " * 40, truncate="start"), say(folder, "whole", truncate="end"))(
        params
    )
    assert (scored.metrics["words"]["truncated"], scored.metrics["whole"]["truncated"]) == (5, 0)
    assert "truncated" not in evaluator(say(folder))(params).metrics["words"]


@pytest.mark.parametrize("new, fits", [(3, True), (4, False)])
def test_a_model_with_learned_positions_refuses_what_it_has_none_for(new, fits):
    model = SimpleNamespace(config=SimpleNamespace(positions=8))
    examples = [EvalExample("x", "", "", [1] * 5, ())]
    if fits:
        evaluators._check_positions(model, examples, [new])
        return
    message = r"^example x: its prompt has 5 tokens, and with 4 more it is too long for the model's 8 positions; use"
    with pytest.raises(UserError, match=message):
        evaluators._check_positions(model, examples, [new])


@pytest.mark.parametrize("name", ["smollm2", "llama2", "mistral_v3", "gemma"])
def test_a_causal_model_s_text_keeps_the_blanks_that_it_begins_with(name):
    tokenizer = checkpoint(name)
    samples = evaluators.Samples.__new__(evaluators.Samples)
    samples._tokenizer, samples._in_context = tokenizer, True
    for text in (" well", "\n  a  b", "Hello"):
        (whole,) = tokenizer.encode(["I am" + text])
        for at in range(1, len(whole)):
            before = tokenizer.decode(whole[:at])
            assert before + samples._decode(whole[:at], whole[at:]) == "I am" + text
